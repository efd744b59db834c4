//! What a node does because it is one of several.
//!
//! A node of several holds in memory only the sessions of devices that are connected to it; the rest is in the stores, and
//! the node that holds the shard of a client sees to it there.

pub(crate) mod comparison;
pub(crate) mod connecting;
pub(crate) mod departure;
pub(crate) mod exchange;
pub(crate) mod forward;
pub(crate) mod groups;
pub(crate) mod holdings;
pub(crate) mod lease;
mod link;
mod peers;
pub(crate) mod publications;
pub(crate) mod retained_changes;
pub(crate) mod shard;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use moorline_router::{
    Claim, ClientId, Epoch, Events, Nodes, Presence, PresenceChange, PubSub, Shards, StoreError,
    unix_ms,
};

use comparison::Comparison;
use connecting::Connecting;
use departure::Departures;
use exchange::Exchange;
use forward::Forwarding;
use holdings::Holdings;
use link::StoreLink;
use publications::Holders;
use retained_changes::RetainedReadings;

pub(crate) use peers::Peers;

use crate::node::Node;
use crate::publish::Durable;

/// How long a node that stops tries to leave things in order.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Until a write is tried again that the store did not take.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

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
    pub(crate) link: StoreLink,
    pub(crate) comparison: Comparison,
    pub(crate) holdings: Holdings,
    pub(crate) connecting: Connecting,
    pub(crate) departures: Departures,
    pub(crate) retained: RetainedReadings,
    pub(crate) forwarding: Forwarding,
    pub(crate) exchange: Exchange,
    pub(crate) holders: Holders,
}

impl Membership {
    pub(crate) fn new(given: Cluster) -> Self {
        Self {
            exchange: Exchange::new(&*given.pubsub),
            holders: Holders::default(),
            given,
            link: StoreLink::new(),
            comparison: Comparison::default(),
            holdings: Holdings::default(),
            connecting: Connecting::default(),
            departures: Departures::default(),
            retained: RetainedReadings::default(),
            forwarding: Forwarding::default(),
        }
    }
}

impl Membership {
    /// Refuses new devices at once while the store is out of reach.
    pub(crate) fn admits(&self) -> Result<(), StoreError> {
        match self.link.is_away() {
            true => Err(StoreError::Unavailable("no lease now".to_owned())),
            false => Ok(()),
        }
    }

    /// Tells that `client` came, unless it has only moved.
    pub(crate) fn online(&self, node: &Node, client: &ClientId, claim: &Claim) {
        if claim.previous.is_none() {
            self.say_online(node, client, claim.epoch);
        }
    }

    pub(crate) fn say_online(&self, node: &Node, client: &ClientId, epoch: Epoch) {
        self.given.events.presence(Presence {
            client: client.clone(),
            change: PresenceChange::Online,
            epoch,
            node: node.id.clone(),
            at_ms: unix_ms(),
        });
    }
}

/// A write that may be made again as long as the store does not answer: in a cluster devices stay connected meanwhile. `write` is called at once,
/// and gives what is to be written by then.
pub(crate) fn until_stored(
    node: &Arc<Node>,
    write: impl Fn(&Node) -> Durable + Send + Sync + 'static,
) -> Durable {
    let first = write(node);
    if node.cluster.is_none() {
        return first;
    }
    let node = Arc::clone(node);
    Box::pin(async move { again_until_stored(&node, first, write).await })
}

/// Sees a write through that was called for as `first`: in a cluster it is made `again` as long as the store does not answer.
///
/// The first time at once: behind a fence the refusal may be an earlier write's, which has been seen through since. So the writes
/// of one sender stay in order as long as each is seen through before the next, and the next was refused where this one was.
pub(crate) async fn again_until_stored<T>(
    node: &Arc<Node>,
    first: BoxFuture<'static, Result<T, StoreError>>,
    again: impl Fn(&Node) -> BoxFuture<'static, Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let mut written = first.await;
    let Some(cluster) = &node.cluster else {
        return written;
    };
    if matches!(written, Err(StoreError::Unavailable(_))) {
        written = again(node).await;
    }
    while matches!(written, Err(StoreError::Unavailable(_))) {
        cluster.link.trouble();
        tokio::time::sleep(WRITE_AGAIN).await;
        written = again(node).await;
    }
    written
}

/// Lets the holder of the client's shard read the stored session again. Resolves when it has.
pub(crate) async fn session_changed(node: &Arc<Node>, client: &ClientId) -> Result<(), StoreError> {
    let Some(cluster) = &node.cluster else {
        return Ok(());
    };
    let shards = &cluster.given.shards;
    let shard = shards.shard_of(client);
    let holder = match cluster.holdings.has(shard) {
        true => Some(node.id.clone()),
        false => shards.holder(shard).await?,
    };
    match holder {
        Some(holder) => Peers::of(node).session_changed(&holder, client).await,
        None => Err(StoreError::Unavailable(format!(
            "shard {shard} has no holder now"
        ))),
    }
}

/// The same where nobody waits for it: a holder that does not hear of the end of a session puts into its inbox for a while
/// what nobody reads.
pub(crate) async fn tell_holder(node: &Arc<Node>, client: &ClientId) {
    if let Err(error) = session_changed(node, client).await {
        tracing::debug!(%client, %error, "holder of the shard not told of a session");
    }
}

/// The last things of a node that stops, before it gives its lease up: what is not done by then is done by others, once they
/// notice.
pub(crate) async fn leave(node: &Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    let left = async {
        holdings::give_up_all(node).await;
        departure::finish_some(node, cluster).await
    };
    match tokio::time::timeout(LEAVE_TIMEOUT, left).await {
        Ok(0) => {}
        Ok(left) => tracing::warn!(left, "ends of connections left to others"),
        Err(_) => tracing::warn!("the store does not answer, the rest is left to others"),
    }
}
