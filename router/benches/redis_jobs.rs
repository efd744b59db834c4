//! How many delayed jobs a second Redis creates, claims and settles, and how much memory one that waits takes.
//!
//! `cargo bench -p moorline-router --bench redis_jobs [-- jobs [url]]`. Without a URL it starts a `redis-server` that syncs
//! every write. Jobs are created in batches of 100 by 16 callers at once; each does a push of about 160 bytes of JSON and names one event.
//! Then all are due: every shard is claimed in batches of 200, and everything claimed is settled. Prints a line for each.

#![allow(clippy::print_stdout, reason = "the report")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first failure")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::join_all;
use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_router::{
    ActionKind, EventName, JobAction, JobCreated, JobId, JobPlan, JobSettlement, Jobs, NewJob,
    NodeId, RetryPolicy, Settled, unix_ms,
};
use moorline_tests::servers::RedisServer;

const BATCH: usize = 100;
const CALLERS: usize = 16;
const CLAIMED_AT_ONCE: usize = 200;
const LATER_MS: u64 = 3_600_000;

fn new_job(n: usize, now_ms: u64) -> NewJob {
    let spec = format!(
        r#"{{"to":{{"client":"phone-{n:07}"}},"topic":"d/phone-{n:07}/orders","payload":{{"order":{n},"state":"cancelled","reason":"not paid in time"}},"qos":1,"ttl":"24h"}}"#
    );
    NewJob {
        id: JobId::parse(&format!("order-{n:07}")).unwrap(),
        created_ms: now_ms,
        fire_at_ms: now_ms + LATER_MS + n as u64 % 1_000,
        plan: JobPlan {
            actions: vec![JobAction {
                kind: ActionKind::Push,
                spec: Bytes::from(spec),
            }],
            check: None,
            notify: None,
            retry: RetryPolicy {
                attempts_max: 5,
                first_ms: 1_000,
                max_ms: 60_000,
            },
        },
        cancel_on: vec![EventName::new("order.paid", &format!("{n:07}")).unwrap()],
        trigger_on: Vec::new(),
        fingerprint: n as u64,
        device: None,
    }
}

/// A number that the server says of itself.
async fn info(
    connection: &mut redis::aio::MultiplexedConnection,
    section: &str,
    field: &str,
) -> f64 {
    let text: String = redis::cmd("INFO")
        .arg(section)
        .query_async(connection)
        .await
        .unwrap();
    let prefix = format!("{field}:");
    let value = text.lines().find_map(|line| line.strip_prefix(&prefix));
    value.unwrap().trim().parse().unwrap()
}

async fn cpu(connection: &mut redis::aio::MultiplexedConnection) -> f64 {
    let user = info(connection, "cpu", "used_cpu_user_main_thread").await;
    user + info(connection, "cpu", "used_cpu_sys_main_thread").await
}

async fn create(jobs: Arc<dyn Jobs>, next: Arc<AtomicUsize>, count: usize) {
    loop {
        let first = next.fetch_add(BATCH, Ordering::Relaxed);
        if first >= count {
            return;
        }
        let now_ms = unix_ms();
        let batch = (first..count.min(first + BATCH)).map(|n| new_job(n, now_ms));
        for created in jobs.create_many(batch.collect()).await {
            assert!(matches!(created, Ok(JobCreated::Created(_))), "{created:?}");
        }
    }
}

/// Claims and settles everything of a shard; says how many there were.
async fn carry_out(jobs: Arc<dyn Jobs>, shard: u16) -> usize {
    let (holder, now_ms) = (NodeId::from_text("queue"), unix_ms() + 2 * LATER_MS);
    let mut count = 0;
    loop {
        let claimed = jobs
            .claim(shard, &holder, now_ms, CLAIMED_AT_ONCE, 600_000)
            .await
            .unwrap()
            .jobs;
        if claimed.is_empty() {
            return count;
        }
        count += claimed.len();
        let settled = claimed
            .iter()
            .map(|job| jobs.settle(&job.id, job.token, JobSettlement::Fired, now_ms));
        for settled in join_all(settled).await {
            assert_eq!(settled.unwrap(), Settled::Done);
        }
    }
}

async fn measure(count: usize, url: &str) {
    let config = Config {
        url: url.to_owned(),
        key_prefix: "bench-jobs".into(),
        ..Config::default()
    };
    let jobs: Arc<dyn Jobs> = RedisStore::open(&config, Limits::default()).unwrap().jobs();
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let report = |what: &str, took: f64, cpu: f64| {
        let count = count as f64;
        println!(
            "{what:<18} {:>8.0} a second, {:>5.1} µs of Redis each",
            count / took,
            cpu / count * 1e6
        );
    };

    let memory = info(&mut connection, "memory", "used_memory").await;
    let (cpu_before, began) = (cpu(&mut connection).await, Instant::now());
    let next = Arc::new(AtomicUsize::new(0));
    let callers = (0..CALLERS).map(|_| tokio::spawn(create(jobs.clone(), next.clone(), count)));
    for caller in join_all(callers).await {
        caller.unwrap();
    }
    let took = began.elapsed().as_secs_f64();
    report("created", took, cpu(&mut connection).await - cpu_before);
    let memory = info(&mut connection, "memory", "used_memory").await - memory;
    println!(
        "waiting            {:>8.0} bytes each",
        memory / count as f64
    );

    let (cpu_before, began) = (cpu(&mut connection).await, Instant::now());
    let holders = (0..jobs.shards()).map(|shard| tokio::spawn(carry_out(jobs.clone(), shard)));
    let carried_out: usize = join_all(holders)
        .await
        .into_iter()
        .map(Result::unwrap)
        .sum();
    assert_eq!(carried_out, count);
    let took = began.elapsed().as_secs_f64();
    report(
        "claimed, settled",
        took,
        cpu(&mut connection).await - cpu_before,
    );
}

fn main() {
    let args: Vec<String> = std::env::args().filter(|arg| arg != "--bench").collect();
    let count = args.get(1).map_or(100_000, |text| text.parse().unwrap());
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
        Box::pin(measure(count, &url)).await;
        drop(server);
    });
}
