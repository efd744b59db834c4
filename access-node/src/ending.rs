//! How connections and sessions end: the will, the route, and what the stores keep.
//!
//! Everything here runs while the client's stripe is held (see [`Node::owning`]), so that it
//! never meets a connect of the same client half-way.

use std::sync::Arc;
use std::time::Duration;

use moorline_mqtt::{Publish, Will};
use moorline_router::{ClientId, Epoch, MessageId, StoreError, WillTurn, unix_ms};

use crate::close_reason::CloseReason;
use crate::cluster::departure::{self, Departure, WillFate};
use crate::cluster::{Membership, connecting};
use crate::connection::Connection;
use crate::message_parts::stable_hash;
use crate::node::Node;
use crate::outbound::Corked;
use crate::publish::{Sender, route};
use crate::redispatch;
use crate::session::{Link, Session};
use crate::timers::Timer;

/// How long the end of a connection waits for what was sent before it.
const PENDING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a newer connection waits for the one that it displaces: longer, because nothing of that one may
/// be noted afterwards.
pub(crate) const SETTLED_TIMEOUT: Duration = Duration::from_secs(15);
/// Until a will is published again that the stores did not take.
const WILL_RETRY_MS: u64 = 10_000;
/// How long nobody else publishes a will that this node is about to publish, in case it dies over it.
const WILL_TURN_MS: u64 = 30_000;
/// How long a peer has to take a goodbye before its socket is dropped.
const LINGER: Duration = Duration::from_secs(1);

/// Ends a connection whose loop has returned `reason`.
pub(crate) async fn finish(mut connection: Box<Connection>, reason: CloseReason) {
    let node = Arc::clone(&connection.node);
    let session = Arc::clone(&connection.session);
    if let Some(link) = session.lock().link_of(connection.epoch) {
        link.close(reason);
    }
    if connection.may_flap {
        node.note_flap(&session.client, reason);
    }
    settle_pending(&mut connection).await;
    node.handovers.settled(&session, connection.epoch);
    {
        let _owning = node.owning(&session.client).await;
        let link = {
            let mut state = session.lock();
            if state.link_of(connection.epoch).is_some() {
                state.detach()
            } else {
                None
            }
        };
        // Without a link a newer connection has taken over, and has seen to the rest.
        if let Some(mut link) = link {
            node.metrics.closed(reason);
            tracing::debug!(client = %session.client, epoch = %connection.epoch, reason = reason.label(), "disconnected");
            match &node.cluster {
                None => detached(&node, &session, &mut link).await,
                Some(cluster) => depart(&node, cluster, &session, &mut link, reason).await,
            }
        }
    }
    if !matches!(
        reason,
        CloseReason::ClientLeft | CloseReason::ConnectionLost
    ) {
        connection.linger(LINGER).await;
    }
}

/// Sees what the device sent before it left through to its subscribers: only the answers have
/// nobody to go to.
async fn settle_pending(connection: &mut Connection) {
    let all = async {
        connection.route_rest().await;
        while let Some(pending) = connection.pending.pop_front() {
            if let Some(durable) = pending.durable {
                // Nobody is left to be told of a refusal.
                if durable.await.is_ok() {
                    connection.note_done(&pending.answer);
                }
            }
        }
    };
    let _ = tokio::time::timeout(PENDING_TIMEOUT, all).await;
}

/// The same where other nodes see to what happens later: nothing of the session stays here.
async fn depart(
    node: &Arc<Node>,
    cluster: &Membership,
    session: &Arc<Session>,
    link: &mut Link,
    reason: CloseReason,
) {
    let record = {
        let state = session.lock();
        state.stored.then(|| state.record(&session.client))
    };
    // A connection that was displaced on another node has nothing to say any more.
    if reason != CloseReason::TakenOver {
        let departure = Departure {
            client: session.client.clone(),
            epoch: link.epoch,
            node: node.id.clone(),
            offline: Some(reason.label()),
            will: match link.will.take() {
                Some(will) => WillFate::Here(will),
                // Said again: the first time may have been while the store was away.
                None if !reason.publishes_will() && link.had_will => WillFate::Discarded,
                None => WillFate::None,
            },
            record,
            tried: false,
        };
        departure::depart(node, cluster, departure).await;
    }
    if let Err(error) = connecting::forget(node, session).await {
        tracing::debug!(client = %session.client, %error, "shared messages of an ended session not given to others");
    }
}

async fn detached(node: &Arc<Node>, session: &Arc<Session>, link: &mut Link) {
    let client = &session.client;
    let warn = |error: StoreError| tracing::warn!(%client, %error, "end of connection not stored");
    if let Err(error) = node.stores.routes.release(client, link.epoch).await {
        warn(error);
    }
    let persistent = session.lock().is_persistent();
    // A DISCONNECT that forbids it has taken the will away.
    if let Some(will) = link.will.take() {
        delay_or_publish(node, client, link.epoch, will, persistent).await;
    }
    if !persistent {
        if let Err(error) = end_session(node, session).await {
            warn(error);
        }
        return;
    }
    let record = session.lock().record(client);
    let disconnected_at_ms = record.disconnected_at_ms.unwrap_or_else(unix_ms);
    let expiry_interval_s = record.expiry_interval_s;
    if let Err(error) = node.stores.sessions.save(link.epoch, record).await {
        warn(error);
    }
    set_expiry(node, client, disconnected_at_ms, expiry_interval_s);
}

/// Leaves no session behind that a failed connect made, and one that it resumed as it was.
pub(crate) async fn abandon(node: &Arc<Node>, client: &ClientId) {
    let Some(session) = node.session(client) else {
        return;
    };
    let (stored, expiry_interval_s, now_ms) = {
        let mut state = session.lock();
        state.disconnected_at_ms = unix_ms();
        (
            state.stored,
            state.expiry_interval_s,
            state.disconnected_at_ms,
        )
    };
    if stored {
        set_expiry(node, client, now_ms, expiry_interval_s);
    } else if let Err(error) = end_session(node, &session).await {
        tracing::warn!(%client, %error, "session of a failed connect not removed");
    }
}

/// Ends the session in time, unless it never ends.
pub(crate) fn set_expiry(
    node: &Node,
    client: &ClientId,
    disconnected_at_ms: u64,
    expiry_interval_s: u32,
) {
    if expiry_interval_s < u32::MAX {
        let at_ms = disconnected_at_ms + u64::from(expiry_interval_s) * 1000;
        let client = client.clone();
        node.timers.set(
            at_ms,
            Timer::SessionExpiry {
                client,
                disconnected_at_ms,
            },
        );
    }
}

/// The will of the connection `epoch`, after its delay if the session lasts that long.
pub(crate) async fn delay_or_publish(
    node: &Arc<Node>,
    client: &ClientId,
    epoch: Epoch,
    will: Box<Will>,
    session_goes_on: bool,
) {
    if will.delay_interval_s > 0 && session_goes_on {
        let at_ms = unix_ms() + u64::from(will.delay_interval_s) * 1000;
        node.timers.set(
            at_ms,
            Timer::Will {
                client: client.clone(),
                epoch,
                will,
            },
        );
    } else {
        publish_will(node, client, epoch, &will).await;
    }
}

/// The will of a connection that a newer one displaced: no DISCONNECT came, so it is published,
/// unless it is delayed and the session goes on at once.
pub(crate) async fn will_of_taken_over(
    node: &Arc<Node>,
    client: &ClientId,
    old: &mut Link,
    session_goes_on: bool,
) {
    let Some(will) = old.will.take() else { return };
    if will.delay_interval_s > 0 && session_goes_on {
        if let Err(error) = node.stores.sessions.delete_will(client, old.epoch).await {
            tracing::warn!(%client, %error, "will not deleted");
        }
        return;
    }
    publish_will(node, client, old.epoch, &will).await;
}

/// Publishes a will and forgets it; tries again later where the stores do not take it.
pub(crate) async fn publish_will(node: &Arc<Node>, client: &ClientId, epoch: Epoch, will: &Will) {
    if let Err(error) = try_publish_will(node, client, epoch, will, "").await {
        tracing::warn!(%client, %error, "will not published, trying again");
        let again = Timer::Will {
            client: client.clone(),
            epoch,
            will: Box::new(will.clone()),
        };
        node.timers.set(unix_ms() + WILL_RETRY_MS, again);
    }
}

/// One attempt; says whether the will is seen to. In a cluster several nodes may be about to publish it: `whose` attempt it is says that one has begun
/// already. The message goes by the same id each time, so that whoever gets it twice can tell.
pub(crate) async fn try_publish_will(
    node: &Arc<Node>,
    client: &ClientId,
    epoch: Epoch,
    will: &Will,
    whose: &str,
) -> Result<bool, StoreError> {
    let turn = async || match &node.cluster {
        Some(cluster) => {
            let shards = &cluster.given.shards;
            shards.take_will(client, epoch, whose, WILL_TURN_MS).await
        }
        None => Ok(WillTurn::Yours),
    };
    match turn().await? {
        WillTurn::Yours => {}
        WillTurn::Anothers => return Ok(false),
        WillTurn::Over => return Ok(true),
    }
    let mut properties = will.properties.clone();
    if let Some(properties) = &mut properties {
        properties.topic_alias = None;
    }
    let publish = Publish {
        dup: false,
        qos: will.qos,
        retain: will.retain,
        topic: will.topic.clone(),
        packet_id: None,
        properties,
        payload: will.payload.clone(),
    };
    let routed = {
        let mut corked = Corked::new();
        route(
            node,
            &publish,
            Some(Sender {
                client,
                fences: None,
            }),
            Some(id_of_will(client, epoch)),
            &mut corked,
        )
    };
    if let Some(mut durable) = routed.durable {
        let mut again = tokio::time::interval(Duration::from_millis(WILL_TURN_MS / 3));
        again.tick().await;
        loop {
            tokio::select! {
                stored = &mut durable => break stored?,
                // Where the broker is away it is still this one's turn; a store that does not answer is asked again.
                _ = again.tick() => drop(turn().await),
            }
        }
    }
    node.metrics.wills_published.increment(1);
    if let Err(error) = node.stores.sessions.delete_will(client, epoch).await {
        tracing::warn!(%client, %error, "will not deleted");
    }
    Ok(true)
}

fn id_of_will(client: &ClientId, epoch: Epoch) -> MessageId {
    let client = stable_hash([client.as_str().as_bytes()]);
    let id = MessageId::parse(&format!("will-{client:016x}-{epoch}"));
    id.expect("42 characters at most")
}

/// Ends a session for good: its subscriptions, and what the stores have of it.
pub(crate) async fn end_session(
    node: &Arc<Node>,
    session: &Arc<Session>,
) -> Result<(), StoreError> {
    let (filters, stored, shared) = {
        let mut state = session.lock();
        (state.end(), state.stored, state.shared.take())
    };
    node.timers.cancel_expiry(&session.client);
    for held in &filters {
        node.unsubscribe(&held.filter, session);
    }
    if let Some(shared) = shared {
        redispatch::orphans(node, shared.into_orphans()).await?;
    }
    if stored {
        // The session is forgotten last: what other members are to get is found by its end alone.
        if node
            .stores
            .inboxes
            .end_session(&session.client, None)
            .await?
            > 0
        {
            redispatch::from_inbox(node, &session.client).await?;
        }
        node.stores.sessions.delete(&session.client, None).await?;
        session.lock().stored = false;
    }
    // Only now: a failed end is made up for by the next connect, which finds the session here.
    let is_this = |_: &ClientId, current: &Arc<Session>| Arc::ptr_eq(current, session);
    if node.sessions.remove_if(&session.client, is_this).is_some() {
        node.metrics.sessions.decrement(1.0);
    }
    Ok(())
}

/// Carries out a session's expiry if nothing has connected since.
pub(crate) async fn expire_session(node: &Arc<Node>, client: &ClientId, disconnected_at_ms: u64) {
    let _owning = node.owning(client).await;
    let Some(session) = node.session(client) else {
        return;
    };
    let due = {
        let state = session.lock();
        state.link.is_none() && !state.ended && state.disconnected_at_ms == disconnected_at_ms
    };
    if !due {
        return;
    }
    tracing::debug!(%client, "session expired");
    if let Some((epoch, will)) = node.timers.take_will(client) {
        publish_will(node, client, epoch, &will).await;
    }
    if let Err(error) = end_session(node, &session).await {
        tracing::warn!(%client, %error, "expired session not removed, it will be at the next start");
    }
}
