//! Decoding and encoding of a QoS 1 PUBLISH: 31 bytes of topic, 128 bytes of payload.
//!
//! `cargo bench -p moorline-mqtt`. The best of many rounds is printed, because a shared machine
//! only ever adds to the time.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::hint::black_box;
use std::num::NonZeroU16;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{
    Decoder, EncodedPublish, PacketId, Publish, PublishProperties, QoS, ReasonCode, TopicName,
    Version, encode,
};

const ROUNDS: usize = 300;
const PACKETS: u32 = 2_000;

fn main() {
    let id = PacketId(NonZeroU16::MIN.saturating_add(41));
    for version in [Version::V3_1_1, Version::V5] {
        let mut publish = Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: TopicName::from_static("up/fleet/eu-west/car-000042/gps"),
            packet_id: Some(id),
            properties: None,
            payload: Bytes::from(vec![b'x'; 128]),
        };
        measure_publish(version, "", &publish, id);
        if version == Version::V5 {
            let properties = PublishProperties {
                message_expiry_interval_s: Some(3600),
                user_properties: vec![("message-id".into(), "0197c0de-7f00".into())],
                ..PublishProperties::default()
            };
            publish.properties = Some(Box::new(properties));
            measure_publish(version, " with 2 properties", &publish, id);
        }
        let mut out = BytesMut::new();
        let best = best_ns(|| {
            out.clear();
            encode::puback(version, black_box(id), ReasonCode::Success, &mut out);
            black_box(&out);
        });
        report(version, "encode PUBACK", best);
    }
}

fn measure_publish(version: Version, what: &str, publish: &Publish, id: PacketId) {
    let mut out = BytesMut::with_capacity(4096);
    publish
        .encode(version, &mut out)
        .expect("a PUBLISH that fits");
    let packet = out.split().freeze();

    let decoder = Decoder::client(version, 1 << 20);
    let best = best_ns(|| {
        let mut src = packet.clone();
        let mut decoder = black_box(decoder);
        black_box(decoder.decode(&mut src).expect("valid"));
    });
    report(version, &format!("decode PUBLISH{what}"), best);

    let best = best_ns(|| {
        out.clear();
        let publish = black_box(publish);
        publish
            .encode(version, &mut out)
            .expect("a PUBLISH that fits");
        black_box(&out);
    });
    report(version, &format!("encode PUBLISH{what}"), best);

    let encoded = EncodedPublish::new(version, publish, QoS::AtLeastOnce, false);
    let best = best_ns(|| {
        out.clear();
        black_box(&encoded).write_with_expiry(Some(black_box(id)), false, 60, &mut out);
        black_box(&out);
    });
    report(version, &format!("patch PUBLISH{what}"), best);
}

fn best_ns(mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..PACKETS {
            work();
        }
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(PACKETS));
    }
    best
}

fn report(version: Version, what: &str, best_ns: f64) {
    let version = format!("{version:?}");
    println!("{version:8} {what:34} {best_ns:6.1} ns");
}
