//! Inboxes and receipts on Redis. What a call does stands in the Lua functions (`lua/inbox*.lua`).
//!
//! Everything about one client is in one slot: its entries as a stream with positions as ids, what counts them, the receipts
//! of its pushes. An append is one call of one function, and says where the client is as well. Beside it lie, in
//! slots of their own, and never more than hints: where the push of a message id went (`m:`), and which clients
//! of a shard something waits for ([`super::inbox_waiting`]).
//!
//! Time to live is by Redis' clock. Entries that are over leave when their inbox is looked at; an inbox that holds nothing
//! but expired pushes is forgotten by Redis itself a week later.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt, join_all};
use redis::Value;

use super::inbox_answer::{self as answer, Ended};
use super::inbox_calls::{ENDS_MAX, InboxCalls};
use super::inbox_hand_over::HandOvers;
use super::inbox_metrics::Metrics;
use super::inbox_waiting::Waiting;
use super::link::Link;
use super::{RedisStore, receipts};
use crate::record::format;
use crate::{
    Append, Appended, ClientId, End, EndReason, Epoch, Fence, HandedOver, InboxEntry, InboxPage,
    InboxStatus, Inboxes, MessageId, NodeId, Origin, Position, Receipt, Route, StoreError, unix_ms,
};

/// What a read that found nothing at all is complete up to: before the first generation, which is a clock in µs.
const NOTHING_YET: Position = Position {
    generation: 1,
    sequence: 0,
};
/// A part of a page, as far as one call goes.
const PART_ENTRIES: usize = 128;
const PART_BYTES: usize = 1 << 20;

/// What everything that sees to inboxes shares.
pub(super) struct InboxParts {
    pub(super) link: Arc<Link>,
    pub(super) calls: InboxCalls,
    pub(super) waiting: Waiting,
    pub(super) hand_overs: HandOvers,
    metrics: Metrics,
}

impl InboxParts {
    pub(super) fn new(link: Arc<Link>, calls: InboxCalls) -> Self {
        Self {
            link,
            calls,
            waiting: Waiting::default(),
            hand_overs: HandOvers::default(),
            metrics: Metrics::new(),
        }
    }

    /// Counts what ended, and lets what pointed to it go in its time. Nobody waits for that.
    pub(super) fn tidy(&self, client: &ClientId, ended: Ended) {
        for reason in ended.reasons {
            self.metrics.ended(reason);
        }
        for id in ended.pushes {
            self.link.note(client.as_str(), self.calls.unpoint(&id));
        }
    }

    /// As [`Self::tidy`]; the client may have nothing left.
    pub(super) fn tidy_emptied(
        &self,
        client: &ClientId,
        ended: Value,
        listed: Value,
    ) -> Result<(), StoreError> {
        self.tidy(client, answer::ended(ended)?);
        if answer::number(listed)? == 1 {
            self.unlist(client);
        }
        Ok(())
    }

    /// Appends one message, at once; the future resolves with what became of it and the route as it is written down.
    pub(super) fn append(
        self: &Arc<Self>,
        append: &Append,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<Appended, StoreError>> {
        let checked = format::check_properties(append.message.properties.as_deref());
        if let Err(error) = checked {
            if let Some(fence) = fence {
                fence.refused(&error);
            }
            return async { Err(error) }.boxed();
        }
        let client = append.client.clone();
        let id = append.message.id.clone();
        let is_push = append.message.origin == Origin::Push;
        let claims = is_push && append.fingerprint.is_some();
        let call = self.calls.append(append);
        let appended = self.link.submit_behind(fence, client.as_str(), call);
        let pointed = is_push.then(|| {
            let call = self.calls.point(append, unix_ms(), claims);
            self.link.submit(client.as_str(), call)
        });
        let parts = self.clone();
        let append = claims.then(|| append.clone());
        async move {
            let appended = parts.read_appended(&client, &id, appended.await?)?;
            let Some(pointed) = pointed else {
                return Ok(appended);
            };
            let before = pointed.await?;
            match append {
                Some(append) => receipts::settle_claim(&parts, &append, appended, before).await,
                None => Ok(appended),
            }
        }
        .boxed()
    }

    fn read_appended(
        self: &Arc<Self>,
        client: &ClientId,
        id: &MessageId,
        value: Value,
    ) -> Result<Appended, StoreError> {
        let mut parts = answer::array(value)?.into_iter();
        let mut next = || parts.next().unwrap_or(Value::Nil);
        let (word, ended) = (answer::text(next())?, answer::ended(next())?);
        self.tidy(client, ended);
        if word == "repeated" {
            let known = answer::receipt(client, id, next())?;
            let (fingerprint, receipt) =
                known.ok_or_else(|| answer::strange("a repetition of nothing"))?;
            return Ok(Appended::Repeated {
                fingerprint: fingerprint.unwrap_or_default(),
                receipt,
            });
        }
        let position = next();
        let (is_first, is_told) = (next() == Value::Int(1), next() == Value::Int(1));
        if is_told {
            // Once, not for each message: what was dropped is counted, and said in receipts.
            tracing::info!(%client, "inbox is full, its overflow policy applies");
        }
        match word.as_str() {
            "full" => return Ok(Appended::Full),
            "dropped" => {
                self.metrics.ended(EndReason::Dropped);
                self.link.note(client.as_str(), self.calls.unpoint(id));
                return Ok(Appended::Dropped);
            }
            "stored" => {}
            _ => return Err(answer::strange("an append in unknown words")),
        }
        if is_first {
            self.list_later(client);
        }
        Ok(Appended::Stored {
            position: answer::position(&answer::text(position)?)?,
            route: route(next())?,
        })
    }

    /// Ends entries of one client, at most [`ENDS_MAX`]. Takes its place at once.
    pub(super) fn end_now(
        self: &Arc<Self>,
        client: &ClientId,
        ends: Vec<End>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let call = self.calls.end(client, &ends);
        let ended = self.link.submit(client.as_str(), call);
        let (parts, client) = (self.clone(), client.clone());
        async move {
            let [ended, listed] = answer::exactly(ended.await?)?;
            parts.tidy_emptied(&client, ended, listed)
        }
        .boxed()
    }

    /// As [`Self::end_now`], with nobody waiting. While Redis is out of reach it is tried again for about a minute: what is
    /// lost here is delivered a second time.
    pub(super) fn end(self: &Arc<Self>, client: ClientId, ends: Vec<End>) {
        let mut ended = self.end_now(&client, ends.clone());
        let parts = self.clone();
        tokio::spawn(async move {
            for pause in 1..=END_TRIES {
                match ended.await {
                    Ok(()) => return,
                    Err(error) if error.is_retryable() => {}
                    Err(error) => {
                        tracing::error!(%client, %error, "a message could not be ended");
                        return;
                    }
                }
                tokio::time::sleep(END_RETRY * pause).await;
                ended = parts.end_now(&client, ends.clone());
            }
            parts.metrics.notes_lost.increment(ends.len() as u64);
        });
    }

    async fn read(
        &self,
        client: &ClientId,
        after: Position,
        limit: usize,
        bytes_max: usize,
    ) -> Result<InboxPage, StoreError> {
        let mut page = InboxPage {
            entries: Vec::new(),
            read_to: after,
            more: true,
        };
        let mut bytes = 0;
        while page.more
            && (page.entries.is_empty() || (page.entries.len() < limit && bytes < bytes_max))
        {
            let entries_left = limit.max(1) - page.entries.len();
            let bytes_left = bytes_max.saturating_sub(bytes).max(1);
            let call = self.calls.read(
                client,
                page.read_to,
                entries_left.min(PART_ENTRIES),
                bytes_left.min(PART_BYTES),
            );
            // In line with this process' own notes, so that what was acknowledged before is not read again.
            let value = self.link.submit(client.as_str(), call).await?;
            let [ended, tail, more, looked_to, entries] = answer::exactly(value)?;
            self.tidy(client, answer::ended(ended)?);
            page.more = answer::number(more)? == 1;
            let looked_to = answer::position(&answer::text(looked_to)?)?;
            page.read_to = page.read_to.max(looked_to);
            for entry in answer::array(entries)? {
                let [position, sent, received, message] = answer::exactly(entry)?;
                let message = answer::bytes(message)?;
                bytes += message.len();
                page.entries.push(InboxEntry {
                    position: answer::position(&answer::text(position)?)?,
                    maybe_sent: answer::number(sent)? == 1,
                    received: answer::number(received)? == 1,
                    message: format::parse_message(client.as_str().as_bytes(), &message)?,
                });
            }
            if !page.more {
                let tail = answer::text(tail)?;
                let tail = match tail.is_empty() {
                    // Whatever comes next begins a generation, before which there is nothing.
                    true => NOTHING_YET,
                    false => answer::position(&tail)?,
                };
                page.read_to = page.read_to.max(tail);
            }
        }
        Ok(page)
    }

    async fn end_session(
        &self,
        client: &ClientId,
        epoch: Option<Epoch>,
    ) -> Result<u64, StoreError> {
        let (mut after, mut up_to) = ("0-0".to_owned(), String::new());
        let mut shared = 0;
        loop {
            let call = self.calls.end_session(client, epoch, &after, &up_to);
            let answered = answer::array(self.link.submit(client.as_str(), call).await?)?;
            let parts: [Value; 5] = match answered.try_into() {
                Ok(parts) => parts,
                Err(mut newer) => {
                    let current = newer.pop().unwrap_or(Value::Nil);
                    let current = Epoch(answer::number(current)?);
                    return Err(StoreError::Stale { current });
                }
            };
            let [ended, listed, found, next, last] = parts;
            self.tidy_emptied(client, ended, listed)?;
            shared += answer::number(found)?;
            (after, up_to) = (answer::text(next)?, answer::text(last)?);
            if after.is_empty() {
                return Ok(shared);
            }
        }
    }
}

/// An end is tried again for about a minute while Redis is out of reach.
const END_TRIES: u32 = 10;
const END_RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// A route as it is written down, valid or not.
fn route(value: Value) -> Result<Option<Route>, StoreError> {
    let [node, epoch, at] = answer::exactly(value)?;
    if node == Value::Nil {
        return Ok(None);
    }
    Ok(Some(Route {
        node: NodeId::from_text(&answer::text(node)?),
        epoch: Epoch(answer::number(epoch)?),
        connected_at_ms: answer::number(at)?,
    }))
}

#[async_trait]
impl Inboxes for RedisStore {
    fn append_behind(
        &self,
        appends: Vec<Append>,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<Vec<Appended>, StoreError>> {
        let calls: Vec<_> = appends
            .iter()
            .map(|append| self.inboxes.append(append, fence))
            .collect();
        let registry = self.registry.clone();
        async move {
            // Every one is waited for, so that an error is never answered while others are still being made.
            let answers = join_all(calls).await;
            let mut appended: Vec<Appended> = answers.into_iter().collect::<Result<_, _>>()?;
            for stored in &mut appended {
                if let Appended::Stored { route, .. } = stored {
                    *route = registry.valid_route(route.take()).await;
                }
            }
            Ok(appended)
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
        self.inboxes.read(client, after, limit, bytes_max).await
    }

    fn mark_sent(&self, client: &ClientId, position: Position, node: &NodeId, epoch: Epoch) {
        let call = self.inboxes.calls.sent(client, position, node, epoch);
        self.inboxes.link.note(client.as_str(), call);
    }

    fn mark_received(
        &self,
        client: &ClientId,
        position: Position,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let call = self.inboxes.calls.received(client, position);
        let noted = self.inboxes.link.submit(client.as_str(), call);
        async move { noted.await.map(|_| ()) }.boxed()
    }

    fn end(&self, ends: Vec<End>) {
        let mut by_client: Vec<(ClientId, Vec<End>)> = Vec::new();
        for end in ends {
            let fits = |(client, ends): &&mut (ClientId, Vec<End>)| {
                *client == end.client && ends.len() < ENDS_MAX
            };
            match by_client.iter_mut().rev().find(fits) {
                Some((_, ends)) => ends.push(end),
                None => by_client.push((end.client.clone(), vec![end])),
            }
        }
        for (client, ends) in by_client {
            self.inboxes.end(client, ends);
        }
    }

    fn hand_over(
        &self,
        client: &ClientId,
        position: Position,
        to: Option<Append>,
    ) -> BoxFuture<'static, Result<HandedOver, StoreError>> {
        self.inboxes.hand_over(client, position, to)
    }

    async fn end_session(
        &self,
        client: &ClientId,
        epoch: Option<Epoch>,
    ) -> Result<u64, StoreError> {
        self.inboxes.end_session(client, epoch).await
    }

    async fn cancel(&self, id: &MessageId) -> Result<Option<Receipt>, StoreError> {
        receipts::cancel(&self.inboxes, id).await
    }

    async fn status(&self, client: &ClientId) -> Result<InboxStatus, StoreError> {
        let call = self.inboxes.calls.status(client);
        let value = self.inboxes.link.submit(client.as_str(), call).await?;
        let [ended, listed, entries, bytes] = answer::exactly(value)?;
        self.inboxes.tidy_emptied(client, ended, listed)?;
        Ok(InboxStatus {
            entries: answer::number(entries)?,
            bytes: answer::number(bytes)?,
        })
    }

    async fn tails(&self, clients: &[ClientId]) -> Result<Vec<Option<Position>>, StoreError> {
        let calls = clients.iter().map(|client| self.inboxes.calls.tail(client));
        let answers = self.inboxes.link.read_all(calls.collect()).await;
        answers.into_iter().map(|value| tail_of(value?)).collect()
    }

    async fn clients_waiting(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<ClientId>, StoreError> {
        self.inboxes.clients_waiting(after, limit).await
    }

    async fn receipt(&self, id: &MessageId) -> Result<Option<Receipt>, StoreError> {
        receipts::look_up(&self.inboxes, id)
            .await
            .map(|known| known.map(|(_, receipt)| receipt))
    }

    async fn record(
        &self,
        receipt: Receipt,
        fingerprint: Option<u64>,
    ) -> Result<Option<Appended>, StoreError> {
        receipts::record(&self.inboxes, receipt, fingerprint).await
    }
}

/// The last position of an inbox in which something waits.
pub(super) fn tail_of(value: Value) -> Result<Option<Position>, StoreError> {
    let [generation, sequence, entries] = answer::exactly(value)?;
    if entries == Value::Nil || answer::number(entries)? == 0 {
        return Ok(None);
    }
    Ok(Some(Position {
        generation: answer::number(generation)?,
        sequence: answer::number(sequence)?,
    }))
}
