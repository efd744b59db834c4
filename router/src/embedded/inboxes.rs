//! Inboxes and receipts as their callers see them. What a write does stands in `inbox_writes`.

use std::collections::HashSet;
use std::ops::Bound;

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};

use super::engine::View;
use super::inbox_table::may_expire;
use super::queue::Kind;
use super::{EmbeddedStore, keys, receipts};
use crate::record::format::{self, SentNote, Stage};
use crate::{
    Append, Appended, ClientId, End, Epoch, Fence, HandedOver, InboxEntry, InboxPage, InboxStatus,
    Inboxes, MessageId, NodeId, Position, Receipt, StoreError, unix_ms,
};

/// Where a read of an inbox stands in relation to what is written meanwhile.
enum Bounds {
    /// The inbox has a state in memory.
    Known {
        /// Everything up to here is in the view.
        committed: Position,
        sent_through: Position,
    },
    /// It has none: the view holds everything there is, and if that is nothing, whatever comes next
    /// has a generation above this one.
    Unknown { generation: u64 },
}

fn append_cost(append: &Append) -> usize {
    let bytes = usize::try_from(format::message_bytes(&append.message)).unwrap_or(usize::MAX);
    bytes.saturating_add(append.client.as_str().len() + 256)
}

/// The entries of a page; see [`Inboxes::read`].
fn read_page(
    view: &View,
    client: &ClientId,
    after: Position,
    limit: usize,
    bytes_max: usize,
    bounds: &Bounds,
) -> Result<InboxPage, StoreError> {
    let sent_through = match bounds {
        Bounds::Known { sent_through, .. } => *sent_through,
        Bounds::Unknown { .. } => stored_sent_through(view, client)?,
    };
    let received = received_positions(view, client, after)?;
    let now = unix_ms();
    let mut page = InboxPage {
        entries: Vec::new(),
        read_to: after,
        more: false,
    };
    let mut bytes = 0;
    let mut last = after;
    let from = Bound::Excluded(keys::entry(keys::ENTRY, client, after));
    for pair in view.range(from, keys::group_end(keys::ENTRY, client.as_str())) {
        if page.entries.len() >= limit.max(1) || (bytes >= bytes_max && !page.entries.is_empty()) {
            page.more = true;
            page.read_to = last;
            return Ok(page);
        }
        let (key, value) = pair?;
        let (_, position) = keys::entry_of(&key)
            .ok_or_else(|| StoreError::Damaged(format!("an impossible key of {client}")))?;
        last = position;
        let message = format::parse_message(&key, &value)?;
        let maybe_sent = position <= sent_through;
        let received = received.contains(&position);
        if message.expires_at_ms.is_some_and(|at| at <= now)
            && may_expire(message.origin, maybe_sent, received)
        {
            continue;
        }
        bytes = bytes.saturating_add(value.len());
        page.entries.push(InboxEntry {
            position,
            maybe_sent,
            received,
            message,
        });
    }
    page.read_to = match bounds {
        Bounds::Known { committed, .. } => last.max(*committed),
        Bounds::Unknown { generation } if last == Position::START => Position {
            generation: *generation,
            sequence: 0,
        },
        Bounds::Unknown { .. } => last,
    };
    Ok(page)
}

fn stored_sent_through(view: &View, client: &ClientId) -> Result<Position, StoreError> {
    use super::engine::Lookup;
    let key = keys::named(keys::SENT, client.as_str());
    match view.get(&key)? {
        Some(value) => Ok(format::parse_sent_note(&key, &value)?.through),
        None => Ok(Position::START),
    }
}

fn received_positions(
    view: &View,
    client: &ClientId,
    after: Position,
) -> Result<HashSet<Position>, StoreError> {
    let from = Bound::Excluded(keys::entry(keys::RECEIVED_ENTRY, client, after));
    let mut received = HashSet::new();
    for pair in view.range(from, keys::group_end(keys::RECEIVED_ENTRY, client.as_str())) {
        received.extend(keys::entry_of(&pair?.0).map(|(_, position)| position));
    }
    Ok(received)
}

impl EmbeddedStore {
    /// A view together with how far it is complete. Both are taken under the lock under which the
    /// writer gives an inbox its first generation: an inbox without a state in memory has nothing
    /// uncommitted, and whatever is appended to it later has a higher generation than
    /// `epochs.last()` of now.
    fn inbox_bounds(&self, client: &ClientId) -> Result<(View, Bounds), StoreError> {
        let engine = self.shared.engine()?;
        let shard = self.shared.inboxes.shard(client);
        let bounds = match shard.get(client) {
            Some(state) => Bounds::Known {
                committed: state.committed,
                sent_through: state.sent_through,
            },
            None => Bounds::Unknown {
                generation: self.shared.epochs.last(),
            },
        };
        Ok((engine.view(), bounds))
    }
}

#[async_trait]
impl Inboxes for EmbeddedStore {
    fn append_behind(
        &self,
        appends: Vec<Append>,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<Vec<Appended>, StoreError>> {
        let mut cost = 0_usize;
        for append in &appends {
            cost = cost.saturating_add(append_cost(append));
            let checked = keys::check_name(append.client.as_str())
                .and_then(|()| format::check_properties(append.message.properties.as_deref()));
            if let Err(error) = checked {
                let refused = Err(error);
                super::tell(fence, &refused);
                return async { refused }.boxed();
            }
        }
        let clients: Vec<_> = appends.iter().map(|append| append.client.clone()).collect();
        let shared = self.shared.clone();
        let stored = self.submit_behind(fence, Kind::Add, cost, move |tx| {
            appends
                .into_iter()
                .map(|append| tx.append(append))
                .collect::<Result<Vec<_>, _>>()
        });
        async move {
            let mut answers = stored.await?;
            for (client, answer) in clients.iter().zip(&mut answers) {
                if let Appended::Stored { route, .. } = answer {
                    *route = shared.routes.look_up(client);
                }
            }
            Ok(answers)
        }
        .boxed()
    }

    async fn read(
        &self,
        client: &ClientId,
        after: Position,
        limit: usize,
        bytes_max: usize,
    ) -> Result<InboxPage, StoreError> {
        let (view, bounds) = self.inbox_bounds(client)?;
        let client = client.clone();
        let read = move || read_page(&view, &client, after, limit, bytes_max, &bounds);
        let task = tokio::task::spawn_blocking(read);
        task.await
            .unwrap_or_else(|error| Err(super::engine::unavailable(error)))
    }

    fn mark_sent(&self, client: &ClientId, position: Position, node: &NodeId, epoch: Epoch) {
        let note = SentNote {
            through: position,
            at_ms: unix_ms(),
            node: node.clone(),
            epoch,
        };
        let mut shard = self.shared.inboxes.shard(client);
        if let Some(state) = shard.get_mut(client).filter(|state| !state.stale) {
            let unsaved = state.note_sent(note);
            drop(shard);
            if unsaved {
                self.shared.inboxes.save_later(client);
            }
            return;
        }
        drop(shard);
        let client = client.clone();
        self.note(move |tx| tx.note_sent(&client, note));
    }

    fn mark_received(
        &self,
        client: &ClientId,
        position: Position,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let client = client.clone();
        let noted = self.submit(Kind::Change, 64, move |tx| {
            tx.note_received(&client, position)
        });
        noted.boxed()
    }

    fn end(&self, ends: Vec<End>) {
        if ends.is_empty() {
            return;
        }
        self.note(move |tx| {
            for End {
                client,
                position,
                reason,
            } in ends
            {
                tx.end(&client, position, reason)?;
            }
            Ok(())
        });
    }

    fn hand_over(
        &self,
        client: &ClientId,
        position: Position,
        to: Option<Append>,
    ) -> BoxFuture<'static, Result<HandedOver, StoreError>> {
        let (client, shared) = (client.clone(), self.shared.clone());
        let target = to.as_ref().map(|append| append.client.clone());
        let cost = to.as_ref().map_or(64, append_cost);
        let moved = self.submit(Kind::Change, cost, move |tx| {
            tx.hand_over(&client, position, to)
        });
        async move {
            let mut answer = moved.await?;
            if let (HandedOver::Moved(Appended::Stored { route, .. }), Some(target)) =
                (&mut answer, &target)
            {
                *route = shared.routes.look_up(target);
            }
            Ok(answer)
        }
        .boxed()
    }

    async fn end_session(
        &self,
        client: &ClientId,
        epoch: Option<Epoch>,
    ) -> Result<u64, StoreError> {
        if let Some(epoch) = epoch {
            self.check_epoch(client, epoch)?;
        }
        let client = client.clone();
        self.submit(Kind::Change, 64, move |tx| tx.end_session(&client))
            .await
    }

    async fn cancel(&self, id: &MessageId) -> Result<Option<Receipt>, StoreError> {
        let id = id.clone();
        self.submit(Kind::Change, 64, move |tx| tx.cancel(&id))
            .await
    }

    async fn status(&self, client: &ClientId) -> Result<InboxStatus, StoreError> {
        let known = {
            let shard = self.shared.inboxes.shard(client);
            shard
                .get(client)
                .filter(|state| !state.stale)
                .map(|state| state.status())
        };
        if let Some(status) = known {
            return Ok(status);
        }
        let client = client.clone();
        self.read(move |view| {
            let group = Bound::Included(keys::group(keys::ENTRY, client.as_str()));
            let mut status = InboxStatus::default();
            for pair in view.range(group, keys::group_end(keys::ENTRY, client.as_str())) {
                let (key, value) = pair?;
                status.entries += 1;
                status.bytes += format::parse_message_head(&key, &value)?.bytes;
            }
            Ok(status)
        })
        .await
    }

    async fn tails(&self, clients: &[ClientId]) -> Result<Vec<Option<Position>>, StoreError> {
        let tail = |client: &ClientId| {
            let shard = self.shared.inboxes.shard(client);
            let state = shard.get(client)?;
            let waits = state.stale || !state.entries.is_empty();
            (waits && state.committed != Position::START).then_some(state.committed)
        };
        Ok(clients.iter().map(tail).collect())
    }

    async fn clients_waiting(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<ClientId>, StoreError> {
        let after = after.cloned();
        self.read(move |view| {
            let mut from = match after {
                Some(after) => keys::group_end(keys::ENTRY, after.as_str()),
                None => vec![keys::ENTRY],
            };
            let end = keys::after_prefix(&[keys::ENTRY]);
            let mut clients = Vec::new();
            while clients.len() < limit {
                let Some(pair) = view.range(Bound::Included(from), end.clone()).next() else {
                    break;
                };
                let (client, _) = keys::entry_of(&pair?.0)
                    .ok_or_else(|| StoreError::Damaged("an impossible entry key".into()))?;
                // One seek a client, however much waits for it.
                from = keys::group_end(keys::ENTRY, client.as_str());
                clients.push(client);
            }
            Ok(clients)
        })
        .await
    }

    async fn receipt(&self, id: &MessageId) -> Result<Option<Receipt>, StoreError> {
        let id = id.clone();
        let shared = self.shared.clone();
        self.read(move |view| {
            let Some(record) = receipts::look_up(view, &id)? else {
                return Ok(None);
            };
            match record.stage {
                Stage::Final(receipt, _) => Ok(Some(receipt)),
                Stage::Waiting(client, position) => {
                    receipts::waiting_receipt(&shared, view, &id, &client, position)
                }
            }
        })
        .await
    }

    async fn record(
        &self,
        receipt: Receipt,
        fingerprint: Option<u64>,
    ) -> Result<Option<Appended>, StoreError> {
        self.submit(Kind::Add, 256, move |tx| tx.record(receipt, fingerprint))
            .await
    }
}
