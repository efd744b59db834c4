//! What is remembered of queues: the seam [`QueueRegistry`]. There are few groups, and few changes: all of it is in one slot.

use async_trait::async_trait;

use super::RedisStore;
use super::reply::parse;
use super::script::{Call, Script, script};
use crate::StoreError;
use crate::pubsub::{Group, QueueRegistry};

static JOIN: Script = script!("queues_join.lua");
static LEAVE: Script = script!("queues_leave.lua");

pub(super) static SCRIPTS: [&Script; 2] = [&JOIN, &LEAVE];

/// The slot, and the place of a write in the order of all of them.
const TAG: &str = "queues";

impl RedisStore {
    fn queues_key(&self, kind: &str) -> String {
        self.keys.global(TAG, kind)
    }

    fn members_key(&self, filter: &str) -> String {
        self.queues_key(&format!("members:{filter}"))
    }

    fn bound_key(&self, queue: &str) -> String {
        self.queues_key(&format!("bound:{queue}"))
    }
}

#[async_trait]
impl QueueRegistry for RedisStore {
    async fn join(
        &self,
        filter: &str,
        member: &str,
        known: Option<u64>,
    ) -> Result<(Group, bool), StoreError> {
        let keys = [
            self.queues_key("lives"),
            self.members_key(filter),
            self.queues_key("ended"),
        ];
        let known = known.map_or_else(String::new, |life| life.to_string());
        let call = Call::script(&JOIN, &keys)
            .arg(filter)
            .arg(member)
            .arg(known);
        let (generation, is_new) = parse(self.link.submit(TAG, call).await?)?;
        let filter = filter.into();
        Ok((Group { filter, generation }, is_new))
    }

    async fn is_declared(&self, group: &Group) -> Result<bool, StoreError> {
        let call = Call::command("SISMEMBER", &self.queues_key("declared")).arg(group.generation);
        parse(self.link.read(call).await?)
    }

    async fn note_declared(&self, group: &Group) -> Result<(), StoreError> {
        let call = Call::command("SADD", &self.queues_key("declared")).arg(group.generation);
        self.link.submit(TAG, call).await.map(drop)
    }

    async fn end(&self, group: &Group) -> Result<(), StoreError> {
        let call = Call::command("HSET", &self.queues_key("ended"))
            .arg(group.generation)
            .arg(&*group.filter);
        self.link.submit(TAG, call).await.map(drop)
    }

    async fn leave(&self, filter: &str, member: &str) -> Result<(), StoreError> {
        let keys = [
            self.queues_key("lives"),
            self.members_key(filter),
            self.queues_key("ended"),
        ];
        let call = Call::script(&LEAVE, &keys).arg(filter).arg(member);
        self.link.submit(TAG, call).await.map(drop)
    }

    async fn group(&self, filter: &str) -> Result<Option<Group>, StoreError> {
        let call = Call::command("HGET", &self.queues_key("lives")).arg(filter);
        let life: Option<u64> = parse(self.link.read(call).await?)?;
        Ok(life.map(|generation| Group {
            filter: filter.into(),
            generation,
        }))
    }

    async fn groups(&self) -> Result<Vec<(Group, Vec<String>)>, StoreError> {
        let call = Call::command("HGETALL", &self.queues_key("lives"));
        let lives: Vec<(String, u64)> = parse(self.link.read(call).await?)?;
        let members =
            |(filter, _): &(String, u64)| Call::command("SMEMBERS", &self.members_key(filter));
        let members = self
            .link
            .read_all(lives.iter().map(members).collect())
            .await;
        let groups = lives.into_iter().zip(members);
        let groups = groups.map(|((filter, generation), members)| {
            let group = Group {
                filter: filter.into(),
                generation,
            };
            Ok((group, parse(members?)?))
        });
        groups.collect()
    }

    async fn ended(&self) -> Result<Vec<Group>, StoreError> {
        let call = Call::command("HGETALL", &self.queues_key("ended"));
        let ended: Vec<(u64, String)> = parse(self.link.read(call).await?)?;
        let group = |(generation, filter): (u64, String)| Group {
            filter: filter.into(),
            generation,
        };
        Ok(ended.into_iter().map(group).collect())
    }

    async fn forget(&self, group: &Group) -> Result<(), StoreError> {
        let declared = Call::command("SREM", &self.queues_key("declared")).arg(group.generation);
        self.link.submit(TAG, declared).await?;
        let call = Call::command("HDEL", &self.queues_key("ended")).arg(group.generation);
        self.link.submit(TAG, call).await.map(drop)
    }

    async fn bound(&self, queue: &str) -> Result<Vec<String>, StoreError> {
        let call = Call::command("SMEMBERS", &self.bound_key(queue));
        parse(self.link.read(call).await?)
    }

    async fn note_bound(&self, queue: &str, patterns: &[String]) -> Result<(), StoreError> {
        let call = Call::command("SADD", &self.bound_key(queue)).arg(patterns);
        self.link.submit(TAG, call).await.map(drop)
    }

    async fn forget_bound(&self, queue: &str, patterns: &[String]) -> Result<(), StoreError> {
        let call = Call::command("SREM", &self.bound_key(queue)).arg(patterns);
        self.link.submit(TAG, call).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Fixture;
    use super::*;

    #[tokio::test]
    async fn a_group_lives_from_its_first_member_to_its_last() {
        let fixture = Fixture::start();
        let store = &fixture.store;
        let filter = "$share/g/a/{b}/+";
        let (first, is_new) = store.join(filter, "node:a", None).await.unwrap();
        assert!(is_new && !store.is_declared(&first).await.unwrap());
        store.note_declared(&first).await.unwrap();
        assert!(store.is_declared(&first).await.unwrap());
        let joined = store.join(filter, "shard:3", Some(7)).await.unwrap();
        assert_eq!(joined, (first.clone(), false));
        assert_eq!(store.group(filter).await.unwrap(), Some(first.clone()));
        let (group, mut members) = store.groups().await.unwrap().remove(0);
        members.sort_unstable();
        assert_eq!(
            (&group, members),
            (&first, vec!["node:a".into(), "shard:3".into()])
        );
        store.leave(filter, "node:a").await.unwrap();
        assert!(store.ended().await.unwrap().is_empty());
        store.leave(filter, "shard:3").await.unwrap();
        assert_eq!(store.ended().await.unwrap(), std::slice::from_ref(&first));
        assert_eq!(store.group(filter).await.unwrap(), None);
        let (second, _) = store.join(filter, "node:b", None).await.unwrap();
        assert!(second.generation > first.generation);
        store.forget(&first).await.unwrap();
        assert!(store.ended().await.unwrap().is_empty());
        store.leave("$share/none/x", "node:b").await.unwrap();
        assert!(store.ended().await.unwrap().is_empty());
        // The notes are lost, but not with the members.
        fixture.command("FLUSHALL", &[]).await;
        let known = Some(second.generation);
        let joined = store.join(filter, "node:b", known).await.unwrap();
        assert_eq!(joined, (second, true), "its queue may have gone");
        store.end(&first).await.unwrap();
        assert_eq!(store.ended().await.unwrap(), [first]);
    }

    #[tokio::test]
    async fn patterns_are_remembered_for_each_queue() {
        let fixture = Fixture::start();
        let store = &fixture.store;
        assert!(store.bound("q").await.unwrap().is_empty());
        let patterns = ["a.*".to_owned(), "b".to_owned()];
        store.note_bound("q", &patterns).await.unwrap();
        store.forget_bound("q", &patterns[..1]).await.unwrap();
        assert_eq!(store.bound("q").await.unwrap(), ["b"]);
        assert!(store.bound("other").await.unwrap().is_empty());
    }
}
