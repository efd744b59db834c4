//! Devices: each is a task with one MQTT connection at a time, which takes, acknowledges and remembers every message, says
//! numbers upstream, and comes back elsewhere when its connection ends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use moorline_tests::Random;
use moorline_tests::device::{Arrived, Device};
use moorline_tests::wire::{self, Connect, Packet, Publish, V3, V5, Will};
use tokio::task::JoinSet;

use super::world::Addresses;

/// A message that arrived.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub(crate) number: u64,
    /// The message id, which 3.1.1 has no place for.
    pub(crate) id: Option<String>,
    pub(crate) at: Instant,
    /// The node it came from.
    pub(crate) node: usize,
}

/// What one device remembers.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) arrived: Vec<Arrival>,
    /// The numbers it said upstream and has the PUBACK of.
    pub(crate) acknowledged: Vec<u64>,
    /// How often it got a connection.
    pub(crate) connects: u64,
    /// How often a connection ended that it did not end itself.
    pub(crate) lost: u64,
    /// Where it is connected.
    pub(crate) node: Option<usize>,
    /// Old connections that the server did not close.
    pub(crate) left_open: u64,
    /// Something was said upstream and has no PUBACK.
    pub(crate) speaking: bool,
}

/// What a device does besides taking messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Habits {
    /// Pause between two upstream messages.
    pub(crate) says_every: Duration,
    /// Goes to another node after so long at most, leaving its old connection as it is.
    pub(crate) hops_within: Option<Duration>,
    /// Leaves a will that says so when its session is thought to have lost its device.
    pub(crate) has_will: bool,
}

impl Habits {
    pub(crate) const STEADY: Self = Self {
        says_every: Duration::from_secs(1),
        hops_within: None,
        has_will: false,
    };
}

/// A number of devices.
#[derive(Debug)]
pub(crate) struct Bots {
    pub(crate) names: Vec<String>,
    pub(crate) memories: Vec<Arc<Mutex<Memory>>>,
    control: Arc<Control>,
    tasks: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Control {
    stop: AtomicBool,
    quiet: AtomicBool,
    /// Those whose habit it is change nodes.
    restless: AtomicBool,
    /// One more than the node that every other device is to leave.
    leave: AtomicU64,
    online: AtomicU64,
}

impl Bots {
    /// Lets `count` devices connect to `nodes`.
    pub(crate) async fn start(
        count: usize,
        nodes: &Addresses,
        random: &mut Random,
        habits: Habits,
    ) -> Self {
        let names: Vec<String> = (0..count).map(|at| format!("bot-{at}")).collect();
        let memories: Vec<Arc<Mutex<Memory>>> = (0..count).map(|_| Arc::default()).collect();
        let control = Arc::new(Control::default());
        let mut tasks = JoinSet::new();
        for (at, name) in names.iter().enumerate() {
            let bot = Bot {
                name: name.clone(),
                version: if at % 2 == 0 { V5 } else { V3 },
                nodes: nodes.clone(),
                random: Random::from_seed(random.next()),
                habits,
                memory: Arc::clone(&memories[at]),
                control: Arc::clone(&control),
                next: 0,
                unconfirmed: None,
                home: None,
                moves_when_told: at % 4 < 2,
            };
            tasks.spawn(bot.live());
        }
        let bots = Self {
            names,
            memories,
            control,
            tasks,
        };
        bots.await_online().await;
        bots
    }

    /// Waits until every device is connected.
    pub(crate) async fn await_online(&self) {
        let count = self.names.len() as u64;
        moorline_tests::eventually(
            Duration::from_secs(90),
            "all devices are online",
            || async { (self.online() == count).then_some(()) },
        )
        .await;
    }

    pub(crate) fn online(&self) -> u64 {
        self.control.online.load(Ordering::Acquire)
    }

    /// Connections that ended without the device's doing, all together.
    pub(crate) fn lost(&self) -> u64 {
        let lost = |memory: &Arc<Mutex<Memory>>| memory.lock().unwrap().lost;
        self.memories.iter().map(lost).sum()
    }

    /// The devices that are connected to a node.
    pub(crate) fn on_node(&self, node: usize) -> Vec<usize> {
        (0..self.names.len())
            .filter(|at| self.memories[*at].lock().unwrap().node == Some(node))
            .collect()
    }

    /// Nothing new is said upstream.
    pub(crate) fn be_quiet(&self) {
        self.control.quiet.store(true, Ordering::Release);
    }

    /// Those whose habit it is change nodes from now on, or stay where they are.
    pub(crate) fn hop(&self, restless: bool) {
        self.control.restless.store(restless, Ordering::Release);
    }

    /// Every other device of `node` connects elsewhere and leaves its old connection as it is.
    pub(crate) fn leave(&self, node: usize) {
        self.control.leave.store(node as u64 + 1, Ordering::Release);
    }

    /// Old connections of devices that moved which the server did not close, all together.
    pub(crate) fn left_open(&self) -> u64 {
        let open = |memory: &Arc<Mutex<Memory>>| memory.lock().unwrap().left_open;
        self.memories.iter().map(open).sum()
    }

    /// Upstream messages that have their PUBACK, all together.
    pub(crate) fn acknowledged(&self) -> usize {
        let count = |memory: &Arc<Mutex<Memory>>| memory.lock().unwrap().acknowledged.len();
        self.memories.iter().map(count).sum()
    }

    /// Waits until nothing that was said upstream lacks its PUBACK.
    pub(crate) async fn await_acknowledged(&self) {
        self.be_quiet();
        moorline_tests::eventually(Duration::from_secs(60), "every PUBACK", || async {
            let speaks = |memory: &Arc<Mutex<Memory>>| memory.lock().unwrap().speaking;
            (!self.memories.iter().any(speaks)).then_some(())
        })
        .await;
    }

    /// Lets the devices go; what they remember stays.
    pub(crate) async fn stop(&mut self) {
        self.control.stop.store(true, Ordering::Release);
        while let Some(done) = self.tasks.join_next().await {
            if let Err(panic) = done {
                std::panic::resume_unwind(panic.into_panic());
            }
        }
    }
}

struct Bot {
    name: String,
    version: u8,
    nodes: Addresses,
    random: Random,
    habits: Habits,
    memory: Arc<Mutex<Memory>>,
    control: Arc<Control>,
    /// The next number to say.
    next: u64,
    /// What was said and has no PUBACK.
    unconfirmed: Option<Publish>,
    home: Option<usize>,
    moves_when_told: bool,
}

/// Why a connection is over.
enum Over {
    Lost,
    Hop,
    Stopped,
}

impl Bot {
    async fn live(mut self) {
        let mut old = JoinSet::new();
        while !self.control.stop.load(Ordering::Acquire) {
            let Some((node, mut device)) = self.connect().await else {
                let pause = self.random.millis(50, 250);
                tokio::time::sleep(pause).await;
                continue;
            };
            self.control.online.fetch_add(1, Ordering::AcqRel);
            let over = self.serve(node, &mut device).await;
            self.control.online.fetch_sub(1, Ordering::AcqRel);
            self.memory.lock().unwrap().node = None;
            match over {
                Over::Lost => self.memory.lock().unwrap().lost += 1,
                Over::Stopped => {
                    device.disconnect().await;
                    break;
                }
                Over::Hop => {
                    let memory = Arc::clone(&self.memory);
                    old.spawn(async move {
                        // The server ends what it no longer owns; what it still sends there is not taken.
                        let closed = async {
                            while !matches!(device.receive(CLOSES).await, Arrived::Closed) {}
                        };
                        if tokio::time::timeout(CLOSES, closed).await.is_err() {
                            memory.lock().unwrap().left_open += 1;
                        }
                    });
                    while old.try_join_next().is_some() {}
                }
            }
        }
        old.join_all().await;
    }

    async fn connect(&mut self) -> Option<(usize, Device)> {
        let (node, address) = self.nodes.any(&mut self.random, self.home)?;
        self.home = Some(node);
        let mut connect = Connect::new(self.version, &self.name)
            .persistent()
            .keep_alive(30);
        if self.habits.has_will {
            connect = connect.with_will(Will {
                topic: format!("wills/{}", self.name),
                payload: b"gone".to_vec(),
                qos: 1,
                ..Will::default()
            });
        }
        let device = tokio::time::timeout(
            Duration::from_secs(15),
            Device::try_connect(address, connect),
        )
        .await
        .ok()?
        .ok()?;
        let mut memory = self.memory.lock().unwrap();
        memory.connects += 1;
        memory.node = Some(node);
        Some((node, device))
    }

    async fn serve(&mut self, node: usize, device: &mut Device) -> Over {
        let mut say_at = Instant::now() + self.random.millis(0, 1000);
        let mut ping_at = Instant::now() + PINGS;
        let hop_at = self
            .habits
            .hops_within
            .map(|within| Instant::now() + within.mul_f64(self.random.below(100) as f64 / 100.0));
        if let Some(unconfirmed) = &mut self.unconfirmed {
            unconfirmed.dup = device.session_present;
            let bytes = wire::publish(self.version, unconfirmed);
            if device.send(&bytes).await.is_err() {
                return Over::Lost;
            }
        }
        loop {
            if self.control.stop.load(Ordering::Acquire) {
                return Over::Stopped;
            }
            let now = Instant::now();
            let leave = self.control.leave.load(Ordering::Acquire);
            if self.moves_when_told && leave == node as u64 + 1 {
                return Over::Hop;
            }
            let restless = self.control.restless.load(Ordering::Acquire);
            if restless && hop_at.is_some_and(|at| at <= now) {
                return Over::Hop;
            }
            if ping_at <= now {
                ping_at = now + PINGS;
                if device.send(&wire::PINGREQ).await.is_err() {
                    return Over::Lost;
                }
            }
            if say_at <= now && self.unconfirmed.is_none() {
                say_at = now + self.habits.says_every;
                // Said before the order to be quiet is looked at: whoever waits for PUBACKs sees it.
                self.memory.lock().unwrap().speaking = true;
                if self.control.quiet.load(Ordering::Acquire) {
                    self.memory.lock().unwrap().speaking = false;
                } else {
                    let topic = format!("up/{}", self.name);
                    let mut publish = Publish::new(&topic, 1, self.next.to_string());
                    publish.packet_id = device.packet_id();
                    self.next += 1;
                    let bytes = wire::publish(self.version, &publish);
                    self.unconfirmed = Some(publish);
                    if device.send(&bytes).await.is_err() {
                        return Over::Lost;
                    }
                }
            }
            let mut next = now + Duration::from_millis(500);
            if self.unconfirmed.is_none() {
                next = next.min(say_at);
            }
            if let Some(hop_at) = hop_at.filter(|_| restless) {
                next = next.min(hop_at);
            }
            let patience = next
                .saturating_duration_since(Instant::now())
                .clamp(Duration::from_millis(1), Duration::from_millis(500));
            match device.receive(patience).await {
                Arrived::Packet(packet) => self.take(node, device, packet).await,
                Arrived::Nothing => {}
                Arrived::Closed => return Over::Lost,
            }
        }
    }

    async fn take(&mut self, node: usize, device: &mut Device, packet: Packet) {
        match packet {
            Packet::Publish(publish) => {
                let arrival = Arrival {
                    number: publish.text().parse().expect("pushes are numbers"),
                    id: publish.user_property("message-id").map(str::to_owned),
                    at: Instant::now(),
                    node,
                };
                self.memory.lock().unwrap().arrived.push(arrival);
                device.acknowledge(&publish).await;
            }
            Packet::PubAck { packet_id, reason } => {
                let said = self
                    .unconfirmed
                    .take_if(|publish| publish.packet_id == packet_id);
                if let Some(said) = said {
                    let number = said.text().parse().expect("it said a number");
                    let mut memory = self.memory.lock().unwrap();
                    memory.speaking = false;
                    if reason < 0x80 {
                        memory.acknowledged.push(number);
                    } else {
                        // Refused: said again, as a new message with the same number.
                        self.next = number;
                    }
                }
            }
            _ => {}
        }
    }
}

/// How long the server may take to close a connection that another one displaced.
const CLOSES: Duration = Duration::from_secs(45);
const PINGS: Duration = Duration::from_secs(10);
