//! The key-value store below, reduced to what is used of it: ordered bytes, consistent reads, and
//! one atomic batch at a time from one thread.
//!
//! One keyspace holds everything: idle keyspaces would pin journals. Nothing here knows what a key means.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fjall::config::PartitioningPolicy;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, Readable, Slice, Snapshot};

use crate::StoreError;

/// Bounds what has to be replayed at a start.
const JOURNAL_BYTES_MAX: u64 = 128 << 20;
const MEMTABLE_BYTES_MAX: u64 = 16 << 20;
/// The store would put a writer to sleep at four, for ever if its flusher died meanwhile.
const SEALED_MEMTABLES_MAX: usize = 3;
const BACKPRESSURE_MAX: Duration = Duration::from_secs(10);

pub(super) fn unavailable(error: impl std::fmt::Display) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

/// What the engine says, in words for whoever reads a log line or an answer.
fn failed(error: fjall::Error) -> StoreError {
    match error {
        fjall::Error::Io(error) | fjall::Error::Storage(fjall::LsmError::Io(error)) => {
            unavailable(format_args!("disk: {error}"))
        }
        fjall::Error::Poisoned => unavailable("disk: an earlier write in the background failed"),
        other => unavailable(other),
    }
}

/// Where a value can be asked for: the engine, or the engine under changes not yet committed.
pub(super) trait Lookup {
    /// The newest value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Slice>, StoreError>;
}

/// Filters and indexes are read in parts of 4 KiB. As a whole those of a large table are a megabyte, and with millions of keys they
/// are more than the cache: every look-up would then read a megabyte. Those of the first level stay in memory.
fn below_the_first_level() -> PartitioningPolicy {
    PartitioningPolicy::new([false, true])
}

/// An open store.
pub(super) struct Engine {
    database: Database,
    keyspace: Keyspace,
}

impl Engine {
    pub(super) fn open(path: &Path, cache_bytes: u64) -> Result<Self, fjall::Error> {
        let database = Database::builder(path)
            .cache_size(cache_bytes)
            .max_journaling_size(JOURNAL_BYTES_MAX)
            .manual_journal_persist(true)
            .worker_threads(2)
            .open()?;
        let keyspace = database.keyspace("main", || {
            KeyspaceCreateOptions::default()
                .max_memtable_size(MEMTABLE_BYTES_MAX)
                .filter_block_partitioning_policy(below_the_first_level())
                .index_block_partitioning_policy(below_the_first_level())
        })?;
        Ok(Self { database, keyspace })
    }

    /// A view of everything committed so far.
    pub(super) fn view(&self) -> View {
        View {
            snapshot: self.database.snapshot(),
            keyspace: self.keyspace.clone(),
        }
    }

    /// Writes all of `staged` or nothing. Without `sync` it survives the process, not the machine.
    pub(super) fn commit(&self, staged: Staged, sync: bool) -> Result<(), StoreError> {
        self.wait_for_flushes()?;
        let mode = if sync {
            PersistMode::SyncData
        } else {
            PersistMode::Buffer
        };
        let mut batch = self.database.batch().durability(Some(mode));
        for (key, value) in staged.changes {
            match value {
                Some(value) => batch.insert(&self.keyspace, key, value),
                None => batch.remove(&self.keyspace, key),
            }
        }
        batch.commit().map_err(failed)
    }

    /// Makes everything durable that was committed without.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.database.persist(PersistMode::SyncAll).map_err(failed)
    }

    /// Holds the writer back here, where a flusher that died is noticed.
    #[expect(
        clippy::disallowed_methods,
        reason = "the writer thread is no runtime thread"
    )]
    fn wait_for_flushes(&self) -> Result<(), StoreError> {
        let began = Instant::now();
        while self.keyspace.sealed_memtable_count() >= SEALED_MEMTABLES_MAX {
            self.database.persist(PersistMode::Buffer).map_err(failed)?;
            if began.elapsed() > BACKPRESSURE_MAX {
                return Err(unavailable(
                    "the disk does not keep up with what is written",
                ));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Lookup for Engine {
    fn get(&self, key: &[u8]) -> Result<Option<Slice>, StoreError> {
        self.keyspace.get(key).map_err(failed)
    }
}

/// A consistent view. Short-lived: it keeps old data from being dropped.
pub(super) struct View {
    snapshot: Snapshot,
    keyspace: Keyspace,
}

impl View {
    /// Pairs from `from` up to, without, `to`.
    pub(super) fn range(&self, from: Bound<Vec<u8>>, to: Vec<u8>) -> Pairs {
        // An empty range must not reach the tree, which takes it for a mistake.
        let empty = match &from {
            Bound::Included(from) | Bound::Excluded(from) => *from >= to,
            Bound::Unbounded => false,
        };
        let range = (from, Bound::Excluded(to));
        Pairs((!empty).then(|| self.snapshot.range(&self.keyspace, range)))
    }

    /// The last pair from `from` up to, without, `to`.
    pub(super) fn last(
        &self,
        from: Vec<u8>,
        to: Vec<u8>,
    ) -> Result<Option<(Slice, Slice)>, StoreError> {
        let range = (Bound::Included(from), Bound::Excluded(to));
        let last = self.snapshot.range(&self.keyspace, range).next_back();
        last.map(|guard| guard.into_inner().map_err(failed))
            .transpose()
    }
}

impl Lookup for View {
    fn get(&self, key: &[u8]) -> Result<Option<Slice>, StoreError> {
        self.snapshot.get(&self.keyspace, key).map_err(failed)
    }
}

/// Keys and values in order.
pub(super) struct Pairs(Option<fjall::Iter>);

impl Iterator for Pairs {
    type Item = Result<(Slice, Slice), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let guard = self.0.as_mut()?.next()?;
        Some(guard.into_inner().map_err(failed))
    }
}

/// Changes that become visible and durable together.
#[derive(Default)]
pub(super) struct Staged {
    changes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Staged {
    pub(super) fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.changes.insert(key, Some(value));
    }

    pub(super) fn delete(&mut self, key: Vec<u8>) {
        self.changes.insert(key, None);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.changes.len()
    }

    /// The staged value of `key`, or what the engine has.
    pub(super) fn get(&self, engine: &Engine, key: &[u8]) -> Result<Option<Slice>, StoreError> {
        match self.changes.get(key) {
            Some(value) => Ok(value.as_deref().map(Slice::from)),
            None => engine.get(key),
        }
    }

    /// The first keys from `from` up to, without, `to`, staged changes included; at most `limit`.
    pub(super) fn first_keys(
        &self,
        engine: &Engine,
        from: Bound<Vec<u8>>,
        to: Vec<u8>,
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        if let Bound::Included(from) | Bound::Excluded(from) = &from
            && *from >= to
        {
            return Ok(Vec::new());
        }
        let mut stored = engine.view().range(from.clone(), to.clone()).peekable();
        let mut changed = self.changes.range((from, Bound::Excluded(to))).peekable();
        let mut keys = Vec::new();
        while keys.len() < limit {
            let stored_first = match (stored.peek(), changed.peek()) {
                (None, None) => break,
                (Some(Err(error)), _) => return Err(error.clone()),
                (Some(Ok((stored, _))), Some((changed, _))) => **stored < ***changed,
                (Some(Ok(_)), None) => true,
                (None, Some(_)) => false,
            };
            if stored_first {
                keys.extend(stored.next().transpose()?.map(|(key, _)| key.to_vec()));
            } else if let Some((key, value)) = changed.next() {
                stored.next_if(|pair| pair.as_ref().is_ok_and(|(stored, _)| **stored == **key));
                keys.extend(value.is_some().then(|| key.clone()));
            }
        }
        Ok(keys)
    }

    /// Keys from `from` up to, without, `to`, staged changes included.
    pub(super) fn keys(
        &self,
        engine: &Engine,
        from: Vec<u8>,
        to: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut keys = BTreeMap::new();
        for pair in engine
            .view()
            .range(Bound::Included(from.clone()), to.clone())
        {
            keys.insert(pair?.0.to_vec(), ());
        }
        for (key, value) in self.changes.range(from..to) {
            match (keys.entry(key.clone()), value) {
                (Entry::Occupied(entry), None) => {
                    entry.remove();
                }
                (Entry::Vacant(entry), Some(_)) => {
                    entry.insert(());
                }
                _ => {}
            }
        }
        Ok(keys.into_keys().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_keys_are_those_that_will_be_there_after_the_commit() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Engine::open(dir.path(), 1 << 20).unwrap();
        let key = |n: u8| vec![b'k', n];
        let mut staged = Staged::default();
        for n in (0..60).step_by(2) {
            staged.put(key(n), Vec::new());
        }
        engine.commit(staged, false).unwrap();
        let mut staged = Staged::default();
        for n in (0..60).step_by(3) {
            staged.put(key(n), vec![n]);
        }
        for n in (0..60).step_by(4) {
            staged.delete(key(n));
        }
        for (from, to) in [(0, 60), (0, 1), (1, 30), (17, 59), (30, 30), (40, 20)] {
            let all = staged
                .keys(&engine, key(from), key(to).max(key(from)))
                .unwrap();
            for limit in [0, 1, 2, 7, 100] {
                for skip_first in [false, true] {
                    let (bound, expected): (_, Vec<_>) = match skip_first {
                        false => (Bound::Included(key(from)), all.iter().collect()),
                        true => (
                            Bound::Excluded(key(from)),
                            all.iter().filter(|other| **other != key(from)).collect(),
                        ),
                    };
                    let found = staged.first_keys(&engine, bound, key(to), limit).unwrap();
                    let expected: Vec<_> = expected.into_iter().take(limit).cloned().collect();
                    assert_eq!(found, expected, "{from} to {to}, {limit}");
                }
            }
        }
    }
}
