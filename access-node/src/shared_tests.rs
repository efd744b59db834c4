use std::collections::{BTreeMap, BTreeSet};

use moorline_router::ClientId;
use proptest::prelude::*;

use super::*;

fn session(name: &str, expiry_interval_s: u32) -> Arc<Session> {
    Arc::new(Session::new(
        ClientId::parse(name).unwrap(),
        expiry_interval_s,
    ))
}

fn member(session: &Arc<Session>, qos: QoS) -> Subscriber<Session> {
    Subscriber {
        session: Arc::clone(session),
        options: SubscriptionOptions { qos, ..UNUSED },
        subscription_id: 0,
    }
}

fn join(to: &SharedSubscriptions, session: &Arc<Session>, filter: &str) -> bool {
    let parsed = TopicFilter::parse(filter.into()).unwrap();
    to.add(&filter.into(), &parsed, member(session, QoS::AtLeastOnce))
}

fn chosen(group: &Group, qos: QoS, passed_over: &[Arc<Session>]) -> Option<String> {
    let member = group.choose(qos, passed_over, &Config::default())?;
    Some(member.session.client.as_str().to_owned())
}

#[test]
fn members_take_turns_also_while_others_join_and_leave() {
    let shared = SharedSubscriptions::default();
    let filter = "$share/g/a/+";
    let sessions: Vec<_> = (0..5).map(|n| session(&n.to_string(), 60)).collect();
    for session in &sessions[..4] {
        assert!(join(&shared, session, filter));
    }
    assert!(
        !join(&shared, &sessions[1], filter),
        "nobody is in it twice"
    );
    let group = shared.group(filter).unwrap();
    let turns = || chosen(&group, QoS::ExactlyOnce, &[]).unwrap();
    let first: Vec<_> = (0..6).map(|_| turns()).collect();
    assert_eq!(first, ["0", "1", "2", "3", "0", "1"]);
    assert!(shared.remove(filter, &sessions[0]));
    assert!(!shared.remove(filter, &sessions[0]));
    assert_eq!(
        [turns(), turns()],
        ["2", "3"],
        "the turn stays where it was"
    );
    assert!(join(&shared, &sessions[4], filter));
    assert_eq!([turns(), turns(), turns()], ["1", "2", "3"]);
    assert_eq!(turns(), "4");
}

#[test]
fn who_can_get_nothing_is_not_chosen() {
    let shared = SharedSubscriptions::default();
    let filter = "$share/g/a";
    let [clean, ended, away] =
        [("clean", 0), ("ended", 60), ("away", 60)].map(|(name, expiry_s)| session(name, expiry_s));
    for session in [&clean, &ended, &away] {
        join(&shared, session, filter);
    }
    ended.lock().ended = true;
    let group = shared.group(filter).unwrap();
    for _ in 0..3 {
        let got = chosen(&group, QoS::AtLeastOnce, &[]);
        assert_eq!(got.as_deref(), Some("away"));
    }
    let passed_over = [Arc::clone(&away)];
    assert_eq!(chosen(&group, QoS::AtLeastOnce, &passed_over), None);
    assert_eq!(
        chosen(&group, QoS::AtMostOnce, &[]),
        None,
        "QoS 0 is kept for nobody"
    );
}

#[test]
fn a_group_ends_with_its_last_member() {
    let shared = SharedSubscriptions::default();
    let one = session("one", 60);
    for filter in ["$share/g/a", "$share/g/+/b", "$share/h/a", "$share/g/#"] {
        join(&shared, &one, filter);
        assert!(!shared.remove("$share/g/other", &one));
        assert!(shared.remove(filter, &one));
        assert!(shared.group(filter).is_none());
    }
    assert!(shared.groups.is_empty() && shared.matching("a").is_empty());
    assert_eq!(shared.count.load(Ordering::Acquire), 0);
}

#[test]
fn less_before_it_is_better_and_being_away_is_better_than_being_full() {
    let best_first = [
        Standing::Room,
        Standing::Loaded(0),
        Standing::Loaded(7),
        Standing::Away,
        Standing::Full,
    ];
    assert!(best_first.is_sorted());
}

const FILTERS: [&str; 8] = [
    "$share/g/a",
    "$share/h/a",
    "$share/g/a/+",
    "$share/g/+/b",
    "$share/g/#",
    "$share/h/+",
    "$share/g//",
    "$share/g/a/b",
];

proptest! {
    #[test]
    fn the_groups_agree_with_matching_one_by_one(
        steps in prop::collection::vec((0..4_usize, 0..FILTERS.len(), any::<bool>()), 1..40),
    ) {
        let shared = SharedSubscriptions::default();
        let sessions: Vec<_> = (0..4).map(|n| session(&n.to_string(), 60)).collect();
        let mut model: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        for (who, filter, joins) in steps {
            let (session, filter) = (&sessions[who], FILTERS[filter]);
            let members = model.entry(filter).or_default();
            if joins {
                prop_assert_eq!(join(&shared, session, filter), members.insert(who));
            } else {
                prop_assert_eq!(shared.remove(filter, session), members.remove(&who));
            }
        }
        model.retain(|_, members| !members.is_empty());
        for topic in ["a", "a/b", "b", "c/b", "/", "a/b/c", "$x/b"] {
            let mut found: Vec<String> =
                shared.matching(topic).iter().map(|group| group.filter.to_string()).collect();
            found.sort_unstable();
            let matches = |filter: &&&str| TopicFilter::parse((**filter).into()).unwrap().matches(topic);
            let mut expected: Vec<String> =
                model.keys().filter(matches).map(|filter| (*filter).to_owned()).collect();
            expected.sort_unstable();
            prop_assert_eq!(found, expected, "topic {}", topic);
        }
        for (filter, members) in &model {
            let group = shared.group(filter).unwrap();
            let rounds = 3;
            let mut counts = BTreeMap::new();
            for _ in 0..rounds * members.len() {
                *counts.entry(chosen(&group, QoS::AtLeastOnce, &[]).unwrap()).or_insert(0) += 1;
            }
            let expected: BTreeMap<_, _> = members.iter().map(|who| (who.to_string(), rounds)).collect();
            prop_assert_eq!(counts, expected, "{} is not fair", filter);
        }
    }
}
