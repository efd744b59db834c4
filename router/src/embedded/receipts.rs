//! Receipts of pushes: derived while the message waits, recorded when it has ended.
//!
//! Final receipts are kept for the declared time and within the declared bytes, the oldest go first.
//! They also are what refuses a repeated message id in that time.

use std::collections::VecDeque;
use std::ops::Bound;

use super::engine::{Engine, Lookup};
use super::transaction::Transaction;
use super::{Shared, keys};
use crate::record::format::{self, MessageRecord, Stage};
use crate::{
    Appended, ClientId, EndReason, MessageId, Position, Receipt, ReceiptState, ReceiptStep,
    Recipient, StoreError, unix_ms,
};

/// At most this many receipts are removed in one batch.
const TRIM_MAX: usize = 1_000;

/// The final receipts as a whole.
pub(super) struct FinalReceipts {
    bytes: u64,
    /// Nothing is below; keeps a scan from walking over what was removed.
    trimmed_to: Vec<u8>,
}

impl FinalReceipts {
    pub(super) fn load(engine: &Engine) -> Result<Self, StoreError> {
        let mut receipts = Self {
            bytes: 0,
            trimmed_to: vec![keys::FINAL],
        };
        for pair in engine.view().range(
            Bound::Included(vec![keys::FINAL]),
            keys::after_prefix(&[keys::FINAL]),
        ) {
            let (key, value) = pair?;
            receipts.bytes += format::parse_number(&key, &value)?;
        }
        Ok(receipts)
    }
}

pub(super) fn final_state(reason: EndReason) -> ReceiptState {
    match reason {
        EndReason::Delivered => ReceiptState::Delivered,
        EndReason::Rejected(_) => ReceiptState::Rejected,
        EndReason::Expired => ReceiptState::Expired,
        EndReason::Replaced => ReceiptState::Replaced,
        EndReason::Dropped | EndReason::SessionEnded => ReceiptState::Dropped,
        EndReason::TooLarge => ReceiptState::TooLarge,
        EndReason::Cancelled => ReceiptState::Cancelled,
    }
}

fn step(state: ReceiptState, at_ms: u64) -> ReceiptStep {
    ReceiptStep {
        state,
        at_ms,
        node: None,
        reason_code: None,
    }
}

/// What is known of a message at `position` while it waits: accepted, and sent if it was.
pub(super) fn timeline(
    shared: &Shared,
    client: &ClientId,
    position: Position,
    accepted_at_ms: u64,
) -> Vec<ReceiptStep> {
    let mut timeline = vec![step(ReceiptState::Accepted, accepted_at_ms)];
    let shard = shared.inboxes.shard(client);
    if let Some(state) = shard.get(client)
        && position <= state.sent_through
    {
        let note = state.note_of(position);
        timeline.push(ReceiptStep {
            node: note.map(|note| (note.node.clone(), note.epoch)),
            ..step(
                ReceiptState::Sent,
                note.map_or(accepted_at_ms, |note| note.at_ms),
            )
        });
    }
    timeline
}

/// The receipt of a message that waits at `position`, or `None` where it does not any more.
pub(super) fn waiting_receipt(
    shared: &Shared,
    store: &impl Lookup,
    id: &MessageId,
    client: &ClientId,
    position: Position,
) -> Result<Option<Receipt>, StoreError> {
    let key = keys::entry(keys::ENTRY, client, position);
    let Some(value) = store.get(&key)? else {
        return Ok(None);
    };
    let head = format::parse_message_head(&key, &value)?;
    let mut timeline = timeline(shared, client, position, head.accepted_at_ms);
    if let Some(at) = head.expires_at_ms.filter(|at| *at <= unix_ms()) {
        timeline.push(step(ReceiptState::Expired, at));
    }
    Ok(Some(Receipt {
        id: id.clone(),
        to: Recipient::Client(client.clone()),
        timeline,
    }))
}

/// What is stored under a message id.
pub(super) fn look_up(
    store: &impl Lookup,
    id: &MessageId,
) -> Result<Option<MessageRecord>, StoreError> {
    let key = keys::message(id);
    let value = store.get(&key)?;
    value
        .map(|value| format::parse_message_record(&key, id, &value))
        .transpose()
}

impl Transaction {
    /// The receipt of a message as of this batch.
    pub(super) fn receipt(
        &self,
        id: &MessageId,
        record: MessageRecord,
    ) -> Result<Option<Receipt>, StoreError> {
        match record.stage {
            Stage::Final(receipt, _) => Ok(Some(receipt)),
            Stage::Waiting(client, position) => {
                waiting_receipt(&self.shared, self, id, &client, position)
            }
        }
    }

    /// The answer to a repeated id, if it is one.
    pub(super) fn repeated(&self, id: &MessageId) -> Result<Option<Appended>, StoreError> {
        let Some(record) = look_up(self, id)? else {
            return Ok(None);
        };
        let fingerprint = record.fingerprint.unwrap_or_default();
        let receipt = self.receipt(id, record)?;
        Ok(receipt.map(|receipt| Appended::Repeated {
            fingerprint,
            receipt,
        }))
    }

    /// Records the end of a message.
    pub(super) fn finish_receipt(&mut self, receipt: Receipt, fingerprint: Option<u64>) {
        let ended_at_ms = unix_ms();
        let id = receipt.id.clone();
        let key = keys::message(&id);
        let stage = Stage::Final(receipt, ended_at_ms);
        let value = format::message_record(&key, &MessageRecord { fingerprint, stage });
        let size = (value.len() + 2 * key.len()) as u64;
        self.receipts.bytes += size;
        self.staged.put(key, value);
        let index = keys::final_receipt(ended_at_ms, &id);
        if index < self.receipts.trimmed_to {
            // The clock went back.
            self.receipts.trimmed_to.clone_from(&index);
        }
        let value = format::number(&index, size);
        self.staged.put(index, value);
    }

    /// Removes final receipts that are over their time or over the limit of bytes.
    pub(super) fn trim_receipts(&mut self) -> Result<(), StoreError> {
        let config = &self.shared.config;
        let retention = u64::try_from(config.receipt_retention.as_millis()).unwrap_or(u64::MAX);
        let ended_before = unix_ms().saturating_sub(retention);
        let bytes_max = config.receipts_bytes_max;
        let mut due = VecDeque::new();
        let mut bytes = self.receipts.bytes;
        for pair in self.engine.view().range(
            Bound::Included(self.receipts.trimmed_to.clone()),
            keys::after_prefix(&[keys::FINAL]),
        ) {
            let (key, value) = pair?;
            let (ended_at_ms, id) = keys::at_of(&key)
                .ok_or_else(|| StoreError::Damaged("an impossible receipt key".into()))?;
            if ended_at_ms >= ended_before && bytes <= bytes_max {
                break;
            }
            if due.len() >= TRIM_MAX {
                self.more_to_do = true;
                break;
            }
            let size = format::parse_number(&key, &value)?;
            bytes = bytes.saturating_sub(size);
            due.push_back((
                key.to_vec(),
                ended_at_ms,
                String::from_utf8_lossy(id).into_owned(),
            ));
        }
        self.receipts.bytes = bytes;
        for (index, ended_at_ms, id) in due {
            if let Ok(id) = MessageId::parse(&id)
                && let Some(record) = look_up(self, &id)?
                // The id may belong to a newer message by now.
                && matches!(record.stage, Stage::Final(_, at) if at == ended_at_ms)
            {
                self.staged.delete(keys::message(&id));
            }
            self.staged.delete(index.clone());
            self.receipts.trimmed_to = index;
        }
        Ok(())
    }

    /// Keeps a receipt that belongs to no inbox entry.
    pub(super) fn record(
        &mut self,
        receipt: Receipt,
        fingerprint: Option<u64>,
    ) -> Result<Option<Appended>, StoreError> {
        if fingerprint.is_some()
            && let Some(repeated) = self.repeated(&receipt.id)?
        {
            return Ok(Some(repeated));
        }
        // A later word on the same message takes the place of the earlier one.
        let earlier = look_up(self, &receipt.id)?;
        let fingerprint = fingerprint.or(earlier.as_ref().and_then(|record| record.fingerprint));
        if let Some(Stage::Final(_, ended_at_ms)) = earlier.map(|record| record.stage) {
            let index = keys::final_receipt(ended_at_ms, &receipt.id);
            if let Some(value) = self.get(&index)? {
                let size = format::parse_number(&index, &value)?;
                self.receipts.bytes = self.receipts.bytes.saturating_sub(size);
                self.staged.delete(index);
            }
        }
        self.finish_receipt(receipt, fingerprint);
        Ok(None)
    }
}
