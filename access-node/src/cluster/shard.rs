//! What the holder of a shard does for its clients while they are on no node: timers, and what the connections of a
//! node that died leave behind.
//!
//! Whoever holds a shard may be frozen and wake up when another has it: whatever is done here is fenced by the epoch
//! of the connection after which it happens, and leaves its timer, or the route of the dead node, in place until it is
//! done. So it may happen twice, and never not.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use moorline_router::{ClientId, DueTimer, Epoch, Route, SessionRecord, StoreError, TimerKind};

use super::departure::{self, Departure, WillFate};
use super::{Membership, publications};
use crate::ending;
use crate::node::{LEASE, Node};
use crate::redispatch;
use crate::restore;

/// Timers, or clients of dead nodes, that are asked for together.
const PAGE: usize = 256;
/// How many of them are seen to at the same time.
const AT_ONCE: usize = 32;
/// Between two pages: with the page a bound of the rate, 1,024 a second and shard.
const PAGE_PAUSE: Duration = Duration::from_millis(250);
/// How long the holder of a shard has to hear of the end of a session.
const HOLDER_TIMEOUT: Duration = Duration::from_secs(2);
/// How late a timer may be that another node has set, or the end of a lease be noticed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Serves `shard` until it is given up.
pub(crate) async fn run(node: Arc<Node>, shard: u16) {
    let Some(cluster) = &node.cluster else { return };
    tokio::join!(
        publications::run(&node, shard),
        timers(&node, cluster, shard),
        stranded(&node, cluster, shard),
    );
}

/// Resolves when this node may do something for clients that seem to be nowhere. After an interruption it waits for one
/// whole lease: others have to come back first.
async fn may_act(cluster: &Membership, shard: u16) {
    while !(cluster.link.is_calm_for(LEASE) && cluster.holdings.has(shard)) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn timers(node: &Arc<Node>, cluster: &Membership, shard: u16) {
    loop {
        may_act(cluster, shard).await;
        let due = cluster.given.shards.due(shard, PAGE).await;
        let Ok(due) = cluster.link.note(due) else {
            continue;
        };
        let is_full = due.timers.len() == PAGE;
        let mut failed = false;
        let mut firing = stream::iter(due.timers)
            .map(|timer| async move { fire(node, cluster, &timer).await.map_err(|e| (timer, e)) })
            .buffer_unordered(AT_ONCE);
        while let Some(fired) = firing.next().await {
            if let Err((timer, error)) = fired {
                failed = true;
                tracing::warn!(client = %timer.client, kind = ?timer.kind, %error, "timer not carried out, trying again");
            }
        }
        let pause = match due.next_in_ms {
            _ if failed => LOOK_EVERY,
            _ if is_full => PAGE_PAUSE,
            Some(next_ms) => Duration::from_millis(next_ms).min(LOOK_EVERY),
            None => LOOK_EVERY,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Carries a timer out, unless the client has connected since. What another node is about is left to it, and the timer in place.
async fn fire(node: &Arc<Node>, cluster: &Membership, timer: &DueTimer) -> Result<(), StoreError> {
    let (client, epoch) = (&timer.client, timer.epoch);
    let route = node.stores.routes.look_up(client).await?;
    // The connection itself may be back as well, where its node was only taken for dead.
    if route.is_none_or(|route| route.epoch < epoch) {
        let fired = match timer.kind {
            TimerKind::Will => publish_will(node, client, epoch).await,
            TimerKind::SessionExpiry => expire(node, cluster, client, epoch).await,
        };
        match fired {
            // A newer connection sees to it.
            Ok(true) | Err(StoreError::Stale { .. }) => {}
            Ok(false) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    let done = cluster.given.shards.cancel_timer(client, timer.kind, epoch);
    done.await
}

/// Publishes the will of `client` if it is that of the connection `epoch` or of an earlier one; says whether it is seen to.
async fn publish_will(
    node: &Arc<Node>,
    client: &ClientId,
    epoch: Epoch,
) -> Result<bool, StoreError> {
    match node.stores.sessions.will(client).await? {
        Some(stored) if stored.epoch <= epoch => {
            let whose = node.id.as_str();
            ending::try_publish_will(node, client, stored.epoch, &stored.will, whose).await
        }
        _ => Ok(true),
    }
}

async fn expire(
    node: &Arc<Node>,
    cluster: &Membership,
    client: &ClientId,
    epoch: Epoch,
) -> Result<bool, StoreError> {
    // Published no later than the session ends [MQTT-3.1.3-9].
    if !publish_will(node, client, epoch).await? {
        return Ok(false);
    }
    end_stored_session(node, client, epoch).await?;
    let shards = &cluster.given.shards;
    shards.cancel_timer(client, TimerKind::Will, epoch).await?;
    tracing::debug!(%client, %epoch, "session expired");
    super::tell_holder(node, client).await;
    Ok(true)
}

/// Ends what the stores have of a session whose last connection was `epoch`.
pub(crate) async fn end_stored_session(
    node: &Arc<Node>,
    client: &ClientId,
    epoch: Epoch,
) -> Result<(), StoreError> {
    // What the holder puts into the inbox afterwards would be there for the session that comes next.
    let sessions = &node.stores.sessions;
    if let Some(record) = sessions.load(client).await?
        && !record.subscriptions.is_empty()
    {
        let subscriptions = Vec::new();
        let unsubscribed = SessionRecord {
            subscriptions,
            ..record
        };
        sessions.save(epoch, unsubscribed).await?;
        let told = super::tell_holder(node, client);
        // Without an answer a few of those may be.
        let _ = tokio::time::timeout(HOLDER_TIMEOUT, told).await;
    }
    // The session is forgotten last: what other members are to get is found by its end alone.
    let shared = node.stores.inboxes.end_session(client, Some(epoch)).await?;
    if shared > 0 {
        redispatch::from_inbox(node, client).await?;
    }
    node.stores.sessions.delete(client, Some(epoch)).await
}

async fn stranded(node: &Arc<Node>, cluster: &Membership, shard: u16) {
    loop {
        may_act(cluster, shard).await;
        let found = cluster.given.shards.stranded(shard, PAGE).await;
        let Ok(found) = cluster.link.note(found) else {
            continue;
        };
        if found.is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
            continue;
        }
        tracing::info!(
            shard,
            clients = found.len(),
            "seeing to clients of a node that is gone"
        );
        stream::iter(found)
            .for_each_concurrent(AT_ONCE, |(client, route)| async move {
                if let Err(error) = strand(node, cluster, &client, &route).await {
                    tracing::warn!(%client, %error, "client of a dead node not seen to, trying again");
                }
            })
            .await;
        tokio::time::sleep(PAGE_PAUSE).await;
    }
}

/// Ends the connection of a node that cannot do so itself: its will and its session become timers, then its route goes.
pub(crate) async fn strand(
    node: &Arc<Node>,
    cluster: &Membership,
    client: &ClientId,
    route: &Route,
) -> Result<(), StoreError> {
    let sessions = &node.stores.sessions;
    let will = sessions.will(client).await?;
    let record = sessions.load(client).await?;
    if let Some(record) = &record {
        restore::note_maybe_sent(node, record).await?;
    }
    let departure = Departure {
        client: client.clone(),
        epoch: route.epoch,
        node: route.node.clone(),
        offline: Some("node_lost"),
        will: match will {
            Some(stored) if stored.epoch <= route.epoch => WillFate::ByTimer(Box::new(stored.will)),
            _ => WillFate::None,
        },
        record,
        tried: false,
    };
    departure::carry_out(node, cluster, &departure).await
}
