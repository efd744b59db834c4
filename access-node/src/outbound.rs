//! From a message to the device's socket: the half of a session that deliverers use.
//!
//! Everything here is synchronous and runs under the session's lock. A message goes one of three
//! ways: written now; kept for later (in memory for a session that is not persistent, in the inbox
//! for the rest); or dropped, counted, by a declared limit.

use std::num::NonZeroU16;
use std::sync::Arc;

use bytes::BytesMut;
use moorline_mqtt::{
    AliasedPublish, Disconnect, DisconnectProperties, EncodedPublish, Packet, PacketId, Publish,
    PublishProperties, QoS, Version,
};
use moorline_router::{
    ClientId, Delivery, DeliveryOutcome, End, EndReason, InboxEntry, InboxPage, Message, Origin,
    Position, unix_ms,
};
use smallvec::SmallVec;

use crate::close_reason::CloseReason;
use crate::node::Node;
use crate::queue::Queued;
use crate::redispatch::SharedMessage;
use crate::refusal::Telling;
use crate::session::{InFlight, Link, Session, State, Transport};
use crate::wire::{self, BEHIND, CLOSING, UNSENT};
use crate::ws;

/// Bytes that are written within one run of deliveries rather than gathered.
pub(crate) const GATHER_BYTES: usize = 32 * 1024;

/// Sessions that were written to and are flushed together: a burst for one device costs one
/// system call, not one a message.
#[derive(Default)]
pub(crate) struct Corked {
    sessions: SmallVec<[Arc<Session>; 4]>,
}

impl Corked {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn add(&mut self, session: &Arc<Session>, state: &mut State) {
        let Some(link) = &mut state.link else { return };
        if link.unsent.len() > GATHER_BYTES {
            link.flush();
        }
        if !link.corked && !link.unsent.is_empty() {
            link.corked = true;
            self.sessions.push(Arc::clone(session));
        }
    }

    pub(crate) fn flush(&mut self) {
        for session in self.sessions.drain(..) {
            if let Some(link) = &mut session.lock().link {
                link.corked = false;
                link.flush();
            }
        }
    }
}

impl Drop for Corked {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Hands a message to the connection of its client, if this node holds it.
pub(crate) fn deliver(node: &Node, delivery: &Delivery, corked: &mut Corked) -> DeliveryOutcome {
    let Some(session) = node.session(&delivery.client) else {
        return DeliveryOutcome::NotHere;
    };
    let mut state = session.lock();
    let Some(version) = state.link.as_ref().map(|link| link.version) else {
        return DeliveryOutcome::NotHere;
    };
    let message = &delivery.message;
    let outcome = match delivery.position {
        Some(position) => state.deliver_hint(&session.client, position, message, node),
        None => {
            let publish = for_device(version, message);
            let encoded = EncodedPublish::new(version, &publish, message.qos, message.retain);
            state.deliver_live(&encoded, message.expires_at_ms, node)
        }
    };
    corked.add(&session, &mut state);
    outcome
}

impl Link {
    /// Writes what the socket takes; the rest is left to the connection's task.
    pub(crate) fn flush(&mut self) {
        if self.unsent.is_empty() || self.wire.is_signalled(UNSENT) {
            return;
        }
        self.write_out();
    }

    /// As [`Link::flush`], for the connection's task once the socket is writable again.
    pub(crate) fn write_out(&mut self) {
        if self.wire.write(&mut self.unsent).is_err() {
            // The reading side learns of it too and ends the connection.
            self.unsent.clear();
        }
        if self.unsent.is_empty() {
            wire::return_buffer(std::mem::take(&mut self.unsent));
        }
    }

    /// Appends `length` bytes that `encode` writes.
    pub(crate) fn append(&mut self, length: usize, encode: impl FnOnce(&mut BytesMut)) {
        if self.closing.is_some() {
            return;
        }
        if self.unsent.capacity() == 0 {
            self.unsent = wire::take_buffer();
        }
        if self.transport == Transport::WebSocket {
            ws::begin_frame(length, &mut self.unsent);
        }
        let before = self.unsent.len();
        encode(&mut self.unsent);
        debug_assert_eq!(self.unsent.len() - before, length);
    }

    /// Appends a PUBLISH, by the alias of its topic where the device takes one. `remaining_s` replaces
    /// the seconds that an expiring message was encoded with.
    fn append_publish(
        &mut self,
        publish: &EncodedPublish,
        packet_id: Option<PacketId>,
        dup: bool,
        remaining_s: Option<u32>,
    ) {
        if self.aliases.is_some() && self.append_aliased(publish, packet_id, dup, remaining_s) {
            return;
        }
        self.append(publish.len(), |out| match remaining_s {
            Some(seconds) => publish.write_with_expiry(packet_id, dup, seconds, out),
            None => publish.write(packet_id, dup, out),
        });
    }

    /// Says whether the topic has an alias, and the packet with it fits.
    fn append_aliased(
        &mut self,
        publish: &EncodedPublish,
        packet_id: Option<PacketId>,
        dup: bool,
        remaining_s: Option<u32>,
    ) -> bool {
        let topic = publish.topic();
        let Some(said) = self.aliases.as_ref().and_then(|held| held.of(topic)) else {
            return false;
        };
        let Some(aliased) = AliasedPublish::new(publish, said.alias, said.is_new) else {
            return false;
        };
        if aliased.len() > self.packet_bytes_max as usize {
            return false;
        }
        self.append(aliased.len(), |out| {
            aliased.write(packet_id, dup, remaining_s, out);
        });
        if said.is_new
            && let Some(aliases) = &mut self.aliases
        {
            aliases.introduced(topic);
        }
        true
    }

    /// Appends WebSocket frames as they are.
    pub(crate) fn append_frames(&mut self, frames: &[u8]) {
        if self.closing.is_none() {
            if self.unsent.capacity() == 0 {
                self.unsent = wire::take_buffer();
            }
            self.unsent.extend_from_slice(frames);
        }
    }

    /// Appends encoded packets.
    pub(crate) fn append_bytes(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.append(bytes.len(), |out| out.extend_from_slice(bytes));
        }
    }

    /// Says goodbye as far as the version knows how to, and lets the task do the rest. The first
    /// reason stays.
    pub(crate) fn close(&mut self, reason: CloseReason) {
        self.close_referring(reason, None);
    }

    /// The same, naming another server to go to.
    pub(crate) fn close_referring(&mut self, reason: CloseReason, server_reference: Option<&str>) {
        if self.closing.is_some() {
            return;
        }
        if let (Version::V5, Some(code)) = (self.version, reason.reason_code()) {
            // Here a Reason String is always allowed (section 3.1.2.11.7).
            let telling = Telling {
                version: self.version,
                packet_bytes_max: self.packet_bytes_max as usize,
                explains: true,
            };
            let packet = telling.explained(reason.explanation(), |text| {
                Packet::Disconnect(Disconnect {
                    reason: code,
                    properties: (text.is_some() || server_reference.is_some()).then(|| {
                        Box::new(DisconnectProperties {
                            reason_string: text,
                            server_reference: server_reference.map(Into::into),
                            ..DisconnectProperties::default()
                        })
                    }),
                })
            });
            self.append_bytes(&packet);
        }
        if self.transport == Transport::WebSocket {
            ws::close_frame(&mut self.unsent);
        }
        self.flush();
        self.closing = Some(reason);
        self.wire.finish_sending();
        self.wire.signal(CLOSING);
    }
}

impl State {
    /// Whether another QoS 1 or 2 message may be sent.
    pub(crate) fn has_room(&self, unsent_bytes_max: usize) -> bool {
        self.link.as_ref().is_some_and(|link| {
            self.in_flight.len() < usize::from(link.window)
                && link.unsent.len() < unsent_bytes_max
                && link.closing.is_none()
        })
    }

    /// Whether a retained message may be sent, where `more` others were just found room for; QoS 1 and 2
    /// only behind everything that waits.
    pub(crate) fn has_room_for(&self, qos: QoS, more: usize, node: &Node) -> bool {
        let unsent_bytes_max = node.config.unsent_bytes_max;
        if qos == QoS::AtMostOnce {
            return self.link.as_ref().is_some_and(|link| {
                link.unsent.len() < unsent_bytes_max && link.closing.is_none()
            });
        }
        let waiting = self.queue.is_some() || (self.keeps_inbox() && self.inbox.behind);
        let window = self
            .link
            .as_ref()
            .map_or(0, |link| usize::from(link.window));
        !waiting && self.has_room(unsent_bytes_max) && self.in_flight.len() + more < window
    }

    /// A packet identifier that no message in flight has.
    fn next_packet_id(&mut self) -> PacketId {
        loop {
            self.last_packet_id = self.last_packet_id.checked_add(1).unwrap_or(1);
            let id = PacketId(NonZeroU16::new(self.last_packet_id).expect("counted from 1"));
            if !self.is_in_flight(id) {
                return id;
            }
        }
    }

    fn is_in_flight(&self, id: PacketId) -> bool {
        self.in_flight.iter().any(|sent| sent.packet_id == id)
    }

    /// The identifier under which an inbox entry is sent. It derives from the position, so that a
    /// message of a persistent session keeps it over connections, restarts and nodes
    /// ([MQTT-4.4.0-1]). While another message in flight has that one, a persistent session waits
    /// (`None`); one that ends with its connection takes any other.
    fn packet_id_at(&mut self, position: Position) -> Option<PacketId> {
        let id = u16::try_from(position.sequence % 65_535).expect("below 65,535") + 1;
        let id = PacketId(NonZeroU16::new(id).expect("at least 1"));
        match (self.is_in_flight(id), self.keeps_inbox()) {
            (false, _) => Some(id),
            (true, true) => None,
            (true, false) => Some(self.next_packet_id()),
        }
    }

    /// Delivers a message that is in no inbox: QoS 0, or any QoS of a session that ends with its
    /// connection.
    pub(crate) fn deliver_live(
        &mut self,
        publish: &EncodedPublish,
        expires_at_ms: Option<u64>,
        node: &Node,
    ) -> DeliveryOutcome {
        self.deliver_shared(publish, expires_at_ms, None, node)
    }

    /// As [`State::deliver_live`]. `shared` is what another member gets if this session ends before it
    /// has acknowledged.
    pub(crate) fn deliver_shared(
        &mut self,
        publish: &EncodedPublish,
        expires_at_ms: Option<u64>,
        shared: Option<Arc<SharedMessage>>,
        node: &Node,
    ) -> DeliveryOutcome {
        let limits = &node.config;
        let Some(link) = &mut self.link else {
            return DeliveryOutcome::NotHere;
        };
        if publish.len() > link.packet_bytes_max as usize {
            node.metrics.dropped_too_large.increment(1);
            return DeliveryOutcome::Dropped;
        }
        let epoch = link.epoch;
        if publish.qos() == QoS::AtMostOnce {
            if link.unsent.len() >= limits.unsent_bytes_max {
                node.metrics.dropped_slow.increment(1);
                return DeliveryOutcome::Dropped;
            }
            link.append_publish(publish, None, false, None);
            node.metrics.sent[0].increment(1);
            return DeliveryOutcome::Sent { epoch };
        }
        if self.queue.is_none() && self.has_room(limits.unsent_bytes_max) {
            self.send_queued(publish, expires_at_ms, shared, node);
            return DeliveryOutcome::Sent { epoch };
        }
        let message = Queued {
            publish: publish.clone(),
            expires_at_ms,
            shared,
        };
        let queue = self.queue.get_or_insert_default();
        let dropped = queue.push(message, limits);
        if dropped.messages == 0 {
            return DeliveryOutcome::Behind;
        }
        node.metrics.dropped_queue_full.increment(dropped.messages);
        if dropped.is_first {
            tracing::info!(%epoch, waiting = queue.len(), "queue of a slow device is full, messages are dropped");
        }
        if dropped.new_one {
            DeliveryOutcome::Dropped
        } else {
            DeliveryOutcome::Behind
        }
    }

    fn send_queued(
        &mut self,
        publish: &EncodedPublish,
        expires_at_ms: Option<u64>,
        shared: Option<Arc<SharedMessage>>,
        node: &Node,
    ) {
        let packet_id = self.next_packet_id();
        if let (Some(message), QoS::AtLeastOnce) = (shared, publish.qos()) {
            self.shared.get_or_insert_default().sent(packet_id, message);
        }
        self.in_flight.push(InFlight {
            packet_id,
            qos: publish.qos(),
            received: false,
            sent_s: node.clock.now_s(),
            position: None,
        });
        let Some(link) = &mut self.link else { return };
        node.metrics.sent[publish.qos() as usize].increment(1);
        let expires_s = expires_at_ms.map(remaining_s);
        link.append_publish(publish, Some(packet_id), false, expires_s);
    }

    /// Sends what waits in memory as far as there is room.
    pub(crate) fn drain_queue(&mut self, node: &Node) {
        while self.has_room(node.config.unsent_bytes_max) {
            let Some(queue) = &mut self.queue else { return };
            let Some(next) = queue.pop() else {
                self.queue = None;
                return;
            };
            if next.expires_at_ms.is_some_and(|at| at <= unix_ms()) {
                node.metrics.dropped_expired.increment(1);
                continue;
            }
            self.send_queued(&next.publish, next.expires_at_ms, next.shared, node);
        }
    }

    /// A hint that an inbox entry waits. It is sent at once if nothing can lie before it; else the
    /// connection's task reads the inbox.
    pub(crate) fn deliver_hint(
        &mut self,
        client: &ClientId,
        position: Position,
        message: &Message,
        node: &Node,
    ) -> DeliveryOutcome {
        let room = self.has_room(node.config.unsent_bytes_max);
        let Some(link) = &self.link else {
            return DeliveryOutcome::NotHere;
        };
        let epoch = link.epoch;
        if position <= self.inbox.read_to {
            return DeliveryOutcome::Sent { epoch };
        }
        self.inbox.heard = self.inbox.heard.max(position);
        if self.inbox.behind || !room || !self.inbox.read_to.is_followed_by(position) {
            self.fall_behind();
            return DeliveryOutcome::Behind;
        }
        match self.send_entry(client, position, message, false, node) {
            Sending::Sent | Sending::Ended => {
                self.inbox.read_to = position;
                node.stores
                    .inboxes
                    .mark_sent(client, position, &node.id, epoch);
                DeliveryOutcome::Sent { epoch }
            }
            Sending::NoPacketId => {
                self.fall_behind();
                DeliveryOutcome::Behind
            }
        }
    }

    /// Leaves the rest of the inbox to the connection's task.
    fn fall_behind(&mut self) {
        self.inbox.behind = true;
        self.call_for_page();
    }

    /// Wakes the task to read the inbox if there is something and room for it. Waiting for an eighth
    /// of the window makes a page worth its read.
    pub(crate) fn call_for_page(&mut self) {
        let Some(link) = &self.link else { return };
        let free = usize::from(link.window).saturating_sub(self.in_flight.len());
        if self.inbox.behind && free >= usize::from(link.window / 8).max(1) {
            link.wire.signal(BEHIND);
        }
    }

    /// How many entries a page may have now; 0 while it is not the time to read.
    pub(crate) fn page_size(&self, node: &Node) -> usize {
        match &self.link {
            Some(link) if self.inbox.behind && self.has_room(node.config.unsent_bytes_max) => {
                usize::from(link.window).saturating_sub(self.in_flight.len())
            }
            _ => 0,
        }
    }

    /// Sends the entries of a page in order, as far as there is room. `heard` is what had been
    /// heard when the page was asked for: appended before, so the page has it or it has ended.
    /// Says whether it makes sense to read on before the device acknowledges something.
    pub(crate) fn deliver_page(
        &mut self,
        client: &ClientId,
        page: &InboxPage,
        heard: Position,
        node: &Node,
    ) -> bool {
        let before = self.inbox.read_to;
        let (mut all, mut goes_on) = (true, true);
        for entry in &page.entries {
            if entry.position <= self.inbox.read_to {
                continue;
            }
            if !self.has_room(node.config.unsent_bytes_max) {
                all = false;
                break;
            }
            if !self.deliver_entry(client, entry, node) {
                (all, goes_on) = (false, false);
                break;
            }
            self.inbox.read_to = entry.position;
        }
        if all {
            self.inbox.read_to = self.inbox.read_to.max(page.read_to);
            if !page.more {
                self.inbox.read_to = self.inbox.read_to.max(heard);
            }
            self.inbox.behind = page.more || self.inbox.heard > self.inbox.read_to;
        }
        if self.inbox.read_to > before
            && let Some(link) = &self.link
        {
            node.stores
                .inboxes
                .mark_sent(client, self.inbox.read_to, &node.id, link.epoch);
        }
        goes_on
    }

    /// Says whether the entry was dealt with.
    fn deliver_entry(&mut self, client: &ClientId, entry: &InboxEntry, node: &Node) -> bool {
        let is_new = self.link.as_ref().is_some_and(|link| link.is_new);
        if !entry.received || is_new {
            let sending = self.send_entry(
                client,
                entry.position,
                &entry.message,
                entry.maybe_sent,
                node,
            );
            return sending != Sending::NoPacketId;
        }
        let Some(packet_id) = self.packet_id_at(entry.position) else {
            return false;
        };
        self.in_flight.push(InFlight {
            packet_id,
            qos: QoS::ExactlyOnce,
            received: true,
            sent_s: node.clock.now_s(),
            position: Some(entry.position),
        });
        if let Some(link) = &mut self.link {
            let mut packet = BytesMut::new();
            moorline_mqtt::encode::pubrel(
                link.version,
                packet_id,
                moorline_mqtt::ReasonCode::Success,
                &mut packet,
            );
            link.append_bytes(&packet);
        }
        true
    }

    fn send_entry(
        &mut self,
        client: &ClientId,
        position: Position,
        message: &Message,
        dup: bool,
        node: &Node,
    ) -> Sending {
        let Some(packet_id) = self.packet_id_at(position) else {
            return Sending::NoPacketId;
        };
        let Some(link) = &mut self.link else {
            return Sending::NoPacketId;
        };
        let publish = for_device(link.version, message);
        let encoded = EncodedPublish::new(link.version, &publish, message.qos, message.retain);
        if encoded.len() > link.packet_bytes_max as usize {
            let reason = EndReason::TooLarge;
            node.stores.inboxes.end(vec![End {
                client: client.clone(),
                position,
                reason,
            }]);
            return Sending::Ended;
        }
        link.append_publish(&encoded, Some(packet_id), dup, None);
        node.metrics.sent[message.qos as usize].increment(1);
        self.in_flight.push(InFlight {
            packet_id,
            qos: message.qos,
            received: false,
            sent_s: node.clock.now_s(),
            position: Some(position),
        });
        Sending::Sent
    }
}

#[derive(PartialEq, Eq)]
enum Sending {
    Sent,
    /// It left the inbox instead.
    Ended,
    NoPacketId,
}

fn remaining_s(expires_at_ms: u64) -> u32 {
    u32::try_from(expires_at_ms.saturating_sub(unix_ms()).div_ceil(1000)).unwrap_or(u32::MAX)
}

/// A waiting message as the PUBLISH that a device gets.
pub(crate) fn for_device(version: Version, message: &Message) -> Publish {
    let properties = (version == Version::V5).then(|| {
        let mut properties: PublishProperties =
            message.properties.as_deref().cloned().unwrap_or_default();
        properties.message_expiry_interval_s = message.expires_at_ms.map(remaining_s);
        let named = properties
            .user_properties
            .iter()
            .any(|(name, _)| name == "message-id");
        if message.origin == Origin::Push && !named {
            properties
                .user_properties
                .push(("message-id".into(), message.id.as_str().into()));
        }
        Box::new(properties)
    });
    Publish {
        dup: false,
        qos: message.qos,
        retain: message.retain,
        topic: message.topic.clone(),
        packet_id: None,
        properties,
        payload: message.payload.clone(),
    }
}
