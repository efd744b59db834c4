use moorline_mqtt::TopicFilter;
use proptest::prelude::*;

use super::*;

fn names(client: &str) -> Names<'_> {
    Names {
        client,
        username: Some("ann"),
        certificate: None,
    }
}

fn rule(permission: Permission, action: Action, topics: &[&str]) -> RuleConfig {
    RuleConfig {
        permission,
        action,
        topics: topics.iter().map(|text| (*text).to_owned()).collect(),
        users: Vec::new(),
    }
}

fn acl(default: Permission, rules: Vec<RuleConfig>) -> Acl {
    Acl::new(&AclConfig { default, rules }, "d").unwrap()
}

fn relation(pattern: &str, filter: &str) -> Relation {
    Pattern::parse(pattern)
        .unwrap()
        .relation_to(filter, false, names("car-7"))
}

#[test]
fn without_rules_a_device_has_its_own_topics_and_no_other_devices() {
    for default in [Permission::Deny, Permission::Allow] {
        let acl = acl(default, Vec::new());
        let may = |wish| acl.allows(&[], wish, names("car-7"));
        for own in ["d/car-7", "d/car-7/push", "d/car-7/a/b"] {
            assert!(may(Wish::Publish(own)), "{own}");
            assert!(may(Wish::Subscribe(own)), "{own}");
        }
        for own in ["d/car-7/#", "d/car-7/+/x"] {
            assert!(may(Wish::Subscribe(own)), "{own}");
        }
        for others in ["d", "d/car-8/push", "d/car-70", "d/", "d//x"] {
            assert!(!may(Wish::Publish(others)), "{others}");
            assert!(!may(Wish::Subscribe(others)), "{others}");
        }
        for others in [
            "#",
            "+/#",
            "d/#",
            "d/+/push",
            "+/car-7/push",
            "+/+",
            "+",
            "d/+",
        ] {
            assert!(!may(Wish::Subscribe(others)), "{others}");
        }
        assert!(may(Wish::Publish("up/x")) && may(Wish::Publish("req/a/b")));
        let other = default == Permission::Allow;
        assert_eq!(may(Wish::Subscribe("up/#")), other);
        assert_eq!(may(Wish::Publish("news")), other);
        assert_eq!(may(Wish::Subscribe("news/+")), other);
        assert_eq!(may(Wish::Subscribe("$SYS/#")), other);
    }
}

#[test]
fn a_name_that_is_no_level_gets_nothing_by_a_placeholder() {
    let acl = acl(
        Permission::Deny,
        vec![rule(Permission::Allow, Action::All, &["{client_id}/#"])],
    );
    for bad in ["a/b", "+", "#", "a+", "$SYS", "{username}"] {
        let own = format!("d/{bad}/push");
        let granted = bad == "{username}" || bad == "$SYS";
        assert_eq!(
            acl.allows(&[], Wish::Subscribe(&own), names(bad)),
            granted,
            "{bad}"
        );
        assert!(!acl.allows(&[], Wish::Subscribe("d/a/push"), names(bad)));
        assert!(!acl.allows(&[], Wish::Subscribe("$SYS/x"), names(bad)));
        assert!(!acl.allows(&[], Wish::Publish("d/ann/push"), names(bad)));
    }
    let nobody = Names {
        client: "x",
        username: None,
        certificate: Some(""),
    };
    for topic in ["{username}/a", "{certificate}/a"] {
        let pattern = Pattern::parse(topic).unwrap();
        assert_eq!(pattern.relation_to("/a", true, nobody), Relation::Apart);
        assert_eq!(pattern.relation_to("#", false, nobody), Relation::Apart);
    }
}

#[test]
fn placeholders_stand_in_and_beside_text() {
    for (pattern, filter, expected) in [
        ("room-{username}/x", "room-ann/x", Relation::Covers),
        ("room-{username}/x", "room-ann", Relation::Apart),
        ("{username}.{client_id}", "ann.car-7", Relation::Covers),
        ("{username}.{client_id}", "ann.car-70", Relation::Apart),
        ("{username}/#", "+/x", Relation::Overlaps),
    ] {
        assert_eq!(relation(pattern, filter), expected, "{pattern} {filter}");
    }
    for wrong in [
        "{user}",
        "{username",
        "username}",
        "a{",
        "{}",
        "a/{client_id}}",
    ] {
        assert!(Pattern::parse(wrong).is_err(), "{wrong}");
    }
    for wrong in ["", "a#", "$share/g/a", "a/#/b"] {
        assert!(Pattern::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_filter_is_compared_as_the_set_of_its_topics() {
    use Relation::{Apart, Covers, Overlaps};
    for (pattern, filter, expected) in [
        ("#", "+/#", Covers),
        ("+/#", "#", Covers),
        ("#", "$SYS/x", Apart),
        ("$SYS/#", "#", Apart),
        ("$SYS/x", "+/x", Apart),
        ("$SYS/#", "$SYS/+", Covers),
        ("a/#", "a", Covers),
        ("a", "a/#", Overlaps),
        ("a/+", "a/#", Overlaps),
        ("a/+/#", "a/#", Overlaps),
        ("a/#", "a/+/#", Covers),
        ("a/+", "+/b", Overlaps),
        ("+/b", "a/+", Overlaps),
        ("a/b", "a/+", Overlaps),
        ("a/+", "a/b", Covers),
        ("a/+", "a/b/c", Apart),
        ("a/b/+", "a/#", Overlaps),
        ("+", "/", Apart),
        ("+/+", "/", Covers),
    ] {
        assert_eq!(relation(pattern, filter), expected, "{pattern} {filter}");
    }
}

#[test]
fn the_first_rule_that_decides_wins_and_own_rules_come_first() {
    let acl = acl(
        Permission::Deny,
        vec![
            rule(Permission::Deny, Action::Subscribe, &["news/secret"]),
            rule(Permission::Allow, Action::All, &["news/#"]),
            RuleConfig {
                users: vec!["operator".to_owned()],
                ..rule(Permission::Allow, Action::All, &["#"])
            },
        ],
    );
    let may = |wish| acl.allows(&[], wish, names("car-7"));
    assert!(may(Wish::Publish("news/secret")));
    assert!(!may(Wish::Subscribe("news/secret")));
    assert!(may(Wish::Subscribe("news/a/#")));
    assert!(!may(Wish::Subscribe("news/#")), "a denied topic is in it");
    assert!(!may(Wish::Subscribe("news/+")));
    let operator = Names {
        username: Some("operator"),
        ..names("console")
    };
    assert!(acl.allows(&[], Wish::Publish("d/car-7/push"), operator));
    assert!(!acl.allows(&[], Wish::Subscribe("#"), operator));
    let own = parse_own(&[rule(Permission::Allow, Action::Subscribe, &["news/secret"])]).unwrap();
    assert!(acl.allows(&own, Wish::Subscribe("news/secret"), names("car-7")));
}

/// Every topic of up to three levels over a small alphabet, with one level that no rule names.
fn topics() -> Vec<String> {
    let levels = ["a", "b", "car-7", "ann", "d", "$x", "other", ""];
    let mut all: Vec<String> = levels.iter().map(|level| (*level).to_owned()).collect();
    let mut longest = all.clone();
    for _ in 0..3 {
        longest = longest
            .iter()
            .flat_map(|front| levels.iter().map(move |level| format!("{front}/{level}")))
            .collect();
        all.extend(longest.iter().cloned());
    }
    all.retain(|topic| !topic.is_empty());
    all
}

fn filter_levels(names: &'static [&'static str]) -> impl Strategy<Value = String> {
    let level = prop::sample::select(names);
    (prop::collection::vec(level, 1..4), any::<bool>()).prop_map(|(mut levels, rest)| {
        if rest {
            levels.pop();
            levels.push("#");
        }
        levels.join("/")
    })
}

fn any_rule() -> impl Strategy<Value = RuleConfig> {
    let pattern = filter_levels(&["a", "b", "+", "{client_id}", "{username}", "d", "$x"]);
    let permission = prop_oneof![Just(Permission::Allow), Just(Permission::Deny)];
    let topics = prop::collection::vec(pattern, 1..3);
    (permission, topics).prop_map(|(permission, topics)| RuleConfig {
        permission,
        action: Action::All,
        topics,
        users: Vec::new(),
    })
}

fn any_filter() -> impl Strategy<Value = String> {
    filter_levels(&["a", "b", "+", "car-7", "ann", "d", "$x"])
        .prop_filter("a topic filter", |text| {
            TopicFilter::parse(text.as_str().into()).is_ok()
        })
}

/// The topics of a pattern, by way of the matching of subscriptions.
fn matches(pattern: &str, topic: &str) -> bool {
    let filter = pattern
        .replace("{client_id}", "car-7")
        .replace("{username}", "ann");
    TopicFilter::parse(filter.into()).unwrap().matches(topic)
}

/// The decision on one topic, rule by rule, written down once more.
fn allowed(rules: &[RuleConfig], default: Permission, topic: &str) -> bool {
    let own = rule(Permission::Allow, Action::All, &["d/{client_id}/#"]);
    let others = rule(Permission::Deny, Action::All, &["d/#"]);
    let decision = rules
        .iter()
        .chain([&own, &others])
        .find(|rule| rule.topics.iter().any(|pattern| matches(pattern, topic)));
    decision.map_or(default, |rule| rule.permission) == Permission::Allow
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Sets of topics say what one walk along the levels says.
    #[test]
    fn relations_are_those_of_the_sets(
        pattern in filter_levels(&["a", "b", "+", "car-7", "d", "$x"]),
        filter in any_filter(),
    ) {
        let wanted = TopicFilter::parse(filter.as_str().into()).unwrap();
        let in_filter: Vec<String> =
            topics().into_iter().filter(|topic| wanted.matches(topic)).collect();
        let in_both = in_filter.iter().filter(|topic| matches(&pattern, topic)).count();
        let expected = match in_both {
            0 => Relation::Apart,
            n if n == in_filter.len() => Relation::Covers,
            _ => Relation::Overlaps,
        };
        prop_assert_eq!(relation(&pattern, &filter), expected);
    }

    /// No topic slips through a granted subscription; and one topic is granted exactly when it may be.
    #[test]
    fn a_granted_filter_holds_granted_topics_only(
        rules in prop::collection::vec(any_rule(), 0..5),
        filter in any_filter(),
        default in prop_oneof![Just(Permission::Allow), Just(Permission::Deny)],
    ) {
        let acl = acl(default, rules.clone());
        let wanted = TopicFilter::parse(filter.as_str().into()).unwrap();
        let granted = acl.allows(&[], Wish::Subscribe(&filter), names("car-7"));
        let mut all = true;
        let mut count = 0;
        for topic in topics().iter().filter(|topic| wanted.matches(topic)) {
            count += 1;
            let may = allowed(&rules, default, topic);
            all &= may;
            prop_assert!(may || !granted, "{} slips through {}", topic, filter);
        }
        // One topic is no set: the answer is exact.
        if count == 1 && !filter.contains(['+', '#']) {
            prop_assert_eq!(granted, all);
        }
    }

    #[test]
    fn a_publish_is_decided_by_the_first_rule_that_matches(
        rules in prop::collection::vec(any_rule(), 0..5),
        default in prop_oneof![Just(Permission::Allow), Just(Permission::Deny)],
        at in any::<prop::sample::Index>(),
    ) {
        let all = topics();
        let topic = at.get(&all);
        let acl = acl(default, rules.clone());
        prop_assert_eq!(
            acl.allows(&[], Wish::Publish(topic), names("car-7")),
            allowed(&rules, default, topic)
        );
    }
}
