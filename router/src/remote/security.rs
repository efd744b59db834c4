//! Who may speak to the internal listeners: whoever knows the shared secret, or whoever has a certificate, or both.

use std::fmt;

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, Server, ServerTlsConfig};

use super::CONNECT_TIMEOUT;

/// Security that cannot be used, in words for an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidSecurity(String);

impl InvalidSecurity {
    fn of_tls(error: &dyn std::error::Error) -> Self {
        let mut why = error.to_string();
        let mut source = error.source();
        while let Some(deeper) = source {
            why = format!("{why}: {deeper}");
            source = deeper.source();
        }
        Self(format!("cannot be used: {why}"))
    }
}

/// How services of one deployment know each other. Nothing at all is for one machine.
#[derive(Clone, Default)]
pub struct Security {
    secret: Option<Secret>,
    tls: Option<Tls>,
}

#[derive(Clone)]
struct Secret {
    /// As it is sent.
    bearer: MetadataValue<Ascii>,
    /// As it is compared: of one length, whatever was sent.
    hash: [u8; 32],
}

/// Mutual TLS: each side shows a certificate of the same authority. PEM.
#[derive(Clone)]
pub struct Tls {
    /// This process's certificate, with the chain to the authority.
    pub certificate: Vec<u8>,
    /// The key of the certificate.
    pub key: Vec<u8>,
    /// The authority that signs the certificates of the deployment.
    pub ca: Vec<u8>,
    /// The name in the certificates of access nodes, where it is not the host of their address.
    pub server_name: Option<String>,
}

impl Security {
    /// Fewest characters of a secret.
    pub const SECRET_LENGTH_MIN: usize = 16;

    /// Security by `secret`, by `tls`, or by both.
    ///
    /// # Errors
    /// When the secret is short or cannot stand in a header, or a file is not what it should be.
    pub fn new(secret: Option<&str>, tls: Option<Tls>) -> Result<Self, InvalidSecurity> {
        let secret = secret.map(Secret::new).transpose()?;
        let security = Self { secret, tls };
        if let Some(tls) = security.of_server() {
            let tried = Server::builder().tls_config(tls);
            tried.map_err(|error| InvalidSecurity::of_tls(&error))?;
        }
        Ok(security)
    }

    /// Whether it keeps anybody out.
    pub fn is_on(&self) -> bool {
        self.secret.is_some() || self.tls.is_some()
    }

    /// Whether TLS is spoken.
    pub(super) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// What the caller shows.
    pub(super) fn bearer(&self) -> Option<&MetadataValue<Ascii>> {
        self.secret.as_ref().map(|secret| &secret.bearer)
    }

    /// Whether `authorization`, a header, lets its sender in.
    pub(super) fn admits(&self, authorization: Option<&[u8]>) -> bool {
        let Some(secret) = &self.secret else {
            return true;
        };
        let shown = authorization.and_then(|header| header.strip_prefix(b"Bearer "));
        let hash: [u8; 32] = Sha256::digest(shown.unwrap_or_default()).into();
        shown.is_some() & bool::from(hash.ct_eq(&secret.hash))
    }

    pub(super) fn of_server(&self) -> Option<ServerTlsConfig> {
        let tls = self.tls.as_ref()?;
        Some(
            ServerTlsConfig::new()
                .identity(Identity::from_pem(&tls.certificate, &tls.key))
                .client_ca_root(Certificate::from_pem(&tls.ca))
                .timeout(CONNECT_TIMEOUT * 5),
        )
    }

    pub(super) fn of_client(&self) -> Option<ClientTlsConfig> {
        let tls = self.tls.as_ref()?;
        let config = ClientTlsConfig::new()
            .identity(Identity::from_pem(&tls.certificate, &tls.key))
            .ca_certificate(Certificate::from_pem(&tls.ca));
        Some(match &tls.server_name {
            Some(name) => config.domain_name(name),
            None => config,
        })
    }
}

impl Secret {
    fn new(text: &str) -> Result<Self, InvalidSecurity> {
        let least = Security::SECRET_LENGTH_MIN;
        if text.len() < least || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(InvalidSecurity(format!(
                "must have at least {least} visible ASCII characters and no spaces"
            )));
        }
        let mut bearer = MetadataValue::try_from(format!("Bearer {text}"))
            .expect("visible ASCII can stand in a header");
        bearer.set_sensitive(true);
        Ok(Self {
            bearer,
            hash: Sha256::digest(text).into(),
        })
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Security")
            .field("secret", &self.secret.is_some())
            .field("tls", &self.tls.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_secret_lets_in() {
        let security = Security::new(Some("0123456789abcdef"), None).unwrap();
        assert!(security.admits(Some(b"Bearer 0123456789abcdef")));
        for wrong in [
            "",
            "Bearer ",
            "Bearer 0123456789abcde",
            "Bearer 0123456789abcdeg",
            "bearer 0123456789abcdef",
            "0123456789abcdef",
        ] {
            assert!(!security.admits(Some(wrong.as_bytes())), "{wrong:?}");
        }
        assert!(!security.admits(None));
        assert!(Security::default().admits(None));
    }

    #[test]
    fn files_that_are_no_certificates_are_refused_before_anything_listens() {
        let pem = || b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec();
        let tls = Tls {
            certificate: pem(),
            key: pem(),
            ca: pem(),
            server_name: None,
        };
        let error = Security::new(None, Some(tls)).unwrap_err().to_string();
        assert!(error.starts_with("cannot be used: "), "{error}");
    }

    #[test]
    fn a_secret_is_long_and_visible_and_not_shown() {
        for wrong in [
            "",
            "0123456789abcde",
            "0123456789 abcdef",
            "0123456789abcdéf",
        ] {
            assert!(Security::new(Some(wrong), None).is_err(), "{wrong:?}");
        }
        let security = Security::new(Some("0123456789abcdef"), None).unwrap();
        assert!(!format!("{security:?}").contains("0123"));
    }
}
