//! CONNECT, which is parsed before the version of the connection is known.

use super::reader::Reader;
use super::{DecodeError, properties};
use crate::{Connect, ConnectProperties, QoS, TopicError, Version, Will};

const RESERVED: u8 = 1;
const CLEAN_START: u8 = 1 << 1;
const WILL: u8 = 1 << 2;
const WILL_QOS_SHIFT: u8 = 3;
const WILL_RETAIN: u8 = 1 << 5;
const PASSWORD: u8 = 1 << 6;
const USER_NAME: u8 = 1 << 7;

pub(super) fn parse(body: &mut Reader) -> Result<Connect, DecodeError> {
    let version = protocol(body)?;
    let flags = checked_flags(body.u8()?, version)?;
    let keep_alive_s = body.u16()?;
    let properties = match version {
        Version::V3_1_1 => ConnectProperties::default(),
        Version::V5 => properties::connect(body)?,
    };
    let client_id = body.text()?;
    let will = match flags & WILL {
        0 => None,
        _ => Some(Box::new(will(body, flags, version)?)),
    };
    let username = (flags & USER_NAME > 0).then(|| body.text()).transpose()?;
    let password = (flags & PASSWORD > 0).then(|| body.binary()).transpose()?;
    body.end()?;
    Ok(Connect {
        version,
        clean_start: flags & CLEAN_START > 0,
        keep_alive_s,
        client_id,
        will,
        username,
        password,
        properties,
    })
}

/// Name and level. `MQIsdp` is the name of 3.1, whose level is 3.
fn protocol(body: &mut Reader) -> Result<Version, DecodeError> {
    let name = body.binary()?;
    match (&name[..], body.u8()?) {
        (b"MQTT", 4) => Ok(Version::V3_1_1),
        (b"MQTT", 5) => Ok(Version::V5),
        (b"MQTT" | b"MQIsdp", level) => Err(DecodeError::UnsupportedVersion(level)),
        _ => Err(DecodeError::ProtocolName),
    }
}

fn checked_flags(flags: u8, version: Version) -> Result<u8, DecodeError> {
    let problem = if flags & RESERVED > 0 {
        "the reserved flag of CONNECT" // [MQTT-3.1.2-3]
    } else if flags & WILL == 0 && flags & (WILL_RETAIN | 0b11 << WILL_QOS_SHIFT) > 0 {
        "a will's QoS or RETAIN without a will" // [MQTT-3.1.2-11] and [MQTT-3.1.2-13]
    } else if QoS::from_bits(flags >> WILL_QOS_SHIFT).is_none() {
        "a will with QoS 3" // [MQTT-3.1.2-12]
    } else if version == Version::V3_1_1 && flags & (PASSWORD | USER_NAME) == PASSWORD {
        "a password without a user name" // 3.1.1 [MQTT-3.1.2-22]
    } else {
        return Ok(flags);
    };
    Err(DecodeError::Malformed(problem))
}

fn will(body: &mut Reader, flags: u8, version: Version) -> Result<Will, DecodeError> {
    let (delay_interval_s, properties) = match version {
        Version::V3_1_1 => (0, None),
        Version::V5 => properties::will(body)?,
    };
    let topic = match body.topic_name() {
        Err(DecodeError::TopicName(TopicError::Empty)) => {
            return Err(DecodeError::Protocol("a will without a topic"));
        }
        topic => topic?,
    };
    Ok(Will {
        topic,
        payload: body.binary()?,
        qos: QoS::from_bits(flags >> WILL_QOS_SHIFT)
            .ok_or(DecodeError::Malformed("a will with QoS 3"))?,
        retain: flags & WILL_RETAIN > 0,
        delay_interval_s,
        properties,
    })
}
