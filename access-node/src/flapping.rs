//! Clients that come and go without end, and addresses that open connection after connection: banned
//! for a while, so that they cost no more than a look at a list.
//!
//! A connection counts when it ends, and only if the device or its network ended it: that of a slow
//! device which this node gave up, or one that an operator or a stop of the node closed, does not.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ahash::RandomState;
use dashmap::DashMap;
use moorline_router::ClientId;

use crate::config::Flapping as Limits;

/// Clients whose connections are counted. Beyond it further ones are not.
const CLIENTS_MAX: usize = 131_072;

/// Something that is counted in windows of time.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Window {
    began_s: u32,
    count: u32,
}

impl Window {
    /// Counts one more; gives how many there are in the window.
    pub(crate) fn count(&mut self, now_s: u32, length: Duration) -> u32 {
        if self.is_over(now_s, length) {
            *self = Self {
                began_s: now_s,
                count: 0,
            };
        }
        self.count = self.count.saturating_add(1);
        self.count
    }

    pub(crate) fn is_over(&self, now_s: u32, length: Duration) -> bool {
        self.count == 0 || u64::from(now_s.saturating_sub(self.began_s)) >= length.as_secs()
    }
}

/// How often clients came and went lately.
#[derive(Debug)]
pub(crate) struct FlappingClients {
    limits: Limits,
    hasher: RandomState,
    /// By a keyed hash of the client id: a wrong ban by a collision needs more devices than there are.
    windows: DashMap<u64, Window, RandomState>,
    swept_s: AtomicU32,
}

impl FlappingClients {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            limits: limits.clone(),
            hasher: RandomState::new(),
            windows: DashMap::default(),
            swept_s: AtomicU32::new(0),
        }
    }

    /// Counts the end of a connection; says whether the client is to be banned.
    pub(crate) fn ended(&self, client: &ClientId, now_s: u32) -> bool {
        let connects_max = self.limits.client_connects;
        if connects_max == 0 {
            return false;
        }
        self.sweep(now_s);
        let key = self.hasher.hash_one(client);
        if self.windows.len() >= CLIENTS_MAX && !self.windows.contains_key(&key) {
            return false;
        }
        let mut window = self.windows.entry(key).or_default();
        let flaps = window.count(now_s, self.limits.window) >= connects_max;
        if flaps {
            *window = Window::default();
        }
        flaps
    }

    fn sweep(&self, now_s: u32) {
        let length = self.limits.window;
        let swept_s = self.swept_s.load(Ordering::Relaxed);
        let due = u64::from(now_s.saturating_sub(swept_s)) >= length.as_secs().max(10);
        let mine = || {
            self.swept_s
                .compare_exchange(swept_s, now_s, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        };
        if due && mine() {
            self.windows
                .retain(|_, window| !window.is_over(now_s, length));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(client_connects: u32) -> FlappingClients {
        FlappingClients::new(&Limits {
            client_connects,
            window: Duration::from_secs(60),
            ..Limits::default()
        })
    }

    fn id(text: &str) -> ClientId {
        ClientId::parse(text).unwrap()
    }

    #[test]
    fn whoever_comes_and_goes_too_often_in_the_window_is_told_apart() {
        let clients = clients(3);
        let flaps = |now_s| clients.ended(&id("a"), now_s);
        assert_eq!([flaps(0), flaps(1), flaps(59)], [false, false, true]);
        assert_eq!([flaps(60), flaps(61), flaps(130)], [false, false, false]);
        assert!(!clients.ended(&id("b"), 130));
        assert_eq!([flaps(131), flaps(132)], [false, true]);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_forgotten() {
        let flapping = clients(2);
        for number in 0..CLIENTS_MAX + 100 {
            assert!(!flapping.ended(&id(&number.to_string()), 1));
        }
        assert_eq!(flapping.windows.len(), CLIENTS_MAX);
        flapping.ended(&id("a"), 100);
        assert_eq!(flapping.windows.len(), 1);
        let off = clients(0);
        assert!((0..100).all(|_| !off.ended(&id("a"), 1)));
        assert!(off.windows.is_empty());
    }
}
