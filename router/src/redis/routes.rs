//! Routes.

use async_trait::async_trait;
use futures_util::future::join_all;
use redis::Value;

use super::RedisStore;
use super::index::Index;
use super::keys::SHARDS;
use super::reply::parse;
use super::script::{Call, Script, script};
use crate::{Claim, ClientId, Epoch, NodeId, NodeRecord, Route, Routes, Standing, StoreError};

static CLAIM: Script = script!("claim.lua");
static RELEASE: Script = script!("release.lua");
static RECONCILE: Script = script!("reconcile.lua");

pub(super) static SCRIPTS: &[&Script] = &[&CLAIM, &RELEASE, &RECONCILE];

/// How long the last epoch of a client without a route is kept as a fence: longer than anything can be late.
const FENCE_MS: u64 = 7 * 24 * 3_600 * 1_000;

impl RedisStore {
    pub(super) fn route_key(&self, client: &ClientId) -> String {
        self.keys.client(client, "route")
    }

    /// Asks for a route; the answer is for [`read_route`].
    pub(super) fn route_question(&self, client: &ClientId) -> Call {
        Call::command("HMGET", &self.route_key(client)).arg(&["node", "epoch", "at"])
    }
}

/// A route from `node`, `epoch` and `at` of its hash.
pub(super) fn read_route(answer: Value) -> Result<Option<Route>, StoreError> {
    let (node, epoch, at): (Option<String>, Option<u64>, Option<u64>) = parse(answer)?;
    Ok(node.zip(epoch).map(|(node, epoch)| Route {
        node: NodeId::from_text(&node),
        epoch: Epoch(epoch),
        connected_at_ms: at.unwrap_or(0),
    }))
}

#[async_trait]
impl Routes for RedisStore {
    async fn claim(&self, client: &ClientId, node: &NodeId) -> Result<Claim, StoreError> {
        let name = client.as_str();
        let route = [self.route_key(client)];
        // The index first: nobody finds the client of a node that dies if it is not there.
        let noted = self.index_put(Index::Routes, client, None, node.as_str());
        let noted = self.link.submit(name, noted);
        let claim = Call::script(&CLAIM, &route)
            .arg(node.as_str())
            .arg(self.newest_epoch());
        let claimed = self.link.submit(name, claim);
        noted.await?;
        let mut answer = parse::<Vec<Value>>(claimed.await?)?;
        if answer.is_empty() {
            return Err(StoreError::Damaged("a claim without an epoch".into()));
        }
        let previous = match answer.split_off(1) {
            none if none.is_empty() => None,
            route => read_route(Value::Array(route))?,
        };
        let epoch = Epoch(parse(answer.remove(0))?);
        self.saw_epoch(epoch);
        let noted = self.index_put(Index::Routes, client, Some(epoch), node.as_str());
        self.link.note(name, noted);
        Ok(Claim { epoch, previous })
    }

    async fn release(&self, client: &ClientId, epoch: Epoch) -> Result<bool, StoreError> {
        let release = Call::script(&RELEASE, &[self.route_key(client)])
            .arg(epoch.0)
            .arg(FENCE_MS);
        let released: u8 = parse(self.link.submit(client.as_str(), release).await?)?;
        if released == 1 {
            let removal = self.index_remove(Index::Routes, client, Some(epoch));
            self.link.note(client.as_str(), removal);
        }
        Ok(released == 1)
    }

    async fn look_up(&self, client: &ClientId) -> Result<Option<Route>, StoreError> {
        let route = read_route(self.link.read(self.route_question(client)).await?)?;
        let Some(route) = route else { return Ok(None) };
        let nodes = self.registry.nodes_with(&route.node).await?;
        Ok(nodes.is_alive(&route.node).then_some(route))
    }

    async fn list(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<(ClientId, Route)>, StoreError> {
        let nodes = self.registry.fresh_nodes().await?;
        let mut listed = Vec::new();
        let mut after = after.cloned();
        while listed.len() < limit {
            let from = after.as_ref();
            let mut page = self
                .index_page(Index::Routes, 0..SHARDS, from, limit)
                .await?;
            // Of each group there are so many at least; what is behind them is on the next page.
            page.truncate(limit);
            let Some(last) = page.last() else { break };
            after = Some(last.client.clone());
            let questions = page.iter().map(|noted| self.route_question(&noted.client));
            let answers = self.link.read_all(questions.collect()).await;
            for (noted, answer) in page.into_iter().zip(answers) {
                if let Some(route) = read_route(answer?)?
                    && nodes.is_alive(&route.node)
                    && listed.len() < limit
                {
                    listed.push((noted.client, route));
                }
            }
        }
        Ok(listed)
    }

    async fn renew(&self, node: NodeRecord, lease_ms: u64) -> Result<bool, StoreError> {
        self.registry.renew_lease(&node, lease_ms).await
    }

    async fn reconcile(
        &self,
        node: &NodeId,
        held: &[(ClientId, Epoch)],
    ) -> Result<Vec<Standing>, StoreError> {
        let mut standing = Vec::with_capacity(held.len());
        // At a bounded rate: devices that connect meanwhile do not wait behind all of them.
        for part in held.chunks(1_024) {
            let compared = part.iter().map(|(client, epoch)| {
                let compare = Call::script(&RECONCILE, &[self.route_key(client)])
                    .arg(node.as_str())
                    .arg(epoch.0);
                self.link.submit(client.as_str(), compare)
            });
            for ((client, epoch), answer) in part.iter().zip(join_all(compared).await) {
                let answer: String = parse(answer?)?;
                standing.push(match answer.as_str() {
                    "owned" => Standing::Owned,
                    "restored" => {
                        let noted =
                            self.index_put(Index::Routes, client, Some(*epoch), node.as_str());
                        self.link.note(client.as_str(), noted);
                        Standing::Restored
                    }
                    newer => Standing::Lost {
                        current: Epoch(newer.parse().map_err(|_| {
                            StoreError::Damaged("a route with an impossible epoch".into())
                        })?),
                    },
                });
            }
        }
        Ok(standing)
    }

    async fn leave(&self, node: &NodeId) -> Result<(), StoreError> {
        self.registry.give_lease_up(node).await
    }

    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        Ok(self.registry.fresh_nodes().await?.records())
    }
}
