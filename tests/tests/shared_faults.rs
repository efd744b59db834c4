//! Members of a shared subscription that come, go and crash while somebody publishes, and a gateway
//! that is killed meanwhile: what was acknowledged reaches a member, and only one keeps it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moorline_tests::device::{Arrived, Device};
use moorline_tests::random::rounds;
use moorline_tests::waiting::{SOON, eventually};
use moorline_tests::wire::{self, Connect, Packet, Publish, V3, V5, Value, property};
use moorline_tests::{Gateway, Random};
use tokio::task::JoinSet;

use crate::support::{QUIET, run};

const FILTER: &str = "$share/workers/job/#";
/// Messages acknowledged in each round before the gateway is killed.
const LOAD_MIN: usize = 25;

/// A member that leaves at random moments and comes back.
struct Member {
    id: String,
    version: u8,
    /// How long its session outlives its connections; 0 begins anew each time.
    expiry_s: u32,
    random: Random,
    /// Messages that arrived, whether or not they were acknowledged.
    seen: BTreeSet<u64>,
    /// Acknowledged (QoS 1) or completed (QoS 2), and the server certainly knows.
    confirmed: Vec<u64>,
    /// QoS 2 messages that were not released yet, by packet identifier.
    received: HashMap<u16, u64>,
}

enum Leave {
    /// With the acknowledgements so far certainly taken.
    Settled,
    /// At once, with whatever is on its way.
    Crash,
}

impl Member {
    fn new(id: &str, version: u8, expiry_s: u32, random: &mut Random) -> Self {
        let mut seed = random.clone();
        for _ in 0..=random.below(50) {
            seed.next();
        }
        Self {
            id: id.to_owned(),
            version,
            expiry_s,
            random: seed,
            seen: BTreeSet::new(),
            confirmed: Vec::new(),
            received: HashMap::new(),
        }
    }

    fn connect(&self) -> Connect {
        let connect = Connect::new(self.version, &self.id);
        match (self.expiry_s, self.version) {
            (0, _) => connect,
            (_, V3) => connect.persistent(),
            (seconds, _) => Connect {
                clean_start: false,
                ..connect.with(property::SESSION_EXPIRY, Value::Four(seconds))
            },
        }
    }

    /// Comes and goes until told to stop, and stays until nothing more comes then.
    async fn work(mut self, address: SocketAddr, stop: Arc<AtomicBool>) -> Self {
        while !stop.load(Ordering::Relaxed) {
            let messages = self.random.below(40);
            let leave = match self.random.below(2) {
                0 => Leave::Settled,
                _ => Leave::Crash,
            };
            self.serve(address, messages, &leave, &stop).await;
            let away = match self.random.below(8) {
                0 => self.random.millis(800, 1600),
                _ => self.random.millis(1, 60),
            };
            tokio::time::sleep(away).await;
        }
        self
    }

    /// One connection, which takes `messages` and then leaves.
    async fn serve(
        &mut self,
        address: SocketAddr,
        messages: u64,
        leave: &Leave,
        stop: &AtomicBool,
    ) {
        let Ok(mut device) = Device::try_connect(address, self.connect()).await else {
            return;
        };
        if !device.session_present {
            self.received.clear();
        }
        let subscribe = wire::subscribe(self.version, 1, &Vec::new(), &[(FILTER, 2)]);
        _ = device.send(&subscribe).await;
        let mut unconfirmed = Vec::new();
        let mut taken = 0;
        while taken < messages && !stop.load(Ordering::Relaxed) {
            match device.receive(Duration::from_millis(50)).await {
                Arrived::Packet(packet) => {
                    taken += u64::from(self.answer(&mut device, &packet, &mut unconfirmed).await);
                }
                Arrived::Nothing => {}
                Arrived::Closed => return,
            }
        }
        if matches!(leave, Leave::Settled) {
            self.settle(&mut device, unconfirmed).await;
        }
    }

    /// Takes everything that comes, until it is quiet for a while.
    async fn drain(&mut self, address: SocketAddr, quiet: Duration) {
        let mut device = Device::connect(address, self.connect()).await;
        if !device.session_present {
            self.received.clear();
        }
        // From here on it is a member, and whatever is acknowledged is for one of them.
        assert_eq!(device.subscribe(FILTER, 2).await, 2);
        let mut unconfirmed = Vec::new();
        while let Arrived::Packet(packet) = device.receive(quiet).await {
            self.answer(&mut device, &packet, &mut unconfirmed).await;
        }
        self.settle(&mut device, unconfirmed).await;
    }

    /// Says whether the packet was a message.
    async fn answer(
        &mut self,
        device: &mut Device,
        packet: &Packet,
        unconfirmed: &mut Vec<u64>,
    ) -> bool {
        match packet {
            Packet::Publish(publish) => {
                let number: u64 = publish.text().parse().unwrap();
                self.seen.insert(number);
                if publish.qos == 1 {
                    _ = device.send(&wire::puback(publish.packet_id)).await;
                    unconfirmed.push(number);
                } else {
                    if let Some(held) = self.received.insert(publish.packet_id, number) {
                        assert_eq!(
                            held, number,
                            "an identifier in use came for another message"
                        );
                    }
                    _ = device.send(&wire::pubrec(publish.packet_id)).await;
                }
                return true;
            }
            Packet::PubRel { packet_id, .. } => {
                // One that is not known was completed before: only its PUBCOMP was lost.
                unconfirmed.extend(self.received.remove(packet_id));
                _ = device.send(&wire::pubcomp(*packet_id)).await;
            }
            _ => {}
        }
        false
    }

    /// A round trip behind the acknowledgements; what comes meanwhile is not acknowledged.
    async fn settle(&mut self, device: &mut Device, unconfirmed: Vec<u64>) {
        _ = device.send(&wire::PINGREQ).await;
        loop {
            match device.receive(Duration::from_secs(10)).await {
                Arrived::Packet(Packet::PingResp) => break,
                Arrived::Packet(Packet::Publish(publish)) => {
                    let number: u64 = publish.text().parse().unwrap();
                    self.seen.insert(number);
                    if publish.qos == 2 {
                        // Kept as received: PUBREC goes out when it is sent again.
                        self.received.insert(publish.packet_id, number);
                    }
                }
                Arrived::Packet(_) => {}
                Arrived::Closed | Arrived::Nothing => return,
            }
        }
        self.confirmed.extend(unconfirmed);
    }
}

/// Publishes numbers one behind the other until the connection breaks; returns the first that was
/// not tried and notes what was acknowledged.
async fn publish_numbers(
    address: SocketAddr,
    qos: u8,
    from: u64,
    count: u64,
    acknowledged: &Mutex<BTreeSet<u64>>,
) -> u64 {
    let connect = Connect::new(V5, &format!("publisher-{from}"));
    let Ok(mut device) = Device::try_connect(address, connect).await else {
        return from;
    };
    for number in from..from + count {
        let mut publish = Publish::new("job/x", qos, number.to_string());
        publish.packet_id = device.packet_id();
        if device.send(&wire::publish(V5, &publish)).await.is_err() {
            return number + 1;
        }
        loop {
            match device.receive(Duration::from_secs(20)).await {
                Arrived::Packet(Packet::PubAck { reason, .. } | Packet::PubRec { reason, .. }) => {
                    assert!(reason < 0x80, "refused with {reason:#04x}");
                    acknowledged.lock().unwrap().insert(number);
                    if qos == 2 {
                        _ = device.send(&wire::pubrel(publish.packet_id)).await;
                    }
                    break;
                }
                Arrived::Packet(_) => {}
                Arrived::Closed => return number + 1,
                Arrived::Nothing => panic!("no acknowledgement of {number} in 20 s"),
            }
        }
    }
    from + count
}

fn who_has_seen(members: &[Member]) -> BTreeMap<u64, Vec<&str>> {
    let mut seen: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for member in members {
        for number in &member.seen {
            seen.entry(*number).or_default().push(&member.id);
        }
    }
    seen
}

fn nobody_confirmed_what_another_did(members: &[Member]) {
    let mut confirmed: BTreeMap<u64, &str> = BTreeMap::new();
    for member in members {
        for number in &member.confirmed {
            if let Some(other) = confirmed.insert(*number, &member.id) {
                panic!(
                    "{number} was delivered to {other} and to {} after that",
                    member.id
                );
            }
        }
    }
}

#[test]
fn every_acknowledged_message_reaches_a_member_while_members_leave_and_crash() {
    run(async {
        let mut random = Random::announced("shared subscriptions and leaving members");
        let gateway = Gateway::start().await;
        // One session stays whatever happens, so that there is always somebody to give a message to.
        let mut members = vec![Member::new("anchor", V3, u32::MAX, &mut random)];
        for (n, (version, expiry_s)) in [(V3, 0), (V5, 0), (V5, 1), (V5, 0), (V5, 2)]
            .into_iter()
            .enumerate()
        {
            members.push(Member::new(
                &format!("m{n}"),
                version,
                expiry_s,
                &mut random,
            ));
        }
        members[0].drain(gateway.mqtt(), QUIET).await;
        let stop = Arc::new(AtomicBool::new(false));
        let mut working = JoinSet::new();
        for member in members {
            working.spawn(member.work(gateway.mqtt(), Arc::clone(&stop)));
        }
        let acknowledged = Mutex::default();
        for round in 0..rounds() {
            publish_numbers(gateway.mqtt(), 1, round * 200, 200, &acknowledged).await;
        }
        let acknowledged = acknowledged.into_inner().unwrap();
        assert_eq!(acknowledged.len() as u64, rounds() * 200);
        stop.store(true, Ordering::Relaxed);
        let mut members = working.join_all().await;
        members.sort_by(|a, b| a.id.cmp(&b.id));
        // The others' sessions have ended or do so; the anchor gets what they leave.
        for member in &members[1..] {
            Device::clean(gateway.mqtt(), V5, &member.id)
                .await
                .disconnect()
                .await;
        }
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            members[0].drain(gateway.mqtt(), QUIET).await;
            let seen = who_has_seen(&members);
            let missing: Vec<_> = acknowledged
                .iter()
                .filter(|number| !seen.contains_key(number))
                .collect();
            if missing.is_empty() {
                break;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "no member got {missing:?}"
            );
        }
        nobody_confirmed_what_another_did(&members);
        let confirmed: usize = members[1..].iter().map(|one| one.confirmed.len()).sum();
        assert!(confirmed > 0, "the others took part");
        gateway.finish().await;
    });
}

/// Rounds of publishing, each cut short by `kill -9`. Gives the members and what was acknowledged.
async fn kill_rounds(
    gateway: &mut Gateway,
    qos: u8,
    mut members: Vec<Member>,
    random: &mut Random,
) -> (Vec<Member>, BTreeSet<u64>) {
    let acknowledged = Arc::new(Mutex::new(BTreeSet::new()));
    let mut next = 0;
    for member in &mut members {
        member.drain(gateway.mqtt(), Duration::from_millis(1)).await;
    }
    for _ in 0..rounds().div_ceil(2) {
        let stop = Arc::new(AtomicBool::new(false));
        let mut working = JoinSet::new();
        for member in members {
            working.spawn(member.work(gateway.mqtt(), Arc::clone(&stop)));
        }
        let address = gateway.mqtt();
        let count = || acknowledged.lock().unwrap().len();
        let loaded = count() + LOAD_MIN;
        let publishing = tokio::spawn({
            let acknowledged = Arc::clone(&acknowledged);
            async move { publish_numbers(address, qos, next, 100_000, &acknowledged).await }
        });
        eventually(SOON, "the gateway is under load", || async {
            (count() >= loaded).then_some(())
        })
        .await;
        tokio::time::sleep(random.millis(1, 1000)).await;
        gateway.kill9();
        stop.store(true, Ordering::Relaxed);
        next = publishing.await.unwrap();
        members = working.join_all().await;
        gateway.restart().await;
    }
    for member in &mut members {
        member.drain(gateway.mqtt(), QUIET).await;
    }
    let acknowledged = acknowledged.lock().unwrap().clone();
    (members, acknowledged)
}

#[test]
fn persistent_members_get_every_acknowledged_qos_1_message_across_kill_9() {
    run(async {
        let mut random = Random::announced("shared QoS 1 and kill -9");
        let mut gateway = Gateway::start().await;
        let members = (0..4)
            .map(|n| {
                let version = if n % 2 == 0 { V3 } else { V5 };
                Member::new(&format!("m{n}"), version, u32::MAX, &mut random)
            })
            .collect();
        let (members, acknowledged) = kill_rounds(&mut gateway, 1, members, &mut random).await;
        let seen = who_has_seen(&members);
        for number in &acknowledged {
            assert!(seen.contains_key(number), "nobody got {number}");
        }
        for (number, who) in &seen {
            assert_eq!(
                who.len(),
                1,
                "{number} went to {who:?}, whose sessions stayed"
            );
        }
        gateway.finish().await;
    });
}

#[test]
fn persistent_members_complete_every_acknowledged_qos_2_message_exactly_once_across_kill_9() {
    run(async {
        let mut random = Random::announced("shared QoS 2 and kill -9");
        let mut gateway = Gateway::start().await;
        let members = (0..4)
            .map(|n| {
                let version = if n % 2 == 0 { V3 } else { V5 };
                Member::new(&format!("m{n}"), version, u32::MAX, &mut random)
            })
            .collect();
        let (members, acknowledged) = kill_rounds(&mut gateway, 2, members, &mut random).await;
        let seen = who_has_seen(&members);
        for number in &acknowledged {
            assert!(seen.contains_key(number), "nobody got {number}");
        }
        for (number, who) in &seen {
            assert_eq!(who.len(), 1, "{number} went to {who:?}");
        }
        for member in &members {
            assert!(
                member.received.is_empty(),
                "not completed: {:?}",
                member.received
            );
        }
        nobody_confirmed_what_another_did(&members);
        gateway.finish().await;
    });
}

#[test]
fn a_qos_2_message_is_shown_to_one_member_only_even_if_sessions_end_and_the_gateway_is_killed() {
    run(async {
        let mut random = Random::announced("ending sessions, shared QoS 2 and kill -9");
        let mut gateway = Gateway::start().await;
        let members = [0, 1, 1, 2, u32::MAX]
            .into_iter()
            .enumerate()
            .map(|(n, expiry_s)| Member::new(&format!("m{n}"), V5, expiry_s, &mut random))
            .collect();
        let (members, _) = kill_rounds(&mut gateway, 2, members, &mut random).await;
        for (number, who) in who_has_seen(&members) {
            assert_eq!(who.len(), 1, "{number} went to {who:?} [MQTT-4.8.2-5]");
        }
        gateway.finish().await;
    });
}
