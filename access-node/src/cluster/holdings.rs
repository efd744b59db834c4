//! Which shards this node holds.
//!
//! Every node computes the same from the list of nodes: shard `i` is that of the node at place `i` modulo their number. Who
//! has it until then gives it up; who dies over it is followed when the lease ends. What a holder does is in
//! [`super::shard`], one task for each shard, which is stopped before the lease can have ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use moorline_router::{NodeId, NodeRecord, NodeState};
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::shard;
use crate::node::{LEASE, LEASE_MS, Node, RENEW_EVERY};

/// How long the store has to answer for all shards; what is not renewed then is tried again the next time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The shards held: until when nobody else can have them.
#[derive(Debug, Default)]
pub(crate) struct Holdings {
    held: Mutex<BTreeMap<u16, Instant>>,
}

impl Holdings {
    /// Whether this node holds `shard` now.
    pub(crate) fn has(&self, shard: u16) -> bool {
        let until = self.held.lock().get(&shard).copied();
        until.is_some_and(|until| until > Instant::now())
    }

    fn all(&self) -> Vec<u16> {
        self.held.lock().keys().copied().collect()
    }

    /// Those whose lease could end before it is looked at again.
    fn ending(&self) -> Vec<u16> {
        let soon = Instant::now() + RENEW_EVERY;
        let held = self.held.lock();
        let ending = held.iter().filter(|(_, until)| **until <= soon);
        ending.map(|(shard, _)| *shard).collect()
    }
}

/// What serves a shard; stopped when it is dropped.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The tasks of the shards held.
struct Serving {
    node: Arc<Node>,
    tasks: BTreeMap<u16, Task>,
}

impl Serving {
    fn begin(&mut self, holdings: &Holdings, shard: u16, until: Instant) {
        holdings.held.lock().insert(shard, until);
        let node = &self.node;
        self.tasks.entry(shard).or_insert_with(|| {
            tracing::debug!(shard, "shard taken");
            Task(tokio::spawn(shard::run(Arc::clone(node), shard)))
        });
    }

    /// Resolves when nothing of it runs any more.
    async fn end(&mut self, holdings: &Holdings, shard: u16) {
        holdings.held.lock().remove(&shard);
        if let Some(mut task) = self.tasks.remove(&shard) {
            task.0.abort();
            // Stopped, or ended by itself.
            let _ = (&mut task.0).await;
            tracing::debug!(shard, "shard given up");
        }
    }
}

/// Which of `count` shards are `node`'s.
fn share_of(node: &NodeId, nodes: &[NodeRecord], count: u16) -> Vec<u16> {
    let ids_of = |wanted: fn(&NodeRecord) -> bool| {
        let ids = nodes.iter().filter(|record| wanted(record));
        let mut ids: Vec<&NodeId> = ids.map(|record| &record.id).collect();
        ids.sort_unstable();
        ids
    };
    let mut ids = ids_of(|record| record.state == NodeState::Up);
    if ids.is_empty() {
        // The last ones to leave go on to the end.
        ids = ids_of(|_| true);
    }
    match ids.iter().position(|id| *id == node) {
        Some(at) => (0..count)
            .filter(|shard| usize::from(*shard) % ids.len() == at)
            .collect(),
        None => Vec::new(),
    }
}

/// Takes, renews and gives up shards until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    let (holdings, shards) = (&cluster.holdings, &cluster.given.shards);
    let mut serving = Serving {
        node: Arc::clone(&node),
        tasks: BTreeMap::new(),
    };
    let id = &node.id;
    let mut every = tokio::time::interval(RENEW_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let nodes = tokio::time::timeout(ANSWER_TIMEOUT, node.stores.routes.nodes()).await;
        if let Ok(Ok(nodes)) = nodes {
            let wanted = share_of(id, &nodes, shards.count());
            for shard in holdings.all() {
                if !wanted.contains(&shard) {
                    serving.end(holdings, shard).await;
                    let given_up = shards.let_go(shard, id);
                    // Who comes next waits for the end of the lease where this does not arrive.
                    let _ = tokio::time::timeout(ANSWER_TIMEOUT, given_up).await;
                }
            }
            let asked = wanted.into_iter().map(|shard| async move {
                // Counted from before the question: the store counts from later on.
                let until = Instant::now() + LEASE;
                let held = shards.hold(shard, id, LEASE_MS);
                (
                    shard,
                    until,
                    tokio::time::timeout(ANSWER_TIMEOUT, held).await,
                )
            });
            for (shard, until, held) in join_all(asked).await {
                match held {
                    Ok(Ok(true)) => serving.begin(holdings, shard, until),
                    Ok(Ok(false)) => serving.end(holdings, shard).await,
                    Ok(Err(_)) | Err(_) => {}
                }
            }
        }
        for shard in holdings.ending() {
            tracing::warn!(shard, "shard not renewed, it is left to others");
            serving.end(holdings, shard).await;
        }
    }
}

/// Gives every shard up, so that others need not wait for the leases to end. Nothing serves them any more.
pub(crate) async fn give_up_all(node: &Node) {
    let Some(cluster) = &node.cluster else { return };
    for shard in cluster.holdings.all() {
        cluster.holdings.held.lock().remove(&shard);
        if let Err(error) = cluster.given.shards.let_go(shard, &node.id).await {
            tracing::debug!(shard, %error, "shard not given up");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, state: NodeState) -> NodeRecord {
        NodeRecord {
            id: NodeId::from_text(name),
            address: String::new(),
            version: String::new(),
            state,
            connections: 0,
            region: String::new(),
            server_reference: String::new(),
        }
    }

    #[test]
    fn every_shard_is_one_nodes_and_a_leaving_one_has_none() {
        let nodes = [
            record("c", NodeState::Up),
            record("a", NodeState::Up),
            record("x", NodeState::Draining),
            record("b", NodeState::Up),
        ];
        let of = |name| share_of(&NodeId::from_text(name), &nodes, 16);
        assert_eq!(of("a"), [0, 3, 6, 9, 12, 15]);
        let mut all: Vec<u16> = ["a", "b", "c", "x"].into_iter().flat_map(of).collect();
        all.sort_unstable();
        assert_eq!(all, (0..16).collect::<Vec<_>>());
        assert!(of("x").is_empty() && of("stranger").is_empty());
        let last = [record("x", NodeState::Draining)];
        assert_eq!(share_of(&NodeId::from_text("x"), &last, 16).len(), 16);
    }
}
