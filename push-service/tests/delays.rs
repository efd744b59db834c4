//! Delayed jobs over HTTP, as far as the API decides: keys, ids, what is kept. Nobody carries them out here.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use moorline_router::{ActionKind, JobId, NodeId};
use reqwest::Method;
use serde_json::{Value, json};
use support::{PUSH_KEY, Service, answer};

fn hook(id: &str) -> Value {
    json!({"id": id, "delay": "1h", "action": {"webhook": {"url": "http://127.0.0.1:9/"}}})
}

#[tokio::test]
async fn each_call_needs_its_scope_and_a_job_that_pushes_that_of_a_push() {
    let service = Service::start().await;
    for (method, path, scope) in [
        (Method::POST, "/v1/delays", "delay"),
        (Method::POST, "/v1/delays/batch", "delay"),
        (Method::PATCH, "/v1/delays/x", "delay"),
        (Method::DELETE, "/v1/delays/x", "delay"),
        (Method::DELETE, "/v1/delays?cancel_on=a:1", "delay"),
        (Method::POST, "/v1/delays/x/trigger", "delay"),
        (Method::POST, "/v1/events", "delay"),
        (Method::POST, "/v1/delays/x/retry", "admin"),
        (Method::GET, "/v1/delays", "read"),
        (Method::GET, "/v1/delays/x", "read"),
        (Method::GET, "/v1/delays/count", "read"),
    ] {
        let request = service.bare(method.clone(), path).json(&json!({}));
        let (status, problem) = answer(request.bearer_auth(PUSH_KEY)).await;
        assert_eq!(status, 403, "{method} {path}");
        assert!(
            problem["detail"].as_str().unwrap().contains(scope),
            "{problem}"
        );
        let request = service.bare(method.clone(), path).json(&json!({}));
        assert_eq!(answer(request).await.0, 401, "{method} {path}");
    }
    // A push may be delayed by whoever may push.
    let push = json!({"to": {"client": "car"}, "payload": "hi", "delay": "1h"});
    let request = service.bare(Method::POST, "/v1/push").json(&push);
    assert_eq!(answer(request.bearer_auth(PUSH_KEY)).await.0, 202);
}

#[tokio::test]
async fn a_delayed_push_is_kept_as_it_was_asked_for_and_named_by_its_idempotency_key() {
    let service = Service::start().await;
    let push = json!({"to": {"client": "car-7"}, "payload": {"b": 1, "a": [1.50]}, "qos": 2, "deliver_at": "2035-01-01T00:00:00Z"});
    let keyed = |body: Value| {
        let request = service.request(Method::POST, "/v1/push").json(&body);
        answer(request.header("Idempotency-Key", "order-1"))
    };
    let (status, first) = keyed(push.clone()).await;
    assert_eq!(
        (status.as_u16(), &first["state"]),
        (202, &json!("scheduled"))
    );
    let (status, again) = keyed(push.clone()).await;
    assert_eq!((status.as_u16(), &again), (202, &first));
    let mut other = push;
    other["payload"] = json!("other");
    let (status, problem) = keyed(other).await;
    assert_eq!(status, 409);
    assert_eq!(problem["type"], "urn:moorline:problem:idempotency-conflict");
    let (_, job) = service
        .get(&format!("/v1/delays/{}", first["delay"].as_str().unwrap()))
        .await;
    assert_eq!(job["fire_at"], "2035-01-01T00:00:00.000Z");
    assert_eq!(job["actions"][0]["id"], first["id"]);
    assert_eq!(
        job["actions"][0]["request"]["to"],
        json!({"client": "car-7"})
    );
    let id = JobId::parse(first["delay"].as_str().unwrap()).unwrap();
    let stored = service.store.stores().jobs.get(&id).await.unwrap().unwrap();
    let action = &stored.plan.actions[0];
    assert_eq!(action.kind, ActionKind::Push);
    let spec = std::str::from_utf8(&action.spec).unwrap();
    assert!(
        spec.contains(r#""payload":{"b":1,"a":[1.50]}"#)
            || spec.contains(r#""payload":{"a":[1.5],"b":1}"#),
        "{spec}"
    );
    assert!(!spec.contains("deliver_at"), "{spec}");
    let both = json!({"to": {"client": "c"}, "payload": "", "delay": 1, "deliver_at": "2035-01-01T00:00:00Z"});
    let (status, problem) = service.post("/v1/push", &both).await;
    assert_eq!(
        (status.as_u16(), &problem["errors"][0]["field"]),
        (400, &json!("deliver_at"))
    );
}

#[tokio::test]
async fn a_job_that_has_begun_is_refused_with_its_state() {
    let service = Service::start().await;
    let mut due = hook("begun");
    due["delay"] = json!(0);
    assert_eq!(service.post("/v1/delays", &due).await.0, 201);
    let jobs = service.store.stores().jobs;
    let holder = NodeId::for_this_run("test");
    let now_ms = moorline_router::unix_ms() + 1;
    let claimed = jobs.claim(0, &holder, now_ms, 10, 60_000).await.unwrap();
    assert_eq!(claimed.jobs.len(), 1);
    for (method, path) in [
        (Method::DELETE, "/v1/delays/begun"),
        (Method::PATCH, "/v1/delays/begun"),
        (Method::POST, "/v1/delays/begun/trigger"),
    ] {
        let request = service.request(method, path).json(&json!({"delay": "1h"}));
        let (status, problem) = answer(request).await;
        assert_eq!(
            (status.as_u16(), &problem["state"]),
            (409, &json!("firing")),
            "{path}"
        );
        assert_eq!(problem["type"], "urn:moorline:problem:job-begun");
    }
}

#[tokio::test]
async fn the_order_of_fields_makes_no_other_job() {
    let service = Service::start().await;
    let text = |body: &'static str| {
        service
            .request(Method::POST, "/v1/delays")
            .header("content-type", "application/json")
            .body(body)
    };
    let first = r#"{"id": "a", "delay": "1h", "action": {"push": {"to": {"client": "c"}, "payload": "x", "qos": 1}}}"#;
    let again = r#"{"action": {"push": {"qos": 1, "payload": "x", "to": {"client": "c"}}}, "id": "a", "delay": 3600}"#;
    assert_eq!(answer(text(first)).await.0, 201);
    assert_eq!(answer(text(again)).await.0, 200);
    let (status, _) = service.get("/v1/delays/a").await;
    assert_eq!(status, 200);
}
