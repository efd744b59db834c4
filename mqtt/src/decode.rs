//! Bytes to packets.
//!
//! A [`Decoder`] looks at the fixed header first: who may send this, with which flags, how long. A
//! packet that is refused by its first bytes is refused before its body is waited for. A whole
//! packet is cut off the front, and its parser cannot see past its end.
//!
//! What a packet means at this point of a conversation is not decided here, with two exceptions: a
//! server's first packet is a CONNECT, and there is only one.

use bytes::{Buf, Bytes};

use crate::packet_type::{PacketType, Peer};
use crate::{Packet, Version};

mod connect;
mod error;
mod packets;
pub(crate) mod properties;
pub(crate) mod reader;

pub use error::DecodeError;

use reader::Reader;

/// Decodes one direction of one connection. After an error the connection is over.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    packet_bytes_max: u32,
    /// `None` until a server has seen the CONNECT.
    version: Option<Version>,
    /// Whose packets these are.
    from: Peer,
}

/// What the first two to five bytes say.
struct FixedHeader {
    first_byte: u8,
    packet_type: PacketType,
    header_bytes: usize,
    packet_bytes: usize,
}

impl Decoder {
    /// For what a client sends. The first packet must be CONNECT, and decides the version.
    /// `packet_bytes_max` counts whole packets, fixed header included.
    pub const fn server(packet_bytes_max: u32) -> Self {
        Self {
            packet_bytes_max,
            version: None,
            from: Peer::Client,
        }
    }

    /// For what a server sends to a client of `version`.
    pub const fn client(version: Version, packet_bytes_max: u32) -> Self {
        Self {
            packet_bytes_max,
            version: Some(version),
            from: Peer::Server,
        }
    }

    /// Takes packets of up to `packet_bytes_max` from now on: a CONNECT may deserve less trust than what
    /// follows it.
    pub const fn set_packet_bytes_max(&mut self, packet_bytes_max: u32) {
        self.packet_bytes_max = packet_bytes_max;
    }

    /// The version of the connection, once it is known.
    pub fn version(&self) -> Option<Version> {
        self.version
    }

    /// Takes one packet off the front of `src`. `None` asks for more bytes and leaves `src` alone.
    ///
    /// Text and payload of the packet are slices of `src` and keep its buffer alive.
    pub fn decode(&mut self, src: &mut Bytes) -> Result<Option<Packet>, DecodeError> {
        let Some(header) = self.fixed_header(src)? else {
            return Ok(None);
        };
        if src.len() < header.packet_bytes {
            return Ok(None);
        }
        let mut packet = src.split_to(header.packet_bytes);
        packet.advance(header.header_bytes);
        let mut body = Reader::new(packet);
        if let Some(version) = self.version {
            let what = packets::Expected {
                version,
                from: self.from,
            };
            return packets::parse(header.packet_type, header.first_byte, body, what).map(Some);
        }
        let connect = connect::parse(&mut body)?;
        self.version = Some(connect.version);
        Ok(Some(Packet::Connect(Box::new(connect))))
    }

    /// How many bytes the packet at the front of `src` has in all, once its fixed header is there.
    /// Never more than the limit, so that a buffer may be sized by it.
    pub fn needed(&self, src: &[u8]) -> Option<usize> {
        self.fixed_header(src)
            .ok()
            .flatten()
            .map(|header| header.packet_bytes)
    }

    fn fixed_header(&self, src: &[u8]) -> Result<Option<FixedHeader>, DecodeError> {
        let Some((&first_byte, rest)) = src.split_first() else {
            return Ok(None);
        };
        let packet_type = self.packet_type(first_byte)?;
        let Some((remaining, length_bytes)) = remaining_length(rest)? else {
            return Ok(None);
        };
        let header_bytes = 1 + length_bytes;
        let packet_bytes = header_bytes + remaining;
        let limit = self.packet_bytes_max;
        if packet_bytes > limit as usize {
            return Err(DecodeError::PacketTooLarge {
                packet_bytes,
                limit,
            });
        }
        Ok(Some(FixedHeader {
            first_byte,
            packet_type,
            header_bytes,
            packet_bytes,
        }))
    }

    fn packet_type(&self, first_byte: u8) -> Result<PacketType, DecodeError> {
        // Before the CONNECT nothing depends on the version: only CONNECT itself passes.
        let version = self.version.unwrap_or(Version::V5);
        let packet_type = PacketType::of(first_byte, version)
            .ok_or(DecodeError::Malformed("a reserved packet type"))?;
        let flags = first_byte & 0x0F;
        if packet_type
            .flags()
            .is_some_and(|required| required != flags)
        {
            return Err(DecodeError::Malformed("reserved flags in the first byte"));
        }
        if !packet_type.is_sent_by(self.from, version) {
            return Err(DecodeError::WrongDirection(packet_type));
        }
        match (packet_type, self.version) {
            (PacketType::Connect, Some(_)) => Err(DecodeError::Protocol("a second CONNECT")),
            (PacketType::Connect, None) | (_, Some(_)) => Ok(packet_type),
            (_, None) => Err(DecodeError::Protocol("a packet before CONNECT")),
        }
    }
}

/// The Remaining Length and how many bytes it takes; `None` while its end is missing.
fn remaining_length(bytes: &[u8]) -> Result<Option<(usize, usize)>, DecodeError> {
    let mut value = 0;
    for (index, &byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            if byte == 0 && index > 0 {
                return Err(DecodeError::Malformed(
                    "a length that is not in its shortest form",
                ));
            }
            return Ok(Some((value, index + 1)));
        }
    }
    match bytes.len() {
        0..4 => Ok(None),
        _ => Err(DecodeError::Malformed("a length of more than four bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONNECT: &[u8] = b"\x10\x0C\x00\x04MQTT\x04\x02\x00\x3C\x00\x00";

    fn connected() -> Decoder {
        let mut decoder = Decoder::server(1024);
        decoder
            .decode(&mut Bytes::from_static(CONNECT))
            .unwrap()
            .unwrap();
        decoder
    }

    #[test]
    fn the_version_comes_from_the_connect() {
        let mut decoder = Decoder::server(1024);
        assert_eq!(decoder.version(), None);
        decoder
            .decode(&mut Bytes::from_static(CONNECT))
            .unwrap()
            .unwrap();
        assert_eq!(decoder.version(), Some(Version::V3_1_1));
    }

    #[test]
    fn a_server_hears_connect_first_and_once() {
        let early = Decoder::server(1024).decode(&mut Bytes::from_static(&[0xC0, 0]));
        assert_eq!(early, Err(DecodeError::Protocol("a packet before CONNECT")));
        let second = connected().decode(&mut Bytes::from_static(&CONNECT[..1]));
        assert_eq!(second, Err(DecodeError::Protocol("a second CONNECT")));
    }

    #[test]
    fn what_follows_a_packet_stays() {
        let mut bytes = Bytes::from_static(b"\xC0\x00\xC0\x00\xC0");
        let mut decoder = connected();
        for left in [3, 1] {
            assert_eq!(decoder.decode(&mut bytes), Ok(Some(Packet::PingReq)));
            assert_eq!(bytes.len(), left);
        }
        assert_eq!(decoder.decode(&mut bytes), Ok(None));
        assert_eq!(bytes.len(), 1);
    }

    #[test]
    fn a_packet_is_refused_by_its_first_bytes() {
        let mut decoder = connected();
        // Bodies are missing in every case.
        assert_eq!(
            decoder.decode(&mut Bytes::from_static(&[0x30, 0xFE, 0x07])),
            Err(DecodeError::PacketTooLarge {
                packet_bytes: 1025,
                limit: 1024
            }),
        );
        assert_eq!(
            decoder.decode(&mut Bytes::from_static(&[0x30, 0xFD, 0x07])),
            Ok(None)
        );
        let reserved = decoder.decode(&mut Bytes::from_static(&[0xC1]));
        assert_eq!(
            reserved,
            Err(DecodeError::Malformed("reserved flags in the first byte"))
        );
        let direction = decoder.decode(&mut Bytes::from_static(&[0x20]));
        assert_eq!(
            direction,
            Err(DecodeError::WrongDirection(PacketType::ConnAck))
        );
    }

    #[test]
    fn a_buffer_can_be_sized_from_the_header() {
        let decoder = connected();
        assert_eq!(decoder.needed(&[]), None);
        assert_eq!(decoder.needed(&[0x30, 0x80]), None);
        assert_eq!(decoder.needed(&[0x30, 0x80, 0x01]), Some(131));
        assert_eq!(
            decoder.needed(&[0x30, 0xFF, 0xFF, 0x7F]),
            None,
            "over the limit"
        );
    }

    #[test]
    fn a_decoder_is_small() {
        assert!(size_of::<Decoder>() <= 8);
        // Passed by value through the hot path: what is large is boxed.
        assert!(size_of::<Packet>() <= 96, "{}", size_of::<Packet>());
    }
}
