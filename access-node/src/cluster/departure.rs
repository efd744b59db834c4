//! How a connection ends in a cluster: what it leaves to the stores, and in which order.
//!
//! First what happens later becomes durable (timers for the will and for the end of the session), then the route is
//! released, then a will that is not delayed is published. Whoever dies in between leaves either a route of a dead node,
//! or a timer. A connection that was displaced meanwhile changes nothing: every step carries its epoch.
//!
//! A departure that the store does not take waits here until the store is back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use moorline_mqtt::Will;
use moorline_router::{
    ClientId, Epoch, MessageId, NodeId, Presence, PresenceChange, SessionRecord, StoreError,
    TimerKind, unix_ms,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Membership;
use crate::ending;
use crate::node::Node;

/// Until a will that is published at once is published by the holder of the shard, should this node die over it.
const INSURANCE_MS: u64 = 30_000;
/// How often that is tried here. Where the connection ended its timer is left; where it was displaced nobody else would.
const WILL_ATTEMPTS: usize = 60;
/// Between two looks whether the store takes what it did not.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How long a newer connection may take to ask.
const REFUSED_KEPT: Duration = Duration::from_secs(30);
/// Departures that are tried again together.
const AT_ONCE: usize = 32;

/// What becomes of the will of a connection that ends.
#[derive(Debug, Clone)]
pub(crate) enum WillFate {
    /// There is none.
    None,
    /// The device took it back.
    Discarded,
    /// It is published when its delay is over; here if it has none.
    Here(Box<Will>),
    /// The same, in any case by the holder of the shard.
    ByTimer(Box<Will>),
}

/// The end of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Departure {
    pub(crate) client: ClientId,
    pub(crate) epoch: Epoch,
    /// Where it was.
    pub(crate) node: NodeId,
    /// For whoever is told that the device is offline; `None` where nobody was told that it came.
    pub(crate) offline: Option<&'static str>,
    pub(crate) will: WillFate,
    /// The session, where the stores have one.
    pub(crate) record: Option<SessionRecord>,
    /// It was tried before, and nobody knows how far that came.
    pub(crate) tried: bool,
}

/// Departures on their way, and those that the store did not take.
#[derive(Debug, Default)]
pub(crate) struct Departures {
    /// By client, with whoever waits for the end.
    running: Mutex<BTreeMap<ClientId, Vec<oneshot::Sender<()>>>>,
    unfinished: Mutex<BTreeMap<ClientId, Unfinished>>,
    /// Ends of sessions that the store refused to be told of, until the newer connection asks.
    refused: Mutex<BTreeMap<ClientId, Refused>>,
}

/// The end of a session that came behind the claim of a newer connection.
#[derive(Debug)]
struct Refused {
    by: Epoch,
    since: Instant,
}

impl Departure {
    /// The device has ended its session. The store refuses to be told so once there is a newer connection.
    fn ends_session(&self) -> bool {
        let record = self.record.as_ref();
        record.is_some_and(|record| record.expiry_interval_s == 0)
    }
}

#[derive(Debug, Clone)]
enum Unfinished {
    Known(Box<Departure>),
    /// A claim whose answer did not come: there may be a route of this node without a connection.
    Claim,
}

/// A departure that others may wait for.
struct Running<'a> {
    of: &'a Departures,
    client: &'a ClientId,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // Whoever waits is told by the loss of the sender.
        self.of.running.lock().remove(self.client);
    }
}

impl Departures {
    fn begin<'a>(&'a self, client: &'a ClientId) -> Running<'a> {
        self.running.lock().entry(client.clone()).or_default();
        Running { of: self, client }
    }

    /// Whether the device had ended its session before the connection `by`, which the store did not let it say.
    pub(crate) fn ended_before(&self, client: &ClientId, by: Epoch) -> bool {
        let mut refused = self.refused.lock();
        let is_this = refused.get(client).is_some_and(|refused| refused.by == by);
        is_this && refused.remove(client).is_some()
    }

    /// Waits until nothing of an earlier connection of `client` is on its way.
    pub(crate) async fn over(&self, client: &ClientId) {
        let over = self.running.lock().get_mut(client).map(|waiting| {
            let (sender, receiver) = oneshot::channel();
            waiting.push(sender);
            receiver
        });
        if let Some(over) = over {
            // An error says that the sender is gone, which is the signal.
            let _ = over.await;
        }
    }

    fn forget_refused(&self) {
        let mut refused = self.refused.lock();
        refused.retain(|_, refused| refused.since.elapsed() < REFUSED_KEPT);
    }

    fn put_off(&self, mut departure: Departure) {
        departure.tried = true;
        let client = departure.client.clone();
        let unfinished = Unfinished::Known(Box::new(departure));
        self.unfinished.lock().insert(client, unfinished);
    }

    /// Notes a claim that nobody knows the outcome of.
    pub(crate) fn doubt_claim(&self, client: &ClientId) {
        let mut unfinished = self.unfinished.lock();
        unfinished
            .entry(client.clone())
            .or_insert(Unfinished::Claim);
    }

    fn take(&self, client: &ClientId) -> Option<Unfinished> {
        self.unfinished.lock().remove(client)
    }

    fn put_back(&self, client: &ClientId, what: Unfinished) {
        let mut unfinished = self.unfinished.lock();
        unfinished.entry(client.clone()).or_insert(what);
    }

    fn some(&self, limit: usize) -> Vec<ClientId> {
        self.unfinished.lock().keys().take(limit).cloned().collect()
    }
}

/// Carries `departure` out, or keeps it until the store takes it.
pub(crate) async fn depart(node: &Arc<Node>, cluster: &Membership, departure: Departure) {
    let client = departure.client.clone();
    let _running = cluster.departures.begin(&client);
    let done = carry_out(node, cluster, &departure).await;
    if let Err(error) = cluster.link.note(done) {
        tracing::debug!(%client, %error, "end of connection not stored, trying again");
        cluster.departures.put_off(departure);
    }
}

/// One attempt.
pub(crate) async fn carry_out(
    node: &Arc<Node>,
    cluster: &Membership,
    departure: &Departure,
) -> Result<(), StoreError> {
    match leave(node, cluster, departure).await {
        // Displaced meanwhile: the newer connection has seen to the rest, or asks for it.
        Err(StoreError::Stale { current }) => {
            if departure.ends_session() {
                let (by, since) = (current, Instant::now());
                let mut refused = cluster.departures.refused.lock();
                refused.insert(departure.client.clone(), Refused { by, since });
            }
            Ok(())
        }
        done => done,
    }
}

async fn leave(
    node: &Arc<Node>,
    cluster: &Membership,
    departure: &Departure,
) -> Result<(), StoreError> {
    let Departure { client, epoch, .. } = departure;
    let (sessions, shards) = (&node.stores.sessions, &cluster.given.shards);
    let goes_on = departure
        .record
        .as_ref()
        .is_some_and(|r| r.expiry_interval_s > 0);
    let delay_ms = |will: &Will| match goes_on {
        true => u64::from(will.delay_interval_s) * 1000,
        false => 0,
    };
    let (timer_ms, now) = match &departure.will {
        WillFate::None => (None, None),
        WillFate::Discarded => {
            sessions.delete_will(client, *epoch).await?;
            (None, None)
        }
        WillFate::ByTimer(will) => (Some(delay_ms(will)), None),
        WillFate::Here(will) => match delay_ms(will) {
            0 => (Some(INSURANCE_MS), Some(will)),
            delay_ms => (Some(delay_ms), None),
        },
    };
    if let Some(in_ms) = timer_ms {
        let set = shards.set_timer(client, TimerKind::Will, *epoch, in_ms);
        set.await?;
    }
    if let Some(record) = &departure.record {
        let record = SessionRecord {
            disconnected_at_ms: record.disconnected_at_ms.or_else(|| Some(unix_ms())),
            ..record.clone()
        };
        let expiry_interval_s = record.expiry_interval_s;
        sessions.save(*epoch, record).await?;
        if expiry_interval_s < u32::MAX {
            let in_ms = u64::from(expiry_interval_s) * 1000;
            let set = shards.set_timer(client, TimerKind::SessionExpiry, *epoch, in_ms);
            set.await?;
        }
    }
    if !node.stores.routes.release(client, *epoch).await? {
        // The first attempt may have released it, and its answer was lost.
        let route = node.stores.routes.look_up(client).await?;
        if !departure.tried || route.is_some() {
            return Ok(());
        }
    }
    if let Some(reason) = departure.offline {
        cluster.given.events.presence(Presence {
            client: client.clone(),
            change: PresenceChange::Offline { reason },
            epoch: *epoch,
            node: departure.node.clone(),
            at_ms: unix_ms(),
        });
    }
    if let Some(will) = now {
        publish_will_later(node, client, *epoch, Will::clone(will));
    }
    Ok(())
}

/// Publishes a will without keeping anybody waiting: the broker may be away, and what a device left is no reason to hold up
/// the next connection.
pub(crate) fn publish_will_later(node: &Arc<Node>, client: &ClientId, epoch: Epoch, will: Will) {
    let (node, client) = (Arc::clone(node), client.clone());
    tokio::spawn(async move {
        let Some(cluster) = &node.cluster else { return };
        let whose = MessageId::generate();
        let whose = whose.as_str();
        for _ in 0..WILL_ATTEMPTS {
            match ending::try_publish_will(&node, &client, epoch, &will, whose).await {
                Ok(true) => {
                    let shards = &cluster.given.shards;
                    let cancelled = shards.cancel_timer(&client, TimerKind::Will, epoch).await;
                    if let Err(error) = cancelled {
                        tracing::debug!(%client, %error, "timer of a published will not cancelled");
                    }
                    return;
                }
                // It may die over it.
                Ok(false) => {}
                Err(error) => tracing::debug!(%client, %error, "will not published, trying again"),
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
        tracing::warn!(%client, "will not published");
    });
}

/// Finishes what is unfinished of `client`; nothing to do for nearly everybody.
pub(crate) async fn finish(
    node: &Arc<Node>,
    cluster: &Membership,
    client: &ClientId,
) -> Result<(), StoreError> {
    let Some(unfinished) = cluster.departures.take(client) else {
        return Ok(());
    };
    let done = match &unfinished {
        Unfinished::Known(departure) => carry_out(node, cluster, departure).await,
        Unfinished::Claim => drop_claim(node, cluster, client).await,
    };
    if done.is_err() {
        cluster.departures.put_back(client, unfinished);
    }
    done
}

async fn drop_claim(
    node: &Arc<Node>,
    cluster: &Membership,
    client: &ClientId,
) -> Result<(), StoreError> {
    match node.stores.routes.look_up(client).await? {
        Some(route) if route.node == node.id && !has_connection(node, client, route.epoch) => {
            super::shard::strand(node, cluster, client, &route).await
        }
        _ => Ok(()),
    }
}

fn has_connection(node: &Node, client: &ClientId, epoch: Epoch) -> bool {
    let session = node.session(client);
    session.is_some_and(|session| session.lock().link_of(epoch).is_some())
}

/// Tries again what the store did not take, while it answers, until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    loop {
        tokio::time::sleep(RETRY_EVERY).await;
        cluster.departures.forget_refused();
        if !cluster.link.is_away() {
            finish_some(&node, cluster).await;
        }
    }
}

/// Tries a number of them again; says how many are left.
pub(crate) async fn finish_some(node: &Arc<Node>, cluster: &Membership) -> usize {
    let clients = cluster.departures.some(16 * AT_ONCE);
    stream::iter(clients)
        .for_each_concurrent(AT_ONCE, |client| async move {
            // Nobody connects as this client meanwhile.
            let _owning = node.owning(&client).await;
            let _running = cluster.departures.begin(&client);
            let done = finish(node, cluster, &client).await;
            if let Err(error) = cluster.link.note(done) {
                tracing::debug!(%client, %error, "end of connection not stored, trying again");
            }
        })
        .await;
    cluster.departures.unfinished.lock().len()
}
