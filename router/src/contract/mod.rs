//! What every backend of a seam must do, as suites of cases that any backend can run.
//!
//! A backend implements [`Backend`] in its tests and names each suite once, for example
//! `moorline_router::inbox_contract!(my_backend)`; every case becomes a test of its own. No backend is
//! mentioned here, and nothing here runs in a gateway.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]
#![allow(
    missing_docs,
    reason = "the name of a case is the sentence that it checks"
)]

pub mod bans;
pub mod inbox_limits;
pub mod inbox_sharing;
pub mod inboxes;
pub mod job_changes;
pub mod job_claims;
pub mod job_events;
pub mod job_limits;
pub mod job_lists;
pub mod jobs;
pub mod receipts;
pub mod routes;
pub mod sessions;
pub mod upstream;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::SignedDuration;
use moorline_mqtt::{ByteString, QoS, TopicName};

use crate::embedded::InboxLimits;
use crate::{
    Append, Appended, ClientId, End, EndReason, InboxPage, Inboxes, Message, MessageId, Origin,
    Position, Stores, unix_ms,
};

/// The limits that cases reach.
#[derive(Debug, Clone)]
pub struct Settings {
    pub inbox: InboxLimits,
    pub receipt_retention: SignedDuration,
    pub receipts_bytes_max: u64,
    pub upstream_queue_bytes_max: u64,
    pub upstream_partitions: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            inbox: InboxLimits::default(),
            receipt_retention: SignedDuration::from_mins(10),
            receipts_bytes_max: 1 << 20,
            upstream_queue_bytes_max: 1 << 20,
            upstream_partitions: 4,
        }
    }
}

/// A backend as a case needs it: one deployment of its own, empty at first.
#[async_trait]
pub trait Backend: Send + Sync {
    /// Starts an empty deployment.
    async fn start(&mut self, settings: Settings) -> Stores;
    /// Ends it cleanly and starts it again on what it kept. Stores handed out before are dead.
    async fn restart(&mut self) -> Stores;
}

/// Makes a test of every named case of one suite.
#[doc(hidden)]
#[macro_export]
macro_rules! contract_cases {
    ($backend:expr, $suite:ident: $($case:ident),+ $(,)?) => {
        mod $suite {
            use super::*;
            $(
                #[tokio::test]
                async fn $case() {
                    $crate::contract::$suite::$case(&mut $backend).await;
                }
            )+
        }
    };
}

/// Waits until `check` holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let held = async {
        while !check().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(10), held)
            .await
            .is_ok(),
        "not yet: {what}"
    );
}

pub fn client(text: &str) -> ClientId {
    ClientId::parse(text).unwrap()
}

pub fn topic(text: &str) -> TopicName {
    TopicName::parse(ByteString::from(text)).unwrap()
}

/// A push with `payload`, QoS 1, that does not expire.
pub fn push(payload: &str) -> Message {
    Message {
        id: MessageId::generate(),
        origin: Origin::Push,
        topic: topic("d/x/push"),
        qos: QoS::AtLeastOnce,
        retain: false,
        properties: None,
        payload: Bytes::copy_from_slice(payload.as_bytes()),
        accepted_at_ms: unix_ms(),
        expires_at_ms: None,
        collapse_key: None,
        share: None,
    }
}

/// The same from a subscription of the client's session.
pub fn of_session(payload: &str) -> Message {
    Message {
        origin: Origin::Session,
        ..push(payload)
    }
}

pub async fn append(inboxes: &dyn Inboxes, client: &ClientId, message: Message) -> Appended {
    let append = Append {
        client: client.clone(),
        message,
        fingerprint: None,
    };
    inboxes.append(vec![append]).await.unwrap().remove(0)
}

/// Appends and expects it to be stored.
pub async fn stored(inboxes: &dyn Inboxes, client: &ClientId, message: Message) -> Position {
    match append(inboxes, client, message).await {
        Appended::Stored { position, .. } => position,
        other => panic!("not stored: {other:?}"),
    }
}

pub async fn read_all(inboxes: &dyn Inboxes, client: &ClientId) -> InboxPage {
    inboxes
        .read(client, Position::START, usize::MAX, usize::MAX)
        .await
        .unwrap()
}

pub fn payloads(page: &InboxPage) -> Vec<String> {
    let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
    page.entries
        .iter()
        .map(|entry| text(&entry.message.payload))
        .collect()
}

/// Ends an entry and waits until that is visible.
pub async fn end(inboxes: &dyn Inboxes, client: &ClientId, position: Position, reason: EndReason) {
    inboxes.end(vec![End {
        client: client.clone(),
        position,
        reason,
    }]);
    eventually("the entry has ended", || async {
        let page = read_all(inboxes, client).await;
        page.entries.iter().all(|entry| entry.position != position)
    })
    .await;
}
