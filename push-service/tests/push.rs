//! Pushes and what became of them, over HTTP.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use moorline_mqtt::QoS;
use moorline_push_service::Config;
use moorline_router::embedded::{self, InboxLimits, OverflowPolicy};
use moorline_router::{ClientId, DeliveryOutcome, End, EndReason, Position, StoreError};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::{KEY, Service, answer};

fn client(id: &str) -> ClientId {
    ClientId::parse(id).unwrap()
}

#[tokio::test]
async fn a_push_to_a_client_that_is_away_waits_in_its_inbox() {
    let service = Service::start().await;
    let body = json!({"to": {"client": "car-7"}, "payload": {"order": 123}, "ttl": "24h"});
    let (status, accepted) = service.post("/v1/push", &body).await;
    assert_eq!(status, 202);
    assert_eq!(accepted.as_object().unwrap().len(), 2, "{accepted}");
    assert_eq!(accepted["state"], "accepted");
    assert!(service.node.delivered.lock().unwrap().is_empty());
    let inboxes = service.store.stores().inboxes;
    let page = inboxes
        .read(&client("car-7"), Position::START, 10, 1 << 20)
        .await
        .unwrap();
    let message = &page.entries[0].message;
    assert_eq!(message.id.as_str(), accepted["id"]);
    assert_eq!(message.topic.as_str(), "d/car-7/push");
    assert_eq!(message.payload, r#"{"order":123}"#);
    assert_eq!(
        message.expires_at_ms,
        Some(message.accepted_at_ms + 24 * 3_600_000)
    );
    assert_eq!(
        message.properties.as_ref().unwrap().content_type.as_deref(),
        Some("application/json")
    );
}

#[tokio::test]
async fn a_push_to_a_connected_client_is_handed_to_its_node() {
    let service = Service::start().await;
    service.connect("car-7").await;
    let body =
        json!({"to": {"client": "car-7"}, "payload": "hi", "qos": 2, "properties": {"k": "v"}});
    let request = service
        .request(Method::POST, "/v1/push")
        .header(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        )
        .json(&body);
    let (_, accepted) = answer(request).await;
    assert_eq!(accepted["state"], "sent");
    let delivered = service.node.delivered.lock().unwrap().pop().unwrap();
    assert!(delivered.position.is_some());
    assert_eq!(delivered.message.qos, QoS::ExactlyOnce);
    let properties = delivered.message.properties.unwrap().user_properties;
    let names: Vec<_> = properties.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, ["k", "traceparent"]);
}

#[tokio::test]
async fn a_device_that_is_behind_gets_a_push_later() {
    let service = Service::start().await;
    service.connect("car-7").await;
    for outcome in [DeliveryOutcome::Behind, DeliveryOutcome::NotHere] {
        *service.node.outcome.lock().unwrap() = outcome;
        let (_, accepted) = service
            .post(
                "/v1/push",
                &json!({"to": {"client": "car-7"}, "payload": ""}),
            )
            .await;
        assert_eq!(accepted["state"], "accepted", "{outcome:?}");
    }
}

#[tokio::test]
async fn a_push_with_qos_0_is_sent_or_dropped_and_never_stored() {
    let service = Service::start().await;
    let body = json!({"to": {"client": "car-7"}, "payload": "hi", "qos": 0});
    let (_, dropped) = service.post("/v1/push", &body).await;
    assert_eq!(dropped["state"], "dropped");
    service.connect("car-7").await;
    let (_, sent) = service.post("/v1/push", &body).await;
    assert_eq!(sent["state"], "sent");
    assert_eq!(service.node.delivered.lock().unwrap()[0].position, None);
    let status = service
        .store
        .stores()
        .inboxes
        .status(&client("car-7"))
        .await
        .unwrap();
    assert_eq!(status.entries, 0);
    let path = format!("/v1/messages/{}", sent["id"].as_str().unwrap());
    let (_, message) = service.get(&path).await;
    assert_eq!(message["timeline"][1]["state"], "sent");
    assert_eq!(message["timeline"][1]["epoch"], 7);
    assert_eq!(message["timeline"][1]["node"], service.node_id.as_str());
}

#[tokio::test]
async fn a_push_to_a_topic_is_published_and_says_how_many_matched() {
    let service = Service::start().await;
    let body =
        json!({"to": {"topic": "news/today"}, "payload": "hi", "retain": true, "ttl": "1500ms"});
    let (status, accepted) = service.post("/v1/push", &body).await;
    assert_eq!(status, 202);
    assert_eq!(
        (&accepted["state"], &accepted["matched"]),
        (&json!("sent"), &json!(3))
    );
    let (id, publish) = service.node.published.lock().unwrap().pop().unwrap();
    assert_eq!(id.as_str(), accepted["id"]);
    assert_eq!(
        (publish.topic.as_str(), publish.retain),
        ("news/today", true)
    );
    assert_eq!(
        publish.properties.unwrap().message_expiry_interval_s,
        Some(2)
    );
    let (_, message) = service.get(&format!("/v1/messages/{id}")).await;
    assert_eq!(message["to"], json!({"topic": "news/today"}));
    assert_eq!(message["state"], "sent");
}

#[tokio::test]
async fn a_topic_push_that_cannot_be_made_safe_is_not_accepted() {
    let service = Service::start().await;
    *service.node.publish_error.lock().unwrap() = Some(StoreError::Unavailable("disk".into()));
    let push = || {
        service
            .request(Method::POST, "/v1/push")
            .header("Idempotency-Key", "k")
            .json(&json!({"to": {"topic": "news"}, "payload": "hi"}))
    };
    let response = push().send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    // The same request is a new attempt, not a repetition of something accepted.
    *service.node.publish_error.lock().unwrap() = None;
    let (status, accepted) = answer(push()).await;
    assert_eq!(
        (status, &accepted["state"]),
        (StatusCode::ACCEPTED, &json!("sent"))
    );
    assert_eq!(service.node.published.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_repeated_idempotency_key_is_accepted_once() {
    let service = Service::start().await;
    for to in [json!({"client": "car-7"}), json!({"topic": "news"})] {
        for qos in [0, 1] {
            let key = format!("{to}{qos}");
            let push = |payload: &str, bearer: &str| {
                service
                    .bare(Method::POST, "/v1/push")
                    .bearer_auth(bearer)
                    .header("Idempotency-Key", &key)
                    .json(&json!({"to": to, "payload": payload, "qos": qos}))
            };
            let first = push("a", KEY).send().await.unwrap();
            assert!(!first.headers().contains_key("idempotent-replayed"));
            let first: Value = first.json().await.unwrap();
            for _ in 0..2 {
                let again = push("a", KEY).send().await.unwrap();
                assert_eq!(again.status(), 202);
                assert_eq!(again.headers()["idempotent-replayed"], "true");
                let again: Value = again.json().await.unwrap();
                assert_eq!(
                    (&again["id"], &again["state"]),
                    (&first["id"], &first["state"]),
                    "{key}"
                );
            }
            let (status, problem) = answer(push("b", KEY)).await;
            assert_eq!(status, 409, "{problem}");
            assert_eq!(problem["type"], "urn:moorline:problem:idempotency-conflict");
            assert_eq!(problem["errors"][0]["field"], "Idempotency-Key");
            // Another caller's key is another key.
            let (status, other) = answer(push("b", support::PUSH_KEY)).await;
            assert_eq!(status, 202);
            assert_ne!(other["id"], first["id"]);
        }
    }
    let inboxes = service.store.stores().inboxes;
    assert_eq!(inboxes.status(&client("car-7")).await.unwrap().entries, 2);
    assert_eq!(service.node.published.lock().unwrap().len(), 4);
}

#[tokio::test]
async fn a_repetition_says_where_the_message_is_by_now() {
    let service = Service::start().await;
    let push = || {
        service
            .request(Method::POST, "/v1/push")
            .header("Idempotency-Key", "k")
            .json(&json!({"to": {"client": "c"}, "payload": "x"}))
    };
    let (_, accepted) = answer(push()).await;
    let inboxes = service.store.stores().inboxes;
    let page = inboxes
        .read(&client("c"), Position::START, 1, 1024)
        .await
        .unwrap();
    let end = End {
        client: client("c"),
        position: page.read_to,
        reason: EndReason::Delivered,
    };
    inboxes.end(vec![end]);
    // The next durable write carries the end with it.
    service
        .push(&json!({"to": {"client": "other"}, "payload": ""}))
        .await;
    let (_, again) = answer(push()).await;
    assert_eq!(
        (&again["id"], &again["state"]),
        (&accepted["id"], &json!("delivered"))
    );
    assert_eq!(inboxes.status(&client("c")).await.unwrap().entries, 0);
}

#[tokio::test]
async fn a_message_can_be_followed_and_cancelled_until_it_ends() {
    let service = Service::start().await;
    let id = service
        .push(&json!({"to": {"client": "c"}, "payload": "x"}))
        .await;
    let path = format!("/v1/messages/{id}");
    let (status, message) = service.get(&path).await;
    assert_eq!(status, 200);
    assert_eq!(
        (&message["id"], &message["to"]),
        (&json!(id), &json!({"client": "c"}))
    );
    assert_eq!(message["timeline"].as_array().unwrap().len(), 1);
    let at = message["timeline"][0]["at"].as_str().unwrap();
    assert!(at.ends_with('Z') && at.len() == 24, "{at}");
    for _ in 0..2 {
        let (status, message) = service.delete(&path).await;
        assert_eq!(
            (status, &message["state"]),
            (StatusCode::OK, &json!("cancelled"))
        );
    }
    let (_, inbox) = service.get("/v1/clients/c/inbox").await;
    assert_eq!(inbox, json!({"entries": []}));

    let published = service
        .push(&json!({"to": {"topic": "t"}, "payload": ""}))
        .await;
    let (status, problem) = service.delete(&format!("/v1/messages/{published}")).await;
    assert_eq!(status, 409);
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .ends_with("it is sent already"),
        "{problem}"
    );

    for (method, path) in [
        (Method::GET, "/v1/messages/nobody"),
        (Method::DELETE, "/v1/messages/nobody"),
    ] {
        let (status, problem) = answer(service.request(method, path)).await;
        assert_eq!(status, 404);
        assert_eq!(problem["type"], "urn:moorline:problem:receipt-expired");
    }
}

#[tokio::test]
async fn a_bad_push_is_answered_with_the_field_and_changes_nothing() {
    let service = Service::start().await;
    let (status, problem) = service
        .post("/v1/push", &json!({"to": {"client": ""}, "payload": ""}))
        .await;
    assert_eq!(status, 400);
    assert_eq!(problem["type"], "urn:moorline:problem:invalid-request");
    assert_eq!(problem["detail"], "to.client must not be empty");
    assert_eq!(
        problem["errors"],
        json!([{"field": "to.client", "detail": "must not be empty"}])
    );
    let request = service.request(Method::POST, "/v1/push").body("{\"to\":");
    let (status, problem) = answer(request).await;
    assert_eq!(status, 400);
    assert_eq!(problem["type"], "urn:moorline:problem:malformed-json");
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("line 1 column 6"),
        "{problem}"
    );
    let (_, clients) = service.get("/v1/clients").await;
    assert_eq!(clients, json!({"clients": []}));
}

#[tokio::test]
async fn bodies_are_bounded_and_must_be_json() {
    let config = Config {
        payload_bytes_max: 100,
        body_bytes_max: 300,
        ..Config::default()
    };
    let service = Service::start_with(config).await;
    let body = |length: usize| json!({"to": {"client": "c"}, "payload": "x".repeat(length)});
    assert_eq!(service.post("/v1/push", &body(100)).await.0, 202);
    let (status, problem) = service.post("/v1/push", &body(101)).await;
    assert_eq!(
        (status.as_u16(), &problem["errors"][0]["field"]),
        (413, &json!("payload"))
    );
    let (status, problem) = service.post("/v1/push", &body(400)).await;
    assert_eq!(status, 413);
    assert_eq!(problem["detail"], "the body must be at most 300 bytes");
    for (kind, expected) in [
        ("text/plain", 415),
        ("application/json; charset=utf-8", 202),
        ("application/vnd.x+json", 202),
        // What `curl -d` sends.
        ("application/x-www-form-urlencoded", 202),
    ] {
        let request = service.request(Method::POST, "/v1/push");
        let request = request
            .header("content-type", kind)
            .body(body(1).to_string());
        let (status, _) = answer(request).await;
        assert_eq!(status, expected, "{kind}");
    }
}

#[tokio::test]
async fn nothing_is_accepted_when_the_store_is_gone() {
    let service = Service::start().await;
    service.store.close().unwrap();
    let request = service.request(Method::POST, "/v1/push");
    let response = request
        .json(&json!({"to": {"client": "c"}, "payload": ""}))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "1");
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["type"], "urn:moorline:problem:store-unavailable");
    let (status, readiness) = answer(service.bare(Method::GET, "/readyz")).await;
    assert_eq!(status, 503);
    assert!(
        readiness["reasons"][0]
            .as_str()
            .unwrap()
            .starts_with("store: "),
        "{readiness}"
    );
}

#[tokio::test]
async fn a_full_inbox_that_rejects_is_a_problem_and_stores_nothing() {
    let inbox = InboxLimits {
        entries_max: 1,
        overflow: OverflowPolicy::Reject,
        ..InboxLimits::default()
    };
    let store = embedded::Config {
        inbox,
        ..embedded::Config::default()
    };
    let service = Service::start_over(Config::default(), store).await;
    let body = json!({"to": {"client": "c"}, "payload": ""});
    service.push(&body).await;
    let response = service
        .request(Method::POST, "/v1/push")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 429);
    assert!(response.headers().contains_key("retry-after"));
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["type"], "urn:moorline:problem:limit-reached");
    assert_eq!(problem["errors"][0]["field"], "to.client");
    let status = service
        .store
        .stores()
        .inboxes
        .status(&client("c"))
        .await
        .unwrap();
    assert_eq!(status.entries, 1);
}
