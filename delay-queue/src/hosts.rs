//! How many calls go to one host at the same time: a slow backend takes no more than its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Hosts that are remembered without a call under way.
const IDLE_MAX: usize = 1_024;

/// The calls under way, by host.
pub(crate) struct Hosts {
    each: usize,
    by_host: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Hosts {
    /// At most `each` calls to one host.
    pub(crate) fn new(each: usize) -> Self {
        Self {
            each,
            by_host: Mutex::default(),
        }
    }

    /// Waits for its turn; those that wait get it in the order in which they came.
    pub(crate) async fn turn(&self, host: &str) -> OwnedSemaphorePermit {
        let semaphore = self.of(host);
        semaphore.acquire_owned().await.expect("never closed")
    }

    fn of(&self, host: &str) -> Arc<Semaphore> {
        let mut by_host = self.by_host.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(semaphore) = by_host.get(host) {
            return Arc::clone(semaphore);
        }
        if by_host.len() >= IDLE_MAX {
            by_host.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
        }
        let semaphore = Arc::new(Semaphore::new(self.each));
        by_host.insert(host.to_owned(), Arc::clone(&semaphore));
        semaphore
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_host_has_no_more_than_its_own_and_takes_nothing_from_others() {
        let hosts = Hosts::new(2);
        let _busy = [hosts.turn("a").await, hosts.turn("a").await];
        tokio::select! {
            biased;
            _ = hosts.turn("a") => panic!("a third call"),
            _ = hosts.turn("b") => {}
        }
        for n in 0..3 * IDLE_MAX {
            drop(hosts.turn(&n.to_string()).await);
        }
        assert!(hosts.by_host.lock().unwrap().len() <= IDLE_MAX);
        assert!(
            hosts.by_host.lock().unwrap().contains_key("a"),
            "it has calls"
        );
    }
}
