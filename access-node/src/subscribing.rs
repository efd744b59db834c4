//! SUBSCRIBE and UNSUBSCRIBE of a connection, and the retained messages that a new subscription
//! gets.

use std::sync::Arc;

use bytes::BytesMut;
use moorline_mqtt::{
    Packet, QoS, ReasonCode, RetainHandling, SubAck, Subscribe, SubscriptionOptions, TopicFilter,
    Unsubscribe,
};
use moorline_router::{Append, Appended, Message, Origin};

use crate::close_reason::CloseReason;
use crate::connection::{Connection, PendingAnswer};
use crate::inbound::Turn;
use crate::node::Node;
use crate::outbound::Corked;
use crate::publish::{Durable, FanOut};
use crate::session::{HeldSubscription, Session};
use crate::subscriptions::Subscriber;

impl Connection {
    pub(crate) fn on_subscribe(
        &mut self,
        subscribe: &Subscribe,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        let mut reasons = Vec::with_capacity(subscribe.filters.len());
        let mut retained = Vec::new();
        for (filter, options) in &subscribe.filters {
            let id = subscribe.subscription_id.unwrap_or(0);
            match self.add_subscription(filter, *options, id) {
                Ok(is_new) => {
                    reasons.push(match options.qos {
                        QoS::AtMostOnce => ReasonCode::Success,
                        QoS::AtLeastOnce => ReasonCode::GrantedQoS1,
                        QoS::ExactlyOnce => ReasonCode::GrantedQoS2,
                    });
                    let wanted = match options.retain_handling {
                        RetainHandling::Send => true,
                        RetainHandling::SendIfNew => is_new,
                        RetainHandling::DoNotSend => false,
                    };
                    // A shared subscription gets none (section 4.8.2).
                    if wanted && filter.share().is_none() {
                        let messages = self.node.retained.matching(filter);
                        retained.push((options.qos, id, messages));
                    }
                }
                Err(reason) => reasons.push(reason),
            }
        }
        let changed = reasons.iter().any(|reason| !reason.is_error());
        let packet_id = subscribe.packet_id;
        let answer = Packet::SubAck(SubAck {
            packet_id,
            reasons,
            properties: None,
        });
        self.answer_when_saved(&answer, changed, turn);
        self.write_replies(turn);
        for (qos, id, messages) in retained {
            self.send_retained(qos, id, &messages, turn);
        }
        Ok(())
    }

    pub(crate) fn on_unsubscribe(
        &mut self,
        unsubscribe: &Unsubscribe,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        let reasons: Vec<ReasonCode> = unsubscribe
            .filters
            .iter()
            .map(|filter| {
                if self.remove_subscription(filter) {
                    ReasonCode::Success
                } else {
                    ReasonCode::NoSubscriptionExisted
                }
            })
            .collect();
        let changed = reasons.contains(&ReasonCode::Success);
        let packet_id = unsubscribe.packet_id;
        let answer = Packet::UnsubAck(SubAck {
            packet_id,
            reasons,
            properties: None,
        });
        self.answer_when_saved(&answer, changed, turn);
        Ok(())
    }

    /// A persistent session's change is durable before it is acknowledged.
    fn answer_when_saved(&mut self, answer: &Packet, changed: bool, turn: &mut Turn) {
        let mut packet = BytesMut::new();
        answer
            .encode(self.version, &mut packet)
            .expect("at most as many codes as the request had filters");
        let record = {
            let mut state = self.session.lock();
            let is_ours = state.link_of(self.epoch).is_some();
            (changed && is_ours && state.is_persistent())
                .then(|| state.record(&self.session.client))
        };
        match record.map(|record| self.node.stores.sessions.save(record)) {
            None => turn.replies.extend_from_slice(&packet),
            Some(saved) => {
                self.put_in_line(Some(saved), PendingAnswer::Encoded(packet.freeze()));
            }
        }
    }

    /// Says whether the session did not hold this filter before.
    fn add_subscription(
        &self,
        filter: &TopicFilter,
        options: SubscriptionOptions,
        subscription_id: u32,
    ) -> Result<bool, ReasonCode> {
        let limits = &self.node.config;
        let plain = filter.share().map_or(filter.as_str(), |(_, filter)| filter);
        if plain.split('/').count() > limits.topic_levels_max {
            return Err(ReasonCode::TopicFilterInvalid);
        }
        let mut state = self.session.lock();
        if state.link_of(self.epoch).is_none() {
            // Displaced: the session is another connection's, or gone.
            return Err(ReasonCode::UnspecifiedError);
        }
        let held = state
            .subscriptions
            .iter_mut()
            .find(|held| &*held.filter == filter.as_str());
        let key = match held {
            Some(held) => {
                held.options = options;
                held.subscription_id = subscription_id;
                Arc::clone(&held.filter)
            }
            None => {
                if state.subscriptions.len() >= limits.subscriptions_max {
                    return Err(ReasonCode::QuotaExceeded);
                }
                let key: Arc<str> = filter.as_str().into();
                let filter = Arc::clone(&key);
                state.subscriptions.reserve_exact(1);
                state.subscriptions.push(HeldSubscription {
                    filter,
                    options,
                    subscription_id,
                });
                key
            }
        };
        drop(state);
        let session = Arc::clone(&self.session);
        let subscriber = Subscriber {
            session,
            options,
            subscription_id,
        };
        let is_new = self.node.subscribe(&key, filter, subscriber);
        if self.session.lock().ended {
            // Ended meanwhile by a newer connection, which did not find this subscription yet.
            self.node.unsubscribe(&key, &self.session);
        }
        Ok(is_new)
    }

    fn remove_subscription(&self, filter: &TopicFilter) -> bool {
        let mut state = self.session.lock();
        let before = state.subscriptions.len();
        state
            .subscriptions
            .retain(|held| &*held.filter != filter.as_str());
        let removed = state.subscriptions.len() < before;
        drop(state);
        self.node.unsubscribe(filter.as_str(), &self.session) && removed
    }

    fn send_retained(
        &mut self,
        qos: QoS,
        subscription_id: u32,
        messages: &[Arc<Message>],
        turn: &mut Turn,
    ) {
        let persistent = self.session.lock().is_persistent();
        let ids: &[u32] = if subscription_id > 0 {
            &[subscription_id]
        } else {
            &[]
        };
        let mut appends = Vec::new();
        for message in messages {
            let qos = message.qos.min(qos);
            if persistent && qos > QoS::AtMostOnce {
                let mut message = Message {
                    origin: Origin::Session,
                    qos,
                    ..Message::clone(message)
                };
                if !ids.is_empty() {
                    let properties = message.properties.get_or_insert_default();
                    properties.subscription_ids = ids.to_vec();
                }
                let client = self.session.client.clone();
                appends.push(Append {
                    client,
                    message,
                    fingerprint: None,
                });
                continue;
            }
            let publish = crate::outbound::for_device(self.version, message);
            let encoded = FanOut::new(&publish).encoded(self.version, qos, true, ids);
            let mut state = self.session.lock();
            state.deliver_live(&encoded, message.expires_at_ms, &self.node);
            turn.corked.add(&self.session, &mut state);
        }
        if !appends.is_empty() {
            let sent = append_retained(&self.node, &self.session, appends);
            // Nothing is answered, but the line waits for it: what the device publishes next is
            // acknowledged after it.
            self.put_in_line(Some(sent), PendingAnswer::Encoded(bytes::Bytes::new()));
        }
    }
}

fn append_retained(node: &Arc<Node>, session: &Arc<Session>, appends: Vec<Append>) -> Durable {
    let messages: Vec<Message> = appends
        .iter()
        .map(|append| append.message.clone())
        .collect();
    let appended = node.stores.inboxes.append(appends);
    let (node, session) = (Arc::clone(node), Arc::clone(session));
    Box::pin(async move {
        let outcomes = appended.await?;
        let mut corked = Corked::new();
        let mut state = session.lock();
        for (outcome, message) in outcomes.iter().zip(&messages) {
            if let Appended::Stored { position, .. } = outcome {
                state.deliver_hint(&session.client, *position, message, &node);
            }
        }
        corked.add(&session, &mut state);
        Ok(())
    })
}
