//! What happens some time after a connection ended: delayed wills and the end of sessions.
//!
//! The stores have both durably; this is the node's memory of when. A timer names the connection
//! that it followed, and does nothing if the client has connected since.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
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

/// By Unix milliseconds and a number that keeps moments apart.
type Key = (u64, u64);
type KeyByClient = HashMap<ClientId, Key, RandomState>;

#[derive(Debug, Default)]
struct Pending {
    timers: BTreeMap<Key, Timer>,
    /// A client has one timer of each kind: a newer one replaces it.
    wills: KeyByClient,
    expiries: KeyByClient,
    next: u64,
}

impl Pending {
    fn keys_of(&mut self, timer: &Timer) -> (&mut KeyByClient, ClientId) {
        match timer {
            Timer::Will { client, .. } => (&mut self.wills, client.clone()),
            Timer::SessionExpiry { client, .. } => (&mut self.expiries, client.clone()),
        }
    }
}

impl Timers {
    pub(crate) fn set(&self, at_ms: u64, timer: Timer) {
        let mut pending = self.by_time.lock();
        pending.next += 1;
        let key = (at_ms, pending.next);
        let (keys, client) = pending.keys_of(&timer);
        if let Some(replaced) = keys.insert(client, key) {
            pending.timers.remove(&replaced);
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

    /// The session is connected again, or gone.
    pub(crate) fn cancel_expiry(&self, client: &ClientId) {
        let mut pending = self.by_time.lock();
        if let Some(key) = pending.expiries.remove(client) {
            pending.timers.remove(&key);
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
        let (keys, client) = pending.keys_of(&timer);
        keys.remove(&client);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_one_expiry_however_often_it_leaves() {
        let timers = Timers::default();
        let client = ClientId::parse("car-7").unwrap();
        for moment in 1..=3 {
            let timer = Timer::SessionExpiry {
                client: client.clone(),
                disconnected_at_ms: moment,
            };
            timers.set(10 + moment, timer);
        }
        assert!(matches!(timers.take_due(12), Err(Some(13))));
        let due = timers.take_due(13);
        assert!(
            matches!(
                due,
                Ok(Timer::SessionExpiry {
                    disconnected_at_ms: 3,
                    ..
                })
            ),
            "{due:?}"
        );
        assert!(matches!(timers.take_due(u64::MAX), Err(None)));
        timers.set(
            1,
            Timer::SessionExpiry {
                client: client.clone(),
                disconnected_at_ms: 1,
            },
        );
        timers.cancel_expiry(&client);
        assert!(matches!(timers.take_due(u64::MAX), Err(None)));
    }
}
