//! Delayed jobs over HTTP: lists, batches, and what is refused.

use moorline_tests::{Backend, Gateway};
use reqwest::Method;
use serde_json::json;

use crate::delays::{call, create, patch};
use crate::support::run;

#[test]
fn changes_at_once_hold_together() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let hook = |path: &str| json!({"webhook": {"url": backend.url(path)}});
        let job = json!({"id": "a", "fire_at": "2035-01-01T00:00:00Z", "action": hook("/0")});
        create(&api, &job).await;
        // Each changes a part of the plan, and none takes back what another one was answered.
        for n in 1..=30 {
            let (action, retry) = (
                json!({"action": hook(&format!("/{n}"))}),
                json!({"retry": {"attempts": n}}),
            );
            let (one, other) = tokio::join!(patch(&api, "a", &action), patch(&api, "a", &retry));
            for answer in [one, other] {
                answer.expect(200);
            }
            let job = api.get("/v1/delays/a").await.expect(200);
            let text = job.to_string();
            assert!(text.contains(&backend.url(&format!("/{n}"))), "{n}: {job}");
            assert_eq!(job["retry"]["attempts"], n, "{job}");
        }
        gateway.finish().await;
    });
}

#[test]
fn jobs_are_listed_by_prefix_event_state_and_time_and_counted() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        for n in 0..25 {
            let mut job = json!({"id": format!("{}-{n:02}", if n % 5 == 0 { "five" } else { "other" }),
                "fire_at": format!("2035-01-01T00:{n:02}:00Z"), "action": {"webhook": {"url": backend.url("/")}}});
            if n % 2 == 0 {
                job["cancel_on"] = json!(["even:1"]);
            }
            create(&api, &job).await;
        }
        let list = async |query: &str| {
            let (mut ids, mut after) = (Vec::new(), String::new());
            loop {
                let path = format!("/v1/delays?limit=4&{query}{after}");
                let page = api.get(&path).await.expect(200);
                for job in page["delays"].as_array().unwrap() {
                    ids.push(job["id"].as_str().unwrap().to_owned());
                }
                match page["next"].as_str() {
                    Some(next) => after = format!("&after={next}"),
                    None => return ids,
                }
            }
        };
        assert_eq!(
            list("prefix=five-").await,
            ["five-00", "five-05", "five-10", "five-15", "five-20"]
        );
        assert_eq!(list("on=even:1").await.len(), 13);
        let by_time = list("state=pending&from=2035-01-01T00:03:00Z&to=2035-01-01T00:07:00Z").await;
        assert_eq!(by_time, ["other-03", "other-04", "five-05", "other-06"]);
        assert_eq!(list("").await.len(), 25);
        api.delete("/v1/delays/five-10").await.expect(200);
        assert_eq!(list("state=cancelled").await, ["five-10"]);
        let counts = api.get("/v1/delays/count").await.expect(200);
        assert_eq!(
            (&counts["pending"], &counts["cancelled"]),
            (&json!(24), &json!(1))
        );
        for (query, field) in [
            ("state=lost", "state"),
            ("from=yesterday", "from"),
            ("on=nothing", "on"),
            ("after=x", "after"),
            ("colour=red", "colour"),
        ] {
            let answer = api.get(&format!("/v1/delays?{query}")).await;
            assert_eq!(answer.problem(400), [field], "{query}");
        }
        gateway.finish().await;
    });
}

#[test]
fn a_batch_has_a_result_for_each_of_its_jobs() {
    run(async {
        let backend = Backend::start().await;
        let gateway = Gateway::start().await;
        let api = gateway.api();
        create(&api, &call(&backend, "there", "1h")).await;
        let jobs = json!([call(&backend, "a", "1h"), {"id": "b"}, call(&backend, "there", "2h"), call(&backend, "there", "1h")]);
        let answer = api.post("/v1/delays/batch", &jobs).await.expect(200);
        let statuses: Vec<_> = answer["results"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["status"].as_u64().unwrap())
            .collect();
        assert_eq!(statuses, [201, 400, 409, 200]);
        assert_eq!(
            answer["results"][1]["problem"]["errors"][0]["field"],
            "delay"
        );
        let lines = format!(
            "{}\n{}\n",
            call(&backend, "c", "1h"),
            call(&backend, "d", "1h")
        );
        let request = api.request(Method::POST, "/v1/delays/batch");
        let request = request
            .header("content-type", "application/x-ndjson")
            .body(lines);
        let answer = api.send(request).await.expect(200);
        assert_eq!(answer["results"][1]["delay"]["id"], "d");
        api.post("/v1/delays/batch", &json!([])).await.problem(400);
        gateway.finish().await;
    });
}

#[test]
fn a_wrong_request_names_every_wrong_field() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let hook = json!({"webhook": {"url": "http://127.0.0.1:9/"}});
        let cases = [
            (json!({"action": hook}), vec!["delay"]),
            (json!({"delay": "soon", "action": hook}), vec!["delay"]),
            (json!({"delay": "4000d", "action": hook}), vec!["delay"]),
            (json!({"delay": -1, "action": hook}), vec!["delay"]),
            (
                json!({"delay": 1, "fire_at": "2035-01-01T00:00:00Z", "action": hook}),
                vec!["fire_at"],
            ),
            (
                json!({"fire_at": "tomorrow", "action": hook}),
                vec!["fire_at"],
            ),
            (json!({"delay": 1}), vec!["action"]),
            (json!({"delay": 1, "action": {}}), vec!["action"]),
            (json!({"delay": 1, "action": []}), vec!["action"]),
            (
                json!({"delay": 1, "action": {"mail": {}}}),
                vec!["action.mail", "action"],
            ),
            (
                json!({"delay": 1, "action": [hook, {"webhook": {"url": "ftp://x/"}}]}),
                vec!["action[1].webhook.url"],
            ),
            (
                json!({"delay": 1, "action": {"push": {"to": {"client": ""}, "payload": 1}}}),
                vec!["action.push.to.client"],
            ),
            (
                json!({"delay": 1, "action": {"push": {"to": {"client": "a"}, "payload": 1, "delay": 1}}}),
                vec!["action.push.delay"],
            ),
            (
                json!({"delay": 1, "action": hook, "cancel_on": ["order"]}),
                vec!["cancel_on[0]"],
            ),
            (
                json!({"delay": 1, "action": hook, "cancel_on": "order:1"}),
                vec!["cancel_on"],
            ),
            (
                json!({"delay": 1, "action": hook, "retry": {"attempts": 0}}),
                vec!["retry.attempts"],
            ),
            (
                json!({"delay": 1, "action": hook, "check": {"url": "x"}}),
                vec!["check.url"],
            ),
            (
                json!({"delay": 1, "action": hook, "on_failed": {}}),
                vec!["on_failed"],
            ),
            (
                json!({"id": "", "delay": "x", "action": hook, "colour": 1}),
                vec!["colour", "id", "delay"],
            ),
            (
                json!({"id": "count", "delay": 1, "action": hook}),
                vec!["id"],
            ),
        ];
        for (body, fields) in cases {
            assert_eq!(
                api.post("/v1/delays", &body).await.problem(400),
                fields,
                "{body}"
            );
        }
        for (body, fields) in [
            (json!({}), vec!["type", "key"]),
            (json!({"type": "a:b", "key": "1"}), vec!["type"]),
            (json!({"type": "a", "key": 1}), vec!["key"]),
        ] {
            assert_eq!(
                api.post("/v1/events", &body).await.problem(400),
                fields,
                "{body}"
            );
        }
        create(&api, &json!({"id": "j", "delay": "1h", "action": hook})).await;
        assert_eq!(
            patch(&api, "j", &json!({"id": "k"})).await.problem(400),
            ["id"]
        );
        patch(&api, "j", &json!({})).await.problem(400);
        api.with_key(Some("wrong"))
            .post("/v1/delays", &json!({}))
            .await
            .problem(401);
        gateway.finish().await;
    });
}

#[test]
fn an_amqp_action_needs_a_rabbitmq() {
    run(async {
        let gateway = Gateway::start().await;
        let action = json!({"amqp": {"exchange": "", "routing_key": "q", "body": "x"}});
        let job = json!({"delay": 0, "action": action});
        let answer = gateway.api().post("/v1/delays", &job).await;
        if moorline_tests::cluster::wanted() {
            answer.expect(201);
        } else {
            assert_eq!(answer.problem(400), ["action.amqp"]);
        }
        gateway.finish().await;
    });
}
