//! Shared subscriptions in a cluster: one member of all nodes gets each message.
//!
//! A group has one queue. Every node that has a connected member takes from it and gives what it takes to a member of its
//! own, by the choice that it would make alone ([`crate::shared`]). A message leaves the queue when it is in a member's inbox, or when a
//! member whose session ends with its connection has acknowledged it; until then the death of the node gives it to
//! another. While nobody is connected it waits in the queue.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use futures_util::stream::{FuturesUnordered, StreamExt};
use moorline_mqtt::{QoS, TopicFilter};
use moorline_router::pubsub::FeedDelivery;
use moorline_router::{GroupMember, Message, Origin, Share, unix_ms};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;

use super::exchange::still_valid;
use crate::message_parts::{expires_at_ms, lasting_properties};
use crate::node::Node;
use crate::redispatch::{self, SharedMessage};

/// Between two looks whether the group is still the same: after a loss of all notes it is another.
const JOIN_AGAIN: Duration = Duration::from_secs(10);
/// Between two attempts to join.
const RETRY: Duration = Duration::from_millis(500);
/// How long a message that no member here takes stays away from the members of other nodes.
const NOBODY_TAKES: Duration = Duration::from_millis(250);

/// How old a message of QoS 0 may be.
const LIVE_MS: u64 = 10_000;
/// After so many times a message is one that no member can have: it is larger than they take.
const GIVEN_BACK_MAX: u64 = 240;

/// The groups that have members on this node.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    wanted: Mutex<HashMap<Arc<str>, watch::Sender<bool>, RandomState>>,
    changed: Notify,
}

impl Groups {
    /// A session became a member of `group`, or is none any more.
    pub(crate) fn changed(&self, node: &Node, group: &str) {
        let mut wanted = self.wanted.lock();
        let is_wanted = node.shared.group(group).is_some();
        match (is_wanted, wanted.contains_key(group)) {
            (true, false) => drop(wanted.insert(group.into(), watch::Sender::new(false))),
            (false, true) => drop(wanted.remove(group)),
            _ => return,
        }
        drop(wanted);
        self.changed.notify_one();
    }

    /// Resolves when this node takes part in every group that it has members of now.
    pub(crate) fn joined(&self) -> impl Future<Output = ()> + Send + use<> {
        let wanted = self.wanted.lock();
        let outstanding = wanted.values().filter(|joined| !*joined.borrow());
        let outstanding: Vec<_> = outstanding.map(watch::Sender::subscribe).collect();
        async move {
            for mut joined in outstanding {
                // Gone with its last member.
                let _ = joined.wait_for(|joined| *joined).await;
            }
        }
    }

    fn names(&self) -> Vec<Arc<str>> {
        self.wanted.lock().keys().cloned().collect()
    }

    fn has_joined(&self, group: &str) {
        if let Some(joined) = self.wanted.lock().get(group) {
            joined.send_replace(true);
        }
    }
}

/// The task of a group.
struct Member {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// Takes part in groups until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    let groups = &cluster.exchange.groups;
    let mut members: HashMap<Arc<str>, Member, RandomState> = HashMap::default();
    loop {
        let wanted = groups.names();
        for (group, member) in &mut members {
            if !wanted.contains(group) {
                // It leaves by itself; an error says that it has.
                let _ = member.stop.take().map(|stop| stop.send(()));
            }
        }
        for group in wanted {
            let held = members.get(&group);
            if held.is_some_and(|member| member.stop.is_some() && !member.task.is_finished()) {
                continue;
            }
            let before = members.remove(&group).map(|member| member.task);
            let (stop, stopped) = oneshot::channel();
            let task = tokio::spawn(take_part(
                Arc::clone(&node),
                Arc::clone(&group),
                before,
                stopped,
            ));
            let stop = Some(stop);
            members.insert(group, Member { stop, task });
        }
        members.retain(|_, member| !member.task.is_finished());
        groups.changed.notified().await;
    }
}

/// Joins, gives to members what comes, and leaves. `before` is the last time, which may not have left yet.
async fn take_part(
    node: Arc<Node>,
    group: Arc<str>,
    before: Option<JoinHandle<()>>,
    stopped: oneshot::Receiver<()>,
) {
    if let Some(before) = before {
        // Ended in whatever way.
        let _ = before.await;
    }
    let Some(cluster) = &node.cluster else { return };
    let pubsub = &cluster.given.pubsub;
    let member = GroupMember::Node(node.id.clone());
    tokio::select! {
        _ = stopped => {}
        () = serve(&node, &group, &member) => {}
    }
    if let Err(error) = pubsub.leave_group(&group, &member).await {
        tracing::debug!(%group, %error, "group not left, it will be seen to");
    }
}

async fn serve(node: &Arc<Node>, name: &Arc<str>, member: &GroupMember) {
    let Some(cluster) = &node.cluster else { return };
    let pubsub = &cluster.given.pubsub;
    let mut failing = false;
    loop {
        let group = match pubsub.join_group(name, member).await {
            Ok(group) => group,
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(group = %name, %error, "shared subscription not joined, trying again");
                }
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        failing = false;
        let mut feed = pubsub.open_group_feed(&group);
        cluster.exchange.groups.has_joined(name);
        let mut again = tokio::time::interval(JOIN_AGAIN);
        again.tick().await;
        let mut giving = FuturesUnordered::new();
        loop {
            tokio::select! {
                delivery = feed.next() => match delivery {
                    Some(delivery) => giving.push(give(node, name, delivery)),
                    None => break,
                },
                Some(()) = giving.next() => {}
                _ = again.tick() => {
                    let joined = pubsub.join_group(name, member).await;
                    if joined.is_ok_and(|joined| joined != group) {
                        break;
                    }
                }
            }
        }
        while giving.next().await.is_some() {}
    }
}

/// Gives a message to a member of this node; else back, after a while.
async fn give(node: &Arc<Node>, group: &Arc<str>, delivery: FeedDelivery) {
    let FeedDelivery {
        publication,
        ack,
        given_back,
    } = delivery;
    let filter = TopicFilter::parse((&**group).into());
    let is_for_it = filter.is_ok_and(|filter| filter.matches(&publication.publish.topic));
    let age_ms = unix_ms().saturating_sub(publication.published_at_ms);
    // It has waited while nobody was there, which QoS 0 does not.
    let is_late = publication.publish.qos == QoS::AtMostOnce && age_ms > LIVE_MS;
    let publish = still_valid(&publication).filter(|_| is_for_it && !is_late);
    let Some(publish) = publish else {
        ack.done();
        return;
    };
    let message = Message {
        id: publication.id,
        origin: Origin::Session,
        qos: publish.qos,
        retain: publish.retain,
        properties: lasting_properties(publish.properties.as_deref()),
        accepted_at_ms: publication.published_at_ms,
        expires_at_ms: expires_at_ms(&publish, unix_ms()),
        collapse_key: None,
        share: Some(Box::new(Share {
            filter: (&**group).into(),
            qos: publish.qos,
            retain: publish.retain,
        })),
        topic: publish.topic,
        payload: publish.payload,
    };
    let is_waited_for = message.qos > QoS::AtMostOnce;
    let message = Arc::new(SharedMessage::from_queue(message, ack));
    let placed = redispatch::offer(node, &message).await;
    match placed {
        Ok(true) => {}
        Ok(false) if !is_waited_for || given_back >= GIVEN_BACK_MAX => {
            node.metrics.dropped_no_member.increment(1);
        }
        Ok(false) | Err(_) => {
            // Whoever has room on another node is to have it, but not as fast as it can go in circles.
            tokio::time::sleep(NOBODY_TAKES).await;
            message.give_back();
        }
    }
}
