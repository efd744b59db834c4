//! Cases of [`crate::Jobs`]: what is created is kept, for as long as it is declared. The others are in [`super::job_claims`]
//! (claims and settlements), [`super::job_changes`] (what callers do to a job that waits), [`super::job_events`], [`super::job_limits`] and
//! [`super::job_lists`].
//!
//! Time is a number that the cases choose. Nothing here sleeps until something is due.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::join_all;

use crate::{
    ActionKind, ActionState, Claimed, EventName, Job, JobAction, JobChange, JobCounts, JobCreated,
    JobId, JobLimits, JobPatch, JobPlan, JobSettlement, JobState, Jobs, NewJob, NodeId,
    RetryPolicy, Settled, StoreError,
};

/// Runs every case about delayed jobs.
#[macro_export]
macro_rules! job_contract {
    ($backend:expr) => {
        $crate::contract_cases!($backend, jobs:
            a_job_comes_back_as_it_was_created,
            the_same_job_twice_is_one_and_another_of_its_id_is_a_conflict,
            a_batch_is_answered_entry_by_entry,
            a_large_batch_is_created_whole,
            unusual_ids_and_names_are_kept_apart,
            a_job_without_actions_and_one_with_large_ones_are_kept,
            what_was_answered_survives_a_crash,
            a_job_that_ended_is_kept_for_its_time_and_no_longer,
            a_sweep_is_bounded,
        );
        $crate::contract_cases!($backend, job_limits:
            at_the_limit_no_job_is_created,
            a_device_has_no_more_jobs_than_it_may_have,
        );
        $crate::contract_cases!($backend, job_claims:
            nothing_is_claimed_before_it_is_due,
            a_job_of_the_past_is_due_at_once_and_one_of_the_far_future_is_not,
            jobs_are_claimed_in_the_order_of_their_times_then_ids,
            a_claim_takes_no_more_than_its_limit_and_says_that_there_is_more,
            claims_at_once_never_get_the_same_job,
            a_claim_whose_lease_has_ended_is_claimed_again_under_a_higher_token,
            an_extended_claim_goes_on_and_keeps_what_is_done,
            a_settled_job_is_never_claimed_again,
            a_settlement_repeated_changes_nothing,
            an_attempt_that_failed_is_repeated_when_it_is_due,
            a_job_that_was_put_off_waits_again_unless_it_had_begun,
            a_job_that_was_put_off_can_be_changed_as_any_that_waits,
            trials_count_until_whoever_began_the_job_settles_it,
            a_dead_letter_is_tried_again,
            a_claim_of_a_process_that_died_is_claimed_again,
            a_token_of_an_earlier_job_of_the_same_id_counts_for_nothing,
            every_shard_is_held_by_somebody,
        );
        $crate::contract_cases!($backend, job_changes:
            a_patch_changes_what_waits,
            of_patches_at_once_none_takes_another_one_back,
            a_cancelled_job_never_fires,
            a_triggered_job_is_due_at_once,
            a_job_that_has_begun_is_refused_with_its_state,
            what_is_not_known_is_not_found,
            of_a_cancel_and_a_claim_at_once_one_comes_first,
            of_a_patch_and_a_claim_at_once_one_comes_first,
            counts_follow_every_change,
            an_earlier_job_is_noticed,
        );
        $crate::contract_cases!($backend, job_events:
            an_event_cancels_and_triggers_what_names_it,
            an_event_changes_nothing_that_has_begun_or_ended,
            an_event_before_its_job_cancels_it_within_the_window,
            an_event_before_its_job_triggers_it_within_the_window,
            a_job_that_names_an_event_twice_is_cancelled_by_it,
            an_event_repeated_is_answered_alike_and_changes_nothing,
            another_event_of_the_same_name_counts_anew,
            a_withdrawal_cancels_and_is_not_remembered,
            a_withdrawal_reaches_what_was_created_before_it_whatever_the_clocks_say,
            what_is_created_after_a_withdrawal_outlives_its_driver,
            an_event_reaches_ten_thousand_jobs,
            an_event_whose_driver_died_is_driven_on,
            jobs_created_while_an_event_comes_do_not_escape_it,
            of_an_event_and_a_claim_at_once_one_comes_first,
            names_that_begin_alike_are_different,
            a_job_of_several_names_is_cancelled_once,
            an_event_is_remembered_across_a_crash,
            nothing_is_left_of_a_finished_event,
            an_event_is_forgotten_after_its_window,
            without_a_window_an_event_means_nothing_to_later_jobs,
            at_the_limit_no_event_is_taken,
        );
        $crate::contract_cases!($backend, job_lists:
            a_prefix_lists_jobs_in_the_order_of_their_ids,
            a_prefix_is_taken_literally,
            an_event_lists_the_jobs_that_name_it,
            a_state_lists_jobs_in_the_order_of_time,
            every_state_together_is_in_the_order_of_time,
            a_range_of_time_has_its_beginning_and_not_its_end,
            filters_hold_together,
            pages_hold_every_job_once,
            a_list_of_nothing_ends_at_once,
        );
    };
}

/// A backend of delayed jobs as a case needs it: one deployment of its own, empty at first.
#[async_trait]
pub trait JobsBackend: Send + Sync {
    /// Starts an empty deployment.
    async fn start(&mut self, limits: JobLimits) -> Arc<dyn Jobs>;
    /// The process that uses the store, or the store, dies without a chance to tidy up, and starts again on what it
    /// kept. Stores handed out before are dead.
    async fn crash(&mut self) -> Arc<dyn Jobs>;
}

/// When cases begin, Unix milliseconds.
pub const NOW: u64 = 1_800_000_000_000;
/// How long claims of cases last, milliseconds.
pub const LEASE: u64 = 30_000;
pub const HOUR: u64 = 3_600_000;

pub async fn start(backend: &mut dyn JobsBackend) -> Arc<dyn Jobs> {
    backend.start(JobLimits::default()).await
}

/// Creates jobs that are not there yet, again where a busy server gave no answer.
pub async fn all_created(jobs: &dyn Jobs, batch: Vec<NewJob>) {
    let mut left = batch;
    for attempt in 0.. {
        let answers = jobs.create_many(left.clone()).await;
        let mut unanswered = Vec::new();
        for (new, answer) in left.into_iter().zip(answers) {
            match answer {
                Ok(JobCreated::Created(_)) => {}
                Ok(JobCreated::Same(_)) if attempt > 0 => {}
                Err(StoreError::Unavailable(_)) if attempt < 5 => unanswered.push(new),
                other => panic!("{}: {other:?}", new.id),
            }
        }
        if unanswered.is_empty() {
            return;
        }
        left = unanswered;
    }
}

pub fn id(text: &str) -> JobId {
    JobId::parse(text).unwrap()
}

pub fn name(text: &str) -> EventName {
    EventName::parse(text).unwrap()
}

pub fn plan(spec: &str) -> JobPlan {
    JobPlan {
        actions: vec![JobAction {
            kind: ActionKind::Push,
            spec: Bytes::copy_from_slice(spec.as_bytes()),
        }],
        check: None,
        notify: None,
        retry: RetryPolicy {
            attempts_max: 5,
            first_ms: 1_000,
            max_ms: 60_000,
        },
    }
}

/// A job with one action, created at [`NOW`].
pub fn job(text: &str, fire_at_ms: u64) -> NewJob {
    NewJob {
        id: id(text),
        created_ms: NOW,
        fire_at_ms,
        plan: plan("{}"),
        cancel_on: Vec::new(),
        trigger_on: Vec::new(),
        fingerprint: 1,
        device: None,
    }
}

/// Creates a job that is new.
pub async fn created(jobs: &dyn Jobs, new: NewJob) -> Job {
    match jobs.create(new).await.unwrap() {
        JobCreated::Created(job) => job,
        other => panic!("not new: {other:?}"),
    }
}

pub async fn get(jobs: &dyn Jobs, text: &str) -> Job {
    jobs.get(&id(text)).await.unwrap().unwrap()
}

pub async fn state(jobs: &dyn Jobs, text: &str) -> JobState {
    get(jobs, text).await.state
}

pub fn holder() -> NodeId {
    NodeId::from_text("queue-1")
}

/// Claims once in every shard; together in the order of (when it was due, id).
pub async fn claim_up_to(jobs: &dyn Jobs, now_ms: u64, limit: usize) -> Claimed {
    let mut all = Claimed::default();
    for shard in 0..jobs.shards() {
        let claimed = jobs
            .claim(shard, &holder(), now_ms, limit, LEASE)
            .await
            .unwrap();
        for job in &claimed.jobs {
            assert_eq!(jobs.shard_of(&job.id), shard);
            assert_eq!(job.state, JobState::Firing);
            assert_eq!(job.holder, Some(holder()));
            assert_eq!(job.due_ms, now_ms + LEASE);
        }
        all.jobs.extend(claimed.jobs);
        all.next_due_ms = [all.next_due_ms, claimed.next_due_ms]
            .into_iter()
            .flatten()
            .min();
    }
    all
}

/// Claims everything that is due.
pub async fn claim(jobs: &dyn Jobs, now_ms: u64) -> Vec<Job> {
    let mut all = Vec::new();
    loop {
        let claimed = claim_up_to(jobs, now_ms, 200).await.jobs;
        if claimed.is_empty() {
            return all;
        }
        all.extend(claimed);
    }
}

/// Claims the one job that is due.
pub async fn claim_one(jobs: &dyn Jobs, now_ms: u64) -> Job {
    let mut claimed = claim(jobs, now_ms).await;
    assert_eq!(claimed.len(), 1, "{claimed:?}");
    claimed.remove(0)
}

pub async fn settle(jobs: &dyn Jobs, job: &Job, settlement: JobSettlement, now_ms: u64) -> Settled {
    jobs.settle(&job.id, job.token, settlement, now_ms)
        .await
        .unwrap()
}

pub fn failed(error: &str) -> JobSettlement {
    JobSettlement::Failed {
        actions: vec![ActionState::Failed],
        error: error.into(),
    }
}

pub fn retry(at_ms: u64) -> JobSettlement {
    JobSettlement::Retry {
        at_ms,
        actions: vec![ActionState::Waiting],
        error: "503".into(),
    }
}

pub fn put_off(at_ms: u64, begun: bool) -> JobSettlement {
    JobSettlement::PutOff {
        at_ms,
        actions: vec![ActionState::Waiting],
        begun,
        reason: "busy".into(),
    }
}

pub fn changed(change: JobChange) -> Job {
    match change {
        JobChange::Changed(job) => job,
        other => panic!("not changed: {other:?}"),
    }
}

pub fn refused(change: JobChange) -> JobState {
    match change {
        JobChange::Refused(job) => job.state,
        other => panic!("not refused: {other:?}"),
    }
}

pub fn ids(jobs: &[Job]) -> Vec<&str> {
    jobs.iter().map(|job| job.id.as_str()).collect()
}

pub async fn a_job_comes_back_as_it_was_created(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let action = |kind, spec: &'static [u8]| JobAction {
        kind,
        spec: Bytes::from_static(spec),
    };
    let new = NewJob {
        plan: JobPlan {
            actions: vec![
                action(ActionKind::Push, br#"{"to": {"client": "car-7"}}"#),
                action(ActionKind::Webhook, b"\xff\x00 any bytes"),
                action(ActionKind::Amqp, b""),
                action(ActionKind::Publish, b"x"),
            ],
            check: Some(Bytes::from_static(b"check")),
            notify: Some(Bytes::from_static(b"notify")),
            retry: RetryPolicy {
                attempts_max: u32::MAX,
                first_ms: 1,
                max_ms: 1 << 50,
            },
        },
        cancel_on: vec![name("order.paid:123"), name("order.gone:123")],
        trigger_on: vec![name("order.late:123")],
        fingerprint: u64::MAX,
        ..job("order-123", NOW + HOUR)
    };
    let expected = Job::waiting(new.clone());
    assert_eq!(created(&*jobs, new).await, expected);
    assert_eq!(expected.actions, [ActionState::Waiting; 4]);
    assert_eq!(expected.due_ms, NOW + HOUR);
    assert_eq!(get(&*jobs, "order-123").await, expected);
    drop(jobs);
    let jobs = backend.crash().await;
    assert_eq!(get(&*jobs, "order-123").await, expected);
}

pub async fn the_same_job_twice_is_one_and_another_of_its_id_is_a_conflict(
    backend: &mut dyn JobsBackend,
) {
    let jobs = start(backend).await;
    let new = job("a", NOW + 10);
    // The time that a relative delay ends at is another one when the request comes again.
    let again = NewJob {
        created_ms: NOW + 5,
        fire_at_ms: NOW + 15,
        ..new.clone()
    };
    let other = NewJob {
        fingerprint: 2,
        ..new.clone()
    };
    created(&*jobs, new).await;
    let check = async |expected: JobState| {
        let kept = get(&*jobs, "a").await;
        assert_eq!(kept.state, expected);
        let same = jobs.create(again.clone()).await.unwrap();
        assert_eq!(same, JobCreated::Same(kept.clone()));
        let conflict = jobs.create(other.clone()).await.unwrap();
        assert_eq!(conflict, JobCreated::Conflict(kept));
    };
    check(JobState::Pending).await;
    let patch = JobPatch {
        fire_at_ms: Some(NOW + 20),
        plan: Some(plan("other")),
        ..JobPatch::default()
    };
    changed(jobs.patch(&id("a"), patch).await.unwrap());
    check(JobState::Pending).await;
    let claimed = claim_one(&*jobs, NOW + 20).await;
    check(JobState::Firing).await;
    settle(&*jobs, &claimed, retry(NOW + 30), NOW + 25).await;
    check(JobState::Retrying).await;
    let claimed = claim_one(&*jobs, NOW + 30).await;
    settle(&*jobs, &claimed, JobSettlement::Fired, NOW + 31).await;
    check(JobState::Fired).await;
    assert_eq!(jobs.counts().await.unwrap().total(), 1);
}

pub async fn a_batch_is_answered_entry_by_entry(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, job("old", NOW)).await;
    let batch = vec![
        job("new", NOW + 1),
        job("old", NOW),
        NewJob {
            fingerprint: 2,
            ..job("old", NOW)
        },
        job("new", NOW + 1),
        NewJob {
            fingerprint: 3,
            ..job("new", NOW + 1)
        },
        job("newer", NOW + 2),
    ];
    let answers = jobs.create_many(batch).await;
    let words: Vec<_> = answers
        .into_iter()
        .map(|answer| match answer.unwrap() {
            JobCreated::Created(job) => format!("created {}", job.id),
            JobCreated::Same(job) => format!("same {}", job.id),
            JobCreated::Conflict(job) => format!("conflict {}", job.id),
        })
        .collect();
    let expected = [
        "created new",
        "same old",
        "conflict old",
        "same new",
        "conflict new",
        "created newer",
    ];
    assert_eq!(words, expected);
    assert_eq!(jobs.counts().await.unwrap().pending, 3);
    assert!(jobs.create_many(Vec::new()).await.is_empty());
}

pub async fn a_large_batch_is_created_whole(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let batch = (0..2_000).map(|n| job(&format!("job-{n}"), NOW + n));
    let answers = jobs.create_many(batch.collect()).await;
    for (n, answer) in answers.into_iter().enumerate() {
        match answer.unwrap() {
            JobCreated::Created(job) => assert_eq!(job.id.as_str(), format!("job-{n}")),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(jobs.counts().await.unwrap().pending, 2_000);
    assert_eq!(claim(&*jobs, NOW + 999).await.len(), 1_000);
    assert_eq!(claim(&*jobs, NOW + 1_999).await.len(), 1_000);
}

pub async fn unusual_ids_and_names_are_kept_apart(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let long = "ü".repeat(100);
    let unusual = [
        "a", "a ", " a", "A", "aa", "a:b", "a}b{", "{j07}", "*", "a*", "?", "[a]", "%", "\\", "\"",
        "'", "-inf", "+inf", "(a", "№", "a\u{301}", "á", &long, "0", "1e3",
    ];
    for (n, text) in unusual.iter().enumerate() {
        let new = NewJob {
            cancel_on: vec![name(&format!("t:{text}"))],
            fingerprint: n as u64,
            ..job(text, NOW + n as u64)
        };
        created(&*jobs, new).await;
    }
    for (n, text) in unusual.iter().enumerate() {
        let kept = get(&*jobs, text).await;
        assert_eq!((kept.id.as_str(), kept.fingerprint), (*text, n as u64));
    }
    let event = super::job_events::event(&format!("t:{}", unusual[3]), NOW);
    assert_eq!(jobs.event(&event).await.unwrap().cancelled, 1);
    changed(jobs.cancel(&id("*"), NOW).await.unwrap());
    let claimed = claim(&*jobs, NOW + 100).await;
    assert_eq!(claimed.len(), unusual.len() - 2);
    for job in claimed {
        assert_eq!(
            settle(&*jobs, &job, JobSettlement::Fired, NOW).await,
            Settled::Done
        );
    }
    assert_eq!(jobs.counts().await.unwrap().fired, unusual.len() as u64 - 2);
}

pub async fn a_job_without_actions_and_one_with_large_ones_are_kept(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let mut empty = job("empty", NOW);
    empty.plan.actions.clear();
    created(&*jobs, empty).await;
    let mut large = job("large", NOW);
    large.plan = plan(&"x".repeat(256 << 10));
    let large = created(&*jobs, large).await;
    assert_eq!(get(&*jobs, "large").await, large);
    let claimed = claim(&*jobs, NOW).await;
    assert_eq!(claimed.len(), 2);
    for job in claimed {
        assert_eq!(
            settle(&*jobs, &job, JobSettlement::Fired, NOW).await,
            Settled::Done
        );
    }
}

/// Sweeps every shard once; says how many jobs went.
pub async fn jobs_swept(jobs: &dyn Jobs, now_ms: u64, limit: usize) -> u64 {
    let mut swept = 0;
    for shard in 0..jobs.shards() {
        swept += jobs.sweep(shard, now_ms, limit).await.unwrap().jobs;
    }
    swept
}

pub async fn what_was_answered_survives_a_crash(backend: &mut dyn JobsBackend) {
    let mut jobs = start(backend).await;
    for n in 0..6 {
        created(&*jobs, job(&format!("job-{n}"), NOW + n)).await;
    }
    jobs.cancel(&id("job-0"), NOW).await.unwrap();
    let patch = JobPatch {
        fire_at_ms: Some(NOW + HOUR),
        plan: Some(plan("patched")),
        ..JobPatch::default()
    };
    jobs.patch(&id("job-1"), patch).await.unwrap();
    jobs.trigger(&id("job-5"), NOW + 1).await.unwrap();
    let mut expected = Vec::new();
    for n in 0..6 {
        expected.push(get(&*jobs, &format!("job-{n}")).await);
    }
    drop(jobs);
    jobs = backend.crash().await;
    for job in &expected {
        assert_eq!(jobs.get(&job.id).await.unwrap().as_ref(), Some(job));
    }
    assert_eq!(ids(&claim(&*jobs, NOW + 1).await), ["job-5"]);
    let mut rest = claim(&*jobs, NOW + 4).await;
    rest.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!(ids(&rest), ["job-2", "job-3", "job-4"]);
}

pub async fn a_job_that_ended_is_kept_for_its_time_and_no_longer(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let limits = JobLimits::default();
    for (text, settlement) in [
        ("fired", Some(JobSettlement::Fired)),
        ("skipped", Some(JobSettlement::Skipped)),
        ("failed", Some(failed("x"))),
        ("cancelled", None),
    ] {
        let mut new = job(text, NOW);
        new.cancel_on = vec![name("t:1")];
        created(&*jobs, new).await;
        match settlement {
            Some(settlement) => {
                let claimed = claim_one(&*jobs, NOW).await;
                settle(&*jobs, &claimed, settlement, NOW).await;
            }
            None => drop(jobs.cancel(&id(text), NOW).await.unwrap()),
        }
    }
    created(&*jobs, job("waits", NOW)).await;
    let retention = limits.retention_ms(JobState::Fired);
    assert_eq!(jobs_swept(&*jobs, NOW + retention - 1, 100).await, 0);
    assert_eq!(state(&*jobs, "fired").await, JobState::Fired);
    assert_eq!(jobs_swept(&*jobs, NOW + retention, 100).await, 3);
    for text in ["fired", "skipped", "cancelled"] {
        assert_eq!(jobs.get(&id(text)).await.unwrap(), None);
    }
    let retention = limits.retention_ms(JobState::Failed);
    assert_eq!(jobs_swept(&*jobs, NOW + retention - 1, 100).await, 0);
    assert_eq!(state(&*jobs, "failed").await, JobState::Failed);
    assert_eq!(jobs_swept(&*jobs, NOW + retention, 100).await, 1);
    assert_eq!(jobs.get(&id("failed")).await.unwrap(), None);
    // What waits is never swept, and the names of what is gone are free.
    assert_eq!(jobs_swept(&*jobs, NOW + 1_000 * HOUR, 100).await, 0);
    assert_eq!(jobs.counts().await.unwrap().total(), 1);
    created(&*jobs, job("fired", NOW + 1_000 * HOUR)).await;
}

pub async fn a_sweep_is_bounded(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let all: Vec<_> = (0..1_200).map(|n| format!("job-{n}")).collect();
    let batch = all.iter().map(|text| job(text, NOW)).collect();
    all_created(&*jobs, batch).await;
    join_all(all.iter().map(|text| {
        let jobs = jobs.clone();
        async move { jobs.cancel(&id(text), NOW).await.unwrap() }
    }))
    .await;
    let late = NOW + 2 * HOUR;
    let mut left = 1_200;
    for shard in 0..jobs.shards() {
        loop {
            let swept = jobs.sweep(shard, late, 50).await.unwrap();
            assert!(swept.jobs <= 50);
            left -= swept.jobs;
            if !swept.more {
                break;
            }
        }
    }
    assert_eq!(left, 0);
    assert_eq!(jobs.counts().await.unwrap(), JobCounts::default());
}
