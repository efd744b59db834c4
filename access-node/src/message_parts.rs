//! What of a PUBLISH is kept with the message: its id, its properties, when it expires.

use moorline_mqtt::{Publish, PublishProperties};
use moorline_router::MessageId;

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
    use super::*;

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
