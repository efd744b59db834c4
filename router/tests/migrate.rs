//! From an embedded data directory to Redis.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;

use moorline_mqtt::{PacketId, QoS, RetainHandling, SubscriptionOptions, Will};
use moorline_router::contract::{client, of_session, push, read_all, stored, topic};
use moorline_router::embedded::{Config as EmbeddedConfig, EmbeddedStore};
use moorline_router::migrate::{self, MigrateError, Migrated};
use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_router::{
    Append, Appended, Ban, BanTarget, Bans, End, EndReason, Epoch, Inboxes, Message, MessageId,
    NodeId, NodeRecord, NodeState, QueueName, ReceiptState, ReceivedPublish, Retained, Routes,
    SessionRecord, Sessions, Shards, Share, StoredSubscription, StoredWill, TimerKind, UpstreamBus,
    UpstreamMessage, unix_ms,
};
use moorline_tests::servers::RedisServer;
use tokio::sync::watch;

fn embedded(dir: &Path) -> Arc<EmbeddedStore> {
    EmbeddedStore::open(EmbeddedConfig {
        data_dir: dir.join("data"),
        ..EmbeddedConfig::default()
    })
    .unwrap()
}

fn redis(server: &RedisServer) -> Arc<RedisStore> {
    let config = Config {
        url: server.url(),
        ..Config::default()
    };
    RedisStore::open(&config, Limits::default()).unwrap()
}

fn session(name: &str, expiry_interval_s: u32, disconnected_at_ms: Option<u64>) -> SessionRecord {
    SessionRecord {
        client: client(name),
        expiry_interval_s,
        disconnected_at_ms,
        subscriptions: vec![StoredSubscription {
            filter: format!("of/{name}/#"),
            options: SubscriptionOptions {
                qos: QoS::AtLeastOnce,
                no_local: true,
                retain_as_published: false,
                retain_handling: RetainHandling::SendIfNew,
            },
            subscription_id: Some(7),
        }],
    }
}

fn will() -> Will {
    Will {
        topic: topic("will"),
        payload: "gone".into(),
        qos: QoS::AtLeastOnce,
        retain: false,
        delay_interval_s: 300,
        properties: None,
    }
}

const ENTRIES: usize = 300;

async fn migrate(
    from: &EmbeddedStore,
    to: &RedisStore,
    into_existing: bool,
) -> Result<Migrated, MigrateError> {
    let progress = watch::Sender::default();
    let migrated = migrate::migrate(from, to, into_existing, &progress).await?;
    assert_eq!(progress.borrow().messages, migrated.messages);
    Ok(migrated)
}

/// What a store in use may hold; answers the pushes of `car` and a push with a fingerprint that has ended.
async fn fill(store: &EmbeddedStore) -> (Vec<Append>, Append) {
    let car = client("car");
    let mut pushes = Vec::new();
    for n in 0..ENTRIES {
        let message = match n % 3 {
            0 => of_session(&n.to_string()),
            1 => Message {
                qos: QoS::ExactlyOnce,
                ..push(&n.to_string())
            },
            _ => Message {
                expires_at_ms: Some(unix_ms() + 3_600_000),
                ..push(&n.to_string())
            },
        };
        let append = Append {
            client: car.clone(),
            message,
            fingerprint: (n % 3 == 1).then_some(n as u64),
        };
        let answer = store.append(vec![append.clone()]).await.unwrap();
        assert!(matches!(answer[0], Appended::Stored { .. }));
        pushes.push(append);
    }
    let page = read_all(store, &car).await;
    store.mark_sent(
        &car,
        page.entries[9].position,
        &NodeId::from_text("n"),
        Epoch(3),
    );
    store
        .mark_received(&car, page.entries[4].position)
        .await
        .unwrap();
    let ended = Append {
        client: car.clone(),
        message: push("ended"),
        fingerprint: Some(99),
    };
    let answer = store.append(vec![ended.clone()]).await.unwrap();
    let Appended::Stored { position, .. } = answer[0] else {
        panic!("not stored");
    };
    store.end(vec![End {
        client: car.clone(),
        position,
        reason: EndReason::Delivered,
    }]);
    let shared = Message {
        qos: QoS::ExactlyOnce,
        share: Some(Box::new(Share {
            filter: "$share/g/a".into(),
            qos: QoS::ExactlyOnce,
            retain: false,
        })),
        ..of_session("shared")
    };
    stored(store, &client("member"), shared).await;

    let now = unix_ms();
    Sessions::save(store, Epoch(1), session("car", 3_600, Some(now - 10_000)))
        .await
        .unwrap();
    Sessions::save(store, Epoch(1), session("member", u32::MAX, None))
        .await
        .unwrap();
    let received = ReceivedPublish {
        packet_id: PacketId(std::num::NonZeroU16::new(5).unwrap()),
        message_id: MessageId::generate(),
        done: true,
    };
    store
        .save_received(&client("car"), Epoch(1), received)
        .await
        .unwrap();
    let stored_will = StoredWill {
        epoch: Epoch(1),
        will: will(),
    };
    store
        .save_will(&client("member"), stored_will)
        .await
        .unwrap();
    for n in 0..5 {
        let message = Message {
            retain: true,
            topic: topic(&format!("retained/{n}")),
            ..push("kept")
        };
        let topic = message.topic.clone();
        Retained::set(store, &topic, Some(&message), None)
            .await
            .unwrap();
    }
    let ban = Ban {
        target: BanTarget::parse("client", "thief").unwrap(),
        reason: "stolen".into(),
        since_ms: now,
        expires_at_ms: None,
    };
    Bans::save(store, ban).await.unwrap();
    let message = UpstreamMessage {
        id: MessageId::generate(),
        client: car,
        topic: topic("up/x"),
        qos: QoS::AtLeastOnce,
        properties: None,
        payload: "up".into(),
        received_at_ms: now,
    };
    let queues = vec![QueueName::new("orders")];
    store.publish(vec![(message, queues)]).await.unwrap();
    (pushes, ended)
}

#[tokio::test]
async fn everything_that_was_promised_is_in_redis_afterwards() {
    let (dir, server) = (tempfile::tempdir().unwrap(), RedisServer::start().await);
    let (from, to) = (embedded(dir.path()), redis(&server));
    let (pushes, ended) = fill(&from).await;
    let migrated = migrate(&from, &to, false).await.unwrap();
    assert_eq!(
        (
            migrated.sessions,
            migrated.received,
            migrated.wills,
            migrated.retained,
            migrated.bans
        ),
        (2, 1, 1, 5, 1)
    );
    let messages = ENTRIES as u64 + 1;
    assert_eq!(
        (migrated.inboxes, migrated.messages, migrated.messages_there),
        (2, messages, 0)
    );
    assert_eq!(migrated.receipts, 1);
    let left: Vec<_> = migrated.left_upstream.into_iter().collect();
    assert_eq!(left, [(QueueName::new("orders"), 1)]);

    for name in ["car", "member"] {
        let (before, after) = (
            read_all(&*from, &client(name)).await,
            read_all(&*to, &client(name)).await,
        );
        if name == "car" {
            assert_eq!(after.entries, before.entries, "positions and flags, too");
        } else {
            assert_eq!(after.entries[0].message, before.entries[0].message);
            assert!(
                after.entries[0].maybe_sent,
                "it was connected when the process died"
            );
        }
    }
    assert_eq!(
        to.clients_waiting(None, 10).await.unwrap(),
        [client("car"), client("member")]
    );
    // What had been accepted is still known as such.
    for append in [&pushes[1], &ended] {
        let answer = to.append(vec![append.clone()]).await.unwrap().remove(0);
        assert!(
            matches!(&answer, Appended::Repeated { fingerprint, .. } if Some(*fingerprint) == append.fingerprint),
            "{answer:?}"
        );
    }
    let receipt = to.receipt(&ended.message.id).await.unwrap().unwrap();
    assert_eq!(receipt.state(), ReceiptState::Delivered);
    let receipt = to.receipt(&pushes[1].message.id).await.unwrap().unwrap();
    assert_eq!(receipt.state(), ReceiptState::Sent);
    let tail = to.tails(&[client("car")]).await.unwrap()[0].unwrap();
    let next = stored(&*to, &client("car"), push("next")).await;
    assert!(next > tail);

    let kept = to.load(&client("car")).await.unwrap().unwrap();
    assert_eq!(kept, from.load(&client("car")).await.unwrap().unwrap());
    let kept = to.load(&client("member")).await.unwrap().unwrap();
    assert!(kept.disconnected_at_ms.is_some());
    assert_eq!(
        to.received(&client("car")).await.unwrap(),
        from.received(&client("car")).await.unwrap()
    );
    assert_eq!(
        to.will(&client("member")).await.unwrap().unwrap().will,
        will()
    );
    let mut timers = Vec::new();
    for name in ["car", "member"] {
        let due = to.due(to.shard_of(&client(name)), 10).await.unwrap();
        timers.extend(due.timers);
        let next_in_ms = due.next_in_ms.unwrap();
        let expected_ms = if name == "car" { 3_590_000 } else { 300_000 };
        assert!(
            (expected_ms - 60_000..=expected_ms).contains(&next_in_ms),
            "{name}: {next_in_ms}"
        );
    }
    assert!(timers.is_empty(), "nothing is due yet: {timers:?}");
    to.cancel_timer(&client("member"), TimerKind::Will, Epoch(1))
        .await
        .unwrap();
    let retained = |mut messages: Vec<Message>| {
        messages.sort_by(|a, b| a.topic.as_str().cmp(b.topic.as_str()));
        messages
    };
    assert_eq!(
        retained(Retained::load_all(&*to).await.unwrap()),
        retained(Retained::load_all(&*from).await.unwrap())
    );
    assert_eq!(
        Bans::load_all(&*to).await.unwrap(),
        Bans::load_all(&*from).await.unwrap()
    );
}

#[tokio::test]
async fn an_interrupted_migration_is_made_again_and_doubles_nothing() {
    let (dir, server) = (tempfile::tempdir().unwrap(), RedisServer::start().await);
    let (from, to) = (embedded(dir.path()), redis(&server));
    fill(&from).await;
    // Cut off at different moments, then to its end.
    for ms in [5, 15, 40, 80] {
        let limit = std::time::Duration::from_millis(ms);
        let _ = tokio::time::timeout(limit, migrate(&from, &to, false)).await;
        to.flush().await;
    }
    let again = redis(&server);
    let finished = migrate(&from, &again, false).await;
    match finished {
        Ok(migrated) => assert_eq!(migrated.messages, ENTRIES as u64 + 1),
        // The last one had come to its end in time.
        Err(MigrateError::Done) => {}
        Err(error) => panic!("{error}"),
    }
    let ids = |page: moorline_router::InboxPage| -> Vec<_> {
        page.entries
            .into_iter()
            .map(|entry| (entry.position, entry.message.id))
            .collect()
    };
    assert_eq!(
        ids(read_all(&*again, &client("car")).await),
        ids(read_all(&*from, &client("car")).await)
    );
    let refused = migrate(&from, &again, false).await;
    assert!(matches!(refused, Err(MigrateError::Done)), "{refused:?}");
}

#[tokio::test]
async fn a_redis_that_is_in_use_is_refused() {
    let (dir, server) = (tempfile::tempdir().unwrap(), RedisServer::start().await);
    let (from, to) = (embedded(dir.path()), redis(&server));
    fill(&from).await;
    let node = NodeRecord {
        id: NodeId::from_text("n"),
        address: String::new(),
        version: "1".into(),
        state: NodeState::Up,
        connections: 0,
        region: String::new(),
        server_reference: String::new(),
    };
    Routes::renew(&*to, node.clone(), 60_000).await.unwrap();
    let refused = migrate(&from, &to, true).await;
    assert!(
        matches!(refused, Err(MigrateError::InUse(1))),
        "{refused:?}"
    );
    Routes::leave(&*to, &node.id).await.unwrap();

    stored(&*to, &client("stranger"), push("x")).await;
    let refused = migrate(&from, &to, false).await;
    assert!(
        matches!(refused, Err(MigrateError::NotEmpty(_))),
        "{refused:?}"
    );
    stored(&*to, &client("car"), push("x")).await;
    let refused = migrate(&from, &to, true).await;
    assert!(
        matches!(&refused, Err(MigrateError::InBoth(name)) if *name == client("car")),
        "{refused:?}"
    );
    to.flush().await;
    assert_eq!(
        read_all(&*to, &client("member")).await.entries.len(),
        0,
        "nothing was begun"
    );
    server.flush().await;
    stored(&*to, &client("stranger"), push("x")).await;
    assert_eq!(migrate(&from, &to, true).await.unwrap().sessions, 2);
    assert_eq!(read_all(&*to, &client("stranger")).await.entries.len(), 1);
}

mod delayed_jobs {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use moorline_router::{
        ActionKind, ActionState, EventKind, EventName, Job, JobAction, JobCounts, JobCreated,
        JobEvent, JobFilter, JobId, JobPlan, JobSettlement, JobState, Jobs, NewJob, RetryPolicy,
    };

    use super::*;

    const COUNT: usize = 700;

    fn new_job(id: &str, at_ms: u64, cancel_on: &str) -> NewJob {
        NewJob {
            id: JobId::parse(id).unwrap(),
            created_ms: unix_ms(),
            fire_at_ms: at_ms,
            plan: JobPlan {
                actions: vec![JobAction {
                    kind: ActionKind::Webhook,
                    spec: Bytes::copy_from_slice(id.as_bytes()),
                }],
                check: Some(Bytes::from_static(b"check")),
                notify: None,
                retry: RetryPolicy {
                    attempts_max: 3,
                    first_ms: 100,
                    max_ms: 1_000,
                },
            },
            cancel_on: vec![EventName::parse(cancel_on).unwrap()],
            trigger_on: Vec::new(),
            fingerprint: 9,
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

    /// Jobs in every state, and an event that was driven to its end.
    async fn fill_jobs(jobs: &dyn Jobs) -> JobEvent {
        let later_ms = unix_ms() + 3_600_000;
        let new = (0..COUNT).map(|n| {
            new_job(
                &format!("job-{n:03}"),
                later_ms + n as u64,
                &format!("paid:{}", n % 50),
            )
        });
        for created in jobs.create_many(new.collect()).await {
            created.unwrap();
        }
        let now_ms = unix_ms();
        for (n, name) in ["firing", "retrying", "fired", "failed", "skipped"]
            .iter()
            .enumerate()
        {
            jobs.create(new_job(name, now_ms - 10 + n as u64, "none:1"))
                .await
                .unwrap();
        }
        let claimed = jobs
            .claim(0, &NodeId::from_text("n"), now_ms, 10, 60_000)
            .await
            .unwrap()
            .jobs;
        assert_eq!(claimed.len(), 5);
        for job in claimed {
            let error = "no answer".to_owned();
            let actions = vec![ActionState::Waiting];
            let settlement = match job.id.as_str() {
                "retrying" => JobSettlement::Retry {
                    at_ms: later_ms,
                    actions,
                    error,
                },
                "failed" => JobSettlement::Failed { actions, error },
                "fired" => JobSettlement::Fired,
                "skipped" => JobSettlement::Skipped,
                _ => continue,
            };
            jobs.settle(&job.id, job.token, settlement, now_ms)
                .await
                .unwrap();
        }
        let paid = event("paid:7");
        assert_eq!(
            jobs.event(&paid).await.unwrap().cancelled,
            COUNT as u64 / 50
        );
        paid
    }

    async fn all(jobs: &dyn Jobs) -> BTreeMap<String, Job> {
        let filter = JobFilter {
            prefix: Some(String::new()),
            ..JobFilter::default()
        };
        let (mut all, mut after) = (BTreeMap::new(), None);
        loop {
            let page = jobs.list(&filter, after.as_ref(), 100).await.unwrap();
            all.extend(page.jobs.into_iter().map(|job| (job.id.to_string(), job)));
            after = page.next;
            if after.is_none() {
                return all;
            }
        }
    }

    #[tokio::test]
    async fn delayed_jobs_and_events_go_on_in_redis() {
        let (dir, server) = (tempfile::tempdir().unwrap(), RedisServer::start().await);
        let (from, to) = (embedded(dir.path()), redis(&server));
        let paid = fill_jobs(&*from).await;
        let migrated = migrate(&from, &to, false).await.unwrap();
        let total = COUNT as u64 + 5;
        assert_eq!(
            (migrated.jobs, migrated.jobs_there, migrated.job_events),
            (total, 0, 1)
        );
        let jobs = to.jobs();
        let before = all(&*from).await;
        let mut after = all(&*jobs).await;
        assert_eq!(before.len(), after.len());
        for (id, before) in before {
            let mut job = after.remove(&id).unwrap();
            if job.state.is_final() {
                // It has no meaning any more.
                job.due_ms = before.due_ms;
            }
            assert_eq!(job, before);
        }
        let counts = jobs.counts().await.unwrap();
        assert_eq!(counts, Jobs::counts(&*from).await.unwrap());
        let expected = JobCounts {
            pending: (COUNT - COUNT / 50) as u64,
            cancelled: (COUNT / 50) as u64,
            firing: 1,
            retrying: 1,
            fired: 1,
            skipped: 1,
            failed: 1,
        };
        assert_eq!(counts, expected);
        // The event is known as it was, and to jobs that come now; other events find the jobs.
        assert_eq!(
            jobs.event(&paid).await.unwrap().cancelled,
            COUNT as u64 / 50
        );
        let late = jobs
            .create(new_job("late", unix_ms() + 5_000, "paid:7"))
            .await
            .unwrap();
        assert!(matches!(late, JobCreated::Created(job) if job.state == JobState::Cancelled));
        assert_eq!(
            jobs.event(&event("paid:8")).await.unwrap().cancelled,
            COUNT as u64 / 50
        );
        // What was claimed is claimed again when its lease has ended, and not before.
        let firing = JobId::parse("firing").unwrap();
        let was = jobs.get(&firing).await.unwrap().unwrap();
        let claim = async |now_ms| {
            let shard = jobs.shard_of(&firing);
            let claimed = jobs
                .claim(shard, &NodeId::from_text("m"), now_ms, 10, 1_000)
                .await;
            claimed.unwrap().jobs
        };
        assert!(
            claim(was.due_ms - 1)
                .await
                .iter()
                .all(|job| job.id != firing)
        );
        let again = claim(was.due_ms).await;
        let again = again.iter().find(|job| job.id == firing).unwrap();
        assert!(again.token > was.token && again.begun_before);
    }

    #[tokio::test]
    async fn an_event_that_was_not_driven_to_its_end_is_driven_in_redis() {
        let (dir, server) = (tempfile::tempdir().unwrap(), RedisServer::start().await);
        let later_ms = unix_ms() + 3_600_000;
        let from = embedded(dir.path());
        let new = (0..2_000).map(|n| new_job(&format!("job-{n}"), later_ms, "paid:1"));
        for created in from.create_many(new.collect()).await {
            created.unwrap();
        }
        // The process ends in the middle of it.
        let paid = event("paid:1");
        let driven = tokio::time::timeout(
            std::time::Duration::from_micros(1),
            Jobs::event(&*from, &paid),
        );
        assert!(driven.await.is_err());
        let unfinished = async |jobs: &dyn Jobs| {
            let mut all = Vec::new();
            for shard in 0..jobs.shards() {
                all.extend(
                    jobs.unfinished_events(shard, u64::MAX >> 12, 9)
                        .await
                        .unwrap(),
                );
            }
            all
        };
        eventually_some(|| unfinished(&*from)).await;
        let to = redis(&server);
        migrate(&from, &to, false).await.unwrap();
        let jobs = to.jobs();
        assert_eq!(unfinished(&*jobs).await, std::slice::from_ref(&paid));
        jobs.event(&paid).await.unwrap();
        assert!(unfinished(&*jobs).await.is_empty());
        assert_eq!(jobs.counts().await.unwrap().cancelled, 2_000);
    }

    async fn eventually_some<T, F: Future<Output = Vec<T>>>(mut ask: impl FnMut() -> F) {
        while ask().await.is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn an_interrupted_migration_of_jobs_doubles_nothing_and_a_job_in_both_is_refused() {
        let (dir, server) = (tempfile::tempdir().unwrap(), RedisServer::start().await);
        let from = embedded(dir.path());
        fill_jobs(&*from).await;
        for ms in [3, 20, 60] {
            let to = redis(&server);
            let limit = std::time::Duration::from_millis(ms);
            let _ = tokio::time::timeout(limit, migrate(&from, &to, false)).await;
            to.flush().await;
        }
        let to = redis(&server);
        let total = COUNT as u64 + 5;
        match migrate(&from, &to, false).await {
            Ok(migrated) => assert_eq!(migrated.jobs, total),
            Err(MigrateError::Done) => {}
            Err(error) => panic!("{error}"),
        }
        let jobs = to.jobs();
        assert_eq!(jobs.counts().await.unwrap().total(), total);
        assert_eq!(
            jobs.event(&event("paid:8")).await.unwrap().cancelled,
            COUNT as u64 / 50
        );
        let refused = migrate(&from, &to, false).await;
        assert!(matches!(refused, Err(MigrateError::Done)), "{refused:?}");
        let refused = migrate(&from, &to, true).await;
        assert!(
            matches!(refused, Err(MigrateError::JobInBoth(_))),
            "{refused:?}"
        );
    }
}
