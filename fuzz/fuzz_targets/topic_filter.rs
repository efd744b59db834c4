//! A topic filter and a topic name, one line each, matched in two ways.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moorline_mqtt::{TopicFilter, TopicName};

fuzz_target!(|text: &str| {
    let (filter, topic) = text.split_once('\n').unwrap_or((text, text));
    let Ok(filter) = TopicFilter::parse(filter.into()) else {
        return;
    };
    assert_eq!(filter.has_wildcards(), filter.as_str().contains(['+', '#']));
    let Ok(topic) = TopicName::parse(topic.into()) else {
        return;
    };
    let plain = filter.share().map_or(filter.as_str(), |(_, plain)| plain);
    let hidden = topic.as_str().starts_with('$') && plain.starts_with(['+', '#']);
    let wanted: Vec<_> = plain.split('/').collect();
    let found: Vec<_> = topic.as_str().split('/').collect();
    assert_eq!(
        filter.matches(&topic),
        !hidden && matches_by_the_book(&wanted, &found)
    );
});

/// Level by level, in the words of section 4.7 of MQTT 5.0.
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
