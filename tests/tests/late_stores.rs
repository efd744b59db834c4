//! Processes of a cluster that start before Redis and RabbitMQ do.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::PoisonError;
use std::time::Duration;

use moorline_tests::cluster::Stores;
use moorline_tests::device::Device;
use moorline_tests::gateway::clean_command;
use moorline_tests::role::{Log, Role, Starting};
use moorline_tests::servers::process::free_port;
use moorline_tests::servers::{RabbitServer, RedisServer};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::V5;
use moorline_tests::{API_KEY, Api, eventually};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::support::run;

/// Longer than a broker takes to come up on a busy machine.
const COMES_UP: Duration = Duration::from_secs(60);

struct World {
    stores: Stores,
    work: TempDir,
    log: Log,
}

impl World {
    /// Starts a process whose HTTP face is known before it says so.
    fn begin(&self, role: &str, name: &str) -> (Starting, Api) {
        let home = self.work.path().join(name);
        std::fs::create_dir_all(&home).unwrap();
        let file = home.join("moorline.toml");
        std::fs::write(&file, self.stores.sections(name)).unwrap();
        let http = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut command: Command = clean_command(&home);
        command.arg(role).arg("--config").arg(&file);
        command.arg("--data-dir").arg(home.join("data"));
        command.args(["--mqtt-listen", "127.0.0.1:0", "--ws-listen", "127.0.0.1:0"]);
        command.args(["--http-listen", &http.to_string()]);
        let starting = Role::begin(&format!("{name} "), command, &self.log);
        (starting, Api::new(http, Some(API_KEY)))
    }

    fn log(&self) -> String {
        let log = self.log.lock();
        log.unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Alive, not ready, and says what it waits for.
    async fn await_waiting(&self, api: &Api, what: &str) {
        let said = async || {
            let answer = api.try_get("/readyz").await.ok()?;
            let reasons = answer.json()["reasons"].to_string();
            (answer.status == 503 && reasons.contains(what)).then_some(())
        };
        eventually(SOON, &format!("what is waited for: {what}"), said).await;
        assert_eq!(api.get("/healthz").await.status, 200, "{}", self.log());
    }

    async fn await_ready(&self, api: &Api) {
        let ready = async || {
            let answer = api.try_get("/readyz").await.ok()?;
            (answer.status == 200).then_some(())
        };
        eventually(COMES_UP, "the process is ready", ready).await;
    }
}

#[test]
fn processes_that_start_before_their_servers_wait_for_them() {
    run(async {
        let (mut redis, mut rabbit) = (RedisServer::start().await, RabbitServer::start().await);
        let stores = Stores::on(&redis.url(), rabbit.vhost().await);
        redis.stop().await;
        rabbit.stop().await;
        let world = World {
            stores,
            work: tempfile::tempdir().unwrap(),
            log: Log::default(),
        };
        let (node, node_api) = world.begin("access-node", "node");
        let (all, all_api) = world.begin("serve", "all");
        let (given_up, given_up_api) = world.begin("access-node", "given-up");
        let (push, push_api) = world.begin("push-service", "push");
        let (worker, worker_api) = world.begin("upstream-worker", "worker");
        for api in [&node_api, &all_api, &given_up_api] {
            world.await_waiting(api, "it waits for the store").await;
        }
        world.await_waiting(&push_api, "redis").await;
        world.await_waiting(&worker_api, "rabbitmq").await;
        let mut given_up = given_up.into_role();
        given_up.signal(Signal::TERM);
        assert_eq!(given_up.wait(SOON).await.code(), Some(0), "{}", world.log());

        redis.restart().await;
        for api in [&node_api, &all_api, &push_api] {
            world.await_ready(api).await;
        }
        let (node, all, push) = (node.ready(), all.ready(), push.ready());
        // What needs no broker works without it.
        for process in [&node, &all] {
            let mqtt = process.listener("mqtt").unwrap();
            let mut device = Device::clean(mqtt, V5, "car-7").await;
            let pushed = json!({"to": {"client": "car-7"}, "payload": "hello", "qos": 1});
            push_api.push(&pushed).await.expect(202);
            assert_eq!(device.take().await.payload, b"hello");
        }
        rabbit.restart().await;
        world.await_ready(&worker_api).await;
        let mut device = Device::clean(node.listener("mqtt").unwrap(), V5, "sender").await;
        let up = moorline_tests::wire::Publish::new("up/x", 1, "upstream");
        assert_eq!(device.publish(up).await, 0);
        for mut process in [node, all, push, worker.ready()] {
            process.signal(Signal::TERM);
            assert_eq!(
                process.wait(2 * SOON).await.code(),
                Some(0),
                "{}",
                world.log()
            );
        }
    });
}
