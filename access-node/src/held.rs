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

fn waits(packet: &Packet) -> bool {
    !matches!(
        packet,
        Packet::PubAck(_) | Packet::PubRec(_) | Packet::PubComp(_) | Packet::PingReq
    )
}

impl Connection {
    /// Everything behind the packet that is looked at waits for [`Self::let_go`].
    pub(crate) fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Puts the packet behind those that wait, or gives it back if it need not.
    pub(crate) fn held_back(&mut self, packet: Packet) -> Option<Packet> {
        match &mut self.held {
            Some(held) if waits(&packet) => {
                held.push_back(packet);
                None
            }
            _ => Some(packet),
        }
    }

    /// No more is read: so much waits, or the device has said that it is gone.
    pub(crate) fn holds_enough(&self) -> bool {
        self.held.as_ref().is_some_and(|held| {
            held.len() >= usize::from(self.node.config.receive_maximum)
                || matches!(held.back(), Some(Packet::Disconnect(_)))
        })
    }

    /// Goes on with what waited, up to the next packet that has others wait.
    pub(crate) fn let_go(&mut self, turn: &mut Turn) -> Result<(), CloseReason> {
        let mut waiting: VecDeque<Packet> =
            self.held.take().map_or_else(VecDeque::new, |held| *held);
        while let Some(packet) = waiting.pop_front() {
            self.on_packet(packet, turn)?;
            if let Some(held) = &mut self.held {
                held.append(&mut waiting);
            }
        }
        Ok(())
    }
}
