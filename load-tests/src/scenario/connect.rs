//! `connect`: idle devices with one subscription each. What does one cost the server?

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use moorline_mqtt::{ByteString, TopicFilter};

use super::Setup;
use crate::clock::{Clock, run_tag};
use crate::fleet::{Fleet, Ramp, Tally, client_id};
use crate::procfs;
use crate::report::{Outcome, Plot};
use crate::roles::idle;
use crate::sampler::{Sampler, settled_memory};
use crate::stats::per_second;

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// How the devices come.
    pub(crate) ramp: Ramp,
    /// What each subscribes to; `{id}` stands for its client id. Empty for nothing.
    pub(crate) subscribe: String,
    /// How long they stay at least.
    pub(crate) hold: Duration,
}

/// Runs it.
pub(crate) async fn run(setup: &Setup, plan: &Plan, label: String) -> Result<Outcome> {
    let clock = Clock::start();
    let run = run_tag();
    let filter = |template: &str, id: &str| {
        TopicFilter::parse(ByteString::from(template.replace("{id}", id)))
    };
    if !plan.subscribe.is_empty() {
        filter(&plan.subscribe, "x")
            .with_context(|| format!("--subscribe {:?}", plan.subscribe))?;
    }
    let before = match setup.server_pid {
        Some(pid) => Some((
            settled_memory(pid).await?,
            procfs::pss(pid).ok(),
            procfs::cpu(pid)?,
        )),
        None => None,
    };
    let sampler = Sampler::start(setup.server_pid, clock);
    let (template, of_run, keep_alive_s) = (
        plan.subscribe.clone(),
        run.clone(),
        setup.target.keep_alive_s,
    );
    let fleet = Fleet::launch(
        &setup.target,
        plan.ramp,
        &run,
        clock,
        Arc::new(Tally::default()),
        move |index| {
            (!template.is_empty())
                .then(|| filter(&template, &client_id(&of_run, index)).ok())
                .flatten()
        },
        move |_, bot, stop| idle(bot, stop, keep_alive_s),
    )
    .await?;
    let held_until = tokio::time::Instant::now() + plan.hold;

    let mut outcome = Outcome::new(label);
    let devices = plan.ramp.devices.max(1) as f64;
    let connected = fleet.tally.connected.load(Ordering::Relaxed);
    outcome.fact("devices", "devices", plan.ramp.devices as f64, "");
    outcome.fact(
        "connects_per_s",
        "connected and subscribed",
        per_second(connected, fleet.took),
        "/s",
    );
    if let (Some(pid), Some((memory, pss, cpu))) = (setup.server_pid, before) {
        let used = procfs::cpu(pid)?.since(cpu);
        outcome.fact(
            "cpu_us_per_connect",
            "server CPU per connect",
            used.total().as_secs_f64() * 1e6 / devices,
            "µs",
        );
        let settled = settled_memory(pid).await?;
        let each = |after: u64, before: u64| (after as f64 - before as f64) / devices;
        outcome.fact(
            "rss_bytes_per_device",
            "RSS per device",
            each(settled.rss, memory.rss),
            "B",
        );
        outcome.fact(
            "anon_bytes_per_device",
            "anonymous RSS per device",
            each(settled.rss_anon, memory.rss_anon),
            "B",
        );
        if let (Some(after), Some(before)) = (procfs::pss(pid).ok(), pss) {
            outcome.fact(
                "pss_bytes_per_device",
                "PSS per device",
                each(after, before),
                "B",
            );
        }
        outcome.fact("rss_bytes_before", "RSS before", memory.rss as f64, "B");
        outcome.fact(
            "rss_bytes_after",
            "RSS with all devices",
            settled.rss as f64,
            "B",
        );
        outcome
            .notes
            .push("RSS does not hold the kernel's socket memory.".to_owned());
    } else {
        outcome
            .notes
            .push("without --server-pid the server's memory is not measured".to_owned());
    }
    tokio::time::sleep_until(held_until).await;
    outcome.checks.push(fleet.check());
    let latency = fleet.latency.summary();
    outcome
        .plots
        .push(Plot::percentiles(std::slice::from_ref(&latency)));
    outcome
        .plots
        .extend(sampler.iter().flat_map(Sampler::plots));
    outcome.latencies.push(latency);
    fleet.stop().await;
    Ok(outcome)
}
