//! The configuration: defaults < TOML file < environment < flags.
//!
//! Each role owns its section. This module only finds the values and says, in the words of the
//! file, what is wrong with them. Which keys there are is in `keys`, where devices come from in `listeners`.

mod cluster;
mod keys;
mod listeners;

use std::path::{Path, PathBuf};

use moorline_access_node::{AclConfig, AuthConfig, ListenerConfig};
use moorline_router::redis::Limits;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use self::cluster::ClusterConfig;
use self::keys::{known_with_elements, overlay_environment, refuse_unknown};
pub(crate) use self::listeners::{Endpoint, Listen};
use crate::cli::Options;

/// Every key of the gateway.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Where everything durable lives.
    pub(crate) data_dir: PathBuf,
    pub(crate) listen: Listen,
    /// Where devices connect besides `[listen]`.
    pub(crate) listeners: Vec<ListenerConfig>,
    pub(crate) log: Log,
    pub(crate) mqtt: moorline_access_node::Config,
    pub(crate) auth: AuthConfig,
    pub(crate) acl: AclConfig,
    pub(crate) http: moorline_push_service::Config,
    pub(crate) store: moorline_router::embedded::Config,
    pub(crate) upstream: moorline_upstream_worker::Config,
    pub(crate) delays: moorline_delay_queue::Config,
    pub(crate) redis: moorline_router::redis::Config,
    pub(crate) rabbitmq: moorline_router::rabbit::Config,
    pub(crate) cluster: ClusterConfig,
}

/// The `[log]` section.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`, or per part: `info,moorline_router=debug`.
    pub(crate) level: String,
    pub(crate) format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "moorline-data".into(),
            listen: Listen::default(),
            listeners: Vec::new(),
            log: Log::default(),
            mqtt: moorline_access_node::Config::default(),
            auth: AuthConfig::default(),
            acl: AclConfig::default(),
            http: moorline_push_service::Config::default(),
            store: moorline_router::embedded::Config::default(),
            upstream: moorline_upstream_worker::Config::default(),
            delays: moorline_delay_queue::Config::default(),
            redis: moorline_router::redis::Config::default(),
            rabbitmq: moorline_router::rabbit::Config::default(),
            cluster: ClusterConfig::default(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// Puts the configuration together; the error is one line for the operator.
pub(crate) fn load(options: &Options) -> Result<Config, String> {
    let mut table = match &options.config {
        Some(path) => read_file(path)?,
        None => Table::new(),
    };
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    overlay_environment(&mut table, variables)?;
    let mut config = typed(table).map_err(|error| format!("configuration: {error}"))?;
    if let Some(dir) = &options.data_dir {
        config.data_dir.clone_from(dir);
    }
    config.listen.mqtt = options.mqtt_listen.unwrap_or(config.listen.mqtt);
    config.listen.ws = options.ws_listen.unwrap_or(config.listen.ws);
    config.listen.http = options.http_listen.unwrap_or(config.listen.http);
    validate(&config)?;
    Ok(config)
}

fn read_file(path: &Path) -> Result<Table, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read configuration {}: {error}", path.display()))?;
    let line_of = |error: &toml::de::Error| {
        error
            .span()
            .map_or(1, |span| 1 + text[..span.start].matches('\n').count())
    };
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        format!(
            "{}:{}: {}",
            path.display(),
            line_of(&error),
            one_line(error.message())
        )
    })?;
    refuse_unknown(&table, &known_with_elements(), "")
        .map_err(|error| format!("{}: {error}", path.display()))?;
    // The file on its own first: the text knows the line, the table knows the key.
    if let (Err(in_text), Err(why)) = (toml::from_str::<Config>(&text), typed(table.clone())) {
        return Err(format!("{}:{}: {why}", path.display(), line_of(&in_text)));
    }
    Ok(table)
}

/// The table as a configuration; the error names the key.
fn typed(table: Table) -> Result<Config, String> {
    Value::Table(table)
        .try_into()
        .map_err(|error: toml::de::Error| in_words(&one_line(&error.to_string())))
}

/// The names of types are the program's; an operator wants ranges.
fn in_words(error: &str) -> String {
    [
        ("expected u16", "expected a whole number from 0 to 65535"),
        (
            "expected u32",
            "expected a whole number from 0 to 4294967295",
        ),
        (
            "expected u64",
            "expected a whole number that is not negative",
        ),
        (
            "expected usize",
            "expected a whole number that is not negative",
        ),
    ]
    .iter()
    .fold(error.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn one_line(text: &str) -> String {
    text.trim().replace('\n', " ")
}

/// The defaults as a file to start from.
pub(crate) fn default_toml() -> String {
    toml::to_string(&Config::default()).expect("the defaults can be written as TOML")
}

fn validate(config: &Config) -> Result<(), String> {
    config.mqtt.validate()?;
    config.auth.validate()?;
    config.acl.validate()?;
    config.http.validate()?;
    config.store.validate()?;
    config.upstream.validate()?;
    config.delays.validate()?;
    if !config.delays.bindings.is_empty() && !config.rabbitmq.is_on() {
        return Err(
            "delays.bindings come from RabbitMQ: set rabbitmq.url, or leave them out".to_owned(),
        );
    }
    config.validate_cluster()?;
    config
        .log
        .level
        .parse::<tracing_subscriber::filter::Targets>()
        .map_err(|_| {
            format!(
                "log.level is {:?}, must be like \"info\" or \"info,moorline_router=debug\"",
                config.log.level
            )
        })?;
    config.validate_listeners()
}

impl Config {
    /// Whether this process is one of several, over Redis and RabbitMQ.
    pub(crate) fn is_cluster(&self) -> bool {
        self.redis.is_on() && self.rabbitmq.is_on()
    }

    /// What the store on Redis holds to: the limits of `[store]`, as on one machine.
    pub(crate) fn shared_limits(&self) -> Limits {
        Limits {
            inbox: self.store.inbox,
            receipt_retention: self.store.receipt_retention,
            receipts_bytes_max: self.store.receipts_bytes_max,
            jobs: self.delays.kept.clone(),
        }
    }

    fn validate_cluster(&self) -> Result<(), String> {
        if self.redis.is_on() && !self.rabbitmq.is_on() {
            return Err(
                "redis.url is set and rabbitmq.url is not: processes share both, or everything is kept in the data directory"
                    .to_owned(),
            );
        }
        self.redis.validate()?;
        self.rabbitmq.validate()?;
        self.cluster.validate()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn redis_and_rabbitmq_come_together() {
        let mut config = Config::default();
        config.redis.url = "redis://127.0.0.1:6379".into();
        let error = validate(&config).unwrap_err();
        assert!(
            error.starts_with("redis.url is set and rabbitmq.url"),
            "{error}"
        );
        config.rabbitmq.url = "amqp://127.0.0.1:5672".into();
        assert_eq!(validate(&config), Ok(()));
        assert!(config.is_cluster() && !Config::default().is_cluster());
        // A single machine may have a RabbitMQ for what delayed jobs publish.
        config.redis.url = String::new();
        assert_eq!(validate(&config), Ok(()));
        assert!(!config.is_cluster());
    }

    #[test]
    fn the_printed_defaults_are_the_defaults() {
        let read: Config = toml::from_str(&default_toml()).unwrap();
        let defaults = Table::try_from(Config::default()).unwrap();
        assert_eq!(Table::try_from(read).unwrap(), defaults);
    }
}
