//! Receipts by message id.
//!
//! The receipt of a push lies in the slot of its client. What leads there from a message id is a key of its own, written in
//! the same flight as the message; it may point to what has gone, and then points to nothing. Receipts of what is in no inbox
//! (topic pushes, QoS 0) lie under that key themselves. Both end by a time to live.

use std::sync::Arc;

use redis::Value;

use super::inbox_answer as answer;
use super::inboxes::InboxParts;
use crate::record::format::{self, MessageRecord, Stage};
use crate::{Append, Appended, ClientId, End, EndReason, MessageId, Receipt, StoreError, unix_ms};

/// With the fingerprint of the content, where the caller gave one.
type Known = (Option<u64>, Receipt);

/// The receipt that something noted under a message id leads to.
async fn follow(
    parts: &InboxParts,
    id: &MessageId,
    noted: &[u8],
) -> Result<Option<Known>, StoreError> {
    match noted.split_first() {
        Some((b'c', client)) => {
            let client = client_of(client)?;
            let value = parts.link.read(parts.calls.receipt(&client, id)).await?;
            answer::receipt(&client, id, value)
        }
        Some((b'r', rest)) => {
            let end = rest.iter().position(|byte| *byte == b'\n');
            let end = end.ok_or_else(|| answer::strange("half a receipt"))?;
            // The one of the first that was recorded, which the record of a later one does not have.
            let fingerprint = std::str::from_utf8(&rest[..end]).ok();
            let fingerprint = fingerprint.and_then(|number| number.parse().ok());
            let key = id.as_str().as_bytes();
            let record = format::parse_message_record(key, id, &rest[end + 1..])?;
            Ok(match record.stage {
                Stage::Final(receipt, _) => Some((fingerprint, receipt)),
                Stage::Waiting(..) => None,
            })
        }
        _ => Err(answer::strange("something unknown about a message")),
    }
}

fn client_of(name: &[u8]) -> Result<ClientId, StoreError> {
    let name = std::str::from_utf8(name).ok();
    name.and_then(|name| ClientId::parse(name).ok())
        .ok_or_else(|| answer::strange("an impossible client id"))
}

async fn noted(parts: &InboxParts, id: &MessageId) -> Result<Option<Vec<u8>>, StoreError> {
    match parts.link.read(parts.calls.pointed(id)).await? {
        Value::Nil => Ok(None),
        value => answer::bytes(value).map(Some),
    }
}

/// See [`crate::Inboxes::receipt`].
pub(super) async fn look_up(
    parts: &InboxParts,
    id: &MessageId,
) -> Result<Option<Known>, StoreError> {
    match noted(parts, id).await? {
        Some(noted) => follow(parts, id, &noted).await,
        None => Ok(None),
    }
}

/// See [`crate::Inboxes::cancel`].
pub(super) async fn cancel(
    parts: &InboxParts,
    id: &MessageId,
) -> Result<Option<Receipt>, StoreError> {
    let Some(noted) = noted(parts, id).await? else {
        return Ok(None);
    };
    let Some((b'c', client)) = noted.split_first() else {
        return Ok(follow(parts, id, &noted).await?.map(|(_, receipt)| receipt));
    };
    let client = client_of(client)?;
    let call = parts.calls.cancel(&client, id);
    let value = parts.link.submit(client.as_str(), call).await?;
    let [ended, listed, receipt] = answer::exactly(value)?;
    parts.tidy_emptied(&client, ended, listed)?;
    Ok(answer::receipt(&client, id, receipt)?.map(|(_, receipt)| receipt))
}

/// See [`crate::Inboxes::record`].
pub(super) async fn record(
    parts: &InboxParts,
    receipt: Receipt,
    fingerprint: Option<u64>,
) -> Result<Option<Appended>, StoreError> {
    let id = receipt.id.clone();
    let key = id.as_str().as_bytes();
    let stage = Stage::Final(receipt, unix_ms());
    let record = format::message_record(key, &MessageRecord { fingerprint, stage });
    let mut mistaken = Vec::new();
    loop {
        let call = parts.calls.record(&id, fingerprint, &record, &mistaken);
        let there = answer::bytes(parts.link.submit(id.as_str(), call).await?)?;
        if there.is_empty() {
            return Ok(None);
        }
        if let Some((fingerprint, receipt)) = follow(parts, &id, &there).await? {
            let fingerprint = fingerprint.unwrap_or_default();
            return Ok(Some(Appended::Repeated {
                fingerprint,
                receipt,
            }));
        }
        // It leads nowhere any more.
        mistaken = there;
    }
}

/// Whether the id of an append was another message's: of another client, or of none. The client's own slot cannot know that,
/// so such an append is withdrawn after it was made; somebody may have been handed it meanwhile.
pub(super) async fn settle_claim(
    parts: &Arc<InboxParts>,
    append: &Append,
    appended: Appended,
    before: Value,
) -> Result<Appended, StoreError> {
    let client = &append.client;
    let before = match before {
        Value::Nil => return Ok(appended),
        value => answer::bytes(value)?,
    };
    if before.strip_prefix(b"c") == Some(client.as_str().as_bytes()) {
        return Ok(appended);
    }
    let id = &append.message.id;
    let Some((fingerprint, receipt)) = follow(parts, id, &before).await? else {
        let point = parts.calls.point(append, unix_ms(), false);
        parts.link.submit(client.as_str(), point).await?;
        return Ok(appended);
    };
    if let Appended::Stored { position, .. } = appended {
        let end = End {
            client: client.clone(),
            position,
            reason: EndReason::Cancelled,
        };
        parts.end_now(client, vec![end]).await?;
    }
    Ok(Appended::Repeated {
        fingerprint: fingerprint.unwrap_or_default(),
        receipt,
    })
}
