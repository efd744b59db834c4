//! Keys: one prefix byte a kind of record, integers big-endian, names ended by a zero byte (a client
//! id cannot contain one), so that no prefix runs into another and order of bytes is order of time.
//!
//! | prefix | key | value |
//! |---|---|---|
//! | `e` | client 0 lane generation sequence | inbox entry |
//! | `p` | client 0 lane generation sequence | PUBREC noted for that entry |
//! | `t` | client | how far it was sent |
//! | `x` | expires at, client 0 lane generation sequence | nothing: what expires when |
//! | `m` | message id | where a push waits, or its final receipt |
//! | `f` | ended at, message id | size of a final receipt, in the order of their ends |
//! | `s` `w` | client | session, will |
//! | `q` | client 0 packet id | received QoS 2 publish |
//! | `r` | topic | retained message |
//! | `b` | kind 0 value | ban |
//! | `u` | queue 0 partition generation sequence | upstream message |
//! | `n` | queue | bytes in the queue and its number of partitions |
//! | `c` | consumer | cursor of a named consumer of the default queue |
//! | `l` | at | dead letter |
//! | `k` | message id 0 queue | which dead letter that is |
//! | `h` | | the highest epoch that may have been handed out |
//! | `z` | | written to see whether writing works |
//!
//! Those of delayed jobs (`j` `d` `v` `o` `a` `i` `g` `J`) are in [`super::job_keys`].

use crate::{BanTarget, ClientId, MessageId, Position, QueueName, StoreError};

pub(super) const ENTRY: u8 = b'e';
pub(super) const RECEIVED_ENTRY: u8 = b'p';
pub(super) const SENT: u8 = b't';
pub(super) const EXPIRY: u8 = b'x';
pub(super) const MESSAGE: u8 = b'm';
pub(super) const FINAL: u8 = b'f';
pub(super) const SESSION: u8 = b's';
pub(super) const WILL: u8 = b'w';
pub(super) const RECEIVED: u8 = b'q';
pub(super) const RETAINED: u8 = b'r';
pub(super) const BAN: u8 = b'b';
pub(super) const UPSTREAM: u8 = b'u';
pub(super) const QUEUE: u8 = b'n';
pub(super) const CONSUMER: u8 = b'c';
pub(super) const DEAD_LETTER: u8 = b'l';
pub(super) const DEAD_LETTER_OF: u8 = b'k';
pub(super) const HIGH_WATER: &[u8] = b"h";
pub(super) const PROBE: &[u8] = b"z";

/// The only priority lane so far; in the key from the first format on.
const LANE: u8 = 0;
const POSITION_LEN: usize = 17;

/// Names longer than this do not fit into a key of the store (65,535 bytes in all).
pub(super) const NAME_BYTES_MAX: usize = 65_000;

/// Refuses names that no key can hold.
pub(super) fn check_name(name: &str) -> Result<(), StoreError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(StoreError::Full(format!(
            "names longer than {NAME_BYTES_MAX} bytes cannot be stored"
        )));
    }
    Ok(())
}

pub(super) fn named(prefix: u8, name: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(name.len() + 1 + POSITION_LEN + 1);
    key.push(prefix);
    key.extend_from_slice(name.as_bytes());
    key
}

/// Everything of one name under `prefix`.
pub(super) fn group(prefix: u8, name: &str) -> Vec<u8> {
    let mut key = named(prefix, name);
    key.push(0);
    key
}

/// The first key after [`group`] of the same name.
pub(super) fn group_end(prefix: u8, name: &str) -> Vec<u8> {
    let mut key = named(prefix, name);
    key.push(1);
    key
}

fn push_position(key: &mut Vec<u8>, position: Position) {
    key.push(LANE);
    key.extend_from_slice(&position.generation.to_be_bytes());
    key.extend_from_slice(&position.sequence.to_be_bytes());
}

/// Key of something about one inbox entry.
pub(super) fn entry(prefix: u8, client: &ClientId, position: Position) -> Vec<u8> {
    let mut key = group(prefix, client.as_str());
    push_position(&mut key, position);
    key
}

/// Splits what [`entry`] made, prefix byte excluded.
fn parse_entry(rest: &[u8]) -> Option<(ClientId, Position)> {
    let (name, position) = rest.split_at_checked(rest.len().checked_sub(POSITION_LEN)?)?;
    let name = std::str::from_utf8(name.strip_suffix(&[0])?).ok()?;
    let client = ClientId::parse(name).ok()?;
    let (generation, sequence) = position.get(1..)?.split_first_chunk::<8>()?;
    Some((
        client,
        Position {
            generation: u64::from_be_bytes(*generation),
            sequence: u64::from_be_bytes(sequence.try_into().ok()?),
        },
    ))
}

/// The client and position in an entry key.
pub(super) fn entry_of(key: &[u8]) -> Option<(ClientId, Position)> {
    parse_entry(key.get(1..)?)
}

pub(super) fn expiry(expires_at_ms: u64, client: &ClientId, position: Position) -> Vec<u8> {
    let mut key = at(EXPIRY, expires_at_ms);
    key.extend_from_slice(client.as_str().as_bytes());
    key.push(0);
    push_position(&mut key, position);
    key
}

/// Time, client and position in an expiry key.
pub(super) fn expiry_of(key: &[u8]) -> Option<(u64, ClientId, Position)> {
    let (at, rest) = key.get(1..)?.split_first_chunk::<8>()?;
    let (client, position) = parse_entry(rest)?;
    Some((u64::from_be_bytes(*at), client, position))
}

pub(super) fn message(id: &MessageId) -> Vec<u8> {
    named(MESSAGE, id.as_str())
}

/// A prefix byte and a number.
pub(super) fn at(prefix: u8, number: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(64);
    key.push(prefix);
    key.extend_from_slice(&number.to_be_bytes());
    key
}

/// The number in a key that begins like [`at`], and what follows it.
pub(super) fn at_of(key: &[u8]) -> Option<(u64, &[u8])> {
    let (number, rest) = key.get(1..)?.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*number), rest))
}

pub(super) fn ban(target: &BanTarget) -> Vec<u8> {
    let mut key = group(BAN, target.kind());
    key.extend_from_slice(target.value().as_bytes());
    key
}

pub(super) fn final_receipt(ended_at_ms: u64, id: &MessageId) -> Vec<u8> {
    let mut key = at(FINAL, ended_at_ms);
    key.extend_from_slice(id.as_str().as_bytes());
    key
}

pub(super) fn received(client: &ClientId, packet_id: u16) -> Vec<u8> {
    let mut key = group(RECEIVED, client.as_str());
    key.extend_from_slice(&packet_id.to_be_bytes());
    key
}

/// Everything of one partition.
pub(super) fn partition(queue: &QueueName, partition: u16) -> Vec<u8> {
    let mut key = group(UPSTREAM, queue.as_str());
    key.extend_from_slice(&partition.to_be_bytes());
    key
}

pub(super) fn upstream(queue: &QueueName, number: u16, position: Position) -> Vec<u8> {
    let mut key = partition(queue, number);
    key.extend_from_slice(&position.generation.to_be_bytes());
    key.extend_from_slice(&position.sequence.to_be_bytes());
    key
}

/// The position at the end of an upstream key.
pub(super) fn upstream_position(key: &[u8]) -> Option<Position> {
    let (rest, sequence) = key.split_last_chunk::<8>()?;
    let (_, generation) = rest.split_last_chunk::<8>()?;
    Some(Position {
        generation: u64::from_be_bytes(*generation),
        sequence: u64::from_be_bytes(*sequence),
    })
}

/// Queue and partition of an upstream key.
pub(super) fn upstream_queue(key: &[u8]) -> Option<(QueueName, u16)> {
    let (name, partition) = key
        .get(1..key.len().checked_sub(16)?)?
        .split_last_chunk::<2>()?;
    let name = std::str::from_utf8(name.strip_suffix(&[0])?).ok()?;
    Some((QueueName::new(name), u16::from_be_bytes(*partition)))
}

pub(super) fn dead_letter_of(id: &MessageId, queue: &QueueName) -> Vec<u8> {
    let mut key = group(DEAD_LETTER_OF, id.as_str());
    key.extend_from_slice(queue.as_str().as_bytes());
    key
}

/// The smallest key above everything that begins with `prefix`. No prefix here is all 0xFF.
pub(super) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while end.pop_if(|byte| *byte == u8::MAX).is_some() {}
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(text: &str) -> ClientId {
        ClientId::parse(text).unwrap()
    }

    #[test]
    fn keys_give_back_what_they_were_made_of() {
        let position = Position {
            generation: 5,
            sequence: u64::MAX,
        };
        for id in ["a", "a/b", "é\u{1}", "0"] {
            let id = client(id);
            assert_eq!(
                entry_of(&entry(ENTRY, &id, position)),
                Some((id.clone(), position))
            );
            assert_eq!(
                expiry_of(&expiry(9, &id, position)),
                Some((9, id, position))
            );
        }
        let queue = QueueName::new("orders");
        let key = upstream(&queue, 7, position);
        assert_eq!(upstream_position(&key), Some(position));
        assert_eq!(upstream_queue(&key), Some((queue, 7)));
    }

    #[test]
    fn one_clients_entries_never_run_into_anothers() {
        let positions = [
            Position::START,
            Position {
                generation: u64::MAX,
                sequence: u64::MAX,
            },
        ];
        for (one, other) in [("a", "aa"), ("a", "a\u{1}"), ("a", "a\u{7f}"), ("a", "b")] {
            for position in positions {
                let other = entry(ENTRY, &client(other), position);
                assert!(!other.starts_with(&group(ENTRY, one)), "{one} {other:?}");
                assert!(other >= group_end(ENTRY, one), "{one} {other:?}");
            }
            let own = entry(ENTRY, &client(one), positions[1]);
            assert!(own < group_end(ENTRY, one));
        }
    }

    #[test]
    fn order_of_keys_is_order_of_positions() {
        let id = client("a");
        let positions = [(1, 1), (1, 2), (1, 256), (2, 1), (256, 1)];
        let keys: Vec<_> = positions
            .map(|(generation, sequence)| {
                entry(
                    ENTRY,
                    &id,
                    Position {
                        generation,
                        sequence,
                    },
                )
            })
            .into();
        assert!(keys.is_sorted());
    }

    #[test]
    fn the_end_of_a_prefix_is_above_all_of_it() {
        assert_eq!(after_prefix(b"ab"), b"ac");
        assert_eq!(after_prefix(&[b'a', 0xFF]), b"b");
    }

    #[test]
    fn names_that_no_key_can_hold_are_refused() {
        assert!(check_name(&"x".repeat(NAME_BYTES_MAX)).is_ok());
        assert!(matches!(
            check_name(&"x".repeat(NAME_BYTES_MAX + 1)),
            Err(StoreError::Full(_))
        ));
    }
}
