//! Cases of [`crate::Jobs`]: lists of jobs, page by page.

use std::collections::BTreeSet;

use super::jobs::{
    JobsBackend, NOW, all_created, claim, created, id, ids, job, name, retry, settle, start,
};
use crate::{Job, JobFilter, JobSettlement, JobState, Jobs, NewJob};

fn prefix(text: &str) -> JobFilter {
    JobFilter {
        prefix: Some(text.into()),
        ..JobFilter::default()
    }
}

/// Every job of a list, in pages of `limit`.
async fn all(jobs: &dyn Jobs, filter: &JobFilter, limit: usize) -> Vec<Job> {
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let page = jobs.list(filter, after.as_ref(), limit).await.unwrap();
        assert!(page.jobs.len() <= limit);
        found.extend(page.jobs);
        match page.next {
            Some(next) => after = Some(next),
            None => return found,
        }
    }
}

async fn create(jobs: &dyn Jobs, texts: &[&str]) {
    for (n, text) in texts.iter().enumerate() {
        created(jobs, job(text, NOW + n as u64)).await;
    }
}

/// Each job at the time by which it is listed.
fn times(jobs: &[Job]) -> Vec<(u64, &str)> {
    jobs.iter()
        .map(|job| (job.at_ms() - NOW, job.id.as_str()))
        .collect()
}

pub async fn a_prefix_lists_jobs_in_the_order_of_their_ids(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let texts = [
        "b",
        "order-2",
        "order-10",
        "a",
        "order-1",
        "order",
        "order\u{2f}",
        "orderü",
    ];
    create(&*jobs, &texts).await;
    for limit in [1, 2, 3, 100] {
        let found = all(&*jobs, &prefix("order"), limit).await;
        let expected = [
            "order", "order-1", "order-10", "order-2", "order/", "orderü",
        ];
        assert_eq!(ids(&found), expected);
        let everything = all(&*jobs, &prefix(""), limit).await;
        assert_eq!(ids(&everything)[..2], ["a", "b"]);
        assert_eq!(everything.len(), texts.len());
        let found = all(&*jobs, &prefix("order-1"), limit).await;
        assert_eq!(ids(&found), ["order-1", "order-10"]);
    }
}

pub async fn a_prefix_is_taken_literally(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    let texts = [
        "*",
        "*a",
        "a",
        "[a]",
        "[",
        "(a",
        "a\\",
        "\u{10ffff}",
        "\u{10ffff}a",
        "+",
        "-",
    ];
    create(&*jobs, &texts).await;
    for text in texts {
        let found = all(&*jobs, &prefix(text), 2).await;
        let mut expected: Vec<_> = texts
            .into_iter()
            .filter(|other| other.starts_with(text))
            .collect();
        expected.sort_unstable();
        assert_eq!(ids(&found), expected);
    }
}

pub async fn an_event_lists_the_jobs_that_name_it(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    for (text, cancel, trigger) in [
        ("c", "t:1", "t:2"),
        ("a", "t:1", "t:3"),
        ("b", "t:4", "t:1"),
        ("d", "t:10", "t:2"),
        ("e", "t:1", "t:1"),
    ] {
        let new = NewJob {
            cancel_on: vec![name(cancel)],
            trigger_on: vec![name(trigger)],
            ..job(text, NOW)
        };
        created(&*jobs, new).await;
    }
    let by = |text| JobFilter {
        event: Some(name(text)),
        ..JobFilter::default()
    };
    for limit in [1, 2, 100] {
        assert_eq!(
            ids(&all(&*jobs, &by("t:1"), limit).await),
            ["a", "b", "c", "e"]
        );
        assert_eq!(ids(&all(&*jobs, &by("t:2"), limit).await), ["c", "d"]);
        assert!(all(&*jobs, &by("t:9"), limit).await.is_empty());
    }
    // A job that ended is listed as long as it is kept.
    jobs.cancel(&id("a"), NOW).await.unwrap();
    assert_eq!(all(&*jobs, &by("t:1"), 9).await.len(), 4);
    for shard in 0..jobs.shards() {
        jobs.sweep(shard, NOW + 10_000_000, 10).await.unwrap();
    }
    assert_eq!(ids(&all(&*jobs, &by("t:1"), 9).await), ["b", "c", "e"]);
}

/// Jobs in every state; each listed at another time, `e` and `f` at the same.
async fn in_every_state(jobs: &dyn Jobs) {
    for (text, after_ms) in [("f", 70), ("e", 70), ("a", 1), ("b", 2), ("c", 3)] {
        created(jobs, job(text, NOW + after_ms)).await;
    }
    let claimed = claim(jobs, NOW + 10).await;
    for (job, settlement) in claimed.iter().zip([
        JobSettlement::Fired,
        retry(NOW + 60),
        JobSettlement::Skipped,
    ]) {
        settle(jobs, job, settlement, NOW + 20).await;
    }
    created(jobs, job("d", NOW + 90)).await;
    jobs.cancel(&id("d"), NOW + 30).await.unwrap();
    created(jobs, job("g", NOW)).await;
    for job in claim(jobs, NOW + 11).await {
        assert_eq!(job.id, id("g"));
    }
}

pub async fn a_state_lists_jobs_in_the_order_of_time(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    in_every_state(&*jobs).await;
    let counts = jobs.counts().await.unwrap();
    for state in JobState::ALL {
        let filter = JobFilter {
            state: Some(state),
            ..JobFilter::default()
        };
        let found = all(&*jobs, &filter, 1).await;
        assert!(found.iter().all(|job| job.state == state));
        assert_eq!(found.len() as u64, *counts.clone().of(state));
        if state == JobState::Pending {
            assert_eq!(times(&found), [(70, "e"), (70, "f")]);
        }
    }
}

pub async fn every_state_together_is_in_the_order_of_time(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    in_every_state(&*jobs).await;
    for limit in [1, 2, 3, 100] {
        let found = all(&*jobs, &JobFilter::default(), limit).await;
        assert_eq!(found.len(), 7);
        assert!(found.is_sorted_by_key(|job| (job.at_ms(), job.id.clone())));
        let found = times(&found);
        assert_eq!(
            found[found.len() - 3..found.len() - 1],
            [(70, "e"), (70, "f")]
        );
        assert_eq!(
            found.last().map(|(_, text)| *text),
            Some("g"),
            "it is claimed"
        );
    }
}

pub async fn a_range_of_time_has_its_beginning_and_not_its_end(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    create(&*jobs, &["a", "b", "c", "d", "e"]).await;
    for limit in [1, 100] {
        for state in [None, Some(JobState::Pending)] {
            let range = |from_ms, to_ms| JobFilter {
                state,
                from_ms,
                to_ms,
                ..JobFilter::default()
            };
            let found = all(&*jobs, &range(Some(NOW + 1), Some(NOW + 3)), limit).await;
            assert_eq!(times(&found), [(1, "b"), (2, "c")]);
            let found = all(&*jobs, &range(None, Some(NOW + 1)), limit).await;
            assert_eq!(times(&found), [(0, "a")]);
            let found = all(&*jobs, &range(Some(NOW + 4), None), limit).await;
            assert_eq!(times(&found), [(4, "e")]);
            for (from_ms, to_ms) in [(5, 9), (2, 2), (3, 1)] {
                let filter = range(Some(NOW + from_ms), Some(NOW + to_ms));
                assert!(all(&*jobs, &filter, limit).await.is_empty());
            }
        }
    }
}

pub async fn filters_hold_together(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    for n in 0..40_u64 {
        let new = NewJob {
            cancel_on: vec![name(&format!("t:{}", n % 4))],
            ..job(&format!("{}-{n:02}", ["a", "b"][(n % 2) as usize]), NOW + n)
        };
        created(&*jobs, new).await;
    }
    for n in (0..40).step_by(8) {
        jobs.cancel(&id(&format!("a-{n:02}")), NOW + n)
            .await
            .unwrap();
    }
    let filter = JobFilter {
        prefix: Some("a-".into()),
        event: Some(name("t:0")),
        state: Some(JobState::Pending),
        from_ms: Some(NOW + 5),
        to_ms: Some(NOW + 28),
    };
    for limit in [1, 2, 100] {
        let found = all(&*jobs, &filter, limit).await;
        assert_eq!(ids(&found), ["a-12", "a-20"]);
        let by_prefix = JobFilter {
            event: None,
            ..filter.clone()
        };
        let found = all(&*jobs, &by_prefix, limit).await;
        let expected = [
            "a-06", "a-10", "a-12", "a-14", "a-18", "a-20", "a-22", "a-26",
        ];
        assert_eq!(ids(&found), expected);
    }
}

pub async fn pages_hold_every_job_once(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    // Many of one time, so that pages end between them.
    let batch = (0..1_000_u64).map(|n| job(&format!("job-{:03}", n * 7 % 1_000), NOW + n / 300));
    all_created(&*jobs, batch.collect()).await;
    for filter in [JobFilter::default(), prefix("job")] {
        for limit in [7, 64] {
            let found = all(&*jobs, &filter, limit).await;
            assert_eq!(found.len(), 1_000);
            let different: BTreeSet<_> = found.iter().map(|job| &job.id).collect();
            assert_eq!(different.len(), 1_000);
        }
    }
}

pub async fn a_list_of_nothing_ends_at_once(backend: &mut dyn JobsBackend) {
    let jobs = start(backend).await;
    for filter in [JobFilter::default(), prefix("a")] {
        let page = jobs.list(&filter, None, 10).await.unwrap();
        assert!(page.jobs.is_empty() && page.next.is_none());
    }
}
