//! What is published on other nodes, for the connections of this one.
//!
//! The broker takes to the node's queue what the filters of its devices ask for, and somewhat more; which connection gets
//! what is decided here, by the same index as for publications of the node's own devices. Of a persistent session only what it gets
//! at QoS 0 comes this way: the rest comes through its inbox, see [`super::publications`].

use std::sync::Arc;
use std::time::Duration;

use moorline_mqtt::{Publish, TopicFilter};
use moorline_router::pubsub::{Feed, Filters};
use moorline_router::{ClientId, PubSub, Publication, StoreError, unix_ms};
use parking_lot::Mutex;

use super::groups::Groups;
use super::session_changed;
use crate::node::Node;
use crate::outbound::Corked;
use crate::publish::deliver_here;

/// Publications that are handed to sockets together.
const BATCH: usize = 128;
/// How long a change of subscriptions may take to be in force, all over the cluster.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two attempts to reach the holder of a shard, which may be changing hands.
const HOLDER_RETRY: Duration = Duration::from_millis(250);

/// The node's part in what is published on others.
#[derive(Debug)]
pub(crate) struct Exchange {
    filters: Filters,
    /// Until it is served.
    feed: Mutex<Option<Feed>>,
    pub(crate) groups: Groups,
}

impl Exchange {
    pub(crate) fn new(pubsub: &dyn PubSub) -> Self {
        let feed = pubsub.open_node_feed();
        Self {
            filters: feed.filters().clone(),
            feed: Mutex::new(Some(feed)),
            groups: Groups::default(),
        }
    }

    /// A session of this node has a subscription that it did not have before.
    pub(crate) fn added(&self, node: &Node, filter: &TopicFilter) {
        match filter.share() {
            Some(_) => self.groups.changed(node, filter.as_str()),
            None => self.filters.add(filter.as_str()),
        }
    }

    /// A session of this node has it no more.
    pub(crate) fn removed(&self, node: &Node, filter: &str, is_shared: bool) {
        match is_shared {
            true => self.groups.changed(node, filter),
            false => self.filters.remove(filter),
        }
    }
}

/// Resolves when the subscriptions of `client` as they are now are in force, wherever something is published; `saved` is the
/// write of a persistent session.
pub(crate) async fn subscriptions_in_force(
    node: Arc<Node>,
    client: ClientId,
    saved: Option<crate::publish::Durable>,
) -> Result<(), StoreError> {
    let Some(cluster) = &node.cluster else {
        return Ok(());
    };
    let settled = cluster.exchange.filters.settled();
    let joined = cluster.exchange.groups.joined();
    let is_stored = saved.is_some();
    if let Some(saved) = saved {
        saved.await?;
    }
    let all = async {
        if is_stored {
            while let Err(error) = session_changed(&node, &client).await {
                tracing::debug!(%client, %error, "holder of the shard not reached, trying again");
                tokio::time::sleep(HOLDER_RETRY).await;
            }
        }
        if let Some(settled) = settled {
            settled.await;
        }
        joined.await;
    };
    match tokio::time::timeout(SETTLE_TIMEOUT, all).await {
        Ok(()) => Ok(()),
        Err(_) => Err(StoreError::Unavailable(
            "a subscription is not in force all over the cluster yet".to_owned(),
        )),
    }
}

/// Hands out what comes until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    let feed = cluster.exchange.feed.lock().take();
    let Some(mut feed) = feed else { return };
    let mut batch = Vec::with_capacity(BATCH);
    while feed.next_many(&mut batch, BATCH).await > 0 {
        let mut corked = Corked::new();
        for delivery in batch.drain(..) {
            deliver_publication(&node, &delivery.publication, &mut corked);
            delivery.ack.done();
        }
        drop(corked);
        // Devices of this thread come first.
        tokio::task::yield_now().await;
    }
}

fn deliver_publication(node: &Arc<Node>, publication: &Publication, corked: &mut Corked) {
    let Some(publish) = still_valid(publication) else {
        node.metrics.dropped_expired.increment(1);
        return;
    };
    deliver_here(node, &publish, publication.from.as_ref(), corked);
}

/// The PUBLISH with what is left of its time; `None` if that is over.
pub(crate) fn still_valid(publication: &Publication) -> Option<Publish> {
    let mut publish = publication.publish.clone();
    if let Some(properties) = &mut publish.properties
        && let Some(seconds) = properties.message_expiry_interval_s
    {
        let expires_at_ms = publication.published_at_ms + u64::from(seconds) * 1000;
        let left_ms = expires_at_ms.checked_sub(unix_ms())?;
        // Rounded up: a whole second that has begun is still there.
        properties.message_expiry_interval_s = u32::try_from(left_ms.div_ceil(1000)).ok();
        if left_ms == 0 {
            return None;
        }
    }
    Some(publish)
}

#[cfg(test)]
mod tests {
    use moorline_mqtt::{PublishProperties, QoS, TopicName};
    use moorline_router::MessageId;

    use super::*;

    #[test]
    fn a_publication_grows_old_on_its_way() {
        let published = |ago_ms, expiry| Publication {
            id: MessageId::generate(),
            from: None,
            publish: Publish {
                dup: false,
                qos: QoS::AtLeastOnce,
                retain: false,
                topic: TopicName::from_static("a"),
                packet_id: None,
                properties: Some(Box::new(PublishProperties {
                    message_expiry_interval_s: expiry,
                    ..PublishProperties::default()
                })),
                payload: bytes::Bytes::new(),
            },
            published_at_ms: unix_ms() - ago_ms,
        };
        let left = |ago_ms, expiry| {
            let publish = still_valid(&published(ago_ms, expiry))?;
            publish.properties?.message_expiry_interval_s
        };
        assert!(still_valid(&published(1_000_000, None)).is_some());
        assert!(still_valid(&published(10_000, Some(10))).is_none());
        assert_eq!(left(4_500, Some(10)), Some(6));
    }
}
