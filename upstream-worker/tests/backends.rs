//! The worker between a real store and real HTTP backends.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use moorline_mqtt::{QoS, TopicName};
use moorline_router::embedded::{self, EmbeddedStore};
use moorline_router::{ClientId, DeadLetter, MessageId, UpstreamMessage};
use moorline_upstream_worker::{Config, run};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
struct Call {
    path: String,
    headers: HeaderMap,
    body: String,
    at: Instant,
}

impl Call {
    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }
}

/// What a backend does with the nth call of one body.
type Behaviour = Box<dyn Fn(&str, usize) -> Answer + Send + Sync>;

enum Answer {
    Status(u16),
    RetryAfter(u16, u64),
    /// Until the test ends.
    Never,
}

struct Backend {
    url: String,
    calls: Mutex<Vec<Call>>,
    behaviour: Behaviour,
}

impl Backend {
    async fn start(behaviour: impl Fn(&str, usize) -> Answer + Send + Sync + 'static) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let backend = Arc::new(Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            calls: Mutex::default(),
            behaviour: Box::new(behaviour),
        });
        let app = Router::new()
            .fallback(take)
            .with_state(Arc::clone(&backend));
        tokio::spawn(axum::serve(listener, app).into_future());
        backend
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn bodies(&self) -> Vec<String> {
        self.calls().into_iter().map(|call| call.body).collect()
    }
}

async fn take(State(backend): State<Arc<Backend>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let body = String::from_utf8(body.to_vec()).unwrap();
    let answer = {
        let mut calls = backend.calls.lock().unwrap();
        let path = parts.uri.path_and_query().unwrap().to_string();
        calls.push(Call {
            path,
            headers: parts.headers,
            body: body.clone(),
            at: Instant::now(),
        });
        let count = calls.iter().filter(|call| call.body == body).count();
        (backend.behaviour)(&body, count)
    };
    let status = |status| StatusCode::from_u16(status).unwrap();
    match answer {
        Answer::Status(code) => (status(code), "said the backend").into_response(),
        Answer::RetryAfter(code, seconds) => {
            (status(code), [("retry-after", seconds.to_string())]).into_response()
        }
        Answer::Never => std::future::pending().await,
    }
}

fn open(directory: &Path) -> Arc<EmbeddedStore> {
    let data_dir = directory.to_owned();
    let config = embedded::Config {
        data_dir,
        upstream_partitions: 4,
        ..Default::default()
    };
    EmbeddedStore::open(config).unwrap()
}

/// A worker that runs, and how to stop it.
struct Worker {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Worker {
    fn start(store: &Arc<EmbeddedStore>, config: &Config) -> Self {
        // As the binary does; another test of this process may have done it before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        config.validate().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let bus = store.stores().upstream;
        let task = tokio::spawn(run(bus, config.clone(), async { drop(stopped.await) }));
        Self { stop, task }
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
    }
}

fn rule(name: &str, url: &str) -> serde_json::Value {
    json!({
        "name": name, "filter": format!("up/{name}/#"), "url": format!("{url}/{{client_id}}?topic={{topic}}"),
        "timeout": "5s", "retry": {"attempts": 4, "initial": "10ms", "max": "2s"},
    })
}

fn config(rules: &[serde_json::Value]) -> Config {
    serde_json::from_value(json!({"rules": rules})).unwrap()
}

/// Publishes as an access node does, to whatever queues the rules name.
async fn publish(
    store: &Arc<EmbeddedStore>,
    config: &Config,
    client: &str,
    topic: &str,
    payload: &str,
) -> MessageId {
    let topic = TopicName::parse(topic.to_owned().into()).unwrap();
    let queues = config.routes().queues_for(&topic);
    let message = UpstreamMessage {
        id: MessageId::generate(),
        client: ClientId::parse(client).unwrap(),
        topic,
        qos: QoS::AtLeastOnce,
        properties: None,
        payload: Bytes::from(payload.to_owned()),
        received_at_ms: 1_700_000_000_000,
    };
    let id = message.id.clone();
    store
        .stores()
        .upstream
        .publish(vec![(message, queues)])
        .await
        .unwrap();
    id
}

async fn eventually<T>(what: &str, check: impl AsyncFn() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn dead_letters(store: &Arc<EmbeddedStore>, count: usize) -> Vec<DeadLetter> {
    let bus = store.stores().upstream;
    eventually("dead letters", async || {
        let letters = bus.dead_letters(None, 100).await.unwrap();
        (letters.len() == count).then_some(letters)
    })
    .await
}

async fn called(backend: &Backend, count: usize) -> Vec<Call> {
    eventually("calls", async || {
        let calls = backend.calls();
        (calls.len() >= count).then_some(calls)
    })
    .await
}

#[tokio::test]
async fn a_message_reaches_its_backend_as_it_was_sent() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let backend = Backend::start(|_, _| Answer::Status(204)).await;
    let config = config(&[rule("a", &backend.url)]);
    let worker = Worker::start(&store, &config);
    let id = publish(&store, &config, "fleet/7", "up/a/x", "hello").await;
    let call = called(&backend, 1).await.remove(0);
    assert_eq!(call.path, "/fleet%2F7?topic=up%2Fa%2Fx");
    assert_eq!(call.body, "hello");
    assert_eq!(call.header("webhook-id"), id.as_str());
    assert_eq!(call.header("moorline-client-id"), "fleet/7");
    assert_eq!(call.header("moorline-topic"), "up/a/x");
    assert_eq!(call.header("content-type"), "application/octet-stream");
    worker.stop().await;
}

/// As a backend does it that knows nothing of this program: <https://www.standardwebhooks.com>.
fn verifies(call: &Call, secret: &[u8]) -> bool {
    use sha2::{Digest, Sha256};
    let mut block = [0_u8; 64];
    block[..secret.len()].copy_from_slice(secret);
    let signed = format!(
        "{}.{}.{}",
        call.header("webhook-id"),
        call.header("webhook-timestamp"),
        call.body
    );
    let inner = Sha256::digest([&block.map(|b| b ^ 0x36), signed.as_bytes()].concat());
    let code = Sha256::digest([&block.map(|b| b ^ 0x5c), inner.as_slice()].concat());
    let expected = format!("v1,{}", STANDARD.encode(code));
    call.header("webhook-signature")
        .split(' ')
        .any(|signature| signature == expected)
}

#[tokio::test]
async fn a_backend_can_verify_every_attempt_of_a_signed_call() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let backend =
        Backend::start(|_, count| Answer::Status(if count < 3 { 503 } else { 200 })).await;
    let secret = b"a secret of thirty-two bytes, ok";
    let mut signed = rule("a", &backend.url);
    signed["secret"] = json!(format!("whsec_{}", STANDARD.encode(secret)));
    let config = config(&[signed, rule("b", &backend.url)]);
    let worker = Worker::start(&store, &config);
    publish(&store, &config, "c", "up/a", "pay 5").await;
    let mut calls = called(&backend, 3).await;
    for call in &calls {
        assert!(verifies(call, secret), "{call:?}");
        assert!(!verifies(call, b"another secret of 32 bytes, yes!"));
        let age = call.header("webhook-timestamp").parse::<u64>().unwrap();
        assert!(moorline_router::unix_ms() / 1_000 - age < 60);
        assert_eq!(call.header("webhook-id"), calls[0].header("webhook-id"));
    }
    calls[0].body = "pay 500".into();
    assert!(!verifies(&calls[0], secret));
    publish(&store, &config, "c", "up/b", "unsigned").await;
    let calls = called(&backend, 4).await;
    assert!(!calls[3].headers.contains_key("webhook-signature"));
    worker.stop().await;
}

#[tokio::test]
async fn each_device_is_handed_on_in_the_order_in_which_it_sent() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    // Some fail at first, which must not let later ones pass.
    let backend = Backend::start(|body, count| match body.ends_with('3') && count < 3 {
        true => Answer::Status(503),
        false => Answer::Status(200),
    })
    .await;
    let config = config(&[rule("a", &backend.url)]);
    for n in 0..20 {
        for device in 0..6 {
            publish(
                &store,
                &config,
                &format!("dev-{device}"),
                "up/a",
                &format!("{device}:{n:02}"),
            )
            .await;
        }
    }
    let worker = Worker::start(&store, &config);
    // 2 of 20 numbers end in 3 and are called three times.
    called(&backend, 6 * (20 + 2 * 2)).await;
    worker.stop().await;
    let mut by_device: HashMap<String, Vec<String>> = HashMap::new();
    for body in backend.bodies() {
        let of = by_device.entry(body[..1].to_owned()).or_default();
        if of.last() != Some(&body) {
            of.push(body);
        }
    }
    for (device, bodies) in by_device {
        let expected: Vec<_> = (0..20).map(|n| format!("{device}:{n:02}")).collect();
        assert_eq!(bodies, expected);
    }
    assert!(
        store
            .stores()
            .upstream
            .dead_letters(None, 10)
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn what_a_backend_refuses_is_a_dead_letter_at_once_and_can_be_tried_again() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let backend = Backend::start(|body, count| match body {
        "bad" if count == 1 => Answer::Status(422),
        "redirect" => Answer::Status(302),
        _ => Answer::Status(200),
    })
    .await;
    let config = config(&[rule("a", &backend.url)]);
    let worker = Worker::start(&store, &config);
    let id = publish(&store, &config, "c", "up/a", "bad").await;
    publish(&store, &config, "c", "up/a", "redirect").await;
    publish(&store, &config, "c", "up/a", "good").await;
    called(&backend, 3).await;
    assert_eq!(backend.bodies(), ["bad", "redirect", "good"]);
    let letters = dead_letters(&store, 2).await;
    assert_eq!((&letters[0].message.id, letters[0].attempts), (&id, 1));
    assert_eq!(
        letters[0].reason,
        "answered 422 Unprocessable Entity: said the backend"
    );
    assert!(letters[1].reason.starts_with("answered 302"));
    assert!(
        store
            .stores()
            .upstream
            .retry_dead_letter(&id)
            .await
            .unwrap()
    );
    let calls = called(&backend, 4).await;
    assert_eq!(
        (calls[3].body.as_str(), calls[3].header("webhook-id")),
        ("bad", id.as_str())
    );
    dead_letters(&store, 1).await;
    worker.stop().await;
}

#[tokio::test]
async fn used_up_attempts_make_a_dead_letter_that_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let backend = Backend::start(|_, _| Answer::Status(502)).await;
    // A port that nobody listens on any more.
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let mut slow = rule("slow", &backend.url);
    slow["timeout"] = json!("50ms");
    slow["retry"]["attempts"] = json!(2);
    let never = Backend::start(|_, _| Answer::Never).await;
    slow["url"] = json!(never.url);
    let config = config(&[
        rule("a", &backend.url),
        rule("closed", &format!("http://{closed}")),
        slow,
    ]);
    let worker = Worker::start(&store, &config);
    for name in ["a", "closed", "slow"] {
        publish(&store, &config, "c", &format!("up/{name}"), "x").await;
    }
    let mut letters = dead_letters(&store, 3).await;
    worker.stop().await;
    letters.sort_by_key(|letter| letter.queue.clone());
    let expected = [
        ("a", 4, "answered 502"),
        ("closed", 4, "cannot connect: "),
        ("slow", 2, "no answer in time: "),
    ];
    for (letter, (queue, attempts, reason)) in letters.iter().zip(expected) {
        assert_eq!((letter.queue.as_str(), letter.attempts), (queue, attempts));
        assert!(letter.reason.starts_with(reason), "{}", letter.reason);
    }
    assert_eq!((backend.calls().len(), never.calls().len()), (4, 2));
}

#[tokio::test]
async fn a_backend_is_left_alone_for_as_long_as_it_asks() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let backend = Backend::start(|_, count| match count {
        1 => Answer::RetryAfter(429, 1),
        _ => Answer::Status(200),
    })
    .await;
    let config = config(&[rule("a", &backend.url)]);
    let worker = Worker::start(&store, &config);
    publish(&store, &config, "c", "up/a", "x").await;
    let calls = called(&backend, 2).await;
    assert!(calls[1].at - calls[0].at >= Duration::from_secs(1));
    worker.stop().await;
}

#[tokio::test]
async fn a_dead_backend_does_not_hold_up_another_rule() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let stuck = Backend::start(|_, _| Answer::Never).await;
    let quick = Backend::start(|_, _| Answer::Status(200)).await;
    let config = config(&[rule("stuck", &stuck.url), rule("quick", &quick.url)]);
    let worker = Worker::start(&store, &config);
    for n in 0..50 {
        for name in ["stuck", "quick"] {
            publish(
                &store,
                &config,
                &format!("c{n}"),
                &format!("up/{name}"),
                &n.to_string(),
            )
            .await;
        }
    }
    let started = Instant::now();
    called(&quick, 50).await;
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(stuck.calls().len() <= 4, "one call a partition");
    drop(worker);
}

#[tokio::test]
async fn no_more_calls_run_at_once_than_the_rule_allows() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let stuck = Backend::start(|_, _| Answer::Never).await;
    let mut narrow = rule("a", &stuck.url);
    narrow["concurrency"] = json!(1);
    narrow["timeout"] = json!("300ms");
    narrow["retry"]["attempts"] = json!(1);
    let config = config(&[narrow]);
    for n in 0..16 {
        publish(&store, &config, &format!("c{n}"), "up/a", &n.to_string()).await;
    }
    let worker = Worker::start(&store, &config);
    let calls = called(&stuck, 4).await;
    for pair in calls.windows(2) {
        assert!(
            pair[1].at - pair[0].at >= Duration::from_millis(250),
            "calls overlap"
        );
    }
    worker.stop().await;
}

#[tokio::test]
async fn what_was_not_settled_comes_again_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let stuck = Backend::start(|body, _| match body {
        "2" => Answer::Status(503),
        _ => Answer::Status(200),
    })
    .await;
    let before = config(&[rule("a", &stuck.url)]);
    let mut patient = before.clone();
    patient.rules[0].retry.attempts = 1_000_000;
    let worker = Worker::start(&store, &patient);
    let mut ids = Vec::new();
    for n in 1..=3 {
        ids.push(publish(&store, &patient, "c", "up/a", &n.to_string()).await);
    }
    called(&stuck, 2).await;
    worker.stop().await;
    assert!(!stuck.bodies().contains(&"3".to_owned()));
    store.close().unwrap();
    drop(store);

    let store = open(directory.path());
    let healthy = Backend::start(|_, _| Answer::Status(200)).await;
    let after = config(&[rule("a", &healthy.url)]);
    let worker = Worker::start(&store, &after);
    let calls = called(&healthy, 2).await;
    worker.stop().await;
    assert_eq!(healthy.bodies(), ["2", "3"]);
    assert_eq!(calls[0].header("webhook-id"), ids[1].as_str());
}

/// Four partitions wait for one backend: while it is out they ask it one by one, not all together, and nothing is given up.
#[tokio::test]
async fn a_backend_that_is_out_is_asked_now_and_then_and_gets_everything_in_order_later() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let started = Instant::now();
    let out = Duration::from_millis(1_500);
    let backend = Backend::start(move |_, _| match started.elapsed() < out {
        true => Answer::Status(503),
        false => Answer::Status(200),
    })
    .await;
    let mut patient = rule("a", &backend.url);
    patient["retry"] = json!({"attempts": 1_000, "initial": "50ms", "max": "50ms"});
    let config = config(&[patient]);
    for n in 0..5 {
        for device in 0..8 {
            let (client, body) = (format!("dev-{device}"), format!("{device}:{n}"));
            publish(&store, &config, &client, "up/a", &body).await;
        }
    }
    let worker = Worker::start(&store, &config);
    eventually("everything arrives", async || {
        let calls = backend.calls();
        let arrived = calls.iter().filter(|call| call.at >= started + out);
        (arrived.count() >= 40).then_some(())
    })
    .await;
    worker.stop().await;
    let (while_out, later): (Vec<_>, Vec<_>) = backend
        .calls()
        .into_iter()
        .partition(|call| call.at < started + out);
    // Four partitions that each try every 25 ms on average would make about 240.
    assert!(while_out.len() < 100, "{} calls", while_out.len());
    for device in 0..8 {
        let of = later
            .iter()
            .filter(|call| call.body.starts_with(&format!("{device}:")));
        let mut bodies: Vec<_> = of.map(|call| call.body.clone()).collect();
        bodies.dedup();
        let expected: Vec<_> = (0..5).map(|n| format!("{device}:{n}")).collect();
        assert_eq!(bodies, expected);
    }
    let letters = store.stores().upstream.dead_letters(None, 10).await;
    assert!(letters.unwrap().is_empty());
}
