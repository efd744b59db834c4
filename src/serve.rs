//! All roles in one process: bind, open the store, start the roles, wait for a signal, drain.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use moorline_access_node::{Access, AccessNode, ListenerSettings, StartError};
use moorline_push_service::{ApiKeyRecord, Dependency, PushService, Readiness};
use moorline_router::NodeId;
use moorline_router::embedded::EmbeddedStore;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::Failure;
use crate::config::{Config, LogFormat};
use crate::welcome::{self, Addresses, ApiKey, Listening};

/// How long a part has to finish what it is doing.
const PART_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the gateway until SIGTERM or SIGINT.
pub(crate) fn run(mut config: Config) -> Result<(), Failure> {
    start_logging(&config);
    let files_max = raise_open_files();
    config.mqtt.connections_max = connections_max(&config, files_max);
    // Before anything is written: a port that is taken must leave nothing half started.
    let listeners = Listeners::bind(&config)?;
    let metrics = moorline_push_service::install_metrics().context("cannot install metrics")?;
    let mut store_config = config.store.clone();
    store_config.data_dir.clone_from(&config.data_dir);
    let store =
        EmbeddedStore::open(store_config).map_err(|error| Failure::Usage(error.to_string()))?;
    let key =
        welcome::api_key(&config.data_dir).map_err(|error| Failure::Usage(format!("{error:#}")))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(16)
        .thread_name("moorline")
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(serve(config, listeners, store, &key, metrics));
    served.map_err(|error| match error.downcast_ref() {
        // A file that the configuration names is the operator's to mend.
        Some(StartError::Auth(why)) => Failure::Usage(why.clone()),
        _ => error.into(),
    })
}

struct Listeners {
    devices: Vec<DeviceListener>,
    http: StdListener,
}

struct DeviceListener {
    socket: StdListener,
    /// What is printed of it.
    taken: Listening,
    settings: ListenerSettings,
}

impl Listeners {
    fn bind(config: &Config) -> Result<Self, Failure> {
        let mut devices = Vec::new();
        for (key, listener) in config.device_listeners() {
            let settings = ListenerSettings::load(&listener, &config.mqtt)
                .map_err(|error| Failure::Usage(format!("{key}: {error}")))?;
            let socket = bind(&key, listener.address)?;
            devices.push(DeviceListener {
                taken: Listening {
                    scheme: listener.scheme(),
                    address: socket
                        .local_addr()
                        .context("a bound socket has an address")?,
                },
                socket,
                settings,
            });
        }
        Ok(Self {
            devices,
            http: bind("listen.http", config.listen.http)?,
        })
    }
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

async fn serve(
    config: Config,
    listeners: Listeners,
    store: Arc<EmbeddedStore>,
    key: &ApiKey,
    metrics: moorline_push_service::MetricsHandle,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let Listeners { devices, http } = listeners;
    let http = TcpListener::from_std(http)?;
    let addresses = Addresses {
        devices: devices.iter().map(|device| device.taken).collect(),
        http: http.local_addr()?,
    };
    let stores = store.stores();
    let device_topics = config.mqtt.device_topics.clone();
    let mut node = AccessNode::start(
        NodeId::for_this_run("moorline"),
        config.mqtt,
        Access {
            auth: config.auth,
            acl: config.acl,
            data_dir: config.data_dir.clone(),
        },
        stores.clone(),
        config.upstream.routes(),
        None,
    )
    .await
    .context("cannot start the access node")?;

    let draining = Arc::new(AtomicBool::new(false));
    let (stop_sender, stop) = watch::channel(());
    let stopped = |mut stop: watch::Receiver<()>| async move {
        // An error says that the sender is gone, which is the signal.
        let _ = stop.changed().await;
    };
    let service = PushService {
        config: config.http,
        stores: stores.clone(),
        nodes: node.nodes(),
        upstream_log: Some(Arc::clone(&store)),
        keys: vec![ApiKeyRecord::with_every_scope("default", &key.key)],
        metrics,
        readiness: Readiness {
            draining: Arc::clone(&draining),
            dependencies: vec![Dependency::embedded(Arc::clone(&store))],
        },
        device_topics,
    };
    let http = tokio::spawn(moorline_push_service::serve(
        http,
        service,
        stopped(stop.clone()),
    ));
    let worker = tokio::spawn(moorline_upstream_worker::run(
        Arc::clone(&stores.upstream),
        config.upstream,
        stopped(stop),
    ));
    for device in devices {
        node.listen(&device.socket, device.settings)?;
    }
    say(&welcome::text(&addresses, &config.data_dir, key));

    loop {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM, stopping"),
            _ = interrupt.recv() => tracing::info!("interrupted, stopping"),
            _ = hangup.recv() => {
                node.reload_certificates();
                continue;
            }
        }
        break;
    }
    draining.store(true, Ordering::Release);
    drop(stop_sender);
    // Pushes first, so that nothing is accepted that nobody could deliver any more.
    match tokio::time::timeout(PART_TIMEOUT, http).await {
        Ok(result) => result.context("HTTP service")?.context("HTTP service")?,
        Err(_) => tracing::warn!("HTTP requests still open after {PART_TIMEOUT:?}"),
    }
    node.stop().await;
    match tokio::time::timeout(PART_TIMEOUT, worker).await {
        Ok(result) => result.context("upstream worker")?,
        Err(_) => tracing::warn!("backend calls still open after {PART_TIMEOUT:?}"),
    }
    tokio::task::spawn_blocking(move || store.close())
        .await?
        .context("cannot close the store")?;
    tracing::info!("stopped");
    Ok(())
}

/// Whoever started the gateway may have closed its output; that is no reason to stop.
pub(crate) fn say(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn start_logging(config: &Config) {
    use tracing_subscriber::Layer as _;
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    let level: tracing_subscriber::filter::Targets = config
        .log
        .level
        .parse()
        .expect("checked with the configuration");
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
fn raise_open_files() -> Option<u64> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current
}

/// Files that the store and everything else may need beside the connections of HTTP callers.
const OTHER_FILES: usize = 256;

/// How many devices may be connected: a flood of them must not take the files that the store opens
/// as it works, or that callers of the HTTP API need.
fn connections_max(config: &Config, files_max: Option<u64>) -> usize {
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
