//! What a migration to other stores reads that no seam tells.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::{EmbeddedStore, job_keys, keys, receipts};
use crate::record::format::Stage;
use crate::record::job::{EventRecord, parse_event};
use crate::{MessageId, QueueName, Receipt, StoreError};

/// A final receipt as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeptReceipt {
    pub(crate) receipt: Receipt,
    pub(crate) fingerprint: Option<u64>,
    /// Where it stands among the others.
    pub(crate) key: Vec<u8>,
}

impl EmbeddedStore {
    /// The fingerprint under which a push was accepted, if it came with one.
    pub(crate) async fn fingerprint(&self, id: &MessageId) -> Result<Option<u64>, StoreError> {
        let id = id.clone();
        self.read(move |view| {
            let record = receipts::look_up(view, &id)?;
            Ok(record.and_then(|record| record.fingerprint))
        })
        .await
    }

    /// Final receipts, the oldest first, from after `after`, at most `limit`.
    pub(crate) async fn final_receipts(
        &self,
        after: Option<Vec<u8>>,
        limit: usize,
    ) -> Result<Vec<KeptReceipt>, StoreError> {
        self.read(move |view| {
            let from = after.map_or(Bound::Included(vec![keys::FINAL]), Bound::Excluded);
            let mut kept = Vec::new();
            for pair in view.range(from, keys::after_prefix(&[keys::FINAL])) {
                if kept.len() == limit {
                    break;
                }
                let (key, _) = pair?;
                let id = keys::at_of(&key).map(|(_, id)| String::from_utf8_lossy(id).into_owned());
                let id = id.and_then(|id| MessageId::parse(&id).ok());
                let id =
                    id.ok_or_else(|| StoreError::Damaged("an impossible receipt key".into()))?;
                if let Some(record) = receipts::look_up(view, &id)?
                    && let Stage::Final(receipt, _) = record.stage
                {
                    kept.push(KeptReceipt {
                        receipt,
                        fingerprint: record.fingerprint,
                        key: key.to_vec(),
                    });
                }
            }
            Ok(kept)
        })
        .await
    }

    /// Events of delayed jobs that are remembered, from after `after`, at most `limit`, each with where it stands.
    pub(crate) async fn job_events(
        &self,
        after: Option<Vec<u8>>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, EventRecord)>, StoreError> {
        self.read(move |view| {
            let all = [job_keys::EVENT];
            let from = after.map_or(Bound::Included(all.to_vec()), Bound::Excluded);
            let mut kept = Vec::new();
            for pair in view.range(from, keys::after_prefix(&all)).take(limit) {
                let (key, value) = pair?;
                let record = parse_event(&key, &value)?;
                kept.push((key.to_vec(), record));
            }
            Ok(kept)
        })
        .await
    }

    /// How many messages wait in each upstream queue, and how many dead letters there are.
    pub(crate) async fn upstream_left(
        &self,
    ) -> Result<(BTreeMap<QueueName, u64>, u64), StoreError> {
        self.read(|view| {
            let mut queues = BTreeMap::new();
            let range = |prefix| {
                let from = Bound::Included(vec![prefix]);
                view.range(from, keys::after_prefix(&[prefix]))
            };
            for pair in range(keys::UPSTREAM) {
                let (queue, _) = keys::upstream_queue(&pair?.0)
                    .ok_or_else(|| StoreError::Damaged("an impossible upstream key".into()))?;
                *queues.entry(queue).or_insert(0) += 1;
            }
            let mut letters = 0;
            for pair in range(keys::DEAD_LETTER) {
                pair?;
                letters += 1;
            }
            Ok((queues, letters))
        })
        .await
    }
}
