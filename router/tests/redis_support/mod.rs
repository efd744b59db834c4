//! Deployments of Redis as the contract suites need them.

use std::sync::Arc;

use async_trait::async_trait;
use moorline_router::Stores;
use moorline_router::contract::{Backend, Settings};
use moorline_router::embedded::{Config as EmbeddedConfig, EmbeddedStore};
use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_tests::servers::RedisServer;
use tempfile::TempDir;

/// What a case sets, for the store on Redis.
pub(crate) fn limits(settings: &Settings) -> Limits {
    Limits {
        inbox: settings.inbox,
        receipt_retention: settings.receipt_retention,
        receipts_bytes_max: settings.receipts_bytes_max,
    }
}

/// One server, restarted with the store.
#[derive(Default)]
pub(crate) struct Single {
    running: Option<(RedisServer, Limits, Arc<RedisStore>)>,
    bus: Option<(TempDir, Stores)>,
}

/// The seams of a store on Redis; what it does not have is that of an embedded one.
pub(crate) fn stores(store: &Arc<RedisStore>, bus: &mut Option<(TempDir, Stores)>) -> Stores {
    let (_, others) = bus.get_or_insert_with(|| {
        let dir = tempfile::tempdir().unwrap();
        let config = EmbeddedConfig {
            data_dir: dir.path().join("data"),
            ..EmbeddedConfig::default()
        };
        let stores = EmbeddedStore::open(config).unwrap().stores();
        (dir, stores)
    });
    Stores {
        routes: store.clone(),
        inboxes: store.clone(),
        sessions: store.clone(),
        retained: store.clone(),
        bans: store.clone(),
        upstream: others.upstream.clone(),
    }
}

impl Single {
    fn config(server: &RedisServer) -> Config {
        Config {
            url: server.url(),
            ..Config::default()
        }
    }
}

#[async_trait]
impl Backend for Single {
    async fn start(&mut self, settings: Settings) -> Stores {
        let server = RedisServer::start().await;
        let limits = limits(&settings);
        let store = RedisStore::open(&Self::config(&server), limits.clone()).unwrap();
        let stores = stores(&store, &mut self.bus);
        self.running = Some((server, limits, store));
        stores
    }

    async fn restart(&mut self) -> Stores {
        let (mut server, limits, store) = self.running.take().unwrap();
        // A clean end: what nobody waited for is written too.
        store.flush().await;
        drop(store);
        server.restart().await;
        let store = RedisStore::open(&Self::config(&server), limits.clone()).unwrap();
        let stores = stores(&store, &mut self.bus);
        self.running = Some((server, limits, store));
        stores
    }
}
