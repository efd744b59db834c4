//! Packets to bytes.
//!
//! Each packet is described once, as a walk over its fields (`Sink`); the walk runs twice,
//! to count and then to write, so that lengths are right by construction and a packet that cannot
//! be written leaves the buffer as it was.
//!
//! Written is what the packet says, in the words of the receiver's version: whether it makes sense
//! now is the caller's business.

use bytes::{BufMut, BytesMut};

use crate::packet_type::PacketType;
use crate::{Packet, PacketId, Publish, ReasonCode, Version};

mod body;
mod properties;
pub(crate) mod sink;

pub(crate) use properties::{PublishPropertySet, WillPropertySet};
pub(crate) use sink::{Counter, PropertySet, Sink};

/// The largest Remaining Length (section 1.5.5).
pub(crate) const REMAINING_LENGTH_MAX: usize = 268_435_455;

/// A whole PINGRESP.
pub const PINGRESP: [u8; 2] = [0xD0, 0];

/// A whole PINGREQ.
pub const PINGREQ: [u8; 2] = [0xC0, 0];

/// Why a packet cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// Text or binary data of more than 65,535 bytes.
    #[error("{0} is longer than 65,535 bytes")]
    FieldTooLong(&'static str),
    /// More than the 268,435,455 bytes that a Remaining Length can tell.
    #[error("the packet is longer than 268,435,455 bytes")]
    PacketTooLong,
    /// A QoS 0 PUBLISH with a packet identifier, or another one without.
    #[error("a PUBLISH has a packet identifier exactly where its QoS is above 0")]
    PacketId,
    /// A subscription identifier of 0 or above 268,435,455.
    #[error("a subscription identifier must be 1 to 268,435,455")]
    SubscriptionId,
    /// AUTH does not exist in 3.1.1.
    #[error("MQTT 3.1.1 has no such packet")]
    NotInVersion,
}

impl Packet {
    /// Appends the packet to `out`; on an error `out` is as before.
    pub fn encode(&self, version: Version, out: &mut BytesMut) -> Result<(), EncodeError> {
        if let Self::Publish(publish) = self {
            return publish.encode(version, out);
        }
        let mut counter = Counter::default();
        body::write(self, version, &mut counter)?;
        start(self.packet_type().first_byte(), counter.bytes(), out)?;
        body::write(self, version, out)
    }

    /// The type of the packet.
    pub fn packet_type(&self) -> PacketType {
        match self {
            Self::Connect(_) => PacketType::Connect,
            Self::ConnAck(_) => PacketType::ConnAck,
            Self::Publish(_) => PacketType::Publish,
            Self::PubAck(_) => PacketType::PubAck,
            Self::PubRec(_) => PacketType::PubRec,
            Self::PubRel(_) => PacketType::PubRel,
            Self::PubComp(_) => PacketType::PubComp,
            Self::Subscribe(_) => PacketType::Subscribe,
            Self::SubAck(_) => PacketType::SubAck,
            Self::Unsubscribe(_) => PacketType::Unsubscribe,
            Self::UnsubAck(_) => PacketType::UnsubAck,
            Self::PingReq => PacketType::PingReq,
            Self::PingResp => PacketType::PingResp,
            Self::Disconnect(_) => PacketType::Disconnect,
            Self::Auth(_) => PacketType::Auth,
        }
    }
}

impl Publish {
    /// Appends the PUBLISH to `out`; on an error `out` is as before.
    pub fn encode(&self, version: Version, out: &mut BytesMut) -> Result<(), EncodeError> {
        let has_id = self.qos as u8 > 0;
        if self.packet_id.is_some() != has_id {
            return Err(EncodeError::PacketId);
        }
        let properties = PublishPropertySet::of(self.properties.as_deref());
        let mut counter = Counter::default();
        self.write_body(version, self.packet_id, &properties, &mut counter)?;
        let first_byte = first_byte_of_publish(self.qos as u8, self.retain);
        start(first_byte | u8::from(self.dup) << 3, counter.bytes(), out)?;
        self.write_body(version, self.packet_id, &properties, out)
    }

    /// What follows the fixed header; the identifier and the properties may be another receiver's.
    pub(crate) fn write_body<S: Sink>(
        &self,
        version: Version,
        packet_id: Option<PacketId>,
        properties: &PublishPropertySet<'_>,
        to: &mut S,
    ) -> Result<(), EncodeError> {
        to.text("the topic name", self.topic.as_str())?;
        if let Some(id) = packet_id {
            to.u16(id.0.get());
        }
        if version == Version::V5 {
            to.properties(properties)?;
        }
        to.bytes(&self.payload);
        Ok(())
    }
}

/// The first byte of a PUBLISH that is no repetition.
pub(crate) fn first_byte_of_publish(qos: u8, retain: bool) -> u8 {
    (PacketType::Publish as u8) << 4 | qos << 1 | u8::from(retain)
}

/// Makes room for a packet and writes its fixed header.
pub(crate) fn start(
    first_byte: u8,
    remaining_length: usize,
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    if remaining_length > REMAINING_LENGTH_MAX {
        return Err(EncodeError::PacketTooLong);
    }
    out.reserve(remaining_length + 5);
    out.put_u8(first_byte);
    out.varint(remaining_length)
}

/// Appends a PUBACK without properties.
pub fn puback(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    ack(PacketType::PubAck, version, id, reason, out);
}

/// Appends a PUBREC without properties.
pub fn pubrec(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    ack(PacketType::PubRec, version, id, reason, out);
}

/// Appends a PUBREL without properties.
pub fn pubrel(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    ack(PacketType::PubRel, version, id, reason, out);
}

/// Appends a PUBCOMP without properties.
pub fn pubcomp(version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    ack(PacketType::PubComp, version, id, reason, out);
}

fn ack(kind: PacketType, version: Version, id: PacketId, reason: ReasonCode, out: &mut BytesMut) {
    let [high, low] = id.0.get().to_be_bytes();
    // 5.0 leaves out a reason of success (section 3.4.2.1); 3.1.1 has none at all.
    if reason == ReasonCode::Success || version == Version::V3_1_1 {
        out.extend_from_slice(&[kind.first_byte(), 2, high, low]);
    } else {
        out.extend_from_slice(&[kind.first_byte(), 3, high, low, reason as u8]);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::{Ack, ConnAck, ConnAckProperties, Disconnect, QoS, SubAck, TopicName};

    fn id(id: u16) -> PacketId {
        PacketId(NonZeroU16::new(id).unwrap())
    }

    fn encoded(packet: &Packet, version: Version) -> Vec<u8> {
        let mut out = BytesMut::new();
        packet.encode(version, &mut out).unwrap();
        out.to_vec()
    }

    #[test]
    fn acknowledgements_are_as_short_as_they_may_be() {
        let mut out = BytesMut::new();
        puback(Version::V5, id(0x1234), ReasonCode::Success, &mut out);
        assert_eq!(out[..], [0x40, 2, 0x12, 0x34]);
        out.clear();
        pubrec(Version::V5, id(1), ReasonCode::QuotaExceeded, &mut out);
        assert_eq!(out[..], [0x50, 3, 0, 1, 0x97]);
        out.clear();
        pubrel(Version::V5, id(1), ReasonCode::Success, &mut out);
        pubcomp(
            Version::V3_1_1,
            id(1),
            ReasonCode::PacketIdentifierNotFound,
            &mut out,
        );
        assert_eq!(out[..], [0x62, 2, 0, 1, 0x70, 2, 0, 1]);
    }

    #[test]
    fn the_short_ways_write_what_the_long_one_does() {
        for version in [Version::V3_1_1, Version::V5] {
            for reason in [ReasonCode::Success, ReasonCode::NotAuthorized] {
                let ack = Ack {
                    packet_id: id(9),
                    reason,
                    properties: None,
                };
                for (short, packet) in [
                    (
                        puback as fn(_, _, _, &mut BytesMut),
                        Packet::PubAck(ack.clone()),
                    ),
                    (pubrec, Packet::PubRec(ack.clone())),
                    (pubrel, Packet::PubRel(ack.clone())),
                    (pubcomp, Packet::PubComp(ack.clone())),
                ] {
                    let mut out = BytesMut::new();
                    short(version, id(9), reason, &mut out);
                    assert_eq!(out[..], encoded(&packet, version)[..], "{packet:?}");
                }
            }
        }
        assert_eq!(PINGRESP[..], encoded(&Packet::PingResp, Version::V5)[..]);
        assert_eq!(PINGREQ[..], encoded(&Packet::PingReq, Version::V5)[..]);
    }

    #[test]
    fn a_refusal_is_told_in_the_words_of_each_version() {
        let refusal = |reason| {
            let properties = ConnAckProperties::default();
            Packet::ConnAck(Box::new(ConnAck {
                session_present: false,
                reason,
                properties,
            }))
        };
        for (reason, code) in [
            (ReasonCode::Success, 0),
            (ReasonCode::UnsupportedProtocolVersion, 1),
            (ReasonCode::ClientIdentifierNotValid, 2),
            (ReasonCode::ServerBusy, 3),
            (ReasonCode::BadUserNameOrPassword, 4),
            (ReasonCode::Banned, 5),
        ] {
            assert_eq!(
                encoded(&refusal(reason), Version::V3_1_1),
                [0x20, 2, 0, code]
            );
            assert_eq!(
                encoded(&refusal(reason), Version::V5),
                [0x20, 3, 0, reason as u8, 0]
            );
        }
        let reasons = vec![ReasonCode::GrantedQoS1, ReasonCode::NotAuthorized];
        let ack = SubAck {
            packet_id: id(7),
            reasons,
            properties: None,
        };
        let suback = Packet::SubAck(ack.clone());
        assert_eq!(encoded(&suback, Version::V3_1_1), [0x90, 4, 0, 7, 1, 0x80]);
        assert_eq!(encoded(&suback, Version::V5), [0x90, 5, 0, 7, 0, 1, 0x87]);
        assert_eq!(
            encoded(&Packet::UnsubAck(ack), Version::V3_1_1),
            [0xB0, 2, 0, 7]
        );
    }

    #[test]
    fn disconnect_leaves_out_what_it_may() {
        let of = |reason| {
            Packet::Disconnect(Disconnect {
                reason,
                properties: None,
            })
        };
        assert_eq!(encoded(&of(ReasonCode::Success), Version::V5), [0xE0, 0]);
        assert_eq!(
            encoded(&of(ReasonCode::SessionTakenOver), Version::V5),
            [0xE0, 1, 0x8E]
        );
        assert_eq!(
            encoded(&of(ReasonCode::SessionTakenOver), Version::V3_1_1),
            [0xE0, 0]
        );
    }

    #[test]
    fn what_cannot_be_written_leaves_the_buffer_alone() {
        let mut out = BytesMut::from("before");
        let mut publish = Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: TopicName::from_static("t"),
            packet_id: None,
            properties: None,
            payload: bytes::Bytes::new(),
        };
        assert_eq!(
            publish.encode(Version::V5, &mut out),
            Err(EncodeError::PacketId)
        );
        publish.packet_id = Some(id(1));
        let properties = crate::PublishProperties {
            content_type: Some("x".repeat(65_536).into()),
            ..Default::default()
        };
        publish.properties = Some(Box::new(properties));
        let error = publish.encode(Version::V5, &mut out);
        assert_eq!(error, Err(EncodeError::FieldTooLong("the content type")));
        assert_eq!(&out[..], b"before");
        assert_eq!(publish.encode(Version::V3_1_1, &mut out), Ok(()));
    }
}
