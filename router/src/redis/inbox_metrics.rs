//! What is counted of inboxes, under the names that the embedded store has for it.

use metrics::{Counter, counter};

use crate::EndReason;

pub(super) struct Metrics {
    pub(super) notes_lost: Counter,
    ends: [(EndReason, Counter); 8],
}

impl Metrics {
    pub(super) fn new() -> Self {
        let end = |reason, name: &'static str| {
            (
                reason,
                counter!("moorline_inbox_ended_total", "reason" => name),
            )
        };
        Self {
            notes_lost: counter!("moorline_store_notes_lost_total"),
            ends: [
                end(EndReason::Delivered, "delivered"),
                end(EndReason::Rejected(0), "rejected"),
                end(EndReason::Expired, "expired"),
                end(EndReason::Replaced, "replaced"),
                end(EndReason::Dropped, "dropped"),
                end(EndReason::TooLarge, "too_large"),
                end(EndReason::SessionEnded, "session_ended"),
                end(EndReason::Cancelled, "cancelled"),
            ],
        }
    }

    /// Counts the end of an entry.
    pub(super) fn ended(&self, reason: EndReason) {
        let same = std::mem::discriminant(&reason);
        let counter = self
            .ends
            .iter()
            .find(|(of, _)| std::mem::discriminant(of) == same);
        if let Some((_, counter)) = counter {
            counter.increment(1);
        }
    }
}
