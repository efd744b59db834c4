//! Cases of the seams that only a deployment of many nodes has: shards, and changes of retained messages.

use std::time::Duration;

use bytes::Bytes;
use moorline_router::contract::{eventually, push, topic};
use moorline_router::redis::Config;
use moorline_router::{
    ClientId, Epoch, Message, NodeId, NodeRecord, NodeState, Retained, RetainedVersion, Routes,
    SessionRecord, Sessions, Shards, TimerKind, WillTurn, unix_ms,
};

use super::support::{client, open};

/// Makes a test of every case for one deployment.
macro_rules! shard_cases {
    ($config:expr) => {
        $crate::shards::shard_cases!($config;
            a_shard_has_one_holder_at_a_time,
            sessions_are_found_by_their_shard,
            timers_are_due_in_their_order_and_belong_to_a_connection,
            clients_of_a_dead_node_are_found_until_their_routes_are_released,
            a_node_learns_what_others_have_retained,
            what_was_asked_for_earlier_replaces_nothing_that_was_retained_since,
            a_will_is_published_by_one_who_may_die_over_it,
            retained_messages_that_expired_are_removed_in_steps,
        );
    };
    ($config:expr; $($case:ident),+ $(,)?) => {
        mod shards {
            use super::*;
            $(
                #[tokio::test]
                async fn $case() {
                    $crate::shards::$case($config).await;
                }
            )+
        }
    };
}
pub(crate) use shard_cases;

pub(crate) fn node(name: &str) -> NodeRecord {
    NodeRecord {
        id: NodeId::from_text(name),
        address: "http://127.0.0.1:1".into(),
        version: "0.1.0".into(),
        state: NodeState::Up,
        connections: 3,
        region: "north".into(),
        server_reference: String::new(),
    }
}

pub(crate) async fn a_shard_has_one_holder_at_a_time(config: Config) {
    let (store, (a, b)) = (open(&config), (node("a").id, node("b").id));
    assert_eq!(store.holder(3).await.unwrap(), None);
    assert!(store.hold(3, &a, 60_000).await.unwrap());
    assert!(!store.hold(3, &b, 60_000).await.unwrap());
    assert!(
        store.hold(3, &a, 60_000).await.unwrap(),
        "its holder renews it"
    );
    assert!(store.hold(4, &b, 60_000).await.unwrap());
    store.let_go(3, &b).await.unwrap();
    assert_eq!(store.holder(3).await.unwrap(), Some(a.clone()));
    store.let_go(3, &a).await.unwrap();
    assert_eq!(store.holder(3).await.unwrap(), None);
    assert!(store.hold(3, &b, 200).await.unwrap());
    eventually("the lease has lapsed", || async {
        store.hold(3, &a, 60_000).await.unwrap()
    })
    .await;
    // A node that leaves has no shards any more.
    store.leave(&a).await.unwrap();
    assert!(store.hold(3, &b, 60_000).await.unwrap());
}

fn session(client: ClientId) -> SessionRecord {
    SessionRecord {
        client,
        expiry_interval_s: 60,
        disconnected_at_ms: None,
        subscriptions: Vec::new(),
    }
}

pub(crate) async fn sessions_are_found_by_their_shard(config: Config) {
    let store = open(&config);
    let mut clients: Vec<ClientId> = (0..200).map(|n| client(&format!("device {n}"))).collect();
    for client in &clients {
        store.save(Epoch(1), session(client.clone())).await.unwrap();
    }
    store.delete(&clients[7], None).await.unwrap();
    clients.remove(7);
    clients.sort();
    let mut found = Vec::new();
    for shard in 0..store.count() {
        let mut in_shard: Vec<ClientId> = Vec::new();
        loop {
            let page = store.sessions(shard, in_shard.last(), 5).await.unwrap();
            if page.is_empty() {
                break;
            }
            assert!(page.len() <= 5);
            in_shard.extend(page.into_iter().map(|session| session.client));
        }
        assert!(in_shard.is_sorted() && in_shard.iter().all(|c| store.shard_of(c) == shard));
        found.extend(in_shard);
    }
    found.sort();
    assert_eq!(found, clients);
    // An older connection neither writes the session nor hides it.
    let newer = store.claim(&clients[0], &node("n").id).await.unwrap().epoch;
    store
        .save(newer, session(clients[0].clone()))
        .await
        .unwrap();
    assert!(store.delete(&clients[0], Some(Epoch(1))).await.is_err());
    let shard = store.shard_of(&clients[0]);
    let all = store.sessions(shard, None, 200).await.unwrap();
    assert!(all.iter().any(|session| session.client == clients[0]));
}

pub(crate) async fn timers_are_due_in_their_order_and_belong_to_a_connection(config: Config) {
    let store = open(&config);
    let device = client("device");
    let shard = store.shard_of(&device);
    let (will, expiry) = (TimerKind::Will, TimerKind::SessionExpiry);
    let nothing = store.due(shard, 10).await.unwrap();
    assert!(nothing.timers.is_empty() && nothing.next_in_ms.is_none());
    store
        .set_timer(&device, will, Epoch(2), 60_000)
        .await
        .unwrap();
    let next = store.due(shard, 10).await.unwrap().next_in_ms.unwrap();
    assert!((50_000..=60_000).contains(&next), "{next}");
    // Of an older connection: neither set nor cancelled.
    store.set_timer(&device, will, Epoch(1), 0).await.unwrap();
    store.cancel_timer(&device, will, Epoch(1)).await.unwrap();
    assert!(store.due(shard, 10).await.unwrap().timers.is_empty());
    store.set_timer(&device, will, Epoch(3), 0).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    store.set_timer(&device, expiry, Epoch(3), 0).await.unwrap();
    let due = store.due(shard, 10).await.unwrap();
    let kinds: Vec<_> = due
        .timers
        .iter()
        .map(|timer| (timer.kind, timer.epoch))
        .collect();
    assert_eq!(kinds, [(will, Epoch(3)), (expiry, Epoch(3))]);
    assert!(due.timers.iter().all(|timer| timer.client == device));
    assert_eq!(store.due(shard, 1).await.unwrap().timers.len(), 1);
    // It stays until it is cancelled, also by a newer connection.
    store.cancel_timer(&device, will, Epoch(3)).await.unwrap();
    store.cancel_timer(&device, expiry, Epoch(4)).await.unwrap();
    let nothing = store.due(shard, 10).await.unwrap();
    assert!(nothing.timers.is_empty() && nothing.next_in_ms.is_none());
}

pub(crate) async fn clients_of_a_dead_node_are_found_until_their_routes_are_released(
    config: Config,
) {
    let store = open(&config);
    let (dying, staying) = (node("dying"), node("staying"));
    store.renew(dying.clone(), 1_000).await.unwrap();
    store.renew(staying.clone(), 1_000).await.unwrap();
    let (left, moved) = (client("left"), client("moved"));
    let epoch = store.claim(&left, &dying.id).await.unwrap().epoch;
    store.claim(&moved, &dying.id).await.unwrap();
    store.claim(&moved, &staying.id).await.unwrap();
    let all = async || {
        let mut all = Vec::new();
        for shard in 0..store.count() {
            all.extend(store.stranded(shard, 10).await.unwrap());
        }
        all
    };
    assert!(all().await.is_empty());
    eventually("the lease has lapsed", || async {
        store.renew(staying.clone(), 1_000).await.unwrap();
        let found = all().await;
        let found: Vec<_> = found
            .iter()
            .map(|(client, route)| (client, route.epoch))
            .collect();
        found == [(&left, epoch)]
    })
    .await;
    assert_eq!(store.look_up(&left).await.unwrap(), None);
    assert_eq!(store.nodes().await.unwrap(), [staying]);
    assert!(store.release(&left, epoch).await.unwrap());
    assert!(all().await.is_empty());
    assert!(store.look_up(&moved).await.unwrap().is_some());
}

pub(crate) async fn retained_messages_that_expired_are_removed_in_steps(config: Config) {
    let store = open(&config);
    let message = |name: &str, expires_at_ms| Message {
        topic: topic(name),
        retain: true,
        expires_at_ms,
        ..push("x")
    };
    let over = Some(unix_ms() - 60_000);
    let later = Some(unix_ms() + 600_000);
    let set = async |name: &str, expires_at_ms| {
        let message = message(name, expires_at_ms);
        let topic = message.topic.clone();
        store.set(&topic, Some(&message), None).await.unwrap();
    };
    for name in ["a", "b", "c", "renewed", "kept", "removed"] {
        set(name, over).await;
    }
    for (name, expires_at_ms) in [("renewed", later), ("kept", None), ("lasting", later)] {
        set(name, expires_at_ms).await;
    }
    store.set(&topic("removed"), None, None).await.unwrap();
    let before = store.changes(RetainedVersion::default()).await.unwrap();
    let before = before.unwrap().version;
    assert_eq!(store.expire(2).await.unwrap(), 2);
    assert_eq!(store.expire(2).await.unwrap(), 1);
    assert_eq!(store.expire(2).await.unwrap(), 0);
    let left = Retained::load_all(&*store).await.unwrap();
    let left: Vec<&str> = left.iter().map(|message| message.topic.as_str()).collect();
    assert_eq!(left, ["kept", "lasting", "renewed"]);
    // Nobody has to be told, and what is set anew is there.
    let none = store.changes(before).await.unwrap().unwrap();
    assert!(!none.complete && none.topics.is_empty(), "{none:?}");
    set("a", None).await;
    let changed = store.changes(before).await.unwrap().unwrap();
    assert_eq!(changed.topics.len(), 1);
    assert_eq!(store.expire(9).await.unwrap(), 0);
}

pub(crate) async fn a_node_learns_what_others_have_retained(config: Config) {
    let (here, there) = (open(&config), open(&config));
    let message = |name: &str, payload: &'static str| Message {
        topic: topic(name),
        retain: true,
        payload: Bytes::from_static(payload.as_bytes()),
        ..push("")
    };
    let (a, b) = (message("a", "1"), message("b", "1"));
    here.set(&a.topic, Some(&a), None).await.unwrap();
    here.set(&b.topic, Some(&b), None).await.unwrap();
    let all = there
        .changes(RetainedVersion::default())
        .await
        .unwrap()
        .unwrap();
    assert!(all.complete);
    assert_eq!(
        all.topics,
        [
            (a.topic.clone(), Some(a.clone())),
            (b.topic.clone(), Some(b.clone()))
        ]
    );
    let none = there.changes(all.version).await.unwrap().unwrap();
    assert!(!none.complete && none.topics.is_empty());
    assert_eq!(none.version, all.version);
    let newer = message("a", "2");
    here.set(&b.topic, None, None).await.unwrap();
    here.set(&a.topic, Some(&newer), None).await.unwrap();
    let changed = there.changes(all.version).await.unwrap().unwrap();
    assert!(!changed.complete && changed.version > all.version);
    assert_eq!(
        changed.topics,
        [(b.topic.clone(), None), (a.topic, Some(newer.clone()))]
    );
    // More than fits into one answer, and a version that this store has never had.
    let mut setting = Vec::new();
    for n in 0..1_100 {
        let many = message(&format!("many/{n}"), "x");
        setting.push(here.set(&many.topic, Some(&many), None));
    }
    setting.push(here.set(&b.topic, Some(&b), None));
    for set in setting {
        set.await.unwrap();
    }
    let many = there.changes(changed.version).await.unwrap().unwrap();
    assert!(!many.complete);
    assert_eq!(many.topics.len(), 1_101);
    let unknown = RetainedVersion {
        generation: many.version.generation + 1,
        ..many.version
    };
    let all = there.changes(unknown).await.unwrap().unwrap();
    assert!(all.complete && all.version == many.version);
    assert_eq!(all.topics.len(), 1_102);
    assert_eq!(Retained::load_all(&*there).await.unwrap().len(), 1_102);
}

pub(crate) async fn what_was_asked_for_earlier_replaces_nothing_that_was_retained_since(
    config: Config,
) {
    let (here, there) = (open(&config), open(&config));
    let message = |payload: &'static str| Message {
        topic: topic("state"),
        retain: true,
        payload: Bytes::from_static(payload.as_bytes()),
        ..push("")
    };
    let state = topic("state");
    let kept = async || {
        let all = Retained::load_all(&*there).await.unwrap();
        all.into_iter().next().map(|message| message.payload)
    };
    assert_eq!(here.now(), None, "nothing is known of the store's clock");
    for store in [&here, &there] {
        store.changes(RetainedVersion::default()).await.unwrap();
    }
    let earlier = here.now();
    assert!(earlier.is_some());
    // As often as it is asked for: nothing is newer.
    for _ in 0..2 {
        let set = here.set(&state, Some(&message("old")), earlier);
        set.await.unwrap();
        assert_eq!(kept().await.unwrap(), "old");
    }
    for later in [None, there.now()] {
        let set = there.set(&state, Some(&message("new")), later);
        set.await.unwrap();
        let late = here.set(&state, Some(&message("old")), earlier);
        late.await.unwrap();
        here.set(&state, None, earlier).await.unwrap();
        assert_eq!(kept().await.unwrap(), "new");
    }
    // Nor does it undo a removal.
    there.set(&state, None, None).await.unwrap();
    let late = here.set(&state, Some(&message("old")), earlier);
    late.await.unwrap();
    assert_eq!(kept().await, None);
    // One after the other, whoever asks: each is newer than those that are done.
    for n in 0..20 {
        let store = [&here, &there][n % 2];
        let sets = ["first", "second", "last"].map(|payload| {
            let asked = store.now();
            store.set(&state, Some(&message(payload)), asked)
        });
        for set in sets {
            set.await.unwrap();
        }
        assert_eq!(kept().await.unwrap(), "last");
        let asked = store.now();
        store.set(&state, None, asked).await.unwrap();
        assert_eq!(kept().await, None);
    }
}

pub(crate) async fn a_will_is_published_by_one_who_may_die_over_it(config: Config) {
    let (store, device) = (open(&config), client("device"));
    let turn = async |epoch, whose, turn_ms| {
        let taken = store.take_will(&device, Epoch(epoch), whose, turn_ms);
        taken.await.unwrap()
    };
    assert_eq!(turn(1, "a", 60_000).await, WillTurn::Yours);
    assert_eq!(turn(1, "b", 60_000).await, WillTurn::Anothers);
    assert_eq!(turn(1, "a", 200).await, WillTurn::Yours);
    // That of the next connection is another, also while this one is not published yet.
    assert_eq!(turn(2, "b", 60_000).await, WillTurn::Yours);
    eventually("the turn of who died is over", || async {
        turn(1, "b", 60_000).await == WillTurn::Yours
    })
    .await;
    assert_eq!(turn(1, "a", 60_000).await, WillTurn::Anothers);
    // Published, although another will has taken its place in the store by then.
    store.delete_will(&device, Epoch(1)).await.unwrap();
    for whose in ["a", "b"] {
        assert_eq!(turn(1, whose, 60_000).await, WillTurn::Over);
    }
    assert_eq!(turn(2, "a", 60_000).await, WillTurn::Anothers);
}
