//! The `[rabbitmq]` section.

use std::path::PathBuf;
use std::time::Duration;

use lapin::types::ShortString;
use lapin::uri::AMQPUri;
use serde::{Deserialize, Serialize};

/// RabbitMQ: where it is and how much is left to it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `amqp://user:password@host:port/vhost`, or `amqps://…`; empty for none.
    pub url: String,
    /// PEM file with the authority that signed the broker's certificate, where it is none of the well-known ones.
    pub ca: Option<PathBuf>,
    /// What the names of all exchanges and queues begin with. The same in the whole deployment.
    pub prefix: String,
    /// Partition queues of each upstream rule. The same in the whole deployment; changed only while the queues are empty.
    pub partitions: u16,
    /// Messages that one upstream queue (a partition of a rule, or the default queue) may hold; then publishes are refused.
    pub queue_messages_max: u32,
    /// Bytes of payloads that one upstream queue may hold; then publishes are refused.
    pub queue_bytes_max: u64,
    /// Messages of one upstream queue that a worker takes ahead of those it is done with.
    pub prefetch: u16,
    /// A connection on which nothing arrived for twice this long is given up. Whole seconds.
    #[serde(with = "crate::duration")]
    pub heartbeat: Duration,
    /// Messages of one channel that are on their way to the broker and not confirmed.
    pub publish_window: usize,
    /// Bytes of messages that wait to be published or confirmed; beyond it publishes are refused as overloaded.
    pub publish_bytes_max: usize,
    /// Messages that wait to be published or confirmed; beyond it publishes are refused as overloaded.
    pub publish_messages_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: String::new(),
            ca: None,
            prefix: "moorline".to_owned(),
            partitions: 8,
            queue_messages_max: 1_000_000,
            queue_bytes_max: 1 << 30,
            prefetch: 64,
            heartbeat: Duration::from_secs(10),
            publish_window: 256,
            publish_bytes_max: 64 << 20,
            publish_messages_max: 100_000,
        }
    }
}

impl std::fmt::Debug for Config {
    /// Without the password that is in the URL.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("address", &self.address())
            .field("prefix", &self.prefix)
            .field("partitions", &self.partitions)
            .finish_non_exhaustive()
    }
}

/// Room for what follows the prefix in a name of 255 bytes at most.
const PREFIX_BYTES_MAX: usize = 64;
/// Each partition of each rule is a quorum queue of its own.
const PARTITIONS_MAX: u16 = 256;

impl Config {
    /// Whether RabbitMQ is used at all.
    pub fn is_on(&self) -> bool {
        !self.url.is_empty()
    }

    /// Checks what the types cannot; the error names the key and what would be right.
    ///
    /// # Errors
    /// When nothing could be published or kept with these values.
    pub fn validate(&self) -> Result<(), String> {
        if self.is_on() {
            self.uri()?;
        }
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let prefix = &self.prefix;
        if prefix.is_empty() || prefix.len() > PREFIX_BYTES_MAX || !prefix.bytes().all(legal) {
            return Err(format!(
                "rabbitmq.prefix {prefix:?} must be 1 to {PREFIX_BYTES_MAX} of the characters a-z, A-Z, 0-9, '-', '_' and '.'"
            ));
        }
        if self.partitions == 0 || self.partitions > PARTITIONS_MAX {
            return Err(format!(
                "rabbitmq.partitions is {}, must be 1 to {PARTITIONS_MAX}",
                self.partitions
            ));
        }
        let seconds = self.heartbeat.as_secs();
        if self.heartbeat.subsec_nanos() > 0 || !(1..=600).contains(&seconds) {
            return Err("rabbitmq.heartbeat must be 1 to 600 whole seconds".into());
        }
        let at_least = [
            ("queue_messages_max", u64::from(self.queue_messages_max), 1),
            ("queue_bytes_max", self.queue_bytes_max, 1_024),
            ("prefetch", u64::from(self.prefetch), 1),
            ("publish_window", self.publish_window as u64, 1),
            ("publish_bytes_max", self.publish_bytes_max as u64, 1 << 20),
            (
                "publish_messages_max",
                self.publish_messages_max as u64,
                self.publish_window as u64,
            ),
        ];
        for (key, value, least) in at_least {
            if value < least {
                return Err(format!(
                    "rabbitmq.{key} is {value}, must be at least {least}"
                ));
            }
        }
        Ok(())
    }

    /// Where the broker is, without who logs in.
    pub fn address(&self) -> String {
        match self.uri() {
            Ok(uri) => format!("{}:{}", uri.authority.host, uri.authority.port),
            Err(_) => String::new(),
        }
    }

    /// The name of an exchange or a queue of this deployment.
    pub fn name(&self, rest: &str) -> ShortString {
        ShortString::try_new(format!("{}.{rest}", self.prefix)).unwrap_or_default()
    }

    pub(super) fn uri(&self) -> Result<AMQPUri, String> {
        let mut uri: AMQPUri = self
            .url
            .parse()
            .map_err(|error| format!("rabbitmq.url is not an AMQP URL: {error}"))?;
        uri.query.heartbeat = u16::try_from(self.heartbeat.as_secs()).ok();
        Ok(uri)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_mean_none() {
        let config = Config::default();
        assert_eq!(config.validate(), Ok(()));
        assert!(!config.is_on());
    }

    #[test]
    fn what_cannot_work_is_named() {
        let refused = |change: fn(&mut Config), key: &str| {
            let mut config = Config::default();
            change(&mut config);
            let error = config.validate().unwrap_err();
            assert!(error.starts_with(key), "{error}");
        };
        refused(|c| c.url = "http://x".into(), "rabbitmq.url");
        refused(|c| c.prefix = "a b".into(), "rabbitmq.prefix");
        refused(|c| c.partitions = 0, "rabbitmq.partitions");
        refused(
            |c| c.heartbeat = Duration::from_millis(1_500),
            "rabbitmq.heartbeat",
        );
        refused(|c| c.publish_window = 0, "rabbitmq.publish_window");
    }

    #[test]
    fn a_password_is_not_printed() {
        let config = Config {
            url: "amqp://user:secret@broker:5671/v".into(),
            ..Config::default()
        };
        assert_eq!(config.address(), "broker:5671");
        assert!(!format!("{config:?}").contains("secret"));
    }
}
