//! Deployments of Redis as the contract suites need them.

use std::sync::Arc;

use async_trait::async_trait;
use moorline_router::contract::{Backend, Settings};
use moorline_router::embedded::{Config as EmbeddedConfig, EmbeddedStore};
use moorline_router::redis::{Config, Limits, Mode, RedisStore};
use moorline_router::{ClientId, Stores};
use moorline_tests::servers::{MASTER_NAME, RedisCluster, RedisServer, Sentinels, unique};
use tempfile::TempDir;
use tokio::sync::OnceCell;

/// What a case sets, for the store on Redis.
fn limits(settings: &Settings) -> Limits {
    Limits {
        inbox: settings.inbox,
        receipt_retention: settings.receipt_retention,
        receipts_bytes_max: settings.receipts_bytes_max,
        ..Limits::default()
    }
}

pub(crate) fn open(config: &Config) -> Arc<RedisStore> {
    RedisStore::open(config, Limits::default()).unwrap()
}

pub(crate) fn client(text: &str) -> ClientId {
    ClientId::parse(text).unwrap()
}

/// The one server that tests share which do it no harm.
pub(crate) async fn one_server() -> Config {
    Config {
        url: RedisServer::shared().await.url(),
        key_prefix: unique("single"),
        ..Config::default()
    }
}

/// The three servers behind sentinels that tests share; writes wait for a replica.
pub(crate) async fn sentinels() -> Config {
    static SHARED: OnceCell<Sentinels> = OnceCell::const_new();
    sentinel_config(SHARED.get_or_init(Sentinels::start).await)
}

pub(crate) fn sentinel_config(sentinels: &Sentinels) -> Config {
    Config {
        mode: Mode::Sentinel,
        urls: sentinels.urls(),
        master_name: MASTER_NAME.into(),
        key_prefix: unique("sentinel"),
        wait_replicas: 1,
        ..Config::default()
    }
}

/// The cluster that tests share; writes wait for a replica.
pub(crate) async fn cluster() -> Config {
    static SHARED: OnceCell<RedisCluster> = OnceCell::const_new();
    cluster_config(SHARED.get_or_init(RedisCluster::start).await)
}

pub(crate) fn cluster_config(cluster: &RedisCluster) -> Config {
    Config {
        mode: Mode::Cluster,
        urls: cluster.urls(),
        key_prefix: unique("cluster"),
        wait_replicas: 1,
        ..Config::default()
    }
}

/// The seams of a store on Redis; what it does not have is that of an embedded one.
fn stores(store: &Arc<RedisStore>, bus: &mut Option<(TempDir, Stores)>) -> Stores {
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
        jobs: store.jobs(),
    }
}

/// A server of its own, restarted with the store.
#[derive(Default)]
pub(crate) struct Single {
    running: Option<(RedisServer, Limits, Arc<RedisStore>)>,
    bus: Option<(TempDir, Stores)>,
}

impl Single {
    fn open(&mut self, server: RedisServer, limits: Limits) -> Stores {
        let config = Config {
            url: server.url(),
            ..Config::default()
        };
        let store = RedisStore::open(&config, limits.clone()).unwrap();
        let stores = stores(&store, &mut self.bus);
        self.running = Some((server, limits, store));
        stores
    }
}

#[async_trait]
impl Backend for Single {
    async fn start(&mut self, settings: Settings) -> Stores {
        self.open(RedisServer::start().await, limits(&settings))
    }

    async fn restart(&mut self) -> Stores {
        let (mut server, limits, store) = self.running.take().unwrap();
        store.flush().await;
        server.restart().await;
        self.open(server, limits)
    }
}

/// A prefix of its own on servers that tests share: only the store is restarted.
pub(crate) struct Shared {
    config: Config,
    limits: Limits,
    store: Option<Arc<RedisStore>>,
    bus: Option<(TempDir, Stores)>,
}

impl Shared {
    pub(crate) fn of(config: Config) -> Self {
        Self {
            config,
            limits: Limits::default(),
            store: None,
            bus: None,
        }
    }

    fn open(&mut self) -> Stores {
        let store = RedisStore::open(&self.config, self.limits.clone()).unwrap();
        self.store = Some(store.clone());
        stores(&store, &mut self.bus)
    }
}

#[async_trait]
impl Backend for Shared {
    async fn start(&mut self, settings: Settings) -> Stores {
        self.limits = limits(&settings);
        self.config.key_prefix = unique("shared");
        self.open()
    }

    async fn restart(&mut self) -> Stores {
        self.store.take().unwrap().flush().await;
        self.open()
    }
}
