//! Keys of delayed jobs; the rules are those of [`super::keys`]. Neither a job id nor an event name contains a zero byte.
//!
//! | prefix | key | value |
//! |---|---|---|
//! | `j` | job id | job |
//! | `d` | state at, job id | nothing: the jobs of a state by time; those that wait are claimed from here |
//! | `v` | event name 0 job id | the job's place in the order of jobs and events: the jobs that name the event |
//! | `o` | event name 0 event id | event, while it is remembered |
//! | `a` | event name | when it happened last |
//! | `i` | at, event name 0 event id | nothing: the events by time |
//! | `g` | event name 0 event id | nothing: an event that was not driven to every job |
//! | `y` | device | how many jobs it has that have not ended |
//! | `J` | | counts |

use super::keys::{at, at_of, group, named};
use crate::record::job::state_code;
use crate::{ClientId, EventName, JobId, JobState, MessageId, StoreError};

pub(super) const JOB: u8 = b'j';
pub(super) const DUE: u8 = b'd';
pub(super) const NAMED: u8 = b'v';
pub(super) const EVENT: u8 = b'o';
pub(super) const LATEST: u8 = b'a';
pub(super) const EVENT_AT: u8 = b'i';
pub(super) const UNFINISHED: u8 = b'g';
pub(super) const DEVICE: u8 = b'y';
pub(super) const COUNTS: &[u8] = b"J";

fn damaged(key: &[u8]) -> StoreError {
    StoreError::Damaged(format!("an impossible key {}", key.escape_ascii()))
}

fn text<'k>(key: &[u8], bytes: &'k [u8]) -> Result<&'k str, StoreError> {
    std::str::from_utf8(bytes).map_err(|_| damaged(key))
}

fn id_of(key: &[u8], bytes: &[u8]) -> Result<JobId, StoreError> {
    JobId::parse(text(key, bytes)?).map_err(|_| damaged(key))
}

pub(super) fn job(id: &JobId) -> Vec<u8> {
    named(JOB, id.as_str())
}

/// How many jobs a device has.
pub(super) fn device(device: &ClientId) -> Vec<u8> {
    named(DEVICE, device.as_str())
}

/// Everything of one state.
pub(super) fn state(state: JobState) -> Vec<u8> {
    vec![DUE, state_code(state)]
}

/// The first key of a state at `at_ms`.
pub(super) fn from(state: JobState, at_ms: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(80);
    key.extend_from_slice(&[DUE, state_code(state)]);
    key.extend_from_slice(&at_ms.to_be_bytes());
    key
}

pub(super) fn due(state: JobState, at_ms: u64, id: &JobId) -> Vec<u8> {
    let mut key = from(state, at_ms);
    key.extend_from_slice(id.as_str().as_bytes());
    key
}

/// Time and job in a key that [`due`] made.
pub(super) fn due_of(key: &[u8]) -> Result<(u64, JobId), StoreError> {
    let (at, id) = key
        .get(2..)
        .and_then(|rest| rest.split_first_chunk::<8>())
        .ok_or_else(|| damaged(key))?;
    Ok((u64::from_be_bytes(*at), id_of(key, id)?))
}

pub(super) fn named_by(name: &EventName, id: &JobId) -> Vec<u8> {
    let mut key = group(NAMED, name.as_str());
    key.extend_from_slice(id.as_str().as_bytes());
    key
}

/// The job in a key that [`named_by`] made for `name`.
pub(super) fn named_by_of(name: &EventName, key: &[u8]) -> Result<JobId, StoreError> {
    let id = key.get(name.as_str().len() + 2..).unwrap_or_default();
    id_of(key, id)
}

/// Of one event, under `prefix`.
pub(super) fn event(prefix: u8, name: &EventName, id: &MessageId) -> Vec<u8> {
    let mut key = group(prefix, name.as_str());
    key.extend_from_slice(id.as_str().as_bytes());
    key
}

fn split_event(key: &[u8], rest: &[u8]) -> Result<(EventName, MessageId), StoreError> {
    let (name, id) = text(key, rest)?
        .split_once('\0')
        .ok_or_else(|| damaged(key))?;
    let name = EventName::parse(name).map_err(|_| damaged(key))?;
    Ok((name, MessageId::parse(id).map_err(|_| damaged(key))?))
}

/// Name and id in a key that [`event`] made.
pub(super) fn event_of(key: &[u8]) -> Result<(EventName, MessageId), StoreError> {
    split_event(key, key.get(1..).unwrap_or_default())
}

pub(super) fn event_at(at_ms: u64, name: &EventName, id: &MessageId) -> Vec<u8> {
    let mut key = at(EVENT_AT, at_ms);
    key.extend_from_slice(&event(0, name, id)[1..]);
    key
}

/// Time, name and id in a key that [`event_at`] made.
pub(super) fn event_at_of(key: &[u8]) -> Result<(u64, EventName, MessageId), StoreError> {
    let (at, rest) = at_of(key).ok_or_else(|| damaged(key))?;
    let (name, id) = split_event(key, rest)?;
    Ok((at, name, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_give_back_what_they_were_made_of_and_are_in_the_order_of_time() {
        let name = EventName::parse("é:b:c").unwrap();
        let message = MessageId::parse("m-1").unwrap();
        for text in ["a", "a b", "ü"] {
            let id = JobId::parse(text).unwrap();
            let key = due(JobState::Failed, u64::MAX, &id);
            assert_eq!(due_of(&key).unwrap(), (u64::MAX, id.clone()));
            assert!(key.starts_with(&state(JobState::Failed)));
            assert_eq!(named_by_of(&name, &named_by(&name, &id)).unwrap(), id);
        }
        let key = event(EVENT, &name, &message);
        assert_eq!(event_of(&key).unwrap(), (name.clone(), message.clone()));
        let key = event_at(7, &name, &message);
        assert_eq!(event_at_of(&key).unwrap(), (7, name, message));

        let id = |text| JobId::parse(text).unwrap();
        let keys = [(1, "b"), (2, "a"), (2, "aa"), (2, "b"), (256, "a")]
            .map(|(at, text)| due(JobState::Pending, at, &id(text)));
        assert!(keys.is_sorted());
    }

    #[test]
    fn jobs_of_one_name_never_run_into_those_of_another() {
        let name = |text| EventName::parse(text).unwrap();
        let id = JobId::parse("x").unwrap();
        let (short, long) = (name("a:b"), name("a:b "));
        assert!(!named_by(&long, &id).starts_with(&group(NAMED, short.as_str())));
    }
}
