//! How many durable appends a second the embedded store takes, and how long each caller waits.
//!
//! `cargo bench -p moorline-router --bench append [-- seconds [directory]]`. Callers wait for each
//! append before the next; every round spreads them over 10,000 clients. Prints one line a round.

#![allow(clippy::print_stdout, reason = "the report")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first failure")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moorline_router::contract::{client, push};
use moorline_router::embedded::{Config, EmbeddedStore};
use moorline_router::{Append, Appended, ClientId, End, EndReason, Inboxes};

const CLIENTS: usize = 10_000;

async fn caller(
    store: Arc<EmbeddedStore>,
    clients: Arc<Vec<ClientId>>,
    next: Arc<AtomicU64>,
    until: Instant,
) -> Vec<Duration> {
    let payload = "x".repeat(200);
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
        // As a connected device would: each message is acknowledged soon after.
        store.end(vec![End {
            client,
            position,
            reason: EndReason::Delivered,
        }]);
    }
    waits
}

async fn round(callers: usize, length: Duration, dir: &std::path::Path) {
    let config = Config {
        data_dir: dir.join(format!("callers-{callers}")),
        ..Config::default()
    };
    let store = EmbeddedStore::open(config).unwrap();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| client(&format!("device-{n}")))
        .collect();
    let (clients, next) = (Arc::new(clients), Arc::new(AtomicU64::new(0)));
    let began = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let (store, clients, next) = (store.clone(), clients.clone(), next.clone());
            tokio::spawn(caller(store, clients, next, began + length))
        })
        .collect();
    let mut waits = Vec::new();
    for task in tasks {
        waits.extend(task.await.unwrap());
    }
    let took = began.elapsed();
    waits.sort_unstable();
    let at = |share: usize| waits[(waits.len() - 1) * share / 1_000].as_secs_f64() * 1e3;
    println!(
        "callers {callers:>4}  appends/s {:>8.0}  wait ms p50 {:.3}  p99 {:.3}  max {:.3}",
        waits.len() as f64 / took.as_secs_f64(),
        at(500),
        at(990),
        at(1_000),
    );
    store.close().unwrap();
}

fn main() {
    let mut numbers = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'));
    let seconds = numbers
        .next()
        .and_then(|text| text.parse().ok())
        .unwrap_or(10);
    let dir = numbers
        .next()
        .map_or_else(tempfile::tempdir, tempfile::tempdir_in)
        .unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    for callers in [1, 64, 512] {
        runtime.block_on(round(callers, Duration::from_secs(seconds), dir.path()));
    }
}
