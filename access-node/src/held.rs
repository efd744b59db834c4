//! What a device sends behind a SUBSCRIBE or UNSUBSCRIBE, until that is in force all over the cluster.
//!
//! On one machine a subscription is in force before the next packet is looked at, and devices count on it: they subscribe
//! and publish in one breath, and expect their own message. Where other processes have to hear of it first, the packets that
//! could tell the difference wait here, in order. Answers to what the server sent, and PINGREQ, do not wait: while
//! the cluster settles for long the device must stay connected.

use std::collections::VecDeque;

use moorline_mqtt::Packet;

use crate::close_reason::CloseReason;
use crate::connection::Connection;
use crate::inbound::Turn;
use crate::unrouted::Unrouted;

/// Bytes of payloads beyond which no more is read.
const BYTES_MAX: usize = 256 * 1024;

fn waits(packet: &Packet) -> bool {
    !matches!(
        packet,
        Packet::PubAck(_) | Packet::PubRec(_) | Packet::PubComp(_) | Packet::PingReq
    )
}

/// Packets that wait, in order.
#[derive(Default)]
struct Held {
    packets: VecDeque<Packet>,
    /// Of their payloads.
    bytes: usize,
}

/// What a connection has taken from its device and not acted on; only in a cluster, and while there is any.
#[derive(Default)]
pub(crate) struct Waiting {
    /// Behind a SUBSCRIBE or UNSUBSCRIBE that is not in force all over the cluster yet.
    held: Option<Held>,
    pub(crate) unrouted: Unrouted,
}

impl Held {
    fn push(&mut self, packet: Packet) {
        if let Packet::Publish(publish) = &packet {
            self.bytes += publish.payload.len();
        }
        self.packets.push_back(packet);
    }
}

impl Connection {
    /// Everything behind the packet that is looked at waits for [`Self::let_go`].
    pub(crate) fn hold(&mut self) {
        self.waiting
            .get_or_insert_default()
            .held
            .get_or_insert_default();
    }

    fn held(&mut self) -> Option<&mut Held> {
        self.waiting.as_mut()?.held.as_mut()
    }

    /// An idle connection has no room for what waits.
    pub(crate) fn drop_empty_waiting(&mut self) {
        let waiting = self.waiting.as_ref();
        if waiting.is_some_and(|waiting| waiting.held.is_none() && waiting.unrouted.is_empty()) {
            self.waiting = None;
        }
    }

    /// Puts the packet behind those that wait, or gives it back if it need not.
    pub(crate) fn held_back(&mut self, packet: Packet) -> Option<Packet> {
        if self.held().is_none() || !waits(&packet) {
            return Some(packet);
        }
        if let Packet::Disconnect(disconnect) = &packet {
            // What the device says of its will and session holds however the connection ends; only its end waits.
            self.on_disconnect(disconnect);
        }
        match self.held() {
            Some(held) => {
                held.push(packet);
                None
            }
            None => Some(packet),
        }
    }

    /// No more is read: so much waits, or the device has said that it is gone.
    pub(crate) fn holds_enough(&self) -> bool {
        let held = self
            .waiting
            .as_ref()
            .and_then(|waiting| waiting.held.as_ref());
        held.is_some_and(|held| {
            held.packets.len() >= usize::from(self.node.config.receive_maximum)
                || held.bytes > BYTES_MAX
                || matches!(held.packets.back(), Some(Packet::Disconnect(_)))
        })
    }

    /// Goes on with what waited, up to the next packet that has others wait.
    pub(crate) fn let_go(&mut self, turn: &mut Turn) -> Result<(), CloseReason> {
        let held = self
            .waiting
            .as_mut()
            .and_then(|waiting| waiting.held.take());
        self.drop_empty_waiting();
        let mut packets = held.unwrap_or_default().packets;
        while let Some(packet) = packets.pop_front() {
            self.on_packet(packet, turn)?;
            if let Some(held) = self.held() {
                packets.drain(..).for_each(|packet| held.push(packet));
            }
        }
        Ok(())
    }
}
