//! The gateway as a cluster: its roles as processes over one Redis and one RabbitMQ.
//!
//! With `MOORLINE_TEST_FIXTURE=cluster` every [`Gateway`](crate::Gateway) is two access nodes, a push service, an upstream
//! worker and a delay queue, with a key prefix and a virtual host of its own on servers that all tests share.

use std::path::Path;
use std::process::Command;

use crate::gateway::{Options, clean_command};
use crate::role::{Log, Role};
use crate::servers::{RabbitServer, RedisServer, VirtualHost, unique};

/// Whether the tests run against a cluster.
///
/// # Panics
/// When the variable has a value that means nothing.
pub fn wanted() -> bool {
    match std::env::var("MOORLINE_TEST_FIXTURE").as_deref() {
        Ok("cluster") => true,
        Ok("embedded") | Err(_) => false,
        Ok(other) => panic!("MOORLINE_TEST_FIXTURE={other}: neither embedded nor cluster"),
    }
}

/// Where the processes of one cluster keep what they share.
#[derive(Debug, Clone)]
pub struct Stores {
    /// The `[redis]` section without its head and prefix: `url = "…"` and what else the test wants.
    pub redis: String,
    /// The virtual host.
    pub rabbit: VirtualHost,
    /// Before every key.
    pub prefix: String,
    /// Where the process listens for the others: `internal_listen = "…"`, and `advertise = "…"` where that differs.
    pub internal: String,
    /// What processes show each other.
    pub secret: String,
}

impl Stores {
    /// A prefix and a virtual host of their own on the servers of this test program.
    pub async fn shared() -> Self {
        let redis = RedisServer::shared().await;
        let rabbit = RabbitServer::shared().await;
        Self::on(&redis.url(), rabbit.vhost().await)
    }

    /// On these servers.
    pub fn on(redis_url: &str, rabbit: VirtualHost) -> Self {
        Self {
            redis: format!("url = \"{redis_url}\"\n"),
            rabbit,
            prefix: unique("test"),
            internal: "internal_listen = \"127.0.0.1:0\"\n".to_owned(),
            secret: "the-secret-that-the-processes-of-a-test-share".to_owned(),
        }
    }

    /// The sections of a configuration file that make a process part of this cluster.
    pub fn sections(&self, name: &str) -> String {
        format!(
            "[redis]\n{}key_prefix = \"{}\"\n\
             [rabbitmq]\nurl = \"{}\"\npartitions = 4\n\
             [cluster]\nname = \"{name}\"\n{}secret = \"{}\"\n",
            self.redis, self.prefix, self.rabbit.url, self.internal, self.secret
        )
    }
}

/// A process of a cluster: `moorline {role}`, with `config` before the sections of the cluster.
///
/// # Panics
/// When the configuration cannot be written.
pub fn command(stores: &Stores, role: &str, name: &str, config: &str, work: &Path) -> Command {
    let home = work.join(name);
    std::fs::create_dir_all(&home).expect("the work directory is writable");
    let file = home.join("moorline.toml");
    std::fs::write(&file, format!("{config}\n{}", stores.sections(name)))
        .expect("the work directory is writable");
    let mut command = clean_command(&home);
    command.arg(role);
    if role == "access-node" {
        command.args(["--mqtt-listen", "127.0.0.1:0", "--ws-listen", "127.0.0.1:0"]);
    }
    command.args(["--http-listen", "127.0.0.1:0"]);
    command.arg("--data-dir").arg(home.join("data"));
    command.arg("--config").arg(file);
    command
}

/// The processes of a [`Gateway`](crate::Gateway); access nodes first.
pub(crate) fn launch(options: &Options, stores: &Stores, work: &Path, log: &Log) -> Vec<Role> {
    let roles = [
        ("access-node", "node-a"),
        ("access-node", "node-b"),
        ("push-service", "push"),
        ("upstream-worker", "worker"),
        ("delay-queue", "delays"),
    ];
    let config = options.config.as_deref().unwrap_or("");
    let starting: Vec<_> = roles
        .into_iter()
        .filter(|(_, name)| *name != "node-b" || !options.one_node)
        .map(|(role, name)| {
            let mut command = command(stores, role, name, config, work);
            command.args(&options.args);
            command.envs(options.env.iter().map(|(name, value)| (name, value)));
            (role, Role::begin(&format!("{name} "), command, log))
        })
        .collect();
    starting
        .into_iter()
        .map(|(role, starting)| {
            let mut process = starting.ready();
            // The API is the push service's; what the others answer on HTTP is for the operator.
            if role != "push-service" {
                for (kind, _) in &mut process.listeners {
                    if kind == "http" {
                        *kind = "admin".to_owned();
                    }
                }
            }
            process
        })
        .collect()
}
