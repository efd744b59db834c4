//! What several themes need.

use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::wire::{Connect, Publish, V3, V5};
use moorline_tests::{Api, Gateway, cluster, eventually};
use serde_json::{Value, json};

pub(crate) const VERSIONS: [u8; 2] = [V3, V5];

/// Long enough that whatever should not happen would have happened.
pub(crate) const QUIET: Duration = Duration::from_millis(300);

/// A runtime for one test: two workers, as on the smallest machine. Does nothing where the test is about the embedded store
/// and a cluster is asked for.
pub(crate) fn run<T: Future<Output = ()>>(test: T) {
    // The name of a test's future begins with the path of the test.
    let name = std::any::type_name::<T>();
    if cluster::wanted()
        && let Some(reason) = crate::embedded_only::reason(name)
    {
        eprintln!("not run against a cluster: {reason}");
        return;
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

pub(crate) async fn resume(gateway: &Gateway, version: u8, id: &str) -> Device {
    Device::connect(gateway.mqtt(), Connect::new(version, id).persistent()).await
}

/// Sends one message upstream, so that whatever is made with the first one is there.
pub(crate) async fn warm_up(gateway: &Gateway) {
    let mut device = Device::clean(gateway.mqtt(), V5, "first-of-all").await;
    assert!(device.publish(Publish::new("up/first", 1, "x")).await < 0x80);
    device.disconnect().await;
    assert_eq!(gateway.await_upstream(1).await.len(), 1);
}

/// Pushes numbered texts one after the other; each is accepted before the next is sent.
pub(crate) async fn push_numbered(
    api: &Api,
    client: &str,
    numbers: std::ops::Range<usize>,
) -> Vec<String> {
    let mut ids = Vec::new();
    for number in numbers {
        ids.push(api.push_text(client, &number.to_string()).await);
    }
    ids
}

pub(crate) async fn await_state(api: &Api, id: &str, state: &str) -> Value {
    eventually(
        Duration::from_secs(20),
        &format!("message {id} is {state}"),
        || async {
            let body = api.get(&format!("/v1/messages/{id}")).await.json();
            (body["state"] == state).then_some(body)
        },
    )
    .await
}

/// The states of a receipt's timeline.
pub(crate) fn timeline(receipt: &Value) -> Vec<String> {
    receipt["timeline"]
        .as_array()
        .map(|steps| {
            steps
                .iter()
                .map(|step| step["state"].as_str().unwrap_or("?").to_owned())
                .collect()
        })
        .unwrap_or_default()
}

pub(crate) fn to(client: &str, payload: &str) -> Value {
    json!({"to": {"client": client}, "payload": payload})
}

/// The value of a metric summed over its labels.
pub(crate) fn metric(text: &str, name: &str) -> Option<f64> {
    let mut found = None;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some(rest) = line.strip_prefix(name) else {
            continue;
        };
        if !rest.starts_with(['{', ' ']) {
            continue;
        }
        let value: f64 = rest.rsplit(' ').next()?.parse().ok()?;
        found = Some(found.unwrap_or(0.0) + value);
    }
    found
}

/// How many messages wait for a client.
pub(crate) async fn waiting(api: &Api, id: &str) -> u64 {
    let answer = api.get(&format!("/v1/clients/{id}")).await;
    if answer.status == 404 {
        return 0;
    }
    let body = answer.expect(200);
    body["inbox"]["entries"]
        .as_u64()
        .unwrap_or_else(|| panic!("no inbox depth in {body}"))
}

pub(crate) async fn await_waiting(api: &Api, id: &str, entries: u64) {
    eventually(
        Duration::from_secs(20),
        &format!("{entries} messages wait for {id}"),
        || async { (waiting(api, id).await == entries).then_some(()) },
    )
    .await;
}
