//! The roles of a cluster as processes: what they print, what each of them answers, how a node parts with its devices.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use moorline_tests::cluster::{Stores, command};
use moorline_tests::device::{Arrived, Device};
use moorline_tests::gateway::clean_command;
use moorline_tests::others::run as run_program;
use moorline_tests::role::{Log, Role};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Connect, Packet, V3, V5, Value, property};
use moorline_tests::{API_KEY, Api, eventually};
use rustix::process::Signal;
use serde_json::json;

use crate::support::run;

/// Processes of one cluster.
struct Cluster {
    stores: Stores,
    work: tempfile::TempDir,
    log: Log,
}

impl Cluster {
    async fn new() -> Self {
        Self {
            stores: Stores::shared().await,
            work: tempfile::tempdir().unwrap(),
            log: Log::default(),
        }
    }

    /// `cluster` goes into the `[cluster]` section, which is the last one.
    fn command(&self, role: &str, name: &str, cluster: &str) -> Command {
        let command = command(&self.stores, role, name, "", self.work.path());
        let file = self.work.path().join(name).join("moorline.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, format!("{text}{cluster}\n")).unwrap();
        command
    }

    fn start(&self, role: &str, name: &str, cluster: &str) -> Role {
        Role::launch(name, self.command(role, name, cluster), &self.log)
    }

    fn log(&self) -> String {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }
}

fn at(role: &Role, kind: &str) -> SocketAddr {
    role.listener(kind)
        .unwrap_or_else(|| panic!("no listening {kind}"))
}

fn api(role: &Role) -> Api {
    Api::new(at(role, "http"), Some(API_KEY))
}

/// What a process that does not start says, on its one line.
async fn refused(command: Command) -> String {
    run_program(command).await.one_line(2).to_owned()
}

async fn nodes(api: &Api) -> Vec<serde_json::Value> {
    let nodes = api.get("/v1/nodes").await.expect(200);
    nodes["nodes"].as_array().unwrap().clone()
}

/// A DISCONNECT as it comes, with its Server Reference.
async fn goodbye(device: &mut Device, patience: Duration) -> (u8, Option<String>) {
    let deadline = Instant::now() + patience;
    loop {
        match device
            .receive(deadline.saturating_duration_since(Instant::now()))
            .await
        {
            Arrived::Packet(Packet::Disconnect { reason, properties }) => {
                let reference = properties
                    .iter()
                    .find(|(id, _)| *id == property::SERVER_REFERENCE);
                let reference = reference.map(|(_, value)| match value {
                    Value::Text(text) => String::from_utf8(text.clone()).unwrap(),
                    other => panic!("{other:?}"),
                });
                return (reason, reference);
            }
            Arrived::Packet(_) => {}
            other => panic!("no DISCONNECT but {other:?}"),
        }
    }
}

#[test]
fn a_push_reaches_a_device_on_a_node_of_another_process() {
    run(async {
        let cluster = Cluster::new().await;
        let node = cluster.start("access-node", "a", "region = \"east\"");
        let push = cluster.start("push-service", "push", "");
        assert!(node.listener("internal").is_some() && push.listener("internal").is_none());
        assert!(push.listener("mqtt").is_none());
        let api = api(&push);
        let mut device = Device::clean(at(&node, "mqtt"), V5, "car-7").await;
        let answer = api
            .push(&json!({"to": {"client": "car-7"}, "payload": "hello", "qos": 1}))
            .await;
        assert_eq!(answer.expect(202)["state"], "sent");
        assert_eq!(device.take().await.payload, b"hello");
        let client = api.get("/v1/clients/car-7").await.expect(200);
        assert_eq!(
            (&client["online"], &client["transport"]),
            (&json!(true), &json!("tcp"))
        );
        let listed = nodes(&api).await;
        assert_eq!(listed.len(), 1, "{listed:?}");
        assert_eq!(
            (&listed[0]["region"], &listed[0]["state"]),
            (&json!("east"), &json!("up"))
        );
        assert!(
            listed[0]["id"].as_str().unwrap().starts_with("a-"),
            "{listed:?}"
        );
        assert_eq!(listed[0]["address"], at(&node, "internal").to_string());
        assert_eq!(client["node"], listed[0]["id"]);
        assert_eq!(api.delete("/v1/clients/car-7/connection").await.status, 204);
        assert_eq!(device.await_close(SOON).await, Some(0x98));
        // What devices sent is not read here.
        let problem = api.get("/v1/upstream").await.expect(404);
        assert!(
            problem["detail"].as_str().unwrap().contains("RabbitMQ"),
            "{problem}"
        );
    });
}

#[test]
fn each_role_is_alive_ready_and_counted_and_only_the_push_service_has_the_api() {
    run(async {
        let cluster = Cluster::new().await;
        for (role, name) in [
            ("access-node", "a"),
            ("push-service", "push"),
            ("upstream-worker", "worker"),
            ("delay-queue", "delays"),
        ] {
            let process = cluster.start(role, name, "");
            let api = api(&process);
            assert_eq!(
                api.get("/healthz").await.expect(200),
                json!({"status": "ok"})
            );
            // Some connections to RabbitMQ are made a moment after the start.
            let ready = eventually(SOON, "it is ready", || async {
                let answer = api.get("/readyz").await;
                (answer.status == 200).then(|| answer.json())
            });
            assert_eq!(ready.await["ready"], true, "{role}");
            assert_eq!(api.get("/metrics").await.status, 200);
            let counted = eventually(SOON, "what is shared is counted", || async {
                let text = api.get("/metrics").await.text;
                let mut expected = vec![
                    "moorline_redis_connects_total ",
                    "moorline_redis_calls_total{way=\"write\"}",
                    "moorline_redis_batch_calls_bucket{way=\"write\",le=\"1\"}",
                    "moorline_redis_errors_total{way=\"read\"} 0",
                    "moorline_rabbitmq_connects_total{link=\"moorline upstream\"}",
                    "moorline_rabbitmq_confirmed_total{publisher=\"moorline upstream\"}",
                    "moorline_rabbitmq_unconfirmed{publisher=\"moorline upstream\",lane=\"0\"} 0",
                ];
                if role == "push-service" {
                    // It writes when it is called.
                    expected.retain(|name| !name.contains("write"));
                }
                let lacking = expected.iter().find(|name| !text.contains(**name));
                lacking.is_none().then_some(text)
            });
            counted.await;
            let expected = if role == "push-service" { 200 } else { 404 };
            assert_eq!(api.get("/v1/nodes").await.status, expected, "{role}");
            let unknown = api.get("/no/such/path").await;
            assert_eq!(
                unknown.expect(404)["type"],
                "urn:moorline:problem:not-found"
            );
        }
    });
}

#[test]
fn a_role_that_lacks_something_says_what_to_do_on_one_line() {
    run(async {
        let cluster = Cluster::new().await;
        let work = tempfile::tempdir().unwrap();
        let bare = |arguments: &[&str]| {
            let mut command = clean_command(work.path());
            command
                .args(arguments)
                .args(["--http-listen", "127.0.0.1:0"]);
            command
        };
        for role in [
            "access-node",
            "push-service",
            "upstream-worker",
            "delay-queue",
        ] {
            let why = refused(bare(&[role])).await;
            assert!(
                why.contains("redis.url") && why.contains("rabbitmq.url"),
                "{why}"
            );
        }
        let mut half = bare(&["serve"]);
        half.env("MOORLINE_REDIS__URL", "redis://127.0.0.1:1");
        let why = refused(half).await;
        assert!(why.contains("rabbitmq.url is not"), "{why}");
        let mut keyless = cluster.command("push-service", "keyless", "");
        keyless.env_remove("MOORLINE_API_KEY");
        let why = refused(keyless).await;
        assert!(why.contains("MOORLINE_API_KEY"), "{why}");
        let mut open = cluster.command("access-node", "open", "");
        open.env("MOORLINE_CLUSTER__INTERNAL_LISTEN", "0.0.0.0:0");
        open.env("MOORLINE_CLUSTER__SECRET", "");
        let why = refused(open).await;
        assert!(why.contains("cluster.secret"), "{why}");
        assert!(is_empty(work.path()), "something was written");
    });
}

fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).unwrap().next().is_none()
}

#[test]
fn a_node_that_drains_sends_its_devices_to_another_of_its_region_and_gives_its_lease_up_last() {
    run(async {
        const DEVICES: usize = 40;
        let cluster = Cluster::new().await;
        let drain = "region = \"east\"\n[cluster.drain]\nrate = 20\ntimeout = \"30s\"";
        let mut leaving = cluster.start("access-node", "leaving", drain);
        let far = "region = \"west\"\nserver_reference = \"far:1883\"";
        let _far = cluster.start("access-node", "far", far);
        let near = "region = \"east\"\nserver_reference = \"near:1883\"";
        let near = cluster.start("access-node", "near", near);
        let push = cluster.start("push-service", "push", "");
        let api = api(&push);
        let mut devices = Vec::new();
        for number in 0..DEVICES {
            let version = if number % 2 == 0 { V5 } else { V3 };
            let connect = Connect::new(version, &format!("car-{number}")).persistent();
            devices.push(Device::connect(at(&leaving, "mqtt"), connect).await);
        }
        let started = Instant::now();
        leaving.signal(Signal::TERM);
        // It says so to whoever asks, and takes nobody any more.
        let admin = api.at(at(&leaving, "http"));
        let ready = eventually(SOON, "the node is not ready", || async {
            let answer = admin.get("/readyz").await;
            (answer.status == 503).then(|| answer.json())
        });
        assert!(
            ready.await["reasons"][0]
                .as_str()
                .unwrap()
                .starts_with("draining")
        );
        eventually(SOON, "the registry knows", || async {
            let listed = nodes(&api).await;
            let node = listed
                .iter()
                .find(|node| node["id"].as_str().unwrap().starts_with("leaving-"));
            (node?["state"] == "draining").then_some(())
        })
        .await;
        let late = Device::try_connect(at(&leaving, "mqtt"), Connect::new(V5, "late")).await;
        assert!(late.is_err(), "a new device was taken");
        // Who is still there is delivered to, who has left waits for nothing.
        let mut said = 0;
        for (number, device) in devices.iter_mut().enumerate() {
            if number % 2 == 0 {
                let (reason, reference) = goodbye(device, Duration::from_secs(30)).await;
                assert_eq!((reason, reference.as_deref()), (0x9C, Some("near:1883")));
                said += 1;
            } else {
                assert_eq!(device.await_close(Duration::from_secs(30)).await, None);
            }
        }
        assert_eq!(said, DEVICES / 2);
        let took = started.elapsed();
        assert!(
            took > Duration::from_millis(1500),
            "40 devices at 20 a second left in {took:?}"
        );
        let status = leaving.wait(2 * SOON).await;
        assert!(status.success(), "{status:?}\n{}", cluster.log());
        eventually(SOON, "the lease is given up", || async {
            (nodes(&api).await.len() == 2).then_some(())
        })
        .await;
        // Its sessions go on elsewhere.
        api.push_text("car-0", "after").await;
        let connect = Connect::new(V5, "car-0").persistent();
        let mut moved = Device::connect(at(&near, "mqtt"), connect).await;
        assert!(moved.session_present);
        assert_eq!(moved.take().await.payload, b"after");
    });
}

#[test]
fn a_node_that_is_asked_to_drain_needs_a_key_and_stays_until_it_is_stopped() {
    run(async {
        let cluster = Cluster::new().await;
        let mut node = cluster.start("access-node", "alone", "");
        let admin = api(&node);
        let mut device = Device::clean(at(&node, "mqtt"), V5, "car-7").await;
        let nobody = admin.with_key(None).post("/admin/drain", &json!({})).await;
        assert_eq!(nobody.status, 401);
        device.ping().await;
        let answer = admin.post("/admin/drain", &json!({})).await;
        assert_eq!(answer.expect(202), json!({"state": "draining"}));
        // There is no other node.
        assert_eq!(goodbye(&mut device, SOON).await, (0x8B, None));
        eventually(SOON, "it is not ready", || async {
            (admin.get("/readyz").await.status == 503).then_some(())
        })
        .await;
        assert_eq!(admin.get("/healthz").await.status, 200);
        assert!(node.ended().is_none());
        node.signal(Signal::TERM);
        assert!(node.wait(2 * SOON).await.success(), "{}", cluster.log());
    });
}

#[test]
fn a_node_whose_redis_is_gone_says_so_and_keeps_its_devices() {
    run(async {
        let mut cluster = Cluster::new().await;
        let mut redis = moorline_tests::servers::RedisServer::start().await;
        cluster.stores.redis = format!("url = \"{}\"\n", redis.url());
        let node = cluster.start("access-node", "a", "");
        let push = cluster.start("push-service", "push", "");
        let mut device = Device::clean(at(&node, "mqtt"), V5, "car-7").await;
        redis.stop().await;
        for process in [&node, &push] {
            let api = api(process);
            let reasons = eventually(2 * SOON, "it is not ready", || async {
                let answer = api.get("/readyz").await;
                (answer.status == 503).then(|| answer.json()["reasons"].to_string())
            });
            let reasons = reasons.await;
            assert!(reasons.contains("redis: "), "{reasons}");
        }
        let refused = api(&push)
            .push(&json!({"to": {"client": "car-7"}, "payload": "x", "qos": 1}))
            .await;
        assert_eq!(refused.status, 503);
        device.ping().await;
        redis.restart().await;
        for process in [&node, &push] {
            let api = api(process);
            eventually(3 * SOON, "it is ready again", || async {
                (api.get("/readyz").await.status == 200).then_some(())
            })
            .await;
        }
        device.ping().await;
    });
}

#[test]
fn all_roles_in_one_process_work_on_redis_and_rabbitmq() {
    run(async {
        let cluster = Cluster::new().await;
        let serve = |name| {
            let mut command = cluster.command("serve", name, "");
            command.args(["--mqtt-listen", "127.0.0.1:0", "--ws-listen", "off"]);
            Role::launch(name, command, &cluster.log)
        };
        let (one, other) = (serve("one"), serve("other"));
        let mut device = Device::clean(at(&one, "mqtt"), V5, "car-7").await;
        for process in [&one, &other] {
            let push = json!({"to": {"client": "car-7"}, "payload": "hi", "qos": 1});
            let answer = api(process).push(&push).await;
            assert_eq!(answer.expect(202)["state"], "sent");
            assert_eq!(device.take().await.payload, b"hi");
        }
        let ready = api(&other).get("/readyz").await.expect(200);
        assert_eq!(ready["ready"], true);
        // The newest connection wins, wherever it is.
        let mut newer = Device::clean(at(&other, "mqtt"), V5, "car-7").await;
        assert_eq!(goodbye(&mut device, SOON).await.0, 0x8E);
        newer.ping().await;
    });
}
