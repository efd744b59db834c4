//! Bots that are real MQTT clients, and real HTTP callers, against a running server.
//!
//! Not a benchmark in a loop: every scenario also keeps accounts of each message and fails when one
//! is lost, doubled or out of order. Read in this order: [`cli`], [`scenario`] (what is run),
//! [`fleet`] and [`roles`] (many bots), [`bot`] and [`http`] (one of them), [`ledger`] and [`stats`]
//! (what they find), [`report`] (how it is told).
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

mod bot;
mod cli;
mod clock;
mod console;
mod fleet;
mod http;
mod ledger;
mod limits;
mod procfs;
mod report;
mod roles;
mod sampler;
mod scenario;
mod server;
mod stamp;
mod stats;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser as _;

use cli::{Cli, Common, Scenario};
use fleet::Ramp;
use procfs::Machine;
use report::Report;
use scenario::{Setup, compare, connect, pubsub, push, upstream};
use server::Kind;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            console::complain(&format!("load-tests: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs the scenario and returns whether every check held.
async fn run(cli: Cli) -> Result<bool> {
    let Cli { scenario, common } = cli;
    let open_files = limits::raise_open_files();
    let within = |wanted: u32| {
        let (devices, said) = limits::devices_within(wanted as usize, open_files);
        if let Some(said) = said {
            console::complain(&said);
        }
        devices.max(1)
    };
    let begun = Instant::now();
    let mut report = Report::begin(title(&scenario), Machine::look(open_files));
    let setup = setup(&common);
    let (payload_bytes, at_once) = (usize::from(common.payload), usize::from(common.at_once));
    match scenario {
        Scenario::Connect(args) => {
            let ramp = Ramp {
                devices: within(args.devices),
                rate: args.rate,
                at_once,
            };
            let plan = connect::Plan {
                ramp,
                subscribe: args.subscribe,
                hold: args.hold,
            };
            report
                .outcomes
                .push(connect::run(&setup, &plan, "connect".to_owned()).await?);
        }
        Scenario::Push(args) => {
            let plan = push::Plan {
                devices: within(args.devices),
                rate: args.load.rate,
                duration: args.load.duration,
                warmup: args.load.warmup,
                callers: usize::from(args.callers),
                payload_bytes,
                at_once,
            };
            report
                .outcomes
                .push(push::run(&setup, &plan, "push".to_owned()).await?);
        }
        Scenario::Upstream(args) => {
            let plan = upstream::Plan {
                devices: within(args.devices),
                rate: args.load.rate,
                duration: args.load.duration,
                warmup: args.load.warmup,
                window: usize::from(args.window),
                payload_bytes,
                page: usize::from(args.page),
                at_once,
            };
            report
                .outcomes
                .push(upstream::run(&setup, &plan, "upstream".to_owned()).await?);
        }
        Scenario::Pubsub(args) => {
            let plan = pubsub::Plan {
                pairs: (within(args.pairs.saturating_mul(2)) / 2).max(1),
                rate: args.load.rate,
                duration: args.load.duration,
                warmup: args.load.warmup,
                window: usize::from(args.window),
                payload_bytes,
                at_once,
            };
            report
                .outcomes
                .push(pubsub::run(&setup, &plan, "pubsub".to_owned()).await?);
        }
        Scenario::Compare(args) => {
            let devices = within(args.devices);
            let plan = compare_plan(args, devices, payload_bytes, at_once);
            compare::run(&setup.target, &plan, &mut report).await?;
        }
    }
    report.finish(begun.elapsed(), common.report.as_deref())
}

fn compare_plan(
    args: cli::Compare,
    devices: usize,
    payload_bytes: usize,
    at_once: usize,
) -> compare::Plan {
    let program = |kind| match kind {
        Kind::Moorline => args.moorline.clone(),
        Kind::Mosquitto => args.mosquitto.clone(),
    };
    compare::Plan {
        servers: args
            .servers
            .iter()
            .map(|kind| (*kind, program(*kind)))
            .collect(),
        connect: connect::Plan {
            ramp: Ramp {
                devices,
                rate: None,
                at_once,
            },
            subscribe: "d/{id}/x".to_owned(),
            hold: std::time::Duration::from_secs(5),
        },
        pubsub: pubsub::Plan {
            pairs: devices / 2,
            rate: args.rate,
            duration: args.duration,
            warmup: std::time::Duration::from_secs(3),
            window: 16,
            payload_bytes,
            at_once,
        },
    }
}

fn title(scenario: &Scenario) -> &'static str {
    match scenario {
        Scenario::Connect(_) => "Idle devices",
        Scenario::Push(_) => "Push: HTTP in, PUBACK out",
        Scenario::Upstream(_) => "Upstream: PUBLISH in, HTTP out",
        Scenario::Pubsub(_) => "Publish and subscribe in pairs",
        Scenario::Compare(_) => "Moorline and Mosquitto side by side",
    }
}

fn setup(common: &Common) -> Setup {
    Setup {
        target: bot::Target {
            address: common.mqtt,
            version: common.mqtt_version.into(),
            keep_alive_s: common.keep_alive,
        },
        api: http::Api {
            address: common.http,
            key: common.api_key.clone(),
        },
        server_pid: common.server_pid,
    }
}
