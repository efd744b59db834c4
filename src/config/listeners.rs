//! Where the gateway listens, and who may come there.

use std::net::SocketAddr;
use std::str::FromStr;

use moorline_access_node::{ListenerConfig, ListenerSettings, Protocol};
use serde::{Deserialize, Serialize};

use super::Config;

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

impl Config {
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

    pub(super) fn validate_listeners(&self) -> Result<(), String> {
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

    use super::super::validate;
    use super::*;

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
