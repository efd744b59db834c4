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

/// What is known of a client that is or was connected.
struct Held {
    route: Route,
    /// The newest connection that wrote the session: older ones note no more received packets.
    owned: Epoch,
}

impl From<Route> for Held {
    fn from(route: Route) -> Self {
        Self {
            route,
            owned: Epoch(0),
        }
    }
}

struct Lease {
    node: NodeRecord,
    until: Instant,
}

pub(super) struct RouteTable {
    /// Ordered, so that a list is a merge of the shards. Locked before `leases` where both are.
    shards: Vec<Mutex<BTreeMap<ClientId, Held>>>,
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

    fn shard(&self, client: &ClientId) -> MutexGuard<'_, BTreeMap<ClientId, Held>> {
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
        let route = self.shard(client).get(client)?.route.clone();
        self.is_alive(&route.node).then_some(route)
    }

    /// Whether there is a route, valid or not: a node may come back to its lease.
    pub(super) fn is_routed(&self, client: &ClientId) -> bool {
        self.shard(client).contains_key(client)
    }

    pub(super) fn newest_epoch(&self, client: &ClientId) -> Option<Epoch> {
        Some(self.shard(client).get(client)?.route.epoch)
    }

    /// The connection `epoch` writes the session.
    pub(super) fn note_owned(&self, client: &ClientId, epoch: Epoch) {
        if let Some(held) = self.shard(client).get_mut(client) {
            held.owned = held.owned.max(epoch);
        }
    }

    /// The newest connection that wrote the session.
    pub(super) fn owned(&self, client: &ClientId) -> Option<Epoch> {
        Some(self.shard(client).get(client)?.owned)
    }

    fn reconcile(&self, node: &NodeId, client: &ClientId, epoch: Epoch) -> Standing {
        let mut shard = self.shard(client);
        match shard.get(client).map(|held| &held.route) {
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
                shard.insert(client.clone(), route.into());
                Standing::Restored
            }
        }
    }

    /// Puts `route` in unless a newer one is there; returns the one it replaces.
    fn claim(&self, client: &ClientId, route: Route) -> Result<Option<Route>, StoreError> {
        let mut shard = self.shard(client);
        match shard.get_mut(client).map(|held| &mut held.route) {
            Some(known) if known.epoch > route.epoch => Err(StoreError::Stale {
                current: known.epoch,
            }),
            Some(known) => Ok(Some(std::mem::replace(known, route))),
            None => {
                shard.insert(client.clone(), route.into());
                Ok(None)
            }
        }
    }

    fn release(&self, client: &ClientId, epoch: Epoch) -> bool {
        let mut shard = self.shard(client);
        let owned = shard
            .get(client)
            .is_some_and(|held| held.route.epoch == epoch);
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
                .filter(|(_, held)| alive.contains(&held.route.node));
            listed.extend(
                valid
                    .take(limit)
                    .map(|(client, held)| (client.clone(), held.route.clone())),
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
            shard.lock().retain(|_, held| held.route.node != *node);
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
