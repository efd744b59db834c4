//! MQTT 3.1.1 and 5.0 as bytes, written from the specifications for these tests alone.
//!
//! The encoder encodes whatever it is told, also what a good client would not send.

/// MQTT 3.1.1.
pub const V3: u8 = 4;
/// MQTT 5.0.
pub const V5: u8 = 5;

/// The value of an MQTT 5.0 property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// One byte.
    Byte(u8),
    /// Two bytes.
    Two(u16),
    /// Four bytes.
    Four(u32),
    /// A variable byte integer.
    Var(u32),
    /// A string or binary data.
    Text(Vec<u8>),
    /// A pair of strings.
    Pair(String, String),
}

/// Properties in the order in which they stand.
pub type Properties = Vec<(u8, Value)>;

/// Identifiers of properties that tests name (MQTT 5.0 section 2.2.2.2).
#[allow(missing_docs, reason = "the specification's words")]
pub mod property {
    pub const MESSAGE_EXPIRY: u8 = 0x02;
    pub const CONTENT_TYPE: u8 = 0x03;
    pub const RESPONSE_TOPIC: u8 = 0x08;
    pub const CORRELATION_DATA: u8 = 0x09;
    pub const SUBSCRIPTION_ID: u8 = 0x0B;
    pub const SESSION_EXPIRY: u8 = 0x11;
    pub const ASSIGNED_CLIENT_ID: u8 = 0x12;
    pub const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub const WILL_DELAY: u8 = 0x18;
    pub const SERVER_REFERENCE: u8 = 0x1C;
    pub const RECEIVE_MAXIMUM: u8 = 0x21;
    pub const TOPIC_ALIAS: u8 = 0x23;
    pub const USER_PROPERTY: u8 = 0x26;
    pub const MAXIMUM_PACKET_SIZE: u8 = 0x27;
}

/// A will.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "the specification's words")]
pub struct Will {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
    pub properties: Properties,
}

/// What a CONNECT says.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "the specification's words")]
pub struct Connect {
    pub version: u8,
    pub client_id: String,
    pub clean_start: bool,
    pub keep_alive_s: u16,
    pub will: Option<Will>,
    pub user_name: Option<String>,
    pub password: Option<Vec<u8>>,
    pub properties: Properties,
}

impl Connect {
    /// A clean start without keep alive.
    pub fn new(version: u8, client_id: &str) -> Self {
        Self {
            version,
            client_id: client_id.to_owned(),
            clean_start: true,
            keep_alive_s: 0,
            will: None,
            user_name: None,
            password: None,
            properties: Vec::new(),
        }
    }

    /// Resumes the session, and keeps it for an hour after the connection in MQTT 5.0 (3.1.1 has no end).
    #[must_use]
    pub fn persistent(mut self) -> Self {
        self.clean_start = false;
        if self.version == V5 {
            self.properties
                .push((property::SESSION_EXPIRY, Value::Four(3600)));
        }
        self
    }

    /// With one more property.
    #[must_use]
    pub fn with(mut self, id: u8, value: Value) -> Self {
        self.properties.push((id, value));
        self
    }

    /// With a will.
    #[must_use]
    pub fn with_will(mut self, will: Will) -> Self {
        self.will = Some(will);
        self
    }

    /// With a keep alive in seconds.
    #[must_use]
    pub fn keep_alive(mut self, seconds: u16) -> Self {
        self.keep_alive_s = seconds;
        self
    }
}

/// A PUBLISH in either direction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the specification's words")]
pub struct Publish {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    pub packet_id: u16,
    pub properties: Properties,
}

impl Publish {
    /// A message; the packet identifier is filled in by whoever sends it.
    pub fn new(topic: &str, qos: u8, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            topic: topic.to_owned(),
            qos,
            payload: payload.into(),
            ..Self::default()
        }
    }

    /// To be kept by the server.
    #[must_use]
    pub fn retained(mut self) -> Self {
        self.retain = true;
        self
    }

    /// With a packet identifier.
    #[must_use]
    pub fn with_id(mut self, packet_id: u16) -> Self {
        self.packet_id = packet_id;
        self
    }

    /// With one more property.
    #[must_use]
    pub fn with(mut self, id: u8, value: Value) -> Self {
        self.properties.push((id, value));
        self
    }

    /// The payload as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// The value of a user property.
    pub fn user_property(&self, name: &str) -> Option<&str> {
        self.properties.iter().find_map(|(_, value)| match value {
            Value::Pair(key, value) if key == name => Some(value.as_str()),
            _ => None,
        })
    }

    /// The first value of a property.
    pub fn property(&self, id: u8) -> Option<&Value> {
        self.properties
            .iter()
            .find(|(key, _)| *key == id)
            .map(|(_, value)| value)
    }
}

/// What a server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the specification's words")]
pub enum Packet {
    ConnAck {
        session_present: bool,
        code: u8,
        properties: Properties,
    },
    Publish(Publish),
    PubAck {
        packet_id: u16,
        reason: u8,
    },
    PubRec {
        packet_id: u16,
        reason: u8,
    },
    PubRel {
        packet_id: u16,
        reason: u8,
    },
    PubComp {
        packet_id: u16,
        reason: u8,
    },
    SubAck {
        packet_id: u16,
        codes: Vec<u8>,
    },
    UnsubAck {
        packet_id: u16,
        codes: Vec<u8>,
    },
    PingResp,
    Disconnect {
        reason: u8,
        properties: Properties,
    },
}

fn var(mut number: u32, out: &mut Vec<u8>) {
    loop {
        let byte = (number % 128) as u8;
        number /= 128;
        out.push(if number > 0 { byte | 0x80 } else { byte });
        if number == 0 {
            return;
        }
    }
}

fn text(bytes: &[u8], out: &mut Vec<u8>) {
    let length = u16::try_from(bytes.len()).expect("tests send short strings");
    out.extend(length.to_be_bytes());
    out.extend(bytes);
}

fn properties(list: &Properties, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    for (id, value) in list {
        body.push(*id);
        match value {
            Value::Byte(n) => body.push(*n),
            Value::Two(n) => body.extend(n.to_be_bytes()),
            Value::Four(n) => body.extend(n.to_be_bytes()),
            Value::Var(n) => var(*n, &mut body),
            Value::Text(bytes) => text(bytes, &mut body),
            Value::Pair(key, value) => {
                text(key.as_bytes(), &mut body);
                text(value.as_bytes(), &mut body);
            }
        }
    }
    var(
        u32::try_from(body.len()).expect("tests send few properties"),
        out,
    );
    out.extend(body);
}

/// A packet of a type and flags byte and a body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    var(
        u32::try_from(body.len()).expect("tests send small packets"),
        &mut out,
    );
    out.extend(body);
    out
}

/// CONNECT.
pub fn connect(connect: &Connect) -> Vec<u8> {
    let mut body = Vec::new();
    text(b"MQTT", &mut body);
    body.push(connect.version);
    let will_flags = connect.will.as_ref().map_or(0, |will| {
        0x04 | (will.qos << 3) | (u8::from(will.retain) << 5)
    });
    body.push(
        (u8::from(connect.clean_start) << 1)
            | will_flags
            | (u8::from(connect.password.is_some()) << 6)
            | (u8::from(connect.user_name.is_some()) << 7),
    );
    body.extend(connect.keep_alive_s.to_be_bytes());
    if connect.version == V5 {
        properties(&connect.properties, &mut body);
    }
    text(connect.client_id.as_bytes(), &mut body);
    if let Some(will) = &connect.will {
        if connect.version == V5 {
            properties(&will.properties, &mut body);
        }
        text(will.topic.as_bytes(), &mut body);
        text(&will.payload, &mut body);
    }
    if let Some(name) = &connect.user_name {
        text(name.as_bytes(), &mut body);
    }
    if let Some(password) = &connect.password {
        text(password, &mut body);
    }
    packet(0x10, &body)
}

/// PUBLISH.
pub fn publish(version: u8, publish: &Publish) -> Vec<u8> {
    let mut body = Vec::new();
    text(publish.topic.as_bytes(), &mut body);
    if publish.qos > 0 {
        body.extend(publish.packet_id.to_be_bytes());
    }
    if version == V5 {
        properties(&publish.properties, &mut body);
    }
    body.extend(&publish.payload);
    let first = 0x30 | (u8::from(publish.dup) << 3) | (publish.qos << 1) | u8::from(publish.retain);
    packet(first, &body)
}

/// PUBACK.
pub fn puback(packet_id: u16) -> Vec<u8> {
    packet(0x40, &packet_id.to_be_bytes())
}

/// An MQTT 5.0 PUBACK that refuses.
pub fn puback_with(packet_id: u16, reason: u8) -> Vec<u8> {
    let [high, low] = packet_id.to_be_bytes();
    packet(0x40, &[high, low, reason])
}

/// PUBREC.
pub fn pubrec(packet_id: u16) -> Vec<u8> {
    packet(0x50, &packet_id.to_be_bytes())
}

/// PUBREL.
pub fn pubrel(packet_id: u16) -> Vec<u8> {
    packet(0x62, &packet_id.to_be_bytes())
}

/// PUBCOMP.
pub fn pubcomp(packet_id: u16) -> Vec<u8> {
    packet(0x70, &packet_id.to_be_bytes())
}

/// SUBSCRIBE to filters with their options byte.
pub fn subscribe(
    version: u8,
    packet_id: u16,
    list: &Properties,
    filters: &[(&str, u8)],
) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == V5 {
        properties(list, &mut body);
    }
    for (filter, options) in filters {
        text(filter.as_bytes(), &mut body);
        body.push(*options);
    }
    packet(0x82, &body)
}

/// UNSUBSCRIBE.
pub fn unsubscribe(version: u8, packet_id: u16, filters: &[&str]) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == V5 {
        body.push(0);
    }
    for filter in filters {
        text(filter.as_bytes(), &mut body);
    }
    packet(0xA2, &body)
}

/// PINGREQ.
pub const PINGREQ: [u8; 2] = [0xC0, 0];

/// DISCONNECT; reason and properties are for MQTT 5.0.
pub fn disconnect(version: u8, reason: u8, list: &Properties) -> Vec<u8> {
    if version != V5 || (reason == 0 && list.is_empty()) {
        return packet(0xE0, &[]);
    }
    let mut body = vec![reason];
    properties(list, &mut body);
    packet(0xE0, &body)
}

/// Reads a body from its front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self
            .0
            .split_at_checked(count)
            .ok_or("the packet is shorter than it says")?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn two(&mut self) -> Result<u16, String> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn four(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn var(&mut self) -> Result<u32, String> {
        let mut number = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            number |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("a variable byte integer of more than four bytes".into())
    }

    fn text(&mut self) -> Result<&'a [u8], String> {
        let length = self.two()?;
        self.take(length.into())
    }

    fn string(&mut self) -> Result<String, String> {
        String::from_utf8(self.text()?.to_vec()).map_err(|_| "a string that is not UTF-8".into())
    }

    fn properties(&mut self) -> Result<Properties, String> {
        let length = self.var()?;
        let mut body = Self(self.take(length as usize)?);
        let mut list = Vec::new();
        while !body.0.is_empty() {
            let id = body.byte()?;
            let value = match id {
                0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2A => Value::Byte(body.byte()?),
                0x13 | 0x21 | 0x22 | 0x23 => Value::Two(body.two()?),
                0x02 | 0x11 | 0x18 | 0x27 => Value::Four(body.four()?),
                0x0B => Value::Var(body.var()?),
                0x26 => Value::Pair(body.string()?, body.string()?),
                0x03 | 0x08 | 0x09 | 0x12 | 0x15 | 0x16 | 0x1A | 0x1C | 0x1F => {
                    Value::Text(body.text()?.to_vec())
                }
                _ => return Err(format!("unknown property {id:#04x}")),
            };
            list.push((id, value));
        }
        Ok(list)
    }

    fn end(self) -> Result<(), String> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(format!("{} bytes too many", self.0.len()))
        }
    }
}

/// Takes one packet off the front of `buffer`; `None` when it is not complete yet.
pub fn decode(version: u8, buffer: &mut Vec<u8>) -> Result<Option<Packet>, String> {
    let Some(&first) = buffer.first() else {
        return Ok(None);
    };
    let mut header = Reader(&buffer[1..]);
    let length = match header.var() {
        Ok(length) => length as usize,
        Err(_) if buffer.len() < 5 => return Ok(None),
        Err(problem) => return Err(problem),
    };
    let start = buffer.len() - header.0.len();
    if buffer.len() < start + length {
        return Ok(None);
    }
    let packet = body(version, first, &buffer[start..start + length])
        .map_err(|problem| format!("{problem} in {:02x?}", &buffer[..start + length]))?;
    buffer.drain(..start + length);
    Ok(Some(packet))
}

fn body(version: u8, first: u8, bytes: &[u8]) -> Result<Packet, String> {
    let mut body = Reader(bytes);
    let v5 = version == V5;
    let packet = match first {
        0x20 => Packet::ConnAck {
            session_present: match body.byte()? {
                0 => false,
                1 => true,
                _ => return Err("reserved bits of CONNACK".into()),
            },
            code: body.byte()?,
            properties: if v5 { body.properties()? } else { Vec::new() },
        },
        0x30..=0x3F => {
            let qos = (first >> 1) & 3;
            let topic = body.string()?;
            let packet_id = if qos > 0 { body.two()? } else { 0 };
            let properties = if v5 { body.properties()? } else { Vec::new() };
            let payload = std::mem::take(&mut body.0).to_vec();
            let (dup, retain) = (first & 8 != 0, first & 1 != 0);
            Packet::Publish(Publish {
                topic,
                payload,
                qos,
                retain,
                dup,
                packet_id,
                properties,
            })
        }
        0x40 | 0x50 | 0x62 | 0x70 => {
            let packet_id = body.two()?;
            let reason = if body.0.is_empty() { 0 } else { body.byte()? };
            if v5 && !body.0.is_empty() {
                body.properties()?;
            } else if !v5 && bytes.len() != 2 {
                return Err("an acknowledgement of 3.1.1 has two bytes".into());
            }
            match first {
                0x40 => Packet::PubAck { packet_id, reason },
                0x50 => Packet::PubRec { packet_id, reason },
                0x62 => Packet::PubRel { packet_id, reason },
                _ => Packet::PubComp { packet_id, reason },
            }
        }
        0x90 | 0xB0 => {
            let packet_id = body.two()?;
            if v5 {
                body.properties()?;
            }
            let codes = std::mem::take(&mut body.0).to_vec();
            match first {
                0x90 => Packet::SubAck { packet_id, codes },
                _ => Packet::UnsubAck { packet_id, codes },
            }
        }
        0xD0 => Packet::PingResp,
        0xE0 if v5 => {
            let reason = if body.0.is_empty() { 0 } else { body.byte()? };
            let properties = if body.0.is_empty() {
                Vec::new()
            } else {
                body.properties()?
            };
            Packet::Disconnect { reason, properties }
        }
        _ => {
            return Err(format!(
                "a server does not send {first:#04x} to version {version}"
            ));
        }
    };
    body.end()?;
    Ok(packet)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_publish_is_read_as_it_was_written() {
        for version in [V3, V5] {
            let mut sent = Publish::new("a/b", 1, "hello").retained();
            sent.packet_id = 7;
            if version == V5 {
                sent = sent.with(property::USER_PROPERTY, Value::Pair("k".into(), "v".into()));
            }
            let mut bytes = publish(version, &sent);
            let last = bytes.pop().unwrap();
            assert_eq!(decode(version, &mut bytes), Ok(None));
            bytes.push(last);
            assert_eq!(decode(version, &mut bytes), Ok(Some(Packet::Publish(sent))));
            assert!(bytes.is_empty());
        }
    }

    #[test]
    fn a_connect_has_the_bytes_of_the_specification() {
        let bytes = connect(&Connect::new(V3, "a").keep_alive(60));
        assert_eq!(
            bytes,
            [
                0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 60, 0, 1, b'a'
            ]
        );
    }
}
