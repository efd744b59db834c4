//! Indexes over clients: for each shard, who has something, in order.
//!
//! The truth is in the client's own slot; an index says where to look for it. An entry carries the epoch of the connection
//! that made it, so that what is late changes nothing, and is written before what it stands for: whoever
//! dies in between leaves an entry for nothing, which goes after a while when it is come across.

use redis::Value;

use super::RedisStore;
use super::keys::{SHARDS, shard_of};
use super::reply::parse;
use super::script::{Call, Script, script};
use crate::{ClientId, Epoch, StoreError};

static PUT: Script = script!("index_put.lua");
static REMOVE: Script = script!("index_remove.lua");
static PAGE: Script = script!("index_page.lua");
static GROUPS: Script = script!("index_groups.lua");
static GROUP: Script = script!("index_group.lua");

pub(super) static SCRIPTS: &[&Script] = &[&PUT, &REMOVE, &PAGE, &GROUPS, &GROUP];

/// What is indexed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Index {
    /// Clients with a route, grouped by node.
    Routes,
    /// Clients with a persistent session.
    Sessions,
    /// Clients with a will.
    Wills,
}

/// How long an entry without anything behind it is left alone, in seconds: what it stands for may be on its way.
const ORPHAN_AGE_S: u32 = 60;

/// A client, and the group it is noted under.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Noted {
    pub(super) client: ClientId,
    pub(super) group: String,
}

impl RedisStore {
    fn index_keys(&self, index: Index, shard: u16) -> [String; 2] {
        let (notes, order) = match index {
            Index::Routes => ("routes", "routes-order"),
            Index::Sessions => ("sessions", "sessions-order"),
            Index::Wills => ("wills", "wills-order"),
        };
        [self.keys.shard(shard, notes), self.keys.shard(shard, order)]
    }

    /// Notes a client. Without an epoch the one that is noted stays.
    pub(super) fn index_put(
        &self,
        index: Index,
        client: &ClientId,
        epoch: Option<Epoch>,
        group: &str,
    ) -> Call {
        Call::script(&PUT, &self.index_keys(index, shard_of(client)))
            .arg(client.as_str())
            .arg(epoch.map_or(String::new(), |epoch| epoch.to_string()))
            .arg(group)
    }

    /// Removes a client's note of `epoch` or before; without one, whichever is there.
    pub(super) fn index_remove(
        &self,
        index: Index,
        client: &ClientId,
        epoch: Option<Epoch>,
    ) -> Call {
        self.removal(index, client, epoch, 0)
    }

    /// Removes a note of something that is not there, unless it is new.
    pub(super) fn index_tidy(&self, index: Index, client: &ClientId) {
        let removal = self.removal(index, client, None, ORPHAN_AGE_S);
        self.link.note(client.as_str(), removal);
    }

    fn removal(&self, index: Index, client: &ClientId, epoch: Option<Epoch>, age_s: u32) -> Call {
        Call::script(&REMOVE, &self.index_keys(index, shard_of(client)))
            .arg(client.as_str())
            .arg(epoch.map_or(String::new(), |epoch| epoch.to_string()))
            .arg(age_s)
    }

    /// Clients of the shards from after `after`, at most `limit` of each group of each shard, in order.
    pub(super) async fn index_page(
        &self,
        index: Index,
        shards: impl Iterator<Item = u16>,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<Noted>, StoreError> {
        let page = |shard| {
            let [_, order] = self.index_keys(index, shard);
            Call::script(&PAGE, &[order])
                .arg(after.map_or("", ClientId::as_str))
                .arg(limit.min(100_000))
        };
        let mut all = Vec::new();
        for answer in self.link.read_all(shards.map(page).collect()).await {
            let fields: Vec<String> = parse(answer?)?;
            for pair in fields.chunks_exact(2) {
                let client = read_client(&pair[1])?;
                all.push(Noted {
                    client,
                    group: pair[0].clone(),
                });
            }
        }
        all.sort();
        Ok(all)
    }

    /// The groups that a shard has clients in.
    pub(super) async fn index_groups(
        &self,
        index: Index,
        shard: u16,
    ) -> Result<Vec<String>, StoreError> {
        let [_, order] = self.index_keys(index, shard);
        parse(self.link.read(Call::script(&GROUPS, &[order])).await?)
    }

    /// Clients of one group of a shard from after `after`, in order.
    pub(super) async fn index_group(
        &self,
        index: Index,
        shard: u16,
        group: &str,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<ClientId>, StoreError> {
        let [_, order] = self.index_keys(index, shard);
        let page = Call::script(&GROUP, &[order])
            .arg(group)
            .arg(after.map_or("", ClientId::as_str))
            .arg(limit);
        let clients: Vec<String> = parse(self.link.read(page).await?)?;
        clients.iter().map(|client| read_client(client)).collect()
    }

    /// Every client of an index with what `question` asks for it and `parse` makes of the answer; what is not there is
    /// left out.
    pub(super) async fn index_all<T>(
        &self,
        index: Index,
        question: impl Fn(&ClientId) -> Call,
        parse: impl Fn(&ClientId, Value) -> Result<Option<T>, StoreError>,
    ) -> Result<Vec<T>, StoreError> {
        let mut all: Vec<(ClientId, T)> = Vec::new();
        for shard in 0..SHARDS {
            let mut after = None;
            loop {
                let from = after.as_ref();
                let page = self
                    .index_page(index, std::iter::once(shard), from, PAGE_SIZE)
                    .await?;
                let answers = page.iter().map(|noted| question(&noted.client)).collect();
                let answers = self.link.read_all(answers).await;
                for (noted, answer) in page.iter().zip(answers) {
                    match parse(&noted.client, answer?)? {
                        Some(found) => all.push((noted.client.clone(), found)),
                        None => self.index_tidy(index, &noted.client),
                    }
                }
                match page.last() {
                    Some(last) if page.len() >= PAGE_SIZE => after = Some(last.client.clone()),
                    _ => break,
                }
            }
        }
        all.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(all.into_iter().map(|(_, found)| found).collect())
    }
}

const PAGE_SIZE: usize = 1_000;

fn read_client(text: &str) -> Result<ClientId, StoreError> {
    ClientId::parse(text)
        .map_err(|_| StoreError::Damaged("an index over an impossible client".into()))
}
