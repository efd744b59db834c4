//! The writer's side of a batch: changes staged in order, and what has to happen after the commit.
//!
//! Lives on the writer thread alone. What each kind of change does stands in the modules of its
//! seam (`inbox_writes`, `receipts`, `session_store`, `upstream_log`), as methods of [`Transaction`].

use std::sync::Arc;

use super::Shared;
use super::engine::{Engine, Lookup, Staged};
use super::job_table::JobTable;
use super::keys;
use super::receipts::FinalReceipts;
use super::upstream_log::UpstreamLog;
use crate::record::format;
use crate::{ClientId, EndReason, Position, StoreError};

pub(super) struct Transaction {
    pub(super) engine: Arc<Engine>,
    pub(super) shared: Arc<Shared>,
    pub(super) staged: Staged,
    /// Inboxes appended to, with their last position.
    pub(super) appended: Vec<(ClientId, Position)>,
    /// Entries that ended, by reason.
    pub(super) ended: Vec<EndReason>,
    pub(super) receipts: FinalReceipts,
    pub(super) upstream: UpstreamLog,
    pub(super) jobs: JobTable,
    /// Nothing expires before this (Unix milliseconds) that has not been swept.
    pub(super) swept_to_ms: u64,
    epoch_mark: Option<u64>,
    /// Bounded work was left undone; see to it soon.
    pub(super) more_to_do: bool,
}

impl Transaction {
    /// Loads what the writer keeps in memory.
    pub(super) fn load(engine: Arc<Engine>, shared: Arc<Shared>) -> Result<Self, StoreError> {
        let receipts = FinalReceipts::load(&engine)?;
        let upstream = UpstreamLog::load(&engine, &shared)?;
        let jobs = JobTable::load(&engine, &shared)?;
        Ok(Self {
            engine,
            shared,
            staged: Staged::default(),
            appended: Vec::new(),
            ended: Vec::new(),
            receipts,
            upstream,
            jobs,
            swept_to_ms: 0,
            epoch_mark: None,
            more_to_do: false,
        })
    }

    /// A number above all before it, for this batch.
    pub(super) fn next_number(&mut self) -> u64 {
        let (number, mark) = self.shared.epochs.next_in_batch();
        if let Some(mark) = mark {
            self.stage_epoch_mark(mark);
        }
        number
    }

    /// Lets epochs below `mark` be handed out once this batch is durable.
    pub(super) fn stage_epoch_mark(&mut self, mark: u64) {
        if self.epoch_mark.is_none_or(|staged| staged < mark) {
            self.epoch_mark = Some(mark);
            self.staged.put(
                keys::HIGH_WATER.to_vec(),
                format::number(keys::HIGH_WATER, mark),
            );
        }
    }

    /// Takes the staged changes, for the commit.
    pub(super) fn take_staged(&mut self) -> Staged {
        self.jobs.stage_counts(&mut self.staged);
        std::mem::take(&mut self.staged)
    }

    /// Makes known what has become durable.
    pub(super) fn committed(&mut self) {
        for (client, position) in self.appended.drain(..) {
            if let Some(state) = self.shared.inboxes.shard(&client).get_mut(&client) {
                state.committed = position;
            }
        }
        for reason in self.ended.drain(..) {
            self.shared.metrics.inbox_end(reason);
        }
        if let Some(mark) = self.epoch_mark.take() {
            self.shared.epochs.raise(mark);
        }
        self.upstream.committed(&self.shared);
        self.jobs.committed(&self.shared.jobs);
    }

    /// The bounded chores between batches.
    pub(super) fn maintain(&mut self) -> Result<(), StoreError> {
        self.more_to_do = false;
        // Each on its own: a damaged record that stops one of them must not stop the rest.
        [
            self.sweep_expired(),
            self.trim_receipts(),
            self.trim_default_queue(),
            self.save_sent_notes(),
        ]
        .into_iter()
        .collect()
    }
}

impl Lookup for Transaction {
    fn get(&self, key: &[u8]) -> Result<Option<fjall::Slice>, StoreError> {
        self.staged.get(&self.engine, key)
    }
}
