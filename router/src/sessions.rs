//! The seams of persistent sessions and of retained messages.

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use moorline_mqtt::{PacketId, SubscriptionOptions, TopicName, Will};

use crate::{ClientId, Epoch, Message, MessageId, StoreError};

/// A subscription of a persistent session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSubscription {
    /// The filter as the client wrote it.
    pub filter: String,
    /// Its options.
    pub options: SubscriptionOptions,
    /// MQTT 5.0 subscription identifier.
    pub subscription_id: Option<u32>,
}

/// A QoS 2 PUBLISH of a client that has not been released yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedPublish {
    /// The client's packet identifier.
    pub packet_id: PacketId,
    /// Kept before the message goes on, so that a repeated PUBLISH goes on under the same id.
    pub message_id: MessageId,
    /// Whether the message went on durably.
    pub done: bool,
}

/// A will that is still to be published if the connection `epoch` ends badly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredWill {
    /// Of which connection.
    pub epoch: Epoch,
    /// The will.
    pub will: Will,
}

/// A persistent session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRecord {
    /// Whose.
    pub client: ClientId,
    /// Seconds after the end of the connection; `u32::MAX` never expires.
    pub expiry_interval_s: u32,
    /// Unix milliseconds of the end of the last connection; `None` while connected.
    pub disconnected_at_ms: Option<u64>,
    /// Its subscriptions.
    pub subscriptions: Vec<StoredSubscription>,
}

/// Persistent sessions, wills and received QoS 2 packet identifiers.
///
/// The returned futures take their place in the order of writes when they are made, not when
/// they are polled, and resolve when the change is durable.
#[async_trait]
pub trait Sessions: Send + Sync {
    /// Every session, for a node that starts.
    async fn load_all(&self) -> Result<Vec<SessionRecord>, StoreError>;

    /// The session of one client, for a node that it connects to.
    async fn load(&self, client: &ClientId) -> Result<Option<SessionRecord>, StoreError>;

    /// Writes or replaces the session; with a disconnected one, also how far its inbox was sent.
    /// `epoch` is the connection that writes it: [`StoreError::Stale`] once the client has a newer one. From then on
    /// older ones note no more received packets, see [`Sessions::save_received`].
    fn save(
        &self,
        epoch: Epoch,
        session: SessionRecord,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Removes the session with its received packet identifiers (not its inbox: see [`crate::Inboxes::end_session`]).
    /// `epoch` is the last connection that it had: [`StoreError::Stale`] once the client has a newer one. `None` where
    /// nobody else could have made one.
    fn delete(
        &self,
        client: &ClientId,
        epoch: Option<Epoch>,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// The unreleased QoS 2 PUBLISH of a client.
    async fn received(&self, client: &ClientId) -> Result<Vec<ReceivedPublish>, StoreError>;

    /// Notes a QoS 2 PUBLISH that the connection `epoch` received: before the message goes on, and once more when it has.
    ///
    /// A newer connection claims the route, has this one closed, writes the session ([`Sessions::save`], or [`Sessions::delete`] where it
    /// begins a new one) and then asks for what was [received](Sessions::received). The line between the two connections is that write:
    ///
    /// * A note called for before it is taken, also behind the newer claim, and the newer connection is told of it: a repetition goes on
    ///   under the same message id, or is only answered.
    /// * A note called for after it answers [`StoreError::Stale`], because the newer connection would not learn of it. Only a
    ///   connection that was not closed in time can come to that: one on a node that did not answer. Its message does not go on,
    ///   because where the message goes to another store it waits for the note, and so the device's repetition is the first.
    /// * That a message went on may be noted after it, too, of what was noted before and is still about that message: it
    ///   is true, and the next connection spares the device's repetition.
    /// * A connection that claimed and failed before that write has changed nothing here.
    fn save_received(
        &self,
        client: &ClientId,
        epoch: Epoch,
        received: ReceivedPublish,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Forgets it on PUBREL, or because it was refused, which the connection `epoch` heard of. [`StoreError::Stale`] behind the line that
    /// [`Sessions::save_received`] is about: by then the identifier may be that of another PUBLISH, and the device repeats its PUBREL.
    fn release_received(
        &self,
        client: &ClientId,
        epoch: Epoch,
        packet_id: PacketId,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Keeps the will of a connection, replacing that of an earlier one; that of a later one stays.
    fn save_will(
        &self,
        client: &ClientId,
        will: StoredWill,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Forgets the will if it is still that of `epoch`.
    fn delete_will(
        &self,
        client: &ClientId,
        epoch: Epoch,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// The will that is kept for `client`.
    async fn will(&self, client: &ClientId) -> Result<Option<StoredWill>, StoreError>;

    /// Every will that is kept, for a node that starts.
    async fn load_wills(&self) -> Result<Vec<(ClientId, StoredWill)>, StoreError>;
}

/// How much of the changes of retained messages a node has seen; the default is nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct RetainedVersion {
    /// Which life of the store: after it was emptied everything is new.
    pub generation: u64,
    /// Counts changes.
    pub change: u64,
}

/// Changes of retained messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedChanges {
    /// Up to where these are.
    pub version: RetainedVersion,
    /// These are all there are: what is not among them is gone.
    pub complete: bool,
    /// The newest of each topic, in the order of changes; `None` was removed.
    pub topics: Vec<(TopicName, Option<Message>)>,
}

/// A moment by the clock of the store of retained messages, in microseconds: never before the one at which the store was asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RetainedMoment(pub(crate) u64);

/// Retained messages.
#[async_trait]
pub trait Retained: Send + Sync {
    /// Every retained message, for a node that starts.
    async fn load_all(&self) -> Result<Vec<Message>, StoreError>;

    /// What other nodes have changed since `version`, for a node that keeps all of them in memory. `Ok(None)` where there
    /// is nobody else.
    async fn changes(&self, since: RetainedVersion) -> Result<Option<RetainedChanges>, StoreError>;

    /// Now, for [`Retained::set`]. `None` where there is nobody else, or nothing is known of the store's clock yet.
    fn now(&self) -> Option<RetainedMoment>;

    /// Replaces the retained message of `topic`; `None` removes it. Takes its place in the order of
    /// writes at once and resolves when durable.
    ///
    /// `asked` is when it was first to be set; `None` is now. Whoever gets no answer may call again with the same: of what is asked for
    /// the last is stored, in whatever order it arrives, and how often. What arrives behind something newer changes
    /// nothing and resolves like the others: it is as if it had been written just before.
    fn set(
        &self,
        topic: &TopicName,
        message: Option<&Message>,
        asked: Option<RetainedMoment>,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Removes messages that have expired by the store's clock, at most `limit`, and says how many. A node that is alone
    /// removes those that it has in memory by itself: there it is always 0.
    async fn expire(&self, limit: usize) -> Result<usize, StoreError>;
}
