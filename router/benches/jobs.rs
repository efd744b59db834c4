//! What many pending jobs cost in the embedded store: time, memory and disk while they are created, at a start, while
//! nothing is due, and while they become due.
//!
//! `cargo bench -p moorline-router --bench jobs [-- jobs [directory]]`; a million jobs if nothing is said. Each has 200 bytes
//! to push and is cancelled by an event of its own. Prints one line a stage.

#![allow(clippy::print_stdout, reason = "the report")]
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first failure")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream;
use moorline_router::contract::job_events::event;
use moorline_router::contract::jobs::{job, name, plan};
use moorline_router::embedded::{Config, EmbeddedStore};
use moorline_router::{
    JobFilter, JobId, JobSettlement, JobState, Jobs, NewJob, NodeId, Settled, unix_ms,
};

const BATCH: u64 = 500;
const DUE: u64 = 20_000;
/// Calls at once.
const CALLERS: usize = 500;

/// Resident memory of this process in MB.
fn memory_mb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kb = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kb.unwrap_or(0) / 1_024
}

fn disk_mb(dir: &Path) -> u64 {
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => disk_mb(&entry.path()) << 20,
        Ok(data) => data.len(),
        Err(_) => 0,
    };
    let entries = fs::read_dir(dir).unwrap().flatten();
    entries.map(bytes).sum::<u64>() >> 20
}

fn open(dir: &Path) -> Arc<EmbeddedStore> {
    EmbeddedStore::open(Config {
        data_dir: dir.into(),
        ..Config::default()
    })
    .unwrap()
}

fn report(what: &str, took: Duration, count: u64, dir: &Path) {
    println!(
        "{what:<28} {:>8.2} s  {:>9.0}/s  memory {:>5} MB  disk {:>6} MB",
        took.as_secs_f64(),
        count as f64 / took.as_secs_f64(),
        memory_mb(),
        disk_mb(dir)
    );
}

fn id(n: u64) -> JobId {
    JobId::parse(&format!("order-{n}")).unwrap()
}

fn new(n: u64, now_ms: u64) -> NewJob {
    NewJob {
        created_ms: now_ms,
        plan: plan(&"x".repeat(200)),
        cancel_on: vec![name(&format!("order.paid:{n}"))],
        ..job(
            &format!("order-{n}"),
            now_ms + 3_600_000 + n * 7_919 % 3_600_000,
        )
    }
}

async fn create(store: &EmbeddedStore, jobs: u64, now_ms: u64) {
    let callers = 4;
    let create = |caller: u64| async move {
        for batch in (0..jobs / BATCH).filter(|batch| batch % callers == caller) {
            let batch = (batch * BATCH..(batch + 1) * BATCH).map(|n| new(n, now_ms));
            for answer in store.create_many(batch.collect()).await {
                answer.unwrap();
            }
        }
    };
    join_all((0..callers).map(create)).await;
}

/// Claims and settles everything that is due, as the runner does.
async fn fire(store: &EmbeddedStore, now_ms: u64) -> u64 {
    let holder = NodeId::from_text("bench");
    let mut fired = 0;
    loop {
        let claimed = store.claim(0, &holder, now_ms, 500, 30_000).await.unwrap();
        if claimed.jobs.is_empty() {
            return fired;
        }
        let settle = |job: &moorline_router::Job| {
            let (id, token) = (job.id.clone(), job.token);
            async move { store.settle(&id, token, JobSettlement::Fired, now_ms).await }
        };
        for settled in join_all(claimed.jobs.iter().map(settle)).await {
            assert_eq!(settled.unwrap(), Settled::Done);
            fired += 1;
        }
    }
}

async fn run(jobs: u64, dir: &Path) {
    let now_ms = unix_ms();
    let store = open(dir);
    let began = Instant::now();
    create(&store, jobs, now_ms).await;
    report("created", began.elapsed(), jobs, dir);

    store.close().unwrap();
    drop(store);
    let began = Instant::now();
    let store = open(dir);
    report("started again", began.elapsed(), 1, dir);
    let counts = store.counts().await.unwrap();
    assert_eq!(counts.pending, jobs);

    let holder = NodeId::from_text("bench");
    let began = Instant::now();
    for _ in 0..1_000 {
        let claimed = store.claim(0, &holder, now_ms, 500, 30_000).await.unwrap();
        assert!(claimed.jobs.is_empty());
    }
    report("claims of nothing", began.elapsed(), 1_000, dir);

    let filter = JobFilter {
        state: Some(JobState::Pending),
        ..JobFilter::default()
    };
    let began = Instant::now();
    let mut after = None;
    for _ in 0..100 {
        let page = store.list(&filter, after.as_ref(), 100).await.unwrap();
        after = page.next;
    }
    report("jobs listed", began.elapsed(), 10_000, dir);

    let began = Instant::now();
    let cancels = (0..DUE / 2).map(|n| {
        let store = store.clone();
        async move {
            store
                .event(&event(&format!("order.paid:{n}"), now_ms))
                .await
        }
    });
    let mut cancels = stream::iter(cancels).buffer_unordered(CALLERS);
    while let Some(outcome) = cancels.next().await {
        assert_eq!(outcome.unwrap().cancelled, 1);
    }
    report("events, one job each", began.elapsed(), DUE / 2, dir);

    let triggers = (DUE / 2..DUE / 2 + DUE).map(|n| {
        let store = store.clone();
        async move { store.trigger(&id(n), now_ms).await }
    });
    let began = Instant::now();
    let mut triggers = stream::iter(triggers).buffer_unordered(CALLERS);
    while let Some(change) = triggers.next().await {
        change.unwrap();
    }
    report("triggered", began.elapsed(), DUE, dir);

    let began = Instant::now();
    assert_eq!(fire(&store, now_ms).await, DUE);
    report("claimed and settled", began.elapsed(), DUE, dir);

    let began = Instant::now();
    let swept = store.sweep(0, now_ms + 7_200_000, 1_000_000).await.unwrap();
    assert_eq!(swept.jobs, DUE + DUE / 2);
    report("swept", began.elapsed(), swept.jobs, dir);
    store.close().unwrap();
}

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'));
    let jobs = arguments
        .next()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1_000_000);
    let dir = arguments
        .next()
        .map_or_else(tempfile::tempdir, tempfile::tempdir_in)
        .unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(run(jobs, dir.path()));
}
