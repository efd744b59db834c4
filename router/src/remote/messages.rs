//! What services say to access nodes: the messages of the package `moorline.node.v1`.
//!
//! Written by hand, as `protoc` would make them of a `.proto` file. A field is never renumbered and never changes its
//! type; whoever does not know a field passes over it. So processes of one version and the next understand each other.

use bytes::Bytes;
use moorline_mqtt::{ByteString, PublishProperties, QoS, TopicName, Version};

use crate::{
    Ban, BanTarget, BanView, ClientId, Delivery, DeliveryOutcome, Epoch, Message, MessageId,
    Origin, Position, SessionView, Share,
};

/// What cannot be understood, in words for a log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is missing or impossible")]
pub(super) struct NotUnderstood(&'static str);

/// Hints, in order. Answered by one [`DeliverAnswer`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DeliverBatch {
    /// Numbered by the sender.
    #[prost(uint64, tag = "1")]
    pub(super) batch: u64,
    /// The run of the node that is meant: another may listen at its address by now.
    #[prost(string, tag = "2")]
    pub(super) node: String,
    #[prost(message, repeated, tag = "3")]
    pub(super) deliveries: Vec<WireDelivery>,
}

/// What the node made of each hint of a batch, in the same order.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DeliverAnswer {
    #[prost(uint64, tag = "1")]
    pub(super) batch: u64,
    #[prost(message, repeated, tag = "2")]
    pub(super) outcomes: Vec<WireOutcome>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireDelivery {
    #[prost(string, tag = "1")]
    pub(super) client: String,
    #[prost(message, optional, tag = "2")]
    pub(super) position: Option<WirePosition>,
    #[prost(message, optional, tag = "3")]
    pub(super) message: Option<WireMessage>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct WirePosition {
    #[prost(uint64, tag = "1")]
    pub(super) generation: u64,
    #[prost(uint64, tag = "2")]
    pub(super) sequence: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireMessage {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    /// 0 is a push, 1 is of a session.
    #[prost(uint32, tag = "2")]
    pub(super) origin: u32,
    #[prost(string, tag = "3")]
    pub(super) topic: String,
    #[prost(uint32, tag = "4")]
    pub(super) qos: u32,
    #[prost(bool, tag = "5")]
    pub(super) retain: bool,
    /// As they stand in a PUBLISH of MQTT 5.0, without their length.
    #[prost(bytes = "bytes", optional, tag = "6")]
    pub(super) properties: Option<Bytes>,
    #[prost(bytes = "bytes", tag = "7")]
    pub(super) payload: Bytes,
    #[prost(uint64, tag = "8")]
    pub(super) accepted_at_ms: u64,
    #[prost(uint64, optional, tag = "9")]
    pub(super) expires_at_ms: Option<u64>,
    #[prost(string, optional, tag = "10")]
    pub(super) collapse_key: Option<String>,
    #[prost(message, optional, tag = "11")]
    pub(super) share: Option<WireShare>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireShare {
    #[prost(string, tag = "1")]
    pub(super) filter: String,
    #[prost(uint32, tag = "2")]
    pub(super) qos: u32,
    #[prost(bool, tag = "3")]
    pub(super) retain: bool,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct WireOutcome {
    #[prost(enumeration = "OutcomeKind", tag = "1")]
    pub(super) kind: i32,
    /// Of the connection, where it was sent.
    #[prost(uint64, tag = "2")]
    pub(super) epoch: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(super) enum OutcomeKind {
    /// Also what is meant by an outcome that the reader does not know.
    Busy = 0,
    Sent = 1,
    Behind = 2,
    NotHere = 3,
    Dropped = 4,
}

/// One client of one node; `by` where a newer connection displaces it.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct OfClient {
    #[prost(string, tag = "1")]
    pub(super) node: String,
    #[prost(string, tag = "2")]
    pub(super) client: String,
    #[prost(uint64, tag = "3")]
    pub(super) by: u64,
}

/// Whether there was one.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Found {
    #[prost(bool, tag = "1")]
    pub(super) found: bool,
}

/// What there was of a displaced connection.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct DisplaceAnswer {
    #[prost(bool, tag = "1")]
    pub(super) found: bool,
    #[prost(bool, tag = "2")]
    pub(super) session_over: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionsAsked {
    #[prost(string, tag = "1")]
    pub(super) node: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) clients: Vec<String>,
}

/// One entry for each client that was asked for, in the same order.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionsAnswer {
    #[prost(message, repeated, tag = "1")]
    pub(super) sessions: Vec<WireSession>,
}

/// Empty where there is no connection.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireSession {
    #[prost(message, optional, tag = "1")]
    pub(super) view: Option<WireView>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireView {
    #[prost(uint64, tag = "1")]
    pub(super) epoch: u64,
    #[prost(string, tag = "2")]
    pub(super) address: String,
    /// The protocol level of the CONNECT: 4 or 5.
    #[prost(uint32, tag = "3")]
    pub(super) version: u32,
    #[prost(string, tag = "4")]
    pub(super) transport: String,
    #[prost(uint32, tag = "5")]
    pub(super) keep_alive_s: u32,
    #[prost(bool, tag = "6")]
    pub(super) persistent: bool,
    #[prost(uint64, tag = "7")]
    pub(super) subscriptions: u64,
    #[prost(uint64, tag = "8")]
    pub(super) in_flight: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireTarget {
    #[prost(string, tag = "1")]
    pub(super) kind: String,
    #[prost(string, tag = "2")]
    pub(super) value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BansAsked {
    #[prost(message, optional, tag = "1")]
    pub(super) after: Option<WireTarget>,
    #[prost(uint64, tag = "2")]
    pub(super) limit: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BansAnswer {
    #[prost(message, repeated, tag = "1")]
    pub(super) bans: Vec<WireBan>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WireBan {
    #[prost(message, optional, tag = "1")]
    pub(super) target: Option<WireTarget>,
    #[prost(string, tag = "2")]
    pub(super) reason: String,
    #[prost(uint64, tag = "3")]
    pub(super) since_ms: u64,
    #[prost(uint64, optional, tag = "4")]
    pub(super) expires_at_ms: Option<u64>,
    #[prost(bool, tag = "5")]
    pub(super) automatic: bool,
}

fn qos(number: u32) -> Result<QoS, NotUnderstood> {
    match number {
        0 => Ok(QoS::AtMostOnce),
        1 => Ok(QoS::AtLeastOnce),
        2 => Ok(QoS::ExactlyOnce),
        _ => Err(NotUnderstood("qos")),
    }
}

pub(super) fn client(text: &str) -> Result<ClientId, NotUnderstood> {
    ClientId::parse(text).map_err(|_| NotUnderstood("client"))
}

fn count(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl From<Delivery> for WireDelivery {
    fn from(delivery: Delivery) -> Self {
        Self {
            client: delivery.client.as_str().to_owned(),
            position: delivery.position.map(|at| WirePosition {
                generation: at.generation,
                sequence: at.sequence,
            }),
            message: Some(delivery.message.into()),
        }
    }
}

impl TryFrom<WireDelivery> for Delivery {
    type Error = NotUnderstood;

    fn try_from(wire: WireDelivery) -> Result<Self, NotUnderstood> {
        Ok(Self {
            client: client(&wire.client)?,
            position: wire.position.map(|at| Position {
                generation: at.generation,
                sequence: at.sequence,
            }),
            message: wire.message.ok_or(NotUnderstood("message"))?.try_into()?,
        })
    }
}

impl From<Message> for WireMessage {
    fn from(message: Message) -> Self {
        Self {
            id: message.id.as_str().to_owned(),
            origin: message.origin as u32,
            topic: message.topic.as_str().to_owned(),
            qos: message.qos as u32,
            retain: message.retain,
            properties: message.properties.map(|properties| properties.to_bytes()),
            payload: message.payload,
            accepted_at_ms: message.accepted_at_ms,
            expires_at_ms: message.expires_at_ms,
            collapse_key: message.collapse_key.map(String::from),
            share: message.share.map(|share| WireShare {
                filter: share.filter.into(),
                qos: share.qos as u32,
                retain: share.retain,
            }),
        }
    }
}

impl TryFrom<WireMessage> for Message {
    type Error = NotUnderstood;

    fn try_from(wire: WireMessage) -> Result<Self, NotUnderstood> {
        let properties = wire.properties.map(PublishProperties::from_bytes);
        let share = wire.share.map(|share| {
            Ok(Box::new(Share {
                filter: share.filter.into(),
                qos: qos(share.qos)?,
                retain: share.retain,
            }))
        });
        Ok(Self {
            id: MessageId::parse(&wire.id).map_err(|_| NotUnderstood("message id"))?,
            origin: match wire.origin {
                0 => Origin::Push,
                1 => Origin::Session,
                _ => return Err(NotUnderstood("origin")),
            },
            topic: TopicName::parse(ByteString::from(wire.topic))
                .map_err(|_| NotUnderstood("topic"))?,
            qos: qos(wire.qos)?,
            retain: wire.retain,
            properties: properties
                .transpose()
                .map_err(|_| NotUnderstood("properties"))?
                .map(Box::new),
            payload: wire.payload,
            accepted_at_ms: wire.accepted_at_ms,
            expires_at_ms: wire.expires_at_ms,
            collapse_key: wire.collapse_key.map(Into::into),
            share: share.transpose()?,
        })
    }
}

impl From<DeliveryOutcome> for WireOutcome {
    fn from(outcome: DeliveryOutcome) -> Self {
        let (kind, epoch) = match outcome {
            DeliveryOutcome::Sent { epoch } => (OutcomeKind::Sent, epoch.0),
            DeliveryOutcome::Behind => (OutcomeKind::Behind, 0),
            DeliveryOutcome::NotHere => (OutcomeKind::NotHere, 0),
            DeliveryOutcome::Busy => (OutcomeKind::Busy, 0),
            DeliveryOutcome::Dropped => (OutcomeKind::Dropped, 0),
        };
        Self {
            kind: kind.into(),
            epoch,
        }
    }
}

impl From<WireOutcome> for DeliveryOutcome {
    fn from(wire: WireOutcome) -> Self {
        match wire.kind() {
            OutcomeKind::Sent => Self::Sent {
                epoch: Epoch(wire.epoch),
            },
            OutcomeKind::Behind => Self::Behind,
            OutcomeKind::NotHere => Self::NotHere,
            OutcomeKind::Busy => Self::Busy,
            OutcomeKind::Dropped => Self::Dropped,
        }
    }
}

impl From<SessionView> for WireView {
    fn from(view: SessionView) -> Self {
        Self {
            epoch: view.epoch.0,
            address: view.address,
            version: match view.version {
                Version::V3_1_1 => 4,
                Version::V5 => 5,
            },
            transport: view.transport,
            keep_alive_s: view.keep_alive_s.into(),
            persistent: view.persistent,
            subscriptions: view.subscriptions as u64,
            in_flight: view.in_flight as u64,
        }
    }
}

impl From<WireView> for SessionView {
    fn from(wire: WireView) -> Self {
        Self {
            epoch: Epoch(wire.epoch),
            address: wire.address,
            version: match wire.version {
                4 => Version::V3_1_1,
                _ => Version::V5,
            },
            transport: wire.transport,
            keep_alive_s: u16::try_from(wire.keep_alive_s).unwrap_or(u16::MAX),
            persistent: wire.persistent,
            subscriptions: count(wire.subscriptions),
            in_flight: count(wire.in_flight),
        }
    }
}

impl From<&BanTarget> for WireTarget {
    fn from(target: &BanTarget) -> Self {
        Self {
            kind: target.kind().to_owned(),
            value: target.value(),
        }
    }
}

impl TryFrom<WireTarget> for BanTarget {
    type Error = NotUnderstood;

    fn try_from(wire: WireTarget) -> Result<Self, NotUnderstood> {
        Self::parse(&wire.kind, &wire.value).map_err(|_| NotUnderstood("the target of a ban"))
    }
}

impl From<BanView> for WireBan {
    fn from(view: BanView) -> Self {
        Self {
            target: Some((&view.ban.target).into()),
            reason: view.ban.reason.into(),
            since_ms: view.ban.since_ms,
            expires_at_ms: view.ban.expires_at_ms,
            automatic: view.automatic,
        }
    }
}

impl TryFrom<WireBan> for BanView {
    type Error = NotUnderstood;

    fn try_from(wire: WireBan) -> Result<Self, NotUnderstood> {
        let target = wire.target.ok_or(NotUnderstood("the target of a ban"))?;
        Ok(Self {
            ban: Ban {
                target: target.try_into()?,
                reason: wire.reason.into(),
                since_ms: wire.since_ms,
                expires_at_ms: wire.expires_at_ms,
            },
            automatic: wire.automatic,
        })
    }
}

#[cfg(test)]
mod tests {
    use moorline_mqtt::UserProperties;
    use prost::Message as _;

    use super::*;

    /// A batch as a later version might send it.
    #[derive(Clone, PartialEq, prost::Message)]
    struct LaterBatch {
        #[prost(uint64, tag = "1")]
        batch: u64,
        #[prost(string, tag = "2")]
        node: String,
        #[prost(message, repeated, tag = "3")]
        deliveries: Vec<WireDelivery>,
        #[prost(message, optional, tag = "900")]
        later: Option<WireShare>,
    }

    fn delivery() -> Delivery {
        let properties = PublishProperties {
            user_properties: UserProperties::from([("k".into(), "v".into())]),
            content_type: Some("text/plain".into()),
            ..PublishProperties::default()
        };
        Delivery {
            client: ClientId::parse("car/7").unwrap(),
            position: Some(Position {
                generation: 3,
                sequence: 9,
            }),
            message: Message {
                id: MessageId::parse("m-1").unwrap(),
                origin: Origin::Session,
                topic: TopicName::from_static("d/car-7/é"),
                qos: QoS::ExactlyOnce,
                retain: true,
                properties: Some(Box::new(properties)),
                payload: Bytes::from_static(b"\x00\xffbytes"),
                accepted_at_ms: 12,
                expires_at_ms: Some(13),
                collapse_key: Some("c".into()),
                share: Some(Box::new(Share {
                    filter: "$share/g/a".into(),
                    qos: QoS::AtLeastOnce,
                    retain: false,
                })),
            },
        }
    }

    #[test]
    fn a_delivery_arrives_as_it_was_sent() {
        let sent = delivery();
        let bytes = WireDelivery::from(sent.clone()).encode_to_vec();
        let read = WireDelivery::decode(bytes.as_slice()).unwrap();
        let read = Delivery::try_from(read).unwrap();
        assert_eq!(
            (read.client, read.position, read.message),
            (sent.client, sent.position, sent.message)
        );
    }

    #[test]
    fn fields_that_a_later_version_adds_are_passed_over() {
        let later = LaterBatch {
            batch: 4,
            node: "n".to_owned(),
            deliveries: vec![delivery().into()],
            later: Some(WireShare::default()),
        };
        let read = DeliverBatch::decode(later.encode_to_vec().as_slice()).unwrap();
        assert_eq!((read.batch, read.node.as_str()), (4, "n"));
        assert_eq!(read.deliveries, [WireDelivery::from(delivery())]);
    }

    #[test]
    fn an_outcome_that_is_not_known_yet_leaves_the_message_to_the_inbox() {
        let later = WireOutcome {
            kind: 77,
            epoch: 12,
        };
        assert_eq!(DeliveryOutcome::from(later), DeliveryOutcome::Busy);
        for outcome in [
            DeliveryOutcome::Sent { epoch: Epoch(8) },
            DeliveryOutcome::Behind,
            DeliveryOutcome::NotHere,
            DeliveryOutcome::Busy,
            DeliveryOutcome::Dropped,
        ] {
            assert_eq!(DeliveryOutcome::from(WireOutcome::from(outcome)), outcome);
        }
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        let broken = |change: fn(&mut WireMessage)| {
            let mut wire = WireDelivery::from(delivery());
            change(wire.message.as_mut().unwrap());
            Delivery::try_from(wire).unwrap_err()
        };
        assert_eq!(broken(|m| m.qos = 3), NotUnderstood("qos"));
        assert_eq!(broken(|m| m.topic = "a/#".into()), NotUnderstood("topic"));
        assert_eq!(
            broken(|m| m.id = String::new()),
            NotUnderstood("message id")
        );
        assert_eq!(broken(|m| m.origin = 9), NotUnderstood("origin"));
        let properties = Some(Bytes::from_static(b"\xff"));
        let mut wire = WireDelivery::from(delivery());
        wire.message.as_mut().unwrap().properties = properties;
        assert!(Delivery::try_from(wire).is_err());
        assert!(Delivery::try_from(WireDelivery::default()).is_err());
    }
}
