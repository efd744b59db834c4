//! Redis frozen, flushed and restarted: who is thought dead, and what goes back.

use std::time::{Duration, Instant};

use moorline_router::contract::eventually;
use moorline_router::redis::Config;
use moorline_router::{Routes, Shards, Standing, StoreError};
use moorline_tests::Authority;
use moorline_tests::servers::RedisServer;
use moorline_tests::servers::process::free_port;

use super::shards::node;
use super::support::{client, open};

fn config(server: &RedisServer) -> Config {
    Config {
        url: server.url(),
        response_timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_millis(300),
        ..Config::default()
    }
}

const LEASE_MS: u64 = 1_500;

#[tokio::test]
async fn nobody_is_thought_dead_because_redis_was_frozen() {
    let redis = RedisServer::start().await;
    let store = open(&config(&redis));
    let (a, b) = (node("a"), node("b"));
    for node in [&a, &b] {
        store.renew(node.clone(), LEASE_MS).await.unwrap();
    }
    let device = client("device");
    let epoch = store.claim(&device, &a.id).await.unwrap().epoch;
    let shard = store.shard_of(&device);
    assert!(store.hold(shard, &a.id, LEASE_MS).await.unwrap());
    redis.freeze();
    let frozen = Instant::now();
    while frozen.elapsed() < Duration::from_millis(LEASE_MS * 2) {
        let refused = store.renew(a.clone(), LEASE_MS).await;
        assert!(
            matches!(refused, Err(StoreError::Unavailable(_))),
            "{refused:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let thawed = Instant::now();
    redis.thaw();
    // Whoever comes first may be one that asks, not one that renews.
    let asker = open(&config(&redis));
    assert!(asker.stranded(shard, 10).await.unwrap().is_empty());
    assert_eq!(asker.nodes().await.unwrap().len(), 2);
    assert!(!asker.hold(shard, &b.id, LEASE_MS).await.unwrap());
    assert_eq!(asker.look_up(&device).await.unwrap().unwrap().epoch, epoch);
    // Only who does not come back within a whole lease is dead.
    let mut known = None;
    loop {
        // The connection of before is found dead by the first calls.
        if let Ok(renewed) = store.renew(a.clone(), LEASE_MS).await {
            known.get_or_insert(renewed);
        }
        assert!(asker.stranded(shard, 10).await.unwrap().is_empty());
        if asker.nodes().await.unwrap().len() == 1 {
            break;
        }
        assert!(
            thawed.elapsed() < Duration::from_secs(10),
            "it is never dead"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(known, Some(true), "its lease was never lost");
    assert!(
        thawed.elapsed() >= Duration::from_millis(LEASE_MS - 10),
        "{:?}",
        thawed.elapsed()
    );
    assert_eq!(store.nodes().await.unwrap(), [a]);
}

#[tokio::test]
async fn a_flushed_redis_learns_again_and_epochs_do_not_go_back() {
    let redis = RedisServer::start().await;
    let (one, other) = (open(&config(&redis)), open(&config(&redis)));
    let (a, b) = (node("a"), node("b"));
    assert!(!one.renew(a.clone(), 60_000).await.unwrap());
    assert!(one.renew(a.clone(), 60_000).await.unwrap());
    let (device, moved) = (client("device"), client("moved"));
    let epoch = one.claim(&device, &a.id).await.unwrap().epoch;
    let old = one.claim(&moved, &a.id).await.unwrap().epoch;
    redis.flush().await;
    assert!(
        !one.renew(a.clone(), 60_000).await.unwrap(),
        "it is not known any more"
    );
    other.renew(b.clone(), 60_000).await.unwrap();
    // One that connects elsewhere before its old node has written its route again.
    let new = other.claim(&moved, &b.id).await.unwrap().epoch;
    assert!(new > old);
    let held = [(device.clone(), epoch), (moved.clone(), old)];
    let standing = one.reconcile(&a.id, &held).await.unwrap();
    assert_eq!(
        standing,
        [Standing::Restored, Standing::Lost { current: new }]
    );
    assert_eq!(other.look_up(&device).await.unwrap().unwrap().epoch, epoch);
    assert_eq!(other.look_up(&moved).await.unwrap().unwrap().node, b.id);
    assert!(other.claim(&device, &b.id).await.unwrap().epoch > epoch);
    // What is listed by indexes comes back with the routes.
    one.reconcile(&a.id, &held[..1]).await.unwrap();
    eventually("both are listed", || async {
        other.list(None, 10).await.unwrap().len() == 2
    })
    .await;
}

#[tokio::test]
async fn a_restarted_redis_is_found_again_with_everything_confirmed() {
    let mut redis = RedisServer::start().await;
    let store = open(&config(&redis));
    store.renew(node("a"), 60_000).await.unwrap();
    let device = client("device");
    let mut last = store.claim(&device, &node("a").id).await.unwrap().epoch;
    for _ in 0..3 {
        redis.kill9();
        redis.restart().await;
        eventually("the store works again", || async {
            store.look_up(&device).await.is_ok()
        })
        .await;
        assert_eq!(store.look_up(&device).await.unwrap().unwrap().epoch, last);
        let claim = store.claim(&device, &node("a").id).await.unwrap();
        assert!(claim.epoch > last);
        assert_eq!(claim.previous.unwrap().epoch, last);
        last = claim.epoch;
    }
}

#[tokio::test]
async fn what_weakens_the_promises_is_said_and_a_dead_server_named() {
    let careful = RedisServer::start().await;
    let health = open(&config(&careful)).health().await;
    assert_eq!(health, moorline_router::redis::Health::default());
    let mut careless = RedisServer::start_with(&["--appendfsync", "everysec"]).await;
    let store = open(&config(&careless));
    let health = store.health().await;
    assert!(health.reasons.is_empty(), "{health:?}");
    assert!(health.warnings[0].contains("appendfsync"), "{health:?}");
    careless.kill9();
    let health = store.health().await;
    assert_eq!(health.reasons.len(), 1, "{health:?}");
}

#[tokio::test]
async fn a_server_is_spoken_to_over_tls_by_a_user_with_a_password() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (authority, stranger, port) = (Authority::new(), Authority::new(), free_port());
    let signed = authority.server("redis");
    let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let (certificate, key) = (path(&signed.certificate), path(&signed.key));
    let redis = RedisServer::start_with(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &certificate,
        "--tls-key-file",
        &key,
        "--tls-ca-cert-file",
        &path(&authority.file()),
        "--tls-auth-clients",
        "no",
        "--user",
        "gateway",
        "on",
        ">secret",
        "~*",
        "&*",
        "+@all",
    ])
    .await;
    let right = Config {
        url: format!("rediss://gateway:secret@localhost:{port}"),
        ca_file: Some(authority.file()),
        ..config(&redis)
    };
    let claim = open(&right).claim(&client("device"), &node("n").id).await;
    assert!(claim.is_ok(), "{claim:?}");
    let wrong = [
        Config {
            url: format!("rediss://gateway:wrong@localhost:{port}"),
            ..right.clone()
        },
        Config {
            ca_file: Some(stranger.file()),
            ..right.clone()
        },
    ];
    for config in wrong {
        let refused = open(&config).claim(&client("device"), &node("n").id).await;
        assert!(
            matches!(refused, Err(StoreError::Unavailable(_))),
            "{refused:?}"
        );
        let health = open(&config).health().await;
        assert_eq!(health.reasons.len(), 1, "{health:?}");
        assert!(!health.reasons[0].contains("wrong@"), "{health:?}");
    }
}
