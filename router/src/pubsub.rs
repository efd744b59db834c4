//! The seam of pub/sub between nodes. On one machine there is none: the one node knows every subscription.

pub mod bindings;
pub mod routing_key;

use futures_util::future::BoxFuture;
use moorline_mqtt::Publish;

use crate::{ClientId, Fence, MessageId, StoreError};

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

/// The way from a publisher to the subscribers of other nodes, to the sessions of every shard, and to the groups
/// of shared subscriptions.
pub trait PubSub: Send + Sync {
    /// Hands a publication to whoever it concerns but to the connections of the publishing node itself, which has seen
    /// to those. Takes its place in the order at once. For QoS 1 and 2 it resolves when every durable queue that takes it has it; having
    /// no subscriber is no error.
    fn publish(
        &self,
        publication: Publication,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>>;
}
