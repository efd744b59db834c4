//! What an operator can set of the HTTP API.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::connections::Limits;
use crate::keys::{ApiKeyRecord, Scope};

/// The `[http]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes of the largest payload of a push.
    pub payload_bytes_max: usize,
    /// Bytes of the largest request body; a payload written as base64 or with escapes needs more
    /// than its own size.
    pub body_bytes_max: usize,
    /// Time to live of a push to a client that names none.
    #[serde(with = "moorline_router::duration")]
    pub ttl_default: Duration,
    /// Longest time to live that a push may ask for.
    #[serde(with = "moorline_router::duration")]
    pub ttl_max: Duration,
    /// Longest `wait` of a long poll.
    #[serde(with = "moorline_router::duration")]
    pub wait_max: Duration,
    /// How long requests in flight may take once the server is told to stop.
    #[serde(with = "moorline_router::duration")]
    pub shutdown_timeout: Duration,
    /// For the head of a request to arrive, and again for its body.
    #[serde(with = "moorline_router::duration")]
    pub request_timeout: Duration,
    /// Connections of callers at the same time; more wait to be accepted.
    pub connections_max: usize,
    /// API keys beside the one of `MOORLINE_API_KEY`.
    pub keys: Vec<KeyConfig>,
}

/// One `[[http.keys]]` table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// Appears in logs and separates the Idempotency-Keys of different callers.
    pub name: String,
    /// SHA-256 of the key, 64 hexadecimal digits: `printf %s "$KEY" | sha256sum`.
    pub sha256: String,
    /// What it allows: `push`, `read`, `admin`, `upstream`, `delay`.
    pub scopes: Vec<Scope>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            payload_bytes_max: 1024 * 1024,
            body_bytes_max: 2 * 1024 * 1024,
            ttl_default: Duration::from_secs(7 * 24 * 3600),
            ttl_max: Duration::from_secs(30 * 24 * 3600),
            wait_max: Duration::from_secs(60),
            shutdown_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            connections_max: 2_000,
            keys: Vec::new(),
        }
    }
}

impl Config {
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            connections_max: self.connections_max,
            head_timeout: self.request_timeout,
        }
    }

    /// Checks what the types cannot; the error names the key and what would be right.
    pub fn validate(&self) -> Result<(), String> {
        if self.payload_bytes_max == 0 || self.payload_bytes_max > 268_000_000 {
            return Err("http.payload_bytes_max must be between 1 and 268000000".into());
        }
        if self.body_bytes_max < self.payload_bytes_max {
            return Err("http.body_bytes_max must be at least http.payload_bytes_max".into());
        }
        if self.ttl_default.is_zero() {
            return Err("http.ttl_default must be greater than 0".into());
        }
        if self.ttl_max < self.ttl_default {
            return Err("http.ttl_max must be at least http.ttl_default".into());
        }
        // The protocol's Message Expiry Interval counts seconds in 32 bits.
        if self.ttl_max.as_secs() > u64::from(u32::MAX) {
            return Err("http.ttl_max must be at most 49710d".into());
        }
        if self.wait_max.as_secs() > 3600 {
            return Err("http.wait_max must be at most 1h".into());
        }
        if self.request_timeout.is_zero() || self.connections_max == 0 {
            let why = "http.request_timeout and http.connections_max must be greater than 0";
            return Err(why.into());
        }
        self.key_records().map(|_| ())
    }

    /// The configured keys.
    pub(crate) fn key_records(&self) -> Result<Vec<ApiKeyRecord>, String> {
        let mut records: Vec<ApiKeyRecord> = Vec::with_capacity(self.keys.len());
        for (at, key) in self.keys.iter().enumerate() {
            let path = format!("http.keys[{at}]");
            if key.name.is_empty() || key.name == ApiKeyRecord::DEFAULT_NAME {
                return Err(format!(
                    "{path}.name must be some name other than {:?}, which is that of MOORLINE_API_KEY",
                    ApiKeyRecord::DEFAULT_NAME
                ));
            }
            if records.iter().any(|record| record.name() == key.name) {
                return Err(format!("{path}.name {:?} is used twice", key.name));
            }
            if key.scopes.is_empty() {
                return Err(format!("{path}.scopes must name at least one scope"));
            }
            let record = ApiKeyRecord::from_sha256_hex(&key.name, &key.sha256, &key.scopes)
                .ok_or_else(|| format!("{path}.sha256 must be 64 hexadecimal digits"))?;
            records.push(record);
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn errors_name_the_key() {
        let with = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.validate().unwrap_err()
        };
        let key = |name: &str, sha256: &str| KeyConfig {
            name: name.into(),
            sha256: sha256.into(),
            scopes: vec![Scope::Push],
        };
        assert!(with(|c| c.payload_bytes_max = 0).starts_with("http.payload_bytes_max "));
        assert!(with(|c| c.body_bytes_max = 10).starts_with("http.body_bytes_max "));
        assert!(with(|c| c.ttl_max = Duration::from_secs(1)).starts_with("http.ttl_max "));
        let mut config = Config {
            keys: vec![key("a", "12")],
            ..Config::default()
        };
        assert!(
            config
                .validate()
                .unwrap_err()
                .starts_with("http.keys[0].sha256 ")
        );
        config.keys = vec![key("a", &"0".repeat(64)), key("a", &"1".repeat(64))];
        assert!(
            config
                .validate()
                .unwrap_err()
                .starts_with("http.keys[1].name ")
        );
        config.keys = vec![key("default", &"0".repeat(64))];
        assert!(
            config
                .validate()
                .unwrap_err()
                .starts_with("http.keys[0].name ")
        );
    }
}
