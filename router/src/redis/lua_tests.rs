//! The functions that no contract suite reaches in every branch, each by itself.

use redis::Value;

use super::RedisStore;
use super::index::{Index, Noted};
use super::keys::{SHARDS, shard_of};
use super::testing::Fixture;
use crate::{ClientId, Epoch, NodeId, Routes, Sessions, Standing, StoreError, StoredWill};

fn client(text: &str) -> ClientId {
    ClientId::parse(text).unwrap()
}

fn node(text: &str) -> NodeId {
    NodeId::from_text(text)
}

async fn noted(
    store: &RedisStore,
    after: Option<&ClientId>,
    limit: usize,
) -> Vec<(String, String)> {
    let page = store
        .index_page(Index::Routes, 0..SHARDS, after, limit)
        .await
        .unwrap();
    let pair = |noted: Noted| (noted.client.to_string(), noted.group);
    page.into_iter().map(pair).collect()
}

async fn put(store: &RedisStore, name: &str, epoch: Option<u64>, group: &str) {
    let call = store.index_put(Index::Routes, &client(name), epoch.map(Epoch), group);
    store.link.submit(name, call).await.unwrap();
}

async fn remove(store: &RedisStore, name: &str, epoch: u64) {
    let call = store.index_remove(Index::Routes, &client(name), Some(Epoch(epoch)));
    store.link.submit(name, call).await.unwrap();
}

fn pair(client: &str, group: &str) -> (String, String) {
    (client.to_owned(), group.to_owned())
}

#[tokio::test]
async fn index_put_moves_a_client_and_lets_nothing_older_do_so() {
    let redis = Fixture::start();
    let store = &redis.store;
    put(store, "a", Some(5), "one").await;
    put(store, "a", Some(4), "two").await;
    assert_eq!(noted(store, None, 9).await, [pair("a", "one")]);
    put(store, "a", Some(6), "two").await;
    assert_eq!(noted(store, None, 9).await, [pair("a", "two")]);
    // Without an epoch it moves, and what is noted later with the epoch of before still counts.
    put(store, "a", None, "three").await;
    put(store, "a", Some(5), "one").await;
    assert_eq!(noted(store, None, 9).await, [pair("a", "three")]);
}

#[tokio::test]
async fn index_remove_leaves_what_is_newer_and_tidying_what_is_young() {
    let redis = Fixture::start();
    let store = &redis.store;
    put(store, "a", Some(5), "one").await;
    remove(store, "a", 4).await;
    store.index_tidy(Index::Routes, &client("a"));
    put(store, "b", Some(1), "one").await;
    assert_eq!(noted(store, None, 9).await.len(), 2);
    remove(store, "a", 5).await;
    remove(store, "a", 5).await;
    assert_eq!(noted(store, None, 9).await, [pair("b", "one")]);
}

#[tokio::test]
async fn index_pages_begin_after_a_client_in_every_group() {
    let redis = Fixture::start();
    let store = &redis.store;
    for (n, name) in ["a", "b", "c", "d", "e", "f"].into_iter().enumerate() {
        put(store, name, Some(1), ["one", "one1", "two"][n % 3]).await;
    }
    let page = noted(store, Some(&client("b")), 9).await;
    assert_eq!(
        page,
        [
            pair("c", "two"),
            pair("d", "one"),
            pair("e", "one1"),
            pair("f", "two")
        ]
    );
    let shard = shard_of(&client("a"));
    let groups = store.index_groups(Index::Routes, shard).await.unwrap();
    assert!(groups.contains(&"one".to_owned()), "{groups:?}");
    let of_one = store
        .index_group(Index::Routes, shard, "one", None, 9)
        .await
        .unwrap();
    assert!(of_one.contains(&client("a")) && !of_one.contains(&client("b")));
    let after = store
        .index_group(Index::Routes, shard, "one", Some(&client("a")), 9)
        .await;
    assert!(!after.unwrap().contains(&client("a")));
}

#[tokio::test]
async fn claim_rises_above_what_this_process_has_seen_whatever_the_clock_says() {
    let redis = Fixture::start();
    let store = &redis.store;
    let future = 4_000_000_000_000_000;
    store.saw_epoch(Epoch(future));
    let claim = store.claim(&client("a"), &node("n")).await.unwrap();
    assert_eq!(claim.epoch, Epoch(future + 1));
    let next = store.claim(&client("a"), &node("n")).await.unwrap();
    assert_eq!(next.epoch, Epoch(future + 2));
    assert_eq!(next.previous.unwrap().epoch, claim.epoch);
}

#[tokio::test]
async fn reconcile_counts_a_newer_connection_that_has_ended_too() {
    let redis = Fixture::start();
    let store = &redis.store;
    let (a, n) = (client("a"), node("n"));
    let old = store.claim(&a, &n).await.unwrap().epoch;
    let new = store.claim(&a, &n).await.unwrap().epoch;
    assert!(store.release(&a, new).await.unwrap());
    let standing = store.reconcile(&n, &[(a.clone(), old)]).await.unwrap();
    assert_eq!(standing, [Standing::Lost { current: new }]);
    let fence = redis.command("PTTL", &["moorline1:{a}:route"]).await;
    assert!(
        matches!(fence, Value::Int(ms) if ms > 86_400_000),
        "{fence:?}"
    );
    // A lost route of an older epoch than the store knows of is written again.
    let standing = store
        .reconcile(&n, &[(a.clone(), Epoch(new.0 + 1))])
        .await
        .unwrap();
    assert_eq!(standing, [Standing::Restored]);
    assert!(matches!(
        redis.command("PTTL", &["moorline1:{a}:route"]).await,
        Value::Int(-1)
    ));
    assert!(store.release(&a, Epoch(new.0 + 1)).await.unwrap());
}

#[tokio::test]
async fn a_fence_says_which_epoch_is_in_force() {
    let redis = Fixture::start();
    let store = &redis.store;
    let a = client("a");
    let epoch = store.claim(&a, &node("n")).await.unwrap().epoch;
    assert!(store.release(&a, epoch).await.unwrap());
    // Also when nobody is connected any more.
    let refused = store.delete(&a, Some(Epoch(epoch.0 - 1))).await;
    assert!(
        matches!(refused, Err(StoreError::Stale { current }) if current == epoch),
        "{refused:?}"
    );
    store.delete(&a, Some(epoch)).await.unwrap();
    store.delete(&a, None).await.unwrap();
}

#[tokio::test]
async fn a_will_of_an_older_connection_replaces_none() {
    let redis = Fixture::start();
    let store = &redis.store;
    let will = |epoch| StoredWill {
        epoch: Epoch(epoch),
        will: moorline_mqtt::Will {
            topic: moorline_mqtt::TopicName::from_static("gone"),
            payload: bytes::Bytes::new(),
            qos: moorline_mqtt::QoS::AtMostOnce,
            retain: false,
            delay_interval_s: 0,
            properties: None,
        },
    };
    store.save_will(&client("a"), will(2)).await.unwrap();
    store.save_will(&client("a"), will(1)).await.unwrap();
    assert_eq!(store.will(&client("a")).await.unwrap(), Some(will(2)));
    store.delete_will(&client("a"), Epoch(1)).await.unwrap();
    assert_eq!(store.load_wills().await.unwrap().len(), 1);
    store.delete_will(&client("a"), Epoch(2)).await.unwrap();
    assert_eq!(store.will(&client("a")).await.unwrap(), None);
}

#[tokio::test]
async fn scripts_that_a_server_has_forgotten_are_given_to_it_again() {
    let redis = Fixture::start();
    let store = &redis.store;
    store.claim(&client("a"), &node("n")).await.unwrap();
    redis.command("SCRIPT", &["FLUSH"]).await;
    let claims = (0..100).map(|_| async { store.claim(&client("a"), &node("n")).await.unwrap() });
    let claims = futures_util::future::join_all(claims).await;
    let epochs: Vec<Epoch> = claims.iter().map(|claim| claim.epoch).collect();
    assert!(
        epochs.is_sorted(),
        "in the order in which they were called: {epochs:?}"
    );
    redis.command("SCRIPT", &["FLUSH"]).await;
    assert!(noted(store, None, 9).await.len() == 1, "reads, too");
}
