//! What a connection does with the packets of its device. Nothing here waits: what has to be
//! durable first is put in line behind [`Pending`].

use std::sync::Arc;

use bytes::BytesMut;
use moorline_mqtt::{Ack, Disconnect, Packet, PacketId, Publish, QoS, ReasonCode, Version, encode};
use moorline_router::{End, EndReason, MessageId, Position, ReceivedPublish, StoreError};

use crate::close_reason::CloseReason;
use crate::cluster::until_stored;
use crate::connection::{Connection, Pending, PendingAnswer, ReceivedId};
use crate::delayed::later;
use crate::fences::Fences;
use crate::message_parts::{id_of, unpin_from_read};
use crate::outbound::Corked;
use crate::publish::{Durable, Routed, Sender, refuse_retained, refuse_topic, route};
use crate::refusal::{Refusal, Telling, reason_properties};
use crate::session::State;

/// What the packets of one read add up to.
pub(crate) struct Turn {
    pub(crate) corked: Corked,
    /// Answers to this device, written together.
    pub(crate) replies: BytesMut,
    /// Inbox entries that ended, told to the store together.
    ends: Vec<End>,
    /// The window may have room again.
    acknowledged: bool,
}

impl Turn {
    pub(crate) fn new() -> Self {
        Self {
            corked: Corked::new(),
            replies: crate::wire::take_buffer(),
            ends: Vec::new(),
            acknowledged: false,
        }
    }
}

impl Connection {
    pub(crate) fn on_packet(&mut self, packet: Packet, turn: &mut Turn) -> Result<(), CloseReason> {
        let Some(packet) = self.held_back(packet) else {
            return Ok(());
        };
        match packet {
            Packet::Publish(publish) => self.on_publish(publish, turn),
            Packet::PubAck(ack) => self.on_puback(&ack, turn),
            Packet::PubRec(ack) => self.on_pubrec(&ack, turn),
            Packet::PubComp(ack) => self.on_pubcomp(&ack, turn),
            Packet::PubRel(ack) => {
                self.on_pubrel(ack.packet_id);
                self.answer_ready(turn);
                Ok(())
            }
            Packet::Subscribe(subscribe) => self.on_subscribe(&subscribe, turn),
            Packet::Unsubscribe(unsubscribe) => self.on_unsubscribe(&unsubscribe, turn),
            Packet::PingReq => {
                turn.replies.extend_from_slice(&encode::PINGRESP);
                Ok(())
            }
            Packet::Disconnect(disconnect) => Err(self.on_disconnect(&disconnect)),
            // CONNECT named no authentication method: one that did was refused ([MQTT-4.12.0-7]).
            Packet::Auth(_)
            | Packet::Connect(_)
            | Packet::ConnAck(_)
            | Packet::SubAck(_)
            | Packet::UnsubAck(_)
            | Packet::PingResp => Err(CloseReason::ProtocolError(ReasonCode::ProtocolError)),
        }
    }

    /// Writes what the turn gathered.
    pub(crate) fn finish_turn(&mut self, mut turn: Turn) {
        self.write_replies(&mut turn);
        if turn.acknowledged {
            let mut state = self.session.lock();
            state.drain_queue(&self.node);
            state.call_for_page();
            turn.corked.add(&self.session, &mut state);
        }
        self.feed_retained(&mut turn);
        if !turn.ends.is_empty() {
            self.node.stores.inboxes.end(turn.ends);
        }
        crate::wire::return_buffer(turn.replies);
    }

    /// Puts the answers so far in front of whatever is sent next.
    pub(crate) fn write_replies(&self, turn: &mut Turn) {
        if turn.replies.is_empty() {
            return;
        }
        let mut state = self.session.lock();
        if let Some(link) = state.link_of(self.epoch) {
            link.append_bytes(&turn.replies);
            turn.corked.add(&self.session, &mut state);
        }
        turn.replies.clear();
    }

    fn on_publish(&mut self, mut publish: Publish, turn: &mut Turn) -> Result<(), CloseReason> {
        self.node.metrics.received[publish.qos as usize].increment(1);
        let alias = publish
            .properties
            .as_mut()
            .and_then(|p| p.topic_alias.take());
        if let Some(alias) = alias {
            let aliases = self.aliases.get_or_insert_default();
            publish.topic = aliases
                .resolve(alias, &publish.topic, self.node.config.topic_alias_max)
                .map_err(CloseReason::ProtocolError)?;
        }
        if publish.qos > QoS::AtMostOnce {
            self.check_receive_maximum(publish.packet_id)?;
        }
        if self.node.cluster.is_some() {
            // It waits for other machines, for long if one of them is away.
            unpin_from_read(&mut publish);
        }
        let denied = self.deny_publish(publish.topic.as_str())?;
        let mut refusal = match later(&publish.topic, &self.node.delays) {
            None => refuse_topic(&publish.topic, &self.node.config).or(denied),
            Some(Err(refusal)) => denied.or(Some(refusal)),
            // It must be allowed to publish later, and to publish that.
            Some(Ok(later)) => {
                let denied_then = self.deny_publish(later.topic.as_str())?;
                let refused_then = refuse_topic(&later.topic, &self.node.config);
                denied.or(denied_then).or(refused_then)
            }
        };
        if self.version == Version::V5 && publish.qos > QoS::AtMostOnce {
            refusal = refusal.or_else(|| refuse_retained(&publish, &self.node));
        }
        match (publish.qos, publish.packet_id) {
            (QoS::AtMostOnce, _) | (_, None) => {
                if refusal.is_none() {
                    self.route(&publish, None, turn);
                }
            }
            (QoS::AtLeastOnce, Some(id)) => {
                let durable = match refusal {
                    Some(refusal) if self.version == Version::V5 => {
                        let answer = self.refused(Packet::PubAck, id, refusal);
                        self.put_in_line(None, answer);
                        self.answer_ready(turn);
                        return Ok(());
                    }
                    // MQTT 3.1.1 has no way to refuse: acknowledged and dropped.
                    Some(_) => None,
                    None => self.route(&publish, None, turn),
                };
                self.put_publish_in_line(&publish, durable, PendingAnswer::PubAck(id));
            }
            (QoS::ExactlyOnce, Some(id)) => self.on_publish_qos2(&publish, id, refusal, turn)?,
        }
        self.answer_ready(turn);
        Ok(())
    }

    /// A 5.0 device may have as many QoS 1 and 2 PUBLISH unanswered as CONNACK says ([MQTT-3.3.4-9]);
    /// one of 3.1.1 cannot be told, and is read more slowly instead.
    fn check_receive_maximum(&self, id: Option<PacketId>) -> Result<(), CloseReason> {
        let limit = usize::from(self.node.config.receive_maximum);
        let is_few = self.pending.len() + self.received.len() < limit;
        let is_again = id.is_some_and(|id| self.received.get(&id).is_some_and(|held| held.here));
        if self.version == Version::V3_1_1 || is_few || is_again {
            return Ok(());
        }
        let qos1 = self.pending.iter();
        let qos1 = qos1.filter(|waits| matches!(waits.answer, PendingAnswer::PubAck(_)));
        let qos2 = self.received.values().filter(|held| held.here);
        if qos1.count() + qos2.count() < limit {
            return Ok(());
        }
        Err(CloseReason::LimitExceeded(
            ReasonCode::ReceiveMaximumExceeded,
        ))
    }

    /// How this device is told why something is refused.
    pub(crate) fn telling(&self) -> Telling {
        let mut state = self.session.lock();
        let link = state.link_of(self.epoch);
        Telling {
            version: self.version,
            packet_bytes_max: link.map_or(usize::MAX, |link| link.packet_bytes_max as usize),
            explains: self.explains,
        }
    }

    fn refused(
        &self,
        packet: fn(Ack) -> Packet,
        packet_id: PacketId,
        refusal: Refusal,
    ) -> PendingAnswer {
        let encoded = self.telling().explained(refusal.why, |text| {
            packet(Ack {
                packet_id,
                reason: refusal.reason,
                properties: reason_properties(text),
            })
        });
        PendingAnswer::Encoded(encoded.freeze())
    }

    /// Passes `publish` on, in its turn; what its acknowledgement has to wait for.
    fn route(
        &mut self,
        publish: &Publish,
        id: Option<MessageId>,
        turn: &mut Turn,
    ) -> Option<Durable> {
        let waiting = self.waiting.as_ref();
        match waiting.is_some_and(|waiting| !waiting.unrouted.is_empty()) {
            true => Some(self.route_later(publish, id, None)),
            false => self.route_now(publish, id, &mut turn.corked).durable,
        }
    }

    pub(crate) fn route_now(
        &mut self,
        publish: &Publish,
        id: Option<MessageId>,
        corked: &mut Corked,
    ) -> Routed {
        // A 5.0 device that is told of a full queue goes on without that message.
        let told = self.version == Version::V5;
        let in_cluster = self.node.cluster.is_some();
        let fences = match publish.qos {
            QoS::AtMostOnce => None,
            _ => Some(
                &**self
                    .fences
                    .get_or_insert_with(|| Box::new(Fences::new(told, in_cluster))),
            ),
        };
        let sender = Sender {
            client: &self.session.client,
            fences,
        };
        route(&self.node, publish, Some(sender), id, corked)
    }

    /// Why this device may not publish to `topic`, if so. Once displaced it may nothing: who it was is
    /// known with its link, and what it sent is not acknowledged.
    fn deny_publish(&self, topic: &str) -> Result<Option<Refusal>, CloseReason> {
        let mut state = self.session.lock();
        let link = state.link_of(self.epoch).ok_or(CloseReason::TakenOver)?;
        let denied = link
            .identity
            .as_ref()
            .is_some_and(|identity| !identity.may_publish(topic));
        drop(state);
        Ok(denied.then(|| {
            self.node.metrics.denied_publish.increment(1);
            tracing::debug!(client = %self.session.client, topic, "publish denied");
            Refusal::new(
                ReasonCode::NotAuthorized,
                "the device may not publish to this topic",
            )
        }))
    }

    fn on_publish_qos2(
        &mut self,
        publish: &Publish,
        id: PacketId,
        refusal: Option<Refusal>,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        let known = self.received.get(&id).cloned();
        if known.as_ref().is_some_and(|received| received.done) {
            self.put_in_line(None, PendingAnswer::PubRec(id));
            return Ok(());
        }
        if let (Some(refusal), Version::V5) = (refusal, self.version) {
            let answer = self.refused(Packet::PubRec, id, refusal);
            // The identifier is free again: what comes under it next is another message, and must not go
            // by the id of one that was begun on an earlier connection.
            let forgotten = self.received.remove(&id).map(|_| {
                self.node
                    .stores
                    .sessions
                    .release_received(&self.session.client, self.epoch, id)
            });
            self.put_in_line(forgotten, answer);
            return Ok(());
        }
        let persistent = self.session.lock().keeps_inbox();
        // A repeated PUBLISH whose first attempt may not have gone on goes on under the same id.
        let message_id = known.and_then(|received| received.message_id);
        let message_id = message_id.or_else(|| persistent.then(|| id_of(publish)));
        let mut durable = Vec::new();
        if let (true, Some(message_id)) = (persistent, &message_id) {
            let (session, epoch) = (Arc::clone(&self.session), self.epoch);
            let received = ReceivedPublish {
                packet_id: id,
                message_id: message_id.clone(),
                done: false,
            };
            durable.push(until_stored(&self.node, move |node| {
                let sessions = &node.stores.sessions;
                sessions.save_received(&session.client, epoch, received.clone())
            }));
        }
        if refusal.is_none() {
            if self.node.cluster.is_some()
                && let Some(noted) = durable.pop()
            {
                durable.push(self.route_later(publish, message_id.clone(), Some(noted)));
            } else {
                durable.extend(self.route(publish, message_id.clone(), turn));
            }
        }
        // For this connection it is done: the line keeps the order, so the answer to a repetition waits
        // for the first one's. The store is told only once it is true, see `note_done`.
        self.received.insert(
            id,
            ReceivedId {
                message_id,
                done: true,
                here: true,
            },
        );
        self.put_publish_in_line(publish, in_turn(durable), PendingAnswer::PubRec(id));
        Ok(())
    }

    /// The message of a stored identifier went on durably: from now on a repetition is only answered.
    /// A lost note costs a second copy under the same message id. Whoever displaces this connection waits
    /// for its notes, see [`crate::handovers`].
    pub(crate) fn note_done(&self, answer: &PendingAnswer) {
        if let PendingAnswer::PubRec(id) = answer
            && let Some(message_id) = self
                .received
                .get(id)
                .and_then(|held| held.message_id.as_ref())
        {
            let received = ReceivedPublish {
                packet_id: *id,
                message_id: message_id.clone(),
                done: true,
            };
            let (sessions, client) = (&self.node.stores.sessions, &self.session.client);
            drop(sessions.save_received(client, self.epoch, received));
        }
    }

    fn on_pubrel(&mut self, id: PacketId) {
        let found = self.received.remove(&id);
        let stored = found
            .as_ref()
            .is_some_and(|received| received.message_id.is_some());
        // The device may use the identifier again once it has PUBCOMP: it must be forgotten durably
        // before, or a new message would pass for a repetition of the old one.
        let durable = stored.then(|| {
            let (session, epoch) = (Arc::clone(&self.session), self.epoch);
            until_stored(&self.node, move |node| {
                let sessions = &node.stores.sessions;
                sessions.release_received(&session.client, epoch, id)
            })
        });
        let reason = match found {
            Some(_) => ReasonCode::Success,
            None => ReasonCode::PacketIdentifierNotFound,
        };
        let mut packet = BytesMut::new();
        encode::pubcomp(self.version, id, reason, &mut packet);
        self.put_in_line(durable, PendingAnswer::Encoded(packet.freeze()));
    }

    pub(crate) fn put_in_line(&mut self, durable: Option<Durable>, answer: PendingAnswer) {
        let bytes = 0;
        self.pending.push_back(Pending {
            durable,
            answer,
            bytes,
        });
    }

    /// The same of the answer to `publish`, which waits with it.
    fn put_publish_in_line(
        &mut self,
        publish: &Publish,
        durable: Option<Durable>,
        answer: PendingAnswer,
    ) {
        let waits = durable.is_some();
        self.put_in_line(durable, answer);
        if let (true, Some(last)) = (waits, self.pending.back_mut()) {
            last.bytes = u32::try_from(publish.payload.len()).unwrap_or(u32::MAX);
            self.pending_bytes = self.pending_bytes.saturating_add(last.bytes);
        }
    }

    /// Answers the front of the line as far as nothing is waited for.
    pub(crate) fn answer_ready(&mut self, turn: &mut Turn) {
        while self
            .pending
            .front()
            .is_some_and(|front| front.durable.is_none())
        {
            let Some(Pending { answer, .. }) = self.pending.pop_front() else {
                return;
            };
            self.answer(&answer, ReasonCode::Success, &mut turn.replies);
        }
    }

    fn answer(&self, answer: &PendingAnswer, reason: ReasonCode, out: &mut BytesMut) {
        match answer {
            PendingAnswer::PubAck(id) => encode::puback(self.version, *id, reason, out),
            PendingAnswer::PubRec(id) => encode::pubrec(self.version, *id, reason, out),
            PendingAnswer::Encoded(bytes) | PendingAnswer::Subscribed(bytes) => {
                out.extend_from_slice(bytes);
            }
        }
    }

    /// The front of the line is durable, or cannot become so.
    pub(crate) fn on_committed(
        &mut self,
        result: Result<(), StoreError>,
    ) -> Result<(), CloseReason> {
        let Some(Pending { answer, bytes, .. }) = self.pending.pop_front() else {
            return Ok(());
        };
        self.pending_bytes = self.pending_bytes.saturating_sub(bytes);
        let reason = match (&result, &answer, self.version) {
            (Ok(()), ..) => {
                self.note_done(&answer);
                ReasonCode::Success
            }
            (
                Err(StoreError::Full(_)),
                PendingAnswer::PubAck(_) | PendingAnswer::PubRec(_),
                Version::V5,
            ) => ReasonCode::QuotaExceeded,
            (
                Err(StoreError::Quota(why)),
                PendingAnswer::PubAck(_) | PendingAnswer::PubRec(_),
                version,
            ) => {
                self.node.metrics.denied_publish.increment(1);
                tracing::debug!(client = %self.session.client, why, "publish denied");
                match version {
                    Version::V5 => ReasonCode::QuotaExceeded,
                    // It cannot be told, and would be refused again however often it came back.
                    Version::V3_1_1 => {
                        self.note_done(&answer);
                        ReasonCode::Success
                    }
                }
            }
            (Err(StoreError::Stale { .. }), ..) => return Err(CloseReason::TakenOver),
            (Err(error), ..) => {
                // Without an acknowledgement the device sends it again when it is back, in order.
                self.node.metrics.upstream_refused.increment(1);
                tracing::debug!(client = %self.session.client, %error, "publish not acknowledged");
                return Err(CloseReason::StoreUnavailable);
            }
        };
        if let (true, PendingAnswer::PubRec(id)) = (reason.is_error(), &answer) {
            // A refused PUBLISH is over: its identifier is free again.
            self.received.remove(id);
            drop(
                self.node
                    .stores
                    .sessions
                    .release_received(&self.session.client, self.epoch, *id),
            );
        }
        let mut turn = Turn::new();
        self.answer(&answer, reason, &mut turn.replies);
        self.answer_ready(&mut turn);
        let result = match answer {
            PendingAnswer::Subscribed(_) => {
                self.write_replies(&mut turn);
                self.let_go(&mut turn)
            }
            _ => Ok(()),
        };
        self.finish_turn(turn);
        let last = self.pending.is_empty();
        if let Some(fences) = &mut self.fences
            && fences.seen_through(last)
        {
            self.fences = None;
        }
        result
    }

    fn on_puback(&mut self, ack: &Ack, turn: &mut Turn) -> Result<(), CloseReason> {
        let mut state = self.session.lock();
        if state.link_of(self.epoch).is_none() {
            return Err(CloseReason::TakenOver);
        }
        // An unknown identifier is no error: the message may have ended meanwhile.
        end_in_flight(&mut state, self, ack, QoS::AtLeastOnce, turn);
        Ok(())
    }

    fn on_pubrec(&mut self, ack: &Ack, turn: &mut Turn) -> Result<(), CloseReason> {
        let mut state = self.session.lock();
        if state.link_of(self.epoch).is_none() {
            return Err(CloseReason::TakenOver);
        }
        if ack.reason.is_error() {
            end_in_flight(&mut state, self, ack, QoS::ExactlyOnce, turn);
            return Ok(());
        }
        let sent = state
            .in_flight
            .iter_mut()
            .find(|sent| sent.packet_id == ack.packet_id && sent.qos == QoS::ExactlyOnce);
        let reason = match sent {
            Some(sent) => {
                sent.received = true;
                let position = sent.position;
                drop(state);
                self.release_received(ack.packet_id, position);
                self.answer_ready(turn);
                return Ok(());
            }
            None => ReasonCode::PacketIdentifierNotFound,
        };
        encode::pubrel(self.version, ack.packet_id, reason, &mut turn.replies);
        Ok(())
    }

    /// PUBREL lets the device forget the message: that it has it must be durable before, or it would
    /// be sent again after a restart and pass for a new one.
    fn release_received(&mut self, packet_id: PacketId, position: Option<Position>) {
        let marked = position.map(|position| {
            let session = Arc::clone(&self.session);
            until_stored(&self.node, move |node| {
                let inboxes = &node.stores.inboxes;
                inboxes.mark_received(&session.client, position)
            })
        });
        let mut pubrel = BytesMut::new();
        encode::pubrel(self.version, packet_id, ReasonCode::Success, &mut pubrel);
        self.put_in_line(marked, PendingAnswer::Encoded(pubrel.freeze()));
    }

    fn on_pubcomp(&mut self, ack: &Ack, turn: &mut Turn) -> Result<(), CloseReason> {
        let mut state = self.session.lock();
        if state.link_of(self.epoch).is_none() {
            return Err(CloseReason::TakenOver);
        }
        // PUBCOMP with an error says that the device has forgotten the identifier: it had released
        // it, so the message was received.
        let ack = Ack {
            reason: ReasonCode::Success,
            ..ack.clone()
        };
        end_in_flight(&mut state, self, &ack, QoS::ExactlyOnce, turn);
        Ok(())
    }

    pub(crate) fn on_disconnect(&mut self, disconnect: &Disconnect) -> CloseReason {
        let mut state = self.session.lock();
        if state.link_of(self.epoch).is_none() {
            return CloseReason::TakenOver;
        }
        let wanted = disconnect
            .properties
            .as_ref()
            .and_then(|held| held.session_expiry_interval_s);
        if let Some(wanted_s) = wanted {
            if state.expiry_interval_s == 0 && wanted_s > 0 {
                // A session that was to end with its connection cannot be kept after all
                // (section 3.14.2.2.2).
                return CloseReason::ProtocolError(ReasonCode::ProtocolError);
            }
            state.expiry_interval_s = wanted_s.min(self.node.config.session_expiry_max_s());
        }
        let reason = match disconnect.reason {
            ReasonCode::Success => CloseReason::ClientLeft,
            _ => CloseReason::ClientLeftWithWill,
        };
        // Here and now: the device may connect again before this connection's end is seen to, and
        // whoever displaces it would publish what it finds.
        let had_will = !reason.publishes_will()
            && state
                .link_of(self.epoch)
                .is_some_and(|link| link.will.take().is_some());
        drop(state);
        if had_will {
            let sessions = &self.node.stores.sessions;
            let deleted = sessions.delete_will(&self.session.client, self.epoch);
            // In the line: whoever displaces this connection from another node waits for it.
            self.put_in_line(Some(deleted), PendingAnswer::Encoded(bytes::Bytes::new()));
        }
        reason
    }
}

/// Several writes as one to wait for; each has its place in the order already.
fn in_turn(parts: Vec<Durable>) -> Option<Durable> {
    (!parts.is_empty()).then(|| {
        Box::pin(async move {
            for part in parts {
                part.await?;
            }
            Ok(())
        }) as Durable
    })
}

/// Removes an acknowledged message from those in flight; its inbox entry ends with it.
fn end_in_flight(state: &mut State, connection: &Connection, ack: &Ack, qos: QoS, turn: &mut Turn) {
    let found = state
        .in_flight
        .iter()
        .position(|sent| sent.packet_id == ack.packet_id && sent.qos == qos);
    let Some(at) = found else { return };
    let sent = state.in_flight.remove(at);
    if state.in_flight.is_empty() && state.in_flight.capacity() > 8 {
        state.in_flight = Vec::new();
    }
    turn.acknowledged = true;
    if let Some(shared) = &mut state.shared {
        shared.acknowledged(sent.packet_id);
    }
    if let Some(position) = sent.position {
        let reason = if ack.reason.is_error() {
            EndReason::Rejected(ack.reason as u8)
        } else {
            EndReason::Delivered
        };
        let client = connection.session.client.clone();
        turn.ends.push(End {
            client,
            position,
            reason,
        });
    }
}
