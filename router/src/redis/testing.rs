//! A Redis server for the tests of this module.

use std::process::{Child, Stdio};
use std::sync::Arc;

use moorline_tests::servers::process::{bound_to_this_program, free_port};
use redis::Value;
use tempfile::TempDir;

use super::script::Call;
use super::{Config, Limits, RedisStore};
use crate::StoreError;

/// A server of its own, and a store on it.
pub(super) struct Fixture {
    pub(super) store: Arc<RedisStore>,
    pub(super) config: Config,
    dir: TempDir,
    port: u16,
    child: Child,
}

impl Fixture {
    pub(super) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = Config {
            url: format!("redis://127.0.0.1:{port}"),
            ..Config::default()
        };
        Self {
            store: RedisStore::open(&config, Limits::default()).unwrap(),
            child: run(&dir, port),
            config,
            dir,
            port,
        }
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(super) fn start_again(&mut self) {
        self.child = run(&self.dir, self.port);
    }

    pub(super) fn freeze(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    pub(super) fn thaw(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(super) async fn command(&self, name: &str, args: &[&str]) -> Value {
        let client = redis::Client::open(self.config.url.as_str()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(name);
        command.arg(args);
        command.query_async(&mut connection).await.unwrap()
    }

    pub(super) async fn write(&self, name: &str, call: Call) -> Result<Value, StoreError> {
        self.store.link.submit(name, call).await
    }
}

fn run(dir: &TempDir, port: u16) -> Child {
    bound_to_this_program("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
        .args([
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
            "--save",
            "",
        ])
        .arg("--dir")
        .arg(dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
