//! Packets as raw bytes, each with what must become of it.
//!
//! The bytes were written from the specifications and not with this crate's encoder. An expected
//! error is the whole error, so that a packet cannot be refused for another reason than its own.

#![allow(clippy::unwrap_used, reason = "tests")]

mod refused_v3;
mod refused_v5;
mod valid;

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{
    ByteString, Connect, ConnectProperties, DecodeError, Decoder, Packet, PacketType,
    PublishProperties, QoS, RetainHandling, SubscriptionOptions, TopicFilter, TopicName, Version,
    Will,
};

/// Who sends the bytes, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sender {
    /// A client, first of all.
    First,
    /// A client that has connected.
    Client,
    Server,
}

/// Name, sender, bytes, the reason code that a 5.0 peer is told, and the error.
pub(crate) type Refused = (&'static str, Sender, &'static [u8], u8, DecodeError);
/// Name, sender and bytes.
pub(crate) type Valid = (&'static str, Sender, &'static [u8]);

pub(crate) const fn m(what: &'static str) -> DecodeError {
    DecodeError::Malformed(what)
}

pub(crate) const fn p(what: &'static str) -> DecodeError {
    DecodeError::Protocol(what)
}

pub(crate) const fn reason(packet: PacketType, code: u8) -> DecodeError {
    DecodeError::IllegalReason { packet, code }
}

pub(crate) const fn property(packet: PacketType, id: u8) -> DecodeError {
    DecodeError::IllegalProperty { packet, id }
}

const PACKET_BYTES_MAX: u32 = 16_384;

fn decoder(version: Version, sender: Sender) -> Decoder {
    if sender == Sender::Server {
        return Decoder::client(version, PACKET_BYTES_MAX);
    }
    let mut decoder = Decoder::server(PACKET_BYTES_MAX);
    if sender == Sender::Client {
        let connect: &[u8] = match version {
            Version::V3_1_1 => b"\x10\x0C\x00\x04MQTT\x04\x02\x00\x3C\x00\x00",
            Version::V5 => b"\x10\x0D\x00\x04MQTT\x05\x02\x00\x3C\x00\x00\x00",
        };
        let connect = decoder.decode(&mut Bytes::from_static(connect)).unwrap();
        assert!(matches!(connect, Some(Packet::Connect(_))));
    }
    decoder
}

fn check_refused(version: Version, table: &[Refused], least: usize) {
    assert!(table.len() >= least);
    let names: HashSet<_> = table.iter().map(|(name, ..)| name).collect();
    assert_eq!(names.len(), table.len(), "a name stands twice");
    for (name, sender, bytes, code, expected) in table {
        assert_eq!(expected.reason_code() as u8, *code, "{name}");
        let mut decoder = decoder(version, *sender);
        let mut src = Bytes::from_static(bytes);
        assert_eq!(decoder.decode(&mut src), Err(*expected), "{name}");
        // An error is not to depend on what follows the packet, nor to reach into it.
        let mut followed = BytesMut::from(*bytes);
        if bytes.len() > 4 && bytes[1] & 0x80 == 0 {
            followed.extend_from_slice(&[0xC0, 0]);
            let mut decoder = self::decoder(version, *sender);
            assert_eq!(
                decoder.decode(&mut followed.freeze()),
                Err(*expected),
                "{name}, followed"
            );
        }
    }
}

#[test]
fn what_3_1_1_forbids_is_refused() {
    check_refused(Version::V3_1_1, refused_v3::REFUSED, 62);
}

#[test]
fn what_5_0_forbids_is_refused() {
    check_refused(Version::V5, refused_v5::REFUSED, 91);
}

fn check_valid(version: Version, table: &[Valid], least: usize) {
    assert!(table.len() >= least);
    for (name, sender, bytes) in table {
        let fresh = decoder(version, *sender);
        for end in 0..bytes.len() {
            let mut part = Bytes::from_static(&bytes[..end]);
            assert_eq!(
                fresh.clone().decode(&mut part),
                Ok(None),
                "{name}, {end} bytes of it"
            );
            assert_eq!(part.len(), end, "{name}: a part must stay as it is");
            let needed = fresh.needed(&part);
            assert!(needed.is_none_or(|needed| needed == bytes.len()), "{name}");
        }
        assert_eq!(fresh.needed(bytes), Some(bytes.len()), "{name}");
        let mut followed = BytesMut::from(*bytes);
        followed.extend_from_slice(b"more");
        let mut src = followed.freeze();
        let packet = fresh.clone().decode(&mut src).unwrap().expect(name);
        assert_eq!(&src[..], b"more", "{name}");
        let mut out = BytesMut::new();
        packet.encode(version, &mut out).unwrap();
        assert_eq!(&out[..], *bytes, "{name}: encoded again");
    }
}

#[test]
fn what_3_1_1_allows_is_taken() {
    check_valid(Version::V3_1_1, valid::V3_1_1, 13);
}

#[test]
fn what_5_0_allows_is_taken() {
    check_valid(Version::V5, valid::V5, 25);
}

fn named(table: &[Valid], version: Version, wanted: &str) -> Packet {
    let (_, sender, bytes) = table.iter().find(|(name, ..)| *name == wanted).unwrap();
    decoder(version, *sender)
        .decode(&mut Bytes::from_static(bytes))
        .unwrap()
        .unwrap()
}

#[test]
fn the_fields_of_connect_are_where_they_belong() {
    let expected = Connect {
        version: Version::V3_1_1,
        clean_start: true,
        keep_alive_s: 60,
        client_id: "device/é".into(),
        will: Some(Box::new(Will {
            topic: TopicName::from_static("will/topic"),
            payload: Bytes::from_static(&[0x00, 0xFF]),
            qos: QoS::ExactlyOnce,
            retain: true,
            delay_interval_s: 0,
            properties: None,
        })),
        username: Some("user".into()),
        password: Some(Bytes::from_static(&[0xFF, 0x00, 0xFE])),
        properties: ConnectProperties::default(),
    };
    let packet = named(valid::V3_1_1, Version::V3_1_1, "CONNECT with everything");
    assert_eq!(packet, Packet::Connect(Box::new(expected)));

    let packet = named(valid::V5, Version::V5, "CONNECT with every property");
    let Packet::Connect(connect) = packet else {
        panic!("{packet:?}")
    };
    let expected = ConnectProperties {
        session_expiry_interval_s: Some(u32::MAX),
        receive_maximum: std::num::NonZeroU16::new(65_535),
        maximum_packet_size: Some(4096),
        topic_alias_maximum: Some(10),
        request_response_information: Some(true),
        request_problem_information: Some(false),
        user_properties: vec![("k".into(), "v".into())],
        authentication_method: Some("m".into()),
        authentication_data: Some(Bytes::from_static(&[0])),
    };
    assert_eq!(connect.properties, expected);
}

#[test]
fn the_fields_of_publish_are_where_they_belong() {
    let packet = named(valid::V5, Version::V5, "PUBLISH with every property");
    let Packet::Publish(publish) = packet else {
        panic!("{packet:?}")
    };
    assert!(publish.dup && publish.retain);
    assert_eq!(publish.qos, QoS::AtLeastOnce);
    assert_eq!(publish.packet_id.unwrap().0.get(), 0x1234);
    assert_eq!(publish.topic.as_str(), "t");
    assert_eq!(&publish.payload[..], b"p");
    let text = |text: &'static str| ByteString::from_static(text);
    let expected = PublishProperties {
        payload_is_utf8: Some(true),
        message_expiry_interval_s: Some(60),
        topic_alias: std::num::NonZeroU16::new(1),
        response_topic: Some(TopicName::from_static("reply")),
        correlation_data: Some(Bytes::from_static(&[0x00, 0xFF])),
        user_properties: vec![(text("k"), text("v")), (text("k"), text(""))],
        subscription_ids: Vec::new(),
        content_type: Some(text("text/plain")),
    };
    assert_eq!(publish.properties.as_deref(), Some(&expected));
    let packet = named(
        valid::V5,
        Version::V5,
        "PUBLISH with two subscription identifiers",
    );
    let Packet::Publish(publish) = packet else {
        panic!("{packet:?}")
    };
    assert_eq!(publish.properties.unwrap().subscription_ids, [1, 128]);
}

#[test]
fn the_options_of_a_subscription_are_where_they_belong() {
    let packet = named(valid::V5, Version::V5, "SUBSCRIBE with every option");
    let Packet::Subscribe(subscribe) = packet else {
        panic!("{packet:?}")
    };
    assert_eq!(subscribe.subscription_id, Some(268_435_455));
    let filter = |text: &'static str| TopicFilter::parse(text.into()).unwrap();
    let first = SubscriptionOptions {
        qos: QoS::ExactlyOnce,
        no_local: true,
        retain_as_published: true,
        retain_handling: RetainHandling::DoNotSend,
    };
    let second = SubscriptionOptions {
        qos: QoS::AtLeastOnce,
        no_local: false,
        retain_as_published: false,
        retain_handling: RetainHandling::SendIfNew,
    };
    assert_eq!(
        subscribe.filters,
        [(filter("a/#"), first), (filter("+"), second)]
    );
}
