//! Which clients something waits for, in the order of their ids.
//!
//! An index a shard, for operators: it may name clients for which nothing waits any more, and does not name one for which
//! something waits since less than a second, so that a device that takes its messages at once costs nothing here.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;

use super::inbox_answer as answer;
use super::inboxes::{InboxParts, tail_of};
use super::keys::{SHARDS, shard_of};
use super::script::Call;
use crate::{ClientId, StoreError};

const PAUSE: Duration = Duration::from_secs(1);
/// Of so many it is remembered that they have to be listed; the others are with the next message that finds nothing before it.
const FRESH_MAX: usize = 100_000;
const PAGE_MAX: usize = 1_000;

/// Clients that may have to be listed.
#[derive(Default)]
pub(super) struct Waiting {
    fresh: Mutex<Fresh>,
}

#[derive(Default)]
struct Fresh {
    clients: HashSet<ClientId>,
    /// Whether a task sees to them.
    is_seen_to: bool,
}

impl InboxParts {
    /// Lists a client in a while, if something waits for it then.
    pub(super) fn list_later(self: &Arc<Self>, client: &ClientId) {
        {
            let mut fresh = self.waiting.fresh.lock();
            if fresh.clients.len() < FRESH_MAX {
                fresh.clients.insert(client.clone());
            }
            if std::mem::replace(&mut fresh.is_seen_to, true) {
                return;
            }
        }
        let parts = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PAUSE).await;
                if let Err(error) = parts.list_fresh().await {
                    tracing::debug!(%error, "the index of waiting clients is behind");
                }
                let mut fresh = parts.waiting.fresh.lock();
                if fresh.clients.is_empty() {
                    fresh.is_seen_to = false;
                    return;
                }
            }
        });
    }

    async fn list_fresh(&self) -> Result<(), StoreError> {
        let fresh = std::mem::take(&mut self.waiting.fresh.lock().clients);
        let listed = fresh.into_iter().map(|client| async move {
            let done = self.list(&client).await;
            (client, done)
        });
        let mut outcome = Ok(());
        for (client, done) in join_all(listed).await {
            if done.is_err() {
                self.waiting.fresh.lock().clients.insert(client);
                outcome = done;
            }
        }
        outcome
    }

    /// Lists a client if something waits for it.
    pub(super) async fn list(&self, client: &ClientId) -> Result<(), StoreError> {
        let waits = self.calls.listed(client);
        let waits = self.link.submit(client.as_str(), waits).await?;
        if answer::number(waits)? == 1 {
            let index = self.calls.waiting(shard_of(client));
            let add = Call::command("ZADD", &index).arg(0).arg(client.as_str());
            self.link.submit(client.as_str(), add).await?;
        }
        Ok(())
    }

    /// Nothing waits for a client that is listed.
    pub(super) fn unlist(&self, client: &ClientId) {
        let index = self.calls.waiting(shard_of(client));
        let remove = Call::command("ZREM", &index).arg(client.as_str());
        self.link.note(client.as_str(), remove);
    }

    /// See [`crate::Inboxes::clients_waiting`].
    pub(super) async fn clients_waiting(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<ClientId>, StoreError> {
        self.list_fresh().await?;
        let mut after = after.cloned();
        let mut found = Vec::new();
        while found.len() < limit {
            let wanted = (limit - found.len()).min(PAGE_MAX);
            let page = self.listed(after.as_ref(), wanted).await?;
            let tails = page.iter().map(|client| self.calls.tail(client)).collect();
            let tails = self.link.read_all(tails).await;
            let (read, last) = (page.len(), page.last().cloned());
            for (client, tail) in page.into_iter().zip(tails) {
                match tail_of(tail?)? {
                    Some(_) => found.push(client),
                    None => self.unlist(&client),
                }
            }
            if read < wanted {
                break;
            }
            after = last;
        }
        Ok(found)
    }

    /// Clients that are listed, of all shards.
    async fn listed(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<ClientId>, StoreError> {
        let from = after.map_or("-".to_owned(), |after| format!("({after}"));
        let page = |shard| {
            Call::command("ZRANGEBYLEX", &self.calls.waiting(shard))
                .arg(&from)
                .arg("+")
                .arg("LIMIT")
                .arg(0)
                .arg(limit)
        };
        let mut clients = Vec::new();
        for names in self.link.read_all((0..SHARDS).map(page).collect()).await {
            for name in answer::array(names?)? {
                let name = answer::text(name)?;
                let client = ClientId::parse(&name);
                clients.push(client.map_err(|_| answer::strange("an impossible client id"))?);
            }
        }
        clients.sort_unstable();
        clients.truncate(limit);
        Ok(clients)
    }
}
