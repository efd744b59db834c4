//! Sections 3.8 and 3.9: SUBSCRIBE and its answer.

use moorline_tests::device::Device;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, property};

use super::raw::Raw;
use super::shared;
use crate::support::{VERSIONS, run};

#[test]
fn suback_has_a_code_for_each_filter_in_their_order() {
    run(async {
        let gateway = shared().await;
        let deep = "x/".repeat(60);
        for version in VERSIONS {
            let id = format!("subscribe-codes-{version}");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &Connect::new(version, &id)).await;
            // A filter with more levels than are taken is refused, the others are not.
            let filters = [
                ("subscribe/codes/2", 2),
                ("subscribe/codes/0", 0),
                (deep.as_str(), 1),
                ("subscribe/codes/1", 1),
                ("subscribe/codes/2", 1),
            ];
            raw.send(&wire::subscribe(version, 0xABCD, &Vec::new(), &filters))
                .await;
            let frame = raw.frame().await.unwrap();
            assert_eq!((frame.first, &frame.body[..2]), (0x90, &[0xAB, 0xCD][..]));
            let codes = match version {
                V3 => &frame.body[2..],
                _ => &frame.body[3 + usize::from(frame.body[2])..],
            };
            assert_eq!(codes.len(), 5);
            assert_eq!((codes[0], codes[1], codes[3], codes[4]), (2, 0, 1, 1));
            match version {
                V3 => assert_eq!(codes[2], 0x80, "the one code for a failure"),
                _ => assert_eq!(codes[2], 0x8F, "topic filter invalid"),
            }
        }
    });
}

#[test]
fn many_filters_in_one_subscribe_are_many_subscriptions() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "subscribe-many").await;
            // The last of a filter that stands twice is the one that holds.
            let filters = [
                ("subscribe/many/a", 2),
                ("subscribe/many/b", 1),
                ("subscribe/many/a", 0),
            ];
            let codes = device.subscribe_with(&Vec::new(), &filters).await;
            assert_eq!(codes, [2, 1, 0]);
            for (topic, granted) in [("subscribe/many/b", 1), ("subscribe/many/a", 0)] {
                device.publish(Publish::new(topic, 2, topic)).await;
                let got = device.take().await;
                assert_eq!((got.text().as_str(), got.qos), (topic, granted));
            }
            device.has_nothing().await;
        }
    });
}

#[test]
fn a_repeated_filter_replaces_its_subscription() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "subscribe-replace").await;
            for granted in [2, 0, 1] {
                assert_eq!(
                    device.subscribe("subscribe/replace", granted).await,
                    granted
                );
                device
                    .publish(Publish::new("subscribe/replace", 2, "x"))
                    .await;
                assert_eq!(device.take().await.qos, granted);
                device.has_nothing().await;
            }
        }
        // Identifier and options are replaced with it.
        let mut device = Device::clean(gateway.mqtt(), V5, "subscribe-replace").await;
        for identifier in [Some(7), Some(268_435_455), None] {
            let properties = identifier
                .map(|id| (property::SUBSCRIPTION_ID, Value::Var(id)))
                .into_iter()
                .collect();
            device
                .subscribe_with(&properties, &[("subscribe/replace", 1)])
                .await;
            device
                .publish(Publish::new("subscribe/replace", 1, "x"))
                .await;
            let got = device.take().await;
            let said = got.property(property::SUBSCRIPTION_ID);
            assert_eq!(said, identifier.map(Value::Var).as_ref());
        }
        // No Local and Retain As Published.
        device.subscribe("subscribe/replace", 1 | 4).await;
        device
            .publish(Publish::new("subscribe/replace", 1, "x"))
            .await;
        device.has_nothing().await;
        device.subscribe("subscribe/replace", 1 | 8).await;
        device
            .publish(Publish::new("subscribe/replace", 1, "").retained())
            .await;
        assert!(device.take().await.retain);
    });
}

#[test]
fn replacing_a_subscription_loses_nothing() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            for persistent in [false, true] {
                let id = format!("subscribe-flow-{version}-{persistent}");
                let connect = Connect::new(version, &id);
                let connect = if persistent {
                    connect.persistent()
                } else {
                    connect
                };
                let mut device = Device::connect(gateway.mqtt(), connect).await;
                device.subscribe(&id, 1).await;
                let publishing = {
                    let (address, id) = (gateway.mqtt(), id.clone());
                    tokio::spawn(async move {
                        let name = format!("{id}-pub");
                        let mut publisher = Device::clean(address, V5, &name).await;
                        for n in 0..100_u8 {
                            publisher.publish(Publish::new(&id, 1, vec![n])).await;
                        }
                    })
                };
                for _ in 0..20 {
                    device.subscribe(&id, 1).await;
                }
                for n in 0..100_u8 {
                    assert_eq!(device.take().await.payload, [n]);
                }
                device.has_nothing().await;
                publishing.await.unwrap();
                device.disconnect().await;
                super::forget(&gateway, version, &id).await;
            }
        }
    });
}

#[test]
fn retain_as_published_and_retain_handling_are_those_of_each_subscription() {
    run(async {
        let gateway = shared().await;
        let mut device = Device::clean(gateway.mqtt(), V5, "subscribe-options").await;
        device
            .publish(Publish::new("subscribe/options", 1, "kept").retained())
            .await;
        // QoS 1, Retain As Published, Retain Handling: what is sent at once and what later.
        for handling in 0..3_u8 {
            for as_published in [0, 8] {
                device.unsubscribe("subscribe/options").await;
                for is_new in [true, false] {
                    device
                        .subscribe("subscribe/options", 1 | as_published | (handling << 4))
                        .await;
                    if handling == 0 || (handling == 1 && is_new) {
                        let got = device.take().await;
                        assert_eq!((got.text().as_str(), got.retain), ("kept", true));
                    }
                    device.has_nothing().await;
                    for retain in [false, true] {
                        let mut publish = Publish::new("subscribe/options", 1, "kept");
                        publish.retain = retain;
                        device.publish(publish).await;
                        assert_eq!(device.take().await.retain, retain && as_published > 0);
                    }
                }
            }
        }
        device
            .publish(Publish::new("subscribe/options", 1, "").retained())
            .await;
    });
}
