//! The node's lease, and what follows from an interruption of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use moorline_router::StoreError;

use crate::node::{LEASE, Node, RENEW_EVERY};

/// How long a renewal may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Until the next attempt while the store does not answer.
const RETRY_EVERY: Duration = Duration::from_millis(500);
/// Between two renewals whatever fails.
const PAUSE: Duration = Duration::from_millis(100);

/// Renews the lease until the node stops. It runs where devices are served: a node that is stuck there loses it.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    let mut renewed_at = Instant::now();
    let mut wait = RENEW_EVERY;
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = cluster.link.doubted() => tokio::time::sleep(PAUSE).await,
        }
        let asked_at = Instant::now();
        let renewed = match tokio::time::timeout(ANSWER_TIMEOUT, node.renew_lease()).await {
            Ok(renewed) => renewed,
            Err(_) => Err(StoreError::Unavailable("no answer".to_owned())),
        };
        match renewed {
            Ok(known) => {
                if cluster.link.is_away() {
                    tracing::info!("node lease renewed again");
                }
                let lapsed = renewed_at.elapsed() >= LEASE;
                renewed_at = asked_at;
                let troubled = cluster.link.renewed();
                if !known || lapsed || troubled {
                    cluster.comparison.ask(lapsed);
                }
                wait = RENEW_EVERY;
            }
            Err(error) => {
                if !cluster.link.is_away() {
                    tracing::warn!(%error, "node lease not renewed, no new devices until it is");
                }
                cluster.link.lost();
                wait = RETRY_EVERY;
            }
        }
    }
}
