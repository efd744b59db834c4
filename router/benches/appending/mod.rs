//! Callers that append, each waiting for one before the next, and what they waited.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moorline_router::contract::{client, push};
use moorline_router::{Append, Appended, ClientId, Inboxes, Position};

const CLIENTS: usize = 10_000;

/// What becomes of a message that was appended.
pub(crate) type Then = fn(&dyn Inboxes, &ClientId, Position);

async fn caller(
    store: Arc<dyn Inboxes>,
    clients: Arc<Vec<ClientId>>,
    next: Arc<AtomicU64>,
    until: Instant,
    then: Then,
) -> Vec<Duration> {
    let payload = "x".repeat(200);
    let mut waits = Vec::new();
    while Instant::now() < until {
        let turn = next.fetch_add(1, Ordering::Relaxed);
        let client = &clients[usize::try_from(turn).unwrap() % CLIENTS];
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
        then(&*store, client, position);
    }
    waits
}

/// Lets so many callers append for `length`, over 10,000 clients in turns; the line of the report.
pub(crate) async fn round(
    store: Arc<dyn Inboxes>,
    callers: usize,
    length: Duration,
    then: Then,
) -> String {
    let clients = (0..CLIENTS).map(|n| client(&format!("device-{n}")));
    let (clients, next) = (Arc::new(clients.collect()), Arc::new(AtomicU64::new(0)));
    let began = Instant::now();
    let start = |_| {
        let (store, clients, next) = (store.clone(), Arc::clone(&clients), next.clone());
        tokio::spawn(caller(store, clients, next, began + length, then))
    };
    let tasks: Vec<_> = (0..callers).map(start).collect();
    let mut waits: Vec<Duration> = Vec::new();
    for task in tasks {
        waits.extend(task.await.unwrap());
    }
    let took = began.elapsed();
    waits.sort_unstable();
    let at = |share: usize| waits[(waits.len() - 1) * share / 1_000].as_secs_f64() * 1e3;
    format!(
        "callers {callers:>4}  appends/s {:>8.0}  wait ms p50 {:.3}  p99 {:.3}  max {:.3}",
        waits.len() as f64 / took.as_secs_f64(),
        at(500),
        at(990),
        at(1_000),
    )
}
