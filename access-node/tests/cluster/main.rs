//! Nodes of a cluster among themselves: who has a device, what follows it, and what becomes of it when its node is gone.
#![allow(clippy::unwrap_used, reason = "tests")]

mod away;
mod denied;
mod held;
mod nodes;

use std::time::{Duration, Instant};

use moorline_access_node::Drain;
use moorline_tests::device::Device;
use moorline_tests::waiting::{SOON, eventually};
use moorline_tests::wire::{Connect, Publish, V3, V5, Value, Will, property};

use nodes::{World, client};

/// Until the lease of a node that died has ended, and somebody has noticed.
const NODE_LOSS: Duration = Duration::from_secs(40);

fn will(topic: &str, delay_s: Option<u32>) -> Will {
    let delay = delay_s.map(|delay_s| (property::WILL_DELAY, Value::Four(delay_s)));
    Will {
        topic: topic.to_owned(),
        payload: b"gone".to_vec(),
        qos: 1,
        retain: false,
        properties: delay.into_iter().collect(),
    }
}

fn persistent(version: u8, id: &str) -> Connect {
    Connect::new(version, id).persistent()
}

async fn push_all(world: &World, to: &str, numbers: std::ops::Range<u32>) {
    for number in numbers {
        world.push(to, &number.to_string()).await;
    }
}

async fn payload(device: &mut Device) -> (String, Publish) {
    let publish = device.next_publish().await;
    (String::from_utf8(publish.payload.clone()).unwrap(), publish)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_follows_its_device_with_what_it_has_not_acknowledged() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    for (version, id) in [(V3, "old"), (V5, "new")] {
        let mut first = Device::connect(a.mqtt, persistent(version, id)).await;
        assert!(!first.session_present);
        assert_eq!(first.subscribe("news/#", 2).await, 2);
        push_all(&world, id, 0..5).await;
        let (text, publish) = payload(&mut first).await;
        assert_eq!(text, "0");
        first.acknowledge(&publish).await;
        let mut unacknowledged = Vec::new();
        for number in 1..5 {
            let (text, publish) = payload(&mut first).await;
            assert_eq!(text, number.to_string());
            unacknowledged.push(publish.packet_id);
        }
        first.ping().await;
        let mut second = Device::connect(b.mqtt, persistent(version, id)).await;
        assert!(second.session_present);
        let closed = first.await_close(SOON).await;
        assert_eq!(closed, (version == V5).then_some(0x8E));
        for (number, packet_id) in (1..5).zip(unacknowledged) {
            let (text, publish) = payload(&mut second).await;
            assert_eq!(text, number.to_string());
            assert_eq!(publish.packet_id, packet_id);
            assert!(publish.dup);
            second.acknowledge(&publish).await;
        }
        // Pushes find it where it is now, and its subscriptions are known there.
        push_all(&world, id, 5..6).await;
        assert_eq!(payload(&mut second).await.0, "5");
        let view = b.node.nodes().sessions(&b.id, &[client(id)]).await.unwrap();
        assert_eq!(view[0].as_ref().unwrap().subscriptions, 1);
        let view = b.node.nodes().sessions(&a.id, &[client(id)]).await.unwrap();
        assert_eq!(view[0], None);
        second.disconnect().await;
        eventually(SOON, "the end is told", || async {
            (world.told.of(id) == ["online", "client_left"]).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_qos_2_publish_is_known_on_the_next_node() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut first = Device::connect(a.mqtt, persistent(V3, "sender")).await;
    let mut publish = Publish::new("d/target/x", 2, "once");
    publish.packet_id = 7;
    first
        .send(&moorline_tests::wire::publish(V3, &publish))
        .await
        .unwrap();
    first.await_pubrec(7).await;
    let mut second = Device::connect(b.mqtt, persistent(V3, "sender")).await;
    assert!(second.session_present);
    publish.dup = true;
    assert_eq!(second.publish(publish).await, 0);
    assert_eq!(world.waiting("target").await, ["once"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qos_2_publish_does_not_go_on_from_a_node_that_has_lost_its_device() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut first = Device::connect(a.mqtt, persistent(V5, "sender")).await;
    // Nobody can tell the node that the device is elsewhere.
    world.cut_off(&a);
    let mut second = Device::connect(b.mqtt, persistent(V5, "sender")).await;
    assert!(second.session_present);
    let mut publish = Publish::new("d/target/x", 2, "once");
    publish.packet_id = 7;
    let mut behind = Publish::new("d/target/x", 1, "behind");
    behind.packet_id = 8;
    for publish in [&publish, &behind] {
        let bytes = moorline_tests::wire::publish(V5, publish);
        first.send(&bytes).await.unwrap();
    }
    assert_eq!(first.await_close(SOON).await, Some(0x8E));
    assert!(world.waiting("target").await.is_empty());
    eventually(SOON, "its node forgets it", || async {
        let nodes = a.node.nodes();
        let sessions = nodes.sessions(&a.id, &[client("sender")]).await.unwrap();
        sessions[0].is_none().then_some(())
    })
    .await;
    for mut publish in [publish, behind] {
        publish.dup = true;
        assert_eq!(second.publish(publish).await, 0);
    }
    assert_eq!(world.waiting("target").await, ["once", "behind"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_start_on_another_node_leaves_nothing_of_the_session() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut first = Device::connect(a.mqtt, persistent(V5, "device")).await;
    first.subscribe("news/#", 1).await;
    let second = Device::clean(b.mqtt, V5, "device").await;
    assert!(!second.session_present);
    first.await_close(SOON).await;
    assert_eq!(
        world.stores.sessions.load(&client("device")).await.unwrap(),
        None
    );
    second.disconnect().await;
    let third = Device::connect(a.mqtt, persistent(V5, "device")).await;
    assert!(!third.session_present);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_will_goes_out_on_a_take_over_as_it_does_on_one_node() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let with_will = |id: &str, delay_s| {
        let topic = format!("d/watcher/{id}");
        persistent(V5, id).with_will(will(&topic, delay_s))
    };
    // At once without a delay, not at all with one, because the session goes on; taken back by a DISCONNECT.
    let _at_once = Device::connect(a.mqtt, with_will("at-once", None)).await;
    let _delayed = Device::connect(a.mqtt, with_will("delayed", Some(2))).await;
    let left = Device::connect(a.mqtt, with_will("left", None)).await;
    left.disconnect().await;
    for id in ["at-once", "delayed", "left"] {
        let taken = Device::connect(b.mqtt, persistent(V5, id)).await;
        assert!(taken.session_present);
        taken.disconnect().await;
    }
    // The delayed one would have been due by now.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(world.waiting("watcher").await, ["gone"]);
    // A delay is kept by whoever holds the shard, also when the device never comes back.
    let lost = Device::connect(a.mqtt, with_will("lost", Some(1))).await;
    drop(lost);
    eventually(SOON, "the delayed will", || async {
        (world.waiting("watcher").await.len() == 2).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_will_goes_out_once_however_fast_its_device_is_on_another_node() {
    const DEVICES: u64 = 80;
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut watcher = Device::clean(a.mqtt, V5, "watcher").await;
    watcher.subscribe("wills/+", 0).await;
    let with_will = |number| {
        let id = format!("device-{number}");
        let will = will(&format!("wills/{number}"), None);
        Connect::new(V5, &id).with_will(will)
    };
    for number in 0..DEVICES {
        drop(Device::connect(a.mqtt, with_will(number)).await);
        // Before, while and after its node sees to its end.
        tokio::time::sleep(Duration::from_micros(500 * (number % 40))).await;
        let back = Device::connect(b.mqtt, with_will(number)).await;
        back.disconnect().await;
    }
    let mut published = Vec::new();
    while let Some(publish) = watcher.take_within(Duration::from_secs(3)).await {
        published.push(publish.topic);
    }
    published.sort();
    let mut expected: Vec<String> = (0..DEVICES).map(|n| format!("wills/{n}")).collect();
    expected.sort();
    assert_eq!(published, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_devices_of_a_node_that_died_are_seen_to_once() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut devices = Vec::new();
    for number in 0..20 {
        let id = format!("device-{number}");
        let connect = Connect::new(V5, &id).with_will(will("d/watcher/x", None));
        devices.push(Device::connect(a.mqtt, connect).await);
    }
    let short = Connect::new(V5, "short").with(property::SESSION_EXPIRY, Value::Four(1));
    let mut short = Device::connect(a.mqtt, short).await;
    short.subscribe("news/#", 1).await;
    let moved = persistent(V5, "moved").with_will(will("d/watcher/x", Some(60)));
    let _moved = Device::connect(a.mqtt, moved).await;
    world.kill(a);
    // Who is back before anybody has noticed goes on, and its delayed will is not published.
    let moved = Device::connect(b.mqtt, persistent(V5, "moved")).await;
    assert!(moved.session_present);
    eventually(NODE_LOSS, "wills of a dead node", || async {
        (world.waiting("watcher").await.len() >= 20).then_some(())
    })
    .await;
    eventually(NODE_LOSS, "the end of a session of a dead node", || async {
        let record = world.stores.sessions.load(&client("short")).await.unwrap();
        record.is_none().then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.waiting("watcher").await.len(), 20);
    for number in 0..20 {
        let told = world.told.of(&format!("device-{number}"));
        assert_eq!(told, ["online", "node_lost"]);
    }
    assert_eq!(world.told.of("moved"), ["online"]);
    assert!(world.stores.sessions.load_wills().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_out_of_reach_is_passed_by_and_closes_what_it_has_lost() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut first = Device::connect(a.mqtt, persistent(V5, "device")).await;
    world.cut_off(&a);
    let mut second = Device::connect(b.mqtt, persistent(V5, "device")).await;
    assert!(second.session_present);
    push_all(&world, "device", 0..3).await;
    for number in 0..3 {
        let (text, publish) = payload(&mut second).await;
        assert_eq!(text, number.to_string());
        second.acknowledge(&publish).await;
    }
    // Twice a minute every connection is compared with the store.
    let closed = first.await_close(Duration::from_secs(45)).await;
    assert_eq!(closed, Some(0x8E));
    push_all(&world, "device", 3..4).await;
    assert_eq!(payload(&mut second).await.0, "3");
    assert_eq!(world.told.of("device"), ["online"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_stay_while_the_store_is_frozen_and_nobody_is_let_in() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let with_will = persistent(V5, "stays").with_will(will("d/watcher/x", None));
    let mut stays = Device::connect(a.mqtt, with_will).await;
    let mut other = Device::clean(a.mqtt, V5, "other").await;
    other.subscribe("room", 0).await;
    world.redis.freeze();
    let frozen_at = Instant::now();
    // Longer than the lease.
    while frozen_at.elapsed() < Duration::from_secs(14) {
        let began = Instant::now();
        let refused = Device::try_connect(b.mqtt, persistent(V5, "late")).await;
        assert!(refused.is_err());
        assert!(
            began.elapsed() < Duration::from_secs(6),
            "{:?}",
            began.elapsed()
        );
        stays.publish(Publish::new("room", 0, "hello")).await;
        assert_eq!(payload(&mut other).await.0, "hello");
        stays.ping().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let began = Instant::now();
    assert!(
        Device::try_connect(b.mqtt, persistent(V5, "late"))
            .await
            .is_err()
    );
    assert!(began.elapsed() < Duration::from_secs(1), "refused at once");
    world.redis.thaw();
    let late = eventually(SOON, "a device is let in again", || async {
        Device::try_connect(b.mqtt, persistent(V5, "late"))
            .await
            .ok()
    })
    .await;
    push_all(&world, "stays", 0..1).await;
    assert_eq!(payload(&mut stays).await.0, "0");
    // A whole lease after it is back, too, nobody has been taken for dead.
    tokio::time::sleep(Duration::from_secs(13)).await;
    stays.ping().await;
    assert_eq!(world.told.of("stays"), ["online"]);
    assert!(world.waiting("watcher").await.is_empty());
    late.disconnect().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_emptied_is_told_again_what_nodes_know() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let connect = persistent(V5, "device").with_will(will("d/watcher/x", Some(1)));
    let mut device = Device::connect(a.mqtt, connect).await;
    device.subscribe("news/#", 1).await;
    world.redis.flush().await;
    let told_again = eventually(SOON, "the session is stored again", || async {
        world.stores.sessions.load(&client("device")).await.unwrap()
    })
    .await;
    assert_eq!(told_again.subscriptions.len(), 1);
    eventually(SOON, "the will is stored again", || async {
        world.stores.sessions.will(&client("device")).await.unwrap()
    })
    .await;
    push_all(&world, "device", 0..1).await;
    assert_eq!(payload(&mut device).await.0, "0");
    let mut second = Device::connect(b.mqtt, persistent(V5, "device")).await;
    assert!(second.session_present);
    assert_eq!(payload(&mut second).await.0, "0");
    assert_eq!(device.await_close(SOON).await, Some(0x8E));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retained_message_is_seen_on_every_node_once_it_is_acknowledged() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut one = Device::clean(a.mqtt, V5, "one").await;
    let mut other = Device::clean(b.mqtt, V5, "other").await;
    for round in 0..20 {
        let topic = format!("state/{round}");
        let mut publish = Publish::new(&topic, 1, round.to_string());
        publish.retain = true;
        one.publish(publish).await;
        assert_eq!(other.subscribe(&topic, 1).await, 1);
        let (text, publish) = payload(&mut other).await;
        assert_eq!(text, round.to_string());
        other.acknowledge(&publish).await;
        other.unsubscribe(&topic).await;
        let mut removal = Publish::new(&topic, 1, "");
        removal.retain = true;
        one.publish(removal).await;
        assert_eq!(other.subscribe(&topic, 0).await, 0);
        other.has_nothing().await;
    }
    let mut publish = Publish::new("late", 1, "known from the start");
    publish.retain = true;
    one.publish(publish).await;
    let c = world.node("c").await;
    let mut third = Device::clean(c.mqtt, V3, "third").await;
    third.subscribe("late", 0).await;
    assert_eq!(payload(&mut third).await.0, "known from the start");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_device_publishes_to_another_finds_it_on_its_node() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut sender = Device::clean(a.mqtt, V5, "sender").await;
    let mut target = Device::clean(b.mqtt, V5, "target").await;
    for qos in 0..3 {
        sender
            .publish(Publish::new("d/target/x", qos, qos.to_string()))
            .await;
        let publish = target.take().await;
        assert_eq!(publish.payload, qos.to_string().into_bytes());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_drains_sends_its_devices_to_another_and_stops() {
    let world = World::new().await;
    let (a, b) = (world.node("a").await, world.node("b").await);
    let mut devices = Vec::new();
    for number in 0..20 {
        let id = format!("device-{number}");
        devices.push((
            id.clone(),
            Device::connect(a.mqtt, persistent(V5, &id)).await,
        ));
    }
    a.node.begin_drain();
    assert!(
        Device::try_connect(a.mqtt, persistent(V5, "late"))
            .await
            .is_err()
    );
    let began = Instant::now();
    let asked = a.node.drain(Drain {
        rate: 20,
        timeout: SOON,
    });
    let back = async {
        for (id, mut device) in devices {
            assert_eq!(device.await_close(SOON).await, Some(0x9C));
            let device = Device::connect(b.mqtt, persistent(V5, &id)).await;
            assert!(device.session_present);
        }
    };
    tokio::join!(asked, back);
    assert!(
        began.elapsed() > Duration::from_millis(500),
        "{:?}",
        began.elapsed()
    );
    let id = a.id.clone();
    a.node.stop().await;
    let nodes = world.stores.routes.nodes().await.unwrap();
    assert!(nodes.iter().all(|node| node.id != id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_that_hop_between_nodes_lose_nothing_and_keep_the_order() {
    const DEVICES: u32 = 100;
    const PUSHES: u32 = 30;
    let world = World::new().await;
    let nodes = [
        world.node("a").await,
        world.node("b").await,
        world.node("c").await,
    ];
    let addresses: Vec<_> = nodes.iter().map(|node| node.mqtt).collect();
    let mut hopping = tokio::task::JoinSet::new();
    for number in 0..DEVICES {
        let addresses = addresses.clone();
        hopping.spawn(async move {
            let id = format!("hopper-{number}");
            let mut seen: Vec<u32> = Vec::new();
            let deadline = Instant::now() + Duration::from_secs(120);
            let mut at = number as usize;
            while seen.last() != Some(&(PUSHES - 1)) {
                assert!(Instant::now() < deadline, "{id} has seen only {seen:?}");
                at += 1;
                let address = addresses[at % addresses.len()];
                let Ok(mut device) = Device::try_connect(address, persistent(V3, &id)).await else {
                    continue;
                };
                // Some of them are left unacknowledged each time.
                for _ in 0..1 + at % 3 {
                    let publish = device.take_within(Duration::from_millis(300)).await;
                    let Some(publish) = publish else { break };
                    let text = String::from_utf8(publish.payload).unwrap();
                    let pushed: u32 = text.parse().unwrap();
                    let next = seen.last().map_or(0, |last| last + 1);
                    assert!(pushed <= next, "{id} got {pushed} after {seen:?}");
                    if pushed == next {
                        seen.push(pushed);
                    }
                }
            }
            id
        });
    }
    for push in 0..PUSHES {
        for number in 0..DEVICES {
            world
                .push(&format!("hopper-{number}"), &push.to_string())
                .await;
        }
    }
    while let Some(done) = hopping.join_next().await {
        let id = done.unwrap();
        let mut held = 0;
        for node in &nodes {
            let view = node
                .node
                .local_nodes()
                .sessions(&node.id, &[client(&id)])
                .await;
            held += usize::from(view.unwrap()[0].is_some());
        }
        assert!(held <= 1, "{id} is on {held} nodes");
    }
}
