//! `moorline migrate`: from the data directory of one machine to the Redis of a cluster.
//!
//! The gateway on the data directory has to be stopped, and no node may run on the Redis yet. What it does is in
//! [`moorline_router::migrate`]; here it is told to the operator.

use std::fmt::Write as _;

use anyhow::Context as _;
use moorline_router::embedded::EmbeddedStore;
use moorline_router::migrate::{MigrateError, Migrated, migrate};
use moorline_router::redis::{Config as RedisConfig, Limits, RedisStore};

use crate::Failure;
use crate::cli::MigrateOptions;
use crate::config::Config;

/// Copies, and prints what was copied.
pub(crate) fn run(asked: &MigrateOptions, config: &Config) -> Result<(), Failure> {
    let redis = redis_config(asked, config)?;
    if !config.data_dir.join("FORMAT").exists() {
        let why = format!(
            "{} is no data directory of Moorline",
            config.data_dir.display()
        );
        return Err(Failure::Usage(why));
    }
    let mut store = config.store.clone();
    store.data_dir.clone_from(&config.data_dir);
    let limits = Limits {
        inbox: store.inbox,
        receipt_retention: store.receipt_retention,
        receipts_bytes_max: store.receipts_bytes_max,
    };
    let from = EmbeddedStore::open(store).map_err(|error| Failure::Usage(error.to_string()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .context("cannot start the runtime")?;
    let migrated = runtime.block_on(async {
        let to =
            RedisStore::open(&redis, limits).map_err(|error| Failure::Usage(error.to_string()))?;
        let migrated = Box::pin(migrate(&from, &to, asked.into_existing)).await;
        migrated.map_err(|error| match error {
            MigrateError::NotEmpty(_) => Failure::Usage(format!(
                "{error}; --into-existing copies nevertheless, where no device is in both"
            )),
            MigrateError::InUse(_) | MigrateError::InBoth(_) => Failure::Usage(error.to_string()),
            MigrateError::Store(error) => Failure::Other(anyhow::anyhow!(
                "{error}; nothing is lost: the data directory is as it was, run this again"
            )),
        })
    })?;
    from.close().context("cannot close the data directory")?;
    crate::roles::say(&report(&migrated));
    Ok(())
}

fn redis_config(asked: &MigrateOptions, config: &Config) -> Result<RedisConfig, Failure> {
    let mut redis = match &asked.to {
        Some(url) => RedisConfig {
            url: url.clone(),
            key_prefix: config.redis.key_prefix.clone(),
            ..RedisConfig::default()
        },
        None => config.redis.clone(),
    };
    if let Some(prefix) = &asked.key_prefix {
        redis.key_prefix.clone_from(prefix);
    }
    if !redis.is_on() {
        let why = "where to? Give --to redis://HOST:PORT, or a configuration with [redis]";
        return Err(Failure::Usage(why.into()));
    }
    redis.validate().map_err(Failure::Usage)?;
    Ok(redis)
}

fn report(migrated: &Migrated) -> String {
    let mut text = String::new();
    for (what, count) in [
        ("sessions", migrated.sessions),
        ("unreleased QoS 2 identifiers", migrated.received),
        ("wills", migrated.wills),
        ("inboxes", migrated.inboxes),
        ("messages", migrated.messages),
        ("receipts", migrated.receipts),
        ("retained messages", migrated.retained),
        ("bans", migrated.bans),
    ] {
        let _ = writeln!(text, "{count} {what} copied");
    }
    if migrated.messages_there > 0 {
        let there = migrated.messages_there;
        let _ = writeln!(
            text,
            "{there} of the messages were there from an earlier attempt"
        );
    }
    for (queue, count) in &migrated.left_upstream {
        let _ = writeln!(text, "{count} messages left in upstream queue {queue}");
    }
    if migrated.left_dead_letters > 0 {
        let letters = migrated.left_dead_letters;
        let _ = writeln!(text, "{letters} dead letters left");
    }
    if !migrated.left_upstream.is_empty() || migrated.left_dead_letters > 0 {
        text.push_str(
            "what is left is in the data directory: run the gateway on it, without devices, until backends have taken it\n",
        );
    }
    text.push_str("done\n");
    text
}
