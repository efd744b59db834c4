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
    /// The token or the answer that let the device in holds no longer.
    CredentialsExpired,
    /// The server is leaving, and others take its devices.
    Drained,
    /// The server stops.
    ServerShuttingDown,
    /// Bytes that are not MQTT; carries the code that the specification names.
    Malformed(ReasonCode),
    /// Legal packets at an illegal moment.
    ProtocolError(ReasonCode),
    /// A declared limit that the protocol cannot refuse in another way.
    LimitExceeded(ReasonCode),
    /// A ban that was made while it was connected.
    Banned,
    /// More in a second than a device may send, where that is answered so.
    RateExceeded,
    /// What was sent could not be made durable, so it is not acknowledged.
    StoreUnavailable,
}

/// Why a connection is refused although nothing is wrong with what it said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Refusal {
    /// Its address, client id or user name is banned.
    Banned,
    /// `mqtt.connections_max`, or that of the listener.
    ConnectionsMax,
    /// `mqtt.half_open_max`, or that of the listener.
    HalfOpenMax,
    /// `mqtt.connects_per_second`, or that of the listener.
    ConnectRate,
    /// `mqtt.per_address.half_open_max`.
    AddressHalfOpenMax,
    /// `mqtt.per_address.connects_per_second`.
    AddressConnectRate,
    /// `mqtt.sessions_max`.
    SessionsMax,
}

impl Refusal {
    /// The code of the CONNACK, where it has come to that.
    pub(crate) fn reason_code(self) -> ReasonCode {
        match self {
            Self::Banned => ReasonCode::Banned,
            Self::ConnectionsMax | Self::HalfOpenMax => ReasonCode::ServerBusy,
            Self::ConnectRate | Self::AddressHalfOpenMax | Self::AddressConnectRate => {
                ReasonCode::ConnectionRateExceeded
            }
            Self::SessionsMax => ReasonCode::QuotaExceeded,
        }
    }

    /// The value of the metric label `reason`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Banned => "banned",
            Self::ConnectionsMax => "connections_max",
            Self::HalfOpenMax => "half_open_max",
            Self::ConnectRate => "connects_per_second",
            Self::AddressHalfOpenMax => "address_half_open_max",
            Self::AddressConnectRate => "address_connects_per_second",
            Self::SessionsMax => "sessions_max",
        }
    }
}

impl CloseReason {
    /// The code of the DISCONNECT sent to a 5.0 device; `None` where none is due.
    pub(crate) fn reason_code(self) -> Option<ReasonCode> {
        match self {
            Self::ClientLeft | Self::ClientLeftWithWill | Self::ConnectionLost => None,
            Self::KeepAliveTimeout => Some(ReasonCode::KeepAliveTimeout),
            Self::AckTimeout => Some(ReasonCode::UnspecifiedError),
            Self::TakenOver => Some(ReasonCode::SessionTakenOver),
            // "Banned" may stand in a CONNACK only (MQTT 5.0 table 2-6).
            Self::Kicked | Self::Banned => Some(ReasonCode::AdministrativeAction),
            Self::CredentialsExpired => Some(ReasonCode::NotAuthorized),
            Self::Drained => Some(ReasonCode::UseAnotherServer),
            Self::ServerShuttingDown => Some(ReasonCode::ServerShuttingDown),
            Self::Malformed(code) | Self::ProtocolError(code) | Self::LimitExceeded(code) => {
                Some(code)
            }
            Self::RateExceeded => Some(ReasonCode::MessageRateTooHigh),
            Self::StoreUnavailable => Some(ReasonCode::ServerUnavailable),
        }
    }

    /// What a 5.0 device is told in the DISCONNECT, for whoever reads its log.
    pub(crate) fn explanation(self) -> &'static str {
        match self {
            Self::ClientLeft | Self::ClientLeftWithWill | Self::ConnectionLost => "",
            Self::KeepAliveTimeout => "nothing came for one and a half times the keep alive",
            Self::AckTimeout => "a message was not acknowledged in time",
            Self::TakenOver => "a newer connection has this client identifier",
            Self::Kicked => "disconnected by an operator",
            Self::CredentialsExpired => "the credentials of this connection hold no longer",
            Self::Banned => "banned",
            Self::Drained => "the server is leaving; connect to another one",
            Self::ServerShuttingDown => "the server stops; connect again",
            Self::Malformed(ReasonCode::PacketTooLarge) => {
                "larger than the Maximum Packet Size of the CONNACK"
            }
            Self::Malformed(_) => "a packet that is not as the specification says",
            Self::ProtocolError(ReasonCode::TopicAliasInvalid) => {
                "above the Topic Alias Maximum of the CONNACK"
            }
            Self::ProtocolError(_) => "a packet that is not allowed at this point",
            Self::LimitExceeded(ReasonCode::ReceiveMaximumExceeded) => {
                "more unacknowledged PUBLISH than the Receive Maximum of the CONNACK"
            }
            Self::LimitExceeded(_) => "a limit of the server was exceeded",
            Self::RateExceeded => "more packets or bytes per second than the server takes",
            Self::StoreUnavailable => "what was sent cannot be kept now; connect again later",
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
            Self::CredentialsExpired => "credentials_expired",
            Self::Drained => "drained",
            Self::ServerShuttingDown => "server_shutting_down",
            Self::Malformed(_) => "malformed",
            Self::ProtocolError(_) => "protocol_error",
            Self::LimitExceeded(_) => "limit_exceeded",
            Self::Banned => "banned",
            Self::RateExceeded => "rate_exceeded",
            Self::StoreUnavailable => "store_unavailable",
        }
    }

    /// Whether the device or its network ended it, rather than this side or an operator: many such
    /// ends make a flapping client.
    pub(crate) fn is_flap(self) -> bool {
        match self {
            Self::ClientLeft
            | Self::ClientLeftWithWill
            | Self::ConnectionLost
            | Self::TakenOver
            | Self::Malformed(_)
            | Self::ProtocolError(_)
            | Self::LimitExceeded(_)
            | Self::RateExceeded => true,
            Self::KeepAliveTimeout
            | Self::AckTimeout
            | Self::Kicked
            | Self::CredentialsExpired
            | Self::Banned
            | Self::Drained
            | Self::ServerShuttingDown
            | Self::StoreUnavailable => false,
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
