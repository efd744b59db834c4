//! Sections 3.10 and 3.11: UNSUBSCRIBE and its answer.

use moorline_tests::device::Device;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, property};

use super::raw::Raw;
use super::{forget, shared};
use crate::support::{VERSIONS, resume, run};

#[test]
fn a_filter_is_compared_character_by_character() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "unsubscribe-exact").await;
            device.subscribe("unsubscribe/exact/+", 0).await;
            for other in [
                "unsubscribe/exact/#",
                "unsubscribe/exact/a",
                "unsubscribe/Exact/+",
                "unsubscribe/exact/+/",
                "#",
            ] {
                device.unsubscribe(other).await;
                device
                    .publish(Publish::new("unsubscribe/exact/a", 0, other))
                    .await;
                assert_eq!(device.take().await.text(), other);
            }
            device.unsubscribe("unsubscribe/exact/+").await;
            device
                .publish(Publish::new("unsubscribe/exact/a", 0, "x"))
                .await;
            device.has_nothing().await;
        }
    });
}

#[test]
fn unsuback_answers_every_filter_and_also_those_nobody_subscribed_to() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let connect = Connect::new(version, "unsubscribe-codes");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            let filters = [("unsubscribe/codes/a", 0), ("unsubscribe/codes/b", 2)];
            raw.send(&wire::subscribe(version, 1, &Vec::new(), &filters))
                .await;
            raw.frame().await;
            let asked = [
                "unsubscribe/codes/b",
                "unsubscribe/never",
                "unsubscribe/codes/a",
            ];
            let expected: [&[u8]; 2] = [&[0, 0x11, 0], &[0x11, 0x11, 0x11]];
            for (round, codes) in expected.into_iter().enumerate() {
                let id = 0x0200 + round as u16;
                raw.send(&wire::unsubscribe(version, id, &asked)).await;
                let answer = raw.frame().await.unwrap();
                assert_eq!(
                    (answer.first, &answer.body[..2]),
                    (0xB0, &id.to_be_bytes()[..])
                );
                match version {
                    V3 => assert_eq!(answer.body.len(), 2),
                    _ => assert_eq!(answer.body[3 + usize::from(answer.body[2])..], *codes),
                }
                assert!(raw.frames_to_pong().await.is_empty(), "one answer");
            }
        }
    });
}

#[test]
fn delivery_that_has_begun_is_completed_after_an_unsubscribe() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            for qos in 1..3 {
                let id = format!("unsubscribe-begun-{version}-{qos}");
                let mut device = resume(&gateway, version, &id).await;
                device.subscribe(&id, qos).await;
                let mut publisher = Device::clean(gateway.mqtt(), V5, "unsubscribe-begun").await;
                publisher.publish(Publish::new(&id, qos, "begun")).await;
                let first = device.next_publish().await;
                device.unsubscribe(&id).await;
                publisher.publish(Publish::new(&id, qos, "later")).await;
                device.ping().await;
                drop(device);
                let mut device = resume(&gateway, version, &id).await;
                let again = device.take().await;
                assert_eq!((again.text().as_str(), again.dup), ("begun", true));
                assert_eq!(again.packet_id, first.packet_id);
                device.has_nothing().await;
                device.disconnect().await;
                forget(&gateway, version, &id).await;
            }
        }
    });
}

#[test]
fn nothing_new_is_added_for_a_device_that_has_unsubscribed_and_left() {
    run(async {
        let gateway = shared().await;
        let id = "unsubscribe-left";
        let connect = Connect::new(V5, id)
            .persistent()
            .with(property::RECEIVE_MAXIMUM, Value::Two(1));
        let mut device = Device::connect(gateway.mqtt(), connect.clone()).await;
        device
            .subscribe_with(
                &Vec::new(),
                &[("unsubscribe/left/a", 1), ("unsubscribe/left/b", 1)],
            )
            .await;
        device.unsubscribe("unsubscribe/left/a").await;
        device.disconnect().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "unsubscribe-left-pub").await;
        for topic in ["unsubscribe/left/a", "unsubscribe/left/b"] {
            publisher.publish(Publish::new(topic, 1, topic)).await;
        }
        let mut device = Device::connect(gateway.mqtt(), connect).await;
        assert_eq!(device.take().await.text(), "unsubscribe/left/b");
        device.has_nothing().await;
        device.disconnect().await;
        forget(&gateway, V5, id).await;
    });
}
