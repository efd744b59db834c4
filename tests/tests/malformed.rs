//! Bytes that are not MQTT cost whoever sent them the connection, and nobody else anything.

use std::time::Duration;

use moorline_tests::Gateway;
use moorline_tests::device::{Arrived, Device};
use moorline_tests::random::rounds;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, property};
use moorline_tests::{Random, others};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::run;

/// Sent instead of a CONNECT.
const FIRST: &[(&str, &[u8])] = &[
    (
        "an HTTP request",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ),
    (
        "a TLS hello",
        &[0x16, 0x03, 0x01, 0x00, 0x05, 1, 0, 0, 1, 0],
    ),
    ("packet type 0", &[0x00, 0x00]),
    ("a PINGREQ", &[0xC0, 0x00]),
    ("a PUBLISH", &[0x30, 0x04, 0, 1, b'a', b'x']),
    (
        "a remaining length of five bytes",
        &[0x10, 0xFF, 0xFF, 0xFF, 0xFF, 0x01],
    ),
    ("a CONNECT of 256 MB", &[0x10, 0xFF, 0xFF, 0xFF, 0x7F]),
    (
        "CONNECT flags in the fixed header",
        &[
            0x11, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 1, b'a',
        ],
    ),
    (
        "another protocol's name",
        &[
            0x10, 13, 0, 4, b'M', b'Q', b'T', b'X', 4, 2, 0, 0, 0, 1, b'a',
        ],
    ),
    (
        "protocol version 9",
        &[
            0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 9, 2, 0, 0, 0, 1, b'a',
        ],
    ),
    (
        "the reserved CONNECT flag",
        &[
            0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 3, 0, 0, 0, 1, b'a',
        ],
    ),
    (
        "will QoS without a will",
        &[
            0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 0x0A, 0, 0, 0, 1, b'a',
        ],
    ),
    (
        "will QoS 3",
        &[
            0x10, 19, 0, 4, b'M', b'Q', b'T', b'T', 4, 0x1E, 0, 0, 0, 1, b'a', 0, 1, b'w', 0, 1,
            b'x',
        ],
    ),
    (
        "a password without a user name in 3.1.1",
        &[
            0x10, 16, 0, 4, b'M', b'Q', b'T', b'T', 4, 0x42, 0, 0, 0, 1, b'a', 0, 1, b'p',
        ],
    ),
    (
        "a CONNECT that ends in its client id",
        &[
            0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 9, b'a',
        ],
    ),
    (
        "bytes after the CONNECT payload",
        &[
            0x10, 14, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 1, b'a', 0,
        ],
    ),
    (
        "a client id that is not UTF-8",
        &[
            0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 1, 0xFF,
        ],
    ),
    (
        "a client id with U+0000",
        &[0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 1, 0],
    ),
    (
        "a will topic with a wildcard",
        &[
            0x10, 19, 0, 4, b'M', b'Q', b'T', b'T', 4, 0x06, 0, 0, 0, 1, b'a', 0, 1, b'#', 0, 1,
            b'x',
        ],
    ),
    (
        "an unknown property",
        &[
            0x10, 16, 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 2, 0x7F, 0, 0, 1, b'a',
        ],
    ),
    (
        "Receive Maximum 0",
        &[
            0x10, 17, 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 3, 0x21, 0, 0, 0, 1, b'a',
        ],
    ),
    (
        "a property twice",
        &[
            0x10, 20, 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 6, 0x21, 0, 9, 0x21, 0, 9, 0, 1,
            b'a',
        ],
    ),
    (
        "properties longer than the packet",
        &[
            0x10, 14, 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 99, 0, 1, b'a',
        ],
    ),
];

/// Sent after a good CONNECT, with the version that was agreed on.
const LATER: &[(u8, &str, &[u8])] = &[
    (
        V3,
        "a second CONNECT",
        &[
            0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 1, b'a',
        ],
    ),
    (V3, "a CONNACK", &[0x20, 2, 0, 0]),
    (V5, "a CONNACK", &[0x20, 3, 0, 0, 0]),
    (V3, "a SUBACK", &[0x90, 3, 0, 1, 0]),
    (V5, "an UNSUBACK", &[0xB0, 4, 0, 1, 0, 0]),
    (V3, "a PINGRESP", &[0xD0, 0]),
    (V3, "AUTH in 3.1.1", &[0xF0, 0]),
    (V5, "AUTH that nobody asked for", &[0xF0, 2, 0x18, 0]),
    (V3, "QoS 3", &[0x36, 6, 0, 1, b'a', 0, 1, b'x']),
    (V5, "QoS 3", &[0x36, 7, 0, 1, b'a', 0, 1, 0, b'x']),
    (V3, "DUP with QoS 0", &[0x38, 4, 0, 1, b'a', b'x']),
    (
        V3,
        "packet identifier 0",
        &[0x32, 6, 0, 1, b'a', 0, 0, b'x'],
    ),
    (V3, "an empty topic", &[0x30, 3, 0, 0, b'x']),
    (V3, "a topic with +", &[0x30, 4, 0, 1, b'+', b'x']),
    (V5, "a topic with #", &[0x30, 5, 0, 1, b'#', 0, b'x']),
    (
        V3,
        "a topic that is not UTF-8",
        &[0x30, 5, 0, 2, 0xC3, 0x28, b'x'],
    ),
    (V3, "a topic with U+0000", &[0x30, 4, 0, 1, 0, b'x']),
    (
        V3,
        "a topic with a surrogate",
        &[0x30, 6, 0, 3, 0xED, 0xA0, 0x80, b'x'],
    ),
    (V3, "a topic longer than the packet", &[0x30, 3, 0, 9, b'a']),
    (V5, "topic alias 0", &[0x30, 7, 0, 1, b'a', 3, 0x23, 0, 0]),
    (
        V5,
        "a topic alias beyond the maximum",
        &[0x30, 7, 0, 1, b'a', 3, 0x23, 0xFF, 0xFF],
    ),
    (V5, "no topic and no alias", &[0x30, 3, 0, 0, 0]),
    (
        V5,
        "a subscription identifier from a client",
        &[0x30, 6, 0, 1, b'a', 2, 0x0B, 1],
    ),
    (V5, "payload format 2", &[0x30, 6, 0, 1, b'a', 2, 0x01, 2]),
    (
        V5,
        "a response topic with a wildcard",
        &[0x30, 8, 0, 1, b'a', 4, 0x08, 0, 1, b'#'],
    ),
    (
        V3,
        "SUBSCRIBE without the reserved bits",
        &[0x80, 6, 0, 1, 0, 1, b'a', 0],
    ),
    (V3, "SUBSCRIBE to nothing", &[0x82, 2, 0, 1]),
    (V3, "SUBSCRIBE with QoS 3", &[0x82, 6, 0, 1, 0, 1, b'a', 3]),
    (
        V3,
        "SUBSCRIBE with identifier 0",
        &[0x82, 6, 0, 0, 0, 1, b'a', 0],
    ),
    (
        V3,
        "SUBSCRIBE to a filter with # inside",
        &[0x82, 8, 0, 1, 0, 3, b'#', b'/', b'a', 0],
    ),
    (
        V3,
        "SUBSCRIBE to an empty filter",
        &[0x82, 5, 0, 1, 0, 0, 0],
    ),
    (
        V5,
        "SUBSCRIBE with reserved option bits",
        &[0x82, 7, 0, 1, 0, 0, 1, b'a', 0xC0],
    ),
    (
        V5,
        "SUBSCRIBE with retain handling 3",
        &[0x82, 7, 0, 1, 0, 0, 1, b'a', 0x30],
    ),
    (
        V5,
        "SUBSCRIBE with identifier property 0",
        &[0x82, 9, 0, 1, 2, 0x0B, 0, 0, 1, b'a', 0],
    ),
    (
        V3,
        "UNSUBSCRIBE without the reserved bits",
        &[0xA0, 5, 0, 1, 0, 1, b'a'],
    ),
    (V3, "UNSUBSCRIBE from nothing", &[0xA2, 2, 0, 1]),
    (V3, "PUBREL without the reserved bits", &[0x60, 2, 0, 1]),
    (V3, "PUBACK of one byte", &[0x40, 1, 0]),
    (V3, "PUBACK of identifier 0", &[0x40, 2, 0, 0]),
    (V5, "PUBACK with an unknown reason", &[0x40, 3, 0, 1, 0x42]),
    (V3, "PINGREQ with a body", &[0xC0, 1, 0]),
    (V3, "DISCONNECT with a body in 3.1.1", &[0xE0, 1, 0]),
    (V5, "DISCONNECT with an unknown reason", &[0xE0, 1, 0x42]),
    (V3, "packet type 0", &[0x00, 0]),
    (
        V3,
        "a remaining length of five bytes",
        &[0x30, 0x80, 0x80, 0x80, 0x80, 0x01],
    ),
    (
        V3,
        "a packet of 256 MB",
        &[0x30, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1, b'a'],
    ),
];

/// Another device that must not notice anything.
struct Bystander {
    device: Device,
    asked: usize,
}

impl Bystander {
    async fn new(gateway: &Gateway) -> Self {
        Self {
            device: Device::clean(gateway.mqtt(), V5, "bystander").await,
            asked: 0,
        }
    }

    async fn is_served(&mut self, gateway: &Gateway) {
        self.asked += 1;
        let text = self.asked.to_string();
        gateway.api().push_text("bystander", &text).await;
        assert_eq!(self.device.take().await.text(), text);
    }
}

#[test]
fn malformed_first_packets_close_the_connection_and_disturb_nobody() {
    run(async {
        let gateway = Gateway::start().await;
        let mut bystander = Bystander::new(&gateway).await;
        for (name, bytes) in FIRST {
            let mut stream = TcpStream::connect(gateway.mqtt()).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            let read = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
            assert!(read.is_ok(), "{name}: the connection is still open");
            // A CONNACK that refuses may be given, one that accepts never.
            if answer.first() == Some(&0x20) {
                assert_ne!(answer[3], 0, "{name} was accepted: {answer:02x?}");
            } else {
                assert!(answer.is_empty(), "{name} was answered {answer:02x?}");
            }
            bystander.is_served(&gateway).await;
        }
        gateway.finish().await;
    });
}

#[test]
fn malformed_later_packets_close_the_connection_and_disturb_nobody() {
    run(async {
        let gateway = Gateway::start().await;
        let mut bystander = Bystander::new(&gateway).await;
        for (version, name, bytes) in LATER {
            let mut device = Device::clean(gateway.mqtt(), *version, "sender").await;
            device.send(bytes).await.unwrap();
            match device.receive(SOON).await {
                Arrived::Closed => {}
                Arrived::Packet(wire::Packet::Disconnect { reason, .. }) => {
                    assert!(
                        reason >= 0x80,
                        "version {version}, {name}: reason {reason:#04x}"
                    );
                    assert_eq!(
                        device.receive(SOON).await,
                        Arrived::Closed,
                        "version {version}, {name}"
                    );
                }
                other => panic!("version {version}, {name}: {other:?}"),
            }
            bystander.is_served(&gateway).await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_device_of_5_0_is_told_what_was_wrong() {
    run(async {
        let gateway = Gateway::start().await;
        let cases: &[(&str, &[u8], u8)] = &[
            (
                "a property twice",
                &[0x30, 9, 0, 1, b'a', 4, 0x01, 0, 0x01, 0, b'x'],
                0x82,
            ),
            (
                "a topic that is not UTF-8",
                &[0x30, 6, 0, 2, 0xC3, 0x28, 0, b'x'],
                0x81,
            ),
            ("topic alias 0", &[0x30, 7, 0, 1, b'a', 3, 0x23, 0, 0], 0x94),
            (
                "a packet that is too large",
                &[0x30, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1, b'a'],
                0x95,
            ),
            (
                "a second CONNECT",
                &[
                    0x10, 14, 0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 0, 0, 0, 1, b'a',
                ],
                0x82,
            ),
        ];
        for (name, bytes, reason) in cases {
            let mut device = Device::clean(gateway.mqtt(), V5, "sender").await;
            device.send(bytes).await.unwrap();
            assert_eq!(device.await_close(SOON).await, Some(*reason), "{name}");
        }
        gateway.finish().await;
    });
}

#[test]
fn a_connect_that_never_ends_is_closed_after_the_handshake_timeout() {
    run(async {
        let options = moorline_tests::Options::config("[mqtt]\nhandshake_timeout = \"500ms\"\n");
        let gateway = Gateway::start_with(options).await;
        for begin in [&[][..], &[0x10], &[0x10, 40, 0, 4, b'M']] {
            for address in [gateway.mqtt(), gateway.ws()] {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(begin).await.unwrap();
                let mut answer = Vec::new();
                let read = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
                assert!(read.is_ok(), "{begin:?} on {address}: still open");
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn packets_cut_into_single_bytes_are_understood() {
    run(async {
        let gateway = Gateway::start().await;
        let mut device = Device::socket(gateway.mqtt(), V5).await.unwrap();
        let mut publish = Publish::new("up/slow", 1, "slowly")
            .with(property::USER_PROPERTY, Value::Pair("a".into(), "b".into()));
        publish.packet_id = 3;
        let bytes = [
            wire::connect(&Connect::new(V5, "slow")),
            wire::publish(V5, &publish),
        ]
        .concat();
        for byte in bytes {
            device.send(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(device.await_puback(3).await, 0);
        gateway.finish().await;
    });
}

#[test]
fn random_changes_to_good_packets_never_stop_the_node() {
    run(async {
        let mut random = Random::announced("mutated packets");
        let gateway = Gateway::start().await;
        let mut bystander = Bystander::new(&gateway).await;
        for round in 0..100 * rounds() {
            let version = if round % 2 == 0 { V3 } else { V5 };
            let mut bytes = [
                wire::publish(version, &Publish::new("a/b", 0, "payload")),
                wire::subscribe(version, 9, &Vec::new(), &[("a/+", 1)]),
                wire::publish(
                    version,
                    &Publish {
                        packet_id: 8,
                        ..Publish::new("a/b", 1, "payload")
                    },
                ),
                wire::unsubscribe(version, 10, &["a/+"]),
                wire::pubrel(8),
            ]
            .concat();
            for _ in 0..=random.below(4) {
                let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
                bytes[at] = u8::try_from(random.below(256)).unwrap();
            }
            let mut device =
                Device::clean(gateway.mqtt(), version, &format!("m{}", round % 7)).await;
            // The server may close while this is written.
            _ = device.send(&bytes).await;
            _ = device
                .send(&wire::disconnect(version, 0, &Vec::new()))
                .await;
            // Answers are read as MQTT: one that is not fails the test.
            while matches!(
                device.receive(Duration::from_millis(20)).await,
                Arrived::Packet(_)
            ) {}
            if round % 50 == 0 {
                bystander.is_served(&gateway).await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn websocket_connections_that_are_none_disturb_nobody() {
    run(async {
        let gateway = Gateway::start().await;
        let mut bystander = Bystander::new(&gateway).await;
        let upgrade = "GET /mqtt HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                       Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                       Sec-WebSocket-Protocol: mqtt\r\n\r\n";
        // After a good upgrade: a text frame, an unmasked frame, an endless frame, reserved bits.
        let frames: [&[u8]; 4] = [
            &[0x81, 0x82, 1, 2, 3, 4, b'h', b'i'],
            &[0x82, 0x02, 0xC0, 0x00],
            &[
                0x82, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1, 2, 3, 4,
            ],
            &[0xF2, 0x80, 1, 2, 3, 4],
        ];
        for frame in frames {
            let mut stream = TcpStream::connect(gateway.ws()).await.unwrap();
            stream.write_all(upgrade.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"\r\n\r\n") {
                let byte = moorline_tests::soon("the upgrade", stream.read_u8())
                    .await
                    .unwrap();
                answer.push(byte);
            }
            let answer = String::from_utf8(answer).unwrap().to_lowercase();
            assert!(answer.starts_with("http/1.1 101"), "{answer}");
            assert!(answer.contains("sec-websocket-protocol: mqtt"), "{answer}");
            assert!(answer.contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{answer}");
            stream.write_all(frame).await.unwrap();
            let mut rest = Vec::new();
            let read = tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await;
            assert!(read.is_ok(), "{frame:02x?}: still open");
            bystander.is_served(&gateway).await;
        }
        for junk in [
            "GET /mqtt HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.0\r\n\r\n",
            "\0\0\0\0\r\n\r\n",
        ] {
            let mut stream = TcpStream::connect(gateway.ws()).await.unwrap();
            stream.write_all(junk.as_bytes()).await.unwrap();
            let mut rest = Vec::new();
            let read = tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await;
            assert!(read.is_ok(), "{junk:?}: still open");
            bystander.is_served(&gateway).await;
        }
        // A client of another make still gets through.
        let seen = others::run(others::mosquitto(
            "mosquitto_pub",
            gateway.mqtt(),
            &["-t", "up/x", "-m", "fine", "-q", "1"],
        ))
        .await;
        assert!(seen.status.success(), "{seen:?}");
        gateway.finish().await;
    });
}
