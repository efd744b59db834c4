//! Certificates and keys of a TLS listener: read from files, checked, and read again when they
//! change, without touching connections that there are.
//!
//! Not the TLS of one connection: that is [`crate::tls`].

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, RwLock};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::listener_config::{CertificateIdentity, ClientCertificateMode, TlsConfig};
use crate::peer::ClientCertificate;
use crate::tls::TlsError;

/// How often the files are looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Names of a device's certificate that are kept.
const ALTERNATIVE_NAMES_MAX: usize = 8;

/// The certificates of one listener.
#[derive(Debug)]
pub(crate) struct Certificates {
    files: TlsConfig,
    /// The protocol that is agreed on in the handshake (ALPN).
    protocol: &'static str,
    current: RwLock<Arc<ServerConfig>>,
    /// What the files looked like when they were last read.
    seen: Mutex<Vec<FileState>>,
}

/// Enough of a file to see that it is another one now.
#[derive(Debug, PartialEq, Eq)]
struct FileState(Option<(SystemTime, u64, u64)>);

impl Certificates {
    /// Reads the files. The error is a key and what is wrong with it.
    pub(crate) fn load(files: &TlsConfig, protocol: &'static str) -> Result<Self, String> {
        let seen = Mutex::new(look(files));
        let current = RwLock::new(Arc::new(read(files, protocol)?));
        Ok(Self {
            files: files.clone(),
            protocol,
            current,
            seen,
        })
    }

    /// What new connections use.
    pub(crate) fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read())
    }

    pub(crate) fn identity(&self) -> CertificateIdentity {
        self.files.identity
    }

    /// Reads the files again if they changed, or `anyway`. Files that are not good change nothing,
    /// and are said once.
    pub(crate) fn refresh(&self, listener: &str, anyway: bool) {
        let mut seen = self.seen.lock();
        let now = look(&self.files);
        if *seen == now && !anyway {
            return;
        }
        *seen = now;
        match read(&self.files, self.protocol) {
            Ok(config) => {
                *self.current.write() = Arc::new(config);
                tracing::info!(%listener, certificate = %self.files.certificate.display(), "certificates read again");
            }
            Err(error) => {
                tracing::warn!(%listener, %error, "new certificates not taken, the old ones stay");
            }
        }
    }
}

fn look(files: &TlsConfig) -> Vec<FileState> {
    let paths = [
        Some(&files.certificate),
        Some(&files.key),
        files.client_ca.as_ref(),
    ];
    let state = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
    };
    let paths = paths.into_iter().flatten();
    paths.map(|path| FileState(state(path))).collect()
}

fn read(files: &TlsConfig, protocol: &str) -> Result<ServerConfig, String> {
    let chain = read_certificates("tls.certificate", &files.certificate)?;
    let key = read_key(&files.key)?;
    let builder = ServerConfig::builder();
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in read_certificates("tls.client_ca", path)? {
                roots
                    .add(certificate)
                    .map_err(|error| format!("tls.client_ca: {}: {error}", path.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots));
            let verifier = match files.client_certificate {
                ClientCertificateMode::Optional => verifier.allow_unauthenticated(),
                ClientCertificateMode::Required | ClientCertificateMode::None => verifier,
            };
            let verifier = verifier
                .build()
                .map_err(|error| format!("tls.client_ca: {}: {error}", path.display()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| {
        let (certificate, key) = (files.certificate.display(), files.key.display());
        match error {
            rustls::Error::InconsistentKeys(_) => {
                format!("tls.key: {key} is not the key of the certificate in {certificate}")
            }
            error => format!("tls.certificate: {certificate} with tls.key {key}: {error}"),
        }
    })?;
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    // Resuming saves a device much of a TLS 1.2 handshake. Tickets are kept by the device, and are
    // void after a reload. A certificate, though, is checked at every connect.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    if files.client_ca.is_none() {
        config.ticketer = rustls::crypto::ring::Ticketer::new()
            .map_err(|error| format!("tls: no session tickets: {error}"))?;
        config.send_tls13_tickets = 1;
    }
    Ok(config)
}

fn read_certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read_file(key, path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates =
        certificates.map_err(|error| format!("{key}: {}: {error}", path.display()))?;
    if certificates.is_empty() {
        return Err(format!(
            "{key}: {} has no certificate in it, must be a PEM file with \"BEGIN CERTIFICATE\"",
            path.display()
        ));
    }
    Ok(certificates)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = read_file("tls.key", path)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => format!(
            "tls.key: {} has no key in it, must be a PEM file with an unencrypted \"PRIVATE KEY\"",
            path.display()
        ),
        error => format!("tls.key: {}: {error}", path.display()),
    })
}

fn read_file(key: &str, path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{key}: cannot read {}: {error}", path.display()))
}

/// The certificate that a device has shown, if it has shown one. One that cannot be read ends the
/// handshake: a device must not become anonymous by it.
pub(crate) fn of_peer(chain: &[CertificateDer<'_>]) -> Result<Option<ClientCertificate>, TlsError> {
    chain
        .first()
        .map(|shown| client_certificate(shown).ok_or(TlsError::Certificate))
        .transpose()
}

/// What a device's certificate says of it.
fn client_certificate(certificate: &CertificateDer<'_>) -> Option<ClientCertificate> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let common_name = parsed
        .subject()
        .iter_common_name()
        .find_map(|name| name.as_str().ok())
        .map(Box::from);
    let names = parsed.subject_alternative_name().ok().flatten();
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let alternative_names = names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) | GeneralName::RFC822Name(name) | GeneralName::URI(name) => {
                Some(Box::from(*name))
            }
            _ => None,
        })
        .take(ALTERNATIVE_NAMES_MAX)
        .collect();
    Some(ClientCertificate {
        common_name,
        alternative_names,
        fingerprint: Sha256::digest(certificate).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_cannot_be_read_is_not_none() {
        let made = rcgen::generate_simple_self_signed(vec!["car-7".to_owned()]).unwrap();
        let good = made.cert.der().clone();
        let name = |chain: &[CertificateDer<'_>]| {
            let read = of_peer(chain).map_err(|error| error.to_string())?;
            Ok::<_, String>(read.map(|read| read.alternative_names))
        };
        assert_eq!(name(&[]), Ok(None));
        assert_eq!(
            name(std::slice::from_ref(&good)),
            Ok(Some(vec!["car-7".into()]))
        );
        let torn = CertificateDer::from(&good[..good.len() / 2]);
        let error = name(&[torn, good.clone()]).unwrap_err();
        assert!(error.contains("cannot be read"), "{error}");
    }
}
