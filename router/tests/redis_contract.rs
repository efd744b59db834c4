//! The store on Redis under the contract suites: one server, a master behind sentinels, and a cluster; and what it does
//! when they die, freeze and forget.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "redis_store/failover.rs"]
mod failover;
use std::sync::LazyLock;

use proptest::prelude::ProptestConfig;
use tokio::runtime::Runtime;

#[path = "redis_store/job_failover.rs"]
mod job_failover;
#[path = "redis_store/job_faults.rs"]
mod job_faults;
mod job_model;
#[path = "redis_store/jobs.rs"]
mod jobs;
#[path = "redis_store/outages.rs"]
mod outages;
#[path = "redis_store/shards.rs"]
mod shards;
#[path = "redis_store/support.rs"]
mod support;

/// Runs the model; every run of it here is in one runtime, which the server that tests share outlives.
fn runs_like_the_reference(run: impl Future<Output = ()>) {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().unwrap()
    });
    RUNTIME.block_on(run);
}

/// Few tries to make a failure smaller: each takes its time here.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 300,
        ..ProptestConfig::default()
    }
}

proptest::proptest! {
    #![proptest_config(cases(24))]
    #[test]
    fn delayed_jobs_are_those_of_a_simple_reference(steps in job_model::steps()) {
        runs_like_the_reference(async {
            let config = support::one_server().await;
            job_model::run(&mut jobs::Abandoned::of(config), steps).await;
        });
    }
}

proptest::proptest! {
    #![proptest_config(cases(6))]
    #[test]
    fn delayed_jobs_are_those_of_a_simple_reference_where_redis_is_killed(steps in job_model::steps()) {
        runs_like_the_reference(async {
            job_model::run(&mut jobs::Killed::default(), steps).await;
        });
    }
}

mod single {
    use super::jobs::Killed;
    use super::shards::shard_cases;
    use super::support::{Single, one_server};

    moorline_router::route_contract!(Single::default());
    moorline_router::ban_contract!(Single::default());
    moorline_router::session_contract!(Single::default());
    moorline_router::inbox_contract!(Single::default());
    moorline_router::receipt_contract!(Single::default());
    moorline_router::job_contract!(Killed::default());
    shard_cases!(one_server().await);
}

mod sentinel {
    use super::jobs::Abandoned;
    use super::shards::shard_cases;
    use super::support::{Shared, sentinels};

    // With a master it is as with one server; the way to it and the waiting for replicas are what is different.
    moorline_router::route_contract!(Shared::of(sentinels().await));
    moorline_router::session_contract!(Shared::of(sentinels().await));
    moorline_router::inbox_contract!(Shared::of(sentinels().await));
    moorline_router::job_contract!(Abandoned::of(sentinels().await));
    shard_cases!(sentinels().await);
}

mod cluster {
    use super::jobs::Abandoned;
    use super::shards::shard_cases;
    use super::support::{Shared, cluster};

    moorline_router::route_contract!(Shared::of(cluster().await));
    moorline_router::ban_contract!(Shared::of(cluster().await));
    moorline_router::session_contract!(Shared::of(cluster().await));
    moorline_router::inbox_contract!(Shared::of(cluster().await));
    moorline_router::receipt_contract!(Shared::of(cluster().await));
    moorline_router::job_contract!(Abandoned::of(cluster().await));
    shard_cases!(cluster().await);
}
