//! Who is at the other end of a connection, as far as its transport knows, and the listener that
//! took it.
#![allow(
    dead_code,
    reason = "read where devices are admitted and authenticated"
)]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::net::TcpStream;

use crate::admission::GateLimits;
use crate::certificates::Certificates;
use crate::config::Config;
use crate::listener_config::{CertificateIdentity, ListenerConfig, Protocol};
use crate::session::Transport;

/// What is known of a device before it has said anything in MQTT.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// Where it connects from; behind a proxy, what the PROXY header says. `None` once it is gone.
    pub(crate) address: Option<SocketAddr>,
    /// The listener that it came to.
    pub(crate) listener: Arc<ListenerSettings>,
    /// The certificate that it showed and that was found good.
    pub(crate) certificate: Option<Arc<ClientCertificate>>,
}

impl Peer {
    /// The name in the device's certificate, where the listener makes it the device's `identity`.
    pub(crate) fn certified(&self, identity: CertificateIdentity) -> Option<&str> {
        let is = self.listener.tls.as_ref()?.identity() == identity;
        self.certificate.as_ref().filter(|_| is)?.name()
    }

    pub(crate) fn takes_client_id_from_certificate(&self) -> bool {
        let tls = self.listener.tls.as_ref();
        tls.is_some_and(|tls| tls.identity() == CertificateIdentity::ClientId)
    }

    /// The user name that the device's certificate gives it.
    pub(crate) fn certified_username(&self) -> Option<&str> {
        self.certified(CertificateIdentity::Username)
    }

    /// What the socket itself tells.
    pub(crate) fn of(stream: &TcpStream, listener: Arc<ListenerSettings>) -> Self {
        Self {
            address: stream.peer_addr().ok(),
            listener,
            certificate: None,
        }
    }

    /// What its certificate calls it.
    pub(crate) fn certificate_name(&self) -> Option<&str> {
        self.certificate.as_deref()?.name()
    }
}

/// A device's certificate, verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientCertificate {
    /// The subject's common name.
    pub(crate) common_name: Option<Box<str>>,
    /// DNS names, addresses of mail, and URIs among the subject's alternative names.
    pub(crate) alternative_names: Vec<Box<str>>,
    /// SHA-256 of the certificate as it came.
    pub(crate) fingerprint: [u8; 32],
}

impl ClientCertificate {
    /// What the certificate calls the device.
    pub(crate) fn name(&self) -> Option<&str> {
        self.common_name
            .as_deref()
            .or_else(|| self.alternative_names.first().map(AsRef::as_ref))
    }
}

/// A listener's settings with everything left out filled in.
#[derive(Debug)]
pub struct ListenerSettings {
    /// Names it in logs and metrics.
    pub(crate) name: Box<str>,
    pub(crate) transport: Transport,
    pub(crate) tls: Option<Certificates>,
    /// Peers whose PROXY header is required and believed; empty: none has one.
    pub(crate) proxy_protocol_from: Vec<IpNet>,
    /// What holds beside the limits of `[mqtt]`.
    pub(crate) gate: GateLimits,
    pub(crate) handshake_timeout: Duration,
    pub(crate) packet_bytes_max: u32,
}

impl ListenerSettings {
    /// The listener as configured, its certificates read. The error is a key and what is wrong
    /// with it.
    pub fn load(config: &ListenerConfig, defaults: &Config) -> Result<Self, String> {
        config.validate()?;
        let transport = match config.protocol {
            Protocol::Mqtt => Transport::Tcp,
            Protocol::Ws => Transport::WebSocket,
        };
        let tls = config.tls.as_ref();
        Ok(Self {
            name: config.name.as_str().into(),
            transport,
            tls: tls
                .map(|tls| Certificates::load(tls, transport.alpn()))
                .transpose()?,
            proxy_protocol_from: config.proxy_protocol_from.clone(),
            gate: GateLimits {
                connections_max: config.connections_max.unwrap_or(0),
                half_open_max: config.half_open_max.unwrap_or(0),
                connects_per_second: config.connects_per_second.unwrap_or(0),
            },
            handshake_timeout: config
                .handshake_timeout
                .unwrap_or(defaults.handshake_timeout),
            packet_bytes_max: config.packet_bytes_max.unwrap_or(defaults.packet_bytes_max),
        })
    }

    /// Whether `address` is that of a proxy whose header is believed.
    pub(crate) fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.proxy_protocol_from
            .iter()
            .any(|net| net.contains(&address))
    }
}
