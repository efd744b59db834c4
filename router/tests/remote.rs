//! The seam between processes, over real sockets; only the node behind it is made up.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use moorline_router::remote::{RemoteNodes, Security, Tls};
use moorline_router::{Ban, BanTarget, DeliveryOutcome, Epoch, Nodes, Position, Route, StoreError};
use support::{Cable, MadeUpNode, Registry, client, delivery, node_id, start, start_at};

/// Longer than any hint may wait for a node that does not answer.
const NEVER_LONGER: Duration = Duration::from_secs(5);

async fn deliver_one(nodes: &RemoteNodes, node: &str, to: &str, sequence: u64) -> DeliveryOutcome {
    let outcomes = nodes
        .deliver(&node_id(node), vec![delivery(to, sequence)])
        .await;
    assert_eq!(outcomes.len(), 1);
    outcomes[0]
}

async fn eventually_sent(nodes: &RemoteNodes, node: &str) {
    let started = Instant::now();
    while deliver_one(nodes, node, "car", 1).await != (DeliveryOutcome::Sent { epoch: Epoch(7) }) {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{node} is not reached again"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_hint_has_its_own_outcome_in_order() {
    let (registry, nodes) = Registry::with_remote();
    let node = start(&registry, "a").await;
    let outcomes = [
        DeliveryOutcome::Sent { epoch: Epoch(9) },
        DeliveryOutcome::Behind,
        DeliveryOutcome::Busy,
        DeliveryOutcome::Dropped,
    ];
    for (number, outcome) in outcomes.into_iter().enumerate() {
        node.outcome_of(&format!("car-{number}"), outcome);
    }
    let hints = (0..200).map(|number| delivery(&format!("car-{}", number % 4), number));
    let made = nodes.deliver(&node_id("a"), hints.collect()).await;
    let expected: Vec<_> = (0..200).map(|number| outcomes[number % 4]).collect();
    assert_eq!(made, expected);
    let seen = node.delivered();
    assert_eq!(seen.len(), 200);
    let first = seen
        .iter()
        .find(|hint| hint.position.unwrap().sequence == 6)
        .unwrap();
    assert_eq!(first.client, client("car-2"));
    assert_eq!(first.message, delivery("car-2", 6).message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_of_one_client_keep_their_order_while_many_are_on_their_way() {
    const CLIENTS: u64 = 20;
    const EACH: u64 = 500;
    let (registry, nodes) = Registry::with_remote();
    let node = start(&registry, "a").await;
    let mut answers = Vec::new();
    for sequence in 1..=EACH {
        for number in 0..CLIENTS {
            let hint = delivery(&format!("car-{number}"), sequence);
            // The first poll takes the place in the order.
            let id = node_id("a");
            let nodes = Arc::clone(&nodes);
            let answer = async move { nodes.deliver(&id, vec![hint]).await };
            let mut answer: BoxFuture<'_, Vec<DeliveryOutcome>> = Box::pin(answer);
            let polled = std::future::poll_fn(|cx| Poll::Ready(answer.as_mut().poll(cx)));
            if let Poll::Ready(outcomes) = polled.await {
                answer = Box::pin(std::future::ready(outcomes));
            }
            answers.push(answer);
        }
        if answers.len() > 2_000 {
            futures_util::future::join_all(answers.drain(..)).await;
        }
    }
    for outcomes in futures_util::future::join_all(answers).await {
        assert_eq!(outcomes, [DeliveryOutcome::Sent { epoch: Epoch(7) }]);
    }
    let seen = node.delivered();
    assert_eq!(seen.len() as u64, CLIENTS * EACH);
    for number in 0..CLIENTS {
        let of = client(&format!("car-{number}"));
        let sequences: Vec<_> = seen
            .iter()
            .filter(|hint| hint.client == of)
            .map(|hint| hint.position.unwrap().sequence)
            .collect();
        assert_eq!(sequences, (1..=EACH).collect::<Vec<_>>(), "{of}");
    }
    let batches = node.calls.load(Ordering::Relaxed) as u64;
    assert!(
        batches < CLIENTS * EACH / 2,
        "{batches} batches: nothing was gathered"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_node_is_not_sent_more_than_its_window() {
    let (registry, nodes) = Registry::with_remote();
    let node = start(&registry, "a").await;
    eventually_sent(&nodes, "a").await;
    let before = node.calls.load(Ordering::Relaxed);
    let held = node.hold();
    let calls: Vec<_> = (1..=3_000)
        .map(|sequence| {
            let nodes = Arc::clone(&nodes);
            tokio::spawn(async move { deliver_one(&nodes, "a", "car", sequence).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(
        node.calls.load(Ordering::Relaxed) - before,
        1,
        "one batch at a time"
    );
    drop(held);
    for call in calls {
        assert_eq!(
            call.await.unwrap(),
            DeliveryOutcome::Sent { epoch: Epoch(7) }
        );
    }
    // Eight small batches were on their way when it stopped; the rest has been gathered.
    let batches = node.calls.load(Ordering::Relaxed) - before;
    assert!(
        batches <= 8 + 3_000_usize.div_ceil(64) + 2,
        "{batches} batches"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_not_there_leaves_hints_to_the_inbox_at_once() {
    let (registry, nodes) = Registry::with_remote();
    let address = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap()
    };
    registry.add("a", &address.to_string());
    let started = Instant::now();
    assert_eq!(
        deliver_one(&nodes, "a", "car", 1).await,
        DeliveryOutcome::Busy
    );
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    let started = Instant::now();
    assert!(
        nodes
            .disconnect(&node_id("a"), &client("car"))
            .await
            .is_err()
    );
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    // It is found again when it is there.
    let _node = start_at(&registry, "a", address, Security::default()).await;
    eventually_sent(&nodes, "a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_leaves_hints_to_the_inbox_and_is_found_again() {
    let (registry, nodes) = Registry::with_remote();
    let node = start(&registry, "a").await;
    let cable = Cable::to(node.address).await;
    registry.add("a", &cable.address.to_string());
    eventually_sent(&nodes, "a").await;
    let held = node.hold();
    let waiting = {
        let nodes = Arc::clone(&nodes);
        tokio::spawn(async move { deliver_one(&nodes, "a", "car", 2).await })
    };
    node.entered().await;
    let started = Instant::now();
    cable.cut();
    assert_eq!(waiting.await.unwrap(), DeliveryOutcome::Busy);
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    drop(held);
    for _ in 0..20 {
        let started = Instant::now();
        deliver_one(&nodes, "a", "car", 3).await;
        assert!(
            started.elapsed() < Duration::from_millis(1500),
            "{:?}",
            started.elapsed()
        );
    }
    cable.mend();
    eventually_sent(&nodes, "a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_frozen_delays_a_hint_once_and_no_other() {
    let (registry, nodes) = Registry::with_remote();
    let node = start(&registry, "a").await;
    let cable = Cable::to(node.address).await;
    registry.add("a", &cable.address.to_string());
    eventually_sent(&nodes, "a").await;
    cable.freeze();
    let started = Instant::now();
    assert_eq!(
        deliver_one(&nodes, "a", "car", 2).await,
        DeliveryOutcome::Busy
    );
    assert!(started.elapsed() < NEVER_LONGER, "{:?}", started.elapsed());
    let started = Instant::now();
    for sequence in 3..100 {
        assert_eq!(
            deliver_one(&nodes, "a", "car", sequence).await,
            DeliveryOutcome::Busy
        );
    }
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    let error = nodes
        .displace(&node_id("a"), &client("car"), Epoch(9))
        .await;
    assert!(
        matches!(error, Err(StoreError::Unavailable(_))),
        "{error:?}"
    );
    let started = Instant::now();
    let error = nodes
        .displace(&node_id("a"), &client("car"), Epoch(9))
        .await;
    assert!(
        error.is_err() && started.elapsed() < Duration::from_millis(500),
        "{:?}",
        started.elapsed()
    );
    cable.mend();
    eventually_sent(&nodes, "a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_has_moved_is_followed_once() {
    let (registry, nodes) = Registry::with_remote();
    let first = start(&registry, "a").await;
    let second = start(&registry, "b").await;
    first.outcome_of("moved", DeliveryOutcome::NotHere);
    first.outcome_of("gone", DeliveryOutcome::NotHere);
    first.outcome_of("hops", DeliveryOutcome::NotHere);
    second.outcome_of("hops", DeliveryOutcome::NotHere);
    let route = |node: &str| Route {
        node: node_id(node),
        epoch: Epoch(9),
        connected_at_ms: 1,
    };
    registry.route("moved", route("b"));
    registry.route("hops", route("b"));
    let hints = ["here", "moved", "gone", "hops"].map(|to| delivery(to, 1));
    let outcomes = nodes.deliver(&node_id("a"), hints.to_vec()).await;
    let sent = DeliveryOutcome::Sent { epoch: Epoch(7) };
    let not_here = DeliveryOutcome::NotHere;
    assert_eq!(outcomes, [sent, sent, not_here, not_here]);
    let seen: Vec<_> = second
        .delivered()
        .into_iter()
        .map(|hint| hint.client)
        .collect();
    assert_eq!(seen.len(), 2);
    assert!(seen.contains(&client("moved")) && seen.contains(&client("hops")));
    assert_eq!(
        registry.look_ups.load(Ordering::Relaxed),
        3,
        "each is looked up once"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_this_process_is_called_directly() {
    let (registry, nodes) = Registry::with_remote();
    let own = MadeUpNode::new("own");
    nodes.attach(node_id("own"), own.clone());
    assert_eq!(
        deliver_one(&nodes, "own", "car", 1).await,
        DeliveryOutcome::Sent { epoch: Epoch(7) }
    );
    own.outcome_of("moved", DeliveryOutcome::NotHere);
    let _other = start(&registry, "b").await;
    let route = Route {
        node: node_id("b"),
        epoch: Epoch(9),
        connected_at_ms: 1,
    };
    registry.route("moved", route);
    assert_eq!(
        deliver_one(&nodes, "own", "moved", 1).await,
        DeliveryOutcome::Sent { epoch: Epoch(7) }
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_calls_say_what_the_node_says() {
    let (registry, nodes) = Registry::with_remote();
    let node = start(&registry, "a").await;
    let (id, car) = (node_id("a"), client("car"));
    assert!(nodes.disconnect(&id, &car).await.unwrap());
    assert!(!nodes.disconnect(&id, &client("nobody")).await.unwrap());
    for (by, found, session_over) in [(7, false, false), (8, true, false), (9, true, true)] {
        let displaced = nodes.displace(&id, &car, Epoch(by)).await.unwrap();
        assert_eq!(
            (displaced.found, displaced.session_over),
            (found, session_over)
        );
    }
    nodes.session_changed(&id, &car).await.unwrap();
    assert_eq!(*node.changed.lock().unwrap(), std::slice::from_ref(&car));
    let views = nodes
        .sessions(&id, &[car.clone(), client("nobody")])
        .await
        .unwrap();
    assert_eq!(views, [Some(support::view()), None]);
    let unknown = nodes.disconnect(&node_id("no-such-node"), &car).await;
    assert!(
        matches!(unknown, Err(StoreError::Unavailable(_))),
        "{unknown:?}"
    );
    node.fail_with(StoreError::Stale { current: Epoch(77) });
    let stale = nodes.displace(&id, &car, Epoch(8)).await;
    assert!(
        matches!(stale, Err(StoreError::Stale { current: Epoch(77) })),
        "{stale:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bans_concern_every_node_and_are_listed_once() {
    let (registry, nodes) = Registry::with_remote();
    let first = start(&registry, "a").await;
    let second = start(&registry, "b").await;
    let ban = |name: &str, expires_at_ms| Ban {
        target: BanTarget::parse("client", name).unwrap(),
        reason: "why".into(),
        since_ms: 1,
        expires_at_ms,
    };
    first.bans([(ban("both", None), false), (ban("one", Some(9)), true)]);
    second.bans([(ban("both", None), false), (ban("two", Some(8)), true)]);
    let listed = nodes.bans(None, 10).await.unwrap();
    let targets: Vec<_> = listed.iter().map(|view| view.ban.target.value()).collect();
    assert_eq!(targets, ["both", "one", "two"]);
    assert_eq!(listed[1].ban, ban("one", Some(9)));
    assert!(listed[1].automatic && !listed[0].automatic);
    let after = BanTarget::parse("client", "both").unwrap();
    let page = nodes.bans(Some(&after), 1).await.unwrap();
    assert_eq!(page.len(), 1);
    assert_eq!(page[0].ban.target.value(), "one");
    let target = BanTarget::parse("client", "two").unwrap();
    assert!(nodes.ban_changed(&target).await.unwrap());
    for node in [&first, &second] {
        assert_eq!(
            *node.bans_changed.lock().unwrap(),
            std::slice::from_ref(&target)
        );
    }
    // A node that is out of reach is passed over: it has died, or reads the list again by itself.
    registry.add("c", "127.0.0.1:1");
    tokio::time::sleep(support::REGISTRY_SEEN).await;
    assert!(nodes.ban_changed(&target).await.unwrap());
    assert_eq!(first.bans_changed.lock().unwrap().len(), 2);
    assert_eq!(nodes.bans(None, 10).await.unwrap().len(), 3);
    // Where none is reached nobody knows.
    let (registry, nodes) = Registry::with_remote();
    registry.add("c", "127.0.0.1:1");
    assert!(nodes.ban_changed(&target).await.is_err());
    assert!(nodes.bans(None, 10).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wrong_secret_is_let_nowhere() {
    let with = |secret| Security::new(secret, None).unwrap();
    let right = with(Some("the-right-secret-of-all"));
    let registry = Registry::new();
    let address = "127.0.0.1:0".parse().unwrap();
    let node = start_at(&registry, "a", address, right.clone()).await;
    for wrong in [with(None), with(Some("the-wrong-secret-of-all"))] {
        let nodes = registry.remote(wrong);
        assert_eq!(
            deliver_one(&nodes, "a", "car", 1).await,
            DeliveryOutcome::Busy
        );
        let error = nodes
            .disconnect(&node_id("a"), &client("car"))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("secret"), "{error}");
    }
    assert!(node.delivered().is_empty());
    let nodes = registry.remote(right);
    assert_eq!(
        deliver_one(&nodes, "a", "car", 1).await,
        DeliveryOutcome::Sent { epoch: Epoch(7) }
    );
    assert!(
        nodes
            .disconnect(&node_id("a"), &client("car"))
            .await
            .unwrap()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_certificates_only_those_of_the_authority_are_let_in() {
    support::install_provider();
    let ours = support::Authority::new();
    let theirs = support::Authority::new();
    let security = |tls: Tls| Security::new(None, Some(tls)).unwrap();
    let registry = Registry::new();
    let address = "127.0.0.1:0".parse().unwrap();
    let node = start_at(&registry, "a", address, security(ours.issue(&ours))).await;
    let nodes = registry.remote(security(ours.issue(&ours)));
    eventually_sent(&nodes, "a").await;
    assert!(
        nodes
            .disconnect(&node_id("a"), &client("car"))
            .await
            .unwrap()
    );
    let before = node.delivered().len();
    // One of another authority that trusts ours, one that trusts only its own, one without TLS.
    for stranger in [
        security(theirs.issue(&ours)),
        security(theirs.issue(&theirs)),
        Security::default(),
    ] {
        let nodes = registry.remote(stranger);
        assert_eq!(
            deliver_one(&nodes, "a", "car", 1).await,
            DeliveryOutcome::Busy
        );
        assert!(
            nodes
                .disconnect(&node_id("a"), &client("car"))
                .await
                .is_err()
        );
    }
    assert_eq!(node.delivered().len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_ends_its_streams_after_the_last_answer() {
    let (registry, nodes) = Registry::with_remote();
    let mut node = start(&registry, "a").await;
    eventually_sent(&nodes, "a").await;
    let started = Instant::now();
    node.stop().await;
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(
        deliver_one(&nodes, "a", "car", 1).await,
        DeliveryOutcome::Busy
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_differ_in_everything_arrive_as_they_were_sent() {
    let (registry, nodes) = Registry::with_remote();
    let node = start(&registry, "a").await;
    let mut large = delivery("car", 1);
    large.message.payload = vec![7; 3 << 20].into();
    let mut none = delivery("car", 2);
    none.position = None;
    none.message.payload = bytes::Bytes::new();
    let sent = vec![large, none];
    nodes.deliver(&node_id("a"), sent.clone()).await;
    let seen = node.delivered();
    assert_eq!(seen.len(), 2);
    for (sent, seen) in sent.iter().zip(&seen) {
        assert_eq!((&sent.client, sent.position), (&seen.client, seen.position));
        assert_eq!(sent.message, seen.message);
    }
    assert_eq!(
        seen[0].position,
        Some(Position {
            generation: 1,
            sequence: 1
        })
    );
}
