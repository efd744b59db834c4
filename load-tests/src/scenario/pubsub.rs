//! `pubsub`: device to device at QoS 1 in pairs, each pair on a topic of its own. Works against any
//! broker: what does one delivered message cost it?

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use moorline_mqtt::{ByteString, TopicFilter, TopicName};
use tokio::sync::watch;
use tokio::time::sleep_until;

use super::{LOOK_EVERY, START_DELAY_NS, Setup, until};
use crate::clock::{Clock, Schedule, run_tag};
use crate::console::progress;
use crate::fleet::{Fleet, Ramp, Tally};
use crate::ledger::Ledger;
use crate::procfs::{self, Cpu};
use crate::report::{Check, Outcome, Plot};
use crate::roles::{Publishing, Receiving};
use crate::sampler::Sampler;
use crate::stats::{Latency, grouped, per_second};

/// How long the last messages may take.
const DRAIN_NS: u64 = 15_000_000_000;

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Publishers, and as many subscribers.
    pub(crate) pairs: usize,
    /// Messages per second of all publishers together.
    pub(crate) rate: u32,
    /// How long is measured.
    pub(crate) duration: Duration,
    /// What is sent before, at the same rate.
    pub(crate) warmup: Duration,
    /// Unacknowledged messages per publisher.
    pub(crate) window: usize,
    /// Bytes of a payload.
    pub(crate) payload_bytes: usize,
    /// Handshakes under way at the same time.
    pub(crate) at_once: usize,
}

fn topic(run: &str, pair: usize) -> ByteString {
    ByteString::from(format!("load/{run}/{pair:06}"))
}

/// Runs it.
pub(crate) async fn run(setup: &Setup, plan: &Plan, label: String) -> Result<Outcome> {
    let clock = Clock::start();
    let run = run_tag();
    let ledger = Arc::new(Ledger::new(plan.pairs));
    let tally = Arc::new(Tally::default());
    let (start, schedule) = watch::channel(None);
    let receiving = Arc::new(Receiving::new(&run, clock, Arc::clone(&ledger), "PUBLISH"));
    let publishing = Arc::new(Publishing {
        run: run.clone(),
        clock,
        ledger: Arc::clone(&ledger),
        tally: Arc::clone(&tally),
        schedule,
        window: plan.window,
        payload_bytes: plan.payload_bytes,
        finished: AtomicU64::new(0),
        acked: Latency::new("PUBACK received, from when it was due"),
        lateness: Latency::new("sent later than due (our own)"),
    });
    let fleet = connect(setup, plan, &run, clock, tally, &receiving, &publishing).await?;

    let sampler = Sampler::start(setup.server_pid, clock);
    let schedule = Schedule {
        start_ns: clock.now_ns() + START_DELAY_NS,
        duration: plan.warmup + plan.duration,
        rate: plan.rate,
        lanes: plan.pairs,
    };
    let measured_from_ns =
        schedule.start_ns + u64::try_from(plan.warmup.as_nanos()).unwrap_or(u64::MAX);
    receiving.count_from(measured_from_ns);
    publishing.count_from(measured_from_ns);
    start.send_replace(Some(schedule));

    let look = || -> Result<(Cpu, u64, u64)> {
        let cpu = setup
            .server_pid
            .map(procfs::cpu)
            .transpose()?
            .unwrap_or_default();
        Ok((
            cpu,
            receiving.delivered.load(Ordering::Relaxed),
            clock.now_ns(),
        ))
    };
    sleep_until(clock.at(measured_from_ns)).await;
    let before = look()?;
    let bar = progress("publishing", schedule.total());
    while clock.now_ns() < schedule.end_ns() {
        bar.set_position(receiving.delivered.load(Ordering::Relaxed));
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let after = look()?;
    until(clock, schedule.end_ns() + DRAIN_NS, || {
        bar.set_position(receiving.delivered.load(Ordering::Relaxed));
        publishing.finished.load(Ordering::Relaxed) == plan.pairs as u64
            && ledger.totals().missing == 0
    })
    .await;
    bar.finish_and_clear();

    let mut outcome = Outcome::new(label);
    outcome.fact("devices", "devices", 2.0 * plan.pairs as f64, "");
    outcome.fact(
        "rate_asked",
        "rate asked for",
        f64::from(plan.rate),
        "messages/s",
    );
    let delivered = after.1 - before.1;
    let reached = per_second(delivered, Duration::from_nanos(after.2 - before.2));
    outcome.fact("rate", "rate delivered", reached, "messages/s");
    if setup.server_pid.is_some() {
        cpu_facts(&mut outcome, after.0.since(before.0), delivered);
    } else {
        outcome
            .notes
            .push("without --server-pid the server's CPU is not measured".to_owned());
    }
    let totals = ledger.totals();
    outcome.checks.push(fleet.check());
    outcome.checks.extend(Check::accounts(&totals, 0));
    outcome
        .checks
        .push(all_answered(totals.accepted, schedule.total()));
    outcome.latencies = [
        &receiving.since_due,
        &receiving.since_sent,
        &publishing.acked,
        &publishing.lateness,
    ]
    .map(Latency::summary)
    .to_vec();
    outcome.plots.push(Plot::percentiles(&outcome.latencies));
    outcome.plots.extend(Plot::seconds(&outcome.latencies[0]));
    outcome
        .plots
        .extend(sampler.iter().flat_map(Sampler::plots));
    fleet.stop().await;
    Ok(outcome)
}

/// The first half of the devices publishes, the second half subscribes.
async fn connect(
    setup: &Setup,
    plan: &Plan,
    run: &str,
    clock: Clock,
    tally: Arc<Tally>,
    receiving: &Arc<Receiving>,
    publishing: &Arc<Publishing>,
) -> Result<Fleet> {
    let (pairs, keep_alive_s) = (plan.pairs, setup.target.keep_alive_s);
    let ramp = Ramp {
        devices: 2 * pairs,
        rate: None,
        at_once: plan.at_once,
    };
    let (receiving, publishing) = (Arc::clone(receiving), Arc::clone(publishing));
    let of_run = run.to_owned();
    let filter =
        move |index: usize| TopicFilter::parse(topic(&of_run, index.checked_sub(pairs)?)).ok();
    Fleet::launch(
        &setup.target,
        ramp,
        run,
        clock,
        tally,
        filter,
        move |index, bot, stop| {
            let (receiving, publishing) = (Arc::clone(&receiving), Arc::clone(&publishing));
            async move {
                let device = u32::try_from(index % pairs)?;
                if index < pairs {
                    let topic = TopicName::parse(topic(&publishing.run, index))?;
                    publishing
                        .play(bot, device, topic, stop, keep_alive_s)
                        .await
                } else {
                    receiving.play(bot, device, stop, keep_alive_s).await
                }
            }
        },
    )
    .await
}

/// What each message cost the server.
pub(super) fn cpu_facts(outcome: &mut Outcome, used: Cpu, messages: u64) {
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

/// An open loop that could not keep up shows here as well as in the latencies.
pub(super) fn all_answered(accepted: u64, planned: u64) -> Check {
    Check {
        name: "everything was sent and answered".to_owned(),
        ok: accepted == planned,
        detail: format!(
            "{} of {} planned messages have a positive answer",
            grouped(accepted),
            grouped(planned)
        ),
    }
}
