//! What happens some time after a connection ended: delayed wills and the end of sessions.
//!
//! The stores have both durably; this is the node's memory of when. A timer names the connection
//! that it followed, and does nothing if the client has connected since.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use moorline_mqtt::Will;
use moorline_router::{ClientId, Epoch, unix_ms};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::node::Node;

/// What is due.
#[derive(Debug)]
pub(crate) enum Timer {
    /// Publish the will of the connection `epoch`.
    Will {
        client: ClientId,
        epoch: Epoch,
        will: Box<Will>,
    },
    /// End the session if no connection came after `disconnected_at_ms`.
    SessionExpiry {
        client: ClientId,
        disconnected_at_ms: u64,
    },
}

/// Timers in the order of their moments.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    by_time: Mutex<Pending>,
    earlier: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    /// By Unix milliseconds and a number that keeps moments apart.
    timers: BTreeMap<(u64, u64), Timer>,
    /// Delayed wills by client, so that a reconnect finds its own.
    wills: std::collections::HashMap<ClientId, (u64, u64), ahash::RandomState>,
    next: u64,
}

impl Timers {
    pub(crate) fn set(&self, at_ms: u64, timer: Timer) {
        let mut pending = self.by_time.lock();
        pending.next += 1;
        let key = (at_ms, pending.next);
        if let Timer::Will { client, .. } = &timer {
            pending.wills.insert(client.clone(), key);
        }
        pending.timers.insert(key, timer);
        if pending
            .timers
            .first_key_value()
            .is_some_and(|(first, _)| *first == key)
        {
            self.earlier.notify_one();
        }
    }

    /// Takes the delayed will of a client that connects again.
    pub(crate) fn take_will(&self, client: &ClientId) -> Option<(Epoch, Box<Will>)> {
        let mut pending = self.by_time.lock();
        let key = pending.wills.remove(client)?;
        match pending.timers.remove(&key) {
            Some(Timer::Will { epoch, will, .. }) => Some((epoch, will)),
            Some(Timer::SessionExpiry { .. }) | None => None,
        }
    }

    fn take_due(&self, now_ms: u64) -> Result<Timer, Option<u64>> {
        let mut pending = self.by_time.lock();
        let first = pending
            .timers
            .first_key_value()
            .map(|(key, _)| *key)
            .ok_or(None)?;
        if first.0 > now_ms {
            return Err(Some(first.0));
        }
        let timer = pending.timers.remove(&first).expect("looked at above");
        if let Timer::Will { client, .. } = &timer {
            pending.wills.remove(client);
        }
        Ok(timer)
    }
}

/// Waits for timers and carries them out until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    loop {
        match node.timers.take_due(unix_ms()) {
            Ok(Timer::Will {
                client,
                epoch,
                will,
            }) => {
                crate::ending::publish_will(&node, &client, epoch, &will).await;
            }
            Ok(Timer::SessionExpiry {
                client,
                disconnected_at_ms,
            }) => {
                crate::ending::expire_session(&node, &client, disconnected_at_ms).await;
            }
            Err(next_ms) => {
                // A minute at most, so that a step of the machine's clock is noticed.
                let wait = next_ms.map_or(60_000, |at| at.saturating_sub(unix_ms()).min(60_000));
                let sleep = tokio::time::sleep(Duration::from_millis(wait.max(1)));
                tokio::select! {
                    () = sleep => {}
                    () = node.timers.earlier.notified() => {}
                }
            }
        }
    }
}
