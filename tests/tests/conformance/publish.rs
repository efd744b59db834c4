//! Section 3.3: how a PUBLISH is passed on.

use std::time::{Duration, Instant};

use moorline_tests::device::Device;
use moorline_tests::wire::{self, Publish, V3, V5, Value, property};

use super::raw::Raw;
use super::{kept_for, pass, shared};
use crate::support::{VERSIONS, run};

const PAYLOAD_FORMAT: u8 = 0x01;

#[test]
fn dup_of_the_publisher_is_not_passed_on() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut subscriber = Device::clean(gateway.mqtt(), version, "publish-dup-sub").await;
            subscriber.subscribe("publish/dup", 2).await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "publish-dup").await;
            for qos in 1..3 {
                let mut publish = Publish::new("publish/dup", qos, "x");
                publish.dup = true;
                publisher.publish(publish).await;
                let got = subscriber.take().await;
                assert_eq!((got.dup, got.qos), (false, qos), "its first delivery here");
            }
        }
    });
}

#[test]
fn a_publish_that_is_not_allowed_is_refused_in_5_0_and_only_acknowledged_in_3_1_1() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "publish-denied-sub").await;
        watcher.subscribe("$SYS/#", 2).await;
        for version in VERSIONS {
            let mut publisher = Device::clean(gateway.mqtt(), version, "publish-denied").await;
            for qos in 0..3 {
                let reason = publisher.publish(Publish::new("$SYS/mine", qos, "x")).await;
                match (version, qos) {
                    (V3, _) | (_, 0) => assert_eq!(reason, 0),
                    _ => assert!(reason >= 0x80, "QoS {qos}: {reason:#04x}"),
                }
                publisher.ping().await;
                watcher.has_nothing().await;
            }
            if version == V3 {
                continue;
            }
            // [MQTT-4.3.3-9]: a refused identifier stands for a new message at once.
            let mut publish = Publish::new("$SYS/mine", 2, "x");
            publish.packet_id = 77;
            assert!(publisher.publish(publish.clone()).await >= 0x80);
            publisher.subscribe("publish/allowed", 0).await;
            publish.topic = "publish/allowed".into();
            assert!(publisher.publish(publish).await < 0x80);
            assert_eq!(publisher.take().await.text(), "x");
        }
    });
}

#[test]
fn the_payload_format_is_passed_on_unaltered() {
    run(async {
        let gateway = shared().await;
        let mut subscriber = Device::clean(gateway.mqtt(), V5, "publish-format-sub").await;
        subscriber.subscribe("publish/format", 1).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "publish-format").await;
        for format in [None, Some(0), Some(1)] {
            let mut publish = Publish::new("publish/format", 1, "text");
            if let Some(format) = format {
                publish = publish.with(PAYLOAD_FORMAT, Value::Byte(format));
            }
            publisher.publish(publish).await;
            let got = subscriber.take().await;
            // 0 is what its absence says.
            let said = match got.property(PAYLOAD_FORMAT) {
                Some(Value::Byte(1)) => 1,
                None | Some(Value::Byte(0)) => 0,
                other => panic!("{other:?}"),
            };
            assert_eq!(said, format.unwrap_or(0));
        }
    });
}

#[test]
fn user_properties_keep_their_order_whatever_their_names() {
    run(async {
        let gateway = shared().await;
        let mut subscriber = Device::clean(gateway.mqtt(), V5, "publish-users-sub").await;
        subscriber.subscribe("publish/users", 2).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "publish-users").await;
        let pairs = ["b=1", "a=2", "b=1", "=", "a=", "c=é", "a=2"].map(|pair| {
            let (name, value) = pair.split_once('=').unwrap();
            Value::Pair(name.into(), value.into())
        });
        for qos in 0..3 {
            let mut publish = Publish::new("publish/users", qos, "x");
            for pair in &pairs {
                publish = publish.with(property::USER_PROPERTY, pair.clone());
            }
            publisher.publish(publish).await;
            let got = subscriber.take().await;
            let users: Vec<Value> = got
                .properties
                .into_iter()
                .filter(|(id, _)| *id == property::USER_PROPERTY)
                .map(|(_, value)| value)
                .collect();
            assert_eq!(users, pairs);
        }
    });
}

#[test]
fn a_message_that_waits_grows_older_and_is_dropped_when_it_is_too_old() {
    run(async {
        let gateway = shared().await;
        let id = "publish-expiry";
        let mut away = Device::connect(gateway.mqtt(), kept_for(id, 60)).await;
        away.subscribe("publish/expiry", 1).await;
        away.disconnect().await;
        // The same for a device that is there and has no room.
        let narrow = wire::Connect::new(V5, "publish-expiry-narrow")
            .with(property::RECEIVE_MAXIMUM, Value::Two(1));
        let mut narrow = Device::connect(gateway.mqtt(), narrow).await;
        narrow.subscribe("publish/expiry", 1).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "publish-expiry-pub").await;
        let sent = Instant::now();
        for (text, seconds) in [("long", 100), ("short", 1), ("longer", 200)] {
            let publish = Publish::new("publish/expiry", 1, text)
                .with(property::MESSAGE_EXPIRY, Value::Four(seconds));
            publisher.publish(publish).await;
        }
        let forever = Publish::new("publish/expiry", 1, "forever");
        publisher.publish(forever).await;
        let first = narrow.next_publish().await;
        assert_eq!(first.text(), "long");
        pass(Duration::from_millis(1600)).await;
        narrow.acknowledge(&first).await;
        let mut back = Device::connect(gateway.mqtt(), kept_for(id, 60)).await;
        assert_eq!(back.next_publish().await.text(), "long");
        for device in [&mut narrow, &mut back] {
            let got = device.take().await;
            assert_eq!(got.text(), "longer", "the short one is gone");
            let Some(Value::Four(left)) = got.property(property::MESSAGE_EXPIRY) else {
                panic!("{got:?}");
            };
            let waited = u32::try_from(sent.elapsed().as_secs()).unwrap();
            assert!(*left <= 199, "counted down: {left}");
            assert!(*left + waited + 2 >= 200, "by the time it waited: {left}");
            let got = device.take().await;
            assert_eq!(got.text(), "forever");
            assert_eq!(got.property(property::MESSAGE_EXPIRY), None);
        }
        back.disconnect().await;
        super::forget(&gateway, V5, id).await;
    });
}

#[test]
fn a_publish_without_qos_has_no_packet_identifier_and_no_dup() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let connect = wire::Connect::new(version, "publish-bytes");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            let subscribe = wire::subscribe(version, 1, &Vec::new(), &[("t", 0)]);
            raw.send(&subscribe).await;
            raw.frame().await;
            let mut publisher = Device::clean(gateway.mqtt(), V3, "publish-bytes-pub").await;
            publisher.publish(Publish::new("t", 2, "p")).await;
            let frame = raw.frame().await.unwrap();
            let expected: &[u8] = if version == V5 {
                &[0, 1, b't', 0, b'p']
            } else {
                &[0, 1, b't', b'p']
            };
            assert_eq!((frame.first, frame.body.as_slice()), (0x30, expected));
        }
    });
}

#[test]
fn messages_of_one_publisher_arrive_in_their_order() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            for qos in 0..3 {
                let id = format!("publish-order-{version}-{qos}");
                let mut live = Device::clean(gateway.mqtt(), version, &id).await;
                live.subscribe("publish/order", qos).await;
                let kept = format!("{id}-kept");
                let mut stored = crate::support::resume(&gateway, version, &kept).await;
                stored.subscribe("publish/order", qos).await;
                let mut publisher = Device::clean(gateway.mqtt(), version, "publish-order").await;
                for number in 0..30_u8 {
                    // Sent without waiting for the acknowledgement of the one before.
                    let mut publish = Publish::new("publish/order", qos, vec![number]);
                    publish.packet_id = u16::from(number) + 1;
                    let bytes = wire::publish(version, &publish);
                    publisher.send(&bytes).await.unwrap();
                }
                for device in [&mut live, &mut stored] {
                    for number in 0..30_u8 {
                        assert_eq!(device.take().await.payload, [number]);
                    }
                    device.has_nothing().await;
                }
                stored.disconnect().await;
                super::forget(&gateway, version, &kept).await;
            }
        }
    });
}

#[test]
fn overlapping_subscriptions_deliver_with_the_highest_qos_and_every_identifier() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut subscriber = Device::clean(gateway.mqtt(), version, "publish-overlap").await;
            let filters = [
                ("publish/over/#", 2),
                ("publish/over/+", 0),
                ("publish/over/x", 1),
            ];
            for (n, (filter, qos)) in filters.iter().enumerate() {
                let identifier = if version == V5 {
                    vec![(property::SUBSCRIPTION_ID, Value::Var(n as u32 + 127))]
                } else {
                    Vec::new()
                };
                subscriber
                    .subscribe_with(&identifier, &[(*filter, *qos)])
                    .await;
            }
            let mut publisher = Device::clean(gateway.mqtt(), version, "publish-overlap-pub").await;
            for qos in 0..3 {
                publisher
                    .publish(Publish::new("publish/over/x", qos, "x"))
                    .await;
                let got = subscriber.take().await;
                assert_eq!(got.qos, qos, "the highest granted is 2");
                let mut ids: Vec<_> = got
                    .properties
                    .iter()
                    .filter(|(id, _)| *id == property::SUBSCRIPTION_ID)
                    .map(|(_, value)| value.clone())
                    .collect();
                ids.sort_by_key(|value| format!("{value:?}"));
                let expected = [127, 128, 129].map(Value::Var);
                assert_eq!(ids, if version == V5 { &expected[..] } else { &[] });
                subscriber.has_nothing().await;
            }
        }
    });
}

#[test]
fn no_local_keeps_a_message_from_its_publisher_alone() {
    run(async {
        let gateway = shared().await;
        let mut one = Device::clean(gateway.mqtt(), V5, "publish-local-1").await;
        let mut two = Device::clean(gateway.mqtt(), V5, "publish-local-2").await;
        for device in [&mut one, &mut two] {
            device.subscribe("publish/local", 1 | (1 << 2)).await;
        }
        one.publish(Publish::new("publish/local", 1, "from one"))
            .await;
        assert_eq!(two.take().await.text(), "from one");
        one.has_nothing().await;
        // A subscription that overlaps and is not so does get it.
        one.subscribe("publish/+", 0).await;
        one.publish(Publish::new("publish/local", 1, "again")).await;
        let got = one.take().await;
        assert_eq!((got.text().as_str(), got.qos), ("again", 0));
        one.has_nothing().await;
    });
}
