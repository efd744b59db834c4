//! Steps from one format of the data directory to the next.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::engine::{Engine, Staged};
use super::keys;
use crate::StoreError;
use crate::record::format::{self, QueueRecord};

/// Brings a store of format `version` to the next one.
pub(super) fn step(engine: &Engine, version: u32) -> Result<(), StoreError> {
    match version {
        0 => count_queue_bytes(engine),
        _ => Err(StoreError::Damaged(format!(
            "no way leads on from format {version}"
        ))),
    }
}

/// Format 0 had no record of how many bytes an upstream queue holds; from format 1 on the limit
/// of a queue goes by that record, without a walk over the queue.
fn count_queue_bytes(engine: &Engine) -> Result<(), StoreError> {
    let mut queues = BTreeMap::new();
    let all = vec![keys::UPSTREAM];
    let end = keys::after_prefix(&all);
    for pair in engine.view().range(Bound::Included(all), end) {
        let (key, value) = pair?;
        let (queue, partition) = keys::upstream_queue(&key)
            .ok_or_else(|| StoreError::Damaged("an impossible upstream key".into()))?;
        let record = queues.entry(queue).or_insert(QueueRecord {
            bytes: 0,
            partitions: 1,
        });
        record.bytes += value.len() as u64;
        record.partitions = record.partitions.max(partition + 1);
    }
    let mut staged = Staged::default();
    for (queue, record) in queues {
        let key = keys::named(keys::QUEUE, queue.as_str());
        let value = format::queue(&key, record);
        staged.put(key, value);
    }
    if staged.is_empty() {
        Ok(())
    } else {
        engine.commit(staged, true)
    }
}
