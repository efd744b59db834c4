//! How many durable appends a second the store on Redis takes, and how long each caller waits.
//!
//! `cargo bench -p moorline-router --bench redis_append [-- seconds [url]]`. Without a URL it starts a `redis-server` that
//! syncs every write. Callers wait for each append before the next; every round spreads them over 10,000 clients.
//! Prints one line a round.

#![allow(clippy::print_stdout, reason = "the report")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first failure")]

mod appending;

use std::time::Duration;

use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_router::{ClientId, End, EndReason, Epoch, Inboxes, NodeId, Position};
use moorline_tests::servers::RedisServer;

/// As a connected device would: each message is sent and acknowledged soon after.
fn delivered(store: &dyn Inboxes, client: &ClientId, position: Position) {
    store.mark_sent(client, position, &NodeId::from_text("node"), Epoch(1));
    store.end(vec![End {
        client: client.clone(),
        position,
        reason: EndReason::Delivered,
    }]);
}

/// For a device that is away.
fn waits(_: &dyn Inboxes, _: &ClientId, _: Position) {}

async fn round(callers: usize, length: Duration, url: &str, delivers: bool) {
    let config = Config {
        url: url.to_owned(),
        key_prefix: format!("bench-{callers}-{delivers}"),
        ..Config::default()
    };
    let store = RedisStore::open(&config, Limits::default()).unwrap();
    let (what, then): (_, appending::Then) = match delivers {
        true => ("delivered", delivered),
        false => ("waiting  ", waits),
    };
    let line = appending::round(store.clone(), callers, length, then).await;
    store.flush().await;
    println!("{what}  {line}");
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
