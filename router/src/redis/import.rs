//! What a migration writes that no seam takes.

use futures_util::future::join_all;

use super::RedisStore;
use super::inbox_answer as answer;
use super::reply::parse;
use super::script::Call;
use crate::{Append, ClientId, InboxEntry, Inboxes as _, Routes as _};
use crate::{Sessions as _, StoreError, unix_ms};

/// What is noted of a migration to this Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Migration {
    /// One began and did not end.
    Running,
    /// One came to its end.
    Done,
}

impl RedisStore {
    fn migration_key(&self) -> String {
        self.keys.global("migration", "state")
    }

    /// The migration that was made to this Redis, if one was.
    pub(crate) async fn migration(&self) -> Result<Option<Migration>, StoreError> {
        let noted = Call::command("GET", &self.migration_key());
        let noted: Option<String> = parse(self.link.read(noted).await?)?;
        Ok(noted.map(|noted| match noted.as_str() {
            "done" => Migration::Done,
            _ => Migration::Running,
        }))
    }

    /// Notes how far a migration is.
    pub(crate) async fn set_migration(&self, migration: Migration) -> Result<(), StoreError> {
        let key = self.migration_key();
        let note = Call::command("SET", &key).arg(match migration {
            Migration::Running => "running",
            Migration::Done => "done",
        });
        self.link.submit(&key, note).await.map(|_| ())
    }

    /// Something that is kept here, if anything is.
    pub(crate) async fn holds(&self) -> Result<Option<&'static str>, StoreError> {
        if !self.clients_waiting(None, 1).await?.is_empty() {
            return Ok(Some("messages that wait for devices"));
        }
        if !self.list(None, 1).await?.is_empty() {
            return Ok(Some("routes of connected devices"));
        }
        if !crate::Sessions::load_all(self).await?.is_empty()
            || !self.load_wills().await?.is_empty()
        {
            return Ok(Some("persistent sessions"));
        }
        if !crate::Retained::load_all(self).await?.is_empty() {
            return Ok(Some("retained messages"));
        }
        if !crate::Bans::load_all(self).await?.is_empty() {
            return Ok(Some("bans"));
        }
        if self.jobs.holds_any().await? {
            return Ok(Some("delayed jobs"));
        }
        Ok(None)
    }

    /// Takes entries of one inbox over, in order and with their positions; says how many were not there yet. `fingerprints`
    /// belong to `entries`.
    pub(crate) async fn import_entries(
        &self,
        client: &ClientId,
        entries: Vec<InboxEntry>,
        fingerprints: Vec<Option<u64>>,
    ) -> Result<u64, StoreError> {
        let parts = &self.inboxes;
        let mut calls = Vec::new();
        for (entry, fingerprint) in entries.into_iter().zip(fingerprints) {
            let append = Append {
                client: client.clone(),
                message: entry.message,
                fingerprint,
            };
            if append.message.origin == crate::Origin::Push {
                let point = parts.calls.point(&append, unix_ms(), false);
                calls.push((false, self.link.submit(client.as_str(), point)));
            }
            let import =
                parts
                    .calls
                    .import(&append, entry.position, entry.maybe_sent, entry.received);
            calls.push((true, self.link.submit(client.as_str(), import)));
        }
        let (counts, calls): (Vec<_>, Vec<_>) = calls.into_iter().unzip();
        let mut taken = 0;
        for (counts, answered) in counts.into_iter().zip(join_all(calls).await) {
            let answered = answered?;
            if counts {
                taken += answer::number(answered)?;
            }
        }
        parts.list(client).await?;
        Ok(taken)
    }
}
