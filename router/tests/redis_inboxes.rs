//! Inboxes and receipts on Redis under their contract suites.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use async_trait::async_trait;
use moorline_router::Stores;
use moorline_router::contract::{Backend, Settings};
use moorline_router::embedded::{Config as EmbeddedConfig, EmbeddedStore};
use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_tests::servers::{RedisServer, unique};
use tempfile::TempDir;

/// A deployment of its own on the server that the tests of this program share.
#[derive(Default)]
struct Redis {
    running: Option<(Config, Limits, Arc<RedisStore>)>,
    others: Option<(TempDir, Stores)>,
}

impl Redis {
    fn open(&mut self, config: Config, limits: Limits) -> Stores {
        let store = RedisStore::open(&config, limits.clone()).unwrap();
        self.running = Some((config, limits, store.clone()));
        let (_, others) = self.others.as_ref().unwrap();
        Stores {
            inboxes: store,
            ..others.clone()
        }
    }
}

#[async_trait]
impl Backend for Redis {
    async fn start(&mut self, settings: Settings) -> Stores {
        let config = Config {
            url: RedisServer::shared().await.url(),
            key_prefix: unique("inboxes"),
            ..Config::default()
        };
        let limits = Limits {
            inbox: settings.inbox,
            receipt_retention: settings.receipt_retention,
            receipts_bytes_max: settings.receipts_bytes_max,
        };
        let dir = tempfile::tempdir().unwrap();
        let others = EmbeddedStore::open(EmbeddedConfig {
            data_dir: dir.path().join("data"),
            ..EmbeddedConfig::default()
        });
        self.others = Some((dir, others.unwrap().stores()));
        self.open(config, limits)
    }

    async fn restart(&mut self) -> Stores {
        let (config, limits, store) = self.running.take().unwrap();
        store.flush().await;
        self.open(config, limits)
    }
}

moorline_router::inbox_contract!(Redis::default());
moorline_router::receipt_contract!(Redis::default());
