//! From the embedded store of one machine to Redis: everything that devices and backends were promised.
//!
//! The embedded store is only read. Everything is written so that a migration which was interrupted can be made again from
//! the beginning: entries keep their positions, and what stands there already stays as it is.
//!
//! Not taken over are messages that wait upstream and dead letters: they are the upstream bus' (the report names them), and
//! routes: devices connect again.

use std::collections::{BTreeMap, HashMap};

use futures_util::future::join_all;
use tokio::sync::watch;

use crate::embedded::EmbeddedStore;
use crate::redis::{Migration, RedisStore};
use crate::{
    Bans, ClientId, Epoch, Inboxes, JobCursor, JobFilter, JobId, JobPage, Jobs, Origin, Position,
    QueueName, Retained, Routes, SessionRecord, Sessions, Shards, StoreError, StoredWill,
    TimerKind, unix_ms,
};
use moorline_mqtt::QoS;

const PAGE: usize = 256;
const PAGE_BYTES: usize = 4 << 20;

/// What was taken over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Migrated {
    /// Persistent sessions.
    pub sessions: u64,
    /// Packet identifiers of QoS 2 messages that were not released yet.
    pub received: u64,
    /// Wills that are still to be published.
    pub wills: u64,
    /// Inboxes in which something waits.
    pub inboxes: u64,
    /// Their messages.
    pub messages: u64,
    /// Of these, those that an earlier attempt had taken over.
    pub messages_there: u64,
    /// Receipts of messages that have ended.
    pub receipts: u64,
    /// Retained messages.
    pub retained: u64,
    /// Bans.
    pub bans: u64,
    /// Delayed jobs, those that ended and are still kept included.
    pub jobs: u64,
    /// Of these, those that an earlier attempt had taken over.
    pub jobs_there: u64,
    /// Events of delayed jobs that are remembered, those that are still to be driven included.
    pub job_events: u64,
    /// Messages that stay behind in upstream queues.
    pub left_upstream: BTreeMap<QueueName, u64>,
    /// Dead letters that stay behind.
    pub left_dead_letters: u64,
}

/// Why a migration was not made, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// Redis is in use.
    #[error("{0} node(s) run on this Redis: stop them first, and wait until their leases are over")]
    InUse(usize),
    /// A migration was made to this Redis before, to its end.
    #[error("a migration to this Redis, under the same key prefix, was completed before")]
    Done,
    /// Redis holds something already.
    #[error("this Redis holds {0} already, under the same key prefix")]
    NotEmpty(&'static str),
    /// A client has something in both stores.
    #[error("client {0} has a session or messages in both stores")]
    InBoth(ClientId),
    /// A delayed job is in both stores.
    #[error("delayed job {0} is in both stores")]
    JobInBoth(JobId),
    /// One of the two stores.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Copies everything. Refuses a Redis that holds something, but for what an interrupted migration left there; with
/// `into_existing` only one that holds something of a client that is to be copied. What was copied so far is told to `progress`.
///
/// # Errors
/// When Redis is in use or holds something, or when a store fails: then the migration can be made again.
pub async fn migrate(
    from: &EmbeddedStore,
    to: &RedisStore,
    into_existing: bool,
    progress: &watch::Sender<Migrated>,
) -> Result<Migrated, MigrateError> {
    let nodes = to.nodes().await?.len();
    if nodes > 0 {
        return Err(MigrateError::InUse(nodes));
    }
    match to.migration().await? {
        Some(Migration::Running) => {}
        Some(Migration::Done) if !into_existing => return Err(MigrateError::Done),
        _ => {
            match into_existing {
                true => check_nobody_is_in_both(from, to).await?,
                false => {
                    if let Some(what) = to.holds().await? {
                        return Err(MigrateError::NotEmpty(what));
                    }
                }
            }
            to.set_migration(Migration::Running).await?;
        }
    }
    let (left_upstream, left_dead_letters) = from.upstream_left().await?;
    let mut migrated = Migrated {
        left_upstream,
        left_dead_letters,
        ..Migrated::default()
    };
    let sessions = Sessions::load_all(from).await?;
    let wills: HashMap<_, _> = from.load_wills().await?.into_iter().collect();
    inboxes(from, to, &sessions, &mut migrated, progress).await?;
    copy_sessions(from, to, &sessions, &wills, &mut migrated, progress).await?;
    copy_wills(to, &sessions, wills, &mut migrated).await?;
    receipts(from, to, &mut migrated, progress).await?;
    for retained in Retained::load_all(from).await?.chunks(PAGE) {
        let sets = retained
            .iter()
            .map(|message| to.set(&message.topic, Some(message), None));
        all(sets.collect()).await?;
        migrated.retained += retained.len() as u64;
        progress.send_replace(migrated.clone());
    }
    for ban in Bans::load_all(from).await? {
        Bans::save(to, ban).await?;
        migrated.bans += 1;
    }
    delayed_jobs(from, to, &mut migrated, progress).await?;
    to.set_migration(Migration::Done).await?;
    Ok(migrated)
}

/// Waits for all; the first error.
async fn all<F: Future<Output = Result<(), StoreError>>>(writes: Vec<F>) -> Result<(), StoreError> {
    join_all(writes).await.into_iter().collect()
}

/// Every client for which something waits.
async fn waiting(
    from: &EmbeddedStore,
    after: Option<&ClientId>,
) -> Result<Vec<ClientId>, StoreError> {
    from.clients_waiting(after, PAGE).await
}

async fn check_nobody_is_in_both(
    from: &EmbeddedStore,
    to: &RedisStore,
) -> Result<(), MigrateError> {
    for session in Sessions::load_all(from).await? {
        if to.load(&session.client).await?.is_some() {
            return Err(MigrateError::InBoth(session.client));
        }
    }
    let mut after = None;
    loop {
        let clients = waiting(from, after.as_ref()).await?;
        let tails = to.tails(&clients).await?;
        if let Some((client, _)) = clients.iter().zip(tails).find(|(_, tail)| tail.is_some()) {
            return Err(MigrateError::InBoth(client.clone()));
        }
        match clients.last() {
            Some(last) => after = Some(last.clone()),
            None => break,
        }
    }
    let (jobs, mut after) = (to.jobs(), None);
    loop {
        let page = jobs_after(from, after.as_ref()).await?;
        let known = page.jobs.iter().map(|job| jobs.get(&job.id));
        for known in join_all(known).await {
            if let Some(job) = known? {
                return Err(MigrateError::JobInBoth(job.id));
            }
        }
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok(()),
        }
    }
}

/// Delayed jobs in the order of their ids.
async fn jobs_after(
    from: &EmbeddedStore,
    after: Option<&JobCursor>,
) -> Result<JobPage, StoreError> {
    let all = JobFilter {
        prefix: Some(String::new()),
        ..JobFilter::default()
    };
    Jobs::list(from, &all, after, PAGE).await
}

/// Jobs before the events: one that is still to be driven finds them there.
async fn delayed_jobs(
    from: &EmbeddedStore,
    to: &RedisStore,
    migrated: &mut Migrated,
    progress: &watch::Sender<Migrated>,
) -> Result<(), MigrateError> {
    let jobs = to.jobs();
    let mut after = None;
    loop {
        let page = jobs_after(from, after.as_ref()).await?;
        let taken = jobs.import(&page.jobs).await?;
        migrated.jobs += page.jobs.len() as u64;
        migrated.jobs_there += page.jobs.len() as u64 - taken;
        progress.send_replace(migrated.clone());
        match page.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    let mut after = None;
    loop {
        let page = from.job_events(after, PAGE).await?;
        after = page.last().map(|(key, _)| key.clone());
        if page.is_empty() {
            return Ok(());
        }
        migrated.job_events += page.len() as u64;
        let imported = page.iter().map(|(_, record)| jobs.import_event(record));
        all(imported.collect()).await?;
    }
}

async fn inboxes(
    from: &EmbeddedStore,
    to: &RedisStore,
    sessions: &[SessionRecord],
    migrated: &mut Migrated,
    progress: &watch::Sender<Migrated>,
) -> Result<(), MigrateError> {
    let was_connected: HashMap<&ClientId, bool> = sessions
        .iter()
        .map(|session| (&session.client, session.disconnected_at_ms.is_none()))
        .collect();
    let mut after = None;
    loop {
        let clients = waiting(from, after.as_ref()).await?;
        for client in &clients {
            let was_connected = was_connected.get(client).copied().unwrap_or(false);
            inbox(from, to, client, was_connected, migrated).await?;
            progress.send_replace(migrated.clone());
        }
        match clients.last() {
            Some(last) => after = Some(last.clone()),
            None => return Ok(()),
        }
    }
}

async fn inbox(
    from: &EmbeddedStore,
    to: &RedisStore,
    client: &ClientId,
    was_connected: bool,
    migrated: &mut Migrated,
) -> Result<(), MigrateError> {
    let mut after = Position::START;
    let mut is_empty = true;
    loop {
        let mut page = from.read(client, after, PAGE, PAGE_BYTES).await?;
        let mut fingerprints = Vec::with_capacity(page.entries.len());
        for entry in &mut page.entries {
            // What had been sent in the last moments is not known: such a message is not to reach another member
            // [MQTT-4.8.2-5].
            let shared_once =
                entry.message.share.is_some() && entry.message.qos == QoS::ExactlyOnce;
            entry.maybe_sent |= was_connected && shared_once;
            fingerprints.push(match entry.message.origin {
                Origin::Push => from.fingerprint(&entry.message.id).await?,
                Origin::Session => None,
            });
        }
        let count = page.entries.len() as u64;
        is_empty &= count == 0;
        let taken = to
            .import_entries(client, page.entries, fingerprints)
            .await?;
        migrated.messages += count;
        migrated.messages_there += count - taken;
        if !page.more {
            migrated.inboxes += u64::from(!is_empty);
            return Ok(());
        }
        after = page.read_to;
    }
}

/// The connection that a session had last, as far as that is known.
fn last_epoch(wills: &HashMap<ClientId, StoredWill>, client: &ClientId) -> Epoch {
    wills.get(client).map_or(Epoch(0), |will| will.epoch)
}

async fn copy_sessions(
    from: &EmbeddedStore,
    to: &RedisStore,
    sessions: &[SessionRecord],
    wills: &HashMap<ClientId, StoredWill>,
    migrated: &mut Migrated,
    progress: &watch::Sender<Migrated>,
) -> Result<(), MigrateError> {
    for session in sessions {
        let client = &session.client;
        let epoch = last_epoch(wills, client);
        // One that was connected when the process died is counted from now on.
        let disconnected_at_ms = session.disconnected_at_ms.unwrap_or_else(unix_ms);
        let mut writes = vec![Sessions::save(
            to,
            epoch,
            SessionRecord {
                disconnected_at_ms: Some(disconnected_at_ms),
                ..session.clone()
            },
        )];
        for received in from.received(client).await? {
            migrated.received += 1;
            writes.push(to.save_received(client, epoch, received));
        }
        if session.expiry_interval_s < u32::MAX {
            let ends_at_ms = disconnected_at_ms + u64::from(session.expiry_interval_s) * 1_000;
            let in_ms = ends_at_ms.saturating_sub(unix_ms());
            writes.push(to.set_timer(client, TimerKind::SessionExpiry, epoch, in_ms));
        }
        all(writes).await?;
        migrated.sessions += 1;
        progress.send_replace(migrated.clone());
    }
    Ok(())
}

/// Whoever still has a will was connected when the process died: it is published, after its delay if the session lasts
/// that long, by the node that sees to the client.
async fn copy_wills(
    to: &RedisStore,
    sessions: &[SessionRecord],
    wills: HashMap<ClientId, StoredWill>,
    migrated: &mut Migrated,
) -> Result<(), MigrateError> {
    let persistent: HashMap<_, _> = sessions
        .iter()
        .map(|session| (&session.client, session.expiry_interval_s))
        .collect();
    for (client, stored) in wills {
        let goes_on = persistent
            .get(&client)
            .is_some_and(|expiry_s| *expiry_s > 0);
        let delay_s = if goes_on {
            stored.will.delay_interval_s
        } else {
            0
        };
        let epoch = stored.epoch;
        to.save_will(&client, stored).await?;
        let in_ms = u64::from(delay_s) * 1_000;
        to.set_timer(&client, TimerKind::Will, epoch, in_ms).await?;
        migrated.wills += 1;
    }
    Ok(())
}

/// They are found by message id, and refuse a repetition of what has ended.
async fn receipts(
    from: &EmbeddedStore,
    to: &RedisStore,
    migrated: &mut Migrated,
    progress: &watch::Sender<Migrated>,
) -> Result<(), MigrateError> {
    let mut after = None;
    loop {
        let page = from.final_receipts(after, PAGE).await?;
        after = page.last().map(|kept| kept.key.clone());
        if page.is_empty() {
            return Ok(());
        }
        migrated.receipts += page.len() as u64;
        let records = page
            .into_iter()
            .map(|kept| to.record(kept.receipt, kept.fingerprint));
        for recorded in join_all(records).await {
            recorded?;
        }
        progress.send_replace(migrated.clone());
    }
}
