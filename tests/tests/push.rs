//! The HTTP API of pushes: what is accepted arrives, and its fate can be asked for.

use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, property};
use moorline_tests::{Gateway, eventually};
use reqwest::Method;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use crate::support::{
    VERSIONS, await_state, await_waiting, push_numbered, resume, run, timeline, to, waiting,
};

#[test]
fn a_push_arrives_at_a_connected_device_and_its_receipt_says_so() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        for version in VERSIONS {
            for qos in [1, 2] {
                let mut device = Device::clean(gateway.mqtt(), version, "car-7").await;
                // A session that has just begun reads its inbox first: up to then a push waits for that.
                let first = api.push_text("car-7", "first").await;
                assert_eq!(device.take().await.text(), "first");
                await_state(&api, &first, "delivered").await;
                let body = json!({
                    "to": {"client": "car-7"}, "topic": "d/car-7/orders",
                    "payload": {"order": 123}, "qos": qos, "ttl": "24h",
                });
                let answer = api.push(&body).await.expect(202);
                let id = answer["id"].as_str().unwrap();
                assert_eq!(answer["state"], "sent", "{answer}");
                let got = device.take().await;
                assert_eq!((got.topic.as_str(), got.qos), ("d/car-7/orders", qos));
                assert_eq!(got.text(), r#"{"order":123}"#);
                if version == V5 {
                    assert_eq!(got.user_property("message-id"), Some(id));
                    assert_eq!(
                        got.property(property::CONTENT_TYPE),
                        Some(&Value::Text(b"application/json".to_vec()))
                    );
                    assert!(matches!(
                        got.property(property::MESSAGE_EXPIRY),
                        Some(Value::Four(86_300..=86_400))
                    ));
                }
                let receipt = await_state(&api, id, "delivered").await;
                assert_eq!(
                    timeline(&receipt),
                    ["accepted", "sent", "delivered"],
                    "{receipt}"
                );
                let steps = receipt["timeline"].as_array().unwrap();
                assert!(
                    steps[1]["node"].is_string() && steps[1]["epoch"].is_u64(),
                    "{receipt}"
                );
                let times: Vec<_> = steps
                    .iter()
                    .map(|step| step["at"].as_str().unwrap())
                    .collect();
                assert!(
                    times.is_sorted() && times[0].ends_with('Z'),
                    "RFC 3339 in order: {times:?}"
                );
                assert_eq!(receipt["to"], json!({"client": "car-7"}));
                await_waiting(&api, "car-7", 0).await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn pushes_to_an_offline_device_arrive_in_order_when_it_connects() {
    run(async {
        let mut gateway = Gateway::start().await;
        let ids = push_numbered(&gateway.api(), "car", 0..300).await;
        assert_eq!(gateway.api().state_of(&ids[0]).await, "accepted");
        assert_eq!(waiting(&gateway.api(), "car").await, 300);
        gateway.sigterm().await;
        gateway.restart().await;
        let mut device = Device::clean(gateway.mqtt(), V3, "car").await;
        for number in 0..300 {
            let got = device.take().await;
            assert_eq!(
                (got.text(), got.topic.as_str()),
                (number.to_string(), "d/car/push")
            );
        }
        device.has_nothing().await;
        for id in [&ids[0], &ids[299]] {
            await_state(&gateway.api(), id, "delivered").await;
        }
        gateway.finish().await;
    });
}

#[test]
fn every_kind_of_payload_arrives_as_it_was_given() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut device = Device::clean(gateway.mqtt(), V5, "car").await;
        let cases: [(serde_json::Value, &[u8]); 6] = [
            (json!({"payload": "text é"}), "text é".as_bytes()),
            (json!({"payload": ""}), b""),
            (
                json!({"payload": {"a": [1, 2.5, null], "b": 1}}),
                br#"{"a":[1,2.5,null],"b":1}"#,
            ),
            (json!({"payload": 42}), b"42"),
            (json!({"payload_base64": "AAH/"}), &[0, 1, 255]),
            (json!({"payload": "x".repeat(200_000)}), &[b'x'; 200_000]),
        ];
        for (mut body, expected) in cases {
            body["to"] = json!({"client": "car"});
            api.push(&body).await.expect(202);
            assert!(
                device.take().await.payload == expected,
                "{}",
                &body.to_string()[..40]
            );
        }
        let body = json!({
            "to": {"client": "car"}, "payload": "x", "content_type": "text/plain",
            "properties": {"tenant": "north", "step": "1"},
        });
        api.push(&body).await.expect(202);
        let got = device.take().await;
        assert_eq!(got.user_property("tenant"), Some("north"));
        assert_eq!(got.user_property("step"), Some("1"));
        assert_eq!(
            got.property(property::CONTENT_TYPE),
            Some(&Value::Text(b"text/plain".to_vec()))
        );
        // Bytes on the wire stay what they were, white space or not.
        let request = api
            .request(Method::POST, "/v1/push")
            .header("content-type", "application/json");
        let text = "{ \"to\" : { \"client\" : \"car\" }, \"payload\" : { \"n\" : 1.0000000000000000001 } }";
        api.send(request.body(text)).await.expect(202);
        assert_eq!(device.take().await.text(), r#"{"n":1.0000000000000000001}"#);
        gateway.finish().await;
    });
}

#[test]
fn a_push_to_a_topic_elsewhere_reaches_the_named_client_without_a_subscription() {
    run(async {
        let gateway = Gateway::start().await;
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        let mut other = Device::clean(gateway.mqtt(), V3, "other").await;
        other.subscribe("#", 1).await;
        let body = json!({"to": {"client": "car"}, "topic": "some/where", "payload": "x"});
        gateway.api().push(&body).await.expect(202);
        let got = car.take().await;
        assert_eq!(
            (got.topic.as_str(), got.text().as_str()),
            ("some/where", "x")
        );
        other.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn a_devices_own_topics_belong_to_it_alone() {
    run(async {
        let gateway = Gateway::start().await;
        let mut car = resume(&gateway, V5, "car").await;
        car.subscribe("d/car/#", 1).await;
        let mut nosy = Device::clean(gateway.mqtt(), V5, "nosy").await;
        for filter in ["#", "d/+/push", "d/car/push"] {
            // Granted or refused: what counts is that nothing arrives.
            nosy.subscribe(filter, 1).await;
        }
        gateway.api().push_text("car", "mine").await;
        assert_eq!(car.take().await.text(), "mine");
        car.has_nothing().await;
        // Another device's publish to them is a durable push.
        car.disconnect().await;
        assert_eq!(
            nosy.publish(Publish::new("d/car/from/nosy", 1, "hi")).await,
            0
        );
        nosy.has_nothing().await;
        assert_eq!(waiting(&gateway.api(), "car").await, 1);
        let mut car = resume(&gateway, V5, "car").await;
        let got = car.take().await;
        assert_eq!(
            (got.topic.as_str(), got.text().as_str()),
            ("d/car/from/nosy", "hi")
        );
        car.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn a_topic_push_reaches_every_subscriber_and_persistent_sessions_that_are_away() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut live = Device::clean(gateway.mqtt(), V3, "live").await;
        live.subscribe("news/+", 1).await;
        let mut away = resume(&gateway, V5, "away").await;
        away.subscribe("news/#", 1).await;
        away.disconnect().await;
        let body = json!({"to": {"topic": "news/a"}, "payload": "hello", "retain": true});
        let answer = api.push(&body).await.expect(202);
        assert!(answer["id"].is_string(), "{answer}");
        assert_eq!(live.take().await.text(), "hello");
        let mut away = resume(&gateway, V5, "away").await;
        assert_eq!(away.take().await.text(), "hello");
        let mut late = Device::clean(gateway.mqtt(), V5, "late").await;
        late.subscribe("news/a", 1).await;
        let kept = late.take().await;
        assert!(kept.retain && kept.text() == "hello");
        let receipt = api
            .get(&format!("/v1/messages/{}", answer["id"].as_str().unwrap()))
            .await
            .expect(200);
        assert_eq!(receipt["to"], json!({"topic": "news/a"}));
        // No subscriber is no error.
        api.push(&json!({"to": {"topic": "nobody/here"}, "payload": "x"}))
            .await
            .expect(202);
        gateway.finish().await;
    });
}

#[test]
fn a_qos_0_push_is_sent_now_or_dropped() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let body = json!({"to": {"client": "car"}, "payload": "x", "qos": 0});
        assert_eq!(api.push(&body).await.expect(202)["state"], "dropped");
        let mut car = Device::clean(gateway.mqtt(), V3, "car").await;
        car.has_nothing().await;
        assert_eq!(api.push(&body).await.expect(202)["state"], "sent");
        assert_eq!(car.take().await.qos, 0);
        gateway.finish().await;
    });
}

#[test]
fn a_push_ends_as_expired_when_its_time_is_over() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let short = json!({"to": {"client": "car"}, "payload": "short", "ttl": "300ms"});
        let id = api.push(&short).await.expect(202)["id"]
            .as_str()
            .unwrap()
            .to_owned();
        api.push(&json!({"to": {"client": "car"}, "payload": "long", "ttl": 3600}))
            .await
            .expect(202);
        let receipt = await_state(&api, &id, "expired").await;
        assert_eq!(timeline(&receipt), ["accepted", "expired"]);
        await_waiting(&api, "car", 1).await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        assert_eq!(car.take().await.text(), "long");
        car.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_refuses_a_push_ends_it_as_rejected() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        let id = api.push_text("car", "unwanted").await;
        let got = car.next_publish().await;
        car.send(&wire::puback_with(got.packet_id, 0x99))
            .await
            .unwrap();
        let receipt = await_state(&api, &id, "rejected").await;
        assert_eq!(receipt["timeline"][2]["reason_code"], 0x99, "{receipt}");
        await_waiting(&api, "car", 0).await;
        gateway.finish().await;
    });
}

#[test]
fn a_push_larger_than_the_device_takes_ends_and_does_not_block_the_next() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let connect =
            Connect::new(V5, "small").with(property::MAXIMUM_PACKET_SIZE, Value::Four(300));
        let mut small = Device::connect(gateway.mqtt(), connect).await;
        let id = api.push_text("small", &"x".repeat(1000)).await;
        api.push_text("small", "fits").await;
        assert_eq!(small.take().await.text(), "fits");
        eventually(SOON, "the receipt says that it was too large", || async {
            let state = api.state_of(&id).await;
            state.replace(['-', '_'], "").eq("toolarge").then_some(())
        })
        .await;
        gateway.finish().await;
    });
}

#[test]
fn a_push_can_be_cancelled_until_it_is_delivered() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let id = api.push_text("car", "never").await;
        api.push_text("car", "arrives").await;
        let cancelled = api.delete(&format!("/v1/messages/{id}")).await;
        assert!(matches!(cancelled.status, 200 | 204), "{cancelled:?}");
        assert_eq!(api.state_of(&id).await, "cancelled");
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        assert_eq!(car.take().await.text(), "arrives");
        car.has_nothing().await;
        let id = api.push_text("car", "too late").await;
        car.take().await;
        await_state(&api, &id, "delivered").await;
        api.delete(&format!("/v1/messages/{id}")).await.problem(409);
        api.delete("/v1/messages/0197f2a0-0000-7000-8000-000000000000")
            .await
            .problem(404);
        gateway.finish().await;
    });
}

#[test]
fn an_idempotency_key_makes_a_repeated_push_one_message() {
    run(async {
        let mut gateway = Gateway::start().await;
        let push = |api: moorline_tests::Api, key: &'static str, text: &'static str| async move {
            let request = api
                .request(Method::POST, "/v1/push")
                .header("idempotency-key", key);
            api.send(request.json(&to("car", text))).await
        };
        let first = push(gateway.api(), "order-1", "once").await;
        let id = first.expect(202)["id"].clone();
        assert_eq!(first.header("idempotent-replayed"), "");
        let second = push(gateway.api(), "order-1", "once").await;
        assert!((200..300).contains(&second.status), "{second:?}");
        assert_eq!(second.json()["id"], id);
        assert_eq!(second.header("idempotent-replayed"), "true");
        push(gateway.api(), "order-1", "something else")
            .await
            .problem(409);
        let other = push(gateway.api(), "order-2", "twice").await.expect(202);
        assert_ne!(other["id"], id);
        // At the same time, too.
        let answers = tokio::join!(
            push(gateway.api(), "order-3", "together"),
            push(gateway.api(), "order-3", "together"),
            push(gateway.api(), "order-3", "together"),
        );
        let ids = [answers.0, answers.1, answers.2].map(|answer| answer.json()["id"].clone());
        assert!(
            ids.iter()
                .filter(|one| one.is_string())
                .all(|one| one == ids.iter().find(|one| one.is_string()).unwrap())
        );
        gateway.kill9();
        gateway.restart().await;
        let third = push(gateway.api(), "order-1", "once").await;
        assert_eq!(third.json()["id"], id, "the key is known after a kill");
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        for text in ["once", "twice", "together"] {
            assert_eq!(car.take().await.text(), text);
        }
        car.has_nothing().await;
        await_state(&gateway.api(), id.as_str().unwrap(), "delivered").await;
        let after = push(gateway.api(), "order-1", "once").await;
        assert_eq!(
            after.json()["id"],
            id,
            "the key is known after the delivery"
        );
        car.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn a_thousand_concurrent_pushes_arrive_once_each() {
    run(async {
        let gateway = Gateway::start().await;
        let mut devices = Vec::new();
        for n in 0..20 {
            devices.push(
                Device::clean(
                    gateway.mqtt(),
                    if n % 2 == 0 { V3 } else { V5 },
                    &format!("car-{n}"),
                )
                .await,
            );
        }
        let mut pushes = tokio::task::JoinSet::new();
        for n in 0..20 {
            let api = gateway.api();
            pushes.spawn(async move { push_numbered(&api, &format!("car-{n}"), 0..50).await });
        }
        for device in &mut devices {
            for number in 0..50 {
                assert_eq!(device.take().await.text(), number.to_string());
            }
        }
        pushes.join_all().await;
        for device in &mut devices {
            device.has_nothing().await;
        }
        tokio::time::timeout(Duration::from_secs(20), gateway.finish())
            .await
            .unwrap();
    });
}

#[test]
fn the_trace_of_a_push_travels_to_the_device() {
    run(async {
        let gateway = Gateway::start().await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let api = gateway.api();
        let request = api
            .request(Method::POST, "/v1/push")
            .header("traceparent", trace);
        api.send(request.json(&to("car", "x"))).await.expect(202);
        assert_eq!(car.take().await.user_property("traceparent"), Some(trace));
        gateway.finish().await;
    });
}

#[test]
fn a_push_is_delivered_at_once_although_its_caller_hangs_up() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        let body = to("car", "x").to_string();
        let request = format!(
            "POST /v1/push HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n{body}",
            moorline_tests::gateway::API_KEY,
            body.len()
        );
        for _ in 0..20 {
            let mut caller = tokio::net::TcpStream::connect(gateway.http).await.unwrap();
            caller.write_all(request.as_bytes()).await.unwrap();
        }
        // Far less than the half minute after which lost hints are found.
        let mut arrived = 0;
        while car.take_within(Duration::from_secs(2)).await.is_some() {
            arrived += 1;
        }
        assert!(arrived > 0);
        let inbox = api.get("/v1/clients/car/inbox").await.expect(200);
        assert_eq!(
            inbox["entries"].as_array().map(Vec::len),
            Some(0),
            "{inbox}"
        );
        gateway.finish().await;
    });
}

#[test]
fn a_device_cannot_take_over_the_receipt_of_a_push_by_its_message_id() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let id = api.push_text("victim", "mine").await;
        let mut other = Device::clean(gateway.mqtt(), V5, "other").await;
        let name = Value::Pair("message-id".into(), id.clone());
        let forged = Publish::new("d/elsewhere/x", 1, "forged").with(property::USER_PROPERTY, name);
        assert!(other.publish(forged).await < 0x80);
        let receipt = api.get(&format!("/v1/messages/{id}")).await.expect(200);
        assert_eq!(receipt["to"], json!({"client": "victim"}));
        let mut elsewhere = Device::clean(gateway.mqtt(), V5, "elsewhere").await;
        assert_eq!(elsewhere.take().await.text(), "forged");
        let mut victim = Device::clean(gateway.mqtt(), V5, "victim").await;
        assert_eq!(victim.take().await.text(), "mine");
        crate::support::await_state(&api, &id, "delivered").await;
        gateway.finish().await;
    });
}
