//! Which partitions are this worker's: all workers are known in Redis for the time of a lease, and partition i belongs to
//! number i modulo their count.
//!
//! This only spreads the work. That no two workers have one partition at a time is seen to by the broker, which has a single active
//! consumer for each queue.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::redis::RedisStore;

const RENEW: Duration = Duration::from_secs(3);
const LEASE: Duration = Duration::from_secs(10);
/// A worker that cannot find out takes everything: better waiting behind another one than nobody.
const GIVE_UP_ASKING: Duration = Duration::from_secs(10);

/// A worker's number and how many there are.
type Share = Option<(usize, usize)>;

pub(super) struct Spread {
    worker: String,
    store: Arc<RedisStore>,
    share: watch::Receiver<Share>,
    task: JoinHandle<()>,
}

impl Spread {
    pub(super) fn start(worker: String, store: Arc<RedisStore>) -> Self {
        let (sender, share) = watch::channel(None);
        let task = tokio::spawn(keep(worker.clone(), Arc::clone(&store), sender));
        Self {
            worker,
            store,
            share,
            task,
        }
    }

    pub(super) fn is_mine(&self, partition: u16) -> bool {
        belongs(*self.share.borrow(), partition)
    }

    /// Resolves when it is the worker's, at once if it is now.
    pub(super) async fn mine(&self, partition: u16) {
        let mut share = self.share.clone();
        let mine = share.wait_for(|share| belongs(*share, partition));
        // An error says that the task has ended, and the process with it.
        let _ = mine.await;
    }

    /// Resolves when it is not the worker's any more.
    pub(super) async fn lost(&self, partition: u16) {
        let mut share = self.share.clone();
        let lost = share.wait_for(|share| !belongs(*share, partition));
        let has_ended = lost.await.is_err();
        if has_ended {
            std::future::pending::<()>().await;
        }
    }

    /// Says goodbye, so that others take over at once.
    pub(super) async fn leave(&self) {
        self.task.abort();
        if let Err(error) = self.store.forget_worker(&self.worker).await {
            tracing::debug!(%error, "a worker could not say goodbye, its lease will end");
        }
    }
}

impl Drop for Spread {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn belongs(share: Share, partition: u16) -> bool {
    share.is_some_and(|(number, count)| usize::from(partition) % count.max(1) == number)
}

fn share_of(worker: &str, mut workers: Vec<String>) -> Share {
    workers.sort_unstable();
    let number = workers.iter().position(|known| known == worker)?;
    Some((number, workers.len()))
}

async fn keep(worker: String, store: Arc<RedisStore>, share: watch::Sender<Share>) {
    let started = Instant::now();
    let mut before = None;
    loop {
        match store.renew_worker(&worker, LEASE).await {
            Ok(workers) => {
                let now = share_of(&worker, workers);
                let known = *share.borrow();
                // After an outage of Redis the workers come back one by one: what is seen twice is believed.
                if now != known && (known.is_none() || now == before) {
                    tracing::info!(share = ?now, "partitions of upstream queues are spread anew");
                    share.send_replace(now);
                }
                before = now;
            }
            Err(_) if share.borrow().is_none() && started.elapsed() > GIVE_UP_ASKING => {
                share.send_replace(Some((0, 1)));
            }
            // Whoever had a partition keeps it.
            Err(error) => tracing::debug!(%error, "the workers cannot be asked for"),
        }
        sleep(RENEW).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_spread_evenly_and_each_has_one_worker() {
        let workers: Vec<String> = ["c", "a", "b"].map(String::from).into();
        let mut taken = [0; 3];
        for partition in 0..12 {
            let owners: Vec<_> = workers
                .iter()
                .map(|worker| share_of(worker, workers.clone()))
                .enumerate()
                .filter(|(_, share)| belongs(*share, partition))
                .collect();
            assert_eq!(owners.len(), 1);
            taken[owners[0].0] += 1;
        }
        assert_eq!(taken, [4, 4, 4]);
        assert_eq!(share_of("x", workers), None);
        assert!(!belongs(None, 0));
    }
}
