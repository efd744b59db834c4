//! How many durable appends a second the embedded store takes, and how long each caller waits.
//!
//! `cargo bench -p moorline-router --bench append [-- seconds [directory]]`. Callers wait for each
//! append before the next; every round spreads them over 10,000 clients. Prints one line a round.

#![allow(clippy::print_stdout, reason = "the report")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first failure")]

mod appending;

use std::time::Duration;

use moorline_router::embedded::{Config, EmbeddedStore};
use moorline_router::{ClientId, End, EndReason, Inboxes, Position};

/// As a connected device would: each message is acknowledged soon after.
fn acknowledged(store: &dyn Inboxes, client: &ClientId, position: Position) {
    store.end(vec![End {
        client: client.clone(),
        position,
        reason: EndReason::Delivered,
    }]);
}

async fn round(callers: usize, length: Duration, dir: &std::path::Path) {
    let config = Config {
        data_dir: dir.join(format!("callers-{callers}")),
        ..Config::default()
    };
    let store = EmbeddedStore::open(config).unwrap();
    let line = appending::round(store.clone(), callers, length, acknowledged).await;
    println!("{line}");
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
