//! What devices of this node publish to the topics of devices on other nodes.
//!
//! A message of QoS 1 and 2 is in the inbox already, and what goes from here is the hint; one of QoS 0 is nowhere else, and
//! may be lost as any of QoS 0. Both go through one line with one end, so that they stay in order; what finds the
//! line full is dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use moorline_router::{Delivery, NodeId, Nodes};
use tokio::sync::mpsc;

use super::Peers;
use crate::node::Node;

/// Messages that wait to be handed to other nodes.
const LINE: usize = 8 * 1024;
/// Messages that go together.
const BATCH: usize = 128;
/// How long another node has to take them.
const PATIENCE: Duration = Duration::from_secs(2);

/// A message and, where that is known, the node of its device.
#[derive(Debug)]
pub(crate) struct Forwarded {
    pub(crate) delivery: Delivery,
    pub(crate) node: Option<NodeId>,
}

/// The line.
#[derive(Debug)]
pub(crate) struct Forwarding {
    line: mpsc::Sender<Forwarded>,
    end: parking_lot::Mutex<Option<mpsc::Receiver<Forwarded>>>,
}

impl Default for Forwarding {
    fn default() -> Self {
        let (line, end) = mpsc::channel(LINE);
        let end = parking_lot::Mutex::new(Some(end));
        Self { line, end }
    }
}

impl Forwarding {
    /// Says whether there was room.
    pub(crate) fn send(&self, forwarded: Forwarded) -> bool {
        self.line.try_send(forwarded).is_ok()
    }
}

/// Hands messages over until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    let Some(mut end) = cluster.forwarding.end.lock().take() else {
        return;
    };
    let peers = Peers::of(&node);
    let mut batch = Vec::with_capacity(BATCH);
    while end.recv_many(&mut batch, BATCH).await > 0 {
        let located = batch.drain(..).map(|forwarded| locate(&node, forwarded));
        let mut by_node: BTreeMap<NodeId, Vec<Delivery>> = BTreeMap::new();
        for (to, delivery) in join_all(located).await.into_iter().flatten() {
            by_node.entry(to).or_default().push(delivery);
        }
        let handed = by_node.into_iter().map(|(to, deliveries)| {
            let peers = &peers;
            async move {
                let delivered = peers.deliver(&to, deliveries);
                // A hint that is lost is made up for; a message of QoS 0 may be lost.
                let _ = tokio::time::timeout(PATIENCE, delivered).await;
            }
        });
        join_all(handed).await;
    }
}

async fn locate(node: &Node, forwarded: Forwarded) -> Option<(NodeId, Delivery)> {
    let Forwarded { delivery, node: to } = forwarded;
    if let Some(to) = to {
        return Some((to, delivery));
    }
    let route = node.stores.routes.look_up(&delivery.client).await.ok()??;
    Some((route.node, delivery))
}
