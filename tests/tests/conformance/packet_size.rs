//! Sections 3.1.2.11.4 and 3.1.2.11.7: what is left out of an answer, and what is not sent at all.

use moorline_tests::wire::{self, Connect, Publish, V5, Value, property};

use super::raw::{Frame, Raw};
use super::shared;
use crate::support::run;

const REASON_STRING: u8 = 0x1F;
const REQUEST_PROBLEM_INFORMATION: u8 = 0x17;

/// Packets whose answers refuse something, with every kind of acknowledgement among them.
fn refused() -> Vec<u8> {
    let deep = "x/".repeat(60);
    let mut bytes = Vec::new();
    for (qos, id) in [(1, 1), (2, 2)] {
        let mut publish = Publish::new("$SYS/x", qos, "x");
        publish.packet_id = id;
        bytes.extend(wire::publish(V5, &publish));
    }
    bytes.extend(wire::pubrel(3));
    bytes.extend(wire::pubrec(4));
    bytes.extend(wire::subscribe(V5, 5, &Vec::new(), &[(&deep, 1)]));
    bytes.extend(wire::unsubscribe(V5, 6, &["packet-size/never"]));
    bytes
}

/// The answers to them, in a device's own conditions.
async fn answers(address: std::net::SocketAddr, connect: Connect) -> Vec<Frame> {
    let (mut raw, _) = Raw::connect(address, &connect).await;
    raw.send(&refused()).await;
    raw.frames_to_pong().await
}

/// Whether the properties of an acknowledgement have a Reason String or a User Property.
fn explains(frame: &Frame) -> bool {
    let properties = match frame.kind() {
        9 | 11 => &frame.body[2..],
        _ => frame.body.get(3..).unwrap_or_default(),
    };
    let length = properties.first().copied().unwrap_or(0);
    length > 0 && [REASON_STRING, property::USER_PROPERTY].contains(&properties[1])
}

#[test]
fn a_reason_string_is_given_only_where_it_is_wanted() {
    run(async {
        let gateway = shared().await;
        let connect = |asked: Option<u8>| {
            let connect = Connect::new(V5, "packet-size-reason");
            match asked {
                Some(asked) => connect.with(REQUEST_PROBLEM_INFORMATION, Value::Byte(asked)),
                None => connect,
            }
        };
        for asked in [None, Some(0)] {
            for frame in answers(gateway.mqtt(), connect(asked)).await {
                assert!(!explains(&frame), "[MQTT-3.1.2-29]: {frame:02x?}");
            }
        }
        let explained = answers(gateway.mqtt(), connect(Some(1))).await;
        assert!(
            explained.iter().any(explains),
            "otherwise a refusal says why"
        );
    });
}

#[test]
fn an_answer_is_never_larger_than_the_device_takes() {
    run(async {
        let gateway = shared().await;
        let mut kinds = std::collections::HashSet::new();
        for limit in (40..120).step_by(4) {
            let connect = Connect::new(V5, "packet-size-answer")
                .with(REQUEST_PROBLEM_INFORMATION, Value::Byte(1))
                .with(property::MAXIMUM_PACKET_SIZE, Value::Four(limit));
            let frames = answers(gateway.mqtt(), connect).await;
            for frame in &frames {
                assert!(frame.length() <= limit as usize, "{limit}: {frame:02x?}");
                kinds.insert(frame.kind());
            }
            assert_eq!(
                frames.len(),
                6,
                "each is answered, if need be without its reason"
            );
        }
        assert_eq!(kinds.len(), 6);
    });
}

#[test]
fn a_goodbye_is_never_larger_than_the_device_takes() {
    run(async {
        let gateway = shared().await;
        for limit in (40..120).step_by(8) {
            let connect = Connect::new(V5, "packet-size-goodbye")
                .with(property::MAXIMUM_PACKET_SIZE, Value::Four(limit));
            for bad in [&[0x00, 0x00][..], &[0x30, 7, 0, 1, b'a', 3, 0x23, 0, 0]] {
                let (mut raw, connack) = Raw::connect(gateway.mqtt(), &connect).await;
                assert!(connack.length() <= limit as usize);
                raw.send(bad).await;
                for frame in raw.frames_to_end().await {
                    assert!(frame.length() <= limit as usize, "{limit}: {frame:02x?}");
                }
            }
        }
    });
}

#[test]
fn a_connack_that_the_device_could_not_take_is_not_sent() {
    run(async {
        let gateway = shared().await;
        for limit in 1..40 {
            let connect = Connect::new(V5, "packet-size-tiny")
                .with(property::MAXIMUM_PACKET_SIZE, Value::Four(limit));
            let mut raw = Raw::open(gateway.mqtt()).await;
            raw.send(&wire::connect(&connect)).await;
            match raw.frame().await {
                None => {}
                Some(frame) => {
                    assert!(frame.length() <= limit as usize, "{limit}: {frame:02x?}");
                    assert_eq!(frame.kind(), 2);
                }
            }
        }
        let (_raw, connack) = Raw::connect(
            gateway.mqtt(),
            &Connect::new(V5, "packet-size-tiny")
                .with(property::MAXIMUM_PACKET_SIZE, Value::Four(40)),
        )
        .await;
        assert!(connack.length() <= 40);
    });
}
