//! MQTT 3.1.1 and 5.0 on the wire: packets to bytes and back, topic names and topic filters.
//!
//! No I/O, no session state, no policy: what is legal at this point of a conversation is decided by
//! whoever holds the session. What is legal *bytes* is decided here, strictly, and an error names
//! the reason code that the specification asks for.
//!
//! Read in this order: [`packet`] (the words), [`reason`] (how things end), [`topic`] (names and
//! filters), [`decode`] and [`encode`] (bytes), [`fan_out`] (one PUBLISH for many
//! receivers), [`aliased`] (the same behind a topic alias).

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

pub mod aliased;
pub mod decode;
pub mod encode;
pub mod fan_out;
pub mod packet;
mod packet_type;
mod property;
pub mod reason;
mod stored;
pub mod topic;

pub use aliased::AliasedPublish;
pub use bytestring::ByteString;
pub use decode::{DecodeError, Decoder};
pub use encode::EncodeError;
pub use fan_out::EncodedPublish;
pub use packet::*;
pub use packet_type::PacketType;
pub use reason::ReasonCode;
pub use topic::{FilterError, TopicError, TopicFilter, TopicName};
