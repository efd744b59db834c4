//! The roles of this program, one or all of them in a process: bind, open the stores, start, wait for a signal, drain.
//!
//! Read in this order: here, `setup` (what comes before), `backends` (the stores), `process` (from the start to the end), `starting` (of an access node).

mod backends;
mod process;
mod setup;
mod starting;

use std::io::Write as _;

use anyhow::Context as _;
use moorline_access_node::StartError;

use crate::Failure;
use crate::config::Config;
use setup::Listeners;

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Everything.
    All,
    /// Holds devices.
    AccessNode,
    /// Answers backends.
    PushService,
    /// Hands what devices sent to backends.
    UpstreamWorker,
    /// Carries out delayed jobs.
    DelayQueue,
}

impl Role {
    fn has_devices(self) -> bool {
        matches!(self, Self::All | Self::AccessNode)
    }

    fn has_api(self) -> bool {
        matches!(self, Self::All | Self::PushService)
    }

    fn works(self) -> bool {
        matches!(self, Self::All | Self::UpstreamWorker)
    }

    fn fires(self) -> bool {
        matches!(self, Self::All | Self::DelayQueue)
    }

    /// As on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::All => "serve",
            Self::AccessNode => "access-node",
            Self::PushService => "push-service",
            Self::UpstreamWorker => "upstream-worker",
            Self::DelayQueue => "delay-queue",
        }
    }

    /// Checks what the configuration lacks for this role alone.
    fn validate(self, config: &Config) -> Result<(), String> {
        if self != Self::All && !config.is_cluster() {
            return Err(format!(
                "moorline {} is one part of several, which share Redis and RabbitMQ: set redis.url and rabbitmq.url, or run \
                 moorline serve for all of them in one process",
                self.name()
            ));
        }
        if self.has_devices() && config.is_cluster() {
            config.cluster.validate_listener()?;
        }
        Ok(())
    }
}

/// Runs the role until SIGTERM or SIGINT.
pub(crate) fn run(role: Role, mut config: Config) -> Result<(), Failure> {
    role.validate(&config).map_err(Failure::Usage)?;
    setup::start_logging(&config);
    let files_max = setup::raise_open_files();
    config.mqtt.connections_max = setup::connections_max(&config, files_max);
    // Before anything is written: a port that is taken must leave nothing half started.
    let listeners = Listeners::bind(role, &config)?;
    let metrics = moorline_push_service::install_metrics().context("cannot install metrics")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(16)
        .thread_name("moorline")
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(process::run(role, config, listeners, metrics))
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        match error {
            // A file that the configuration names is the operator's to mend.
            StartError::Auth(why) => Self::Usage(why),
            error => anyhow::Error::new(error)
                .context("cannot start the access node")
                .into(),
        }
    }
}

/// Whoever started the gateway may have closed its output; that is no reason to stop.
pub(crate) fn say(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
