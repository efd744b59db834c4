//! A message as it waits for a device.

use bytes::Bytes;
use moorline_mqtt::{PublishProperties, QoS, TopicName};

use crate::MessageId;

/// Who put a message into an inbox; decides what a clean start drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Origin {
    /// A backend: the message belongs to the client id and outlives its sessions.
    Push = 0,
    /// A subscription of the client's persistent session: it ends with the session.
    Session = 1,
}

/// What waits in an inbox: everything needed to deliver it, whatever version the device speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Travels end to end.
    pub id: MessageId,
    /// Push or session.
    pub origin: Origin,
    /// Where it arrives.
    pub topic: TopicName,
    /// 1 or 2 in an inbox.
    pub qos: QoS,
    /// The RETAIN flag that the device sees.
    pub retain: bool,
    /// The properties that an MQTT 5.0 device sees. Message expiry and topic alias are not kept
    /// here: the former is `expires_at_ms`, the latter belongs to a connection.
    pub properties: Option<Box<PublishProperties>>,
    /// The application message.
    pub payload: Bytes,
    /// Unix milliseconds.
    pub accepted_at_ms: u64,
    /// Unix milliseconds; `None` never expires.
    pub expires_at_ms: Option<u64>,
    /// A newer message with the same key replaces this one. Kept in the format from the start;
    /// nothing sets it yet.
    pub collapse_key: Option<Box<str>>,
    /// `Some` where a shared subscription chose this client among its members.
    pub share: Option<Box<Share>>,
}

/// What is needed to choose another member of a shared subscription when the session of the first
/// ends (MQTT 5.0 section 4.8.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// `$share/{group}/{filter}`.
    pub filter: Box<str>,
    /// As published: the next member may have been granted more than the first.
    pub qos: QoS,
    /// As published.
    pub retain: bool,
}
