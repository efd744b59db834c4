//! `kill -9` at random moments under full load: nothing that was acknowledged is missing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moorline_tests::device::{Arrived, Device};
use moorline_tests::random::rounds;
use moorline_tests::wire::{self, Connect, Packet, Publish, V3, V5};
use moorline_tests::{Api, Gateway, Random, cluster};
use tokio::task::JoinSet;

use crate::support::{QUIET, await_state, resume, run, to, warm_up};

const PUBLISHERS: usize = 200;
/// PUBLISH that one device sends before it waits for the first PUBACK.
const WINDOW: u64 = 8;

/// One device that publishes numbers upstream until the connection breaks.
struct Publisher {
    name: String,
    version: u8,
    next: u64,
    acknowledged: Vec<u64>,
}

impl Publisher {
    async fn publish_until_killed(mut self, address: std::net::SocketAddr) -> Self {
        let connect = Connect::new(self.version, &self.name);
        let Ok(mut device) = Device::try_connect(address, connect).await else {
            return self;
        };
        let topic = format!("up/{}", self.name);
        let mut in_flight = std::collections::VecDeque::new();
        loop {
            while (in_flight.len() as u64) < WINDOW {
                let mut publish = Publish::new(&topic, 1, self.next.to_string());
                publish.packet_id = device.packet_id();
                in_flight.push_back((publish.packet_id, self.next));
                self.next += 1;
                if device
                    .send(&wire::publish(self.version, &publish))
                    .await
                    .is_err()
                {
                    return self;
                }
            }
            match device.receive(Duration::from_secs(20)).await {
                Arrived::Packet(Packet::PubAck { packet_id, reason }) => {
                    assert!(
                        reason < 0x80,
                        "{} was refused with {reason:#04x}",
                        self.name
                    );
                    let (expected, number) = in_flight.pop_front().unwrap();
                    assert_eq!(
                        packet_id, expected,
                        "PUBACKs come in the order of PUBLISHes [MQTT-4.6.0-2]"
                    );
                    self.acknowledged.push(number);
                }
                Arrived::Packet(other) => panic!("{} got {other:?}", self.name),
                Arrived::Closed => return self,
                Arrived::Nothing => panic!("{}: no PUBACK in 20 s", self.name),
            }
        }
    }
}

#[test]
fn every_upstream_message_with_a_puback_survives_kill_9_in_the_order_of_its_device() {
    run(async {
        let mut random = Random::announced("upstream and kill -9");
        let mut gateway = Gateway::start().await;
        warm_up(&gateway).await;
        let mut publishers: Vec<Publisher> = (0..PUBLISHERS)
            .map(|n| Publisher {
                name: format!("car-{n}"),
                version: if n % 2 == 0 { V3 } else { V5 },
                next: 0,
                acknowledged: Vec::new(),
            })
            .collect();
        let mut seen: HashMap<String, Vec<u64>> = HashMap::new();
        for round in 0..rounds() {
            let mut devices = JoinSet::new();
            for publisher in publishers.drain(..) {
                devices.spawn(publisher.publish_until_killed(gateway.mqtt()));
            }
            let moment = random.millis(20, 1500);
            tokio::time::sleep(moment).await;
            gateway.kill9();
            publishers = devices.join_all().await;
            gateway.restart().await;
            for message in gateway.drain_upstream("checker").await {
                let name = message["client"].as_str().unwrap().to_owned();
                assert_eq!(message["topic"], format!("up/{name}"));
                seen.entry(name)
                    .or_default()
                    .push(message["payload"].as_str().unwrap().parse().unwrap());
            }
            let acknowledged: usize = publishers.iter().map(|one| one.acknowledged.len()).sum();
            eprintln!("round {round}: killed after {moment:?}, {acknowledged} acknowledged so far");
            for publisher in &publishers {
                check_device(
                    publisher,
                    seen.get(&publisher.name).map_or(&[], Vec::as_slice),
                );
            }
        }
        let acknowledged: usize = publishers.iter().map(|one| one.acknowledged.len()).sum();
        assert!(
            acknowledged > PUBLISHERS,
            "the test did not put the gateway under load"
        );
        gateway.finish().await;
    });
}

fn check_device(publisher: &Publisher, seen: &[u64]) {
    let name = &publisher.name;
    let mut first = Vec::new();
    for number in seen {
        // Order means order of first occurrence.
        if first.last().is_none_or(|last| number > last) {
            first.push(*number);
        } else {
            assert!(
                first.contains(number),
                "{name}: {number} came after {:?}",
                first.last()
            );
        }
    }
    for number in &publisher.acknowledged {
        assert!(
            first.binary_search(number).is_ok(),
            "{name}: {number} had its PUBACK and is lost"
        );
    }
}

const RECEIVERS: usize = 50;

/// What one device has got so far, in the order of arrival.
type Got = Arc<Mutex<Vec<u64>>>;

/// Takes and acknowledges until the connection ends.
async fn receive(mut device: Device, got: Got, stop: Arc<AtomicBool>) {
    loop {
        match device.receive(Duration::from_millis(200)).await {
            Arrived::Packet(Packet::Publish(publish)) => {
                got.lock().unwrap().push(publish.text().parse().unwrap());
                device.acknowledge(&publish).await;
            }
            Arrived::Packet(_) => {}
            Arrived::Closed => return,
            Arrived::Nothing if stop.load(Ordering::Acquire) => return,
            Arrived::Nothing => {}
        }
    }
}

/// Pushes numbers to one client until the gateway is gone; returns those that were answered 202.
async fn push_until_killed(api: Api, client: String, mut next: u64) -> (u64, Vec<u64>) {
    let mut accepted = Vec::new();
    loop {
        let number = next;
        next += 1;
        let request = api.request(reqwest::Method::POST, "/v1/push");
        match api
            .try_send(request.json(&to(&client, &number.to_string())))
            .await
        {
            Ok(answer) if answer.status == 202 => accepted.push(number),
            Ok(answer) => panic!("a push was answered {answer:?}"),
            Err(_) => return (next, accepted),
        }
    }
}

#[test]
fn every_accepted_push_survives_kill_9_in_order() {
    run(async {
        let mut random = Random::announced("pushes and kill -9");
        let mut gateway = Gateway::start().await;
        let names: Vec<String> = (0..RECEIVERS).map(|n| format!("phone-{n}")).collect();
        let got: Vec<Got> = (0..RECEIVERS).map(|_| Got::default()).collect();
        let mut next = vec![0; RECEIVERS];
        let mut accepted: Vec<Vec<u64>> = vec![Vec::new(); RECEIVERS];
        for round in 0..rounds() {
            // Half of the devices are connected while it happens, the others find everything later.
            let stop = Arc::new(AtomicBool::new(false));
            let mut receivers = JoinSet::new();
            for n in (0..RECEIVERS).filter(|n| (*n as u64 + round).is_multiple_of(2)) {
                let device = resume(&gateway, if n % 4 < 2 { V3 } else { V5 }, &names[n]).await;
                receivers.spawn(receive(device, Arc::clone(&got[n]), Arc::clone(&stop)));
            }
            let mut pushers = JoinSet::new();
            for n in 0..RECEIVERS {
                let pushing = push_until_killed(gateway.api(), names[n].clone(), next[n]);
                pushers.spawn(async move { (n, pushing.await) });
            }
            let moment = random.millis(20, 1500);
            tokio::time::sleep(moment).await;
            gateway.kill9();
            while let Some(done) = pushers.join_next().await {
                let (n, (to, numbers)) = done.unwrap();
                next[n] = to;
                accepted[n].extend(numbers);
            }
            receivers.join_all().await;
            gateway.restart().await;
            let total: usize = accepted.iter().map(Vec::len).sum();
            eprintln!("round {round}: killed after {moment:?}, {total} pushes accepted so far");
        }
        let mut receivers = JoinSet::new();
        let stop = Arc::new(AtomicBool::new(false));
        for n in 0..RECEIVERS {
            let device = resume(&gateway, if n % 4 < 2 { V3 } else { V5 }, &names[n]).await;
            receivers.spawn(receive(device, Arc::clone(&got[n]), Arc::clone(&stop)));
        }
        for (n, numbers) in accepted.iter().enumerate() {
            let all = || {
                let got = got[n].lock().unwrap();
                numbers.iter().all(|number| got.contains(number))
            };
            moorline_tests::eventually(
                Duration::from_secs(60),
                &format!("{} has all of its {} pushes", names[n], numbers.len()),
                || async { all().then_some(()) },
            )
            .await;
        }
        stop.store(true, Ordering::Release);
        receivers.join_all().await;
        for (n, got) in got.iter().enumerate() {
            let mut highest = None;
            let mut seen = std::collections::HashSet::new();
            for number in got.lock().unwrap().iter() {
                if seen.insert(*number) {
                    assert!(
                        Some(*number) > highest,
                        "{}: {number} came after {highest:?}",
                        names[n]
                    );
                    highest = Some(*number);
                }
            }
        }
        assert!(
            accepted.iter().map(Vec::len).sum::<usize>() > RECEIVERS,
            "no load"
        );
        gateway.finish().await;
    });
}

#[test]
fn sessions_retained_messages_and_queued_publishes_survive_kill_9() {
    run(async {
        let mut gateway = Gateway::start().await;
        for version in [V3, V5] {
            let id = format!("sub-{version}");
            let mut subscriber = resume(&gateway, version, &id).await;
            assert_eq!(subscriber.subscribe("news/+", 1).await, 1);
            drop(subscriber);
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "publisher").await;
        assert!(
            publisher
                .publish(Publish::new("news/a", 1, "kept").retained())
                .await
                < 0x80
        );
        for n in 0..100 {
            assert_eq!(
                publisher
                    .publish(Publish::new("news/b", 1, n.to_string()))
                    .await,
                0
            );
        }
        gateway.kill9();
        gateway.restart().await;
        for version in [V3, V5] {
            let mut subscriber = resume(&gateway, version, &format!("sub-{version}")).await;
            assert!(
                subscriber.session_present,
                "the session of version {version} is lost"
            );
            assert_eq!(subscriber.take().await.text(), "kept");
            let expected: Vec<String> = (0..100).map(|n| n.to_string()).collect();
            let mut got: Vec<String> = Vec::new();
            while got != expected {
                let text = subscriber.take().await.text();
                // What a killed node of several had not acknowledged to the broker comes again.
                if !(cluster::wanted() && got.contains(&text)) {
                    assert_eq!(text, expected[got.len()], "after {got:?}");
                    got.push(text);
                }
            }
            while let Some(more) = subscriber.take_within(QUIET).await {
                assert!(cluster::wanted(), "{} again", more.text());
                assert!(got.contains(&more.text()), "{} after all", more.text());
            }
        }
        let mut newcomer = Device::clean(gateway.mqtt(), V5, "newcomer").await;
        newcomer.subscribe("news/#", 0).await;
        let retained = newcomer.take().await;
        assert_eq!((retained.text().as_str(), retained.retain), ("kept", true));
        gateway.finish().await;
    });
}

#[test]
fn a_qos_2_message_arrives_once_though_the_gateway_is_killed_in_the_middle() {
    run(async {
        let mut gateway = Gateway::start().await;
        let api = gateway.api();
        // Towards the backend: killed between PUBREC and PUBREL.
        let mut device = resume(&gateway, V5, "car").await;
        let mut publish = Publish::new("up/once", 2, "exactly");
        publish.packet_id = 77;
        device.send(&wire::publish(V5, &publish)).await.unwrap();
        assert_eq!(device.await_pubrec(77).await, 0);
        // Towards the device: killed after its PUBREC.
        let body = serde_json::json!({"to": {"client": "phone"}, "payload": "twice?", "qos": 2});
        let id = api.push(&body).await.expect(202)["id"]
            .as_str()
            .unwrap()
            .to_owned();
        let mut phone = resume(&gateway, V5, "phone").await;
        let first = phone.next_publish().await;
        assert_eq!(
            (first.qos, first.user_property("message-id")),
            (2, Some(id.as_str()))
        );
        gateway.kill9();
        gateway.restart().await;

        let mut device = resume(&gateway, V5, "car").await;
        assert!(device.session_present);
        publish.dup = true;
        device.send(&wire::publish(V5, &publish)).await.unwrap();
        assert_eq!(device.await_pubrec(77).await, 0);
        device.send(&wire::pubrel(77)).await.unwrap();
        device
            .await_packet("a PUBCOMP", |packet| {
                matches!(packet, Packet::PubComp { packet_id: 77, .. }).then_some(())
            })
            .await;
        let upstream = gateway.drain_upstream("checker").await;
        assert_eq!(upstream.len(), 1, "{upstream:?}");

        let mut phone = resume(&gateway, V5, "phone").await;
        let again = phone.take().await;
        assert_eq!(
            again.packet_id, first.packet_id,
            "a packet identifier survives [MQTT-4.4.0-1]"
        );
        // DUP may be missing: what was sent is noted without waiting for the disk.
        phone.has_nothing().await;
        await_state(&gateway.api(), &id, "delivered").await;
        gateway.finish().await;
    });
}

#[test]
fn a_qos_2_push_whose_release_was_sent_is_never_sent_again_by_a_killed_gateway() {
    run(async {
        let mut gateway = Gateway::start().await;
        let mut random = Random::announced("release and kill");
        for round in 0..rounds() {
            for version in [V3, V5] {
                let id = format!("car-{version}-{round}");
                let topic = format!("d/{id}/push");
                let mut device = resume(&gateway, version, &id).await;
                let body = serde_json::json!({
                    "to": {"client": id}, "topic": topic, "payload": "once", "qos": 2
                });
                let api = gateway.api();
                api.post("/v1/push", &body).await.expect(202);
                let publish = device.next_publish().await;
                device.send(&wire::pubrec(publish.packet_id)).await.unwrap();
                let released = device
                    .await_packet("a PUBREL", |packet| match packet {
                        Packet::PubRel { packet_id, .. } => Some(*packet_id),
                        _ => None,
                    })
                    .await;
                assert_eq!(released, publish.packet_id);
                // From here on the device has forgotten the identifier, whether or not the gateway
                // gets to hear of it.
                if random.below(2) == 0 {
                    device.send(&wire::pubcomp(released)).await.unwrap();
                }
            }
            gateway.kill9();
            gateway.restart().await;
            for version in [V3, V5] {
                let id = format!("car-{version}-{round}");
                let mut device = resume(&gateway, version, &id).await;
                assert!(device.session_present);
                // Whatever waited comes before what is accepted now.
                gateway.api().push_text(&id, "marker").await;
                assert_eq!(device.take().await.text(), "marker");
                device.disconnect().await;
            }
        }
        gateway.finish().await;
    });
}
