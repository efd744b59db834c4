//! Persistent sessions, wills, and received QoS 2 packet identifiers.

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};
use moorline_mqtt::PacketId;

use super::RedisStore;
use super::index::Index;
use super::reply::parse;
use super::script::{Call, Script, script};
use crate::record::format;
use crate::{ClientId, Epoch, ReceivedPublish, SessionRecord, Sessions, StoreError, StoredWill};

static SESSION_SAVE: Script = script!("fence.lua", "session_save.lua");
static SESSION_DELETE: Script = script!("fence.lua", "session_delete.lua");
static RECEIVED_SAVE: Script = script!("received_save.lua");
static RECEIVED_RELEASE: Script = script!("received_release.lua");
static WILL_SAVE: Script = script!("will_save.lua");
static WILL_DELETE: Script = script!("will_delete.lua");

pub(super) static SCRIPTS: &[&Script] = &[
    &SESSION_SAVE,
    &SESSION_DELETE,
    &RECEIVED_SAVE,
    &RECEIVED_RELEASE,
    &WILL_SAVE,
    &WILL_DELETE,
];

impl RedisStore {
    fn session_key(&self, client: &ClientId) -> String {
        self.keys.client(client, "session")
    }

    fn received_key(&self, client: &ClientId) -> String {
        self.keys.client(client, "received")
    }

    fn will_key(&self, client: &ClientId) -> String {
        self.keys.client(client, "will")
    }

    /// Who publishes a will, see [`crate::Shards::take_will`].
    pub(super) fn will_turns_key(&self, client: &ClientId) -> String {
        self.keys.client(client, "will-turns")
    }

    /// Writes something that an index leads to: the index first.
    fn submit_indexed(
        &self,
        client: &ClientId,
        noted: Call,
        write: Call,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let noted = self.link.submit(client.as_str(), noted);
        let written = self.link.submit(client.as_str(), write);
        async move {
            noted.await?;
            written.await.map(|_| ())
        }
        .boxed()
    }

    pub(super) fn session_question(&self, client: &ClientId) -> Call {
        Call::command("GET", &self.session_key(client))
    }

    pub(super) fn read_session(
        &self,
        client: &ClientId,
        answer: redis::Value,
    ) -> Result<Option<SessionRecord>, StoreError> {
        let record: Option<Vec<u8>> = parse(answer)?;
        let key = self.session_key(client);
        let read = |record: Vec<u8>| format::parse_session(key.as_bytes(), &record);
        record.map(read).transpose()
    }

    fn read_will(
        &self,
        client: &ClientId,
        answer: redis::Value,
    ) -> Result<Option<StoredWill>, StoreError> {
        let record: Option<Vec<u8>> = parse(answer)?;
        let key = self.will_key(client);
        let read = |record: Vec<u8>| format::parse_will(key.as_bytes(), &record);
        record.map(read).transpose()
    }

    fn will_question(&self, client: &ClientId) -> Call {
        Call::command("HGET", &self.will_key(client)).arg("record")
    }
}

#[async_trait]
impl Sessions for RedisStore {
    async fn load_all(&self) -> Result<Vec<SessionRecord>, StoreError> {
        let question = |client: &ClientId| self.session_question(client);
        let read = |client: &ClientId, answer| self.read_session(client, answer);
        self.index_all(Index::Sessions, question, read).await
    }

    async fn load(&self, client: &ClientId) -> Result<Option<SessionRecord>, StoreError> {
        let answer = self.link.read(self.session_question(client)).await?;
        self.read_session(client, answer)
    }

    fn save(
        &self,
        epoch: Epoch,
        session: SessionRecord,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let client = &session.client;
        let keys = [self.route_key(client), self.session_key(client)];
        let record = format::session(keys[1].as_bytes(), &session);
        let save = Call::script(&SESSION_SAVE, &keys).arg(epoch.0).arg(record);
        let noted = self.index_put(Index::Sessions, client, Some(epoch), "");
        self.submit_indexed(client, noted, save)
    }

    fn delete(
        &self,
        client: &ClientId,
        epoch: Option<Epoch>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let keys = [
            self.route_key(client),
            self.session_key(client),
            self.received_key(client),
        ];
        let fence = epoch.map_or(String::new(), |epoch| epoch.to_string());
        let delete = Call::script(&SESSION_DELETE, &keys).arg(fence);
        let deleted = self.link.submit(client.as_str(), delete);
        let removal = self.index_remove(Index::Sessions, client, epoch);
        let removed = self.link.submit(client.as_str(), removal);
        async move {
            deleted.await?;
            removed.await.map(|_| ())
        }
        .boxed()
    }

    async fn received(&self, client: &ClientId) -> Result<Vec<ReceivedPublish>, StoreError> {
        let key = self.received_key(client);
        let answer = self.link.read(Call::command("HVALS", &key)).await?;
        let records: Vec<Vec<u8>> = parse(answer)?;
        let read = |record: &Vec<u8>| format::parse_received(key.as_bytes(), record);
        let mut received: Vec<_> = records.iter().map(read).collect::<Result<_, _>>()?;
        received.sort_by_key(|publish| publish.packet_id.0);
        Ok(received)
    }

    fn save_received(
        &self,
        client: &ClientId,
        epoch: Epoch,
        received: ReceivedPublish,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let keys = [self.route_key(client), self.received_key(client)];
        let record = format::received(keys[1].as_bytes(), &received);
        let before = match received.done {
            true => format::received(
                keys[1].as_bytes(),
                &ReceivedPublish {
                    done: false,
                    ..received.clone()
                },
            ),
            false => Vec::new(),
        };
        let save = Call::script(&RECEIVED_SAVE, &keys)
            .arg(epoch.0)
            .arg(received.packet_id.0.get())
            .arg(record)
            .arg(before);
        let saved = self.link.submit(client.as_str(), save);
        async move { saved.await.map(|_| ()) }.boxed()
    }

    fn release_received(
        &self,
        client: &ClientId,
        epoch: Epoch,
        packet_id: PacketId,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let keys = [self.route_key(client), self.received_key(client)];
        let release = Call::script(&RECEIVED_RELEASE, &keys)
            .arg(epoch.0)
            .arg(packet_id.0.get());
        let released = self.link.submit(client.as_str(), release);
        async move { released.await.map(|_| ()) }.boxed()
    }

    fn save_will(
        &self,
        client: &ClientId,
        will: StoredWill,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let key = self.will_key(client);
        let record = format::will(key.as_bytes(), &will);
        let save = Call::script(&WILL_SAVE, &[key])
            .arg(will.epoch.0)
            .arg(record);
        let noted = self.index_put(Index::Wills, client, Some(will.epoch), "");
        self.submit_indexed(client, noted, save)
    }

    fn delete_will(
        &self,
        client: &ClientId,
        epoch: Epoch,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let keys = [self.will_key(client), self.will_turns_key(client)];
        let delete = Call::script(&WILL_DELETE, &keys).arg(epoch.0);
        let deleted = self.link.submit(client.as_str(), delete);
        let removal = self.index_remove(Index::Wills, client, Some(epoch));
        let removed = self.link.submit(client.as_str(), removal);
        async move {
            deleted.await?;
            removed.await.map(|_| ())
        }
        .boxed()
    }

    async fn will(&self, client: &ClientId) -> Result<Option<StoredWill>, StoreError> {
        let answer = self.link.read(self.will_question(client)).await?;
        self.read_will(client, answer)
    }

    async fn load_wills(&self) -> Result<Vec<(ClientId, StoredWill)>, StoreError> {
        let question = |client: &ClientId| self.will_question(client);
        let read = |client: &ClientId, answer| {
            let will = self.read_will(client, answer)?;
            Ok(will.map(|will| (client.clone(), will)))
        };
        self.index_all(Index::Wills, question, read).await
    }
}
