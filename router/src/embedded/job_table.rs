//! What is kept in memory of delayed jobs: how many there are, and from where on there is something to look at. Nothing is kept
//! for one job.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::engine::{Engine, Lookup, Staged};
use super::{Shared, job_keys};
use crate::record::job as record;
use crate::{JobCounts, JobState, StoreError};

/// What callers share with the writer.
pub(super) struct JobsShared {
    counts: Mutex<JobCounts>,
    /// Changes when something may be due earlier than was said.
    earlier: watch::Sender<u64>,
    /// Claims up to this token were made by an earlier run of the process, which carries nothing out any more.
    pub(super) earlier_run: u64,
}

impl JobsShared {
    pub(super) fn new(earlier_run: u64) -> Self {
        Self {
            counts: Mutex::default(),
            earlier: watch::Sender::new(0),
            earlier_run,
        }
    }

    /// How many jobs there are, as far as that is durable.
    pub(super) fn counts(&self) -> JobCounts {
        *self.counts.lock()
    }

    pub(super) fn earlier(&self) -> watch::Receiver<u64> {
        self.earlier.subscribe()
    }

    /// Lets whoever claims look again.
    pub(super) fn wake(&self) {
        self.earlier.send_modify(|count| *count += 1);
    }
}

/// Where a scan of an ordered run of keys begins. What was removed is below it, so that a scan does not walk over
/// all of it again.
type Floors = HashMap<Vec<u8>, Vec<u8>>;

/// The writer's part.
pub(super) struct JobTable {
    pub(super) counts: JobCounts,
    pub(super) events: u64,
    saved: (JobCounts, u64),
    floors: Floors,
    /// Up to where the claims of an earlier run were looked at; `None` once all were.
    pub(super) recovered_to: Option<Vec<u8>>,
    /// The earliest time at which something staged in this batch may be claimed.
    earliest_ms: u64,
    /// When there is something to claim, as the last claim was told.
    told_ms: u64,
}

impl JobTable {
    pub(super) fn load(engine: &Engine, shared: &Shared) -> Result<Self, StoreError> {
        let (counts, events) = match engine.get(job_keys::COUNTS)? {
            Some(value) => record::parse_job_counts(job_keys::COUNTS, &value)?,
            None => Default::default(),
        };
        *shared.jobs.counts.lock() = counts;
        // Whoever sleeps does not know what an outage has changed.
        shared.jobs.wake();
        Ok(Self {
            counts,
            events,
            saved: (counts, events),
            floors: Floors::new(),
            recovered_to: Some(job_keys::state(JobState::Firing)),
            earliest_ms: u64::MAX,
            told_ms: u64::MAX,
        })
    }

    /// Where a scan of the keys that begin with `run` begins.
    pub(super) fn floor(&self, run: &[u8]) -> Vec<u8> {
        let floor = self.floors.get(run);
        floor.map_or_else(|| run.to_vec(), Clone::clone)
    }

    /// There is nothing of the run below `key`.
    pub(super) fn raise_floor(&mut self, run: &[u8], key: Vec<u8>) {
        self.floors.insert(run.to_vec(), key);
    }

    /// `key` is new.
    pub(super) fn lower_floor(&mut self, run: &[u8], key: &[u8]) {
        if let Some(floor) = self.floors.get_mut(run)
            && key < floor.as_slice()
        {
            key.clone_into(floor);
        }
    }

    /// Something may be claimed at `at_ms`.
    pub(super) fn due(&mut self, at_ms: u64) {
        self.earliest_ms = self.earliest_ms.min(at_ms);
    }

    /// A claim was told that there is nothing before `next_due_ms`.
    pub(super) fn told(&mut self, next_due_ms: Option<u64>) {
        self.told_ms = next_due_ms.unwrap_or(u64::MAX);
        // What was staged before is part of what it was told.
        self.earliest_ms = u64::MAX;
    }

    /// Stages the counts if they have changed. Done once a batch, however many jobs it changes.
    pub(super) fn stage_counts(&mut self, staged: &mut Staged) {
        let now = (self.counts, self.events);
        if now != self.saved {
            self.saved = now;
            let value = record::job_counts(job_keys::COUNTS, self.counts, self.events);
            staged.put(job_keys::COUNTS.to_vec(), value);
        }
    }

    /// Makes known what has become durable.
    pub(super) fn committed(&mut self, shared: &JobsShared) {
        let mut counts = shared.counts.lock();
        if *counts != self.counts {
            *counts = self.counts;
        }
        drop(counts);
        if self.earliest_ms < self.told_ms {
            self.told_ms = self.earliest_ms;
            shared.wake();
        }
        self.earliest_ms = u64::MAX;
    }
}
