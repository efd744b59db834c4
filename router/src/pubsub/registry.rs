//! What is remembered of queues that outlive whoever reads them.
//!
//! A broker does not say what a queue is bound to, nor who may still come for it. Both is noted here *before* it is done, and
//! forgotten after it is undone: what is noted may not be there, what is there is noted.

use async_trait::async_trait;

use crate::StoreError;

/// One life of a group of a shared subscription, from its first member to its last.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Group {
    /// `$share/{group}/{filter}`.
    pub filter: Box<str>,
    /// Which life. A queue is made for each, so that the end of one never takes the next one's messages.
    pub generation: u64,
}

/// The notes.
#[async_trait]
pub trait QueueRegistry: Send + Sync {
    /// Makes `member` one of the group. A group without members begins a new life; or goes on with the life `known`, which
    /// is that of a member who knows of no end: then it is the notes that were lost. Says whether this call began it, or began it again: its
    /// queue may not be there then.
    async fn join(
        &self,
        filter: &str,
        member: &str,
        known: Option<u64>,
    ) -> Result<(Group, bool), StoreError>;

    /// Whether the queue of a life is there.
    async fn is_declared(&self, group: &Group) -> Result<bool, StoreError>;

    /// Notes that the queue of a life is there.
    async fn note_declared(&self, group: &Group) -> Result<(), StoreError>;

    /// Notes a life as ended that nobody is a member of.
    async fn end(&self, group: &Group) -> Result<(), StoreError>;

    /// Takes `member` out; a life that ends so is [`QueueRegistry::ended`].
    async fn leave(&self, filter: &str, member: &str) -> Result<(), StoreError>;

    /// The group, if it has members.
    async fn group(&self, filter: &str) -> Result<Option<Group>, StoreError>;

    /// Every group that has members, with them.
    async fn groups(&self) -> Result<Vec<(Group, Vec<String>)>, StoreError>;

    /// Lives that ended and were not forgotten.
    async fn ended(&self) -> Result<Vec<Group>, StoreError>;

    /// Nothing is left of it.
    async fn forget(&self, group: &Group) -> Result<(), StoreError>;

    /// The patterns that `queue` may be bound to.
    async fn bound(&self, queue: &str) -> Result<Vec<String>, StoreError>;

    /// Notes patterns that are about to be bound.
    async fn note_bound(&self, queue: &str, patterns: &[String]) -> Result<(), StoreError>;

    /// Forgets patterns that are bound no more.
    async fn forget_bound(&self, queue: &str, patterns: &[String]) -> Result<(), StoreError>;
}
