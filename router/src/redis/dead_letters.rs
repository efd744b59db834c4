//! Dead letters of the upstream bus, and the workers of it. Both are few: each is in one slot.
//!
//! A letter has an id that orders letters by time and tells one that is stored twice. It is found in the order of these, and by the
//! id of its message, of which there may be several letters.

use std::time::Duration;

use super::RedisStore;
use super::reply::parse;
use super::script::{Call, Script, script};
use crate::record::format;
use crate::{DeadLetter, MessageId, StoreError};

static ADD: Script = script!("dead_letter_add.lua");
static PAGE: Script = script!("dead_letter_page.lua");
static REMOVE: Script = script!("dead_letter_remove.lua");
static RENEW: Script = script!("workers_renew.lua");

pub(super) static SCRIPTS: [&Script; 4] = [&ADD, &PAGE, &REMOVE, &RENEW];

/// Beyond either, dead letters stay in their queue on the broker, and beyond its limit in the queues of the rules.
const LETTERS_MAX: u32 = 100_000;
const LETTERS_BYTES_MAX: u64 = 1 << 30;

const DEAD: &str = "dead";
const WORKERS: &str = "workers";

impl RedisStore {
    fn dead_keys(&self) -> [String; 4] {
        ["letters", "order", "of", "bytes"].map(|kind| self.keys.global(DEAD, kind))
    }

    /// Keeps a letter; durable on return. Once more with the same id changes nothing.
    pub(crate) async fn add_dead_letter(
        &self,
        id: &str,
        letter: &DeadLetter,
    ) -> Result<(), StoreError> {
        let call = Call::script(&ADD, &self.dead_keys())
            .arg(id)
            .arg(letter.message.id.as_str())
            .arg(format::dead_letter(id.as_bytes(), letter))
            .arg(LETTERS_MAX)
            .arg(LETTERS_BYTES_MAX);
        let kept: bool = parse(self.link.submit(DEAD, call).await?)?;
        if kept {
            return Ok(());
        }
        let text = format!("there are {LETTERS_MAX} dead letters or {LETTERS_BYTES_MAX} bytes");
        Err(StoreError::Full(text))
    }

    /// As [`crate::UpstreamBus::dead_letters`].
    pub(crate) async fn dead_letters_page(
        &self,
        after: Option<&MessageId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let call = Call::script(&PAGE, &self.dead_keys()[..3])
            .arg(after.map_or("", MessageId::as_str))
            .arg(limit.max(1));
        let found: Vec<(String, Vec<u8>)> = parse(self.link.read(call).await?)?;
        let parsed = found
            .iter()
            .map(|(id, record)| format::parse_dead_letter(id.as_bytes(), record));
        parsed.collect()
    }

    /// All letters of a message, with their ids, oldest first.
    pub(crate) async fn dead_letters_of(
        &self,
        message: &MessageId,
    ) -> Result<Vec<(String, DeadLetter)>, StoreError> {
        let [letters, _, of, _] = self.dead_keys();
        let call = Call::command("ZRANGEBYLEX", &of)
            .arg(format!("[{message} "))
            .arg(format!("({message}!"));
        let members: Vec<String> = parse(self.link.read(call).await?)?;
        let mut found = Vec::with_capacity(members.len());
        for member in members {
            let id = member.split_once(' ').map_or("", |(_, id)| id);
            let call = Call::command("HGET", &letters).arg(id);
            let record: Option<Vec<u8>> = parse(self.link.read(call).await?)?;
            if let Some(record) = record {
                let letter = format::parse_dead_letter(id.as_bytes(), &record)?;
                found.push((id.to_owned(), letter));
            }
        }
        Ok(found)
    }

    /// Forgets letters of a message.
    pub(crate) async fn remove_dead_letters(
        &self,
        message: &MessageId,
        letters: &[String],
    ) -> Result<(), StoreError> {
        let call = Call::script(&REMOVE, &self.dead_keys())
            .arg(message.as_str())
            .arg(letters);
        self.link.submit(DEAD, call).await.map(drop)
    }

    /// Makes a worker known for the time of a lease, and says which ones there are.
    pub(crate) async fn renew_worker(
        &self,
        worker: &str,
        lease: Duration,
    ) -> Result<Vec<String>, StoreError> {
        let lease = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        let keys = [self.keys.global(WORKERS, "leases")];
        let call = Call::script(&RENEW, &keys).arg(worker).arg(lease);
        parse(self.link.submit(WORKERS, call).await?)
    }

    /// The worker takes nothing any more.
    pub(crate) async fn forget_worker(&self, worker: &str) -> Result<(), StoreError> {
        let key = self.keys.global(WORKERS, "leases");
        let call = Call::command("ZREM", &key).arg(worker);
        self.link.submit(WORKERS, call).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fixture;
    use super::*;
    use crate::contract::upstream::message;
    use crate::{QueueName, UpstreamMessage};

    fn letter(message: &UpstreamMessage, reason: &str) -> (String, DeadLetter) {
        let letter = DeadLetter {
            queue: QueueName::new("rule"),
            message: message.clone(),
            reason: reason.to_owned(),
            attempts: 2,
            at_ms: 1,
        };
        (MessageId::generate().to_string(), letter)
    }

    #[tokio::test]
    async fn letters_are_paged_by_message_and_forgotten() {
        let fixture = Fixture::start();
        let store = &fixture.store;
        let (first, second) = (message("a", "1"), message("a", "2"));
        let all = [
            letter(&first, "x"),
            letter(&second, "y"),
            letter(&first, "z"),
        ];
        for (id, letter) in &all {
            store.add_dead_letter(id, letter).await.unwrap();
            store.add_dead_letter(id, letter).await.unwrap();
        }
        let page = |after: Option<MessageId>| async move {
            store.dead_letters_page(after.as_ref(), 1).await.unwrap()
        };
        let whole: Vec<_> = all.iter().map(|(_, letter)| letter.clone()).collect();
        let to_the_second = &whole[..2];
        assert_eq!(page(None).await, to_the_second, "it has no newer letter");
        assert!(page(Some(first.id.clone())).await.is_empty());
        assert_eq!(page(Some(second.id.clone())).await, whole[2..]);
        let found = store.dead_letters_of(&first.id).await.unwrap();
        assert_eq!(found, [all[0].clone(), all[2].clone()]);
        let ids: Vec<_> = found.into_iter().map(|(id, _)| id).collect();
        store.remove_dead_letters(&first.id, &ids).await.unwrap();
        assert_eq!(page(None).await, whole[1..2]);
        store
            .remove_dead_letters(&second.id, &[all[1].0.clone()])
            .await
            .unwrap();
        assert!(page(None).await.is_empty());
    }

    #[tokio::test]
    async fn a_worker_is_known_for_its_lease() {
        let fixture = Fixture::start();
        let store = &fixture.store;
        let long = Duration::from_secs(60);
        store
            .renew_worker("a", Duration::from_millis(1))
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(store.renew_worker("b", long).await.unwrap(), ["b"]);
        let mut both = store.renew_worker("c", long).await.unwrap();
        both.sort_unstable();
        assert_eq!(both, ["b", "c"]);
        store.forget_worker("b").await.unwrap();
        assert_eq!(store.renew_worker("c", long).await.unwrap(), ["c"]);
    }
}
