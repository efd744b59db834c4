//! The slow clock of the node: keep alive, unacknowledged messages, lost hints.
//!
//! A connection is looked at when its next deadline is due and at least every 30 s, not when a
//! packet comes: a packet only notes the time. The wheel holds weak references, so a closed
//! connection costs its slot for half a minute at most.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use moorline_router::{ClientId, Epoch, unix_ms};
use parking_lot::Mutex;

use crate::close_reason::CloseReason;
use crate::cluster::comparison;
use crate::node::Node;
use crate::session::{Link, Session, State};
use crate::wire::UNREAD;

/// Seconds after which every connection is looked at, whatever its deadlines.
const LOOK_EVERY_S: u32 = 30;
/// Seconds between two looks for retained messages that expired.
const RETAINED_SWEEP_S: u32 = 60;
const SLOTS: u32 = LOOK_EVERY_S + 2;

/// Seconds since the node started.
#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
        }
    }

    pub(crate) fn now_s(&self) -> u32 {
        u32::try_from(self.started.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

struct Watched {
    session: Weak<Session>,
    epoch: Epoch,
}

/// Connections by the second in which they are looked at next.
pub(crate) struct Wheel {
    slots: Box<[Mutex<Vec<Watched>>]>,
}

impl Wheel {
    pub(crate) fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Mutex::default()).collect(),
        }
    }

    /// Watches a new connection.
    pub(crate) fn watch(
        &self,
        session: &Arc<Session>,
        epoch: Epoch,
        now_s: u32,
        keep_alive_s: u16,
    ) {
        // Spread by the epoch, so that a storm of connects is not a storm of looks.
        let spread = 1 + u32::try_from(epoch.0 % u64::from(LOOK_EVERY_S)).expect("below 30");
        let expires_s = session.lock().link.as_ref().and_then(credentials_left_s);
        let after = [keep_alive_deadline(keep_alive_s), expires_s]
            .into_iter()
            .flatten()
            .fold(spread, u32::min)
            .max(1);
        self.put(
            Watched {
                session: Arc::downgrade(session),
                epoch,
            },
            now_s + after,
        );
    }

    fn put(&self, watched: Watched, at_s: u32) {
        self.slots[(at_s % SLOTS) as usize].lock().push(watched);
    }

    /// Looks at what is due in the second `now_s`; returns the sessions whose inbox is to be
    /// compared with what they have read.
    fn turn(&self, now_s: u32, node: &Node) -> Vec<(Arc<Session>, Epoch)> {
        let due = std::mem::take(&mut *self.slots[(now_s % SLOTS) as usize].lock());
        let mut idle = Vec::new();
        for watched in due {
            let Some(session) = watched.session.upgrade() else {
                continue;
            };
            let mut state = session.lock();
            let Some(next) = look(&mut state, watched.epoch, now_s, node) else {
                continue;
            };
            // Nobody else looks whether the connection is still the client's.
            let reads = !state.inbox.behind || node.cluster.is_some();
            drop(state);
            if reads {
                idle.push((Arc::clone(&session), watched.epoch));
            }
            self.put(watched, next.clamp(now_s + 1, now_s + LOOK_EVERY_S));
        }
        idle
    }
}

fn keep_alive_deadline(keep_alive_s: u16) -> Option<u32> {
    // One and a half times the keep alive [MQTT-3.1.2-24]. The clock counts whole seconds: one more
    // keeps a device that is just in time.
    (keep_alive_s > 0).then(|| u32::from(keep_alive_s) * 3 / 2 + 1)
}

/// Seconds until the device's credentials end, rounded up; `None` where they do not. By the clock of
/// the machine, which is what a token names.
fn credentials_left_s(link: &Link) -> Option<u32> {
    let at_ms = link.identity.as_ref()?.expires_at_ms?;
    let left_s = at_ms.saturating_sub(unix_ms()).div_ceil(1000);
    Some(u32::try_from(left_s).unwrap_or(u32::MAX))
}

/// Closes what is overdue; else says when to look again, `None` where the connection is gone.
fn look(state: &mut State, epoch: Epoch, now_s: u32, node: &Node) -> Option<u32> {
    let oldest_s = state.in_flight.iter().map(|sent| sent.sent_s).min();
    let link = state.link_of(epoch)?;
    if link.closing.is_some() {
        return None;
    }
    let last_s = match link.wire.is_signalled(UNREAD) {
        true => now_s,
        false => link.wire.last_received_s(),
    };
    let mut next_s = u32::MAX;
    if let Some(left_s) = credentials_left_s(link) {
        if left_s == 0 {
            link.close(CloseReason::CredentialsExpired);
            return None;
        }
        next_s = now_s.saturating_add(left_s);
    }
    if let Some(after) = keep_alive_deadline(link.keep_alive_s) {
        let silent_s = last_s + after;
        if silent_s <= now_s {
            link.close(CloseReason::KeepAliveTimeout);
            return None;
        }
        next_s = next_s.min(silent_s);
    }
    if let Some(oldest_s) = oldest_s {
        let whole = |limit: Duration| u32::try_from(limit.as_secs()).unwrap_or(u32::MAX / 2) + 1;
        let dead_s = oldest_s.max(last_s) + whole(node.config.ack_timeout);
        let slow_s = oldest_s + whole(node.config.slow_ack_timeout);
        if dead_s.min(slow_s) <= now_s {
            link.close(CloseReason::AckTimeout);
            return None;
        }
        next_s = next_s.min(dead_s).min(slow_s);
    }
    Some(next_s)
}

/// Turns the wheel until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let mut turned_s = node.clock.now_s();
    let mut every = tokio::time::interval(Duration::from_secs(1));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let now_s = node.clock.now_s();
        // A stalled process must not skip slots.
        while turned_s < now_s {
            turned_s += 1;
            if turned_s.is_multiple_of(RETAINED_SWEEP_S) {
                sweep_retained(&node);
            }
            let idle = node.wheel.turn(turned_s, &node);
            for page in idle.chunks(comparison::PAGE) {
                reconcile(&node, page).await;
                if let Some(cluster) = &node.cluster {
                    comparison::compare(&node, cluster, page, false).await;
                }
            }
        }
    }
}

/// Gives back the room of retained messages that expired; nobody is handed one meanwhile.
fn sweep_retained(node: &Node) {
    let store = &node.stores.retained;
    node.retained.remove_expired(|topic| {
        if node.cluster.is_some() {
            // Another node may have set it anew.
            return;
        }
        // A lost removal is made up for by the next start, which finds it expired again.
        drop(store.set(topic, None, None));
    });
}

/// Finds entries whose hint was lost, with its sender or on its way.
pub(crate) async fn reconcile(node: &Node, idle: &[(Arc<Session>, Epoch)]) {
    if idle.is_empty() {
        return;
    }
    let clients: Vec<ClientId> = idle
        .iter()
        .map(|(session, _)| session.client.clone())
        .collect();
    // An unreachable store is reported by itself; the next pass comes in 30 s.
    let Ok(tails) = node.stores.inboxes.tails(&clients).await else {
        return;
    };
    for ((session, epoch), tail) in idle.iter().zip(tails) {
        let Some(tail) = tail else { continue };
        let mut state = session.lock();
        if state.link_of(*epoch).is_some() && !state.inbox.behind && tail > state.inbox.read_to {
            node.metrics.reconciled.increment(1);
            state.inbox.heard = state.inbox.heard.max(tail);
            state.inbox.behind = true;
            state.call_for_page();
        }
    }
}
