//! The embedded store under the contract suites.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use async_trait::async_trait;
use moorline_router::Stores;
use moorline_router::contract::{Backend, Settings};
use moorline_router::embedded::{Config, EmbeddedStore};
use tempfile::TempDir;

#[derive(Default)]
struct Embedded {
    running: Option<(TempDir, Config, Arc<EmbeddedStore>)>,
}

#[async_trait]
impl Backend for Embedded {
    async fn start(&mut self, settings: Settings) -> Stores {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().join("data"),
            inbox: settings.inbox,
            receipt_retention: settings.receipt_retention,
            receipts_bytes_max: settings.receipts_bytes_max,
            upstream_queue_bytes_max: settings.upstream_queue_bytes_max,
            upstream_partitions: settings.upstream_partitions,
            ..Config::default()
        };
        let store = EmbeddedStore::open(config.clone()).unwrap();
        let stores = store.stores();
        self.running = Some((dir, config, store));
        stores
    }

    async fn restart(&mut self) -> Stores {
        let (dir, config, store) = self.running.take().unwrap();
        store.close().unwrap();
        let store = EmbeddedStore::open(config.clone()).unwrap();
        let stores = store.stores();
        self.running = Some((dir, config, store));
        stores
    }
}

moorline_router::inbox_contract!(Embedded::default());
moorline_router::receipt_contract!(Embedded::default());
moorline_router::route_contract!(Embedded::default());
moorline_router::ban_contract!(Embedded::default());
moorline_router::session_contract!(Embedded::default());
moorline_router::upstream_contract!(Embedded::default());
