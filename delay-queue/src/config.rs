//! The `[delays]` section.

use std::path::PathBuf;
use std::time::Duration;

use moorline_mqtt::TopicFilter;
use moorline_router::jobs::{EventSource, TopicEvents};
use moorline_router::{JobLimits, RetryPolicy};
use moorline_upstream_worker::webhook::SigningSecret;
use serde::{Deserialize, Serialize};

/// What an operator can set of delayed jobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Jobs that one process begins in a second; more that are due are late by that, in the order of their times.
    pub rate: u32,
    /// Jobs that one process carries out at the same time.
    pub concurrency: u32,
    /// For how long a job is one process's; it is prolonged while the job is carried out. A job whose process died is begun again after that.
    #[serde(with = "moorline_router::duration")]
    pub lease: Duration,
    /// For jobs that say nothing of it.
    pub retry: Retry,
    /// For one call, from connecting to the end of the answer.
    #[serde(with = "moorline_router::duration")]
    pub webhook_timeout: Duration,
    /// Calls of one process to one host at the same time.
    pub webhook_concurrency: u32,
    /// What calls are signed with, as Standard Webhooks says: `whsec_…`. Not at all where none is given.
    pub webhook_secret: SigningSecret,
    /// PEM file with the authority that signed the certificates of backends, beside those that the system knows. Empty for none.
    pub webhook_ca: PathBuf,
    /// The `source` of CloudEvents.
    pub source: String,
    /// The longest delay that a device may ask for with `$delay/{seconds}/…`; 0 is off.
    #[serde(with = "moorline_router::duration")]
    pub device_delay_max: Duration,
    /// What is kept, and for how long.
    pub kept: JobLimits,
    /// Events that come of what devices publish.
    pub topics: Vec<TopicRule>,
    /// Events that come of messages in RabbitMQ.
    pub bindings: Vec<Binding>,
}

/// One `[[delays.topics]]` table. Each part of an event is text (`order.paid`), a level of the topic (`{2}`, counted from 1) or a JSON
/// pointer into the payload (`/order/id`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicRule {
    /// MQTT topic filter.
    pub filter: String,
    /// What happened.
    pub r#type: String,
    /// To what.
    pub key: String,
}

/// One `[[delays.bindings]]` table: a queue of its own, bound to an exchange that exists. Each part of an event is text, a word of the
/// routing key (`{2}`, counted from 1) or a JSON pointer into the body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// Names the queue: `{rabbitmq.prefix}.delay-events.{name}`.
    pub name: String,
    /// The exchange.
    pub exchange: String,
    /// The routing keys that the queue is bound by.
    pub routing_keys: Vec<String>,
    /// What happened.
    pub r#type: String,
    /// To what.
    pub key: String,
}

impl TopicRule {
    fn parse(&self) -> Result<(TopicFilter, EventSource), String> {
        let filter = TopicFilter::parse(self.filter.clone().into())
            .map_err(|error| format!("filter {:?} is not a topic filter: {error}", self.filter))?;
        if filter.share().is_some() {
            return Err(format!(
                "filter {:?} must not be a shared subscription",
                self.filter
            ));
        }
        Ok((filter, EventSource::parse(&self.r#type, &self.key)?))
    }
}

impl Binding {
    /// Checks it; what becomes of its messages.
    pub(crate) fn parse(&self) -> Result<EventSource, String> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if self.name.is_empty() || self.name.len() > 64 || !self.name.bytes().all(legal) {
            return Err(format!(
                "name {:?} must be 1 to 64 of the characters a-z, A-Z, 0-9, '-', '_' and '.'",
                self.name
            ));
        }
        if self.exchange.is_empty() || self.exchange.len() > 255 {
            return Err("exchange must be the name of an exchange".to_owned());
        }
        if self.routing_keys.is_empty() || self.routing_keys.iter().any(|key| key.len() > 255) {
            return Err(
                "routing_keys must be a list like [\"order.#\"], of keys of at most 255 bytes"
                    .to_owned(),
            );
        }
        EventSource::parse(&self.r#type, &self.key)
    }
}

/// Exponential backoff: the wait before attempt n + 1 is random between 0 and `initial` doubled n - 1 times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retry {
    /// In all; then the job has failed, and is kept as a dead letter.
    pub attempts: u32,
    /// Longest wait after the first attempt.
    #[serde(with = "moorline_router::duration")]
    pub initial: Duration,
    /// Longest wait ever, also where the backend asks for more with `Retry-After`.
    #[serde(with = "moorline_router::duration")]
    pub max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rate: 20_000,
            concurrency: 1_024,
            lease: Duration::from_secs(30),
            retry: Retry::default(),
            webhook_timeout: Duration::from_secs(10),
            webhook_concurrency: 64,
            webhook_secret: SigningSecret::default(),
            webhook_ca: PathBuf::new(),
            source: "moorline".to_owned(),
            device_delay_max: Duration::from_secs(7 * 24 * 3600),
            kept: JobLimits::default(),
            topics: Vec::new(),
            bindings: Vec::new(),
        }
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 12,
            initial: Duration::from_secs(1),
            max: Duration::from_secs(600),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Retry {
    /// As jobs keep it.
    pub fn policy(&self) -> RetryPolicy {
        RetryPolicy {
            attempts_max: self.attempts,
            first_ms: millis(self.initial),
            max_ms: millis(self.max),
        }
    }
}

impl Config {
    pub(crate) fn lease_ms(&self) -> u64 {
        millis(self.lease)
    }

    /// Checks what the types cannot; the error names the key and what would be right.
    pub fn validate(&self) -> Result<(), String> {
        if !(1..=1_000_000).contains(&self.rate) {
            return Err("delays.rate must be between 1 and 1000000".into());
        }
        if !(1..=100_000).contains(&self.concurrency) {
            return Err("delays.concurrency must be between 1 and 100000".into());
        }
        let lease = Duration::from_secs(1)..=Duration::from_secs(3_600);
        if !lease.contains(&self.lease) {
            return Err("delays.lease must be between 1s and 1h".into());
        }
        if !(1..=100).contains(&self.retry.attempts) {
            return Err("delays.retry.attempts must be between 1 and 100".into());
        }
        if self.retry.initial.is_zero() || self.retry.max < self.retry.initial {
            return Err(
                "delays.retry.initial must be greater than 0 and at most delays.retry.max".into(),
            );
        }
        if self.webhook_timeout.is_zero() || self.webhook_concurrency == 0 {
            return Err(
                "delays.webhook_timeout and delays.webhook_concurrency must be greater than 0"
                    .into(),
            );
        }
        if self.source.is_empty() || !self.source.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("delays.source must be visible ASCII characters".into());
        }
        let kept = [
            ("jobs_max", self.kept.jobs_max),
            ("events_max", self.kept.events_max),
            ("device_jobs_max", self.kept.device_jobs_max),
        ];
        if let Some((key, _)) = kept.iter().find(|(_, max)| *max == 0) {
            return Err(format!("delays.kept.{key} must be greater than 0"));
        }
        for (at, rule) in self.topics.iter().enumerate() {
            rule.parse()
                .map_err(|error| format!("delays.topics[{at}]: {error}"))?;
        }
        for (at, binding) in self.bindings.iter().enumerate() {
            let named = format!("delays.bindings[{at}]");
            binding
                .parse()
                .map_err(|error| format!("{named}: {error}"))?;
            if self.bindings[..at]
                .iter()
                .any(|other| other.name == binding.name)
            {
                return Err(format!("{named}: name {:?} is used twice", binding.name));
            }
        }
        self.webhook_secret
            .validate()
            .map_err(|error| format!("delays.webhook_secret {error}"))?;
        self.authorities().map(drop)
    }

    /// The events of what devices publish, for whoever takes it. Of a valid configuration.
    pub fn topic_events(&self) -> TopicEvents {
        let rules = self.topics.iter().filter_map(|rule| rule.parse().ok());
        TopicEvents::new(rules.collect())
    }

    /// The certificates of `webhook_ca`.
    pub(crate) fn authorities(&self) -> Result<Vec<reqwest::Certificate>, String> {
        if self.webhook_ca.as_os_str().is_empty() {
            return Ok(Vec::new());
        }
        moorline_upstream_worker::config::read_authorities(&self.webhook_ca)
            .map_err(|error| format!("delays.webhook_ca {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_key() {
        assert_eq!(Config::default().validate(), Ok(()));
        let error = |change: fn(&mut Config), key: &str| {
            let mut config = Config::default();
            change(&mut config);
            let error = config.validate().unwrap_err();
            assert!(error.starts_with(key), "{error}");
        };
        error(|c| c.rate = 0, "delays.rate ");
        error(|c| c.concurrency = 0, "delays.concurrency ");
        error(|c| c.lease = Duration::ZERO, "delays.lease ");
        error(|c| c.retry.attempts = 0, "delays.retry.attempts ");
        error(|c| c.retry.max = Duration::ZERO, "delays.retry.initial ");
        error(|c| c.webhook_concurrency = 0, "delays.webhook_timeout ");
        error(|c| c.kept.jobs_max = 0, "delays.kept.jobs_max ");
        error(
            |c| c.kept.device_jobs_max = 0,
            "delays.kept.device_jobs_max ",
        );
        error(|c| c.source = String::new(), "delays.source ");
        error(
            |c| {
                c.topics = vec![TopicRule {
                    filter: "a/#/b".into(),
                    r#type: "t".into(),
                    key: "{1}".into(),
                }];
            },
            "delays.topics[0]: filter ",
        );
        error(
            |c| {
                c.bindings = vec![Binding {
                    name: "b".into(),
                    exchange: "e".into(),
                    routing_keys: vec!["#".into()],
                    r#type: "t".into(),
                    key: "{0}".into(),
                }];
            },
            "delays.bindings[0]: key ",
        );
        error(
            |c| c.webhook_secret = SigningSecret::new("x"),
            "delays.webhook_secret ",
        );
        error(
            |c| c.webhook_ca = "/no/such.pem".into(),
            "delays.webhook_ca ",
        );
    }
}
