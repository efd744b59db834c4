//! Tells the exchange `{prefix}.events` that devices come and go.

use std::sync::Arc;

use bytes::Bytes;
use lapin::types::ShortString;
use lapin::{BasicProperties, ExchangeKind};
use serde::Serialize;

use super::publisher::sender_hash;
use super::{Config, Declaration, Publisher, Publishing, Topology};
use crate::MessageId;
use crate::events::{Events, Presence, PresenceChange};

/// What waits while the broker is away; beyond it events are lost.
const MESSAGES_MAX: usize = 20_000;
const BYTES_MAX: usize = 32 << 20;

/// Events over RabbitMQ: fire and forget, those of one device in order. A topic exchange, routing keys `device.online` and
/// `device.offline`; the body is JSON.
pub struct RabbitEvents {
    exchange: ShortString,
    publisher: Arc<Publisher>,
}

#[derive(Serialize)]
struct Body<'a> {
    r#type: &'static str,
    client: &'a str,
    node: &'a str,
    epoch: u64,
    at_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

impl RabbitEvents {
    /// Waits for nobody. Works on the runtime that this is called in.
    pub fn open(config: &Config) -> Arc<Self> {
        let exchange = config.name("events");
        let topology = Topology::new();
        topology.add([Declaration::Exchange {
            name: exchange.clone(),
            kind: ExchangeKind::Topic,
        }]);
        let config = Config {
            publish_messages_max: MESSAGES_MAX,
            publish_bytes_max: BYTES_MAX,
            ..config.clone()
        };
        Arc::new(Self {
            exchange,
            publisher: Publisher::new(&config, "moorline events", 1, &topology),
        })
    }
}

impl Events for RabbitEvents {
    fn presence(&self, presence: Presence) {
        let (name, reason) = match presence.change {
            PresenceChange::Online => ("device.online", None),
            PresenceChange::Offline { reason } => ("device.offline", Some(reason)),
        };
        let body = Body {
            r#type: name,
            client: presence.client.as_str(),
            node: presence.node.as_str(),
            epoch: presence.epoch.0,
            at_ms: presence.at_ms,
            reason,
        };
        let Ok(body) = serde_json::to_vec(&body) else {
            return;
        };
        let publishing = Publishing {
            exchange: self.exchange.clone(),
            routing_key: name.into(),
            id: MessageId::generate(),
            properties: BasicProperties::default()
                .with_content_type("application/json".into())
                .with_type(name.into())
                .with_timestamp(presence.at_ms / 1_000),
            // Whoever wants to hear of it later has a durable queue.
            persistent: true,
            mandatory: false,
            body: Bytes::from(body),
        };
        let sender = sender_hash(presence.client.as_str());
        // It has its place; nobody waits for the answer.
        drop(self.publisher.publish(sender, publishing, None));
    }
}
