//! Every packet but CONNECT.

use super::reader::Reader;
use super::{DecodeError, properties};
use crate::packet_type::{PacketType, Peer};
use crate::{
    Ack, Auth, ConnAck, ConnAckProperties, Disconnect, Packet, Publish, QoS, ReasonCode,
    RetainHandling, SubAck, Subscribe, SubscriptionOptions, TopicFilter, TopicName, Unsubscribe,
    Version,
};

/// What decides how a body is read, besides its type.
#[derive(Clone, Copy)]
pub(super) struct Expected {
    pub(super) version: Version,
    pub(super) from: Peer,
}

pub(super) fn parse(
    packet_type: PacketType,
    first_byte: u8,
    mut body: Reader,
    expected: Expected,
) -> Result<Packet, DecodeError> {
    let body_ref = &mut body;
    let packet = match packet_type {
        PacketType::Publish => {
            return publish(first_byte, body, expected).map(Packet::Publish);
        }
        // The fixed header has refused a second one.
        PacketType::Connect => Packet::Connect(Box::new(super::connect::parse(body_ref)?)),
        PacketType::ConnAck => Packet::ConnAck(Box::new(connack(body_ref, expected)?)),
        PacketType::PubAck => Packet::PubAck(ack(packet_type, body_ref, expected)?),
        PacketType::PubRec => Packet::PubRec(ack(packet_type, body_ref, expected)?),
        PacketType::PubRel => Packet::PubRel(ack(packet_type, body_ref, expected)?),
        PacketType::PubComp => Packet::PubComp(ack(packet_type, body_ref, expected)?),
        PacketType::Subscribe => Packet::Subscribe(Box::new(subscribe(body_ref, expected)?)),
        PacketType::SubAck => Packet::SubAck(suback(packet_type, body_ref, expected)?),
        PacketType::Unsubscribe => Packet::Unsubscribe(Box::new(unsubscribe(body_ref, expected)?)),
        PacketType::UnsubAck => Packet::UnsubAck(suback(packet_type, body_ref, expected)?),
        PacketType::PingReq => Packet::PingReq,
        PacketType::PingResp => Packet::PingResp,
        PacketType::Disconnect => Packet::Disconnect(disconnect(body_ref, expected)?),
        PacketType::Auth => Packet::Auth(Box::new(auth(body_ref, expected)?)),
    };
    body.end()?;
    Ok(packet)
}

fn reason(packet: PacketType, body: &mut Reader, from: Peer) -> Result<ReasonCode, DecodeError> {
    let code = body.u8()?;
    ReasonCode::from_byte(code)
        .filter(|reason| reason.may_stand_in(packet, from))
        .ok_or(DecodeError::IllegalReason { packet, code })
}

fn publish(first_byte: u8, mut body: Reader, expected: Expected) -> Result<Publish, DecodeError> {
    let qos =
        QoS::from_bits(first_byte >> 1).ok_or(DecodeError::Malformed("a PUBLISH with QoS 3"))?;
    let dup = first_byte & 0b1000 > 0;
    if dup && qos == QoS::AtMostOnce {
        // [MQTT-3.3.1-2]
        return Err(DecodeError::Malformed("DUP with QoS 0"));
    }
    let topic = body.unchecked_text()?;
    let packet_id = match qos {
        QoS::AtMostOnce => None,
        QoS::AtLeastOnce | QoS::ExactlyOnce => Some(body.packet_id()?),
    };
    let (topic, properties) = match expected.version {
        Version::V3_1_1 => (TopicName::parse(topic)?, None),
        Version::V5 => {
            let topic = TopicName::parse_or_empty(topic)?;
            let properties = properties::publish(&mut body, expected.from)?;
            let has_alias = properties.as_ref().is_some_and(|p| p.topic_alias.is_some());
            if topic.is_empty() && !has_alias {
                return Err(DecodeError::Protocol(
                    "neither a topic name nor a topic alias",
                ));
            }
            (topic, properties)
        }
    };
    let retain = first_byte & 1 > 0;
    Ok(Publish {
        dup,
        qos,
        retain,
        topic,
        packet_id,
        properties,
        payload: body.rest(),
    })
}

fn connack(body: &mut Reader, expected: Expected) -> Result<ConnAck, DecodeError> {
    let flags = body.u8()?;
    if flags > 1 {
        return Err(DecodeError::Malformed("reserved flags of CONNACK"));
    }
    let session_present = flags == 1;
    let (reason, properties) = match expected.version {
        Version::V3_1_1 => {
            let code = body.u8()?;
            let packet = PacketType::ConnAck;
            let reason = ReasonCode::from_connect_return_code(code)
                .ok_or(DecodeError::IllegalReason { packet, code })?;
            (reason, ConnAckProperties::default())
        }
        Version::V5 => (
            reason(PacketType::ConnAck, body, expected.from)?,
            properties::connack(body)?,
        ),
    };
    if session_present && reason.is_error() {
        // [MQTT-3.2.2-6]
        return Err(DecodeError::Protocol("a session with a refusal"));
    }
    Ok(ConnAck {
        session_present,
        reason,
        properties,
    })
}

fn ack(packet: PacketType, body: &mut Reader, expected: Expected) -> Result<Ack, DecodeError> {
    let packet_id = body.packet_id()?;
    let mut ack = Ack {
        packet_id,
        reason: ReasonCode::Success,
        properties: None,
    };
    if expected.version == Version::V5 && !body.is_empty() {
        ack.reason = reason(packet, body, expected.from)?;
        if !body.is_empty() {
            ack.properties = properties::reason(body, packet)?;
        }
    }
    Ok(ack)
}

fn subscribe(body: &mut Reader, expected: Expected) -> Result<Subscribe, DecodeError> {
    let packet_id = body.packet_id()?;
    let (subscription_id, user_properties) = match expected.version {
        Version::V3_1_1 => Default::default(),
        Version::V5 => properties::subscribe(body)?,
    };
    let mut filters = Vec::new();
    while !body.is_empty() {
        let filter = TopicFilter::parse(body.unchecked_text()?)?;
        let options = match expected.version {
            Version::V3_1_1 => options_of_3_1_1(body.u8()?)?,
            Version::V5 => options(body.u8()?)?,
        };
        if options.no_local && filter.share().is_some() {
            // [MQTT-3.8.3-4]
            return Err(DecodeError::Protocol("No Local on a shared subscription"));
        }
        filters.push((filter, options));
    }
    if filters.is_empty() {
        return Err(DecodeError::Protocol("a SUBSCRIBE without a topic filter"));
    }
    Ok(Subscribe {
        packet_id,
        filters,
        subscription_id,
        user_properties,
    })
}

fn options_of_3_1_1(byte: u8) -> Result<SubscriptionOptions, DecodeError> {
    let qos = match byte {
        0..=2 => QoS::from_bits(byte),
        _ => None,
    };
    Ok(SubscriptionOptions {
        qos: qos.ok_or(DecodeError::Malformed(
            "a requested QoS other than 0, 1 and 2",
        ))?,
        no_local: false,
        retain_as_published: false,
        retain_handling: RetainHandling::Send,
    })
}

fn options(byte: u8) -> Result<SubscriptionOptions, DecodeError> {
    if byte & 0b1100_0000 > 0 {
        // [MQTT-3.8.3-5]
        return Err(DecodeError::Malformed(
            "reserved bits of subscription options",
        ));
    }
    let retain_handling = match byte >> 4 {
        0 => RetainHandling::Send,
        1 => RetainHandling::SendIfNew,
        2 => RetainHandling::DoNotSend,
        _ => return Err(DecodeError::Protocol("retain handling 3")),
    };
    Ok(SubscriptionOptions {
        qos: QoS::from_bits(byte).ok_or(DecodeError::Protocol("a maximum QoS of 3"))?,
        no_local: byte & 0b100 > 0,
        retain_as_published: byte & 0b1000 > 0,
        retain_handling,
    })
}

fn suback(
    packet: PacketType,
    body: &mut Reader,
    expected: Expected,
) -> Result<SubAck, DecodeError> {
    let packet_id = body.packet_id()?;
    let mut ack = SubAck {
        packet_id,
        reasons: Vec::new(),
        properties: None,
    };
    if expected.version == Version::V3_1_1 && packet == PacketType::UnsubAck {
        return Ok(ack);
    }
    if expected.version == Version::V5 {
        ack.properties = properties::reason(body, packet)?;
    }
    while !body.is_empty() {
        ack.reasons.push(match expected.version {
            Version::V3_1_1 => suback_return_code(body.u8()?)?,
            Version::V5 => reason(packet, body, expected.from)?,
        });
    }
    match ack.reasons.is_empty() {
        true => Err(DecodeError::Protocol("an answer without a reason code")),
        false => Ok(ack),
    }
}

fn suback_return_code(code: u8) -> Result<ReasonCode, DecodeError> {
    match code {
        0..=2 | 0x80 => ReasonCode::from_byte(code),
        _ => None,
    }
    .ok_or(DecodeError::IllegalReason {
        packet: PacketType::SubAck,
        code,
    })
}

fn unsubscribe(body: &mut Reader, expected: Expected) -> Result<Unsubscribe, DecodeError> {
    let packet_id = body.packet_id()?;
    let user_properties = match expected.version {
        Version::V3_1_1 => Vec::new(),
        Version::V5 => properties::unsubscribe(body)?,
    };
    let mut filters = Vec::new();
    while !body.is_empty() {
        filters.push(TopicFilter::parse(body.unchecked_text()?)?);
    }
    match filters.is_empty() {
        true => Err(DecodeError::Protocol(
            "an UNSUBSCRIBE without a topic filter",
        )),
        false => Ok(Unsubscribe {
            packet_id,
            filters,
            user_properties,
        }),
    }
}

fn disconnect(body: &mut Reader, expected: Expected) -> Result<Disconnect, DecodeError> {
    let mut disconnect = Disconnect {
        reason: ReasonCode::Success,
        properties: None,
    };
    if expected.version == Version::V5 && !body.is_empty() {
        disconnect.reason = reason(PacketType::Disconnect, body, expected.from)?;
        if !body.is_empty() {
            disconnect.properties = properties::disconnect(body, expected.from)?;
        }
    }
    Ok(disconnect)
}

fn auth(body: &mut Reader, expected: Expected) -> Result<Auth, DecodeError> {
    let bare = Auth {
        reason: ReasonCode::Success,
        authentication_method: None,
        authentication_data: None,
        reason_string: None,
        user_properties: Vec::new(),
    };
    if body.is_empty() {
        // Nothing said is success, and only a server succeeds.
        return match expected.from {
            Peer::Server => Ok(bare),
            Peer::Client => Err(DecodeError::IllegalReason {
                packet: PacketType::Auth,
                code: 0,
            }),
        };
    }
    let mut auth = bare.clone();
    auth.reason = reason(PacketType::Auth, body, expected.from)?;
    properties::auth(body, &mut auth)?;
    if auth != bare && auth.authentication_method.is_none() {
        // Section 3.15.2.2.2; only the success of section 3.15.2.1 does without.
        return Err(DecodeError::Protocol(
            "AUTH without an authentication method",
        ));
    }
    Ok(auth)
}
