//! `moorline migrate`: from the data directory of one machine to the Redis of a cluster.
//!
//! The gateway on the data directory has to be stopped, and no node may run on the Redis yet. What it does is in
//! [`moorline_router::migrate`]; here it is told to the operator: on standard error what is being done, on standard output what was.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use moorline_router::embedded::{EmbeddedStore, OpenError};
use moorline_router::migrate::{MigrateError, Migrated, migrate};
use moorline_router::redis::{Config as RedisConfig, RedisStore};
use tokio::sync::watch;

use crate::Failure;
use crate::cli::MigrateOptions;
use crate::config::Config;

/// Between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Copies, and prints what was copied.
pub(crate) fn run(asked: &MigrateOptions, config: &Config) -> Result<(), Failure> {
    let redis = redis_config(asked, config)?;
    let data_dir = config.data_dir.display();
    if !config.data_dir.join("FORMAT").exists() {
        return Err(Failure::Usage(format!(
            "{data_dir} is no data directory of Moorline: --data-dir says which one to copy"
        )));
    }
    let mut store = config.store.clone();
    store.data_dir.clone_from(&config.data_dir);
    let from = EmbeddedStore::open(store).map_err(|error| match error {
        OpenError::InUse { .. } => Failure::Usage(format!("{error}: stop the gateway first")),
        error => Failure::Usage(error.to_string()),
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .context("cannot start the runtime")?;
    let migrated = runtime.block_on(async {
        let to = RedisStore::open(&redis, config.shared_limits())
            .map_err(|error| Failure::Usage(format!("redis: {error}")))?;
        copy(&from, &to, asked.into_existing).await
    })?;
    from.close().context("cannot close the data directory")?;
    crate::roles::say(&report(&migrated));
    Ok(())
}

async fn copy(
    from: &Arc<EmbeddedStore>,
    to: &Arc<RedisStore>,
    into_existing: bool,
) -> Result<Migrated, Failure> {
    let progress = watch::Sender::default();
    let mut told = progress.subscribe();
    let mut migrating = Box::pin(migrate(from, to, into_existing, &progress));
    let mut ticks = tokio::time::interval(PROGRESS_EVERY);
    let migrated = loop {
        tokio::select! {
            migrated = &mut migrating => break migrated,
            _ = ticks.tick() => {
                // An error says that it has ended, which is seen above.
                if told.has_changed().unwrap_or(false) {
                    tell(&format!("copied so far: {}", so_far(&told.borrow_and_update())));
                }
            }
        }
    };
    let migrated = migrated.map_err(|error| match error {
        MigrateError::Done => Failure::Usage(format!(
            "{error}: nothing is left to do (--into-existing copies another data directory, where no device is in both)"
        )),
        MigrateError::NotEmpty(_) => Failure::Usage(format!(
            "{error}: choose another --key-prefix, or copy nevertheless with --into-existing, where no device is in both"
        )),
        MigrateError::InUse(_) | MigrateError::InBoth(_) | MigrateError::JobInBoth(_) => {
            Failure::Usage(error.to_string())
        }
        MigrateError::Store(error) => Failure::Other(anyhow::anyhow!(
            "{error}; nothing is lost: the data directory is as it was, run this again"
        )),
    })?;
    for warning in to.health().await.warnings {
        tell(&format!("warning: redis: {warning}"));
    }
    Ok(migrated)
}

#[expect(
    clippy::print_stderr,
    reason = "what a person who waits is told meanwhile"
)]
fn tell(text: &str) {
    eprintln!("moorline: {text}");
}

fn so_far(migrated: &Migrated) -> String {
    format!(
        "{} messages of {} devices, {} sessions, {} receipts, {} retained messages, {} delayed jobs",
        migrated.messages,
        migrated.inboxes,
        migrated.sessions,
        migrated.receipts,
        migrated.retained,
        migrated.jobs
    )
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
        ("delayed jobs", migrated.jobs),
        ("events of delayed jobs", migrated.job_events),
    ] {
        let _ = writeln!(text, "{count} {what} copied");
    }
    for (what, there) in [
        ("messages", migrated.messages_there),
        ("delayed jobs", migrated.jobs_there),
    ] {
        if there > 0 {
            let _ = writeln!(
                text,
                "of the {what} {there} were there from an earlier attempt"
            );
        }
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
            "what is left is in the data directory: run the gateway on it, where no device can reach it, until backends have taken it\n",
        );
    }
    text.push_str(
        "done: start the nodes on this Redis; devices must not go to the old gateway any more\n",
    );
    text
}
