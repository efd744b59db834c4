//! A random walk of a few clients against a running gateway, each step held against the [`World`].

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use moorline_tests::device::{Arrived, Device};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Packet, Publish, V3, V5, Value, property};
use moorline_tests::{Gateway, Random};

use super::world::{Certainty, Client, Subscription, Will, World};

/// The gateways of the walks send this many messages at once at most.
pub(crate) const IN_FLIGHT_MAX: usize = 8;
/// Packet identifiers of strays; neither side assigns them otherwise.
const STRAYS: u16 = 60_000;
/// The client that sees everything at QoS 0: that a will was published is known from it.
const OBSERVER: usize = 0;
/// Lines of the trace that a failure prints.
const TRACE_LINES: usize = 400;

/// An open connection.
struct Link {
    device: Device,
    /// Answers that were read while something else was awaited.
    replies: VecDeque<Packet>,
}

/// A QoS 2 publish of a client between PUBREC and PUBCOMP.
struct Unreleased {
    publish: Publish,
    /// The gateway has durably noted that it went on; until then a kill may make a repetition go on again.
    noted: bool,
}

pub(crate) struct Walk<'a> {
    gateway: &'a mut Gateway,
    random: Random,
    world: World,
    links: Vec<Option<Link>>,
    /// QoS 2 publishes of each client between PUBREC and PUBCOMP.
    unreleased: Vec<BTreeMap<u16, Unreleased>>,
    name: String,
    next_number: u64,
    trace: Vec<String>,
}

/// How a connection is cut while something is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Drop,
    Takeover,
    Kill,
}

impl<'a> Walk<'a> {
    pub(crate) async fn begin(gateway: &'a mut Gateway, seed: u64) -> Self {
        let mut random = Random::from_seed(seed);
        let name = format!("m{seed}");
        let mut clients = vec![Client::new(format!("{name}-observer"), V5)];
        for number in 0..2 + random.below(2) {
            let version = if random.one_in(2) { V3 } else { V5 };
            clients.push(Client::new(format!("{name}-{number}"), version));
        }
        let mut walk = Self {
            gateway,
            random,
            links: clients.iter().map(|_| None).collect(),
            unreleased: clients.iter().map(|_| BTreeMap::new()).collect(),
            world: World::of(clients),
            name,
            next_number: 0,
            trace: Vec::new(),
        };
        walk.connect_observer().await;
        walk
    }

    fn note(&mut self, line: String) {
        self.trace.push(line);
    }

    fn fail(&self, what: &str) -> ! {
        let from = self.trace.len().saturating_sub(TRACE_LINES);
        for line in &self.trace[from..] {
            eprintln!("    {line}");
        }
        panic!("{}: {what}", self.name);
    }

    /// One step and everything that must follow from it.
    pub(crate) async fn step(&mut self) {
        let clients = self.world.clients.len() as u64;
        let at = 1 + self.random.below(clients - 1) as usize;
        let choice = self.random.below(100);
        if choice < 3 {
            self.restart().await;
        } else if choice < 12 || !self.world.clients[at].online {
            self.connect(at).await;
        } else {
            match choice {
                12..=18 => self.disconnect(at).await,
                19..=28 => self.subscribe(at).await,
                29..=31 => self.unsubscribe(at).await,
                32..=59 => self.publish(at).await,
                60..=82 => self.acknowledge(at).await,
                83..=89 => self.go_on_with_qos_2(at).await,
                90..=96 => self.publish_and_cut(at).await,
                _ => self.stray(at).await,
            }
        }
        self.settle().await;
    }

    /// Everyone comes back and takes everything: nothing may be missing.
    pub(crate) async fn end(mut self) {
        self.note("the end".into());
        for at in 1..self.world.clients.len() {
            if !self.world.clients[at].online {
                self.connect_with(at, false, true, None).await;
            }
        }
        loop {
            self.settle().await;
            let before = self.trace.len();
            for at in 1..self.world.clients.len() {
                for (id, qos, released) in self.world.clients[at].acknowledgeable() {
                    self.acknowledge_one(at, id, qos, released, 0).await;
                }
            }
            if self.trace.len() == before {
                break;
            }
            self.ping_all().await;
        }
        for at in 1..self.world.clients.len() {
            if let Some(due) = self.world.clients[at].due.iter().find(|due| !due.doubtful) {
                self.fail(&format!("never came: {}", due.describe()));
            }
        }
        self.clean_up().await;
    }

    /// Leaves nothing behind that would slow down the next walk.
    async fn clean_up(&mut self) {
        for topic in std::mem::take(&mut self.world.retained).into_keys() {
            let clear = Publish::new(&topic, 0, Vec::new()).retained();
            self.send(OBSERVER, &wire::publish(V5, &clear)).await;
        }
        for at in 0..self.world.clients.len() {
            let client = &self.world.clients[at];
            let connect = Connect::new(client.version, &client.name);
            let device = Device::connect(self.gateway.mqtt(), connect).await;
            device.disconnect().await;
        }
    }

    // --- reading ---------------------------------------------------------------------------------

    async fn send(&mut self, at: usize, bytes: &[u8]) {
        let Some(link) = &mut self.links[at] else {
            self.fail(&format!("client {at} is not connected"));
        };
        if let Err(error) = link.device.send(bytes).await {
            self.fail(&format!("client {at} cannot send: {error}"));
        }
    }

    /// Reads one packet; answers are put aside, messages are held against the world.
    async fn read(&mut self, at: usize, what: &str) {
        let Some(link) = &mut self.links[at] else {
            self.fail(&format!("client {at} is not connected but awaits {what}"));
        };
        let packet = match link.device.receive(SOON).await {
            Arrived::Packet(packet) => packet,
            other => self.fail(&format!("client {at} awaits {what}: {other:?}")),
        };
        self.note(format!("{at} <- {}", short(&packet)));
        let client = &mut self.world.clients[at];
        let verdict = match &packet {
            Packet::Publish(publish) => client.on_publish(publish),
            Packet::PubRel { packet_id, .. } if *packet_id < STRAYS => client.on_pubrel(*packet_id),
            Packet::Disconnect { reason, .. } => Err(format!("disconnected with {reason:#04x}")),
            _ => {
                if let Some(link) = &mut self.links[at] {
                    link.replies.push_back(packet);
                }
                return;
            }
        };
        if let Err(problem) = verdict {
            self.fail(&format!("client {at}: {problem}: {}", short(&packet)));
        }
    }

    /// The next answer that `wanted` takes; no other may come before it.
    async fn reply<T>(
        &mut self,
        at: usize,
        what: &str,
        wanted: impl Fn(&Packet) -> Option<T>,
    ) -> T {
        loop {
            if let Some(reply) = self.links[at]
                .as_mut()
                .and_then(|link| link.replies.pop_front())
            {
                match wanted(&reply) {
                    Some(found) => return found,
                    None => self.fail(&format!("client {at} awaits {what}, not {reply:?}")),
                }
            }
            self.read(at, what).await;
        }
    }

    /// Reads until everything that must come has come.
    async fn settle(&mut self) {
        for at in 0..self.world.clients.len() {
            while let Some(what) = self.world.clients[at].awaits() {
                self.read(at, &what).await;
            }
        }
        if self.random.one_in(2) {
            self.ping_all().await;
        }
    }

    async fn ping_all(&mut self) {
        for at in 0..self.world.clients.len() {
            if self.world.clients[at].online {
                self.send(at, &wire::PINGREQ).await;
                self.reply(at, "PINGRESP", |packet| {
                    matches!(packet, Packet::PingResp).then_some(())
                })
                .await;
                self.world.clients[at].all_is_read();
            }
        }
    }

    // --- connections -----------------------------------------------------------------------------

    async fn connect_observer(&mut self) {
        self.connect_with(OBSERVER, true, false, None).await;
        let everything = Subscription {
            filter: format!("{}/#", self.name),
            qos: 0,
            no_local: false,
            retain_as_published: true,
            retain_handling: 2,
            id: 0,
        };
        self.subscribe_to(OBSERVER, vec![everything]).await;
    }

    async fn connect(&mut self, at: usize) {
        let clean_start = self.random.one_in(4);
        let persistent = match self.world.clients[at].version {
            V3 => !clean_start,
            _ => !self.random.one_in(3),
        };
        let will = self.random.one_in(3).then(|| self.will(at));
        self.connect_with(at, clean_start, persistent, will).await;
    }

    fn will(&mut self, at: usize) -> Will {
        let qos = self.random.below(3) as u8;
        Will {
            topic: self.topic(),
            payload: self.payload(),
            qos,
            retain: qos > 0 && self.random.one_in(4),
            delayed: self.world.clients[at].version == V5 && self.random.one_in(2),
        }
    }

    async fn connect_with(
        &mut self,
        at: usize,
        clean_start: bool,
        persistent: bool,
        will: Option<Will>,
    ) {
        let version = self.world.clients[at].version;
        let mut connect = Connect::new(version, &self.world.clients[at].name);
        connect.clean_start = clean_start;
        let mut window = IN_FLIGHT_MAX;
        if version == V5 {
            if persistent {
                connect = connect.with(property::SESSION_EXPIRY, Value::Four(3600));
            }
            if self.random.one_in(2) {
                window = 1 + self.random.below(4) as usize;
                connect = connect.with(property::RECEIVE_MAXIMUM, Value::Two(window as u16));
            }
        }
        connect.will = will.as_ref().map(|will| wire::Will {
            topic: will.topic.clone(),
            payload: will.payload.clone(),
            qos: will.qos,
            retain: will.retain,
            properties: if will.delayed {
                vec![(property::WILL_DELAY, Value::Four(3600))]
            } else {
                Vec::new()
            },
        });
        self.note(format!(
            "{at} connects: version {version}, clean start {clean_start}, persistent {persistent}, window {window}, will {will:?}"
        ));
        let old = self.links[at].take();
        let resumes = self
            .world
            .connect(at, clean_start, persistent, window, will);
        if !resumes {
            self.unreleased[at].clear();
        }
        let device = match Device::try_connect(self.gateway.mqtt(), connect).await {
            Ok(device) => device,
            Err(problem) => self.fail(&format!("client {at} could not connect: {problem}")),
        };
        if device.session_present != resumes {
            self.fail(&format!(
                "client {at}: session present {}, should be {resumes}",
                device.session_present
            ));
        }
        self.links[at] = Some(Link {
            device,
            replies: VecDeque::new(),
        });
        if let Some(mut old) = old {
            let reason = old.device.await_close(SOON).await;
            if version == V5 && reason != Some(0x8E) {
                self.fail(&format!("client {at}: taken over, and told {reason:?}"));
            }
        }
    }

    async fn disconnect(&mut self, at: usize) {
        // What a killed process may have retained or delayed in spite of this DISCONNECT would be a matter of its own.
        let will = self.world.clients[at].will.as_ref();
        let keeps_will = will.is_some_and(|will| will.retain || will.delayed);
        if keeps_will || self.random.one_in(2) {
            self.note(format!("{at} is cut off"));
            self.links[at] = None;
            self.world.clients[at].cut = true;
            self.world.disconnect(at, true);
            return;
        }
        let (mut reason, mut properties) = (0, Vec::new());
        let mut changes = None;
        if self.world.clients[at].version == V5 {
            if self.random.one_in(4) {
                reason = 4;
            }
            if self.random.one_in(3) {
                let persistent = self.world.clients[at].is_persistent() && self.random.one_in(2);
                let seconds = if persistent { 3600 } else { 0 };
                properties.push((property::SESSION_EXPIRY, Value::Four(seconds)));
                changes = Some(persistent);
            }
        }
        self.note(format!("{at} disconnects with {reason}, {properties:?}"));
        let version = self.world.clients[at].version;
        self.send(at, &wire::disconnect(version, reason, &properties))
            .await;
        if let Some(mut link) = self.links[at].take() {
            loop {
                match link.device.receive(SOON).await {
                    Arrived::Closed => break,
                    Arrived::Packet(Packet::Disconnect { reason, .. }) => {
                        self.fail(&format!(
                            "client {at}: DISCONNECT answered with {reason:#04x}"
                        ));
                    }
                    Arrived::Packet(_) => {}
                    Arrived::Nothing => self.fail(&format!("client {at}: not closed")),
                }
            }
        }
        let client = &mut self.world.clients[at];
        client.all_is_read();
        if let (Some(persistent), Some(session)) = (changes, &mut client.session) {
            session.persistent = persistent;
        }
        self.world.disconnect(at, reason == 4);
    }

    async fn restart(&mut self) {
        let publishes_a_will = |client: &Client| {
            let stays = client.is_persistent();
            client
                .will
                .as_ref()
                .is_some_and(|will| !(will.delayed && stays))
        };
        self.note_ends().await;
        let kills = self.random.below(3) > 0 || self.world.clients.iter().any(publishes_a_will);
        if kills {
            self.kill().await;
        } else {
            self.note("the gateway is stopped".into());
            self.gateway.sigterm().await;
            self.links.iter_mut().for_each(|link| *link = None);
            for at in 0..self.world.clients.len() {
                self.world.disconnect(at, true);
            }
            self.all_is_durable(None);
            self.gateway.restart().await;
        }
        self.connect_observer().await;
    }

    /// Nothing says when the end of a session has reached the disk, but a new one begins behind it.
    async fn note_ends(&mut self) {
        for at in 0..self.world.clients.len() {
            if self.world.clients[at].ended_unnoted {
                self.connect_with(at, true, false, None).await;
            }
        }
    }

    async fn kill(&mut self) {
        self.note("the gateway is killed".into());
        self.gateway.kill9();
        self.links.iter_mut().for_each(|link| *link = None);
        self.world.killed();
        self.gateway.restart().await;
    }

    // --- subscriptions ---------------------------------------------------------------------------

    async fn subscribe(&mut self, at: usize) {
        let mut wanted = Vec::new();
        let v5 = self.world.clients[at].version == V5;
        let id = if v5 && self.random.one_in(2) {
            1 + self.random.below(1000) as u32
        } else {
            0
        };
        for _ in 0..1 + self.random.below(3) {
            let filter = self.filter();
            if wanted.iter().any(|one: &Subscription| one.filter == filter) {
                continue;
            }
            wanted.push(Subscription {
                filter,
                qos: self.random.below(3) as u8,
                no_local: v5 && self.random.one_in(4),
                retain_as_published: v5 && self.random.one_in(2),
                retain_handling: if v5 { self.random.below(3) as u8 } else { 0 },
                id,
            });
        }
        if !self.world.has_room_for_retained(at, &wanted) {
            return self.acknowledge(at).await;
        }
        self.subscribe_to(at, wanted).await;
    }

    async fn subscribe_to(&mut self, at: usize, wanted: Vec<Subscription>) {
        let list: Vec<(&str, u8)> = wanted
            .iter()
            .map(|one| {
                let options = one.qos
                    | u8::from(one.no_local) << 2
                    | u8::from(one.retain_as_published) << 3
                    | one.retain_handling << 4;
                (one.filter.as_str(), options)
            })
            .collect();
        let mut properties = Vec::new();
        if wanted[0].id > 0 {
            properties.push((property::SUBSCRIPTION_ID, Value::Var(wanted[0].id)));
        }
        self.note(format!("{at} subscribes to {list:x?}, {properties:?}"));
        let version = self.world.clients[at].version;
        let bytes = wire::subscribe(version, STRAYS, &properties, &list);
        self.send(at, &bytes).await;
        let granted: Vec<u8> = wanted.iter().map(|one| one.qos).collect();
        for one in wanted {
            self.world.subscribe(at, one);
        }
        let codes = self
            .reply(at, "SUBACK", |packet| match packet {
                Packet::SubAck {
                    packet_id: STRAYS,
                    codes,
                } => Some(codes.clone()),
                _ => None,
            })
            .await;
        if codes != granted {
            self.fail(&format!(
                "client {at}: SUBACK {codes:?}, should be {granted:?}"
            ));
        }
    }

    async fn unsubscribe(&mut self, at: usize) {
        let filter = self.filter();
        self.note(format!("{at} unsubscribes from {filter}"));
        let version = self.world.clients[at].version;
        self.send(at, &wire::unsubscribe(version, STRAYS, &[&filter]))
            .await;
        let codes = self
            .reply(at, "UNSUBACK", |packet| match packet {
                Packet::UnsubAck {
                    packet_id: STRAYS,
                    codes,
                } => Some(codes.clone()),
                _ => None,
            })
            .await;
        let code = if self.world.unsubscribe(at, &filter) {
            0
        } else {
            0x11
        };
        if version == V5 && codes != [code] {
            self.fail(&format!(
                "client {at}: UNSUBACK {codes:?}, should be {code:#04x}"
            ));
        }
    }

    fn filter(&mut self) -> String {
        let tails = ["a", "b", "a/x", "+", "#", "a/+", "a/#", "+/x"];
        let tail = tails[self.random.below(tails.len() as u64) as usize];
        format!("{}/{tail}", self.name)
    }

    fn topic(&mut self) -> String {
        if self.random.one_in(6) {
            let clients = self.world.clients.len() as u64;
            let at = 1 + self.random.below(clients - 1) as usize;
            return format!("d/{}/x", self.world.clients[at].name);
        }
        let tails = ["a", "b", "a/x"];
        let tail = tails[self.random.below(tails.len() as u64) as usize];
        format!("{}/{tail}", self.name)
    }

    fn payload(&mut self) -> Vec<u8> {
        self.next_number += 1;
        self.next_number.to_string().into_bytes()
    }

    // --- what clients publish --------------------------------------------------------------------

    /// A packet identifier that no unreleased publish has; few, so that they are used again.
    fn packet_id(&mut self, at: usize) -> Option<u16> {
        let id = 1 + self.random.below(5) as u16;
        (!self.unreleased[at].contains_key(&id)).then_some(id)
    }

    async fn publish(&mut self, at: usize) {
        let qos = self.random.below(3) as u8;
        let Some(packet_id) = self.packet_id(at) else {
            return;
        };
        let mut publish = Publish::new(&self.topic(), qos, self.payload());
        // What is retained of QoS 0 is lost with the process, maybe.
        if qos > 0 && self.random.one_in(4) {
            publish.retain = true;
            if self.random.one_in(3) {
                publish.payload.clear();
            }
        }
        if qos > 0 {
            publish.packet_id = packet_id;
        }
        self.note(format!("{at} publishes {}", short_publish(&publish)));
        let stored = self.world.publish(at, &publish, Certainty::Certain, None);
        self.send_publish(at, &publish).await;
        if stored {
            self.all_is_durable(Some((at, packet_id)));
        }
        if qos == 2 && self.random.one_in(2) {
            self.release(at, packet_id).await;
        }
    }

    /// Everything told to the stores before has reached the disk, but not what follows from `just_now`.
    fn all_is_durable(&mut self, just_now: Option<(usize, u16)>) {
        self.world.all_is_durable();
        for (at, unreleased) in self.unreleased.iter_mut().enumerate() {
            for (id, held) in unreleased {
                held.noted |= just_now != Some((at, *id));
            }
        }
    }

    /// Sends a PUBLISH and awaits PUBACK or PUBREC.
    async fn send_publish(&mut self, at: usize, publish: &Publish) {
        let version = self.world.clients[at].version;
        self.send(at, &wire::publish(version, publish)).await;
        let id = publish.packet_id;
        let reason = match publish.qos {
            0 => 0,
            1 => {
                self.reply(at, "PUBACK", |packet| match packet {
                    Packet::PubAck { packet_id, reason } if *packet_id == id => Some(*reason),
                    _ => None,
                })
                .await
            }
            _ => {
                let reason = self
                    .reply(at, "PUBREC", |packet| match packet {
                        Packet::PubRec { packet_id, reason } if *packet_id == id => Some(*reason),
                        _ => None,
                    })
                    .await;
                let publish = publish.clone();
                let noted = false;
                self.unreleased[at]
                    .entry(id)
                    .or_insert(Unreleased { publish, noted });
                reason
            }
        };
        if reason >= 0x80 {
            self.fail(&format!("client {at}: refused with {reason:#04x}"));
        }
    }

    async fn release(&mut self, at: usize, id: u16) {
        self.note(format!("{at} releases {id}"));
        self.send(at, &wire::pubrel(id)).await;
        self.completed(at, id, 0).await;
        self.unreleased[at].remove(&id);
    }

    async fn completed(&mut self, at: usize, id: u16, wanted: u8) {
        let reason = self
            .reply(at, "PUBCOMP", |packet| match packet {
                Packet::PubComp { packet_id, reason } if *packet_id == id => Some(*reason),
                _ => None,
            })
            .await;
        if self.world.clients[at].version == V5 && reason != wanted {
            self.fail(&format!(
                "client {at}: PUBCOMP with {reason:#04x}, not {wanted:#04x}"
            ));
        }
    }

    /// Releases or repeats a QoS 2 PUBLISH; a repetition goes nowhere.
    async fn go_on_with_qos_2(&mut self, at: usize) {
        let ids: Vec<u16> = self.unreleased[at].keys().copied().collect();
        if ids.is_empty() {
            return self.publish(at).await;
        }
        let id = ids[self.random.below(ids.len() as u64) as usize];
        if self.random.one_in(2) {
            return self.release(at, id).await;
        }
        let held = &self.unreleased[at][&id];
        let (mut again, noted) = (held.publish.clone(), held.noted);
        again.dup = true;
        self.note(format!("{at} repeats {}", short_publish(&again)));
        if !noted {
            self.world.repeat(at, &again, true);
        }
        self.send_publish(at, &again).await;
    }

    /// Publishes, and loses the connection before the answer; comes back and repeats.
    async fn publish_and_cut(&mut self, at: usize) {
        if !self.world.clients[at].is_persistent() {
            return self.publish(at).await;
        }
        let cut = [Cut::Drop, Cut::Takeover, Cut::Kill][self.random.below(3) as usize];
        if cut == Cut::Kill {
            self.note_ends().await;
        }
        let concerns = |other: usize| other == at || cut == Cut::Kill;
        let has_will = self
            .world
            .clients
            .iter()
            .enumerate()
            .any(|(other, client)| concerns(other) && client.will.is_some());
        let Some(packet_id) = self.packet_id(at).filter(|_| !has_will) else {
            return self.publish(at).await;
        };
        let mut publish = Publish::new(
            &self.topic(),
            1 + self.random.below(2) as u8,
            self.payload(),
        );
        publish.packet_id = packet_id;
        let pause = self.random.below(4);
        self.note(format!(
            "{at} publishes {} and is cut: {cut:?} after {pause} ms",
            short_publish(&publish)
        ));
        self.world.publish(at, &publish, Certainty::Doubtful, None);
        let version = self.world.clients[at].version;
        self.send(at, &wire::publish(version, &publish)).await;
        if pause > 0 {
            // Not for anything to happen, but for more or less of it to have happened.
            tokio::time::sleep(Duration::from_millis(pause - 1)).await;
        }
        match cut {
            Cut::Drop => {
                self.links[at] = None;
                self.world.clients[at].cut = true;
                self.world.disconnect(at, true);
            }
            Cut::Takeover => {}
            Cut::Kill => self.kill().await,
        }
        self.connect_with(at, false, true, None).await;
        if cut == Cut::Kill {
            self.connect_observer().await;
        }
        publish.dup = true;
        self.note(format!("{at} repeats {}", short_publish(&publish)));
        self.world
            .repeat(at, &publish, publish.qos == 1 || cut == Cut::Kill);
        self.send_publish(at, &publish).await;
        if publish.qos == 2 && self.random.one_in(2) {
            self.release(at, packet_id).await;
        }
    }

    // --- what clients acknowledge ----------------------------------------------------------------

    async fn acknowledge(&mut self, at: usize) {
        let mut open = self.world.clients[at].acknowledgeable();
        let refuses = self.world.clients[at].version == V5 && self.random.one_in(10);
        let reason = if refuses { 0x83 } else { 0 };
        let all = self.random.one_in(4);
        while !open.is_empty() {
            let chosen = self.random.below(open.len() as u64) as usize;
            let (id, qos, released) = open.remove(chosen);
            self.acknowledge_one(at, id, qos, released, reason).await;
            if !all {
                return;
            }
        }
    }

    async fn acknowledge_one(&mut self, at: usize, id: u16, qos: u8, released: bool, reason: u8) {
        let client = &mut self.world.clients[at];
        let refuses = reason > 0 && !released;
        let (first, what) = match (qos, released) {
            (1, _) => (0x40, "PUBACK"),
            (_, false) => (0x50, "PUBREC"),
            (_, true) => (0x70, "PUBCOMP"),
        };
        if qos == 2 && !released && !refuses {
            client.recorded(id);
        } else {
            client.acknowledged(id);
        }
        self.note(format!(
            "{at} -> {what} {id}{}",
            if refuses { " refusing" } else { "" }
        ));
        let [high, low] = id.to_be_bytes();
        let body = if refuses {
            vec![high, low, reason]
        } else {
            vec![high, low]
        };
        self.send(at, &wire::packet(first, &body)).await;
    }

    /// Acknowledgements of what was never sent change nothing.
    async fn stray(&mut self, at: usize) {
        let id = STRAYS + self.random.below(100) as u16;
        let choice = self.random.below(4);
        self.note(format!("{at} sends a stray, {choice} of {id}"));
        match choice {
            0 => self.send(at, &wire::puback(id)).await,
            1 => self.send(at, &wire::pubcomp(id)).await,
            2 => {
                self.send(at, &wire::pubrel(id)).await;
                self.completed(at, id, 0x92).await;
            }
            _ => {
                self.send(at, &wire::pubrec(id)).await;
                let reason = self
                    .reply(at, "PUBREL", |packet| match packet {
                        Packet::PubRel { packet_id, reason } if *packet_id == id => Some(*reason),
                        _ => None,
                    })
                    .await;
                if self.world.clients[at].version == V5 && reason != 0x92 {
                    self.fail(&format!("client {at}: PUBREL with {reason:#04x}, not 0x92"));
                }
            }
        }
    }
}

fn short(packet: &Packet) -> String {
    match packet {
        Packet::Publish(publish) => short_publish(publish),
        other => format!("{other:?}"),
    }
}

fn short_publish(publish: &Publish) -> String {
    format!(
        "{:?} on {}, QoS {}, packet id {}{}{}, {:?}",
        publish.text(),
        publish.topic,
        publish.qos,
        publish.packet_id,
        if publish.dup { ", dup" } else { "" },
        if publish.retain { ", retain" } else { "" },
        publish.properties
    )
}
