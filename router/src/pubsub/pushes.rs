//! Pushes to a topic, from a process that holds no devices.

use std::sync::Arc;

use moorline_mqtt::{Publish, QoS};

use super::{PubSub, Publication};
use crate::{
    Append, Appended, ClientId, Delivery, Inboxes, Message, MessageId, Nodes, Origin, Retained,
    Routes, StoreError, unix_ms,
};

/// Publishes to subscribers on whatever node, and to the retained messages.
#[derive(Clone)]
pub struct TopicPushes {
    /// The way to subscribers.
    pub pubsub: Arc<dyn PubSub>,
    /// Retained messages.
    pub retained: Arc<dyn Retained>,
    /// For topics that belong to a device.
    pub inboxes: Arc<dyn Inboxes>,
    /// For topics that belong to a device.
    pub routes: Arc<dyn Routes>,
    /// The first level of topics that belong to a device, `d` by default.
    pub device_topics: String,
}

impl TopicPushes {
    /// Resolves when every persistent session that matches has it safe (QoS 1 and 2), and it is retained where it asks for that.
    /// `nodes` takes hints.
    ///
    /// # Errors
    /// When a store does not take it.
    pub async fn publish(
        &self,
        nodes: &dyn Nodes,
        id: MessageId,
        publish: Publish,
    ) -> Result<(), StoreError> {
        if let Some(client) = device_of(publish.topic.as_str(), &self.device_topics) {
            return self.push_to_device(nodes, client, id, publish).await;
        }
        let now_ms = unix_ms();
        let retained = publish.retain.then(|| {
            let kept = !publish.payload.is_empty();
            let message = kept.then(|| message_of(id.clone(), &publish, Origin::Session, true));
            let asked = self.retained.now();
            self.retained.set(&publish.topic, message.as_ref(), asked)
        });
        let is_waited_for = publish.qos > QoS::AtMostOnce;
        let publication = Publication {
            id,
            from: None,
            publish,
            published_at_ms: now_ms,
        };
        let published = self.pubsub.publish(publication, None);
        if is_waited_for {
            if let Some(retained) = retained {
                retained.await?;
            }
            published.await?;
        }
        Ok(())
    }

    async fn push_to_device(
        &self,
        nodes: &dyn Nodes,
        client: ClientId,
        id: MessageId,
        publish: Publish,
    ) -> Result<(), StoreError> {
        let message = message_of(id, &publish, Origin::Push, false);
        let (position, route) = if publish.qos == QoS::AtMostOnce {
            (None, self.routes.look_up(&client).await?)
        } else {
            let append = Append {
                client: client.clone(),
                message: message.clone(),
                fingerprint: None,
            };
            match self.inboxes.append(vec![append]).await?.pop() {
                Some(Appended::Stored { position, route }) => (Some(position), route),
                // The declared policy of the device's inbox.
                _ => return Ok(()),
            }
        };
        if let Some(route) = route {
            let delivery = Delivery {
                client,
                position,
                message,
            };
            nodes.deliver(&route.node, vec![delivery]).await;
        }
        Ok(())
    }
}

/// The client whose topic `topic` is.
fn device_of(topic: &str, prefix: &str) -> Option<ClientId> {
    let rest = topic.strip_prefix(prefix)?.strip_prefix('/')?;
    ClientId::parse(rest.split('/').next()?).ok()
}

fn message_of(id: MessageId, publish: &Publish, origin: Origin, retain: bool) -> Message {
    let now_ms = unix_ms();
    let mut properties = publish.properties.clone();
    let mut expires_at_ms = None;
    if let Some(kept) = &mut properties {
        let expiry = kept.message_expiry_interval_s.take();
        expires_at_ms = expiry.map(|seconds| now_ms + u64::from(seconds) * 1000);
        kept.topic_alias = None;
        kept.subscription_ids.clear();
    }
    Message {
        id,
        origin,
        topic: publish.topic.clone(),
        qos: publish.qos,
        retain,
        properties: properties.filter(|kept| **kept != moorline_mqtt::PublishProperties::default()),
        payload: publish.payload.clone(),
        accepted_at_ms: now_ms,
        expires_at_ms,
        collapse_key: None,
        share: None,
    }
}
