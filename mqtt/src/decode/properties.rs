//! The properties of each packet: which may stand there, what they may say, and once or often.

use std::num::NonZeroU16;

use super::DecodeError;
use super::reader::{Reader, once};
use crate::packet_type::{PacketType, Peer};
use crate::property as id;
use crate::{
    Auth, ConnAckProperties, ConnectProperties, DisconnectProperties, PublishProperties, QoS,
    ReasonProperties, UserProperties,
};

type Read<T> = Result<T, DecodeError>;

/// Those of CONNECT.
pub(super) fn connect(reader: &mut Reader) -> Read<ConnectProperties> {
    let mut p = ConnectProperties::default();
    reader.properties(PacketType::Connect, |id, value| {
        match id {
            id::SESSION_EXPIRY_INTERVAL => once(&mut p.session_expiry_interval_s, id, value.u32()?),
            id::RECEIVE_MAXIMUM => once(&mut p.receive_maximum, id, receive_maximum(value)?),
            id::MAXIMUM_PACKET_SIZE => once(&mut p.maximum_packet_size, id, packet_size(value)?),
            id::TOPIC_ALIAS_MAXIMUM => once(&mut p.topic_alias_maximum, id, value.u16()?),
            id::REQUEST_RESPONSE_INFORMATION => {
                once(&mut p.request_response_information, id, value.bool()?)
            }
            id::REQUEST_PROBLEM_INFORMATION => {
                once(&mut p.request_problem_information, id, value.bool()?)
            }
            id::AUTHENTICATION_METHOD => once(&mut p.authentication_method, id, value.text()?),
            id::AUTHENTICATION_DATA => once(&mut p.authentication_data, id, value.binary()?),
            id::USER_PROPERTY => user_property(&mut p.user_properties, value),
            _ => return Ok(false),
        }?;
        Ok(true)
    })?;
    check_authentication(
        p.authentication_method.is_some(),
        p.authentication_data.is_some(),
    )?;
    Ok(p)
}

/// Those of a will: its delay, and what the PUBLISH will have.
pub(super) fn will(reader: &mut Reader) -> Read<(u32, Option<Box<PublishProperties>>)> {
    let mut delay = None;
    let mut message = None;
    reader.properties(PacketType::Connect, |id, value| match id {
        id::WILL_DELAY_INTERVAL => once(&mut delay, id, value.u32()?).map(|()| true),
        _ => message_property(&mut message, id, value),
    })?;
    Ok((delay.unwrap_or(0), message))
}

/// Those of CONNACK.
pub(super) fn connack(reader: &mut Reader) -> Read<ConnAckProperties> {
    let mut p = ConnAckProperties::default();
    reader.properties(PacketType::ConnAck, |id, value| {
        match id {
            id::SESSION_EXPIRY_INTERVAL => once(&mut p.session_expiry_interval_s, id, value.u32()?),
            id::RECEIVE_MAXIMUM => once(&mut p.receive_maximum, id, receive_maximum(value)?),
            id::MAXIMUM_QOS => once(&mut p.maximum_qos, id, maximum_qos(value)?),
            id::RETAIN_AVAILABLE => once(&mut p.retain_available, id, value.bool()?),
            id::MAXIMUM_PACKET_SIZE => once(&mut p.maximum_packet_size, id, packet_size(value)?),
            id::ASSIGNED_CLIENT_IDENTIFIER => once(&mut p.assigned_client_id, id, value.text()?),
            id::TOPIC_ALIAS_MAXIMUM => once(&mut p.topic_alias_maximum, id, value.u16()?),
            id::REASON_STRING => once(&mut p.reason_string, id, value.text()?),
            id::USER_PROPERTY => user_property(&mut p.user_properties, value),
            id::WILDCARD_SUBSCRIPTION_AVAILABLE => {
                once(&mut p.wildcard_subscription_available, id, value.bool()?)
            }
            id::SUBSCRIPTION_IDENTIFIER_AVAILABLE => {
                once(&mut p.subscription_ids_available, id, value.bool()?)
            }
            id::SHARED_SUBSCRIPTION_AVAILABLE => {
                once(&mut p.shared_subscription_available, id, value.bool()?)
            }
            id::SERVER_KEEP_ALIVE => once(&mut p.server_keep_alive_s, id, value.u16()?),
            id::RESPONSE_INFORMATION => once(&mut p.response_information, id, value.text()?),
            id::SERVER_REFERENCE => once(&mut p.server_reference, id, value.text()?),
            id::AUTHENTICATION_METHOD => once(&mut p.authentication_method, id, value.text()?),
            id::AUTHENTICATION_DATA => once(&mut p.authentication_data, id, value.binary()?),
            _ => return Ok(false),
        }?;
        Ok(true)
    })?;
    check_authentication(
        p.authentication_method.is_some(),
        p.authentication_data.is_some(),
    )?;
    Ok(p)
}

/// Those of PUBLISH; `None`, and no allocation, where there are none.
pub(super) fn publish(reader: &mut Reader, from: Peer) -> Read<Option<Box<PublishProperties>>> {
    let mut properties = None;
    reader.properties(PacketType::Publish, |id, value| {
        if id == id::SUBSCRIPTION_IDENTIFIER && from == Peer::Client {
            // [MQTT-3.3.4-6]
            return Err(DecodeError::Protocol(
                "a subscription identifier from a client",
            ));
        }
        publish_property(&mut properties, id, value)
    })?;
    Ok(properties)
}

/// Those of a stored message: the block without its length.
pub(crate) fn stored(reader: Reader) -> Read<Option<Box<PublishProperties>>> {
    let mut properties = None;
    reader.all_properties(PacketType::Publish, |id, value| {
        publish_property(&mut properties, id, value)
    })?;
    Ok(properties)
}

fn publish_property(
    properties: &mut Option<Box<PublishProperties>>,
    id: u8,
    value: &mut Reader,
) -> Read<bool> {
    match id {
        id::TOPIC_ALIAS => {
            let alias = NonZeroU16::new(value.u16()?).ok_or(DecodeError::TopicAlias)?;
            once(
                &mut properties.get_or_insert_default().topic_alias,
                id,
                alias,
            )?;
        }
        id::SUBSCRIPTION_IDENTIFIER => {
            let subscription_id = subscription_id(value)?;
            properties
                .get_or_insert_default()
                .subscription_ids
                .push(subscription_id);
        }
        _ => return message_property(properties, id, value),
    }
    Ok(true)
}

/// What a PUBLISH and a will have in common.
fn message_property(
    properties: &mut Option<Box<PublishProperties>>,
    id: u8,
    value: &mut Reader,
) -> Read<bool> {
    let p = properties.get_or_insert_default();
    match id {
        id::PAYLOAD_FORMAT_INDICATOR => once(&mut p.payload_is_utf8, id, value.bool()?),
        id::MESSAGE_EXPIRY_INTERVAL => once(&mut p.message_expiry_interval_s, id, value.u32()?),
        id::RESPONSE_TOPIC => once(&mut p.response_topic, id, value.topic_name()?),
        id::CORRELATION_DATA => once(&mut p.correlation_data, id, value.binary()?),
        id::CONTENT_TYPE => once(&mut p.content_type, id, value.text()?),
        id::USER_PROPERTY => user_property(&mut p.user_properties, value),
        _ => return Ok(false),
    }?;
    Ok(true)
}

/// Those of the packets that answer: a reason string and user properties.
pub(super) fn reason(
    reader: &mut Reader,
    packet: PacketType,
) -> Read<Option<Box<ReasonProperties>>> {
    let mut properties: Option<Box<ReasonProperties>> = None;
    reader.properties(packet, |id, value| {
        let p = properties.get_or_insert_default();
        match id {
            id::REASON_STRING => once(&mut p.reason_string, id, value.text()?),
            id::USER_PROPERTY => user_property(&mut p.user_properties, value),
            _ => return Ok(false),
        }?;
        Ok(true)
    })?;
    Ok(properties)
}

/// Those of SUBSCRIBE.
pub(super) fn subscribe(reader: &mut Reader) -> Read<(Option<u32>, UserProperties)> {
    let mut found = None;
    let mut user_properties = UserProperties::new();
    reader.properties(PacketType::Subscribe, |id, value| {
        match id {
            id::SUBSCRIPTION_IDENTIFIER => once(&mut found, id, subscription_id(value)?),
            id::USER_PROPERTY => user_property(&mut user_properties, value),
            _ => return Ok(false),
        }?;
        Ok(true)
    })?;
    Ok((found, user_properties))
}

/// Those of UNSUBSCRIBE.
pub(super) fn unsubscribe(reader: &mut Reader) -> Read<UserProperties> {
    let mut user_properties = UserProperties::new();
    reader.properties(PacketType::Unsubscribe, |id, value| match id {
        id::USER_PROPERTY => user_property(&mut user_properties, value).map(|()| true),
        _ => Ok(false),
    })?;
    Ok(user_properties)
}

/// Those of DISCONNECT: a session's expiry is for the client to change ([MQTT-3.14.2-2]), another
/// server for the server to name.
pub(super) fn disconnect(
    reader: &mut Reader,
    from: Peer,
) -> Read<Option<Box<DisconnectProperties>>> {
    let mut properties: Option<Box<DisconnectProperties>> = None;
    reader.properties(PacketType::Disconnect, |id, value| {
        let p = properties.get_or_insert_default();
        match id {
            id::SESSION_EXPIRY_INTERVAL if from == Peer::Server => Err(DecodeError::Protocol(
                "a session expiry interval from a server",
            )),
            id::SESSION_EXPIRY_INTERVAL => once(&mut p.session_expiry_interval_s, id, value.u32()?),
            id::SERVER_REFERENCE if from == Peer::Client => {
                Err(DecodeError::Protocol("a server reference from a client"))
            }
            id::SERVER_REFERENCE => once(&mut p.server_reference, id, value.text()?),
            id::REASON_STRING => once(&mut p.reason_string, id, value.text()?),
            id::USER_PROPERTY => user_property(&mut p.user_properties, value),
            _ => return Ok(false),
        }?;
        Ok(true)
    })?;
    Ok(properties)
}

/// Those of AUTH, which are all of its fields.
pub(super) fn auth(reader: &mut Reader, auth: &mut Auth) -> Read<()> {
    reader.properties(PacketType::Auth, |id, value| {
        match id {
            id::AUTHENTICATION_METHOD => once(&mut auth.authentication_method, id, value.text()?),
            id::AUTHENTICATION_DATA => once(&mut auth.authentication_data, id, value.binary()?),
            id::REASON_STRING => once(&mut auth.reason_string, id, value.text()?),
            id::USER_PROPERTY => user_property(&mut auth.user_properties, value),
            _ => return Ok(false),
        }?;
        Ok(true)
    })
}

fn user_property(list: &mut UserProperties, value: &mut Reader) -> Read<()> {
    list.push((value.text()?, value.text()?));
    Ok(())
}

fn receive_maximum(value: &mut Reader) -> Read<NonZeroU16> {
    NonZeroU16::new(value.u16()?).ok_or(DecodeError::Protocol("a receive maximum of 0"))
}

fn packet_size(value: &mut Reader) -> Read<u32> {
    match value.u32()? {
        0 => Err(DecodeError::Protocol("a maximum packet size of 0")),
        size => Ok(size),
    }
}

fn maximum_qos(value: &mut Reader) -> Read<QoS> {
    match value.bool()? {
        false => Ok(QoS::AtMostOnce),
        true => Ok(QoS::AtLeastOnce),
    }
}

fn subscription_id(value: &mut Reader) -> Read<u32> {
    match value.varint()? {
        0 => Err(DecodeError::Protocol("subscription identifier 0")),
        id => Ok(id),
    }
}

fn check_authentication(has_method: bool, has_data: bool) -> Read<()> {
    if has_data && !has_method {
        return Err(DecodeError::Protocol(
            "authentication data without a method",
        ));
    }
    Ok(())
}
