//! The seam between whoever pushes and the access nodes: a function call in one process, a stream
//! between several.

use async_trait::async_trait;
use moorline_mqtt::{Publish, Version};

use crate::{Ban, BanTarget, ClientId, Epoch, Message, MessageId, NodeId, Position, StoreError};

/// A hint to a node that a message waits. Losing it loses nothing: the inbox has the message.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// For whom.
    pub client: ClientId,
    /// Where in the inbox; `None` for a QoS 0 push, which is in no inbox.
    pub position: Option<Position>,
    /// The message itself, so that a device that is up to date needs no read of the inbox.
    pub message: Message,
}

/// What a node made of a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryOutcome {
    /// Handed to the device's connection.
    Sent {
        /// Of that connection.
        epoch: Epoch,
    },
    /// The device has more before it; the session will read it from the inbox.
    Behind,
    /// The device is not connected to this node.
    NotHere,
    /// The node has more to do than it takes, or is out of reach: the session will read the message from the inbox.
    Busy,
    /// A QoS 0 push that the connection could not take.
    Dropped,
}

/// What became of a publish to a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Published {
    /// Sessions that match; not known where there are several nodes.
    pub matched: Option<u64>,
}

/// A connection as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionView {
    /// Its fencing token.
    pub epoch: Epoch,
    /// `address:port` of the peer.
    pub address: String,
    /// The protocol version.
    pub version: Version,
    /// `tcp`, `tls`, `ws` or `wss`.
    pub transport: String,
    /// Seconds; 0 is off.
    pub keep_alive_s: u16,
    /// Whether the session outlives the connection.
    pub persistent: bool,
    /// Subscriptions held.
    pub subscriptions: usize,
    /// QoS 1 and 2 messages sent and not acknowledged.
    pub in_flight: usize,
}

/// What a node had of a client that has a newer connection elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Displaced {
    /// There was a connection.
    pub found: bool,
    /// The device had ended its session (DISCONNECT with a Session Expiry Interval of 0), and the store refused to be told so by
    /// the older connection.
    pub session_over: bool,
}

/// A ban as it is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BanView {
    /// The ban.
    pub ban: Ban,
    /// Whether a node gave it by itself, because of what it saw.
    pub automatic: bool,
}

/// The access nodes.
#[async_trait]
pub trait Nodes: Send + Sync {
    /// Hands messages to the connections that `node` holds; one outcome a message, in order.
    async fn deliver(&self, node: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome>;

    /// Closes the connection of `client` on `node` as an administrative action; says whether there was one.
    async fn disconnect(&self, node: &NodeId, client: &ClientId) -> Result<bool, StoreError>;

    /// Closes the connection of `client` on `node` if it is older than `by`, the one that displaces it. Resolves when what
    /// the displaced one took from the device is stored or refused.
    async fn displace(
        &self,
        node: &NodeId,
        client: &ClientId,
        by: Epoch,
    ) -> Result<Displaced, StoreError>;

    /// The stored session of `client` has changed: `node`, which holds its shard, reads it again. Resolves when whatever
    /// is published from now on and matches reaches its inbox.
    async fn session_changed(&self, node: &NodeId, client: &ClientId) -> Result<(), StoreError>;

    /// Bans in force on any node, in the order of their targets, from after `after`, at most `limit`.
    async fn bans(
        &self,
        after: Option<&BanTarget>,
        limit: usize,
    ) -> Result<Vec<BanView>, StoreError>;

    /// The ban of `target` in [`crate::Bans`] has changed: every node reads it again, and closes
    /// connections that are banned now. A ban of the node itself is lifted. Says whether `target` was
    /// banned before.
    async fn ban_changed(&self, target: &BanTarget) -> Result<bool, StoreError>;

    /// What `node` knows of each client's connection.
    async fn sessions(
        &self,
        node: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError>;

    /// Publishes to every subscriber, on whatever node, and to the retained messages. Resolves when every persistent
    /// session that matches has it safe (QoS 1 and 2).
    async fn publish(&self, id: MessageId, publish: Publish) -> Result<Published, StoreError>;
}
