//! The `[cluster]` section: what a process is to the others of its deployment.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use moorline_router::remote::{Security, Tls};
use serde::{Deserialize, Serialize};

/// Longest name of a node.
const NAME_BYTES_MAX: usize = 64;
/// What MQTT can carry as text.
const REFERENCE_BYTES_MAX: usize = 65_535;

/// The `[cluster]` section. Only read where `[redis]` and `[rabbitmq]` are configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ClusterConfig {
    /// Begins the ids of the runs of this node; in logs and in `GET /v1/nodes`.
    pub(crate) name: String,
    /// Where an access node takes calls of the other services.
    pub(crate) internal_listen: SocketAddr,
    /// `host:port` where the other services reach `internal_listen`; empty for that address itself.
    pub(crate) advertise: String,
    /// What every service of the deployment shows the others; at least 16 characters.
    pub(crate) secret: SecretText,
    /// A file whose first line is the secret.
    pub(crate) secret_file: PathBuf,
    /// Mutual TLS between the services, beside the secret or in its place.
    pub(crate) tls: ClusterTls,
    /// Where the node runs. Devices that are to leave it are sent to nodes of the same region first.
    pub(crate) region: String,
    /// Where devices reach this node, told to those that another node sends here (MQTT 5.0 Server Reference).
    pub(crate) server_reference: String,
    /// How a node that is to stop parts with its devices.
    pub(crate) drain: DrainConfig,
}

/// The `[cluster.tls]` section. PEM files; all of them, or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ClusterTls {
    /// The certificate of this process with its chain; it is shown as a server and as a client.
    pub(crate) certificate: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
    /// The authority that signs the certificates of all services.
    pub(crate) ca: PathBuf,
    /// The name in the certificates of access nodes; empty for the host of their address.
    pub(crate) server_name: String,
}

/// The `[cluster.drain]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DrainConfig {
    /// Devices that are asked to leave in a second.
    pub(crate) rate: u32,
    /// After this time the rest is disconnected at once.
    #[serde(with = "moorline_router::duration")]
    pub(crate) timeout: Duration,
}

/// Text that is not shown.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct SecretText(String);

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "none" } else { "…" })
    }
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            name: "moorline".to_owned(),
            internal_listen: ([127, 0, 0, 1], 0).into(),
            advertise: String::new(),
            secret: SecretText::default(),
            secret_file: PathBuf::new(),
            tls: ClusterTls::default(),
            region: String::new(),
            server_reference: String::new(),
            drain: DrainConfig::default(),
        }
    }
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self {
            rate: 500,
            timeout: Duration::from_secs(120),
        }
    }
}

fn is_unset(path: &std::path::Path) -> bool {
    path.as_os_str().is_empty()
}

impl ClusterConfig {
    /// Checks what the types cannot; the error names the key and what would be right.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let name = &self.name;
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(legal) {
            return Err(format!(
                "cluster.name {name:?} must be 1 to {NAME_BYTES_MAX} of the characters a-z, A-Z, 0-9, '-', '_' and '.'"
            ));
        }
        if !self.advertise.is_empty() && !is_host_and_port(&self.advertise) {
            return Err(format!(
                "cluster.advertise {:?} must be like \"10.0.0.7:7400\" or \"node-7.internal:7400\"",
                self.advertise
            ));
        }
        if self.drain.rate == 0 {
            return Err("cluster.drain.rate must be greater than 0".to_owned());
        }
        for (key, text) in [
            ("region", &self.region),
            ("server_reference", &self.server_reference),
        ] {
            if text.len() > REFERENCE_BYTES_MAX || text.contains('\0') {
                return Err(format!(
                    "cluster.{key} must be text of at most {REFERENCE_BYTES_MAX} bytes"
                ));
            }
        }
        if !self.secret.0.is_empty() && !is_unset(&self.secret_file) {
            return Err(
                "cluster.secret and cluster.secret_file say the same thing: set one of them"
                    .to_owned(),
            );
        }
        let ClusterTls {
            certificate,
            key,
            ca,
            ..
        } = &self.tls;
        let files = [certificate, key, ca]
            .into_iter()
            .filter(|path| !is_unset(path));
        if !matches!(files.count(), 0 | 3) {
            return Err(
                "cluster.tls.certificate, cluster.tls.key and cluster.tls.ca must be set together"
                    .to_owned(),
            );
        }
        self.security()?;
        Ok(())
    }

    /// Checks what holds for a process that takes internal calls.
    pub(crate) fn validate_listener(&self) -> Result<(), String> {
        let address = self.internal_listen;
        if !address.ip().is_loopback() && !self.security()?.is_on() {
            return Err(format!(
                "cluster.internal_listen is {address}, which is not loopback, and anybody who reaches it could speak for the \
                 other services: set cluster.secret or cluster.secret_file to the same at least {} characters everywhere, or \
                 cluster.tls",
                Security::SECRET_LENGTH_MIN
            ));
        }
        if address.ip().is_unspecified() && self.advertise.is_empty() {
            return Err(format!(
                "cluster.internal_listen is {address}, every address of this machine: set cluster.advertise to the one where \
                 the other services reach it"
            ));
        }
        Ok(())
    }

    /// How the services of this deployment know each other.
    pub(crate) fn security(&self) -> Result<Security, String> {
        let (key, secret) = if is_unset(&self.secret_file) {
            ("cluster.secret", self.secret.0.clone())
        } else {
            ("cluster.secret_file", self.first_line()?)
        };
        let is_set = !secret.is_empty() || !is_unset(&self.secret_file);
        let secret = is_set.then_some(secret.as_str());
        Security::new(secret, None).map_err(|error| format!("{key} {error}"))?;
        Security::new(secret, self.tls.read()?).map_err(|error| format!("cluster.tls {error}"))
    }

    fn first_line(&self) -> Result<String, String> {
        let path = &self.secret_file;
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| {
            format!(
                "cluster.secret_file cannot be read: {}: {error}",
                path.display()
            )
        })?;
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    }
}

impl ClusterTls {
    fn read(&self) -> Result<Option<Tls>, String> {
        if is_unset(&self.certificate) {
            return Ok(None);
        }
        let file = |key: &str, path: &PathBuf| {
            let read = std::fs::read(path);
            read.map_err(|error| {
                format!(
                    "cluster.tls.{key} cannot be read: {}: {error}",
                    path.display()
                )
            })
        };
        Ok(Some(Tls {
            certificate: file("certificate", &self.certificate)?,
            key: file("key", &self.key)?,
            ca: file("ca", &self.ca)?,
            server_name: Some(self.server_name.clone()).filter(|name| !name.is_empty()),
        }))
    }
}

fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let legal =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b':' | b'[' | b']' | b'_');
    !host.is_empty() && host.bytes().all(legal) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut ClusterConfig)) -> String {
        let mut config = ClusterConfig::default();
        change(&mut config);
        config.validate().unwrap_err()
    }

    #[test]
    fn errors_name_the_key() {
        assert_eq!(ClusterConfig::default().validate(), Ok(()));
        assert!(refused(|c| c.name = "a b".into()).starts_with("cluster.name "));
        assert!(refused(|c| c.advertise = "10.0.0.7".into()).starts_with("cluster.advertise "));
        assert!(refused(|c| c.drain.rate = 0).starts_with("cluster.drain.rate "));
        assert!(
            refused(|c| c.secret = SecretText("short".into())).starts_with("cluster.secret must")
        );
        assert!(refused(|c| c.secret_file = "/no/such".into()).starts_with("cluster.secret_file "));
        assert!(refused(|c| c.tls.ca = "/no/such".into()).starts_with("cluster.tls."));
        let both = refused(|c| {
            c.secret = SecretText("0123456789abcdef".into());
            c.secret_file = "/no/such".into();
        });
        assert!(both.contains("one of them"), "{both}");
    }

    #[test]
    fn beyond_loopback_needs_a_secret_and_an_address_that_others_reach() {
        let mut config = ClusterConfig::default();
        assert_eq!(config.validate_listener(), Ok(()));
        config.internal_listen = "10.0.0.7:7400".parse().unwrap();
        let error = config.validate_listener().unwrap_err();
        assert!(error.contains("cluster.secret"), "{error}");
        config.secret = SecretText("0123456789abcdef".into());
        assert_eq!(config.validate_listener(), Ok(()));
        config.internal_listen = "0.0.0.0:7400".parse().unwrap();
        let error = config.validate_listener().unwrap_err();
        assert!(error.contains("cluster.advertise"), "{error}");
        config.advertise = "node-7.internal:7400".into();
        assert_eq!(
            (config.validate(), config.validate_listener()),
            (Ok(()), Ok(()))
        );
    }

    #[test]
    fn the_secret_of_a_file_is_its_first_line() {
        let path = std::env::temp_dir().join(format!("moorline-secret-{}", std::process::id()));
        std::fs::write(&path, "0123456789abcdef \nand more\n").unwrap();
        let config = ClusterConfig {
            secret_file: path.clone(),
            ..ClusterConfig::default()
        };
        assert!(config.security().unwrap().is_on());
        std::fs::write(&path, "\n").unwrap();
        let error = config.security().unwrap_err();
        assert!(error.starts_with("cluster.secret_file must"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_secret_is_not_shown() {
        let config = ClusterConfig {
            secret: SecretText("0123456789abcdef".into()),
            ..ClusterConfig::default()
        };
        assert!(!format!("{config:?}").contains("0123"));
    }
}
