//! `push`: HTTP in, PUBLISH and PUBACK out, as an open loop. How fast, and is anything lost?
//!
//! Each caller owns some of the devices and calls in turn over its own connection, so that the order
//! in which a device's pushes are accepted is known.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use super::{Load, Setup, check_messages, cpu_facts, draw_messages, receivers, until};
use crate::clock::{Clock, Schedule, run_tag};
use crate::console::progress;
use crate::fleet::{Tally, client_id};
use crate::http::{Api, Caller};
use crate::ledger::Ledger;
use crate::procfs;
use crate::report::Outcome;
use crate::roles::Receiving;
use crate::sampler::Sampler;
use crate::stamp::Stamp;
use crate::stats::{Latency, per_second};

/// How far behind its schedule a run may end, and how long the last messages may take.
const DRAIN_NS: u64 = 30_000_000_000;
/// For one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Devices whose inbox is asked for when something has not arrived.
const ASKED_MAX: usize = 200;

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Devices that receive.
    pub(crate) devices: usize,
    /// How many pushes, and how long.
    pub(crate) load: Load,
    /// HTTP connections.
    pub(crate) callers: usize,
    /// Bytes of a payload.
    pub(crate) payload_bytes: usize,
    /// Handshakes under way at the same time.
    pub(crate) at_once: usize,
}

/// What the callers share.
struct Calling {
    run: String,
    clock: Clock,
    api: Api,
    schedule: Schedule,
    devices: usize,
    payload_bytes: usize,
    ledger: Arc<Ledger>,
    tally: Arc<Tally>,
    accepted: AtomicU64,
    answered: Latency,
    lateness: Latency,
}

/// Runs it.
pub(crate) async fn run(setup: &Setup, plan: &Plan, label: String) -> Result<Outcome> {
    let clock = Clock::start();
    let run = run_tag();
    try_api(&setup.api).await?;
    let ledger = Arc::new(Ledger::new(plan.devices));
    let tally = Arc::new(Tally::default());
    let receiving = Arc::new(Receiving::new(&run, clock, Arc::clone(&ledger), "PUBLISH"));
    let fleet = receivers(setup, plan.devices, plan.at_once, &receiving, &tally).await?;

    let sampler = Sampler::start(setup.server_pid, clock);
    let lanes = plan.callers.min(plan.devices).max(1);
    let (schedule, measured_from_ns) = plan.load.begin(clock, lanes);
    let calling = Arc::new(Calling {
        run: run.clone(),
        clock,
        api: setup.api.clone(),
        schedule,
        devices: plan.devices,
        payload_bytes: plan.payload_bytes,
        ledger: Arc::clone(&ledger),
        tally,
        accepted: AtomicU64::new(0),
        answered: Latency::new("HTTP 202, from when it was due"),
        lateness: Latency::new("sent later than due (our own)"),
    });
    receiving.count_from(measured_from_ns);
    calling.answered.count_from(measured_from_ns);
    calling.lateness.count_from(measured_from_ns);
    let cpu_before = setup.server_pid.map(procfs::cpu).transpose()?;
    let took = call_all(&calling, &receiving).await;
    until(clock, clock.now_ns() + DRAIN_NS, || {
        ledger.totals().missing == 0
    })
    .await;

    let mut outcome = Outcome::new(label);
    outcome.fact("devices", "devices", plan.devices as f64, "");
    outcome.fact(
        "rate_asked",
        "rate asked for",
        f64::from(plan.load.rate),
        "pushes/s",
    );
    let accepted = calling.accepted.load(Ordering::Relaxed);
    outcome.fact(
        "rate",
        "rate accepted",
        per_second(accepted, took),
        "pushes/s",
    );
    if let (Some(pid), Some(before)) = (setup.server_pid, cpu_before) {
        cpu_facts(&mut outcome, procfs::cpu(pid)?.since(before), accepted);
    }
    let waiting = waiting(&setup.api, &run, &ledger, plan.devices).await?;
    let totals = ledger.totals();
    outcome.fact("accepted", "accepted", totals.accepted as f64, "");
    outcome.fact("delivered", "delivered", totals.delivered as f64, "");
    outcome.fact("waiting", "waiting at the server", waiting as f64, "");
    check_messages(&mut outcome, &fleet, &totals, waiting, schedule.total());
    draw_messages(
        &mut outcome,
        &[
            &receiving.since_due,
            &receiving.since_sent,
            &calling.answered,
            &calling.lateness,
        ],
        sampler.as_ref(),
    );
    fleet.stop().await;
    Ok(outcome)
}

/// Fails early, and with the server's own words, where the key is missing or wrong.
async fn try_api(api: &Api) -> Result<()> {
    let answer = Caller::new(api.clone())
        .call("GET", "/v1/clients?limit=1", None, CALL_TIMEOUT)
        .await?;
    answer
        .json()
        .context("GET /v1/clients (is MOORLINE_API_KEY or --api-key the server's key?)")?;
    Ok(())
}

/// Lets every caller send its share and says how long that took.
async fn call_all(calling: &Arc<Calling>, receiving: &Receiving) -> Duration {
    let schedule = calling.schedule;
    let mut callers = JoinSet::new();
    for lane in 0..schedule.lanes {
        callers.spawn(call(Arc::clone(calling), lane));
    }
    let bar = progress("pushing", schedule.total());
    let mut tick = tokio::time::interval(super::LOOK_EVERY);
    loop {
        tokio::select! {
            ended = callers.join_next() => if ended.is_none() { break },
            _ = tick.tick() => bar.set_position(receiving.delivered.load(Ordering::Relaxed)),
        }
    }
    bar.finish_and_clear();
    Duration::from_nanos(calling.clock.now_ns().saturating_sub(schedule.start_ns))
}

/// One caller: devices `lane`, `lane + lanes`, … in turn.
async fn call(calling: Arc<Calling>, lane: usize) {
    let lanes = calling.schedule.lanes;
    let own = calling.devices.saturating_sub(lane).div_ceil(lanes).max(1);
    let mut caller = Caller::new(calling.api.clone());
    let mut payload = String::new();
    let mut k = 0;
    while let Some(due_ns) = calling.schedule.due_ns(lane, k) {
        sleep_until(calling.clock.at(due_ns)).await;
        let sent_ns = calling.clock.now_ns();
        if sent_ns > calling.schedule.end_ns() + DRAIN_NS {
            calling
                .tally
                .error("gave up: the server takes less than the rate asked for".to_owned());
            return;
        }
        let index = lane + lanes * (k as usize % own);
        let (device, sequence) = (index as u32, (k as usize / own) as u32);
        let stamp = Stamp {
            run: &calling.run,
            device,
            sequence,
            due_ns,
            sent_ns,
        };
        stamp.write(calling.payload_bytes, &mut payload);
        let id = client_id(&calling.run, index);
        let body = format!(
            r#"{{"to":{{"client":"{id}"}},"topic":"d/{id}/load","payload":"{payload}","qos":1,"ttl":"10m"}}"#
        );
        calling.lateness.record(due_ns, sent_ns);
        match caller
            .call("POST", "/v1/push", Some(body.as_bytes()), CALL_TIMEOUT)
            .await
        {
            Ok(answer) if answer.status == 202 => {
                calling.answered.record(due_ns, calling.clock.now_ns());
                calling.ledger.accept(device, sequence);
                calling.accepted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(answer) => calling.tally.error(answer.complaint()),
            Err(error) => calling.tally.error(format!("POST /v1/push: {error:#}")),
        }
        k += 1;
    }
}

/// How much waits in the inboxes of devices that have not got everything.
async fn waiting(api: &Api, run: &str, ledger: &Ledger, devices: usize) -> Result<u64> {
    let mut caller = Caller::new(api.clone());
    let mut sum = 0;
    for index in (0..devices)
        .filter(|index| ledger.missing(*index) > 0)
        .take(ASKED_MAX)
    {
        let path = format!("/v1/clients/{}", client_id(run, index));
        let client = caller
            .call("GET", &path, None, CALL_TIMEOUT)
            .await?
            .json()
            .with_context(|| path.clone())?;
        sum += client["inbox"]["entries"]
            .as_u64()
            .with_context(|| format!("{path} does not say what waits"))?;
    }
    Ok(sum)
}
