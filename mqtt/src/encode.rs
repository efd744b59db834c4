//! Packets to bytes. Reasons and properties that a 3.1.1 peer would not understand are left out.

use bytes::{BufMut, BytesMut};

use crate::packet::{
    Ack, Auth, ConnAck, Connect, Disconnect, Packet, PacketId, Publish, QoS, ReasonProperties,
    SubAck, Subscribe, SubscriptionOptions, Unsubscribe, Version,
};
use crate::properties::{Writer, id, put_binary, put_varint, varint_len};
use crate::reason::ReasonCode;
use crate::topic::TopicName;

/// PINGRESP: nothing in it varies.
pub const PINGRESP: [u8; 2] = [0xD0, 0x00];
/// The largest remaining length that four bytes can say (section 1.5.5).
pub(crate) const REMAINING_MAX: usize = 268_435_455;

/// A packet that has no form on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A text or binary field of more than 65,535 bytes.
    #[error("a text or binary field is longer than 65,535 bytes")]
    FieldTooLong,
    /// More than the protocol can frame.
    #[error("the packet is longer than 268,435,455 bytes")]
    PacketTooLong,
    /// AUTH, or another packet that 3.1.1 does not have.
    #[error("MQTT 3.1.1 has no such packet")]
    NotInVersion,
}

/// PUBACK without properties.
pub fn puback(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    short_ack(0x40, version, id, reason, out);
}

/// PUBREC without properties.
pub fn pubrec(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    short_ack(0x50, version, id, reason, out);
}

/// PUBREL without properties.
pub fn pubrel(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    short_ack(0x62, version, id, reason, out);
}

/// PUBCOMP without properties.
pub fn pubcomp(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    short_ack(0x70, version, id, reason, out);
}

/// A success says so by saying nothing (MQTT 5.0 section 3.4.2.1).
fn short_ack(first: u8, version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    let with_reason = version == Version::V5 && reason != ReasonCode::Success;
    out.put_u8(first);
    out.put_u8(if with_reason { 3 } else { 2 });
    out.put_u16(id.0.get());
    if with_reason {
        out.put_u8(reason as u8);
    }
}

impl Packet {
    /// Appends the packet in its form for `version`.
    ///
    /// # Errors
    /// When it has none; `out` is as it was then.
    pub fn encode(&self, version: Version, out: &mut BytesMut) -> Result<(), EncodeError> {
        let mut body = Writer::new();
        let first = match self {
            Self::Connect(connect) => write_connect(connect, &mut body),
            Self::ConnAck(ack) => write_connack(ack, version, &mut body),
            Self::Publish(publish) => write_publish(publish, version, &mut body),
            Self::PubAck(ack) => write_ack(0x40, ack, version, &mut body),
            Self::PubRec(ack) => write_ack(0x50, ack, version, &mut body),
            Self::PubRel(ack) => write_ack(0x62, ack, version, &mut body),
            Self::PubComp(ack) => write_ack(0x70, ack, version, &mut body),
            Self::Subscribe(subscribe) => write_subscribe(subscribe, version, &mut body),
            Self::SubAck(ack) => write_suback(0x90, ack, version, &mut body),
            Self::Unsubscribe(unsubscribe) => write_unsubscribe(unsubscribe, version, &mut body),
            Self::UnsubAck(ack) => write_suback(0xB0, ack, version, &mut body),
            Self::PingReq => 0xC0,
            Self::PingResp => 0xD0,
            Self::Disconnect(disconnect) => write_disconnect(disconnect, version, &mut body),
            Self::Auth(_) if version == Version::V3_1_1 => return Err(EncodeError::NotInVersion),
            Self::Auth(auth) => write_auth(auth, &mut body),
        };
        if body.too_long {
            return Err(EncodeError::FieldTooLong);
        }
        if body.section.len() > REMAINING_MAX {
            return Err(EncodeError::PacketTooLong);
        }
        out.reserve(1 + varint_len(body.section.len()) + body.section.len());
        out.put_u8(first);
        put_varint(body.section.len() as u32, out);
        out.extend_from_slice(&body.section);
        Ok(())
    }
}

impl Writer {
    fn field(&mut self, value: &[u8]) {
        self.too_long |= !put_binary(value, &mut self.section);
    }

    fn section(&mut self, properties: Self) {
        self.too_long |= !properties.finish(&mut self.section);
    }
}

fn write_connect(connect: &Connect, body: &mut Writer) -> u8 {
    body.field(b"MQTT");
    let mut flags = u8::from(connect.clean_start) << 1;
    if let Some(will) = &connect.will {
        flags |= 0x04 | (will.qos as u8) << 3 | u8::from(will.retain) << 5;
    }
    flags |= u8::from(connect.password.is_some()) << 6;
    flags |= u8::from(connect.username.is_some()) << 7;
    body.section.put_u8(if connect.version == Version::V5 { 5 } else { 4 });
    body.section.put_u8(flags);
    body.section.put_u16(connect.keep_alive_s);
    if connect.version == Version::V5 {
        let from = &connect.properties;
        let mut to = Writer::new();
        to.u32(id::SESSION_EXPIRY, from.session_expiry_interval_s);
        to.u16(id::RECEIVE_MAXIMUM, from.receive_maximum.map(|value| value.get()));
        to.u32(id::MAXIMUM_PACKET_SIZE, from.maximum_packet_size);
        to.u16(id::TOPIC_ALIAS_MAXIMUM, from.topic_alias_maximum);
        to.flag(id::REQUEST_RESPONSE_INFO, from.request_response_information);
        to.flag(id::REQUEST_PROBLEM_INFO, from.request_problem_information);
        to.user(&from.user_properties);
        to.text(id::AUTH_METHOD, from.authentication_method.as_ref());
        to.binary(id::AUTH_DATA, from.authentication_data.as_deref());
        body.section(to);
    }
    body.field(connect.client_id.as_bytes());
    if let Some(will) = &connect.will {
        if connect.version == Version::V5 {
            let mut to = Writer::new();
            // 0 is the default and means the same as leaving it out.
            to.u32(id::WILL_DELAY, (will.delay_interval_s > 0).then_some(will.delay_interval_s));
            if let Some(properties) = &will.properties {
                to.message(properties);
            }
            body.section(to);
        }
        body.field(will.topic.as_str().as_bytes());
        body.field(&will.payload);
    }
    if let Some(username) = &connect.username {
        body.field(username.as_bytes());
    }
    if let Some(password) = &connect.password {
        body.field(password);
    }
    0x10
}

fn write_connack(ack: &ConnAck, version: Version, body: &mut Writer) -> u8 {
    body.section.put_u8(u8::from(ack.session_present));
    if version == Version::V3_1_1 {
        body.section.put_u8(ack.reason.connect_return_code());
        return 0x20;
    }
    body.section.put_u8(ack.reason as u8);
    let from = &ack.properties;
    let mut to = Writer::new();
    to.u32(id::SESSION_EXPIRY, from.session_expiry_interval_s);
    to.u16(id::RECEIVE_MAXIMUM, from.receive_maximum.map(|value| value.get()));
    // QoS 2 is said by leaving the property out.
    to.flag(id::MAXIMUM_QOS, from.maximum_qos.filter(|qos| *qos < QoS::ExactlyOnce).map(|qos| qos == QoS::AtLeastOnce));
    to.flag(id::RETAIN_AVAILABLE, from.retain_available);
    to.u32(id::MAXIMUM_PACKET_SIZE, from.maximum_packet_size);
    to.text(id::ASSIGNED_CLIENT_ID, from.assigned_client_id.as_ref());
    to.u16(id::TOPIC_ALIAS_MAXIMUM, from.topic_alias_maximum);
    to.text(id::REASON_STRING, from.reason_string.as_ref());
    to.user(&from.user_properties);
    to.flag(id::WILDCARD_AVAILABLE, from.wildcard_subscription_available);
    to.flag(id::SUBSCRIPTION_ID_AVAILABLE, from.subscription_ids_available);
    to.flag(id::SHARED_AVAILABLE, from.shared_subscription_available);
    to.u16(id::SERVER_KEEP_ALIVE, from.server_keep_alive_s);
    to.text(id::RESPONSE_INFO, from.response_information.as_ref());
    to.text(id::SERVER_REFERENCE, from.server_reference.as_ref());
    to.text(id::AUTH_METHOD, from.authentication_method.as_ref());
    to.binary(id::AUTH_DATA, from.authentication_data.as_deref());
    body.section(to);
    0x20
}

/// The first byte of a PUBLISH.
pub(crate) fn publish_first_byte(dup: bool, qos: QoS, retain: bool) -> u8 {
    0x30 | u8::from(dup) << 3 | (qos as u8) << 1 | u8::from(retain)
}

fn write_publish(publish: &Publish, version: Version, body: &mut Writer) -> u8 {
    body.section.reserve(publish.topic.as_str().len() + publish.payload.len() + 16);
    put_topic(&publish.topic, body);
    if let Some(id) = publish.packet_id {
        body.section.put_u16(id.0.get());
    }
    if version == Version::V5 {
        let mut to = Writer::new();
        if let Some(properties) = &publish.properties {
            to.publish(properties);
        }
        body.section(to);
    }
    body.section.extend_from_slice(&publish.payload);
    publish_first_byte(publish.dup, publish.qos, publish.retain)
}

fn put_topic(topic: &TopicName, body: &mut Writer) {
    body.field(topic.as_str().as_bytes());
}

fn write_ack(first: u8, ack: &Ack, version: Version, body: &mut Writer) -> u8 {
    body.section.put_u16(ack.packet_id.0.get());
    let says_more = ack.reason != ReasonCode::Success || ack.properties.is_some();
    if version == Version::V5 && says_more {
        body.section.put_u8(ack.reason as u8);
        write_reason(ack.properties.as_deref(), body);
    }
    first
}

/// Nothing where there are no properties: the section may be left out at the end of a packet.
fn write_reason(properties: Option<&ReasonProperties>, body: &mut Writer) {
    if let Some(from) = properties {
        let mut to = Writer::new();
        to.text(id::REASON_STRING, from.reason_string.as_ref());
        to.user(&from.user_properties);
        body.section(to);
    }
}

fn write_subscribe(subscribe: &Subscribe, version: Version, body: &mut Writer) -> u8 {
    body.section.put_u16(subscribe.packet_id.0.get());
    if version == Version::V5 {
        let mut to = Writer::new();
        if let Some(id) = subscribe.subscription_id {
            to.subscription_id(id);
        }
        to.user(&subscribe.user_properties);
        body.section(to);
    }
    for (filter, options) in &subscribe.filters {
        body.field(filter.as_str().as_bytes());
        body.section.put_u8(option_bits(*options, version));
    }
    0x82
}

fn option_bits(options: SubscriptionOptions, version: Version) -> u8 {
    match version {
        Version::V3_1_1 => options.qos as u8,
        Version::V5 => {
            options.qos as u8
                | u8::from(options.no_local) << 2
                | u8::from(options.retain_as_published) << 3
                | (options.retain_handling as u8) << 4
        }
    }
}

fn write_suback(first: u8, ack: &SubAck, version: Version, body: &mut Writer) -> u8 {
    body.section.put_u16(ack.packet_id.0.get());
    match (version, first) {
        (Version::V5, _) => {
            let mut to = Writer::new();
            if let Some(from) = &ack.properties {
                to.text(id::REASON_STRING, from.reason_string.as_ref());
                to.user(&from.user_properties);
            }
            body.section(to);
            ack.reasons.iter().for_each(|reason| body.section.put_u8(*reason as u8));
        }
        (Version::V3_1_1, 0xB0) => {}
        (Version::V3_1_1, _) => {
            for reason in &ack.reasons {
                // 3.1.1 knows one failure.
                let code = if reason.is_error() { 0x80 } else { *reason as u8 };
                body.section.put_u8(code);
            }
        }
    }
    first
}

fn write_unsubscribe(unsubscribe: &Unsubscribe, version: Version, body: &mut Writer) -> u8 {
    body.section.put_u16(unsubscribe.packet_id.0.get());
    if version == Version::V5 {
        let mut to = Writer::new();
        to.user(&unsubscribe.user_properties);
        body.section(to);
    }
    unsubscribe.filters.iter().for_each(|filter| body.field(filter.as_str().as_bytes()));
    0xA2
}

fn write_disconnect(disconnect: &Disconnect, version: Version, body: &mut Writer) -> u8 {
    let says_more = disconnect.reason != ReasonCode::Success || disconnect.properties.is_some();
    if version == Version::V5 && says_more {
        body.section.put_u8(disconnect.reason as u8);
        if let Some(from) = &disconnect.properties {
            let mut to = Writer::new();
            to.u32(id::SESSION_EXPIRY, from.session_expiry_interval_s);
            to.text(id::REASON_STRING, from.reason_string.as_ref());
            to.user(&from.user_properties);
            to.text(id::SERVER_REFERENCE, from.server_reference.as_ref());
            body.section(to);
        }
    }
    0xE0
}

fn write_auth(auth: &Auth, body: &mut Writer) -> u8 {
    let mut to = Writer::new();
    to.text(id::AUTH_METHOD, auth.authentication_method.as_ref());
    to.binary(id::AUTH_DATA, auth.authentication_data.as_deref());
    to.text(id::REASON_STRING, auth.reason_string.as_ref());
    to.user(&auth.user_properties);
    if auth.reason != ReasonCode::Success || !to.section.is_empty() {
        body.section.put_u8(auth.reason as u8);
        body.section(to);
    }
    0xF0
}
