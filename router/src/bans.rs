//! The seam of the ban list: who may not connect, by word of an operator.
//!
//! Short bans that a node gives by itself are not here: they end with the process.

use std::fmt;
use std::net::IpAddr;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use ipnet::IpNet;

use crate::{ClientId, StoreError};

/// Whom a ban concerns. Ordered as a list of bans is: by kind, then by value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BanTarget {
    /// Every device in a network; one address is a network of itself.
    Address(IpNet),
    /// A client id.
    Client(ClientId),
    /// A user name.
    Username(Box<str>),
}

/// Text that names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidBan(String);

impl BanTarget {
    /// The kinds that [`Self::parse`] knows.
    pub const KINDS: [&'static str; 3] = ["address", "client", "username"];

    /// Whom `kind` and `value` name.
    pub fn parse(kind: &str, value: &str) -> Result<Self, InvalidBan> {
        let invalid = |text: String| Err(InvalidBan(text));
        match kind {
            "address" => match (value.parse::<IpNet>(), value.parse::<IpAddr>()) {
                (Ok(net), _) => Ok(Self::network(net)),
                (_, Ok(address)) => Ok(Self::network(address.into())),
                _ => invalid(format!(
                    "{value:?} is no address: write one like \"192.0.2.7\" or a network like \"192.0.2.0/24\" or \"2001:db8::/64\""
                )),
            },
            "client" => match ClientId::parse(value) {
                Ok(client) => Ok(Self::Client(client)),
                Err(error) => invalid(error.to_string()),
            },
            "username" if value.is_empty() => invalid("user name must not be empty".to_owned()),
            "username" => Ok(Self::Username(value.into())),
            other => invalid(format!(
                "{other:?} is not what can be banned: {}",
                Self::KINDS.join(", ")
            )),
        }
    }

    /// A network without the part that it does not look at, an IPv4 address as such however written.
    pub fn network(net: IpNet) -> Self {
        let net = net.trunc();
        if let IpNet::V6(six) = net
            && let Some(four) = six.addr().to_ipv4_mapped()
            && let Some(prefix) = six.prefix_len().checked_sub(96)
            && let Ok(net) = IpNet::new(four.into(), prefix)
        {
            return Self::Address(net.trunc());
        }
        Self::Address(net)
    }

    /// What is banned: `address`, `client` or `username`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Address(_) => "address",
            Self::Client(_) => "client",
            Self::Username(_) => "username",
        }
    }

    /// Which one, as [`Self::parse`] reads it.
    pub fn value(&self) -> String {
        match self {
            Self::Address(net) if net.prefix_len() == net.max_prefix_len() => {
                net.addr().to_string()
            }
            Self::Address(net) => net.to_string(),
            Self::Client(client) => client.to_string(),
            Self::Username(name) => name.to_string(),
        }
    }
}

impl fmt::Display for BanTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.value())
    }
}

/// A ban.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ban {
    /// Whose.
    pub target: BanTarget,
    /// Why, for people; may be empty.
    pub reason: Box<str>,
    /// Unix milliseconds.
    pub since_ms: u64,
    /// Unix milliseconds; `None` is for ever.
    pub expires_at_ms: Option<u64>,
}

impl Ban {
    /// Whether it is over.
    pub fn is_over(&self, now_ms: u64) -> bool {
        self.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms)
    }
}

/// The ban list.
///
/// The returned futures take their place in the order of writes when they are made, not when they
/// are polled, and resolve when the change is durable. Bans that are over are kept until deleted.
#[async_trait]
pub trait Bans: Send + Sync {
    /// Every ban, for a node that starts.
    async fn load_all(&self) -> Result<Vec<Ban>, StoreError>;

    /// The ban of exactly `target`.
    async fn get(&self, target: &BanTarget) -> Result<Option<Ban>, StoreError>;

    /// Writes or replaces the ban of its target.
    fn save(&self, ban: Ban) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Removes the ban; says whether there was one.
    fn delete(&self, target: &BanTarget) -> BoxFuture<'static, Result<bool, StoreError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(kind: &str, value: &str) -> Option<String> {
        BanTarget::parse(kind, value)
            .ok()
            .map(|target| target.value())
    }

    #[test]
    fn a_target_has_one_way_to_be_written() {
        let same = |value, written: &str| {
            assert_eq!(
                parsed("address", value).as_deref(),
                Some(written),
                "{value}"
            );
        };
        same("192.0.2.7", "192.0.2.7");
        same("192.0.2.7/32", "192.0.2.7");
        same("192.0.2.7/24", "192.0.2.0/24");
        same("::ffff:192.0.2.7", "192.0.2.7");
        same("::ffff:192.0.2.7/120", "192.0.2.0/24");
        same("2001:DB8::1/64", "2001:db8::/64");
        same("::/0", "::/0");
        assert_eq!(parsed("client", "car/7").as_deref(), Some("car/7"));
        assert_eq!(parsed("username", "anna").as_deref(), Some("anna"));
    }

    #[test]
    fn what_names_nobody_is_refused_with_what_would_be_right() {
        for (kind, value, word) in [
            ("address", "192.0.2.300", "192.0.2.0/24"),
            ("address", "192.0.2.0/33", "192.0.2.0/24"),
            ("client", "", "empty"),
            ("username", "", "empty"),
            ("colour", "red", "address, client, username"),
        ] {
            let error = BanTarget::parse(kind, value).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
