//! One lane of a publisher: a queue of calls, a connection, a window of unconfirmed messages.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures_util::future::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::ConfirmSelectOptions;
use lapin::types::ShortString;
use lapin::{Channel, Confirmation};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use super::confirms::{
    Confirm, gather, is_about_a_message, pass_behind_confirms, poll_once, publish,
};
use super::link::answered;
use super::metrics::LaneMetrics;
use super::window::{Item, Window};
use super::{Link, Topology};
use crate::StoreError;

/// The topology is made sure of again, after a message was returned or a refusal, at most this often.
const REDECLARE: Duration = Duration::from_secs(1);

/// For so long a queue that has taken nothing on a channel yet is not believed when it refuses: one whose leader is not
/// elected yet, as after a restart, refuses just like one that is full.
const GRACE: Duration = Duration::from_secs(10);
/// A broker that is not blocked confirms sooner than this, or it never will: the command to a queue that changed its
/// leader can be lost inside it.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);
/// The same where nothing was confirmed on this channel yet; longer each time.
const FIRST_CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// How often unconfirmed messages are looked at.
const WATCH: Duration = Duration::from_secs(1);
/// Between attempts meanwhile.
const PROBE_PAUSE: Duration = Duration::from_millis(250);

/// What callers share with the lane's task.
pub(super) struct Lane {
    waiting: Mutex<VecDeque<Item>>,
    changed: Notify,
    closed: AtomicBool,
    connected: AtomicBool,
}

impl Lane {
    pub(super) fn start(
        link: Arc<Link>,
        topology: Arc<Topology>,
        window_max: usize,
        metrics: LaneMetrics,
    ) -> Arc<Self> {
        let lane = Arc::new(Self {
            waiting: Mutex::default(),
            changed: Notify::new(),
            closed: AtomicBool::new(false),
            connected: AtomicBool::new(false),
        });
        let work = Work {
            lane: Arc::clone(&lane),
            link,
            topology,
            window_max: window_max.max(1),
            again: VecDeque::new(),
            careful: 0,
            held: HashMap::new(),
            window: Window::default(),
            gates: HashMap::new(),
            probes: VecDeque::new(),
            probe_at: Instant::now(),
            stuck: 0,
            warned: false,
            metrics,
        };
        tokio::spawn(work.run());
        lane
    }

    pub(super) fn push(&self, item: Item) {
        let mut waiting = self.waiting.lock();
        waiting.push_back(item);
        let first = waiting.len() == 1;
        drop(waiting);
        if first {
            self.changed.notify_one();
        }
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// Before a queue that is published to directly: the first message on a channel goes alone, so that nothing is behind it
/// that the queue might take after it refused that one.
struct Gate {
    is_open: bool,
    since: Instant,
    /// One message is on its way, or will be tried again.
    probed: bool,
    held: VecDeque<Item>,
}

/// Why there is no channel.
enum Unopened {
    Away,
    Undeclared(StoreError),
}

/// Why a channel is no longer used.
enum Ended {
    /// Nothing is left to be done.
    Closed,
    Broken(lapin::Error),
    /// The connection works and a confirm does not come.
    Stuck,
    /// The topology could not be made sure of.
    Undeclared(StoreError),
}

/// The task of a lane.
struct Work {
    lane: Arc<Lane>,
    link: Arc<Link>,
    topology: Arc<Topology>,
    window_max: usize,
    /// Goes out before anything that waits: what was unconfirmed, and what was held back.
    again: VecDeque<Item>,
    /// So many of the next go out one by one: one of them may be what the broker closed the channel for.
    careful: usize,
    /// Senders whose messages go one by one and have one unconfirmed, with what is held back meanwhile.
    held: HashMap<u64, VecDeque<Item>>,
    window: Window,
    /// By queue, on this channel.
    gates: HashMap<ShortString, Gate>,
    /// Goes through closed gates.
    probes: VecDeque<Item>,
    probe_at: Instant,
    /// Channels in a row on which a confirm did not come.
    stuck: u32,
    /// That the topology cannot be declared was said.
    warned: bool,
    metrics: LaneMetrics,
}

impl Work {
    async fn run(mut self) {
        loop {
            let opened = tokio::select! {
                opened = self.open() => opened,
                () = self.idle_and_closed() => return,
            };
            let (channel, declared) = match opened {
                Ok(opened) => opened,
                // The link says so itself, and waits before the next attempt.
                Err(Unopened::Away) => continue,
                Err(Unopened::Undeclared(error)) => {
                    self.undeclared(&error).await;
                    continue;
                }
            };
            self.warned = false;
            self.lane.connected.store(true, Ordering::Relaxed);
            let ended = self.publish_on(&channel, declared).await;
            self.lane.connected.store(false, Ordering::Relaxed);
            self.metrics
                .republished
                .increment(self.window.unconfirmed as u64);
            self.metrics.unconfirmed.set(0.0);
            // Nothing of the old connection may be in use when the messages go out again.
            drop(channel);
            self.link.reset().await;
            match ended {
                Ended::Closed => return,
                Ended::Broken(error) => self.recover(&error),
                Ended::Stuck => {
                    self.stuck = self.stuck.saturating_add(1);
                    let unconfirmed = self.window.unconfirmed;
                    tracing::warn!(
                        unconfirmed,
                        "RabbitMQ does not confirm, what is unconfirmed goes out again"
                    );
                    self.put_back();
                }
                Ended::Undeclared(error) => {
                    self.put_back();
                    self.undeclared(&error).await;
                }
            }
        }
    }

    async fn open(&self) -> Result<(Channel, usize), Unopened> {
        let channel = self.link.channel().await.map_err(|_| Unopened::Away)?;
        let confirming = channel.confirm_select(ConfirmSelectOptions::default());
        answered(confirming).await.map_err(|_| Unopened::Away)?;
        match self.topology.declare(&self.link, 0).await {
            Ok(declared) => Ok((channel, declared)),
            Err(error) => Err(Unopened::Undeclared(error)),
        }
    }

    /// The broker does not let the topology be what it should be: that is for a person to see to, and it is tried again.
    async fn undeclared(&mut self, error: &StoreError) {
        if !self.warned {
            tracing::warn!(%error, "an exchange or queue cannot be declared, nothing is published until it can");
            self.warned = true;
        }
        sleep(REDECLARE).await;
    }

    /// Resolves when nothing more will come and nothing waits.
    async fn idle_and_closed(&self) {
        loop {
            if self.lane.is_closed() && self.is_idle() {
                return;
            }
            self.lane.changed.notified().await;
        }
    }

    fn is_idle(&self) -> bool {
        self.window.unconfirmed == 0
            && self.again.is_empty()
            && self.probes.is_empty()
            && self.gates.values().all(|gate| gate.held.is_empty())
            && self.lane.waiting.lock().is_empty()
    }

    /// Of each queue in order: what went out, what was to go out again, what was held back behind it, what comes after that.
    fn put_back(&mut self) {
        let mut unconfirmed = self.window.drain();
        unconfirmed.append(&mut self.probes);
        for (_, mut gate) in self.gates.drain() {
            unconfirmed.append(&mut gate.held);
        }
        unconfirmed.append(&mut self.again);
        self.again = unconfirmed;
    }

    /// Makes what was unconfirmed the first to go out. If the broker closed the channel for what was published, the messages go one
    /// by one, and the one that is alone when it happens again is refused.
    fn recover(&mut self, error: &lapin::Error) {
        let blamed = is_about_a_message(error);
        let unconfirmed = self.window.unconfirmed;
        tracing::warn!(%error, unconfirmed, "the channel to RabbitMQ broke, what is unconfirmed goes out again");
        if blamed && self.careful > 0 && unconfirmed == 1 {
            for item in self.window.drain() {
                let refused = StoreError::Unavailable(format!("RabbitMQ refuses it: {error}"));
                self.finish(item, Err(refused));
            }
        }
        self.put_back();
        if blamed {
            self.careful = self.careful.max(unconfirmed.max(1));
        }
    }

    /// The next message that may go out now.
    fn next(&mut self) -> Option<Item> {
        while self.probe_at <= Instant::now()
            && let Some(probe) = self.probes.pop_front()
        {
            match probe.check() {
                Ok(()) => return Some(probe),
                Err(error) => self.finish(probe, Err(error)),
            }
        }
        loop {
            let from_again = self.again.pop_front();
            let is_again = from_again.is_some();
            let item = from_again.or_else(|| self.lane.waiting.lock().pop_front())?;
            if !is_again && let Some(held) = self.held.get_mut(&item.sender) {
                held.push_back(item);
                continue;
            }
            if let Err(error) = item.check() {
                self.end(item, Err(error));
                continue;
            }
            if item.is_alone() {
                self.held.entry(item.sender).or_default();
            }
            if let Some(item) = self.pass_gate(item) {
                return Some(item);
            }
        }
    }

    /// Keeps the item if there is one before it that the queue has not taken yet.
    fn pass_gate(&mut self, item: Item) -> Option<Item> {
        let Some(queue) = item.queue() else {
            return Some(item);
        };
        if let Some(gate) = self.gates.get_mut(queue) {
            if gate.is_open {
                return Some(item);
            }
            if gate.probed {
                gate.held.push_back(item);
                return None;
            }
            gate.probed = true;
            return Some(item);
        }
        let gate = Gate {
            is_open: false,
            since: Instant::now(),
            probed: true,
            held: VecDeque::new(),
        };
        self.gates.insert(queue.clone(), gate);
        Some(item)
    }

    /// Whether the refusal of this item is not to be believed yet.
    fn is_doubtful(&self, item: &Item) -> bool {
        let gate = item.queue().and_then(|queue| self.gates.get(queue));
        gate.is_some_and(|gate| !gate.is_open && gate.since.elapsed() < GRACE)
    }

    /// A message that went out is confirmed or refused.
    fn finish(&mut self, item: Item, result: Result<(), StoreError>) {
        let gate = item.queue().and_then(|queue| self.gates.get_mut(queue));
        if let Some(gate) = gate.filter(|gate| !gate.is_open) {
            if result.is_ok() {
                gate.is_open = true;
                self.again.append(&mut gate.held);
            } else if let Some(next) = gate.held.pop_front() {
                self.probes.push_back(next);
            } else {
                gate.probed = false;
            }
        }
        self.end(item, result);
    }

    /// The call is over; what was held back behind it may go on.
    fn end(&mut self, item: Item, result: Result<(), StoreError>) {
        self.careful = self.careful.saturating_sub(1);
        let sender = item.sender;
        let was_alone = item.is_alone();
        item.finish(result);
        if !was_alone {
            return;
        }
        let Some(mut held) = self.held.remove(&sender) else {
            return;
        };
        // As many as the next one that goes alone, which holds back the rest.
        while let Some(next) = held.pop_front() {
            if let Err(error) = next.check() {
                next.finish(Err(error));
                continue;
            }
            let alone = next.is_alone();
            self.again.push_back(next);
            if alone {
                self.held.insert(sender, held);
                return;
            }
        }
    }

    /// Whether a message waits for its confirm for too long, blocked times not counted.
    fn is_stuck(&self, counted_from: Instant, any_confirmed: bool) -> bool {
        let first = FIRST_CONFIRM_TIMEOUT * (1 << self.stuck.min(3));
        self.window.slots.iter().flatten().any(|sent| {
            let gate = sent.item.queue().and_then(|queue| self.gates.get(queue));
            let is_known = gate.map_or(any_confirmed, |gate| gate.is_open);
            let limit = if is_known {
                CONFIRM_TIMEOUT
            } else {
                first.min(CONFIRM_TIMEOUT)
            };
            sent.at.max(counted_from).elapsed() > limit
        })
    }

    async fn publish_on(&mut self, channel: &Channel, mut declared: usize) -> Ended {
        let mut confirms: FuturesUnordered<Confirm> = FuturesUnordered::new();
        let mut redeclared = Instant::now();
        let mut watch = tokio::time::interval(WATCH);
        let mut counted_from = Instant::now();
        let mut any_confirmed = false;
        loop {
            let window_max = if self.careful > 0 { 1 } else { self.window_max };
            while self.window.unconfirmed < window_max
                && let Some(item) = self.next()
            {
                if self.topology.len() > declared {
                    match self.topology.declare(&self.link, declared).await {
                        Ok(now) => declared = now,
                        Err(error) => {
                            self.again.push_front(item);
                            return Ended::Undeclared(error);
                        }
                    }
                }
                let confirm = publish(channel, &item.publishing);
                let number = self.window.push(item);
                let mut confirm = confirm.map(move |result| (number, result)).boxed();
                // The first poll gives it its delivery tag and its place among the frames.
                match poll_once(&mut confirm).await {
                    Poll::Pending => confirms.push(confirm),
                    Poll::Ready(done) => confirms.push(std::future::ready(done).boxed()),
                }
            }
            let has_room = self.window.unconfirmed < window_max;
            if self.lane.is_closed() && self.is_idle() {
                return Ended::Closed;
            }
            tokio::select! {
                biased;
                Some(confirmed) = confirms.next() => {
                    let mut confirmed = vec![confirmed];
                    gather(&mut confirms, &mut confirmed).await;
                    pass_behind_confirms(channel);
                    gather(&mut confirms, &mut confirmed).await;
                    let returned = match self.settle(confirmed) {
                        Ok(returned) => returned,
                        Err(error) => return Ended::Broken(error),
                    };
                    any_confirmed = true;
                    self.stuck = 0;
                    if returned && redeclared.elapsed() >= REDECLARE {
                        redeclared = Instant::now();
                        declared = 0;
                    }
                }
                _ = watch.tick() => {
                    self.metrics.unconfirmed.set(self.window.unconfirmed as f64);
                    if self.link.is_blocked() {
                        counted_from = Instant::now();
                    } else if self.is_stuck(counted_from, any_confirmed) {
                        return Ended::Stuck;
                    }
                }
                () = self.lane.changed.notified(), if has_room => {}
                () = sleep_until(self.probe_at), if has_room && !self.probes.is_empty() => {}
            }
        }
    }

    /// Ends the calls of confirmed messages; says whether any was returned. An error says that the channel is gone.
    fn settle(
        &mut self,
        confirmed: Vec<(u64, lapin::Result<Confirmation>)>,
    ) -> lapin::Result<bool> {
        let mut ended = Vec::with_capacity(confirmed.len());
        let mut broken = None;
        let mut any_returned = false;
        // Returned messages first: the client library hands each to some confirm, not to its own.
        for (number, result) in confirmed {
            match result {
                Ok(confirmation) => {
                    ended.push((number, confirmation.is_nack()));
                    if let Some(returned) = confirmation.take_message()
                        && let Some(item) = self.window.take_returned(&returned)
                    {
                        any_returned = true;
                        self.metrics.returned.increment(1);
                        let text = &returned.reply_text;
                        let what = format!("no queue takes it: {text}");
                        self.finish(item, Err(StoreError::Unavailable(what)));
                    }
                }
                Err(error) => broken = Some(error),
            }
        }
        ended.sort_unstable();
        for (number, is_nack) in ended {
            let Some(item) = self.window.take(number) else {
                continue;
            };
            if is_nack && self.is_doubtful(&item) {
                self.probes.push_back(item);
                self.probe_at = Instant::now() + PROBE_PAUSE;
                continue;
            }
            let result = if is_nack {
                self.metrics.nacked.increment(1);
                Err(StoreError::Full(format!(
                    "a queue that takes {} is at its limit",
                    item.publishing.routing_key
                )))
            } else {
                self.metrics.confirmed.increment(1);
                Ok(())
            };
            self.finish(item, result);
        }
        broken.map_or(Ok(any_returned), Err)
    }
}
