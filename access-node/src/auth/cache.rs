//! What was found out about credentials a short while ago, so that a storm of reconnects does not
//! ask and hash again. Credentials are not in it, only their keyed hash.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use ahash::RandomState;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

/// Stands for credentials; worthless without the key of this process.
pub(crate) type Fingerprint = [u8; 32];

/// The key of the hashes: random, and gone with the process.
pub(crate) struct Hasher {
    key: [u8; 32],
}

impl Hasher {
    pub(crate) fn new() -> std::io::Result<Self> {
        let mut key = [0; 32];
        let mut source = std::fs::File::open("/dev/urandom")?;
        std::io::Read::read_exact(&mut source, &mut key)?;
        Ok(Self { key })
    }

    /// The hash of all `parts`; each is told apart from its neighbours, and "absent" from "empty".
    pub(crate) fn fingerprint(&self, parts: &[Option<&[u8]>]) -> Fingerprint {
        let mut hash = Sha256::new_with_prefix(self.key);
        for part in parts {
            let length = part.map_or(u64::MAX, |bytes| bytes.len() as u64);
            hash.update(length.to_be_bytes());
            hash.update(part.unwrap_or_default());
        }
        // With the key once more behind the text, a hash cannot be continued.
        hash.update(self.key);
        hash.finalize().into()
    }
}

/// Answers by fingerprint; when full, the oldest go first.
pub(crate) struct Cache<V> {
    entries_max: usize,
    held: Mutex<Held<V>>,
}

struct Held<V> {
    by_fingerprint: HashMap<Fingerprint, Kept<V>, RandomState>,
    /// In the order in which they came, with their numbers; some have been replaced since.
    order: VecDeque<(Fingerprint, u64)>,
    next: u64,
}

struct Kept<V> {
    value: V,
    until: Instant,
    number: u64,
}

impl<V: Clone> Cache<V> {
    pub(crate) fn new(entries_max: usize) -> Self {
        Self {
            entries_max,
            held: Mutex::new(Held {
                by_fingerprint: HashMap::default(),
                order: VecDeque::new(),
                next: 0,
            }),
        }
    }

    pub(crate) fn get(&self, fingerprint: &Fingerprint, now: Instant) -> Option<V> {
        let held = self.held.lock();
        let kept = held.by_fingerprint.get(fingerprint)?;
        (kept.until > now).then(|| kept.value.clone())
    }

    pub(crate) fn put(&self, fingerprint: Fingerprint, value: V, ttl: Duration, now: Instant) {
        if ttl.is_zero() || self.entries_max == 0 {
            return;
        }
        let mut held = self.held.lock();
        held.next += 1;
        let number = held.next;
        let kept = Kept {
            value,
            until: now + ttl,
            number,
        };
        held.by_fingerprint.insert(fingerprint, kept);
        held.order.push_back((fingerprint, number));
        held.make_room(self.entries_max, now);
    }
}

impl<V> Held<V> {
    /// Drops what is too much, and what has ended and stands in front.
    fn make_room(&mut self, entries_max: usize, now: Instant) {
        while let Some((fingerprint, number)) = self.order.front() {
            let current = self.by_fingerprint.get(fingerprint);
            let current = current.filter(|kept| kept.number == *number);
            let is_over = current.is_none_or(|kept| kept.until <= now);
            if !is_over && self.order.len() <= entries_max {
                return;
            }
            if current.is_some() {
                self.by_fingerprint.remove(fingerprint);
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_apart_and_keys_differ() {
        let hasher = Hasher::new().unwrap();
        let of = |parts: &[Option<&[u8]>]| hasher.fingerprint(parts);
        assert_eq!(
            of(&[Some(b"ab"), Some(b"c")]),
            of(&[Some(b"ab"), Some(b"c")])
        );
        assert_ne!(
            of(&[Some(b"ab"), Some(b"c")]),
            of(&[Some(b"a"), Some(b"bc")])
        );
        assert_ne!(of(&[Some(b"a"), None]), of(&[Some(b"a"), Some(b"")]));
        let other = Hasher::new().unwrap();
        assert_ne!(of(&[Some(b"a")]), other.fingerprint(&[Some(b"a")]));
    }

    #[test]
    fn entries_end_in_time_and_in_number() {
        let cache = Cache::new(2);
        let now = Instant::now();
        let ttl = Duration::from_secs(10);
        for number in 0..3u8 {
            cache.put([number; 32], number, ttl, now);
        }
        assert_eq!(cache.get(&[0; 32], now), None, "the oldest made room");
        assert_eq!(cache.get(&[2; 32], now), Some(2));
        assert_eq!(cache.get(&[2; 32], now + ttl), None);
        for round in 0..100 {
            cache.put([1; 32], round, ttl, now);
        }
        let held = cache.held.lock();
        assert!(held.order.len() <= 2 && held.by_fingerprint.len() <= 2);
        drop(held);
        assert_eq!(cache.get(&[1; 32], now), Some(99));
    }
}
