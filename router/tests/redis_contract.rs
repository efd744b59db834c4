//! The store on Redis under the contract suites: one server, a master behind sentinels, and a cluster; and what it does
//! when they die, freeze and forget.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "redis_store/failover.rs"]
mod failover;
#[path = "redis_store/job_faults.rs"]
mod job_faults;
#[path = "redis_store/outages.rs"]
mod outages;
#[path = "redis_store/shards.rs"]
mod shards;
#[path = "redis_store/support.rs"]
mod support;

mod single {
    use super::shards::shard_cases;
    use super::support::{Single, one_server};

    moorline_router::route_contract!(Single::default());
    moorline_router::ban_contract!(Single::default());
    moorline_router::session_contract!(Single::default());
    moorline_router::inbox_contract!(Single::default());
    moorline_router::receipt_contract!(Single::default());
    shard_cases!(one_server().await);
}

mod sentinel {
    use super::shards::shard_cases;
    use super::support::{Shared, sentinels};

    // With a master it is as with one server; the way to it and the waiting for replicas are what is different.
    moorline_router::route_contract!(Shared::of(sentinels().await));
    moorline_router::session_contract!(Shared::of(sentinels().await));
    moorline_router::inbox_contract!(Shared::of(sentinels().await));
    shard_cases!(sentinels().await);
}

mod cluster {
    use super::shards::shard_cases;
    use super::support::{Shared, cluster};

    moorline_router::route_contract!(Shared::of(cluster().await));
    moorline_router::ban_contract!(Shared::of(cluster().await));
    moorline_router::session_contract!(Shared::of(cluster().await));
    moorline_router::inbox_contract!(Shared::of(cluster().await));
    moorline_router::receipt_contract!(Shared::of(cluster().await));
    shard_cases!(cluster().await);
}
