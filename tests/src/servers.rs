//! The servers a cluster stands on, as child processes on free ports of loopback.
//!
//! [`RedisServer`], [`RabbitServer`] and [`Proxy`] are what most tests need; [`Sentinels`] and [`RedisCluster`] are Redis with
//! a failover. Each is ready when `start` returns, and each answer is known to come from the process that was started: the
//! listening socket is looked up among its open files. A test that panics, and a test program that is killed, leave
//! nothing behind: see [`process`].
//!
//! `shared()` gives the one of this test program. It takes RabbitMQ seconds to start, so tests share it and each takes a
//! virtual host of its own; of a shared Redis each takes a key prefix of its own.

pub mod process;
mod proxy;
mod rabbit;
mod redis;
mod redis_cluster;
mod sentinel;

pub use proxy::Proxy;
pub use rabbit::{RabbitServer, VirtualHost};
pub use redis::{RedisServer, Reply};
pub use redis_cluster::RedisCluster;
pub use sentinel::{MASTER_NAME, Sentinels};

use std::sync::atomic::{AtomicU64, Ordering};

/// A name that no other test of this run has: for key prefixes, queue prefixes and virtual hosts.
pub fn unique(what: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{what}-{}-{number}", std::process::id())
}
