//! Reason codes (MQTT 5.0 section 2.4) and their nearest 3.1.1 words.

use crate::packet_type::{PacketType, Peer};

/// One reason code of MQTT 5.0; those that share a value share a variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum ReasonCode {
    /// Also "normal disconnection" and "granted QoS 0".
    Success = 0x00,
    GrantedQoS1 = 0x01,
    GrantedQoS2 = 0x02,
    DisconnectWithWill = 0x04,
    NoMatchingSubscribers = 0x10,
    NoSubscriptionExisted = 0x11,
    ContinueAuthentication = 0x18,
    ReAuthenticate = 0x19,
    UnspecifiedError = 0x80,
    MalformedPacket = 0x81,
    ProtocolError = 0x82,
    ImplementationSpecificError = 0x83,
    UnsupportedProtocolVersion = 0x84,
    ClientIdentifierNotValid = 0x85,
    BadUserNameOrPassword = 0x86,
    NotAuthorized = 0x87,
    ServerUnavailable = 0x88,
    ServerBusy = 0x89,
    Banned = 0x8A,
    ServerShuttingDown = 0x8B,
    BadAuthenticationMethod = 0x8C,
    KeepAliveTimeout = 0x8D,
    SessionTakenOver = 0x8E,
    TopicFilterInvalid = 0x8F,
    TopicNameInvalid = 0x90,
    PacketIdentifierInUse = 0x91,
    PacketIdentifierNotFound = 0x92,
    ReceiveMaximumExceeded = 0x93,
    TopicAliasInvalid = 0x94,
    PacketTooLarge = 0x95,
    MessageRateTooHigh = 0x96,
    QuotaExceeded = 0x97,
    AdministrativeAction = 0x98,
    PayloadFormatInvalid = 0x99,
    RetainNotSupported = 0x9A,
    QoSNotSupported = 0x9B,
    UseAnotherServer = 0x9C,
    ServerMoved = 0x9D,
    SharedSubscriptionsNotSupported = 0x9E,
    ConnectionRateExceeded = 0x9F,
    MaximumConnectTime = 0xA0,
    SubscriptionIdentifiersNotSupported = 0xA1,
    WildcardSubscriptionsNotSupported = 0xA2,
}

impl ReasonCode {
    /// Whether the code says that something failed.
    pub fn is_error(self) -> bool {
        self as u8 >= 0x80
    }

    /// The code with the value `byte`.
    pub fn from_byte(byte: u8) -> Option<Self> {
        ALL.iter().copied().find(|code| *code as u8 == byte)
    }

    /// The return code of a 3.1.1 CONNACK (3.1.1 table 3.1) that says nearly the same.
    pub fn connect_return_code(self) -> u8 {
        match self {
            code if !code.is_error() => 0,
            Self::UnsupportedProtocolVersion => 1,
            Self::ClientIdentifierNotValid => 2,
            Self::BadUserNameOrPassword | Self::BadAuthenticationMethod => 4,
            Self::NotAuthorized | Self::Banned | Self::TopicNameInvalid => 5,
            _ => 3,
        }
    }

    /// The reason that a 3.1.1 return code stands for; `None` for the reserved ones.
    pub fn from_connect_return_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Success,
            1 => Self::UnsupportedProtocolVersion,
            2 => Self::ClientIdentifierNotValid,
            3 => Self::ServerUnavailable,
            4 => Self::BadUserNameOrPassword,
            5 => Self::NotAuthorized,
            _ => return None,
        })
    }

    /// What a 3.1.1 SUBACK says instead: any failure is 0x80.
    pub fn suback_return_code(self) -> u8 {
        if self.is_error() { 0x80 } else { self as u8 }
    }

    /// Whether `peer` may put the code into such a packet of MQTT 5.0 (the table of each packet).
    pub(crate) fn may_stand_in(self, packet: PacketType, peer: Peer) -> bool {
        match packet {
            PacketType::ConnAck => self == Self::Success || self.may_stand_in_connack(),
            PacketType::PubAck | PacketType::PubRec => matches!(
                self as u8,
                0x00 | 0x10 | 0x80 | 0x83 | 0x87 | 0x90 | 0x91 | 0x97 | 0x99
            ),
            PacketType::PubRel | PacketType::PubComp => {
                matches!(self, Self::Success | Self::PacketIdentifierNotFound)
            }
            PacketType::SubAck => matches!(
                self as u8,
                0x00..=0x02 | 0x80 | 0x83 | 0x87 | 0x8F | 0x91 | 0x97 | 0x9E | 0xA1 | 0xA2
            ),
            PacketType::UnsubAck => {
                matches!(self as u8, 0x00 | 0x11 | 0x80 | 0x83 | 0x87 | 0x8F | 0x91)
            }
            PacketType::Disconnect => self.may_stand_in_disconnect(peer),
            PacketType::Auth => match self {
                Self::Success => peer == Peer::Server,
                Self::ContinueAuthentication => true,
                Self::ReAuthenticate => peer == Peer::Client,
                _ => false,
            },
            _ => false,
        }
    }

    fn may_stand_in_connack(self) -> bool {
        matches!(
            self as u8,
            0x80..=0x8A | 0x8C | 0x90 | 0x95 | 0x97 | 0x99 | 0x9A | 0x9B | 0x9C | 0x9D | 0x9F
        )
    }

    fn may_stand_in_disconnect(self, peer: Peer) -> bool {
        match self as u8 {
            // 0x00 is the client's, but an empty DISCONNECT of a server says it too.
            0x00 | 0x80..=0x83 | 0x90 | 0x93..=0x99 => true,
            0x04 => peer == Peer::Client,
            0x87 | 0x89 | 0x8B | 0x8D..=0x8F | 0x9A..=0xA2 => peer == Peer::Server,
            _ => false,
        }
    }
}

/// Every code, the frequent ones first.
const ALL: [ReasonCode; 43] = [
    ReasonCode::Success,
    ReasonCode::GrantedQoS1,
    ReasonCode::GrantedQoS2,
    ReasonCode::NoMatchingSubscribers,
    ReasonCode::DisconnectWithWill,
    ReasonCode::NoSubscriptionExisted,
    ReasonCode::ContinueAuthentication,
    ReasonCode::ReAuthenticate,
    ReasonCode::UnspecifiedError,
    ReasonCode::MalformedPacket,
    ReasonCode::ProtocolError,
    ReasonCode::ImplementationSpecificError,
    ReasonCode::UnsupportedProtocolVersion,
    ReasonCode::ClientIdentifierNotValid,
    ReasonCode::BadUserNameOrPassword,
    ReasonCode::NotAuthorized,
    ReasonCode::ServerUnavailable,
    ReasonCode::ServerBusy,
    ReasonCode::Banned,
    ReasonCode::ServerShuttingDown,
    ReasonCode::BadAuthenticationMethod,
    ReasonCode::KeepAliveTimeout,
    ReasonCode::SessionTakenOver,
    ReasonCode::TopicFilterInvalid,
    ReasonCode::TopicNameInvalid,
    ReasonCode::PacketIdentifierInUse,
    ReasonCode::PacketIdentifierNotFound,
    ReasonCode::ReceiveMaximumExceeded,
    ReasonCode::TopicAliasInvalid,
    ReasonCode::PacketTooLarge,
    ReasonCode::MessageRateTooHigh,
    ReasonCode::QuotaExceeded,
    ReasonCode::AdministrativeAction,
    ReasonCode::PayloadFormatInvalid,
    ReasonCode::RetainNotSupported,
    ReasonCode::QoSNotSupported,
    ReasonCode::UseAnotherServer,
    ReasonCode::ServerMoved,
    ReasonCode::SharedSubscriptionsNotSupported,
    ReasonCode::ConnectionRateExceeded,
    ReasonCode::MaximumConnectTime,
    ReasonCode::SubscriptionIdentifiersNotSupported,
    ReasonCode::WildcardSubscriptionsNotSupported,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_names_one_code_or_none() {
        let known: Vec<u8> = (0..=255)
            .filter(|byte| {
                let code = ReasonCode::from_byte(*byte);
                assert!(code.is_none_or(|code| code as u8 == *byte));
                code.is_some()
            })
            .collect();
        let listed = [0x00, 0x01, 0x02, 0x04, 0x10, 0x11, 0x18, 0x19];
        assert_eq!(
            known,
            listed.into_iter().chain(0x80..=0xA2).collect::<Vec<u8>>()
        );
    }

    #[test]
    fn return_codes_of_3_1_1_come_back() {
        for code in 0..=5 {
            let reason = ReasonCode::from_connect_return_code(code).unwrap();
            assert_eq!(reason.connect_return_code(), code);
        }
        assert_eq!(ReasonCode::from_connect_return_code(6), None);
    }
}
