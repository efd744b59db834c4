//! Sections 3.4 to 3.7, 4.3 and 4.4: acknowledgements, and what is sent again without them.

use std::collections::HashSet;

use moorline_tests::device::{Arrived, Device};
use moorline_tests::wire::{self, Connect, Packet, Publish, V5, Value, property};

use super::raw::{Frame, Raw};
use super::shared;
use crate::support::{QUIET, VERSIONS, resume, run};

#[test]
fn an_acknowledgement_has_the_packet_identifier_of_what_it_answers() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let connect = Connect::new(version, "acks-ids");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            for id in [1_u16, 255, 256, 0x1234, 65_535] {
                let mut publish = Publish::new("acks/ids", 1, "x");
                publish.packet_id = id;
                let one = wire::publish(version, &publish);
                publish.qos = 2;
                let two = wire::publish(version, &publish);
                let none = Vec::new();
                let asked: [(Vec<u8>, u8); 5] = [
                    (one, 0x40),
                    (two, 0x50),
                    (wire::pubrel(id), 0x70),
                    (
                        wire::subscribe(version, id, &none, &[("acks/no/body", 0)]),
                        0x90,
                    ),
                    (wire::unsubscribe(version, id, &["acks/no/body"]), 0xB0),
                ];
                for (bytes, expected) in asked {
                    raw.send(&bytes).await;
                    let frame = raw.frame().await.unwrap();
                    assert_eq!(frame.first, expected, "{id:#x}");
                    assert_eq!(frame.body[..2], id.to_be_bytes(), "{expected:#x}");
                }
            }
        }
    });
}

#[test]
fn acknowledgements_come_in_the_order_of_what_they_answer() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let connect = Connect::new(version, "acks-order");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            // Some have to be made durable first, some have not.
            let mut stored = resume(&gateway, version, "acks-order-sub").await;
            stored.subscribe("acks/order/stored", 2).await;
            let mut bytes = Vec::new();
            for id in 1..=40_u16 {
                let topic = ["acks/order/stored", "acks/order/live"][usize::from(id % 2)];
                let mut publish = Publish::new(topic, 1 + (id % 3 % 2) as u8, "x");
                publish.packet_id = id;
                bytes.extend(wire::publish(version, &publish));
            }
            raw.send(&bytes).await;
            for id in 1..=40_u16 {
                let frame = raw.frame().await.unwrap();
                assert_eq!(frame.body[..2], id.to_be_bytes());
                assert_eq!(frame.kind(), 4 + (id % 3 % 2) as u8);
            }
            let received = (1..=40).filter(|id| id % 3 % 2 == 1);
            let releases: Vec<u8> = received.clone().flat_map(wire::pubrel).collect();
            raw.send(&releases).await;
            for id in received {
                let frame = raw.frame().await.unwrap();
                assert_eq!((frame.kind(), &frame.body[..2]), (7, &id.to_be_bytes()[..]));
            }
            stored.disconnect().await;
            super::forget(&gateway, version, "acks-order-sub").await;
        }
    });
}

#[test]
fn an_identifier_that_nobody_knows_is_answered_and_5_0_is_told_so() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let connect = Connect::new(version, "acks-unknown");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            let told: &[u8] = if version == V5 { &[0x92] } else { &[] };
            raw.send(&wire::pubrel(99)).await;
            let frame = raw.frame().await.unwrap();
            assert_eq!((frame.first, &frame.body[2..]), (0x70, told), "PUBCOMP");
            raw.send(&wire::pubrec(99)).await;
            let frame = raw.frame().await.unwrap();
            assert_eq!((frame.first, &frame.body[2..]), (0x62, told), "PUBREL");
            // A message may have ended meanwhile: no reason to end the connection.
            raw.send(&wire::puback(99)).await;
            raw.send(&wire::pubcomp(99)).await;
            assert_eq!(raw.frames_to_pong().await, []);
        }
    });
}

#[test]
fn a_publish_after_its_puback_is_a_new_message_whatever_its_dup() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "acks-new").await;
            device.subscribe("acks/new", 1).await;
            for dup in [false, true, true] {
                let mut publish = Publish::new("acks/new", 1, "x");
                (publish.packet_id, publish.dup) = (5, dup);
                device.publish(publish).await;
                assert!(!device.take().await.dup);
            }
            device.has_nothing().await;
        }
    });
}

#[test]
fn a_repeated_qos_2_publish_is_answered_and_not_delivered_again() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "acks-twice").await;
            device.subscribe("acks/twice", 0).await;
            let mut publish = Publish::new("acks/twice", 2, "once");
            publish.packet_id = 6;
            for dup in [false, true, false, true] {
                publish.dup = dup;
                device
                    .send(&wire::publish(version, &publish))
                    .await
                    .unwrap();
                device.await_pubrec(6).await;
            }
            assert_eq!(device.take().await.text(), "once");
            device.has_nothing().await;
            // PUBREL may be repeated as well.
            for _ in 0..2 {
                device.send(&wire::pubrel(6)).await.unwrap();
                device
                    .await_packet("a PUBCOMP", |packet| {
                        matches!(packet, Packet::PubComp { packet_id: 6, .. }).then_some(())
                    })
                    .await;
            }
            publish.dup = false;
            device.publish(publish).await;
            assert_eq!(
                device.take().await.text(),
                "once",
                "a new one after PUBCOMP"
            );
        }
    });
}

/// Three messages on their way to a persistent session, none acknowledged.
async fn three_in_flight(
    gateway: &moorline_tests::Gateway,
    version: u8,
    id: &str,
    qos: u8,
) -> (Device, Vec<Publish>) {
    let mut device = resume(gateway, version, id).await;
    device.subscribe(id, qos).await;
    let mut publisher = Device::clean(gateway.mqtt(), V5, &format!("{id}-pub")).await;
    for n in 0..3 {
        publisher
            .publish(Publish::new(id, qos, n.to_string()))
            .await;
    }
    let mut sent = Vec::new();
    for n in 0..3 {
        let publish = device.next_publish().await;
        assert_eq!((publish.text(), publish.dup), (n.to_string(), false));
        sent.push(publish);
    }
    let ids: HashSet<u16> = sent.iter().map(|publish| publish.packet_id).collect();
    assert_eq!(ids.len(), 3, "each has its own packet identifier");
    assert!(!ids.contains(&0));
    (device, sent)
}

#[test]
fn what_is_not_acknowledged_is_not_repeated_while_connected() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("acks-silent-{version}");
            let (mut device, _) = three_in_flight(&gateway, version, &id, 2).await;
            assert_eq!(
                device.receive(2 * QUIET).await,
                Arrived::Nothing,
                "[MQTT-4.4.0-1]"
            );
            device.disconnect().await;
            super::forget(&gateway, version, &id).await;
        }
    });
}

#[test]
fn after_pubrec_the_pubrel_is_repeated_and_never_the_publish() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("acks-pubrel-{version}");
            let (mut device, sent) = three_in_flight(&gateway, version, &id, 2).await;
            // The first is done, the second released, the third untouched.
            device.acknowledge(&sent[0]).await;
            device.send(&wire::pubrec(sent[1].packet_id)).await.unwrap();
            let released = |packet: &Packet| matches!(packet, Packet::PubRel { .. }).then_some(());
            device.await_packet("a PUBREL", released).await;
            for _ in 0..2 {
                drop(device);
                device = resume(&gateway, version, &id).await;
                assert!(device.session_present);
                let first = device.receive(moorline_tests::waiting::SOON).await;
                let pubrel = Packet::PubRel {
                    packet_id: sent[1].packet_id,
                    reason: 0,
                };
                assert_eq!(
                    first,
                    Arrived::Packet(pubrel),
                    "in the order they were sent"
                );
                let again = device.next_publish().await;
                assert_eq!(
                    again,
                    Publish {
                        dup: true,
                        ..sent[2].clone()
                    }
                );
                device.has_nothing().await;
            }
            device
                .send(&wire::pubcomp(sent[1].packet_id))
                .await
                .unwrap();
            device.acknowledge(&sent[2]).await;
            device.ping().await;
            drop(device);
            let mut device = resume(&gateway, version, &id).await;
            device.has_nothing().await;
            device.disconnect().await;
            super::forget(&gateway, version, &id).await;
        }
    });
}

#[test]
fn what_a_device_refuses_is_not_sent_again() {
    run(async {
        let gateway = shared().await;
        for (qos, kind) in [(1, 0x40), (2, 0x50)] {
            let id = format!("acks-refused-{qos}");
            let (mut device, sent) = three_in_flight(&gateway, V5, &id, qos).await;
            for (publish, reason) in sent.iter().zip([0x80, 0x83, 0x97]) {
                let [high, low] = publish.packet_id.to_be_bytes();
                device
                    .send(&wire::packet(kind, &[high, low, reason]))
                    .await
                    .unwrap();
            }
            device.has_nothing().await;
            drop(device);
            let mut device = resume(&gateway, V5, &id).await;
            device.has_nothing().await;
            device.disconnect().await;
            super::forget(&gateway, V5, &id).await;
        }
    });
}

#[test]
fn packet_identifiers_in_flight_differ_over_all_their_range() {
    run(async {
        let gateway = shared().await;
        let mut device = Device::clean(gateway.mqtt(), V5, "acks-range").await;
        device.subscribe("acks/range", 1).await;
        // One stays open while the others pass it by.
        let mut publisher = Device::clean(gateway.mqtt(), V5, "acks-range-pub").await;
        publisher
            .publish(Publish::new("acks/range", 1, "open"))
            .await;
        let open = device.next_publish().await;
        for _ in 0..300 {
            publisher.publish(Publish::new("acks/range", 1, "x")).await;
            let got = device.take().await;
            assert!(got.packet_id != 0 && got.packet_id != open.packet_id);
        }
    });
}

#[test]
fn reasons_of_acknowledgements_are_those_of_their_packet() {
    run(async {
        let gateway = shared().await;
        let legal: [(u8, &[u8]); 6] = [
            (4, &[0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99]),
            (5, &[0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99]),
            (6, &[0, 0x92]),
            (7, &[0, 0x92]),
            (
                9,
                &[
                    0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2,
                ],
            ),
            (11, &[0, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91]),
        ];
        let connect = Connect::new(V5, "acks-reasons");
        let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
        let mut bytes = wire::subscribe(
            V5,
            1,
            &Vec::new(),
            &[("acks/reasons", 2), ("$share/g/acks/x", 1)],
        );
        let deep = "x/".repeat(40);
        bytes.extend(wire::subscribe(V5, 2, &Vec::new(), &[(&deep, 0)]));
        for (id, topic) in [
            (3, "acks/nobody"),
            (4, "acks/reasons"),
            (5, "$SYS/x"),
            (6, &deep),
        ] {
            for qos in 1..3 {
                let mut publish = Publish::new(topic, qos, "x");
                publish.packet_id = id + u16::from(qos) * 10;
                bytes.extend(wire::publish(V5, &publish));
            }
        }
        for id in [23, 24, 77] {
            bytes.extend(wire::pubrel(id));
        }
        bytes.extend(wire::unsubscribe(
            V5,
            7,
            &["acks/reasons", "acks/never", &deep],
        ));
        raw.send(&bytes).await;
        let mut frames = Vec::new();
        while frames.last().is_none_or(|last: &Frame| last.kind() != 11) {
            frames.push(raw.frame().await.unwrap());
        }
        frames.extend(raw.frames_to_pong().await);
        let mut seen = HashSet::new();
        for frame in frames {
            let reasons = match frame.kind() {
                3 => continue,
                // Behind the properties, if there are any, one for each filter.
                9 | 11 => &frame.body[3 + usize::from(frame.body[2])..],
                _ => frame.body.get(2..3).unwrap_or(&[0]),
            };
            let (_, allowed) = legal
                .iter()
                .find(|(kind, _)| *kind == frame.kind())
                .unwrap();
            assert!(!reasons.is_empty(), "{frame:02x?}");
            for reason in reasons {
                assert!(allowed.contains(reason), "{reason:#04x} in {frame:02x?}");
                seen.insert((frame.kind(), *reason));
            }
        }
        // Enough of them to mean something: granted, refused, unknown, not subscribed.
        for expected in [(9, 2), (7, 0), (7, 0x92), (11, 0), (11, 0x11)] {
            assert!(
                seen.contains(&expected),
                "{expected:x?} is not in {seen:x?}"
            );
        }
        assert!(
            seen.iter()
                .any(|(kind, reason)| *kind == 4 && *reason >= 0x80)
        );
    });
}

#[test]
fn what_was_sent_is_seen_through_although_it_expires() {
    run(async {
        let gateway = shared().await;
        let id = "acks-expired";
        let mut device = resume(&gateway, V5, id).await;
        device.subscribe(id, 2).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "acks-expired-pub").await;
        for text in ["released", "untouched"] {
            let publish = Publish::new(id, 2, text).with(property::MESSAGE_EXPIRY, Value::Four(1));
            publisher.publish(publish).await;
        }
        let one = device.next_publish().await;
        let two = device.next_publish().await;
        device.send(&wire::pubrec(one.packet_id)).await.unwrap();
        device.ping().await;
        super::pass(std::time::Duration::from_millis(1300)).await;
        drop(device);
        let mut device = resume(&gateway, V5, id).await;
        let released = |packet: &Packet| match packet {
            Packet::PubRel { packet_id, .. } => Some(*packet_id),
            _ => None,
        };
        assert_eq!(
            device.await_packet("a PUBREL", released).await,
            one.packet_id
        );
        // [MQTT-4.3.3-7]: once sent, a QoS 2 message has no expiry.
        let again = device.next_publish().await;
        assert_eq!(
            (again.text().as_str(), again.packet_id),
            ("untouched", two.packet_id)
        );
        device.send(&wire::pubcomp(one.packet_id)).await.unwrap();
        device.acknowledge(&again).await;
        device.disconnect().await;
        super::forget(&gateway, V5, id).await;
    });
}
