//! What a device and the gateway agree on in CONNECT and CONNACK, and what follows from it.

use moorline_tests::device::Device;
use moorline_tests::gateway::Options;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, Will, property};
use moorline_tests::{Gateway, eventually};

use crate::conformance::raw::Raw;
use crate::support::{VERSIONS, metric, run};

const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
const REQUEST_PROBLEM_INFORMATION: u8 = 0x17;

fn aliased(topic: &str, alias: u16, payload: &str) -> Publish {
    Publish::new(topic, 1, payload).with(property::TOPIC_ALIAS, Value::Two(alias))
}

#[test]
fn a_topic_alias_of_a_device_stands_for_its_topic_until_it_is_given_another() {
    run(async {
        let gateway = Gateway::start().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "watcher").await;
        watcher.subscribe("#", 1).await;
        let mut device = Device::clean(gateway.mqtt(), V5, "device").await;
        for (publish, topic) in [
            (aliased("first/topic", 16, "1"), "first/topic"),
            (aliased("", 16, "2"), "first/topic"),
            (aliased("second/topic", 1, "3"), "second/topic"),
            (aliased("", 16, "4"), "first/topic"),
            (aliased("third/topic", 16, "5"), "third/topic"),
            (aliased("", 16, "6"), "third/topic"),
            (aliased("", 1, "7"), "second/topic"),
        ] {
            let payload = publish.text();
            assert_eq!(device.publish(publish).await, 0);
            let got = watcher.take().await;
            assert_eq!((got.topic.as_str(), got.text()), (topic, payload));
            assert_eq!(got.property(property::TOPIC_ALIAS), None);
        }
        // Aliases end with the connection.
        let mut again = Device::clean(gateway.mqtt(), V5, "device").await;
        let publish = moorline_tests::wire::publish(V5, &aliased("", 16, "lost").with_id(1));
        again.send(&publish).await.unwrap();
        let reason = again.await_close(SOON).await;
        assert_eq!(reason, Some(0x82), "an alias that stands for nothing");
        watcher.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_takes_topic_aliases_is_sent_each_topic_once() {
    run(async {
        let gateway = Gateway::start().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        for persistent in [false, true] {
            let connect = Connect::new(V5, "narrow").with(TOPIC_ALIAS_MAXIMUM, Value::Two(2));
            let connect = if persistent {
                connect.persistent()
            } else {
                connect
            };
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            device.subscribe("of/#", 2).await;
            let mut seen = Vec::new();
            for (topic, qos) in [
                ("of/a", 0),
                ("of/a", 1),
                ("of/b", 2),
                ("of/c", 1),
                ("of/b", 0),
                ("of/a", 2),
                ("of/c", 1),
            ] {
                publisher.publish(Publish::new(topic, qos, topic)).await;
                let got = device.take().await;
                assert_eq!(got.text(), topic);
                let alias = match got.property(property::TOPIC_ALIAS) {
                    Some(Value::Two(alias)) => Some(*alias),
                    None => None,
                    other => panic!("no alias: {other:?}"),
                };
                seen.push((got.topic, alias));
            }
            let expected = [
                ("of/a", Some(1)),
                ("", Some(1)),
                ("of/b", Some(2)),
                ("of/c", None),
                ("", Some(2)),
                ("", Some(1)),
                ("of/c", None),
            ];
            let expected = expected.map(|(topic, alias)| (topic.to_owned(), alias));
            assert_eq!(seen, expected, "persistent: {persistent}");
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_new_subscription_gets_every_retained_message_however_many_there_are() {
    run(async {
        const MESSAGES: usize = 2_500;
        // A window and a queue that could not hold them, and an inbox that could not either.
        let config = "[mqtt]\nin_flight_max = 20\nqueued_messages_max = 10\n\
                      [store.inbox]\nentries_max = 100\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        for n in 0..MESSAGES {
            let qos = u8::try_from(n % 3).unwrap();
            let publish = Publish::new(&format!("kept/{n:04}"), qos, n.to_string()).retained();
            assert_eq!(publisher.publish(publish).await, 0);
        }
        for version in VERSIONS {
            for persistent in [false, true] {
                let id = format!("reader-{version}-{persistent}");
                let connect = Connect::new(version, &id);
                let connect = if persistent {
                    connect.persistent()
                } else {
                    connect
                };
                let mut device = Device::connect(gateway.mqtt(), connect).await;
                // The second filter gets its own share of them.
                let both = [("kept/#", 2), ("kept/0001", 1)];
                device.subscribe_with(&Vec::new(), &both).await;
                let mut got = vec![0; MESSAGES];
                for _ in 0..=MESSAGES {
                    let publish = device.take().await;
                    assert!(publish.retain);
                    got[publish.text().parse::<usize>().unwrap()] += 1;
                }
                got[1] -= 1;
                assert!(got.iter().all(|times| *times == 1), "{id}: {got:?}");
                device.has_nothing().await;
                device.disconnect().await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn retained_messages_go_on_where_they_stopped_when_the_device_comes_back() {
    run(async {
        let config = "[mqtt]\nin_flight_max = 5\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        for n in 0..40 {
            let publish = Publish::new(&format!("kept/{n:02}"), 1, n.to_string()).retained();
            publisher.publish(publish).await;
        }
        let connect = Connect::new(V3, "reader").persistent();
        let mut device = Device::connect(gateway.mqtt(), connect.clone()).await;
        device.subscribe("kept/#", 1).await;
        let mut got = Vec::new();
        while got.len() < 12 {
            got.push(device.take().await.text());
        }
        drop(device);
        let mut device = Device::connect(gateway.mqtt(), connect).await;
        assert!(device.session_present);
        while got.len() < 40 {
            let publish = device.take().await;
            // The connection broke: what was acknowledged last may not have arrived.
            if !got.contains(&publish.text()) {
                got.push(publish.text());
            }
        }
        let expected: Vec<String> = (0..40).map(|n| n.to_string()).collect();
        assert_eq!(got, expected);
        gateway.finish().await;
    });
}

#[test]
fn who_subscribes_again_at_once_gets_what_is_retained_again() {
    run(async {
        let gateway = Gateway::start().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        for topic in ["kept/a", "kept/b"] {
            publisher
                .publish(Publish::new(topic, 1, topic).retained())
                .await;
        }
        for version in VERSIONS {
            let connect = Connect::new(version, "reader").persistent();
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            // What waits has been read once this arrives: from now on all goes on at once.
            device.subscribe("kept/a", 1).await;
            assert_eq!(device.take().await.text(), "kept/a");
            let subscribe = |id| wire::subscribe(version, id, &Vec::new(), &[("kept/#", 1)]);
            let again = [subscribe(101), subscribe(102)].concat();
            device.send(&again).await.unwrap();
            let mut got = Vec::new();
            for _ in 0..4 {
                got.push(device.take().await.text());
            }
            assert_eq!(got, ["kept/a", "kept/b", "kept/a", "kept/b"]);
            device.has_nothing().await;
            device.unsubscribe("kept/a").await;
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_filter_that_matches_one_of_very_many_retained_messages_gets_it() {
    run(async {
        const MESSAGES: usize = 10_000;
        let gateway = Gateway::start().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        let mut all = Vec::new();
        for n in 0..MESSAGES {
            let publish = Publish::new(&format!("many/{n:05}"), 0, n.to_string()).retained();
            all.extend(wire::publish(V5, &publish));
        }
        publisher.send(&all).await.unwrap();
        let rare = Publish::new("z/rare", 1, "rare").retained();
        assert_eq!(publisher.publish(rare).await, 0);
        for persistent in [false, true] {
            let connect = Connect::new(V5, "reader");
            let connect = if persistent {
                connect.persistent()
            } else {
                connect
            };
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            device.subscribe("+/rare", 1).await;
            assert_eq!(device.take().await.text(), "rare");
            device.subscribe("many/#", 0).await;
            for n in 0..MESSAGES {
                assert_eq!(device.take().await.text(), n.to_string());
            }
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn what_cannot_be_retained_any_more_is_refused_to_who_can_be_told() {
    run(async {
        let config = "[mqtt]\nretained_messages_max = 2\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "watcher").await;
        watcher.subscribe("k/#", 1).await;
        let mut device = Device::clean(gateway.mqtt(), V5, "device").await;
        let mut old = Device::clean(gateway.mqtt(), V3, "old").await;
        for topic in ["k/1", "k/2", "k/2"] {
            assert_eq!(
                device.publish(Publish::new(topic, 1, "x").retained()).await,
                0
            );
        }
        assert_eq!(
            device.publish(Publish::new("k/3", 1, "x").retained()).await,
            0x97
        );
        assert_eq!(
            device.publish(Publish::new("k/3", 2, "x").retained()).await,
            0x97
        );
        old.publish(Publish::new("k/4", 1, "x").retained()).await;
        let mut topics = Vec::new();
        for _ in 0..4 {
            topics.push(watcher.take().await.topic);
        }
        assert_eq!(topics, ["k/1", "k/2", "k/2", "k/4"]);
        watcher.has_nothing().await;
        // A removed one makes room.
        device.publish(Publish::new("k/1", 1, "").retained()).await;
        assert_eq!(
            device.publish(Publish::new("k/3", 1, "x").retained()).await,
            0
        );
        let metrics = gateway.metrics().await;
        let dropped = metrics
            .lines()
            .find(|line| line.contains("not_retained"))
            .and_then(|line| line.rsplit(' ').next());
        assert_eq!(dropped, Some("1"), "{metrics}");
        gateway.finish().await;
    });
}

#[test]
fn refusals_say_why_only_to_a_device_that_wants_to_know() {
    run(async {
        let gateway = Gateway::start().await;
        for wants in [true, false] {
            let connect = Connect::new(V5, "curious")
                .with(REQUEST_PROBLEM_INFORMATION, Value::Byte(wants.into()));
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            let publish = Publish::new("$not/yours", 1, "x").with_id(7);
            raw.send(&moorline_tests::wire::publish(V5, &publish)).await;
            let puback = raw.frame().await.expect("a PUBACK");
            assert_eq!((puback.first, &puback.body[..3]), (0x40, &[0, 7, 0x90][..]));
            let text = String::from_utf8_lossy(&puback.body[3..]).into_owned();
            assert_eq!(text.contains("begin with $"), wants, "{text:?}");
            assert_eq!(puback.body.len() == 3, !wants);
            let filter = vec!["x"; 40].join("/");
            let filters = [("fine", 1), (filter.as_str(), 1)];
            raw.send(&moorline_tests::wire::subscribe(
                V5,
                8,
                &Vec::new(),
                &filters,
            ))
            .await;
            let suback = raw.frame().await.expect("a SUBACK");
            let text = String::from_utf8_lossy(&suback.body).into_owned();
            assert_eq!(text.contains("more levels"), wants, "{text:?}");
            assert_eq!(suback.body[suback.body.len() - 2..], [1, 0x8F]);
        }
        // What fits nowhere is left out, and what must be said is said.
        let connect =
            Connect::new(V5, "narrow").with(property::MAXIMUM_PACKET_SIZE, Value::Four(30));
        let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
        let publish = Publish::new("$not/yours", 1, "x").with_id(7);
        raw.send(&moorline_tests::wire::publish(V5, &publish)).await;
        assert_eq!(raw.frame().await.expect("a PUBACK").body, [0, 7, 0x90]);
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_takes_no_packet_as_large_as_its_answer_is_not_sent_it() {
    run(async {
        let gateway = Gateway::start().await;
        let narrow = |bytes| {
            Connect::new(V5, "narrow").with(property::MAXIMUM_PACKET_SIZE, Value::Four(bytes))
        };
        let mut raw = Raw::open(gateway.mqtt()).await;
        raw.send(&moorline_tests::wire::connect(&narrow(8))).await;
        let connack = raw.frame().await.expect("a CONNACK");
        assert_eq!(connack.body, [0, 0x95, 0], "packet too large, and no more");
        let mut raw = Raw::open(gateway.mqtt()).await;
        raw.send(&moorline_tests::wire::connect(&narrow(4))).await;
        assert_eq!(raw.frame().await, None, "not even that fits");
        let mut device = Device::connect(gateway.mqtt(), narrow(40)).await;
        let filters: Vec<String> = (0..50).map(|n| format!("f/{n}")).collect();
        let filters: Vec<_> = filters.iter().map(|filter| (filter.as_str(), 0)).collect();
        let subscribe = moorline_tests::wire::subscribe(V5, 1, &Vec::new(), &filters);
        device.send(&subscribe).await.unwrap();
        let reason = device.await_close(SOON).await;
        assert_eq!(reason, Some(0x95));
        gateway.finish().await;
    });
}

#[test]
fn a_keep_alive_beyond_the_servers_is_shortened_for_who_can_be_told() {
    run(async {
        let config = "[mqtt]\nkeep_alive_max_s = 60\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        for (asked, told) in [(0, Some(60)), (61, Some(60)), (60, None), (5, None)] {
            let connect = Connect::new(V5, "device").keep_alive(asked);
            let device = Device::connect(gateway.mqtt(), connect).await;
            let server_keep_alive = device
                .connack
                .iter()
                .find(|(id, _)| *id == property::SERVER_KEEP_ALIVE)
                .map(|(_, value)| value.clone());
            assert_eq!(server_keep_alive, told.map(Value::Two), "asked for {asked}");
        }
        gateway.finish().await;
    });
}

#[test]
fn a_will_goes_only_where_a_device_may_publish() {
    run(async {
        let gateway = Gateway::start().await;
        let deep = vec!["x"; 33].join("/");
        for topic in ["$SYS/mine", "$share/g/x", deep.as_str()] {
            for (version, code) in [(V5, 0x90), (V3, 5)] {
                let will = Will {
                    topic: topic.to_owned(),
                    ..Will::default()
                };
                let connect = Connect::new(version, "device").with_will(will);
                let mut raw = Raw::open(gateway.mqtt()).await;
                raw.send(&moorline_tests::wire::connect(&connect)).await;
                let connack = raw.frame().await.expect("a CONNACK");
                assert_eq!(connack.body[..2], [0, code], "{topic} in {version}");
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn a_session_in_its_last_connection_keeps_its_order() {
    run(async {
        let gateway = Gateway::start_with(Options::config("[mqtt]\nin_flight_max = 4\n")).await;
        let persistent = Connect::new(V5, "car").persistent();
        let mut device = Device::connect(gateway.mqtt(), persistent.clone()).await;
        device.subscribe("news", 1).await;
        device.disconnect().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        for n in 0..20 {
            publisher
                .publish(Publish::new("news", 1, n.to_string()))
                .await;
        }
        // No expiry interval: the session ends with this connection.
        let last = Connect {
            clean_start: false,
            ..Connect::new(V5, "car")
        };
        let mut device = Device::connect(gateway.mqtt(), last).await;
        assert!(device.session_present);
        for n in 20..40 {
            publisher
                .publish(Publish::new("news", 1, n.to_string()))
                .await;
        }
        for n in 0..40 {
            assert_eq!(device.take().await.text(), n.to_string());
        }
        device.disconnect().await;
        let device = Device::connect(gateway.mqtt(), persistent).await;
        assert!(!device.session_present);
        gateway.finish().await;
    });
}

#[test]
fn a_slow_reader_without_a_session_keeps_what_the_policy_says() {
    run(async {
        for (policy, kept) in [
            ("drop-oldest", [0, 1, 7, 8, 9]),
            ("drop-new", [0, 1, 2, 3, 4]),
        ] {
            let config = format!(
                "[mqtt]\nin_flight_max = 2\nqueued_messages_max = 3\nqueued_overflow = \"{policy}\"\n"
            );
            let gateway = Gateway::start_with(Options::config(&config).one_node()).await;
            let mut slow = Device::clean(gateway.mqtt(), V5, "slow").await;
            slow.subscribe("news", 1).await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            for n in 0..10 {
                publisher
                    .publish(Publish::new("news", 1, n.to_string()))
                    .await;
            }
            for n in kept {
                assert_eq!(slow.take().await.text(), n.to_string(), "{policy}");
            }
            slow.has_nothing().await;
            eventually(SOON, "the drops are counted", || async {
                let text = gateway.metrics().await;
                let dropped = metric(&text, "moorline_mqtt_messages_dropped_total")?;
                (dropped >= 5.0).then_some(())
            })
            .await;
            gateway.finish().await;
        }
    });
}

#[test]
fn a_connect_may_be_smaller_than_what_follows_it() {
    run(async {
        let config = "[mqtt]\nconnect_bytes_max = 1000\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let large = Connect::new(V5, &"x".repeat(1_000));
        let mut raw = Raw::open(gateway.mqtt()).await;
        raw.send(&moorline_tests::wire::connect(&large)).await;
        assert_eq!(raw.frame().await, None, "closed without an answer");
        let mut device = Device::clean(gateway.mqtt(), V5, &"x".repeat(900)).await;
        device.subscribe("big", 1).await;
        let publish = Publish::new("big", 1, "y".repeat(500_000));
        assert_eq!(device.publish(publish).await, 0);
        assert_eq!(device.take().await.payload.len(), 500_000);
        gateway.finish().await;
    });
}
