//! Cases of [`crate::Jobs`]: claims, leases, tokens and settlements.

use std::collections::HashSet;

use futures_util::future::join_all;

use super::jobs::{
    HOUR, JobsBackend, LEASE, NOW, all_created, changed, claim, claim_one, claim_up_to, created,
    failed, get, holder, id, ids, job, jobs_swept, name, put_off, refused, retry, settle, start,
    state,
};
use crate::{
    ActionState, ClaimToken, Claimed, Job, JobPatch, JobSettlement, JobState, NewJob, Settled,
};

pub async fn nothing_is_claimed_before_it_is_due(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    assert_eq!(claim_up_to(&*jobs, NOW, 10).await, Claimed::default());
    created(&*jobs, job("a", NOW + 1_000)).await;
    let early = claim_up_to(&*jobs, NOW + 999, 10).await;
    assert!(early.jobs.is_empty());
    assert_eq!(early.next_due_ms, Some(NOW + 1_000));
    assert_eq!(state(&*jobs, "a").await, JobState::Pending);
    let due = claim_up_to(&*jobs, NOW + 1_000, 10).await;
    assert_eq!(ids(&due.jobs), ["a"]);
    assert_eq!(due.jobs[0].claims, 1);
    assert_ne!(due.jobs[0].token, ClaimToken::default());
    assert_eq!(get(&*jobs, "a").await, due.jobs[0]);
    // What is left is the end of the lease.
    let next = claim_up_to(&*jobs, NOW + 1_000, 10).await;
    assert!(next.jobs.is_empty());
    assert_eq!(next.next_due_ms, Some(NOW + 1_000 + LEASE));
}

pub async fn a_job_of_the_past_is_due_at_once_and_one_of_the_far_future_is_not(
    backend: &mut dyn JobsBackend,
) {
    let jobs = start(backend).await;
    let years = NOW + 10 * 366 * 24 * HOUR;
    created(&*jobs, job("past", 5)).await;
    created(&*jobs, job("future", years)).await;
    assert_eq!(claim_one(&*jobs, NOW).await.id, id("past"));
    let claimed = claim_up_to(&*jobs, years - 1, 10).await;
    assert_eq!(ids(&claimed.jobs), ["past"]);
    let claimed = claim_up_to(&*jobs, years, 10).await;
    assert_eq!(ids(&claimed.jobs), ["future"]);
}

pub async fn jobs_are_claimed_in_the_order_of_their_times_then_ids(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let mut expected: Vec<_> = (0..300_u64)
        .map(|n| (NOW + n * 7 % 10, format!("job-{}", n * 31 % 300)))
        .collect();
    let batch = expected.iter().map(|(at, text)| job(text, *at)).collect();
    for answer in jobs.create_many(batch).await {
        answer.unwrap();
    }
    expected.sort();
    for shard in 0..jobs.shards() {
        let mut seen = Vec::new();
        loop {
            let claimed = jobs.claim(shard, &holder(), NOW + 10, 7, LEASE).await;
            let claimed = claimed.unwrap().jobs;
            if claimed.is_empty() {
                break;
            }
            seen.extend(claimed.into_iter().map(|job| (job.fire_at_ms, job.id)));
        }
        let of_shard = expected
            .iter()
            .map(|(at, text)| (*at, id(text)))
            .filter(|(_, id)| jobs.shard_of(id) == shard);
        assert_eq!(seen, of_shard.collect::<Vec<_>>());
    }
}

pub async fn a_claim_takes_no_more_than_its_limit_and_says_that_there_is_more(
    backend: &mut dyn JobsBackend,
) {
    let jobs = start(backend).await;
    let batch = (0..100)
        .map(|n| job(&format!("job-{n}"), NOW + n))
        .collect();
    all_created(&*jobs, batch).await;
    let now_ms = NOW + 1_000;
    for shard in 0..jobs.shards() {
        let mut left = (0..100)
            .filter(|n| jobs.shard_of(&id(&format!("job-{n}"))) == shard)
            .count();
        while left > 0 {
            let claimed = jobs
                .claim(shard, &holder(), now_ms, 3, LEASE)
                .await
                .unwrap();
            assert_eq!(claimed.jobs.len(), left.min(3));
            left -= claimed.jobs.len();
            let is_more = claimed.next_due_ms.is_some_and(|next| next <= now_ms);
            assert_eq!(is_more, left > 0);
        }
    }
}

pub async fn claims_at_once_never_get_the_same_job(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let batch = (0..400).map(|n| job(&format!("job-{n}"), NOW)).collect();
    all_created(&*jobs, batch).await;
    let claims = (0..8).map(|_| {
        let jobs = jobs.clone();
        async move { claim(&*jobs, NOW).await }
    });
    let claimed: Vec<Job> = join_all(claims).await.into_iter().flatten().collect();
    assert_eq!(claimed.len(), 400);
    let different: HashSet<_> = claimed.iter().map(|job| &job.id).collect();
    assert_eq!(different.len(), 400);
}

pub async fn a_claim_whose_lease_has_ended_is_claimed_again_under_a_higher_token(
    backend: &mut dyn JobsBackend,
) {
    let jobs = start(backend).await;
    created(&*jobs, job("a", NOW)).await;
    let first = claim_one(&*jobs, NOW).await;
    assert!(claim(&*jobs, NOW + LEASE - 1).await.is_empty());
    let second = claim_one(&*jobs, NOW + LEASE).await;
    assert!(second.token > first.token);
    assert_eq!((second.claims, second.attempts), (2, 0));
    for settlement in [
        JobSettlement::Fired,
        JobSettlement::Skipped,
        put_off(NOW, false),
        retry(NOW),
        failed("late"),
    ] {
        assert_eq!(
            settle(&*jobs, &first, settlement, NOW + LEASE).await,
            Settled::Stale
        );
    }
    let extended = jobs.extend(
        &first.id,
        first.token,
        NOW + HOUR,
        vec![ActionState::Done],
        false,
    );
    assert_eq!(extended.await.unwrap(), Settled::Stale);
    assert_eq!(get(&*jobs, "a").await, second);
    assert_eq!(
        settle(&*jobs, &second, JobSettlement::Fired, NOW).await,
        Settled::Done
    );
}

pub async fn an_extended_claim_goes_on_and_keeps_what_is_done(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let mut new = job("a", NOW);
    new.plan.actions.push(new.plan.actions[0].clone());
    created(&*jobs, new).await;
    let first = claim_one(&*jobs, NOW).await;
    let actions = vec![ActionState::Done, ActionState::Waiting];
    let extended = jobs.extend(
        &first.id,
        first.token,
        NOW + 2 * LEASE,
        actions.clone(),
        false,
    );
    assert_eq!(extended.await.unwrap(), Settled::Done);
    assert!(claim(&*jobs, NOW + 2 * LEASE - 1).await.is_empty());
    let second = claim_one(&*jobs, NOW + 2 * LEASE).await;
    assert_eq!(second.actions, actions);
    assert_eq!(
        settle(&*jobs, &second, JobSettlement::Fired, NOW).await,
        Settled::Done
    );
    assert_eq!(get(&*jobs, "a").await.actions, [ActionState::Done; 2]);
    let extended = jobs.extend(&second.id, second.token, NOW + HOUR, actions, false);
    assert_eq!(extended.await.unwrap(), Settled::Stale);
    assert_eq!(state(&*jobs, "a").await, JobState::Fired);
}

pub async fn a_settled_job_is_never_claimed_again(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    for (text, settlement, expected) in [
        ("a", JobSettlement::Fired, JobState::Fired),
        ("b", JobSettlement::Skipped, JobState::Skipped),
        ("c", failed("no such device"), JobState::Failed),
    ] {
        created(&*jobs, job(text, NOW)).await;
        let claimed = claim_one(&*jobs, NOW).await;
        let settled = settle(&*jobs, &claimed, settlement, NOW + 7).await;
        assert_eq!(settled, Settled::Done);
        let ended = get(&*jobs, text).await;
        assert_eq!(ended.state, expected);
        assert_eq!((ended.ended_ms, ended.holder), (Some(NOW + 7), None));
    }
    assert_eq!(
        get(&*jobs, "c").await.last_error.as_deref(),
        Some("no such device")
    );
    assert_eq!(get(&*jobs, "c").await.actions, [ActionState::Failed]);
    assert_eq!(get(&*jobs, "c").await.attempts, 1);
    assert_eq!(
        claim_up_to(&*jobs, NOW + 100 * LEASE, 10).await,
        Claimed::default()
    );
}

pub async fn a_settlement_repeated_changes_nothing(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, job("a", NOW)).await;
    let claimed = claim_one(&*jobs, NOW).await;
    for _ in 0..2 {
        let settled = settle(&*jobs, &claimed, retry(NOW + 100), NOW + 1).await;
        assert_eq!(settled, Settled::Done);
    }
    assert_eq!(get(&*jobs, "a").await.attempts, 1);
    let again = claim_one(&*jobs, NOW + 100).await;
    let settled = settle(&*jobs, &claimed, retry(NOW + 100), NOW + 1).await;
    assert_eq!(settled, Settled::Stale);
    for at_ms in [NOW + 101, NOW + 102] {
        let settled = settle(&*jobs, &again, JobSettlement::Fired, at_ms).await;
        assert_eq!(settled, Settled::Done);
    }
    assert_eq!(get(&*jobs, "a").await.ended_ms, Some(NOW + 101));
    assert_eq!(jobs.counts().await.unwrap().fired, 1);
}

pub async fn an_attempt_that_failed_is_repeated_when_it_is_due(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let mut new = job("a", NOW);
    new.plan.actions.push(new.plan.actions[0].clone());
    created(&*jobs, new).await;
    let first = claim_one(&*jobs, NOW).await;
    let actions = vec![ActionState::Done, ActionState::Waiting];
    let settlement = JobSettlement::Retry {
        at_ms: NOW + 5_000,
        actions: actions.clone(),
        error: "connection refused".into(),
    };
    settle(&*jobs, &first, settlement, NOW + 10).await;
    let waiting = get(&*jobs, "a").await;
    assert_eq!(waiting.state, JobState::Retrying);
    assert_eq!((waiting.attempts, waiting.due_ms), (1, NOW + 5_000));
    assert_eq!((waiting.fire_at_ms, waiting.holder), (NOW, None));
    assert_eq!(waiting.actions, actions);
    assert_eq!(waiting.last_error.as_deref(), Some("connection refused"));
    let early = claim_up_to(&*jobs, NOW + 4_999, 10).await;
    assert!(early.jobs.is_empty());
    assert_eq!(early.next_due_ms, Some(NOW + 5_000));
    let second = claim_one(&*jobs, NOW + 5_000).await;
    assert!(second.token > first.token);
    assert_eq!((second.attempts, second.claims), (1, 2));
    assert_eq!(second.actions, actions);
}

pub async fn a_job_that_was_put_off_waits_again_unless_it_had_begun(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, job("a", NOW)).await;
    let claimed = claim_one(&*jobs, NOW + 5).await;
    settle(&*jobs, &claimed, put_off(NOW + 7, false), NOW + 6).await;
    let waiting = get(&*jobs, "a").await;
    assert_eq!(
        (waiting.state, waiting.due_ms),
        (JobState::Pending, NOW + 7)
    );
    assert_eq!((waiting.claims, waiting.attempts), (0, 0));
    assert_eq!((waiting.fire_at_ms, waiting.holder), (NOW, None));
    assert_eq!(waiting.last_error.as_deref(), Some("busy"));
    let early = claim_up_to(&*jobs, NOW + 6, 10).await;
    assert!(early.jobs.is_empty());
    assert_eq!(early.next_due_ms, Some(NOW + 7));
    let again = claim_one(&*jobs, NOW + 7).await;
    assert!(again.token > claimed.token);
    settle(&*jobs, &again, retry(NOW + 100), NOW + 8).await;
    let claimed = claim_one(&*jobs, NOW + 100).await;
    settle(&*jobs, &claimed, put_off(NOW + 101, false), NOW + 100).await;
    let waiting = get(&*jobs, "a").await;
    assert_eq!(
        (waiting.state, waiting.due_ms),
        (JobState::Retrying, NOW + 101)
    );
    assert_eq!((waiting.claims, waiting.attempts), (1, 1));
    assert_eq!(
        refused(jobs.cancel(&id("a"), NOW).await.unwrap()),
        JobState::Retrying
    );
    let claimed = claim_one(&*jobs, NOW + 101).await;
    settle(&*jobs, &claimed, JobSettlement::Fired, NOW + 102).await;

    // This claim has begun it, and an earlier one of another job may have: its lease ended.
    created(&*jobs, job("b", NOW + 200)).await;
    created(&*jobs, job("c", NOW + 200)).await;
    let claimed = claim(&*jobs, NOW + 200).await;
    let b = claimed.iter().find(|job| job.id == id("b")).unwrap();
    settle(&*jobs, b, put_off(NOW + 200 + LEASE, true), NOW + 201).await;
    let b = get(&*jobs, "b").await;
    assert_eq!((b.state, b.claims, b.attempts), (JobState::Retrying, 0, 0));
    let claimed = claim(&*jobs, NOW + 200 + LEASE).await;
    assert_eq!(claimed.len(), 2);
    for job in &claimed {
        settle(&*jobs, job, put_off(NOW + HOUR, false), NOW + 300 + LEASE).await;
        assert_eq!(state(&*jobs, job.id.as_str()).await, JobState::Retrying);
    }
}

pub async fn a_job_that_was_put_off_can_be_changed_as_any_that_waits(
    backend: &mut dyn JobsBackend,
) {
    let jobs = start(backend).await;
    let texts = ["cancelled", "patched", "triggered", "by-event"];
    for text in texts {
        let new = NewJob {
            cancel_on: vec![name(&format!("t:{text}"))],
            ..job(text, NOW)
        };
        created(&*jobs, new).await;
    }
    for claimed in claim(&*jobs, NOW).await {
        settle(&*jobs, &claimed, put_off(NOW + HOUR, false), NOW).await;
    }
    assert_eq!(jobs.counts().await.unwrap().pending, 4);
    changed(jobs.cancel(&id("cancelled"), NOW + 1).await.unwrap());
    let event = super::job_events::event("t:by-event", NOW + 1);
    assert_eq!(jobs.event(&event).await.unwrap().cancelled, 1);
    let patch = JobPatch {
        fire_at_ms: Some(NOW + 5),
        ..JobPatch::default()
    };
    let patched = changed(jobs.patch(&id("patched"), patch).await.unwrap());
    assert_eq!((patched.fire_at_ms, patched.due_ms), (NOW + 5, NOW + 5));
    let triggered = changed(jobs.trigger(&id("triggered"), NOW + 2).await.unwrap());
    assert_eq!((triggered.fire_at_ms, triggered.due_ms), (NOW, NOW));
    assert_eq!(ids(&claim(&*jobs, NOW + 5).await).len(), 2);
    assert!(claim(&*jobs, NOW + 4).await.is_empty());
}

pub async fn trials_count_until_whoever_began_the_job_settles_it(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, job("a", NOW)).await;
    let mut now_ms = NOW;
    let claim_again = async |now_ms: &mut u64, is_trial: bool| {
        let claimed = claim_one(&*jobs, *now_ms).await;
        let until_ms = *now_ms + LEASE;
        let actions = vec![ActionState::Waiting];
        let extended = jobs.extend(&claimed.id, claimed.token, until_ms, actions, is_trial);
        assert_eq!(extended.await.unwrap(), Settled::Done);
        *now_ms += LEASE;
        claimed
    };
    for trials in 0..3 {
        assert_eq!(claim_again(&mut now_ms, true).await.trials, trials);
    }
    let claimed = claim_again(&mut now_ms, false).await;
    assert_eq!(
        (claimed.trials, claimed.claims),
        (3, 4),
        "no trial, no count"
    );
    // Who did not begin it says nothing about it.
    let claimed = claim_one(&*jobs, now_ms).await;
    settle(&*jobs, &claimed, put_off(now_ms, false), now_ms).await;
    let claimed = claim_one(&*jobs, now_ms).await;
    assert_eq!(claimed.trials, 3);
    settle(&*jobs, &claimed, put_off(now_ms, true), now_ms).await;
    assert_eq!(claim_again(&mut now_ms, true).await.trials, 0);
    let claimed = claim_one(&*jobs, now_ms).await;
    assert_eq!(claimed.trials, 1);
    settle(&*jobs, &claimed, retry(now_ms), now_ms).await;
    assert_eq!(claim_again(&mut now_ms, true).await.trials, 0);
    let claimed = claim_one(&*jobs, now_ms).await;
    settle(&*jobs, &claimed, failed("no"), now_ms).await;
    let revived = changed(jobs.retry_failed(&id("a"), now_ms).await.unwrap());
    assert_eq!((revived.trials, revived.revived), (0, 1));
}

pub async fn a_dead_letter_is_tried_again(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let mut new = job("a", NOW);
    new.plan.actions.push(new.plan.actions[0].clone());
    created(&*jobs, new).await;
    let claimed = claim_one(&*jobs, NOW).await;
    let settlement = JobSettlement::Failed {
        actions: vec![ActionState::Done, ActionState::Failed],
        error: "gone".into(),
    };
    settle(&*jobs, &claimed, settlement, NOW + 1).await;
    let job = changed(jobs.retry_failed(&id("a"), NOW + 50).await.unwrap());
    assert_eq!((job.state, job.due_ms), (JobState::Retrying, NOW + 50));
    assert_eq!((job.attempts, job.ended_ms), (0, None));
    assert_eq!(job.actions, [ActionState::Done, ActionState::Waiting]);
    assert_eq!(get(&*jobs, "a").await, job);
    // It has begun once: it cannot be cancelled any more.
    assert_eq!(
        refused(jobs.cancel(&id("a"), NOW).await.unwrap()),
        JobState::Retrying
    );
    let again = jobs.retry_failed(&id("a"), NOW + 51).await.unwrap();
    assert_eq!(refused(again), JobState::Retrying);
    let claimed = claim_one(&*jobs, NOW + 50).await;
    settle(&*jobs, &claimed, JobSettlement::Fired, NOW + 52).await;
    assert_eq!(state(&*jobs, "a").await, JobState::Fired);
}

pub async fn a_claim_of_a_process_that_died_is_claimed_again(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    for text in ["a", "b", "c"] {
        created(&*jobs, job(text, NOW)).await;
    }
    let before = claim(&*jobs, NOW).await;
    let fired = before.iter().find(|job| job.id == id("b")).unwrap();
    settle(&*jobs, fired, JobSettlement::Fired, NOW).await;
    drop(jobs);
    let jobs = backend.crash().await;
    // At the end of its lease at the latest.
    let mut after = claim(&*jobs, NOW + LEASE).await;
    after.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!(ids(&after), ["a", "c"]);
    for old in before.iter().filter(|job| job.id != id("b")) {
        let new = after.iter().find(|job| job.id == old.id).unwrap();
        assert!(new.token > old.token);
        assert_eq!(
            settle(&*jobs, old, JobSettlement::Fired, NOW).await,
            Settled::Stale
        );
        assert_eq!(
            settle(&*jobs, new, JobSettlement::Fired, NOW).await,
            Settled::Done
        );
    }
    assert!(claim(&*jobs, NOW + 3 * LEASE).await.is_empty());
}

pub async fn a_token_of_an_earlier_job_of_the_same_id_counts_for_nothing(
    backend: &mut dyn JobsBackend,
) {
    let jobs = start(backend).await;
    created(&*jobs, job("a", NOW)).await;
    let old = claim_one(&*jobs, NOW).await;
    settle(&*jobs, &old, JobSettlement::Fired, NOW).await;
    assert_eq!(jobs_swept(&*jobs, NOW + 2 * HOUR, 10).await, 1);
    created(&*jobs, job("a", NOW)).await;
    let new = claim_one(&*jobs, NOW).await;
    assert!(new.token > old.token);
    assert_eq!(settle(&*jobs, &old, failed("x"), NOW).await, Settled::Stale);
    assert_eq!(get(&*jobs, "a").await, new);
}

pub async fn every_shard_is_held_by_somebody(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let mut seen = HashSet::new();
    for n in 0..1_000 {
        let shard = jobs.shard_of(&id(&format!("job-{n}")));
        assert!(shard < jobs.shards());
        seen.insert(shard);
    }
    assert_eq!(seen.len(), usize::from(jobs.shards()));
    let held = jobs.hold(&holder(), LEASE).await.unwrap();
    let expected: Vec<_> = (0..jobs.shards()).collect();
    assert_eq!(held, expected);
    assert_eq!(jobs.hold(&holder(), LEASE).await.unwrap(), expected);
    jobs.let_go(&holder()).await.unwrap();
    assert!(jobs.time().await.unwrap() > 1_600_000_000_000);
}
