//! The `[redis]` section, and the limits that it shares with the embedded store.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use jiff::SignedDuration;
use redis::{ConnectionInfo, IntoConnectionInfo};
use serde::{Deserialize, Serialize};

use crate::JobLimits;
use crate::embedded::InboxLimits;

/// How the servers are arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One server, at `url`.
    #[default]
    Single,
    /// One master among several servers, which the sentinels at `urls` name.
    Sentinel,
    /// A Redis Cluster; `urls` are some of its servers.
    Cluster,
}

/// Where Redis is, and how it is spoken to.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `redis://` or `rediss://` (TLS), with `user:password@` where the server asks for it. Empty: there is no Redis. With
    /// sentinels it says how to speak to the master (scheme, user, password, database); its host does not matter.
    pub url: String,
    /// How the servers are arranged.
    pub mode: Mode,
    /// The sentinels, or some servers of the cluster.
    pub urls: Vec<String>,
    /// The master's name, as the sentinels know it.
    pub master_name: String,
    /// Before every key: deployments with different prefixes can share a server.
    pub key_prefix: String,
    /// A write counts as durable once so many replicas have it too; with 0 a failover may lose the last ones.
    pub wait_replicas: u32,
    /// How long is waited for these replicas.
    #[serde(with = "crate::duration")]
    pub wait_timeout: Duration,
    /// How long making a connection may take.
    #[serde(with = "crate::duration")]
    pub connect_timeout: Duration,
    /// How long an answer may take, a lost connection and a failover included.
    #[serde(with = "crate::duration")]
    pub response_timeout: Duration,
    /// A file of certificate authorities (PEM) to trust instead of those of the system.
    pub ca_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: String::new(),
            mode: Mode::Single,
            urls: Vec::new(),
            master_name: "mymaster".into(),
            key_prefix: "moorline".into(),
            wait_replicas: 0,
            wait_timeout: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(1),
            response_timeout: Duration::from_secs(3),
            ca_file: None,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls: Vec<_> = self.urls.iter().map(|url| without_password(url)).collect();
        f.debug_struct("Config")
            .field("url", &without_password(&self.url))
            .field("mode", &self.mode)
            .field("urls", &urls)
            .field("master_name", &self.master_name)
            .field("key_prefix", &self.key_prefix)
            .field("wait_replicas", &self.wait_replicas)
            .finish_non_exhaustive()
    }
}

/// A URL that can be shown.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}"),
        None => url.to_owned(),
    }
}

impl Config {
    /// Whether there is a Redis at all.
    pub fn is_on(&self) -> bool {
        !self.url.is_empty() || !self.urls.is_empty()
    }

    /// Checks what the types cannot; the error names the key and what would be right.
    ///
    /// # Errors
    /// When a URL is none, or one that the mode needs is missing.
    pub fn validate(&self) -> Result<(), String> {
        if !self.is_on() {
            return Ok(());
        }
        if self.key_prefix.is_empty() || !self.key_prefix.bytes().all(is_plain) {
            return Err(format!(
                "redis.key_prefix is {:?}, must be letters, digits, '-', '_', '.' and ':'",
                self.key_prefix
            ));
        }
        let (one, several) = (!self.url.is_empty(), !self.urls.is_empty());
        match self.mode {
            Mode::Single if !one || several => {
                return Err(
                    "redis.mode is \"single\": name the server in redis.url and none in redis.urls"
                        .into(),
                );
            }
            Mode::Sentinel if !several || self.master_name.is_empty() => {
                return Err("redis.mode is \"sentinel\": name the sentinels in redis.urls and the master in redis.master_name".into());
            }
            Mode::Cluster if !one && !several => {
                return Err(
                    "redis.mode is \"cluster\": name some of its servers in redis.urls".into(),
                );
            }
            _ => {}
        }
        for url in std::iter::once(&self.url).chain(&self.urls) {
            if !url.is_empty() {
                parse_url(url)?;
            }
        }
        for (key, value) in [
            ("wait_timeout", self.wait_timeout),
            ("connect_timeout", self.connect_timeout),
            ("response_timeout", self.response_timeout),
        ] {
            if value < Duration::from_millis(10) {
                return Err(format!("redis.{key} must be at least 10ms"));
            }
        }
        if self.wait_replicas > 0 && self.wait_timeout >= self.response_timeout {
            return Err("redis.wait_timeout must be shorter than redis.response_timeout".into());
        }
        Ok(())
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte)
}

/// The server that a URL names.
pub(super) fn parse_url(url: &str) -> Result<ConnectionInfo, String> {
    url.into_connection_info().map_err(|error| {
        format!(
            "{:?} is not the URL of a Redis server like \"redis://host:6379\": {error}",
            without_password(url)
        )
    })
}

/// What is kept, and for how long: the same for every store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// What one inbox may hold.
    pub inbox: InboxLimits,
    /// How long the receipt of an ended push is kept, and with it the refusal of a repetition.
    pub receipt_retention: SignedDuration,
    /// All final receipts together; the oldest go first.
    pub receipts_bytes_max: u64,
    /// Delayed jobs.
    pub jobs: JobLimits,
}

impl Default for Limits {
    fn default() -> Self {
        let embedded = crate::embedded::Config::default();
        Self {
            inbox: embedded.inbox,
            receipt_retention: embedded.receipt_retention,
            receipts_bytes_max: embedded.receipts_bytes_max,
            jobs: JobLimits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str, mode: Mode, urls: &[&str]) -> Config {
        Config {
            url: url.into(),
            mode,
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            ..Config::default()
        }
    }

    #[test]
    fn without_a_url_there_is_no_redis() {
        assert!(!Config::default().is_on());
        assert_eq!(Config::default().validate(), Ok(()));
        let written = serde_json::to_string(&Config::default()).unwrap();
        let read = serde_json::from_str::<Config>(&written).unwrap();
        assert_eq!(read, Config::default());
    }

    #[test]
    fn each_mode_says_what_it_needs() {
        let right = [
            config("redis://h", Mode::Single, &[]),
            config("rediss://u:p@h:1/2", Mode::Single, &[]),
            config("", Mode::Sentinel, &["redis://s1:26379"]),
            config(
                "redis://:p@m",
                Mode::Sentinel,
                &["redis://s1", "redis://s2"],
            ),
            config("", Mode::Cluster, &["redis://n1"]),
        ];
        for config in right {
            assert_eq!(config.validate(), Ok(()), "{config:?}");
        }
        let wrong = [
            (config("", Mode::Single, &["redis://h"]), "redis.url"),
            (config("redis://h", Mode::Sentinel, &[]), "redis.urls"),
            (config("http://h", Mode::Single, &[]), "http://h"),
            (config("", Mode::Cluster, &["n1"]), "n1"),
        ];
        for (config, word) in wrong {
            let error = config.validate().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_prefix_cannot_change_the_slot_of_a_key() {
        let config = Config {
            key_prefix: "a{b}".into(),
            ..config("redis://h", Mode::Single, &[])
        };
        assert!(config.validate().unwrap_err().contains("redis.key_prefix"));
    }

    #[test]
    fn a_password_is_not_shown() {
        let config = config(
            "redis://u:secret@h:1/2",
            Mode::Single,
            &["redis://:secret@s"],
        );
        let shown = format!("{config:?}");
        assert!(
            !shown.contains("secret") && shown.contains("h:1/2"),
            "{shown}"
        );
    }
}
