//! Section 3.1: what a CONNECT may say and what becomes of it.

use moorline_tests::device::Device;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, property};

use super::raw::{Frame, Raw};
use super::shared;
use crate::support::{VERSIONS, resume, run};

/// A CONNECT of a name, a level, flags, and payload fields, each with its length in front.
pub(super) fn crafted(name: &str, level: u8, flags: u8, fields: &[&[u8]]) -> Vec<u8> {
    let mut body = Vec::new();
    let put = |field: &[u8], out: &mut Vec<u8>| {
        out.extend((field.len() as u16).to_be_bytes());
        out.extend(field);
    };
    put(name.as_bytes(), &mut body);
    body.extend([level, flags, 0, 0]);
    if level == V5 {
        body.push(0);
    }
    for field in fields {
        put(field, &mut body);
    }
    wire::packet(0x10, &body)
}

/// What a server that closes after `bytes` had to say.
pub(super) async fn answer_to(raw: &mut Raw, bytes: &[u8]) -> Vec<Frame> {
    raw.send(bytes).await;
    raw.frames_to_end().await
}

#[test]
fn a_version_that_the_server_does_not_speak_is_answered_so() {
    run(async {
        let gateway = shared().await;
        for (name, level) in [("MQIsdp", 3), ("MQTT", 3), ("MQTT", 6), ("MQTT", 0x84)] {
            let mut raw = Raw::open(gateway.mqtt()).await;
            let connect = crafted(name, level, 2, &[b"connect-level"]);
            let answer = answer_to(&mut raw, &connect).await;
            let expected = Frame {
                first: 0x20,
                body: vec![0, 1],
            };
            assert_eq!(answer, [expected], "{name} {level}");
        }
        // Another protocol altogether gets no answer in MQTT's words.
        for name in ["mqtt", "MQTT ", "HTTP", ""] {
            let mut raw = Raw::open(gateway.mqtt()).await;
            let answer = answer_to(&mut raw, &crafted(name, 4, 2, &[b"connect-name"])).await;
            assert_eq!(answer, [], "{name}");
        }
    });
}

#[test]
fn the_fields_of_a_connect_are_those_that_its_flags_announce() {
    run(async {
        let gateway = shared().await;
        let id: &[u8] = b"connect-fields";
        // Flags and fields that do not go together.
        let bad: &[(&str, u8, &[&[u8]])] = &[
            ("no client id", 0x02, &[]),
            ("a user name announced, none there", 0x82, &[id]),
            ("a user name there, none announced", 0x02, &[id, b"user"]),
            ("a password announced, none there", 0xC2, &[id, b"user"]),
            (
                "a password there, none announced",
                0x82,
                &[id, b"user", b"pw"],
            ),
            ("a will announced, none there", 0x06, &[id]),
            ("a will without its message", 0x06, &[id, b"will/topic"]),
            (
                "a will there, none announced",
                0x02,
                &[id, b"will/topic", b"gone"],
            ),
            ("will RETAIN without a will", 0x22, &[id]),
            ("will QoS without a will", 0x0A, &[id]),
            ("will QoS 3", 0x1E, &[id, b"will/topic", b"gone"]),
            ("the reserved flag", 0x03, &[id]),
            ("a user name that is not UTF-8", 0x82, &[id, b"\xC0\x80"]),
            ("a user name with U+0000", 0x82, &[id, b"a\0b"]),
            ("a client id with a surrogate", 0x02, &[b"\xED\xA0\x80"]),
            (
                "a will topic that is not UTF-8",
                0x06,
                &[id, b"\xFF", b"gone"],
            ),
        ];
        for (name, flags, fields) in bad {
            // A will of 5.0 has properties before its topic: only 3.1.1 is this simple.
            let versions: &[u8] = if flags & 4 > 0 { &[V3] } else { &VERSIONS };
            for version in versions {
                let mut raw = Raw::open(gateway.mqtt()).await;
                let connect = crafted("MQTT", *version, *flags, fields);
                let answer = answer_to(&mut raw, &connect).await;
                if *version == V3 {
                    // [MQTT-3.1.4-1] of 3.1.1 asks for silence.
                    assert_eq!(answer, [], "{name}");
                } else {
                    let refused = |frame: &Frame| frame.first == 0x20 && frame.body[1] >= 0x80;
                    assert!(answer.iter().all(refused), "{name}: {answer:02x?}");
                }
            }
        }
        // A password needs no user name in 5.0 only.
        let connect = crafted("MQTT", V3, 0x42, &[id, b"pw"]);
        let mut raw = Raw::open(gateway.mqtt()).await;
        assert_eq!(answer_to(&mut raw, &connect).await, []);
        for (version, flags, fields) in [
            (V5, 0x42, vec![id, b"pw"]),
            (V3, 0xC2, vec![id, b"user", b"pw"]),
            (V3, 0xC6, vec![id, b"will/topic", b"gone", b"user", b"pw"]),
        ] {
            let mut raw = Raw::open(gateway.mqtt()).await;
            raw.send(&crafted("MQTT", version, flags, &fields)).await;
            let connack = raw.frame().await.unwrap();
            assert_eq!((connack.first, connack.body[1]), (0x20, 0), "{flags:#x}");
            raw.send(&wire::disconnect(version, 0, &Vec::new())).await;
        }
    });
}

#[test]
fn client_ids_of_1_to_23_letters_and_digits_are_taken() {
    run(async {
        let gateway = shared().await;
        let all = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
        for version in VERSIONS {
            for length in 1..=23 {
                for start in (0..all.len() - length).step_by(23) {
                    let id = &all[start..start + length];
                    Device::clean(gateway.mqtt(), version, id)
                        .await
                        .ping()
                        .await;
                }
            }
            // Longer ones, and other characters, are allowed to be taken too.
            for id in [all, "connect/é/日本", " ", "\u{FEFF}"] {
                Device::clean(gateway.mqtt(), version, id)
                    .await
                    .ping()
                    .await;
            }
        }
    });
}

#[test]
fn a_client_id_is_told_from_others_by_every_byte() {
    run(async {
        let gateway = shared().await;
        // A byte order mark is a character of the name like any other.
        let ids = [
            "connect-id",
            "connect-Id",
            "\u{FEFF}connect-id",
            "connect-id ",
        ];
        for version in VERSIONS {
            let mut devices = Vec::new();
            for id in ids {
                devices.push(Device::clean(gateway.mqtt(), version, id).await);
            }
            for device in &mut devices {
                device.ping().await;
            }
        }
    });
}

#[test]
fn an_assigned_client_id_names_a_session_like_any_other() {
    run(async {
        let gateway = shared().await;
        let nameless = Connect::new(V5, "").with(property::SESSION_EXPIRY, Value::Four(60));
        let mut ids = Vec::new();
        for _ in 0..3 {
            let device = Device::connect(gateway.mqtt(), nameless.clone()).await;
            assert!(!device.session_present);
            let assigned = device.connack.iter().find_map(|(id, value)| match value {
                Value::Text(text) if *id == property::ASSIGNED_CLIENT_ID => Some(text.clone()),
                _ => None,
            });
            ids.push(String::from_utf8(assigned.expect("an assigned client id")).unwrap());
            device.disconnect().await;
        }
        assert!(
            ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2],
            "{ids:?}"
        );
        for id in &ids {
            let back = resume(&gateway, V5, id).await;
            assert!(back.session_present, "{id}");
            let told = back
                .connack
                .iter()
                .any(|(id, _)| *id == property::ASSIGNED_CLIENT_ID);
            assert!(!told, "a device that brings its id is assigned none");
            back.disconnect().await;
            super::forget(&gateway, V5, id).await;
        }
        // 5.0 allows a nameless device to ask for a session that was there.
        let connect = Connect {
            clean_start: false,
            ..nameless
        };
        let device = Device::connect(gateway.mqtt(), connect).await;
        assert!(!device.session_present);
    });
}

#[test]
fn nothing_behind_a_refused_connect_is_obeyed() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "connect-watcher").await;
        watcher.subscribe("connect/refused/#", 1).await;
        let nameless = Connect {
            clean_start: false,
            ..Connect::new(V3, "")
        };
        let refused = [
            (V3, wire::connect(&nameless)),
            (V3, crafted("MQTT", 9, 2, &[b"connect-refused"])),
            (V3, crafted("MQTT", V3, 3, &[b"connect-refused"])),
        ];
        for (version, mut bytes) in refused {
            let publish = Publish::new("connect/refused/x", 0, "no").retained();
            bytes.extend(wire::publish(version, &publish));
            bytes.extend(wire::PINGREQ);
            let mut raw = Raw::open(gateway.mqtt()).await;
            let answer = answer_to(&mut raw, &bytes).await;
            assert!(answer.len() <= 1, "{answer:02x?}");
            for connack in answer {
                assert_eq!(connack.first, 0x20);
                assert_ne!(connack.body[1], 0, "refused");
                assert_eq!(connack.body[0], 0, "[MQTT-3.2.2-6]: no session present");
            }
            watcher.has_nothing().await;
        }
        let mut late = Device::clean(gateway.mqtt(), V5, "connect-late").await;
        late.subscribe("connect/refused/#", 0).await;
        late.has_nothing().await;
    });
}

#[test]
fn a_device_need_not_wait_for_its_connack() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("connect-eager-{version}");
            let mut bytes = wire::connect(&Connect::new(version, &id));
            bytes.extend(wire::subscribe(
                version,
                1,
                &Vec::new(),
                &[("connect/eager", 0)],
            ));
            let publish = Publish::new("connect/eager", 0, "me");
            bytes.extend(wire::publish(version, &publish));
            let mut raw = Raw::open(gateway.mqtt()).await;
            raw.send(&bytes).await;
            let kinds: Vec<u8> = [raw.frame().await, raw.frame().await, raw.frame().await]
                .iter()
                .map(|frame| frame.as_ref().unwrap().kind())
                .collect();
            assert_eq!(kinds, [2, 9, 3], "CONNACK first, then in order");
        }
    });
}

#[test]
fn a_session_of_3_1_1_is_kept_only_without_clean_session() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("connect-clean-{version}");
            let mut first = resume(&gateway, version, &id).await;
            assert!(!first.session_present, "a new one is made");
            first.subscribe("connect/clean", 1).await;
            first.disconnect().await;
            let again = resume(&gateway, version, &id).await;
            assert!(again.session_present, "and resumed");
            again.disconnect().await;
            let mut clean = Device::clean(gateway.mqtt(), version, &id).await;
            assert!(!clean.session_present, "and thrown away");
            clean.publish(Publish::new("connect/clean", 1, "x")).await;
            clean.has_nothing().await;
            clean.disconnect().await;
            let last = resume(&gateway, version, &id).await;
            assert!(!last.session_present, "nothing of either is left");
            last.disconnect().await;
            super::forget(&gateway, version, &id).await;
        }
    });
}

#[test]
fn a_second_connect_ends_the_connection_and_changes_nothing() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("connect-second-{version}");
            let connect = Connect::new(version, &id);
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            let other = Connect::new(version, "connect-second-other");
            let answer = answer_to(&mut raw, &wire::connect(&other)).await;
            let expected: &[u8] = if version == V5 { &[0xE0, 0x82] } else { &[] };
            let told: Vec<u8> = answer
                .iter()
                .flat_map(|frame| [frame.first, frame.body[0]])
                .collect();
            assert_eq!(told, expected, "no second CONNACK: {answer:02x?}");
        }
    });
}
