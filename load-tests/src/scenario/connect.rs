//! `connect`: idle devices with one subscription each. What does one cost the server?

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use moorline_mqtt::{ByteString, TopicFilter};

use super::Setup;
use crate::clock::{Clock, run_tag};
use crate::fleet::{Fleet, Ramp, Tally, client_id};
use crate::procfs::{self, Cpu, Memory};
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
        Some(pid) => Some(Look::at(pid).await?),
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
    if let Some(before) = before {
        cost(&mut outcome, &before, &Look::at(before.pid).await?, devices);
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

/// The server's process once its memory has settled.
struct Look {
    pid: u32,
    cpu: Cpu,
    memory: Memory,
    pss: Option<u64>,
}

impl Look {
    async fn at(pid: u32) -> Result<Self> {
        // First, so that what the server does while it settles is nobody's connect.
        let cpu = procfs::cpu(pid)?;
        let memory = settled_memory(pid).await?;
        Ok(Self {
            pid,
            cpu,
            memory,
            pss: procfs::pss(pid).ok(),
        })
    }
}

/// What one device costs.
fn cost(outcome: &mut Outcome, before: &Look, after: &Look, devices: f64) {
    let cpu_us = after.cpu.since(before.cpu).total().as_secs_f64() * 1e6;
    outcome.fact(
        "cpu_us_per_connect",
        "server CPU per connect",
        cpu_us / devices,
        "µs",
    );
    let each = |after: u64, before: u64| (after as f64 - before as f64) / devices;
    let (was, is) = (before.memory, after.memory);
    outcome.fact(
        "rss_bytes_per_device",
        "RSS per device",
        each(is.rss, was.rss),
        "B",
    );
    let anonymous = each(is.rss_anon, was.rss_anon);
    outcome.fact(
        "anon_bytes_per_device",
        "anonymous RSS per device",
        anonymous,
        "B",
    );
    if let (Some(is), Some(was)) = (after.pss, before.pss) {
        outcome.fact("pss_bytes_per_device", "PSS per device", each(is, was), "B");
    }
    outcome.fact("rss_bytes_before", "RSS before", was.rss as f64, "B");
    outcome.fact(
        "rss_bytes_after",
        "RSS with all devices",
        is.rss as f64,
        "B",
    );
    outcome
        .notes
        .push("RSS does not hold the kernel's socket memory; memory that an earlier run left free is not counted, so start the server afresh".to_owned());
}
