//! What an operator can set of one listener: the `[[listeners]]` tables.
//!
//! Only values and what is wrong with them; the loaded form is [`crate::peer::ListenerSettings`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::PACKET_BYTES_MAX;

/// One `[[listeners]]` table. What is left out is as in `[mqtt]`; the limits of connections hold
/// beside those of `[mqtt]`, which count every listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerConfig {
    /// Names it in logs and metrics.
    pub name: String,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// Where it listens; port 0 takes any free one.
    pub address: SocketAddr,
    /// Peers whose PROXY header is required and believed; anyone else is refused here. Empty: there
    /// is no such header.
    #[serde(default)]
    pub proxy_protocol_from: Vec<IpNet>,
    /// Connections at the same time.
    #[serde(default)]
    pub connections_max: Option<usize>,
    /// Connections at the same time that have not sent their CONNECT yet.
    #[serde(default)]
    pub half_open_max: Option<usize>,
    /// New connections in one second, with as many at once.
    #[serde(default)]
    pub connects_per_second: Option<u32>,
    /// Time for everything up to the whole CONNECT.
    #[serde(default, with = "optional_duration")]
    pub handshake_timeout: Option<Duration>,
    /// Bytes of the largest packet taken from a device.
    #[serde(default)]
    pub packet_bytes_max: Option<u32>,
    /// Encryption; without it the listener is plain.
    #[serde(default)]
    pub tls: Option<TlsConfig>,
}

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// MQTT on the byte stream itself.
    Mqtt,
    /// MQTT in WebSocket frames.
    Ws,
}

/// Certificates of a listener. Files are PEM and are read again when they change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The server's certificate, then those that lead to a root.
    pub certificate: PathBuf,
    /// The private key of the first certificate.
    pub key: PathBuf,
    /// The authorities that sign certificates of devices.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    /// Whether a device shows a certificate.
    #[serde(default)]
    pub client_certificate: ClientCertificateMode,
    /// What the name in a device's certificate is good for.
    #[serde(default)]
    pub identity: CertificateIdentity,
}

/// Whether a device shows a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificateMode {
    /// It is not asked for one.
    #[default]
    None,
    /// One that is shown must be good.
    Optional,
    /// No device without one.
    Required,
}

/// What the name in a device's certificate (common name, or else the first DNS name) is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CertificateIdentity {
    /// Nothing.
    #[default]
    None,
    /// It is the client id: CONNECT says the same or none.
    ClientId,
    /// It is the user name.
    Username,
}

impl ListenerConfig {
    /// A listener without anything special, as `[listen]` has them.
    pub fn plain(name: &str, protocol: Protocol, address: SocketAddr) -> Self {
        Self {
            name: name.to_owned(),
            protocol,
            address,
            proxy_protocol_from: Vec::new(),
            connections_max: None,
            half_open_max: None,
            connects_per_second: None,
            handshake_timeout: None,
            packet_bytes_max: None,
            tls: None,
        }
    }

    /// One that has every key, to tell which there are.
    pub fn with_every_key() -> Self {
        Self {
            connections_max: Some(1),
            half_open_max: Some(1),
            connects_per_second: Some(1),
            handshake_timeout: Some(Duration::from_secs(1)),
            packet_bytes_max: Some(1),
            tls: Some(TlsConfig {
                certificate: PathBuf::new(),
                key: PathBuf::new(),
                client_ca: Some(PathBuf::new()),
                client_certificate: ClientCertificateMode::None,
                identity: CertificateIdentity::None,
            }),
            ..Self::plain("", Protocol::Mqtt, SocketAddr::from(([127, 0, 0, 1], 0)))
        }
    }

    /// What it prints as its kind: `mqtt`, `mqtts`, `ws` or `wss`.
    pub fn scheme(&self) -> &'static str {
        match (self.protocol, &self.tls) {
            (Protocol::Mqtt, None) => "mqtt",
            (Protocol::Mqtt, Some(_)) => "mqtts",
            (Protocol::Ws, None) => "ws",
            (Protocol::Ws, Some(_)) => "wss",
        }
    }

    /// Whether nobody connects here without a certificate that an authority of the operator signed.
    pub fn requires_certificate(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|tls| tls.client_certificate == ClientCertificateMode::Required)
    }

    /// Checks what the types cannot; the error is the key and what is wrong with it. Files are not
    /// looked at.
    pub fn validate(&self) -> Result<(), String> {
        let label = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || !self.name.chars().all(label) {
            return Err(format!(
                "name is {:?}, must be letters, digits, \"-\", \"_\" and \".\"",
                self.name
            ));
        }
        let positive = [
            ("connections_max", self.connections_max.map(|n| n as u64)),
            ("half_open_max", self.half_open_max.map(|n| n as u64)),
            (
                "connects_per_second",
                self.connects_per_second.map(u64::from),
            ),
            (
                "handshake_timeout",
                self.handshake_timeout.map(|time| time.as_millis() as u64),
            ),
            ("packet_bytes_max", self.packet_bytes_max.map(u64::from)),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == Some(0)) {
            return Err(format!("{key} must be greater than 0"));
        }
        if self.packet_bytes_max > Some(PACKET_BYTES_MAX) {
            return Err(format!(
                "packet_bytes_max must be at most {PACKET_BYTES_MAX}, the protocol's limit"
            ));
        }
        self.tls.as_ref().map_or(Ok(()), TlsConfig::validate)
    }
}

impl TlsConfig {
    fn validate(&self) -> Result<(), String> {
        let asks = self.client_certificate != ClientCertificateMode::None;
        match (asks, &self.client_ca) {
            (true, None) => Err(
                "tls.client_certificate needs tls.client_ca, the file with the \
                                 authorities that sign certificates of devices"
                    .to_owned(),
            ),
            (false, Some(_)) => Err("tls.client_ca has no use while tls.client_certificate is \
                                     \"none\": set it to \"optional\" or \"required\""
                .to_owned()),
            (false, None) if self.identity != CertificateIdentity::None => Err(
                "tls.identity needs tls.client_certificate \"optional\" or \"required\"".to_owned(),
            ),
            _ => Ok(()),
        }
    }
}

/// A duration that may be left out.
mod optional_duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Wrapped(#[serde(with = "moorline_router::duration")] Duration);

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(Wrapped).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|wrapped| wrapped.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(mode: ClientCertificateMode, ca: Option<&str>) -> TlsConfig {
        TlsConfig {
            certificate: "c.pem".into(),
            key: "k.pem".into(),
            client_ca: ca.map(PathBuf::from),
            client_certificate: mode,
            identity: CertificateIdentity::None,
        }
    }

    #[test]
    fn mistakes_are_named_by_their_key() {
        let plain =
            || ListenerConfig::plain("a", Protocol::Mqtt, SocketAddr::from(([127, 0, 0, 1], 1)));
        assert_eq!(plain().validate(), Ok(()));
        let error = |change: fn(&mut ListenerConfig)| {
            let mut config = plain();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert!(error(|c| c.name = "a b".into()).starts_with("name is \"a b\""));
        assert!(error(|c| c.connections_max = Some(0)).starts_with("connections_max "));
        assert!(error(|c| c.handshake_timeout = Some(Duration::ZERO)).starts_with("handshake"));
        assert!(error(|c| c.packet_bytes_max = Some(u32::MAX)).contains("268435460"));
        let required = error(|c| c.tls = Some(tls(ClientCertificateMode::Required, None)));
        assert!(required.starts_with("tls.client_certificate needs tls.client_ca"));
        let useless = error(|c| c.tls = Some(tls(ClientCertificateMode::None, Some("ca"))));
        assert!(useless.starts_with("tls.client_ca has no use"));
    }
}
