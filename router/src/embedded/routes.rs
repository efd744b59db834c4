//! Routes and leases: in memory, because a route dies with the process whose connection it names.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::time::{Duration, Instant};

use ahash::RandomState;
use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::EmbeddedStore;
use super::queue::Kind;
use crate::{
    Claim, ClientId, Epoch, NodeId, NodeRecord, Route, Routes, Standing, StoreError, unix_ms,
};

const SHARDS: usize = 64;

struct Lease {
    node: NodeRecord,
    until: Instant,
}

pub(super) struct RouteTable {
    /// Ordered, so that a list is a merge of the shards. Locked before `leases` where both are.
    shards: Vec<Mutex<BTreeMap<ClientId, Route>>>,
    hasher: RandomState,
    leases: RwLock<HashMap<NodeId, Lease>>,
}

impl RouteTable {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            leases: RwLock::default(),
        }
    }

    fn shard(&self, client: &ClientId) -> MutexGuard<'_, BTreeMap<ClientId, Route>> {
        let hash = self.hasher.hash_one(client.as_str());
        self.shards[usize::try_from(hash % SHARDS as u64).expect("below 64")].lock()
    }

    fn is_alive(&self, node: &NodeId) -> bool {
        let leases = self.leases.read();
        leases
            .get(node)
            .is_some_and(|lease| lease.until > Instant::now())
    }

    /// The valid route of `client`.
    pub(super) fn look_up(&self, client: &ClientId) -> Option<Route> {
        let route = self.shard(client).get(client).cloned()?;
        self.is_alive(&route.node).then_some(route)
    }

    /// Whether there is a route, valid or not: a node may come back to its lease.
    pub(super) fn is_routed(&self, client: &ClientId) -> bool {
        self.shard(client).contains_key(client)
    }

    pub(super) fn newest_epoch(&self, client: &ClientId) -> Option<Epoch> {
        Some(self.shard(client).get(client)?.epoch)
    }

    fn reconcile(&self, node: &NodeId, client: &ClientId, epoch: Epoch) -> Standing {
        let mut shard = self.shard(client);
        match shard.get(client) {
            Some(known) if known.epoch == epoch => Standing::Owned,
            Some(known) if known.epoch > epoch => Standing::Lost {
                current: known.epoch,
            },
            _ => {
                let route = Route {
                    node: node.clone(),
                    epoch,
                    connected_at_ms: unix_ms(),
                };
                shard.insert(client.clone(), route);
                Standing::Restored
            }
        }
    }

    /// Puts `route` in unless a newer one is there; returns the one it replaces.
    fn claim(&self, client: &ClientId, route: Route) -> Result<Option<Route>, StoreError> {
        let mut shard = self.shard(client);
        match shard.get_mut(client) {
            Some(known) if known.epoch > route.epoch => Err(StoreError::Stale {
                current: known.epoch,
            }),
            Some(known) => Ok(Some(std::mem::replace(known, route))),
            None => {
                shard.insert(client.clone(), route);
                Ok(None)
            }
        }
    }

    fn release(&self, client: &ClientId, epoch: Epoch) -> bool {
        let mut shard = self.shard(client);
        let owned = shard.get(client).is_some_and(|route| route.epoch == epoch);
        if owned {
            shard.remove(client);
        }
        owned
    }

    fn list(&self, after: Option<&ClientId>, limit: usize) -> Vec<(ClientId, Route)> {
        let alive: Vec<NodeId> = self.nodes().into_iter().map(|node| node.id).collect();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut listed = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            let valid = shard
                .range::<ClientId, _>((from, Bound::Unbounded))
                .filter(|(_, route)| alive.contains(&route.node));
            listed.extend(
                valid
                    .take(limit)
                    .map(|(client, route)| (client.clone(), route.clone())),
            );
        }
        listed.sort_by(|(one, _), (other, _)| one.cmp(other));
        listed.truncate(limit);
        listed
    }

    fn nodes(&self) -> Vec<NodeRecord> {
        let now = Instant::now();
        let leases = self.leases.read();
        let mut nodes: Vec<_> = leases
            .values()
            .filter(|lease| lease.until > now)
            .map(|lease| lease.node.clone())
            .collect();
        nodes.sort_by(|one, other| one.id.cmp(&other.id));
        nodes
    }

    fn renew(&self, node: NodeRecord, lease_ms: u64) -> bool {
        let until = Instant::now() + Duration::from_millis(lease_ms);
        let mut leases = self.leases.write();
        leases
            .insert(node.id.clone(), Lease { node, until })
            .is_some()
    }

    fn leave(&self, node: &NodeId) {
        self.leases.write().remove(node);
        for shard in &self.shards {
            shard.lock().retain(|_, route| route.node != *node);
        }
    }
}

#[async_trait]
impl Routes for EmbeddedStore {
    async fn claim(&self, client: &ClientId, node: &NodeId) -> Result<Claim, StoreError> {
        self.shared.engine()?;
        loop {
            let epoch = match self.shared.epochs.next() {
                Some(epoch) => Epoch(epoch),
                None => {
                    let reserve = |tx: &mut super::Transaction| {
                        let mark = tx.shared.epochs.next_mark();
                        tx.stage_epoch_mark(mark);
                        Ok(())
                    };
                    self.submit(Kind::Change, 16, reserve).await?;
                    continue;
                }
            };
            let route = Route {
                node: node.clone(),
                epoch,
                connected_at_ms: unix_ms(),
            };
            match self.shared.routes.claim(client, route) {
                Ok(previous) => return Ok(Claim { epoch, previous }),
                // Two claims at once: the one that takes its place later is the newer.
                Err(StoreError::Stale { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn release(&self, client: &ClientId, epoch: Epoch) -> Result<bool, StoreError> {
        Ok(self.shared.routes.release(client, epoch))
    }

    async fn look_up(&self, client: &ClientId) -> Result<Option<Route>, StoreError> {
        Ok(self.shared.routes.look_up(client))
    }

    async fn list(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<(ClientId, Route)>, StoreError> {
        Ok(self.shared.routes.list(after, limit))
    }

    async fn renew(&self, node: NodeRecord, lease_ms: u64) -> Result<bool, StoreError> {
        Ok(self.shared.routes.renew(node, lease_ms))
    }

    async fn reconcile(
        &self,
        node: &NodeId,
        held: &[(ClientId, Epoch)],
    ) -> Result<Vec<Standing>, StoreError> {
        let routes = &self.shared.routes;
        let standing = |(client, epoch): &(ClientId, Epoch)| routes.reconcile(node, client, *epoch);
        Ok(held.iter().map(standing).collect())
    }

    async fn leave(&self, node: &NodeId) -> Result<(), StoreError> {
        self.shared.routes.leave(node);
        Ok(())
    }

    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        Ok(self.shared.routes.nodes())
    }
}
