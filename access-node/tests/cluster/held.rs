//! What devices send while something that they sent before is not in force yet.

use std::time::{Duration, Instant};

use moorline_tests::device::{Arrived, Device};
use moorline_tests::waiting::{SOON, eventually};
use moorline_tests::wire::{self, Packet, Publish, V3, V5, Value, property};

use super::nodes::World;
use super::{persistent, will};

/// Longer than one and a half times the keep alive of these devices.
const AWAY: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_hears_what_it_publishes_behind_its_subscribe() {
    let world = World::new().await;
    let a = world.node("a").await;
    for version in [V3, V5] {
        let mut device = Device::connect(a.mqtt, persistent(version, "eager")).await;
        let mut bytes = wire::subscribe(version, 1, &Vec::new(), &[("news/#", 1)]);
        for number in 0..3 {
            let mut publish = Publish::new("news/x", 1, number.to_string());
            publish.packet_id = 10 + number;
            bytes.extend(wire::publish(version, &publish));
        }
        device.send(&bytes).await.unwrap();
        for number in 0..3 {
            assert_eq!(device.take().await.text(), number.to_string());
        }
        device.unsubscribe("news/#").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_behind_a_subscribe_waits_no_longer_than_devices_do() {
    let world = World::new().await;
    let a = world.node("a").await;
    let mut other = Device::clean(a.mqtt, V5, "other").await;
    other.subscribe("room", 0).await;
    for version in [V3, V5] {
        let connect = persistent(version, &format!("eager-{version}"));
        let mut device = Device::connect(a.mqtt, connect).await;
        world.redis.freeze();
        let frozen = Instant::now();
        let mut bytes = wire::subscribe(version, 3, &Vec::new(), &[("news/#", 1)]);
        let mut publish = Publish::new("room", 1, "goes on");
        publish.packet_id = 7;
        bytes.extend(wire::publish(version, &publish));
        device.send(&bytes).await.unwrap();
        // At once it is not handed on: on one machine the subscription would come first.
        assert!(
            other
                .take_within(Duration::from_millis(500))
                .await
                .is_none()
        );
        assert_eq!(other.take().await.text(), "goes on");
        assert!(
            frozen.elapsed() < Duration::from_secs(3),
            "{:?}",
            frozen.elapsed()
        );
        // Past the SUBACK, which is not there before the subscription is in force.
        match device.receive(SOON).await {
            Arrived::Packet(Packet::PubAck { packet_id, .. }) => assert_eq!(packet_id, 7),
            arrived => panic!("{arrived:?}"),
        }
        let arrived = device.receive(Duration::from_secs(1)).await;
        assert!(matches!(arrived, Arrived::Nothing), "{arrived:?}");
        world.redis.thaw();
        device
            .await_packet("SUBACK", |packet| match packet {
                Packet::SubAck { packet_id: 3, .. } => Some(()),
                _ => None,
            })
            .await;
        let mut publish = Publish::new("news/x", 1, "heard");
        publish.packet_id = 8;
        device
            .send(&wire::publish(version, &publish))
            .await
            .unwrap();
        assert_eq!(device.take().await.text(), "heard");
        eventually(SOON, "the node takes devices", || async {
            Device::try_connect(a.mqtt, persistent(V5, "probe"))
                .await
                .ok()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_behind_a_subscribe_is_believed_however_long_that_takes() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let connect = persistent(V5, "leaver").with_will(will("d/watcher/x", None));
    let mut device = Device::connect(a.mqtt, connect.keep_alive(1)).await;
    world.redis.freeze();
    let mut bytes = wire::subscribe(V5, 1, &Vec::new(), &[("news/#", 1)]);
    let no_session = vec![(property::SESSION_EXPIRY, Value::Four(0))];
    bytes.extend(wire::disconnect(V5, 0, &no_session));
    device.send(&bytes).await.unwrap();
    let arrived = device.receive(AWAY).await;
    assert!(matches!(arrived, Arrived::Nothing), "{arrived:?}");
    world.redis.thaw();
    assert_eq!(device.await_close(SOON).await, None);
    let back = eventually(SOON, "the other node takes devices", || async {
        Device::try_connect(b.mqtt, persistent(V5, "leaver"))
            .await
            .ok()
    })
    .await;
    assert!(!back.session_present, "the device had ended its session");
    assert!(world.waiting("watcher").await.is_empty(), "and its will");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_not_read_for_a_while_stays() {
    const MESSAGES: u16 = 400;
    let world = World::new().await;
    let a = world.node("a").await;
    let connect = persistent(V3, "sender").keep_alive(1);
    let mut sender = Device::connect(a.mqtt, connect).await;
    world.redis.freeze();
    let mut bytes = Vec::new();
    for number in 1..=MESSAGES {
        let mut publish = Publish::new("d/target/x", 1, number.to_string());
        publish.packet_id = number;
        bytes.extend(wire::publish(V3, &publish));
    }
    sender.send(&bytes).await.unwrap();
    let arrived = sender.receive(AWAY).await;
    assert!(matches!(arrived, Arrived::Nothing), "{arrived:?}");
    world.redis.thaw();
    for number in 1..=MESSAGES {
        assert_eq!(sender.await_puback(number).await, 0);
    }
    let numbers: Vec<String> = (1..=MESSAGES).map(|number| number.to_string()).collect();
    assert_eq!(world.waiting("target").await, numbers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_not_read_while_a_mebibyte_of_its_messages_waits_for_redis() {
    /// Fewer than a device may have without an answer; together more than sockets hold.
    const MESSAGES: u16 = 250;
    let world = World::new().await;
    let a = world.node("a").await;
    let mut sender = Device::connect(a.mqtt, persistent(V3, "sender")).await;
    let large = "x".repeat(200 * 1024);
    let mut bytes = Vec::new();
    for number in 1..=MESSAGES {
        let topic = format!("d/target-{}/x", number % 10);
        let mut publish = Publish::new(&topic, 1, large.clone());
        publish.packet_id = number;
        bytes.extend(wire::publish(V3, &publish));
    }
    world.redis.freeze();
    {
        let mut sending = Box::pin(sender.send(&bytes));
        let sent = tokio::time::timeout(AWAY, &mut sending).await;
        assert!(sent.is_err(), "all of it was read");
        world.redis.thaw();
        sending.await.unwrap();
    }
    for number in 1..=MESSAGES {
        assert_eq!(sender.await_puback(number).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_an_older_session_is_not_that_of_a_newer_one() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let _older = Device::clean(a.mqtt, V5, "device").await;
    // Nobody can tell the node that the device is elsewhere.
    world.cut_off(&a);
    let newer = Device::connect(b.mqtt, persistent(V5, "device")).await;
    newer.disconnect().await;
    let back = Device::connect(a.mqtt, persistent(V5, "device")).await;
    assert!(back.session_present);
}
