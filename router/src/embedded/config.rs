//! What can be set for the embedded store.

use std::path::PathBuf;

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

/// The embedded store's settings. The data directory is the only one without which it cannot start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where everything is kept; made if missing. Set by whoever opens the store, not in its section.
    #[serde(skip)]
    pub data_dir: PathBuf,
    /// What one inbox may hold.
    pub inbox: InboxLimits,
    /// How long the receipt of an ended push is kept, and with it the refusal of a repetition.
    #[serde(with = "crate::duration")]
    pub receipt_retention: SignedDuration,
    /// All final receipts together; the oldest go first.
    pub receipts_bytes_max: u64,
    /// What one upstream queue may hold, dead letters included; then publishes are refused.
    pub upstream_queue_bytes_max: u64,
    /// Partitions of a rule's queue. A queue keeps the number it was made with while it holds anything.
    pub upstream_partitions: u16,
    /// Below this much free space nothing that adds data is accepted.
    pub min_free_bytes: u64,
    /// Memory for blocks read from disk.
    pub cache_bytes: u64,
    /// Memory for what callers handed over and is not durable yet; beyond it calls are refused as overloaded.
    pub queue_bytes_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("./moorline-data"),
            inbox: InboxLimits::default(),
            receipt_retention: SignedDuration::from_mins(10),
            receipts_bytes_max: 64 << 20,
            upstream_queue_bytes_max: 1 << 30,
            upstream_partitions: 8,
            min_free_bytes: 64 << 20,
            cache_bytes: 32 << 20,
            queue_bytes_max: 64 << 20,
        }
    }
}

impl Config {
    /// Checks what the types cannot; the error names the key and what would be right.
    ///
    /// # Errors
    /// When a limit is so low that nothing could be kept.
    pub fn validate(&self) -> Result<(), String> {
        let lowest = [
            ("inbox.entries_max", self.inbox.entries_max, 1),
            ("inbox.bytes_max", self.inbox.bytes_max, 1),
            (
                "upstream_queue_bytes_max",
                self.upstream_queue_bytes_max,
                1 << 20,
            ),
            (
                "upstream_partitions",
                u64::from(self.upstream_partitions),
                1,
            ),
            ("queue_bytes_max", self.queue_bytes_max as u64, 1 << 20),
        ];
        match lowest.iter().find(|(_, value, least)| value < least) {
            Some((key, value, least)) => {
                Err(format!("store.{key} is {value}, must be at least {least}"))
            }
            None => Ok(()),
        }
    }
}

/// What one inbox may hold, and what happens at the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InboxLimits {
    /// Entries.
    pub entries_max: u64,
    /// Topics, properties and payloads in bytes.
    pub bytes_max: u64,
    /// What happens to a message that does not fit.
    pub overflow: OverflowPolicy,
}

impl Default for InboxLimits {
    fn default() -> Self {
        Self {
            entries_max: 10_000,
            bytes_max: 16_000_000,
            overflow: OverflowPolicy::DropOldest,
        }
    }
}

/// What happens to a message that does not fit into its inbox. A message larger than a whole inbox
/// is rejected whatever the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OverflowPolicy {
    /// The oldest entries end as dropped until it fits.
    DropOldest,
    /// The message itself ends as dropped: it is accepted, and its receipt says so.
    DropNew,
    /// The call is refused.
    Reject,
}
