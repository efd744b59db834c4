//! A certificate authority of the tests, and devices that speak TLS.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Signs certificates for servers and devices, and keeps them in files.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

/// A certificate with its key.
#[derive(Debug)]
pub struct Signed {
    /// PEM file of the certificate.
    pub certificate: PathBuf,
    /// PEM file of the key.
    pub key: PathBuf,
    der: CertificateDer<'static>,
    key_der: Vec<u8>,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

fn params(names: &[&str], common_name: &str) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).expect("names that are names");
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params
}

impl Authority {
    /// A new one that nobody knows.
    ///
    /// # Panics
    /// When there is no temporary directory.
    pub fn new() -> Self {
        let mut params = params(&[], "authority of the tests");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key can be made");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate can be made");
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).expect("it is writable");
        Self { issuer, dir }
    }

    /// PEM file of the authority's own certificate.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn sign(&self, file: &str, params: &CertificateParams) -> Signed {
        let key = KeyPair::generate().expect("a key can be made");
        let signed = params
            .signed_by(&key, &self.issuer)
            .expect("a certificate can be signed");
        let certificate = self.dir.path().join(format!("{file}.pem"));
        let key_file = self.dir.path().join(format!("{file}.key"));
        std::fs::write(&certificate, signed.pem()).expect("it is writable");
        std::fs::write(&key_file, key.serialize_pem()).expect("it is writable");
        Signed {
            certificate,
            key: key_file,
            der: signed.der().clone(),
            key_der: key.serialize_der(),
        }
    }

    /// For a server on loopback; `file` names the files.
    pub fn server(&self, file: &str) -> Signed {
        self.sign(file, &params(&["localhost", "127.0.0.1"], "gateway"))
    }

    /// For a device of that name.
    pub fn device(&self, name: &str) -> Signed {
        self.sign(&format!("device-{name}"), &params(&[], name))
    }

    /// For a device without a common name, but with a DNS name.
    pub fn device_by_dns_name(&self, name: &str) -> Signed {
        let mut params = params(&[name], "");
        params.distinguished_name = rcgen::DistinguishedName::new();
        self.sign(&format!("device-{name}"), &params)
    }

    /// For a device, but no longer.
    pub fn expired_device(&self, name: &str) -> Signed {
        let mut params = params(&[], name);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
        self.sign(&format!("expired-{name}"), &params)
    }

    /// How a device that trusts this authority speaks TLS.
    pub fn client(&self) -> Client<'_> {
        Client {
            authority: self,
            versions: rustls::ALL_VERSIONS,
            alpn: Vec::new(),
            identity: None,
        }
    }
}

impl Signed {
    /// Speaks TLS as a server with this certificate.
    ///
    /// # Panics
    /// When the key is not that of the certificate.
    pub fn acceptor(&self) -> TlsAcceptor {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(self.key_der.clone().into());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the default versions")
            .with_no_client_auth()
            .with_single_cert(vec![self.der.clone()], key)
            .expect("a key of its certificate");
        TlsAcceptor::from(Arc::new(config))
    }
}

/// How a device speaks TLS.
#[derive(Debug, Clone)]
pub struct Client<'a> {
    authority: &'a Authority,
    versions: &'static [&'static SupportedProtocolVersion],
    alpn: Vec<Vec<u8>>,
    identity: Option<&'a Signed>,
}

impl<'a> Client<'a> {
    /// With this version only.
    #[must_use]
    pub fn only(mut self, versions: &'static [&'static SupportedProtocolVersion]) -> Self {
        self.versions = versions;
        self
    }

    /// Offers these protocols (ALPN).
    #[must_use]
    pub fn offering(mut self, protocols: &[&str]) -> Self {
        self.alpn = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        self
    }

    /// Shows this certificate.
    #[must_use]
    pub fn showing(mut self, identity: &'a Signed) -> Self {
        self.identity = Some(identity);
        self
    }

    /// The configuration of `rustls`.
    ///
    /// # Panics
    /// When it makes none of it.
    pub fn config(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots
            .add(self.authority.issuer.der().clone())
            .expect("an authority's certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .expect("known versions")
            .with_root_certificates(roots);
        let mut config = match self.identity {
            None => builder.with_no_client_auth(),
            Some(signed) => builder
                .with_client_auth_cert(
                    vec![signed.der.clone()],
                    PrivateKeyDer::Pkcs8(signed.key_der.clone().into()),
                )
                .expect("a key of its certificate"),
        };
        config.alpn_protocols.clone_from(&self.alpn);
        Arc::new(config)
    }

    /// Connects and runs the handshake.
    pub async fn connect(&self, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
        self.over(TcpStream::connect(address).await?).await
    }

    /// Runs the handshake on a connection that there is.
    pub async fn over(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("localhost").expect("a name");
        TlsConnector::from(self.config())
            .connect(name, stream)
            .await
    }
}
