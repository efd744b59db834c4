//! The ban list: one record a ban.

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};

use super::queue::Kind;
use super::sessions::all;
use super::{EmbeddedStore, engine::Lookup, keys};
use crate::record::format;
use crate::{Ban, BanTarget, Bans, StoreError};

#[async_trait]
impl Bans for EmbeddedStore {
    async fn load_all(&self) -> Result<Vec<Ban>, StoreError> {
        self.read(|view| all(view, keys::BAN, format::parse_ban))
            .await
    }

    async fn get(&self, target: &BanTarget) -> Result<Option<Ban>, StoreError> {
        let key = keys::ban(target);
        self.read(move |view| match view.get(&key)? {
            Some(value) => format::parse_ban(&key, &value).map(Some),
            None => Ok(None),
        })
        .await
    }

    fn save(&self, ban: Ban) -> BoxFuture<'static, Result<(), StoreError>> {
        let key = keys::ban(&ban.target);
        let value = format::ban(&key, &ban);
        self.put(&ban.target.value(), Kind::Add, key, value)
    }

    fn delete(&self, target: &BanTarget) -> BoxFuture<'static, Result<bool, StoreError>> {
        let key = keys::ban(target);
        let delete = move |tx: &mut super::Transaction| {
            let found = tx.get(&key)?.is_some();
            if found {
                tx.staged.delete(key);
            }
            Ok(found)
        };
        self.submit(Kind::Change, 64, delete).boxed()
    }
}
