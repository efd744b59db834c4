//! What devices publish to `up/#`: durable before its PUBACK, read by consumers or sent to backends.

use std::time::{Duration, Instant};

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Publish, V3, V5, Value, property};
use moorline_tests::{Backend, Gateway, Options, eventually, soon};
use serde_json::{Value as Json, json};

use crate::support::run;

fn payloads(messages: &[Json]) -> Vec<String> {
    messages
        .iter()
        .map(|one| one["payload"].as_str().unwrap_or("?").to_owned())
        .collect()
}

fn rule(name: &str, filter: &str, url: &str, more: &str) -> String {
    format!(
        "[[upstream.rules]]\nname = \"{name}\"\nfilter = \"{filter}\"\nurl = \"{url}\"\n{more}\n"
    )
}

const FAST_RETRY: &str = "retry = { attempts = 6, initial = \"20ms\", max = \"100ms\" }";

#[test]
fn messages_are_read_in_order_with_who_sent_what() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        for (qos, text) in [(0, "zero"), (1, "one"), (2, "two")] {
            assert!(car.publish(Publish::new("up/state/é", qos, text)).await < 0x80);
        }
        car.publish(Publish::new("up/raw", 1, vec![0, 255])).await;
        let page = eventually(SOON, "four messages", || async {
            let page = api
                .get("/v1/upstream?consumer=reader&limit=100&wait=0s")
                .await
                .expect(200);
            (page["messages"].as_array()?.len() == 4).then_some(page)
        })
        .await;
        let messages = page["messages"].as_array().unwrap();
        assert_eq!(payloads(messages), ["zero", "one", "two", "?"]);
        assert_eq!(messages[3]["payload_base64"], "AP8=");
        for (message, qos) in messages.iter().zip([0, 1, 2, 1]) {
            assert_eq!(message["client"], "car");
            assert_eq!(message["qos"], qos);
            assert!(
                message["id"].is_string() && message["at"].as_str().unwrap().ends_with('Z'),
                "{message}"
            );
        }
        assert_eq!(messages[0]["topic"], "up/state/é");
        // Without an ack the same comes again; with it, only what is new.
        let again = api
            .get("/v1/upstream?consumer=reader&wait=0s")
            .await
            .expect(200);
        assert_eq!(again["messages"].as_array().unwrap().len(), 4);
        let body = json!({"consumer": "reader", "cursor": page["next"]});
        assert!(api.post("/v1/upstream/ack", &body).await.status < 300);
        car.publish(Publish::new("up/state", 1, "new")).await;
        let page = api
            .get("/v1/upstream?consumer=reader&wait=0s")
            .await
            .expect(200);
        assert_eq!(payloads(page["messages"].as_array().unwrap()), ["new"]);
        gateway.finish().await;
    });
}

#[test]
fn the_cursor_of_a_page_leads_to_the_next() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        for n in 0..25 {
            car.publish(Publish::new("up/n", 1, n.to_string())).await;
        }
        let mut all = Vec::new();
        let mut after = String::new();
        loop {
            let path = format!("/v1/upstream?consumer=reader&limit=10&wait=0s{after}");
            let page = api.get(&path).await.expect(200);
            let messages = page["messages"].as_array().unwrap();
            if messages.is_empty() {
                break;
            }
            assert!(messages.len() <= 10);
            all.extend(payloads(messages));
            let next = page["next"].as_str().unwrap_or_else(|| panic!("{page}"));
            after = format!("&after={next}");
        }
        assert_eq!(all, (0..25).map(|n| n.to_string()).collect::<Vec<_>>());
        api.get("/v1/upstream?consumer=reader&after=nonsense")
            .await
            .problem(400);
        api.get("/v1/upstream?colour=red").await.problem(400);
        api.get("/v1/upstream?consumer=reader&limit=0")
            .await
            .problem(400);
        gateway.finish().await;
    });
}

#[test]
fn a_long_poll_answers_when_something_comes_and_not_before() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        let empty = Instant::now();
        let page = api
            .get("/v1/upstream?consumer=reader&wait=400ms")
            .await
            .expect(200);
        assert_eq!(page["messages"], json!([]));
        assert!(
            empty.elapsed() >= Duration::from_millis(350),
            "after {:?}",
            empty.elapsed()
        );
        let polling = tokio::spawn({
            let api = api.clone();
            async move {
                api.get("/v1/upstream?consumer=reader&wait=20s")
                    .await
                    .expect(200)
            }
        });
        // The poll has to be there first: it is when its request is counted.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!polling.is_finished());
        let sent = Instant::now();
        car.publish(Publish::new("up/x", 1, "now")).await;
        let page = soon("the poll", polling).await.unwrap();
        assert_eq!(payloads(page["messages"].as_array().unwrap()), ["now"]);
        assert!(
            sent.elapsed() < Duration::from_secs(5),
            "{:?}",
            sent.elapsed()
        );
        gateway.finish().await;
    });
}

#[test]
fn consumers_have_a_cursor_each_that_survives_a_restart() {
    run(async {
        let mut gateway = Gateway::start().await;
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        // Both are known before anything may be trimmed.
        for consumer in ["fast", "slow"] {
            gateway
                .api()
                .get(&format!("/v1/upstream?consumer={consumer}&wait=0s"))
                .await
                .expect(200);
        }
        for n in 0..10 {
            car.publish(Publish::new("up/n", 1, n.to_string())).await;
        }
        assert_eq!(gateway.drain_upstream("fast").await.len(), 10);
        drop(car);
        gateway.kill9();
        gateway.restart().await;
        assert_eq!(gateway.drain_upstream("fast").await.len(), 0);
        assert_eq!(gateway.drain_upstream("slow").await.len(), 10);
        gateway.finish().await;
    });
}

#[test]
fn server_sent_events_follow_the_stream() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        car.publish(Publish::new("up/x", 1, "before")).await;
        let events = |last: Option<String>| {
            let mut request = api
                .request(reqwest::Method::GET, "/v1/upstream?consumer=events")
                .header("accept", "text/event-stream");
            if let Some(last) = last {
                request = request.header("last-event-id", last);
            }
            request.send()
        };
        let mut stream = events(None).await.unwrap();
        assert_eq!(stream.status(), 200);
        assert!(
            stream.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/event-stream")
        );
        let mut text = String::new();
        let mut sent_more = false;
        while !text.contains("after") {
            let chunk = soon("an event", stream.chunk())
                .await
                .unwrap()
                .expect("the stream goes on");
            text.push_str(&String::from_utf8_lossy(&chunk));
            if text.contains("before") && !sent_more {
                sent_more = true;
                car.publish(Publish::new("up/x", 1, "after")).await;
            }
        }
        assert!(sent_more && text.contains("\"client\":\"car\""), "{text}");
        let ids: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("id:"))
            .map(|id| id.trim().to_owned())
            .collect();
        assert!(ids.len() >= 2, "{text}");
        drop(stream);
        // From the first event's id on, only the second comes.
        let mut stream = events(Some(ids[0].clone())).await.unwrap();
        let mut text = String::new();
        while !text.contains("\n\n") || !text.contains("data:") {
            let chunk = soon("an event", stream.chunk())
                .await
                .unwrap()
                .expect("the stream goes on");
            text.push_str(&String::from_utf8_lossy(&chunk));
        }
        assert!(text.contains("after") && !text.contains("before"), "{text}");
        drop(stream);
        gateway.finish().await;
    });
}

#[test]
fn upstream_topics_reach_ordinary_subscribers_too() {
    run(async {
        let gateway = Gateway::start().await;
        let mut listener = Device::clean(gateway.mqtt(), V3, "listener").await;
        listener.subscribe("up/#", 1).await;
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        car.publish(Publish::new("up/x", 1, "both")).await;
        assert_eq!(listener.take().await.text(), "both");
        assert_eq!(payloads(&gateway.drain_upstream("reader").await), ["both"]);
        // And what is elsewhere does not go upstream.
        car.publish(Publish::new("uptime/x", 1, "no")).await;
        assert!(gateway.drain_upstream("reader").await.is_empty());
        gateway.finish().await;
    });
}

#[test]
fn a_rule_sends_each_message_to_its_backend_as_it_was() {
    run(async {
        let backend = Backend::start().await;
        let config = rule(
            "orders",
            "up/orders/#",
            &backend.url("/hook/{client_id}?topic={topic}"),
            "",
        );
        let gateway = Gateway::start_with(Options::config(&config)).await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car/7 é").await;
        let publish = Publish::new("up/orders/new", 1, r#"{"n": 1}"#)
            .with(
                property::CONTENT_TYPE,
                Value::Text(b"application/json".to_vec()),
            )
            .with(
                property::USER_PROPERTY,
                Value::Pair("message-id".into(), "my-own-id".into()),
            );
        car.publish(publish).await;
        let calls = backend.await_calls(1).await;
        let call = &calls[0];
        assert_eq!(
            (call.method.as_str(), call.text().as_str()),
            ("POST", r#"{"n": 1}"#)
        );
        assert_eq!(call.path, "/hook/car%2F7%20%C3%A9?topic=up%2Forders%2Fnew");
        assert_eq!(call.header("content-type"), "application/json");
        assert_eq!(
            call.header("webhook-id"),
            "my-own-id",
            "a device's own message id is kept"
        );
        assert!(
            !call.header("moorline-topic").is_empty()
                && !call.header("moorline-client-id").is_empty()
        );
        // What no rule takes stays for consumers.
        car.publish(Publish::new("up/other", 1, "default")).await;
        assert_eq!(
            payloads(&gateway.drain_upstream("reader").await),
            ["default"]
        );
        assert_eq!(backend.calls().len(), 1);
        gateway.finish().await;
    });
}

#[test]
fn a_backend_that_fails_for_a_while_gets_everything_in_order() {
    run(async {
        // Every message fails twice first, in ways that can pass.
        let failures = std::sync::Mutex::new(std::collections::HashMap::<String, u16>::new());
        let backend = Backend::answering(move |call, _| {
            let mut failures = failures.lock().unwrap();
            let tries = failures
                .entry(call.header("webhook-id").to_owned())
                .or_default();
            *tries += 1;
            (
                match *tries {
                    1 => 503,
                    2 => 429,
                    _ => 200,
                },
                Duration::ZERO,
            )
        })
        .await;
        let gateway = Gateway::start_with(Options::config(&rule(
            "all",
            "up/#",
            &backend.url("/"),
            FAST_RETRY,
        )))
        .await;
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        for n in 0..10 {
            car.publish(Publish::new("up/n", 1, n.to_string())).await;
        }
        let calls = backend.await_calls(30).await;
        let expected: Vec<String> = (0..10).flat_map(|n| vec![n.to_string(); 3]).collect();
        assert_eq!(
            calls
                .iter()
                .map(moorline_tests::Call::text)
                .collect::<Vec<_>>(),
            expected
        );
        gateway.finish().await;
    });
}

#[test]
fn what_a_backend_refuses_becomes_a_dead_letter_that_can_be_retried() {
    run(async {
        let refuse = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let backend = {
            let refuse = std::sync::Arc::clone(&refuse);
            Backend::answering(move |call, _| {
                let bad = call.text() == "bad" && refuse.load(std::sync::atomic::Ordering::Acquire);
                (if bad { 400 } else { 200 }, Duration::ZERO)
            })
            .await
        };
        let gateway = Gateway::start_with(Options::config(&rule(
            "all",
            "up/#",
            &backend.url("/"),
            FAST_RETRY,
        )))
        .await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        car.publish(Publish::new("up/x", 1, "bad")).await;
        car.publish(Publish::new("up/x", 1, "good")).await;
        let calls = backend.await_calls(2).await;
        assert_eq!(
            (calls[0].text().as_str(), calls[1].text().as_str()),
            ("bad", "good"),
            "4xx is not tried again"
        );
        let letter = eventually(SOON, "a dead letter", || async {
            let body = api.get("/v1/dead-letters").await.expect(200);
            let list = body["dead_letters"]
                .as_array()
                .unwrap_or_else(|| panic!("{body}"));
            list.first().cloned()
        })
        .await;
        assert!(
            letter.to_string().contains("400") && letter.to_string().contains("car"),
            "{letter}"
        );
        refuse.store(false, std::sync::atomic::Ordering::Release);
        let id = letter["id"].as_str().unwrap();
        let retried = api
            .post(&format!("/v1/dead-letters/{id}/retry"), &json!({}))
            .await;
        assert!(retried.status < 300, "{retried:?}");
        assert_eq!(backend.await_calls(3).await[2].text(), "bad");
        eventually(SOON, "no dead letter", || async {
            let body = api.get("/v1/dead-letters").await.expect(200);
            body["dead_letters"].as_array()?.is_empty().then_some(())
        })
        .await;
        gateway.finish().await;
    });
}

#[test]
fn a_slow_backend_of_one_rule_does_not_stop_another() {
    run(async {
        let slow = Backend::answering(|_, _| (200, Duration::from_secs(30))).await;
        let quick = Backend::start().await;
        let config = rule("slow", "up/slow", &slow.url("/"), "")
            + &rule("quick", "up/quick", &quick.url("/"), "");
        let gateway = Gateway::start_with(Options::config(&config)).await;
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        for n in 0..20 {
            car.publish(Publish::new("up/slow", 1, n.to_string())).await;
            car.publish(Publish::new("up/quick", 1, n.to_string()))
                .await;
        }
        let calls = quick.await_calls(20).await;
        assert_eq!(
            calls
                .iter()
                .map(moorline_tests::Call::text)
                .collect::<Vec<_>>(),
            (0..20).map(|n| n.to_string()).collect::<Vec<_>>()
        );
        drop(slow);
        drop(gateway);
    });
}

#[test]
fn what_a_backend_did_not_take_before_kill_9_is_sent_after_the_restart() {
    run(async {
        let config_for = |url: &str| {
            rule(
                "all",
                "up/#",
                url,
                "retry = { attempts = 100, initial = \"20ms\", max = \"50ms\" }",
            )
        };
        let down = Backend::answering(|_, _| (503, Duration::ZERO)).await;
        let mut gateway = Gateway::start_with(Options::config(&config_for(&down.url("/")))).await;
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        for n in 0..20 {
            car.publish(Publish::new("up/n", 1, n.to_string())).await;
        }
        down.await_calls(2).await;
        gateway.kill9();
        let backend = Backend::start().await;
        gateway
            .restart_with(Options::config(&config_for(&backend.url("/"))))
            .await;
        let calls = backend.await_calls(20).await;
        assert_eq!(
            calls
                .iter()
                .map(moorline_tests::Call::text)
                .collect::<Vec<_>>(),
            (0..20).map(|n| n.to_string()).collect::<Vec<_>>()
        );
        gateway.finish().await;
    });
}

#[test]
fn what_follows_a_refused_publish_is_not_stored_before_it() {
    run(async {
        let config = "[store]\nupstream_queue_bytes_max = 1048576\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let api = gateway.api();
        let mut filler = Device::clean(gateway.mqtt(), V5, "filler").await;
        assert!(
            filler
                .publish(Publish::new("up/x", 1, vec![b'f'; 600_000]))
                .await
                < 0x80
        );
        let first = vec![b'1'; 700_000];
        let burst = |version| {
            let mut bytes = Vec::new();
            for (id, payload) in [
                (1, first.clone()),
                (2, b"two".to_vec()),
                (3, b"three".to_vec()),
            ] {
                let publish = Publish {
                    packet_id: id,
                    ..Publish::new("up/x", 1, payload)
                };
                bytes.extend(wire::publish(version, &publish));
            }
            bytes
        };
        // 3.1.1 cannot be told: the connection ends, and nothing that came after is there.
        let mut old = Device::clean(gateway.mqtt(), V3, "old").await;
        old.send(&burst(V3)).await.unwrap();
        old.await_close(SOON).await;
        // 5.0 is told, keeps the connection, and goes on without that message.
        let mut new = Device::clean(gateway.mqtt(), V5, "new").await;
        new.send(&burst(V5)).await.unwrap();
        assert_eq!(new.await_puback(1).await, 0x97);
        assert!(new.await_puback(2).await < 0x80);
        assert!(new.await_puback(3).await < 0x80);
        let stored = api.drain_upstream("reader").await;
        let senders: Vec<&str> = stored
            .iter()
            .map(|one| one["client"].as_str().unwrap())
            .collect();
        assert_eq!(senders, ["filler", "new", "new"]);
        assert_eq!(payloads(&stored)[1..], ["two", "three"]);
        gateway.finish().await;
    });
}
