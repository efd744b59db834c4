//! The seam of pub/sub between nodes. On one machine there is none: the one node knows every subscription.
//!
//! ```text
//! publisher's node ──▶ exchange ──┬─▶ queue of each node ──▶ connections of clean sessions, and QoS 0
//!                                 ├─▶ queue of each shard ──▶ its holder ──▶ inboxes of persistent sessions
//!                                 └─▶ queue of each group ──▶ one node with a member ──▶ one member
//! ```
//!
//! Read in this order: here, [`feed`] (what a node takes from), [`registry`] (what is remembered of queues), [`routing_key`]
//! and [`bindings`] (from filters to what an exchange understands), [`pushes`].

pub mod bindings;
pub mod feed;
pub mod pushes;
pub mod registry;
pub mod routing_key;

use std::fmt;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use moorline_mqtt::Publish;

use crate::{ClientId, Fence, MessageId, NodeId, StoreError};

pub use feed::{Ack, Feed, FeedDelivery, Filters};
pub use pushes::TopicPushes;
pub use registry::{Group, QueueRegistry};

/// A PUBLISH on its way to subscribers that other nodes know of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// Travels end to end.
    pub id: MessageId,
    /// Who published it, for No Local; `None` for a push to a topic.
    pub from: Option<ClientId>,
    /// As published.
    pub publish: Publish,
    /// Unix milliseconds.
    pub published_at_ms: u64,
}

/// Who wants the queue of a group of a shared subscription to exist.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GroupMember {
    /// A node with members that are connected to it.
    Node(NodeId),
    /// A shard with members among its persistent sessions, connected or not.
    Shard(u16),
}

impl fmt::Display for GroupMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(f, "node:{node}"),
            Self::Shard(shard) => write!(f, "shard:{shard}"),
        }
    }
}

impl GroupMember {
    /// Reads what it was displayed as.
    pub fn from_text(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("node", id) => Some(Self::Node(NodeId::from_text(id))),
            ("shard", number) => Some(Self::Shard(number.parse().ok()?)),
            _ => None,
        }
    }
}

/// The way from a publisher to the subscribers of other nodes, to the sessions of every shard, and to the groups
/// of shared subscriptions.
#[async_trait]
pub trait PubSub: Send + Sync {
    /// Hands a publication to whoever it concerns but to the connections of the publishing node itself, which has seen
    /// to those. Takes its place in the order at once. For QoS 1 and 2 it resolves when every durable queue that takes it has it; having
    /// no subscriber is no error.
    fn publish(
        &self,
        publication: Publication,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Publications of other processes for the connections of this node, as far as its filters go. Not durable: what comes
    /// while the node or the broker is away is not there afterwards. At its limit the oldest are dropped.
    fn open_node_feed(&self) -> Feed;

    /// Publications of QoS 1 and 2 for the persistent sessions of `shard`: all since a holder of the shard first named a filter
    /// that matches, whoever held it meanwhile. One feed of a shard gets something at a time.
    fn open_shard_feed(&self, shard: u16, filters: &[String]) -> Feed;

    /// Makes sure that what is published for `group` (`$share/{group}/{filter}`) waits for it until `member`, and everybody else
    /// who joined, has left. May be called again and again; the answer changes where everything of the group was lost.
    async fn join_group(&self, group: &str, member: &GroupMember) -> Result<Group, StoreError>;

    /// The last one to leave takes what waits with it.
    async fn leave_group(&self, group: &str, member: &GroupMember) -> Result<(), StoreError>;

    /// The groups of which `member` is one.
    async fn groups_of(&self, member: &GroupMember) -> Result<Vec<String>, StoreError>;

    /// Publications for `group`, each for one of its feeds. What is not acknowledged when a feed ends goes to another.
    fn open_group_feed(&self, group: &Group) -> Feed;

    /// Puts a publication into the queue of a group again, for another member. Resolves when it is safe there; says `false`
    /// where the group has nobody left.
    fn give_back(
        &self,
        group: &str,
        publication: Publication,
    ) -> BoxFuture<'static, Result<bool, StoreError>>;

    /// Lets nodes that are not among `alive` leave their groups, and removes what groups without members left behind.
    async fn sweep_groups(&self, alive: &[NodeId]) -> Result<(), StoreError>;
}
