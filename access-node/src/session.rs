//! A session: what MQTT keeps about a client, and what may outlive its connection.
//!
//! One short lock guards it. Under the lock a deliverer assigns packet identifiers, encodes and
//! writes to the socket (see [`crate::outbound`]); the connection's task attaches, detaches and
//! acknowledges. What waits for a persistent session is not here but in the inbox: the session
//! knows only how far it has read it.

use std::sync::Arc;

use bytes::BytesMut;
use moorline_mqtt::{PacketId, QoS, SubscriptionOptions, Version, Will};
use moorline_router::{ClientId, Epoch, Position, SessionRecord, StoredSubscription, unix_ms};
use parking_lot::{Mutex, MutexGuard};

use crate::aliases::SentAliases;
use crate::auth::identity::Identity;
use crate::close_reason::CloseReason;
use crate::queue::Queue;
use crate::redispatch::SharedDeliveries;
use crate::retained_feed::RetainedFeed;
use crate::wire::Wire;

/// How the bytes of a connection are wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    WebSocket,
}

impl Transport {
    pub(crate) fn label(self, encrypted: bool) -> &'static str {
        match (self, encrypted) {
            (Self::Tcp, false) => "tcp",
            (Self::Tcp, true) => "tls",
            (Self::WebSocket, false) => "ws",
            (Self::WebSocket, true) => "wss",
        }
    }

    /// Its name in a TLS handshake (ALPN).
    pub(crate) fn alpn(self) -> &'static str {
        match self {
            Self::Tcp => "mqtt",
            Self::WebSocket => "http/1.1",
        }
    }
}

/// The MQTT state of one client on this node.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) client: ClientId,
    state: Mutex<State>,
}

/// What the session's lock guards.
#[derive(Debug)]
pub(crate) struct State {
    /// The connection, if there is one.
    pub(crate) link: Option<Link>,
    /// Seconds that the session outlives its connection; 0 ends with it, `u32::MAX` never ends.
    pub(crate) expiry_interval_s: u32,
    /// Set once: whoever finds it set looks for, or makes, another session.
    pub(crate) ended: bool,
    /// Whether the stores hold anything of this session.
    pub(crate) stored: bool,
    /// Unix milliseconds of the end of the last connection; 0 before the first.
    pub(crate) disconnected_at_ms: u64,
    pub(crate) subscriptions: Vec<HeldSubscription>,
    pub(crate) inbox: InboxCursor,
    pub(crate) in_flight: Vec<InFlight>,
    /// Messages of a session that is not persistent, waiting for room in flight; made with the first.
    pub(crate) queue: Option<Box<Queue>>,
    pub(crate) last_packet_id: u16,
    /// What another member of a shared subscription gets if this session ends; only where that
    /// happened to a session that is not persistent.
    pub(crate) shared: Option<Box<SharedDeliveries>>,
    /// Retained messages that new subscriptions are still to get.
    pub(crate) feed: Option<Box<RetainedFeed>>,
}

/// A subscription as the session keeps it. The filter's text is shared with the node's index.
#[derive(Debug, Clone)]
pub(crate) struct HeldSubscription {
    pub(crate) filter: Arc<str>,
    pub(crate) options: SubscriptionOptions,
    pub(crate) subscription_id: u32,
}

impl HeldSubscription {
    /// As it is stored.
    pub(crate) fn stored(&self) -> StoredSubscription {
        StoredSubscription {
            filter: self.filter.to_string(),
            options: self.options,
            subscription_id: (self.subscription_id > 0).then_some(self.subscription_id),
        }
    }
}

/// How far the session has been handed its inbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InboxCursor {
    /// The last position handed to the connection.
    pub(crate) read_to: Position,
    /// The highest position that a hint named.
    pub(crate) heard: Position,
    /// Something may be in the inbox behind `read_to`: hints are not delivered directly until the
    /// connection's task has read up to the end.
    pub(crate) behind: bool,
}

/// A QoS 1 or 2 message that the device has not acknowledged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InFlight {
    pub(crate) packet_id: PacketId,
    pub(crate) qos: QoS,
    /// PUBREC has come, PUBCOMP is awaited.
    pub(crate) received: bool,
    /// Seconds of the node's clock.
    pub(crate) sent_s: u32,
    /// Which inbox entry; `None` for a message that is in no inbox.
    pub(crate) position: Option<Position>,
}

/// The connection of a session.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) wire: Arc<Wire>,
    pub(crate) epoch: Epoch,
    pub(crate) version: Version,
    pub(crate) transport: Transport,
    pub(crate) keep_alive_s: u16,
    /// The device's Receive Maximum, capped.
    pub(crate) window: u16,
    /// The device's Maximum Packet Size.
    pub(crate) packet_bytes_max: u32,
    /// Present where the device takes topic aliases.
    pub(crate) aliases: Option<Box<SentAliases>>,
    /// Encoded, and not yet taken by the socket.
    pub(crate) unsent: BytesMut,
    /// Someone who is appending will flush.
    pub(crate) corked: bool,
    /// Why the connection is being closed; no more is sent.
    pub(crate) closing: Option<CloseReason>,
    /// Its task takes no more packets, and what it took is stored or refused.
    pub(crate) settled: bool,
    pub(crate) will: Option<Box<Will>>,
    /// CONNECT came with one.
    pub(crate) had_will: bool,
    /// `None` where devices are not asked who they are: nothing is denied to them.
    pub(crate) identity: Option<Arc<Identity>>,
    /// The session began with this connection: the device remembers nothing of an earlier one.
    pub(crate) is_new: bool,
}

impl Session {
    pub(crate) fn new(client: ClientId, expiry_interval_s: u32) -> Self {
        let state = State {
            link: None,
            expiry_interval_s,
            ended: false,
            stored: false,
            disconnected_at_ms: 0,
            subscriptions: Vec::new(),
            inbox: InboxCursor::START,
            in_flight: Vec::new(),
            queue: None,
            last_packet_id: 0,
            shared: None,
            feed: None,
        };
        Self {
            client,
            state: Mutex::new(state),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl InboxCursor {
    /// Nothing read: a new connection begins with what waits.
    pub(crate) const START: Self = Self {
        read_to: Position::START,
        heard: Position::START,
        behind: true,
    };
}

impl State {
    /// Whether messages for this session outlive its connection.
    pub(crate) fn is_persistent(&self) -> bool {
        self.expiry_interval_s > 0
    }

    /// Whether QoS 1 and 2 messages go through the inbox: also while a session that was persistent
    /// ends with this connection, so that they stay behind what waits there.
    pub(crate) fn keeps_inbox(&self) -> bool {
        self.is_persistent() || self.stored
    }

    /// The connection if it is still that of `epoch`.
    pub(crate) fn link_of(&mut self, epoch: Epoch) -> Option<&mut Link> {
        self.link.as_mut().filter(|link| link.epoch == epoch)
    }

    /// Who the connected device is, where that was asked.
    pub(crate) fn identity(&self) -> Option<&Identity> {
        self.link.as_ref()?.identity.as_deref()
    }

    /// Takes the connection away. What was in flight from the inbox will be read from there again.
    pub(crate) fn detach(&mut self) -> Option<Link> {
        self.inbox = InboxCursor::START;
        self.in_flight = Vec::new();
        let mut queue = self.queue.take();
        let holds_shared = queue.as_ref().is_some_and(|queue| queue.holds_shared());
        if self.shared.is_some() || holds_shared {
            let shared = self.shared.get_or_insert_default();
            shared.orphan(std::iter::from_fn(|| queue.as_mut()?.pop()));
        }
        self.disconnected_at_ms = unix_ms();
        if let Some(feed) = &mut self.feed {
            feed.interrupted();
        }
        self.link.take()
    }

    /// The session as it is stored.
    pub(crate) fn record(&self, client: &ClientId) -> SessionRecord {
        let subscriptions = self.subscriptions.iter().map(HeldSubscription::stored);
        SessionRecord {
            client: client.clone(),
            expiry_interval_s: self.expiry_interval_s,
            disconnected_at_ms: self.link.is_none().then_some(self.disconnected_at_ms),
            subscriptions: subscriptions.collect(),
        }
    }

    /// Marks the session as gone and hands out the filters to remove from the index.
    pub(crate) fn end(&mut self) -> Vec<HeldSubscription> {
        self.ended = true;
        std::mem::take(&mut self.subscriptions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten thousand idle devices hold ten thousand of these: a field added here is paid by each.
    #[test]
    fn an_idle_session_is_small() {
        let size = size_of::<Session>();
        assert!(size <= 256, "Session grew to {size} bytes");
    }
}
