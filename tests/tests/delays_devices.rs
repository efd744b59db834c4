//! What devices have to do with delayed jobs: `$delay/{seconds}/{topic}`, and events that come of what they publish.

use std::time::{Duration, Instant};

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Publish, V3, V5};
use moorline_tests::{Gateway, Options, eventually};
use serde_json::json;

use crate::support::{QUIET, run};

/// What an MQTT 5.0 PUBACK says.
const NOT_AUTHORIZED: u8 = 0x87;
const TOPIC_NAME_INVALID: u8 = 0x90;
const QUOTA_EXCEEDED: u8 = 0x97;

#[test]
fn a_device_publishes_later_to_subscribers_and_upstream() {
    run(async {
        let gateway = Gateway::start().await;
        let mut listener = Device::clean(gateway.mqtt(), V5, "listener").await;
        listener.subscribe("room/+", 1).await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        let began = Instant::now();
        for qos in 0..3 {
            let publish = Publish::new(&format!("$delay/1/room/{qos}"), qos, "later");
            assert!(car.publish(publish).await < 0x80);
        }
        assert!(
            car.publish(Publish::new("$delay/1/up/state", 1, "hot"))
                .await
                < 0x80
        );
        assert!(listener.take_within(QUIET).await.is_none(), "not yet");
        let mut topics = Vec::new();
        for _ in 0..3 {
            let arrived = listener.take().await;
            assert!(began.elapsed() >= Duration::from_secs(1), "never early");
            assert_eq!(arrived.payload, b"later");
            topics.push(arrived.topic);
        }
        topics.sort();
        assert_eq!(topics, ["room/0", "room/1", "room/2"]);
        let upstream = eventually(SOON, "the message upstream", || async {
            let messages = gateway.drain_upstream("reader").await;
            messages.into_iter().next()
        })
        .await;
        assert_eq!(
            (&upstream["client"], &upstream["topic"]),
            (&json!("car"), &json!("up/state"))
        );
        assert!(listener.take_within(QUIET).await.is_none(), "once each");
        gateway.finish().await;
    });
}

#[test]
fn a_delay_that_cannot_be_is_refused_with_its_reason() {
    run(async {
        let gateway =
            Gateway::start_with(Options::config("[delays]\ndevice_delay_max = \"1h\"\n")).await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        for (topic, reason) in [
            ("$delay/3601/t", QUOTA_EXCEEDED),
            ("$delay/soon/t", TOPIC_NAME_INVALID),
            ("$delay/1", TOPIC_NAME_INVALID),
            ("$delay/1/$SYS/x", TOPIC_NAME_INVALID),
            ("$other/1/t", TOPIC_NAME_INVALID),
        ] {
            assert_eq!(
                car.publish(Publish::new(topic, 1, "x")).await,
                reason,
                "{topic}"
            );
        }
        // 3.1.1 has no way to be told: acknowledged, and nothing comes of it.
        let mut old = Device::clean(gateway.mqtt(), V3, "old").await;
        assert_eq!(old.publish(Publish::new("$delay/3601/t", 1, "x")).await, 0);
        let counts = gateway.api().get("/v1/delays/count").await.expect(200);
        assert_eq!(counts["pending"], 0);
        gateway.finish().await;
        let off =
            Gateway::start_with(Options::config("[delays]\ndevice_delay_max = \"0s\"\n")).await;
        let mut car = Device::clean(off.mqtt(), V5, "car").await;
        assert_eq!(
            car.publish(Publish::new("$delay/1/t", 1, "x")).await,
            TOPIC_NAME_INVALID
        );
        off.finish().await;
    });
}

#[test]
fn an_authenticated_device_must_be_allowed_to_delay_and_to_publish_that() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let passwords = directory.path().join("passwords");
        let add = |user: &str| {
            let config = directory.path().join("moorline.toml");
            std::fs::write(&config, "").unwrap();
            let mut command = moorline_tests::gateway::clean_command(directory.path());
            command.args(["passwd", "--file"]).arg(&passwords).arg(user);
            command.stdin(std::process::Stdio::piped());
            let mut child = command.spawn().unwrap();
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"secret\n").unwrap();
            assert!(child.wait().unwrap().success());
        };
        add("may");
        add("not");
        let config = format!(
            "[auth]\nchain = [\"password_file\"]\n[auth.password_file]\nfile = \"{}\"\n\
             [[acl.rules]]\npermission = \"allow\"\naction = \"publish\"\ntopics = [\"$delay/#\"]\nusers = [\"may\"]\n",
            passwords.display()
        );
        let gateway = Gateway::start_with(Options::config(&config)).await;
        for (user, topic, reason) in [
            ("may", "$delay/3600/up/x", 0),
            ("may", "$delay/3600/elsewhere", NOT_AUTHORIZED),
            ("not", "$delay/3600/up/x", NOT_AUTHORIZED),
        ] {
            let mut connect = moorline_tests::wire::Connect::new(V5, &format!("{user}-device"));
            connect.user_name = Some(user.to_owned());
            connect.password = Some(b"secret".to_vec());
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            let code = device.publish(Publish::new(topic, 1, "x")).await;
            // "No matching subscribers" is no refusal.
            assert_eq!(if code < 0x80 { 0 } else { code }, reason, "{user} {topic}");
        }
        gateway.finish().await;
    });
}

#[test]
fn what_a_device_publishes_later_survives_kill_9() {
    run(async {
        let mut gateway = Gateway::start().await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        // With it there is something to read from, wherever that is.
        assert!(car.publish(Publish::new("up/n", 1, "now")).await < 0x80);
        for n in 0..5 {
            assert!(
                car.publish(Publish::new("$delay/2/up/n", 1, n.to_string()))
                    .await
                    < 0x80
            );
        }
        gateway.kill9();
        gateway.restart().await;
        let mut seen = Vec::new();
        let deadline = Instant::now() + SOON;
        while seen.len() < 6 && Instant::now() < deadline {
            for message in gateway.drain_upstream("again").await {
                seen.push(message["payload"].as_str().unwrap().to_owned());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        seen.sort();
        seen.dedup();
        assert_eq!(seen, ["0", "1", "2", "3", "4", "now"]);
        gateway.finish().await;
    });
}

#[test]
fn a_device_has_no_more_delayed_publications_than_it_may_have() {
    run(async {
        let config = "[delays.kept]\ndevice_jobs_max = 2\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut new = Device::clean(gateway.mqtt(), V5, "new").await;
        let mut old = Device::clean(gateway.mqtt(), V3, "old").await;
        for (device, refused) in [(&mut new, QUOTA_EXCEEDED), (&mut old, 0)] {
            for n in 0..2 {
                let publish = Publish::new("$delay/3600/t", 1 + n, "x");
                assert!(device.publish(publish).await < 0x80);
            }
            for qos in 1..3 {
                let publish = Publish::new("$delay/3600/t", qos, "x");
                assert_eq!(device.publish(publish).await, refused);
            }
            // It goes on, and so does what is not delayed.
            assert!(device.publish(Publish::new("t", 2, "x")).await < 0x80);
        }
        let counts = gateway.api().get("/v1/delays/count").await.expect(200);
        assert_eq!(counts["pending"], 4);
        gateway.finish().await;
    });
}

#[test]
fn an_event_comes_of_what_a_device_publishes_later_when_it_is_published() {
    run(async {
        let config = "[[delays.topics]]\nfilter = \"up/orders/+/paid\"\ntype = \"order.paid\"\nkey = \"{3}\"\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let api = gateway.api();
        let job = json!({"id": "order", "delay": "1h", "cancel_on": ["order.paid:77"], "action": {"webhook": {"url": "http://127.0.0.1:9/"}}});
        api.post("/v1/delays", &job).await.expect(201);
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        let publish = Publish::new("$delay/1/up/orders/77/paid", 1, "");
        assert!(car.publish(publish).await < 0x80);
        assert_eq!(api.get("/v1/delays/order").await.json()["state"], "pending");
        let order = eventually(SOON, "the event comes", || async {
            let order = api.get("/v1/delays/order").await.expect(200);
            (order["state"] == "cancelled").then_some(order)
        })
        .await;
        assert_eq!(order["by_event"], "order.paid:77");
        gateway.finish().await;
    });
}

#[test]
fn an_event_comes_of_what_a_device_publishes_before_its_puback() {
    run(async {
        let config = "[[delays.topics]]\nfilter = \"up/orders/+/paid\"\ntype = \"order.paid\"\nkey = \"{3}\"\n\
                      [[delays.topics]]\nfilter = \"up/seats\"\ntype = \"seat.taken\"\nkey = \"/seat\"\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let api = gateway.api();
        let job = |id: &str, event: &str| json!({"id": id, "delay": "1h", "cancel_on": [event], "action": {"webhook": {"url": "http://127.0.0.1:9/"}}});
        api.post("/v1/delays", &job("order", "order.paid:77"))
            .await
            .expect(201);
        api.post("/v1/delays", &job("seat", "seat.taken:14C"))
            .await
            .expect(201);
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        assert!(car.publish(Publish::new("up/orders/77/paid", 1, "")).await < 0x80);
        let order = api.get("/v1/delays/order").await.expect(200);
        assert_eq!(
            (&order["state"], &order["by_event"]),
            (&json!("cancelled"), &json!("order.paid:77"))
        );
        assert!(car.publish(Publish::new("up/seats", 1, "no json")).await < 0x80);
        assert_eq!(api.get("/v1/delays/seat").await.json()["state"], "pending");
        assert!(
            car.publish(Publish::new("up/seats", 2, r#"{"seat": "14C"}"#))
                .await
                < 0x80
        );
        assert_eq!(
            api.get("/v1/delays/seat").await.json()["state"],
            "cancelled"
        );
        // It went upstream all the same.
        assert_eq!(gateway.drain_upstream("reader").await.len(), 3);
        gateway.finish().await;
    });
}
