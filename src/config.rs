//! The configuration: defaults < TOML file < environment < flags.
//!
//! Each role owns its section. This module only finds the values and says, in the words of the
//! file, what is wrong with them.

mod cluster;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use moorline_access_node::{AclConfig, AuthConfig, ListenerConfig, ListenerSettings, Protocol};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use self::cluster::ClusterConfig;
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
    pub(crate) redis: moorline_router::redis::Config,
    pub(crate) rabbitmq: moorline_router::rabbit::Config,
    pub(crate) cluster: ClusterConfig,
}

/// The `[listen]` section.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Listen {
    /// MQTT over TCP, or `"off"`.
    pub(crate) mqtt: Endpoint,
    /// MQTT over WebSocket, or `"off"`.
    pub(crate) ws: Endpoint,
    /// The HTTP API.
    pub(crate) http: SocketAddr,
}

/// Where something listens, or that it does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) enum Endpoint {
    At(SocketAddr),
    Off,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            text => text.parse().map(Self::At).map_err(|_| {
                format!("{text:?} is not an address like \"127.0.0.1:1883\", nor \"off\"")
            }),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::At(address) => address.to_string(),
            Endpoint::Off => "off".to_owned(),
        }
    }
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
            redis: moorline_router::redis::Config::default(),
            rabbitmq: moorline_router::rabbit::Config::default(),
            cluster: ClusterConfig::default(),
        }
    }
}

impl Default for Listen {
    fn default() -> Self {
        let on = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            mqtt: Endpoint::At(on(1883)),
            ws: Endpoint::At(on(8083)),
            http: on(8080),
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

/// Variables that are no configuration key.
const OTHER_VARIABLES: [&str; 6] = [
    "MOORLINE_API_KEY",
    "MOORLINE_CONFIG",
    "MOORLINE_DATA_DIR",
    "MOORLINE_MQTT_LISTEN",
    "MOORLINE_WS_LISTEN",
    "MOORLINE_HTTP_LISTEN",
];
/// Variables of the project's own tests.
const TEST_PREFIXES: [&str; 2] = ["MOORLINE_BIN", "MOORLINE_TEST_"];

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

/// Every key there is, with its default; those that are left out by default are empty.
fn known() -> Table {
    let mut config = Config::default();
    config.rabbitmq.ca = Some(PathBuf::new());
    config.redis.ca_file = Some(PathBuf::new());
    Table::try_from(config).expect("the defaults can be written as TOML")
}

/// The same with one element in each list of tables.
fn known_with_elements() -> Table {
    let mut known = known();
    let element = Table::try_from(ListenerConfig::with_every_key());
    let element = element.expect("a listener can be written as TOML");
    known.insert(
        "listeners".to_owned(),
        Value::Array(vec![Value::Table(element)]),
    );
    known
}

/// The defaults as a file to start from.
pub(crate) fn default_toml() -> String {
    toml::to_string(&Config::default()).expect("the defaults can be written as TOML")
}

fn refuse_unknown(table: &Table, known: &Table, prefix: &str) -> Result<(), String> {
    for (key, value) in table {
        match (known.get(key), value) {
            (Some(Value::Table(known)), Value::Table(inner)) => {
                refuse_unknown(inner, known, &format!("{prefix}{key}."))?;
            }
            (Some(Value::Array(known)), Value::Array(given)) => {
                let Some(Value::Table(known)) = known.first() else {
                    continue;
                };
                for (at, value) in given.iter().enumerate() {
                    if let Value::Table(inner) = value {
                        refuse_unknown(inner, known, &format!("{prefix}{key}[{at}]."))?;
                    }
                }
            }
            (Some(_), _) => {}
            (None, _) => {
                let nearest = nearest(key, known.keys().map(String::as_str));
                return Err(format!(
                    "unknown key `{prefix}{key}`{}",
                    hint(prefix, nearest)
                ));
            }
        }
    }
    Ok(())
}

fn nearest<'k>(key: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    known
        .map(|name| (strsim::jaro_winkler(key, name), name))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

fn hint(prefix: &str, nearest: Option<&str>) -> String {
    match nearest {
        Some(name) => format!(", did you mean `{prefix}{name}`?"),
        None => "; `moorline config default` lists every key".to_owned(),
    }
}

/// `MOORLINE_SECTION__KEY=value` sets `key` of `[section]`.
fn overlay_environment(
    table: &mut Table,
    variables: impl Iterator<Item = (String, String)>,
) -> Result<(), String> {
    let mut keys = Vec::new();
    gather_keys(&known(), &mut Vec::new(), &mut keys);
    for (name, text) in variables {
        let foreign = !name.starts_with("MOORLINE_")
            || OTHER_VARIABLES.contains(&name.as_str())
            || TEST_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if foreign {
            continue;
        }
        let Some((path, default)) = keys.iter().find(|(path, _)| variable_of(path) == name) else {
            let all: Vec<String> = keys.iter().map(|(path, _)| variable_of(path)).collect();
            let near = nearest(&name, all.iter().map(String::as_str));
            return Err(format!(
                "unknown environment variable `{name}`{}",
                hint("", near)
            ));
        };
        let value = value_of(&text, default).map_err(|error| format!("{name}: {error}"))?;
        put(table, path, value)?;
    }
    Ok(())
}

/// Every key that is no section, with its path and default.
fn gather_keys(table: &Table, path: &mut Vec<String>, keys: &mut Vec<(Vec<String>, Value)>) {
    for (key, value) in table {
        path.push(key.clone());
        match value {
            Value::Table(inner) => gather_keys(inner, path, keys),
            value => keys.push((path.clone(), value.clone())),
        }
        path.pop();
    }
}

fn variable_of(path: &[String]) -> String {
    format!("MOORLINE_{}", path.join("__").to_uppercase())
}

fn put(table: &mut Table, path: &[String], value: Value) -> Result<(), String> {
    let (key, sections) = path.split_last().expect("a key has at least one part");
    let mut target = table;
    for section in sections {
        let entry = target
            .entry(section.clone())
            .or_insert_with(|| Value::Table(Table::new()));
        target = entry
            .as_table_mut()
            .ok_or_else(|| format!("`{section}` must be a section"))?;
    }
    target.insert(key.clone(), value);
    Ok(())
}

/// The text of a variable as the type that its key has.
fn value_of(text: &str, default: &Value) -> Result<Value, String> {
    match default {
        Value::Integer(_) => text
            .parse()
            .map(Value::Integer)
            .map_err(|_| format!("{text:?} is not a whole number")),
        Value::Boolean(_) => text
            .parse()
            .map(Value::Boolean)
            .map_err(|_| format!("{text:?} is not true or false")),
        Value::Array(_) => Err("lists can only be set in the file".to_owned()),
        _ => Ok(Value::String(text.to_owned())),
    }
}

fn validate(config: &Config) -> Result<(), String> {
    config.mqtt.validate()?;
    config.auth.validate()?;
    config.acl.validate()?;
    config.http.validate()?;
    config.store.validate()?;
    config.upstream.validate()?;
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

    fn validate_cluster(&self) -> Result<(), String> {
        let (has, lacks) = match (self.redis.is_on(), self.rabbitmq.is_on()) {
            (true, false) => ("redis.url", "rabbitmq.url"),
            (false, true) => ("rabbitmq.url", "redis.url"),
            _ => ("", ""),
        };
        if has != lacks {
            return Err(format!(
                "{has} is set and {lacks} is not: processes share both, or everything is kept in the data directory"
            ));
        }
        self.redis.validate()?;
        self.rabbitmq.validate()?;
        self.cluster.validate()
    }

    /// Every listener for devices: those of `[listen]`, then the `[[listeners]]`; each with the key
    /// that an operator knows it by.
    pub(crate) fn device_listeners(&self) -> Vec<(String, ListenerConfig)> {
        let plain = [
            ("mqtt", Protocol::Mqtt, self.listen.mqtt),
            ("ws", Protocol::Ws, self.listen.ws),
        ];
        let plain = plain.into_iter().filter_map(|(name, protocol, endpoint)| {
            let Endpoint::At(address) = endpoint else {
                return None;
            };
            let listener = ListenerConfig::plain(name, protocol, address);
            Some((format!("listen.{name}"), listener))
        });
        let further = self.listeners.iter().enumerate().map(|(at, listener)| {
            let key = match listener.name.as_str() {
                "" => format!("listeners[{at}]"),
                name => format!("listeners[{at}] ({name})"),
            };
            (key, listener.clone())
        });
        plain.chain(further).collect()
    }

    fn validate_listeners(&self) -> Result<(), String> {
        let listeners = self.device_listeners();
        for (at, (key, listener)) in listeners.iter().enumerate() {
            ListenerSettings::load(listener, &self.mqtt)
                .map_err(|error| format!("{key}: {error}"))?;
            let name = &listener.name;
            if listeners[..at].iter().any(|(_, other)| other.name == *name) {
                return Err(format!(
                    "{key}: name {name:?} is that of another listener, must be unique"
                ));
            }
            // A proxy on this machine brings devices from anywhere.
            let is_local =
                listener.address.ip().is_loopback() && listener.proxy_protocol_from.is_empty();
            if !is_local
                && !listener.requires_certificate()
                && !self.auth.is_on()
                && !self.mqtt.allow_anonymous_beyond_loopback
            {
                return Err(format!(
                    "{key} is {}, which is not loopback or takes devices from a proxy, and devices are not authenticated: \
                     set auth.chain, like [\"password_file\"], \
                     or mqtt.allow_anonymous_beyond_loopback = true if anyone who reaches this address may connect",
                    listener.address
                ));
            }
        }
        let asks_for_certificates = |(_, listener): &(String, ListenerConfig)| {
            let tls = listener.tls.as_ref();
            tls.is_some_and(|tls| tls.client_ca.is_some())
        };
        if !self.acl.rules.is_empty()
            && !self.auth.is_on()
            && !listeners.iter().any(asks_for_certificates)
        {
            return Err(
                "acl.rules hold for nobody, because devices are not authenticated: \
                 set auth.chain, like [\"password_file\"], or leave the rules out"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use moorline_access_node::AuthenticatorKind;

    use super::*;

    fn overlaid(name: &str, value: &str) -> Result<Table, String> {
        let mut table = Table::new();
        overlay_environment(
            &mut table,
            [(name.to_owned(), value.to_owned())].into_iter(),
        )?;
        Ok(table)
    }

    #[test]
    fn the_environment_sets_keys_of_their_type() {
        let table = overlaid("MOORLINE_MQTT__RECEIVE_MAXIMUM", "7").unwrap();
        assert_eq!(table["mqtt"]["receive_maximum"], Value::Integer(7));
        let table = overlaid("MOORLINE_LISTEN__HTTP", "127.0.0.1:1").unwrap();
        assert_eq!(table["listen"]["http"], Value::String("127.0.0.1:1".into()));
        assert_eq!(overlaid("PATH", "x").unwrap(), Table::new());
    }

    #[test]
    fn mistakes_are_named_with_what_would_be_right() {
        let error = overlaid("MOORLINE_MQTT__RECIEVE_MAXIMUM", "7").unwrap_err();
        assert!(error.contains("MOORLINE_MQTT__RECEIVE_MAXIMUM"), "{error}");
        let error = overlaid("MOORLINE_MQTT__RECEIVE_MAXIMUM", "many").unwrap_err();
        assert_eq!(
            error,
            "MOORLINE_MQTT__RECEIVE_MAXIMUM: \"many\" is not a whole number"
        );
        let table: Table = "[mqtt]\nack_timeuot = 3".parse().unwrap();
        let error = refuse_unknown(&table, &known(), "").unwrap_err();
        assert_eq!(
            error,
            "unknown key `mqtt.ack_timeuot`, did you mean `mqtt.ack_timeout`?"
        );
    }

    #[test]
    fn a_listener_is_checked_like_a_section() {
        let table: Table = "[[listeners]]\nname = 'a'\n[[listeners]]\nadress = 'b'"
            .parse()
            .unwrap();
        let error = refuse_unknown(&table, &known_with_elements(), "").unwrap_err();
        assert_eq!(
            error,
            "unknown key `listeners[1].adress`, did you mean `listeners[1].address`?"
        );
        let table: Table = "[[listeners]]\ntls = { certifcate = 'b' }".parse().unwrap();
        let error = refuse_unknown(&table, &known_with_elements(), "").unwrap_err();
        assert!(
            error.ends_with("did you mean `listeners[0].tls.certificate`?"),
            "{error}"
        );
    }

    #[test]
    fn listeners_have_names_of_their_own() {
        let mut config = Config::default();
        let address = "127.0.0.1:0".parse().unwrap();
        config.listeners = vec![ListenerConfig::plain("ws", Protocol::Ws, address)];
        let error = validate(&config).unwrap_err();
        assert!(
            error.starts_with("listeners[0] (ws): name \"ws\""),
            "{error}"
        );
        config.listen.ws = Endpoint::Off;
        assert_eq!(validate(&config), Ok(()));
    }

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
        config.redis.url = String::new();
        let error = validate(&config).unwrap_err();
        assert!(
            error.starts_with("rabbitmq.url is set and redis.url"),
            "{error}"
        );
    }

    #[test]
    fn keys_that_are_left_out_by_default_are_known() {
        let table: Table = "redis = { ca_file = 'a' }\nrabbitmq = { ca = 'b' }"
            .parse()
            .unwrap();
        assert_eq!(refuse_unknown(&table, &known(), ""), Ok(()));
        let table = overlaid("MOORLINE_RABBITMQ__CA", "x").unwrap();
        assert_eq!(table["rabbitmq"]["ca"], Value::String("x".into()));
        let table: Table = "[cluster.drain]\nrat = 3".parse().unwrap();
        let error = refuse_unknown(&table, &known(), "").unwrap_err();
        assert_eq!(
            error,
            "unknown key `cluster.drain.rat`, did you mean `cluster.drain.rate`?"
        );
    }

    #[test]
    fn rules_that_hold_for_nobody_are_refused() {
        let mut config = Config::default();
        let deny = "permission = 'deny'\ntopics = ['secret/#']";
        config.acl.rules = vec![toml::from_str(deny).unwrap()];
        let error = validate(&config).unwrap_err();
        assert!(error.starts_with("acl.rules hold for nobody"), "{error}");
        config.auth.chain = vec![AuthenticatorKind::PasswordFile];
        assert_eq!(validate(&config), Ok(()));
    }

    #[test]
    fn the_printed_defaults_are_the_defaults() {
        let read: Config = toml::from_str(&default_toml()).unwrap();
        let defaults = Table::try_from(Config::default()).unwrap();
        assert_eq!(Table::try_from(read).unwrap(), defaults);
    }

    #[test]
    fn beyond_loopback_needs_authentication_or_plain_words() {
        let mut config = Config::default();
        config.listen.ws = "0.0.0.0:8083".parse().unwrap();
        let error = validate(&config).unwrap_err();
        assert!(error.starts_with("listen.ws is 0.0.0.0:8083"), "{error}");
        config.mqtt.allow_anonymous_beyond_loopback = true;
        assert_eq!(validate(&config), Ok(()));
        config.mqtt.allow_anonymous_beyond_loopback = false;
        config.auth.chain = vec![AuthenticatorKind::PasswordFile];
        assert_eq!(validate(&config), Ok(()));
    }

    #[test]
    fn who_comes_through_a_proxy_comes_from_beyond_loopback() {
        let text = "[[listeners]]\nname = \"proxied\"\nprotocol = \"mqtt\"\n\
                    address = \"127.0.0.1:0\"\nproxy_protocol_from = [\"127.0.0.1/32\"]\n";
        let mut config: Config = toml::from_str(text).unwrap();
        let error = validate(&config).unwrap_err();
        assert!(error.contains("from a proxy"), "{error}");
        config.mqtt.allow_anonymous_beyond_loopback = true;
        assert_eq!(validate(&config), Ok(()));
    }
}
