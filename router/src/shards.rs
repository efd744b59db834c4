//! The seam of what a deployment of many nodes does for clients that are on none of them.
//!
//! The clients are spread over a fixed number of *shards*, by a hash of their ids. One node holds a
//! shard at a time, under a lease: it sees to the sessions of its clients wherever they are connected
//! (what their subscriptions match goes into their inboxes) and to what happens some time after a
//! connection ended (delayed wills, the end of sessions), also where the node of the connection died.
//! On one machine there is nothing of this: the one node sees to everything it has.

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::{ClientId, Epoch, NodeId, Route, SessionRecord, StoreError};

/// What happens to a client some time after a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TimerKind {
    /// Its will is published.
    Will,
    /// Its session ends.
    SessionExpiry,
}

/// A durable timer. A client has one of each kind at most: a newer one replaces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueTimer {
    /// Whose.
    pub client: ClientId,
    /// What happens.
    pub kind: TimerKind,
    /// After the end of which connection. Nothing happens if a newer one was made.
    pub epoch: Epoch,
    /// Unix milliseconds, by the store's clock.
    pub at_ms: u64,
}

/// What is due in a shard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Due {
    /// Oldest first. A timer stays until it is cancelled: whoever dies over it leaves it to its successor.
    pub timers: Vec<DueTimer>,
    /// How long until the next one, in milliseconds by the store's clock; `None` where there is none.
    pub next_in_ms: Option<u64>,
}

/// Who publishes a will.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WillTurn {
    /// Whoever has asked, and nobody else for a while.
    Yours,
    /// Another, who may die over it: ask again.
    Anothers,
    /// Nobody any more: it was published and forgotten, see [`crate::Sessions::delete_will`].
    Over,
}

/// Shards: their leases, their sessions, their timers, and whose turn it is.
#[async_trait]
pub trait Shards: Send + Sync {
    /// How many there are; the same in the whole deployment.
    fn count(&self) -> u16;

    /// The shard of `client`.
    fn shard_of(&self, client: &ClientId) -> u16;

    /// Takes the shard for `node`, or renews it; says whether `node` has it now. Nobody else gets it for `lease_ms`
    /// milliseconds, nor, after an outage of the store, before one whole lease has gone by since.
    async fn hold(&self, shard: u16, node: &NodeId, lease_ms: u64) -> Result<bool, StoreError>;

    /// Gives the shard up, if `node` has it.
    async fn let_go(&self, shard: u16, node: &NodeId) -> Result<(), StoreError>;

    /// Who has the shard.
    async fn holder(&self, shard: u16) -> Result<Option<NodeId>, StoreError>;

    /// The persistent sessions of the shard in the order of client ids, from after `after`, at most `limit`.
    async fn sessions(
        &self,
        shard: u16,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<SessionRecord>, StoreError>;

    /// Clients of the shard that have a route of a node whose lease ended: it died, and nobody has seen to their
    /// wills and sessions yet. At most `limit`; each stays until [`crate::Routes::release`] of its epoch.
    async fn stranded(
        &self,
        shard: u16,
        limit: usize,
    ) -> Result<Vec<(ClientId, Route)>, StoreError>;

    /// Sets a timer `in_ms` from now. Durable once resolved.
    fn set_timer(
        &self,
        client: &ClientId,
        kind: TimerKind,
        epoch: Epoch,
        in_ms: u64,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Removes the timer if it is that of `epoch` or of an older connection.
    fn cancel_timer(
        &self,
        client: &ClientId,
        kind: TimerKind,
        epoch: Epoch,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// What is due in the shard now, at most `limit`.
    async fn due(&self, shard: u16, limit: usize) -> Result<Due, StoreError>;

    /// Says who publishes the will that `client` left with the connection `epoch`: the node of that connection, that of the next one, and the holder
    /// of the shard may be about to. `whose` names the one who asks; its turn lasts `turn_ms` milliseconds from when it asked last.
    async fn take_will(
        &self,
        client: &ClientId,
        epoch: Epoch,
        whose: &str,
        turn_ms: u64,
    ) -> Result<WillTurn, StoreError>;
}
