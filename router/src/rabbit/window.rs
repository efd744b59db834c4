//! The messages of a lane: what a call is, and which are out and not confirmed.

use std::collections::VecDeque;

use lapin::message::BasicReturnMessage;
use lapin::types::ShortString;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::publisher::{Publishing, Room};
use crate::{Fence, StoreError};

/// One call.
pub(super) struct Item {
    pub(super) sender: u64,
    pub(super) publishing: Publishing,
    pub(super) fence: Option<Fence>,
    pub(super) answer: oneshot::Sender<Result<(), StoreError>>,
    pub(super) _room: Room,
}

impl Item {
    pub(super) fn finish(self, result: Result<(), StoreError>) {
        if let (Some(fence), Err(error)) = (&self.fence, &result) {
            fence.refused(error);
        }
        // The caller may have gone: the message stands anyway.
        let _ = self.answer.send(result);
    }

    /// Nothing of its sender may go out before this one is confirmed.
    pub(super) fn is_alone(&self) -> bool {
        self.fence
            .as_ref()
            .is_some_and(|fence| !fence.passes_full())
    }

    pub(super) fn check(&self) -> Result<(), StoreError> {
        self.fence.as_ref().map_or(Ok(()), Fence::check)
    }

    /// The queue that it goes to directly.
    pub(super) fn queue(&self) -> Option<&ShortString> {
        let publishing = &self.publishing;
        publishing
            .exchange
            .as_str()
            .is_empty()
            .then_some(&publishing.routing_key)
    }

    pub(super) fn is_what_came_back(&self, returned: &BasicReturnMessage) -> bool {
        let id = returned.properties.message_id();
        id.as_ref().map(ShortString::as_str) == Some(self.publishing.id.as_str())
            && returned.exchange == self.publishing.exchange
            && returned.routing_key == self.publishing.routing_key
    }
}

/// A message that went out.
pub(super) struct Sent {
    pub(super) item: Item,
    pub(super) at: Instant,
}

/// Messages that went out and are not confirmed, in the order in which they went.
#[derive(Default)]
pub(super) struct Window {
    pub(super) slots: VecDeque<Option<Sent>>,
    /// The number of the first slot.
    first: u64,
    pub(super) unconfirmed: usize,
}

impl Window {
    pub(super) fn push(&mut self, item: Item) -> u64 {
        let at = Instant::now();
        self.slots.push_back(Some(Sent { item, at }));
        self.unconfirmed += 1;
        self.first + self.slots.len() as u64 - 1
    }

    pub(super) fn take(&mut self, number: u64) -> Option<Item> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let Sent { item, .. } = self.slots.get_mut(at)?.take()?;
        self.unconfirmed -= 1;
        while matches!(self.slots.front(), Some(None)) {
            self.slots.pop_front();
            self.first += 1;
        }
        Some(item)
    }

    pub(super) fn take_returned(&mut self, returned: &BasicReturnMessage) -> Option<Item> {
        let of_it = |slot: &Option<Sent>| {
            let sent = slot.as_ref();
            sent.is_some_and(|sent| sent.item.is_what_came_back(returned))
        };
        let at = self.slots.iter().position(of_it)? as u64;
        self.take(self.first + at)
    }

    /// Everything unconfirmed, in order.
    pub(super) fn drain(&mut self) -> VecDeque<Item> {
        self.first += self.slots.len() as u64;
        self.unconfirmed = 0;
        let sent = self.slots.drain(..).flatten();
        sent.map(|sent| sent.item).collect()
    }
}
