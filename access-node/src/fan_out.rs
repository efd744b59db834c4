//! Who gets a PUBLISH, and the PUBLISH encoded for them.

use std::sync::Arc;

use moorline_mqtt::{EncodedPublish, Publish, QoS, SubscriptionOptions, TopicName, Version};
use moorline_router::ClientId;
use smallvec::SmallVec;

use crate::node::Node;
use crate::session::Session;
use crate::subscriptions::{Subscriber, Subscriptions};

/// One session and the subscriptions of it that match.
pub(crate) struct Match<S = Session> {
    pub(crate) subscriber: Subscriber<S>,
    pub(crate) subscription_ids: SmallVec<[u32; 1]>,
}

/// Each session that matches once, with the highest QoS of its subscriptions and the identifiers
/// of all of them (MQTT 5.0 section 3.3.4).
pub(crate) fn find_matches(
    node: &Node,
    topic: &TopicName,
    from: Option<&ClientId>,
) -> SmallVec<[Match; 4]> {
    matches_of(&node.subscriptions, topic.as_str(), |options, session| {
        !(options.no_local && from == Some(&session.client))
    })
}

/// The same of any index; `hears` leaves subscriptions out.
pub(crate) fn matches_of<S>(
    index: &Subscriptions<S>,
    topic: &str,
    hears: impl Fn(&SubscriptionOptions, &S) -> bool,
) -> SmallVec<[Match<S>; 4]> {
    let mut matches: SmallVec<[Match<S>; 4]> = SmallVec::new();
    index.for_each_match(topic, |subscriber| {
        if !hears(&subscriber.options, &subscriber.session) {
            return;
        }
        let id = subscriber.subscription_id;
        matches.push(Match {
            subscriber: subscriber.duplicate(),
            subscription_ids: if id > 0 {
                SmallVec::from_elem(id, 1)
            } else {
                SmallVec::new()
            },
        });
    });
    if matches.len() > 1 {
        matches.sort_by_key(|found| Arc::as_ptr(&found.subscriber.session).addr());
        matches.dedup_by(|next, kept| {
            let same = Arc::ptr_eq(&next.subscriber.session, &kept.subscriber.session);
            if same {
                let options = &mut kept.subscriber.options;
                options.qos = options.qos.max(next.subscriber.options.qos);
                options.retain_as_published |= next.subscriber.options.retain_as_published;
                kept.subscription_ids
                    .extend_from_slice(&next.subscription_ids);
            }
            same
        });
    }
    matches
}

/// The PUBLISH encoded once a kind of receiver, not once a receiver.
pub(crate) struct FanOut<'a> {
    publish: &'a Publish,
    encoded: SmallVec<[(Version, QoS, bool, EncodedPublish); 2]>,
}

impl<'a> FanOut<'a> {
    pub(crate) fn new(publish: &'a Publish) -> Self {
        Self {
            publish,
            encoded: SmallVec::new(),
        }
    }

    pub(crate) fn encoded(
        &mut self,
        version: Version,
        qos: QoS,
        retain: bool,
        subscription_ids: &[u32],
    ) -> EncodedPublish {
        if version == Version::V5 && !subscription_ids.is_empty() {
            let publish = self.publish;
            return EncodedPublish::with_subscription_ids(
                version,
                publish,
                qos,
                retain,
                subscription_ids,
            );
        }
        let kind = (version, qos, retain);
        if let Some((.., held)) = self
            .encoded
            .iter()
            .find(|(v, q, r, _)| (*v, *q, *r) == kind)
        {
            return held.clone();
        }
        let encoded = EncodedPublish::new(version, self.publish, qos, retain);
        self.encoded.push((version, qos, retain, encoded.clone()));
        encoded
    }
}
