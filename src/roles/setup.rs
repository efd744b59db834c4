//! What every process does before it starts a role: logs, open files, sockets.

use std::net::{SocketAddr, TcpListener as StdListener};

use anyhow::Context as _;
use moorline_access_node::ListenerSettings;

use super::Role;
use crate::Failure;
use crate::config::{Config, LogFormat};
use crate::welcome::Listening;

/// Files that the store and everything else may need beside the connections of HTTP callers.
const OTHER_FILES: usize = 256;

/// The sockets of a process.
pub(super) struct Listeners {
    pub(super) devices: Vec<DeviceListener>,
    /// Calls of the other services.
    pub(super) internal: Option<StdListener>,
    pub(super) http: StdListener,
}

/// A socket that devices come to.
pub(super) struct DeviceListener {
    pub(super) socket: StdListener,
    /// What is printed of it.
    pub(super) taken: Listening,
    pub(super) settings: ListenerSettings,
}

impl Listeners {
    /// Binds what the role listens on.
    pub(super) fn bind(role: Role, config: &Config) -> Result<Self, Failure> {
        let mut devices = Vec::new();
        let mut internal = None;
        if role.has_devices() {
            for (key, listener) in config.device_listeners() {
                let settings = ListenerSettings::load(&listener, &config.mqtt)
                    .map_err(|error| Failure::Usage(format!("{key}: {error}")))?;
                let socket = bind(&key, listener.address)?;
                devices.push(DeviceListener {
                    taken: Listening {
                        scheme: listener.scheme(),
                        address: taken(&socket)?,
                    },
                    socket,
                    settings,
                });
            }
            if config.is_cluster() {
                let address = config.cluster.internal_listen;
                internal = Some(bind("cluster.internal_listen", address)?);
            }
        }
        Ok(Self {
            devices,
            internal,
            http: bind("listen.http", config.listen.http)?,
        })
    }
}

/// The address that a socket has taken.
pub(super) fn taken(socket: &StdListener) -> Result<SocketAddr, Failure> {
    let address = socket.local_addr();
    Ok(address.context("a bound socket has an address")?)
}

fn bind(key: &str, address: SocketAddr) -> Result<StdListener, Failure> {
    let bound = (|| {
        let listener = StdListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })();
    bound.map_err(|error: std::io::Error| {
        let advice = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                "; another process has it: choose a free one (port 0 takes any)"
            }
            _ => "",
        };
        Failure::Usage(format!(
            "cannot listen on {address} ({key}): {error}{advice}"
        ))
    })
}

/// Sends what is logged to standard error.
pub(super) fn start_logging(config: &Config) {
    use tracing_subscriber::Layer as _;
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    let mut level: tracing_subscriber::filter::Targets = config
        .log
        .level
        .parse()
        .expect("checked with the configuration");
    if !config.log.level.contains("lapin") {
        // What it says of a lost connection is said once, by who handles that.
        level = level.with_target("lapin", tracing_subscriber::filter::LevelFilter::OFF);
    }
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match config.log.format {
        LogFormat::Text => lines
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(level))
        .init();
}

/// Every device is an open file: the soft limit is often a thousand where the hard one allows more.
/// Gives the limit in force, if there is one.
pub(super) fn raise_open_files() -> Option<u64> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current
}

/// How many devices may be connected: a flood of them must not take the files that the store opens
/// as it works, or that callers of the HTTP API need.
pub(super) fn connections_max(config: &Config, files_max: Option<u64>) -> usize {
    let asked = config.mqtt.connections_max;
    let Some(files_max) = files_max.and_then(|files| usize::try_from(files).ok()) else {
        return asked;
    };
    let reserve = config.http.connections_max.saturating_add(OTHER_FILES);
    let possible = files_max - reserve.min(files_max / 2);
    if possible < asked {
        tracing::debug!(
            files_max,
            connections_max = possible,
            "the limit of open files allows fewer connections than mqtt.connections_max"
        );
    }
    asked.min(possible)
}
