//! The packets of which there are most do not touch the heap, and none takes more of it than its
//! own size accounts for.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::hint::black_box;
use std::num::NonZeroU16;

use allocation_counter::measure;
use bytes::{Bytes, BytesMut};
use moorline_mqtt::{
    Decoder, EncodedPublish, Packet, PacketId, Publish, QoS, ReasonCode, TopicName, Version, encode,
};

const VERSIONS: [Version; 2] = [Version::V3_1_1, Version::V5];

fn id() -> PacketId {
    PacketId(NonZeroU16::new(7).unwrap())
}

fn publish() -> Publish {
    Publish {
        dup: false,
        qos: QoS::AtLeastOnce,
        retain: false,
        topic: TopicName::from_static("up/car-7/gps"),
        packet_id: Some(id()),
        properties: None,
        payload: Bytes::from_static(&[b'x'; 128]),
    }
}

/// As a socket's reader has it: a slice of a buffer that others hold slices of.
fn received(packet: &Packet, version: Version) -> Bytes {
    let mut out = BytesMut::from("what came before");
    let before = out.len();
    packet.encode(version, &mut out).unwrap();
    let mut bytes = out.freeze();
    let _ = bytes.split_to(before);
    bytes
}

#[test]
fn the_common_packets_are_decoded_without_the_heap() {
    let common = [Packet::Publish(publish()), Packet::PingResp];
    for version in VERSIONS {
        for packet in &common {
            let mut src = received(packet, version);
            let mut decoder = Decoder::client(version, 1024);
            let heap = measure(|| {
                black_box(decoder.decode(&mut src).unwrap().unwrap());
            });
            assert_eq!(heap.count_total, 0, "{version:?} {packet:?}");
        }
    }
}

#[test]
fn the_common_packets_are_encoded_without_the_heap() {
    let publish = publish();
    for version in VERSIONS {
        let encoded = EncodedPublish::new(version, &publish, QoS::AtLeastOnce, false);
        let mut out = BytesMut::with_capacity(1024);
        let heap = measure(|| {
            publish.encode(version, &mut out).unwrap();
            encoded.clone().write(Some(id()), true, &mut out);
            encode::puback(version, id(), ReasonCode::NotAuthorized, &mut out);
        });
        assert_eq!(heap.count_total, 0, "{version:?}");
    }
}

#[test]
fn a_fan_out_is_encoded_in_two_allocations() {
    let publish = publish();
    // The bytes, and the count of those who share them.
    let heap = measure(|| {
        let encoded = EncodedPublish::new(Version::V5, &publish, QoS::AtLeastOnce, false);
        black_box(encoded.clone());
    });
    assert!(heap.count_total <= 2, "{}", heap.count_total);
}

/// What is announced is not reserved: a length of 256 MB costs nothing until the bytes come.
#[test]
fn an_announced_length_reserves_nothing() {
    let mut decoder = Decoder::client(Version::V5, u32::MAX);
    let heap = measure(|| {
        let mut src = Bytes::from_static(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1, b't']);
        assert_eq!(decoder.decode(&mut src), Ok(None));
    });
    assert_eq!(heap.count_total, 0);
}

/// The worst a packet can do: as many user properties as fit, each of the shortest.
#[test]
fn the_heap_a_packet_takes_is_bounded_by_its_size() {
    let pairs = vec![(Default::default(), Default::default()); 10_000];
    let mut publish = publish();
    let properties = moorline_mqtt::PublishProperties {
        user_properties: pairs,
        ..Default::default()
    };
    publish.properties = Some(Box::new(properties));
    let mut src = received(&Packet::Publish(publish), Version::V5);
    let packet_bytes = src.len() as u64;
    let mut decoder = Decoder::client(Version::V5, 1 << 20);
    let heap = measure(|| {
        black_box(decoder.decode(&mut src).unwrap().unwrap());
    });
    // 64 bytes for the pair against 5 in the packet, and a vector may be twice as long as full.
    assert!(
        heap.bytes_max <= 40 * packet_bytes,
        "{} for {packet_bytes}",
        heap.bytes_max
    );
}
