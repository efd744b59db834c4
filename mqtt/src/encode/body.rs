//! What follows the fixed header of every packet but PUBLISH.

use super::properties::SubscribePropertySet;
use super::{EncodeError, Sink, WillPropertySet};
use crate::{
    Ack, Auth, ConnAck, Connect, Disconnect, Packet, PacketId, ReasonCode, SubAck, Subscribe,
    SubscriptionOptions, Unsubscribe, Version, Will,
};

pub(super) fn write<S: Sink>(
    packet: &Packet,
    version: Version,
    to: &mut S,
) -> Result<(), EncodeError> {
    match packet {
        Packet::Connect(connect) => write_connect(connect, to),
        Packet::ConnAck(ack) => write_connack(ack, version, to),
        Packet::PubAck(ack) | Packet::PubRec(ack) | Packet::PubRel(ack) | Packet::PubComp(ack) => {
            write_ack(ack, version, to)
        }
        Packet::Subscribe(subscribe) => write_subscribe(subscribe, version, to),
        Packet::SubAck(ack) => write_suback(ack, version, to),
        Packet::Unsubscribe(unsubscribe) => write_unsubscribe(unsubscribe, version, to),
        Packet::UnsubAck(ack) => match version {
            Version::V3_1_1 => {
                write_id(ack.packet_id, to);
                Ok(())
            }
            Version::V5 => write_suback(ack, version, to),
        },
        Packet::Disconnect(disconnect) => write_disconnect(disconnect, version, to),
        Packet::Auth(auth) => match version {
            Version::V3_1_1 => Err(EncodeError::NotInVersion),
            Version::V5 => write_auth(auth, to),
        },
        // PUBLISH has its own way, `Publish::encode`.
        Packet::Publish(_) | Packet::PingReq | Packet::PingResp => Ok(()),
    }
}

fn write_id<S: Sink>(id: PacketId, to: &mut S) {
    to.u16(id.0.get());
}

/// The version is the packet's own: a CONNECT says which one follows.
fn write_connect<S: Sink>(connect: &Connect, to: &mut S) -> Result<(), EncodeError> {
    to.text("the protocol name", "MQTT")?;
    to.u8(match connect.version {
        Version::V3_1_1 => 4,
        Version::V5 => 5,
    });
    to.u8(connect_flags(connect));
    to.u16(connect.keep_alive_s);
    if connect.version == Version::V5 {
        to.properties(&connect.properties)?;
    }
    to.text("the client identifier", &connect.client_id)?;
    if let Some(will) = &connect.will {
        write_will(will, connect.version, to)?;
    }
    if let Some(username) = &connect.username {
        to.text("the user name", username)?;
    }
    if let Some(password) = &connect.password {
        to.binary("the password", password)?;
    }
    Ok(())
}

fn connect_flags(connect: &Connect) -> u8 {
    let will = connect.will.as_ref().map_or(0, |will| {
        1 << 2 | (will.qos as u8) << 3 | u8::from(will.retain) << 5
    });
    u8::from(connect.clean_start) << 1
        | will
        | u8::from(connect.password.is_some()) << 6
        | u8::from(connect.username.is_some()) << 7
}

fn write_will<S: Sink>(will: &Will, version: Version, to: &mut S) -> Result<(), EncodeError> {
    if version == Version::V5 {
        to.properties(&WillPropertySet(will))?;
    }
    to.text("the will topic", will.topic.as_str())?;
    to.binary("the will payload", &will.payload)
}

fn write_connack<S: Sink>(ack: &ConnAck, version: Version, to: &mut S) -> Result<(), EncodeError> {
    // [MQTT-3.2.2-6]: a refusal has no session.
    to.u8(u8::from(ack.session_present && !ack.reason.is_error()));
    match version {
        Version::V3_1_1 => to.u8(ack.reason.connect_return_code()),
        Version::V5 => {
            to.u8(ack.reason as u8);
            to.properties(&ack.properties)?;
        }
    }
    Ok(())
}

fn write_ack<S: Sink>(ack: &Ack, version: Version, to: &mut S) -> Result<(), EncodeError> {
    write_id(ack.packet_id, to);
    if version == Version::V3_1_1 {
        return Ok(());
    }
    // What says nothing is left out (section 3.4.2.1).
    if ack.properties.is_some() || ack.reason != ReasonCode::Success {
        to.u8(ack.reason as u8);
    }
    if ack.properties.is_some() {
        to.properties(&ack.properties)?;
    }
    Ok(())
}

fn write_subscribe<S: Sink>(
    subscribe: &Subscribe,
    version: Version,
    to: &mut S,
) -> Result<(), EncodeError> {
    write_id(subscribe.packet_id, to);
    if version == Version::V5 {
        to.properties(&SubscribePropertySet {
            subscription_id: subscribe.subscription_id,
            user_properties: &subscribe.user_properties,
        })?;
    }
    for (filter, options) in &subscribe.filters {
        to.text("the topic filter", filter.as_str())?;
        to.u8(options_byte(options, version));
    }
    Ok(())
}

fn options_byte(options: &SubscriptionOptions, version: Version) -> u8 {
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

fn write_suback<S: Sink>(ack: &SubAck, version: Version, to: &mut S) -> Result<(), EncodeError> {
    write_id(ack.packet_id, to);
    if version == Version::V5 {
        to.properties(&ack.properties)?;
    }
    for reason in &ack.reasons {
        to.u8(match version {
            Version::V3_1_1 => reason.suback_return_code(),
            Version::V5 => *reason as u8,
        });
    }
    Ok(())
}

fn write_unsubscribe<S: Sink>(
    unsubscribe: &Unsubscribe,
    version: Version,
    to: &mut S,
) -> Result<(), EncodeError> {
    write_id(unsubscribe.packet_id, to);
    if version == Version::V5 {
        to.properties(&unsubscribe.user_properties)?;
    }
    for filter in &unsubscribe.filters {
        to.text("the topic filter", filter.as_str())?;
    }
    Ok(())
}

fn write_disconnect<S: Sink>(
    disconnect: &Disconnect,
    version: Version,
    to: &mut S,
) -> Result<(), EncodeError> {
    let has_properties = disconnect.properties.is_some();
    if version == Version::V3_1_1 || (disconnect.reason == ReasonCode::Success && !has_properties) {
        return Ok(());
    }
    to.u8(disconnect.reason as u8);
    match &disconnect.properties {
        Some(properties) => to.properties(&**properties),
        None => Ok(()),
    }
}

fn write_auth<S: Sink>(auth: &Auth, to: &mut S) -> Result<(), EncodeError> {
    let bare = auth.authentication_method.is_none()
        && auth.authentication_data.is_none()
        && auth.reason_string.is_none()
        && auth.user_properties.is_empty();
    if bare && auth.reason == ReasonCode::Success {
        return Ok(());
    }
    to.u8(auth.reason as u8);
    to.properties(auth)
}
