//! Strategies for every packet that each end may send, in the form in which it is decoded.

use std::num::NonZeroU16;

use bytes::Bytes;
use moorline_mqtt::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// Who sends a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sender {
    Client,
    Server,
}

/// Any packet that `sender` may send in `version`.
pub(crate) fn packet(version: Version, sender: Sender) -> BoxedStrategy<Packet> {
    let both = prop_oneof![
        4 => publish(version, sender).prop_map(Packet::Publish),
        1 => ack(version, &PUBLISH_REASONS).prop_map(Packet::PubAck),
        1 => ack(version, &PUBLISH_REASONS).prop_map(Packet::PubRec),
        1 => ack(version, &RELEASE_REASONS).prop_map(Packet::PubRel),
        1 => ack(version, &RELEASE_REASONS).prop_map(Packet::PubComp),
    ];
    let own = match sender {
        Sender::Client => prop_oneof![
            3 => connect(version).prop_map(|connect| Packet::Connect(Box::new(connect))),
            3 => subscribe(version).prop_map(|subscribe| Packet::Subscribe(Box::new(subscribe))),
            1 => unsubscribe(version).prop_map(|packet| Packet::Unsubscribe(Box::new(packet))),
            1 => Just(Packet::PingReq),
            1 => disconnect(version, sender).prop_map(Packet::Disconnect),
        ]
        .boxed(),
        Sender::Server => prop_oneof![
            3 => connack(version).prop_map(|ack| Packet::ConnAck(Box::new(ack))),
            1 => suback(version, &SUBSCRIBE_REASONS).prop_map(Packet::SubAck),
            1 => unsuback(version).prop_map(Packet::UnsubAck),
            1 => Just(Packet::PingResp),
        ]
        .boxed(),
    };
    match (version, sender) {
        (Version::V3_1_1, _) => prop_oneof![both, own].boxed(),
        (Version::V5, Sender::Client) => {
            prop_oneof![3 => both, 3 => own, 1 => auth(sender)].boxed()
        }
        (Version::V5, Sender::Server) => {
            let leaving = disconnect(version, sender).prop_map(Packet::Disconnect);
            prop_oneof![3 => both, 3 => own, 1 => auth(sender), 1 => leaving].boxed()
        }
    }
}

use ReasonCode as R;

const PUBLISH_REASONS: [R; 5] = [
    R::Success,
    R::NoMatchingSubscribers,
    R::NotAuthorized,
    R::TopicNameInvalid,
    R::QuotaExceeded,
];
const RELEASE_REASONS: [R; 2] = [R::Success, R::PacketIdentifierNotFound];
const SUBSCRIBE_REASONS: [R; 5] = [
    R::Success,
    R::GrantedQoS1,
    R::GrantedQoS2,
    R::NotAuthorized,
    R::TopicFilterInvalid,
];
const CONNECT_REASONS: [R; 6] = [
    R::Success,
    R::UnsupportedProtocolVersion,
    R::ClientIdentifierNotValid,
    R::ServerUnavailable,
    R::BadUserNameOrPassword,
    R::NotAuthorized,
];

fn text() -> impl Strategy<Value = ByteString> {
    "[a-z0-9/+# é日\u{1F600}]{0,8}".prop_map(ByteString::from)
}

fn binary() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..20).prop_map(Bytes::from)
}

pub(crate) fn topic() -> impl Strategy<Value = TopicName> {
    "[a-z0-9é$ ]{1,3}(/[a-z0-9é]{0,3}){0,3}".prop_map(|text| TopicName::parse(text.into()).unwrap())
}

pub(crate) fn filter() -> impl Strategy<Value = TopicFilter> {
    "(\\$share/[a-z]{1,2}/)?(\\+|[a-z]{1,2})(/(\\+|[a-zé]{0,2})){0,3}(/#)?"
        .prop_map(|text| TopicFilter::parse(text.into()).unwrap())
}

fn packet_id() -> impl Strategy<Value = PacketId> {
    any::<NonZeroU16>().prop_map(PacketId)
}

fn qos() -> impl Strategy<Value = QoS> {
    select(vec![QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce])
}

fn user_properties() -> impl Strategy<Value = UserProperties> {
    prop_oneof![2 => Just(Vec::new()), 1 => vec((text(), text()), 1..4)]
}

/// Absent and empty properties look the same on the wire, and are decoded as absent.
fn present<T: Default + PartialEq>(properties: T) -> Option<Box<T>> {
    (properties != T::default()).then(|| Box::new(properties))
}

fn message_properties() -> impl Strategy<Value = PublishProperties> {
    (
        option::of(any::<bool>()),
        option::of(any::<u32>()),
        option::of(topic()),
        option::of(binary()),
        user_properties(),
        option::of(text()),
    )
        .prop_map(
            |(utf8, expiry, response_topic, correlation_data, user_properties, content_type)| {
                PublishProperties {
                    payload_is_utf8: utf8,
                    message_expiry_interval_s: expiry,
                    topic_alias: None,
                    response_topic,
                    correlation_data,
                    user_properties,
                    subscription_ids: Vec::new(),
                    content_type,
                }
            },
        )
}

fn publish_properties(
    version: Version,
    sender: Sender,
) -> BoxedStrategy<Option<Box<PublishProperties>>> {
    if version == Version::V3_1_1 {
        return Just(None).boxed();
    }
    let ids = match sender {
        Sender::Client => Just(Vec::new()).boxed(),
        Sender::Server => vec(1..=268_435_455u32, 0..3).boxed(),
    };
    let full = (message_properties(), option::of(any::<NonZeroU16>()), ids);
    let full = full.prop_map(|(message, topic_alias, subscription_ids)| {
        present(PublishProperties {
            topic_alias,
            subscription_ids,
            ..message
        })
    });
    prop_oneof![1 => Just(None), 2 => full].boxed()
}

fn publish(version: Version, sender: Sender) -> impl Strategy<Value = Publish> {
    (
        (any::<bool>(), qos(), any::<bool>(), topic(), packet_id()),
        publish_properties(version, sender),
        binary(),
        any::<bool>(),
    )
        .prop_map(
            |((dup, qos, retain, topic, id), properties, payload, by_alias)| {
                let has_alias = properties.as_ref().is_some_and(|p| p.topic_alias.is_some());
                Publish {
                    dup: dup && qos > QoS::AtMostOnce,
                    qos,
                    retain,
                    topic: if by_alias && has_alias {
                        TopicName::empty()
                    } else {
                        topic
                    },
                    packet_id: (qos > QoS::AtMostOnce).then_some(id),
                    properties,
                    payload,
                }
            },
        )
}

fn will(version: Version) -> BoxedStrategy<Will> {
    let properties = match version {
        Version::V3_1_1 => Just((0, None)).boxed(),
        Version::V5 => (any::<u32>(), message_properties().prop_map(present)).boxed(),
    };
    (topic(), binary(), qos(), any::<bool>(), properties)
        .prop_map(
            |(topic, payload, qos, retain, (delay_interval_s, properties))| Will {
                topic,
                payload,
                qos,
                retain,
                delay_interval_s,
                properties,
            },
        )
        .boxed()
}

fn connect_properties() -> impl Strategy<Value = ConnectProperties> {
    (
        (
            option::of(any::<u32>()),
            option::of(any::<NonZeroU16>()),
            option::of(1..=u32::MAX),
        ),
        (
            option::of(any::<u16>()),
            option::of(any::<bool>()),
            option::of(any::<bool>()),
        ),
        (
            user_properties(),
            option::of((text(), option::of(binary()))),
        ),
    )
        .prop_map(
            |((expiry, receive, size), (alias, response, problem), (user, auth))| {
                let (method, data) =
                    auth.map_or((None, None), |(method, data)| (Some(method), data));
                ConnectProperties {
                    session_expiry_interval_s: expiry,
                    receive_maximum: receive,
                    maximum_packet_size: size,
                    topic_alias_maximum: alias,
                    request_response_information: response,
                    request_problem_information: problem,
                    user_properties: user,
                    authentication_method: method,
                    authentication_data: data,
                }
            },
        )
}

fn connect(version: Version) -> BoxedStrategy<Connect> {
    let properties = match version {
        Version::V3_1_1 => Just(ConnectProperties::default()).boxed(),
        Version::V5 => connect_properties().boxed(),
    };
    let credentials = (option::of(text()), option::of(binary()));
    (
        any::<bool>(),
        any::<u16>(),
        text(),
        option::of(will(version)),
        credentials,
        properties,
    )
        .prop_map(
            move |(clean_start, keep_alive_s, client_id, will, credentials, properties)| {
                let (username, password) = credentials;
                let may_have_password = version == Version::V5 || username.is_some();
                Connect {
                    version,
                    clean_start,
                    keep_alive_s,
                    client_id,
                    will: will.map(Box::new),
                    password: password.filter(|_| may_have_password),
                    username,
                    properties,
                }
            },
        )
        .boxed()
}

fn connack_properties() -> impl Strategy<Value = ConnAckProperties> {
    let flag = || option::of(any::<bool>());
    (
        (
            option::of(any::<u32>()),
            option::of(any::<NonZeroU16>()),
            option::of(1..=u32::MAX),
        ),
        (
            option::of(select(vec![QoS::AtMostOnce, QoS::AtLeastOnce])),
            flag(),
            flag(),
            flag(),
            flag(),
        ),
        (
            option::of(any::<u16>()),
            option::of(any::<u16>()),
            user_properties(),
        ),
        (
            option::of(text()),
            option::of(text()),
            option::of(text()),
            option::of(text()),
        ),
        option::of((text(), option::of(binary()))),
    )
        .prop_map(|(sizes, flags, numbers, texts, auth)| {
            let (method, data) = auth.map_or((None, None), |(method, data)| (Some(method), data));
            ConnAckProperties {
                session_expiry_interval_s: sizes.0,
                receive_maximum: sizes.1,
                maximum_packet_size: sizes.2,
                maximum_qos: flags.0,
                retain_available: flags.1,
                wildcard_subscription_available: flags.2,
                subscription_ids_available: flags.3,
                shared_subscription_available: flags.4,
                topic_alias_maximum: numbers.0,
                server_keep_alive_s: numbers.1,
                user_properties: numbers.2,
                assigned_client_id: texts.0,
                reason_string: texts.1,
                response_information: texts.2,
                server_reference: texts.3,
                authentication_method: method,
                authentication_data: data,
            }
        })
}

fn connack(version: Version) -> BoxedStrategy<ConnAck> {
    let properties = match version {
        Version::V3_1_1 => Just(ConnAckProperties::default()).boxed(),
        Version::V5 => connack_properties().boxed(),
    };
    (any::<bool>(), select(CONNECT_REASONS.to_vec()), properties)
        .prop_map(|(present, reason, properties)| {
            let session_present = present && !reason.is_error();
            ConnAck {
                session_present,
                reason,
                properties,
            }
        })
        .boxed()
}

fn reason_properties(version: Version) -> BoxedStrategy<Option<Box<ReasonProperties>>> {
    match version {
        Version::V3_1_1 => Just(None).boxed(),
        Version::V5 => (option::of(text()), user_properties())
            .prop_map(|(reason_string, user_properties)| {
                present(ReasonProperties {
                    reason_string,
                    user_properties,
                })
            })
            .boxed(),
    }
}

fn ack(version: Version, reasons: &[ReasonCode]) -> BoxedStrategy<Ack> {
    let reasons = if version == Version::V5 {
        reasons
    } else {
        &[R::Success]
    };
    (
        packet_id(),
        select(reasons.to_vec()),
        reason_properties(version),
    )
        .prop_map(|(packet_id, reason, properties)| Ack {
            packet_id,
            reason,
            properties,
        })
        .boxed()
}

fn suback(version: Version, reasons: &[ReasonCode]) -> BoxedStrategy<SubAck> {
    let of_3_1_1 = [
        R::Success,
        R::GrantedQoS1,
        R::GrantedQoS2,
        R::UnspecifiedError,
    ];
    let reasons = if version == Version::V5 {
        reasons
    } else {
        &of_3_1_1
    };
    (
        packet_id(),
        vec(select(reasons.to_vec()), 1..4),
        reason_properties(version),
    )
        .prop_map(|(packet_id, reasons, properties)| SubAck {
            packet_id,
            reasons,
            properties,
        })
        .boxed()
}

fn unsuback(version: Version) -> BoxedStrategy<SubAck> {
    match version {
        Version::V3_1_1 => packet_id()
            .prop_map(|packet_id| SubAck {
                packet_id,
                reasons: Vec::new(),
                properties: None,
            })
            .boxed(),
        Version::V5 => suback(
            version,
            &[R::Success, R::NoSubscriptionExisted, R::NotAuthorized],
        ),
    }
}

fn subscription_options(version: Version) -> BoxedStrategy<SubscriptionOptions> {
    let handling = vec![
        RetainHandling::Send,
        RetainHandling::SendIfNew,
        RetainHandling::DoNotSend,
    ];
    (qos(), any::<bool>(), any::<bool>(), select(handling))
        .prop_map(
            move |(qos, no_local, retain_as_published, retain_handling)| match version {
                Version::V3_1_1 => SubscriptionOptions {
                    qos,
                    no_local: false,
                    retain_as_published: false,
                    retain_handling: RetainHandling::Send,
                },
                Version::V5 => SubscriptionOptions {
                    qos,
                    no_local,
                    retain_as_published,
                    retain_handling,
                },
            },
        )
        .boxed()
}

fn subscribe(version: Version) -> BoxedStrategy<Subscribe> {
    let properties = match version {
        Version::V3_1_1 => Just((None, Vec::new())).boxed(),
        Version::V5 => (option::of(1..=268_435_455u32), user_properties()).boxed(),
    };
    let filters = vec((filter(), subscription_options(version)), 1..4);
    (packet_id(), filters, properties)
        .prop_map(
            |(packet_id, mut filters, (subscription_id, user_properties))| {
                for (filter, options) in &mut filters {
                    options.no_local &= filter.share().is_none();
                }
                Subscribe {
                    packet_id,
                    filters,
                    subscription_id,
                    user_properties,
                }
            },
        )
        .boxed()
}

fn unsubscribe(version: Version) -> BoxedStrategy<Unsubscribe> {
    let user_properties = match version {
        Version::V3_1_1 => Just(Vec::new()).boxed(),
        Version::V5 => user_properties().boxed(),
    };
    (packet_id(), vec(filter(), 1..4), user_properties)
        .prop_map(|(packet_id, filters, user_properties)| Unsubscribe {
            packet_id,
            filters,
            user_properties,
        })
        .boxed()
}

fn disconnect(version: Version, sender: Sender) -> BoxedStrategy<Disconnect> {
    if version == Version::V3_1_1 {
        return Just(Disconnect {
            reason: R::Success,
            properties: None,
        })
        .boxed();
    }
    let reasons = match sender {
        Sender::Client => vec![R::Success, R::DisconnectWithWill, R::ProtocolError],
        Sender::Server => vec![R::Success, R::SessionTakenOver, R::ServerMoved],
    };
    (
        select(reasons),
        option::of(any::<u32>()),
        option::of(text()),
        user_properties(),
        option::of(text()),
    )
        .prop_map(
            move |(reason, expiry, reason_string, user_properties, reference)| Disconnect {
                reason,
                properties: present(DisconnectProperties {
                    session_expiry_interval_s: expiry.filter(|_| sender == Sender::Client),
                    reason_string,
                    user_properties,
                    server_reference: reference.filter(|_| sender == Sender::Server),
                }),
            },
        )
        .boxed()
}

fn auth(sender: Sender) -> BoxedStrategy<Packet> {
    let reasons = match sender {
        Sender::Client => vec![R::ContinueAuthentication, R::ReAuthenticate],
        Sender::Server => vec![R::ContinueAuthentication, R::Success],
    };
    (
        select(reasons),
        text(),
        option::of(binary()),
        option::of(text()),
        user_properties(),
    )
        .prop_map(|(reason, method, data, reason_string, user_properties)| {
            Packet::Auth(Box::new(Auth {
                reason,
                authentication_method: Some(method),
                authentication_data: data,
                reason_string,
                user_properties,
            }))
        })
        .boxed()
}
