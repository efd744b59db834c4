//! Where a PUBLISH goes: the one door for devices, wills and topic pushes.
//!
//! What needs no store is written to the subscribers' sockets here and now. What must be durable
//! is handed to the stores, in order, and comes back as one future: the acknowledgement waits
//! for it.

mod to_device;

use std::sync::Arc;

use futures_util::future::BoxFuture;
use moorline_mqtt::{Publish, QoS, ReasonCode, TopicName};
use moorline_router::{
    Append, Appended, ClientId, DeliveryOutcome, End, EndReason, Fence, Message, MessageId, Origin,
    Publication, Share, StoreError, UpstreamMessage, unix_ms,
};
use smallvec::SmallVec;

use crate::cluster::Membership;
use crate::cluster::retained_changes;
use crate::config::Config;
use crate::delayed::{self, Later};
use crate::fan_out::{FanOut, find_matches};
use crate::fences::Fences;
use crate::message_parts::{expires_at_ms, id_of, lasting_properties};
use crate::node::Node;
use crate::outbound::Corked;
use crate::redispatch::{self, SharedMessage};
use crate::refusal::Refusal;
use crate::retained::RetainedFull;
use crate::session::Session;
use crate::shared::{Group, PassedOver};
use crate::subscriptions::Subscriber;

/// Resolves when a message is as durable as its QoS promises.
pub(crate) type Durable = BoxFuture<'static, Result<(), StoreError>>;

/// What became of a publish.
pub(crate) struct Routed {
    /// Sessions it went to.
    pub(crate) matched: u64,
    /// What the acknowledgement has to wait for.
    pub(crate) durable: Option<Durable>,
}

/// The device that publishes.
#[derive(Clone, Copy)]
pub(crate) struct Sender<'a> {
    pub(crate) client: &'a ClientId,
    /// Keep its messages in order over a refusal; none for a will.
    pub(crate) fences: Option<&'a Fences>,
}

/// Sends `publish` everywhere it belongs. `from` is known to No Local and to upstream; `id` is made
/// where none is given and one is needed.
pub(crate) fn route(
    node: &Arc<Node>,
    publish: &Publish,
    from: Option<Sender<'_>>,
    id: Option<MessageId>,
    corked: &mut Corked,
) -> Routed {
    let mut routing = Routing {
        fences: from.and_then(|sender| sender.fences),
        node,
        publish,
        id,
        durable: SmallVec::new(),
    };
    if let (Some(sender), Some(Ok(later))) = (from, delayed::later(&publish.topic, &node.delays)) {
        routing.keep_for_later(sender.client, later);
        return routing.into_routed(0);
    }
    if let Some(owner) = device_of(publish.topic.as_str(), &node.config.device_topics) {
        let matched = routing.push_to_device(owner, corked);
        return routing.into_routed(matched);
    }
    let from = from.map(|sender| sender.client);
    if let Some(client) = from {
        routing.send_upstream(client);
        routing.tell_events();
    }
    if publish.retain {
        routing.retain();
    }
    let matched = match &node.cluster {
        None => routing.deliver_to_subscribers(from, corked),
        Some(cluster) => {
            let here = deliver_here(node, publish, from, corked);
            routing.publish_to_others(cluster, from);
            here
        }
    };
    routing.into_routed(matched)
}

/// Hands a publication of whatever node to the connections of this one, in a cluster: to all but persistent sessions that get
/// it with QoS 1 or 2, which get it through their inboxes, and members of groups. Says how many it went to.
pub(crate) fn deliver_here(
    node: &Arc<Node>,
    publish: &Publish,
    from: Option<&ClientId>,
    corked: &mut Corked,
) -> u64 {
    let matches = find_matches(node, &publish.topic, from);
    let mut fan_out = FanOut::new(publish);
    let expires_at_ms = expires_at_ms(publish, unix_ms());
    let mut delivered = 0;
    for found in &matches {
        let session = &found.subscriber.session;
        let options = found.subscriber.options;
        let qos = publish.qos.min(options.qos);
        let retain = publish.retain && options.retain_as_published;
        let mut state = session.lock();
        if qos > QoS::AtMostOnce && state.keeps_inbox() {
            continue;
        }
        let Some(version) = state.link.as_ref().map(|link| link.version) else {
            continue;
        };
        let encoded = fan_out.encoded(version, qos, retain, &found.subscription_ids);
        state.deliver_live(&encoded, expires_at_ms, node);
        corked.add(session, &mut state);
        delivered += 1;
    }
    delivered
}

/// Why devices may not publish to `topic`, if so.
pub(crate) fn refuse_topic(topic: &TopicName, limits: &Config) -> Option<Refusal> {
    let text = topic.as_str();
    let levels = 1 + text.bytes().filter(|byte| *byte == b'/').count();
    let why = if text.starts_with('$') {
        "topics that begin with $ are the server's"
    } else if levels > limits.topic_levels_max {
        "the topic has more levels than the server takes"
    } else {
        return None;
    };
    Some(Refusal::new(ReasonCode::TopicNameInvalid, why))
}

/// Why `publish` cannot be retained, if so: whoever can be told is, before anything is done with it.
pub(crate) fn refuse_retained(publish: &Publish, node: &Node) -> Option<Refusal> {
    let retains = publish.retain
        && !publish.payload.is_empty()
        && device_of(publish.topic.as_str(), &node.config.device_topics).is_none();
    let limits = node.config.retained_limits();
    let full = retains
        && !node
            .retained
            .has_room(&publish.topic, publish.payload.len(), limits);
    full.then(|| {
        Refusal::new(
            ReasonCode::QuotaExceeded,
            "the server retains as much as it may",
        )
    })
}

/// The client id in a topic `d/{client_id}/…`.
fn device_of<'t>(topic: &'t str, prefix: &str) -> Option<&'t str> {
    let rest = topic.strip_prefix(prefix)?.strip_prefix('/')?;
    let owner = rest.split('/').next()?;
    (!owner.is_empty()).then_some(owner)
}

struct Routing<'a> {
    fences: Option<&'a Fences>,
    node: &'a Arc<Node>,
    publish: &'a Publish,
    id: Option<MessageId>,
    durable: SmallVec<[Durable; 2]>,
}

impl<'a> Routing<'a> {
    fn into_routed(self, matched: u64) -> Routed {
        let mut parts = self.durable;
        let durable = match parts.len() {
            0 => None,
            1 => parts.pop(),
            // Each has its place in the stores' order already; waiting one by one costs nothing.
            _ => Some(Box::pin(async move {
                for part in parts {
                    part.await?;
                }
                Ok(())
            }) as Durable),
        };
        Routed { matched, durable }
    }

    fn fence(&self) -> Option<&'a Fence> {
        self.fences.map(|fences| &fences.publishes)
    }

    fn id(&mut self) -> MessageId {
        self.id.get_or_insert_with(|| id_of(self.publish)).clone()
    }

    /// The message as stores keep it: nothing of it may belong to one connection.
    fn message(&mut self, origin: Origin, qos: QoS, retain: bool) -> Message {
        let publish = self.publish;
        let now_ms = unix_ms();
        Message {
            id: self.id(),
            origin,
            topic: publish.topic.clone(),
            qos,
            retain,
            properties: lasting_properties(publish.properties.as_deref()),
            payload: publish.payload.clone(),
            accepted_at_ms: now_ms,
            expires_at_ms: expires_at_ms(publish, now_ms),
            collapse_key: None,
            share: None,
        }
    }

    fn send_upstream(&mut self, client: &ClientId) {
        let queues = self.node.upstream.queues_for(&self.publish.topic);
        if queues.is_empty() {
            return;
        }
        let message = UpstreamMessage {
            id: self.id(),
            client: client.clone(),
            topic: self.publish.topic.clone(),
            qos: self.publish.qos,
            properties: lasting_properties(self.publish.properties.as_deref()),
            payload: self.publish.payload.clone(),
            received_at_ms: unix_ms(),
        };
        let stored = self
            .node
            .stores
            .upstream
            .publish_behind(vec![(message, queues)], self.fence());
        self.wait_for(stored);
    }

    fn keep_for_later(&mut self, client: &ClientId, later: Later) {
        let id = self.id();
        let stored = delayed::store(self.node, client, later, self.publish, &id);
        self.wait_for(stored);
    }

    /// The acknowledgement waits until an event that comes of the message is durable, and told to the jobs it names.
    fn tell_events(&mut self) {
        let (node, publish) = (self.node, self.publish);
        if let Some(told) = delayed::tell_events(node, publish, || self.id()) {
            self.wait_for(told);
        }
    }

    /// What subscribers elsewhere, persistent sessions and groups get.
    fn publish_to_others(&mut self, cluster: &Membership, from: Option<&ClientId>) {
        let publication = Publication {
            id: self.id(),
            from: from.cloned(),
            publish: Publish {
                dup: false,
                packet_id: None,
                ..self.publish.clone()
            },
            published_at_ms: unix_ms(),
        };
        let published = cluster.given.pubsub.publish(publication, self.fence());
        self.wait_for(published);
    }

    /// QoS 0 is never waited for: the write has its place in the order all the same.
    fn wait_for(&mut self, durable: Durable) {
        if self.publish.qos > QoS::AtMostOnce {
            self.durable.push(durable);
        }
    }

    fn store_retained(&self, message: Option<&Arc<Message>>) -> Durable {
        let topic = &self.publish.topic;
        retained_changes::store(self.node, topic, message, self.fences.is_some())
    }

    /// In a cluster the node has to know when its write is done, also where nobody else waits for it.
    fn wait_for_retained(&mut self, stored: Durable) {
        if self.publish.qos == QoS::AtMostOnce && self.node.cluster.is_some() {
            tokio::spawn(stored);
        } else {
            self.wait_for(stored);
        }
    }

    fn retain(&mut self) {
        let publish = self.publish;
        if publish.payload.is_empty() {
            let store = || self.store_retained(None);
            let removed = self.node.retained.remove(&publish.topic, store);
            self.wait_for_retained(removed);
            return;
        }
        let mut message = self.message(Origin::Session, publish.qos, true);
        // It stays: it must not hold on to the buffer that it was read from.
        message.topic = message.topic.copied();
        message.payload = bytes::Bytes::copy_from_slice(&message.payload);
        message.properties = message.properties.map(|held| Box::new(held.copied()));
        let limits = self.node.config.retained_limits();
        let message = Arc::new(message);
        let kept = Arc::clone(&message);
        let store = || self.store_retained(Some(&message));
        let stored = self.node.retained.put(kept, limits, store);
        match stored {
            Ok(stored) => self.wait_for_retained(stored),
            // Who cannot be refused: subscribers of now have it all the same.
            Err(RetainedFull) => self.node.metrics.dropped_retained_full.increment(1),
        }
    }

    fn deliver_to_subscribers(&mut self, from: Option<&ClientId>, corked: &mut Corked) -> u64 {
        let matches = find_matches(self.node, &self.publish.topic, from);
        let mut fan_out = FanOut::new(self.publish);
        let mut appends = Vec::new();
        let mut waiting = Vec::new();
        let now_ms = unix_ms();
        let expires_at_ms = expires_at_ms(self.publish, now_ms);
        for found in &matches {
            let session = &found.subscriber.session;
            let options = found.subscriber.options;
            let qos = self.publish.qos.min(options.qos);
            let retain = self.publish.retain && options.retain_as_published;
            let mut state = session.lock();
            if qos > QoS::AtMostOnce && state.keeps_inbox() {
                drop(state);
                let mut message = self.message(Origin::Session, qos, retain);
                if !found.subscription_ids.is_empty() {
                    let properties = message.properties.get_or_insert_default();
                    properties.subscription_ids = found.subscription_ids.to_vec();
                }
                appends.push(Append {
                    client: session.client.clone(),
                    message,
                    fingerprint: None,
                });
                waiting.push(Arc::clone(session));
                continue;
            }
            let Some(version) = state.link.as_ref().map(|link| link.version) else {
                continue;
            };
            let encoded = fan_out.encoded(version, qos, retain, &found.subscription_ids);
            state.deliver_live(&encoded, expires_at_ms, self.node);
            corked.add(session, &mut state);
        }
        if !appends.is_empty() {
            self.append_all(appends, waiting);
        }
        matches.len() as u64 + self.deliver_to_groups(&mut fan_out, expires_at_ms, corked)
    }

    /// One member of each group whose filter matches gets the message, beside what its members get by
    /// subscriptions of their own (MQTT 5.0 section 4.8.2).
    fn deliver_to_groups(
        &mut self,
        fan_out: &mut FanOut<'_>,
        expires_at_ms: Option<u64>,
        corked: &mut Corked,
    ) -> u64 {
        let mut matched = 0;
        let node = self.node;
        for group in node.shared.matching(self.publish.topic.as_str()) {
            let mut passed_over = PassedOver::new();
            // Each choice looks at every member: not as often as there are members.
            while passed_over.len() < redispatch::OFFERS_MAX
                && let Some(member) = group.choose(self.publish.qos, &passed_over, &node.config)
            {
                if self.give_to_member(&group, &member, fan_out, expires_at_ms, corked) {
                    matched += 1;
                    break;
                }
                passed_over.push(member.session);
            }
        }
        matched
    }

    /// Says whether the member took it; it may have left since it was chosen.
    fn give_to_member(
        &mut self,
        group: &Group,
        member: &Subscriber<Session>,
        fan_out: &mut FanOut<'_>,
        expires_at_ms: Option<u64>,
        corked: &mut Corked,
    ) -> bool {
        let session = &member.session;
        // [MQTT-4.8.2-3].
        let qos = self.publish.qos.min(member.options.qos);
        let (ended, persistent) = {
            let state = session.lock();
            (state.ended, state.keeps_inbox())
        };
        if ended {
            return false;
        }
        if qos > QoS::AtMostOnce && persistent {
            let message = redispatch::for_member(&self.shared_message(group), member);
            let append = Append {
                client: session.client.clone(),
                message: message.clone(),
                fingerprint: None,
            };
            let inboxes = &self.node.stores.inboxes;
            let appended = inboxes.append_behind(vec![append], self.fence());
            let (node, session) = (Arc::clone(self.node), Arc::clone(session));
            self.durable.push(Box::pin(async move {
                let outcome = appended.await?.pop();
                redispatch::settle(&node, session, message, outcome).await
            }));
            return true;
        }
        let shared = (qos > QoS::AtMostOnce).then(|| {
            let mut message = self.shared_message(group);
            // It may stay for long: it must not hold on to the buffer that it was read from.
            message.topic = message.topic.copied();
            message.payload = bytes::Bytes::copy_from_slice(&message.payload);
            Arc::new(SharedMessage::new(message))
        });
        let retain = self.publish.retain && member.options.retain_as_published;
        let mut state = session.lock();
        let link = state.link.as_ref().filter(|link| link.closing.is_none());
        let Some(version) = link.map(|link| link.version) else {
            return false;
        };
        let id = [member.subscription_id];
        let ids = if id[0] > 0 { &id[..] } else { &[] };
        let encoded = fan_out.encoded(version, qos, retain, ids);
        let outcome = state.deliver_shared(&encoded, expires_at_ms, shared, self.node);
        corked.add(session, &mut state);
        matches!(
            outcome,
            DeliveryOutcome::Sent { .. } | DeliveryOutcome::Behind
        )
    }

    /// The message as any member of `group` could be given it.
    fn shared_message(&mut self, group: &Group) -> Message {
        let publish = self.publish;
        let share = Share {
            filter: (&*group.filter).into(),
            qos: publish.qos,
            retain: publish.retain,
        };
        Message {
            share: Some(Box::new(share)),
            ..self.message(Origin::Session, publish.qos, publish.retain)
        }
    }

    /// Makes a message safe for persistent sessions, then tells those that are connected.
    fn append_all(&mut self, appends: Vec<Append>, sessions: Vec<Arc<Session>>) {
        let messages: Vec<Message> = appends
            .iter()
            .map(|append| append.message.clone())
            .collect();
        let appended = self
            .node
            .stores
            .inboxes
            .append_behind(appends, self.fence());
        let node = Arc::clone(self.node);
        self.durable.push(Box::pin(async move {
            let outcomes = appended.await?;
            let mut corked = Corked::new();
            let mut orphans = Vec::new();
            for ((outcome, session), message) in outcomes.iter().zip(&sessions).zip(&messages) {
                match outcome {
                    Appended::Stored { position, .. } => {
                        let mut state = session.lock();
                        if state.ended {
                            // It ended between the match and the append, and its end did not see this
                            // entry, which is no concern of the session that comes after it.
                            orphans.push(End {
                                client: session.client.clone(),
                                position: *position,
                                reason: EndReason::SessionEnded,
                            });
                            continue;
                        }
                        state.deliver_hint(&session.client, *position, message, &node);
                        corked.add(session, &mut state);
                    }
                    // The subscriber's declared overflow policy; not the publisher's concern.
                    Appended::Full | Appended::Dropped => {
                        node.metrics.dropped_queue_full.increment(1);
                    }
                    Appended::Repeated { .. } => {}
                }
            }
            if !orphans.is_empty() {
                node.stores.inboxes.end(orphans);
            }
            Ok(())
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_topics_name_their_device() {
        assert_eq!(device_of("d/car-7/push", "d"), Some("car-7"));
        assert_eq!(device_of("d/car-7", "d"), Some("car-7"));
        assert_eq!(device_of("d//x", "d"), None);
        assert_eq!(device_of("dd/car-7/x", "d"), None);
        assert_eq!(device_of("d", "d"), None);
    }
}
