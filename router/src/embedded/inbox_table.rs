//! What is kept in memory about inboxes: where each one ends, what is in it, how far it was sent.
//!
//! Only for clients that something was appended for since the start; a device that never got a push
//! costs nothing. Entries change on the writer thread alone; anyone may look, and note what was sent.

use std::collections::HashMap;
use std::collections::VecDeque;

use ahash::RandomState;
use parking_lot::{Mutex, MutexGuard};

use crate::record::format::SentNote;
use crate::{ClientId, InboxStatus, Origin, Position};

const SHARDS: usize = 64;
/// Notes say which node sent what when, for receipts; beyond this the oldest is forgotten.
const NOTES_MAX: usize = 64;

/// An entry without its message.
#[derive(Debug, Clone, Copy)]
pub(super) struct EntryMeta {
    pub(super) position: Position,
    pub(super) expires_at_ms: Option<u64>,
    pub(super) bytes: u32,
    pub(super) origin: Origin,
    /// Of a shared subscription: it may still go to another member.
    pub(super) shared: bool,
    pub(super) received: bool,
}

impl EntryMeta {
    /// Whether the entry is past its time, in an inbox that was handed on up to `sent_through`.
    pub(super) fn is_over(&self, sent_through: Position, now_ms: u64) -> bool {
        let sent = self.position <= sent_through;
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
            && may_expire(self.origin, sent, self.received)
    }
}

/// Whether an expiry still means anything: a message whose delivery has begun is seen through
/// ([MQTT-3.3.2-5], [MQTT-4.3.3-7]). A push may have been sent to a session that has ended since, so
/// that only the device's PUBREC is beyond doubt.
pub(super) fn may_expire(origin: Origin, sent: bool, received: bool) -> bool {
    let begun = received || (sent && origin == Origin::Session);
    !begun
}

/// One inbox.
#[derive(Debug)]
pub(super) struct InboxState {
    /// The last position given out, durable or not.
    pub(super) tail: Position,
    /// The last position that is durable; [`Position::START`] before the first.
    pub(super) committed: Position,
    /// In order of position, staged changes included.
    pub(super) entries: VecDeque<EntryMeta>,
    pub(super) bytes: u64,
    pub(super) sent_through: Position,
    /// As of the record on disk.
    pub(super) sent_persisted: Position,
    pub(super) notes: VecDeque<SentNote>,
    /// Whether the client is in [`InboxTable::take_unsaved`].
    unsaved: bool,
    /// A commit failed: `entries` are unknown until read again; positions stay what they were, so
    /// that none is given out twice.
    pub(super) stale: bool,
    /// The overflow policy was applied since the inbox was last empty, which has been told.
    pub(super) overflowing: bool,
}

impl InboxState {
    pub(super) fn new(tail: Position) -> Self {
        Self {
            tail,
            committed: Position::START,
            entries: VecDeque::new(),
            bytes: 0,
            sent_through: Position::START,
            sent_persisted: Position::START,
            notes: VecDeque::new(),
            unsaved: false,
            stale: false,
            overflowing: false,
        }
    }

    pub(super) fn find(&self, position: Position) -> Option<usize> {
        self.entries
            .binary_search_by_key(&position, |entry| entry.position)
            .ok()
    }

    /// Takes an entry out.
    pub(super) fn remove(&mut self, index: usize) -> Option<EntryMeta> {
        let entry = self.entries.remove(index)?;
        self.bytes -= u64::from(entry.bytes);
        match self.entries.front() {
            Some(first) => {
                while self.notes.len() > 1
                    && self
                        .notes
                        .front()
                        .is_some_and(|note| note.through < first.position)
                {
                    self.notes.pop_front();
                }
            }
            None => {
                self.entries = VecDeque::new();
                self.notes = VecDeque::new();
                self.overflowing = false;
            }
        }
        Some(entry)
    }

    /// The note under which `position` was sent first, as far as it is still known.
    pub(super) fn note_of(&self, position: Position) -> Option<&SentNote> {
        self.notes.iter().find(|note| note.through >= position)
    }

    /// Says whether the client has to be queued for saving.
    pub(super) fn note_sent(&mut self, note: SentNote) -> bool {
        if note.through <= self.sent_through {
            return false;
        }
        self.sent_through = note.through;
        if self
            .entries
            .front()
            .is_some_and(|first| first.position <= note.through)
        {
            if self.notes.len() >= NOTES_MAX {
                self.notes.pop_front();
            }
            self.notes.push_back(note);
        }
        !std::mem::replace(&mut self.unsaved, true)
    }

    pub(super) fn status(&self) -> InboxStatus {
        InboxStatus {
            entries: self.entries.len() as u64,
            bytes: self.bytes,
        }
    }
}

type Shard = HashMap<ClientId, InboxState, RandomState>;

pub(super) struct InboxTable {
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
    unsaved: Mutex<Vec<ClientId>>,
}

impl InboxTable {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            unsaved: Mutex::default(),
        }
    }

    /// The part of the table that `client` is in. Held for a map operation only.
    pub(super) fn shard(&self, client: &ClientId) -> MutexGuard<'_, Shard> {
        let hash = self.hasher.hash_one(client.as_str());
        self.shards[usize::try_from(hash % SHARDS as u64).expect("below 64")].lock()
    }

    /// Remembers that the note of `client` is to be saved. Not to be called with a shard held.
    pub(super) fn save_later(&self, client: &ClientId) {
        self.unsaved.lock().push(client.clone());
    }

    /// Clients whose note changed, at most `limit`.
    pub(super) fn take_unsaved(&self, limit: usize) -> Vec<ClientId> {
        let mut unsaved = self.unsaved.lock();
        let rest = unsaved.len().saturating_sub(limit);
        unsaved.split_off(rest)
    }

    /// Marks the note of `client` as looked after.
    pub(super) fn saved(state: &mut InboxState) {
        state.unsaved = false;
    }

    /// A commit failed: entries have to be read again.
    pub(super) fn forget_entries(&self) {
        for shard in &self.shards {
            for state in shard.lock().values_mut() {
                state.stale = true;
                state.entries = VecDeque::new();
                state.bytes = 0;
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Drops states that disk can give back: empty ones, and those for which `keep` is false. Not
    /// to be called between a change and its commit.
    pub(super) fn evict(&self, keep: impl Fn(&ClientId) -> bool) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.retain(|client, state| {
                state.stale || state.unsaved || (!state.entries.is_empty() && keep(client))
            });
            shard.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Epoch, NodeId};

    fn at(sequence: u64) -> Position {
        Position {
            generation: 1,
            sequence,
        }
    }

    fn state(sequences: &[u64]) -> InboxState {
        let mut state = InboxState::new(at(0));
        for sequence in sequences {
            let position = at(*sequence);
            state.entries.push_back(EntryMeta {
                position,
                expires_at_ms: None,
                bytes: 10,
                origin: Origin::Push,
                shared: false,
                received: false,
            });
            state.bytes += 10;
            state.tail = position;
        }
        state
    }

    fn note(sequence: u64, epoch: u64) -> SentNote {
        let node = NodeId::from_text("n");
        SentNote {
            through: at(sequence),
            at_ms: epoch,
            node,
            epoch: Epoch(epoch),
        }
    }

    #[test]
    fn an_entry_is_known_by_the_note_under_which_it_was_first_sent() {
        let mut state = state(&[1, 2, 3]);
        assert!(state.note_sent(note(1, 7)));
        assert!(
            !state.note_sent(note(3, 8)),
            "it is queued for saving already"
        );
        assert!(
            !state.note_sent(note(2, 9)),
            "an older note says nothing new"
        );
        let epoch = |sequence| state.note_of(at(sequence)).map(|note| note.epoch.0);
        assert_eq!(
            [epoch(1), epoch(2), epoch(3), epoch(4)],
            [Some(7), Some(8), Some(8), None]
        );
    }

    #[test]
    fn notes_are_bounded_and_go_with_their_entries() {
        let mut state = state(&(1..=200).collect::<Vec<_>>());
        for sequence in 1..=150 {
            state.note_sent(note(sequence, sequence));
        }
        assert_eq!(state.notes.len(), NOTES_MAX);
        for sequence in 1..=149 {
            let index = state.find(at(sequence)).unwrap();
            state.remove(index);
        }
        assert_eq!(state.notes.len(), 1);
        for sequence in 150..=200 {
            let index = state.find(at(sequence)).unwrap();
            state.remove(index);
        }
        assert_eq!((state.notes.len(), state.bytes), (0, 0));
        assert_eq!(
            state.tail,
            at(200),
            "an empty inbox still knows where it ended"
        );
    }

    #[test]
    fn only_what_disk_can_give_back_is_evicted() {
        let table = InboxTable::new();
        let client = |name: &str| ClientId::parse(name).unwrap();
        let put = |name: &str, state| {
            table.shard(&client(name)).insert(client(name), state);
        };
        put("empty", state(&[]));
        put("offline", state(&[1]));
        put("connected", state(&[1]));
        put(
            "after an outage",
            InboxState {
                stale: true,
                ..state(&[])
            },
        );
        let mut sent = state(&[1]);
        sent.note_sent(note(1, 7));
        put("to be saved", sent);
        table.evict(|name| name.as_str() == "connected");
        let kept = |name: &str| table.shard(&client(name)).contains_key(name);
        assert!(kept("connected") && kept("after an outage") && kept("to be saved"));
        assert!(!kept("empty") && !kept("offline"));
        assert_eq!(table.len(), 3);
    }
}
