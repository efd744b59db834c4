//! Delayed jobs under their contract suite.

use std::sync::Arc;

use async_trait::async_trait;
use moorline_router::contract::jobs::JobsBackend;
use moorline_router::redis::{Config, Limits, RedisStore};
use moorline_router::{JobLimits, Jobs};
use moorline_tests::servers::{RedisServer, unique};

fn open(config: &Config, limits: &JobLimits) -> Arc<RedisStore> {
    let limits = Limits {
        jobs: limits.clone(),
        ..Limits::default()
    };
    RedisStore::open(config, limits).unwrap()
}

/// A server of its own, which is killed.
#[derive(Default)]
pub(crate) struct Killed {
    running: Option<(RedisServer, JobLimits)>,
}

impl Killed {
    fn open(&mut self, server: RedisServer, limits: JobLimits) -> Arc<dyn Jobs> {
        let config = Config {
            url: server.url(),
            ..Config::default()
        };
        let jobs = open(&config, &limits).jobs();
        self.running = Some((server, limits));
        jobs
    }
}

#[async_trait]
impl JobsBackend for Killed {
    async fn start(&mut self, limits: JobLimits) -> Arc<dyn Jobs> {
        self.open(RedisServer::start().await, limits)
    }

    async fn crash(&mut self) -> Arc<dyn Jobs> {
        let (mut server, limits) = self.running.take().unwrap();
        server.kill9();
        server.restart().await;
        self.open(server, limits)
    }
}

/// A prefix of its own on servers that tests share: the process that uses them dies.
pub(crate) struct Abandoned {
    config: Config,
    limits: JobLimits,
}

impl Abandoned {
    pub(crate) fn of(config: Config) -> Self {
        Self {
            config,
            limits: JobLimits::default(),
        }
    }
}

#[async_trait]
impl JobsBackend for Abandoned {
    async fn start(&mut self, limits: JobLimits) -> Arc<dyn Jobs> {
        self.limits = limits;
        self.config.key_prefix = unique("jobs");
        open(&self.config, &self.limits).jobs()
    }

    async fn crash(&mut self) -> Arc<dyn Jobs> {
        open(&self.config, &self.limits).jobs()
    }
}
