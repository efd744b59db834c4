//! Cases of [`crate::Jobs`]: events, before and after the jobs that name them.

use futures_util::future::{join, join_all};

use super::jobs::{
    HOUR, JobsBackend, NOW, all_created, changed, claim, claim_one, created, failed, get, id, job,
    name, plan, retry, settle, start, state,
};
use crate::{
    EventKind, EventOutcome, JobEvent, JobLimits, JobPatch, JobSettlement, JobState, Jobs,
    MessageId, NewJob, StoreError,
};

/// As long as the default limits remember an event.
const WINDOW: u64 = 600_000;

/// An event that nobody has heard of.
pub fn event(text: &str, at_ms: u64) -> JobEvent {
    JobEvent {
        id: MessageId::generate(),
        name: name(text),
        kind: EventKind::Happened,
        at_ms,
    }
}

async fn happens(jobs: &dyn Jobs, text: &str, at_ms: u64) -> (u64, u64) {
    let outcome = jobs.event(&event(text, at_ms)).await.unwrap();
    (outcome.cancelled, outcome.triggered)
}

/// A job that `cancel` cancels and `trigger` triggers.
fn naming(text: &str, fire_at_ms: u64, cancel: &[&str], trigger: &[&str]) -> NewJob {
    NewJob {
        cancel_on: cancel.iter().map(|text| name(text)).collect(),
        trigger_on: trigger.iter().map(|text| name(text)).collect(),
        ..job(text, fire_at_ms)
    }
}

pub async fn an_event_cancels_and_triggers_what_names_it(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let later = NOW + 100_000;
    created(&*jobs, naming("a", later, &["paid:1", "gone:1"], &[])).await;
    created(&*jobs, naming("b", later, &["gone:1"], &["paid:1"])).await;
    created(&*jobs, naming("c", later, &["paid:2"], &["gone:1"])).await;
    created(&*jobs, job("d", later)).await;
    assert_eq!(happens(&*jobs, "paid:1", NOW + 5).await, (1, 1));
    let cancelled = get(&*jobs, "a").await;
    assert_eq!(cancelled.state, JobState::Cancelled);
    assert_eq!(cancelled.ended_ms, Some(NOW + 5));
    assert_eq!(cancelled.by_event, Some(name("paid:1")));
    let triggered = get(&*jobs, "b").await;
    assert_eq!(triggered.state, JobState::Pending);
    assert_eq!((triggered.fire_at_ms, triggered.due_ms), (NOW + 5, NOW + 5));
    assert_eq!(triggered.by_event, Some(name("paid:1")));
    assert_eq!(get(&*jobs, "c").await.due_ms, later);
    assert_eq!(claim_one(&*jobs, NOW + 5).await.id, id("b"));
    assert_eq!(happens(&*jobs, "nothing:1", NOW).await, (0, 0));
    assert_eq!(happens(&*jobs, "gone:1", NOW + 6).await, (0, 1));
    assert_eq!(claim_one(&*jobs, NOW + 6).await.id, id("c"));
}

pub async fn an_event_changes_nothing_that_has_begun_or_ended(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let settlements = [
        ("firing", None, JobState::Firing),
        ("retrying", Some(retry(NOW + 1_000)), JobState::Retrying),
        ("fired", Some(JobSettlement::Fired), JobState::Fired),
        ("skipped", Some(JobSettlement::Skipped), JobState::Skipped),
        ("failed", Some(failed("x")), JobState::Failed),
    ];
    for (text, settlement, _) in settlements.clone() {
        created(&*jobs, naming(text, NOW, &["t:cancel"], &["t:trigger"])).await;
        let claimed = claim_one(&*jobs, NOW).await;
        if let Some(settlement) = settlement {
            settle(&*jobs, &claimed, settlement, NOW).await;
        }
    }
    created(
        &*jobs,
        naming("cancelled", NOW, &["t:cancel"], &["t:trigger"]),
    )
    .await;
    jobs.cancel(&id("cancelled"), NOW).await.unwrap();
    assert_eq!(happens(&*jobs, "t:cancel", NOW + 1).await, (0, 0));
    assert_eq!(happens(&*jobs, "t:trigger", NOW + 1).await, (0, 0));
    for (text, _, expected) in settlements {
        assert_eq!(state(&*jobs, text).await, expected);
    }
    assert_eq!(get(&*jobs, "retrying").await.due_ms, NOW + 1_000);
}

pub async fn an_event_before_its_job_cancels_it_within_the_window(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    assert_eq!(happens(&*jobs, "paid:1", NOW).await, (0, 0));
    let at = |text, created_ms| NewJob {
        created_ms,
        ..naming(text, created_ms + 1_000, &["other:1", "paid:1"], &[])
    };
    for (text, created_ms) in [("at once", NOW), ("in time", NOW + WINDOW)] {
        let job = created(&*jobs, at(text, created_ms)).await;
        assert_eq!(job.state, JobState::Cancelled);
        assert_eq!(job.ended_ms, Some(created_ms));
        assert_eq!(job.by_event, Some(name("paid:1")));
        assert_eq!(get(&*jobs, text).await, job);
    }
    let job = created(&*jobs, at("too late", NOW + WINDOW + 1)).await;
    assert_eq!(job.state, JobState::Pending);
    assert_eq!(claim_one(&*jobs, NOW + 2 * WINDOW).await.id, id("too late"));
    let counts = jobs.counts().await.unwrap();
    assert_eq!((counts.cancelled, counts.firing), (2, 1));
}

pub async fn an_event_before_its_job_triggers_it_within_the_window(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    assert_eq!(happens(&*jobs, "late:1", NOW).await, (0, 0));
    let at = |text, created_ms| NewJob {
        created_ms,
        ..naming(text, created_ms + 50_000, &[], &["late:1"])
    };
    let job = created(&*jobs, at("in time", NOW + WINDOW)).await;
    assert_eq!(job.state, JobState::Pending);
    assert_eq!((job.fire_at_ms, job.due_ms), (NOW + WINDOW, NOW + WINDOW));
    assert_eq!(job.by_event, Some(name("late:1")));
    let late = created(&*jobs, at("too late", NOW + WINDOW + 1)).await;
    assert_eq!(late.fire_at_ms, NOW + WINDOW + 50_001);
    assert_eq!(claim_one(&*jobs, NOW + WINDOW + 1).await.id, id("in time"));
}

pub async fn a_job_that_names_an_event_twice_is_cancelled_by_it(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, naming("before", NOW + 9, &["t:1"], &["t:1"])).await;
    assert_eq!(happens(&*jobs, "t:1", NOW).await, (1, 0));
    created(&*jobs, naming("after", NOW + 9, &["t:1"], &["t:1"])).await;
    // One event cancels, another one that came as well would trigger.
    assert_eq!(happens(&*jobs, "t:2", NOW).await, (0, 0));
    created(&*jobs, naming("both", NOW + 9, &["t:1"], &["t:2"])).await;
    for text in ["before", "after", "both"] {
        assert_eq!(state(&*jobs, text).await, JobState::Cancelled);
    }
    assert!(claim(&*jobs, NOW + 10).await.is_empty());
}

pub async fn an_event_repeated_is_answered_alike_and_changes_nothing(
    backend: &mut dyn JobsBackend,
) {
    let jobs = start(backend).await;
    created(&*jobs, naming("a", NOW + 1_000, &["t:1"], &[])).await;
    created(&*jobs, naming("b", NOW + 1_000, &[], &["t:1"])).await;
    let one = event("t:1", NOW);
    let outcome = EventOutcome {
        cancelled: 1,
        triggered: 1,
    };
    assert_eq!(jobs.event(&one).await.unwrap(), outcome);
    let later = JobPatch {
        fire_at_ms: Some(NOW + 5_000),
        plan: None,
        ..JobPatch::default()
    };
    changed(jobs.patch(&id("b"), later).await.unwrap());
    let again = JobEvent {
        at_ms: NOW + 10,
        ..one.clone()
    };
    assert_eq!(jobs.event(&again).await.unwrap(), outcome);
    assert_eq!(get(&*jobs, "b").await.fire_at_ms, NOW + 5_000);
    drop(jobs);
    let jobs = backend.crash().await;
    assert_eq!(jobs.event(&one).await.unwrap(), outcome);
    assert_eq!(get(&*jobs, "b").await.fire_at_ms, NOW + 5_000);
    // The same id under another name is another event.
    let other = JobEvent {
        name: name("t:2"),
        ..one
    };
    assert_eq!(jobs.event(&other).await.unwrap(), EventOutcome::default());
}

pub async fn another_event_of_the_same_name_counts_anew(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, naming("a", NOW + 1_000, &[], &["t:1"])).await;
    assert_eq!(happens(&*jobs, "t:1", NOW + 10).await, (0, 1));
    // It is due already.
    assert_eq!(happens(&*jobs, "t:1", NOW + 20).await, (0, 0));
    assert_eq!(get(&*jobs, "a").await.fire_at_ms, NOW + 10);
    let later = JobPatch {
        fire_at_ms: Some(NOW + 5_000),
        plan: Some(plan("x")),
        ..JobPatch::default()
    };
    changed(jobs.patch(&id("a"), later).await.unwrap());
    assert_eq!(happens(&*jobs, "t:1", NOW + 30).await, (0, 1));
    assert_eq!(get(&*jobs, "a").await.fire_at_ms, NOW + 30);
}

pub async fn a_withdrawal_cancels_and_is_not_remembered(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, naming("a", NOW + 1_000, &["t:1"], &[])).await;
    created(&*jobs, naming("b", NOW + 1_000, &[], &["t:1"])).await;
    let withdrawal = JobEvent {
        kind: EventKind::Withdrawal,
        ..event("t:1", NOW)
    };
    for _ in 0..2 {
        let outcome = jobs.event(&withdrawal).await.unwrap();
        assert_eq!((outcome.cancelled, outcome.triggered), (1, 0));
    }
    assert_eq!(state(&*jobs, "a").await, JobState::Cancelled);
    assert_eq!(get(&*jobs, "b").await.fire_at_ms, NOW + 1_000);
    let later = NewJob {
        created_ms: NOW + 1,
        ..naming("c", NOW + 1_000, &["t:1"], &[])
    };
    assert_eq!(created(&*jobs, later).await.state, JobState::Pending);
    // The same call again is the same withdrawal.
    jobs.event(&withdrawal).await.unwrap();
    assert_eq!(state(&*jobs, "c").await, JobState::Pending);
}

pub async fn a_withdrawal_reaches_what_was_created_before_it_whatever_the_clocks_say(
    backend: &mut dyn JobsBackend,
) {
    let limits = JobLimits {
        event_window: jiff::SignedDuration::ZERO,
        ..JobLimits::default()
    };
    let jobs = backend.start(limits).await;
    for (kind, text) in [
        (EventKind::Withdrawal, "withdrawn:1"),
        (EventKind::Happened, "happened:1"),
    ] {
        // By a clock that is ahead of the one by which it is withdrawn.
        let ahead = NewJob {
            created_ms: NOW + 5_000,
            ..naming(text, NOW + HOUR, &[text], &[])
        };
        created(&*jobs, ahead).await;
        let event = JobEvent {
            kind,
            ..event(text, NOW)
        };
        assert_eq!(jobs.event(&event).await.unwrap().cancelled, 1, "{text}");
        assert_eq!(state(&*jobs, text).await, JobState::Cancelled);
        let behind = NewJob {
            created_ms: NOW - 5_000,
            ..naming(&format!("{text}-later"), NOW + HOUR, &[text], &[])
        };
        created(&*jobs, behind).await;
    }
    assert_eq!(jobs.counts().await.unwrap().cancelled, 2);
}

pub async fn what_is_created_after_a_withdrawal_outlives_its_driver(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let batch = (0..3_000).map(|n| naming(&format!("job-{n}"), NOW + 1, &["t:1"], &[]));
    all_created(&*jobs, batch.collect()).await;
    let withdrawal = JobEvent {
        kind: EventKind::Withdrawal,
        ..event("t:1", NOW)
    };
    let begun = async {
        while jobs.counts().await.unwrap().cancelled == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        _ = jobs.event(&withdrawal) => {}
        () = begun => {}
    }
    drop(jobs);
    let jobs = backend.crash().await;
    // It comes behind the others in the order in which they are driven, by a clock that says it came before.
    let later = NewJob {
        created_ms: NOW - 5_000,
        ..naming("x", NOW + 1, &["t:1"], &[])
    };
    created(&*jobs, later).await;
    for shard in 0..jobs.shards() {
        for left in jobs.unfinished_events(shard, u64::MAX, 10).await.unwrap() {
            jobs.event(&left).await.unwrap();
        }
    }
    let counts = jobs.counts().await.unwrap();
    assert_eq!((counts.pending, counts.cancelled), (1, 3_000));
    assert_eq!(claim_one(&*jobs, NOW + 1).await.id, id("x"));
}

pub async fn an_event_reaches_ten_thousand_jobs(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let batch = |from: u64| {
        let range = from..from + 1_000;
        let job = |n| naming(&format!("job-{n}"), NOW + 1, &["flight.gone:7"], &[]);
        range.map(job).collect::<Vec<_>>()
    };
    for from in (0..10_000).step_by(1_000) {
        for answer in jobs.create_many(batch(from)).await {
            answer.unwrap();
        }
    }
    created(&*jobs, job("other", NOW + 1)).await;
    assert_eq!(happens(&*jobs, "flight.gone:7", NOW).await, (10_000, 0));
    let counts = jobs.counts().await.unwrap();
    assert_eq!((counts.pending, counts.cancelled), (1, 10_000));
    assert_eq!(claim_one(&*jobs, NOW + 1).await.id, id("other"));
}

pub async fn an_event_whose_driver_died_is_driven_on(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let batch = (0..3_000).map(|n| naming(&format!("job-{n}"), NOW + 1, &["t:1"], &[]));
    all_created(&*jobs, batch.collect()).await;
    let event = event("t:1", NOW);
    let begun = async {
        while jobs.counts().await.unwrap().cancelled == 0 {
            tokio::task::yield_now().await;
        }
    };
    // The driver is gone as soon as one job has answered.
    tokio::select! {
        _ = jobs.event(&event) => {}
        () = begun => {}
    }
    drop(jobs);
    let jobs = backend.crash().await;
    for shard in 0..jobs.shards() {
        let early = jobs.unfinished_events(shard, NOW, 10).await.unwrap();
        assert_eq!(early, [], "its driver may still be at it");
        for left in jobs.unfinished_events(shard, NOW + 1, 10).await.unwrap() {
            assert_eq!(left, event);
            jobs.event(&left).await.unwrap();
        }
    }
    assert_eq!(jobs.counts().await.unwrap().cancelled, 3_000);
    let outcome = jobs.event(&event).await.unwrap();
    assert_eq!(outcome.cancelled, 3_000);
    for shard in 0..jobs.shards() {
        let left = jobs.unfinished_events(shard, u64::MAX, 10).await.unwrap();
        assert_eq!(left, []);
    }
}

pub async fn jobs_created_while_an_event_comes_do_not_escape_it(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let create = |from: u64| {
        let jobs = jobs.clone();
        async move {
            for n in from..from + 100 {
                let new = naming(&format!("job-{n}"), NOW + 1, &["t:1"], &[]);
                jobs.create(new).await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    };
    let happen = async {
        // After some of them, and before others.
        while jobs.counts().await.unwrap().total() < 60 {
            tokio::task::yield_now().await;
        }
        happens(&*jobs, "t:1", NOW).await
    };
    let (_, (cancelled, _)) = join(join_all([0, 100, 200, 300].map(create)), happen).await;
    assert!((60..=400).contains(&cancelled), "{cancelled}");
    let counts = jobs.counts().await.unwrap();
    assert_eq!((counts.pending, counts.cancelled), (0, 400));
    assert!(claim(&*jobs, NOW + 1).await.is_empty());
}

pub async fn of_an_event_and_a_claim_at_once_one_comes_first(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let batch = (0..1_000).map(|n| naming(&format!("job-{n}"), NOW, &["t:1"], &[]));
    all_created(&*jobs, batch.collect()).await;
    let (claimed, (cancelled, _)) = join(claim(&*jobs, NOW), happens(&*jobs, "t:1", NOW)).await;
    assert_eq!(claimed.len() as u64 + cancelled, 1_000);
    for job in claimed {
        assert_eq!(jobs.get(&job.id).await.unwrap(), Some(job));
    }
    assert_eq!(jobs.counts().await.unwrap().cancelled, cancelled);
}

pub async fn names_that_begin_alike_are_different(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let names = [
        "t:1", "t:10", "t:1 ", "t:1:x", "T:1", "t:*", "t:}1{", "tt:1",
    ];
    for text in names {
        created(&*jobs, naming(text, NOW + 1, &[text], &[])).await;
    }
    for (gone, text) in names.iter().enumerate() {
        assert_eq!(happens(&*jobs, text, NOW).await, (1, 0), "{text}");
        assert_eq!(state(&*jobs, text).await, JobState::Cancelled);
        let counts = jobs.counts().await.unwrap();
        assert_eq!(counts.cancelled, gone as u64 + 1);
    }
}

pub async fn a_job_of_several_names_is_cancelled_once(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let names = ["a:1", "b:1", "c:1", "a:1"];
    created(&*jobs, naming("x", NOW + 1, &names, &["d:1", "d:1"])).await;
    assert_eq!(happens(&*jobs, "b:1", NOW).await, (1, 0));
    for text in ["a:1", "b:1", "c:1", "d:1"] {
        assert_eq!(happens(&*jobs, text, NOW).await, (0, 0));
    }
    assert_eq!(get(&*jobs, "x").await.by_event, Some(name("b:1")));
}

pub async fn an_event_is_remembered_across_a_crash(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    happens(&*jobs, "paid:1", NOW).await;
    drop(jobs);
    let jobs = backend.crash().await;
    let job = created(&*jobs, naming("a", NOW + 1, &["paid:1"], &[])).await;
    assert_eq!(job.state, JobState::Cancelled);
}

pub async fn nothing_is_left_of_a_finished_event(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    for n in 0..600 {
        let new = naming(&format!("job-{n}"), NOW + 1, &["t:1"], &[]);
        jobs.create(new).await.unwrap();
    }
    assert_eq!(happens(&*jobs, "t:1", NOW).await, (600, 0));
    happens(&*jobs, "t:2", NOW).await;
    for shard in 0..jobs.shards() {
        let left = jobs.unfinished_events(shard, u64::MAX, 10).await.unwrap();
        assert_eq!(left, []);
    }
}

async fn events_swept(jobs: &dyn Jobs, now_ms: u64) -> u64 {
    let mut swept = 0;
    for shard in 0..jobs.shards() {
        swept += jobs.sweep(shard, now_ms, 1_000).await.unwrap().events;
    }
    swept
}

pub async fn an_event_is_forgotten_after_its_window(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let first = event("t:1", NOW);
    jobs.event(&first).await.unwrap();
    jobs.event(&event("t:1", NOW + 100)).await.unwrap();
    // A sweep that comes early leaves it.
    events_swept(&*jobs, NOW + WINDOW).await;
    let at = |text, created_ms| NewJob {
        created_ms,
        ..naming(text, created_ms + 9, &["t:1"], &[])
    };
    let job = created(&*jobs, at("a", NOW + WINDOW)).await;
    assert_eq!(job.state, JobState::Cancelled);
    // The first is over, the second is not.
    events_swept(&*jobs, NOW + WINDOW + 50).await;
    let job = created(&*jobs, at("b", NOW + WINDOW + 100)).await;
    assert_eq!(job.state, JobState::Cancelled);
    events_swept(&*jobs, NOW + 2 * WINDOW).await;
    let job = created(&*jobs, at("c", NOW + 2 * WINDOW)).await;
    assert_eq!(job.state, JobState::Pending);
    // Its id is free again, too.
    let again = JobEvent {
        at_ms: NOW + 2 * WINDOW,
        ..first
    };
    assert_eq!(jobs.event(&again).await.unwrap().cancelled, 1);
}

pub async fn without_a_window_an_event_means_nothing_to_later_jobs(backend: &mut dyn JobsBackend) {
    let limits = JobLimits {
        event_window: jiff::SignedDuration::ZERO,
        ..JobLimits::default()
    };
    let jobs = backend.start(limits).await;
    created(&*jobs, naming("a", NOW + 9, &["t:1"], &[])).await;
    assert_eq!(happens(&*jobs, "t:1", NOW).await, (1, 0));
    let later = NewJob {
        created_ms: NOW + 1,
        ..naming("b", NOW + 9, &["t:1"], &[])
    };
    assert_eq!(created(&*jobs, later).await.state, JobState::Pending);
}

pub async fn at_the_limit_no_event_is_taken(backend: &mut dyn JobsBackend) {
    let limits = JobLimits {
        events_max: 64,
        ..JobLimits::default()
    };
    let jobs = backend.start(limits).await;
    created(&*jobs, naming("a", NOW + 9, &["t:199"], &[])).await;
    let (mut taken, mut full) = (0, 0);
    for n in 0..200 {
        match jobs.event(&event(&format!("t:{n}"), NOW)).await {
            Ok(_) => taken += 1,
            Err(StoreError::Full(_)) => full += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!((32..=64).contains(&taken), "{taken}");
    assert_eq!(taken + full, 200);
    assert_eq!(state(&*jobs, "a").await, JobState::Pending);
    events_swept(&*jobs, NOW + 2 * WINDOW).await;
    assert_eq!(happens(&*jobs, "t:199", NOW + 2 * WINDOW).await, (1, 0));
}
