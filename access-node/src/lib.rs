//! Access node: the only part that holds device connections.
//!
//! It owns sockets, MQTT sessions and local subscriptions, and nothing that cannot be rebuilt:
//! what must survive is in the router's stores. It never speaks HTTP to a backend.
//!
//! Read in the order of a connection's life: `listener` (and `admission`) → `handshake` (with `auth`) → `connection` (the task
//! and its one waiting place) → `inbound` and `subscribing` (what packets do) → `publish` (where a
//! message goes; `fan_out` and `message_parts` beside it) → `outbound` (how it reaches a socket) → `ending`. `local_nodes` is how services of the same process reach the node. Beside that: `session` and
//! `wire` (what is shared), `peer`, `listener_config` and `certificates` (who comes, and where),
//! `threads`, `reader`, `proxy`, `tls` and `ws` (bytes), `subscriptions` and `retained` (indexes),
//! `deadlines` and `timers` (time), `rate` (how much in a second), `bans` and `flapping`, `handovers`
//! (of a displaced connection), `drain`, `close_reason`. `cluster` is what a node does because it is one of several.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

mod admission;
mod aliases;
mod auth;
mod bans;
mod certificates;
mod close_reason;
mod cluster;
mod config;
mod connack;
mod connection;
mod deadlines;
mod delayed;
mod drain;
mod ending;
mod fan_out;
mod fences;
mod flapping;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod handovers;
mod handshake;
mod held;
mod inbound;
mod listener;
mod listener_config;
mod local_nodes;
mod message_parts;
mod metrics;
mod node;
mod outbound;
mod peer;
mod proxy;
mod publish;
mod queue;
mod rate;
mod reader;
mod redispatch;
mod refusal;
mod restore;
mod retained;
mod retained_feed;
mod session;
mod shared;
mod subscribing;
mod subscriptions;
mod threads;
mod timers;
mod tls;
mod unrouted;
mod wire;
mod ws;

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use moorline_router::upstream::UpstreamRoutes;
use moorline_router::{NodeId, Nodes, StoreError, Stores};
use tokio::sync::Notify;
use tokio::task::JoinSet;

pub use auth::config::{AclConfig, AuthConfig, AuthenticatorKind};
pub use auth::password::{edit_passwords, hash as hash_password};
pub use cluster::Cluster;
pub use config::{Config, Excess, Flapping, PerAddress, PerDevice, QueueOverflow};
pub use delayed::DelayRules;
pub use drain::Drain;
pub use listener_config::{
    CertificateIdentity, ClientCertificateMode, ListenerConfig, Protocol, TlsConfig,
};
pub use peer::ListenerSettings;

use crate::auth::Auth;
use crate::close_reason::CloseReason;
use crate::cluster::{
    Peers, comparison, departure, exchange, forward, groups, holdings, lease, publications,
    retained_changes,
};
use crate::listener::Listener;
use crate::local_nodes::LocalNodes;
use crate::node::Node;
use crate::threads::Threads;

/// How long a clean stop waits for connections to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a node of a cluster that begins waits for its shards.
const SETTLE_IN: Duration = Duration::from_secs(10);

/// A node that is ready to take devices.
pub struct AccessNode {
    node: Arc<Node>,
    threads: Threads,
    tasks: JoinSet<()>,
    /// One for each listener with certificates.
    certificates: Vec<Arc<Notify>>,
}

/// Who is let in, and what for.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Who is let in.
    pub auth: AuthConfig,
    /// What for.
    pub acl: AclConfig,
    /// Where files lie whose place is not configured.
    pub data_dir: PathBuf,
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The stores cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of an authenticator cannot be used.
    #[error("{0}")]
    Auth(String),
    /// The system gives no thread or event loop.
    #[error("cannot start the threads that serve devices: {0}")]
    Threads(#[from] std::io::Error),
}

impl AccessNode {
    /// Restores what outlived the last process (sessions, retained messages, wills of devices that
    /// were connected when it died) and takes the node's lease. With a `cluster` the node is one of several, and sessions
    /// are loaded when their devices connect.
    ///
    /// # Errors
    /// When the stores cannot be read or written, or the system gives no threads.
    pub async fn start(
        id: NodeId,
        config: Config,
        access: Access,
        stores: Stores,
        upstream: UpstreamRoutes,
        delays: DelayRules,
        cluster: Option<Cluster>,
    ) -> Result<Self, StartError> {
        let Access {
            auth,
            acl,
            data_dir,
        } = access;
        let auth = Auth::open(&auth, &acl, &config.device_topics, &data_dir);
        let auth = auth.map_err(StartError::Auth)?;
        let node = Arc::new(Node::new(
            id, config, auth, stores, upstream, delays, cluster,
        ));
        node.renew_lease().await?;
        match node.cluster {
            None => restore::run(&node).await?,
            Some(ref cluster) => retained_changes::catch_up(&node, cluster).await?,
        }
        bans::load(&node).await?;
        let threads = Threads::start(node.config.threads)?;
        // On a thread that serves devices, so that a node that is stuck there loses its lease.
        let first = &threads.handles[0];
        let mut tasks = JoinSet::new();
        tasks.spawn_on(deadlines::run(Arc::clone(&node)), first);
        if node.cluster.is_some() {
            tasks.spawn_on(lease::run(Arc::clone(&node)), first);
            tasks.spawn(comparison::run(Arc::clone(&node)));
            tasks.spawn(departure::run(Arc::clone(&node)));
            tasks.spawn(holdings::run(Arc::clone(&node)));
            tasks.spawn(forward::run(Arc::clone(&node)));
            tasks.spawn(retained_changes::run(Arc::clone(&node)));
            tasks.spawn_on(exchange::run(Arc::clone(&node)), first);
            tasks.spawn(groups::run(Arc::clone(&node)));
        } else {
            tasks.spawn_on(timers::run(Arc::clone(&node)), first);
            tasks.spawn_on(Arc::clone(&node).keep_lease(), first);
        }
        tasks.spawn_on(bans::run(Arc::clone(&node)), first);
        if let Some(refreshing) = node.auth.refreshing() {
            // Here, where HTTP is spoken, not among the devices.
            tasks.spawn(refreshing);
        }
        Ok(Self {
            node,
            threads,
            tasks,
            certificates: Vec::new(),
        })
    }

    /// In a cluster, waits until what is published reaches every persistent session, for at most ten seconds: a broker that is away
    /// is no reason to take no devices.
    pub async fn settle_in(&self) {
        let Some(cluster) = &self.node.cluster else {
            return;
        };
        let held = publications::all_held(cluster);
        if tokio::time::timeout(SETTLE_IN, held).await.is_err() {
            tracing::warn!(
                "not every shard of persistent sessions is seen to yet: publications may pass some by that was never bound to the broker"
            );
        }
    }

    /// Takes devices. The socket must be non-blocking. Every thread accepts: whichever is free first
    /// takes the connection and keeps it.
    ///
    /// # Errors
    /// When the system gives no further handle of the socket.
    pub fn listen(
        &mut self,
        socket: &TcpListener,
        settings: ListenerSettings,
    ) -> std::io::Result<()> {
        let listener = Arc::new(Listener::new(Arc::clone(&self.node), settings));
        for handle in &self.threads.handles {
            let shared = socket.try_clone()?;
            self.tasks
                .spawn_on(listener::run(Arc::clone(&listener), shared), handle);
        }
        if listener.settings.tls.is_some() {
            let wake = Arc::new(Notify::new());
            self.certificates.push(Arc::clone(&wake));
            let watch = listener::watch_certificates(Arc::clone(&listener.settings), wake);
            self.tasks.spawn_on(watch, &self.threads.handles[0]);
        }
        Ok(())
    }

    /// Reads the certificates of every listener again. It also happens by itself soon after their
    /// files change.
    pub fn reload_certificates(&self) {
        for wake in &self.certificates {
            wake.notify_one();
        }
    }

    /// Every node as services of the same process reach them: this one, and in a cluster the others.
    pub fn nodes(&self) -> Arc<dyn Nodes> {
        Arc::new(Peers::of(&self.node))
    }

    /// This node alone, as it is offered to other processes.
    pub fn local_nodes(&self) -> Arc<dyn Nodes> {
        Arc::new(LocalNodes(Arc::clone(&self.node)))
    }

    /// Takes no new devices and asks those that are here to leave, each in its turn; those that speak MQTT 5.0 are told where
    /// to go, if another node says where it is reached. Resolves when all have left or the time is over. The
    /// lease is kept: what is still here is delivered to.
    pub async fn drain(&self, drain: Drain) {
        self.node.begin_drain();
        if let Err(error) = self.node.renew_lease().await {
            tracing::warn!(%error, "the others are not told that this node is leaving");
        }
        let connections = self.node.admission.gate.open();
        tracing::info!(connections, rate = drain.rate, "devices are asked to leave");
        let leaving = drain::run(&self.node, drain.rate);
        if tokio::time::timeout(drain.timeout, leaving).await.is_err() {
            tracing::warn!("devices still connected after {:?}", drain.timeout);
        }
    }

    /// Takes no new devices from now on, and lets the other nodes know.
    pub fn begin_drain(&self) {
        self.node.begin_drain();
    }

    /// Whether it does not.
    pub fn is_draining(&self) -> bool {
        self.node.is_draining()
    }

    /// Sockets of devices that are open now.
    pub fn connections(&self) -> usize {
        self.node.admission.gate.open()
    }

    /// Whether the stores of the cluster answer; a node alone has its own.
    pub fn reaches_stores(&self) -> bool {
        let cluster = self.node.cluster.as_ref();
        cluster.is_none_or(|cluster| cluster.admits().is_ok())
    }

    /// Stops cleanly: no new devices, every connection closed with its reason, the lease given up
    /// last. Sessions and inboxes stay as they are.
    pub async fn stop(mut self) {
        self.node.begin_drain();
        self.tasks.shutdown().await;
        self.node.close_all(CloseReason::ServerShuttingDown);
        let gone = self.node.admission.gate.all_gone();
        if tokio::time::timeout(STOP_TIMEOUT, gone).await.is_err() {
            tracing::warn!("connections still open after {STOP_TIMEOUT:?}");
        }
        cluster::leave(&self.node).await;
        self.threads.stop();
        if let Err(error) = self.node.stores.routes.leave(&self.node.id).await {
            tracing::warn!(%error, "node lease not given up");
        }
    }
}
