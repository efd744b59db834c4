//! What a node does because it is one of several.
//!
//! A node of several holds in memory only the sessions of devices that are connected to it; the rest is in the stores, and
//! the node that holds the shard of a client sees to it there.

mod peers;

use std::fmt;
use std::sync::Arc;

use moorline_router::{Events, Nodes, PubSub, Shards};

pub(crate) use peers::Peers;

/// What a node is given that is one of several.
#[derive(Clone)]
pub struct Cluster {
    /// Who sees to the clients that are on no node.
    pub shards: Arc<dyn Shards>,
    /// The way to the other nodes. What concerns this one does not go there.
    pub peers: Arc<dyn Nodes>,
    /// The way of publications to the other nodes.
    pub pubsub: Arc<dyn PubSub>,
    /// Where it is told that devices came and went.
    pub events: Arc<dyn Events>,
    /// Where the other services reach what [`crate::AccessNode::local_nodes`] gives.
    pub address: String,
    /// Where the node runs, by the operator's word; may be empty.
    pub region: String,
    /// Where devices reach it, as MQTT 5.0 tells them; may be empty.
    pub server_reference: String,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("address", &self.address)
            .field("region", &self.region)
            .field("server_reference", &self.server_reference)
            .finish_non_exhaustive()
    }
}

/// The node's part in the cluster.
pub(crate) struct Membership {
    pub(crate) given: Cluster,
}

impl Membership {
    pub(crate) fn new(given: Cluster) -> Self {
        Self { given }
    }
}
