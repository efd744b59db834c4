//! Persistent sessions, wills, received QoS 2 publishes, and retained messages: one record each.

use std::ops::Bound;

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};
use moorline_mqtt::{PacketId, TopicName};

use super::engine::{Lookup, View};
use super::queue::Kind;
use super::{EmbeddedStore, keys};
use crate::record::format;
use crate::{
    ClientId, Epoch, Message, ReceivedPublish, Retained, RetainedChanges, RetainedMoment,
    RetainedVersion, SessionRecord, Sessions, StoreError, StoredWill,
};

/// Every record under one prefix byte.
pub(super) fn all<T>(
    view: &View,
    prefix: u8,
    parse: impl Fn(&[u8], &[u8]) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    let pairs = view.range(Bound::Included(vec![prefix]), keys::after_prefix(&[prefix]));
    pairs
        .map(|pair| pair.and_then(|(key, value)| parse(&key, &value)))
        .collect()
}

impl EmbeddedStore {
    /// Writes one record.
    pub(super) fn put(
        &self,
        name: &str,
        kind: Kind,
        key: Vec<u8>,
        value: Vec<u8>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        if let Err(error) = keys::check_name(name) {
            return async { Err(error) }.boxed();
        }
        let cost = key.len() + value.len();
        let write = move |tx: &mut super::Transaction| {
            tx.staged.put(key, value);
            Ok(())
        };
        self.submit(kind, cost, write).boxed()
    }

    /// Refuses what an older connection than the newest of `client` wants to write.
    pub(super) fn check_epoch(&self, client: &ClientId, epoch: Epoch) -> Result<(), StoreError> {
        match self.shared.routes.newest_epoch(client) {
            Some(current) if current > epoch => Err(StoreError::Stale { current }),
            _ => Ok(()),
        }
    }

    async fn read_one<T: Send + 'static>(
        &self,
        key: Vec<u8>,
        parse: impl Fn(&[u8], &[u8]) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<Option<T>, StoreError> {
        self.read(move |view| {
            let value = view.get(&key)?;
            value.map(|value| parse(&key, &value)).transpose()
        })
        .await
    }

    /// Removes one record.
    fn remove(&self, key: Vec<u8>) -> BoxFuture<'static, Result<(), StoreError>> {
        let remove = move |tx: &mut super::Transaction| {
            if tx.get(&key)?.is_some() {
                tx.staged.delete(key);
            }
            Ok(())
        };
        self.submit(Kind::Change, 64, remove).boxed()
    }
}

#[async_trait]
impl Sessions for EmbeddedStore {
    async fn load_all(&self) -> Result<Vec<SessionRecord>, StoreError> {
        self.read(|view| all(view, keys::SESSION, format::parse_session))
            .await
    }

    async fn load(&self, client: &ClientId) -> Result<Option<SessionRecord>, StoreError> {
        let key = keys::named(keys::SESSION, client.as_str());
        self.read_one(key, format::parse_session).await
    }

    fn save(
        &self,
        epoch: Epoch,
        session: SessionRecord,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let name = session.client.as_str();
        let checked = keys::check_name(name);
        if let Err(error) = checked.and_then(|()| self.check_epoch(&session.client, epoch)) {
            return async { Err(error) }.boxed();
        }
        self.shared.routes.note_owned(&session.client, epoch);
        let key = keys::named(keys::SESSION, name);
        let value = format::session(&key, &session);
        let cost = key.len() + value.len();
        let save = move |tx: &mut super::Transaction| {
            tx.staged.put(key, value);
            if session.disconnected_at_ms.is_some() {
                // A session that says it is disconnected says how far it was sent, too.
                tx.save_sent_note(&session.client)?;
            }
            Ok(())
        };
        self.submit(Kind::Add, cost, save).boxed()
    }

    fn delete(
        &self,
        client: &ClientId,
        epoch: Option<Epoch>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let checked = epoch.map_or(Ok(()), |epoch| self.check_epoch(client, epoch));
        if let Err(error) = checked {
            return async { Err(error) }.boxed();
        }
        if let Some(epoch) = epoch {
            self.shared.routes.note_owned(client, epoch);
        }
        let client = client.clone();
        let delete = move |tx: &mut super::Transaction| {
            let name = client.as_str();
            let session = keys::named(keys::SESSION, name);
            if tx.get(&session)?.is_some() {
                tx.staged.delete(session);
            }
            let from = keys::group(keys::RECEIVED, name);
            let to = keys::group_end(keys::RECEIVED, name);
            for key in tx.staged.keys(&tx.engine, from, to)? {
                tx.staged.delete(key);
            }
            Ok(())
        };
        self.submit(Kind::Change, 64, delete).boxed()
    }

    async fn received(&self, client: &ClientId) -> Result<Vec<ReceivedPublish>, StoreError> {
        let client = client.clone();
        self.read(move |view| {
            let group = Bound::Included(keys::group(keys::RECEIVED, client.as_str()));
            let pairs = view.range(group, keys::group_end(keys::RECEIVED, client.as_str()));
            pairs
                .map(|pair| pair.and_then(|(key, value)| format::parse_received(&key, &value)))
                .collect()
        })
        .await
    }

    fn save_received(
        &self,
        client: &ClientId,
        epoch: Epoch,
        received: ReceivedPublish,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let key = keys::received(client, received.packet_id.0.get());
        let value = format::received(&key, &received);
        let current = match self.shared.routes.owned(client) {
            Some(owned) if owned > epoch => owned,
            _ => return self.put(client.as_str(), Kind::Add, key, value),
        };
        let before = ReceivedPublish {
            done: false,
            ..received.clone()
        };
        let before = received.done.then(|| format::received(&key, &before));
        let save = move |tx: &mut super::Transaction| {
            if before.is_none() || tx.get(&key)?.as_deref() != before.as_deref() {
                return Err(StoreError::Stale { current });
            }
            tx.staged.put(key, value);
            Ok(())
        };
        self.submit(Kind::Change, 64, save).boxed()
    }

    fn release_received(
        &self,
        client: &ClientId,
        epoch: Epoch,
        packet_id: PacketId,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        if let Some(current) = self
            .shared
            .routes
            .owned(client)
            .filter(|owned| *owned > epoch)
        {
            return async move { Err(StoreError::Stale { current }) }.boxed();
        }
        self.remove(keys::received(client, packet_id.0.get()))
    }

    fn save_will(
        &self,
        client: &ClientId,
        will: StoredWill,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let key = keys::named(keys::WILL, client.as_str());
        let value = format::will(&key, &will);
        self.put(client.as_str(), Kind::Add, key, value)
    }

    fn delete_will(
        &self,
        client: &ClientId,
        epoch: Epoch,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let key = keys::named(keys::WILL, client.as_str());
        let delete = move |tx: &mut super::Transaction| {
            if let Some(value) = tx.get(&key)?
                && format::parse_will(&key, &value)?.epoch == epoch
            {
                tx.staged.delete(key);
            }
            Ok(())
        };
        self.submit(Kind::Change, 64, delete).boxed()
    }

    async fn will(&self, client: &ClientId) -> Result<Option<StoredWill>, StoreError> {
        let key = keys::named(keys::WILL, client.as_str());
        self.read_one(key, format::parse_will).await
    }

    async fn load_wills(&self) -> Result<Vec<(ClientId, StoredWill)>, StoreError> {
        self.read(|view| {
            all(view, keys::WILL, |key, value| {
                let client = std::str::from_utf8(&key[1..]).ok();
                let client = client.and_then(|text| ClientId::parse(text).ok());
                let client =
                    client.ok_or_else(|| StoreError::Damaged("an impossible will key".into()))?;
                Ok((client, format::parse_will(key, value)?))
            })
        })
        .await
    }
}

#[async_trait]
impl Retained for EmbeddedStore {
    async fn load_all(&self) -> Result<Vec<Message>, StoreError> {
        self.read(|view| all(view, keys::RETAINED, format::parse_message))
            .await
    }

    async fn changes(&self, _: RetainedVersion) -> Result<Option<RetainedChanges>, StoreError> {
        Ok(None)
    }

    async fn expire(&self, _: usize) -> Result<usize, StoreError> {
        Ok(0)
    }

    fn now(&self) -> Option<RetainedMoment> {
        None
    }

    fn set(
        &self,
        topic: &TopicName,
        message: Option<&Message>,
        _: Option<RetainedMoment>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let key = keys::named(keys::RETAINED, topic.as_str());
        match message {
            Some(message) => {
                if let Err(error) = format::check_properties(message.properties.as_deref()) {
                    return async { Err(error) }.boxed();
                }
                let value = format::message(&key, message);
                self.put(topic.as_str(), Kind::Add, key, value)
            }
            None => self.remove(key),
        }
    }
}
