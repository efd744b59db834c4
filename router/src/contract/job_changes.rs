//! Cases of [`crate::Jobs`]: what callers do to a job that waits, against claims at the same time, and how others hear of it.

use std::collections::HashSet;

use futures_util::future::{join, join_all};

use super::jobs::{
    HOUR, JobsBackend, LEASE, NOW, all_created, changed, claim, claim_one, claim_up_to, created,
    failed, get, holder, id, ids, job, jobs_swept, name, plan, put_off, refused, retry, settle,
    start, state,
};
use crate::{
    ActionState, ClaimToken, Claimed, JobChange, JobCounts, JobPatch, JobPlan, JobSettlement,
    JobState, Settled,
};

pub async fn a_patch_changes_what_waits(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let before = created(&*jobs, job("a", NOW + 1_000)).await;
    let patch = |fire_at_ms, plan| JobPatch {
        fire_at_ms,
        plan,
        ..JobPatch::default()
    };
    let nothing = changed(jobs.patch(&id("a"), JobPatch::default()).await.unwrap());
    assert_eq!(nothing, before);

    let later = changed(
        jobs.patch(&id("a"), patch(Some(NOW + 2_000), None))
            .await
            .unwrap(),
    );
    assert_eq!((later.fire_at_ms, later.due_ms), (NOW + 2_000, NOW + 2_000));
    assert!(claim(&*jobs, NOW + 1_999).await.is_empty());

    let mut two = plan("two");
    two.actions.push(two.actions[0].clone());
    let other = changed(
        jobs.patch(&id("a"), patch(None, Some(two.clone())))
            .await
            .unwrap(),
    );
    assert_eq!((&other.plan, other.fire_at_ms), (&two, NOW + 2_000));
    assert_eq!(other.actions, [ActionState::Waiting; 2]);

    changed(
        jobs.patch(&id("a"), patch(Some(NOW + 10), None))
            .await
            .unwrap(),
    );
    let claimed = claim_one(&*jobs, NOW + 10).await;
    assert_eq!(claimed.plan, two);
    assert_eq!(claimed.fingerprint, before.fingerprint);
    assert_eq!(claim_up_to(&*jobs, NOW + 5_000, 9).await.jobs, []);
}

pub async fn of_patches_at_once_none_takes_another_one_back(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let before = created(&*jobs, job("a", NOW + 1_000)).await.plan;
    let instead_of = |before: &JobPlan, spec| JobPatch {
        plan: Some(plan(spec)),
        instead_of: Some(before.clone()),
        fire_at_ms: Some(NOW + 5),
    };
    let other = || instead_of(&plan("not this"), "other");
    assert_eq!(
        jobs.patch(&id("a"), other()).await.unwrap(),
        JobChange::Outdated
    );
    assert_eq!(get(&*jobs, "a").await.fire_at_ms, NOW + 1_000);
    // Whoever did not hear the answer asks again.
    for _ in 0..2 {
        let patched = jobs.patch(&id("a"), instead_of(&before, "one")).await;
        assert_eq!(changed(patched.unwrap()).plan, plan("one"));
    }
    let only_the_time = JobPatch {
        plan: None,
        ..instead_of(&before, "")
    };
    assert_eq!(
        jobs.patch(&id("a"), only_the_time).await.unwrap(),
        JobChange::Outdated
    );

    let all: Vec<_> = (0..20).map(|n| n.to_string()).collect();
    let patches = all.iter().map(|spec| {
        let (jobs, patch) = (jobs.clone(), instead_of(&plan("one"), spec));
        async move { jobs.patch(&id("a"), patch).await.unwrap() }
    });
    let answers = join_all(patches).await;
    let was_first = |answer: &&JobChange| matches!(answer, JobChange::Changed(_));
    assert_eq!(answers.iter().filter(was_first).count(), 1, "{answers:?}");
    let first = answers
        .iter()
        .position(|answer| was_first(&answer))
        .unwrap();
    assert_eq!(get(&*jobs, "a").await.plan, plan(&all[first]));

    claim_one(&*jobs, NOW + 5).await;
    let begun = jobs.patch(&id("a"), other()).await.unwrap();
    assert_eq!(refused(begun), JobState::Firing);
    let unknown = jobs.patch(&id("b"), other()).await.unwrap();
    assert_eq!(unknown, JobChange::NotFound);
}

pub async fn a_cancelled_job_never_fires(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, job("a", NOW + 10)).await;
    created(&*jobs, job("due", NOW)).await;
    for text in ["a", "due"] {
        let cancelled = changed(jobs.cancel(&id(text), NOW + 3).await.unwrap());
        assert_eq!(cancelled.state, JobState::Cancelled);
        assert_eq!(cancelled.ended_ms, Some(NOW + 3));
        assert_eq!(get(&*jobs, text).await, cancelled);
        // Whoever did not hear the answer asks again.
        let again = changed(jobs.cancel(&id(text), NOW + 4).await.unwrap());
        assert_eq!(again, cancelled);
    }
    assert_eq!(
        claim_up_to(&*jobs, NOW + HOUR, 10).await,
        Claimed::default()
    );
    let trigger = jobs.trigger(&id("a"), NOW).await.unwrap();
    assert_eq!(refused(trigger), JobState::Cancelled);
    let patch = jobs.patch(&id("a"), JobPatch::default()).await.unwrap();
    assert_eq!(refused(patch), JobState::Cancelled);
}

pub async fn a_triggered_job_is_due_at_once(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, job("a", NOW + HOUR)).await;
    let triggered = changed(jobs.trigger(&id("a"), NOW + 7).await.unwrap());
    assert_eq!((triggered.fire_at_ms, triggered.due_ms), (NOW + 7, NOW + 7));
    assert_eq!(triggered.state, JobState::Pending);
    let again = changed(jobs.trigger(&id("a"), NOW + 9).await.unwrap());
    assert_eq!(again, triggered);
    assert!(claim(&*jobs, NOW + 6).await.is_empty());
    assert_eq!(claim_one(&*jobs, NOW + 7).await.id, id("a"));
    let claimed = claim_up_to(&*jobs, NOW + HOUR, 10).await.jobs;
    assert_eq!(ids(&claimed), ["a"], "only because its lease has ended");
}

pub async fn a_job_that_has_begun_is_refused_with_its_state(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let everything = async |text: &str, expected: JobState| {
        let before = get(&*jobs, text).await;
        let id = id(text);
        let patch = JobPatch {
            fire_at_ms: Some(NOW + HOUR),
            plan: Some(plan("x")),
            ..JobPatch::default()
        };
        let mut answers = vec![
            jobs.patch(&id, patch).await.unwrap(),
            jobs.trigger(&id, NOW).await.unwrap(),
        ];
        if expected != JobState::Cancelled {
            answers.push(jobs.cancel(&id, NOW).await.unwrap());
        }
        if expected != JobState::Failed {
            answers.push(jobs.retry_failed(&id, NOW).await.unwrap());
        }
        for answer in answers {
            assert_eq!(answer, JobChange::Refused(before.clone()));
        }
        assert_eq!(before.state, expected);
        assert_eq!(get(&*jobs, text).await, before);
    };
    created(&*jobs, job("cancelled", NOW + 1)).await;
    jobs.cancel(&id("cancelled"), NOW).await.unwrap();
    everything("cancelled", JobState::Cancelled).await;
    for (text, settlement, expected) in [
        ("fired", JobSettlement::Fired, JobState::Fired),
        ("skipped", JobSettlement::Skipped, JobState::Skipped),
        ("failed", failed("x"), JobState::Failed),
        ("retrying", retry(NOW + HOUR), JobState::Retrying),
    ] {
        created(&*jobs, job(text, NOW)).await;
        let claimed = claim_one(&*jobs, NOW).await;
        everything(text, JobState::Firing).await;
        settle(&*jobs, &claimed, settlement, NOW).await;
        everything(text, expected).await;
    }
}

pub async fn what_is_not_known_is_not_found(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    created(&*jobs, job("ab", NOW)).await;
    for text in ["a", "abc", "b"] {
        let id = id(text);
        assert_eq!(jobs.get(&id).await.unwrap(), None);
        for answer in [
            jobs.patch(&id, JobPatch::default()).await,
            jobs.cancel(&id, NOW).await,
            jobs.trigger(&id, NOW).await,
            jobs.retry_failed(&id, NOW).await,
        ] {
            assert_eq!(answer.unwrap(), JobChange::NotFound);
        }
        for token in [ClaimToken::default(), ClaimToken(7)] {
            let settled = jobs.settle(&id, token, JobSettlement::Fired, NOW).await;
            assert_eq!(settled.unwrap(), Settled::Stale);
            let extended = jobs.extend(&id, token, NOW, Vec::new(), false).await;
            assert_eq!(extended.unwrap(), Settled::Stale);
        }
    }
    assert_eq!(state(&*jobs, "ab").await, JobState::Pending);
}

pub async fn of_a_cancel_and_a_claim_at_once_one_comes_first(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let all: Vec<_> = (0..200).map(|n| format!("job-{n}")).collect();
    let batch = all.iter().map(|text| job(text, NOW)).collect();
    all_created(&*jobs, batch).await;
    let cancels = join_all(all.iter().map(|text| {
        let jobs = jobs.clone();
        async move { jobs.cancel(&id(text), NOW).await.unwrap() }
    }));
    let (cancels, claimed) = join(cancels, claim(&*jobs, NOW)).await;
    let claimed: HashSet<_> = claimed.into_iter().map(|job| job.id).collect();
    for (text, cancel) in all.iter().zip(cancels) {
        match cancel {
            JobChange::Changed(_) => assert!(!claimed.contains(&id(text)), "{text} is in both"),
            JobChange::Refused(job) => {
                assert_eq!(job.state, JobState::Firing);
                assert!(claimed.contains(&id(text)), "{text} is in neither");
            }
            JobChange::Outdated | JobChange::NotFound => panic!("{text} is gone"),
        }
    }
    let counts = jobs.counts().await.unwrap();
    assert_eq!(counts.firing, claimed.len() as u64);
    assert_eq!(counts.cancelled + counts.firing, 200);
}

pub async fn of_a_patch_and_a_claim_at_once_one_comes_first(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let all: Vec<_> = (0..200).map(|n| format!("job-{n}")).collect();
    let batch = all.iter().map(|text| job(text, NOW)).collect();
    all_created(&*jobs, batch).await;
    let patches = join_all(all.iter().map(|text| {
        let jobs = jobs.clone();
        let patch = JobPatch {
            fire_at_ms: Some(NOW + HOUR),
            plan: Some(plan("new")),
            ..JobPatch::default()
        };
        async move { jobs.patch(&id(text), patch).await.unwrap() }
    }));
    let (patches, claimed) = join(patches, claim(&*jobs, NOW)).await;
    for job in &claimed {
        assert_eq!(job.plan, plan("{}"));
    }
    let claimed: HashSet<_> = claimed.into_iter().map(|job| job.id).collect();
    for (text, patch) in all.iter().zip(patches) {
        let was_patched = matches!(patch, JobChange::Changed(_));
        assert_ne!(was_patched, claimed.contains(&id(text)), "{text}");
    }
    let later = claim(&*jobs, NOW + HOUR).await;
    let new = later.iter().filter(|job| job.plan == plan("new"));
    assert_eq!(new.count(), 200 - claimed.len());
}

pub async fn counts_follow_every_change(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let mut expected = JobCounts::default();
    assert_eq!(jobs.counts().await.unwrap(), expected);
    for n in 0..7 {
        created(&*jobs, job(&format!("job-{n}"), NOW + n)).await;
    }
    expected.pending = 7;
    assert_eq!(jobs.counts().await.unwrap(), expected);
    jobs.create(job("job-0", NOW)).await.unwrap();
    jobs.cancel(&id("job-6"), NOW).await.unwrap();
    jobs.trigger(&id("job-5"), NOW).await.unwrap();
    let claimed = claim(&*jobs, NOW + 6).await;
    expected = JobCounts {
        cancelled: 1,
        firing: 6,
        ..JobCounts::default()
    };
    assert_eq!(jobs.counts().await.unwrap(), expected);
    let settlements = [
        JobSettlement::Fired,
        JobSettlement::Skipped,
        failed("x"),
        retry(NOW + 50),
        put_off(NOW + 10, false),
    ];
    for (job, settlement) in claimed.iter().zip(settlements) {
        settle(&*jobs, job, settlement, NOW + 10).await;
    }
    expected = JobCounts {
        pending: 1,
        firing: 1,
        retrying: 1,
        fired: 1,
        skipped: 1,
        failed: 1,
        cancelled: 1,
    };
    assert_eq!(jobs.counts().await.unwrap(), expected);
    drop(jobs);
    let jobs = backend.crash().await;
    assert_eq!(jobs.counts().await.unwrap(), expected);
    jobs.retry_failed(&claimed[2].id, NOW).await.unwrap();
    expected.failed = 0;
    expected.retrying = 2;
    assert_eq!(jobs.counts().await.unwrap(), expected);
    while jobs_swept(&*jobs, NOW + 2 * HOUR, 100).await > 0 {}
    expected.fired = 0;
    expected.skipped = 0;
    expected.cancelled = 0;
    assert_eq!(jobs.counts().await.unwrap(), expected);
}

pub async fn an_earlier_job_is_noticed(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let text = "a";
    let shard = jobs.shard_of(&id(text));
    let mut earlier = jobs.earlier(shard);
    let next_due = async |now_ms: u64| {
        let claimed = jobs
            .claim(shard, &holder(), now_ms, 10, LEASE)
            .await
            .unwrap();
        (claimed.jobs, claimed.next_due_ms)
    };
    macro_rules! notices {
        ($change:expr, $due_ms:expr) => {
            earlier.mark_unchanged();
            $change;
            let noticed =
                tokio::time::timeout(std::time::Duration::from_secs(10), earlier.changed());
            noticed.await.expect("the change is noticed").unwrap();
            assert_eq!(next_due(NOW).await, (Vec::new(), Some($due_ms)));
        };
    }
    assert_eq!(next_due(NOW).await, (Vec::new(), None));
    let mut new = job(text, NOW + HOUR);
    new.trigger_on = vec![name("go:1")];
    notices!(created(&*jobs, new).await, NOW + HOUR);
    let sooner = JobPatch {
        fire_at_ms: Some(NOW + 1_000),
        plan: None,
        ..JobPatch::default()
    };
    notices!(jobs.patch(&id(text), sooner).await.unwrap(), NOW + 1_000);
    notices!(jobs.trigger(&id(text), NOW + 500).await.unwrap(), NOW + 500);
    notices!(
        jobs.event(&super::job_events::event("go:1", NOW + 100))
            .await
            .unwrap(),
        NOW + 100
    );
    let (claimed, next) = next_due(NOW + 100).await;
    assert_eq!(next, Some(NOW + 100 + LEASE));
    notices!(
        settle(&*jobs, &claimed[0], retry(NOW + 300), NOW).await,
        NOW + 300
    );
}
