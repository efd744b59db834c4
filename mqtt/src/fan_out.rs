//! A PUBLISH encoded once for many receivers.
//!
//! What differs between receivers of one kind (version, QoS, RETAIN) is patched while copying: the
//! packet identifier, DUP, and what is left of the message expiry interval.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

use crate::encode::{REMAINING_MAX, publish_first_byte};
use crate::packet::{PacketId, Publish, QoS, Version};
use crate::properties::{Writer, id, put_binary, put_varint, varint_len};

/// An encoded PUBLISH without its packet identifier. Clones share the bytes.
#[derive(Debug, Clone)]
pub struct EncodedPublish {
    bytes: Bytes,
    qos: QoS,
    /// Where the packet identifier goes.
    packet_id_at: u32,
    /// Where the message expiry interval is; 0 where there is none.
    expiry_at: u32,
}

impl EncodedPublish {
    /// Encodes for one kind of receivers. A topic alias belongs to another connection and is left
    /// out.
    ///
    /// # Panics
    /// When a field is longer than the protocol allows, which none that was decoded is.
    pub fn new(version: Version, publish: &Publish, qos: QoS, retain: bool) -> Self {
        Self::build(version, publish, qos, retain, &[])
    }

    /// As [`EncodedPublish::new`] for a receiver with subscription identifiers of its own.
    ///
    /// # Panics
    /// As [`EncodedPublish::new`].
    pub fn with_subscription_ids(
        version: Version,
        publish: &Publish,
        qos: QoS,
        retain: bool,
        subscription_ids: &[u32],
    ) -> Self {
        Self::build(version, publish, qos, retain, subscription_ids)
    }

    fn build(
        version: Version,
        publish: &Publish,
        qos: QoS,
        retain: bool,
        subscription_ids: &[u32],
    ) -> Self {
        let mut properties = Writer::new();
        let mut has_expiry = false;
        if version == Version::V5 {
            if let Some(from) = &publish.properties {
                has_expiry = from.message_expiry_interval_s.is_some();
                properties.message(from);
                from.subscription_ids.iter().for_each(|id| properties.subscription_id(*id));
            }
            subscription_ids.iter().for_each(|id| properties.subscription_id(*id));
        }
        let section = properties.section.len();
        let section_with_length = match version {
            Version::V5 => varint_len(section) + section,
            Version::V3_1_1 => 0,
        };
        let topic = publish.topic.as_str().as_bytes();
        let id_len = if qos == QoS::AtMostOnce { 0 } else { 2 };
        let remaining = 2 + topic.len() + id_len + section_with_length + publish.payload.len();
        assert!(remaining <= REMAINING_MAX, "a PUBLISH longer than the protocol can frame");
        let mut bytes = BytesMut::with_capacity(1 + varint_len(remaining) + remaining);
        bytes.put_u8(publish_first_byte(false, qos, retain));
        put_varint(remaining as u32, &mut bytes);
        assert!(put_binary(topic, &mut bytes), "a topic longer than 65,535 bytes");
        let packet_id_at = bytes.len() as u32;
        if id_len > 0 {
            bytes.put_u16(0);
        }
        let mut expiry_at = 0;
        if version == Version::V5 {
            if has_expiry {
                // The writer puts it first: after the length and its identifier.
                debug_assert_eq!(properties.section[0], id::MESSAGE_EXPIRY);
                expiry_at = (bytes.len() + varint_len(section) + 1) as u32;
            }
            assert!(properties.finish(&mut bytes), "a property longer than 65,535 bytes");
        }
        bytes.extend_from_slice(&publish.payload);
        Self { bytes: bytes.freeze(), qos, packet_id_at, expiry_at }
    }

    /// Bytes on the wire.
    #[expect(clippy::len_without_is_empty, reason = "a packet is never empty")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The QoS it was encoded with.
    pub fn qos(&self) -> QoS {
        self.qos
    }

    /// Appends the packet. `packet_id` is written where the QoS has one.
    pub fn write(&self, packet_id: Option<PacketId>, dup: bool, out: &mut BytesMut) {
        self.patch(packet_id, dup, None, out);
    }

    /// As [`EncodedPublish::write`], with what is left of the message expiry interval, in seconds,
    /// in the place of what it was.
    pub fn write_with_expiry(
        &self,
        packet_id: Option<PacketId>,
        dup: bool,
        expiry_interval_s: u32,
        out: &mut BytesMut,
    ) {
        self.patch(packet_id, dup, Some(expiry_interval_s), out);
    }

    fn patch(
        &self,
        packet_id: Option<PacketId>,
        dup: bool,
        expiry_interval_s: Option<u32>,
        out: &mut BytesMut,
    ) {
        let start = out.len();
        out.extend_from_slice(&self.bytes);
        let packet = &mut out[start..];
        packet[0] |= u8::from(dup) << 3;
        if let (Some(id), true) = (packet_id, self.qos > QoS::AtMostOnce) {
            packet[field(self.packet_id_at, 2)].copy_from_slice(&id.0.get().to_be_bytes());
        }
        if let (Some(left_s), true) = (expiry_interval_s, self.expiry_at > 0) {
            packet[field(self.expiry_at, 4)].copy_from_slice(&left_s.to_be_bytes());
        }
    }
}

fn field(at: u32, length: usize) -> Range<usize> {
    at as usize..at as usize + length
}
