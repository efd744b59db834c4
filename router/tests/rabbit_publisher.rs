//! The publisher in front of a real RabbitMQ that is full, in alarm, frozen and killed.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::print_stdout,
    reason = "a measurement is for the person who runs it"
)]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use lapin::options::{BasicGetOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, ExchangeKind};
use moorline_router::rabbit::publisher::sender_hash;
use moorline_router::rabbit::topology::Arguments;
use moorline_router::rabbit::{Config, Declaration, Link, Publisher, Publishing, Topology};
use moorline_router::{Fence, MessageId, StoreError};
use moorline_tests::servers::RabbitServer;
use moorline_tests::waiting::{eventually, soon};

const PATIENCE: Duration = Duration::from_secs(90);

fn config(url: &str) -> Config {
    Config {
        url: url.to_owned(),
        heartbeat: Duration::from_secs(5),
        ..Config::default()
    }
}

async fn shared() -> Config {
    config(&RabbitServer::shared().await.vhost().await.url)
}

fn quorum(name: &str) -> Declaration {
    Arguments::quorum(1_000_000, 1 << 30).of_queue(name.into())
}

/// A publisher of two lanes that declares `declarations`.
fn publisher(
    config: &Config,
    declarations: impl IntoIterator<Item = Declaration>,
) -> Arc<Publisher> {
    let topology = Topology::new();
    topology.add(declarations);
    Publisher::new(config, "test", 2, &topology)
}

fn to_queue(queue: &str, body: &str) -> Publishing {
    Publishing {
        exchange: ShortString::default(),
        routing_key: queue.into(),
        id: MessageId::generate(),
        properties: BasicProperties::default(),
        persistent: true,
        mandatory: true,
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

/// Takes everything out of a queue: ids and bodies, in order.
async fn drain(config: &Config, queue: &str) -> Vec<(String, String)> {
    let link = Link::new(config, "drain");
    let channel = soon("a channel", async {
        loop {
            if let Ok(channel) = link.channel().await {
                return channel;
            }
        }
    })
    .await;
    let mut taken = Vec::new();
    loop {
        let options = BasicGetOptions { no_ack: true };
        let got = channel.basic_get(queue.into(), options).await.unwrap();
        let Some(message) = got else { return taken };
        let id = message
            .properties
            .message_id()
            .as_ref()
            .unwrap()
            .to_string();
        taken.push((id, String::from_utf8(message.data.clone()).unwrap()));
    }
}

/// Calls of several senders, each numbered.
struct Load {
    calls: Vec<(usize, String, MessageCall)>,
}

type MessageCall = futures_util::future::BoxFuture<'static, Result<(), StoreError>>;

impl Load {
    fn new(publisher: &Publisher, queue: &str, senders: usize, each: usize, from: usize) -> Self {
        let mut calls = Vec::new();
        for number in from..from + each {
            for sender in 0..senders {
                let publishing = to_queue(queue, &format!("{sender} {number}"));
                let id = publishing.id.to_string();
                let call = publisher.publish(sender_hash(&sender.to_string()), publishing, None);
                calls.push((sender, id, call));
            }
        }
        Self { calls }
    }

    /// The ids of the calls that were answered with Ok.
    async fn accepted(self) -> HashSet<String> {
        let answered = self.calls.into_iter().map(|(_, id, call)| async move {
            let answer = tokio::time::timeout(PATIENCE, call).await;
            answer.expect("a call is answered").is_ok().then_some(id)
        });
        join_all(answered).await.into_iter().flatten().collect()
    }
}

/// Nothing accepted is missing, each sender's messages are in order of first occurrence, and what is there twice is the
/// same message. Says how many there were twice.
fn check(taken: &[(String, String)], accepted: &HashSet<String>) -> usize {
    let there: HashSet<&String> = taken.iter().map(|(id, _)| id).collect();
    let missing = accepted.iter().filter(|id| !there.contains(id)).count();
    assert_eq!(missing, 0, "of {} accepted", accepted.len());
    let mut bodies: HashMap<&str, &str> = HashMap::new();
    let mut next: HashMap<&str, usize> = HashMap::new();
    let mut twice = 0;
    for (id, body) in taken {
        if let Some(before) = bodies.insert(id, body) {
            assert_eq!(before, body, "one id, two messages");
            twice += 1;
            continue;
        }
        let (sender, number) = body.split_once(' ').unwrap();
        let number: usize = number.parse().unwrap();
        let expected = next.entry(sender).or_default();
        assert_eq!(number, *expected, "of sender {sender}");
        *expected += 1;
    }
    twice
}

#[tokio::test]
async fn what_several_senders_publish_is_confirmed_and_in_order() {
    let config = shared().await;
    let publisher = publisher(&config, [quorum("q")]);
    let accepted = Load::new(&publisher, "q", 10, 200, 0).accepted().await;
    assert_eq!(accepted.len(), 2_000);
    assert_eq!(publisher.waiting(), (0, 0));
    let taken = drain(&config, "q").await;
    assert_eq!(check(&taken, &accepted), 0);
    assert_eq!(taken.len(), 2_000);
}

#[tokio::test]
async fn what_no_queue_takes_is_refused_and_nothing_else_is() {
    let config = shared().await;
    let publisher = publisher(&config, [quorum("q")]);
    let mut calls = Vec::new();
    for number in 0..3_000 {
        let is_lost = number % 3 == 1 || number % 7 == 0;
        let queue = if is_lost { "nowhere" } else { "q" };
        let publishing = to_queue(queue, &format!("0 {number}"));
        let id = publishing.id.to_string();
        calls.push((is_lost, id, publisher.publish(0, publishing, None)));
    }
    let mut accepted = HashSet::new();
    for (is_lost, id, call) in calls {
        match call.await {
            Ok(()) => {
                assert!(!is_lost, "accepted and nowhere");
                accepted.insert(id);
            }
            Err(StoreError::Unavailable(text)) => assert!(is_lost, "{text}"),
            Err(other) => panic!("{other}"),
        }
    }
    let taken = drain(&config, "q").await;
    assert_eq!(taken.len(), accepted.len());
    let optional = Publishing {
        mandatory: false,
        ..to_queue("nowhere", "x")
    };
    publisher.publish(0, optional, None).await.unwrap();
}

#[tokio::test]
async fn a_full_queue_refuses_until_there_is_room() {
    let config = shared().await;
    let publisher = publisher(
        &config,
        [
            Arguments::quorum(10, 1 << 20).of_queue("small".into()),
            quorum("q"),
        ],
    );
    eventually(PATIENCE, "the queue is full", || async {
        match soon(
            "an answer",
            publisher.publish(0, to_queue("small", "x"), None),
        )
        .await
        {
            Ok(()) => None,
            Err(StoreError::Full(_)) => Some(()),
            Err(other) => panic!("{other}"),
        }
    })
    .await;
    publisher
        .publish(0, to_queue("q", "0 0"), None)
        .await
        .unwrap();
    assert!(drain(&config, "small").await.len() >= 10);
    eventually(PATIENCE, "the queue takes more", || async {
        publisher
            .publish(0, to_queue("small", "x"), None)
            .await
            .ok()
    })
    .await;
}

/// A sender that sends everything again after a refusal gets nothing stored behind what was refused.
#[tokio::test]
async fn nothing_goes_out_behind_a_refusal() {
    let config = shared().await;
    let publisher = publisher(&config, [quorum("q")]);
    let fence = Fence::new(false);
    let calls: Vec<_> = (0..50)
        .map(|number| {
            let queue = if number == 20 { "nowhere" } else { "q" };
            let publishing = to_queue(queue, &format!("0 {number}"));
            publisher.publish(0, publishing, Some(&fence))
        })
        .collect();
    let other = publisher.publish(0, to_queue("q", "0 20"), None);
    let answers = join_all(calls).await;
    other.await.unwrap();
    assert!(answers[..20].iter().all(Result::is_ok));
    assert!(answers[20..].iter().all(Result::is_err));
    let again = publisher.publish(0, to_queue("q", "x"), Some(&fence));
    assert!(again.await.is_err(), "the fence stays broken");
    let taken = drain(&config, "q").await;
    let numbers: Vec<_> = taken.iter().map(|(_, body)| body.as_str()).collect();
    let expected: Vec<_> = (0..=20).map(|number| format!("0 {number}")).collect();
    assert_eq!(numbers, expected);
}

/// The broker closes the channel over one message: that one is refused, and nothing else is lost or out of order.
#[tokio::test]
async fn a_message_that_the_broker_refuses_takes_no_other_with_it() {
    let config = shared().await;
    let publisher = publisher(&config, [quorum("q")]);
    let mut calls = Vec::new();
    let mut refused = Vec::new();
    for number in 0..200 {
        calls.push(publisher.publish(0, to_queue("q", &format!("0 {number}")), None));
        if number % 80 == 40 {
            let bad = Publishing {
                exchange: "no-such-exchange".into(),
                ..to_queue("q", "bad")
            };
            refused.push(publisher.publish(0, bad, None));
        }
    }
    for call in refused {
        let error = soon("an answer", call).await.unwrap_err();
        assert!(error.to_string().contains("NOT_FOUND"), "{error}");
    }
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    let taken = drain(&config, "q").await;
    check(&taken, &HashSet::new());
    let different: HashSet<_> = taken.iter().map(|(id, _)| id).collect();
    assert_eq!(different.len(), 200);
}

#[tokio::test]
async fn a_queue_that_was_deleted_comes_back() {
    let config = shared().await;
    let publisher = publisher(
        &config,
        [
            Declaration::Exchange {
                name: "x".into(),
                kind: ExchangeKind::Topic,
            },
            quorum("q"),
            Declaration::Binding {
                queue: "q".into(),
                exchange: "x".into(),
                routing_key: "a.#".into(),
            },
        ],
    );
    let publishing = |body| Publishing {
        exchange: "x".into(),
        ..to_queue("a.b", body)
    };
    publisher.publish(0, publishing("0 0"), None).await.unwrap();
    let link = Link::new(&config, "delete");
    let channel = link.channel().await.unwrap();
    let deleted = channel.queue_delete("q".into(), lapin::options::QueueDeleteOptions::default());
    deleted.await.unwrap();
    eventually(PATIENCE, "the queue is there again", || async {
        publisher.publish(0, publishing("0 0"), None).await.ok()
    })
    .await;
    assert_eq!(drain(&config, "q").await.len(), 1);
}

#[tokio::test]
async fn a_queue_with_other_limits_is_used_as_it_is() {
    let config = shared().await;
    let link = Link::new(&config, "before");
    let channel = link.channel().await.unwrap();
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let made = channel.queue_declare("q".into(), options, FieldTable::default());
    made.await.unwrap();
    let publisher = publisher(&config, [quorum("q"), quorum("r")]);
    publisher
        .publish(0, to_queue("q", "x"), None)
        .await
        .unwrap();
    publisher
        .publish(0, to_queue("r", "x"), None)
        .await
        .unwrap();
}

#[tokio::test]
async fn more_than_the_bound_is_refused_while_the_broker_is_away() {
    let config = Config {
        publish_messages_max: 300,
        ..config("amqp://127.0.0.1:1")
    };
    let publisher = publisher(&config, []);
    let waiting: Vec<_> = (0..300)
        .map(|_| publisher.publish(0, to_queue("q", "x"), None))
        .collect();
    let beyond = publisher.publish(0, to_queue("q", "x"), None).await;
    assert!(matches!(beyond, Err(StoreError::Unavailable(_))));
    assert_eq!(publisher.waiting().1, 300);
    assert!(!publisher.is_connected());
    drop(waiting);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_confirmed_is_missing_after_the_broker_was_killed() {
    let mut server = RabbitServer::start().await;
    let config = config(&server.url());
    let publisher = publisher(&config, [quorum("q")]);
    publisher
        .publish(0, to_queue("q", "9 0"), None)
        .await
        .unwrap();
    // The broker writes down some seconds later that there is a new queue. Until then killing it loses the queue.
    let synced = server.eval("mnesia:dump_log(), lists:usort([dets:sync(T) || T <- dets:all()])");
    assert_eq!(synced.await, "[ok]");
    let mut accepted = HashSet::new();
    for round in 0..3 {
        let load = Load::new(&publisher, "q", 8, 250, round * 250);
        let accepting = tokio::spawn(load.accepted());
        // Some are confirmed, many are on their way.
        eventually(PATIENCE, "the load runs", || async {
            (publisher.waiting().1 < 1_800).then_some(())
        })
        .await;
        server.kill9();
        server.restart().await;
        accepted.extend(accepting.await.unwrap());
    }
    assert_eq!(accepted.len(), 6_000, "everything was answered with Ok");
    let taken = drain(&config, "q").await;
    let twice = check(&taken[1..], &accepted);
    println!("{twice} of {} twice", taken.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_broker_and_a_memory_alarm_make_publishes_wait() {
    let server = RabbitServer::start().await;
    let config = config(&server.url());
    let publisher = publisher(&config, [quorum("q")]);
    publisher
        .publish(0, to_queue("q", "9 0"), None)
        .await
        .unwrap();

    server.freeze();
    let started = Instant::now();
    let frozen = tokio::spawn(Load::new(&publisher, "q", 4, 500, 0).accepted());
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!frozen.is_finished());
    server.thaw();
    let mut accepted = frozen.await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(20));

    server.memory_alarm(true).await;
    let alarmed = tokio::spawn(Load::new(&publisher, "q", 4, 500, 500).accepted());
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(!alarmed.is_finished());
    server.memory_alarm(false).await;
    accepted.extend(alarmed.await.unwrap());
    assert_eq!(accepted.len(), 4_000);
    let taken = drain(&config, "q").await;
    let twice = check(&taken[1..], &accepted);
    println!("{twice} of {} twice", taken.len());
}

/// How fast: run by hand with `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure() {
    let config = shared().await;
    for window in [1_usize, 64, 256, 1_024] {
        let config = Config {
            publish_window: window,
            ..config.clone()
        };
        let topology = Topology::new();
        topology.add([quorum("q")]);
        let publisher = Publisher::new(&config, "measure", 1, &topology);
        publisher
            .publish(0, to_queue("q", "x"), None)
            .await
            .unwrap();
        let body = "x".repeat(128);
        let total = if window == 1 { 2_000 } else { 40_000 };
        let started = Instant::now();
        let mut times = Vec::new();
        let mut running = futures_util::stream::FuturesUnordered::new();
        for _ in 0..total {
            use futures_util::StreamExt as _;
            if running.len() >= window {
                times.push(running.next().await.unwrap());
            }
            let call = publisher.publish(0, to_queue("q", &body), None);
            let sent = Instant::now();
            running.push(async move {
                call.await.unwrap();
                sent.elapsed()
            });
        }
        use futures_util::StreamExt as _;
        times.extend(running.collect::<Vec<_>>().await);
        let rate = f64::from(total) / started.elapsed().as_secs_f64();
        times.sort_unstable();
        println!(
            "window {window}: {rate:.0} confirms/s, p50 {:?}, p99 {:?}",
            times[times.len() / 2],
            times[times.len() * 99 / 100]
        );
        drain(&config, "q").await;
    }
}
