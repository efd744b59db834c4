//! Section 3.2: what a server says in its CONNACK, and that it says it first and once.

use moorline_tests::device::Device;
use moorline_tests::wire::{self, Connect, Publish, V5, Value, property};

use super::raw::{Frame, Raw};
use super::{kept_for, shared};
use crate::support::{VERSIONS, resume, run};

#[test]
fn connack_comes_first_and_once_and_before_what_was_queued() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("connack-first-{version}");
            let mut away = resume(&gateway, version, &id).await;
            away.subscribe("connack/first", 1).await;
            away.disconnect().await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "connack-pub").await;
            for _ in 0..5 {
                publisher
                    .publish(Publish::new("connack/first", 1, "queued"))
                    .await;
            }
            let (mut raw, connack) =
                Raw::connect(gateway.mqtt(), &Connect::new(version, &id).persistent()).await;
            assert_eq!(connack.body[0], 1, "session present and no reserved bit");
            for _ in 0..5 {
                assert_eq!(raw.frame().await.unwrap().kind(), 3);
            }
            let behind = raw.frames_to_pong().await;
            assert_eq!(behind, [], "and nothing else");
            super::forget(&gateway, version, &id).await;
        }
    });
}

#[test]
fn session_present_says_what_the_server_had() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("connack-present-{version}");
            let connect = |clean_start| {
                let connect = Connect::new(version, &id).persistent();
                Connect {
                    clean_start,
                    ..connect
                }
            };
            // Clean, whether the server had one, whether it says so.
            for (clean_start, present) in [
                (false, 0),
                (false, 1),
                (true, 0),
                // What a clean start with an expiry interval has made is there for the next (5.0),
                // what CleanSession has made is not (3.1.1).
                (false, u8::from(version == V5)),
            ] {
                let (mut raw, connack) = Raw::connect(gateway.mqtt(), &connect(clean_start)).await;
                assert_eq!(connack.body[0], present, "clean start: {clean_start}");
                raw.send(&wire::disconnect(version, 0, &Vec::new())).await;
                raw.frames_to_end().await;
            }
            super::forget(&gateway, version, &id).await;
        }
    });
}

#[test]
fn connack_of_5_0_says_what_the_server_limits_and_no_more() {
    run(async {
        let gateway = shared().await;
        let connect = Connect::new(V5, "connack-limits").keep_alive(30);
        let device = Device::connect(gateway.mqtt(), connect).await;
        let mut seen = std::collections::HashSet::new();
        for (id, value) in &device.connack {
            assert!(seen.insert(*id), "property {id:#04x} twice");
            let legal = match (*id, value) {
                (property::RECEIVE_MAXIMUM, Value::Two(n)) => *n > 0,
                (property::MAXIMUM_PACKET_SIZE, Value::Four(n)) => *n > 0,
                // Maximum QoS, Retain, Wildcards, Identifiers and Shared Subscriptions Available.
                (0x24 | 0x25 | 0x28 | 0x29 | 0x2A, Value::Byte(flag)) => *flag <= 1,
                // Topic Alias Maximum; Session Expiry Interval when it is not what was asked for.
                (0x22, Value::Two(_)) | (property::SESSION_EXPIRY, Value::Four(_)) => true,
                _ => false,
            };
            assert!(legal, "property {id:#04x} with {value:?}");
        }
        // QoS 2, retained messages, wildcards and identifiers work, so nothing may deny them.
        for id in [0x24, 0x25, 0x28, 0x29] {
            let denied = device.connack.contains(&(id, Value::Byte(0)));
            assert!(!denied, "property {id:#04x} denies what the server can do");
        }
        // No Server Keep Alive: the device's own holds.
        assert!(!seen.contains(&property::SERVER_KEEP_ALIVE));
    });
}

#[test]
fn response_information_is_given_only_when_asked_for() {
    run(async {
        let gateway = shared().await;
        for asked in [None, Some(0)] {
            let mut connect = Connect::new(V5, "connack-response");
            if let Some(asked) = asked {
                connect = connect.with(0x19, Value::Byte(asked));
            }
            let device = Device::connect(gateway.mqtt(), connect).await;
            let given = device.connack.iter().any(|(id, _)| *id == 0x1A);
            assert!(!given, "{asked:?}: {:?}", device.connack);
        }
    });
}

#[test]
fn a_session_expiry_interval_of_zero_is_as_good_as_none() {
    run(async {
        let gateway = shared().await;
        for connect in [
            Connect::new(V5, "connack-zero"),
            kept_for("connack-zero", 0),
        ] {
            let connect = Connect {
                clean_start: false,
                ..connect
            };
            for _ in 0..2 {
                let (mut raw, connack) = Raw::connect(gateway.mqtt(), &connect).await;
                assert_eq!(connack.body[0], 0, "it ends with its connection");
                raw.send(&wire::disconnect(V5, 0, &Vec::new())).await;
                let rest: Vec<Frame> = raw.frames_to_end().await;
                assert_eq!(rest, []);
            }
        }
    });
}

#[test]
fn a_refusal_has_no_session_and_ends_the_connection() {
    run(async {
        let gateway = shared().await;
        let id = "connack-refusal";
        Device::connect(gateway.mqtt(), kept_for(id, 60))
            .await
            .disconnect()
            .await;
        let connect = kept_for(id, 60).with(0x15, Value::Text(b"unknown".to_vec()));
        let mut raw = Raw::open(gateway.mqtt()).await;
        raw.send(&wire::connect(&connect)).await;
        let answer = raw.frames_to_end().await;
        assert_eq!(answer.len(), 1, "{answer:02x?}");
        assert_eq!((answer[0].first, answer[0].body[0]), (0x20, 0));
        assert!(answer[0].body[1] >= 0x80);
        // The session that the refused one did not get is still there.
        let back = Device::connect(gateway.mqtt(), kept_for(id, 60)).await;
        assert!(back.session_present);
        back.disconnect().await;
        super::forget(&gateway, V5, id).await;
    });
}
