//! A slot of jobs moves to another server, and a master dies, while jobs are created, cancelled and claimed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use moorline_router::contract::eventually;
use moorline_router::contract::jobs::{job, name};
use moorline_router::redis::Config;
use moorline_router::{
    EventKind, JobChange, JobCreated, JobEvent, JobId, JobSettlement, JobState, Jobs, MessageId,
    NewJob, NodeId, Settled, StoreError, unix_ms,
};
use moorline_tests::servers::{RedisCluster, Sentinels};

use super::failover::move_slot;
use super::support::{cluster_config, open, sentinel_config};

const WRITERS: usize = 12;
/// Jobs that are created before the server goes, and after it is back.
const LOAD: usize = 300;

/// Jobs that were answered as created, and those that were answered as cancelled.
#[derive(Default)]
struct Answered {
    created: Vec<JobId>,
    cancelled: HashSet<JobId>,
}

/// Again where it is not known what became of it: each call can be repeated as it is.
async fn insist<T, F: Future<Output = Result<T, StoreError>>>(mut call: impl FnMut() -> F) -> T {
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => panic!("{error}"),
        }
    }
}

async fn write(
    jobs: Arc<dyn Jobs>,
    number: usize,
    made: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
) -> Answered {
    let mut answered = Answered::default();
    while !stop.load(Ordering::Relaxed) {
        let n = answered.created.len();
        let paid = name(&format!("paid:{number}-{n}"));
        let new = NewJob {
            created_ms: unix_ms(),
            cancel_on: vec![paid.clone()],
            ..job(&format!("job-{number}-{n}"), unix_ms() + 200)
        };
        let created = insist(|| jobs.create(new.clone())).await;
        assert!(!matches!(created, JobCreated::Conflict(_)), "{created:?}");
        answered.created.push(new.id.clone());
        made.fetch_add(1, Ordering::Relaxed);
        match n % 4 {
            0 => {
                let now_ms = unix_ms();
                if let JobChange::Changed(_) = insist(|| jobs.cancel(&new.id, now_ms)).await {
                    answered.cancelled.insert(new.id);
                }
            }
            2 => {
                let event = JobEvent {
                    id: MessageId::generate(),
                    name: paid,
                    kind: EventKind::Happened,
                    at_ms: unix_ms(),
                };
                if insist(|| jobs.event(&event)).await.cancelled == 1 {
                    answered.cancelled.insert(new.id);
                }
            }
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    answered
}

/// Carries out what is due; answers which jobs were ever claimed.
async fn carry_out(jobs: Arc<dyn Jobs>, stop: Arc<AtomicBool>) -> HashSet<JobId> {
    let (holder, mut claimed) = (NodeId::from_text("queue"), HashSet::new());
    while !stop.load(Ordering::Relaxed) {
        for shard in 0..jobs.shards() {
            let Ok(batch) = jobs.claim(shard, &holder, unix_ms(), 20, 5_000).await else {
                continue;
            };
            for job in batch.jobs {
                let settle = || jobs.settle(&job.id, job.token, JobSettlement::Fired, unix_ms());
                if insist(settle).await == Settled::Done {
                    claimed.insert(job.id);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    claimed
}

async fn survives(config: &Config, fail_over: impl AsyncFnOnce()) {
    let jobs: Arc<dyn Jobs> = open(config).jobs();
    let (stop, stop_carrying) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let made = Arc::new(AtomicUsize::new(0));
    let writers: Vec<_> = (0..WRITERS)
        .map(|n| tokio::spawn(write(jobs.clone(), n, made.clone(), stop.clone())))
        .collect();
    let load = || async {
        let enough = made.load(Ordering::Relaxed) + LOAD;
        eventually("the writers are answered", || async {
            made.load(Ordering::Relaxed) >= enough
        })
        .await;
    };
    let carrying = tokio::spawn(carry_out(jobs.clone(), stop_carrying.clone()));
    load().await;
    fail_over().await;
    eventually("the store works again", || async {
        jobs.counts().await.is_ok()
    })
    .await;
    load().await;
    stop.store(true, Ordering::Relaxed);
    let mut answered = Answered::default();
    for writer in writers {
        let one = writer.await.unwrap();
        answered.created.extend(one.created);
        answered.cancelled.extend(one.cancelled);
    }
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        match jobs.counts().await {
            Ok(counts) if counts.pending + counts.firing + counts.retrying == 0 => break,
            counts => assert!(tokio::time::Instant::now() < deadline, "{counts:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stop_carrying.store(true, Ordering::Relaxed);
    let claimed = carrying.await.unwrap();
    // Another process: nothing that the first one knows helps.
    let jobs = open(config).jobs();
    let mut states = HashMap::new();
    for id in &answered.created {
        let job = insist(|| jobs.get(id)).await;
        let job = job.unwrap_or_else(|| panic!("{id} was answered as created and is lost"));
        *states.entry(job.state).or_insert(0) += 1;
        assert!(job.state.is_final(), "{id} is {}", job.state);
        assert_eq!(claimed.contains(id), job.state == JobState::Fired, "{id}");
        if answered.cancelled.contains(id) {
            assert_eq!(job.state, JobState::Cancelled, "{id}");
        }
    }
    let counts = insist(|| jobs.counts()).await;
    assert_eq!(
        counts.total(),
        answered.created.len() as u64,
        "nothing is there twice"
    );
    assert!(
        states.len() == 2 && states.values().all(|count| *count > WRITERS),
        "{states:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_fail_over_and_no_job_is_lost_or_fires_although_cancelled() {
    let mut sentinels = Sentinels::start().await;
    let config = sentinel_config(&sentinels);
    survives(&config, async || {
        sentinels.fail_over().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_moves_a_shard_and_fails_over_and_no_job_is_lost_or_fires_although_cancelled() {
    let mut cluster = RedisCluster::start().await;
    let config = cluster_config(&cluster);
    let key = format!("{}1:jobs:{{j03}}:head", config.key_prefix);
    survives(&config, async || {
        move_slot(&cluster, &key).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (old, _) = cluster.fail_over(&key).await;
        // The new master confirms nothing before it has a replica again.
        cluster.servers[old].restart().await;
    })
    .await;
}
