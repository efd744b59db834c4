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
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser as _;

use cli::{Cli, Common, Scenario};
use fleet::Ramp;
use procfs::Machine;
use report::Report;
use roles::Flow;
use scenario::{Load, Setup, compare, connect, delay, pubsub, push, upstream};
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
    let begun = Instant::now();
    let bounds = Bounds::of(&common);
    let mut report = Report::begin(title(&scenario), Machine::look(bounds.open_files));
    let setup = setup(&common);
    let outcome = match scenario {
        Scenario::Connect(args) => {
            Some(connect::run(&setup, &bounds.connect(args), "connect".to_owned()).await?)
        }
        Scenario::Push(args) => {
            Some(push::run(&setup, &bounds.push(&args), "push".to_owned()).await?)
        }
        Scenario::Upstream(args) => {
            Some(upstream::run(&setup, &bounds.upstream(&args), "upstream".to_owned()).await?)
        }
        Scenario::Delay(args) => {
            Some(delay::run(&setup, &bounds.delay(args), "delay".to_owned()).await?)
        }
        Scenario::Pubsub(args) => {
            Some(pubsub::run(&setup, &bounds.pubsub(&args), "pubsub".to_owned()).await?)
        }
        Scenario::Compare(args) => {
            compare::run(&setup.target, &bounds.compare(&args), &mut report).await?;
            None
        }
    };
    report.outcomes.extend(outcome);
    report.finish(begun.elapsed(), common.report.as_deref())
}

/// What turns arguments into plans: the machine's limits and the flags of every scenario.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    open_files: u64,
    payload_bytes: usize,
    at_once: usize,
}

impl Bounds {
    fn of(common: &Common) -> Self {
        Self {
            open_files: limits::raise_open_files(),
            payload_bytes: usize::from(common.payload),
            at_once: usize::from(common.at_once),
        }
    }

    /// As many devices as wanted, or as this machine allows, and then it is said.
    fn devices(self, wanted: u32) -> usize {
        let (devices, said) = limits::devices_within(wanted as usize, self.open_files);
        if let Some(said) = said {
            console::complain(&said);
        }
        devices.max(1)
    }

    fn flow(self, window: u16) -> Flow {
        Flow {
            window: usize::from(window),
            payload_bytes: self.payload_bytes,
        }
    }

    fn connect(self, args: cli::Connect) -> connect::Plan {
        let ramp = Ramp {
            devices: self.devices(args.devices),
            rate: args.rate,
            at_once: self.at_once,
        };
        connect::Plan {
            ramp,
            subscribe: args.subscribe,
            hold: args.hold,
        }
    }

    fn push(self, args: &cli::Push) -> push::Plan {
        push::Plan {
            devices: self.devices(args.devices),
            load: load(&args.load),
            callers: usize::from(args.callers),
            payload_bytes: self.payload_bytes,
            at_once: self.at_once,
        }
    }

    fn upstream(self, args: &cli::Upstream) -> upstream::Plan {
        upstream::Plan {
            devices: self.devices(args.devices),
            load: load(&args.load),
            flow: self.flow(args.window),
            page: usize::from(args.page),
            at_once: self.at_once,
        }
    }

    fn delay(self, args: cli::Delay) -> delay::Plan {
        delay::Plan {
            pending: args.pending,
            devices: self.devices(args.devices),
            rate: args.rate,
            duration: args.duration,
            churn: args.churn,
            idle: args.idle,
            callers: usize::from(args.callers),
            payload_bytes: self.payload_bytes,
            at_once: self.at_once,
            data_dir: args.data_dir,
        }
    }

    fn pubsub(self, args: &cli::Pubsub) -> pubsub::Plan {
        pubsub::Plan {
            pairs: (self.devices(args.pairs.saturating_mul(2)) / 2).max(1),
            load: load(&args.load),
            flow: self.flow(args.window),
            at_once: self.at_once,
        }
    }

    fn compare(self, args: &cli::Compare) -> compare::Plan {
        let devices = self.devices(args.devices);
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
                    at_once: self.at_once,
                },
                subscribe: "d/{id}/x".to_owned(),
                hold: Duration::from_secs(5),
            },
            pubsub: pubsub::Plan {
                pairs: (devices / 2).max(1),
                load: Load {
                    rate: args.rate,
                    duration: args.duration,
                    warmup: Duration::from_secs(3),
                },
                flow: self.flow(16),
                at_once: self.at_once,
            },
        }
    }
}

fn load(args: &cli::Load) -> Load {
    Load {
        rate: args.rate,
        duration: args.duration,
        warmup: args.warmup,
    }
}

fn title(scenario: &Scenario) -> &'static str {
    match scenario {
        Scenario::Connect(_) => "Idle devices",
        Scenario::Push(_) => "Push: HTTP in, PUBACK out",
        Scenario::Upstream(_) => "Upstream: PUBLISH in, HTTP out",
        Scenario::Delay(_) => "Delayed jobs",
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
