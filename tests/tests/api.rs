//! The HTTP API: who may call it, what it refuses, and how it shows devices and itself.

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{V3, V5};
use moorline_tests::{Gateway, eventually};
use reqwest::Method;
use serde_json::json;

use crate::support::{VERSIONS, resume, run, to, waiting};

#[test]
fn a_bad_push_is_refused_with_the_name_of_the_field() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let cases = [
            (json!({"payload": "x"}), "to"),
            (json!({"to": {}, "payload": "x"}), "to"),
            (json!({"to": "car", "payload": "x"}), "to"),
            (json!({"to": {"client": ""}, "payload": "x"}), "to.client"),
            (json!({"to": {"client": 7}, "payload": "x"}), "to.client"),
            (
                json!({"to": {"client": "a\u{0}b"}, "payload": "x"}),
                "to.client",
            ),
            (
                json!({"to": {"client": "c", "topic": "t"}, "payload": "x"}),
                "to",
            ),
            (json!({"to": {"topic": "a/+"}, "payload": "x"}), "to.topic"),
            (json!({"to": {"topic": "a/#"}, "payload": "x"}), "to.topic"),
            (json!({"to": {"all": true}, "payload": "x"}), "to.all"),
            (
                json!({"to": {"clients": ["a"]}, "payload": "x"}),
                "to.clients",
            ),
            (json!({"to": {"client": "c"}}), "payload"),
            (json!({"to": {"client": "c"}, "payload": null}), "payload"),
            (
                json!({"to": {"client": "c"}, "payload": "x", "payload_base64": "eA=="}),
                "payload_base64",
            ),
            (
                json!({"to": {"client": "c"}, "payload_base64": "%%%"}),
                "payload_base64",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "qos": 3}),
                "qos",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "qos": "1"}),
                "qos",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "topic": "a/#"}),
                "topic",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "topic": ""}),
                "topic",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "ttl": 0}),
                "ttl",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "ttl": -1}),
                "ttl",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "ttl": "soon"}),
                "ttl",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "ttl": "9999d"}),
                "ttl",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "properties": {"a": 1}}),
                "properties.a",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "delay": "soon"}),
                "delay",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "collapse_key": "k"}),
                "collapse_key",
            ),
            (
                json!({"to": {"client": "c"}, "payload": "x", "priorty": "high"}),
                "priorty",
            ),
        ];
        for (body, field) in cases {
            let answer = api.push(&body).await;
            let fields = answer.problem(400);
            assert!(
                fields.iter().any(|one| one == field),
                "{body}: {field} is not in {fields:?}: {}",
                answer.text
            );
        }
        // Every mistake at once.
        let body = json!({"to": {"client": ""}, "payload": "x", "qos": 9, "ttl": "never"});
        assert_eq!(api.push(&body).await.problem(400).len(), 3);
        for text in [
            "",
            "{",
            "[]",
            "null",
            "{\"to\": {\"client\": \"c\"}, \"payload\": \"x\"} x",
        ] {
            let request = api
                .request(Method::POST, "/v1/push")
                .header("content-type", "application/json");
            api.send(request.body(text)).await.problem(400);
        }
        let request = api
            .request(Method::POST, "/v1/push")
            .header("content-type", "application/json");
        let answer = api.send(request.body("{\"to\":\n  {,}")).await;
        answer.problem(400);
        assert!(
            answer.json()["detail"].as_str().unwrap().contains("line 2"),
            "{}",
            answer.text
        );
        let big = json!({"to": {"client": "c"}, "payload": "x".repeat(3 << 20)});
        api.push(&big).await.problem(413);
        api.get("/v1/push").await.problem(405);
        api.get("/v1/nothing").await.problem(404);
        api.get("/v1/messages/unknown").await.problem(404);
        assert_eq!(waiting(&api, "c").await, 0, "nothing was stored");
        gateway.finish().await;
    });
}

#[test]
fn without_a_good_key_nothing_is_given() {
    run(async {
        let gateway = Gateway::start().await;
        for key in [
            None,
            Some("wrong"),
            Some(""),
            Some("key-of-the-black-box-test"),
        ] {
            let api = gateway.api().with_key(key);
            for path in [
                "/v1/clients",
                "/v1/nodes",
                "/v1/upstream?consumer=x",
                "/v1/messages/x",
            ] {
                let answer = api.get(path).await;
                answer.problem(401);
                assert!(
                    answer.header("www-authenticate").starts_with("Bearer"),
                    "{answer:?}"
                );
            }
            api.push(&to("car", "x")).await.problem(401);
            api.delete("/v1/clients/car/connection").await.problem(401);
            for path in ["/healthz", "/readyz", "/metrics", "/openapi.json"] {
                assert_eq!(api.get(path).await.status, 200, "{path} is open");
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn a_key_with_one_scope_can_do_that_alone() {
    run(async {
        let digest = sha256_hex("push-only-key").expect("sha256sum is part of every Debian");
        let config =
            format!("[[http.keys]]\nname = \"shop\"\nsha256 = \"{digest}\"\nscopes = [\"push\"]\n");
        let gateway = Gateway::start_with(moorline_tests::Options::config(&config)).await;
        let shop = gateway.api().with_key(Some("push-only-key"));
        shop.push(&to("car", "x")).await.expect(202);
        shop.get("/v1/clients").await.problem(403);
        shop.delete("/v1/clients/car/connection").await.problem(403);
        shop.get("/v1/upstream?consumer=x").await.problem(403);
        gateway.finish().await;
    });
}

fn sha256_hex(text: &str) -> Option<String> {
    let mut child = std::process::Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .ok()?;
    std::io::Write::write_all(&mut child.stdin.take()?, text.as_bytes()).ok()?;
    let output = child.wait_with_output().ok()?;
    Some(
        String::from_utf8(output.stdout)
            .ok()?
            .split(' ')
            .next()?
            .to_owned(),
    )
}

#[test]
fn clients_are_listed_with_filters_and_pages() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let mut devices = Vec::new();
        for n in 0..5 {
            devices.push(Device::clean(gateway.mqtt(), V5, &format!("car-{n}")).await);
        }
        devices.push(Device::clean(gateway.mqtt(), V3, "bike/1 é").await);
        api.push_text("van-1", "waits").await;
        let ids = |body: &serde_json::Value| -> Vec<String> {
            let list = body["clients"]
                .as_array()
                .unwrap_or_else(|| panic!("{body}"));
            list.iter()
                .map(|one| one["id"].as_str().unwrap().to_owned())
                .collect()
        };
        let all = api.get("/v1/clients").await.expect(200);
        assert_eq!(
            ids(&all),
            [
                "bike/1 é",
                "car-0",
                "car-1",
                "car-2",
                "car-3",
                "car-4",
                "van-1"
            ]
        );
        let online = api
            .get("/v1/clients?online=true&prefix=car-")
            .await
            .expect(200);
        assert_eq!(ids(&online).len(), 5);
        assert_eq!(
            ids(&api.get("/v1/clients?online=false").await.expect(200)),
            ["van-1"]
        );
        let first = api.get("/v1/clients?limit=3").await.expect(200);
        assert_eq!(ids(&first), ["bike/1 é", "car-0", "car-1"]);
        let next = api.get("/v1/clients?limit=3&after=car-1").await.expect(200);
        assert_eq!(ids(&next), ["car-2", "car-3", "car-4"]);
        let one = api.get("/v1/clients/car-0").await.expect(200);
        assert_eq!(one["online"], true, "{one}");
        for field in ["node", "since", "address", "protocol", "inbox"] {
            assert!(!one[field].is_null(), "{field} in {one}");
        }
        let bike = api.get("/v1/clients/bike%2F1%20%C3%A9").await.expect(200);
        assert_eq!(bike["online"], true, "{bike}");
        let van = api.get("/v1/clients/van-1").await.expect(200);
        assert_eq!(
            (&van["online"], &van["inbox"]["entries"]),
            (&json!(false), &json!(1)),
            "{van}"
        );
        let inbox = api.get("/v1/clients/van-1/inbox").await.expect(200);
        assert!(inbox.to_string().contains("d/van-1/push"), "{inbox}");
        api.get("/v1/clients?limit=x").await.problem(400);
        api.get("/v1/clients?colour=red").await.problem(400);
        let nodes = api.get("/v1/nodes").await.expect(200);
        let running = if moorline_tests::cluster::wanted() {
            2
        } else {
            1
        };
        assert_eq!(
            nodes["nodes"].as_array().map(Vec::len),
            Some(running),
            "{nodes}"
        );
        gateway.finish().await;
    });
}

#[test]
fn a_kick_closes_the_connection_and_keeps_the_inbox() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        for version in VERSIONS {
            let mut car = resume(&gateway, version, "car").await;
            let kicked = api.delete("/v1/clients/car/connection").await;
            assert!(matches!(kicked.status, 200 | 202 | 204), "{kicked:?}");
            let reason = car.await_close(SOON).await;
            assert_eq!(
                reason,
                (version == V5).then_some(0x98),
                "administrative action"
            );
            eventually(SOON, "it is offline", || async {
                let answer = api.get("/v1/clients/car").await;
                (answer.status == 404 || answer.json()["online"] == false).then_some(())
            })
            .await;
            api.push_text("car", "later").await;
            let mut car = resume(&gateway, version, "car").await;
            assert_eq!(car.take().await.text(), "later");
            car.disconnect().await;
        }
        eventually(SOON, "nobody to kick", || async {
            (api.delete("/v1/clients/car/connection").await.status == 404).then_some(())
        })
        .await;
        gateway.finish().await;
    });
}

#[test]
fn the_api_describes_itself() {
    run(async {
        let gateway = Gateway::start().await;
        let document = gateway
            .api()
            .with_key(None)
            .get("/openapi.json")
            .await
            .expect(200);
        assert!(
            document["openapi"]
                .as_str()
                .is_some_and(|version| version.starts_with("3.1"))
        );
        for path in [
            "/v1/push",
            "/v1/messages/{id}",
            "/v1/clients",
            "/v1/clients/{id}",
            "/v1/clients/{id}/connection",
            "/v1/clients/{id}/inbox",
            "/v1/upstream",
            "/v1/upstream/ack",
            "/v1/dead-letters",
            "/v1/nodes",
        ] {
            assert!(
                document["paths"][path].is_object(),
                "{path} is not described"
            );
        }
        gateway.finish().await;
    });
}
