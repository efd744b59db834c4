//! Shards: their leases, their sessions, their timers, and whom a node left behind that died.

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};
use redis::Value;

use super::RedisStore;
use super::index::Index;
use super::keys::{SHARDS, shard_of};
use super::registry::Nodes;
use super::reply::parse;
use super::routes::read_route;
use super::script::{Call, Script, script};
use crate::{
    ClientId, Due, DueTimer, Epoch, NodeId, Route, SessionRecord, Shards, StoreError, TimerKind,
    WillTurn,
};

static TIMER_SET: Script = script!("timer_set.lua");
static TIMER_CANCEL: Script = script!("timer_cancel.lua");
static TIMER_DUE: Script = script!("timer_due.lua");
static WILL_TAKE: Script = script!("will_take.lua");

pub(super) static SCRIPTS: &[&Script] = &[&TIMER_SET, &TIMER_CANCEL, &TIMER_DUE, &WILL_TAKE];

/// For how long it is known whose turn a will was: nobody asks so late.
const TURNS_KEPT_MS: u64 = 600_000;

/// A timer as a member of the sorted set.
fn timer(kind: TimerKind, client: &ClientId) -> String {
    let kind = match kind {
        TimerKind::Will => "will",
        TimerKind::SessionExpiry => "session",
    };
    format!("{kind} {client}")
}

fn parse_timer(text: &str) -> Option<(TimerKind, ClientId)> {
    let (kind, client) = text.split_once(' ')?;
    let kind = match kind {
        "will" => TimerKind::Will,
        "session" => TimerKind::SessionExpiry,
        _ => return None,
    };
    Some((kind, ClientId::parse(client).ok()?))
}

impl RedisStore {
    fn timer_keys(&self, shard: u16) -> [String; 2] {
        ["timers", "timer-epochs"].map(|kind| self.keys.shard(shard, kind))
    }

    /// Adds the clients that `group`, a dead node, has left behind, until there are `limit`.
    async fn stranded_by(
        &self,
        nodes: &Nodes,
        shard: u16,
        group: &str,
        limit: usize,
        stranded: &mut Vec<(ClientId, Route)>,
    ) -> Result<(), StoreError> {
        let mut after: Option<ClientId> = None;
        while stranded.len() < limit {
            let page = self
                .index_group(Index::Routes, shard, group, after.as_ref(), PAGE)
                .await?;
            let Some(last) = page.last() else { break };
            after = Some(last.clone());
            let questions = page.iter().map(|client| self.route_question(client));
            let answers = self.link.read_all(questions.collect()).await;
            for (client, answer) in page.into_iter().zip(answers) {
                match read_route(answer?)? {
                    Some(route) if !nodes.is_dead(&route.node) => {
                        // It is elsewhere by now; only its note is not.
                        let node = route.node.as_str();
                        let noted = self.index_put(Index::Routes, &client, Some(route.epoch), node);
                        self.link.note(client.as_str(), noted);
                    }
                    Some(route) if stranded.len() < limit => stranded.push((client, route)),
                    Some(_) => break,
                    None => self.index_tidy(Index::Routes, &client),
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Shards for RedisStore {
    fn count(&self) -> u16 {
        SHARDS
    }

    fn shard_of(&self, client: &ClientId) -> u16 {
        shard_of(client)
    }

    async fn hold(&self, shard: u16, node: &NodeId, lease_ms: u64) -> Result<bool, StoreError> {
        self.registry.hold_shard(shard, node, lease_ms).await
    }

    async fn let_go(&self, shard: u16, node: &NodeId) -> Result<(), StoreError> {
        self.registry.let_shard_go(shard, node).await
    }

    async fn holder(&self, shard: u16) -> Result<Option<NodeId>, StoreError> {
        self.registry.shard_holder(shard).await
    }

    async fn sessions(
        &self,
        shard: u16,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<SessionRecord>, StoreError> {
        let mut found = Vec::new();
        let mut after = after.cloned();
        while found.len() < limit {
            let (from, wanted) = (after.as_ref(), limit - found.len());
            let shards = std::iter::once(shard);
            let page = self
                .index_page(Index::Sessions, shards, from, wanted)
                .await?;
            let Some(last) = page.last() else { break };
            after = Some(last.client.clone());
            let questions = page
                .iter()
                .map(|noted| self.session_question(&noted.client));
            let answers = self.link.read_all(questions.collect()).await;
            for (noted, answer) in page.iter().zip(answers) {
                match self.read_session(&noted.client, answer?)? {
                    Some(session) => found.push(session),
                    None => self.index_tidy(Index::Sessions, &noted.client),
                }
            }
        }
        Ok(found)
    }

    async fn stranded(
        &self,
        shard: u16,
        limit: usize,
    ) -> Result<Vec<(ClientId, Route)>, StoreError> {
        let nodes = self.registry.fresh_nodes().await?;
        let mut stranded = Vec::new();
        for group in self.index_groups(Index::Routes, shard).await? {
            if nodes.is_dead(&NodeId::from_text(&group)) {
                self.stranded_by(&nodes, shard, &group, limit, &mut stranded)
                    .await?;
            }
        }
        Ok(stranded)
    }

    fn set_timer(
        &self,
        client: &ClientId,
        kind: TimerKind,
        epoch: Epoch,
        in_ms: u64,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let set = Call::script(&TIMER_SET, &self.timer_keys(shard_of(client)))
            .arg(timer(kind, client))
            .arg(epoch.0)
            .arg(in_ms);
        let set = self.link.submit(client.as_str(), set);
        async move { set.await.map(|_| ()) }.boxed()
    }

    fn cancel_timer(
        &self,
        client: &ClientId,
        kind: TimerKind,
        epoch: Epoch,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let cancel = Call::script(&TIMER_CANCEL, &self.timer_keys(shard_of(client)))
            .arg(timer(kind, client))
            .arg(epoch.0);
        let cancelled = self.link.submit(client.as_str(), cancel);
        async move { cancelled.await.map(|_| ()) }.boxed()
    }

    async fn due(&self, shard: u16, limit: usize) -> Result<Due, StoreError> {
        let due = Call::script(&TIMER_DUE, &self.timer_keys(shard)).arg(limit);
        let mut answer = parse::<Vec<Value>>(self.link.read(due).await?)?.into_iter();
        let next_in_ms: i64 = parse(answer.next().unwrap_or_default())?;
        let mut timers = Vec::new();
        for timer in answer {
            let (text, epoch, at_ms): (String, u64, u64) = parse(timer)?;
            let (kind, client) = parse_timer(&text)
                .ok_or_else(|| StoreError::Damaged("an impossible timer".into()))?;
            timers.push(DueTimer {
                client,
                kind,
                epoch: Epoch(epoch),
                at_ms,
            });
        }
        Ok(Due {
            timers,
            next_in_ms: u64::try_from(next_in_ms).ok(),
        })
    }

    async fn take_will(
        &self,
        client: &ClientId,
        epoch: Epoch,
        whose: &str,
        turn_ms: u64,
    ) -> Result<WillTurn, StoreError> {
        let take = Call::script(&WILL_TAKE, &[self.will_turns_key(client)])
            .arg(epoch.0)
            .arg(whose)
            .arg(turn_ms)
            .arg(TURNS_KEPT_MS.max(turn_ms));
        let answer: String = parse(self.link.submit(client.as_str(), take).await?)?;
        match answer.as_str() {
            "yours" => Ok(WillTurn::Yours),
            "anothers" => Ok(WillTurn::Anothers),
            _ => Ok(WillTurn::Over),
        }
    }
}

/// Routes looked at in one go.
const PAGE: usize = 1_000;
