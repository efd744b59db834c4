//! Answers with a Reason String, for whoever reads the device's log.
//!
//! The text is left out where the device has not asked for it ([MQTT-3.1.2-29]) or takes no packet as
//! large ([MQTT-3.4.2-2] and its like in each packet's section).

use bytes::BytesMut;
use moorline_mqtt::{ByteString, Packet, ReasonCode, ReasonProperties, Version};

/// Why something is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: ReasonCode,
    /// For the Reason String.
    pub(crate) why: &'static str,
}

impl Refusal {
    pub(crate) fn new(reason: ReasonCode, why: &'static str) -> Self {
        Self { reason, why }
    }
}

/// How a device wants to be told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Telling {
    pub(crate) version: Version,
    pub(crate) packet_bytes_max: usize,
    /// The device takes Reason Strings in acknowledgements.
    pub(crate) explains: bool,
}

impl Telling {
    /// The encoded answer that `packet` makes of a text; empty where the device takes no packet as
    /// large even without one.
    pub(crate) fn explained(
        self,
        why: &'static str,
        packet: impl Fn(Option<ByteString>) -> Packet,
    ) -> BytesMut {
        let mut encoded = BytesMut::new();
        let text = (self.explains && self.version == Version::V5 && !why.is_empty())
            .then(|| ByteString::from_static(why));
        let tries = [text.is_some().then_some(text), Some(None)];
        for text in tries.into_iter().flatten() {
            encoded.clear();
            if packet(text).encode(self.version, &mut encoded).is_ok()
                && encoded.len() <= self.packet_bytes_max
            {
                return encoded;
            }
        }
        BytesMut::new()
    }
}

/// A Reason String as the properties that most answers share.
pub(crate) fn reason_properties(text: Option<ByteString>) -> Option<Box<ReasonProperties>> {
    text.map(|text| {
        Box::new(ReasonProperties {
            reason_string: Some(text),
            ..ReasonProperties::default()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moorline_mqtt::{Ack, PacketId};
    use std::num::NonZeroU16;

    fn puback(telling: Telling) -> Vec<u8> {
        let packet_id = PacketId(NonZeroU16::new(1).unwrap());
        let answer = telling.explained("why", |text| {
            Packet::PubAck(Ack {
                packet_id,
                reason: ReasonCode::NotAuthorized,
                properties: reason_properties(text),
            })
        });
        answer.to_vec()
    }

    #[test]
    fn a_text_is_left_out_where_it_is_not_wanted_or_does_not_fit() {
        let telling = Telling {
            version: Version::V5,
            packet_bytes_max: 12,
            explains: true,
        };
        let plain = [0x40, 3, 0, 1, 0x87];
        assert_eq!(puback(telling), b"\x40\x0A\0\x01\x87\x06\x1F\0\x03why");
        let packet_bytes_max = 11;
        assert_eq!(
            puback(Telling {
                packet_bytes_max,
                ..telling
            }),
            plain
        );
        let explains = false;
        assert_eq!(
            puback(Telling {
                explains,
                ..telling
            }),
            plain
        );
        let packet_bytes_max = 4;
        assert!(
            puback(Telling {
                packet_bytes_max,
                ..telling
            })
            .is_empty()
        );
        let version = Version::V3_1_1;
        assert_eq!(puback(Telling { version, ..telling }), [0x40, 2, 0, 1]);
    }
}
