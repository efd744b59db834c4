//! Many bots: connected at a rate, each in a task of its own that then plays its role.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use moorline_mqtt::{QoS, TopicFilter};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval_at};

use crate::bot::{Bot, Target};
use crate::clock::{Clock, Schedule};
use crate::console::progress;
use crate::report::Check;
use crate::stats::Latency;

/// How the devices come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ramp {
    /// How many.
    pub(crate) devices: usize,
    /// Connects per second; `None` is as fast as `at_once` allows.
    pub(crate) rate: Option<u32>,
    /// Handshakes under way at the same time.
    pub(crate) at_once: usize,
}

/// What became of the devices, counted by their own tasks.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Devices that got through CONNECT and SUBSCRIBE.
    pub(crate) connected: AtomicU64,
    /// Devices whose connection ended before it was to.
    pub(crate) lost: AtomicU64,
    errors: Mutex<BTreeMap<String, u64>>,
}

impl Tally {
    /// Counts something that went wrong, by its text.
    pub(crate) fn error(&self, text: String) {
        *self.errors.lock().entry(text).or_default() += 1;
    }

    /// What went wrong, the most frequent first, on one line; empty if nothing did.
    pub(crate) fn complaints(&self) -> String {
        let errors = self.errors.lock();
        let mut list: Vec<_> = errors
            .iter()
            .map(|(text, count)| (*count, text.as_str()))
            .collect();
        list.sort_unstable_by(|a, b| b.cmp(a));
        list.iter()
            .take(5)
            .map(|(count, text)| format!("{count} × {text}"))
            .collect::<Vec<_>>()
            .join("; ")
    }
}

/// Tells a bot's task when to leave.
#[derive(Debug, Clone)]
pub(crate) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Waits until it is time to leave. May be dropped and called again.
    pub(crate) async fn stopped(&mut self) {
        // An error means that the fleet is gone, which is also a time to leave.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// The connected devices.
pub(crate) struct Fleet {
    /// What became of them.
    pub(crate) tally: Arc<Tally>,
    /// From a device's due time (or its turn, without a rate) to its SUBACK.
    pub(crate) latency: Arc<Latency>,
    /// How long it took until the last one was there.
    pub(crate) took: Duration,
    devices: usize,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

impl Fleet {
    /// Connects the devices and returns when each has succeeded or failed. `filter` names what a
    /// device subscribes to at QoS 1; `role` is what it does until it is told to stop.
    pub(crate) async fn launch<F, R, Fut>(
        target: &Target,
        ramp: Ramp,
        run: &str,
        clock: Clock,
        tally: Arc<Tally>,
        filter: F,
        role: R,
    ) -> Result<Self>
    where
        F: Fn(usize) -> Option<TopicFilter> + Send + Sync + 'static,
        R: Fn(usize, Bot, Stop) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        let probe = Bot::connect(target, 0, &format!("bot-{run}-probe")).await;
        probe
            .context("the first device can't connect")?
            .disconnect()
            .await?;

        let begun_ns = clock.now_ns();
        let latency = Arc::new(Latency::new("connect and subscribe"));
        latency.count_from(begun_ns);
        let bar = progress("connecting", ramp.devices as u64);
        let (stop, stopped) = watch::channel(false);
        let shared = Arc::new(Shared {
            target: target.clone(),
            run: run.to_owned(),
            clock,
            latency: Arc::clone(&latency),
            tally: Arc::clone(&tally),
            turns: Semaphore::new(ramp.at_once.max(1)),
            arrived: Semaphore::new(0),
            bar: bar.clone(),
            filter,
            role,
        });
        let schedule = ramp.rate.map(|rate| Schedule {
            start_ns: begun_ns,
            duration: Duration::MAX,
            rate,
            lanes: 1,
        });
        let mut tasks = JoinSet::new();
        for index in 0..ramp.devices {
            let due_ns = schedule.and_then(|schedule| schedule.due_ns(0, index as u64));
            tasks.spawn(device(
                Arc::clone(&shared),
                index,
                due_ns,
                Stop(stopped.clone()),
            ));
        }
        let all = u32::try_from(ramp.devices).context("too many devices")?;
        let _arrivals = shared
            .arrived
            .acquire_many(all)
            .await
            .context("the fleet was closed")?;
        bar.finish_and_clear();
        let took = Duration::from_nanos(clock.now_ns() - begun_ns);
        Ok(Self {
            tally,
            latency,
            took,
            devices: ramp.devices,
            tasks,
            stop,
        })
    }

    /// Tells all devices to leave and waits until they have.
    pub(crate) async fn stop(mut self) {
        // Without receivers every device has ended already.
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
    }

    /// Whether every device connected and stayed.
    pub(crate) fn check(&self) -> Check {
        let connected = self.tally.connected.load(Ordering::Relaxed);
        let lost = self.tally.lost.load(Ordering::Relaxed);
        let complaints = self.tally.complaints();
        Check {
            name: "every device connected and stayed".to_owned(),
            ok: connected == self.devices as u64 && lost == 0,
            detail: format!(
                "{connected} of {} connected, {lost} lost{}",
                self.devices,
                prefixed(&complaints)
            ),
        }
    }
}

fn prefixed(complaints: &str) -> String {
    if complaints.is_empty() {
        String::new()
    } else {
        format!(": {complaints}")
    }
}

struct Shared<F, R> {
    target: Target,
    run: String,
    clock: Clock,
    latency: Arc<Latency>,
    tally: Arc<Tally>,
    turns: Semaphore,
    arrived: Semaphore,
    bar: ProgressBar,
    filter: F,
    role: R,
}

async fn device<F, R, Fut>(shared: Arc<Shared<F, R>>, index: usize, due_ns: Option<u64>, stop: Stop)
where
    F: Fn(usize) -> Option<TopicFilter>,
    R: Fn(usize, Bot, Stop) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    if let Some(due_ns) = due_ns {
        tokio::time::sleep_until(shared.clock.at(due_ns)).await;
    }
    let bot = {
        let _turn = shared.turns.acquire().await;
        let begun_ns = due_ns.unwrap_or_else(|| shared.clock.now_ns());
        let bot = handshake(&shared, index).await;
        if bot.is_ok() {
            shared.latency.record(begun_ns, shared.clock.now_ns());
        }
        bot
    };
    let bot = match bot {
        Ok(bot) => {
            shared.tally.connected.fetch_add(1, Ordering::Relaxed);
            Some(bot)
        }
        Err(error) => {
            shared.tally.error(format!("{error:#}"));
            None
        }
    };
    shared.bar.inc(1);
    shared.arrived.add_permits(1);
    if let Some(bot) = bot
        && let Err(error) = (shared.role)(index, bot, stop).await
    {
        shared.tally.lost.fetch_add(1, Ordering::Relaxed);
        shared.tally.error(format!("{error:#}"));
    }
}

async fn handshake<F, R>(shared: &Shared<F, R>, index: usize) -> Result<Bot>
where
    F: Fn(usize) -> Option<TopicFilter>,
{
    let mut bot = Bot::connect(&shared.target, index, &client_id(&shared.run, index)).await?;
    if let Some(filter) = (shared.filter)(index) {
        bot.subscribe(&filter, QoS::AtLeastOnce).await?;
    }
    Ok(bot)
}

/// The client id of device `index` of a run.
pub(crate) fn client_id(run: &str, index: usize) -> String {
    format!("bot-{run}-{index:06}")
}

/// Ticks when a ping is due.
pub(crate) fn pings(keep_alive_s: u16) -> Interval {
    let half = match keep_alive_s {
        0 => Duration::from_secs(86_400),
        s => Duration::from_millis(u64::from(s) * 500),
    };
    let mut interval = interval_at(tokio::time::Instant::now() + half, half);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
