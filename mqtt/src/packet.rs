//! The packets of both versions as Rust values.
//!
//! One set of types serves both versions: fields that only MQTT 5.0 has are left empty by a 3.1.1
//! peer and not written to one. Text and payloads are slices of the buffer they were read from.

use std::fmt;
use std::num::NonZeroU16;

use bytes::Bytes;
use bytestring::ByteString;

use crate::ReasonCode;
use crate::topic::{TopicFilter, TopicName};

/// The protocol level that a CONNECT asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// MQTT 3.1.1, protocol level 4.
    V3_1_1,
    /// MQTT 5.0, protocol level 5.
    V5,
}

/// How often a message may arrive (MQTT 5.0 section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum QoS {
    /// QoS 0.
    AtMostOnce = 0,
    /// QoS 1.
    AtLeastOnce = 1,
    /// QoS 2.
    ExactlyOnce = 2,
}

impl QoS {
    /// The QoS in the lowest two bits; 3 is none ([MQTT-3.3.1-4]).
    pub(crate) fn from_bits(bits: u8) -> Option<Self> {
        match bits & 0b11 {
            0 => Some(Self::AtMostOnce),
            1 => Some(Self::AtLeastOnce),
            2 => Some(Self::ExactlyOnce),
            _ => None,
        }
    }
}

/// A packet identifier; zero is not one ([MQTT-2.2.1-3]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PacketId(pub NonZeroU16);

/// User properties in the order in which they were sent ([MQTT-3.1.3-10]).
pub type UserProperties = Vec<(ByteString, ByteString)>;

/// Any control packet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant's type has the documentation")]
pub enum Packet {
    Connect(Box<Connect>),
    ConnAck(Box<ConnAck>),
    Publish(Publish),
    PubAck(Ack),
    PubRec(Ack),
    PubRel(Ack),
    PubComp(Ack),
    Subscribe(Box<Subscribe>),
    SubAck(SubAck),
    Unsubscribe(Box<Unsubscribe>),
    UnsubAck(SubAck),
    PingReq,
    PingResp,
    Disconnect(Disconnect),
    Auth(Box<Auth>),
}

/// CONNECT (section 3.1). Its `Debug` shows no password.
#[derive(Clone, PartialEq, Eq)]
pub struct Connect {
    /// Which version the rest of the connection speaks.
    pub version: Version,
    /// Clean Start (5.0) or Clean Session (3.1.1).
    pub clean_start: bool,
    /// Seconds; 0 switches keep alive off.
    pub keep_alive_s: u16,
    /// Empty where the server is to choose one.
    pub client_id: ByteString,
    /// What to publish when the connection ends without a DISCONNECT.
    pub will: Option<Box<Will>>,
    /// User name.
    pub username: Option<ByteString>,
    /// Password: binary data in both versions.
    pub password: Option<Bytes>,
    /// Properties; the defaults for 3.1.1.
    pub properties: ConnectProperties,
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect")
            .field("version", &self.version)
            .field("clean_start", &self.clean_start)
            .field("keep_alive_s", &self.keep_alive_s)
            .field("client_id", &self.client_id)
            .field("will", &self.will)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "…"))
            .field("properties", &self.properties)
            .finish()
    }
}

/// The properties of CONNECT (section 3.1.2.11).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectProperties {
    /// Seconds; `None` is 0: the session ends with the connection. `u32::MAX` never expires.
    pub session_expiry_interval_s: Option<u32>,
    /// How many QoS 1 and 2 PUBLISH the client takes at once; `None` is 65,535.
    pub receive_maximum: Option<NonZeroU16>,
    /// Bytes; `None` is no limit but the protocol's.
    pub maximum_packet_size: Option<u32>,
    /// Highest topic alias that the client takes; `None` is 0.
    pub topic_alias_maximum: Option<u16>,
    /// Whether CONNACK may carry response information.
    pub request_response_information: Option<bool>,
    /// Whether reason strings and user properties may come in any packet.
    pub request_problem_information: Option<bool>,
    /// User properties.
    pub user_properties: UserProperties,
    /// Extended authentication method.
    pub authentication_method: Option<ByteString>,
    /// Extended authentication data.
    pub authentication_data: Option<Bytes>,
}

/// The will message of a CONNECT (section 3.1.2.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Will {
    /// Where it is published.
    pub topic: TopicName,
    /// What is published.
    pub payload: Bytes,
    /// With which QoS.
    pub qos: QoS,
    /// Whether it is retained.
    pub retain: bool,
    /// Seconds between the end of the connection and the publication.
    pub delay_interval_s: u32,
    /// The rest of the will properties, as those of a PUBLISH.
    pub properties: Option<Box<PublishProperties>>,
}

/// CONNACK (section 3.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnAck {
    /// Whether the server has a session for this client.
    pub session_present: bool,
    /// [`ReasonCode::Success`] or why not; written as the nearest return code to a 3.1.1 client.
    pub reason: ReasonCode,
    /// Properties; not written to a 3.1.1 client.
    pub properties: ConnAckProperties,
}

/// The properties of CONNACK (section 3.2.2.3). `None` leaves a property out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub struct ConnAckProperties {
    pub session_expiry_interval_s: Option<u32>,
    pub receive_maximum: Option<NonZeroU16>,
    /// `None` is QoS 2; may be only 0 or 1.
    pub maximum_qos: Option<QoS>,
    pub retain_available: Option<bool>,
    pub maximum_packet_size: Option<u32>,
    pub assigned_client_id: Option<ByteString>,
    pub topic_alias_maximum: Option<u16>,
    pub reason_string: Option<ByteString>,
    pub user_properties: UserProperties,
    pub wildcard_subscription_available: Option<bool>,
    pub subscription_ids_available: Option<bool>,
    pub shared_subscription_available: Option<bool>,
    pub server_keep_alive_s: Option<u16>,
    pub response_information: Option<ByteString>,
    pub server_reference: Option<ByteString>,
    pub authentication_method: Option<ByteString>,
    pub authentication_data: Option<Bytes>,
}

/// PUBLISH (section 3.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Whether this may be a repeated attempt.
    pub dup: bool,
    /// Quality of service.
    pub qos: QoS,
    /// Retain.
    pub retain: bool,
    /// The topic; empty only with a topic alias (5.0).
    pub topic: TopicName,
    /// Present exactly where `qos` is above 0.
    pub packet_id: Option<PacketId>,
    /// `None` where there is not a single property, so that the common packet allocates nothing.
    pub properties: Option<Box<PublishProperties>>,
    /// The application message.
    pub payload: Bytes,
}

/// The properties of PUBLISH (section 3.3.2.3) and those of a will that become one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub struct PublishProperties {
    /// Whether the payload says of itself that it is UTF-8.
    pub payload_is_utf8: Option<bool>,
    pub message_expiry_interval_s: Option<u32>,
    pub topic_alias: Option<NonZeroU16>,
    pub response_topic: Option<TopicName>,
    pub correlation_data: Option<Bytes>,
    pub user_properties: UserProperties,
    /// Several only from a server to a client.
    pub subscription_ids: Vec<u32>,
    pub content_type: Option<ByteString>,
}

/// PUBACK, PUBREC, PUBREL and PUBCOMP (sections 3.4 to 3.7), which differ only in their type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// Which PUBLISH this answers.
    pub packet_id: PacketId,
    /// [`ReasonCode::Success`] from a 3.1.1 peer.
    pub reason: ReasonCode,
    /// `None` where there are none.
    pub properties: Option<Box<ReasonProperties>>,
}

/// The properties that most answers share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReasonProperties {
    /// For a person who reads logs.
    pub reason_string: Option<ByteString>,
    /// User properties.
    pub user_properties: UserProperties,
}

/// SUBSCRIBE (section 3.8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe {
    /// Answered by the SUBACK of the same id.
    pub packet_id: PacketId,
    /// At least one ([MQTT-3.8.3-2]).
    pub filters: Vec<(TopicFilter, SubscriptionOptions)>,
    /// 1 to 268,435,455.
    pub subscription_id: Option<u32>,
    /// User properties.
    pub user_properties: UserProperties,
}

/// The options of one filter of a SUBSCRIBE (section 3.8.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubscriptionOptions {
    /// The highest QoS at which messages are sent.
    pub qos: QoS,
    /// Not back to the connection that published.
    pub no_local: bool,
    /// Whether forwarded messages keep the RETAIN flag they were published with.
    pub retain_as_published: bool,
    /// What happens to retained messages when the subscription is made.
    pub retain_handling: RetainHandling,
}

/// When retained messages are sent for a new subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RetainHandling {
    /// At each SUBSCRIBE.
    Send = 0,
    /// Only if the subscription did not exist before.
    SendIfNew = 1,
    /// Never.
    DoNotSend = 2,
}

/// SUBACK and UNSUBACK (sections 3.9 and 3.11).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubAck {
    /// The id of the SUBSCRIBE or UNSUBSCRIBE.
    pub packet_id: PacketId,
    /// One a filter, in their order. Not written in an UNSUBACK to a 3.1.1 client.
    pub reasons: Vec<ReasonCode>,
    /// `None` where there are none.
    pub properties: Option<Box<ReasonProperties>>,
}

/// UNSUBSCRIBE (section 3.10).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsubscribe {
    /// Answered by the UNSUBACK of the same id.
    pub packet_id: PacketId,
    /// At least one ([MQTT-3.10.3-2]).
    pub filters: Vec<TopicFilter>,
    /// User properties.
    pub user_properties: UserProperties,
}

/// DISCONNECT (section 3.14).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disconnect {
    /// [`ReasonCode::Success`] ("normal disconnection") from a 3.1.1 client.
    pub reason: ReasonCode,
    /// `None` where there are none.
    pub properties: Option<Box<DisconnectProperties>>,
}

/// The properties of DISCONNECT (section 3.14.2.2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub struct DisconnectProperties {
    pub session_expiry_interval_s: Option<u32>,
    pub reason_string: Option<ByteString>,
    pub user_properties: UserProperties,
    pub server_reference: Option<ByteString>,
}

/// AUTH (section 3.15), 5.0 only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// Success, continue authentication or re-authenticate.
    pub reason: ReasonCode,
    /// Authentication method.
    pub authentication_method: Option<ByteString>,
    /// Authentication data.
    pub authentication_data: Option<Bytes>,
    /// For a person who reads logs.
    pub reason_string: Option<ByteString>,
    /// User properties.
    pub user_properties: UserProperties,
}
