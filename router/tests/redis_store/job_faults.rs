//! Redis killed and flushed under delayed jobs, holders that freeze, and drivers of events that die.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use moorline_router::redis::Config;
use moorline_router::{
    ActionKind, ActionState, EventKind, EventName, EventOutcome, Job, JobAction, JobChange,
    JobCreated, JobEvent, JobId, JobPlan, JobSettlement, JobState, Jobs, MessageId, NewJob, NodeId,
    RetryPolicy, Settled, StoreError, unix_ms,
};
use moorline_tests::servers::RedisServer;
use moorline_tests::waiting::eventually;

use super::support::open;

const PATIENCE: Duration = Duration::from_secs(30);

fn jobs_on(server: &RedisServer) -> Arc<dyn Jobs> {
    waiting(server, Duration::from_millis(700))
}

/// Where nothing happens to Redis: on a busy machine an answer may take its time.
fn patient(server: &RedisServer) -> Arc<dyn Jobs> {
    waiting(server, PATIENCE)
}

fn waiting(server: &RedisServer, response_timeout: Duration) -> Arc<dyn Jobs> {
    let config = Config {
        url: server.url(),
        response_timeout,
        ..Config::default()
    };
    open(&config).jobs()
}

fn new_job(id: &str, fire_at_ms: u64, cancel_on: &[&str]) -> NewJob {
    NewJob {
        id: JobId::parse(id).unwrap(),
        created_ms: unix_ms(),
        fire_at_ms,
        plan: JobPlan {
            actions: vec![JobAction {
                kind: ActionKind::Push,
                spec: Bytes::from_static(b"{}"),
            }],
            check: None,
            notify: None,
            retry: RetryPolicy {
                attempts_max: 3,
                first_ms: 100,
                max_ms: 1_000,
            },
        },
        cancel_on: cancel_on
            .iter()
            .map(|name| EventName::parse(name).unwrap())
            .collect(),
        trigger_on: Vec::new(),
        fingerprint: 1,
        device: None,
    }
}

fn event(name: &str) -> JobEvent {
    JobEvent {
        id: MessageId::generate(),
        name: EventName::parse(name).unwrap(),
        kind: EventKind::Happened,
        at_ms: unix_ms(),
    }
}

/// Calls until the store says what became of it.
async fn insist<T, F: Future<Output = Result<T, StoreError>>>(mut call: impl FnMut() -> F) -> T {
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => panic!("{error}"),
        }
    }
}

fn holder(name: &str) -> NodeId {
    NodeId::from_text(name)
}

const WRITERS: usize = 16;
const KILLS: usize = 4;

/// What a writer was told.
#[derive(Default)]
struct Answered {
    created: Vec<JobId>,
    cancelled: HashSet<JobId>,
}

/// Creates jobs that are due soon, and cancels every third, by itself or by an event.
async fn write(jobs: Arc<dyn Jobs>, number: usize, stop: Arc<AtomicBool>) -> Answered {
    let mut answered = Answered::default();
    while !stop.load(Ordering::Relaxed) {
        let n = answered.created.len();
        let (id, name) = (format!("job-{number}-{n}"), format!("paid:{number}-{n}"));
        let job = new_job(&id, unix_ms() + (n as u64 % 7) * 50, &[&name]);
        insist(|| jobs.create(job.clone())).await;
        answered.created.push(job.id.clone());
        match n % 6 {
            0 => {
                let now_ms = unix_ms();
                if let JobChange::Changed(_) = insist(|| jobs.cancel(&job.id, now_ms)).await {
                    answered.cancelled.insert(job.id);
                }
            }
            3 => {
                let event = event(&name);
                if insist(|| jobs.event(&event)).await.cancelled == 1 {
                    answered.cancelled.insert(job.id);
                }
            }
            _ => {}
        }
    }
    answered
}

/// Claims and settles what is due; answers how often each job was claimed and how often its end was confirmed as new.
async fn fire(jobs: Arc<dyn Jobs>, name: String, stop: Arc<AtomicBool>) -> HashMap<JobId, u32> {
    let mut fired = HashMap::new();
    while !stop.load(Ordering::Relaxed) {
        for shard in 0..jobs.shards() {
            let now_ms = unix_ms();
            let Ok(claimed) = jobs.claim(shard, &holder(&name), now_ms, 50, 2_000).await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let settled = claimed.jobs.iter().map(|job| async {
                assert!(job.fire_at_ms <= now_ms, "early");
                let settle = || jobs.settle(&job.id, job.token, JobSettlement::Fired, unix_ms());
                (job.id.clone(), insist(settle).await)
            });
            for (id, settled) in join_all(settled).await {
                if settled == Settled::Done {
                    *fired.entry(id).or_default() += 1;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fired
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_about_jobs_survives_a_killed_redis() {
    let mut server = RedisServer::start().await;
    let jobs = jobs_on(&server);
    let (stop, stop_firing) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| tokio::spawn(write(jobs.clone(), number, stop.clone())))
        .collect();
    let fire = |name: &str| tokio::spawn(fire(jobs.clone(), name.to_owned(), stop_firing.clone()));
    let firing = [fire("one"), fire("two")];
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(400)).await;
        server.kill9();
        server.restart().await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::Relaxed);
    let mut answered = Answered::default();
    for writer in writers {
        let one = writer.await.unwrap();
        answered.created.extend(one.created);
        answered.cancelled.extend(one.cancelled);
    }
    eventually(PATIENCE, "nothing waits any more", || async {
        let counts = jobs.counts().await.ok()?;
        (counts.pending + counts.firing + counts.retrying == 0).then_some(())
    })
    .await;
    stop_firing.store(true, Ordering::Relaxed);
    let mut fired: HashMap<JobId, u32> = HashMap::new();
    for firing in firing {
        for (id, times) in firing.await.unwrap() {
            *fired.entry(id).or_default() += times;
        }
    }
    let mut ended = HashMap::new();
    for id in &answered.created {
        let job = jobs.get(id).await.unwrap();
        let job = job.unwrap_or_else(|| panic!("{id} was answered as created and is lost"));
        ended.insert(id.clone(), job.state);
    }
    for id in &answered.cancelled {
        assert_eq!(ended[id], JobState::Cancelled, "{id}");
        assert_eq!(fired.get(id), None, "{id} was cancelled and fired");
    }
    for (id, state) in &ended {
        let times = fired.get(id).copied().unwrap_or(0);
        match state {
            JobState::Fired => assert!(times >= 1, "{id} was not fired by anybody"),
            JobState::Cancelled => assert_eq!(times, 0, "{id}"),
            other => panic!("{id} is {other}"),
        }
    }
    let enough = WRITERS * KILLS * 2;
    assert!(
        answered.created.len() > enough && answered.cancelled.len() > KILLS,
        "{} created and {} cancelled are too few to show anything",
        answered.created.len(),
        answered.cancelled.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_holders_of_one_shard_share_its_jobs() {
    let server = RedisServer::start().await;
    let (one, other) = (patient(&server), patient(&server));
    let now_ms = unix_ms();
    let new = (0..600).map(|n| new_job(&format!("job-{n}"), now_ms - n, &[]));
    for created in one.create_many(new.collect()).await {
        assert!(matches!(created, Ok(JobCreated::Created(_))));
    }
    let claim_all = |jobs: Arc<dyn Jobs>, name: &'static str| async move {
        let mut mine = Vec::new();
        for shard in 0..jobs.shards() {
            loop {
                let claimed = jobs
                    .claim(shard, &holder(name), now_ms, 7, 60_000)
                    .await
                    .unwrap();
                if claimed.jobs.is_empty() {
                    break;
                }
                mine.extend(claimed.jobs);
            }
        }
        mine
    };
    let (mine, theirs) = tokio::join!(
        tokio::spawn(claim_all(one.clone(), "one")),
        tokio::spawn(claim_all(other.clone(), "other"))
    );
    let (mine, theirs) = (mine.unwrap(), theirs.unwrap());
    assert_eq!(mine.len() + theirs.len(), 600);
    let ids: HashSet<_> = mine.iter().chain(&theirs).map(|job| &job.id).collect();
    assert_eq!(ids.len(), 600, "nobody has what another one has");
    let settle = |jobs: &Arc<dyn Jobs>, job: &Job| {
        let (jobs, id, token) = (jobs.clone(), job.id.clone(), job.token);
        async move {
            jobs.settle(&id, token, JobSettlement::Fired, now_ms)
                .await
                .unwrap()
        }
    };
    for settled in join_all(mine.iter().map(|job| settle(&other, job))).await {
        assert_eq!(
            settled,
            Settled::Done,
            "who settles does not matter, the token does"
        );
    }
    join_all(theirs.iter().map(|job| settle(&one, job))).await;
    assert_eq!(one.counts().await.unwrap().fired, 600);
}

#[tokio::test]
async fn a_holder_that_froze_comes_back_to_find_its_tokens_worth_nothing() {
    let server = RedisServer::start().await;
    let jobs = patient(&server);
    let job = new_job("a", unix_ms(), &[]);
    insist(|| jobs.create(job.clone())).await;
    let (shard, now_ms) = (jobs.shard_of(&job.id), unix_ms());
    let claim = async |name: &str, now_ms: u64| {
        let claimed = jobs
            .claim(shard, &holder(name), now_ms, 9, 1_000)
            .await
            .unwrap();
        claimed.jobs.into_iter().next()
    };
    let frozen = claim("frozen", now_ms).await.unwrap();
    assert_eq!(claim("other", now_ms + 999).await, None);
    let taken = claim("other", now_ms + 1_000).await.unwrap();
    assert!(taken.token > frozen.token);
    let done = vec![ActionState::Done];
    assert_eq!(
        jobs.extend(&job.id, frozen.token, now_ms + 9_000, done, false)
            .await
            .unwrap(),
        Settled::Stale
    );
    for settlement in [
        JobSettlement::Fired,
        JobSettlement::PutOff {
            at_ms: now_ms,
            actions: vec![ActionState::Waiting],
            begun: false,
            reason: "late".into(),
        },
        JobSettlement::Failed {
            actions: vec![ActionState::Failed],
            error: "late".into(),
        },
    ] {
        let settled = jobs.settle(&job.id, frozen.token, settlement, now_ms).await;
        assert_eq!(settled.unwrap(), Settled::Stale);
    }
    assert_eq!(jobs.get(&job.id).await.unwrap(), Some(taken.clone()));
    let settled = jobs
        .settle(&job.id, taken.token, JobSettlement::Fired, now_ms)
        .await;
    assert_eq!(settled.unwrap(), Settled::Done);
    assert_eq!(jobs.get(&job.id).await.unwrap().unwrap().attempts, 0);
}

const MANY: usize = 3_000;

/// Creates them in parts that a busy machine writes in time.
async fn create_many(jobs: &Arc<dyn Jobs>, name: &str) {
    let at_ms = unix_ms() + 3_600_000;
    let new = (0..MANY).map(|n| new_job(&format!("job-{n}"), at_ms, &[name]));
    for part in new.collect::<Vec<_>>().chunks(200) {
        let created = insist(|| async {
            let created = jobs.create_many(part.to_vec()).await;
            created.into_iter().collect::<Result<Vec<_>, _>>()
        });
        for created in created.await {
            assert!(!matches!(created, JobCreated::Conflict(_)), "{created:?}");
        }
    }
}

#[tokio::test]
async fn an_event_whose_driver_died_is_driven_on_by_another_and_counted_once() {
    let server = RedisServer::start().await;
    let (one, other) = (patient(&server), patient(&server));
    create_many(&one, "shop.closed:1").await;
    let event = event("shop.closed:1");
    // Dies over it: somewhere between the first job and the last.
    let driven = tokio::spawn({
        let (one, event) = (one.clone(), event.clone());
        async move { one.event(&event).await }
    });
    eventually(PATIENCE, "some are cancelled", || async {
        (other.counts().await.ok()?.cancelled > 0).then_some(())
    })
    .await;
    driven.abort();
    let _ = driven.await;
    drop(one);
    let mut unfinished = Vec::new();
    for shard in 0..other.shards() {
        unfinished.extend(
            other
                .unfinished_events(shard, unix_ms() + 1, 10)
                .await
                .unwrap(),
        );
    }
    assert_eq!(
        unfinished,
        std::slice::from_ref(&event),
        "the driver died too late to show anything"
    );
    let expected = EventOutcome {
        cancelled: MANY as u64,
        triggered: 0,
    };
    assert_eq!(other.event(&unfinished[0]).await.unwrap(), expected);
    assert_eq!(
        other.event(&event).await.unwrap(),
        expected,
        "a repetition is answered alike"
    );
    assert_eq!(other.counts().await.unwrap().cancelled, MANY as u64);
    for shard in 0..other.shards() {
        let unfinished = other.unfinished_events(shard, unix_ms() + 1, 10).await;
        assert!(unfinished.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_redis_flushed_in_the_middle_of_an_event_begins_again() {
    let server = RedisServer::start().await;
    let jobs = jobs_on(&server);
    create_many(&jobs, "shop.closed:1").await;
    let first = event("shop.closed:1");
    let driven = tokio::spawn({
        let (jobs, event) = (jobs.clone(), first.clone());
        async move { jobs.event(&event).await }
    });
    eventually(PATIENCE, "some are cancelled", || async {
        (jobs.counts().await.ok()?.cancelled > 0).then_some(())
    })
    .await;
    server.flush().await;
    // Whatever it says, it ends, and says no more than was there.
    let outcome = tokio::time::timeout(PATIENCE, driven)
        .await
        .unwrap()
        .unwrap();
    assert!(outcome.is_err() || outcome.unwrap().cancelled <= MANY as u64);
    assert_eq!(jobs.counts().await.unwrap().total(), 0);
    // Nothing of before stands in the way of the same jobs and another event.
    tokio::time::sleep(Duration::from_millis(5)).await;
    create_many(&jobs, "shop.closed:2").await;
    for (name, cancelled) in [("shop.closed:1", 0), ("shop.closed:2", MANY as u64)] {
        let event = event(name);
        let outcome = insist(|| jobs.event(&event)).await;
        assert_eq!(outcome.cancelled, cancelled, "{name}");
    }
}

#[tokio::test]
async fn a_notice_arrives_from_another_process_also_after_redis_was_away() {
    let mut server = RedisServer::start().await;
    let (one, other) = (jobs_on(&server), jobs_on(&server));
    let job = |id: &str, in_ms| new_job(id, unix_ms() + in_ms, &[]);
    let first = job("a", 3_600_000);
    let mut earlier = one.earlier(one.shard_of(&first.id));
    let told = async |earlier: &mut tokio::sync::watch::Receiver<u64>| {
        tokio::time::timeout(PATIENCE, earlier.changed())
            .await
            .unwrap()
            .unwrap();
        // Whatever else is on its way.
        while tokio::time::timeout(Duration::from_millis(300), earlier.changed())
            .await
            .is_ok()
        {}
    };
    // It listens.
    told(&mut earlier).await;
    insist(|| other.create(first.clone())).await;
    told(&mut earlier).await;
    server.kill9();
    server.restart().await;
    // Something may have been missed.
    told(&mut earlier).await;
    let now_ms = unix_ms();
    insist(|| other.trigger(&first.id, now_ms)).await;
    told(&mut earlier).await;
}
