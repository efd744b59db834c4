//! A push, and the one door through which every push goes: [`Submitter::submit`].
//!
//! ```text
//! HTTP handler ─▶ Push (valid by construction) ─▶ submit ─▶ inbox (durable) + route ─▶ node (a hint) ─▶ Outcome
//! ```
//!
//! What may be in a push is decided where it is read (`request`); what becomes of it is decided
//! here. Delivery itself is the access node's.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use moorline_mqtt::{ByteString, Publish, PublishProperties, QoS, TopicName, UserProperties};
use moorline_router::{
    Append, Appended, ClientId, Delivery, DeliveryOutcome, Epoch, Message, MessageId, NodeId,
    Nodes, Origin, Position, Receipt, ReceiptState, ReceiptStep, Recipient, Route, StoreError,
    Stores, unix_ms,
};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::metrics::Metrics;

/// To whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One client, whatever it subscribes to.
    Client(ClientId),
    /// Everyone who subscribes to the topic.
    Topic(TopicName),
}

/// A push that may be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    /// To whom.
    pub target: Target,
    /// Where it arrives.
    pub topic: TopicName,
    /// What.
    pub payload: Bytes,
    /// 0 is sent now or dropped.
    pub qos: QoS,
    /// `None` never expires.
    pub ttl: Option<Duration>,
    /// MQTT 5.0 Content Type.
    pub content_type: Option<ByteString>,
    /// MQTT 5.0 user properties.
    pub properties: UserProperties,
    /// Keep as the topic's retained message; only with [`Target::Topic`].
    pub retain: bool,
}

impl Push {
    /// Identifies what is asked for, to tell a repeated request from another one with the same
    /// Idempotency-Key. The same in every version of the program: it is kept.
    fn fingerprint(&self) -> u64 {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        match &self.target {
            Target::Client(client) => field(client.as_str().as_bytes()),
            Target::Topic(_) => field(&[]),
        }
        field(self.topic.as_str().as_bytes());
        field(&self.payload);
        field(&[self.qos as u8, u8::from(self.retain)]);
        field(&self.ttl.map_or(0, |ttl| ttl.as_millis()).to_be_bytes());
        field(self.content_type.as_deref().unwrap_or("").as_bytes());
        for (name, value) in &self.properties {
            field(name.as_bytes());
            field(value.as_bytes());
        }
        let digest = hash.finalize();
        u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes"))
    }

    fn recipient(&self) -> Recipient {
        match &self.target {
            Target::Client(client) => Recipient::Client(client.clone()),
            Target::Topic(topic) => Recipient::Topic(topic.as_str().to_owned()),
        }
    }

    fn publish_properties(
        &self,
        traceparent: Option<ByteString>,
    ) -> Option<Box<PublishProperties>> {
        if self.content_type.is_none() && self.properties.is_empty() && traceparent.is_none() {
            return None;
        }
        let mut user_properties = self.properties.clone();
        user_properties
            .extend(traceparent.map(|value| (ByteString::from_static("traceparent"), value)));
        Some(Box::new(PublishProperties {
            content_type: self.content_type.clone(),
            user_properties,
            ..PublishProperties::default()
        }))
    }
}

/// What goes with a push and is not part of what it says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Context {
    /// `Some` makes the push at most once for its name: the same id is accepted again only with
    /// the same content, and answered with what became of the first.
    pub once: Option<MessageId>,
    /// W3C trace context, handed on as a user property.
    pub traceparent: Option<ByteString>,
}

/// The message id of a caller's Idempotency-Key: the same for the same `caller` and `key` anywhere.
pub fn derived_id(caller: &str, key: &str) -> MessageId {
    let mut hash = Sha256::new();
    hash.update((caller.len() as u64).to_be_bytes());
    hash.update(caller.as_bytes());
    hash.update(key.as_bytes());
    let digest = hash.finalize();
    let bytes: [u8; 16] = digest[..16].try_into().expect("SHA-256 has 32 bytes");
    let id = uuid::Uuid::new_v8(bytes).hyphenated().to_string();
    MessageId::parse(&id).expect("a UUID is 36 visible ASCII characters")
}

/// What became of a push that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The message.
    pub id: MessageId,
    /// Where it is now.
    pub state: ReceiptState,
    /// Whether this repeats a push that had been accepted before.
    pub replayed: bool,
    /// Sessions that matched a push to a topic.
    pub matched: Option<u64>,
}

/// Why a push was not accepted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SubmitError {
    /// The id was used for something else.
    #[error("message {0} was accepted before with another content")]
    Conflict(MessageId),
    /// The same push is being made at this moment.
    #[error("message {0} is being accepted at this moment")]
    InProgress(MessageId),
    /// The inbox is at its limit and rejects.
    #[error("the inbox of this client is full")]
    InboxFull,
    /// Nothing was stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl SubmitError {
    /// Whether the same push may be accepted later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Conflict(_) => false,
            Self::InProgress(_) | Self::InboxFull => true,
            Self::Store(error) => error.is_retryable(),
        }
    }
}

/// Accepts pushes.
pub struct Submitter {
    stores: Stores,
    nodes: Arc<dyn Nodes>,
    metrics: Metrics,
    /// Ids of pushes that are recorded before they are made, see [`Submitter::once`].
    in_progress: Mutex<HashSet<MessageId>>,
}

impl Submitter {
    /// A door to these stores and nodes.
    pub fn new(stores: Stores, nodes: Arc<dyn Nodes>) -> Self {
        Self {
            stores,
            nodes,
            metrics: Metrics::new(),
            in_progress: Mutex::default(),
        }
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Accepts `push`. A QoS of 1 or 2 is durable when this returns `Ok`; an error means that
    /// nothing was promised.
    pub async fn submit(&self, push: Push, context: Context) -> Result<Outcome, SubmitError> {
        let started = Instant::now();
        let result = match (&push.target, push.qos) {
            (Target::Client(client), QoS::AtLeastOnce | QoS::ExactlyOnce) => {
                let client = client.clone();
                self.to_inbox(client, push, context).await
            }
            _ => self.once(push, context).await,
        };
        self.metrics.push_ended(&result, started.elapsed());
        result
    }

    async fn to_inbox(
        &self,
        client: ClientId,
        push: Push,
        context: Context,
    ) -> Result<Outcome, SubmitError> {
        let fingerprint = context.once.is_some().then(|| push.fingerprint());
        let id = context.once.unwrap_or_else(MessageId::generate);
        let message = message(push, id.clone(), context.traceparent);
        let append = Append {
            client: client.clone(),
            message: message.clone(),
            fingerprint,
        };
        let appended = self.stores.inboxes.append(vec![append]).await?.pop();
        let state = match appended {
            Some(Appended::Stored { position, route }) => {
                self.hint(client, Some(position), message, route).await.0
            }
            Some(Appended::Repeated {
                fingerprint: first,
                receipt,
            }) => {
                return repeated(id, fingerprint, first, &receipt);
            }
            Some(Appended::Dropped) => ReceiptState::Dropped,
            Some(Appended::Full) => return Err(SubmitError::InboxFull),
            None => {
                let detail = "it answered an append with nothing".to_owned();
                return Err(StoreError::Unavailable(detail).into());
            }
        };
        Ok(Outcome {
            id,
            state,
            replayed: false,
            matched: None,
        })
    }

    /// Tells the node that holds the client. The message is safe already where it has a position.
    async fn hint(
        &self,
        client: ClientId,
        position: Option<Position>,
        message: Message,
        route: Option<Route>,
    ) -> (ReceiptState, Option<(NodeId, Epoch)>) {
        let Some(route) = route else {
            return (ReceiptState::Accepted, None);
        };
        let delivery = Delivery {
            client,
            position,
            message,
        };
        let outcomes = self.nodes.deliver(&route.node, vec![delivery]).await;
        match outcomes.first() {
            Some(DeliveryOutcome::Sent { epoch }) => {
                (ReceiptState::Sent, Some((route.node, *epoch)))
            }
            Some(
                DeliveryOutcome::Behind
                | DeliveryOutcome::NotHere
                | DeliveryOutcome::Busy
                | DeliveryOutcome::Dropped,
            )
            | None => (ReceiptState::Accepted, None),
        }
    }

    /// A push that goes into no inbox of its own: to a topic, or with QoS 0. It has a receipt, kept by
    /// itself.
    ///
    /// With an Idempotency-Key the receipt is written twice: as accepted before the push is made, which refuses
    /// every other content from then on, and with its outcome after. A first receipt that is still
    /// only accepted belongs to a call that failed half-way: the push is then made again, under the same id.
    async fn once(&self, push: Push, context: Context) -> Result<Outcome, SubmitError> {
        let id = context.once.clone().unwrap_or_else(MessageId::generate);
        let mut receipt = Receipt {
            id: id.clone(),
            to: push.recipient(),
            timeline: vec![step(ReceiptState::Accepted, None)],
        };
        let _claim;
        if context.once.is_some() {
            _claim =
                Claim::take(&self.in_progress, &id).ok_or(SubmitError::InProgress(id.clone()))?;
            let fingerprint = Some(push.fingerprint());
            let recorded = self
                .stores
                .inboxes
                .record(receipt.clone(), fingerprint)
                .await?;
            if let Some(Appended::Repeated {
                fingerprint: first,
                receipt: earlier,
            }) = recorded
            {
                let outcome = repeated(id.clone(), fingerprint, first, &earlier)?;
                if outcome.state != ReceiptState::Accepted {
                    return Ok(outcome);
                }
                receipt.timeline = earlier.timeline;
            }
        }
        let (last, matched) = self.make(push, &id, context.traceparent).await?;
        let state = last.state;
        receipt.timeline.push(last);
        if let Err(error) = self.stores.inboxes.record(receipt, None).await {
            // Made is made. With a key the caller can ask again without a second copy; without one an
            // error would only make it send another.
            if context.once.is_some() {
                return Err(error.into());
            }
            tracing::warn!(%id, %error, "receipt not kept");
        }
        Ok(Outcome {
            id,
            state,
            replayed: false,
            matched,
        })
    }

    async fn make(
        &self,
        push: Push,
        id: &MessageId,
        traceparent: Option<ByteString>,
    ) -> Result<(ReceiptStep, Option<u64>), SubmitError> {
        let Target::Client(client) = &push.target else {
            let published = self
                .nodes
                .publish(id.clone(), publish(&push, traceparent))
                .await?;
            return Ok((step(ReceiptState::Sent, None), published.matched));
        };
        let client = client.clone();
        let route = self.stores.routes.look_up(&client).await?;
        let message = message(push, id.clone(), traceparent);
        Ok(match self.hint(client, None, message, route).await {
            (ReceiptState::Sent, node) => (step(ReceiptState::Sent, node), None),
            _ => (step(ReceiptState::Dropped, None), None),
        })
    }
}

/// The right to make one push; given back on drop.
struct Claim<'a> {
    ids: &'a Mutex<HashSet<MessageId>>,
    id: MessageId,
}

impl<'a> Claim<'a> {
    fn take(ids: &'a Mutex<HashSet<MessageId>>, id: &MessageId) -> Option<Self> {
        ids.lock().insert(id.clone()).then(|| Self {
            ids,
            id: id.clone(),
        })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.ids.lock().remove(&self.id);
    }
}

fn step(state: ReceiptState, node: Option<(NodeId, Epoch)>) -> ReceiptStep {
    ReceiptStep {
        state,
        at_ms: unix_ms(),
        node,
        reason_code: None,
    }
}

fn repeated(
    id: MessageId,
    fingerprint: Option<u64>,
    first: u64,
    receipt: &Receipt,
) -> Result<Outcome, SubmitError> {
    if fingerprint != Some(first) {
        return Err(SubmitError::Conflict(id));
    }
    Ok(Outcome {
        id,
        state: receipt.state(),
        replayed: true,
        matched: None,
    })
}

fn message(push: Push, id: MessageId, traceparent: Option<ByteString>) -> Message {
    let properties = push.publish_properties(traceparent);
    let accepted_at_ms = unix_ms();
    let expires_at_ms = push.ttl.map(|ttl| {
        accepted_at_ms.saturating_add(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))
    });
    Message {
        id,
        origin: Origin::Push,
        topic: push.topic,
        qos: push.qos,
        retain: false,
        properties,
        payload: push.payload,
        accepted_at_ms,
        expires_at_ms,
        collapse_key: None,
        share: None,
    }
}

fn publish(push: &Push, traceparent: Option<ByteString>) -> Publish {
    let mut properties = push.publish_properties(traceparent);
    if let Some(ttl) = push.ttl {
        // Whole seconds on the wire: rounded up, so that a message lives no shorter than asked for.
        let seconds = ttl.as_millis().div_ceil(1_000);
        properties.get_or_insert_default().message_expiry_interval_s =
            Some(u32::try_from(seconds).unwrap_or(u32::MAX));
    }
    Publish {
        dup: false,
        qos: push.qos,
        retain: push.retain,
        topic: push.topic.clone(),
        packet_id: None,
        properties,
        payload: push.payload.clone(),
    }
}
