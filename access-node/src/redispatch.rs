//! A message of a shared subscription whose chosen member cannot have it after all: the member's
//! inbox is full, or its session ended before it acknowledged. It goes to another member.
//!
//! What a persistent session was given stands in its inbox and moves from there in one write, so
//! that a killed process neither loses nor doubles it. What a session that ends with its connection
//! was given is kept here in memory until it is acknowledged, as everything such a session has.
//!
//! The rules of MQTT 5.0 section 4.8.2: a QoS 2 message whose delivery has begun is nobody else's,
//! also when the session ends [MQTT-4.8.2-5]; while the session lasts it waits for its device
//! [MQTT-4.8.2-4], and so does a QoS 1 message, which the text leaves open; what a device rejects is
//! offered to nobody else [MQTT-4.8.2-6].

use std::sync::Arc;

use futures_util::future::join_all;
use moorline_mqtt::{EncodedPublish, PacketId, Publish, QoS};
use moorline_router::pubsub::Ack;
use moorline_router::{
    Append, Appended, ClientId, DeliveryOutcome, End, EndReason, HandedOver, InboxEntry, Message,
    Position, Publication, StoreError, unix_ms,
};
use parking_lot::Mutex;

use crate::cluster::Membership;
use crate::node::Node;
use crate::outbound::{Corked, for_device};
use crate::queue::Queued;
use crate::session::Session;
use crate::shared::PassedOver;
use crate::subscriptions::Subscriber;

/// Members that one message is offered to before it counts as one that the group has no room for.
pub(crate) const OFFERS_MAX: usize = 16;
/// Entries of an ended session that move together, sharing a commit.
const PAGE_ENTRIES: usize = 128;
const PAGE_BYTES: usize = 512 * 1024;

/// A message of a shared subscription on its way to a member.
///
/// In a cluster it stands in the queue of its group until nobody here has it any more; then it is there no more either.
#[derive(Debug)]
pub(crate) struct SharedMessage {
    message: Message,
    queued: Mutex<Option<Ack>>,
}

impl SharedMessage {
    pub(crate) fn new(message: Message) -> Self {
        let queued = Mutex::new(None);
        Self { message, queued }
    }

    pub(crate) fn from_queue(message: Message, ack: Ack) -> Self {
        let queued = Mutex::new(Some(ack));
        Self { message, queued }
    }

    /// Leaves it to the group's queue, and so to the members of any node; `false` where it is in none.
    pub(crate) fn give_back(&self) -> bool {
        self.queued.lock().take().is_some()
    }
}

impl std::ops::Deref for SharedMessage {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.message
    }
}

impl Drop for SharedMessage {
    fn drop(&mut self) {
        if let Some(ack) = self.queued.get_mut().take() {
            ack.done();
        }
    }
}

/// What a session that is not persistent was given as a member of groups and has not
/// acknowledged.
#[derive(Debug, Default)]
pub(crate) struct SharedDeliveries {
    /// QoS 1 only: QoS 2 in flight goes to nobody else [MQTT-4.8.2-5].
    in_flight: Vec<(PacketId, Arc<SharedMessage>)>,
    /// What another member is to get, since the connection has gone.
    orphans: Vec<Arc<SharedMessage>>,
}

impl SharedDeliveries {
    pub(crate) fn sent(&mut self, packet_id: PacketId, message: Arc<SharedMessage>) {
        self.in_flight.push((packet_id, message));
    }

    /// PUBACK came, whatever it says: a rejected message is not offered to others [MQTT-4.8.2-6].
    pub(crate) fn acknowledged(&mut self, packet_id: PacketId) {
        let found = self.in_flight.iter().position(|(id, _)| *id == packet_id);
        if let Some(at) = found {
            self.in_flight.remove(at);
        }
    }

    /// The connection has gone; `queued` is what it had not been sent, of whatever QoS.
    pub(crate) fn orphan(&mut self, queued: impl Iterator<Item = Queued>) {
        let sent = std::mem::take(&mut self.in_flight);
        self.orphans
            .extend(sent.into_iter().map(|(_, message)| message));
        self.orphans.extend(queued.filter_map(|held| held.shared));
    }

    pub(crate) fn into_orphans(self) -> Vec<Arc<SharedMessage>> {
        self.orphans
    }
}

/// `message` as `member` gets it: at most at the QoS that it was granted [MQTT-4.8.2-3], with its
/// own subscription identifier.
pub(crate) fn for_member(message: &Message, member: &Subscriber<Session>) -> Message {
    let mut message = message.clone();
    if let Some(share) = &message.share {
        message.qos = share.qos.min(member.options.qos);
        message.retain = share.retain && member.options.retain_as_published;
    }
    if let Some(properties) = &mut message.properties {
        properties.subscription_ids.clear();
    }
    if member.subscription_id > 0 {
        let properties = message.properties.get_or_insert_default();
        properties.subscription_ids = vec![member.subscription_id];
    }
    message
}

/// Sees an append to the first chosen member's inbox through to its connection, or to another
/// member.
pub(crate) async fn settle(
    node: &Node,
    session: Arc<Session>,
    message: Message,
    outcome: Option<Appended>,
) -> Result<(), StoreError> {
    let mut passed_over = PassedOver::new();
    let standing = match outcome {
        Some(Appended::Stored { position, .. }) => {
            if tell(node, &session, position, &message) {
                return Ok(());
            }
            Some((session.client.clone(), position))
        }
        Some(Appended::Full | Appended::Dropped) => None,
        Some(Appended::Repeated { .. }) | None => return Ok(()),
    };
    passed_over.push(session);
    let message = Arc::new(SharedMessage::new(message));
    place(node, message, standing, passed_over).await
}

/// Gives the messages that a connection left behind to other members.
pub(crate) async fn orphans(
    node: &Node,
    orphans: Vec<Arc<SharedMessage>>,
) -> Result<(), StoreError> {
    let placed = orphans
        .into_iter()
        .filter(|message| !message.give_back())
        .map(|message| place(node, message, None, PassedOver::new()));
    join_all(placed).await.into_iter().collect()
}

/// Gives what waits for an ended session as a member of groups to other members. Whatever is still
/// appended meanwhile is seen to by whoever appends it (see [`settle`]).
pub(crate) async fn from_inbox(node: &Node, client: &ClientId) -> Result<(), StoreError> {
    let mut after = Position::START;
    loop {
        let inboxes = &node.stores.inboxes;
        let page = inboxes
            .read(client, after, PAGE_ENTRIES, PAGE_BYTES)
            .await?;
        let shared = page
            .entries
            .into_iter()
            .filter(|entry| entry.message.share.is_some());
        let placed = shared.map(|entry| async {
            if let Some(cluster) = &node.cluster {
                return return_to_group(node, cluster, client, entry).await;
            }
            let standing = Some((client.clone(), entry.position));
            let message = Arc::new(SharedMessage::new(entry.message));
            place(node, message, standing, PassedOver::new()).await
        });
        // Each takes its place in the store's order as it is first polled, which is in order.
        join_all(placed)
            .await
            .into_iter()
            .collect::<Result<(), _>>()?;
        if !page.more {
            return Ok(());
        }
        after = page.read_to;
    }
}

/// Puts what waits for an ended session into the queue of its group: its next member may be on any node. First there, then out of
/// the inbox: a killed process doubles it, under the same id, but does not lose it. What is to come once at most is
/// taken out first.
async fn return_to_group(
    node: &Node,
    cluster: &Membership,
    client: &ClientId,
    entry: InboxEntry,
) -> Result<(), StoreError> {
    let inboxes = &node.stores.inboxes;
    let Some(share) = &entry.message.share else {
        return Ok(());
    };
    let is_once = share.qos == QoS::ExactlyOnce;
    if is_once && inboxes.hand_over(client, entry.position, None).await? == HandedOver::Gone {
        return Ok(());
    }
    let now_ms = unix_ms();
    let filter = share.filter.clone();
    let mut properties = entry.message.properties.clone();
    if let Some(at_ms) = entry.message.expires_at_ms {
        let left_s = at_ms.saturating_sub(now_ms).div_ceil(1000);
        let kept = properties.get_or_insert_default();
        kept.message_expiry_interval_s = Some(u32::try_from(left_s).unwrap_or(u32::MAX));
    }
    if let Some(kept) = &mut properties {
        kept.subscription_ids.clear();
    }
    let publication = Publication {
        id: entry.message.id.clone(),
        from: None,
        publish: Publish {
            dup: false,
            qos: share.qos,
            retain: share.retain,
            topic: entry.message.topic.clone(),
            packet_id: None,
            properties,
            payload: entry.message.payload.clone(),
        },
        published_at_ms: now_ms,
    };
    match cluster.given.pubsub.give_back(&filter, publication).await? {
        true => node.metrics.shared_redispatched.increment(1),
        false => node.metrics.dropped_no_member.increment(1),
    }
    if !is_once {
        inboxes.hand_over(client, entry.position, None).await?;
    }
    Ok(())
}

/// Tells a member's connection of a new entry; `false` if the session has ended, and the entry is
/// nobody's.
fn tell(node: &Node, session: &Arc<Session>, position: Position, message: &Message) -> bool {
    let mut corked = Corked::new();
    let mut state = session.lock();
    if state.ended {
        return false;
    }
    state.deliver_hint(&session.client, position, message, node);
    corked.add(session, &mut state);
    true
}

/// Finds a member for `message`. `standing` is the entry in which it waits, of a session that has
/// ended; it leaves there in any case.
async fn place(
    node: &Node,
    message: Arc<SharedMessage>,
    mut standing: Option<(ClientId, Position)>,
    passed_over: PassedOver,
) -> Result<(), StoreError> {
    if !offer_from(node, &message, &mut standing, passed_over).await? {
        // Nobody is left, or nobody has room. A session's messages end with it.
        node.metrics.dropped_no_member.increment(1);
        end(node, standing);
    }
    Ok(())
}

/// Gives a message that stands in no inbox to a member; says whether one took it.
pub(crate) async fn offer(node: &Node, message: &Arc<SharedMessage>) -> Result<bool, StoreError> {
    let mut standing = None;
    let taken = offer_from(node, message, &mut standing, PassedOver::new()).await;
    if !matches!(taken, Ok(true)) {
        end(node, standing);
    }
    taken
}

/// Offers a message to members until one takes it, and says whether one did. Where it stands afterwards, if nobody
/// did, is in `standing`.
async fn offer_from(
    node: &Node,
    message: &Arc<SharedMessage>,
    standing: &mut Option<(ClientId, Position)>,
    mut passed_over: PassedOver,
) -> Result<bool, StoreError> {
    let inboxes = &node.stores.inboxes;
    let is_once = message
        .share
        .as_ref()
        .is_some_and(|share| share.qos == QoS::ExactlyOnce);
    for _ in 0..OFFERS_MAX {
        let Some(member) = choose(node, message, &passed_over) else {
            break;
        };
        let own = for_member(message, &member);
        let session = member.session;
        if own.qos > QoS::AtMostOnce && session.lock().keeps_inbox() {
            let append = Append {
                client: session.client.clone(),
                message: own.clone(),
                fingerprint: None,
            };
            let appended = match &*standing {
                None => inboxes.append(vec![append]).await?.pop(),
                Some((from, position)) => {
                    match inboxes.hand_over(from, *position, Some(append)).await? {
                        HandedOver::Moved(appended) => Some(appended),
                        HandedOver::Taken | HandedOver::Gone => return Ok(true),
                    }
                }
            };
            if let Some(Appended::Stored { position, .. }) = appended {
                node.metrics.shared_redispatched.increment(1);
                // In a cluster the session goes on where it is not in memory.
                if tell(node, &session, position, &own) || node.cluster.is_some() {
                    return Ok(true);
                }
                *standing = Some((session.client.clone(), position));
            }
        } else {
            if let (Some((from, position)), true) = (&*standing, is_once) {
                // Taken out first: neither a kill between the two nor a delivery that has begun may
                // give it to two members.
                if inboxes.hand_over(from, *position, None).await? == HandedOver::Gone {
                    return Ok(true);
                }
                *standing = None;
            }
            if deliver_live(node, &session, &own, message) {
                node.metrics.shared_redispatched.increment(1);
                end(node, standing.take());
                return Ok(true);
            }
        }
        passed_over.push(session);
    }
    Ok(false)
}

fn choose(node: &Node, message: &Message, passed_over: &PassedOver) -> Option<Subscriber<Session>> {
    let share = message.share.as_ref()?;
    let group = node.shared.group(&share.filter)?;
    group.choose(share.qos, passed_over, &node.config)
}

/// Hands the message to the connection of a session that is not persistent, or at QoS 0; says
/// whether it took it.
fn deliver_live(
    node: &Node,
    session: &Arc<Session>,
    own: &Message,
    message: &Arc<SharedMessage>,
) -> bool {
    let mut corked = Corked::new();
    let mut state = session.lock();
    let link = state.link.as_ref().filter(|link| link.closing.is_none());
    let Some(version) = link.map(|link| link.version) else {
        return false;
    };
    let publish = for_device(version, own);
    let encoded = EncodedPublish::new(version, &publish, own.qos, own.retain);
    let shared = (own.qos > QoS::AtMostOnce).then(|| Arc::clone(message));
    let outcome = state.deliver_shared(&encoded, message.expires_at_ms, shared, node);
    corked.add(session, &mut state);
    matches!(
        outcome,
        DeliveryOutcome::Sent { .. } | DeliveryOutcome::Behind
    )
}

fn end(node: &Node, standing: Option<(ClientId, Position)>) {
    if let Some((client, position)) = standing {
        let reason = EndReason::SessionEnded;
        node.stores.inboxes.end(vec![End {
            client,
            position,
            reason,
        }]);
    }
}
