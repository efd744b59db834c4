//! What is encoded is decoded as it was, in one piece and in many.

use bytes::{Buf, Bytes, BytesMut};
use moorline_mqtt::{Decoder, Packet, PublishProperties, Version, Will};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::generate::{self, Sender};
use crate::{decoder, encode};

fn version_and_sender() -> impl Strategy<Value = (Version, Sender)> {
    (
        prop_oneof![Just(Version::V3_1_1), Just(Version::V5)],
        prop_oneof![Just(Sender::Client), Just(Sender::Server)],
    )
}

fn conversation() -> impl Strategy<Value = (Version, Sender, Vec<Packet>)> {
    version_and_sender().prop_flat_map(|(version, sender)| {
        let packets = vec(generate::packet(version, sender), 1..6);
        (Just(version), Just(sender), packets)
    })
}

/// The decoder in front of a packet: a CONNECT is decoded by a fresh one.
fn fresh_for(packet: &Packet, version: Version, sender: Sender) -> Decoder {
    decoder(version, sender, matches!(packet, Packet::Connect(_)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn a_packet_comes_back_as_it_was((version, sender, packets) in conversation()) {
        for packet in packets {
            let bytes = encode(&packet, version);
            let mut decoder = fresh_for(&packet, version, sender);
            prop_assert_eq!(decoder.needed(&bytes), Some(bytes.len()));
            let mut src = bytes;
            prop_assert_eq!(decoder.decode(&mut src), Ok(Some(packet)));
            prop_assert!(src.is_empty());
        }
    }

    /// Bytes come as the network cuts them; a decoder that is asked too early must ask for more and
    /// leave what it has seen alone.
    #[test]
    fn a_stream_may_be_cut_anywhere(
        (version, sender, packets) in conversation(),
        cuts in vec(1..7usize, 1..40),
    ) {
        let packets: Vec<_> =
            packets.into_iter().filter(|packet| !matches!(packet, Packet::Connect(_))).collect();
        let mut stream = BytesMut::new();
        for packet in &packets {
            packet.encode(version, &mut stream).unwrap();
        }
        let mut rest = stream.freeze();
        let mut decoder = decoder(version, sender, false);
        let mut seen = Vec::new();
        let mut gathered = Bytes::new();
        for cut in cuts.into_iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let piece = rest.split_to(cut.min(rest.len()));
            gathered = [&gathered[..], &piece[..]].concat().into();
            while let Some(packet) = decoder.decode(&mut gathered).unwrap() {
                seen.push(packet);
            }
        }
        prop_assert!(!gathered.has_remaining());
        prop_assert_eq!(seen, packets);
    }

    /// Stores keep wills and properties in this form.
    #[test]
    fn what_is_stored_comes_back_as_it_was((version, sender, packets) in conversation()) {
        let _ = (version, sender);
        for packet in packets {
            match packet {
                Packet::Publish(publish) => {
                    let properties = publish.properties.map(|p| *p).unwrap_or_default();
                    let back = PublishProperties::from_bytes(properties.to_bytes());
                    prop_assert_eq!(back.as_ref(), Ok(&properties));
                    prop_assert_eq!(properties.copied(), properties);
                }
                Packet::Connect(connect) => {
                    let Some(will) = connect.will else { continue };
                    let mut bytes = BytesMut::new();
                    will.append_to(&mut bytes);
                    let back = Will::from_bytes(bytes.freeze());
                    prop_assert_eq!(back.as_ref(), Ok(&*will));
                    prop_assert_eq!(will.copied(), *will);
                }
                _ => {}
            }
        }
    }
}
