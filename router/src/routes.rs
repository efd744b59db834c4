//! The seam of routes and the node registry.

use async_trait::async_trait;

use crate::{ClientId, Epoch, NodeId, StoreError};

/// Where a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The run of the node that holds the connection.
    pub node: NodeId,
    /// The connection's fencing token.
    pub epoch: Epoch,
    /// Unix milliseconds.
    pub connected_at_ms: u64,
}

/// What a claim returns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The new connection's epoch, higher than any before for this client.
    pub epoch: Epoch,
    /// Whom it displaced: also where that node has died meanwhile, and nobody has released the route.
    pub previous: Option<Route>,
}

/// What a store knows of a connection that a node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is the client's.
    Owned,
    /// The store knew of no connection as new as this one, and knows of this one now.
    Restored,
    /// The client has a newer one.
    Lost {
        /// The newest epoch.
        current: Epoch,
    },
}

/// Whether a node takes new devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// It does.
    Up,
    /// It is leaving.
    Draining,
}

/// A node as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// The run.
    pub id: NodeId,
    /// Where other services reach it; empty when it lives in this process.
    pub address: String,
    /// The program's version.
    pub version: String,
    /// Whether it takes new devices.
    pub state: NodeState,
    /// Connections held, as of the last renewal.
    pub connections: u64,
    /// Where it runs, by the operator's word; nodes of one region send devices to each other first. May be empty.
    pub region: String,
    /// Where devices reach it, as MQTT 5.0 tells them (Server Reference); may be empty.
    pub server_reference: String,
}

/// Routes and node leases.
///
/// A route is valid only while its node's lease is: a node that stops renewing takes all of its
/// routes with it, without a heartbeat per device.
#[async_trait]
pub trait Routes: Send + Sync {
    /// Makes `node` the owner of `client`. The newest claim wins; epochs never go back, not even
    /// across a restart or a step of the clock.
    async fn claim(&self, client: &ClientId, node: &NodeId) -> Result<Claim, StoreError>;

    /// Removes the route if it still carries `epoch`; says whether it did.
    async fn release(&self, client: &ClientId, epoch: Epoch) -> Result<bool, StoreError>;

    /// The valid route of `client`.
    async fn look_up(&self, client: &ClientId) -> Result<Option<Route>, StoreError>;

    /// Valid routes in the order of client ids, from after `after`, at most `limit`.
    async fn list(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<(ClientId, Route)>, StoreError>;

    /// Takes or renews the lease of `node` for `lease_ms` milliseconds; says whether the store still knew it. One
    /// that it does not know any more has been emptied, or has been out of reach for long: what the node holds is to be
    /// compared ([`Routes::reconcile`]).
    async fn renew(&self, node: NodeRecord, lease_ms: u64) -> Result<bool, StoreError>;

    /// Compares the connections of `node` with the store, in order, and writes each route again that the store has lost.
    async fn reconcile(
        &self,
        node: &NodeId,
        held: &[(ClientId, Epoch)],
    ) -> Result<Vec<Standing>, StoreError>;

    /// Gives the lease up; every route of the node is invalid at once.
    async fn leave(&self, node: &NodeId) -> Result<(), StoreError>;

    /// The nodes whose lease is valid.
    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError>;
}
