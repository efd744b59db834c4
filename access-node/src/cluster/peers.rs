//! Every access node as one seam: what concerns this node is a function call, the rest goes to the others.

use std::sync::Arc;

use async_trait::async_trait;
use moorline_mqtt::Publish;
use moorline_router::{
    BanTarget, BanView, ClientId, Delivery, DeliveryOutcome, Displaced, Epoch, MessageId, NodeId,
    Nodes, Published, SessionView, StoreError,
};

use crate::local_nodes::LocalNodes;
use crate::node::Node;

/// This node and the others.
#[derive(Clone)]
pub(crate) struct Peers(Arc<Node>);

impl Peers {
    pub(crate) fn of(node: &Arc<Node>) -> Self {
        Self(Arc::clone(node))
    }

    fn here(&self) -> LocalNodes {
        LocalNodes(Arc::clone(&self.0))
    }

    /// The others, where there are any and `node` is not this one.
    fn elsewhere(&self, node: &NodeId) -> Option<&dyn Nodes> {
        self.others().filter(|_| *node != self.0.id)
    }

    fn others(&self) -> Option<&dyn Nodes> {
        Some(&*self.0.cluster.as_ref()?.given.peers)
    }
}

#[async_trait]
impl Nodes for Peers {
    async fn deliver(&self, node: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        match self.elsewhere(node) {
            Some(others) => others.deliver(node, deliveries).await,
            None => self.here().deliver(node, deliveries).await,
        }
    }

    async fn disconnect(&self, node: &NodeId, client: &ClientId) -> Result<bool, StoreError> {
        match self.elsewhere(node) {
            Some(others) => others.disconnect(node, client).await,
            None => self.here().disconnect(node, client).await,
        }
    }

    async fn displace(
        &self,
        node: &NodeId,
        client: &ClientId,
        by: Epoch,
    ) -> Result<Displaced, StoreError> {
        match self.elsewhere(node) {
            Some(others) => others.displace(node, client, by).await,
            None => self.here().displace(node, client, by).await,
        }
    }

    async fn session_changed(&self, node: &NodeId, client: &ClientId) -> Result<(), StoreError> {
        match self.elsewhere(node) {
            Some(others) => others.session_changed(node, client).await,
            None => self.here().session_changed(node, client).await,
        }
    }

    /// Bans that nodes gave by themselves are of one node each; an operator's ban is on all of them, and shown once.
    async fn bans(
        &self,
        after: Option<&BanTarget>,
        limit: usize,
    ) -> Result<Vec<BanView>, StoreError> {
        let mut all = self.here().bans(after, limit).await?;
        if let Some(others) = self.others() {
            all.extend(others.bans(after, limit).await?);
            all.sort_by(|one, other| {
                let key = |view: &BanView| (view.automatic, u64::MAX - view.ban.since_ms);
                let targets = one.ban.target.cmp(&other.ban.target);
                targets.then_with(|| key(one).cmp(&key(other)))
            });
            all.dedup_by(|next, kept| next.ban.target == kept.ban.target);
            all.truncate(limit);
        }
        Ok(all)
    }

    async fn ban_changed(&self, target: &BanTarget) -> Result<bool, StoreError> {
        let here = self.here().ban_changed(target).await?;
        let elsewhere = match self.others() {
            Some(others) => others.ban_changed(target).await?,
            None => false,
        };
        Ok(here || elsewhere)
    }

    async fn sessions(
        &self,
        node: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError> {
        match self.elsewhere(node) {
            Some(others) => others.sessions(node, clients).await,
            None => self.here().sessions(node, clients).await,
        }
    }

    async fn publish(&self, id: MessageId, publish: Publish) -> Result<Published, StoreError> {
        // This node is as good as any: what others subscribe to goes on from here.
        self.here().publish(id, publish).await
    }
}
