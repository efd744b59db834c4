//! Cases of [`crate::Jobs`]: how many jobs there may be.

use super::jobs::{
    HOUR, JobsBackend, NOW, changed, claim, created, failed, get, id, job, jobs_swept, name, retry,
    settle,
};
use crate::{ClientId, JobCreated, JobLimits, JobSettlement, Jobs, NewJob, StoreError};

pub async fn at_the_limit_no_job_is_created(backend: &mut dyn JobsBackend) {
    // A store that counts by shards may refuse a little before: it holds this many in each.
    let limits = JobLimits {
        jobs_max: 64,
        ..JobLimits::default()
    };
    let jobs = backend.start(limits).await;
    let mut kept = Vec::new();
    let mut full = None;
    for n in 0..200 {
        let text = format!("job-{n}");
        match jobs.create(job(&text, NOW)).await {
            Ok(JobCreated::Created(_)) => kept.push(text),
            Err(StoreError::Full(_)) => full = Some(text),
            other => panic!("{other:?}"),
        }
    }
    assert!(kept.len() <= 64 && kept.len() >= 32, "{}", kept.len());
    let full = full.expect("there is a limit");
    let notice = jobs.create_notice(job("notice", NOW)).await.unwrap();
    assert!(matches!(notice, JobCreated::Created(_)));
    jobs.cancel(&id("notice"), NOW).await.unwrap();
    assert_eq!(jobs.get(&id(&full)).await.unwrap(), None);
    let same = jobs.create(job(&kept[0], NOW)).await.unwrap();
    assert!(matches!(same, JobCreated::Same(_)));
    // What has ended still counts until it is swept.
    for text in &kept {
        jobs.cancel(&id(text), NOW).await.unwrap();
    }
    assert!(matches!(
        jobs.create(job(&full, NOW)).await,
        Err(StoreError::Full(_))
    ));
    jobs_swept(&*jobs, NOW + 2 * HOUR, 1_000).await;
    created(&*jobs, job(&full, NOW)).await;
}

pub async fn a_device_has_no_more_jobs_than_it_may_have(backend: &mut dyn JobsBackend) {
    let limits = JobLimits {
        device_jobs_max: 3,
        ..JobLimits::default()
    };
    let jobs = backend.start(limits).await;
    let of = |device: &str, text: &str| NewJob {
        device: Some(ClientId::parse(device).unwrap()),
        cancel_on: vec![name(&format!("t:{text}"))],
        ..job(text, NOW)
    };
    let is_full = async |jobs: &dyn Jobs, new: NewJob| {
        let answer = jobs.create(new).await;
        matches!(answer, Err(StoreError::Quota(_)))
    };
    let first = created(&*jobs, of("car-7", "a")).await;
    assert_eq!(first.device, Some(ClientId::parse("car-7").unwrap()));
    assert_eq!(get(&*jobs, "a").await, first);
    for text in ["b", "c"] {
        created(&*jobs, of("car-7", text)).await;
    }
    assert!(is_full(&*jobs, of("car-7", "d")).await);
    // What is there already is known again, and others have their own.
    let same = jobs.create(of("car-7", "a")).await.unwrap();
    assert!(matches!(same, JobCreated::Same(_)));
    created(&*jobs, of("car-8", "other")).await;
    created(&*jobs, job("nobody's", NOW)).await;
    drop(jobs);
    let jobs = backend.crash().await;
    assert!(is_full(&*jobs, of("car-7", "d")).await);
    // Room is made by the end of a job, whichever it is.
    jobs.cancel(&id("a"), NOW).await.unwrap();
    created(&*jobs, of("car-7", "d")).await;
    assert!(is_full(&*jobs, of("car-7", "e")).await);
    let event = super::job_events::event("t:b", NOW);
    assert_eq!(jobs.event(&event).await.unwrap().cancelled, 1);
    created(&*jobs, of("car-7", "e")).await;
    let claimed = claim(&*jobs, NOW).await;
    let by_id = |text: &str| claimed.iter().find(|job| job.id == id(text)).unwrap();
    assert!(
        is_full(&*jobs, of("car-7", "f")).await,
        "they have not ended"
    );
    settle(&*jobs, by_id("c"), retry(NOW + 9), NOW).await;
    assert!(is_full(&*jobs, of("car-7", "f")).await, "nor has this one");
    settle(&*jobs, by_id("d"), JobSettlement::Fired, NOW).await;
    settle(&*jobs, by_id("e"), failed("no"), NOW).await;
    created(&*jobs, of("car-7", "f")).await;
    changed(jobs.retry_failed(&id("e"), NOW).await.unwrap());
    assert!(is_full(&*jobs, of("car-7", "g")).await, "it is tried again");
}
