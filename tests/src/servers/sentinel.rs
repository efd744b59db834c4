//! A Redis master with two replicas and three sentinels that watch them.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;

use super::process::{Process, bound_to_this_program, folder, free_port};
use super::redis::{RedisServer, Reply};
use crate::waiting::eventually;

/// What the sentinels call their master.
pub const MASTER_NAME: &str = "moorline";

/// Three Redis servers and three sentinels.
#[derive(Debug)]
pub struct Sentinels {
    /// The servers; which one is the master, [`master`](Self::master) says.
    pub servers: Vec<RedisServer>,
    sentinels: Vec<Sentinel>,
}

#[derive(Debug)]
struct Sentinel {
    process: Process,
    address: SocketAddr,
    _folder: TempDir,
}

impl Sentinels {
    /// Starts them and waits until the sentinels know each other and both replicas.
    pub async fn start() -> Self {
        let master = RedisServer::start().await;
        let port = master.address().port().to_string();
        let replica = ["--replicaof", &format!("127.0.0.1 {port}")];
        let servers = vec![
            master,
            RedisServer::start_with(&replica).await,
            RedisServer::start_with(&replica).await,
        ];
        for server in &servers[1..] {
            eventually(
                Duration::from_secs(60),
                "a replica that follows",
                || async {
                    let info = server.command(&["INFO", "replication"]).await;
                    (info.field("master_link_status")? == "up").then_some(())
                },
            )
            .await;
        }
        let mut sentinels = Vec::new();
        while sentinels.len() < 3 {
            let folder = folder("sentinel");
            let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
            let mut process = sentinel(folder.path(), address, &port);
            if process.listens(address).await {
                sentinels.push(Sentinel {
                    process,
                    address,
                    _folder: folder,
                });
            }
        }
        let all = Self { servers, sentinels };
        for address in all.addresses() {
            eventually(
                Duration::from_secs(60),
                "sentinels that know all",
                || async {
                    let about = Reply::of(address, &["SENTINEL", "MASTER", MASTER_NAME])
                        .await
                        .ok()?;
                    let text = about.text();
                    let words: Vec<&str> = text.lines().collect();
                    let value = |name: &str| {
                        let at = words.iter().position(|word| *word == name)?;
                        words.get(at + 1).copied()
                    };
                    (value("num-slaves")? == "2" && value("num-other-sentinels")? == "2")
                        .then_some(())
                },
            )
            .await;
        }
        all
    }

    /// Where the sentinels listen.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sentinels.iter().map(|one| one.address).collect()
    }

    /// `redis://…` of each sentinel.
    pub fn urls(&self) -> Vec<String> {
        self.addresses()
            .iter()
            .map(|address| format!("redis://{address}"))
            .collect()
    }

    /// The process ids of the sentinels.
    pub fn pids(&self) -> Vec<u32> {
        self.sentinels.iter().map(|one| one.process.pid()).collect()
    }

    /// Which of the servers the sentinels call master.
    ///
    /// # Panics
    /// When they name none of them.
    pub async fn master(&self) -> usize {
        let asked = self.addresses()[0];
        let answer = Reply::of(asked, &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME])
            .await
            .expect("a sentinel answers");
        let port = answer.text().lines().nth(1).map(str::to_owned);
        self.servers
            .iter()
            .position(|server| Some(server.address().port().to_string()) == port)
            .unwrap_or_else(|| panic!("an unknown master: {answer:?}"))
    }

    /// Kills the master and waits until another one is; returns the old one and the new one.
    pub async fn fail_over(&mut self) -> (usize, usize) {
        let old = self.master().await;
        self.servers[old].kill9();
        let new = self.after_failover(old).await;
        (old, new)
    }

    /// Waits until another server than `old` is a master that takes writes.
    pub async fn after_failover(&self, old: usize) -> usize {
        eventually(Duration::from_secs(60), "a new master", || async {
            let new = self.master().await;
            if new == old {
                return None;
            }
            let role = Reply::of(self.servers[new].address(), &["ROLE"])
                .await
                .ok()?;
            role.text().starts_with("master").then_some(new)
        })
        .await
    }
}

fn sentinel(folder: &Path, address: SocketAddr, master: &str) -> Process {
    // A sentinel rewrites its configuration.
    let configuration = folder.join("sentinel.conf");
    std::fs::write(
        &configuration,
        format!(
            "port {}\nbind 127.0.0.1\ndir {}\n\
             sentinel monitor {MASTER_NAME} 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds {MASTER_NAME} 1500\n\
             sentinel failover-timeout {MASTER_NAME} 10000\n",
            address.port(),
            folder.display()
        ),
    )
    .expect("the folder is writable");
    let mut command = bound_to_this_program("redis-server");
    command
        .arg(&configuration)
        .arg("--sentinel")
        .stdin(Stdio::null());
    Process::start("redis-sentinel", command, &folder.join("sentinel.log"))
}
