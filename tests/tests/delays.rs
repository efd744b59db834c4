//! Delayed jobs as a backend and a device see them.

use std::time::{Duration, Instant};

use moorline_tests::api::Answer;
use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::V5;
use moorline_tests::{Api, Backend, Call, Gateway, Options, eventually};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{QUIET, resume, run};

/// Failed attempts are repeated soon.
const FAST: &str = "[delays.retry]\nattempts = 3\ninitial = \"20ms\"\nmax = \"100ms\"\n";

/// A job that calls `backend` after `delay`.
pub(crate) fn call(backend: &Backend, id: &str, delay: &str) -> Value {
    json!({"id": id, "delay": delay, "action": {"webhook": {"url": backend.url("/due"), "body": {"job": id}}}})
}

pub(crate) async fn create(api: &Api, job: &Value) -> Value {
    api.post("/v1/delays", job).await.expect(201)
}

async fn state(api: &Api, id: &str) -> String {
    let job = api.get(&format!("/v1/delays/{id}")).await.expect(200);
    job["state"].as_str().unwrap().to_owned()
}

async fn await_state(api: &Api, id: &str, wanted: &str) -> Value {
    eventually(SOON, &format!("{id} is {wanted}"), || async {
        let job = api.get(&format!("/v1/delays/{id}")).await.expect(200);
        (job["state"] == wanted).then_some(job)
    })
    .await
}

pub(crate) async fn patch(api: &Api, id: &str, body: &Value) -> Answer {
    let path = format!("/v1/delays/{id}");
    api.send(api.request(Method::PATCH, &path).json(body)).await
}

#[test]
fn a_job_fires_at_its_time_once_and_never_before() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let began = Instant::now();
        let job = create(&api, &call(&backend, "order-1", "700ms")).await;
        assert_eq!(
            (&job["id"], &job["state"]),
            (&json!("order-1"), &json!("pending"))
        );
        let called = backend.await_calls(1).await.remove(0);
        assert!(
            called.at - began >= Duration::from_millis(700),
            "{:?}",
            called.at - began
        );
        assert_eq!(
            (called.method.as_str(), called.path.as_str()),
            ("POST", "/due")
        );
        assert_eq!(called.text(), r#"{"job":"order-1"}"#);
        assert_eq!(called.header("content-type"), "application/json");
        assert_eq!(called.header("ce-specversion"), "1.0");
        assert_eq!(called.header("ce-type"), "moorline.delay.due");
        assert_eq!(called.header("ce-subject"), "order-1");
        let job = await_state(&api, "order-1", "fired").await;
        assert_eq!(job["actions"][0]["state"], "done");
        assert_eq!(job["actions"][0]["id"], called.header("webhook-id"));
        assert!(job["ended_at"].is_string());
        tokio::time::sleep(QUIET).await;
        assert_eq!(backend.calls().len(), 1);
        gateway.finish().await;
    });
}

#[test]
fn a_cancelled_job_never_fires_and_one_that_fired_says_so() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        create(&api, &call(&backend, "kept", "500ms")).await;
        create(&api, &call(&backend, "gone", "500ms")).await;
        for _ in 0..2 {
            let gone = api.delete("/v1/delays/gone").await.expect(200);
            assert_eq!(gone["state"], "cancelled");
        }
        await_state(&api, "kept", "fired").await;
        for answer in [
            api.delete("/v1/delays/kept").await,
            patch(&api, "kept", &json!({"delay": "1h"})).await,
            api.post("/v1/delays/kept/trigger", &json!({})).await,
            api.post("/v1/delays/kept/retry", &json!({})).await,
        ] {
            answer.problem(409);
            assert_eq!(answer.json()["state"], "fired", "{}", answer.text);
        }
        assert_eq!(
            patch(&api, "gone", &json!({"delay": "1s"})).await.json()["state"],
            "cancelled"
        );
        for answer in [
            api.get("/v1/delays/other").await,
            api.delete("/v1/delays/other").await,
            patch(&api, "other", &json!({"delay": "1s"})).await,
        ] {
            answer.problem(404);
        }
        assert_eq!(state(&api, "gone").await, "cancelled");
        tokio::time::sleep(QUIET).await;
        assert_eq!(backend.calls().len(), 1);
        gateway.finish().await;
    });
}

#[test]
fn the_same_id_is_the_same_job_and_another_body_is_refused() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let job = call(&backend, "once", "1h");
        create(&api, &job).await;
        let again = api.post("/v1/delays", &job).await;
        assert_eq!(again.expect(200)["id"], "once");
        assert_eq!(again.header("idempotent-replayed"), "true");
        let other = api.post("/v1/delays", &call(&backend, "once", "2h")).await;
        other.problem(409);
        assert_eq!(other.json()["state"], "pending");
        // Without an id the Idempotency-Key names it.
        let mut nameless = job.clone();
        nameless.as_object_mut().unwrap().remove("id");
        let keyed = |key: &'static str| {
            let request = api.request(Method::POST, "/v1/delays").json(&nameless);
            api.send(request.header("Idempotency-Key", key))
        };
        let first = keyed("a").await.expect(201);
        assert_eq!(keyed("a").await.expect(200)["id"], first["id"]);
        assert_ne!(keyed("b").await.expect(201)["id"], first["id"]);
        // The job stays the same one after it was changed and after it ended.
        patch(&api, "once", &json!({"delay": 0})).await.expect(200);
        await_state(&api, "once", "fired").await;
        assert_eq!(
            api.post("/v1/delays", &job).await.expect(200)["state"],
            "fired"
        );
        assert_eq!(backend.calls().len(), 1);
        gateway.finish().await;
    });
}

#[test]
fn a_job_can_be_moved_changed_and_triggered_while_it_waits() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        create(&api, &call(&backend, "moved", "1h")).await;
        create(&api, &call(&backend, "changed", "1h")).await;
        create(&api, &call(&backend, "triggered", "1h")).await;
        patch(&api, "moved", &json!({"delay": "100ms"}))
            .await
            .expect(200);
        let body = json!({"fire_at": "2020-01-01T00:00:00Z", "action": {"webhook": {"url": backend.url("/other"), "body": "new"}}});
        patch(&api, "changed", &body).await.expect(200);
        let triggered = api.post("/v1/delays/triggered/trigger", &json!({})).await;
        triggered.expect(200);
        let calls = backend.await_calls(3).await;
        let mut bodies: Vec<String> = calls.iter().map(Call::text).collect();
        bodies.sort();
        assert_eq!(
            bodies,
            ["new", r#"{"job":"moved"}"#, r#"{"job":"triggered"}"#]
        );
        gateway.finish().await;
    });
}

#[test]
fn an_event_cancels_or_triggers_every_job_that_names_it() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        for n in 0..5 {
            let mut job = call(&backend, &format!("cancel-{n}"), "1h");
            job["cancel_on"] = json!(["order.paid:1"]);
            create(&api, &job).await;
        }
        let mut job = call(&backend, "ship", "1h");
        job["trigger_on"] = json!(["order.paid:1", "order.paid:2"]);
        create(&api, &job).await;
        let event = json!({"type": "order.paid", "key": "1", "id": "e-1"});
        for _ in 0..2 {
            let told = api.post("/v1/events", &event).await.expect(202);
            assert_eq!(
                (&told["cancelled"], &told["triggered"]),
                (&json!(5), &json!(1))
            );
        }
        let call = backend.await_calls(1).await.remove(0);
        assert_eq!(call.text(), r#"{"job":"ship"}"#);
        let job = await_state(&api, "ship", "fired").await;
        assert_eq!(job["by_event"], "order.paid:1");
        for n in 0..5 {
            assert_eq!(state(&api, &format!("cancel-{n}")).await, "cancelled");
        }
        let nothing = api
            .post("/v1/events", &json!({"type": "order.paid", "key": "7"}))
            .await;
        assert_eq!(nothing.expect(202)["cancelled"], 0);
        gateway.finish().await;
    });
}

#[test]
fn an_event_that_comes_before_its_job_still_counts() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        api.post("/v1/events", &json!({"type": "order.paid", "key": "5"}))
            .await
            .expect(202);
        let mut job = call(&backend, "late", "200ms");
        job["cancel_on"] = json!(["order.paid:5"]);
        assert_eq!(create(&api, &job).await["state"], "cancelled");
        let mut job = call(&backend, "due", "1h");
        job["trigger_on"] = json!(["order.paid:5"]);
        create(&api, &job).await;
        await_state(&api, "due", "fired").await;
        tokio::time::sleep(QUIET).await;
        assert_eq!(backend.calls().len(), 1);
        gateway.finish().await;
    });
}

#[test]
fn jobs_are_withdrawn_by_what_would_cancel_them() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        for n in 0..3 {
            let mut job = call(&backend, &format!("j-{n}"), "1h");
            job["cancel_on"] = json!([format!("user.left:{}", n % 2)]);
            create(&api, &job).await;
        }
        let gone = api.delete("/v1/delays?cancel_on=user.left:0").await;
        assert_eq!(gone.expect(200), json!({"cancelled": 2}));
        assert_eq!(state(&api, "j-1").await, "pending");
        assert_eq!(api.delete("/v1/delays").await.problem(400), ["cancel_on"]);
        // It was no event: a job of later does not hear of it.
        let mut job = call(&backend, "later", "1h");
        job["cancel_on"] = json!(["user.left:0"]);
        assert_eq!(create(&api, &job).await["state"], "pending");
        gateway.finish().await;
    });
}

#[test]
fn a_delayed_push_arrives_when_it_is_due_under_the_id_that_was_told() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut car = Device::clean(gateway.mqtt(), V5, "car-7").await;
        let began = Instant::now();
        let push = json!({"to": {"client": "car-7"}, "payload": {"seat": "14C"}, "delay": "600ms"});
        let accepted = api.push(&push).await.expect(202);
        assert_eq!(accepted["state"], "scheduled");
        let arrived = car.take().await;
        assert!(began.elapsed() >= Duration::from_millis(600));
        assert_eq!(arrived.payload, br#"{"seat":"14C"}"#);
        let id = accepted["id"].as_str().unwrap();
        eventually(SOON, "the push is delivered", || async {
            (api.state_of(id).await == "delivered").then_some(())
        })
        .await;
        let job = accepted["delay"].as_str().unwrap();
        let job = await_state(&api, job, "fired").await;
        assert_eq!(job["actions"][0]["id"], id);
        // As an action among others, for a device that is away.
        drop(car);
        let job = json!({"id": "two", "delay": 0, "action": [
            {"push": {"to": {"client": "away"}, "payload": "one"}},
            {"push": {"to": {"client": "away"}, "payload": "two"}}]});
        create(&api, &job).await;
        await_state(&api, "two", "fired").await;
        let mut away = resume(&gateway, V5, "away").await;
        assert_eq!(away.take().await.payload, b"one");
        assert_eq!(away.take().await.payload, b"two");
        gateway.finish().await;
    });
}

#[test]
fn a_job_that_fails_is_tried_again_and_then_a_dead_letter_that_can_be_retried() {
    run(async {
        let backend = Backend::answering(|call, _| match call.path.as_str() {
            "/down" => (503, Duration::ZERO),
            "/refuses" => (422, Duration::ZERO),
            _ => (200, Duration::ZERO),
        })
        .await;
        let gateway = Gateway::start_with(Options::config(FAST)).await;
        let api = gateway.api();
        let job = |id: &str, path: &str| {
            json!({"id": id, "delay": 0,
                "action": [{"webhook": {"url": backend.url("/first")}}, {"webhook": {"url": backend.url(path)}}],
                "on_failed": {"webhook": {"url": backend.url("/told")}}})
        };
        create(&api, &job("down", "/down")).await;
        let failed = await_state(&api, "down", "failed").await;
        assert_eq!(failed["attempts"], 3);
        assert!(
            failed["last_error"].as_str().unwrap().contains("503"),
            "{failed}"
        );
        let states = |job: &Value| {
            [
                job["actions"][0]["state"].clone(),
                job["actions"][1]["state"].clone(),
            ]
        };
        assert_eq!(states(&failed)[0], "done");
        let to = |path: &str| {
            backend
                .calls()
                .into_iter()
                .filter(|call| call.path == path)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            (to("/first").len(), to("/down").len()),
            (1, 3),
            "what is done is not done again"
        );
        let ids: Vec<_> = to("/down")
            .iter()
            .map(|call| call.header("webhook-id").to_owned())
            .collect();
        assert!(
            ids.iter().all(|id| *id == ids[0] && !id.is_empty()),
            "{ids:?}"
        );
        create(&api, &job("refused", "/refuses")).await;
        let refused = await_state(&api, "refused", "failed").await;
        assert_eq!(
            to("/refuses").len(),
            1,
            "no backend is asked again that refuses"
        );
        assert_eq!(states(&refused)[1], "failed");
        let told = eventually(SOON, "whoever wants to know is told", || async {
            let told = to("/told");
            (told.len() == 2).then_some(told)
        })
        .await;
        assert_eq!(told[0].header("ce-type"), "moorline.delay.failed");
        let body: Value = serde_json::from_slice(&told[0].body).unwrap();
        assert_eq!(
            (&body["id"], &body["state"]),
            (&json!("down"), &json!("failed"))
        );
        let page = api.get("/v1/delays?state=failed").await.expect(200);
        assert_eq!(page["delays"].as_array().unwrap().len(), 2);
        api.post("/v1/delays/down/retry", &json!({}))
            .await
            .expect(200);
        eventually(SOON, "three more attempts", || async {
            (to("/down").len() == 6).then_some(())
        })
        .await;
        assert_eq!(to("/first").len(), 2, "one of each job");
        gateway.finish().await;
    });
}

#[test]
fn a_check_decides_whether_there_is_anything_to_do() {
    run(async {
        let backend = Backend::speaking(|call, number| match call.path.as_str() {
            "/paid" => (200, r#"{"fire": false}"#.to_owned(), Duration::ZERO),
            "/unpaid" if number == 0 => (500, String::new(), Duration::ZERO),
            _ => (200, String::new(), Duration::ZERO),
        })
        .await;
        let gateway = Gateway::start_with(Options::config(FAST)).await;
        let api = gateway.api();
        for id in ["unpaid", "paid"] {
            let mut job = call(&backend, id, "0s");
            job["check"] = json!({"url": backend.url(&format!("/{id}"))});
            create(&api, &job).await;
            await_state(&api, id, if id == "paid" { "skipped" } else { "fired" }).await;
        }
        let calls = backend.calls();
        let of = |path: &str| calls.iter().filter(|call| call.path == path).count();
        assert_eq!((of("/unpaid"), of("/paid"), of("/due")), (2, 1, 1));
        assert_eq!(calls[0].method, "GET");
        gateway.finish().await;
    });
}

#[test]
fn a_backend_that_hangs_keeps_no_other_job_from_its_time() {
    run(async {
        let slow = Backend::answering(|_, _| (200, Duration::from_secs(60))).await;
        let quick = Backend::start().await;
        let config =
            "[delays]\nconcurrency = 40\nwebhook_concurrency = 4\nwebhook_timeout = \"30s\"\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let api = gateway.api();
        for n in 0..20 {
            create(&api, &call(&slow, &format!("slow-{n}"), "0s")).await;
        }
        slow.await_calls(4).await;
        let began = Instant::now();
        create(&api, &call(&quick, "quick", "0s")).await;
        quick.await_calls(1).await;
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "{:?}",
            began.elapsed()
        );
        assert_eq!(slow.calls().len(), 4, "no more than its own");
        gateway.finish().await;
    });
}

#[test]
fn what_waits_survives_kill_9_and_fires_after_the_restart() {
    run(async {
        let backend = Backend::start().await;
        let mut gateway = Gateway::start().await;
        let api = gateway.api();
        create(&api, &call(&backend, "later", "1500ms")).await;
        let mut job = call(&backend, "moot", "1500ms");
        job["cancel_on"] = json!(["order.paid:1"]);
        create(&api, &job).await;
        api.post("/v1/events", &json!({"type": "order.paid", "key": "1"}))
            .await
            .expect(202);
        let created = Instant::now();
        gateway.kill9();
        gateway.restart().await;
        let api = gateway.api();
        let call = backend.await_calls(1).await.remove(0);
        assert_eq!(call.text(), r#"{"job":"later"}"#);
        assert!(
            call.at - created >= Duration::from_millis(1_400),
            "never early"
        );
        await_state(&api, "later", "fired").await;
        assert_eq!(state(&api, "moot").await, "cancelled");
        assert_eq!(backend.calls().len(), 1);
        gateway.finish().await;
    });
}
