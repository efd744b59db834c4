//! Who a device is, and what it may do.
//!
//! Between CONNECT and the claim of the client id each authenticator of the chain is asked in turn:
//! it accepts, refuses, or does not know the device, and then the next one is asked. The end of the
//! chain refuses. Without a chain everyone is let in, and no rule applies.
//!
//! Read in this order: [`config`], `mod` (the chain), `password`, `jwt` with `keys` and `jwks`,
//! `http`, then [`identity`] and [`acl`]. `cache` and `watched` are what several of them need.

pub(crate) mod acl;
mod cache;
pub(crate) mod config;
mod http;
pub(crate) mod identity;
mod jwks;
mod jwt;
mod keys;
pub(crate) mod password;
mod watched;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use moorline_mqtt::{Connect, ReasonCode, Version};
use moorline_router::ClientId;
use tokio::runtime::Handle;

use self::acl::{Acl, Rule};
use self::cache::Hasher;
use self::config::{AclConfig, AuthConfig, AuthenticatorKind};
use self::http::HttpAuth;
use self::identity::Identity;
use self::jwt::Jwt;
use self::password::PasswordFile;
use crate::listener_config::CertificateIdentity;
use crate::peer::Peer;

/// What a device says of itself, and what is known of its connection.
pub(crate) struct Credentials<'a> {
    /// Empty where the server is to choose one.
    client_id: &'a str,
    username: Option<&'a str>,
    password: Option<&'a [u8]>,
    version: Version,
    peer: &'a Peer,
}

/// What one authenticator says.
enum Verdict {
    Accepted(Accepted),
    Refused(Refusal),
    /// The device is none of this authenticator's.
    Unknown,
}

/// A device that an authenticator answers for.
#[derive(Debug, Clone, Default)]
struct Accepted {
    username: Option<Box<str>>,
    /// The only client id that the device may take.
    client_id: Option<Box<str>>,
    own_rules: Arc<[Rule]>,
    expires_at_ms: Option<u64>,
}

/// Why a device is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nobody of that name, or not that password: which of them is not told.
    BadCredentials,
    /// The credentials are good, and not for this.
    NotAuthorized,
    /// Whoever would know does not answer.
    Unavailable,
    /// Too many ask at once.
    Busy,
}

impl Refusal {
    /// The code of the CONNACK.
    pub(crate) fn reason_code(self) -> ReasonCode {
        match self {
            Self::BadCredentials => ReasonCode::BadUserNameOrPassword,
            Self::NotAuthorized => ReasonCode::NotAuthorized,
            Self::Unavailable => ReasonCode::ServerUnavailable,
            Self::Busy => ReasonCode::ServerBusy,
        }
    }

    /// Why no session came of a connection, as a metric label: not whether the user is known.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::BadCredentials | Self::NotAuthorized => "not_authorized",
            Self::Unavailable => "authenticator_unavailable",
            Self::Busy => "authenticator_busy",
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::BadCredentials | Self::NotAuthorized => "refused",
            Self::Unavailable => "unavailable",
            Self::Busy => "busy",
        }
    }
}

enum Authenticator {
    PasswordFile(Box<PasswordFile>),
    Jwt(Box<Jwt>),
    Http(Box<HttpAuth>),
    Certificate,
}

impl Authenticator {
    fn label(&self) -> &'static str {
        match self {
            Self::PasswordFile(_) => "password_file",
            Self::Jwt(_) => "jwt",
            Self::Http(_) => "http",
            Self::Certificate => "certificate",
        }
    }

    async fn judge(&self, asked: &Credentials<'_>) -> Verdict {
        match self {
            Self::PasswordFile(file) => file.judge(asked).await,
            Self::Jwt(jwt) => jwt.judge(asked).await,
            Self::Http(http) => http.judge(asked).await,
            Self::Certificate => judge_certificate(asked.peer),
        }
    }
}

/// The chain and the rules of a node.
pub(crate) struct Auth {
    chain: Vec<Authenticator>,
    acl: Arc<Acl>,
    timeout: Duration,
}

impl Auth {
    /// Reads every file once. Called within the runtime whose threads may be blocked.
    pub(crate) fn open(
        config: &AuthConfig,
        acl: &AclConfig,
        device_topics: &str,
        data_dir: &Path,
    ) -> Result<Self, String> {
        let handle = Handle::current();
        let hasher = Hasher::new().map_err(|error| format!("cannot read /dev/urandom: {error}"))?;
        let hasher = Arc::new(hasher);
        let open = |kind: &AuthenticatorKind| -> Result<Authenticator, String> {
            let (hasher, handle) = (Arc::clone(&hasher), handle.clone());
            Ok(match kind {
                AuthenticatorKind::PasswordFile => {
                    let path = config.password_path(data_dir);
                    let file = PasswordFile::open(&config.password_file, &path, hasher, handle)?;
                    Authenticator::PasswordFile(Box::new(file))
                }
                AuthenticatorKind::Jwt => {
                    Authenticator::Jwt(Box::new(Jwt::open(&config.jwt, handle)?))
                }
                AuthenticatorKind::Http => {
                    Authenticator::Http(Box::new(HttpAuth::open(&config.http, hasher, handle)?))
                }
                AuthenticatorKind::Certificate => Authenticator::Certificate,
            })
        };
        Ok(Self {
            chain: config.chain.iter().map(open).collect::<Result<_, _>>()?,
            acl: Arc::new(Acl::new(acl, device_topics)?),
            timeout: config.timeout,
        })
    }

    /// Says who the device is: nobody in particular where nobody is asked.
    pub(crate) async fn authenticate(
        &self,
        peer: &Peer,
        connect: &Connect,
    ) -> Result<Option<Known>, Refusal> {
        if self.chain.is_empty() && peer.certificate.is_none() {
            return Ok(None);
        }
        let asked = Credentials {
            client_id: &connect.client_id,
            username: connect.username.as_deref(),
            password: connect.password.as_deref(),
            version: connect.version,
            peer,
        };
        let accepted = tokio::time::timeout(self.timeout, self.ask(&asked))
            .await
            .unwrap_or_else(|_| {
                count("chain", Refusal::Busy.label());
                Err(Refusal::Busy)
            })?;
        let accepted = bind_to_certificate(accepted, peer)?;
        let is_other = |bound: &str| !connect.client_id.is_empty() && &*connect.client_id != bound;
        if accepted.client_id.as_deref().is_some_and(is_other) {
            count("chain", "client_id_mismatch");
            return Err(Refusal::NotAuthorized);
        }
        Ok(Some(Known {
            accepted,
            certificate: peer.certificate_name().map(Into::into),
            acl: Arc::clone(&self.acl),
        }))
    }

    async fn ask(&self, asked: &Credentials<'_>) -> Result<Accepted, Refusal> {
        for authenticator in &self.chain {
            let label = authenticator.label();
            match authenticator.judge(asked).await {
                Verdict::Accepted(accepted) => {
                    count(label, "accepted");
                    return Ok(accepted);
                }
                Verdict::Refused(refusal) => {
                    count(label, refusal.label());
                    return Err(refusal);
                }
                Verdict::Unknown => count(label, "unknown"),
            }
        }
        if self.chain.is_empty()
            && let Verdict::Accepted(accepted) = judge_certificate(asked.peer)
        {
            // A listener that verifies certificates has asked who the device is.
            return Ok(accepted);
        }
        Err(Refusal::BadCredentials)
    }

    /// What keeps keys fresh, to run as long as the node does.
    pub(crate) fn refreshing(&self) -> Option<impl Future<Output = ()> + Send + use<>> {
        self.chain
            .iter()
            .find_map(|authenticator| match authenticator {
                Authenticator::Jwt(jwt) => jwt.refreshing(),
                _ => None,
            })
    }
}

/// TLS has verified it: what is left is to take its name.
fn judge_certificate(peer: &Peer) -> Verdict {
    match &peer.certificate {
        Some(_) => Verdict::Accepted(Accepted {
            username: peer.certificate_name().map(Into::into),
            ..Accepted::default()
        }),
        None => Verdict::Unknown,
    }
}

/// The name that the listener takes from the certificate goes before every other, whoever let the
/// device in. (That of a client id is taken where the client id is chosen.)
fn bind_to_certificate(accepted: Accepted, peer: &Peer) -> Result<Accepted, Refusal> {
    if let (Some(certified), Some(bound)) = (
        peer.certified(CertificateIdentity::ClientId),
        &accepted.client_id,
    ) && *certified != **bound
    {
        return Err(Refusal::NotAuthorized);
    }
    Ok(match peer.certified_username() {
        Some(name) => Accepted {
            username: Some(name.into()),
            ..accepted
        },
        None => accepted,
    })
}

/// A device that may connect, before its client id is settled.
pub(crate) struct Known {
    accepted: Accepted,
    certificate: Option<Box<str>>,
    acl: Arc<Acl>,
}

impl Known {
    /// The one client id that it may take, if it is bound to one.
    pub(crate) fn client_id(&self) -> Option<&str> {
        self.accepted.client_id.as_deref()
    }

    /// Who it is as `client`.
    pub(crate) fn identity(self, client: &ClientId) -> Arc<Identity> {
        Arc::new(Identity {
            client: client.clone(),
            username: self.accepted.username,
            certificate: self.certificate,
            own_rules: self.accepted.own_rules,
            acl: self.acl,
            expires_at_ms: self.accepted.expires_at_ms,
        })
    }
}

fn count(authenticator: &'static str, result: &'static str) {
    counter!("moorline_auth_total", "authenticator" => authenticator, "result" => result)
        .increment(1);
}
