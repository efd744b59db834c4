//! How many durable appends a second the store on Redis takes, and how long each caller waits.
//!
//! `cargo bench -p moorline-router --bench redis_append [-- seconds [url]]`. Without a URL it starts a `redis-server` that
//! syncs every write. Callers wait for each append before the next; every round spreads them over 10,000 clients.
//! Prints one line a round.

#![allow(clippy::print_stdout, reason = "the report")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first failure")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moorline_router::contract::{client, push};
use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_router::{Append, Appended, ClientId, End, EndReason, Epoch, Inboxes, NodeId};
use moorline_tests::servers::RedisServer;

const CLIENTS: usize = 10_000;

async fn caller(
    store: Arc<RedisStore>,
    clients: Arc<Vec<ClientId>>,
    next: Arc<AtomicU64>,
    until: Instant,
    delivers: bool,
) -> Vec<Duration> {
    let payload = "x".repeat(200);
    let node = NodeId::from_text("node");
    let mut waits = Vec::new();
    while Instant::now() < until {
        let turn = next.fetch_add(1, Ordering::Relaxed);
        let client = clients[usize::try_from(turn).unwrap() % CLIENTS].clone();
        let append = Append {
            client: client.clone(),
            message: push(&payload),
            fingerprint: None,
        };
        let began = Instant::now();
        let answers = store.append(vec![append]).await.unwrap();
        waits.push(began.elapsed());
        let Appended::Stored { position, .. } = answers[0] else {
            panic!("not stored");
        };
        if delivers {
            // As a connected device would: each message is sent and acknowledged soon after.
            store.mark_sent(&client, position, &node, Epoch(1));
            store.end(vec![End {
                client,
                position,
                reason: EndReason::Delivered,
            }]);
        }
    }
    waits
}

async fn round(callers: usize, length: Duration, url: &str, delivers: bool) {
    let config = Config {
        url: url.to_owned(),
        key_prefix: format!("bench-{callers}-{delivers}"),
        ..Config::default()
    };
    let store = RedisStore::open(&config, Limits::default()).unwrap();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| client(&format!("device-{n}")))
        .collect();
    let (clients, next) = (Arc::new(clients), Arc::new(AtomicU64::new(0)));
    let began = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let (store, clients, next) = (store.clone(), clients.clone(), next.clone());
            tokio::spawn(caller(store, clients, next, began + length, delivers))
        })
        .collect();
    let mut waits = Vec::new();
    for task in tasks {
        waits.extend(task.await.unwrap());
    }
    let took = began.elapsed();
    store.flush().await;
    waits.sort_unstable();
    let at = |share: usize| waits[(waits.len() - 1) * share / 1_000].as_secs_f64() * 1e3;
    println!(
        "callers {callers:>4}  {}  appends/s {:>8.0}  wait ms p50 {:.3}  p99 {:.3}  max {:.3}",
        if delivers { "delivered" } else { "waiting  " },
        waits.len() as f64 / took.as_secs_f64(),
        at(500),
        at(990),
        at(1_000),
    );
}

fn main() {
    let args: Vec<String> = std::env::args().filter(|arg| arg != "--bench").collect();
    let seconds = args.get(1).map_or(5, |text| text.parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (server, url) = match args.get(2) {
            Some(url) => (None, url.clone()),
            None => {
                let server = RedisServer::start().await;
                let url = server.url();
                (Some(server), url)
            }
        };
        for delivers in [false, true] {
            for callers in [1, 64, 512] {
                let length = Duration::from_secs(seconds);
                Box::pin(round(callers, length, &url, delivers)).await;
            }
        }
        drop(server);
    });
}
