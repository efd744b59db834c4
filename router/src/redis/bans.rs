//! Bans: all in one hash.

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};

use super::RedisStore;
use super::reply::parse;
use super::script::Call;
use crate::record::format;
use crate::{Ban, BanTarget, Bans, StoreError};

impl RedisStore {
    fn bans_key(&self) -> String {
        self.keys.global("bans", "all")
    }

    fn read_ban(&self, record: &[u8]) -> Result<Ban, StoreError> {
        format::parse_ban(self.bans_key().as_bytes(), record)
    }
}

#[async_trait]
impl Bans for RedisStore {
    async fn load_all(&self) -> Result<Vec<Ban>, StoreError> {
        let all = Call::command("HVALS", &self.bans_key());
        let records: Vec<Vec<u8>> = parse(self.link.read(all).await?)?;
        records.iter().map(|record| self.read_ban(record)).collect()
    }

    async fn get(&self, target: &BanTarget) -> Result<Option<Ban>, StoreError> {
        let get = Call::command("HGET", &self.bans_key()).arg(target.to_string());
        let record: Option<Vec<u8>> = parse(self.link.read(get).await?)?;
        record.map(|record| self.read_ban(&record)).transpose()
    }

    fn save(&self, ban: Ban) -> BoxFuture<'static, Result<(), StoreError>> {
        let (key, field) = (self.bans_key(), ban.target.to_string());
        let record = format::ban(key.as_bytes(), &ban);
        let save = Call::command("HSET", &key).arg(&field).arg(record);
        let saved = self.link.submit(&field, save);
        async move { saved.await.map(|_| ()) }.boxed()
    }

    fn delete(&self, target: &BanTarget) -> BoxFuture<'static, Result<bool, StoreError>> {
        let field = target.to_string();
        let delete = Call::command("HDEL", &self.bans_key()).arg(&field);
        let deleted = self.link.submit(&field, delete);
        async move { Ok(parse::<u64>(deleted.await?)? > 0) }.boxed()
    }
}
