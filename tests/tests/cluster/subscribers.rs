//! Publishers on one node, subscribers on others, and on none.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::wire::{Connect, Publish, V3, V5, Value, property};

use super::world::{Shape, World};

/// Long enough for what should not come to have come.
const QUIET: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(60);

const NO_LOCAL: u8 = 0b100;
const RETAIN_AS_PUBLISHED: u8 = 0b1000;

impl World {
    async fn clean(&self, node: usize, version: u8, id: &str) -> Device {
        Device::clean(self.mqtt.get(node).unwrap(), version, id).await
    }

    async fn resume(&self, node: usize, version: u8, id: &str) -> Device {
        let address = self.mqtt.get(node).unwrap();
        Device::connect(address, Connect::new(version, id).persistent()).await
    }
}

async fn take(device: &mut Device) -> Publish {
    let taken = device.take_within(PATIENCE).await;
    taken.expect("a message")
}

async fn has_nothing(device: &mut Device) {
    let taken = device.take_within(QUIET).await;
    assert!(taken.is_none(), "{taken:?}");
}

#[test]
fn a_subscriber_gets_what_is_published_on_whatever_node() {
    super::rounds("subscribers on other nodes", async |_| {
        let world = World::start(Shape::default()).await;
        connected_ones(&world).await;
        persistent_ones(&world).await;
        retained_ones(&world).await;
        world.finish().await;
    });
}

/// Clean sessions: through the queue of their node.
async fn connected_ones(world: &World) {
    for version in [V3, V5] {
        let mut near = world.clean(0, version, "near").await;
        let mut far = world.clean(1, version, "far").await;
        for granted in 0..=2 {
            let filter = format!("c{version}/{granted}/+/#");
            assert_eq!(near.subscribe(&filter, granted).await, granted);
            assert_eq!(far.subscribe(&filter, granted).await, granted);
        }
        let mut publisher = world.clean(0, version, "publisher").await;
        for granted in 0..=2 {
            for qos in 0..=2 {
                let topic = format!("c{version}/{granted}/x.y/{qos}");
                publisher
                    .publish(Publish::new(&topic, qos, topic.as_str()))
                    .await;
                for subscriber in [&mut near, &mut far] {
                    let got = take(subscriber).await;
                    assert_eq!((got.text(), got.qos), (topic.clone(), qos.min(granted)));
                    assert!(!got.retain && !got.dup);
                }
            }
        }
        for subscriber in [&mut near, &mut far] {
            subscriber.unsubscribe(&format!("c{version}/0/+/#")).await;
        }
        let gone = Publish::new(&format!("c{version}/0/x"), 1, "gone");
        publisher.publish(gone).await;
        has_nothing(&mut far).await;
        has_nothing(&mut near).await;
        publisher.disconnect().await;
    }
    // No Local, over its own node's queue too.
    let mut own = world.clean(1, V5, "own").await;
    own.subscribe("own/#", 1 | NO_LOCAL).await;
    own.publish(Publish::new("own/x", 1, "not back")).await;
    let mut other = world.clean(2, V5, "other").await;
    other.publish(Publish::new("own/x", 1, "for you")).await;
    assert_eq!(take(&mut own).await.text(), "for you");
    has_nothing(&mut own).await;
}

/// Persistent sessions: through the queue of their shard, connected or not.
async fn persistent_ones(world: &World) {
    let mut publisher = world.clean(2, V5, "publisher").await;
    for (version, qos) in [(V3, 1), (V3, 2), (V5, 1), (V5, 2)] {
        let id = format!("keeps-{version}-{qos}");
        let topic = format!("p/{version}/{qos}");
        let mut device = world.resume(0, version, &id).await;
        assert_eq!(device.subscribe(&topic, qos).await, qos);
        publisher.publish(Publish::new(&topic, qos, "online")).await;
        let got = take(&mut device).await;
        assert_eq!((got.text(), got.qos), ("online".to_owned(), qos));
        publisher.publish(Publish::new(&topic, 0, "live")).await;
        assert_eq!(take(&mut device).await.text(), "live");
        device.disconnect().await;
        for n in 0..50 {
            publisher
                .publish(Publish::new(&topic, qos, n.to_string()))
                .await;
        }
        let mut device = world.resume(1, version, &id).await;
        assert!(device.session_present);
        for n in 0..50 {
            assert_eq!(take(&mut device).await.text(), n.to_string());
        }
        has_nothing(&mut device).await;
        // On the new node too, and with QoS 0.
        publisher.publish(Publish::new(&topic, 0, "live")).await;
        assert_eq!(take(&mut device).await.text(), "live");
        device.unsubscribe(&topic).await;
        publisher.publish(Publish::new(&topic, qos, "gone")).await;
        publisher.publish(Publish::new(&topic, 0, "gone")).await;
        has_nothing(&mut device).await;
    }
    // Overlapping filters: one copy, at the highest QoS, with every identifier.
    let mut device = world.resume(0, V5, "overlaps").await;
    for (id, filter, options) in [(7, "o/#", 0), (8, "o/+", 2), (9, "o/x", 1)] {
        let properties = vec![(property::SUBSCRIPTION_ID, Value::Var(id))];
        device
            .subscribe_with(&properties, &[(filter, options)])
            .await;
    }
    device.subscribe("own/p", 1 | NO_LOCAL).await;
    publisher.publish(Publish::new("o/x", 2, "once")).await;
    let got = take(&mut device).await;
    assert_eq!((got.text(), got.qos), ("once".to_owned(), 2));
    let ids = got.properties.iter().filter_map(|(_, value)| match value {
        Value::Var(id) => Some(*id),
        _ => None,
    });
    assert_eq!(ids.collect::<BTreeSet<u32>>(), BTreeSet::from([7, 8, 9]));
    device.publish(Publish::new("own/p", 1, "not back")).await;
    has_nothing(&mut device).await;
    publisher
        .publish(Publish::new("own/p", 1, "from another"))
        .await;
    assert_eq!(take(&mut device).await.text(), "from another");
    // A clean start is a new beginning: nothing of before arrives.
    device.disconnect().await;
    publisher
        .publish(Publish::new("o/x", 1, "of the old session"))
        .await;
    let mut device = world.clean(2, V5, "overlaps").await;
    has_nothing(&mut device).await;
    publisher.publish(Publish::new("o/x", 1, "nobody")).await;
    has_nothing(&mut device).await;
}

async fn retained_ones(world: &World) {
    let mut publisher = world.clean(0, V5, "publisher").await;
    let mut there = world.clean(1, V5, "there").await;
    there.subscribe("r/plain", 1).await;
    there
        .subscribe("r/as-published", 1 | RETAIN_AS_PUBLISHED)
        .await;
    for topic in ["r/plain", "r/as-published"] {
        publisher
            .publish(Publish::new(topic, 1, topic).retained())
            .await;
        // What is retained just behind a SUBACK may come as such too (docs/guarantees.md), beside what is published.
        let got = loop {
            let got = take(&mut there).await;
            if !(got.retain && got.text() == "r/plain") {
                break got;
            }
        };
        assert_eq!(
            (got.text(), got.retain),
            (topic.to_owned(), topic != "r/plain")
        );
    }
    let mut later = world.clean(2, V5, "later").await;
    later.subscribe("r/#", 1).await;
    let got = [take(&mut later).await, take(&mut later).await];
    assert!(got.iter().all(|got| got.retain), "{got:?}");
    // A push to a topic goes the same way.
    let push = serde_json::json!({"to": {"topic": "r/pushed"}, "payload": "pushed", "qos": 1});
    let answer = world.api().push(&push).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    assert_eq!(take(&mut later).await.text(), "pushed");
}

const SHARE: &str = "$share/workers/job/#";

#[test]
fn a_shared_subscription_has_one_member_for_each_message_over_all_nodes() {
    super::rounds("shared subscriptions on several nodes", async |_| {
        let mut world = World::start(Shape::default()).await;
        let mut publisher = world.clean(2, V5, "publisher").await;
        let mut clean = world.clean(0, V5, "clean").await;
        assert_eq!(clean.subscribe(SHARE, 1).await, 1);
        let mut keeps = world.resume(1, V5, "keeps").await;
        assert_eq!(keeps.subscribe(SHARE, 1).await, 1);
        for n in 0..200 {
            publisher
                .publish(Publish::new("job/x", 1, n.to_string()))
                .await;
        }
        let mut seen = BTreeMap::new();
        let mut count = |got: Publish| *seen.entry(got.text()).or_insert(0) += 1;
        let mut each = [0, 0];
        while each[0] + each[1] < 200 {
            let before = each;
            for (at, member) in [&mut clean, &mut keeps].into_iter().enumerate() {
                while let Some(got) = member.take_within(QUIET).await {
                    each[at] += 1;
                    count(got);
                }
            }
            assert_ne!(before, each, "nothing more came");
        }
        assert!(seen.len() == 200 && seen.values().all(|times| *times == 1));
        assert!(
            each[0] > 20 && each[1] > 20,
            "one node has nearly all: {each:?}"
        );

        // Nobody is connected: it waits for the persistent member.
        clean.disconnect().await;
        keeps.disconnect().await;
        for n in 200..230 {
            publisher
                .publish(Publish::new("job/x", 1, n.to_string()))
                .await;
        }
        // A member takes some, acknowledges none, and its node is killed.
        let mut doomed = world.clean(1, V5, "doomed").await;
        doomed.subscribe(SHARE, 1).await;
        let mut held = BTreeSet::new();
        while held.len() < 10 {
            held.insert(doomed.next_publish().await.text());
        }
        world.kill_node(1);
        let mut keeps = world.resume(2, V5, "keeps").await;
        let expected: BTreeSet<String> = (200..230).map(|n: u32| n.to_string()).collect();
        let mut rest = BTreeSet::new();
        while rest.len() < 30 {
            let Some(got) = keeps.take_within(PATIENCE).await else {
                let missing: Vec<_> = expected.difference(&rest).collect();
                panic!("{missing:?} did not come; the killed one had {held:?}");
            };
            rest.insert(got.text());
        }
        assert_eq!(rest, expected);
        has_nothing(&mut keeps).await;

        // A session that ends hands back what it did not acknowledge.
        publisher
            .publish(Publish::new("job/y", 1, "handed on"))
            .await;
        assert_eq!(keeps.next_publish().await.text(), "handed on");
        let mut next = world.clean(0, V5, "next").await;
        next.subscribe(SHARE, 1).await;
        drop(keeps);
        let ends = world.clean(2, V5, "keeps").await;
        assert_eq!(take(&mut next).await.text(), "handed on");
        drop(ends);
        world.finish().await;
    });
}

#[test]
fn nothing_acknowledged_is_missing_after_rabbitmq_was_restarted() {
    super::rounds("RabbitMQ restarted under publishers", async |mut random| {
        let shape = Shape {
            own_rabbit: true,
            ..Shape::default()
        };
        let mut world = World::start(shape).await;
        let mut online = world.resume(0, V5, "online").await;
        online.subscribe("n/#", 1).await;
        let mut offline = world.resume(1, V5, "offline").await;
        offline.subscribe("n/#", 2).await;
        offline.disconnect().await;
        // What a broker was told in the last two seconds before it was killed it may not know afterwards: see
        // docs/guarantees.md.
        tokio::time::sleep(Duration::from_secs(4)).await;
        let address = world.mqtt.get(2).unwrap();
        let publishing = tokio::spawn(async move {
            let mut publisher = Device::clean(address, V5, "publisher").await;
            for n in 0..300_u32 {
                let id = publisher.packet_id();
                let publish = Publish::new("n/x", 1, n.to_string()).with_id(id);
                let sent = moorline_tests::wire::publish(V5, &publish);
                publisher.send(&sent).await.unwrap();
                let answered = async {
                    use moorline_tests::device::Arrived;
                    use moorline_tests::wire::Packet;
                    loop {
                        match publisher.receive(PATIENCE).await {
                            Arrived::Packet(Packet::PubAck { packet_id, reason })
                                if packet_id == id =>
                            {
                                return reason;
                            }
                            Arrived::Packet(_) => {}
                            other => panic!("no PUBACK of {n}: {other:?}"),
                        }
                    }
                };
                assert!(answered.await < 0x80, "{n} refused");
            }
        });
        tokio::time::sleep(random.millis(200, 1500)).await;
        // The client library says so itself.
        world.expect_error("lapin::");
        world.rabbit().restart().await;
        publishing.await.unwrap();
        let mut offline = world.resume(2, V5, "offline").await;
        for (name, device) in [("online", &mut online), ("offline", &mut offline)] {
            let mut seen: Vec<u32> = Vec::new();
            while seen.len() < 300 {
                let got = device.take_within(PATIENCE).await;
                let got = got.unwrap_or_else(|| panic!("{name} has {} of 300", seen.len()));
                let n = got.text().parse().unwrap();
                if !seen.contains(&n) {
                    seen.push(n);
                }
            }
            assert!(seen.is_sorted(), "{name}: {seen:?}");
        }
        // What is not durable works again as well.
        let mut clean = world.clean(1, V5, "clean").await;
        clean.subscribe("again", 0).await;
        let mut publisher = world.clean(0, V5, "another").await;
        publisher.publish(Publish::new("again", 0, "again")).await;
        assert_eq!(take(&mut clean).await.text(), "again");
        world.finish().await;
    });
}
