//! SUBSCRIBE and UNSUBSCRIBE of a connection.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::BytesMut;
use moorline_mqtt::{
    Packet, QoS, ReasonCode, RetainHandling, SubAck, Subscribe, SubscriptionOptions, TopicFilter,
    Unsubscribe,
};

use crate::close_reason::CloseReason;
use crate::cluster::exchange::subscriptions_in_force;
use crate::cluster::until_stored;
use crate::connection::{Connection, PendingAnswer};
use crate::inbound::Turn;
use crate::refusal::{Refusal, reason_properties};
use crate::retained_feed::Fed;
use crate::session::HeldSubscription;
use crate::subscriptions::Subscriber;

/// Beyond so many in one UNSUBSCRIBE it pays to gather what is held first.
const FEW_FILTERS: usize = 32;

impl Connection {
    pub(crate) fn on_subscribe(
        &mut self,
        subscribe: &Subscribe,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        let mut reasons = Vec::with_capacity(subscribe.filters.len());
        let mut why = "";
        let mut retained_wanted = false;
        // Each filter is compared with those held: a packet with more of them than anyone may hold
        // would keep the thread from other devices.
        let filters_max = self.node.config.subscriptions_max;
        for (at, (filter, options)) in subscribe.filters.iter().enumerate() {
            let id = subscribe.subscription_id.unwrap_or(0);
            let added = match at < filters_max {
                true => self.add_subscription(filter, *options, id),
                false => Err(Refusal::new(
                    ReasonCode::QuotaExceeded,
                    "more filters in one packet than subscriptions a device may have",
                )),
            };
            match added {
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
                        self.want_retained(Fed::new(filter, options.qos, id));
                        retained_wanted = true;
                    }
                }
                Err(refusal) => {
                    reasons.push(refusal.reason);
                    why = refusal.why;
                }
            }
        }
        let changed = reasons.iter().any(|reason| !reason.is_error());
        let packet_id = subscribe.packet_id;
        let answer = self.telling().explained(why, |text| {
            Packet::SubAck(SubAck {
                packet_id,
                reasons: reasons.clone(),
                properties: reason_properties(text),
            })
        });
        self.answer_when_saved(answer, changed, turn)?;
        if retained_wanted {
            self.catch_up_before_feeding();
        }
        self.write_replies(turn);
        self.feed_retained(turn);
        Ok(())
    }

    /// A new subscription gets what is retained as room appears.
    fn want_retained(&mut self, fed: Fed) {
        let mut state = self.session.lock();
        state.feed.get_or_insert_default().add(fed);
        self.feeding = true;
    }

    pub(crate) fn on_unsubscribe(
        &mut self,
        unsubscribe: &Unsubscribe,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        let mut held = (unsubscribe.filters.len() > FEW_FILTERS).then(|| self.filters_held());
        // Once: a filter named again and again is looked for among those held only the first time.
        let mut is_held = |filter: &str| held.as_mut().is_none_or(|held| held.remove(filter));
        let reasons: Vec<ReasonCode> = unsubscribe
            .filters
            .iter()
            .map(|filter| {
                if is_held(filter.as_str()) && self.remove_subscription(filter) {
                    ReasonCode::Success
                } else {
                    ReasonCode::NoSubscriptionExisted
                }
            })
            .collect();
        let changed = reasons.contains(&ReasonCode::Success);
        let packet_id = unsubscribe.packet_id;
        let answer = self.telling().explained("", |_| {
            Packet::UnsubAck(SubAck {
                packet_id,
                reasons: reasons.clone(),
                properties: None,
            })
        });
        self.answer_when_saved(answer, changed, turn)
    }

    fn filters_held(&self) -> HashSet<Arc<str>> {
        let state = self.session.lock();
        let filters = state.subscriptions.iter();
        filters.map(|held| Arc::clone(&held.filter)).collect()
    }

    /// A persistent session's change is durable before it is acknowledged.
    fn answer_when_saved(
        &mut self,
        packet: BytesMut,
        changed: bool,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        if packet.is_empty() {
            // It must be answered, and must not be with as many codes ([MQTT-3.1.2-24]).
            return Err(CloseReason::LimitExceeded(ReasonCode::PacketTooLarge));
        }
        let is_stored = {
            let mut state = self.session.lock();
            changed && state.link_of(self.epoch).is_some() && state.keeps_inbox()
        };
        let saved = is_stored.then(|| {
            let (session, epoch) = (Arc::clone(&self.session), self.epoch);
            until_stored(&self.node, move |node| {
                let record = session.lock().record(&session.client);
                node.stores.sessions.save(epoch, record)
            })
        });
        if changed && self.node.cluster.is_some() {
            let (node, client) = (Arc::clone(&self.node), self.session.client.clone());
            let in_force = Box::pin(subscriptions_in_force(node, client, saved));
            self.hold();
            self.put_in_line(Some(in_force), PendingAnswer::Subscribed(packet.freeze()));
            return Ok(());
        }
        match saved {
            None => turn.replies.extend_from_slice(&packet),
            Some(saved) => {
                self.put_in_line(Some(saved), PendingAnswer::Encoded(packet.freeze()));
            }
        }
        Ok(())
    }

    /// Says whether the session did not hold this filter before.
    fn add_subscription(
        &self,
        filter: &TopicFilter,
        options: SubscriptionOptions,
        subscription_id: u32,
    ) -> Result<bool, Refusal> {
        let limits = &self.node.config;
        let plain = filter.share().map_or(filter.as_str(), |(_, filter)| filter);
        if plain.split('/').count() > limits.topic_levels_max {
            return Err(Refusal::new(
                ReasonCode::TopicFilterInvalid,
                "the filter has more levels than the server takes",
            ));
        }
        let mut state = self.session.lock();
        if state.link_of(self.epoch).is_none() {
            // Displaced: the session is another connection's, or gone.
            return Err(Refusal::new(
                ReasonCode::UnspecifiedError,
                "a newer connection has this session",
            ));
        }
        if state
            .identity()
            .is_some_and(|identity| !identity.may_subscribe(filter))
        {
            self.node.metrics.denied_subscribe.increment(1);
            tracing::debug!(client = %self.session.client, filter = filter.as_str(), "subscribe denied");
            return Err(Refusal::new(
                ReasonCode::NotAuthorized,
                "the device may not have every topic of this filter",
            ));
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
                    return Err(Refusal::new(
                        ReasonCode::QuotaExceeded,
                        "the device has as many subscriptions as the server takes",
                    ));
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
        if let Some(feed) = &mut state.feed {
            feed.remove(filter.as_str());
        }
        let before = state.subscriptions.len();
        state
            .subscriptions
            .retain(|held| &*held.filter != filter.as_str());
        let removed = state.subscriptions.len() < before;
        drop(state);
        self.node.unsubscribe(filter.as_str(), &self.session) && removed
    }
}
