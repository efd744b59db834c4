//! Upstream rules as they are configured.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use moorline_mqtt::TopicFilter;
use moorline_router::QueueName;
use moorline_router::upstream::UpstreamRoutes;
use reqwest::header::{HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

use crate::rule::UrlTemplate;
use crate::webhook::SigningSecret;

/// Headers that a rule cannot set, as every call has its own.
const OWN_HEADERS: [&str; 7] = [
    "content-length",
    "host",
    "transfer-encoding",
    "connection",
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature",
];

/// The `[upstream]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What devices publish here is kept until a backend has it. What no rule takes waits in the
    /// default queue for `GET /v1/upstream`.
    pub filter: String,
    /// Which backend gets what.
    pub rules: Vec<Rule>,
}

/// One `[[upstream.rules]]` table: a topic filter and the backend that gets what matches it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Names the rule's queue; not `default`. A renamed rule leaves the messages of the old name behind.
    pub name: String,
    /// MQTT topic filter.
    pub filter: String,
    /// `http://…` or `https://…`, where `{client_id}` and `{topic}` stand for those of the message, percent-encoded.
    pub url: String,
    /// PEM file with the authority that signed the backend's certificate, where it is none that the
    /// system knows.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// HTTP method.
    #[serde(default = "post")]
    pub method: String,
    /// What calls are signed with, as Standard Webhooks says: `whsec_…`. Not at all where none is given.
    #[serde(default)]
    pub secret: SigningSecret,
    /// Further headers of every call.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// For one call, from connecting to the end of the answer.
    #[serde(default = "ten_seconds", with = "moorline_router::duration")]
    pub timeout: Duration,
    /// Calls to this backend that run at once. One device's messages are never called at once.
    #[serde(default = "eight")]
    pub concurrency: u16,
    /// What happens when the backend is out of reach, says 429 or 502 to 504, or takes too long.
    #[serde(default)]
    pub retry: Retry,
}

/// Exponential backoff: the wait before attempt n + 1 is random between 0 and `initial` doubled n - 1 times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retry {
    /// In all; then the message is a dead letter.
    pub attempts: u32,
    /// Longest wait after the first attempt.
    #[serde(with = "moorline_router::duration")]
    pub initial: Duration,
    /// Longest wait ever, also where the backend asks for more with `Retry-After`.
    #[serde(with = "moorline_router::duration")]
    pub max: Duration,
}

fn post() -> String {
    "POST".to_owned()
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn eight() -> u16 {
    8
}

impl Default for Config {
    fn default() -> Self {
        Self {
            filter: UpstreamRoutes::DEFAULT_FILTER.to_owned(),
            rules: Vec::new(),
        }
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 8,
            initial: Duration::from_millis(500),
            max: Duration::from_secs(30),
        }
    }
}

impl Config {
    /// Checks what the types cannot; the error names the rule and the key and what would be right.
    pub fn validate(&self) -> Result<(), String> {
        parse_filter(&self.filter).map_err(|error| format!("upstream.filter {error}"))?;
        for (at, rule) in self.rules.iter().enumerate() {
            let named = match rule.name.as_str() {
                "" => format!("upstream.rules[{at}]"),
                name => format!("upstream.rules[{at}] ({name})"),
            };
            rule.validate()
                .map_err(|(key, error)| format!("{named}: {key} {error}"))?;
            if self.rules[..at]
                .iter()
                .any(|earlier| earlier.name == rule.name)
            {
                return Err(format!(
                    "{named}: name is used by an earlier rule, must be unique"
                ));
            }
        }
        Ok(())
    }

    /// Which queues take what, for whoever publishes upstream. Of a valid configuration.
    pub fn routes(&self) -> UpstreamRoutes {
        let rules = self.rules.iter().filter_map(|rule| {
            Some((parse_filter(&rule.filter).ok()?, QueueName::new(&rule.name)))
        });
        match parse_filter(&self.filter) {
            Ok(filter) => UpstreamRoutes::new(filter, rules.collect()),
            Err(_) => UpstreamRoutes::default(),
        }
    }
}

fn parse_filter(text: &str) -> Result<TopicFilter, String> {
    let filter = TopicFilter::parse(text.to_owned().into())
        .map_err(|error| format!("{text:?} is not a topic filter: {error}"))?;
    match filter.share() {
        Some(_) => Err(format!("{text:?} must not be a shared subscription")),
        None => Ok(filter),
    }
}

type KeyError = (&'static str, String);

impl Rule {
    fn validate(&self) -> Result<(), KeyError> {
        let of = |key: &'static str| move |error: String| (key, error);
        check_name(&self.name).map_err(of("name"))?;
        parse_filter(&self.filter).map_err(of("filter"))?;
        UrlTemplate::parse(&self.url).map_err(of("url"))?;
        if let Some(path) = &self.ca {
            if !self.url.starts_with("https://") {
                return Err(("ca", "has no use while url is not https://".to_owned()));
            }
            read_authorities(path).map_err(of("ca"))?;
        }
        parse_method(&self.method).map_err(of("method"))?;
        self.secret.validate().map_err(of("secret"))?;
        for (name, value) in &self.headers {
            parse_header(name, value).map_err(of("headers"))?;
        }
        let positive = "must be greater than 0";
        let checks = [
            ("timeout", self.timeout.is_zero()),
            ("concurrency", self.concurrency == 0),
            ("retry.attempts", self.retry.attempts == 0),
            ("retry.initial", self.retry.initial.is_zero()),
        ];
        if let Some((key, _)) = checks.iter().find(|(_, is_zero)| *is_zero) {
            return Err((*key, positive.to_owned()));
        }
        if self.retry.max < self.retry.initial {
            return Err(("retry.max", "must be at least retry.initial".to_owned()));
        }
        Ok(())
    }
}

/// The certificates of a PEM file with authorities.
pub fn read_authorities(path: &Path) -> Result<Vec<reqwest::Certificate>, String> {
    let pem = std::fs::read(path)
        .map_err(|error| format!("cannot be read: {}: {error}", path.display()))?;
    match reqwest::Certificate::from_pem_bundle(&pem) {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(format!(
            "must be a PEM file with \"BEGIN CERTIFICATE\", {} is not",
            path.display()
        )),
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name == QueueName::DEFAULT {
        return Err(format!(
            "must not be {name:?}, which is the queue of what no rule takes"
        ));
    }
    if name.is_empty() || name.len() > 64 || !name.bytes().all(legal) {
        return Err(format!(
            "{name:?} must be 1 to 64 of the characters a-z, A-Z, 0-9, '-', '_' and '.'"
        ));
    }
    Ok(())
}

pub(crate) fn parse_method(text: &str) -> Result<reqwest::Method, String> {
    match text {
        "POST" | "PUT" | "PATCH" => Ok(text.parse().expect("a method of the standard")),
        _ => Err(format!("{text:?} must be \"POST\", \"PUT\" or \"PATCH\"")),
    }
}

pub(crate) fn parse_header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let header =
        HeaderName::try_from(name).map_err(|_| format!("{name:?} is not a header name"))?;
    if OWN_HEADERS.contains(&header.as_str()) {
        return Err(format!("{name:?} is set by the gateway"));
    }
    let value = HeaderValue::try_from(value)
        .map_err(|_| format!("{name:?} has a value that no header can have"))?;
    Ok((header, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(change: impl FnOnce(&mut Rule)) -> Result<(), String> {
        let json = r#"{"name": "orders", "filter": "up/orders/#", "url": "http://127.0.0.1:9/{client_id}"}"#;
        let mut rule: Rule = serde_json::from_str(json).unwrap();
        change(&mut rule);
        Config {
            rules: vec![rule],
            ..Config::default()
        }
        .validate()
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        assert_eq!(rule(|_| ()), Ok(()));
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn errors_name_the_rule_and_the_key() {
        let error = |change: fn(&mut Rule), key: &str| {
            let error = rule(change).unwrap_err();
            assert!(
                error.starts_with("upstream.rules[0]") && error.contains(key),
                "{error}"
            );
        };
        error(
            |r| r.name = "default".into(),
            ": name must not be \"default\"",
        );
        error(|r| r.name = String::new(), ": name ");
        error(|r| r.filter = "a/#/b".into(), "(orders): filter ");
        error(|r| r.filter = "$share/g/a".into(), "(orders): filter ");
        error(|r| r.url = "ftp://x/".into(), "(orders): url ");
        error(|r| r.ca = Some("/no/such.pem".into()), "(orders): ca ");
        error(
            |r| {
                r.url = "https://h/".into();
                r.ca = Some("/no/such.pem".into());
            },
            "(orders): ca cannot be read: /no/such.pem",
        );
        error(|r| r.method = "GET".into(), "(orders): method ");
        error(
            |r| r.secret = SigningSecret::new("s3cret"),
            "(orders): secret must be",
        );
        error(|r| r.timeout = Duration::ZERO, "(orders): timeout ");
        error(|r| r.concurrency = 0, "(orders): concurrency ");
        error(|r| r.retry.attempts = 0, "(orders): retry.attempts ");
        error(
            |r| r.retry.max = Duration::from_millis(1),
            "(orders): retry.max ",
        );
        error(
            |r| drop(r.headers.insert("bad name".into(), String::new())),
            "(orders): headers ",
        );
        error(
            |r| drop(r.headers.insert("Host".into(), "x".into())),
            "(orders): headers ",
        );
    }

    #[test]
    fn names_are_unique() {
        let json = r#"{"rules": [{"name": "a", "filter": "up/1", "url": "http://h/"},
                                  {"name": "a", "filter": "up/2", "url": "http://h/"}]}"#;
        let config: Config = serde_json::from_str(json).unwrap();
        let error = config.validate().unwrap_err();
        assert!(error.starts_with("upstream.rules[1] (a): name "), "{error}");
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        let json = r#"{"name": "a", "filter": "up/1", "url": "http://h/", "retries": 3}"#;
        let error = serde_json::from_str::<Rule>(json).unwrap_err().to_string();
        assert!(error.contains("unknown field `retries`"), "{error}");
    }
}
