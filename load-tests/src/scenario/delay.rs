//! `delay`: delayed jobs. How late are they, is any early, is any lost, and what does it cost to have many that wait?
//!
//! First the store is filled with jobs that are due in a year; then the server is left alone, to see what an idle queue costs; then
//! jobs (each a push to a device) are created that become due at a steady rate, and while they do others are created and
//! cancelled. Lateness is from the time that a job was created with to the PUBACK of its device.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use super::{Setup, cpu_facts, draw_messages, receivers, until};
use crate::clock::{Clock, Schedule, run_tag};
use crate::console::progress;
use crate::fleet::{Tally, client_id};
use crate::http::{Api, Caller};
use crate::ledger::Ledger;
use crate::procfs;
use crate::report::{Check, Outcome};
use crate::roles::Receiving;
use crate::sampler::Sampler;
use crate::stamp::Stamp;
use crate::stats::{Latency, grouped, per_second};

/// Jobs of one call.
const BATCH: u64 = 250;
/// For one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the last jobs may take.
const DRAIN_NS: u64 = 60_000_000_000;
/// After the jobs were created, until the first is due.
const LEAD: Duration = Duration::from_secs(5);
/// Of what was filled in, when it is due.
const FAR: &str = "366d";

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Jobs that wait and do not become due.
    pub(crate) pending: u64,
    /// Devices that receive.
    pub(crate) devices: usize,
    /// Jobs that become due in a second.
    pub(crate) rate: u32,
    /// For how long.
    pub(crate) duration: Duration,
    /// Jobs that are created, and as many that are cancelled, in a second meanwhile.
    pub(crate) churn: u32,
    /// How long the server is left alone.
    pub(crate) idle: Duration,
    /// HTTP connections.
    pub(crate) callers: usize,
    /// Bytes of a payload.
    pub(crate) payload_bytes: usize,
    /// Handshakes under way at the same time.
    pub(crate) at_once: usize,
    /// The server's data directory, whose size is then told.
    pub(crate) data_dir: Option<PathBuf>,
}

/// What the callers share.
struct Calling {
    run: String,
    clock: Clock,
    /// What the machine's clock says where the run's says zero, Unix nanoseconds.
    origin_ns: u64,
    api: Api,
    ledger: Arc<Ledger>,
    tally: Arc<Tally>,
    created: AtomicU64,
    cancelled: AtomicU64,
    late: AtomicU64,
    answered: Latency,
}

impl Calling {
    fn unix_time(&self, ns: u64) -> Result<String> {
        // Rounded up: the server counts milliseconds, and none may be early by our own rounding.
        let ms = (self.origin_ns + ns).div_ceil(1_000_000);
        let time = jiff::Timestamp::from_millisecond(i64::try_from(ms)?)?;
        Ok(format!("{time:.3}"))
    }

    /// Posts a batch; how many of it were created.
    async fn post(&self, caller: &mut Caller, jobs: &[String]) -> Result<Vec<bool>> {
        let body = format!("[{}]", jobs.join(","));
        let begun_ns = self.clock.now_ns();
        let answer = caller
            .call(
                "POST",
                "/v1/delays/batch",
                Some(body.as_bytes()),
                CALL_TIMEOUT,
            )
            .await?;
        self.answered.record(begun_ns, self.clock.now_ns());
        let answer = answer.json()?;
        let results = answer["results"].as_array().context("no results")?;
        if let Some(refused) = results.iter().find(|result| result["status"] != 201) {
            self.tally.error(format!(
                "a job of a batch: {}",
                refused["problem"]["detail"]
            ));
        }
        Ok(results
            .iter()
            .map(|result| result["status"] == 201)
            .collect())
    }
}

/// Runs it.
pub(crate) async fn run(setup: &Setup, plan: &Plan, label: String) -> Result<Outcome> {
    let clock = Clock::start();
    let origin_ns = unix_ns()? - clock.now_ns();
    let run = run_tag();
    let mut outcome = Outcome::new(label);
    let ledger = Arc::new(Ledger::new(plan.devices));
    let tally = Arc::new(Tally::default());
    let calling = Arc::new(Calling {
        run: run.clone(),
        clock,
        origin_ns,
        api: setup.api.clone(),
        ledger: Arc::clone(&ledger),
        tally: Arc::clone(&tally),
        created: AtomicU64::new(0),
        cancelled: AtomicU64::new(0),
        late: AtomicU64::new(0),
        answered: Latency::new(format!("HTTP 200 of {BATCH} jobs")),
    });
    let sampler = Sampler::start(setup.server_pid, clock);
    let counted_before = count(&setup.api, "pending").await?;
    let fill_rate = fill(&calling, plan).await?;
    outcome.fact("pending", "jobs that wait", plan.pending as f64, "");
    outcome.fact("fill_rate", "created", fill_rate, "jobs/s");
    let counted = count(&setup.api, "pending").await? - counted_before;
    outcome.checks.push(Check {
        name: "the server counts what it was given".to_owned(),
        ok: counted == plan.pending,
        detail: format!("{} of {}", grouped(counted), grouped(plan.pending)),
    });
    size_facts(&mut outcome, setup, plan, "filled")?;
    idle(&mut outcome, setup, plan).await?;

    let receiving = Arc::new(Receiving::new(&run, clock, Arc::clone(&ledger), "PUSH"));
    let fleet = receivers(setup, plan.devices, plan.at_once, &receiving, &tally).await?;
    calling.answered.count_from(0);
    let total = u64::from(plan.rate) * plan.duration.as_secs();
    // They must all be there before the first is due.
    let making = Duration::from_secs_f64(total as f64 / fill_rate.max(1.0) * 2.0) + LEAD;
    let schedule = Schedule {
        start_ns: clock.now_ns() + u64::try_from(making.as_nanos())?,
        duration: plan.duration,
        rate: plan.rate,
        lanes: plan.callers.max(1),
    };
    receiving.count_from(schedule.start_ns);
    create_due(&calling, plan, schedule).await?;
    let cpu_before = setup.server_pid.map(procfs::cpu).transpose()?;
    let stop = Arc::new(AtomicBool::new(false));
    let churning = tokio::spawn(churn(Arc::clone(&calling), plan.clone(), Arc::clone(&stop)));
    sleep_until(clock.at(schedule.end_ns())).await;
    stop.store(true, Ordering::Relaxed);
    churning.await?;
    until(clock, schedule.end_ns() + DRAIN_NS, || {
        ledger.totals().missing == 0
    })
    .await;

    let totals = ledger.totals();
    if let (Some(pid), Some(before)) = (setup.server_pid, cpu_before) {
        cpu_facts(
            &mut outcome,
            procfs::cpu(pid)?.since(before),
            totals.delivered,
        );
    }
    size_facts(&mut outcome, setup, plan, "after")?;
    outcome.fact("rate", "due", f64::from(plan.rate), "jobs/s");
    outcome.fact("fired", "arrived", totals.delivered as f64, "");
    let churned = calling.cancelled.load(Ordering::Relaxed);
    outcome.fact(
        "cancelled",
        "created and cancelled meanwhile",
        churned as f64,
        "",
    );
    let early = receiving.early.load(Ordering::Relaxed);
    let created_late = calling.late.load(Ordering::Relaxed);
    let checks = [
        ("none is early", early == 0, format!("{early} early")),
        (
            "none is lost",
            totals.missing == 0 && totals.accepted == total,
            format!(
                "{} of {} created, {} not arrived",
                grouped(totals.accepted),
                grouped(total),
                grouped(totals.missing)
            ),
        ),
        (
            "none comes twice",
            totals.duplicates == 0,
            format!("{} duplicates", totals.duplicates),
        ),
        (
            "all were there before the first was due",
            created_late == 0,
            format!("{created_late} created later than they were due"),
        ),
    ];
    outcome.checks.push(fleet.check());
    outcome
        .checks
        .extend(checks.map(|(name, ok, detail)| Check {
            name: name.to_owned(),
            ok,
            detail,
        }));
    draw_messages(
        &mut outcome,
        &[&receiving.since_due, &calling.answered],
        sampler.as_ref(),
    );
    fleet.stop().await;
    Ok(outcome)
}

fn unix_ns() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(u64::try_from(now.as_nanos())?)
}

async fn count(api: &Api, state: &str) -> Result<u64> {
    let answer = Caller::new(api.clone())
        .call("GET", "/v1/delays/count", None, CALL_TIMEOUT)
        .await?;
    let counts = answer
        .json()
        .context("GET /v1/delays/count (is MOORLINE_API_KEY or --api-key the server's key?)")?;
    counts[state].as_u64().context("no such count")
}

/// Jobs per second.
async fn fill(calling: &Arc<Calling>, plan: &Plan) -> Result<f64> {
    let began = Instant::now();
    let bar = progress("filling", plan.pending);
    let next = Arc::new(AtomicU64::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..plan.callers.max(1) {
        let (calling, next, bar, pending) = (
            Arc::clone(calling),
            Arc::clone(&next),
            bar.clone(),
            plan.pending,
        );
        callers.spawn(async move {
            let mut caller = Caller::new(calling.api.clone());
            loop {
                let from = next.fetch_add(BATCH, Ordering::Relaxed);
                if from >= pending {
                    return Ok(());
                }
                let jobs: Vec<_> = (from..pending.min(from + BATCH))
                    .map(|n| waiting(&calling.run, n))
                    .collect();
                let created = calling.post(&mut caller, &jobs).await?;
                if created.iter().any(|created| !created) {
                    bail!("a job was refused: {}", calling.tally.complaints());
                }
                bar.inc(jobs.len() as u64);
            }
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended??;
    }
    bar.finish_and_clear();
    // With nothing to fill in, how fast jobs are made is not known: a modest rate then.
    Ok(match plan.pending {
        0 => 2_000.0,
        pending => per_second(pending, began.elapsed()),
    })
}

/// One that does not become due.
fn waiting(run: &str, n: u64) -> String {
    format!(
        r#"{{"id":"{run}-wait-{n}","delay":"{FAR}","cancel_on":["load.moot:{run}-{n}"],"action":{{"push":{{"to":{{"client":"{run}-nobody"}},"payload":"{n}"}}}}}}"#
    )
}

/// What the server uses while nothing happens.
async fn idle(outcome: &mut Outcome, setup: &Setup, plan: &Plan) -> Result<()> {
    let Some(pid) = setup.server_pid.filter(|_| !plan.idle.is_zero()) else {
        return Ok(());
    };
    // What was filled in may still be worked on.
    tokio::time::sleep(plan.idle.min(Duration::from_secs(10))).await;
    let (before, began) = (procfs::cpu(pid)?, Instant::now());
    tokio::time::sleep(plan.idle).await;
    let used = procfs::cpu(pid)?.since(before).total();
    let share = used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;
    outcome.fact("idle_cpu", "CPU of an idle queue", share, "% of one core");
    Ok(())
}

fn size_facts(outcome: &mut Outcome, setup: &Setup, plan: &Plan, when: &str) -> Result<()> {
    let filled = when == "filled";
    if let Some(pid) = setup.server_pid {
        let rss = procfs::memory(pid)?.rss as f64 / 1e6;
        match filled {
            true => outcome.fact("rss_filled", "memory when filled", rss, "MB"),
            false => outcome.fact("rss_after", "memory at the end", rss, "MB"),
        }
    }
    if let Some(path) = &plan.data_dir {
        let bytes = bytes_below(path) as f64 / 1e6;
        match filled {
            true => outcome.fact("disk_filled", "disk when filled", bytes, "MB"),
            false => outcome.fact("disk_after", "disk at the end", bytes, "MB"),
        }
    }
    Ok(())
}

fn bytes_below(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else {
        return std::fs::metadata(path).map_or(0, |file| file.len());
    };
    // A file that is gone meanwhile counts nothing.
    entries
        .flatten()
        .map(|entry| bytes_below(&entry.path()))
        .sum()
}

/// Creates the jobs that become due, before they do.
async fn create_due(calling: &Arc<Calling>, plan: &Plan, schedule: Schedule) -> Result<()> {
    let bar = progress("creating", schedule.total());
    let mut callers = JoinSet::new();
    for lane in 0..schedule.lanes {
        let (calling, plan, bar) = (Arc::clone(calling), plan.clone(), bar.clone());
        callers.spawn(async move {
            let mut caller = Caller::new(calling.api.clone());
            let mut k = 0;
            loop {
                let (mut jobs, mut stamps) = (Vec::new(), Vec::new());
                while (jobs.len() as u64) < BATCH
                    && let Some(due_ns) = schedule.due_ns(lane, k)
                {
                    let number = k * schedule.lanes as u64 + lane as u64;
                    let device = u32::try_from(number % plan.devices as u64)?;
                    let sequence = u32::try_from(number / plan.devices as u64)?;
                    jobs.push(due(&calling, &plan, due_ns, device, sequence)?);
                    stamps.push((device, sequence, due_ns));
                    k += 1;
                }
                if jobs.is_empty() {
                    return Ok::<_, anyhow::Error>(());
                }
                let created = calling.post(&mut caller, &jobs).await?;
                for ((device, sequence, due_ns), created) in stamps.into_iter().zip(created) {
                    if created {
                        calling.ledger.accept(device, sequence);
                        calling.created.fetch_add(1, Ordering::Relaxed);
                    }
                    if calling.clock.now_ns() > due_ns {
                        calling.late.fetch_add(1, Ordering::Relaxed);
                    }
                }
                bar.inc(jobs.len() as u64);
            }
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended??;
    }
    bar.finish_and_clear();
    Ok(())
}

fn due(calling: &Calling, plan: &Plan, due_ns: u64, device: u32, sequence: u32) -> Result<String> {
    let mut payload = String::new();
    let stamp = Stamp {
        run: &calling.run,
        device,
        sequence,
        due_ns,
        sent_ns: calling.clock.now_ns(),
    };
    stamp.write(plan.payload_bytes, &mut payload);
    let (run, client) = (&calling.run, client_id(&calling.run, device as usize));
    let at = calling.unix_time(due_ns)?;
    Ok(format!(
        r#"{{"id":"{run}-due-{device}-{sequence}","fire_at":"{at}","action":{{"push":{{"to":{{"client":"{client}"}},"topic":"d/{client}/load","payload":"{payload}"}}}}}}"#
    ))
}

/// Creates jobs and cancels them by their event, at a steady rate.
async fn churn(calling: Arc<Calling>, plan: Plan, stop: Arc<AtomicBool>) {
    if plan.churn == 0 {
        return;
    }
    let mut callers = JoinSet::new();
    let lanes = plan.callers.clamp(1, 16);
    let pause = Duration::from_secs_f64(lanes as f64 / f64::from(plan.churn));
    for lane in 0..lanes {
        let (calling, stop) = (Arc::clone(&calling), Arc::clone(&stop));
        callers.spawn(async move {
            let mut caller = Caller::new(calling.api.clone());
            let mut turn = tokio::time::interval(pause);
            for n in 0.. {
                turn.tick().await;
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let run = format!("{}-churn-{lane}", calling.run);
                let job = waiting(&run, n);
                let created = caller
                    .call("POST", "/v1/delays", Some(job.as_bytes()), CALL_TIMEOUT)
                    .await;
                let event = format!(r#"{{"type":"load.moot","key":"{run}-{n}"}}"#);
                let told = caller
                    .call("POST", "/v1/events", Some(event.as_bytes()), CALL_TIMEOUT)
                    .await;
                match (created, told.and_then(|answer| answer.json())) {
                    (Ok(created), Ok(told)) if created.status == 201 && told["cancelled"] == 1 => {
                        calling.cancelled.fetch_add(1, Ordering::Relaxed);
                    }
                    (Ok(created), Ok(told)) => calling
                        .tally
                        .error(format!("created with {}, cancelled {told}", created.status)),
                    (Err(error), _) | (_, Err(error)) => calling.tally.error(format!("{error:#}")),
                }
            }
        });
    }
    while callers.join_next().await.is_some() {}
}
