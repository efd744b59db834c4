//! A publish to a device's own topics, which is a push to that device.

use std::sync::Arc;

use moorline_mqtt::QoS;
use moorline_router::{Append, Appended, ClientId, Delivery, DeliveryOutcome, MessageId, Origin};

use super::Routing;
use crate::cluster::again_until_stored;
use crate::cluster::forward::Forwarded;
use crate::message_parts::{stable_hash, supplied_id};
use crate::node::Node;
use crate::outbound::{Corked, deliver};

impl Routing<'_> {
    /// A permitted publish to a device's own topics is a push to that device.
    pub(super) fn push_to_device(&mut self, owner: &str, corked: &mut Corked) -> u64 {
        let Ok(client) = ClientId::parse(owner) else {
            return 0;
        };
        let qos = self.publish.qos;
        let message = self.message(Origin::Push, qos, false);
        if qos == QoS::AtMostOnce {
            let delivery = Delivery {
                client,
                position: None,
                message,
            };
            let outcome = deliver(self.node, &delivery, corked);
            if let (DeliveryOutcome::NotHere, Some(cluster)) = (outcome, &self.node.cluster) {
                let node = None;
                let sent = cluster.forwarding.send(Forwarded { delivery, node });
                return u64::from(sent);
            }
            return u64::from(matches!(outcome, DeliveryOutcome::Sent { .. }));
        }
        let fingerprint = self.fingerprint();
        let append = Append {
            client: client.clone(),
            message: message.clone(),
            fingerprint,
        };
        let pushes = self.fences.map(|fences| &fences.pushes);
        let inboxes = &self.node.stores.inboxes;
        let appended = inboxes.append_behind(vec![append.clone()], pushes);
        let node = Arc::clone(self.node);
        // A device waits for its acknowledgement as long as it takes.
        let waits = pushes.is_some();
        self.durable.push(Box::pin(async move {
            let appended = match waits {
                true => {
                    let again = move |node: &Node| node.stores.inboxes.append(vec![append.clone()]);
                    again_until_stored(&node, appended, again).await
                }
                false => appended.await,
            };
            let mut outcome = appended?.pop();
            let mut message = message;
            if let Some(Appended::Repeated {
                fingerprint: first, ..
            }) = &outcome
                && Some(*first) != fingerprint
            {
                // The id is another message's: this one needs its own.
                message.id = MessageId::generate();
                let (client, message) = (client.clone(), message.clone());
                let append = Append {
                    client,
                    message,
                    fingerprint: None,
                };
                outcome = node.stores.inboxes.append(vec![append]).await?.pop();
            }
            match outcome {
                Some(Appended::Stored {
                    position,
                    route: Some(route),
                }) => {
                    let position = Some(position);
                    let delivery = Delivery {
                        client,
                        position,
                        message,
                    };
                    match &node.cluster {
                        Some(cluster) if route.node != node.id => {
                            let node = Some(route.node);
                            cluster.forwarding.send(Forwarded { delivery, node });
                        }
                        _ => {
                            deliver(&node, &delivery, &mut Corked::new());
                        }
                    }
                }
                // The declared policy of the other device's inbox; not the publisher's concern.
                Some(Appended::Full | Appended::Dropped) => {
                    node.metrics.dropped_queue_full.increment(1);
                }
                // Here or nowhere: it waits. Or it was accepted before.
                Some(Appended::Stored { .. } | Appended::Repeated { .. }) | None => {}
            }
            Ok(())
        }));
        1
    }

    /// What tells a repetition from another message: where the device has named the message itself, whose
    /// id may be one that is in use, and in a cluster, where an append without an answer is made again.
    fn fingerprint(&self) -> Option<u64> {
        let publish = self.publish;
        if self.node.cluster.is_none() {
            supplied_id(publish)?;
        }
        Some(stable_hash([
            publish.topic.as_str().as_bytes(),
            &publish.payload,
        ]))
    }
}
