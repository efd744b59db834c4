//! The node as the services of the same process reach it: the seam [`Nodes`] as function calls.

use std::sync::Arc;

use async_trait::async_trait;
use moorline_mqtt::Publish;
use moorline_router::{
    BanTarget, BanView, ClientId, Delivery, DeliveryOutcome, Displaced, Epoch, MessageId, NodeId,
    Nodes, Published, SessionView, StoreError,
};

use crate::bans;
use crate::close_reason::CloseReason;
use crate::cluster::{connecting, publications};
use crate::node::Node;
use crate::outbound::{Corked, deliver};

/// An access node in this process.
#[derive(Clone)]
pub(crate) struct LocalNodes(pub(crate) Arc<Node>);

#[async_trait]
impl Nodes for LocalNodes {
    async fn deliver(&self, node: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        if *node != self.0.id {
            return vec![DeliveryOutcome::NotHere; deliveries.len()];
        }
        let mut corked = Corked::new();
        deliveries
            .iter()
            .map(|delivery| deliver(&self.0, delivery, &mut corked))
            .collect()
    }

    async fn disconnect(&self, node: &NodeId, client: &ClientId) -> Result<bool, StoreError> {
        if *node != self.0.id {
            return Ok(false);
        }
        let Some(session) = self.0.session(client) else {
            return Ok(false);
        };
        let mut state = session.lock();
        let Some(link) = &mut state.link else {
            return Ok(false);
        };
        link.close(CloseReason::Kicked);
        Ok(true)
    }

    async fn displace(
        &self,
        node: &NodeId,
        client: &ClientId,
        by: Epoch,
    ) -> Result<Displaced, StoreError> {
        if *node != self.0.id {
            return Ok(Displaced::default());
        }
        match &self.0.cluster {
            Some(cluster) => connecting::displace(&self.0, cluster, client, by).await,
            // Whoever displaces a connection of the only node does so in memory.
            None => Ok(Displaced::default()),
        }
    }

    async fn session_changed(&self, node: &NodeId, client: &ClientId) -> Result<(), StoreError> {
        if *node != self.0.id {
            let cause = format!("{node} is not this node");
            return Err(StoreError::Unavailable(cause));
        }
        // The one node of a machine sees every subscription where it is made.
        publications::changed(&self.0, client).await
    }

    async fn bans(
        &self,
        after: Option<&BanTarget>,
        limit: usize,
    ) -> Result<Vec<BanView>, StoreError> {
        Ok(self.0.bans.list(after, limit))
    }

    async fn ban_changed(&self, target: &BanTarget) -> Result<bool, StoreError> {
        bans::changed(&self.0, target).await
    }

    async fn sessions(
        &self,
        node: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError> {
        if *node != self.0.id {
            return Ok(vec![None; clients.len()]);
        }
        let view = |client| {
            let session = self.0.session(client)?;
            let state = session.lock();
            let link = state.link.as_ref()?;
            Some(SessionView {
                epoch: link.epoch,
                address: link
                    .wire
                    .address()
                    .map_or_else(String::new, |a| a.to_string()),
                version: link.version,
                transport: link.transport.label(link.wire.is_encrypted()).to_owned(),
                keep_alive_s: link.keep_alive_s,
                persistent: state.is_persistent(),
                subscriptions: state.subscriptions.len(),
                in_flight: state.in_flight.len(),
            })
        };
        Ok(clients.iter().map(view).collect())
    }

    async fn publish(&self, id: MessageId, publish: Publish) -> Result<Published, StoreError> {
        let routed = {
            let mut corked = Corked::new();
            crate::publish::route(&self.0, &publish, None, Some(id), &mut corked)
        };
        if let Some(durable) = routed.durable {
            durable.await?;
        }
        Ok(Published {
            // Others know of theirs.
            matched: self.0.cluster.is_none().then_some(routed.matched),
        })
    }
}
