//! What of a PUBLISH is kept with the message: its id, its properties, when it expires.

use bytes::Bytes;
use moorline_mqtt::{Publish, PublishProperties};
use moorline_router::MessageId;

/// A payload of this size is most of what it was read with, or not much less: it may keep that.
const KEEPS_ITS_READ: usize = 16 * 1024;

/// The id that a device supplied, or a new one.
pub(crate) fn id_of(publish: &Publish) -> MessageId {
    supplied_id(publish).unwrap_or_else(MessageId::generate)
}

pub(crate) fn supplied_id(publish: &Publish) -> Option<MessageId> {
    let properties = publish
        .properties
        .iter()
        .flat_map(|held| &held.user_properties);
    properties
        .filter(|(name, _)| name == "message-id")
        .find_map(|(_, value)| MessageId::parse(value).ok())
}

/// FNV-1a over the parts, each behind its length. The number is stored, so it must be the same in
/// every build and on every machine, which the hashers of maps do not promise.
pub(crate) fn stable_hash<const N: usize>(parts: [&[u8]; N]) -> u64 {
    let mut hash = 0xCBF2_9CE4_8422_2325_u64;
    for part in parts {
        let length = (part.len() as u64).to_be_bytes();
        for byte in length.iter().chain(part) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
        }
    }
    hash
}

/// For what is kept for longer than it takes to handle a packet: it must not keep the 64 KiB that many packets are read with for a few bytes.
pub(crate) fn unpin_from_read(publish: &mut Publish) {
    if publish.payload.len() >= KEEPS_ITS_READ {
        return;
    }
    publish.topic = publish.topic.copied();
    publish.payload = Bytes::copy_from_slice(&publish.payload);
    if let Some(properties) = &mut publish.properties {
        **properties = properties.copied();
    }
}

pub(crate) fn expires_at_ms(publish: &Publish, now_ms: u64) -> Option<u64> {
    let seconds = publish.properties.as_ref()?.message_expiry_interval_s?;
    Some(now_ms + u64::from(seconds) * 1000)
}

pub(crate) fn lasting_properties(
    properties: Option<&PublishProperties>,
) -> Option<Box<PublishProperties>> {
    let mut kept = properties?.clone();
    kept.message_expiry_interval_s = None;
    kept.topic_alias = None;
    kept.subscription_ids.clear();
    (kept != PublishProperties::default()).then(|| Box::new(kept))
}

#[cfg(test)]
mod tests {
    use moorline_mqtt::{ByteString, QoS, TopicName};

    use super::*;

    #[test]
    fn what_is_kept_does_not_keep_what_it_was_read_with() {
        let read = Bytes::from(vec![b'x'; 64 * 1024]);
        let text = |range: std::ops::Range<usize>| ByteString::try_from(read.slice(range)).unwrap();
        let publish = |payload_bytes: usize| Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: TopicName::parse(text(0..7)).unwrap(),
            packet_id: None,
            properties: Some(Box::new(PublishProperties {
                correlation_data: Some(read.slice(7..9)),
                user_properties: vec![(text(9..10), text(10..20))],
                ..PublishProperties::default()
            })),
            payload: read.slice(20..20 + payload_bytes),
        };
        let mut kept = publish(100);
        unpin_from_read(&mut kept);
        assert_eq!(kept, publish(100));
        let mut large = publish(60_000);
        unpin_from_read(&mut large);
        assert_eq!(large.payload.as_ptr(), read[20..].as_ptr(), "not copied");
        drop(large);
        assert!(read.is_unique(), "nothing else holds it");
    }

    #[test]
    fn the_stored_hash_is_what_it_always_was() {
        assert_eq!(stable_hash::<0>([]), 0xCBF2_9CE4_8422_2325);
        assert_ne!(
            stable_hash([&b"ab"[..], b"c"]),
            stable_hash([&b"a"[..], b"bc"])
        );
        assert_eq!(
            stable_hash([&b"d/x/y"[..], b"payload"]),
            0xC086_3B50_163E_ED32
        );
    }
}
