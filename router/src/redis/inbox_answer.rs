//! What the functions of inboxes answer, as the types of the seam.

use redis::Value;

use crate::{
    ClientId, EndReason, Epoch, MessageId, NodeId, Position, Receipt, ReceiptState, ReceiptStep,
    Recipient, StoreError,
};

/// An answer that no function of this version gives.
pub(super) fn strange(what: &str) -> StoreError {
    StoreError::Damaged(format!("redis answered {what}"))
}

/// The parts of an array.
pub(super) fn array(value: Value) -> Result<Vec<Value>, StoreError> {
    match value {
        Value::Array(values) => Ok(values),
        other => Err(strange(&format!("{other:?} instead of an array"))),
    }
}

/// An array of just so many parts.
pub(super) fn exactly<const PARTS: usize>(value: Value) -> Result<[Value; PARTS], StoreError> {
    array(value)?
        .try_into()
        .map_err(|parts: Vec<_>| strange(&format!("{} parts instead of {PARTS}", parts.len())))
}

/// Bytes as they were stored.
pub(super) fn bytes(value: Value) -> Result<Vec<u8>, StoreError> {
    match value {
        Value::BulkString(bytes) => Ok(bytes),
        Value::SimpleString(text) => Ok(text.into_bytes()),
        Value::Okay => Ok(b"OK".into()),
        other => Err(strange(&format!("{other:?} instead of text"))),
    }
}

pub(super) fn text(value: Value) -> Result<String, StoreError> {
    String::from_utf8(bytes(value)?).map_err(|_| strange("text that is not UTF-8"))
}

/// A number, as one or written down.
pub(super) fn number(value: Value) -> Result<u64, StoreError> {
    match value {
        Value::Int(number) => u64::try_from(number).map_err(|_| strange("a number below zero")),
        other => parse(&text(other)?),
    }
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T, StoreError> {
    text.parse()
        .map_err(|_| strange(&format!("{text:?} where a number belongs")))
}

/// A position as it is written in keys.
pub(super) fn position_text(position: Position) -> String {
    format!("{}-{}", position.generation, position.sequence)
}

/// The other way.
pub(super) fn position(text: &str) -> Result<Position, StoreError> {
    let (generation, sequence) = text
        .split_once('-')
        .ok_or_else(|| strange("an impossible position"))?;
    Ok(Position {
        generation: parse(generation)?,
        sequence: parse(sequence)?,
    })
}

/// How functions name the way an entry ends, and its reason code.
pub(super) fn reason_letter(reason: EndReason) -> (&'static str, String) {
    match reason {
        EndReason::Delivered => ("d", String::new()),
        EndReason::Rejected(code) => ("r", code.to_string()),
        EndReason::Expired => ("x", String::new()),
        EndReason::Replaced => ("p", String::new()),
        EndReason::Dropped => ("o", String::new()),
        EndReason::TooLarge => ("l", String::new()),
        EndReason::SessionEnded => ("s", String::new()),
        EndReason::Cancelled => ("c", String::new()),
    }
}

fn reason(letter: &str) -> Result<EndReason, StoreError> {
    Ok(match letter {
        "d" => EndReason::Delivered,
        "r" => EndReason::Rejected(0),
        "x" => EndReason::Expired,
        "p" => EndReason::Replaced,
        "o" => EndReason::Dropped,
        "l" => EndReason::TooLarge,
        "s" => EndReason::SessionEnded,
        "c" => EndReason::Cancelled,
        _ => return Err(strange("an end of an unknown kind")),
    })
}

/// What ended by the way, and which pushes these were.
#[derive(Debug, Default)]
pub(super) struct Ended {
    pub(super) reasons: Vec<EndReason>,
    pub(super) pushes: Vec<MessageId>,
}

/// Reads pairs of how it ended and the message id of a push.
pub(super) fn ended(value: Value) -> Result<Ended, StoreError> {
    let mut ended = Ended::default();
    let mut parts = array(value)?.into_iter();
    while let (Some(letter), Some(id)) = (parts.next(), parts.next()) {
        ended.reasons.push(reason(&text(letter)?)?);
        let id = text(id)?;
        if !id.is_empty() {
            ended.pushes.push(message_id(&id)?);
        }
    }
    Ok(ended)
}

fn message_id(text: &str) -> Result<MessageId, StoreError> {
    MessageId::parse(text).map_err(|_| strange("an impossible message id"))
}

fn step(state: ReceiptState, at_ms: u64) -> ReceiptStep {
    ReceiptStep {
        state,
        at_ms,
        node: None,
        reason_code: None,
    }
}

/// A receipt of a push to `client` with its fingerprint; `None` where nothing is known.
pub(super) fn receipt(
    client: &ClientId,
    id: &MessageId,
    value: Value,
) -> Result<Option<(Option<u64>, Receipt)>, StoreError> {
    let parts = array(value)?;
    if parts.is_empty() {
        return Ok(None);
    }
    let parts: [Value; 8] = parts.try_into().map_err(|_| strange("half a receipt"))?;
    let mut texts: [String; 8] = Default::default();
    for (to, from) in texts.iter_mut().zip(parts) {
        *to = text(from)?;
    }
    let [fingerprint, accepted, sent, epoch, node, how, at, code] = texts;
    let optional = |text: &str| (!text.is_empty()).then(|| parse::<u64>(text)).transpose();
    let mut timeline = vec![step(ReceiptState::Accepted, parse(&accepted)?)];
    if let Some(sent_at) = optional(&sent)? {
        let node = optional(&epoch)?.map(|epoch| (NodeId::from_text(&node), Epoch(epoch)));
        timeline.push(ReceiptStep {
            node,
            ..step(ReceiptState::Sent, sent_at)
        });
    }
    if let Some(at) = optional(&at)? {
        let reason = reason(&how)?;
        let by_device = matches!(
            reason,
            EndReason::Delivered | EndReason::Rejected(_) | EndReason::TooLarge
        );
        let node = timeline
            .last()
            .and_then(|last| last.node.clone())
            .filter(|_| by_device);
        let earliest = timeline.last().map_or(0, |last| last.at_ms);
        timeline.push(ReceiptStep {
            node,
            reason_code: (!code.is_empty()).then(|| parse(&code)).transpose()?,
            ..step(final_state(reason), at.max(earliest))
        });
    }
    let receipt = Receipt {
        id: id.clone(),
        to: Recipient::Client(client.clone()),
        timeline,
    };
    Ok(Some((optional(&fingerprint)?, receipt)))
}

/// The state in which an entry ends.
fn final_state(reason: EndReason) -> ReceiptState {
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
