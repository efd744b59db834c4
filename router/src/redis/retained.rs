//! Retained messages: all in one slot, with a number for each change, so that a node asks only for what is new to it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};
use moorline_mqtt::{ByteString, TopicName};
use parking_lot::Mutex;
use redis::Value;

use super::RedisStore;
use super::reply::parse;
use super::script::{Call, Script, script};
use crate::record::format;
use crate::{Message, Retained, RetainedChanges, RetainedMoment, RetainedVersion, StoreError};

static SET: Script = script!("retained_set.lua");
static CHANGES: Script = script!("retained_changes.lua");
static EXPIRE: Script = script!("retained_expire.lua");

pub(super) static SCRIPTS: &[&Script] = &[&SET, &CHANGES, &EXPIRE];

/// Removed topics that are remembered: a node that has missed more than that begins anew.
const REMOVED_MAX: usize = 10_000;
/// Changes in one answer.
const PAGE: usize = 500;

/// The store's clock as far as this process knows it, so that it knows the time also while the store is out of reach: never less
/// than that is, and more by as long as the fastest answer took.
#[derive(Debug, Default)]
pub(super) struct StoreClock(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    said: Option<Said>,
    last: u64,
}

/// The store said this time after it was asked at that moment.
#[derive(Debug, Clone, Copy)]
struct Said {
    asked_at: Instant,
    time_us: u64,
}

impl Said {
    fn time_at(&self, moment: Instant) -> u64 {
        let since = moment.saturating_duration_since(self.asked_at);
        let since_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        self.time_us.saturating_add(since_us)
    }
}

impl StoreClock {
    fn is_unknown(&self) -> bool {
        self.0.lock().said.is_none()
    }

    fn said(&self, asked_at: Instant, time_us: u64) {
        let mut known = self.0.lock();
        let as_known = known.said.is_some_and(|said| {
            (said.time_at(asked_at)..=said.time_at(Instant::now())).contains(&time_us)
        });
        if !as_known {
            known.said = Some(Said { asked_at, time_us });
        }
    }

    /// Each time a later one.
    fn now(&self) -> Option<RetainedMoment> {
        let mut known = self.0.lock();
        let now = known.said?.time_at(Instant::now());
        known.last = now.max(known.last + 1);
        Some(RetainedMoment(known.last))
    }
}

/// What one answer says.
struct Page {
    generation: u64,
    /// Of all changes there are.
    newest: u64,
    anew: bool,
    changes: Vec<(String, u64, Option<Vec<u8>>)>,
}

impl RedisStore {
    fn retained_keys(&self) -> [String; 4] {
        ["messages", "changes", "removed", "state"].map(|kind| self.retained_key(kind))
    }

    fn retained_key(&self, kind: &str) -> String {
        self.keys.global("retained", kind)
    }

    async fn retained_page(&self, since: RetainedVersion) -> Result<Page, StoreError> {
        let page = Call::script(&CHANGES, &self.retained_keys())
            .arg(since.generation)
            .arg(since.change)
            .arg(PAGE);
        let asked_at = Instant::now();
        let mut answer = parse::<Vec<Value>>(self.link.read(page).await?)?.into_iter();
        let mut number = || parse::<u64>(answer.next().unwrap_or_default());
        let (generation, newest, anew) = (number()?, number()?, number()? == 1);
        self.retained_clock.said(asked_at, number()?);
        let mut changes = Vec::new();
        while let Some(topic) = answer.next() {
            let change = parse(answer.next().unwrap_or_default())?;
            changes.push((
                parse(topic)?,
                change,
                parse(answer.next().unwrap_or_default())?,
            ));
        }
        Ok(Page {
            generation,
            newest,
            anew,
            changes,
        })
    }

    /// Everything since `since`, page by page. A topic that changes meanwhile comes once, as it was last.
    async fn retained_since(&self, since: RetainedVersion) -> Result<RetainedChanges, StoreError> {
        if self.retained_clock.is_unknown() {
            // The first answer may have had to wait for a connection, which says little about the time.
            self.retained_page(since).await?;
        }
        let mut version = since;
        let mut complete = false;
        let mut newest: HashMap<String, (u64, Option<Vec<u8>>)> = HashMap::new();
        loop {
            let page = self.retained_page(version).await?;
            if page.anew {
                complete = true;
                newest.clear();
            }
            version.generation = page.generation;
            let full = page.changes.len() == PAGE;
            // Without a change on the page there is none behind it.
            version.change = page
                .changes
                .last()
                .map_or(page.newest, |(_, change, _)| *change);
            for (topic, change, record) in page.changes {
                newest.insert(topic, (change, record));
            }
            if !full {
                break;
            }
        }
        let mut changed: Vec<_> = newest.into_iter().collect();
        changed.sort_by_key(|(_, (change, _))| *change);
        let mut topics = Vec::with_capacity(changed.len());
        for (topic, (_, record)) in changed {
            let message = record
                .map(|record| self.read_retained(&topic, &record))
                .transpose()?;
            if message.is_some() || !complete {
                topics.push((parse_topic(&topic)?, message));
            }
        }
        Ok(RetainedChanges {
            version,
            complete,
            topics,
        })
    }

    /// A record is tied to its topic, not only to the key of them all.
    fn retained_record_key(&self, topic: &str) -> String {
        self.keys.global("retained", topic)
    }

    fn read_retained(&self, topic: &str, record: &[u8]) -> Result<Message, StoreError> {
        format::parse_message(self.retained_record_key(topic).as_bytes(), record)
    }
}

fn parse_topic(topic: &str) -> Result<TopicName, StoreError> {
    TopicName::parse(ByteString::from(topic))
        .map_err(|_| StoreError::Damaged("a retained message of an impossible topic".into()))
}

#[async_trait]
impl Retained for RedisStore {
    async fn load_all(&self) -> Result<Vec<Message>, StoreError> {
        let all = self.retained_since(RetainedVersion::default()).await?;
        let mut messages: Vec<_> = all
            .topics
            .into_iter()
            .filter_map(|(_, message)| message)
            .collect();
        messages.sort_by(|one, other| one.topic.as_str().cmp(other.topic.as_str()));
        Ok(messages)
    }

    async fn changes(&self, since: RetainedVersion) -> Result<Option<RetainedChanges>, StoreError> {
        self.retained_since(since).await.map(Some)
    }

    fn now(&self) -> Option<RetainedMoment> {
        self.retained_clock.now()
    }

    fn set(
        &self,
        topic: &TopicName,
        message: Option<&Message>,
        asked: Option<RetainedMoment>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let record = match message {
            Some(message) => {
                if let Err(error) = format::check_properties(message.properties.as_deref()) {
                    return async { Err(error) }.boxed();
                }
                format::message(self.retained_record_key(topic.as_str()).as_bytes(), message)
            }
            None => Vec::new(),
        };
        let [messages, changes, removed, state] = self.retained_keys();
        let keys = [
            messages,
            changes,
            removed,
            state,
            self.retained_key("expiry"),
            self.retained_key("asked"),
        ];
        let expires_at_ms = message.and_then(|message| message.expires_at_ms);
        let set = Call::script(&SET, &keys)
            .arg(topic.as_str())
            .arg(record)
            .arg(REMOVED_MAX)
            .arg(expires_at_ms.map_or(String::new(), |at_ms| at_ms.to_string()))
            .arg(asked.map_or(String::new(), |moment| moment.0.to_string()));
        let (clock, asked_at) = (Arc::clone(&self.retained_clock), Instant::now());
        let set = self.link.submit(topic.as_str(), set);
        async move {
            clock.said(asked_at, parse(set.await?)?);
            Ok(())
        }
        .boxed()
    }

    async fn expire(&self, limit: usize) -> Result<usize, StoreError> {
        let keys = ["messages", "changes", "expiry", "asked"].map(|kind| self.retained_key(kind));
        let expire = Call::script(&EXPIRE, &keys).arg(limit);
        parse(self.link.submit(&keys[0], expire).await?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_clock_of_the_store_is_known_as_well_as_its_fastest_answer_tells() {
        let clock = StoreClock::default();
        assert!(clock.is_unknown() && clock.now().is_none());
        let told = Instant::now();
        let before = |ms| told.checked_sub(Duration::from_millis(ms)).unwrap();
        let time_when_told = || clock.0.lock().said.unwrap().time_at(told);
        clock.said(before(500), 10_000_000);
        assert_eq!(time_when_told(), 10_500_000);
        // A faster answer, and a slower one.
        clock.said(before(100), 10_000_000);
        assert_eq!(time_when_told(), 10_100_000);
        clock.said(before(900), 10_000_000);
        assert_eq!(time_when_told(), 10_100_000);
        // Later than it can be: it is another server's.
        clock.said(before(10), 20_000_000);
        assert_eq!(time_when_told(), 20_010_000);
        let first = clock.now().unwrap();
        assert!(clock.now().unwrap() > first);
    }
}
