//! Why bytes are refused.

use crate::packet_type::PacketType;
use crate::property;
use crate::{FilterError, ReasonCode, TopicError};

/// Why bytes are not a packet that may stand here. The connection is to be closed; over 5.0 with a
/// DISCONNECT (a CONNACK, before one was sent) that carries [`DecodeError::reason_code`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not to be parsed as the specification says.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// Parsed, and found to hold what is not allowed.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// A packet that this end of a connection sends, not receives.
    #[error("protocol error: {0} from the wrong end of the connection")]
    WrongDirection(PacketType),
    /// A property that the packet may not have, or that does not exist.
    #[error("malformed packet: {packet} with property {id:#04x} ({})", property::name(*id))]
    IllegalProperty {
        /// In which packet; a will's properties count as those of CONNECT.
        packet: PacketType,
        /// The property's identifier.
        id: u8,
    },
    /// A property that may stand only once.
    #[error("protocol error: property {id:#04x} ({}) more than once", property::name(*id))]
    RepeatedProperty {
        /// The property's identifier.
        id: u8,
    },
    /// A reason code that does not exist or that the packet may not carry.
    #[error("protocol error: {packet} with reason code {code:#04x}")]
    IllegalReason {
        /// In which packet.
        packet: PacketType,
        /// The byte that stood for the reason.
        code: u8,
    },
    /// Topic, will topic or response topic.
    #[error(transparent)]
    TopicName(#[from] TopicError),
    /// A filter of SUBSCRIBE or UNSUBSCRIBE.
    #[error(transparent)]
    TopicFilter(#[from] FilterError),
    /// A topic alias of 0.
    #[error("a topic alias must not be 0")]
    TopicAlias,
    /// Longer than this end takes; found before the body is read.
    #[error("a packet of {packet_bytes} bytes exceeds the limit of {limit}")]
    PacketTooLarge {
        /// Bytes of the whole packet as announced.
        packet_bytes: usize,
        /// The limit in bytes.
        limit: u32,
    },
    /// CONNECT asks for a protocol level other than 4 and 5. A CONNACK of 3.1.1 may say so
    /// ([MQTT-3.1.2-2]).
    #[error("protocol level {0} is not supported")]
    UnsupportedVersion(u8),
    /// CONNECT with another protocol name: not MQTT, and no answer is due ([MQTT-3.1.2-1]).
    #[error("the protocol name is not MQTT")]
    ProtocolName,
}

impl DecodeError {
    /// What a 5.0 peer is told. [`DecodeError::ProtocolName`] is told to nobody.
    pub fn reason_code(&self) -> ReasonCode {
        match self {
            // U+0000 makes a string ill-formed, wherever it stands ([MQTT-1.5.4-2]).
            Self::TopicName(TopicError::Nul) | Self::TopicFilter(FilterError::Nul) => {
                ReasonCode::MalformedPacket
            }
            Self::Malformed(_) | Self::IllegalProperty { .. } | Self::ProtocolName => {
                ReasonCode::MalformedPacket
            }
            Self::Protocol(_)
            | Self::WrongDirection(_)
            | Self::RepeatedProperty { .. }
            | Self::IllegalReason { .. } => ReasonCode::ProtocolError,
            Self::TopicName(_) => ReasonCode::TopicNameInvalid,
            Self::TopicFilter(_) => ReasonCode::TopicFilterInvalid,
            Self::TopicAlias => ReasonCode::TopicAliasInvalid,
            Self::PacketTooLarge { .. } => ReasonCode::PacketTooLarge,
            Self::UnsupportedVersion(_) => ReasonCode::UnsupportedProtocolVersion,
        }
    }
}
