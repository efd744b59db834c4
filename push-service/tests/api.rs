//! Everything but pushes, over HTTP: keys, clients, upstream, dead letters, operations.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use moorline_mqtt::{QoS, TopicName};
use moorline_push_service::Config;
use moorline_router::{ClientId, MessageId, Position, QueueName, Settlement, UpstreamMessage};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::{PUSH_KEY, Service, answer};

async fn send_upstream(
    service: &Service,
    queue: &str,
    client: &str,
    payload: &'static [u8],
) -> MessageId {
    let message = UpstreamMessage {
        id: MessageId::generate(),
        client: ClientId::parse(client).unwrap(),
        topic: TopicName::parse("up/x".into()).unwrap(),
        qos: QoS::AtLeastOnce,
        properties: None,
        payload: Bytes::from_static(payload),
        received_at_ms: 1_700_000_000_000,
    };
    let id = message.id.clone();
    let bus = service.store.stores().upstream;
    bus.publish(vec![(message, vec![QueueName::new(queue)])])
        .await
        .unwrap();
    id
}

fn payloads(page: &Value) -> Vec<&str> {
    let messages = page["messages"].as_array().unwrap();
    messages
        .iter()
        .map(|message| message["payload"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn a_call_needs_a_known_key_with_the_scope() {
    let service = Service::start().await;
    let paths = [
        "/v1/clients",
        "/v1/nodes",
        "/v1/messages/x",
        "/v1/upstream",
        "/v1/dead-letters",
    ];
    for path in paths {
        let response = service.bare(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), 401, "{path}");
        assert!(
            response.headers()["www-authenticate"]
                .to_str()
                .unwrap()
                .starts_with("Bearer")
        );
        let (status, _) = answer(service.bare(Method::GET, path).bearer_auth("wrong")).await;
        assert_eq!(status, 401, "{path}");
        let basic = service
            .bare(Method::GET, path)
            .basic_auth("a", Some(support::KEY));
        assert_eq!(answer(basic).await.0, 401, "{path}");
        let (status, problem) = answer(service.bare(Method::GET, path).bearer_auth(PUSH_KEY)).await;
        assert_eq!(status, 403, "{path}");
        assert!(
            problem["detail"]
                .as_str()
                .unwrap()
                .starts_with("the key \"pusher\" has no scope")
        );
    }
    let kick = service
        .bare(Method::DELETE, "/v1/clients/c/connection")
        .bearer_auth(PUSH_KEY);
    assert_eq!(answer(kick).await.0, 403);
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.json"] {
        let response = service.bare(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
    }
}

#[tokio::test]
async fn unknown_paths_methods_and_parameters_are_problems() {
    let service = Service::start().await;
    let (status, problem) = service.get("/v1/nonsense").await;
    assert_eq!(
        (status.as_u16(), &problem["type"]),
        (404, &json!("urn:moorline:problem:not-found"))
    );
    let response = service
        .request(Method::GET, "/v1/push")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["allow"], "POST");
    let (status, problem) = service.get("/v1/push").await;
    assert_eq!(
        (status.as_u16(), &problem["type"]),
        (405, &json!("urn:moorline:problem:method-not-allowed"))
    );
    for (query, field, detail) in [
        ("limit=0", "limit", "from 1 to 1000"),
        ("limit=x", "limit", "from 1 to 1000"),
        ("limit=1&limit=2", "limit", "is given twice"),
        ("online=maybe", "online", "true or false"),
        ("after=", "after", "must not be empty"),
        (
            "sort=id",
            "sort",
            "is not a known parameter; there are: after, limit, prefix, online",
        ),
    ] {
        let (status, problem) = service.get(&format!("/v1/clients?{query}")).await;
        assert_eq!(status, 400, "{query}");
        assert_eq!(problem["errors"][0]["field"], field, "{query}");
        let text = problem["errors"][0]["detail"].as_str().unwrap();
        assert!(text.contains(detail), "{query}: {text}");
    }
    let (status, problem) = service.get("/v1/clients/%FF").await;
    assert_eq!(
        (status.as_u16(), &problem["errors"][0]["field"]),
        (400, &json!("id"))
    );
}

#[tokio::test]
async fn clients_are_listed_in_pages_online_and_waited_for() {
    let service = Service::start().await;
    for client in ["a", "car-1", "car-3", "z"] {
        service.connect(client).await;
    }
    for client in ["b", "car", "car-2", "car-3"] {
        service
            .push(&json!({"to": {"client": client}, "payload": "x"}))
            .await;
    }
    let ids = async |query: &str| {
        let mut ids = Vec::new();
        let mut after = String::new();
        loop {
            let (status, page) = service
                .get(&format!("/v1/clients?limit=2{query}{after}"))
                .await;
            assert_eq!(status, 200, "{page}");
            let clients = page["clients"].as_array().unwrap().clone();
            ids.extend(
                clients
                    .iter()
                    .map(|client| client["id"].as_str().unwrap().to_owned()),
            );
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => return ids,
            }
        }
    };
    assert_eq!(
        ids("").await,
        ["a", "b", "car", "car-1", "car-2", "car-3", "z"]
    );
    assert_eq!(ids("&online=true").await, ["a", "car-1", "car-3", "z"]);
    assert_eq!(ids("&online=false").await, ["b", "car", "car-2"]);
    assert_eq!(ids("&prefix=car").await, ["car", "car-1", "car-2", "car-3"]);
    assert_eq!(ids("&prefix=car&online=true").await, ["car-1", "car-3"]);
    assert_eq!(ids("&prefix=car-").await, ["car-1", "car-2", "car-3"]);
    assert_eq!(ids("&prefix=q").await, Vec::<String>::new());
}

#[tokio::test]
async fn a_client_is_described_with_its_connection_and_its_inbox() {
    let service = Service::start().await;
    service.connect("fleet/car 7").await;
    service
        .push(&json!({"to": {"client": "fleet/car 7"}, "payload": "four"}))
        .await;
    let (status, client) = service.get("/v1/clients/fleet%2Fcar%207").await;
    assert_eq!(status, 200);
    assert_eq!(
        (&client["id"], &client["online"]),
        (&json!("fleet/car 7"), &json!(true))
    );
    assert_eq!(client["node"], service.node_id.as_str());
    let details = ("127.0.0.1:9", "5.0", "ws", 60);
    assert_eq!(client["address"], details.0);
    assert_eq!(client["protocol"], details.1);
    assert_eq!(client["transport"], details.2);
    assert_eq!(client["keep_alive"], details.3);
    assert!(client["since"].as_str().unwrap().ends_with('Z') && client["epoch"].is_u64());
    assert_eq!(client["inbox"]["entries"], 1);

    let (status, nobody) = service.get("/v1/clients/nobody").await;
    assert_eq!(status, 200);
    assert_eq!(
        nobody,
        json!({"id": "nobody", "online": false, "inbox": {"entries": 0, "bytes": 0}})
    );
}

#[tokio::test]
async fn an_inbox_is_read_in_pages() {
    let service = Service::start().await;
    for payload in ["1", "2", "3"] {
        service
            .push(&json!({"to": {"client": "c"}, "payload": payload, "properties": {"n": payload}}))
            .await;
    }
    service
        .push(&json!({"to": {"client": "c"}, "payload_base64": "/w==", "ttl": "1h"}))
        .await;
    let (_, first) = service.get("/v1/clients/c/inbox?limit=3").await;
    let entries = first["entries"].as_array().unwrap();
    assert_eq!(
        entries
            .iter()
            .map(|e| e["payload"].as_str().unwrap())
            .collect::<Vec<_>>(),
        ["1", "2", "3"]
    );
    assert_eq!(entries[0]["properties"], json!({"n": "1"}));
    assert_eq!(
        (&entries[0]["origin"], &entries[0]["qos"]),
        (&json!("push"), &json!(1))
    );
    let next = first["next"].as_str().unwrap();
    let (_, second) = service
        .get(&format!("/v1/clients/c/inbox?after={next}"))
        .await;
    assert_eq!(second["entries"][0]["payload_base64"], "/w==");
    assert!(second["entries"][0]["expires_at"].is_string());
    assert!(second.get("next").is_none());
    let (status, problem) = service.get("/v1/clients/c/inbox?after=xyz").await;
    assert_eq!(
        (status.as_u16(), &problem["errors"][0]["field"]),
        (400, &json!("after"))
    );
}

#[tokio::test]
async fn a_client_can_be_disconnected() {
    let service = Service::start().await;
    service.connect("a/b").await;
    assert_eq!(service.delete("/v1/clients/a%2Fb/connection").await.0, 204);
    assert_eq!(
        *service.node.disconnected.lock().unwrap(),
        [ClientId::parse("a/b").unwrap()]
    );
    let (status, problem) = service.delete("/v1/clients/other/connection").await;
    assert_eq!(
        (status.as_u16(), &problem["detail"]),
        (404, &json!("client other is not connected"))
    );
}

#[tokio::test]
async fn a_consumer_reads_and_acknowledges_at_its_own_pace() {
    let service = Service::start().await;
    for payload in [b"1", b"2", b"3"] {
        send_upstream(&service, QueueName::DEFAULT, "car-7", payload).await;
    }
    let (_, page) = service.get("/v1/upstream?consumer=a&limit=2").await;
    assert_eq!(payloads(&page), ["1", "2"]);
    let message = &page["messages"][0];
    assert_eq!(
        (&message["client"], &message["topic"], &message["qos"]),
        (&json!("car-7"), &json!("up/x"), &json!(1))
    );
    assert_eq!(message["at"], "2023-11-14T22:13:20.000Z");
    // Nothing was acknowledged: it is read again.
    let (_, again) = service.get("/v1/upstream?consumer=a&limit=2").await;
    assert_eq!(again, page);
    let next = page["next"].as_str().unwrap();
    let (_, rest) = service
        .get(&format!("/v1/upstream?consumer=a&after={next}"))
        .await;
    assert_eq!(payloads(&rest), ["3"]);
    let ack = json!({"consumer": "a", "cursor": next});
    assert_eq!(service.post("/v1/upstream/ack", &ack).await.0, 204);
    let (_, after_ack) = service.get("/v1/upstream?consumer=a").await;
    assert_eq!(payloads(&after_ack), ["3"]);

    let (_, known) = service.get("/v1/upstream/consumers").await;
    assert_eq!(known, json!({"consumers": [{"name": "a", "cursor": next}]}));
    assert_eq!(service.delete("/v1/upstream/consumers/a").await.0, 204);
    assert_eq!(service.delete("/v1/upstream/consumers/a").await.0, 404);
}

#[tokio::test]
async fn a_bad_acknowledgement_names_its_field() {
    let service = Service::start().await;
    let (status, problem) = service
        .post("/v1/upstream/ack", &json!({"cursor": "x", "consumer": ""}))
        .await;
    assert_eq!(status, 400);
    let fields: Vec<_> = problem["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["field"])
        .collect();
    assert_eq!(fields, ["cursor", "consumer"]);
    let (status, problem) = service
        .post("/v1/upstream/ack", &json!({"cursor": "1-1", "x": 1}))
        .await;
    assert_eq!(status, 400);
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("unknown field `x`"),
        "{problem}"
    );
    let (status, problem) = service.get("/v1/upstream?consumer=&wait=2h").await;
    let fields: Vec<_> = problem["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["field"])
        .collect();
    assert_eq!(status, 400);
    assert_eq!(fields, ["consumer", "wait"]);
}

#[tokio::test]
async fn a_long_poll_ends_with_the_first_message() {
    let service = Arc::new(Service::start().await);
    let (_, empty) = service.get("/v1/upstream").await;
    assert_eq!(empty, json!({"messages": [], "next": null}));
    let started = Instant::now();
    let poll = tokio::spawn({
        let service = Arc::clone(&service);
        async move { service.get("/v1/upstream?wait=30s").await }
    });
    send_upstream(&service, QueueName::DEFAULT, "c", b"now").await;
    let (_, page) = poll.await.unwrap();
    assert_eq!(payloads(&page), ["now"]);
    assert!(started.elapsed() < Duration::from_secs(20));
}

/// Events of a stream as (id, payload).
async fn next_events(response: &mut reqwest::Response, count: usize) -> Vec<(String, String)> {
    let mut text = String::new();
    while text.matches("\n\n").count() < count {
        let chunk = tokio::time::timeout(Duration::from_secs(20), response.chunk()).await;
        text.push_str(std::str::from_utf8(&chunk.unwrap().unwrap().unwrap()).unwrap());
    }
    let field = |event: &str, name: &str| {
        let line = event.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} in {event:?}"))
            .trim()
            .to_owned()
    };
    let events = text.split("\n\n").filter(|event| !event.is_empty());
    events
        .map(|event| {
            assert_eq!(field(event, "event:"), "message");
            let data: Value = serde_json::from_str(&field(event, "data:")).unwrap();
            (
                field(event, "id:"),
                data["payload"].as_str().unwrap().to_owned(),
            )
        })
        .collect()
}

#[tokio::test]
async fn an_event_stream_goes_on_where_it_broke_off() {
    let service = Service::start().await;
    for payload in [b"1", b"2"] {
        send_upstream(&service, QueueName::DEFAULT, "c", payload).await;
    }
    let open = |last: Option<&str>| {
        let request = service
            .request(Method::GET, "/v1/upstream?limit=1")
            .header("accept", "text/event-stream");
        match last {
            Some(last) => request.header("last-event-id", last),
            None => request,
        }
    };
    let mut stream = open(None).send().await.unwrap();
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    let events = next_events(&mut stream, 2).await;
    assert_eq!((events[0].1.as_str(), events[1].1.as_str()), ("1", "2"));
    send_upstream(&service, QueueName::DEFAULT, "c", b"3").await;
    assert_eq!(next_events(&mut stream, 1).await[0].1, "3");
    drop(stream);
    let mut stream = open(Some(&events[0].0)).send().await.unwrap();
    let again = next_events(&mut stream, 2).await;
    assert_eq!((again[0].1.as_str(), again[1].1.as_str()), ("2", "3"));
    assert_eq!(again[0].0, events[1].0);
    assert_eq!(open(Some("nonsense")).send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn a_dead_letter_is_listed_and_tried_again() {
    let service = Service::start().await;
    let queue = QueueName::new("orders");
    let bus = service.store.stores().upstream;
    let id = send_upstream(&service, "orders", "c", b"x").await;
    let mut found = None;
    for partition in 0..bus.partitions(&queue) {
        let fetch = bus.fetch(&queue, partition, Position::START, 1);
        if let Ok(page) = tokio::time::timeout(Duration::from_millis(200), fetch).await {
            found = Some((partition, page.unwrap()[0].position));
        }
    }
    let (partition, position) = found.unwrap();
    let settlement = Settlement::DeadLetter {
        reason: "answered 400".into(),
        attempts: 1,
    };
    bus.settle(&queue, partition, position, settlement)
        .await
        .unwrap();
    let (_, letters) = service.get("/v1/dead-letters").await;
    let letter = &letters["dead_letters"][0];
    assert_eq!(letter["id"], id.as_str());
    assert_eq!(
        (&letter["queue"], &letter["reason"]),
        (&json!("orders"), &json!("answered 400"))
    );
    assert_eq!(
        (&letter["payload"], &letter["attempts"]),
        (&json!("x"), &json!(1))
    );
    assert!(letters.get("next").is_none());
    let path = format!("/v1/dead-letters/{id}/retry");
    let (status, retried) = service.post(&path, &json!({})).await;
    assert_eq!(
        (status, retried),
        (
            StatusCode::ACCEPTED,
            json!({"id": id.as_str(), "state": "queued"})
        )
    );
    assert_eq!(service.post(&path, &json!({})).await.0, 404);
    let (_, letters) = service.get("/v1/dead-letters").await;
    assert_eq!(letters, json!({"dead_letters": []}));
    let page = bus.fetch(&queue, partition, position, 1).await.unwrap();
    assert_eq!(page[0].message.id, id);
}

#[tokio::test]
async fn nodes_and_health_are_told() {
    let service = Service::start().await;
    service.connect("c").await;
    let (_, nodes) = service.get("/v1/nodes").await;
    let expected = json!({"nodes": [{"id": service.node_id.as_str(), "version": "0", "state": "up", "connections": 1}]});
    assert_eq!(nodes, expected);
    let (status, readiness) = answer(service.bare(Method::GET, "/readyz")).await;
    assert_eq!(
        (status, readiness),
        (StatusCode::OK, json!({"ready": true, "reasons": []}))
    );
    service.draining.store(true, Ordering::Release);
    let (status, readiness) = answer(service.bare(Method::GET, "/readyz")).await;
    assert_eq!(status, 503);
    assert_eq!(
        readiness["reasons"],
        json!(["draining: this process is about to stop"])
    );
    let (status, alive) = answer(service.bare(Method::GET, "/healthz")).await;
    assert_eq!((status, alive), (StatusCode::OK, json!({"status": "ok"})));
}

#[tokio::test]
async fn a_stop_ends_long_polls_and_streams_at_once_and_finishes_requests() {
    let mut service = Service::start_with(Config::default()).await;
    let poll = service.request(Method::GET, "/v1/upstream?wait=60s");
    let poll = tokio::spawn(async move { answer(poll).await });
    let stream = service
        .request(Method::GET, "/v1/upstream?consumer=s")
        .header("accept", "text/event-stream");
    let mut stream = stream.send().await.unwrap();
    // The poll has been taken up when its consumer is known.
    let deadline = Instant::now() + Duration::from_secs(20);
    while service.get("/v1/upstream/consumers").await.1["consumers"]
        .as_array()
        .unwrap()
        .len()
        < 2
    {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    let started = Instant::now();
    service.stop.take().unwrap().send(()).unwrap();
    let (status, page) = poll.await.unwrap();
    assert_eq!((status.as_u16(), payloads(&page).len()), (200, 0));
    assert_eq!(stream.chunk().await.unwrap(), None);
    (&mut service.task).await.unwrap().unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn bans_are_made_listed_and_lifted() {
    let service = Service::start().await;
    let put = async |path: &str, body: &Value| {
        answer(service.request(Method::PUT, path).json(body)).await
    };
    let (status, ban) = put(
        "/v1/bans/address/192.0.2.7%2F24",
        &json!({"reason": "scans", "ttl": "1h"}),
    )
    .await;
    assert_eq!(status, StatusCode::OK, "{ban}");
    assert_eq!(ban["value"], "192.0.2.0/24");
    assert_eq!(ban["reason"], "scans");
    assert_eq!(ban["automatic"], false);
    assert!(ban["expires_at"].is_string());
    let (status, ban) = put("/v1/bans/client/car%2F7", &json!({})).await;
    assert_eq!(status, StatusCode::OK, "{ban}");
    assert!(ban.get("expires_at").is_none());
    put("/v1/bans/username/anna", &json!({"reason": "left"})).await;

    let (_, first) = service.get("/v1/bans?limit=2").await;
    let values = |page: &Value| -> Vec<String> {
        let bans = page["bans"].as_array().unwrap().iter();
        bans.map(|ban| ban["value"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(values(&first), ["192.0.2.0/24", "car/7"]);
    assert_eq!(first["next"], "client/car/7");
    let (_, last) = service.get("/v1/bans?limit=2&after=client/car/7").await;
    assert_eq!(values(&last), ["anna"]);
    assert!(last.get("next").is_none());

    let (status, _) = service.delete("/v1/bans/address/192.0.2.0%2F24").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (status, _) = service.delete("/v1/bans/address/192.0.2.0%2F24").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (_, left) = service.get("/v1/bans").await;
    assert_eq!(values(&left), ["car/7", "anna"]);
}

#[tokio::test]
async fn a_ban_of_nobody_is_refused_by_field() {
    let service = Service::start().await;
    for (path, body, field) in [
        ("/v1/bans/address/here", json!({}), "value"),
        ("/v1/bans/colour/red", json!({}), "kind"),
        ("/v1/bans/client/a", json!({"ttl": "soon"}), "ttl"),
    ] {
        let (status, problem) = answer(service.request(Method::PUT, path).json(&body)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{problem}");
        assert_eq!(problem["errors"][0]["field"], field, "{problem}");
    }
    let (status, problem) = service.get("/v1/bans?after=x").await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{problem}");
    let request = service.bare(Method::PUT, "/v1/bans/client/a");
    let (status, _) = answer(request.bearer_auth(PUSH_KEY).json(&json!({}))).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
}
