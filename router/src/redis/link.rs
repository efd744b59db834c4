//! The link to Redis, as the backends of the seams use it.

use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all};
use redis::Value;

use super::config::{Config, Mode};
use super::flight::{Servers, Way, follow};
use super::lanes::Lanes;
use super::link_metrics::LinkMetrics;
use super::port::Timeouts;
use super::script::Call;
use super::topology::Topology;
use crate::{Fence, StoreError};

/// Every call to Redis goes through here.
///
/// An answer `Unavailable` to a write does not say that it was not done.
pub(crate) struct Link {
    servers: Arc<Servers>,
    lanes: Lanes,
}

impl Link {
    /// Does not wait for a connection: the first call does.
    pub(super) fn start(config: &Config) -> Result<Self, String> {
        config.validate()?;
        let servers = Arc::new(Servers {
            topology: Topology::new(config)?,
            timeouts: Timeouts {
                connect: config.connect_timeout,
                response: config.response_timeout,
            },
            wait_replicas: config.wait_replicas,
            wait_timeout: config.wait_timeout,
            metrics: LinkMetrics::new(),
        });
        if config.mode == Mode::Cluster {
            tokio::spawn(follow(Arc::downgrade(&servers)));
        }
        Ok(Self {
            lanes: Lanes::start(&servers),
            servers,
        })
    }

    /// A write. It takes its place behind every earlier one of the same `name` when this is called, and is made whether the
    /// future is polled or not; that one resolves when the write is durable.
    pub(crate) fn submit(
        &self,
        name: &str,
        call: Call,
    ) -> BoxFuture<'static, Result<Value, StoreError>> {
        self.lanes.submit(name, call, None)
    }

    /// As [`Self::submit`], refused once another call behind the same fence was.
    pub(crate) fn submit_behind(
        &self,
        fence: Option<&Fence>,
        name: &str,
        call: Call,
    ) -> BoxFuture<'static, Result<Value, StoreError>> {
        self.lanes.submit(name, call, fence)
    }

    /// As [`Self::submit`] without anybody waiting for it.
    pub(crate) fn note(&self, name: &str, call: Call) {
        if let Err(error) = self.lanes.push(name, call, None, None) {
            tracing::debug!(%error, "a note to redis is lost");
        }
    }

    /// Waits until every write that was called has been answered, notes included.
    pub(super) async fn flush(&self) {
        self.lanes.flush().await;
    }

    /// A read, beside all writes: it sees what was answered before it was called.
    pub(crate) async fn read(&self, call: Call) -> Result<Value, StoreError> {
        self.read_all(vec![call]).await.remove(0)
    }

    /// Several reads at once; answers are in the order of `calls`.
    pub(crate) async fn read_all(&self, calls: Vec<Call>) -> Vec<Result<Value, StoreError>> {
        let mut answers = Vec::with_capacity(calls.len());
        // A pipeline that is not too long for others to wait behind.
        for part in calls.chunks(512) {
            answers.extend(Box::pin(self.servers.fly(Way::Read, part)).await);
        }
        answers
    }

    /// Finds out which servers there are, where that is not known yet.
    pub(super) async fn find_servers(&self) -> Result<(), StoreError> {
        match self.servers.topology.servers().is_empty() {
            true => self.servers.topology.refresh().await,
            false => Ok(()),
        }
    }

    /// Asks every server the same, with its name.
    pub(super) async fn ask_each(
        &self,
        questions: &redis::Pipeline,
    ) -> Vec<(String, Result<Vec<Value>, StoreError>)> {
        let servers = self.servers.topology.servers();
        let asked = servers.iter().map(|server| async move {
            let answers = async {
                let mut connected = server.reads.get().await?;
                let asking =
                    connected
                        .connection
                        .send_packed_commands(questions, 0, questions.len());
                Box::pin(asking).await.map_err(|error| {
                    server.reads.lost(connected.number, &error.to_string());
                    StoreError::Unavailable(error.to_string())
                })
            };
            (server.name.clone(), answers.await)
        });
        join_all(asked).await
    }

    /// A connection that listens to `channels` of the deployment; what it hears is given to `heard`.
    pub(super) async fn subscribe(
        &self,
        channels: &[String],
        heard: impl Fn(redis::PushInfo) -> Result<(), ()> + Send + Sync + 'static,
    ) -> Result<redis::aio::MultiplexedConnection, StoreError> {
        self.find_servers().await?;
        let servers = self.servers.topology.servers();
        // Any server of a cluster hears what is published on another.
        let server = servers.iter().find(|server| !server.writes.is_down());
        let server = server
            .or(servers.first())
            .ok_or_else(|| StoreError::Unavailable("no server is known".into()))?;
        let listening = Box::pin(server.writes.listen(channels, heard)).await;
        listening.map_err(StoreError::Unavailable)
    }

    pub(super) fn wait_replicas(&self) -> u32 {
        self.servers.wait_replicas
    }
}
