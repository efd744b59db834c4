//! Access node: the only part that holds device connections.
//!
//! It owns sockets, MQTT sessions and local subscriptions, and nothing that cannot be rebuilt:
//! what must survive is in the router's stores. It never speaks HTTP to a backend.
//!
//! Read in the order of a connection's life: `listener` → `handshake` → `connection` (the task
//! and its one waiting place) → `inbound` and `subscribing` (what packets do) → `publish` (where a
//! message goes) → `outbound` (how it reaches a socket) → `ending`. Beside that: `session` and
//! `wire` (what is shared), `reader` and `ws` (bytes), `subscriptions` and `retained` (indexes),
//! `deadlines` and `timers` (time), `close_reason`.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

mod close_reason;
mod config;
mod connection;
mod deadlines;
mod ending;
mod handshake;
mod inbound;
mod listener;
mod metrics;
mod node;
mod outbound;
mod publish;
mod reader;
mod restore;
mod retained;
mod session;
mod subscribing;
mod subscriptions;
mod timers;
mod wire;
mod ws;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use moorline_router::upstream::UpstreamRoutes;
use moorline_router::{NodeId, Nodes, StoreError, Stores};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

pub use config::Config;

use crate::close_reason::CloseReason;
use crate::node::{LocalNodes, Node};
use crate::session::Transport;

/// How long a clean stop waits for connections to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A node that is ready to take devices.
pub struct AccessNode {
    node: Arc<Node>,
    tasks: JoinSet<()>,
}

impl AccessNode {
    /// Restores what outlived the last process (sessions, retained messages, wills of devices that
    /// were connected when it died) and takes the node's lease.
    ///
    /// # Errors
    /// When the stores cannot be read or written.
    pub async fn start(
        id: NodeId,
        config: Config,
        stores: Stores,
        upstream: UpstreamRoutes,
    ) -> Result<Self, StoreError> {
        let node = Arc::new(Node::new(id, config, stores, upstream));
        node.renew_lease().await?;
        restore::run(&node).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(deadlines::run(Arc::clone(&node)));
        tasks.spawn(timers::run(Arc::clone(&node)));
        tasks.spawn(Arc::clone(&node).keep_lease());
        Ok(Self { node, tasks })
    }

    /// Takes devices that speak MQTT over TCP.
    pub fn listen_tcp(&mut self, listener: TcpListener) {
        self.tasks.spawn(listener::run(
            Arc::clone(&self.node),
            listener,
            Transport::Tcp,
        ));
    }

    /// Takes devices that speak MQTT over WebSocket.
    pub fn listen_websocket(&mut self, listener: TcpListener) {
        self.tasks.spawn(listener::run(
            Arc::clone(&self.node),
            listener,
            Transport::WebSocket,
        ));
    }

    /// The node as services of the same process reach it.
    pub fn nodes(&self) -> Arc<dyn Nodes> {
        Arc::new(LocalNodes(Arc::clone(&self.node)))
    }

    /// Stops cleanly: no new devices, every connection closed with its reason, the lease given up
    /// last. Sessions and inboxes stay as they are.
    pub async fn stop(mut self) {
        self.node.draining.store(true, Ordering::Release);
        self.tasks.shutdown().await;
        self.node.close_all(CloseReason::ServerShuttingDown);
        let gone = self.node.all_connections_gone();
        if tokio::time::timeout(STOP_TIMEOUT, gone).await.is_err() {
            tracing::warn!("connections still open after {STOP_TIMEOUT:?}");
        }
        if let Err(error) = self.node.stores.routes.leave(&self.node.id).await {
            tracing::warn!(%error, "node lease not given up");
        }
    }
}
