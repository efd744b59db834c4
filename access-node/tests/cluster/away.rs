//! What devices publish while Redis is away.

use std::time::{Duration, Instant};

use moorline_tests::device::{Arrived, Device};
use moorline_tests::servers::Proxy;
use moorline_tests::waiting::{SOON, eventually};
use moorline_tests::wire::{self, Connect, Packet, Publish, V3, V5, Value, property};

use super::nodes::{TestNode, World};
use super::{payload, persistent};

/// Longer than Redis has for an answer, shorter than a lease.
const AWAY: Duration = Duration::from_secs(5);
const MESSAGES: u16 = 12;

/// Sends numbered publishes in turns to another device's topic and to a retained one, without waiting for an answer.
async fn send_all(device: &mut Device, version: u8) {
    for number in 1..=MESSAGES {
        let mut pushed = Publish::new("d/target/x", 1 + (number % 2) as u8, number.to_string());
        pushed.packet_id = 2 * number;
        let mut kept = Publish::new("state", 1, number.to_string());
        kept.packet_id = 2 * number + 1;
        kept.retain = true;
        for publish in [pushed, kept] {
            let bytes = wire::publish(version, &publish);
            device.send(&bytes).await.unwrap();
        }
    }
}

/// The answers to [`send_all`], in order; what is asked for along the way is given.
async fn await_answers(device: &mut Device) {
    let mut answered = Vec::new();
    while answered.len() < 2 * usize::from(MESSAGES) {
        match device.receive(2 * SOON).await {
            Arrived::Packet(Packet::PubAck { packet_id, reason }) => {
                assert_eq!(reason, 0);
                answered.push(packet_id);
            }
            Arrived::Packet(Packet::PubRec { packet_id, reason }) => {
                assert_eq!(reason, 0);
                answered.push(packet_id);
                device.send(&wire::pubrel(packet_id)).await.unwrap();
            }
            Arrived::Packet(Packet::PubComp { .. } | Packet::PingResp) => {}
            other => panic!("{other:?} after {answered:?}"),
        }
    }
    let expected: Vec<u16> = (2..=2 * MESSAGES + 1).collect();
    assert_eq!(answered, expected);
}

/// The device stays and is heard, and nothing is acknowledged.
async fn stays_unanswered(device: &mut Device, since: Instant) {
    while since.elapsed() < AWAY {
        device.ping().await;
        let arrived = device.receive(Duration::from_millis(200)).await;
        assert!(matches!(arrived, Arrived::Nothing), "{arrived:?}");
    }
}

async fn check_all(world: &World, node: &TestNode) {
    let numbers: Vec<String> = (1..=MESSAGES).map(|number| number.to_string()).collect();
    assert_eq!(world.waiting("target").await, numbers);
    assert_eq!(retained(node).await, MESSAGES.to_string());
}

/// What a new subscriber of `node` is told of the retained topic. The node may have to find out first that Redis is back.
async fn retained(node: &TestNode) -> String {
    let mut reader = eventually(SOON, "the node takes devices", || async {
        let connect = Connect::new(V5, "reader");
        Device::try_connect(node.mqtt, connect).await.ok()
    })
    .await;
    reader.subscribe("state", 0).await;
    payload(&mut reader).await.0
}

async fn check_sender_goes_on(device: &mut Device) {
    let after = Publish::new("d/other/x", 1, "after");
    assert_eq!(device.publish(after).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_must_be_durable_waits_in_order_for_a_redis_that_hangs() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut sender = Device::connect(a.mqtt, persistent(V5, "sender")).await;
    world.redis.freeze();
    let frozen = Instant::now();
    send_all(&mut sender, V5).await;
    stays_unanswered(&mut sender, frozen).await;
    world.redis.thaw();
    await_answers(&mut sender).await;
    check_all(&world, &b).await;
    check_sender_goes_on(&mut sender).await;
    assert_eq!(world.waiting("other").await, ["after"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_must_be_durable_waits_in_order_for_a_redis_that_is_restarted() {
    let mut world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut sender = Device::connect(a.mqtt, Connect::new(V3, "sender").persistent()).await;
    world.redis.stop().await;
    let stopped = Instant::now();
    send_all(&mut sender, V3).await;
    stays_unanswered(&mut sender, stopped).await;
    world.redis.restart().await;
    await_answers(&mut sender).await;
    check_all(&world, &b).await;
    check_sender_goes_on(&mut sender).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_to_be_published_later_waits_for_redis_and_is_kept_once() {
    let world = World::new().await;
    let a = world.node("a").await;
    let mut sender = Device::connect(a.mqtt, persistent(V5, "sender")).await;
    world.redis.freeze();
    let frozen = Instant::now();
    let mut publish = Publish::new("$delay/3600/up/x", 1, "later");
    publish.packet_id = 7;
    sender.send(&wire::publish(V5, &publish)).await.unwrap();
    stays_unanswered(&mut sender, frozen).await;
    world.redis.thaw();
    assert_eq!(sender.await_puback(7).await, 0);
    assert_eq!(world.stores.jobs.counts().await.unwrap().total(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_retained_messages_that_waited_the_last_is_kept_whoever_is_left_of_their_senders() {
    let mut world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut first = Device::clean(a.mqtt, V5, "first").await;
    let mut second = Device::clean(a.mqtt, V5, "second").await;
    let kept = |payload: &str, packet_id| {
        let mut publish = Publish::new("state", 1, payload);
        publish.retain = true;
        publish.packet_id = packet_id;
        wire::publish(V5, &publish)
    };
    assert_eq!(
        first
            .publish(Publish {
                retain: true,
                ..Publish::new("state", 1, "old")
            })
            .await,
        0
    );
    world.redis.stop().await;
    let stopped = Instant::now();
    first.send(&kept("first", 7)).await.unwrap();
    first.ping().await;
    second.send(&kept("second", 7)).await.unwrap();
    second.ping().await;
    // The one whose message is the last of them goes before it is stored.
    drop(second);
    stays_unanswered(&mut first, stopped).await;
    world.redis.restart().await;
    assert_eq!(first.await_puback(7).await, 0);
    assert_eq!(retained(&b).await, "second");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waited_on_a_node_that_was_cut_off_leaves_what_was_retained_elsewhere_meanwhile() {
    const TOPICS: [(&str, &str, &str); 4] = [
        ("kept", "old", "new"),
        ("expired", "old", "new"),
        ("removed", "old", ""),
        ("not-removed", "", "new"),
    ];
    let world = World::new().await;
    let link = Proxy::to(world.redis.address()).await;
    let a = world
        .node_on("a", &format!("redis://{}", link.address()))
        .await;
    let b = world.node("b").await;
    let retain = |topic: &str, payload: &str| Publish {
        retain: true,
        ..Publish::new(topic, 1, payload)
    };
    // Reset, or silent until it heals and then delivers what was sent into it.
    for interrupt in [Proxy::cut, Proxy::freeze] {
        let mut here = Device::clean(a.mqtt, V5, "here").await;
        let mut there = Device::clean(b.mqtt, V5, "there").await;
        for (topic, ..) in TOPICS {
            assert_eq!(there.publish(retain(topic, "first")).await, 0);
        }
        interrupt(&link);
        let interrupted = Instant::now();
        for ((topic, old, _), packet_id) in TOPICS.into_iter().zip(7..) {
            let mut publish = retain(topic, old);
            publish.packet_id = packet_id;
            if topic == "expired" {
                let expiry = (property::MESSAGE_EXPIRY, Value::Four(1));
                publish.properties.push(expiry);
            }
            here.send(&wire::publish(V5, &publish)).await.unwrap();
        }
        here.ping().await;
        // A busy node knows the time of Redis less well.
        tokio::time::sleep(Duration::from_secs(2)).await;
        for (topic, _, new) in TOPICS {
            assert_eq!(there.publish(retain(topic, new)).await, 0);
        }
        stays_unanswered(&mut here, interrupted).await;
        link.heal();
        for packet_id in 7..11 {
            assert_eq!(here.await_puback(packet_id).await, 0);
        }
        let kept = world.stores.retained.load_all().await.unwrap();
        let kept: Vec<_> = kept
            .iter()
            .map(|message| (message.topic.as_str(), &*message.payload))
            .collect();
        let new = &b"new"[..];
        assert_eq!(
            kept,
            [("expired", new), ("kept", new), ("not-removed", new)]
        );
        // On the node itself, too, which had the other in memory, as soon as it has read what it has missed.
        for (topic, _, new) in TOPICS {
            eventually(SOON, "the newer message", || async {
                let connect = Connect::new(V5, "reader");
                let mut reader = Device::try_connect(a.mqtt, connect).await.ok()?;
                reader.subscribe(topic, 0).await;
                let kept = reader.take_within(Duration::from_millis(500)).await;
                (kept.map_or(String::new(), |publish| publish.text()) == new).then_some(())
            })
            .await;
        }
        here.disconnect().await;
    }
}
