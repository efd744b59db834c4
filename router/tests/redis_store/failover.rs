//! A master dies with SIGKILL while it is written to: what was confirmed is there afterwards, epochs do not go back,
//! and the store goes on by itself.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moorline_mqtt::PacketId;
use moorline_router::contract::{eventually, push};
use moorline_router::redis::{Config, RedisStore};
use moorline_router::{
    Append, Appended, ClientId, Epoch, Inboxes, NodeId, Position, Routes, SessionRecord, Sessions,
};
use moorline_tests::servers::{RedisCluster, Reply, Sentinels};

use super::support::{client, cluster_config, open, sentinel_config};

const CLIENTS: usize = 12;

/// What one client's writer was told.
struct Told {
    client: ClientId,
    /// Of every claim that was answered, in order.
    epochs: Vec<Epoch>,
    /// The number of the last session whose saving was confirmed.
    session: u32,
    /// Payloads of every message that was confirmed, in order.
    messages: Vec<String>,
}

/// What the writers and whoever watches them share.
#[derive(Default)]
struct Writing {
    stop: AtomicBool,
    /// Messages that were confirmed, of each client.
    confirmed: [AtomicUsize; CLIENTS],
}

impl Writing {
    /// Waits until every writer has had this many more messages confirmed.
    async fn go_on(&self, more: usize) {
        let counts = || {
            let counts = self.confirmed.iter();
            counts
                .map(|count| count.load(Ordering::Relaxed))
                .collect::<Vec<_>>()
        };
        let before = counts();
        eventually("every writer goes on", || async {
            let mut pairs = counts().into_iter().zip(&before);
            pairs.all(|(now, before)| now >= before + more)
        })
        .await;
    }
}

async fn write(store: Arc<RedisStore>, number_of_client: usize, writing: Arc<Writing>) -> Told {
    let client = client(&format!("device-{number_of_client}"));
    let node = NodeId::from_text("node");
    let mut told = Told {
        client: client.clone(),
        epochs: Vec::new(),
        session: 0,
        messages: Vec::new(),
    };
    let mut number = 0;
    while !writing.stop.load(Ordering::Relaxed) {
        number += 1;
        // What is refused or not confirmed may be there afterwards or not.
        if let Ok(claim) = store.claim(&client, &node).await {
            told.epochs.push(claim.epoch);
        }
        let epoch = told.epochs.last().copied().unwrap_or(Epoch(0));
        let session = SessionRecord {
            client: client.clone(),
            expiry_interval_s: number,
            disconnected_at_ms: None,
            subscriptions: Vec::new(),
        };
        if store.save(epoch, session).await.is_ok() {
            told.session = number;
        }
        let append = Append {
            client: client.clone(),
            message: push(&number.to_string()),
            fingerprint: None,
        };
        match store.append(vec![append]).await.as_deref() {
            Ok([Appended::Stored { .. }]) => {
                told.messages.push(number.to_string());
                writing.confirmed[number_of_client].fetch_add(1, Ordering::Relaxed);
            }
            Ok(other) => panic!("not stored: {other:?}"),
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    told
}

async fn check(config: &Config, told: Vec<Told>) {
    // Another process: nothing that the first one knows helps.
    let store = open(config);
    for told in told {
        let client = &told.client;
        assert!(
            told.epochs.windows(2).all(|pair| pair[0] < pair[1]),
            "epochs of {client} went back: {:?}",
            told.epochs
        );
        let next = store
            .claim(client, &NodeId::from_text("other"))
            .await
            .unwrap();
        let last = told.epochs.last().copied().unwrap();
        assert!(next.epoch > last, "the epoch of {client} went back");
        let session = store.load(client).await.unwrap().unwrap();
        assert!(
            session.expiry_interval_s >= told.session,
            "the session of {client} went back"
        );
        let page = store
            .read(client, Position::START, 100_000, usize::MAX)
            .await
            .unwrap();
        let text = |payload: &[u8]| String::from_utf8(payload.to_vec()).unwrap();
        let found: Vec<String> = page
            .entries
            .iter()
            .map(|entry| text(&entry.message.payload))
            .collect();
        let confirmed: Vec<String> = found
            .iter()
            .filter(|text| told.messages.contains(text))
            .cloned()
            .collect();
        assert_eq!(confirmed, told.messages, "messages of {client}");
        assert!(!told.messages.is_empty() && told.session > 0);
    }
}

/// Runs writers, and `fail_over` in the midst of them.
async fn survives(config: Config, fail_over: impl AsyncFnOnce()) {
    let store = open(&config);
    let writing = Arc::<Writing>::default();
    let start = |n| tokio::spawn(write(store.clone(), n, writing.clone()));
    let writers: Vec<_> = (0..CLIENTS).map(start).collect();
    writing.go_on(20).await;
    fail_over().await;
    eventually("the store works again", || async {
        let mut works = true;
        for n in 0..CLIENTS {
            works &= store
                .claim(&client(&format!("other-{n}")), &NodeId::from_text("n"))
                .await
                .is_ok();
        }
        works
    })
    .await;
    writing.go_on(20).await;
    writing.stop.store(true, Ordering::Relaxed);
    let mut told = Vec::new();
    for writer in writers {
        told.push(writer.await.unwrap());
    }
    check(&config, told).await;
}

#[tokio::test]
async fn sentinels_fail_over_and_nothing_confirmed_is_lost() {
    let mut sentinels = Sentinels::start().await;
    let config = sentinel_config(&sentinels);
    survives(config, async || {
        sentinels.fail_over().await;
    })
    .await;
}

#[tokio::test]
async fn a_cluster_moves_a_slot_and_fails_over_and_nothing_confirmed_is_lost() {
    let mut cluster = RedisCluster::start().await;
    let config = cluster_config(&cluster);
    let key = format!("{}1:{{device-0}}:route", config.key_prefix);
    survives(config.clone(), async || {
        move_slot(&cluster, &key).await;
        let (old, _) = cluster.fail_over(&key).await;
        // The new master confirms nothing before it has a replica again.
        cluster.servers[old].restart().await;
    })
    .await;
    serves_without_a_part(cluster, config, &key).await;
}

/// A master and its replica are gone: clients in other slots go on as if nothing were.
async fn serves_without_a_part(mut cluster: RedisCluster, mut config: Config, key: &str) {
    config.wait_replicas = 0;
    config.response_timeout = Duration::from_secs(1);
    let store = open(&config);
    let part = cluster.master_of(key).await;
    let id = cluster.servers[part]
        .command(&["CLUSTER", "MYID"])
        .await
        .text();
    let replicas = cluster.servers[part]
        .command(&["CLUSTER", "REPLICAS", &id])
        .await
        .text();
    let mut kept = Vec::new();
    for n in 0..CLIENTS {
        let route = format!("{}1:{{device-{n}}}:route", config.key_prefix);
        if cluster.master_of(&route).await != part {
            kept.push(client(&format!("device-{n}")));
        }
    }
    assert!(!kept.is_empty());
    for server in &mut cluster.servers {
        if replicas.contains(&server.address().to_string()) {
            server.kill9();
        }
    }
    cluster.servers[part].kill9();
    let lost = store.load(&client("device-0")).await;
    assert!(lost.is_err(), "{lost:?}");
    eventually("nobody waits for what is gone", || async {
        let (began, gone) = (Instant::now(), client("device-0"));
        assert!(store.load(&gone).await.is_err());
        let packet_id = PacketId(NonZeroU16::MIN);
        assert!(
            store
                .release_received(&gone, Epoch(1), packet_id)
                .await
                .is_err()
        );
        began.elapsed() < Duration::from_millis(200)
    })
    .await;
    let session = |client: &ClientId| SessionRecord {
        client: client.clone(),
        expiry_interval_s: 1,
        disconnected_at_ms: None,
        subscriptions: Vec::new(),
    };
    for _ in 0..5 {
        let began = Instant::now();
        // In the same lanes as what is refused.
        let refused =
            store.release_received(&client("device-0"), Epoch(1), PacketId(NonZeroU16::MIN));
        for client in &kept {
            let epoch = Epoch(u64::MAX >> 12);
            // Its index may be in the part that is gone: then it says so, as fast.
            let _ = store.save(epoch, session(client)).await;
            assert!(store.load(client).await.unwrap().is_some());
            let packet_id = PacketId(NonZeroU16::MIN);
            store
                .release_received(client, Epoch(u64::MAX), packet_id)
                .await
                .unwrap();
        }
        assert!(refused.await.is_err());
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "{:?}",
            began.elapsed()
        );
    }
}

/// Gives the slot of `key` to another master while it is written to, step by step as an operator's tool does.
pub(crate) async fn move_slot(cluster: &RedisCluster, key: &str) {
    let from = cluster.master_of(key).await;
    let to = (0..3).find(|at| *at != from).unwrap();
    let ask = async |at: usize, words: &[&str]| {
        let answer = cluster.servers[at].command(words).await;
        assert!(!matches!(answer, Reply::Error(_)), "{words:?}: {answer:?}");
        answer.text()
    };
    let (from_id, to_id) = (
        ask(from, &["CLUSTER", "MYID"]).await,
        ask(to, &["CLUSTER", "MYID"]).await,
    );
    let slot = ask(from, &["CLUSTER", "KEYSLOT", key]).await;
    let set = ["CLUSTER", "SETSLOT", &slot];
    ask(to, &[&set[..], &["IMPORTING", &from_id]].concat()).await;
    ask(from, &[&set[..], &["MIGRATING", &to_id]].concat()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let port = cluster.servers[to].address().port().to_string();
    loop {
        let keys = ask(from, &["CLUSTER", "GETKEYSINSLOT", &slot, "100"]).await;
        if keys.is_empty() {
            break;
        }
        let mut migrate = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
        migrate.extend(keys.lines());
        ask(from, &migrate).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    for at in [to, from, 3 - from - to] {
        ask(at, &[&set[..], &["NODE", &to_id]].concat()).await;
    }
    assert_eq!(cluster.master_of(key).await, to);
}
