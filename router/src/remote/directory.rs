//! Which access nodes there are, and the connections to them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::peer::Peer;
use super::security::Security;
use crate::{NodeId, NodeRecord, Routes, StoreError};

/// How long the list of nodes is taken for true.
const FRESH: Duration = Duration::from_secs(2);
/// How long a node that is not on the list is taken for dead without asking again.
const UNKNOWN_FRESH: Duration = Duration::from_millis(200);

/// The access nodes by the registry.
pub(super) struct Directory {
    routes: Arc<dyn Routes>,
    security: Security,
    known: parking_lot::RwLock<Arc<Known>>,
    /// One asks the registry, the others wait for the answer.
    asking: Mutex<()>,
}

#[derive(Default)]
struct Known {
    /// When the registry was asked last.
    at: Option<Instant>,
    /// Why it did not answer, if so: the peers are those of the time before.
    failed: Option<StoreError>,
    peers: HashMap<NodeId, Arc<Peer>>,
}

impl Directory {
    pub(super) fn new(routes: Arc<dyn Routes>, security: Security) -> Self {
        Self {
            routes,
            security,
            known: parking_lot::RwLock::default(),
            asking: Mutex::default(),
        }
    }

    pub(super) fn routes(&self) -> &Arc<dyn Routes> {
        &self.routes
    }

    /// `node`, if it is alive. Does not wait where the list is fresh.
    pub(super) async fn peer(&self, node: &NodeId) -> Option<Arc<Peer>> {
        if let Some(peer) = self.known(FRESH).await.peers.get(node) {
            return Some(Arc::clone(peer));
        }
        let known = self.known(UNKNOWN_FRESH).await;
        known.peers.get(node).map(Arc::clone)
    }

    /// Every node that is alive, in the order of their ids.
    ///
    /// # Errors
    /// When the registry cannot be asked: some nodes may not be known.
    pub(super) async fn all(&self) -> Result<Vec<(NodeId, Arc<Peer>)>, StoreError> {
        let known = self.known(UNKNOWN_FRESH).await;
        if let Some(error) = &known.failed {
            return Err(error.clone());
        }
        let peers = known.peers.iter();
        let mut all: Vec<_> = peers
            .map(|(node, peer)| (node.clone(), Arc::clone(peer)))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// The list, asked for again if it is older than `fresh`. Where the registry does not answer, the last list goes
    /// on, and nobody waits for it again for a while.
    async fn known(&self, fresh: Duration) -> Arc<Known> {
        let current = || {
            let known = Arc::clone(&self.known.read());
            let is_fresh = known.at.is_some_and(|at| at.elapsed() < fresh);
            (known, is_fresh)
        };
        if let (known, true) = current() {
            return known;
        }
        let _asking = self.asking.lock().await;
        let (before, is_fresh) = current();
        if is_fresh {
            return before;
        }
        let known = match self.routes.nodes().await {
            Ok(records) => self.renewed(&before, &records),
            Err(error) => Known {
                at: Some(Instant::now()),
                failed: Some(error),
                peers: before.peers.clone(),
            },
        };
        let known = Arc::new(known);
        *self.known.write() = Arc::clone(&known);
        known
    }

    /// Keeps the connections of nodes that are still there.
    fn renewed(&self, before: &Known, records: &[NodeRecord]) -> Known {
        let mut peers = HashMap::with_capacity(records.len());
        for record in records.iter().filter(|record| !record.address.is_empty()) {
            let kept = before.peers.get(&record.id);
            let peer = match kept.filter(|peer| peer.address == record.address) {
                Some(peer) => Arc::clone(peer),
                None => match Peer::new(&record.id, &record.address, &self.security) {
                    Ok(peer) => Arc::new(peer),
                    Err(error) => {
                        tracing::warn!(node = %record.id, %error, "access node cannot be reached");
                        continue;
                    }
                },
            };
            peers.insert(record.id.clone(), peer);
        }
        Known {
            at: Some(Instant::now()),
            failed: None,
            peers,
        }
    }
}
