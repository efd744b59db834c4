//! Redis killed, frozen and failed over while inboxes are written to: what was answered as stored is there, in order and once.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use moorline_router::contract::{client, payloads, push, read_all, stored};
use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_router::{
    Append, Appended, ClientId, Inboxes, MessageId, NodeId, Position, StoreError,
};
use moorline_tests::servers::RedisServer;
use moorline_tests::waiting::eventually;

fn open(server: &RedisServer) -> Arc<RedisStore> {
    let config = Config {
        url: server.url(),
        response_timeout: Duration::from_millis(700),
        ..Config::default()
    };
    RedisStore::open(&config, Limits::default()).unwrap()
}

fn append_of(client: &ClientId, payload: &str) -> Append {
    Append {
        client: client.clone(),
        message: push(payload),
        fingerprint: Some(7),
    }
}

/// Tries until the store says what became of it. Says whether it was stored by an earlier try.
async fn insist(store: &RedisStore, append: &Append) -> bool {
    loop {
        match store.append(vec![append.clone()]).await {
            Ok(answers) => match &answers[0] {
                Appended::Stored { .. } => return false,
                Appended::Repeated { fingerprint: 7, .. } => return true,
                other => panic!("{other:?}"),
            },
            Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(other) => panic!("{other}"),
        }
    }
}

const CLIENTS: usize = 48;
const KILLS: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_stored_survives_a_killed_redis_in_order_and_once() {
    let mut server = RedisServer::start().await;
    let store = open(&server);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writers: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (store, stop) = (store.clone(), stop.clone());
            tokio::spawn(async move {
                let device = client(&format!("device-{number}"));
                let (mut ids, mut repeated) = (Vec::<MessageId>::new(), 0);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let append = append_of(&device, &ids.len().to_string());
                    repeated += u32::from(insist(&store, &append).await);
                    ids.push(append.message.id);
                }
                (device, ids, repeated)
            })
        })
        .collect();
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(400)).await;
        server.kill9();
        server.restart().await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let (mut all, mut doubles) = (0, 0);
    for writer in writers {
        let (device, ids, _) = writer.await.unwrap();
        let page = read_all(&*store, &device).await;
        let mut read: Vec<_> = page
            .entries
            .iter()
            .map(|entry| entry.message.id.clone())
            .collect();
        let before = read.len();
        read.dedup();
        doubles += before - read.len();
        assert_eq!(read, ids, "{device}");
        assert!(
            page.entries
                .windows(2)
                .all(|pair| pair[0].position < pair[1].position)
        );
        let status = store.status(&device).await.unwrap();
        assert_eq!(status.entries, page.entries.len() as u64);
        all += ids.len();
    }
    // A server killed in the middle of writing a transaction to its log leaves half of that at the end. The next start
    // ignores it; the one after that does not, and brings a try back that was repeated since.
    assert!(doubles < KILLS, "{doubles} messages are there twice");
    assert!(
        all > CLIENTS * KILLS,
        "{all} appends are too few to show anything"
    );
}

#[tokio::test]
async fn a_frozen_redis_makes_appends_unavailable_and_their_repetition_stores_once() {
    let server = RedisServer::start().await;
    let store = open(&server);
    let device = client("device");
    stored(&*store, &device, push("before")).await;
    server.freeze();
    let appends: Vec<_> = (0..20)
        .map(|n| append_of(&device, &n.to_string()))
        .collect();
    let calls = appends
        .iter()
        .map(|append| store.append(vec![append.clone()]));
    for outcome in join_all(calls).await {
        assert!(
            matches!(outcome, Err(StoreError::Unavailable(_))),
            "{outcome:?}"
        );
    }
    server.thaw();
    for append in &appends {
        insist(&store, append).await;
    }
    for append in &appends {
        assert!(insist(&store, append).await, "a repetition is known as one");
    }
    let read = payloads(&read_all(&*store, &device).await);
    let mut expected = vec!["before".to_owned()];
    expected.extend((0..20).map(|n| n.to_string()));
    assert_eq!(read, expected);
}

#[tokio::test]
async fn an_end_that_finds_no_redis_is_made_up_for() {
    let server = RedisServer::start().await;
    let store = open(&server);
    let device = client("device");
    let position = stored(&*store, &device, push("x")).await;
    server.freeze();
    store.end(vec![moorline_router::End {
        client: device.clone(),
        position,
        reason: moorline_router::EndReason::Delivered,
    }]);
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    server.thaw();
    eventually(Duration::from_secs(20), "it has ended", || async {
        let status = store.status(&device).await.ok()?;
        (status.entries == 0).then_some(())
    })
    .await;
}

/// A failover to a replica that had not yet got everything. A connection that was handed what is now unknown must not
/// take what comes next for what it knows.
#[tokio::test]
async fn what_a_failover_forgot_is_not_given_out_again() {
    let (server, replica) = (RedisServer::start().await, RedisServer::start().await);
    let store = open(&server);
    let device = client("device");
    stored(&*store, &device, push("1")).await;
    let address = server.address();
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    replica.command(&["REPLICAOF", &host, &port]).await;
    eventually(Duration::from_secs(20), "the replica has it", || async {
        let keys = replica.command(&["DBSIZE"]).await.number();
        (keys > 0 && keys == server.command(&["DBSIZE"]).await.number()).then_some(())
    })
    .await;
    replica.command(&["REPLICAOF", "NO", "ONE"]).await;
    let mut told = Position::START;
    for payload in ["2", "3", "4"] {
        told = stored(&*store, &device, push(payload)).await;
    }

    let store = open(&replica);
    let node = NodeId::from_text("node");
    let five = stored(&*store, &device, push("5")).await;
    let six = stored(&*store, &device, push("6")).await;
    assert!(five > told, "{five:?} after {told:?}");
    assert!(!told.is_followed_by(five), "something may lie before it");
    assert!(five.is_followed_by(six));
    let page = store.read(&device, told, 10, usize::MAX).await.unwrap();
    assert_eq!(payloads(&page), ["5", "6"]);
    assert_eq!(payloads(&read_all(&*store, &device).await), ["1", "5", "6"]);
    // Also where the connection says first what it was handed.
    let other = client("other");
    stored(&*store, &other, push("1")).await;
    let beyond = Position {
        generation: five.generation + 1_000_000_000,
        sequence: 9,
    };
    store.mark_sent(&other, beyond, &node, moorline_router::Epoch(1));
    let next = stored(&*store, &other, push("2")).await;
    assert!(beyond.is_followed_by(next), "{next:?} after {beyond:?}");
}

#[tokio::test]
async fn after_a_flush_an_inbox_begins_again() {
    let server = RedisServer::start().await;
    let store = open(&server);
    let device = client("device");
    stored(&*store, &device, push("1")).await;
    let told = stored(&*store, &device, push("2")).await;
    server.flush().await;
    let first = stored(&*store, &device, push("3")).await;
    assert!(told.is_followed_by(first), "{first:?} after {told:?}");
    assert_eq!(payloads(&read_all(&*store, &device).await), ["3"]);
}
