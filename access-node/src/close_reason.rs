//! The closed list of ways in which a connection ends.
//!
//! One table drives the MQTT reason code, the metric label and whether the will is published.

use moorline_mqtt::{DecodeError, ReasonCode};

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CloseReason {
    /// DISCONNECT from the device.
    ClientLeft,
    /// DISCONNECT with reason 0x04: the device wants its will published.
    ClientLeftWithWill,
    /// The network ended without a DISCONNECT.
    ConnectionLost,
    /// Nothing came for one and a half times the keep alive.
    KeepAliveTimeout,
    /// A message in flight was not acknowledged in time.
    AckTimeout,
    /// A newer connection of the same client id.
    TakenOver,
    /// An operator.
    Kicked,
    /// The server stops.
    ServerShuttingDown,
    /// Bytes that are not MQTT; carries the code that the specification names.
    Malformed(ReasonCode),
    /// Legal packets at an illegal moment.
    ProtocolError(ReasonCode),
    /// A declared limit that the protocol cannot refuse in another way.
    LimitExceeded(ReasonCode),
    /// What was sent could not be made durable, so it is not acknowledged.
    StoreUnavailable,
}

impl CloseReason {
    /// The code of the DISCONNECT sent to a 5.0 device; `None` where none is due.
    pub(crate) fn reason_code(self) -> Option<ReasonCode> {
        match self {
            Self::ClientLeft | Self::ClientLeftWithWill | Self::ConnectionLost => None,
            Self::KeepAliveTimeout => Some(ReasonCode::KeepAliveTimeout),
            Self::AckTimeout => Some(ReasonCode::UnspecifiedError),
            Self::TakenOver => Some(ReasonCode::SessionTakenOver),
            Self::Kicked => Some(ReasonCode::AdministrativeAction),
            Self::ServerShuttingDown => Some(ReasonCode::ServerShuttingDown),
            Self::Malformed(code) | Self::ProtocolError(code) | Self::LimitExceeded(code) => {
                Some(code)
            }
            Self::StoreUnavailable => Some(ReasonCode::ServerUnavailable),
        }
    }

    /// The value of the metric label `reason`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::ClientLeft => "client_left",
            Self::ClientLeftWithWill => "client_left_with_will",
            Self::ConnectionLost => "connection_lost",
            Self::KeepAliveTimeout => "keep_alive_timeout",
            Self::AckTimeout => "ack_timeout",
            Self::TakenOver => "taken_over",
            Self::Kicked => "kicked",
            Self::ServerShuttingDown => "server_shutting_down",
            Self::Malformed(_) => "malformed",
            Self::ProtocolError(_) => "protocol_error",
            Self::LimitExceeded(_) => "limit_exceeded",
            Self::StoreUnavailable => "store_unavailable",
        }
    }

    /// Whether the will goes out ([MQTT-3.1.2-8]): always but after a DISCONNECT that does not ask
    /// for it.
    pub(crate) fn publishes_will(self) -> bool {
        self != Self::ClientLeft
    }
}

impl From<&DecodeError> for CloseReason {
    fn from(error: &DecodeError) -> Self {
        match error.reason_code() {
            code @ ReasonCode::ProtocolError => Self::ProtocolError(code),
            code => Self::Malformed(code),
        }
    }
}
