//! The seam of inboxes and receipts.

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::{ClientId, Epoch, Fence, Message, MessageId, NodeId, Position, Route, StoreError};

/// One message for one client.
#[derive(Debug, Clone)]
pub struct Append {
    /// Whose inbox.
    pub client: ClientId,
    /// What.
    pub message: Message,
    /// `Some` where the id may have been used before (it derives from an `Idempotency-Key` or came
    /// from a device): then a second append with the same id is refused as [`Appended::Repeated`].
    /// The number identifies the content, to tell a repetition from a conflict.
    pub fingerprint: Option<u64>,
}

/// What became of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// It is durable.
    Stored {
        /// Where it stands.
        position: Position,
        /// Where the client was connected after the append: looking it up later than the append is
        /// what keeps a concurrent connect from missing the message.
        route: Option<Route>,
    },
    /// The same id was accepted before, with the fingerprint given here; nothing was stored.
    Repeated {
        /// The fingerprint of the first append.
        fingerprint: u64,
        /// What became of the first.
        receipt: Receipt,
    },
    /// The inbox is full and its policy is to drop what is new: the message is accepted and has
    /// ended at once, as its receipt says. There is nothing to deliver.
    Dropped,
    /// The inbox is full and its policy is to reject; nothing was stored.
    Full,
}

/// An entry as read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxEntry {
    /// Where it stands.
    pub position: Position,
    /// Whether an earlier connection may have been sent it already: the DUP flag.
    pub maybe_sent: bool,
    /// For QoS 2: the device has answered PUBREC, only PUBREL remains to be sent.
    pub received: bool,
    /// What waits.
    pub message: Message,
}

/// A part of an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxPage {
    /// In order, none of them expired; what a device of the session was sent does not expire any more.
    pub entries: Vec<InboxEntry>,
    /// Up to where the page is complete: the last entry's position, or the tail of the inbox where
    /// there is nothing more.
    pub read_to: Position,
    /// Whether entries follow.
    pub more: bool,
}

/// Why an entry left its inbox (DESIGN: the closed list of reasons).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// PUBACK or PUBCOMP.
    Delivered,
    /// PUBACK or PUBREC with this reason code, 0x80 or above.
    Rejected(u8),
    /// Its time to live ended.
    Expired,
    /// A newer message with its collapse key came.
    Replaced,
    /// The inbox's overflow policy.
    Dropped,
    /// Larger than the device's Maximum Packet Size.
    TooLarge,
    /// Its session ended (session entries only).
    SessionEnded,
    /// An explicit cancel.
    Cancelled,
}

/// The end of one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Whose inbox.
    pub client: ClientId,
    /// Which entry.
    pub position: Position,
    /// Why.
    pub reason: EndReason,
}

/// What became of an entry that was to be handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandedOver {
    /// It has gone to the other inbox; or has stayed where it was, if that one answered [`Appended::Full`] or
    /// [`Appended::Dropped`].
    Moved(Appended),
    /// It has left the inbox and is the caller's to deliver.
    Taken,
    /// There is nothing to hand over: it had ended, or was QoS 2 and may have been sent, and has ended with its session.
    Gone,
}

/// How full an inbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InboxStatus {
    /// Entries that wait or are in flight.
    pub entries: u64,
    /// Their payloads, topics and properties in bytes.
    pub bytes: u64,
}

/// To whom a push went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipient {
    /// One client.
    Client(ClientId),
    /// Everyone who subscribes to the topic.
    Topic(String),
}

/// Where a message is in its life; the names are those of the HTTP API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(
    missing_docs,
    reason = "the words of the public interface, explained in `EndReason`"
)]
pub enum ReceiptState {
    Accepted,
    Sent,
    Delivered,
    Rejected,
    Expired,
    Replaced,
    Dropped,
    TooLarge,
    Cancelled,
}

/// One step of a message's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptStep {
    /// What happened.
    pub state: ReceiptState,
    /// Unix milliseconds.
    pub at_ms: u64,
    /// By which node and under which epoch, where a node was concerned.
    pub node: Option<(NodeId, Epoch)>,
    /// The reason code of a rejection.
    pub reason_code: Option<u8>,
}

/// What became of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The message.
    pub id: MessageId,
    /// To whom it went.
    pub to: Recipient,
    /// Never empty; the last one is the state.
    pub timeline: Vec<ReceiptStep>,
}

impl Receipt {
    /// The newest state.
    pub fn state(&self) -> ReceiptState {
        self.timeline
            .last()
            .map_or(ReceiptState::Accepted, |step| step.state)
    }
}

/// Per-client inboxes and the receipts of pushes.
///
/// What is appended stays until one of the reasons of [`EndReason`]. Entries of one client are
/// read in the order in which their appends were called.
#[async_trait]
pub trait Inboxes: Send + Sync {
    /// Makes every message durable, then looks the routes up. Answers are in the order of `appends`. The call
    /// takes its place in the order of writes when it is made, before the future is polled, so that a session
    /// can go on reading packets while earlier ones become durable.
    ///
    /// An error promises nothing: on one machine nothing was stored then, on many each message by itself may have
    /// been. Made again with the same ids and fingerprints, what was stored answers [`Appended::Repeated`]; without
    /// fingerprints it is stored a second time, with the same id. A repetition with another client is known after
    /// the fact on many machines: its message is withdrawn, and may have been handed on in between.
    fn append(
        &self,
        appends: Vec<Append>,
    ) -> BoxFuture<'static, Result<Vec<Appended>, StoreError>> {
        self.append_behind(appends, None)
    }

    /// As [`Inboxes::append`], refused once another write behind the same fence was.
    fn append_behind(
        &self,
        appends: Vec<Append>,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<Vec<Appended>, StoreError>>;

    /// Entries after `after`, at most `limit` and about `bytes_max` (at least one entry if there is
    /// one). Expired entries are left out.
    async fn read(
        &self,
        client: &ClientId,
        after: Position,
        limit: usize,
        bytes_max: usize,
    ) -> Result<InboxPage, StoreError>;

    /// Notes that entries up to and with `position` were handed to the connection `epoch` of `node`. Does not
    /// wait for durability: a lost note costs a DUP flag, not a message.
    fn mark_sent(&self, client: &ClientId, position: Position, node: &NodeId, epoch: Epoch);

    /// Notes the PUBREC of a QoS 2 entry: PUBREL may be sent once that is durable. Takes its place in the
    /// order of writes when it is called.
    fn mark_received(
        &self,
        client: &ClientId,
        position: Position,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Ends entries; unknown ones are ignored. Does not wait: a lost end costs a repeated delivery
    /// with the same message id.
    fn end(&self, ends: Vec<End>);

    /// Moves an entry of a shared subscription, whose session has ended, to the inbox that `to` names. Without `to` it
    /// is taken out. Of several that try the same entry, one succeeds. A QoS 2 entry that may have been sent already
    /// is never another client's [MQTT-4.8.2-5]. Durable once resolved.
    ///
    /// On one machine both inboxes change or neither. On many the entry is appended first and ended then: a process or
    /// store that dies in between, or an error, may leave it in both with the same id, and never in none.
    fn hand_over(
        &self,
        client: &ClientId,
        position: Position,
        to: Option<Append>,
    ) -> BoxFuture<'static, Result<HandedOver, StoreError>>;

    /// Ends every `Session` entry of `client` (clean start, session expiry) but those of shared subscriptions, which
    /// are handed over first and may still come for a moment; and forgets which pushes the
    /// session had received; stands behind every note made before. Durable on return. Answers how many shared entries there
    /// are. `epoch` is the last connection that the session had: [`StoreError::Stale`] once the client has a newer one.
    /// `None` where nobody else could have made one.
    async fn end_session(&self, client: &ClientId, epoch: Option<Epoch>)
    -> Result<u64, StoreError>;

    /// Ends one push that has not been delivered; says with which receipt it ended, `None` where no
    /// such message is known. A message that had ended already keeps its state.
    async fn cancel(&self, id: &MessageId) -> Result<Option<Receipt>, StoreError>;

    /// How full the inbox is.
    async fn status(&self, client: &ClientId) -> Result<InboxStatus, StoreError>;

    /// The last position appended for each client, `None` where nothing waits as far as is known
    /// without reading. Cheap enough to be asked for every device twice a minute: that is how a
    /// node finds messages whose hint was lost.
    async fn tails(&self, clients: &[ClientId]) -> Result<Vec<Option<Position>>, StoreError>;

    /// The clients that something waits for, in the order of client ids, from after `after`.
    async fn clients_waiting(
        &self,
        after: Option<&ClientId>,
        limit: usize,
    ) -> Result<Vec<ClientId>, StoreError>;

    /// The receipt of a push, until the declared time after its end.
    async fn receipt(&self, id: &MessageId) -> Result<Option<Receipt>, StoreError>;

    /// Keeps a receipt that belongs to no inbox entry (a topic push, a QoS 0 push). Durable on return. Refused as
    /// [`Appended::Repeated`] like an append where `fingerprint` is `Some`; else `Ok(None)`. Recorded again without
    /// one it takes the place of the receipt that is there and keeps that one's fingerprint.
    async fn record(
        &self,
        receipt: Receipt,
        fingerprint: Option<u64>,
    ) -> Result<Option<Appended>, StoreError>;
}
