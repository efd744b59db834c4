//! What a device sends behind a SUBSCRIBE or UNSUBSCRIBE, until that is in force all over the cluster.
//!
//! On one machine a subscription is in force before the next packet is looked at, and devices count on it: they subscribe
//! and publish in one breath, and expect their own message. Where other processes have to hear of it first, the packets that
//! could tell the difference wait here, in order. Answers to what the server sent, and PINGREQ, do not wait: while
//! the cluster settles for long the device must stay connected.
//!
//! Nor does anything else wait for longer than [`HOLD_MAX`]: while Redis or RabbitMQ is away the device goes on without its SUBACK, which promises
//! nothing before it has come, and comes past the answers to later packets once the subscription is in force. Only a
//! DISCONNECT with what is before it waits on: nobody waits for an answer to that.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use moorline_mqtt::{Packet, TopicFilter};
use moorline_router::StoreError;
use tokio::time::Sleep;

use crate::close_reason::CloseReason;
use crate::connection::{Connection, Pending, PendingAnswer};
use crate::inbound::Turn;
use crate::message_parts::unpin_from_read;
use crate::publish::Durable;
use crate::unrouted::Unrouted;

/// Bytes of packets beyond which no more is read.
const BYTES_MAX: usize = 256 * 1024;
/// What a topic filter takes besides its text.
const FILTER_BYTES: usize = 64;
/// How long anything waits behind one SUBSCRIBE or UNSUBSCRIBE.
const HOLD_MAX: Duration = Duration::from_millis(1500);
/// So many may be without an answer then; behind the next one everything waits until there are fewer.
const OVERDUE_MAX: usize = 16;

fn waits(packet: &Packet) -> bool {
    !matches!(
        packet,
        Packet::PubAck(_) | Packet::PubRec(_) | Packet::PubComp(_) | Packet::PingReq
    )
}

/// About how many bytes a packet takes while it waits.
fn cost(packet: &Packet) -> usize {
    let filters = |filters: &mut dyn Iterator<Item = &TopicFilter>| -> usize {
        filters
            .map(|filter| filter.as_str().len() + FILTER_BYTES)
            .sum()
    };
    match packet {
        Packet::Publish(publish) => publish.topic.as_str().len() + publish.payload.len(),
        Packet::Subscribe(subscribe) => {
            filters(&mut subscribe.filters.iter().map(|(filter, _)| filter))
        }
        Packet::Unsubscribe(unsubscribe) => filters(&mut unsubscribe.filters.iter()),
        _ => 0,
    }
}

/// Packets that wait, in order.
struct Held {
    packets: VecDeque<Packet>,
    /// What they take, see [`cost`].
    bytes: usize,
    limit: Pin<Box<Sleep>>,
}

/// A SUBACK or UNSUBACK that nothing waits for any more.
struct Overdue {
    in_force: Durable,
    answer: Bytes,
}

/// What a connection has taken from its device and not acted on; only in a cluster, and while there is any.
#[derive(Default)]
pub(crate) struct Waiting {
    /// Behind a SUBSCRIBE or UNSUBSCRIBE that is not in force all over the cluster yet.
    held: Option<Held>,
    overdue: VecDeque<Overdue>,
    pub(crate) unrouted: Unrouted,
}

impl Held {
    fn new() -> Self {
        Self {
            packets: VecDeque::new(),
            bytes: 0,
            limit: Box::pin(tokio::time::sleep(HOLD_MAX)),
        }
    }

    fn push(&mut self, mut packet: Packet) {
        if let Packet::Publish(publish) = &mut packet {
            unpin_from_read(publish);
        }
        self.bytes += cost(&packet);
        self.packets.push_back(packet);
    }
}

impl Connection {
    /// Everything behind the packet that is looked at waits for [`Self::let_go`].
    pub(crate) fn hold(&mut self) {
        let waiting = self.waiting.get_or_insert_default();
        waiting.held.get_or_insert_with(Held::new);
    }

    /// Resolves when what is held has waited long enough.
    pub(crate) fn poll_held(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(waiting) = &mut self.waiting else {
            return Poll::Pending;
        };
        match &mut waiting.held {
            Some(held)
                if waiting.overdue.len() < OVERDUE_MAX
                    && !matches!(held.packets.back(), Some(Packet::Disconnect(_))) =>
            {
                held.limit.as_mut().poll(context)
            }
            _ => Poll::Pending,
        }
    }

    /// Goes on without the answer that everything has waited for.
    pub(crate) fn on_held_for_long(&mut self) -> Result<(), CloseReason> {
        let is_it = |pending: &Pending| matches!(pending.answer, PendingAnswer::Subscribed(_));
        if let Some(at) = self.pending.iter().position(is_it)
            && let Some(Pending {
                durable, answer, ..
            }) = self.pending.remove(at)
            && let (Some(in_force), PendingAnswer::Subscribed(answer)) = (durable, answer)
        {
            let waiting = self.waiting.get_or_insert_default();
            waiting.overdue.push_back(Overdue { in_force, answer });
        }
        let mut turn = Turn::new();
        self.answer_ready(&mut turn);
        let result = self.let_go(&mut turn);
        self.finish_turn(turn);
        result
    }

    /// Resolves when a subscription is in force whose answer is overdue, or cannot be.
    pub(crate) fn poll_overdue(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<(Result<(), StoreError>, Bytes)> {
        let Some(waiting) = &mut self.waiting else {
            return Poll::Pending;
        };
        for at in 0..waiting.overdue.len() {
            if let Poll::Ready(result) = waiting.overdue[at].in_force.as_mut().poll(context)
                && let Some(overdue) = waiting.overdue.remove(at)
            {
                self.drop_empty_waiting();
                return Poll::Ready((result, overdue.answer));
            }
        }
        Poll::Pending
    }

    pub(crate) fn on_in_force(
        &mut self,
        result: Result<(), StoreError>,
        answer: &Bytes,
    ) -> Result<(), CloseReason> {
        match result {
            Ok(()) => {
                let mut turn = Turn::new();
                turn.replies.extend_from_slice(answer);
                self.finish_turn(turn);
                Ok(())
            }
            Err(StoreError::Stale { .. }) => Err(CloseReason::TakenOver),
            Err(error) => {
                tracing::debug!(client = %self.session.client, %error, "subscription not in force");
                Err(CloseReason::StoreUnavailable)
            }
        }
    }

    fn held(&mut self) -> Option<&mut Held> {
        self.waiting.as_mut()?.held.as_mut()
    }

    /// An idle connection has no room for what waits.
    pub(crate) fn drop_empty_waiting(&mut self) {
        let waiting = self.waiting.as_ref();
        if waiting.is_some_and(|waiting| {
            waiting.held.is_none() && waiting.overdue.is_empty() && waiting.unrouted.is_empty()
        }) {
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
        let mut packets = held.map_or_else(VecDeque::new, |held| held.packets);
        while let Some(packet) = packets.pop_front() {
            self.on_packet(packet, turn)?;
            if let Some(held) = self.held() {
                packets.drain(..).for_each(|packet| held.push(packet));
            }
        }
        Ok(())
    }
}
