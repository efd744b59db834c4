//! The task of one connection: it waits in one place, [`Connection::next_event`], and changes state
//! elsewhere, without waiting ([`crate::inbound`] for packets, [`crate::outbound`] for deliveries).

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use moorline_mqtt::{PacketId, ReasonCode, Version};
use moorline_router::{Epoch, InboxPage, MessageId, Position, StoreError};

use crate::aliases::ReceivedAliases;
use crate::close_reason::CloseReason;
use crate::fences::Fences;
use crate::held::Waiting;
use crate::inbound::Turn;
use crate::node::Node;
use crate::outbound::Corked;
use crate::publish::Durable;
use crate::rate::Meter;
use crate::reader::{ReadError, Reader, Received};
use crate::session::Session;
use crate::wire::{BEHIND, CLOSING, FEEDING, RESTORE, UNREAD, UNSENT, Wire, YIELDED};

/// Bytes of a page of the inbox.
const PAGE_BYTES: usize = 256 * 1024;
/// Bytes of answers that a device may leave unread, beside the messages.
const ANSWERS_UNSENT_MAX: usize = 64 * 1024;
/// Bytes of publishes that a device may have waiting for the stores; beyond them no more is read.
pub(crate) const WAITING_BYTES_MAX: usize = 1024 * 1024;
/// Until a page is asked for again after the store failed.
const PAGE_RETRY: Duration = Duration::from_secs(1);

/// An answer that waits for the stores; answers go out in the order of what they answer
/// ([MQTT-4.6.0-2]).
pub(crate) struct Pending {
    /// `None` once, or where nothing but the order is waited for.
    pub(crate) durable: Option<Durable>,
    pub(crate) answer: PendingAnswer,
    /// Of the payload that waits with it.
    pub(crate) bytes: u32,
}

/// What is said once it is durable.
pub(crate) enum PendingAnswer {
    PubAck(PacketId),
    PubRec(PacketId),
    /// Any encoded packet that cannot be turned into a refusal.
    Encoded(Bytes),
    /// SUBACK or UNSUBACK for which packets are held.
    Subscribed(Bytes),
}

/// A QoS 2 PUBLISH from the device that it has not released.
#[derive(Debug, Clone)]
pub(crate) struct ReceivedId {
    /// Kept for a persistent session only.
    pub(crate) message_id: Option<MessageId>,
    /// The message went on durably.
    pub(crate) done: bool,
    /// It came on this connection: the device counts it against the Receive Maximum.
    pub(crate) here: bool,
}

/// A page of the inbox that is being read.
pub(crate) struct ReadingPage {
    page: BoxFuture<'static, Result<InboxPage, StoreError>>,
    /// What had been heard when the reading began: the page has all of it.
    heard: Position,
}

/// A device's connection, as its own task holds it.
pub(crate) struct Connection {
    pub(crate) node: Arc<Node>,
    pub(crate) session: Arc<Session>,
    pub(crate) wire: Arc<Wire>,
    pub(crate) epoch: Epoch,
    pub(crate) version: Version,
    /// Subscriptions may still have retained messages to get.
    pub(crate) feeding: bool,
    /// Reason Strings may come in acknowledgements: the device has asked for problem information in as
    /// many words. To others they are only allowed, and some read no acknowledgement but the shortest.
    pub(crate) explains: bool,
    /// Of all that is pending.
    pub(crate) pending_bytes: u32,
    pub(crate) reader: Reader,
    pub(crate) pending: VecDeque<Pending>,
    pub(crate) received: BTreeMap<PacketId, ReceivedId>,
    pub(crate) page: Option<Box<ReadingPage>>,
    /// What the device's topic aliases stand for; made with the first.
    pub(crate) aliases: Option<Box<ReceivedAliases>>,
    /// Behind which everything durable of this connection stands; made with the first.
    pub(crate) fences: Option<Box<Fences>>,
    /// What the device has sent and must wait for what it had sent before.
    pub(crate) waiting: Option<Box<Waiting>>,
    /// Present where the rates of a device are limited.
    pub(crate) meter: Option<Box<Meter>>,
    /// Whether its end counts where flapping clients are looked for.
    pub(crate) may_flap: bool,
}

enum Event {
    Closing,
    Noted(Result<(), StoreError>),
    Committed(Result<(), StoreError>),
    InForce(Result<(), StoreError>, Bytes),
    HeldForLong,
    Writable,
    Page(Result<InboxPage, StoreError>, Position),
    Feeding,
    Restore,
    Received(Result<Received, ReadError>),
}

impl Connection {
    /// Takes what came behind the CONNECT in the same read.
    pub(crate) fn begin(&mut self, first: Bytes) -> Result<(), CloseReason> {
        self.on_received(Received {
            data: first,
            answer: None,
            read_bytes: 0,
        })
    }

    /// Serves the connection to its end and says why it ended. `turn` is the outcome so far.
    pub(crate) async fn run(&mut self, mut turn: Result<(), CloseReason>) -> CloseReason {
        loop {
            if let Err(reason) = turn {
                return reason;
            }
            turn = match poll_fn(|context| self.next_event(context)).await {
                Event::Closing => return self.closing_reason(),
                Event::Noted(result) => self.on_noted(result),
                Event::Committed(result) => self.on_committed(result),
                Event::InForce(result, answer) => self.on_in_force(result, &answer),
                Event::HeldForLong => self.on_held_for_long(),
                Event::Writable => self.on_writable(),
                Event::Page(result, heard) => self.on_page(result, heard),
                Event::Feeding => {
                    self.wire.clear(FEEDING | YIELDED);
                    self.feed_when_there_is_room();
                    Ok(())
                }
                Event::Restore => self.restore(),
                Event::Received(Ok(received)) => self.on_received(received),
                Event::Received(Err(ReadError::WebSocket(error))) => {
                    tracing::debug!(client = %self.session.client, %error, "not MQTT over WebSocket");
                    Err(CloseReason::Malformed(ReasonCode::ProtocolError))
                }
                Event::Received(Err(ReadError::Tls(error))) => {
                    tracing::debug!(client = %self.session.client, %error, "TLS broken off");
                    Err(CloseReason::ConnectionLost)
                }
                Event::Received(Err(ReadError::Ended | ReadError::Network(_))) => {
                    Err(CloseReason::ConnectionLost)
                }
            };
        }
    }

    fn next_event(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        self.wire.register(context);
        if self.wire.is_signalled(CLOSING) {
            return Poll::Ready(Event::Closing);
        }
        if self.wire.is_signalled(RESTORE) {
            return Poll::Ready(Event::Restore);
        }
        if let Poll::Ready(noted) = self.poll_noted(context) {
            return Poll::Ready(Event::Noted(noted));
        }
        if let Some(Pending {
            durable: Some(durable),
            ..
        }) = self.pending.front_mut()
            && let Poll::Ready(result) = durable.as_mut().poll(context)
        {
            return Poll::Ready(Event::Committed(result));
        }
        if self.waiting.is_some() {
            if let Poll::Ready((result, answer)) = self.poll_overdue(context) {
                return Poll::Ready(Event::InForce(result, answer));
            }
            if self.poll_held(context).is_ready() {
                return Poll::Ready(Event::HeldForLong);
            }
        }
        // An error of the socket shows when it is read.
        if self.wire.is_signalled(UNSENT) && self.wire.poll_writable(context).is_ready() {
            return Poll::Ready(Event::Writable);
        }
        if self.page.is_none() && self.wire.is_signalled(BEHIND) {
            self.page = self.begin_page(Duration::ZERO);
        }
        if let Some(reading) = &mut self.page
            && let Poll::Ready(result) = reading.page.as_mut().poll(context)
        {
            let heard = reading.heard;
            self.page = None;
            return Poll::Ready(Event::Page(result, heard));
        }
        if self.wire.is_signalled(FEEDING) {
            if self.wire.is_signalled(YIELDED) {
                return Poll::Ready(Event::Feeding);
            }
            // Wakes this task, behind those that are ready to run.
            self.wire.signal(YIELDED);
            return Poll::Pending;
        }
        let rests = self
            .meter
            .as_mut()
            .is_some_and(|meter| meter.poll_ready(context).is_pending());
        // A device that sends faster than it may, or than the stores take, waits here; MQTT 5.0 devices
        // that heed the Receive Maximum never do for the stores.
        if rests
            || self.pending.len() > usize::from(self.node.config.receive_maximum)
            || self.pending_bytes as usize > WAITING_BYTES_MAX
            || self.is_recovering()
            || self.has_too_much_unrouted()
            || self.holds_enough()
        {
            self.wire.signal(UNREAD);
            return Poll::Pending;
        }
        if self.wire.is_signalled(UNREAD) {
            self.wire.received(self.node.clock.now_s());
            self.wire.clear(UNREAD);
        }
        if self.is_ignored() {
            return Poll::Pending;
        }
        self.reader
            .poll_receive(context, &self.wire)
            .map(Event::Received)
    }

    /// Of QoS 0 nothing stands in the line.
    fn has_too_much_unrouted(&self) -> bool {
        let waiting = self.waiting.as_ref();
        let limit = usize::from(self.node.config.receive_maximum);
        waiting.is_some_and(|waiting| {
            waiting.unrouted.len() > limit || waiting.unrouted.bytes() > WAITING_BYTES_MAX
        })
    }

    /// Whether what a store that was out of reach has not taken is being written again.
    fn is_recovering(&self) -> bool {
        let fences = self.fences.as_ref();
        fences.is_some_and(|fences| fences.is_recovering()) && !self.pending.is_empty()
    }

    /// Whether the device leaves its answers unread: what it sends has to wait then. Messages alone
    /// never fill the buffer that far.
    fn is_ignored(&self) -> bool {
        self.wire.is_signalled(UNSENT)
            && self.session.lock().link_of(self.epoch).is_some_and(|link| {
                link.unsent.len() >= self.node.config.unsent_bytes_max + ANSWERS_UNSENT_MAX
            })
    }

    fn begin_page(&self, delay: Duration) -> Option<Box<ReadingPage>> {
        self.wire.clear(BEHIND);
        let (limit, after, heard) = {
            let state = self.session.lock();
            (
                state.page_size(&self.node),
                state.inbox.read_to,
                state.inbox.heard,
            )
        };
        if limit == 0 {
            return None;
        }
        let inboxes = Arc::clone(&self.node.stores.inboxes);
        let client = self.session.client.clone();
        let page = Box::pin(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            inboxes.read(&client, after, limit, PAGE_BYTES).await
        });
        Some(Box::new(ReadingPage { page, heard }))
    }

    fn on_page(
        &mut self,
        result: Result<InboxPage, StoreError>,
        heard: Position,
    ) -> Result<(), CloseReason> {
        let page = match result {
            Ok(page) => page,
            Err(error) => {
                tracing::debug!(client = %self.session.client, %error, "inbox not read, trying again");
                self.page = self.begin_page(PAGE_RETRY);
                return Ok(());
            }
        };
        let mut corked = Corked::new();
        let mut state = self.session.lock();
        if state.link_of(self.epoch).is_none() {
            return Err(CloseReason::TakenOver);
        }
        let goes_on = state.deliver_page(&self.session.client, &page, heard, &self.node);
        if goes_on {
            state.call_for_page();
        }
        corked.add(&self.session, &mut state);
        drop(state);
        self.feed_when_there_is_room();
        Ok(())
    }

    fn on_writable(&mut self) -> Result<(), CloseReason> {
        let mut state = self.session.lock();
        let Some(link) = state.link_of(self.epoch) else {
            return Err(CloseReason::TakenOver);
        };
        link.write_out();
        if link.unsent.is_empty() {
            state.drain_queue(&self.node);
            state.call_for_page();
            if let Some(link) = &mut state.link {
                link.flush();
            }
            drop(state);
            self.feed_when_there_is_room();
        }
        Ok(())
    }

    fn feed_when_there_is_room(&mut self) {
        if self.feeding {
            self.finish_turn(Turn::new());
        }
    }

    fn on_received(&mut self, received: Received) -> Result<(), CloseReason> {
        self.wire.received(self.node.clock.now_s());
        self.node
            .metrics
            .received_bytes
            .increment(received.read_bytes as u64);
        let mut turn = Turn::new();
        let mut data = received.data;
        let mut result = Ok(());
        let mut packets = 0;
        while result.is_ok() {
            result = match self.reader.next_packet(&mut data) {
                Ok(None) => break,
                Ok(Some(packet)) => {
                    packets += 1;
                    self.on_packet(packet, &mut turn)
                }
                Err(error) => {
                    if let Some(suppressed) = self.node.log_limit.allows(self.node.clock.now_s()) {
                        tracing::info!(client = %self.session.client, %error, suppressed, "malformed packet");
                    }
                    Err(CloseReason::from(&error))
                }
            };
        }
        self.finish_turn(turn);
        let result = result.and_then(|()| self.meter(packets, received.read_bytes));
        if let Some(answer) = received.answer {
            if !answer.frames.is_empty() {
                self.send_frames(&answer.frames);
            }
            if answer.closed {
                return result.and(Err(CloseReason::ConnectionLost));
            }
        }
        result
    }

    /// Holds the device to its rates: its next bytes wait in the network.
    fn meter(&mut self, packets: usize, bytes: usize) -> Result<(), CloseReason> {
        let Some(meter) = &mut self.meter else {
            return Ok(());
        };
        let now_ns = self.node.clock.now_ns();
        let rest = meter.count(&self.node.device_rates, now_ns, packets, bytes)?;
        if !rest.is_zero() {
            self.node.metrics.paused.increment(1);
        }
        Ok(())
    }

    /// Frames that belong to WebSocket itself.
    fn send_frames(&self, frames: &BytesMut) {
        let mut state = self.session.lock();
        if let Some(link) = state.link_of(self.epoch) {
            link.append_frames(frames);
            link.flush();
        }
    }

    /// Reads and forgets until the peer closes too, so that it gets to read the goodbye.
    pub(crate) async fn linger(&mut self, limit: Duration) {
        let ended = poll_fn(|context| {
            while let Poll::Ready(read) = self.reader.poll_raw(context, &self.wire) {
                if read.is_err() {
                    return Poll::Ready(());
                }
            }
            Poll::Pending
        });
        // The limit is the answer to a peer that does neither.
        let _ = tokio::time::timeout(limit, ended).await;
    }

    fn closing_reason(&self) -> CloseReason {
        let mut state = self.session.lock();
        state
            .link_of(self.epoch)
            .and_then(|link| link.closing)
            .unwrap_or(CloseReason::TakenOver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each connected device has one; what is rare is boxed.
    #[test]
    fn an_idle_connection_is_small() {
        let size = size_of::<Connection>();
        assert!(size <= 200, "Connection grew to {size} bytes");
    }
}
