//! Where a message goes next.
//!
//! The truth about a device is kept here, behind one small trait per seam, each with one contract
//! test suite (`contract`) that every backend must pass:
//!
//! | seam | what it keeps |
//! |---|---|
//! | [`Routes`] | which node holds a device, under which epoch; which nodes are alive |
//! | [`Inboxes`] | what waits for a device, and the receipts of what was pushed |
//! | [`Sessions`] | persistent MQTT sessions, wills, received QoS 2 packet identifiers |
//! | [`Retained`] | retained messages |
//! | [`Shards`] | who sees to clients that are on no node; many nodes only |
//! | [`PubSub`] | publications on their way to other nodes; many nodes only |
//! | [`Events`] | that devices came and went, for backends; many nodes only |
//! | [`Bans`] | who may not connect |
//! | [`UpstreamBus`] | what devices sent and a backend has not taken yet |
//! | [`Jobs`] | what is to be done later, unless something happens before |
//! | [`Nodes`] | the way to an access node, wherever it runs |
//!
//! Read in this order: [`ids`], [`message`], the seams above, then [`embedded`], the backend of a
//! single machine: one key-value store, one writer thread, one `fdatasync` for many callers. [`mod@redis`] and
//! [`rabbit`] are those of many machines. [`remote`] is the way to access
//! nodes of other processes.
//! [`duration`] is how durations are written in every configuration section and request.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

pub mod bans;
pub mod contract;
pub mod duration;
pub mod embedded;
pub mod events;
pub mod fence;
pub mod ids;
pub mod inboxes;
pub mod jobs;
pub mod message;
pub mod migrate;
pub mod nodes;
pub mod pubsub;
pub mod rabbit;
mod record;
pub mod redis;
pub mod remote;
pub mod routes;
pub mod sessions;
pub mod shards;
pub mod upstream;

pub use bans::{Ban, BanTarget, Bans, InvalidBan};
pub use events::{Events, Presence, PresenceChange};
pub use fence::Fence;
pub use ids::{ClientId, Epoch, InvalidId, MessageId, NodeId, Position, unix_ms};
pub use inboxes::{
    Append, Appended, End, EndReason, HandedOver, InboxEntry, InboxPage, InboxStatus, Inboxes,
    Receipt, ReceiptState, ReceiptStep, Recipient,
};
pub use jobs::{
    ActionKind, ActionState, ClaimToken, Claimed, Clock, EventKind, EventName, EventOutcome, Job,
    JobAction, JobChange, JobCounts, JobCreated, JobCursor, JobEvent, JobFilter, JobId, JobLimits,
    JobPage, JobPatch, JobPlan, JobSettlement, JobState, Jobs, NewJob, RetryPolicy, Settled, Swept,
};
pub use message::{Message, Origin, Share};
pub use nodes::{BanView, Delivery, DeliveryOutcome, Displaced, Nodes, Published, SessionView};
pub use pubsub::{GroupMember, PubSub, Publication, TopicPushes};
pub use routes::{Claim, NodeRecord, NodeState, Route, Routes, Standing};
pub use sessions::{
    ReceivedPublish, Retained, RetainedChanges, RetainedMoment, RetainedVersion, SessionRecord,
    Sessions, StoredSubscription, StoredWill,
};
pub use shards::{Due, DueTimer, Shards, TimerKind, WillTurn};
pub use upstream::{
    DeadLetter, QueueName, Settlement, UpstreamBus, UpstreamDelivery, UpstreamMessage,
};

/// Why a store did not do what was asked; named by what the caller does next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Out of reach or unable to make things durable; the same call may succeed later.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// A newer epoch owns this client: give up, do not retry.
    #[error("a newer connection (epoch {current}) owns this client")]
    Stale {
        /// The epoch in force.
        current: Epoch,
    },
    /// A declared limit is reached and its policy is to reject.
    #[error("{0}")]
    Full(String),
    /// The one who asks has all that it may have; others are served.
    #[error("{0}")]
    Quota(String),
    /// Stored bytes do not make sense; the text names the record.
    #[error("damaged record: {0}")]
    Damaged(String),
}

impl StoreError {
    /// Whether the same call may succeed later without anything else being done.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Full(_))
    }
}

/// Every seam of one deployment, as the roles receive them.
#[derive(Clone)]
#[allow(missing_docs, reason = "one field a seam")]
pub struct Stores {
    pub routes: std::sync::Arc<dyn Routes>,
    pub inboxes: std::sync::Arc<dyn Inboxes>,
    pub sessions: std::sync::Arc<dyn Sessions>,
    pub retained: std::sync::Arc<dyn Retained>,
    pub bans: std::sync::Arc<dyn Bans>,
    pub upstream: std::sync::Arc<dyn UpstreamBus>,
    pub jobs: std::sync::Arc<dyn Jobs>,
}
