//! What the store counts. Handles are taken once, nothing is looked up per record.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::EndReason;

pub(super) struct Metrics {
    commits: Counter,
    commit_failures: Counter,
    commit_seconds: Histogram,
    records: Counter,
    notes_lost: Counter,
    unavailable: Gauge,
    delivered: Counter,
    rejected: Counter,
    expired: Counter,
    replaced: Counter,
    dropped: Counter,
    too_large: Counter,
    session_ended: Counter,
    cancelled: Counter,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let ended =
            |reason: &'static str| counter!("moorline_inbox_ended_total", "reason" => reason);
        Self {
            commits: counter!("moorline_store_commits_total"),
            commit_failures: counter!("moorline_store_commit_failures_total"),
            commit_seconds: histogram!("moorline_store_commit_seconds"),
            records: counter!("moorline_store_records_total"),
            notes_lost: counter!("moorline_store_notes_lost_total"),
            unavailable: gauge!("moorline_store_unavailable"),
            delivered: ended("delivered"),
            rejected: ended("rejected"),
            expired: ended("expired"),
            replaced: ended("replaced"),
            dropped: ended("dropped"),
            too_large: ended("too_large"),
            session_ended: ended("session_ended"),
            cancelled: ended("cancelled"),
        }
    }

    pub(super) fn commit(&self, took: Duration, records: usize) {
        self.commits.increment(1);
        self.commit_seconds.record(took.as_secs_f64());
        self.records.increment(records as u64);
    }

    pub(super) fn commit_failed(&self) {
        self.commit_failures.increment(1);
    }

    pub(super) fn note_lost(&self) {
        self.notes_lost.increment(1);
    }

    pub(super) fn set_unavailable(&self, unavailable: bool) {
        self.unavailable.set(f64::from(u8::from(unavailable)));
    }

    pub(super) fn inbox_end(&self, reason: EndReason) {
        match reason {
            EndReason::Delivered => &self.delivered,
            EndReason::Rejected(_) => &self.rejected,
            EndReason::Expired => &self.expired,
            EndReason::Replaced => &self.replaced,
            EndReason::Dropped => &self.dropped,
            EndReason::TooLarge => &self.too_large,
            EndReason::SessionEnded => &self.session_ended,
            EndReason::Cancelled => &self.cancelled,
        }
        .increment(1);
    }
}
