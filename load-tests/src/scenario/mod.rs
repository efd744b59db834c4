//! The scenarios: each takes a plan, runs it against one server, and returns what it found.

pub(crate) mod compare;
pub(crate) mod connect;
pub(crate) mod delay;
pub(crate) mod pubsub;
pub(crate) mod push;
pub(crate) mod upstream;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use crate::bot::Target;
use crate::clock::{Clock, Schedule};
use crate::fleet::{Fleet, Ramp, Tally};
use crate::http::Api;
use crate::ledger::Totals;
use crate::procfs::Cpu;
use crate::report::{Check, Outcome, Plot};
use crate::roles::Receiving;
use crate::sampler::Sampler;
use crate::stats::{Latency, grouped};

/// The server under test.
#[derive(Clone)]
pub(crate) struct Setup {
    /// Where devices connect.
    pub(crate) target: Target,
    /// Where backends call.
    pub(crate) api: Api,
    /// Its process, to be watched.
    pub(crate) server_pid: Option<u32>,
}

/// Connects the devices that receive; each has the account of its number.
async fn receivers(
    setup: &Setup,
    devices: usize,
    at_once: usize,
    receiving: &Arc<Receiving>,
    tally: &Arc<Tally>,
) -> Result<Fleet> {
    let (role, keep_alive_s) = (Arc::clone(receiving), setup.target.keep_alive_s);
    let ramp = Ramp {
        devices,
        rate: None,
        at_once,
    };
    Fleet::launch(
        &setup.target,
        ramp,
        &receiving.run,
        receiving.clock,
        Arc::clone(tally),
        |_| None,
        move |index, bot, stop| {
            let role = Arc::clone(&role);
            async move {
                role.play(bot, u32::try_from(index)?, stop, keep_alive_s)
                    .await
            }
        },
    )
    .await
}

/// The open loop of a scenario.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Messages per second of all senders together.
    pub(crate) rate: u32,
    /// How long is measured.
    pub(crate) duration: Duration,
    /// What is sent before, at the same rate, and not measured.
    pub(crate) warmup: Duration,
}

impl Load {
    /// The schedule that begins in a moment, and from when on it is measured.
    fn begin(self, clock: Clock, lanes: usize) -> (Schedule, u64) {
        let schedule = Schedule {
            start_ns: clock.now_ns() + START_DELAY_NS,
            duration: self.warmup + self.duration,
            rate: self.rate,
            lanes,
        };
        let warmup_ns = u64::try_from(self.warmup.as_nanos()).unwrap_or(u64::MAX);
        (schedule, schedule.start_ns.saturating_add(warmup_ns))
    }
}

/// From "everyone is connected" to the first message, so that all senders have heard of it.
const START_DELAY_NS: u64 = 200_000_000;
/// Between two looks at whether a run is over.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Looks until `done` says so; false if that took until the clock read `deadline_ns`.
async fn until(clock: Clock, deadline_ns: u64, mut done: impl FnMut() -> bool) -> bool {
    loop {
        if done() {
            return true;
        }
        if clock.now_ns() >= deadline_ns {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What each message cost the server.
fn cpu_facts(outcome: &mut Outcome, used: Cpu, messages: u64) {
    let each = |time: Duration| time.as_secs_f64() * 1e6 / messages.max(1) as f64;
    outcome.fact(
        "cpu_us_per_message",
        "server CPU per message",
        each(used.total()),
        "µs",
    );
    outcome.fact(
        "user_us_per_message",
        "  of it in user space",
        each(used.user),
        "µs",
    );
    outcome.fact(
        "system_us_per_message",
        "  of it in the kernel",
        each(used.system),
        "µs",
    );
}

/// The checks that every scenario with messages makes: `waiting` is what the server still holds,
/// `planned` what the schedule asked for.
fn check_messages(
    outcome: &mut Outcome,
    fleet: &Fleet,
    totals: &Totals,
    waiting: u64,
    planned: u64,
) {
    outcome.checks.push(fleet.check());
    outcome.checks.extend(Check::accounts(totals, waiting));
    outcome.checks.push(Check {
        name: "everything was sent and answered".to_owned(),
        ok: totals.accepted == planned,
        detail: format!(
            "{} of {} planned messages have a positive answer",
            grouped(totals.accepted),
            grouped(planned)
        ),
    });
}

/// Latencies and their plots, the first of them also second by second.
fn draw_messages(outcome: &mut Outcome, latencies: &[&Latency], sampler: Option<&Sampler>) {
    outcome.latencies = latencies.iter().map(|latency| latency.summary()).collect();
    outcome.plots.push(Plot::percentiles(&outcome.latencies));
    outcome.plots.extend(
        outcome
            .latencies
            .first()
            .map(Plot::seconds)
            .into_iter()
            .flatten(),
    );
    outcome
        .plots
        .extend(sampler.map(Sampler::plots).into_iter().flatten());
}
