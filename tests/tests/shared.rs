//! Shared subscriptions (MQTT 5.0 section 4.8.2): one member of a group gets each message, and
//! another one does when that member leaves.

use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::gateway::Options;
use moorline_tests::others::{Running, mosquitto};
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, property};
use moorline_tests::{Gateway, eventually};

use crate::support::{VERSIONS, await_waiting, metric, resume, run, waiting};

const FILTER: &str = "$share/g/job/+";

/// A member with a session that ends with its connection.
async fn member(gateway: &Gateway, version: u8, id: &str, qos: u8) -> Device {
    let mut device = Device::clean(gateway.mqtt(), version, id).await;
    assert_eq!(device.subscribe(FILTER, qos).await, qos, "granted");
    device
}

/// A member with a persistent session.
async fn lasting(gateway: &Gateway, version: u8, id: &str, qos: u8) -> Device {
    let mut device = resume(gateway, version, id).await;
    assert_eq!(device.subscribe(FILTER, qos).await, qos, "granted");
    device
}

async fn publish(publisher: &mut Device, qos: u8, numbers: std::ops::Range<usize>) {
    for number in numbers {
        let text = number.to_string();
        let code = publisher.publish(Publish::new("job/x", qos, text)).await;
        assert!(code < 0x80, "refused with {code:#04x}");
    }
}

async fn take_texts(device: &mut Device, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    for _ in 0..count {
        texts.push(device.take().await.text());
    }
    texts
}

fn session_expiry(version: u8, id: &str, seconds: u32) -> Connect {
    Connect::new(version, id).with(property::SESSION_EXPIRY, Value::Four(seconds))
}

#[test]
fn members_take_turns_whatever_version_they_speak() {
    run(async {
        let gateway = Gateway::start().await;
        for qos in 0..3 {
            let mut members = Vec::new();
            for (n, version) in [V3, V5, V5].into_iter().enumerate() {
                members.push(member(&gateway, version, &format!("m{n}"), 2).await);
            }
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            publish(&mut publisher, qos, 0..12).await;
            let mut all = Vec::new();
            for one in &mut members {
                let texts = take_texts(one, 4).await;
                let numbers: Vec<usize> = texts.iter().map(|t| t.parse().unwrap()).collect();
                assert!(numbers.is_sorted(), "in the order of the publisher");
                all.extend(numbers);
            }
            for one in &mut members {
                one.has_nothing().await;
            }
            all.sort_unstable();
            assert_eq!(all, (0..12).collect::<Vec<_>>(), "each message once");
        }
        gateway.finish().await;
    });
}

#[test]
fn a_member_gets_its_own_qos_identifier_and_retain_flag() {
    run(async {
        let gateway = Gateway::start().await;
        let mut device = Device::clean(gateway.mqtt(), V5, "m").await;
        let absent_or_true = device
            .connack
            .iter()
            .all(|(id, value)| *id != 0x2A || *value == Value::Byte(1));
        assert!(absent_or_true, "shared subscriptions are announced");
        let retain_as_published = 0x08;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publisher
            .publish(Publish::new("job/x", 1, "old").retained())
            .await;
        for (granted, id) in [(0, 7), (1, 8), (2, 9)] {
            let properties = vec![(property::SUBSCRIPTION_ID, Value::Var(id))];
            let options = granted | retain_as_published;
            let codes = device
                .subscribe_with(&properties, &[(FILTER, options)])
                .await;
            assert_eq!(codes, [granted]);
            device.has_nothing().await;
            for qos in 0..3 {
                publisher
                    .publish(Publish::new("job/x", qos, "x").retained())
                    .await;
                let got = device.take().await;
                assert_eq!(got.qos, qos.min(granted), "[MQTT-4.8.2-3]");
                assert_eq!(
                    got.property(property::SUBSCRIPTION_ID),
                    Some(&Value::Var(id)),
                    "that of the last SUBSCRIBE"
                );
                assert!(got.retain && !got.dup);
            }
            device.has_nothing().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_message_that_no_member_takes_is_not_offered_to_all_of_a_large_group() {
    run(async {
        const MEMBERS: usize = 40;
        let gateway = Gateway::start().await;
        let mut members = Vec::new();
        for n in 0..MEMBERS {
            let connect = Connect::new(V5, &format!("m{n}"));
            let connect = connect.with(property::MAXIMUM_PACKET_SIZE, Value::Four(64));
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            assert_eq!(device.subscribe(FILTER, 1).await, 1);
            members.push(device);
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publisher
            .publish(Publish::new("job/x", 1, vec![b'x'; 100]))
            .await;
        let text = gateway.metrics().await;
        let line = text
            .lines()
            .find(|line| line.contains("larger_than_maximum_packet_size"))
            .expect("a count of what was too large");
        let offers = metric(line, line.split('{').next().unwrap_or_default()).unwrap();
        assert!((1.0..MEMBERS as f64 / 2.0).contains(&offers), "{line}");
        // Who can have it does.
        publish(&mut publisher, 1, 0..MEMBERS).await;
        for device in &mut members {
            device.take().await;
            device.has_nothing().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn retained_messages_are_not_sent_on_a_shared_subscribe() {
    run(async {
        let gateway = Gateway::start().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publisher
            .publish(Publish::new("job/x", 1, "kept").retained())
            .await;
        for version in VERSIONS {
            let mut clean = member(&gateway, version, "clean", 1).await;
            let mut kept = lasting(&gateway, version, "kept", 1).await;
            clean.has_nothing().await;
            kept.has_nothing().await;
            kept.subscribe("job/x", 0).await;
            assert_eq!(kept.take().await.text(), "kept", "an ordinary one does");
            kept.unsubscribe("job/x").await;
        }
        gateway.finish().await;
    });
}

#[test]
fn groups_and_ordinary_subscriptions_each_get_a_copy() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut one = Device::clean(gateway.mqtt(), version, "one").await;
            for filter in ["job/#", FILTER, "$share/g/job/x", "$share/h/job/+"] {
                assert_eq!(one.subscribe(filter, 1).await, 1);
            }
            let mut other = Device::clean(gateway.mqtt(), version, "other").await;
            other.subscribe("$share/h/job/+", 1).await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
            publish(&mut publisher, 1, 0..2).await;
            let mut texts = take_texts(&mut one, 7).await;
            texts.sort_unstable();
            let zeros = texts.iter().filter(|text| *text == "0").count();
            assert!((3..=4).contains(&zeros), "one copy a group: {texts:?}");
            other.take().await;
            one.has_nothing().await;
            other.has_nothing().await;

            // Leaving one group by its exact text leaves the others alone.
            one.unsubscribe("$share/h/job/+").await;
            one.unsubscribe("job/+").await;
            publish(&mut publisher, 1, 2..4).await;
            assert_eq!(take_texts(&mut other, 2).await, ["2", "3"]);
            assert_eq!(take_texts(&mut one, 6).await.len(), 6);
            one.unsubscribe("job/#").await;
            publish(&mut publisher, 1, 4..5).await;
            assert_eq!(take_texts(&mut one, 2).await, ["4", "4"]);
            one.has_nothing().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_malformed_shared_filter_or_no_local_ends_the_connection_with_its_reason() {
    run(async {
        let gateway = Gateway::start().await;
        let bad = [
            "$share//x",
            "$share/a+/x",
            "$share/#/x",
            "$share/g",
            "$share/g/",
        ];
        for filter in bad {
            for version in VERSIONS {
                let mut device = Device::clean(gateway.mqtt(), version, "bad").await;
                let bytes = wire::subscribe(version, 1, &Vec::new(), &[(filter, 0)]);
                device.send(&bytes).await.unwrap();
                let reason = device.await_close(Duration::from_secs(5)).await;
                let expected = (version == V5).then_some(0x8F);
                assert_eq!(reason, expected, "{filter} [MQTT-4.8.2-1] [MQTT-4.8.2-2]");
            }
        }
        let no_local = 0x04;
        let mut device = Device::clean(gateway.mqtt(), V5, "no-local").await;
        let bytes = wire::subscribe(V5, 1, &Vec::new(), &[(FILTER, no_local)]);
        device.send(&bytes).await.unwrap();
        let reason = device.await_close(Duration::from_secs(5)).await;
        assert_eq!(reason, Some(0x82), "[MQTT-3.8.3-4]");
        // A name that only begins alike is an ordinary filter.
        let mut device = Device::clean(gateway.mqtt(), V5, "alike").await;
        assert_eq!(device.subscribe("$shared/g/x", 1).await, 1);
        gateway.finish().await;
    });
}

#[test]
fn the_publisher_may_be_a_member_and_device_topics_are_nobodys() {
    run(async {
        let gateway = Gateway::start().await;
        let mut thief = Device::clean(gateway.mqtt(), V5, "thief").await;
        for filter in ["$share/g/#", "$share/g/d/#", "$share/g/d/owner/push"] {
            thief.subscribe(filter, 1).await;
        }
        let mut owner = Device::clean(gateway.mqtt(), V5, "owner").await;
        gateway.api().push_text("owner", "pushed").await;
        assert_eq!(owner.take().await.text(), "pushed");
        thief
            .publish(Publish::new("d/owner/push", 1, "published"))
            .await;
        assert_eq!(owner.take().await.text(), "published");
        thief.has_nothing().await;
        thief.publish(Publish::new("own", 1, "own")).await;
        assert_eq!(thief.take().await.text(), "own");
        gateway.finish().await;
    });
}

#[test]
fn a_member_without_room_is_left_out_until_it_has_room() {
    run(async {
        let gateway = Gateway::start().await;
        let narrow = Connect::new(V5, "slow").with(property::RECEIVE_MAXIMUM, Value::Two(2));
        let mut slow = Device::connect(gateway.mqtt(), narrow).await;
        slow.subscribe(FILTER, 1).await;
        let mut quick = member(&gateway, V5, "quick", 1).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publish(&mut publisher, 1, 0..20).await;
        assert_eq!(take_texts(&mut quick, 18).await.len(), 18);
        let (first, second) = (slow.next_publish().await, slow.next_publish().await);
        slow.has_nothing().await;
        slow.acknowledge(&first).await;
        slow.acknowledge(&second).await;
        slow.ping().await;
        publish(&mut publisher, 1, 20..24).await;
        assert_eq!(take_texts(&mut slow, 2).await.len(), 2);
        assert_eq!(take_texts(&mut quick, 2).await.len(), 2);
        gateway.finish().await;
    });
}

#[test]
fn what_a_clean_session_had_not_acknowledged_goes_to_another_member() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let narrow = Connect::new(V5, "leaver").with(property::RECEIVE_MAXIMUM, Value::Two(2));
            let mut leaver = Device::connect(gateway.mqtt(), narrow).await;
            leaver.subscribe(FILTER, 2).await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
            // Two in flight, the rest waits for room.
            publish(&mut publisher, 1, 0..1).await;
            publish(&mut publisher, 2, 1..4).await;
            publish(&mut publisher, 1, 4..6).await;
            assert_eq!(leaver.next_publish().await.text(), "0");
            assert_eq!(leaver.next_publish().await.text(), "1");
            let mut heir = member(&gateway, version, "heir", 2).await;
            heir.has_nothing().await;
            drop(leaver);
            // "1" was being sent at QoS 2: it is nobody else's [MQTT-4.8.2-5].
            let mut qos = Vec::new();
            for expected in ["0", "2", "3", "4", "5"] {
                let got = heir.take().await;
                assert!(!got.dup, "the first time for this device");
                assert_eq!(got.text(), expected);
                qos.push(got.qos);
            }
            assert_eq!(qos, [1, 2, 2, 1, 1]);
            heir.has_nothing().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn what_a_member_rejects_is_offered_to_nobody_else() {
    run(async {
        let gateway = Gateway::start().await;
        for persistent in [false, true] {
            let mut refuser = if persistent {
                lasting(&gateway, V5, "refuser", 2).await
            } else {
                member(&gateway, V5, "refuser", 2).await
            };
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            publish(&mut publisher, 1, 0..1).await;
            publish(&mut publisher, 2, 1..2).await;
            let (first, second) = (refuser.next_publish().await, refuser.next_publish().await);
            let mut other = member(&gateway, V5, "other", 2).await;
            refuser
                .send(&wire::puback_with(first.packet_id, 0x83))
                .await
                .unwrap();
            let pubrec = wire::packet(
                0x50,
                &[second.packet_id.to_be_bytes().as_slice(), &[0x97, 0]].concat(),
            );
            refuser.send(&pubrec).await.unwrap();
            refuser.ping().await;
            let now = vec![(property::SESSION_EXPIRY, Value::Four(0))];
            refuser.disconnect_with(0, &now).await;
            publish(&mut publisher, 1, 2..3).await;
            assert_eq!(other.take().await.text(), "2", "[MQTT-4.8.2-6]");
            other.has_nothing().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn an_absent_member_gets_nothing_while_another_is_there_and_its_share_when_none_is() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        for version in VERSIONS {
            for id in ["a", "b"] {
                lasting(&gateway, version, id, 1).await.disconnect().await;
            }
            let mut here = lasting(&gateway, version, "here", 1).await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
            publish(&mut publisher, 1, 0..10).await;
            assert_eq!(take_texts(&mut here, 10).await.len(), 10);
            here.unsubscribe(FILTER).await;
            publish(&mut publisher, 1, 10..20).await;
            publish(&mut publisher, 0, 99..100).await;
            for id in ["a", "b"] {
                await_waiting(&api, id, 5).await;
                let mut back = resume(&gateway, version, id).await;
                assert!(back.session_present);
                assert_eq!(take_texts(&mut back, 5).await.len(), 5);
                back.has_nothing().await;
                back.unsubscribe(FILTER).await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn what_waited_for_a_persistent_session_goes_to_another_member_when_it_ends() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        // By a clean start, by its expiry, by DISCONNECT with expiry 0.
        for (round, way) in ["clean start", "expiry", "disconnect"].iter().enumerate() {
            let id = format!("leaver-{round}");
            let expiry_s = if *way == "expiry" { 1 } else { 1000 };
            let connect =
                session_expiry(V5, &id, expiry_s).with(property::RECEIVE_MAXIMUM, Value::Two(2));
            let mut leaver = Device::connect(gateway.mqtt(), connect).await;
            leaver.subscribe(FILTER, 2).await;
            leaver.subscribe("own", 1).await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            publish(&mut publisher, 1, 0..1).await;
            publish(&mut publisher, 2, 1..3).await;
            publish(&mut publisher, 1, 3..4).await;
            publisher.publish(Publish::new("own", 1, "own")).await;
            assert_eq!(leaver.next_publish().await.text(), "0");
            assert_eq!(leaver.next_publish().await.text(), "1");
            await_waiting(&api, &id, 5).await;
            // One heir is away, so that it has them in its inbox.
            let mut heir = lasting(&gateway, V5, "heir", 2).await;
            if round != 1 {
                heir.disconnect().await;
                heir = Device::clean(gateway.mqtt(), V5, "nobody").await;
            }
            match *way {
                "clean start" => {
                    drop(leaver);
                    let mut again = Device::clean(gateway.mqtt(), V5, &id).await;
                    assert!(!again.session_present);
                    again.has_nothing().await;
                }
                "expiry" => drop(leaver),
                _ => {
                    let now = vec![(property::SESSION_EXPIRY, Value::Four(0))];
                    leaver.disconnect_with(0, &now).await;
                }
            }
            await_waiting(&api, &id, 0).await;
            if round != 1 {
                await_waiting(&api, "heir", 3).await;
                heir = resume(&gateway, V5, "heir").await;
            }
            let mut got = Vec::new();
            for _ in 0..3 {
                let one = heir.take().await;
                assert!(!one.dup, "the first time for this device");
                got.push((one.text(), one.qos));
            }
            let expected = [("0", 1), ("2", 2), ("3", 1)];
            let expected = expected.map(|(text, qos)| (text.to_owned(), qos));
            assert_eq!(got, expected, "after {way} [MQTT-4.8.2-5]");
            heir.has_nothing().await;
            heir.unsubscribe(FILTER).await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_persistent_member_that_comes_back_completes_what_it_was_sent() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut member_a = lasting(&gateway, version, "a", 2).await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
            publish(&mut publisher, 2, 0..2).await;
            let first = member_a.next_publish().await;
            let second = member_a.next_publish().await;
            member_a
                .send(&wire::pubrec(second.packet_id))
                .await
                .unwrap();
            member_a.ping().await;
            drop(member_a);
            let mut other = lasting(&gateway, version, "b", 2).await;
            publish(&mut publisher, 2, 2..3).await;
            // [MQTT-4.8.2-4].
            let mut back = resume(&gateway, version, "a").await;
            let again = back.next_publish().await;
            assert_eq!((again.text(), again.dup), ("0".into(), true));
            assert_eq!(again.packet_id, first.packet_id);
            back.acknowledge(&again).await;
            back.await_packet("the PUBREL of the second", |packet| match packet {
                wire::Packet::PubRel { packet_id, .. } if *packet_id == second.packet_id => {
                    Some(())
                }
                _ => None,
            })
            .await;
            back.send(&wire::pubcomp(second.packet_id)).await.unwrap();
            back.has_nothing().await;
            assert_eq!(other.take().await.text(), "2");
            other.has_nothing().await;
            for mut one in [back, other] {
                one.unsubscribe(FILTER).await;
                one.disconnect().await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn a_full_inbox_sends_the_message_to_another_member() {
    run(async {
        for policy in ["reject", "drop-new"] {
            let config = format!("[store.inbox]\nentries_max = 3\noverflow = \"{policy}\"\n");
            let gateway = Gateway::start_with(Options::config(&config)).await;
            for id in ["a", "b"] {
                lasting(&gateway, V5, id, 1).await.disconnect().await;
            }
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            let api = gateway.api();
            // Only "a" is at its limit at first.
            for n in 0..3 {
                api.push_text("a", &n.to_string()).await;
            }
            publish(&mut publisher, 1, 0..3).await;
            assert_eq!(waiting(&api, "a").await, 3);
            assert_eq!(waiting(&api, "b").await, 3, "with {policy}");
            // Nobody has room: the declared policy of inboxes, not the publisher's concern.
            publish(&mut publisher, 1, 3..4).await;
            let mut b = resume(&gateway, V5, "b").await;
            assert_eq!(take_texts(&mut b, 3).await, ["0", "1", "2"]);
            b.has_nothing().await;
            gateway.finish().await;
        }
    });
}

#[test]
fn shared_subscriptions_and_what_waits_for_them_survive_kill_9() {
    run(async {
        let mut gateway = Gateway::start().await;
        for id in ["a", "b"] {
            lasting(&gateway, V5, id, 2).await.disconnect().await;
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publish(&mut publisher, 1, 0..6).await;
        publish(&mut publisher, 2, 6..10).await;
        gateway.kill9();
        gateway.restart().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publish(&mut publisher, 1, 10..12).await;
        let mut a = resume(&gateway, V5, "a").await;
        let mut all = take_texts(&mut a, 6).await;
        // Its session ends: what waits there for "b" is found with its group after the restart too.
        let gone = Device::clean(gateway.mqtt(), V5, "b").await;
        gone.disconnect().await;
        all.extend(take_texts(&mut a, 6).await);
        a.has_nothing().await;
        let mut numbers: Vec<usize> = all.iter().map(|text| text.parse().unwrap()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..12).collect::<Vec<_>>());
        gateway.finish().await;
    });
}

#[test]
fn a_qos_2_message_that_was_sent_just_before_kill_9_is_nobody_elses() {
    run(async {
        let mut gateway = Gateway::start().await;
        for ends_before in [false, true] {
            lasting(&gateway, V5, "heir", 2).await.disconnect().await;
            let connect =
                session_expiry(V5, "leaver", 2).with(property::RECEIVE_MAXIMUM, Value::Two(1));
            let mut leaver = Device::connect(gateway.mqtt(), connect).await;
            leaver.subscribe(FILTER, 2).await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            publish(&mut publisher, 2, 0..1).await;
            assert_eq!(leaver.next_publish().await.text(), "0");
            if ends_before {
                leaver.disconnect().await;
                let api = gateway.api();
                eventually(Duration::from_secs(10), "it is away", || async {
                    let answer = api.get("/v1/clients/leaver").await;
                    (answer.json()["online"] != true).then_some(())
                })
                .await;
                // Whatever is acknowledged later is durable later.
                publish(&mut publisher, 1, 7..8).await;
            }
            gateway.kill9();
            gateway.restart().await;
            await_waiting(&gateway.api(), "leaver", 0).await;
            let mut heir = resume(&gateway, V5, "heir").await;
            if ends_before {
                assert_eq!(heir.take().await.text(), "7");
            }
            // [MQTT-4.8.2-5].
            heir.has_nothing().await;
            heir.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn subscriptions_max_counts_shared_subscriptions_too() {
    run(async {
        let config = "[mqtt]\nsubscriptions_max = 2\ntopic_levels_max = 3\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut device = Device::clean(gateway.mqtt(), V5, "many").await;
        assert_eq!(device.subscribe("$share/g/a", 1).await, 1);
        assert_eq!(device.subscribe("$share/g/a/b/c/d", 1).await, 0x8F);
        assert_eq!(device.subscribe("$share/g/a/b/c", 1).await, 1);
        assert_eq!(device.subscribe("$share/h/a", 1).await, 0x97);
        assert_eq!(device.subscribe("$share/g/a", 2).await, 2, "not one more");
        gateway.finish().await;
    });
}

#[test]
fn mosquitto_subscribers_share_a_group() {
    run(async {
        let gateway = Gateway::start().await;
        let mut subscribers = Vec::new();
        for (n, version) in ["311", "5"].into_iter().enumerate() {
            let id = format!("mosquitto-{n}");
            let args = ["-V", version, "-i", &id, "-q", "1", "-t", "$share/g/x"];
            subscribers.push(Running::start(&mut mosquitto(
                "mosquitto_sub",
                gateway.mqtt(),
                &args,
            )));
        }
        let api = gateway.api();
        for id in ["mosquitto-0", "mosquitto-1"] {
            eventually(Duration::from_secs(20), "both subscribe", || async {
                let answer = api.get(&format!("/v1/clients/{id}")).await;
                (answer.status == 200 && answer.json()["subscriptions"] == 1).then_some(())
            })
            .await;
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        for number in 0..6 {
            let text = number.to_string();
            publisher.publish(Publish::new("x", 1, text)).await;
        }
        let mut all = Vec::new();
        for one in &subscribers {
            for _ in 0..3 {
                all.push(one.line().await);
            }
        }
        all.sort_unstable();
        assert_eq!(all, ["0", "1", "2", "3", "4", "5"]);
        drop(subscribers);
        gateway.finish().await;
    });
}
