//! Keeping the retained messages of this node up to those of all nodes.
//!
//! Every node has all of them in memory, and reads what the others have changed before it serves a new subscription: so
//! what was acknowledged to a publisher anywhere is seen. Many subscriptions share one reading.
//!
//! What this node writes itself is in memory before it is in the store. A reading that began before such a write was done
//! may show the store as it was before: that topic is left as it is, and read again.
//!
//! A write that the store does not answer is made again until it does, where a device waits for it, each time as what was asked for at first:
//! what was asked for later, here or on another node, stays.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use futures_util::future::BoxFuture;
use moorline_mqtt::TopicName;
use moorline_router::{Message, RetainedVersion, StoreError};
use parking_lot::Mutex;

use super::{Membership, again_until_stored};
use crate::node::Node;
use crate::publish::Durable;

/// Readings until the node's own writes are done.
const READINGS_MAX: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);
/// How often what the others changed is read although nobody subscribes, so that it does not become much.
const READ_EVERY: Duration = Duration::from_secs(10);
/// How often the store is asked to remove what has expired.
const EXPIRE_EVERY: Duration = Duration::from_secs(10);
/// So many in one step, and as long between two as nobody notices it.
const EXPIRE_STEP: usize = 256;
const EXPIRE_PAUSE: Duration = Duration::from_millis(100);
/// How long a new subscription waits for what the others changed; then it gets what the node knows.
const PATIENCE: Duration = Duration::from_secs(3);

/// How far the node has read.
#[derive(Debug, Default)]
pub(crate) struct RetainedReadings {
    asked: Mutex<u64>,
    reading: tokio::sync::Mutex<Reading>,
    own: Mutex<OwnWrites>,
}

#[derive(Debug, Default)]
struct Reading {
    /// Whoever asked up to then has been answered.
    covers: u64,
    version: RetainedVersion,
}

/// Writes of this node that a reading may not have seen.
#[derive(Debug, Default)]
struct OwnWrites {
    /// Counts readings.
    reading: u64,
    topics: HashMap<Box<str>, OwnWrite, RandomState>,
    /// One has failed: the store has something else than the memory.
    failed: bool,
}

#[derive(Debug, Default)]
struct OwnWrite {
    under_way: usize,
    /// During, or after, which reading the last one was done.
    done_in: u64,
}

/// A write that is under way until it is dropped.
struct UnderWay {
    node: Arc<Node>,
    topic: TopicName,
    done: bool,
}

impl UnderWay {
    fn begin(node: &Arc<Node>, cluster: &Membership, topic: &TopicName) -> Self {
        let mut own = cluster.retained.own.lock();
        own.topics
            .entry(topic.as_str().into())
            .or_default()
            .under_way += 1;
        Self {
            node: Arc::clone(node),
            topic: topic.copied(),
            done: false,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let Some(cluster) = &self.node.cluster else {
            return;
        };
        let mut own = cluster.retained.own.lock();
        own.failed |= !self.done;
        let reading = own.reading;
        if let Some(write) = own.topics.get_mut(self.topic.as_str()) {
            write.under_way -= 1;
            write.done_in = reading;
        }
    }
}

impl OwnWrites {
    /// Whether the reading that is under way may have seen `topic` as it was before a write of this node.
    fn is_newer(&self, topic: &str) -> bool {
        let write = self.topics.get(topic);
        write.is_some_and(|write| write.under_way > 0 || write.done_in >= self.reading)
    }
}

/// Stores what is in the node's memory, or no more there. To be called where no other write of the topic can be made. With `insists` it is made
/// again until the store answers.
pub(crate) fn store(
    node: &Arc<Node>,
    topic: &TopicName,
    message: Option<&Arc<Message>>,
    insists: bool,
) -> Durable {
    let retained = &node.stores.retained;
    let asked = retained.now();
    let first = retained.set(topic, message.map(|message| &**message), asked);
    let Some(cluster) = &node.cluster else {
        return first;
    };
    let under_way = UnderWay::begin(node, cluster, topic);
    if !insists {
        return Box::pin(async move {
            let mut under_way = under_way;
            let written = first.await;
            under_way.done = written.is_ok();
            written
        });
    }
    let message = message.cloned();
    // By itself: the devices of this node have seen it, and it is stored although the one that sent it may have gone.
    let written = tokio::spawn(async move {
        let mut under_way = under_way;
        let again = |node: &Node| {
            let retained = &node.stores.retained;
            retained.set(&under_way.topic, message.as_deref(), asked)
        };
        let written = again_until_stored(&under_way.node, first, again).await;
        under_way.done = written.is_ok();
        written
    });
    Box::pin(async move {
        let ended = |_| Err(StoreError::Unavailable("the node stops".to_owned()));
        written.await.unwrap_or_else(ended)
    })
}

/// Reads what other nodes have changed up to now.
pub(crate) async fn catch_up(node: &Node, cluster: &Membership) -> Result<(), StoreError> {
    let readings = &cluster.retained;
    let ticket = {
        let mut asked = readings.asked.lock();
        *asked += 1;
        *asked
    };
    let mut reading = readings.reading.lock().await;
    if reading.covers >= ticket {
        return Ok(());
    }
    let covers = *readings.asked.lock();
    for _ in 0..READINGS_MAX {
        if read(node, cluster, &mut reading.version).await? {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    reading.covers = covers;
    Ok(())
}

/// Says whether everything that was read could be taken over.
async fn read(
    node: &Node,
    cluster: &Membership,
    version: &mut RetainedVersion,
) -> Result<bool, StoreError> {
    let own = &cluster.retained.own;
    {
        let mut own = own.lock();
        own.reading += 1;
        if std::mem::take(&mut own.failed) {
            *version = RetainedVersion::default();
        }
    }
    let changes = node.stores.retained.changes(*version).await;
    let changes = match cluster.link.note(changes) {
        Ok(Some(changes)) => changes,
        Ok(None) => return Ok(true),
        Err(error) => {
            *version = RetainedVersion::default();
            return Err(error);
        }
    };
    let read_to = changes.version;
    let skipped = node
        .retained
        .take_over(changes, |topic| own.lock().is_newer(topic));
    let mut own = own.lock();
    own.topics.retain(|_, write| write.under_way > 0);
    if skipped {
        return Ok(false);
    }
    *version = read_to;
    Ok(true)
}

/// The same for a new subscription, which is not kept waiting for a store that is out of reach.
pub(crate) fn before_feeding(node: &Arc<Node>) -> BoxFuture<'static, ()> {
    let node = Arc::clone(node);
    Box::pin(async move {
        let Some(cluster) = &node.cluster else { return };
        let read = tokio::time::timeout(PATIENCE, catch_up(&node, cluster)).await;
        if !matches!(read, Ok(Ok(()))) {
            tracing::debug!(
                "retained messages of other nodes not read, a subscription gets those that are known"
            );
        }
    })
}

/// Lets the store remove what has expired, until it is stopped. Nodes hand out none of it meanwhile.
pub(super) async fn expire(node: &Node, cluster: &Membership) {
    loop {
        let expired = node.stores.retained.expire(EXPIRE_STEP).await;
        let pause = match cluster.link.note(expired) {
            Ok(EXPIRE_STEP) => EXPIRE_PAUSE,
            Ok(_) => EXPIRE_EVERY,
            Err(error) => {
                tracing::debug!(%error, "retained messages that have expired are not removed yet");
                EXPIRE_EVERY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Reads now and then until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else { return };
    loop {
        tokio::time::sleep(READ_EVERY).await;
        if let Err(error) = catch_up(&node, cluster).await {
            tracing::debug!(%error, "retained messages of other nodes not read");
        }
    }
}
