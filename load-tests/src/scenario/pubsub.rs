//! `pubsub`: device to device at QoS 1 in pairs, each pair on a topic of its own. Works against any
//! broker: what does one delivered message cost it?

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use moorline_mqtt::{ByteString, TopicFilter, TopicName};
use tokio::sync::watch;
use tokio::time::sleep_until;

use super::{LOOK_EVERY, Load, Setup, check_messages, cpu_facts, draw_messages, until};
use crate::clock::{Clock, run_tag};
use crate::console::progress;
use crate::fleet::{Fleet, Ramp, Tally};
use crate::ledger::Ledger;
use crate::procfs::{self, Cpu};
use crate::report::Outcome;
use crate::roles::{Flow, Publishing, Receiving};
use crate::sampler::Sampler;
use crate::stats::per_second;

/// How long the last messages may take.
const DRAIN_NS: u64 = 15_000_000_000;

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Publishers, and as many subscribers.
    pub(crate) pairs: usize,
    /// How many messages, and how long.
    pub(crate) load: Load,
    /// Within which bounds each publishes.
    pub(crate) flow: Flow,
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
    let publishing = Publishing::new(
        &run,
        clock,
        Arc::clone(&ledger),
        Arc::clone(&tally),
        schedule,
        plan.flow,
    );
    let publishing = Arc::new(publishing);
    let fleet = connect(setup, plan, &run, clock, tally, &receiving, &publishing).await?;

    let sampler = Sampler::start(setup.server_pid, clock);
    let (schedule, measured_from_ns) = plan.load.begin(clock, plan.pairs);
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
        f64::from(plan.load.rate),
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
    check_messages(&mut outcome, &fleet, &totals, 0, schedule.total());
    draw_messages(
        &mut outcome,
        &[
            &receiving.since_due,
            &receiving.since_sent,
            &publishing.acked,
            &publishing.lateness,
        ],
        sampler.as_ref(),
    );
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
