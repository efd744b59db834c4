//! The access nodes of other processes.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use futures_util::future::join_all;
use metrics::{Counter, counter, describe_counter};
use moorline_mqtt::Publish;

use super::directory::Directory;
use super::messages::{
    BansAnswer, BansAsked, DisplaceAnswer, Found, OfClient, SessionsAnswer, SessionsAsked,
    WireTarget,
};
use super::peer::Peer;
use super::{Security, path};
use crate::pubsub::TopicPushes;
use crate::{
    BanTarget, BanView, ClientId, Delivery, DeliveryOutcome, Displaced, Epoch, MessageId, NodeId,
    Nodes, Published, Routes, SessionView, StoreError,
};

/// Clients of one question for sessions.
const SESSIONS_MAX: usize = 1_000;

/// The access nodes of other processes.
pub struct RemoteNodes {
    directory: Directory,
    own: OnceLock<(NodeId, Arc<dyn Nodes>)>,
    pushes: Option<TopicPushes>,
    metrics: Metrics,
}

impl RemoteNodes {
    /// The nodes that the registry of `routes` knows, reached as `security` says.
    pub fn new(routes: Arc<dyn Routes>, security: Security) -> Self {
        Self {
            directory: Directory::new(routes, security),
            own: OnceLock::new(),
            pushes: None,
            metrics: Metrics::new(),
        }
    }

    /// Publishes to topics through `pushes` while there is no node in this process.
    #[must_use]
    pub fn publishing_over(self, pushes: TopicPushes) -> Self {
        Self {
            pushes: Some(pushes),
            ..self
        }
    }

    /// `node` is in this process: what concerns it is a function call from now on, and bans are those of the others.
    pub fn attach(&self, node: NodeId, nodes: Arc<dyn Nodes>) {
        // There is one access node in a process: a second one would be a defect, and is reached as any other.
        let _ = self.own.set((node, nodes));
    }

    fn own(&self, node: &NodeId) -> Option<&Arc<dyn Nodes>> {
        let (id, nodes) = self.own.get()?;
        (id == node).then_some(nodes)
    }

    async fn peer(&self, node: &NodeId) -> Result<Arc<Peer>, StoreError> {
        let peer = self.directory.peer(node).await;
        peer.ok_or_else(|| StoreError::Unavailable(format!("there is no access node {node}")))
    }

    /// Every other node.
    async fn others(&self) -> Result<Vec<Arc<Peer>>, StoreError> {
        let all = self.directory.all().await?.into_iter();
        let others = all.filter(|(node, _)| self.own(node).is_none());
        Ok(others.map(|(_, peer)| peer).collect())
    }

    async fn of_client<A>(
        &self,
        path: &'static str,
        node: &NodeId,
        client: &ClientId,
        by: Epoch,
    ) -> Result<A, StoreError>
    where
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let asked = OfClient {
            node: node.as_str().to_owned(),
            client: client.as_str().to_owned(),
            by: by.0,
        };
        self.peer(node).await?.call(path, asked).await
    }

    async fn deliver_once(&self, node: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        if let Some(own) = self.own(node) {
            return own.deliver(node, deliveries).await;
        }
        match self.directory.peer(node).await {
            Some(peer) => peer.deliver(deliveries).await,
            // It died, and its devices may be elsewhere by now.
            None => vec![DeliveryOutcome::NotHere; deliveries.len()],
        }
    }

    /// Looks for those that were not where they were thought to be, once: what is nowhere waits in its inbox.
    async fn redirect(
        &self,
        node: &NodeId,
        deliveries: Vec<(usize, Delivery)>,
        outcomes: &mut [DeliveryOutcome],
    ) {
        let routes = self.directory.routes();
        let look_ups = deliveries.into_iter().map(|(place, delivery)| async move {
            let route = routes.look_up(&delivery.client).await.ok().flatten()?;
            (route.node != *node).then_some((route.node, place, delivery))
        });
        let mut by_node: HashMap<NodeId, (Vec<usize>, Vec<Delivery>)> = HashMap::new();
        for (node, place, delivery) in join_all(look_ups).await.into_iter().flatten() {
            let (places, deliveries) = by_node.entry(node).or_default();
            places.push(place);
            deliveries.push(delivery);
        }
        for (node, (places, deliveries)) in by_node {
            self.metrics.redirected.increment(places.len() as u64);
            let found = self.deliver_once(&node, deliveries).await;
            for (place, outcome) in places.into_iter().zip(found) {
                outcomes[place] = outcome;
            }
        }
    }
}

#[async_trait]
impl Nodes for RemoteNodes {
    async fn deliver(&self, node: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        let kept = deliveries.clone();
        let mut outcomes = self.deliver_once(node, deliveries).await;
        let elsewhere: Vec<_> = kept
            .into_iter()
            .enumerate()
            .filter(|(place, _)| outcomes.get(*place) == Some(&DeliveryOutcome::NotHere))
            .collect();
        if !elsewhere.is_empty() {
            self.redirect(node, elsewhere, &mut outcomes).await;
        }
        self.metrics.count(&outcomes);
        outcomes
    }

    async fn disconnect(&self, node: &NodeId, client: &ClientId) -> Result<bool, StoreError> {
        if let Some(own) = self.own(node) {
            return own.disconnect(node, client).await;
        }
        let answer = self
            .of_client(path::DISCONNECT, node, client, Epoch(0))
            .await;
        answer.map(|Found { found }| found)
    }

    async fn displace(
        &self,
        node: &NodeId,
        client: &ClientId,
        by: Epoch,
    ) -> Result<Displaced, StoreError> {
        if let Some(own) = self.own(node) {
            return own.displace(node, client, by).await;
        }
        let answer = self.of_client(path::DISPLACE, node, client, by).await;
        answer.map(
            |DisplaceAnswer {
                 found,
                 session_over,
             }| Displaced {
                found,
                session_over,
            },
        )
    }

    async fn session_changed(&self, node: &NodeId, client: &ClientId) -> Result<(), StoreError> {
        if let Some(own) = self.own(node) {
            return own.session_changed(node, client).await;
        }
        let answer = self
            .of_client(path::SESSION_CHANGED, node, client, Epoch(0))
            .await;
        answer.map(|Found { .. }| ())
    }

    async fn bans(
        &self,
        after: Option<&BanTarget>,
        limit: usize,
    ) -> Result<Vec<BanView>, StoreError> {
        let mut all = Vec::new();
        let asked = BansAsked {
            after: after.map(Into::into),
            limit: limit as u64,
        };
        let others = self.others().await?;
        let calls = others
            .iter()
            .map(|peer| peer.call(path::BANS, asked.clone()));
        for BansAnswer { bans } in of_those_in_reach(join_all(calls).await)? {
            // What a later version bans is not shown; it is in force there all the same.
            all.extend(
                bans.into_iter()
                    .filter_map(|ban| BanView::try_from(ban).ok()),
            );
        }
        // One target may be banned by several nodes: by an operator before by themselves, then whichever is longest.
        let ends = |view: &BanView| view.ban.expires_at_ms.unwrap_or(u64::MAX);
        all.sort_by(|a, b| {
            let longest = ends(b).cmp(&ends(a));
            let by = a.ban.target.cmp(&b.ban.target);
            by.then(a.automatic.cmp(&b.automatic)).then(longest)
        });
        all.dedup_by(|later, earlier| later.ban.target == earlier.ban.target);
        all.truncate(limit);
        Ok(all)
    }

    async fn ban_changed(&self, target: &BanTarget) -> Result<bool, StoreError> {
        let others = self.others().await?;
        let calls = others.iter().map(|peer| async {
            let answer = peer.call(path::BAN_CHANGED, WireTarget::from(target)).await;
            answer.map(|Found { found }| found)
        });
        // One that is out of reach has died, or reads the list again within half a minute.
        let found = of_those_in_reach(join_all(calls).await)?;
        Ok(found.contains(&true))
    }

    async fn sessions(
        &self,
        node: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError> {
        if let Some(own) = self.own(node) {
            return own.sessions(node, clients).await;
        }
        let peer = self.peer(node).await?;
        let mut views = Vec::with_capacity(clients.len());
        for clients in clients.chunks(SESSIONS_MAX) {
            let asked = SessionsAsked {
                node: node.as_str().to_owned(),
                clients: clients.iter().map(ClientId::to_string).collect(),
            };
            let SessionsAnswer { mut sessions } = peer.call(path::SESSIONS, asked).await?;
            sessions.resize_with(clients.len(), Default::default);
            views.extend(
                sessions
                    .into_iter()
                    .map(|session| session.view.map(Into::into)),
            );
        }
        Ok(views)
    }

    async fn publish(&self, id: MessageId, publish: Publish) -> Result<Published, StoreError> {
        if let Some((_, own)) = self.own.get() {
            return own.publish(id, publish).await;
        }
        let Some(pushes) = &self.pushes else {
            let why = "this process has no way to publish to topics";
            return Err(StoreError::Unavailable(why.to_owned()));
        };
        pushes.publish(self, id, publish).await?;
        Ok(Published { matched: None })
    }
}

/// The answers of those nodes that gave one; the error only where none did.
fn of_those_in_reach<A>(answers: Vec<Result<A, StoreError>>) -> Result<Vec<A>, StoreError> {
    let mut given = Vec::with_capacity(answers.len());
    let mut failed = None;
    for answer in answers {
        match answer {
            Ok(answer) => given.push(answer),
            Err(error) => {
                tracing::warn!(%error, "a node was passed over");
                failed = Some(error);
            }
        }
    }
    match failed {
        Some(error) if given.is_empty() => Err(error),
        _ => Ok(given),
    }
}

/// What is counted of hints.
struct Metrics {
    sent: Counter,
    behind: Counter,
    not_here: Counter,
    busy: Counter,
    dropped: Counter,
    redirected: Counter,
}

impl Metrics {
    fn new() -> Self {
        describe_counter!(
            "moorline_hints_total",
            "Messages handed to access nodes by what the node made of them"
        );
        describe_counter!(
            "moorline_hints_redirected_total",
            "Messages that a device was not there for and that followed it to another node"
        );
        let hints = |outcome: &'static str| counter!("moorline_hints_total", "outcome" => outcome);
        Self {
            sent: hints("sent"),
            behind: hints("behind"),
            not_here: hints("not_here"),
            busy: hints("busy"),
            dropped: hints("dropped"),
            redirected: counter!("moorline_hints_redirected_total"),
        }
    }

    fn count(&self, outcomes: &[DeliveryOutcome]) {
        for outcome in outcomes {
            match outcome {
                DeliveryOutcome::Sent { .. } => &self.sent,
                DeliveryOutcome::Behind => &self.behind,
                DeliveryOutcome::NotHere => &self.not_here,
                DeliveryOutcome::Busy => &self.busy,
                DeliveryOutcome::Dropped => &self.dropped,
            }
            .increment(1);
        }
    }
}
