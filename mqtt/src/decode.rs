//! Bytes to packets, strictly: whatever the specification calls malformed or a protocol error and
//! the bytes alone can show is refused, nothing is repaired.
//!
//! The size limit is checked on the fixed header, before the body is there. Nothing is reserved
//! for what is only announced, and nothing is read past the end of a packet.

use std::num::NonZeroU16;

use bytes::{Buf, Bytes};
use bytestring::ByteString;

use crate::packet::{
    Ack, Auth, ConnAck, ConnAckProperties, Connect, ConnectProperties, Disconnect, Packet,
    PacketId, Publish, QoS, ReasonProperties, RetainHandling, SubAck, Subscribe,
    SubscriptionOptions, Unsubscribe, Version, Will,
};
use crate::properties;
use crate::reason::ReasonCode;
use crate::topic::{TopicFilter, TopicName};

/// Why bytes are no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// It cannot be parsed by the rules of the specification.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// It can be parsed, and says what must not be said.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// Topic alias 0 ([MQTT-3.3.2-8]).
    #[error("the topic alias is 0")]
    TopicAlias,
    /// Larger than this side takes.
    #[error("a packet of {size} bytes, more than the {max} that are taken")]
    TooLarge {
        /// Bytes of the whole packet.
        size: u32,
        /// The limit.
        max: u32,
    },
    /// A CONNECT of an MQTT version that is not spoken here.
    #[error("protocol level {0}, not 4 (3.1.1) or 5 (5.0)")]
    UnsupportedVersion(u8),
    /// A CONNECT whose protocol name is not that of MQTT: no answer is due ([MQTT-3.1.2-1]).
    #[error("the protocol name is not MQTT")]
    NotMqtt,
}

impl DecodeError {
    /// The code for a DISCONNECT or CONNACK (MQTT 5.0 section 4.13).
    pub fn reason_code(&self) -> ReasonCode {
        match self {
            Self::Malformed(_) | Self::NotMqtt => ReasonCode::MalformedPacket,
            Self::Protocol(_) => ReasonCode::ProtocolError,
            Self::TopicAlias => ReasonCode::TopicAliasInvalid,
            Self::TooLarge { .. } => ReasonCode::PacketTooLarge,
            Self::UnsupportedVersion(_) => ReasonCode::UnsupportedProtocolVersion,
        }
    }
}

type Result<T> = std::result::Result<T, DecodeError>;

/// Takes packets off the front of received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoder {
    /// `None` on a server before CONNECT.
    version: Option<Version>,
    from_client: bool,
    packet_bytes_max: u32,
}

impl Decoder {
    /// For the server's side: expects a CONNECT and goes on in its version. Packets that only
    /// servers send are refused.
    pub const fn server(packet_bytes_max: u32) -> Self {
        Self { version: None, from_client: true, packet_bytes_max }
    }

    /// For the client's side; packets that only clients send are refused.
    pub const fn client(version: Version, packet_bytes_max: u32) -> Self {
        Self { version: Some(version), from_client: false, packet_bytes_max }
    }

    /// Bytes of the whole packet at the front, as soon as its fixed header tells.
    pub fn needed(&self, front: &[u8]) -> Option<usize> {
        let (header, body) = fixed_header(front).ok()??;
        Some(header + body as usize)
    }

    /// Takes one packet. `None` means that it is not all there; `bytes` are untouched then.
    ///
    /// # Errors
    /// After an error the stream cannot be read on: the connection is to be closed.
    pub fn decode(&mut self, bytes: &mut Bytes) -> Result<Option<Packet>> {
        let Some(first) = bytes.first().copied() else { return Ok(None) };
        self.check_type(first)?;
        let Some((header, length)) = fixed_header(bytes)? else { return Ok(None) };
        let size = header as u32 + length;
        if size > self.packet_bytes_max {
            return Err(DecodeError::TooLarge { size, max: self.packet_bytes_max });
        }
        if bytes.len() < size as usize {
            return Ok(None);
        }
        let mut frame = bytes.split_to(size as usize);
        frame.advance(header);
        let mut body = Body::new(frame);
        let packet = self.decode_body(first, &mut body)?;
        body.end()?;
        if let Packet::Connect(connect) = &packet {
            self.version = Some(connect.version);
        }
        Ok(Some(packet))
    }

    /// What the first byte alone shows: type, direction and reserved flags.
    fn check_type(&self, first: u8) -> Result<()> {
        let (kind, flags) = (first >> 4, first & 0x0F);
        let required = match kind {
            3 => flags,
            6 | 8 | 10 => 0b0010,
            _ => 0,
        };
        if flags != required {
            return Err(DecodeError::Malformed("reserved flags of the fixed header"));
        }
        let allowed = match (kind, self.from_client, self.version) {
            (0, ..) | (15, _, Some(Version::V3_1_1)) => {
                return Err(DecodeError::Malformed("a reserved packet type"));
            }
            (1, true, None) => true,
            (_, _, None) => return Err(DecodeError::Protocol("the first packet is not CONNECT")),
            (1, ..) => return Err(DecodeError::Protocol("a second CONNECT")),
            (8 | 10 | 12, from_client, _) => from_client,
            (2 | 9 | 11 | 13, from_client, _) => !from_client,
            (14, from_client, Some(Version::V3_1_1)) => from_client,
            _ => true,
        };
        if allowed {
            Ok(())
        } else {
            Err(DecodeError::Protocol("a packet that only the other side sends"))
        }
    }

    fn decode_body(&self, first: u8, body: &mut Body) -> Result<Packet> {
        let version = match self.version {
            Some(version) => version,
            None => return connect(body).map(|connect| Packet::Connect(Box::new(connect))),
        };
        Ok(match first >> 4 {
            2 => Packet::ConnAck(Box::new(connack(body, version)?)),
            3 => Packet::Publish(publish(first, body, version, self.from_client)?),
            4 => Packet::PubAck(ack(body, version, &PUBLISH_CODES)?),
            5 => Packet::PubRec(ack(body, version, &PUBLISH_CODES)?),
            6 => Packet::PubRel(ack(body, version, &RELEASE_CODES)?),
            7 => Packet::PubComp(ack(body, version, &RELEASE_CODES)?),
            8 => Packet::Subscribe(Box::new(subscribe(body, version)?)),
            9 => Packet::SubAck(suback(body, version)?),
            10 => Packet::Unsubscribe(Box::new(unsubscribe(body, version)?)),
            11 => Packet::UnsubAck(unsuback(body, version)?),
            12 => Packet::PingReq,
            13 => Packet::PingResp,
            14 => Packet::Disconnect(disconnect(body, version, self.from_client)?),
            _ => Packet::Auth(Box::new(auth(body)?)),
        })
    }
}

/// `(bytes of the fixed header, remaining length)`; `None` while it is not all there.
fn fixed_header(bytes: &[u8]) -> Result<Option<(usize, u32)>> {
    let mut length = 0u32;
    for (at, byte) in bytes.iter().skip(1).take(4).enumerate() {
        length |= u32::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            if at > 0 && *byte == 0 {
                return Err(NOT_MINIMAL);
            }
            return Ok(Some((at + 2, length)));
        }
    }
    if bytes.len() >= 5 {
        return Err(DecodeError::Malformed("a remaining length of more than four bytes"));
    }
    Ok(None)
}

const NOT_MINIMAL: DecodeError =
    DecodeError::Malformed("a variable byte integer with more bytes than it needs");

/// The rest of a packet that is being read.
pub(crate) struct Body {
    bytes: Bytes,
}

const CUT: DecodeError = DecodeError::Malformed("a field goes past the end of the packet");

impl Body {
    pub(crate) fn new(bytes: Bytes) -> Self {
        Self { bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Everything has been read.
    pub(crate) fn end(&self) -> Result<()> {
        if self.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Malformed("bytes after the end of the packet's fields"))
        }
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        self.bytes.try_get_u8().map_err(|_| CUT)
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        self.bytes.try_get_u16().map_err(|_| CUT)
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        self.bytes.try_get_u32().map_err(|_| CUT)
    }

    /// Section 1.5.5.
    pub(crate) fn varint(&mut self) -> Result<u32> {
        let mut value = 0;
        for at in 0..4 {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7F) << (7 * at);
            if byte & 0x80 == 0 {
                return if at > 0 && byte == 0 { Err(NOT_MINIMAL) } else { Ok(value) };
            }
        }
        Err(DecodeError::Malformed("a variable byte integer of more than four bytes"))
    }

    /// The next `length` bytes as a body of their own.
    pub(crate) fn take(&mut self, length: usize) -> Result<Self> {
        if length > self.bytes.len() {
            return Err(CUT);
        }
        Ok(Self { bytes: self.bytes.split_to(length) })
    }

    pub(crate) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes)
    }

    pub(crate) fn binary(&mut self) -> Result<Bytes> {
        let length = usize::from(self.u16()?);
        Ok(self.take(length)?.bytes)
    }

    /// Section 1.5.4.
    pub(crate) fn string(&mut self) -> Result<ByteString> {
        let bytes = self.binary()?;
        if bytes.contains(&0) {
            return Err(DecodeError::Malformed("text with U+0000"));
        }
        ByteString::try_from(bytes).map_err(|_| DecodeError::Malformed("text that is not UTF-8"))
    }

    fn packet_id(&mut self) -> Result<PacketId> {
        NonZeroU16::new(self.u16()?).map(PacketId).ok_or(DecodeError::Protocol("packet identifier 0"))
    }

    fn topic(&mut self, what: &'static str) -> Result<TopicName> {
        TopicName::parse(self.string()?).map_err(|_| DecodeError::Malformed(what))
    }

    fn filter(&mut self) -> Result<TopicFilter> {
        TopicFilter::parse(self.string()?)
            .map_err(|_| DecodeError::Malformed("a topic filter that is not one"))
    }

    fn reason(&mut self, allowed: &[u8]) -> Result<ReasonCode> {
        let value = self.u8()?;
        if !allowed.contains(&value) {
            return Err(DecodeError::Malformed("a reason code that this packet cannot have"));
        }
        ReasonCode::from_byte(value).ok_or(DecodeError::Malformed("an unknown reason code"))
    }
}

fn connect(body: &mut Body) -> Result<Connect> {
    let name = body.binary()?;
    let level = body.u8()?;
    let version = match (&name[..], level) {
        (b"MQTT", 4) => Version::V3_1_1,
        (b"MQTT", 5) => Version::V5,
        (b"MQTT" | b"MQIsdp", _) => return Err(DecodeError::UnsupportedVersion(level)),
        _ => return Err(DecodeError::NotMqtt),
    };
    let flags = body.u8()?;
    let has = |bit: u8| flags & bit != 0;
    if has(0x01) {
        return Err(DecodeError::Malformed("the reserved flag of CONNECT"));
    }
    if !has(0x04) && flags & 0x38 != 0 {
        return Err(DecodeError::Malformed("will QoS or will retain without a will"));
    }
    if version == Version::V3_1_1 && has(0x40) && !has(0x80) {
        return Err(DecodeError::Malformed("a password without a user name"));
    }
    let keep_alive_s = body.u16()?;
    let properties = match version {
        Version::V5 => properties::read_connect(body)?,
        Version::V3_1_1 => ConnectProperties::default(),
    };
    let client_id = body.string()?;
    let will = if has(0x04) { Some(Box::new(will(flags, body, version)?)) } else { None };
    let username = if has(0x80) { Some(body.string()?) } else { None };
    let password = if has(0x40) { Some(body.binary()?) } else { None };
    let clean_start = has(0x02);
    Ok(Connect { version, clean_start, keep_alive_s, client_id, will, username, password, properties })
}

fn will(flags: u8, body: &mut Body, version: Version) -> Result<Will> {
    let qos = QoS::from_bits(flags >> 3 & 3)?;
    let (delay_interval_s, properties) = match version {
        Version::V5 => properties::read_will(body)?,
        Version::V3_1_1 => (0, None),
    };
    let topic = body.topic("the will topic is not a topic name")?;
    let (payload, retain) = (body.binary()?, flags & 0x20 != 0);
    Ok(Will { topic, payload, qos, retain, delay_interval_s, properties })
}

const CONNACK_CODES: [u8; 22] = [
    0x00, 0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8C, 0x90, 0x95, 0x97,
    0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F,
];

fn connack(body: &mut Body, version: Version) -> Result<ConnAck> {
    let session_present = match body.u8()? {
        0 => false,
        1 => true,
        _ => return Err(DecodeError::Malformed("reserved flags of CONNACK")),
    };
    let (reason, properties) = match version {
        Version::V5 => (body.reason(&CONNACK_CODES)?, properties::read_connack(body)?),
        Version::V3_1_1 => {
            let code = ReasonCode::from_connect_return_code(body.u8()?);
            let reason = code.ok_or(DecodeError::Malformed("a reserved return code"))?;
            (reason, ConnAckProperties::default())
        }
    };
    if session_present && reason != ReasonCode::Success {
        return Err(DecodeError::Protocol("a refusal with session present"));
    }
    Ok(ConnAck { session_present, reason, properties })
}

fn publish(first: u8, body: &mut Body, version: Version, from_client: bool) -> Result<Publish> {
    let qos = QoS::from_bits(first >> 1 & 3)?;
    let dup = first & 0x08 != 0;
    if dup && qos == QoS::AtMostOnce {
        return Err(DecodeError::Malformed("DUP with QoS 0"));
    }
    let topic = body.string()?;
    let packet_id = if qos == QoS::AtMostOnce { None } else { Some(body.packet_id()?) };
    let properties = match version {
        Version::V5 => properties::read_publish(body, from_client)?,
        Version::V3_1_1 => None,
    };
    let aliased = properties.as_ref().is_some_and(|held| held.topic_alias.is_some());
    let topic = if topic.is_empty() && version == Version::V5 {
        if !aliased {
            return Err(DecodeError::Protocol("a PUBLISH with neither topic nor topic alias"));
        }
        TopicName::empty()
    } else {
        TopicName::parse(topic)
            .map_err(|_| DecodeError::Malformed("the topic of a PUBLISH is not a topic name"))?
    };
    let retain = first & 0x01 != 0;
    Ok(Publish { dup, qos, retain, topic, packet_id, properties, payload: body.rest() })
}

const PUBLISH_CODES: [u8; 9] = [0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
const RELEASE_CODES: [u8; 2] = [0x00, 0x92];

fn ack(body: &mut Body, version: Version, codes: &[u8]) -> Result<Ack> {
    let packet_id = body.packet_id()?;
    let (mut reason, mut properties) = (ReasonCode::Success, None);
    if version == Version::V5 && !body.is_empty() {
        reason = body.reason(codes)?;
        properties = optional_reason_properties(body)?;
    }
    Ok(Ack { packet_id, reason, properties })
}

/// The property section may be left out where it would be empty and nothing follows.
fn optional_reason_properties(body: &mut Body) -> Result<Option<Box<ReasonProperties>>> {
    if body.is_empty() { Ok(None) } else { properties::read_reason(body) }
}

fn subscribe(body: &mut Body, version: Version) -> Result<Subscribe> {
    let packet_id = body.packet_id()?;
    let (subscription_id, user_properties) = match version {
        Version::V5 => properties::read_subscribe(body, true)?,
        Version::V3_1_1 => (None, Vec::new()),
    };
    let mut filters = Vec::new();
    while !body.is_empty() {
        let filter = body.filter()?;
        let options = subscription_options(body.u8()?, version)?;
        if options.no_local && filter.share().is_some() {
            return Err(DecodeError::Protocol("no local on a shared subscription"));
        }
        filters.push((filter, options));
    }
    if filters.is_empty() {
        return Err(DecodeError::Protocol("a SUBSCRIBE without a topic filter"));
    }
    Ok(Subscribe { packet_id, filters, subscription_id, user_properties })
}

fn subscription_options(bits: u8, version: Version) -> Result<SubscriptionOptions> {
    let reserved = match version {
        Version::V5 => 0xC0,
        Version::V3_1_1 => 0xFC,
    };
    if bits & reserved != 0 {
        return Err(DecodeError::Malformed("reserved bits of the subscription options"));
    }
    let retain_handling = match bits >> 4 & 3 {
        0 => RetainHandling::Send,
        1 => RetainHandling::SendIfNew,
        2 => RetainHandling::DoNotSend,
        _ => return Err(DecodeError::Protocol("retain handling 3 does not exist")),
    };
    Ok(SubscriptionOptions {
        qos: QoS::from_bits(bits & 3)?,
        no_local: bits & 0x04 != 0,
        retain_as_published: bits & 0x08 != 0,
        retain_handling,
    })
}

const SUBACK_CODES: [u8; 12] =
    [0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2];
const SUBACK_CODES_3_1_1: [u8; 4] = [0x00, 0x01, 0x02, 0x80];
const UNSUBACK_CODES: [u8; 7] = [0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91];

fn suback(body: &mut Body, version: Version) -> Result<SubAck> {
    let packet_id = body.packet_id()?;
    let (codes, properties): (&[u8], _) = match version {
        Version::V5 => (&SUBACK_CODES, properties::read_reason(body)?),
        Version::V3_1_1 => (&SUBACK_CODES_3_1_1, None),
    };
    let reasons = reasons(body, codes)?;
    Ok(SubAck { packet_id, reasons, properties })
}

fn unsuback(body: &mut Body, version: Version) -> Result<SubAck> {
    let packet_id = body.packet_id()?;
    if version == Version::V3_1_1 {
        return Ok(SubAck { packet_id, reasons: Vec::new(), properties: None });
    }
    let properties = properties::read_reason(body)?;
    let reasons = reasons(body, &UNSUBACK_CODES)?;
    Ok(SubAck { packet_id, reasons, properties })
}

fn reasons(body: &mut Body, codes: &[u8]) -> Result<Vec<ReasonCode>> {
    if body.is_empty() {
        return Err(DecodeError::Protocol("an answer without a single reason code"));
    }
    let mut reasons = Vec::new();
    while !body.is_empty() {
        reasons.push(body.reason(codes)?);
    }
    Ok(reasons)
}

fn unsubscribe(body: &mut Body, version: Version) -> Result<Unsubscribe> {
    let packet_id = body.packet_id()?;
    let (_, user_properties) = match version {
        Version::V5 => properties::read_subscribe(body, false)?,
        Version::V3_1_1 => (None, Vec::new()),
    };
    let mut filters = Vec::new();
    while !body.is_empty() {
        filters.push(body.filter()?);
    }
    if filters.is_empty() {
        return Err(DecodeError::Protocol("an UNSUBSCRIBE without a topic filter"));
    }
    Ok(Unsubscribe { packet_id, filters, user_properties })
}

const CLIENT_DISCONNECT_CODES: [u8; 14] =
    [0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99];
const SERVER_DISCONNECT_CODES: [u8; 28] = [
    0x00, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x8F, 0x90, 0x93, 0x94, 0x95, 0x96,
    0x97, 0x98, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x9F, 0xA0, 0xA1, 0xA2,
];

fn disconnect(body: &mut Body, version: Version, from_client: bool) -> Result<Disconnect> {
    let (mut reason, mut properties) = (ReasonCode::Success, None);
    if version == Version::V5 && !body.is_empty() {
        let codes: &[u8] =
            if from_client { &CLIENT_DISCONNECT_CODES } else { &SERVER_DISCONNECT_CODES };
        reason = body.reason(codes)?;
        if !body.is_empty() {
            properties = properties::read_disconnect(body, from_client)?;
        }
    }
    Ok(Disconnect { reason, properties })
}

fn auth(body: &mut Body) -> Result<Auth> {
    let mut auth = Auth {
        reason: ReasonCode::Success,
        authentication_method: None,
        authentication_data: None,
        reason_string: None,
        user_properties: Vec::new(),
    };
    if !body.is_empty() {
        auth.reason = body.reason(&[0x00, 0x18, 0x19])?;
        properties::read_auth(body, &mut auth)?;
        if auth.authentication_method.is_none() {
            return Err(DecodeError::Protocol("AUTH without an authentication method"));
        }
    }
    Ok(auth)
}
