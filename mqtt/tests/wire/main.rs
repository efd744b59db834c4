//! Generated packets of both versions: there and back, in pieces, against another codec, and
//! damaged.

#![allow(clippy::unwrap_used, reason = "tests")]

mod damaged;
mod differential;
mod generate;
mod round_trip;

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{Decoder, Packet, Version};

pub(crate) use generate::Sender;

pub(crate) const VERSIONS: [Version; 2] = [Version::V3_1_1, Version::V5];
pub(crate) const PACKET_BYTES_MAX: u32 = 65_536;

/// A decoder in the state in which it may see `packet`'s like from `sender`.
pub(crate) fn decoder(version: Version, sender: Sender, expects_connect: bool) -> Decoder {
    if sender == Sender::Server {
        return Decoder::client(version, PACKET_BYTES_MAX);
    }
    let mut decoder = Decoder::server(PACKET_BYTES_MAX);
    if !expects_connect {
        let connect: &[u8] = match version {
            Version::V3_1_1 => b"\x10\x0C\x00\x04MQTT\x04\x02\x00\x3C\x00\x00",
            Version::V5 => b"\x10\x0D\x00\x04MQTT\x05\x02\x00\x3C\x00\x00\x00",
        };
        decoder
            .decode(&mut Bytes::from_static(connect))
            .unwrap()
            .unwrap();
    }
    decoder
}

pub(crate) fn encode(packet: &Packet, version: Version) -> Bytes {
    let mut out = BytesMut::new();
    packet.encode(version, &mut out).unwrap();
    out.freeze()
}

/// Small, seeded and the same everywhere (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Damages `bytes` in one to three places.
pub(crate) fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    const TELLING: [u8; 12] = [
        0x00, 0x01, 0x02, 0x7F, 0x80, 0xFF, b'+', b'#', b'/', b'$', 0x26, 0x0B,
    ];
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = TELLING[random.below(TELLING.len())],
            2 => bytes.insert(at, TELLING[random.below(TELLING.len())]),
            3 if !bytes.is_empty() => drop(bytes.remove(at)),
            4 => bytes.truncate(at),
            5 => {
                let end = at + random.below((bytes.len() - at).min(12) + 1);
                let repeated = bytes[at..end].to_vec();
                bytes.splice(at..at, repeated);
            }
            _ if bytes.len() > 1 => bytes[1] = random.next() as u8,
            _ => {}
        }
    }
    // Half of the time the length is put right, so that the damage is met behind the fixed header.
    if bytes.len() >= 2 && bytes.len() < 130 && random.below(2) == 0 {
        bytes[1] = (bytes.len() - 2) as u8;
    }
}
