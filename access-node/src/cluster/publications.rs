//! What is published for the persistent sessions of a shard, while this node holds it.

use std::sync::Arc;

use crate::node::Node;

/// Serves the sessions of `shard` until the shard is given up.
pub(crate) async fn run(_node: &Arc<Node>, _shard: u16) {
    std::future::pending::<()>().await;
}
