//! Ordinary MQTT between devices.

use std::time::Duration;

use moorline_tests::Gateway;
use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, Will, property};

use crate::support::{VERSIONS, run};

#[test]
fn every_qos_reaches_every_qos_in_both_versions() {
    run(async {
        let gateway = Gateway::start().await;
        for publisher_version in VERSIONS {
            for subscriber_version in VERSIONS {
                let mut subscribers = Vec::new();
                for granted in 0..3 {
                    let id = format!("sub-{granted}");
                    let mut one = Device::clean(gateway.mqtt(), subscriber_version, &id).await;
                    assert_eq!(one.subscribe("a/b", granted).await, granted);
                    subscribers.push((granted, one));
                }
                let mut publisher = Device::clean(gateway.mqtt(), publisher_version, "pub").await;
                for qos in 0..3 {
                    let text = format!("q{qos}");
                    assert!(
                        publisher
                            .publish(Publish::new("a/b", qos, text.clone()))
                            .await
                            < 0x80
                    );
                    for (granted, one) in &mut subscribers {
                        let got = one.take().await;
                        assert_eq!((got.topic.as_str(), got.text()), ("a/b", text.clone()));
                        assert_eq!(
                            got.qos,
                            qos.min(*granted),
                            "the lower of both [MQTT-3.8.4-8]"
                        );
                        assert!(!got.dup && !got.retain);
                    }
                }
                for (_, one) in &mut subscribers {
                    one.has_nothing().await;
                }
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn wildcards_match_as_the_specification_says() {
    run(async {
        let gateway = Gateway::start().await;
        // Filter, topics that match, topics that do not (MQTT 5.0 section 4.7).
        let cases: &[(&str, &[&str], &[&str])] = &[
            (
                "sport/tennis/player1/#",
                &[
                    "sport/tennis/player1",
                    "sport/tennis/player1/ranking",
                    "sport/tennis/player1/score/wimbledon",
                ],
                &["sport/tennis/player2", "sport/tennis"],
            ),
            ("sport/#", &["sport", "sport/"], &["sports", "Sport"]),
            ("#", &["a", "/a", "a/b/c", "é/x", "日本/語"], &[]),
            (
                "sport/tennis/+",
                &["sport/tennis/player1", "sport/tennis/"],
                &["sport/tennis/player1/ranking", "sport/tennis"],
            ),
            ("+", &["finance"], &["/finance", "a/b"]),
            ("+/+", &["/finance", "a/b"], &["finance", "a/b/c"]),
            ("/+", &["/finance"], &["finance", "a/b"]),
            (
                "+/tennis/#",
                &["sport/tennis", "sport/tennis/x/y", "/tennis"],
                &["tennis", "a/b/tennis"],
            ),
            ("a//b", &["a//b"], &["a/b"]),
        ];
        for version in VERSIONS {
            for (n, (filter, yes, no)) in cases.iter().enumerate() {
                let mut subscriber =
                    Device::clean(gateway.mqtt(), version, &format!("sub-{n}")).await;
                assert_eq!(subscriber.subscribe(filter, 0).await, 0);
                let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
                for topic in no.iter().chain(*yes) {
                    publisher.publish(Publish::new(topic, 1, *topic)).await;
                }
                for topic in *yes {
                    let got = subscriber.take().await;
                    assert_eq!(
                        got.text(),
                        *topic,
                        "{filter} takes {topic} and nothing before it"
                    );
                }
                subscriber.has_nothing().await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn unsubscribe_ends_the_delivery() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut subscriber = Device::clean(gateway.mqtt(), version, "sub").await;
            subscriber.subscribe("a", 1).await;
            subscriber.subscribe("+/b", 1).await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
            publisher.publish(Publish::new("a", 1, "1")).await;
            assert_eq!(subscriber.take().await.text(), "1");
            subscriber.unsubscribe("a").await;
            publisher.publish(Publish::new("a", 1, "2")).await;
            publisher.publish(Publish::new("a/b", 1, "3")).await;
            assert_eq!(subscriber.take().await.text(), "3");
            subscriber.has_nothing().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn retained_messages_are_given_to_new_subscriptions_until_they_are_cleared() {
    run(async {
        let mut gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
            let mut live = Device::clean(gateway.mqtt(), version, "live").await;
            live.subscribe("state/#", 1).await;
            for (topic, qos) in [("state/a", 0), ("state/b", 1), ("state/c", 2)] {
                publisher
                    .publish(Publish::new(topic, qos, topic).retained())
                    .await;
                let got = live.take().await;
                assert!(
                    !got.retain,
                    "RETAIN is for new subscriptions [MQTT-3.3.1-9]"
                );
            }
            publisher
                .publish(Publish::new("state/b", 1, "newer").retained())
                .await;
            live.take().await;
            let mut late = Device::clean(gateway.mqtt(), version, "late").await;
            late.subscribe("state/+", 2).await;
            let mut got = Vec::new();
            for _ in 0..3 {
                let one = late.take().await;
                assert!(one.retain, "{one:?}");
                got.push(one.text());
            }
            got.sort();
            assert_eq!(got, ["newer", "state/a", "state/c"]);
            late.has_nothing().await;
            for topic in ["state/a", "state/b", "state/c"] {
                publisher
                    .publish(Publish::new(topic, 1, "").retained())
                    .await;
            }
            let mut later = Device::clean(gateway.mqtt(), version, "later").await;
            later.subscribe("state/#", 2).await;
            later.has_nothing().await;
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publisher
            .publish(Publish::new("state/kept", 1, "over a restart").retained())
            .await;
        gateway.sigterm().await;
        gateway.restart().await;
        let mut late = Device::clean(gateway.mqtt(), V5, "late").await;
        late.subscribe("state/#", 1).await;
        assert_eq!(late.take().await.text(), "over a restart");
        gateway.finish().await;
    });
}

#[test]
fn retain_handling_no_local_and_retain_as_published_are_honoured() {
    run(async {
        let gateway = Gateway::start().await;
        let mut one = Device::clean(gateway.mqtt(), V5, "one").await;
        one.publish(Publish::new("r", 1, "kept").retained()).await;
        // Retain handling 2: none; 1: only for a subscription that is new.
        one.subscribe("r", 1 | (2 << 4)).await;
        one.has_nothing().await;
        one.subscribe("r", 1 | (1 << 4)).await;
        one.has_nothing().await;
        one.unsubscribe("r").await;
        one.subscribe("r", 1 | (1 << 4)).await;
        assert_eq!(one.take().await.text(), "kept");
        // No local.
        one.subscribe("mine", 1 | (1 << 2)).await;
        one.publish(Publish::new("mine", 1, "echo")).await;
        one.has_nothing().await;
        // Retain as published.
        one.subscribe("as/published", 1 | (1 << 3)).await;
        one.publish(Publish::new("as/published", 1, "x").retained())
            .await;
        assert!(one.take().await.retain);
        gateway.finish().await;
    });
}

#[test]
fn properties_of_5_0_travel_with_the_message() {
    run(async {
        let gateway = Gateway::start().await;
        let mut subscriber = Device::clean(gateway.mqtt(), V5, "sub").await;
        let identifier = vec![(property::SUBSCRIPTION_ID, Value::Var(300))];
        assert_eq!(
            subscriber.subscribe_with(&identifier, &[("a", 1)]).await,
            [1]
        );
        let mut old = Device::clean(gateway.mqtt(), V3, "old").await;
        old.subscribe("a", 1).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        let pair = |key: &str, value: &str| Value::Pair(key.into(), value.into());
        let publish = Publish::new("a", 1, "x")
            .with(property::CONTENT_TYPE, Value::Text(b"text/plain".to_vec()))
            .with(
                property::RESPONSE_TOPIC,
                Value::Text(b"answer/here".to_vec()),
            )
            .with(property::CORRELATION_DATA, Value::Text(vec![0, 1, 255]))
            .with(property::MESSAGE_EXPIRY, Value::Four(100))
            .with(property::USER_PROPERTY, pair("k", "1"))
            .with(property::USER_PROPERTY, pair("k", "2"));
        publisher.publish(publish).await;
        let got = subscriber.take().await;
        assert_eq!(
            got.property(property::CONTENT_TYPE),
            Some(&Value::Text(b"text/plain".to_vec()))
        );
        assert_eq!(
            got.property(property::RESPONSE_TOPIC),
            Some(&Value::Text(b"answer/here".to_vec()))
        );
        assert_eq!(
            got.property(property::CORRELATION_DATA),
            Some(&Value::Text(vec![0, 1, 255]))
        );
        assert_eq!(
            got.property(property::SUBSCRIPTION_ID),
            Some(&Value::Var(300))
        );
        assert!(matches!(
            got.property(property::MESSAGE_EXPIRY),
            Some(Value::Four(90..=100))
        ));
        let users: Vec<_> = got
            .properties
            .iter()
            .filter(|(id, value)| {
                *id == property::USER_PROPERTY && matches!(value, Value::Pair(k, _) if k == "k")
            })
            .map(|(_, value)| value.clone())
            .collect();
        assert_eq!(
            users,
            [pair("k", "1"), pair("k", "2")],
            "in their order [MQTT-3.3.2-18]"
        );
        assert_eq!(old.take().await.text(), "x", "3.1.1 gets the payload alone");
        gateway.finish().await;
    });
}

fn will(qos: u8, retain: bool) -> Will {
    Will {
        topic: "wills/car".into(),
        payload: b"gone".to_vec(),
        qos,
        retain,
        ..Will::default()
    }
}

#[test]
fn a_will_is_published_when_the_connection_breaks_and_not_after_a_disconnect() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut watcher = Device::clean(gateway.mqtt(), version, "watcher").await;
            watcher.subscribe("wills/#", 2).await;
            for qos in 0..3 {
                let connect = || Connect::new(version, "car").with_will(will(qos, false));
                drop(Device::connect(gateway.mqtt(), connect()).await);
                let got = watcher.take().await;
                assert_eq!((got.text().as_str(), got.qos), ("gone", qos));
                Device::connect(gateway.mqtt(), connect())
                    .await
                    .disconnect()
                    .await;
                watcher.has_nothing().await;
            }
            // A malformed packet is no proper end either.
            let mut bad = Device::connect(
                gateway.mqtt(),
                Connect::new(version, "car").with_will(will(1, false)),
            )
            .await;
            bad.send(&[0x00, 0x00]).await.unwrap();
            bad.await_close(SOON).await;
            assert_eq!(watcher.take().await.text(), "gone");
        }
        gateway.finish().await;
    });
}

#[test]
fn a_will_can_be_retained_delayed_and_asked_for_by_a_disconnect() {
    run(async {
        let gateway = Gateway::start().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "watcher").await;
        watcher.subscribe("wills/#", 1).await;
        // DISCONNECT with will message (0x04).
        let connect = Connect::new(V5, "car").with_will(will(1, true));
        Device::connect(gateway.mqtt(), connect)
            .await
            .disconnect_with(0x04, &Vec::new())
            .await;
        assert_eq!(watcher.take().await.text(), "gone");
        let mut late = Device::clean(gateway.mqtt(), V5, "late").await;
        late.subscribe("wills/#", 1).await;
        assert!(late.take().await.retain);
        // A delayed will is not published when the device is back in time.
        let delayed = |seconds| Will {
            properties: vec![(property::WILL_DELAY, Value::Four(seconds))],
            ..will(1, false)
        };
        let connect = Connect::new(V5, "car").persistent().with_will(delayed(60));
        drop(Device::connect(gateway.mqtt(), connect.clone()).await);
        let back = Device::connect(gateway.mqtt(), Connect::new(V5, "car").persistent()).await;
        back.disconnect().await;
        watcher.has_nothing().await;
        // And is published when it is not.
        let connect = Connect::new(V5, "car").persistent().with_will(delayed(1));
        let broken = std::time::Instant::now();
        drop(Device::connect(gateway.mqtt(), connect).await);
        assert_eq!(watcher.take().await.text(), "gone");
        assert!(
            broken.elapsed() >= Duration::from_millis(900),
            "after {:?}",
            broken.elapsed()
        );
        gateway.finish().await;
    });
}

#[test]
fn the_will_of_a_device_is_published_although_the_gateway_was_killed() {
    run(async {
        let mut gateway = Gateway::start().await;
        let mut watcher =
            Device::connect(gateway.mqtt(), Connect::new(V5, "watcher").persistent()).await;
        watcher.subscribe("wills/#", 1).await;
        let car = Device::connect(
            gateway.mqtt(),
            Connect::new(V3, "car").with_will(will(1, false)),
        )
        .await;
        gateway.kill9();
        drop(car);
        gateway.restart().await;
        let mut watcher =
            Device::connect(gateway.mqtt(), Connect::new(V5, "watcher").persistent()).await;
        assert_eq!(watcher.take().await.text(), "gone");
        gateway.finish().await;
    });
}

#[test]
fn a_silent_device_is_closed_after_one_and_a_half_keep_alives() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut watcher = Device::clean(gateway.mqtt(), version, "watcher").await;
            watcher.subscribe("wills/#", 0).await;
            let connect = Connect::new(version, "car")
                .keep_alive(1)
                .with_will(will(0, false));
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            let started = std::time::Instant::now();
            let reason = device.await_close(SOON).await;
            let lived = started.elapsed();
            assert!(
                lived >= Duration::from_millis(1400),
                "closed after {lived:?}"
            );
            assert!(lived < Duration::from_secs(6), "closed after {lived:?}");
            assert_eq!(
                reason,
                (version == V5).then_some(0x8D),
                "keep alive timeout"
            );
            assert_eq!(watcher.take().await.text(), "gone");
        }
        gateway.finish().await;
    });
}

#[test]
fn pings_keep_a_device_connected() {
    run(async {
        let gateway = Gateway::start().await;
        let mut device =
            Device::connect(gateway.mqtt(), Connect::new(V5, "car").keep_alive(1)).await;
        // Longer than any keep alive, each pause shorter than one and a half.
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            device.ping().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_device_without_an_id_gets_one() {
    run(async {
        let gateway = Gateway::start().await;
        let one = Device::connect(gateway.mqtt(), Connect::new(V5, "")).await;
        let assigned = one
            .connack
            .iter()
            .find(|(id, _)| *id == property::ASSIGNED_CLIENT_ID);
        assert!(
            matches!(assigned, Some((_, Value::Text(text))) if !text.is_empty()),
            "{assigned:?}"
        );
        let mut first = Device::connect(gateway.mqtt(), Connect::new(V3, "")).await;
        let mut second = Device::connect(gateway.mqtt(), Connect::new(V3, "")).await;
        first.ping().await;
        second.ping().await;
        // [MQTT-3.1.3-8]: without an id only a clean session is possible.
        let refused = Device::try_connect(gateway.mqtt(), Connect::new(V3, "").persistent()).await;
        assert!(refused.unwrap_err().contains("code: 2"));
        gateway.finish().await;
    });
}

#[test]
fn the_message_larger_than_the_device_takes_is_not_sent() {
    run(async {
        let gateway = Gateway::start().await;
        let connect =
            Connect::new(V5, "small").with(property::MAXIMUM_PACKET_SIZE, Value::Four(100));
        let mut small = Device::connect(gateway.mqtt(), connect).await;
        small.subscribe("a", 1).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publisher
            .publish(Publish::new("a", 1, vec![b'x'; 200]))
            .await;
        publisher.publish(Publish::new("a", 1, "fits")).await;
        assert_eq!(small.take().await.text(), "fits");
        gateway.finish().await;
    });
}

#[test]
fn receive_maximum_bounds_what_is_in_flight() {
    run(async {
        let gateway = Gateway::start().await;
        let connect = Connect::new(V5, "narrow").with(property::RECEIVE_MAXIMUM, Value::Two(3));
        let mut narrow = Device::connect(gateway.mqtt(), connect).await;
        let api = gateway.api();
        crate::support::push_numbered(&api, "narrow", 0..10).await;
        let mut open = Vec::new();
        for _ in 0..3 {
            open.push(narrow.next_publish().await);
        }
        narrow.has_nothing().await;
        // Each acknowledgement makes room for one more, although two others stay open.
        for number in 0..10 {
            let publish = open.remove(0);
            assert_eq!(publish.text(), number.to_string());
            narrow.send(&wire::puback(publish.packet_id)).await.unwrap();
            if number + 3 < 10 {
                open.push(narrow.next_publish().await);
            }
        }
        narrow.has_nothing().await;
        gateway.finish().await;
    });
}
