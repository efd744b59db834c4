use std::collections::BTreeSet;

use moorline_mqtt::{QoS, TopicFilter};
use proptest::prelude::*;

use super::super::routing_key::{exchange_matches, routing_key};
use super::*;

/// What a broker would hold, and how often it was spoken to.
#[derive(Default)]
struct Broker {
    bound: BTreeSet<String>,
    operations: usize,
}

impl Broker {
    fn apply(&mut self, changes: Changes) {
        self.operations += changes.bind.len() + changes.unbind.len();
        for pattern in changes.bind {
            assert!(self.bound.insert(pattern.clone()), "{pattern} bound twice");
        }
        for pattern in changes.unbind {
            assert!(self.bound.remove(&pattern), "{pattern} was not bound");
        }
    }

    fn takes(&self, topic: &str) -> bool {
        let key = routing_key(topic, QoS::AtLeastOnce);
        let mut patterns = self.bound.iter();
        patterns.any(|pattern| exchange_matches(&format!("*.{pattern}"), &key))
    }
}

#[test]
fn few_filters_are_bound_as_they_are() {
    let mut bindings = Bindings::new(8);
    let mut broker = Broker::default();
    for filter in ["a/b", "a/+", "b/#", "a/b"] {
        broker.apply(bindings.add(filter));
    }
    let bound: Vec<&str> = broker.bound.iter().map(String::as_str).collect();
    assert_eq!(bound, ["%l", "a.*", "a.b", "b.#"]);
    for filter in ["a/b", "a/+", "b/#"] {
        broker.apply(bindings.remove(filter));
    }
    assert_eq!(bindings.patterns(), ["a.b"]);
    assert!(!bindings.is_empty());
    broker.apply(bindings.remove("a/b"));
    assert!(broker.bound.is_empty() && bindings.is_empty());
    assert!(bindings.remove("a/b").is_empty());
}

#[test]
fn an_open_filter_takes_the_place_of_what_begins_like_it() {
    let mut bindings = Bindings::new(8);
    let mut broker = Broker::default();
    for filter in ["a/b", "a/c/d", "a/#"] {
        broker.apply(bindings.add(filter));
    }
    assert_eq!(broker.bound.iter().collect::<Vec<_>>(), ["%l", "a.#"]);
    broker.apply(bindings.remove("a/#"));
    assert_eq!(broker.bound.iter().collect::<Vec<_>>(), ["a.b", "a.c.d"]);
}

/// What the limit is for: devices that come and go with a topic of their own each.
#[test]
fn a_storm_of_ten_thousand_own_topics_costs_few_operations() {
    for (name, filter, come_max) in [
        (
            "dev/N/cmd",
            (|n| format!("dev/{n}/cmd")) as fn(usize) -> String,
            130,
        ),
        ("t/N%100/N", |n| format!("t/{}/{n}", n % 100), 130),
        // One tenant after the other: each is bound as it is until it is coarsened.
        ("t/N/100/N", |n| format!("t/{}/{n}", n / 100), 4_000),
        ("N/cmd", |n| format!("{n}/cmd"), 130),
        ("dev/N/#", |n| format!("dev/{n}/#"), 130),
    ] {
        let mut bindings = Bindings::new(64);
        let mut broker = Broker::default();
        for n in 0..10_000 {
            broker.apply(bindings.add(&filter(n)));
        }
        let come = broker.operations;
        // Every one of them leaves and comes back, a few hundred at a time.
        for n in 0..10_000 {
            broker.apply(bindings.remove(&filter(n)));
            if n >= 300 {
                broker.apply(bindings.add(&filter(n - 300)));
            }
        }
        let hopped = broker.operations - come;
        for n in 9_700..10_000 {
            broker.apply(bindings.add(&filter(n)));
        }
        for n in 0..10_000 {
            assert!(broker.takes(&filter(n).replace('#', "x")), "{n} of {name}");
        }
        let before = broker.operations;
        for n in 0..10_000 {
            broker.apply(bindings.remove(&filter(n)));
        }
        let gone = broker.operations - before;
        assert!(come < come_max, "{name}: {come}");
        assert!(hopped < 10, "{name}: {hopped}");
        assert!(gone < 100, "{name}: {gone}");
        assert!(broker.bound.is_empty());
    }
}

#[test]
fn a_number_that_swings_about_the_limit_changes_little() {
    let mut bindings = Bindings::new(64);
    let mut broker = Broker::default();
    for n in 0..64 {
        broker.apply(bindings.add(&format!("a/{n}")));
    }
    let before = broker.operations;
    for _ in 0..1000 {
        for n in 60..70 {
            broker.apply(bindings.add(&format!("a/{n}x")));
        }
        for n in 60..70 {
            broker.apply(bindings.remove(&format!("a/{n}x")));
        }
    }
    assert!(broker.operations - before < 100);
}

fn level() -> impl Strategy<Value = String> {
    let long = "x".repeat(140);
    prop::sample::select(vec![
        String::new(),
        "a".into(),
        "b.c".into(),
        "%".into(),
        "$x".into(),
        "*".into(),
        long,
    ])
}

fn filter() -> impl Strategy<Value = String> {
    let levels = prop::collection::vec(prop_oneof![4 => level(), 1 => Just("+".to_owned())], 1..5);
    (levels, prop::bool::weighted(0.2)).prop_map(|(levels, open)| {
        let mut text = levels.join("/");
        if open {
            text.push_str("/#");
        }
        text
    })
}

proptest! {
    #[test]
    fn whatever_a_filter_matches_reaches_its_queue(
        steps in prop::collection::vec((filter(), prop::bool::weighted(0.65)), 1..60),
        topics in prop::collection::vec(prop::collection::vec(level(), 1..6), 40),
        limit in 2_usize..12,
    ) {
        let mut bindings = Bindings::new(limit);
        let mut broker = Broker::default();
        let mut held: Vec<String> = Vec::new();
        for (text, adds) in steps {
            if TopicFilter::parse(text.as_str().into()).is_err() { continue }
            if adds {
                broker.apply(bindings.add(&text));
                held.push(text);
            } else if held.is_empty() {
                prop_assert!(bindings.remove(&text).is_empty());
            } else {
                let gone = held.swap_remove(text.len() % held.len());
                broker.apply(bindings.remove(&gone));
            }
            prop_assert!(broker.bound.len() <= limit, "{:?}", broker.bound);
            prop_assert_eq!(bindings.len(), broker.bound.len());
            let listed: BTreeSet<String> = bindings.patterns().into_iter().collect();
            prop_assert_eq!(&listed, &broker.bound);
            for pattern in &broker.bound {
                prop_assert!(pattern.len() <= 253);
            }
        }
        for levels in &topics {
            let topic = levels.join("/");
            for text in &held {
                let parsed = TopicFilter::parse(text.as_str().into()).unwrap();
                if parsed.matches(&topic) {
                    prop_assert!(broker.takes(&topic), "{} for {}: {:?}", topic, text, broker.bound);
                }
            }
        }
        for text in held {
            broker.apply(bindings.remove(&text));
        }
        prop_assert!(broker.bound.is_empty());
    }
}
