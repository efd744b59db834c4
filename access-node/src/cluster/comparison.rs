//! Comparing the connections of this node with the stores.
//!
//! Two things may have happened that nobody told the node of: a message was put into an inbox, and the hint got lost; or
//! a connection is no longer the client's. Every connection is compared twice a minute (see [`crate::deadlines`]),
//! and all of them soon after the lease or the link to the store was interrupted. A store that has been emptied gets what the
//! node knows of each connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use moorline_router::{ClientId, Epoch, ReceivedPublish, Standing};
use tokio::sync::Notify;

use super::Membership;
use crate::close_reason::CloseReason;
use crate::connection::{Connection, PendingAnswer};
use crate::deadlines;
use crate::node::Node;
use crate::session::Session;
use crate::wire::RESTORE;

/// Connections that are compared together.
pub(crate) const PAGE: usize = 256;
/// Between two pages of a pass: 2,000 connections a second.
const PAGE_PAUSE: Duration = Duration::from_millis(128);
/// Between two passes.
const PASS_PAUSE: Duration = Duration::from_secs(3);
/// Until what the store did not take is written again.
const RETRY: Duration = Duration::from_secs(1);

/// Whether a pass over all connections is wanted.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    wanted: Notify,
    /// The lease had ended: others may have taken the devices for offline.
    lapsed: AtomicBool,
}

impl Comparison {
    pub(crate) fn ask(&self, lapsed: bool) {
        self.lapsed.fetch_or(lapsed, Ordering::AcqRel);
        self.wanted.notify_one();
    }
}

/// Passes over all connections when that is asked for, until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    loop {
        cluster.comparison.wanted.notified().await;
        let lapsed = cluster.comparison.lapsed.swap(false, Ordering::AcqRel);
        let held: Vec<(Arc<Session>, Epoch)> = node
            .sessions
            .iter()
            .filter_map(|session| {
                let epoch = session.lock().link.as_ref()?.epoch;
                Some((Arc::clone(&session), epoch))
            })
            .collect();
        tracing::info!(
            connections = held.len(),
            "comparing every connection with the store"
        );
        for page in held.chunks(PAGE) {
            deadlines::reconcile(&node, page).await;
            compare(&node, cluster, page, lapsed).await;
            tokio::time::sleep(PAGE_PAUSE).await;
        }
        tokio::time::sleep(PASS_PAUSE).await;
    }
}

/// Asks the store for the standing of connections, and does what follows from it. An unreachable store is noted: that asks for
/// another pass.
pub(crate) async fn compare(
    node: &Arc<Node>,
    cluster: &Membership,
    held: &[(Arc<Session>, Epoch)],
    lapsed: bool,
) {
    let asked: Vec<(ClientId, Epoch)> = held
        .iter()
        .map(|(session, epoch)| (session.client.clone(), *epoch))
        .collect();
    let standings = node.stores.routes.reconcile(&node.id, &asked).await;
    let Ok(standings) = cluster.link.note(standings) else {
        if lapsed {
            cluster.comparison.lapsed.store(true, Ordering::Release);
        }
        return;
    };
    for ((session, epoch), standing) in held.iter().zip(standings) {
        match standing {
            Standing::Owned => {}
            Standing::Restored => {
                let client = &session.client;
                tracing::debug!(%client, %epoch, "connection made known to the store again");
                if let Some(link) = session.lock().link_of(*epoch) {
                    link.wire.signal(RESTORE);
                }
                if lapsed {
                    cluster.say_online(node, client, *epoch);
                }
            }
            Standing::Lost { current } => {
                let client = &session.client;
                tracing::debug!(%client, %epoch, %current, "connection is no longer the client's");
                if let Some(link) = session.lock().link_of(*epoch) {
                    link.close(CloseReason::TakenOver);
                }
            }
        }
    }
}

impl Connection {
    /// Writes what the stores are to have of this connection: they have lost it, or somebody took the device for gone.
    pub(crate) fn restore(&mut self) -> Result<(), CloseReason> {
        self.wire.clear(RESTORE);
        let node = Arc::clone(&self.node);
        let Some(cluster) = &node.cluster else {
            return Ok(());
        };
        let (client, epoch) = (self.session.client.clone(), self.epoch);
        let (record, will) = {
            let mut state = self.session.lock();
            let Some(link) = state.link_of(epoch) else {
                return Err(CloseReason::TakenOver);
            };
            let will = link.will.clone();
            (state.stored.then(|| state.record(&client)), will)
        };
        let sessions = &node.stores.sessions;
        let is_stored = record.is_some();
        let mut writes = Vec::new();
        let shards = &cluster.given.shards;
        writes.push(shards.cancel_timer(&client, moorline_router::TimerKind::Will, epoch));
        writes.push(shards.cancel_timer(&client, moorline_router::TimerKind::SessionExpiry, epoch));
        writes.extend(record.map(|record| sessions.save(epoch, record)));
        writes.extend(will.map(|will| {
            let will = moorline_router::StoredWill { epoch, will: *will };
            sessions.save_will(&client, will)
        }));
        for (packet_id, received) in &self.received {
            if let Some(message_id) = received.message_id.clone() {
                let received = ReceivedPublish {
                    packet_id: *packet_id,
                    message_id,
                    // Nobody waits for the answer to a first one that is still in the line.
                    done: received.done && self.pending.is_empty(),
                };
                writes.push(sessions.save_received(&client, epoch, received));
            }
        }
        let wire = Arc::clone(&self.wire);
        let node = Arc::clone(&self.node);
        let restored = Box::pin(async move {
            for write in writes {
                match write.await {
                    Ok(()) => {}
                    Err(error @ moorline_router::StoreError::Stale { .. }) => return Err(error),
                    Err(error) => {
                        // What is to be written may be something else by then.
                        tracing::debug!(%client, %error, "connection not made known, trying again");
                        tokio::time::sleep(RETRY).await;
                        wire.signal(RESTORE);
                        return Ok(());
                    }
                }
            }
            if is_stored {
                super::tell_holder(&node, &client).await;
            }
            Ok(())
        });
        self.put_in_line(Some(restored), PendingAnswer::Encoded(bytes::Bytes::new()));
        Ok(())
    }
}
