//! What must hold for any bytes, whoever sends them; shared by the targets of both versions.

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{DecodeError, Decoder, Packet, Version};

const PACKET_BYTES_MAX: u32 = 65_536;
const AFTER: &[u8] = b"\xC0\x00after";

/// A server's decoder behind the CONNECT of `version`.
fn connected(version: Version) -> Decoder {
    let connect: &[u8] = match version {
        Version::V3_1_1 => b"\x10\x0C\x00\x04MQTT\x04\x02\x00\x3C\x00\x00",
        Version::V5 => b"\x10\x0D\x00\x04MQTT\x05\x02\x00\x3C\x00\x00\x00",
    };
    let mut decoder = Decoder::server(PACKET_BYTES_MAX);
    let packet = decoder.decode(&mut Bytes::from_static(connect));
    assert!(matches!(packet, Ok(Some(Packet::Connect(_)))));
    decoder
}

/// `data` as a client's first packet, as a later one, and as a server's.
pub fn all(data: &[u8], version: Version) {
    one(data, Decoder::server(PACKET_BYTES_MAX), version);
    one(data, connected(version), version);
    one(data, Decoder::client(version, PACKET_BYTES_MAX), version);
}

/// In whatever pieces the bytes come, the same packets and the same refusal come out.
fn in_pieces(data: &[u8], fresh: &Decoder) {
    let Some((step, stream)) = data.split_first() else {
        return;
    };
    let whole = decode_all(stream, stream.len().max(1), fresh.clone());
    let torn = decode_all(stream, 1 + usize::from(step % 16), fresh.clone());
    assert_eq!(whole, torn);
}

fn decode_all(
    stream: &[u8],
    step: usize,
    mut decoder: Decoder,
) -> (Vec<Packet>, Option<DecodeError>) {
    let mut packets = Vec::new();
    let mut rest = Vec::new();
    for piece in stream.chunks(step) {
        rest.extend_from_slice(piece);
        let mut src = Bytes::from(rest);
        loop {
            match decoder.decode(&mut src) {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(error) => return (packets, Some(error)),
            }
        }
        rest = src.to_vec();
    }
    (packets, None)
}

fn one(data: &[u8], fresh: Decoder, version: Version) {
    in_pieces(data, &fresh);
    let mut decoder = fresh;
    let mut src = Bytes::from([data, AFTER].concat());
    let whole = src.len();
    let needed = decoder.needed(&src);
    match decoder.decode(&mut src) {
        Ok(Some(packet)) => {
            assert_eq!(Some(whole - src.len()), needed, "took what was announced");
            let version = decoder.version().unwrap_or(version);
            let mut out = BytesMut::new();
            packet
                .encode(version, &mut out)
                .expect("what was decoded can be encoded");
            // Longest forms may become shorter, nothing else may change.
            assert!(out.len() <= whole - src.len());
            let again = fresh.clone().decode(&mut out.freeze());
            assert_eq!(again, Ok(Some(packet)));
        }
        Ok(None) => assert_eq!(src.len(), whole, "waiting leaves the bytes alone"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
