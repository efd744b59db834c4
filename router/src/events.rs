//! The seam of what backends may want to know of devices: that they came and went.
//!
//! A device is online from the first connection that finds no other to the end of the last one; a newer connection that
//! takes over from an older one is neither. Each change carries the epoch of the connection it speaks of, so that whoever
//! hears of changes in another order than they happened can tell.

use crate::{ClientId, Epoch, NodeId};

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PresenceChange {
    /// It was connected nowhere, and is now.
    Online,
    /// It is connected nowhere any more.
    Offline {
        /// Why: the label of the way in which the connection ended, or `node_lost`.
        reason: &'static str,
    },
}

/// A device came or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// Which.
    pub client: ClientId,
    /// What changed.
    pub change: PresenceChange,
    /// Of which connection.
    pub epoch: Epoch,
    /// Where it was or is.
    pub node: NodeId,
    /// Unix milliseconds.
    pub at_ms: u64,
}

/// Where changes are told.
pub trait Events: Send + Sync {
    /// Tells of a change. Fire and forget: nobody waits for it, and it may be lost with the process or the broker.
    fn presence(&self, presence: Presence);
}
