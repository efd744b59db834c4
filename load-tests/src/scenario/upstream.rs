//! `upstream`: devices publish to `up/…` at QoS 1 while a consumer reads `GET /v1/upstream`. Is every
//! acknowledged message there, in the order in which its device sent it?

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use moorline_mqtt::{ByteString, TopicName};
use tokio::sync::watch;

use super::{Load, Setup, check_messages, cpu_facts, draw_messages, until};
use crate::clock::{Clock, run_tag};
use crate::console::progress;
use crate::fleet::{Fleet, Ramp, Tally};
use crate::http::{Api, Caller};
use crate::ledger::Ledger;
use crate::procfs;
use crate::report::Outcome;
use crate::roles::{Flow, Publishing, Receiving};
use crate::sampler::Sampler;
use crate::stamp::Stamp;
use crate::stats::per_second;

/// How long the last messages may take.
const DRAIN_NS: u64 = 30_000_000_000;
/// For one call, beyond the second that the server may let it wait.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Devices that publish.
    pub(crate) devices: usize,
    /// How many messages, and how long.
    pub(crate) load: Load,
    /// Within which bounds each publishes.
    pub(crate) flow: Flow,
    /// Messages in one page of the consumer.
    pub(crate) page: usize,
    /// Handshakes under way at the same time.
    pub(crate) at_once: usize,
}

/// Runs it.
pub(crate) async fn run(setup: &Setup, plan: &Plan, label: String) -> Result<Outcome> {
    let clock = Clock::start();
    let run = run_tag();
    let ledger = Arc::new(Ledger::new(plan.devices));
    let tally = Arc::new(Tally::default());
    let (start, schedule) = watch::channel(None);
    let receiving = Arc::new(Receiving::new(
        &run,
        clock,
        Arc::clone(&ledger),
        "GET /v1/upstream",
    ));
    let publishing = Publishing::new(
        &run,
        clock,
        Arc::clone(&ledger),
        Arc::clone(&tally),
        schedule,
        plan.flow,
    );
    let publishing = Arc::new(publishing);
    let mut consumer = Consumer::new(setup.api.clone(), consumer_name(&run), plan.page);
    consumer.skip_old().await?;
    let fleet = connect(setup, plan, &run, clock, Arc::clone(&tally), &publishing).await?;

    let sampler = Sampler::start(setup.server_pid, clock);
    let (schedule, measured_from_ns) = plan.load.begin(clock, plan.devices);
    receiving.count_from(measured_from_ns);
    publishing.count_from(measured_from_ns);
    let cpu_before = setup.server_pid.map(procfs::cpu).transpose()?;
    start.send_replace(Some(schedule));

    let reading = tokio::spawn(consumer.read(Arc::clone(&receiving), tally));
    let bar = progress("publishing", schedule.total());
    until(clock, schedule.end_ns() + DRAIN_NS, || {
        bar.set_position(receiving.delivered.load(Ordering::Relaxed));
        reading.is_finished()
            || (publishing.finished.load(Ordering::Relaxed) == plan.devices as u64
                && ledger.totals().missing == 0)
    })
    .await;
    bar.finish_and_clear();
    reading.abort();

    let mut outcome = Outcome::new(label);
    if let Err(error) = forget(&setup.api, &consumer_name(&run)).await {
        outcome.notes.push(format!(
            "the consumer stays, and with it what it has not read: {error:#}"
        ));
    }
    let totals = ledger.totals();
    outcome.fact("devices", "devices", plan.devices as f64, "");
    outcome.fact(
        "rate_asked",
        "rate asked for",
        f64::from(plan.load.rate),
        "messages/s",
    );
    let took = Duration::from_nanos(clock.now_ns().saturating_sub(schedule.start_ns));
    outcome.fact(
        "rate",
        "rate until all was read",
        per_second(totals.delivered, took),
        "messages/s",
    );
    if let (Some(pid), Some(before)) = (setup.server_pid, cpu_before) {
        cpu_facts(
            &mut outcome,
            procfs::cpu(pid)?.since(before),
            totals.accepted,
        );
    }
    check_messages(&mut outcome, &fleet, &totals, 0, schedule.total());
    draw_messages(
        &mut outcome,
        &[
            &publishing.acked,
            &receiving.since_due,
            &publishing.lateness,
        ],
        sampler.as_ref(),
    );
    fleet.stop().await;
    Ok(outcome)
}

async fn connect(
    setup: &Setup,
    plan: &Plan,
    run: &str,
    clock: Clock,
    tally: Arc<Tally>,
    publishing: &Arc<Publishing>,
) -> Result<Fleet> {
    let ramp = Ramp {
        devices: plan.devices,
        rate: None,
        at_once: plan.at_once,
    };
    let (publishing, keep_alive_s) = (Arc::clone(publishing), setup.target.keep_alive_s);
    Fleet::launch(
        &setup.target,
        ramp,
        run,
        clock,
        tally,
        |_| None,
        move |index, bot, stop| {
            let publishing = Arc::clone(&publishing);
            async move {
                let topic = TopicName::parse(ByteString::from(format!(
                    "up/load/{}/{index:06}",
                    publishing.run
                )))?;
                publishing
                    .play(bot, u32::try_from(index)?, topic, stop, keep_alive_s)
                    .await
            }
        },
    )
    .await
}

fn consumer_name(run: &str) -> String {
    format!("load-{run}")
}

/// Removes the consumer: the server keeps messages for every one that it knows.
async fn forget(api: &Api, name: &str) -> Result<()> {
    let path = format!("/v1/upstream/consumers/{name}");
    let answer = Caller::new(api.clone())
        .call("DELETE", &path, None, CALL_TIMEOUT)
        .await?;
    if !(200..300).contains(&answer.status) {
        anyhow::bail!("DELETE {path}: {}", answer.complaint());
    }
    Ok(())
}

/// Reads page after page and acknowledges each.
struct Consumer {
    caller: Caller,
    name: String,
    page: usize,
}

impl Consumer {
    fn new(api: Api, name: String, page: usize) -> Self {
        Self {
            caller: Caller::new(api),
            name,
            page,
        }
    }

    /// Reads what earlier runs left, so that it is not in the way of this one.
    async fn skip_old(&mut self) -> Result<()> {
        while !self.next_page("0s").await?.is_empty() {}
        Ok(())
    }

    /// Reads until it is aborted; an error ends it and is counted.
    async fn read(mut self, receiving: Arc<Receiving>, tally: Arc<Tally>) {
        loop {
            let messages = match self.next_page("1s").await {
                Ok(messages) => messages,
                Err(error) => return tally.error(format!("{error:#}")),
            };
            let now_ns = receiving.clock.now_ns();
            for message in messages {
                let Some(stamp) = message["payload"]
                    .as_str()
                    .and_then(|payload| Stamp::parse(payload.as_bytes()))
                else {
                    continue;
                };
                if stamp.run == receiving.run
                    && receiving.ledger.deliver(stamp.device, stamp.sequence)
                {
                    receiving.since_due.record(stamp.due_ns, now_ns);
                    receiving.delivered.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    async fn next_page(&mut self, wait: &str) -> Result<Vec<serde_json::Value>> {
        let path = format!(
            "/v1/upstream?consumer={}&limit={}&wait={wait}",
            self.name, self.page
        );
        let answer = self
            .caller
            .call("GET", &path, None, CALL_TIMEOUT)
            .await
            .and_then(|answer| answer.json());
        let mut page = answer.with_context(|| format!("GET {path}"))?;
        let serde_json::Value::Array(messages) = page["messages"].take() else {
            anyhow::bail!("GET {path}: the answer has no \"messages\"");
        };
        if !messages.is_empty() {
            let body =
                serde_json::json!({ "consumer": self.name, "cursor": page["next"] }).to_string();
            let ack = self
                .caller
                .call(
                    "POST",
                    "/v1/upstream/ack",
                    Some(body.as_bytes()),
                    CALL_TIMEOUT,
                )
                .await?;
            if !(200..300).contains(&ack.status) {
                anyhow::bail!("POST /v1/upstream/ack: {}", ack.complaint());
            }
        }
        Ok(messages)
    }
}
