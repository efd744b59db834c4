//! What can be set for the embedded store.

use std::path::PathBuf;

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

use crate::JobLimits;

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
    /// What is kept of delayed jobs. Has a section of its own: set by whoever opens the store.
    #[serde(skip)]
    pub jobs: JobLimits,
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
            jobs: JobLimits::default(),
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
    /// When a limit is so low that nothing could be kept, or so high that nothing could run.
    pub fn validate(&self) -> Result<(), String> {
        let at_least = |key: &str, value: u64, least: u64| {
            if value >= least {
                return Ok(());
            }
            Err(format!("store.{key} is {value}, must be at least {least}"))
        };
        at_least("inbox.entries_max", self.inbox.entries_max, 1)?;
        at_least("inbox.bytes_max", self.inbox.bytes_max, 1_024)?;
        at_least(
            "upstream_queue_bytes_max",
            self.upstream_queue_bytes_max,
            1 << 20,
        )?;
        at_least(
            "upstream_partitions",
            u64::from(self.upstream_partitions),
            1,
        )?;
        at_least("cache_bytes", self.cache_bytes, 1 << 20)?;
        at_least("queue_bytes_max", self.queue_bytes_max as u64, 1 << 20)?;
        if self.upstream_partitions > PARTITIONS_MAX {
            return Err(format!(
                "store.upstream_partitions is {}, must be at most {PARTITIONS_MAX}",
                self.upstream_partitions
            ));
        }
        if self.receipt_retention.is_negative() {
            return Err("store.receipt_retention must not be negative".into());
        }
        Ok(())
    }
}

/// Each partition of each rule has a task of its own.
const PARTITIONS_MAX: u16 = 1_024;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_survive_being_written_down() {
        let config = Config::default();
        assert_eq!(config.validate(), Ok(()));
        let written = serde_json::to_string(&config).unwrap();
        assert!(
            written.contains(r#""receipt_retention":"10m""#),
            "{written}"
        );
        assert!(!written.contains("data_dir"));
        assert_eq!(serde_json::from_str::<Config>(&written).unwrap(), config);
    }

    #[test]
    fn an_unknown_key_and_a_useless_value_are_named() {
        let unknown = serde_json::from_str::<Config>(r#"{"inbox": {"entrys_max": 1}}"#);
        assert!(unknown.unwrap_err().to_string().contains("entrys_max"));
        let config = Config {
            upstream_partitions: 0,
            ..Config::default()
        };
        assert!(
            config
                .validate()
                .unwrap_err()
                .contains("store.upstream_partitions")
        );
        let inbox = InboxLimits {
            bytes_max: 3,
            ..InboxLimits::default()
        };
        let config = Config {
            inbox,
            ..Config::default()
        };
        assert!(
            config
                .validate()
                .unwrap_err()
                .contains("store.inbox.bytes_max")
        );
    }
}
