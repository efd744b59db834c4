//! The same bytes given to `rmqtt-codec`, which shares no code with this crate. Where the two
//! disagree, the disagreement is listed here with its reason.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{
    ConnAck, Connect, DecodeError, Packet, Publish, PublishProperties, QoS, Version,
};
use rmqtt_codec::{v3, v5};
use tokio_util::codec::{Decoder as _, Encoder as _};

use crate::damaged::seeds;
use crate::generate::Sender;
use crate::{PACKET_BYTES_MAX, Random, VERSIONS, damage, decoder, encode};

/// What they make of bytes: their packet, encoded by them.
fn theirs(bytes: &[u8], version: Version) -> Result<Option<Bytes>, String> {
    let mut src = BytesMut::from(bytes);
    let mut out = BytesMut::new();
    let failed = |error: &dyn std::fmt::Debug| format!("{error:?}");
    match version {
        Version::V3_1_1 => {
            let mut codec = v3::Codec::new(PACKET_BYTES_MAX);
            let Some((packet, _)) = codec.decode(&mut src).map_err(|e| failed(&e))? else {
                return Ok(None);
            };
            codec.encode(packet, &mut out).map_err(|e| failed(&e))?;
        }
        Version::V5 => {
            let mut codec = v5::Codec::new(PACKET_BYTES_MAX, 0);
            let Some((packet, _)) = codec.decode(&mut src).map_err(|e| failed(&e))? else {
                return Ok(None);
            };
            codec.encode(packet, &mut out).map_err(|e| failed(&e))?;
        }
    }
    Ok(Some(out.freeze()))
}

fn ours(bytes: &Bytes, version: Version, sender: Sender) -> Result<Option<Packet>, DecodeError> {
    let expects_connect = bytes.first().is_some_and(|first| first >> 4 == 1);
    decoder(version, sender, expects_connect).decode(&mut bytes.clone())
}

/// Why this crate refuses what they take. Each is a rule of the specification.
fn stricter(error: &DecodeError) -> Option<&'static str> {
    Some(match error {
        DecodeError::WrongDirection(_) => "they do not know who is sending",
        DecodeError::IllegalReason { .. } => "reason codes of the other end, or reserved (3.1.1)",
        DecodeError::TopicName(_) => "wildcards and U+0000 in topic names [MQTT-3.3.2-2]",
        DecodeError::TopicFilter(_) => "misplaced wildcards and broken shares [MQTT-4.7.1-1]",
        DecodeError::Malformed(what) => match *what {
            "bytes after the end of the packet" => "bytes after the last field",
            "text with U+0000" => "U+0000 in any text [MQTT-1.5.4-2]",
            "a length that is not in its shortest form" => "padded lengths [MQTT-1.5.5-1]",
            "DUP with QoS 0" => "DUP with QoS 0 [MQTT-3.3.1-2]",
            "a requested QoS other than 0, 1 and 2" => "reserved bits beside a QoS [MQTT-3.8.3-4]",
            "reserved bits of subscription options" => "reserved option bits [MQTT-3.8.3-5]",
            "a password without a user name" => "a lone password in 3.1.1 [MQTT-3.1.2-22]",
            "a will's QoS or RETAIN without a will" => "flags of no will [MQTT-3.1.2-11]",
            // AUTH may leave both out only together (section 3.15.2.1).
            "a field that reaches beyond the end of its packet or properties" => {
                "AUTH with a reason and no property length"
            }
            _ => return None,
        },
        DecodeError::Protocol(what) => match *what {
            "an answer without a reason code" => "SUBACK and UNSUBACK that answer nothing",
            "a session with a refusal" => "session present in a refusal [MQTT-3.2.2-6]",
            "neither a topic name nor a topic alias" => "a PUBLISH to nowhere (3.3.2.1)",
            "a will without a topic" => "a will to nowhere [MQTT-4.7.3-1]",
            "AUTH without an authentication method" => "AUTH without a method (3.15.2.2.2)",
            "a subscription identifier from a client" => "identifiers upstream [MQTT-3.3.4-6]",
            "authentication data without a method" => "data without a method (3.1.2.11.10)",
            "a server reference from a client" => "they do not know who is sending",
            "a session expiry interval from a server" => "they do not know who is sending",
            "a flag property that is neither 0 nor 1" => "flags that are neither 0 nor 1",
            "No Local on a shared subscription" => "No Local on a share [MQTT-3.8.3-4]",
            _ => return None,
        },
        _ => return None,
    })
}

/// Why this crate refuses at once what they would wait for: the first bytes decide.
fn earlier(error: &DecodeError) -> Option<&'static str> {
    match error {
        DecodeError::Malformed(
            "reserved flags in the first byte"
            | "a reserved packet type"
            | "a length that is not in its shortest form",
        )
        | DecodeError::WrongDirection(_) => Some("refused by its fixed header"),
        _ => None,
    }
}

/// Why this crate takes what they refuse.
fn more_lenient(packet: &Packet) -> Option<&'static str> {
    let expired = |p: &Option<Box<PublishProperties>>| {
        p.as_ref()
            .is_some_and(|p| p.message_expiry_interval_s == Some(0))
    };
    match packet {
        Packet::Publish(publish) if expired(&publish.properties) => {
            Some("an expiry interval of 0 is legal (section 3.3.2.3.3)")
        }
        Packet::Connect(connect) if connect.client_id.is_empty() && !connect.clean_start => {
            // For 3.1.1 the answer is a CONNACK that says so [MQTT-3.1.3-8]; 5.0 allows it.
            Some("an empty client id is answered, not unreadable")
        }
        Packet::Connect(connect) => {
            let will = connect.will.as_ref()?;
            expired(&will.properties).then_some("an expiry interval of 0 is legal")
        }
        _ => None,
    }
}

/// They keep defaults where this crate keeps absence: both are made defaults.
fn with_defaults(mut packet: Packet) -> Packet {
    match &mut packet {
        Packet::Connect(connect) => {
            let Connect {
                properties, will, ..
            } = &mut **connect;
            properties.session_expiry_interval_s.get_or_insert(0);
            properties.topic_alias_maximum.get_or_insert(0);
            properties.request_problem_information.get_or_insert(true);
            properties.request_response_information.get_or_insert(false);
            if let Some(will) = will {
                let properties = will.properties.get_or_insert_default();
                properties.payload_is_utf8.get_or_insert(false);
            }
        }
        Packet::Publish(Publish { properties, .. }) => {
            properties
                .get_or_insert_default()
                .payload_is_utf8
                .get_or_insert(false);
        }
        Packet::ConnAck(ack) => {
            let ConnAck { properties, .. } = &mut **ack;
            properties
                .receive_maximum
                .get_or_insert(std::num::NonZeroU16::MAX);
            properties.maximum_qos.get_or_insert(QoS::ExactlyOnce);
            properties.topic_alias_maximum.get_or_insert(0);
            for flag in [
                &mut properties.retain_available,
                &mut properties.wildcard_subscription_available,
                &mut properties.subscription_ids_available,
                &mut properties.shared_subscription_available,
            ] {
                flag.get_or_insert(true);
            }
        }
        _ => {}
    }
    packet
}

/// Compares the two; says why where they disagree for a listed reason.
fn compare(bytes: &Bytes, version: Version, sender: Sender) -> Option<&'static str> {
    match (ours(bytes, version, sender), theirs(bytes, version)) {
        (Ok(None), Ok(None)) | (Err(_), Err(_)) => None,
        (Ok(Some(taken)), Ok(Some(again))) => {
            let theirs = ours(&again, version, sender);
            let Ok(Some(theirs)) = theirs else {
                panic!("{theirs:?} {bytes:02X?} {again:02X?}")
            };
            assert_eq!(
                with_defaults(taken),
                with_defaults(theirs),
                "{version:?} {bytes:02X?}"
            );
            None
        }
        (Err(error), Ok(Some(_))) => {
            Some(stricter(&error).unwrap_or_else(|| panic!("{version:?} {error:?} {bytes:02X?}")))
        }
        (Err(error), Ok(None)) => {
            Some(earlier(&error).unwrap_or_else(|| panic!("{version:?} {error:?} {bytes:02X?}")))
        }
        (Ok(Some(packet)), Err(error)) => {
            Some(more_lenient(&packet).unwrap_or_else(|| panic!("{version:?} {error} {packet:?}")))
        }
        (ours, theirs) => panic!("{version:?} {ours:?} {theirs:?} {bytes:02X?}"),
    }
}

#[test]
fn two_codecs_read_the_same_in_valid_packets() {
    let mut compared = 0;
    for version in VERSIONS {
        for sender in [Sender::Client, Sender::Server] {
            for packet in seeds(version, sender, 400) {
                let disagreement = compare(&encode(&packet, version), version, sender);
                assert!(
                    disagreement.is_none() || more_lenient(&packet) == disagreement,
                    "{disagreement:?} {packet:?}"
                );
                compared += u32::from(disagreement.is_none());
            }
        }
    }
    assert!(compared > 1500, "only {compared} were compared");
}

#[test]
fn two_codecs_disagree_on_damaged_packets_for_known_reasons_only() {
    let mut random = Random(99);
    let mut met = BTreeMap::new();
    for version in VERSIONS {
        for sender in [Sender::Client, Sender::Server] {
            for packet in seeds(version, sender, 80) {
                let original = encode(&packet, version);
                for _ in 0..400 {
                    let mut bytes = original.to_vec();
                    damage(&mut bytes, &mut random);
                    if let Some(why) = compare(&bytes.into(), version, sender) {
                        *met.entry(why).or_insert(0u32) += 1;
                    }
                }
            }
        }
    }
    assert!(met.len() >= 8, "the damage reaches too little: {met:?}");
}
