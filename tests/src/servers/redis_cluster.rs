//! Redis Cluster: three masters with a replica each.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::redis::{RedisServer, Reply};
use crate::waiting::eventually;

/// Six servers that share the 16,384 slots.
#[derive(Debug)]
pub struct RedisCluster {
    /// The servers; the first three start as masters.
    pub servers: Vec<RedisServer>,
}

impl RedisCluster {
    /// Starts it and waits until every slot is served and every master has its replica.
    ///
    /// # Panics
    /// When it cannot be formed.
    pub async fn start() -> Self {
        let mut servers = Vec::new();
        for _ in 0..6 {
            servers.push(
                RedisServer::start_with(&[
                    "--cluster-enabled",
                    "yes",
                    "--cluster-config-file",
                    "nodes.conf",
                    "--cluster-node-timeout",
                    "2000",
                    "--cluster-require-full-coverage",
                    "no",
                ])
                .await,
            );
        }
        let mut form = Command::new("redis-cli");
        form.args(["--cluster", "create"])
            .args(servers.iter().map(|server| server.address().to_string()))
            .args(["--cluster-replicas", "1", "--cluster-yes"])
            .stdin(Stdio::null());
        let formed = tokio::task::spawn_blocking(move || form.output())
            .await
            .expect("a thread that does not panic")
            .expect("redis-cli is there");
        assert!(formed.status.success(), "{formed:?}");
        let cluster = Self { servers };
        for server in &cluster.servers {
            eventually(
                Duration::from_secs(60),
                "a cluster that is whole",
                || async {
                    let info = server.command(&["CLUSTER", "INFO"]).await;
                    let replication = server.command(&["INFO", "replication"]).await;
                    let paired = replication.field("master_link_status").as_deref() == Some("up")
                        || replication.field("connected_slaves").as_deref() == Some("1");
                    (info.field("cluster_state")? == "ok"
                        && info.field("cluster_slots_ok")? == "16384"
                        && info.field("cluster_known_nodes")? == "6"
                        && paired)
                        .then_some(())
                },
            )
            .await;
        }
        cluster
    }

    /// `redis://…` of each server.
    pub fn urls(&self) -> Vec<String> {
        self.servers.iter().map(RedisServer::url).collect()
    }

    /// The server that serves the slot of `key`.
    ///
    /// # Panics
    /// When none does.
    pub async fn master_of(&self, key: &str) -> usize {
        for (at, server) in self.servers.iter().enumerate() {
            // A server that does not serve the slot says which one does.
            let Ok(answer) = Reply::of(server.address(), &["EXISTS", key]).await else {
                continue;
            };
            let Reply::Error(moved) = &answer else {
                return at;
            };
            let port = moved.rsplit(':').next().unwrap_or("");
            if let Some(at) = self
                .servers
                .iter()
                .position(|server| server.address().port().to_string() == port)
                && self.is_master(at).await
            {
                return at;
            }
        }
        panic!("nobody serves the slot of {key}");
    }

    async fn is_master(&self, at: usize) -> bool {
        Reply::of(self.servers[at].address(), &["ROLE"])
            .await
            .is_ok_and(|role| role.text().starts_with("master"))
    }

    /// Kills the master of `key`'s slot and waits until its replica has taken over; returns the old one and the new one.
    pub async fn fail_over(&mut self, key: &str) -> (usize, usize) {
        let old = self.master_of(key).await;
        self.servers[old].kill9();
        let servers = &self.servers;
        let new = eventually(
            Duration::from_secs(60),
            "a replica that takes over",
            || async {
                for (at, server) in servers.iter().enumerate() {
                    if at != old
                        && let Ok(Reply::Text(_)) =
                            Reply::of(server.address(), &["EXISTS", key]).await
                    {
                        return Some(at);
                    }
                }
                None
            },
        )
        .await;
        (old, new)
    }
}
