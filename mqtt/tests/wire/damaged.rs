//! The entry points of the fuzz targets, driven by seeded damage on a stable toolchain: nothing
//! panics, nothing is read past a packet, and what is taken can be written and read again.

use bytes::{BufMut, Bytes, BytesMut};
use moorline_mqtt::{Packet, TopicFilter, TopicName, Version};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::generate::{self, Sender};
use crate::{Random, VERSIONS, damage, decoder, encode};

const RUNS_PER_PACKET: usize = 1500;

/// Packets to damage, the same in each run.
pub(crate) fn seeds(version: Version, sender: Sender, number: usize) -> Vec<Packet> {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = generate::packet(version, sender);
    (0..number)
        .map(|_| strategy.new_tree(&mut runner).unwrap().current())
        .collect()
}

/// What each fuzz target for packets checks too.
fn check(bytes: &[u8], version: Version, sender: Sender, expects_connect: bool) {
    const AFTER: &[u8] = b"\xC0\x00after";
    let mut decoder = decoder(version, sender, expects_connect);
    let mut joined = BytesMut::from(bytes);
    joined.put_slice(AFTER);
    let mut src = joined.freeze();
    let whole = src.len();
    let needed = decoder.needed(&src);
    match decoder.decode(&mut src) {
        Ok(Some(packet)) => {
            assert_eq!(Some(whole - src.len()), needed, "{bytes:02X?}");
            let version = decoder.version().unwrap();
            let again = encode(&packet, version);
            let mut decoder = crate::decoder(version, sender, matches!(packet, Packet::Connect(_)));
            assert_eq!(
                decoder.decode(&mut again.clone()),
                Ok(Some(packet)),
                "{bytes:02X?}"
            );
        }
        Ok(None) => assert_eq!(src.len(), whole, "{bytes:02X?}"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[test]
fn damaged_packets_do_no_harm() {
    let mut random = Random(0x6D6F_6F72_6C69_6E65);
    for version in VERSIONS {
        for sender in [Sender::Client, Sender::Server] {
            for packet in seeds(version, sender, 60) {
                let original = encode(&packet, version);
                let expects_connect = matches!(packet, Packet::Connect(_));
                for _ in 0..RUNS_PER_PACKET {
                    let mut bytes = original.to_vec();
                    damage(&mut bytes, &mut random);
                    check(&bytes, version, sender, expects_connect);
                }
            }
        }
    }
}

#[test]
fn noise_does_no_harm() {
    let mut random = Random(42);
    for _ in 0..40_000 {
        let bytes: Vec<u8> = (0..random.below(24)).map(|_| random.next() as u8).collect();
        for version in VERSIONS {
            check(&bytes, version, Sender::Client, false);
            check(&bytes, version, Sender::Server, false);
            check(&bytes, version, Sender::Client, true);
        }
    }
}

/// Matching level by level, in the words of section 4.7 and nothing else.
fn matches_by_the_book(filter: &[&str], topic: &[&str]) -> bool {
    match (filter, topic) {
        (["#"], _) | ([], []) => true,
        (["+", filter @ ..], [_, topic @ ..]) => matches_by_the_book(filter, topic),
        ([wanted, filter @ ..], [found, topic @ ..]) => {
            wanted == found && matches_by_the_book(filter, topic)
        }
        _ => false,
    }
}

#[test]
fn filters_and_topics_do_no_harm_and_match_by_the_book() {
    const PIECES: [&str; 10] = ["a", "b", "/", "/", "+", "#", "$", "$share/g/", "é", "\0"];
    let mut random = Random(7);
    let mut matched = 0;
    for _ in 0..60_000 {
        let mut text = || {
            (0..random.below(6))
                .map(|_| PIECES[random.below(10)])
                .collect::<String>()
        };
        let (filter, topic) = (text(), text());
        let Ok(filter) = TopicFilter::parse(filter.into()) else {
            continue;
        };
        let Ok(topic) = TopicName::parse(topic.into()) else {
            continue;
        };
        let plain = filter.share().map_or(filter.as_str(), |(_, plain)| plain);
        let hidden = topic.as_str().starts_with('$') && plain.starts_with(['+', '#']);
        let levels = |text: &str| text.split('/').map(str::to_owned).collect::<Vec<_>>();
        let (wanted, found) = (levels(plain), levels(topic.as_str()));
        let (wanted, found): (Vec<_>, Vec<_>) = (
            wanted.iter().map(|l| &**l).collect(),
            found.iter().map(|l| &**l).collect(),
        );
        let expected = !hidden && matches_by_the_book(&wanted, &found);
        assert_eq!(filter.matches(&topic), expected, "{filter} and {topic}");
        matched += u32::from(expected);
    }
    assert!(
        matched > 500,
        "{matched} pairs matched: the pieces are badly chosen"
    );
}

#[test]
fn a_decoder_for_anything_announces_no_more_than_its_limit() {
    let mut random = Random(1);
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..5).map(|_| random.next() as u8).collect();
        let decoder = decoder(Version::V5, Sender::Client, false);
        let needed = decoder.needed(&Bytes::from(bytes));
        assert!(needed.is_none_or(|bytes| bytes <= crate::PACKET_BYTES_MAX as usize));
    }
}
