//! What is particular to the embedded store: its directory, its clean end, named consumers, limits.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moorline_router::contract::{client, push, read_all, stored, topic};
use moorline_router::embedded::{Config, EmbeddedStore, FORMAT_VERSION, Health, OpenError};
use moorline_router::{
    Append, Inboxes, MessageId, Position, QueueName, Settlement, StoreError, UpstreamBus,
    UpstreamMessage, unix_ms,
};

fn config(dir: &Path) -> Config {
    Config {
        data_dir: dir.join("data"),
        ..Config::default()
    }
}

fn open(dir: &Path) -> Arc<EmbeddedStore> {
    EmbeddedStore::open(config(dir)).unwrap()
}

fn refused(config: Config) -> OpenError {
    match EmbeddedStore::open(config) {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    }
}

fn upstream(payload: &str) -> UpstreamMessage {
    UpstreamMessage {
        id: MessageId::generate(),
        client: client("device"),
        topic: topic("up/x"),
        qos: moorline_mqtt::QoS::AtLeastOnce,
        properties: None,
        payload: payload.to_owned().into(),
        received_at_ms: unix_ms(),
    }
}

async fn publish(store: &EmbeddedStore, payload: &str) {
    let default = vec![QueueName::new(QueueName::DEFAULT)];
    store
        .publish(vec![(upstream(payload), default)])
        .await
        .unwrap();
}

#[tokio::test]
async fn a_newer_format_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).close().unwrap();
    fs::write(dir.path().join("data/FORMAT"), "7\n").unwrap();
    let error = refused(config(dir.path()));
    assert!(
        matches!(&error, OpenError::NewerFormat { found: 7, supported, .. } if *supported == FORMAT_VERSION)
    );
    let text = error.to_string();
    let data = dir.path().join("data");
    for part in [data.to_str().unwrap(), "7", &FORMAT_VERSION.to_string()] {
        assert!(text.contains(part), "{text:?} names {part}");
    }
    fs::write(dir.path().join("data/FORMAT"), "seven").unwrap();
    assert!(
        refused(config(dir.path()))
            .to_string()
            .contains("\"seven\"")
    );
}

#[tokio::test]
async fn a_store_from_before_formats_were_numbered_is_migrated() {
    let dir = tempfile::tempdir().unwrap();
    let limited = Config {
        upstream_queue_bytes_max: 4_000,
        ..config(dir.path())
    };
    let store = EmbeddedStore::open(limited.clone()).unwrap();
    stored(&*store, &client("device"), push("kept")).await;
    publish(&store, &"x".repeat(3_000)).await;
    store.close().unwrap();
    remove_queue_counters(&limited.data_dir.join("store"));
    fs::remove_file(limited.data_dir.join("FORMAT")).unwrap();
    let store = EmbeddedStore::open(limited.clone()).unwrap();
    let format = fs::read_to_string(limited.data_dir.join("FORMAT")).unwrap();
    assert_eq!(format.trim(), FORMAT_VERSION.to_string());
    assert_eq!(read_all(&*store, &client("device")).await.entries.len(), 1);
    let default = vec![QueueName::new(QueueName::DEFAULT)];
    let more = vec![(upstream(&"x".repeat(3_000)), default)];
    let refused = UpstreamBus::publish(&*store, more).await;
    assert!(
        matches!(refused, Err(StoreError::Full(_))),
        "what is there was counted"
    );
}

/// Makes a store look as it did in format 0.
fn remove_queue_counters(path: &Path) {
    let database = fjall::Database::builder(path).open().unwrap();
    let keyspace = database
        .keyspace("main", fjall::KeyspaceCreateOptions::default)
        .unwrap();
    let counters: Vec<_> = keyspace
        .prefix("n")
        .map(|guard| guard.key().unwrap().to_vec())
        .collect();
    assert!(!counters.is_empty());
    for key in counters {
        keyspace.remove(key).unwrap();
    }
    database.persist(fjall::PersistMode::SyncAll).unwrap();
}

#[tokio::test]
async fn two_cannot_have_the_same_directory_and_the_error_names_the_holder() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let error = refused(config(dir.path()));
    assert!(matches!(error, OpenError::InUse { .. }));
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    store.close().unwrap();
    open(dir.path()).close().unwrap();
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("data"), "a file").unwrap();
    let error = refused(config(dir.path()));
    assert!(matches!(error, OpenError::Io { .. }));
    assert!(
        error
            .to_string()
            .contains(dir.path().join("data").to_str().unwrap()),
        "{error}"
    );
}

#[tokio::test]
async fn after_its_end_every_call_says_that_the_store_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    assert_eq!(store.health(), Health::Ready);
    let append = Append {
        client: client("a"),
        message: push("x"),
        fingerprint: None,
    };
    let submitted = store.append(vec![append.clone()]);
    store.close().unwrap();
    submitted.await.unwrap();
    store.close().unwrap();
    assert!(!store.is_writable());
    for error in [
        store.append(vec![append]).await.unwrap_err(),
        store
            .read(&client("a"), Position::START, 1, 1)
            .await
            .unwrap_err(),
        store
            .read_default("c", None, 1, Duration::ZERO)
            .await
            .unwrap_err(),
    ] {
        assert!(matches!(&error, StoreError::Unavailable(cause) if cause.contains("closed")));
    }
    assert_eq!(
        read_all(&*open(dir.path()), &client("a"))
            .await
            .entries
            .len(),
        1
    );
}

#[tokio::test]
async fn a_fetch_that_waits_ends_when_the_store_does() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let waiting = {
        let store = store.clone();
        tokio::spawn(async move {
            store
                .fetch(&QueueName::new("rule"), 0, Position::START, 1)
                .await
        })
    };
    tokio::task::yield_now().await;
    let closing = store.clone();
    tokio::task::spawn_blocking(move || closing.close())
        .await
        .unwrap()
        .unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), waiting).await;
    assert!(matches!(
        ended.unwrap().unwrap(),
        Err(StoreError::Unavailable(_))
    ));
}

#[tokio::test]
async fn too_little_free_space_refuses_data_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let device = client("device");
    stored(&*store, &device, push("1")).await;
    store.close().unwrap();
    let store = EmbeddedStore::open(Config {
        min_free_bytes: u64::MAX,
        ..config(dir.path())
    })
    .unwrap();
    let append = Append {
        client: device.clone(),
        message: push("2"),
        fingerprint: None,
    };
    match store.append(vec![append]).await {
        Err(StoreError::Unavailable(cause)) => assert!(cause.starts_with("disk: "), "{cause}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(store.health(), Health::Unavailable(cause) if cause.starts_with("disk: ")));
    let page = read_all(&*store, &device).await;
    let cancelled = store.cancel(&page.entries[0].message.id).await.unwrap();
    assert!(cancelled.is_some());
    assert!(read_all(&*store, &device).await.entries.is_empty());
}

#[tokio::test]
async fn too_much_waiting_is_refused_as_overloaded() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(Config {
        queue_bytes_max: 50_000,
        ..config(dir.path())
    })
    .unwrap();
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let message = push(&"x".repeat(10_000));
            store.append(vec![Append {
                client: client("a"),
                message,
                fingerprint: None,
            }])
        })
        .collect();
    let mut accepted = 0;
    for call in calls {
        match call.await {
            Ok(_) => accepted += 1,
            Err(StoreError::Unavailable(cause)) => assert!(cause.contains("overloaded")),
            Err(error) => panic!("{error}"),
        }
    }
    assert!((1..200).contains(&accepted), "{accepted}");
    assert_eq!(
        read_all(&*store, &client("a")).await.entries.len(),
        accepted
    );
}

#[tokio::test]
async fn names_that_no_key_can_hold_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let long = client(&"x".repeat(65_535));
    let append = Append {
        client: long,
        message: push("x"),
        fingerprint: None,
    };
    assert!(matches!(
        store.append(vec![append]).await,
        Err(StoreError::Full(_))
    ));
}

fn texts(page: &[moorline_router::UpstreamDelivery]) -> Vec<String> {
    page.iter()
        .map(|d| String::from_utf8(d.message.payload.to_vec()).unwrap())
        .collect()
}

#[tokio::test]
async fn each_consumer_has_a_cursor_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    for n in 0..5 {
        publish(&store, &n.to_string()).await;
    }
    let a = store
        .read_default("a", None, 3, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(texts(&a), ["0", "1", "2"]);
    let onward = store
        .read_default("a", Some(a[2].position), 9, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(texts(&onward), ["3", "4"]);
    let b = store
        .read_default("b", None, 1, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(texts(&b), ["0"]);
    // What is not acknowledged comes again, also after a restart.
    store.ack_default("a", a[1].position).await.unwrap();
    store.ack_default("a", a[0].position).await.unwrap();
    store.close().unwrap();
    store = open(dir.path());
    let again = store
        .read_default("a", None, 9, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(texts(&again), ["2", "3", "4"]);
    let b = store
        .read_default("b", None, 1, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(texts(&b), ["0"]);
    assert_eq!(
        store.consumers(),
        [("a".into(), a[1].position), ("b".into(), Position::START)]
    );
    assert!(store.delete_consumer("b").await.unwrap());
    assert!(!store.delete_consumer("b").await.unwrap());
    assert_eq!(store.consumers().len(), 1);
}

#[tokio::test]
async fn an_acknowledgement_past_the_end_skips_nothing_that_comes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    publish(&store, "1").await;
    store
        .ack_default(
            "a",
            Position {
                generation: u64::MAX,
                sequence: u64::MAX,
            },
        )
        .await
        .unwrap();
    publish(&store, "2").await;
    let page = store
        .read_default("a", None, 9, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(texts(&page), ["2"]);
}

#[tokio::test]
async fn a_long_poll_returns_what_comes_or_nothing_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let began = Instant::now();
    let none = store
        .read_default("a", None, 9, Duration::from_millis(30))
        .await
        .unwrap();
    assert!(none.is_empty() && began.elapsed() >= Duration::from_millis(30));
    let waiting = {
        let store = store.clone();
        tokio::spawn(async move {
            store
                .read_default("a", None, 9, Duration::from_secs(60))
                .await
        })
    };
    tokio::task::yield_now().await;
    publish(&store, "1").await;
    assert_eq!(texts(&waiting.await.unwrap().unwrap()), ["1"]);
}

#[tokio::test]
async fn the_default_queue_is_trimmed_once_every_consumer_has_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let limited = Config {
        upstream_queue_bytes_max: 10_000,
        ..config(dir.path())
    };
    let store = EmbeddedStore::open(limited).unwrap();
    let large = "x".repeat(3_000);
    for _ in 0..3 {
        publish(&store, &large).await;
    }
    let full = || {
        let default = vec![QueueName::new(QueueName::DEFAULT)];
        store.publish(vec![(upstream(&large), default)])
    };
    assert!(
        matches!(full().await, Err(StoreError::Full(_))),
        "with no consumer they stay"
    );
    let a = store
        .read_default("a", None, 9, Duration::ZERO)
        .await
        .unwrap();
    store
        .read_default("b", None, 1, Duration::ZERO)
        .await
        .unwrap();
    store.ack_default("a", a[2].position).await.unwrap();
    assert!(
        matches!(full().await, Err(StoreError::Full(_))),
        "one consumer is still to come"
    );
    store.ack_default("b", a[1].position).await.unwrap();
    moorline_router::contract::eventually("there is room again", || async { full().await.is_ok() })
        .await;
    let b = store
        .read_default("b", None, 9, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(b[0], a[2], "what one has not acknowledged is still there");
}

#[tokio::test]
async fn consumers_are_bounded_and_their_names_checked() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..64 {
        store
            .ack_default(&format!("consumer-{n}"), Position::START)
            .await
            .unwrap();
    }
    let one_more = store
        .read_default("one-more", None, 1, Duration::ZERO)
        .await;
    assert!(matches!(one_more, Err(StoreError::Full(_))));
    for name in ["", "a b", "é", &"x".repeat(65)] {
        assert!(
            store.ack_default(name, Position::START).await.is_err(),
            "{name}"
        );
    }
}

#[tokio::test]
async fn a_damaged_record_is_named_and_never_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    stored(&*store, &client("device"), push("payload")).await;
    stored(&*store, &client("other"), push("payload")).await;
    store.close().unwrap();
    {
        let database = fjall::Database::builder(dir.path().join("data/store"))
            .open()
            .unwrap();
        let keyspace = database
            .keyspace("main", fjall::KeyspaceCreateOptions::default)
            .unwrap();
        let guard = keyspace.prefix("edevice").next().unwrap();
        let (key, value) = guard.into_inner().unwrap();
        let mut damaged = value.to_vec();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        keyspace.insert(key, damaged).unwrap();
        database.persist(fjall::PersistMode::SyncAll).unwrap();
    }
    let store = open(dir.path());
    match store
        .read(&client("device"), Position::START, 10, 1_000)
        .await
    {
        Err(error @ StoreError::Damaged(_)) => {
            assert!(error.to_string().contains("device"), "{error}");
            assert!(!error.is_retryable());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(read_all(&*store, &client("other")).await.entries.len(), 1);
}

#[tokio::test]
async fn a_call_that_does_not_fit_into_one_queue_is_stored_in_none() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        upstream_queue_bytes_max: 10_000,
        upstream_partitions: 1,
        ..config(dir.path())
    };
    let store = EmbeddedStore::open(config).unwrap();
    let queue = QueueName::new;
    let large = || upstream(&"x".repeat(3_000));
    for _ in 0..3 {
        let call = store.publish(vec![(large(), vec![queue("full")])]);
        call.await.unwrap();
    }
    let both = || {
        vec![
            (upstream("small"), vec![queue("other")]),
            (large(), vec![queue("full")]),
        ]
    };
    let refused = store.publish(both()).await;
    assert!(matches!(refused, Err(StoreError::Full(_))));
    let full = queue("full");
    let page = store.fetch(&full, 0, Position::START, 10).await.unwrap();
    let dead = Settlement::DeadLetter {
        reason: "no".into(),
        attempts: 1,
    };
    store
        .settle(&full, 0, page[0].position, dead)
        .await
        .unwrap();
    assert!(
        store.publish(both()).await.is_err(),
        "a dead letter still takes its room"
    );
    let done = store.settle(&full, 0, page[1].position, Settlement::Done);
    done.await.unwrap();
    store.publish(both()).await.unwrap();
    let other = queue("other");
    let page = store.fetch(&other, 0, Position::START, 10).await.unwrap();
    assert_eq!(page.len(), 1, "nothing of the refused calls was stored");
}
