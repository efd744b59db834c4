//! `moorline migrate`: the way from one machine to a cluster.

use moorline_tests::cluster::{self, Stores};
use moorline_tests::device::Device;
use moorline_tests::gateway::Options;
use moorline_tests::role::{Log, Role};
use moorline_tests::servers::{RabbitServer, RedisServer};
use moorline_tests::wire::{Connect, Publish, V5};
use moorline_tests::{API_KEY, Api, Gateway};
use serde_json::json;

use crate::support::{resume, run};

const PUSHES: usize = 30;

fn migration(data: &std::path::Path, stores: &Stores, redis: &RedisServer) -> Options {
    let mut options = Options {
        bare: true,
        ..Options::default()
    };
    for argument in [
        "migrate",
        "--to",
        &redis.url(),
        "--key-prefix",
        &stores.prefix,
        "--data-dir",
        &data.to_string_lossy(),
    ] {
        options = options.arg(argument);
    }
    options
}

#[test]
fn a_wrong_way_to_migrate_is_said_in_one_line() {
    run(async {
        let redis = RedisServer::start().await;
        let work = tempfile::tempdir().expect("a temporary directory can be made");
        let nothing = work.path().join("nothing");
        let told = |to: &str| {
            let options = ["migrate", "--data-dir", &nothing.to_string_lossy()]
                .into_iter()
                .chain(
                    (!to.is_empty())
                        .then_some(["--to", to])
                        .into_iter()
                        .flatten(),
                )
                .fold(
                    Options {
                        bare: true,
                        ..Options::default()
                    },
                    |options, argument| options.arg(argument),
                );
            Gateway::run_to_end(&options).one_line(2).to_owned()
        };
        let why = told(&redis.url());
        assert!(why.contains("no data directory"), "{why}");
        assert!(!nothing.exists(), "nothing is made by the attempt");
        let why = told("");
        assert!(why.contains("where to?"), "{why}");
        let why = told("http://127.0.0.1:1");
        assert!(why.contains("redis"), "{why}");
    });
}

#[test]
fn what_was_promised_on_one_machine_is_kept_by_the_cluster() {
    run(async {
        let mut gateway = Gateway::start().await;
        let mut device = resume(&gateway, V5, "car").await;
        device.subscribe("news/#", 1).await;
        device.disconnect().await;
        let mut ids = Vec::new();
        for n in 0..PUSHES {
            ids.push(gateway.api().push_text("car", &n.to_string()).await);
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "publisher").await;
        publisher
            .publish(Publish::new("news/x", 1, "published"))
            .await;
        let mut kept = Publish::new("state", 1, "kept");
        kept.retain = true;
        publisher.publish(kept).await;
        publisher.publish(Publish::new("up/x", 1, "upstream")).await;
        publisher.disconnect().await;

        let redis = RedisServer::start().await;
        let rabbit = RabbitServer::shared().await;
        let stores = Stores::on(&redis.url(), rabbit.vhost().await);
        let migrate = migration(&gateway.data_dir(), &stores, &redis);
        let refused = Gateway::run_to_end(&migrate);
        let why = refused.one_line(2);
        assert!(
            why.contains("in use") && why.contains("stop the gateway"),
            "{why}"
        );
        gateway.sigterm().await;
        let done = Gateway::run_to_end(&migrate);
        assert_eq!(done.status.code(), Some(0), "{done:?}");
        for line in [
            "1 sessions copied",
            "1 inboxes copied",
            "31 messages copied",
            "1 retained messages copied",
            "1 messages left in upstream queue",
            "done",
        ] {
            assert!(done.stdout.contains(line), "{line}: {done:?}");
        }
        let again = Gateway::run_to_end(&migrate);
        let why = again.one_line(2);
        assert!(why.contains("completed before"), "{why}");

        let work = tempfile::tempdir().expect("a temporary directory can be made");
        let log = Log::default();
        let start = |role: &str, name: &str| {
            let command = cluster::command(&stores, role, name, "", work.path());
            Role::launch(name, command, &log)
        };
        let node = start("access-node", "node");
        let push = start("push-service", "push");
        let mqtt = node.listener("mqtt").expect("an access node listens");
        let mut device = Device::connect(mqtt, Connect::new(V5, "car").persistent()).await;
        assert!(device.session_present);
        for n in 0..PUSHES {
            assert_eq!(device.take().await.text(), n.to_string());
        }
        assert_eq!(device.take().await.text(), "published");
        let mut publisher = Device::clean(mqtt, V5, "publisher").await;
        publisher.publish(Publish::new("news/y", 1, "live")).await;
        assert_eq!(
            device.take().await.text(),
            "live",
            "the subscription moved too"
        );
        publisher.subscribe("state", 1).await;
        assert_eq!(publisher.take().await.text(), "kept");
        let api = Api::new(
            push.listener("http").expect("a push service listens"),
            Some(API_KEY),
        );
        for id in ids {
            let deadline = std::time::Duration::from_secs(20);
            moorline_tests::eventually(deadline, "the receipt says so", async || {
                (api.state_of(&id).await == "delivered").then_some(())
            })
            .await;
        }
        let pushed =
            json!({"to": {"client": "car"}, "topic": "d/car/push", "payload": "after", "qos": 1});
        api.push(&pushed).await.expect(202);
        assert_eq!(device.take().await.text(), "after");
        node.kill9();
        push.kill9();
    });
}
