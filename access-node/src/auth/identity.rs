//! Who a connected device is and what that lets it do.

use std::fmt;
use std::sync::Arc;

use moorline_mqtt::TopicFilter;
use moorline_router::ClientId;

use super::acl::{Acl, Names, Rule, Wish};

/// An authenticated device. It holds no secret.
pub(crate) struct Identity {
    pub(crate) client: ClientId,
    pub(crate) username: Option<Box<str>>,
    /// The name of its certificate.
    pub(crate) certificate: Option<Box<str>>,
    /// Rules of this device alone; they come before all others.
    pub(crate) own_rules: Arc<[Rule]>,
    pub(crate) acl: Arc<Acl>,
    /// Unix milliseconds from which on the credentials hold no longer.
    pub(crate) expires_at_ms: Option<u64>,
}

impl Identity {
    /// Whether it may publish to `topic`, as a device or as a will.
    pub(crate) fn may_publish(&self, topic: &str) -> bool {
        self.acl
            .allows(&self.own_rules, Wish::Publish(topic), self.names())
    }

    /// Whether it may have every message that `filter` can match.
    pub(crate) fn may_subscribe(&self, filter: &TopicFilter) -> bool {
        let plain = match filter.share() {
            Some((_, plain)) => plain,
            None => filter.as_str(),
        };
        self.acl
            .allows(&self.own_rules, Wish::Subscribe(plain), self.names())
    }

    fn names(&self) -> Names<'_> {
        Names {
            client: self.client.as_str(),
            username: self.username.as_deref(),
            certificate: self.certificate.as_deref(),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("username", &self.username)
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}
