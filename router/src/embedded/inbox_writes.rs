//! What happens to inboxes on the writer thread: append, end, expiry, overflow.

use std::ops::Bound;

use moorline_mqtt::QoS;

use super::config::OverflowPolicy;
use super::engine::Lookup;
use super::inbox_table::{EntryMeta, InboxState, InboxTable};
use super::keys;
use super::receipts::{self, final_state};
use super::transaction::Transaction;
use crate::record::format::{self, MessageRecord, SentNote, Stage};
use crate::{
    Append, Appended, ClientId, EndReason, HandedOver, Message, MessageId, Origin, Position,
    Receipt, ReceiptState, ReceiptStep, Recipient, StoreError, unix_ms,
};

/// At most this many entries are ended by one pass of the sweep.
const SWEEP_MAX: usize = 500;
const SAVE_MAX: usize = 2_000;

impl Transaction {
    /// Reads an inbox into memory unless it is there; says whether it is there now.
    fn load_inbox(&mut self, client: &ClientId) -> Result<bool, StoreError> {
        let known = match self.shared.inboxes.shard(client).get(client) {
            Some(state) if !state.stale => return Ok(true),
            Some(state) => Some((state.tail, state.committed, state.sent_through)),
            None => None,
        };
        let mut state = InboxState::new(Position::START);
        let view = self.engine.view();
        let group = keys::group(keys::ENTRY, client.as_str());
        let end = keys::group_end(keys::ENTRY, client.as_str());
        for pair in view.range(Bound::Included(group), end) {
            let (key, value) = pair?;
            let (_, position) = keys::entry_of(&key)
                .ok_or_else(|| StoreError::Damaged(format!("an impossible key of {client}")))?;
            let head = format::parse_message_head(&key, &value)?;
            state.bytes += head.bytes;
            state.entries.push_back(EntryMeta {
                position,
                expires_at_ms: head.expires_at_ms,
                bytes: u32::try_from(head.bytes).unwrap_or(u32::MAX),
                origin: head.origin,
                shared: head.shared,
                received: false,
            });
            state.tail = position;
        }
        if state.entries.is_empty() && known.is_none() {
            return Ok(false);
        }
        state.committed = state.tail;
        let group = keys::group(keys::RECEIVED_ENTRY, client.as_str());
        let end = keys::group_end(keys::RECEIVED_ENTRY, client.as_str());
        for pair in view.range(Bound::Included(group), end) {
            let noted = keys::entry_of(&pair?.0).and_then(|(_, position)| state.find(position));
            if let Some(index) = noted {
                state.entries[index].received = true;
            }
        }
        let key = keys::named(keys::SENT, client.as_str());
        if let Some(value) = self.get(&key)? {
            let note = format::parse_sent_note(&key, &value)?;
            // What was sent there may have ended since, but its position, and with it its packet
            // identifier, is never another message's.
            state.tail = state.tail.max(note.through);
            state.committed = state.tail;
            state.sent_through = note.through;
            state.sent_persisted = note.through;
            state.notes.push_back(note);
        }
        if let Some((tail, committed, sent_through)) = known {
            // A position given out once is not given out again, even if its commit failed.
            state.tail = state.tail.max(tail);
            state.committed = state.committed.max(committed);
            state.sent_through = state.sent_through.max(sent_through);
        }
        self.shared
            .inboxes
            .shard(client)
            .insert(client.clone(), state);
        Ok(true)
    }

    /// Runs `act` on the inbox if there is one.
    fn on_inbox<T>(
        &mut self,
        client: &ClientId,
        act: impl FnOnce(&mut InboxState) -> T,
    ) -> Result<Option<T>, StoreError> {
        if !self.load_inbox(client)? {
            return Ok(None);
        }
        Ok(self.shared.inboxes.shard(client).get_mut(client).map(act))
    }

    /// Stages one message; see [`crate::Inboxes::append`].
    pub(super) fn append(&mut self, append: Append) -> Result<Appended, StoreError> {
        let Append {
            client,
            message,
            fingerprint,
        } = append;
        let fingerprint = fingerprint.filter(|_| message.origin == Origin::Push);
        if fingerprint.is_some()
            && let Some(repeated) = self.repeated(&message.id)?
        {
            return Ok(repeated);
        }
        let bytes = format::message_bytes(&message);
        let limits = self.shared.config.inbox;
        if bytes > limits.bytes_max || limits.entries_max == 0 {
            return Ok(Appended::Full);
        }
        let loaded = self.load_inbox(&client)?;
        if loaded && !self.make_room(&client, bytes)? {
            if limits.overflow == OverflowPolicy::Reject {
                return Ok(Appended::Full);
            }
            return self.drop_new(client, &message, fingerprint);
        }
        let position = self.next_position(&client, loaded);
        self.stage_entry(&client, position, &message, fingerprint);
        let meta = EntryMeta {
            position,
            expires_at_ms: message.expires_at_ms,
            bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
            origin: message.origin,
            shared: message.share.is_some() && message.origin == Origin::Session,
            received: false,
        };
        if let Some(state) = self.shared.inboxes.shard(&client).get_mut(&client) {
            state.entries.push_back(meta);
            state.bytes += bytes;
            state.tail = position;
        }
        self.appended.push((client, position));
        Ok(Appended::Stored {
            position,
            route: None,
        })
    }

    fn next_position(&mut self, client: &ClientId, loaded: bool) -> Position {
        if loaded && let Some(state) = self.shared.inboxes.shard(client).get(client) {
            return Position {
                generation: state.tail.generation,
                sequence: state.tail.sequence + 1,
            };
        }
        // The number is taken and the state made under one lock: a reader that saw no state took
        // a number before this one (see `EmbeddedStore::read_inbox`).
        let shared = self.shared.clone();
        let mut shard = shared.inboxes.shard(client);
        let generation = self.next_number();
        shard.insert(
            client.clone(),
            InboxState::new(Position {
                generation,
                sequence: 0,
            }),
        );
        Position {
            generation,
            sequence: 1,
        }
    }

    fn stage_entry(
        &mut self,
        client: &ClientId,
        position: Position,
        message: &Message,
        fingerprint: Option<u64>,
    ) {
        let key = keys::entry(keys::ENTRY, client, position);
        let value = format::message(&key, message);
        self.staged.put(key, value);
        if message.origin == Origin::Push {
            let key = keys::message(&message.id);
            let stage = Stage::Waiting(client.clone(), position);
            let value = format::message_record(&key, &MessageRecord { fingerprint, stage });
            self.staged.put(key, value);
        }
        if let Some(at) = message.expires_at_ms {
            self.staged
                .put(keys::expiry(at, client, position), Vec::new());
            self.swept_to_ms = self.swept_to_ms.min(at);
        }
    }

    /// Makes an inbox take `bytes` more, as its policy allows; says whether it does.
    fn make_room(&mut self, client: &ClientId, bytes: u64) -> Result<bool, StoreError> {
        let limits = self.shared.config.inbox;
        let fits = |state: &mut InboxState| {
            (state.entries.len() as u64) < limits.entries_max
                && state.bytes + bytes <= limits.bytes_max
        };
        if self.on_inbox(client, fits)? != Some(false) {
            return Ok(true);
        }
        let now = unix_ms();
        let expired = self.on_inbox(client, |state| {
            let sent_through = state.sent_through;
            let is_over = |entry: &&EntryMeta| entry.is_over(sent_through, now);
            state
                .entries
                .iter()
                .filter(is_over)
                .map(|entry| entry.position)
                .collect::<Vec<_>>()
        })?;
        for position in expired.unwrap_or_default() {
            self.end(client, position, EndReason::Expired)?;
        }
        let told = |state: &mut InboxState| std::mem::replace(&mut state.overflowing, true);
        if self.on_inbox(client, fits)? == Some(false)
            && self.on_inbox(client, told)? == Some(false)
        {
            // Once, not for each message: what was dropped is counted, and said in receipts.
            tracing::info!(%client, policy = ?limits.overflow, "inbox is full, its overflow policy applies");
        }
        while self.on_inbox(client, fits)? == Some(false) {
            if limits.overflow != OverflowPolicy::DropOldest {
                return Ok(false);
            }
            let oldest = self
                .on_inbox(client, |state| state.entries.front().copied())?
                .flatten();
            let Some(oldest) = oldest else { break };
            self.end(client, oldest.position, EndReason::Dropped)?;
        }
        Ok(true)
    }

    /// The policy says that the new message is the one to go.
    fn drop_new(
        &mut self,
        client: ClientId,
        message: &Message,
        fingerprint: Option<u64>,
    ) -> Result<Appended, StoreError> {
        if message.origin == Origin::Push {
            let step = |state, at_ms| ReceiptStep {
                state,
                at_ms,
                node: None,
                reason_code: None,
            };
            let timeline = vec![
                step(ReceiptState::Accepted, message.accepted_at_ms),
                step(ReceiptState::Dropped, unix_ms()),
            ];
            let to = Recipient::Client(client);
            self.finish_receipt(
                Receipt {
                    id: message.id.clone(),
                    to,
                    timeline,
                },
                fingerprint,
            );
        }
        self.ended.push(EndReason::Dropped);
        Ok(Appended::Dropped)
    }

    /// Ends one entry; says whether there was one that may end so.
    pub(super) fn end(
        &mut self,
        client: &ClientId,
        position: Position,
        reason: EndReason,
    ) -> Result<bool, StoreError> {
        let entry = self.on_inbox(client, |state| {
            let index = state.find(position)?;
            let of_session = state.entries[index].origin == Origin::Session;
            let allowed = of_session || reason != EndReason::SessionEnded;
            allowed.then(|| state.entries[index])
        })?;
        let Some(entry) = entry.flatten() else {
            return Ok(false);
        };
        let key = keys::entry(keys::ENTRY, client, position);
        if let Some(value) = self.get(&key)?
            && entry.origin == Origin::Push
        {
            let (id, accepted_at_ms) = format::parse_message_id(&key, &value)?;
            self.finish_push(client, position, &id, accepted_at_ms, reason)?;
        }
        let emptied = self.on_inbox(client, |state| {
            if let Some(index) = state.find(position) {
                state.remove(index);
            }
            let persisted = state.sent_persisted != Position::START;
            let emptied = state.entries.is_empty() && persisted;
            if emptied {
                state.sent_persisted = Position::START;
            }
            emptied
        })?;
        if emptied == Some(true) {
            self.staged.delete(keys::named(keys::SENT, client.as_str()));
        }
        self.staged.delete(key);
        if let Some(at) = entry.expires_at_ms {
            self.staged.delete(keys::expiry(at, client, position));
        }
        if entry.received {
            self.staged
                .delete(keys::entry(keys::RECEIVED_ENTRY, client, position));
        }
        self.ended.push(reason);
        Ok(true)
    }

    fn finish_push(
        &mut self,
        client: &ClientId,
        position: Position,
        id: &MessageId,
        accepted_at_ms: u64,
        reason: EndReason,
    ) -> Result<(), StoreError> {
        let fingerprint = receipts::look_up(self, id)?.and_then(|record| record.fingerprint);
        let mut timeline = receipts::timeline(&self.shared, client, position, accepted_at_ms);
        let by_device = matches!(
            reason,
            EndReason::Delivered | EndReason::Rejected(_) | EndReason::TooLarge
        );
        let node = timeline
            .last()
            .and_then(|sent| sent.node.clone())
            .filter(|_| by_device);
        timeline.push(ReceiptStep {
            state: final_state(reason),
            at_ms: unix_ms(),
            node,
            reason_code: match reason {
                EndReason::Rejected(code) => Some(code),
                _ => None,
            },
        });
        let to = Recipient::Client(client.clone());
        self.finish_receipt(
            Receipt {
                id: id.clone(),
                to,
                timeline,
            },
            fingerprint,
        );
        Ok(())
    }

    /// Moves an entry of a shared subscription; see [`crate::Inboxes::hand_over`].
    pub(super) fn hand_over(
        &mut self,
        client: &ClientId,
        position: Position,
        to: Option<Append>,
    ) -> Result<HandedOver, StoreError> {
        let found = self.on_inbox(client, |state| {
            let entry = state.entries[state.find(position)?];
            let sent = entry.received || position <= state.sent_through;
            entry.shared.then_some(sent)
        })?;
        let Some(sent) = found.flatten() else {
            return Ok(HandedOver::Gone);
        };
        let key = keys::entry(keys::ENTRY, client, position);
        let qos = match self.get(&key)? {
            Some(value) => format::parse_message(&key, &value)?.qos,
            None => return Ok(HandedOver::Gone),
        };
        if sent && qos == QoS::ExactlyOnce {
            // [MQTT-4.8.2-5]: its delivery to this client had begun, so it is nobody else's.
            self.end(client, position, EndReason::SessionEnded)?;
            return Ok(HandedOver::Gone);
        }
        let appended = match to {
            None => None,
            Some(append) => Some(self.append(append)?),
        };
        if !matches!(appended, Some(Appended::Full | Appended::Dropped)) {
            self.end(client, position, EndReason::SessionEnded)?;
        }
        Ok(appended.map_or(HandedOver::Taken, HandedOver::Moved))
    }

    /// Ends every session entry but those of shared subscriptions, which other members may still get; says how
    /// many of those there are.
    pub(super) fn end_session(&mut self, client: &ClientId) -> Result<u64, StoreError> {
        let positions = self.on_inbox(client, |state| {
            let of_session = |entry: &&EntryMeta| entry.origin == Origin::Session && !entry.shared;
            state
                .entries
                .iter()
                .filter(of_session)
                .map(|entry| entry.position)
                .collect::<Vec<_>>()
        })?;
        for position in positions.unwrap_or_default() {
            self.end(client, position, EndReason::SessionEnded)?;
        }
        // A push stays, but the PUBREC that the session's device sent for it means nothing any more.
        let received = self.on_inbox(client, |state| {
            let of_push = state
                .entries
                .iter_mut()
                .filter(|entry| entry.received && !entry.shared);
            of_push
                .map(|entry| {
                    entry.received = false;
                    entry.position
                })
                .collect::<Vec<_>>()
        })?;
        for position in received.unwrap_or_default() {
            self.staged
                .delete(keys::entry(keys::RECEIVED_ENTRY, client, position));
        }
        let left = self.on_inbox(client, |state| {
            state.entries.iter().filter(|entry| entry.shared).count() as u64
        })?;
        Ok(left.unwrap_or_default())
    }

    /// Ends one push by its id; answers with the receipt it ends with.
    pub(super) fn cancel(&mut self, id: &MessageId) -> Result<Option<Receipt>, StoreError> {
        let Some(record) = receipts::look_up(self, id)? else {
            return Ok(None);
        };
        if let Stage::Waiting(client, position) = &record.stage {
            let expired = self.on_inbox(client, |state| {
                let entry = state.find(*position).map(|index| state.entries[index]);
                entry.is_some_and(|entry| entry.is_over(state.sent_through, unix_ms()))
            })?;
            let reason = if expired == Some(true) {
                EndReason::Expired
            } else {
                EndReason::Cancelled
            };
            self.end(client, *position, reason)?;
        }
        match receipts::look_up(self, id)? {
            Some(record) => self.receipt(id, record),
            None => Ok(None),
        }
    }

    /// Notes how far an inbox was handed to a connection.
    pub(super) fn note_sent(
        &mut self,
        client: &ClientId,
        note: SentNote,
    ) -> Result<(), StoreError> {
        if self.on_inbox(client, |state| state.note_sent(note))? == Some(true) {
            self.shared.inboxes.save_later(client);
        }
        Ok(())
    }

    /// Notes the PUBREC of an entry.
    pub(super) fn note_received(
        &mut self,
        client: &ClientId,
        position: Position,
    ) -> Result<(), StoreError> {
        let noted = self.on_inbox(client, |state| {
            let index = state.find(position)?;
            Some(!std::mem::replace(&mut state.entries[index].received, true))
        })?;
        if noted.flatten() == Some(true) {
            let key = keys::entry(keys::RECEIVED_ENTRY, client, position);
            self.staged.put(key, Vec::new());
        }
        Ok(())
    }

    /// Ends what is past its time, so that it is counted and its receipt says so without a read.
    pub(super) fn sweep_expired(&mut self) -> Result<(), StoreError> {
        let now = unix_ms();
        let mut due = Vec::new();
        let from = Bound::Included(keys::at(keys::EXPIRY, self.swept_to_ms));
        let mut swept_to = now;
        for pair in self
            .engine
            .view()
            .range(from, keys::at(keys::EXPIRY, now + 1))
        {
            let (key, _) = pair?;
            let parsed = keys::expiry_of(&key)
                .ok_or_else(|| StoreError::Damaged("an impossible expiry key".into()))?;
            if due.len() >= SWEEP_MAX {
                swept_to = parsed.0;
                self.more_to_do = true;
                break;
            }
            due.push((key.to_vec(), parsed.1, parsed.2));
        }
        for (key, client, position) in due {
            let goes_on = self.on_inbox(&client, |state| {
                let entry = state.find(position).map(|index| state.entries[index]);
                entry.is_some_and(|entry| !entry.is_over(state.sent_through, now))
            })?;
            if goes_on == Some(true) {
                continue;
            }
            if !self.end(&client, position, EndReason::Expired)? {
                self.staged.delete(key);
            }
        }
        self.swept_to_ms = swept_to;
        Ok(())
    }

    /// Writes down how far inboxes were sent, where something of that is still unanswered.
    pub(super) fn save_sent_notes(&mut self) -> Result<(), StoreError> {
        let clients = self.shared.inboxes.take_unsaved(SAVE_MAX);
        self.more_to_do |= clients.len() == SAVE_MAX;
        for client in clients {
            if let Err(error) = self.save_sent_note(&client) {
                // The others' notes are worth keeping all the same.
                tracing::error!(%client, %error, "how far a device was sent its inbox is not kept");
            }
        }
        Ok(())
    }

    /// Writes down how far one inbox was sent, if something of that is still unanswered.
    pub(super) fn save_sent_note(&mut self, client: &ClientId) -> Result<(), StoreError> {
        let note = self.on_inbox(client, |state| {
            InboxTable::saved(state);
            let first = state.entries.front()?.position;
            let note = state.notes.back()?.clone();
            let worth = first <= state.sent_through && note.through > state.sent_persisted;
            if worth {
                state.sent_persisted = note.through;
            }
            worth.then_some(note)
        })?;
        if let Some(note) = note.flatten() {
            let key = keys::named(keys::SENT, client.as_str());
            let value = format::sent_note(&key, &note);
            self.staged.put(key, value);
        }
        Ok(())
    }
}
