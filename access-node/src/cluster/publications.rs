//! What is published for the persistent sessions of a shard, while this node holds it.
//!
//! The shard's queue holds all that was published since somebody first asked for it, whoever held the shard meanwhile. The
//! holder knows the sessions of the shard from the stores, wherever they are connected, finds those that match, appends to
//! their inboxes, and then acknowledges. A session that changes is read again before its SUBACK is sent: from then on the
//! queue is bound to its filters.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use dashmap::DashMap;
use moorline_mqtt::{QoS, SubscriptionOptions, TopicFilter};
use moorline_router::pubsub::{Feed, FeedDelivery, Filters};
use moorline_router::{
    Append, Appended, ClientId, Delivery, GroupMember, Message, NodeId, Nodes, Origin, PubSub,
    SessionRecord, StoreError, StoredSubscription, unix_ms,
};
use parking_lot::Mutex;

use super::exchange::still_valid;
use super::{Membership, Peers, retained_changes};
use crate::fan_out::matches_of;
use crate::message_parts::{expires_at_ms, lasting_properties};
use crate::node::{LEASE, Node};
use crate::subscriptions::{Subscriber, Subscriptions};

/// Sessions that are read together when a shard is taken.
const PAGE: usize = 512;
/// Publications that are matched together.
const BATCH: usize = 128;
/// Entries that are appended together.
const APPENDS: usize = 512;
/// While the store does not take an append.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long a change of a session waits for its holder to have read the shard.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a node may take with hints. They may be lost.
const HINT_TIMEOUT: Duration = Duration::from_millis(500);
/// Between two looks whether the groups of the shard are still joined: all notes may have been lost.
const JOIN_AGAIN: Duration = Duration::from_secs(30);
/// Between two looks at groups whose members are gone.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// The shards whose sessions this node knows.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    by_shard: Mutex<BTreeMap<u16, Arc<Holder>>>,
}

/// A client of the shard, as the index holds it.
#[derive(Debug)]
struct Subscribed {
    client: ClientId,
}

#[derive(Debug)]
struct Held {
    session: Arc<Subscribed>,
    subscriptions: Vec<StoredSubscription>,
}

/// The sessions of one shard.
#[derive(Debug)]
struct Holder {
    shard: u16,
    index: Subscriptions<Subscribed>,
    sessions: DashMap<ClientId, Held, RandomState>,
    /// Held while publications that were matched are not in the inboxes yet.
    storing: tokio::sync::Mutex<()>,
    /// One change after the other: each reads the session and then makes the index like it.
    changing: tokio::sync::Mutex<()>,
    filters: Filters,
    /// Sessions with a subscription to each group.
    groups: Mutex<HashMap<String, usize, RandomState>>,
}

/// In the list for as long as this lives.
struct Listed<'a> {
    holders: &'a Holders,
    holder: Arc<Holder>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        let mut by_shard = self.holders.by_shard.lock();
        let shard = self.holder.shard;
        let is_this = |held: &Arc<Holder>| Arc::ptr_eq(held, &self.holder);
        if by_shard.get(&shard).is_some_and(is_this) {
            by_shard.remove(&shard);
        }
    }
}

/// Resolves when every shard has a holder, and the queues of those that this node holds are bound: from then on nothing that is
/// acknowledged passes a persistent session by. Only in a cluster that has just begun, as after a migration, is that ever not so.
pub(crate) async fn all_held(cluster: &Membership) {
    let shards = &cluster.given.shards;
    for shard in 0..shards.count() {
        loop {
            let here = cluster.holders.by_shard.lock().get(&shard).cloned();
            if let Some(holder) = here {
                if let Some(settled) = holder.filters.settled() {
                    settled.await;
                }
                break;
            }
            let is_here = cluster.holdings.has(shard);
            if !is_here && matches!(shards.holder(shard).await, Ok(Some(_))) {
                break;
            }
            tokio::time::sleep(BACKOFF_MIN).await;
        }
    }
}

/// Serves the sessions of `shard` until the shard is given up.
pub(crate) async fn run(node: &Arc<Node>, shard: u16) {
    let Some(cluster) = &node.cluster else { return };
    // One node sees to what concerns all groups, and to retained messages.
    if shard == 0 {
        tokio::join!(
            serve(node, cluster, shard),
            sweep(node, cluster),
            retained_changes::expire(node, cluster),
        );
    } else {
        serve(node, cluster, shard).await;
    }
}

async fn serve(node: &Arc<Node>, cluster: &Membership, shard: u16) {
    let records = load(cluster, shard).await;
    let wanted = filters_of(&records);
    let pubsub = &cluster.given.pubsub;
    let mut feed = pubsub.open_shard_feed(shard, &wanted);
    let holder = Arc::new(Holder {
        shard,
        index: Subscriptions::default(),
        sessions: DashMap::default(),
        storing: tokio::sync::Mutex::default(),
        changing: tokio::sync::Mutex::default(),
        filters: feed.filters().clone(),
        groups: Mutex::default(),
    });
    let sessions = records.len();
    for record in records {
        holder.put(record, Known::InFeed);
    }
    see_to_groups(&**pubsub, &holder).await;
    let by_shard = &cluster.holders.by_shard;
    by_shard.lock().insert(shard, Arc::clone(&holder));
    let _listed = Listed {
        holders: &cluster.holders,
        holder: Arc::clone(&holder),
    };
    tracing::debug!(shard, sessions, "sessions of a shard read");
    let keeping = async {
        loop {
            tokio::time::sleep(JOIN_AGAIN).await;
            let _changing = holder.changing.lock().await;
            see_to_groups(&**pubsub, &holder).await;
        }
    };
    tokio::select! {
        () = keeping => {}
        () = consume(node, cluster, &holder, &mut feed) => {}
    }
}

async fn consume(node: &Arc<Node>, cluster: &Membership, holder: &Holder, feed: &mut Feed) {
    let mut batch = Vec::with_capacity(BATCH);
    while feed.next_many(&mut batch, BATCH).await > 0 {
        {
            let _storing = holder.storing.lock().await;
            store(node, holder, &batch).await;
        }
        // Who froze in between may have matched with sessions as they were before another node held the shard.
        if !cluster.holdings.has(holder.shard) {
            return;
        }
        for delivery in batch.drain(..) {
            delivery.ack.done();
        }
    }
}

async fn load(cluster: &Membership, shard: u16) -> Vec<SessionRecord> {
    let mut records: Vec<SessionRecord> = Vec::new();
    loop {
        let after = records.last().map(|record| &record.client);
        match cluster.given.shards.sessions(shard, after, PAGE).await {
            Ok(page) => {
                let is_last = page.len() < PAGE;
                records.extend(page);
                if is_last {
                    return records;
                }
            }
            Err(error) => {
                tracing::debug!(shard, %error, "sessions of a shard not read, trying again");
                tokio::time::sleep(BACKOFF_MAX).await;
            }
        }
    }
}

/// Each as often as it is subscribed to.
fn filters_of(records: &[SessionRecord]) -> Vec<String> {
    let all = records.iter().flat_map(|record| &record.subscriptions);
    let bound = all.filter(|held| is_bound(held));
    bound.map(|held| held.filter.clone()).collect()
}

fn is_shared(held: &StoredSubscription) -> bool {
    held.filter.starts_with("$share/")
}

/// Whether the shard's queue takes what this asks for: QoS 0 goes to the connection, if there is one.
fn is_bound(held: &StoredSubscription) -> bool {
    held.options.qos > QoS::AtMostOnce && !is_shared(held)
}

/// Whether the feed knows the filters of a session already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    InFeed,
    New,
}

impl Holder {
    /// Makes the index like `record`; says whether the session has lost a subscription.
    fn put(&self, record: SessionRecord, known: Known) -> bool {
        let before = self.sessions.remove(&record.client).map(|(_, held)| held);
        let (session, old) = match before {
            Some(held) => (held.session, held.subscriptions),
            None => {
                let client = record.client.clone();
                (Arc::new(Subscribed { client }), Vec::new())
            }
        };
        for new in &record.subscriptions {
            self.subscribe(&session, new);
            if known == Known::New && is_bound(new) {
                self.filters.add(&new.filter);
            }
        }
        let lost = self.forget(&session, &old, &record.subscriptions);
        let held = Held {
            session,
            subscriptions: record.subscriptions,
        };
        self.sessions.insert(record.client, held);
        lost
    }

    fn subscribe(&self, session: &Arc<Subscribed>, new: &StoredSubscription) {
        if is_shared(new) {
            *self.groups.lock().entry(new.filter.clone()).or_default() += 1;
            return;
        }
        match TopicFilter::parse(new.filter.as_str().into()) {
            Ok(filter) => {
                let subscriber = Subscriber {
                    session: Arc::clone(session),
                    options: new.options,
                    subscription_id: new.subscription_id.unwrap_or(0),
                };
                self.index
                    .add(&new.filter.as_str().into(), &filter, subscriber);
            }
            Err(error) => {
                tracing::warn!(client = %session.client, filter = new.filter, %error, "stored subscription left out");
            }
        }
    }

    /// Takes out what is in `old` and no more in `kept`; says whether that is anything.
    fn forget(
        &self,
        session: &Arc<Subscribed>,
        old: &[StoredSubscription],
        kept: &[StoredSubscription],
    ) -> bool {
        let mut lost = false;
        for gone in old {
            if is_bound(gone) {
                self.filters.remove(&gone.filter);
            }
            if is_shared(gone) {
                let mut groups = self.groups.lock();
                if let Some(count) = groups.get_mut(&gone.filter) {
                    *count -= 1;
                    if *count == 0 {
                        groups.remove(&gone.filter);
                    }
                }
            } else if kept.iter().all(|held| held.filter != gone.filter) {
                lost = true;
                self.index.remove(&gone.filter, session);
            }
        }
        lost
    }

    fn remove(&self, client: &ClientId) -> bool {
        self.sessions
            .remove(client)
            .is_some_and(|(_, held)| self.forget(&held.session, &held.subscriptions, &[]))
    }

    fn groups_of(&self, client: &ClientId) -> Vec<String> {
        let held = self.sessions.get(client);
        held.map_or_else(Vec::new, |held| {
            let shared = held.subscriptions.iter().filter(|held| is_shared(held));
            shared.map(|held| held.filter.clone()).collect()
        })
    }

    /// Entries for the inboxes of every session that matches.
    fn match_all(&self, deliveries: &[FeedDelivery]) -> Vec<Append> {
        let mut appends = Vec::new();
        for FeedDelivery { publication, .. } in deliveries {
            let Some(publish) = still_valid(publication) else {
                continue;
            };
            let from = publication.from.as_ref();
            let found = matches_of(&self.index, publish.topic.as_str(), |options, held| {
                hears(*options, &held.client, from)
            });
            for found in found {
                let options = found.subscriber.options;
                let qos = publish.qos.min(options.qos);
                if qos == QoS::AtMostOnce {
                    continue;
                }
                let mut properties = lasting_properties(publish.properties.as_deref());
                if !found.subscription_ids.is_empty() {
                    let properties = properties.get_or_insert_default();
                    properties.subscription_ids = found.subscription_ids.to_vec();
                }
                let message = Message {
                    id: publication.id.clone(),
                    origin: Origin::Session,
                    topic: publish.topic.clone(),
                    qos,
                    retain: publish.retain && options.retain_as_published,
                    properties,
                    payload: publish.payload.clone(),
                    accepted_at_ms: publication.published_at_ms,
                    expires_at_ms: expires_at_ms(&publish, unix_ms()),
                    collapse_key: None,
                    share: None,
                };
                appends.push(Append {
                    client: found.subscriber.session.client.clone(),
                    message,
                    fingerprint: None,
                });
            }
        }
        appends
    }
}

fn hears(options: SubscriptionOptions, client: &ClientId, from: Option<&ClientId>) -> bool {
    !(options.no_local && from == Some(client))
}

/// Puts what matches into inboxes, however long that takes, and gives hints.
async fn store(node: &Arc<Node>, holder: &Holder, deliveries: &[FeedDelivery]) {
    let appends = holder.match_all(deliveries);
    for part in appends.chunks(APPENDS) {
        let mut backoff = BACKOFF_MIN;
        let outcomes = loop {
            match node.stores.inboxes.append(part.to_vec()).await {
                Ok(outcomes) => break outcomes,
                Err(error) => {
                    tracing::debug!(shard = holder.shard, %error, "inboxes not written, trying again");
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
            }
        };
        hint(node, part, outcomes).await;
    }
}

async fn hint(node: &Arc<Node>, appends: &[Append], outcomes: Vec<Appended>) {
    let mut by_node: BTreeMap<NodeId, Vec<Delivery>> = BTreeMap::new();
    for (append, outcome) in appends.iter().zip(outcomes) {
        match outcome {
            Appended::Stored {
                position,
                route: Some(route),
            } => {
                let delivery = Delivery {
                    client: append.client.clone(),
                    position: Some(position),
                    message: append.message.clone(),
                };
                by_node.entry(route.node).or_default().push(delivery);
            }
            // The subscriber's declared overflow policy.
            Appended::Full | Appended::Dropped => node.metrics.dropped_queue_full.increment(1),
            Appended::Stored { route: None, .. } | Appended::Repeated { .. } => {}
        }
    }
    let peers = Peers::of(node);
    let given = by_node.into_iter().map(|(to, deliveries)| {
        let peers = peers.clone();
        async move {
            let given = peers.deliver(&to, deliveries);
            // What is not told is found when the node compares.
            let _ = tokio::time::timeout(HINT_TIMEOUT, given).await;
        }
    });
    futures_util::future::join_all(given).await;
}

/// The stored session of `client` has changed, and this node holds its shard: resolves when what is published from now on
/// and matches reaches its inbox.
pub(crate) async fn changed(node: &Arc<Node>, client: &ClientId) -> Result<(), StoreError> {
    let Some(cluster) = &node.cluster else {
        return Ok(());
    };
    let shard = cluster.given.shards.shard_of(client);
    let not_here = || StoreError::Unavailable(format!("shard {shard} is not held here"));
    let holder = holder_of(cluster, shard).await.ok_or_else(not_here)?;
    {
        let _changing = holder.changing.lock().await;
        let before = holder.groups_of(client);
        let lost = match node.stores.sessions.load(client).await? {
            Some(record) => holder.put(record, Known::New),
            None => holder.remove(client),
        };
        if lost {
            // What was matched before is in the inbox then, and not on its way there.
            drop(holder.storing.lock().await);
        }
        let (pubsub, member) = (&cluster.given.pubsub, GroupMember::Shard(shard));
        for group in holder.groups_of(client) {
            pubsub.join_group(&group, &member).await?;
        }
        for group in before {
            if !holder.groups.lock().contains_key(&group) {
                pubsub.leave_group(&group, &member).await?;
            }
        }
    }
    if let Some(settled) = holder.filters.settled() {
        settled.await;
    }
    match cluster.holdings.has(shard) {
        true => Ok(()),
        false => Err(not_here()),
    }
}

/// Waits for a holder that has not read the shard yet.
async fn holder_of(cluster: &Membership, shard: u16) -> Option<Arc<Holder>> {
    let found = async {
        loop {
            if let Some(holder) = cluster.holders.by_shard.lock().get(&shard) {
                return Some(Arc::clone(holder));
            }
            if !cluster.holdings.has(shard) {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(READY_TIMEOUT, found).await.ok()?
}

/// Joins the groups that the sessions of the shard are members of, and leaves the others.
async fn see_to_groups(pubsub: &dyn PubSub, holder: &Holder) {
    let member = GroupMember::Shard(holder.shard);
    while let Err(error) = compare_groups(pubsub, holder, &member).await {
        tracing::debug!(shard = holder.shard, %error, "groups of a shard not seen to, trying again");
        tokio::time::sleep(BACKOFF_MAX).await;
    }
}

async fn compare_groups(
    pubsub: &dyn PubSub,
    holder: &Holder,
    member: &GroupMember,
) -> Result<(), StoreError> {
    let wanted: Vec<String> = holder.groups.lock().keys().cloned().collect();
    for group in &wanted {
        pubsub.join_group(group, member).await?;
    }
    for group in pubsub.groups_of(member).await? {
        if !holder.groups.lock().contains_key(&group) {
            pubsub.leave_group(&group, member).await?;
        }
    }
    Ok(())
}

async fn sweep(node: &Arc<Node>, cluster: &Membership) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    loop {
        every.tick().await;
        // After an interruption others have to come back first.
        if !cluster.link.is_calm_for(LEASE) {
            continue;
        }
        let swept = async {
            let alive = node.stores.routes.nodes().await?;
            let alive: Vec<NodeId> = alive.into_iter().map(|record| record.id).collect();
            cluster.given.pubsub.sweep_groups(&alive).await
        };
        if let Err(error) = swept.await {
            tracing::debug!(%error, "groups without members not seen to, trying again");
        }
    }
}
