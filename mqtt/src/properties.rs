//! MQTT 5.0 properties (section 2.2.2): reading and writing each packet's set.

use std::num::NonZeroU16;

use bytes::{BufMut, Bytes, BytesMut};
use bytestring::ByteString;

use crate::decode::{Body, DecodeError};
use crate::packet::{
    ConnAckProperties, ConnectProperties, DisconnectProperties, PublishProperties, QoS,
    ReasonProperties, UserProperties, Will,
};
use crate::topic::TopicName;

/// Property identifiers (table 2-4).
pub(crate) mod id {
    pub(crate) const PAYLOAD_FORMAT: u8 = 0x01;
    pub(crate) const MESSAGE_EXPIRY: u8 = 0x02;
    pub(crate) const CONTENT_TYPE: u8 = 0x03;
    pub(crate) const RESPONSE_TOPIC: u8 = 0x08;
    pub(crate) const CORRELATION_DATA: u8 = 0x09;
    pub(crate) const SUBSCRIPTION_ID: u8 = 0x0B;
    pub(crate) const SESSION_EXPIRY: u8 = 0x11;
    pub(crate) const ASSIGNED_CLIENT_ID: u8 = 0x12;
    pub(crate) const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub(crate) const AUTH_METHOD: u8 = 0x15;
    pub(crate) const AUTH_DATA: u8 = 0x16;
    pub(crate) const REQUEST_PROBLEM_INFO: u8 = 0x17;
    pub(crate) const WILL_DELAY: u8 = 0x18;
    pub(crate) const REQUEST_RESPONSE_INFO: u8 = 0x19;
    pub(crate) const RESPONSE_INFO: u8 = 0x1A;
    pub(crate) const SERVER_REFERENCE: u8 = 0x1C;
    pub(crate) const REASON_STRING: u8 = 0x1F;
    pub(crate) const RECEIVE_MAXIMUM: u8 = 0x21;
    pub(crate) const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    pub(crate) const TOPIC_ALIAS: u8 = 0x23;
    pub(crate) const MAXIMUM_QOS: u8 = 0x24;
    pub(crate) const RETAIN_AVAILABLE: u8 = 0x25;
    pub(crate) const USER_PROPERTY: u8 = 0x26;
    pub(crate) const MAXIMUM_PACKET_SIZE: u8 = 0x27;
    pub(crate) const WILDCARD_AVAILABLE: u8 = 0x28;
    pub(crate) const SUBSCRIPTION_ID_AVAILABLE: u8 = 0x29;
    pub(crate) const SHARED_AVAILABLE: u8 = 0x2A;
}

/// Reads a property section: `each` gets every identifier with the body at its value. Repetitions
/// are refused but for those properties that may repeat.
pub(crate) fn read_each(
    body: &mut Body,
    mut each: impl FnMut(u8, &mut Body) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    let length = body.varint()? as usize;
    let mut section = body.take(length)?;
    let mut seen = 0u64;
    while !section.is_empty() {
        // An identifier is a variable byte integer, but all of them fit into one byte.
        let id = section.u8()?;
        let bit = 1u64.checked_shl(u32::from(id)).unwrap_or(0);
        let repeats = matches!(id, id::USER_PROPERTY | id::SUBSCRIPTION_ID);
        if seen & bit != 0 && !repeats {
            return Err(DecodeError::Protocol("a property is given twice"));
        }
        seen |= bit;
        each(id, &mut section)?;
    }
    Ok(())
}

fn flag(body: &mut Body) -> Result<bool, DecodeError> {
    match body.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(DecodeError::Protocol("a property that is 0 or 1 has another value")),
    }
}

fn user_property(body: &mut Body, into: &mut UserProperties) -> Result<(), DecodeError> {
    let name = body.string()?;
    into.push((name, body.string()?));
    Ok(())
}

pub(crate) fn not_allowed(_: u8) -> DecodeError {
    DecodeError::Malformed("a property that is unknown or not allowed in this packet")
}

fn non_zero(value: u16, what: &'static str) -> Result<NonZeroU16, DecodeError> {
    NonZeroU16::new(value).ok_or(DecodeError::Protocol(what))
}

fn response_topic(body: &mut Body) -> Result<TopicName, DecodeError> {
    TopicName::parse(body.string()?)
        .map_err(|_| DecodeError::Protocol("the response topic is not a topic name"))
}

/// The properties that a PUBLISH and a will share; `false` where `id` is none of them.
fn read_message_property(
    id: u8,
    body: &mut Body,
    into: &mut PublishProperties,
) -> Result<bool, DecodeError> {
    match id {
        id::PAYLOAD_FORMAT => into.payload_is_utf8 = Some(flag(body)?),
        id::MESSAGE_EXPIRY => into.message_expiry_interval_s = Some(body.u32()?),
        id::CONTENT_TYPE => into.content_type = Some(body.string()?),
        id::RESPONSE_TOPIC => into.response_topic = Some(response_topic(body)?),
        id::CORRELATION_DATA => into.correlation_data = Some(body.binary()?),
        id::USER_PROPERTY => user_property(body, &mut into.user_properties)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// `None` where the section is empty, so that the common PUBLISH allocates nothing.
pub(crate) fn read_publish(
    body: &mut Body,
    from_client: bool,
) -> Result<Option<Box<PublishProperties>>, DecodeError> {
    let mut properties: Option<Box<PublishProperties>> = None;
    read_each(body, |id, body| {
        let into = properties.get_or_insert_default();
        if read_message_property(id, body, into)? {
            return Ok(());
        }
        match id {
            id::TOPIC_ALIAS => {
                let alias = NonZeroU16::new(body.u16()?).ok_or(DecodeError::TopicAlias)?;
                into.topic_alias = Some(alias);
            }
            id::SUBSCRIPTION_ID if from_client => {
                return Err(DecodeError::Protocol("a client's PUBLISH with a subscription identifier"));
            }
            id::SUBSCRIPTION_ID => into.subscription_ids.push(subscription_id(body)?),
            _ => return Err(not_allowed(id)),
        }
        Ok(())
    })?;
    Ok(properties)
}

pub(crate) fn subscription_id(body: &mut Body) -> Result<u32, DecodeError> {
    match body.varint()? {
        0 => Err(DecodeError::Protocol("the subscription identifier is 0")),
        id => Ok(id),
    }
}

/// Will delay and the properties of the message to come.
pub(crate) fn read_will(
    body: &mut Body,
) -> Result<(u32, Option<Box<PublishProperties>>), DecodeError> {
    let mut properties: Option<Box<PublishProperties>> = None;
    let mut delay_s = 0;
    read_each(body, |id, body| {
        if id == id::WILL_DELAY {
            delay_s = body.u32()?;
            return Ok(());
        }
        if read_message_property(id, body, properties.get_or_insert_default())? {
            return Ok(());
        }
        Err(not_allowed(id))
    })?;
    Ok((delay_s, properties))
}

pub(crate) fn read_connect(body: &mut Body) -> Result<ConnectProperties, DecodeError> {
    let mut into = ConnectProperties::default();
    read_each(body, |id, body| {
        match id {
            id::SESSION_EXPIRY => into.session_expiry_interval_s = Some(body.u32()?),
            id::RECEIVE_MAXIMUM => {
                into.receive_maximum = Some(non_zero(body.u16()?, "the receive maximum is 0")?);
            }
            id::MAXIMUM_PACKET_SIZE => match body.u32()? {
                0 => return Err(DecodeError::Protocol("the maximum packet size is 0")),
                size => into.maximum_packet_size = Some(size),
            },
            id::TOPIC_ALIAS_MAXIMUM => into.topic_alias_maximum = Some(body.u16()?),
            id::REQUEST_RESPONSE_INFO => into.request_response_information = Some(flag(body)?),
            id::REQUEST_PROBLEM_INFO => into.request_problem_information = Some(flag(body)?),
            id::USER_PROPERTY => user_property(body, &mut into.user_properties)?,
            id::AUTH_METHOD => into.authentication_method = Some(body.string()?),
            id::AUTH_DATA => into.authentication_data = Some(body.binary()?),
            _ => return Err(not_allowed(id)),
        }
        Ok(())
    })?;
    if into.authentication_data.is_some() && into.authentication_method.is_none() {
        return Err(DecodeError::Protocol("authentication data without a method"));
    }
    Ok(into)
}

pub(crate) fn read_connack(body: &mut Body) -> Result<ConnAckProperties, DecodeError> {
    let mut into = ConnAckProperties::default();
    read_each(body, |id, body| {
        match id {
            id::SESSION_EXPIRY => into.session_expiry_interval_s = Some(body.u32()?),
            id::RECEIVE_MAXIMUM => {
                into.receive_maximum = Some(non_zero(body.u16()?, "the receive maximum is 0")?);
            }
            id::MAXIMUM_QOS => {
                let at_least_once = flag(body)?;
                into.maximum_qos =
                    Some(if at_least_once { QoS::AtLeastOnce } else { QoS::AtMostOnce });
            }
            id::RETAIN_AVAILABLE => into.retain_available = Some(flag(body)?),
            id::MAXIMUM_PACKET_SIZE => match body.u32()? {
                0 => return Err(DecodeError::Protocol("the maximum packet size is 0")),
                size => into.maximum_packet_size = Some(size),
            },
            id::ASSIGNED_CLIENT_ID => into.assigned_client_id = Some(body.string()?),
            id::TOPIC_ALIAS_MAXIMUM => into.topic_alias_maximum = Some(body.u16()?),
            id::REASON_STRING => into.reason_string = Some(body.string()?),
            id::USER_PROPERTY => user_property(body, &mut into.user_properties)?,
            id::WILDCARD_AVAILABLE => into.wildcard_subscription_available = Some(flag(body)?),
            id::SUBSCRIPTION_ID_AVAILABLE => into.subscription_ids_available = Some(flag(body)?),
            id::SHARED_AVAILABLE => into.shared_subscription_available = Some(flag(body)?),
            id::SERVER_KEEP_ALIVE => into.server_keep_alive_s = Some(body.u16()?),
            id::RESPONSE_INFO => into.response_information = Some(body.string()?),
            id::SERVER_REFERENCE => into.server_reference = Some(body.string()?),
            id::AUTH_METHOD => into.authentication_method = Some(body.string()?),
            id::AUTH_DATA => into.authentication_data = Some(body.binary()?),
            _ => return Err(not_allowed(id)),
        }
        Ok(())
    })?;
    Ok(into)
}

pub(crate) fn read_reason(body: &mut Body) -> Result<Option<Box<ReasonProperties>>, DecodeError> {
    let mut properties: Option<Box<ReasonProperties>> = None;
    read_each(body, |id, body| {
        let into = properties.get_or_insert_default();
        match id {
            id::REASON_STRING => into.reason_string = Some(body.string()?),
            id::USER_PROPERTY => user_property(body, &mut into.user_properties)?,
            _ => return Err(not_allowed(id)),
        }
        Ok(())
    })?;
    Ok(properties)
}

pub(crate) fn read_disconnect(
    body: &mut Body,
    from_client: bool,
) -> Result<Option<Box<DisconnectProperties>>, DecodeError> {
    let mut properties: Option<Box<DisconnectProperties>> = None;
    read_each(body, |id, body| {
        let into = properties.get_or_insert_default();
        match id {
            id::SESSION_EXPIRY if from_client => into.session_expiry_interval_s = Some(body.u32()?),
            id::REASON_STRING => into.reason_string = Some(body.string()?),
            id::USER_PROPERTY => user_property(body, &mut into.user_properties)?,
            id::SERVER_REFERENCE if !from_client => into.server_reference = Some(body.string()?),
            id::SESSION_EXPIRY => {
                return Err(DecodeError::Protocol("a server's DISCONNECT with a session expiry"));
            }
            _ => return Err(not_allowed(id)),
        }
        Ok(())
    })?;
    Ok(properties)
}

/// The user properties of SUBSCRIBE and UNSUBSCRIBE; the former may have a subscription identifier.
pub(crate) fn read_subscribe(
    body: &mut Body,
    with_id: bool,
) -> Result<(Option<u32>, UserProperties), DecodeError> {
    let (mut found, mut user) = (None, UserProperties::new());
    read_each(body, |id, body| {
        match id {
            id::SUBSCRIPTION_ID if with_id && found.is_some() => {
                return Err(DecodeError::Protocol("a property is given twice"));
            }
            id::SUBSCRIPTION_ID if with_id => found = Some(subscription_id(body)?),
            id::USER_PROPERTY => user_property(body, &mut user)?,
            _ => return Err(not_allowed(id)),
        }
        Ok(())
    })?;
    Ok((found, user))
}

pub(crate) fn read_auth(body: &mut Body, into: &mut crate::packet::Auth) -> Result<(), DecodeError> {
    read_each(body, |id, body| {
        match id {
            id::AUTH_METHOD => into.authentication_method = Some(body.string()?),
            id::AUTH_DATA => into.authentication_data = Some(body.binary()?),
            id::REASON_STRING => into.reason_string = Some(body.string()?),
            id::USER_PROPERTY => user_property(body, &mut into.user_properties)?,
            _ => return Err(not_allowed(id)),
        }
        Ok(())
    })
}

/// Writes properties into a section whose length is put in front at the end.
pub(crate) struct Writer {
    pub(crate) section: BytesMut,
    /// A value did not fit its two bytes of length: the packet must not be sent.
    pub(crate) too_long: bool,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self { section: BytesMut::new(), too_long: false }
    }

    pub(crate) fn flag(&mut self, id: u8, value: Option<bool>) {
        if let Some(value) = value {
            self.section.put_u8(id);
            self.section.put_u8(u8::from(value));
        }
    }

    pub(crate) fn u16(&mut self, id: u8, value: Option<u16>) {
        if let Some(value) = value {
            self.section.put_u8(id);
            self.section.put_u16(value);
        }
    }

    pub(crate) fn u32(&mut self, id: u8, value: Option<u32>) {
        if let Some(value) = value {
            self.section.put_u8(id);
            self.section.put_u32(value);
        }
    }

    pub(crate) fn binary(&mut self, id: u8, value: Option<&[u8]>) {
        if let Some(value) = value {
            self.section.put_u8(id);
            self.too_long |= !put_binary(value, &mut self.section);
        }
    }

    pub(crate) fn text(&mut self, id: u8, value: Option<&ByteString>) {
        self.binary(id, value.map(|text| text.as_bytes().as_ref()));
    }

    pub(crate) fn user(&mut self, properties: &UserProperties) {
        for (name, value) in properties {
            self.section.put_u8(id::USER_PROPERTY);
            self.too_long |= !put_binary(name.as_bytes(), &mut self.section);
            self.too_long |= !put_binary(value.as_bytes(), &mut self.section);
        }
    }

    pub(crate) fn subscription_id(&mut self, value: u32) {
        self.section.put_u8(id::SUBSCRIPTION_ID);
        put_varint(value, &mut self.section);
    }

    /// The properties that a PUBLISH and a will share. Message expiry comes first, so that its
    /// place is known.
    pub(crate) fn message(&mut self, from: &PublishProperties) {
        self.u32(id::MESSAGE_EXPIRY, from.message_expiry_interval_s);
        self.flag(id::PAYLOAD_FORMAT, from.payload_is_utf8);
        self.text(id::CONTENT_TYPE, from.content_type.as_ref());
        let response_topic = from.response_topic.as_ref().map(|topic| topic.as_str().as_bytes());
        self.binary(id::RESPONSE_TOPIC, response_topic);
        self.binary(id::CORRELATION_DATA, from.correlation_data.as_deref());
        self.user(&from.user_properties);
    }

    pub(crate) fn publish(&mut self, from: &PublishProperties) {
        self.message(from);
        self.u16(id::TOPIC_ALIAS, from.topic_alias.map(NonZeroU16::get));
        for value in &from.subscription_ids {
            self.subscription_id(*value);
        }
    }

    /// Appends the section with its length; says whether everything fitted.
    #[must_use]
    pub(crate) fn finish(self, out: &mut BytesMut) -> bool {
        put_varint(u32::try_from(self.section.len()).unwrap_or(u32::MAX), out);
        out.extend_from_slice(&self.section);
        !self.too_long
    }
}

/// A length in two bytes, then the bytes; `false` and nothing written where they are too many.
#[must_use]
pub(crate) fn put_binary(value: &[u8], out: &mut BytesMut) -> bool {
    let Ok(length) = u16::try_from(value.len()) else { return false };
    out.put_u16(length);
    out.extend_from_slice(value);
    true
}

/// A variable byte integer (section 1.5.5); at most four bytes.
pub(crate) fn put_varint(mut value: u32, out: &mut BytesMut) {
    loop {
        let byte = (value & 0x7F) as u8;
        value >>= 7;
        if value == 0 {
            out.put_u8(byte);
            return;
        }
        out.put_u8(byte | 0x80);
    }
}

pub(crate) const fn varint_len(value: usize) -> usize {
    match value {
        0..=0x7F => 1,
        0x80..=0x3FFF => 2,
        0x4000..=0x1F_FFFF => 3,
        _ => 4,
    }
}

impl PublishProperties {
    /// Appends the properties in their form on the wire, length first, for a record of a store.
    ///
    /// # Panics
    /// When a text is longer than 65,535 bytes, which none that was decoded is.
    pub fn append_to(&self, out: &mut BytesMut) {
        let mut writer = Writer::new();
        writer.publish(self);
        assert!(writer.finish(out), "a property is longer than 65,535 bytes");
    }

    /// Reads what [`PublishProperties::append_to`] wrote, and nothing after it; `None` for an empty
    /// section.
    ///
    /// # Errors
    /// When the bytes are not such a section.
    pub fn from_bytes(bytes: Bytes) -> Result<Option<Box<Self>>, DecodeError> {
        let mut body = Body::new(bytes);
        let properties = read_publish(&mut body, false)?;
        body.end()?;
        Ok(properties)
    }
}

impl Will {
    /// Appends the will as bytes for a record of a store.
    ///
    /// # Panics
    /// When a text is longer than 65,535 bytes, which none that was decoded is.
    pub fn append_to(&self, out: &mut BytesMut) {
        out.put_u8(self.qos as u8 | u8::from(self.retain) << 2);
        let mut fits = put_binary(self.topic.as_str().as_bytes(), out);
        let mut writer = Writer::new();
        writer.u32(id::WILL_DELAY, Some(self.delay_interval_s));
        if let Some(properties) = &self.properties {
            writer.message(properties);
        }
        fits &= writer.finish(out);
        assert!(fits, "a text of the will is longer than 65,535 bytes");
        out.extend_from_slice(&self.payload);
    }

    /// Reads what [`Will::append_to`] wrote.
    ///
    /// # Errors
    /// When the bytes are not a will.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut body = Body::new(bytes);
        let flags = body.u8()?;
        let qos = QoS::from_bits(flags & 3)?;
        let topic = TopicName::parse(body.string()?)
            .map_err(|_| DecodeError::Malformed("the will topic is not a topic name"))?;
        let (delay_interval_s, properties) = read_will(&mut body)?;
        let (retain, payload) = (flags & 4 != 0, body.rest());
        Ok(Self { topic, payload, qos, retain, delay_interval_s, properties })
    }

    /// The same will in memory of its own, so that it does not hold on to the buffer that it was
    /// read from.
    #[must_use]
    pub fn copied(&self) -> Self {
        let mut own = BytesMut::new();
        self.append_to(&mut own);
        Self::from_bytes(own.freeze()).expect("just written from a will")
    }
}
