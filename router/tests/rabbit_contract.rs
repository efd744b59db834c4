//! The upstream bus on a real RabbitMQ and Redis: the contract suite, several workers, a broker that dies.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use moorline_router::contract::upstream::message;
use moorline_router::contract::{Backend, Settings};
use moorline_router::rabbit::{self, RabbitUpstream};
use moorline_router::redis::{self, Limits, RedisStore};
use moorline_router::{Position, QueueName, Settlement, Stores, UpstreamBus, UpstreamDelivery};
use moorline_tests::servers::{RabbitServer, RedisServer, unique};
use moorline_tests::waiting::eventually;

const PATIENCE: Duration = Duration::from_secs(90);

/// A deployment of its own: a virtual host and a key prefix.
#[derive(Clone)]
struct Deployment {
    rabbit: rabbit::Config,
    redis: redis::Config,
}

impl Deployment {
    async fn on(url: String, settings: &Settings) -> Self {
        let rabbit = rabbit::Config {
            url,
            partitions: settings.upstream_partitions,
            queue_bytes_max: settings.upstream_queue_bytes_max,
            // A case wants to see everything at once.
            prefetch: 2_000,
            heartbeat: Duration::from_secs(5),
            ..rabbit::Config::default()
        };
        let redis = redis::Config {
            url: RedisServer::shared().await.url(),
            key_prefix: unique("upstream"),
            ..redis::Config::default()
        };
        Self { rabbit, redis }
    }

    fn open(&self) -> (Arc<RabbitUpstream>, Arc<RedisStore>) {
        let store = RedisStore::open(&self.redis, Limits::default()).unwrap();
        let upstream = RabbitUpstream::open(&self.rabbit, &unique("worker"), store.clone());
        (upstream, store)
    }
}

#[derive(Default)]
struct Rabbit {
    running: Option<(Deployment, Arc<RabbitUpstream>)>,
}

impl Rabbit {
    fn run(&mut self, deployment: Deployment) -> Stores {
        let (upstream, store) = deployment.open();
        self.running = Some((deployment, upstream.clone()));
        Stores {
            routes: store.clone(),
            inboxes: store.clone(),
            sessions: store.clone(),
            retained: store.clone(),
            jobs: store.jobs(),
            bans: store,
            upstream,
        }
    }
}

#[async_trait]
impl Backend for Rabbit {
    async fn start(&mut self, settings: Settings) -> Stores {
        let vhost = RabbitServer::shared().await.vhost().await;
        self.run(Deployment::on(vhost.url, &settings).await)
    }

    async fn restart(&mut self) -> Stores {
        let (deployment, upstream) = self.running.take().unwrap();
        upstream.close().await;
        drop(upstream);
        self.run(deployment)
    }
}

moorline_router::upstream_contract!(Rabbit::default());

fn rule() -> QueueName {
    QueueName::new("rule")
}

/// Works on all partitions until it is told to stop; says who it was.
struct Worker {
    bus: Arc<RabbitUpstream>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// What workers saw, in order: worker, partition, payload, id.
type Seen = Arc<std::sync::Mutex<Vec<(usize, u16, String, String)>>>;

impl Worker {
    fn start(number: usize, bus: Arc<RabbitUpstream>, seen: &Seen) -> Self {
        let tasks = (0..bus.partitions(&rule())).map(|partition| {
            let (bus, seen) = (bus.clone(), seen.clone());
            tokio::spawn(async move {
                let mut after = Position::START;
                loop {
                    let Ok(page) = bus.fetch(&rule(), partition, after, 16).await else {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        continue;
                    };
                    for delivery in page {
                        let UpstreamDelivery { position, message } = delivery;
                        let payload = String::from_utf8(message.payload.to_vec()).unwrap();
                        let entry = (number, partition, payload, message.id.to_string());
                        seen.lock().unwrap().push(entry);
                        // What could not be settled comes again.
                        _ = bus
                            .settle(&rule(), partition, position, Settlement::Done)
                            .await;
                        after = position;
                        if bus.is_wanted_elsewhere(&rule(), partition) {
                            break;
                        }
                    }
                }
            })
        });
        Self {
            tasks: tasks.collect(),
            bus,
        }
    }

    async fn stop(self) {
        for task in self.tasks {
            task.abort();
            // It was aborted.
            _ = task.await;
        }
        self.bus.close().await;
    }
}

/// Everything published was seen, each device's messages in order of first occurrence.
fn check(seen: &Seen, devices: usize, each: usize) {
    let seen = seen.lock().unwrap();
    let mut next: HashMap<&str, usize> = HashMap::new();
    let mut known = HashSet::new();
    for (worker, partition, payload, id) in &*seen {
        if !known.insert(id) {
            continue;
        }
        let (device, number) = payload.split_once(' ').unwrap();
        let expected = next.entry(device).or_default();
        let number: usize = number.parse().unwrap();
        assert_eq!(
            number, *expected,
            "of device {device}, at worker {worker}, partition {partition}"
        );
        *expected += 1;
    }
    assert_eq!(next.len(), devices);
    assert!(next.values().all(|count| *count == each));
}

fn count(seen: &Seen) -> usize {
    let seen = seen.lock().unwrap();
    let different: HashSet<_> = seen.iter().map(|(_, _, _, id)| id).collect();
    different.len()
}

async fn publish(bus: &RabbitUpstream, devices: usize, numbers: std::ops::Range<usize>) {
    let mut calls = Vec::new();
    for number in numbers {
        for device in 0..devices {
            let message = message(&format!("device-{device}"), &format!("{device} {number}"));
            calls.push(bus.publish(vec![(message, vec![rule()])]));
        }
    }
    for call in calls {
        tokio::time::timeout(PATIENCE, call).await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_move_to_a_worker_that_comes_and_back_when_it_leaves_in_order() {
    let vhost = RabbitServer::shared().await.vhost().await;
    let mut deployment = Deployment::on(vhost.url, &Settings::default()).await;
    deployment.rabbit.prefetch = 16;
    let (publisher, _) = deployment.open();
    let seen = Seen::default();
    let first = Worker::start(1, deployment.open().0, &seen);
    publish(&publisher, 20, 0..20).await;
    let second = Worker::start(2, deployment.open().0, &seen);
    let mut published = 20;
    let partitions_of = |worker| {
        let seen = seen.lock().unwrap();
        let of_worker = seen.iter().rev().take(100);
        let of_worker = of_worker.filter(move |entry| entry.0 == worker);
        of_worker.map(|entry| entry.1).collect::<HashSet<_>>().len()
    };
    for _ in 0..60 {
        publish(&publisher, 20, published..published + 5).await;
        published += 5;
        eventually(PATIENCE, "everything is seen", || async {
            (count(&seen) == 20 * published).then_some(())
        })
        .await;
        if partitions_of(1) == 2 && partitions_of(2) == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert_eq!((partitions_of(1), partitions_of(2)), (2, 2), "two each");
    publish(&publisher, 20, published..published + 20).await;
    first.stop().await;
    publish(&publisher, 20, published + 20..published + 40).await;
    eventually(PATIENCE, "everything is seen", || async {
        (count(&seen) == 20 * (published + 40)).then_some(())
    })
    .await;
    check(&seen, 20, published + 40);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_loses_nothing_between_publishers_and_workers() {
    let mut server = RabbitServer::start().await;
    let deployment = Deployment::on(server.url(), &Settings::default()).await;
    let seen = Seen::default();
    let (publisher, _) = deployment.open();
    publish(&publisher, 10, 0..10).await;
    let worker = Worker::start(1, deployment.open().0, &seen);
    eventually(PATIENCE, "the first are seen", || async {
        (count(&seen) == 100).then_some(())
    })
    .await;
    // The broker writes down some seconds later that there is a new queue. Until then killing it loses the queue.
    let synced = server.eval("mnesia:dump_log(), lists:usort([dets:sync(T) || T <- dets:all()])");
    assert_eq!(synced.await, "[ok]");
    for round in 0..2 {
        let from = 10 + round * 100;
        let bus = publisher.clone();
        let publishing = tokio::spawn(async move { publish(&bus, 10, from..from + 100).await });
        eventually(PATIENCE, "some are seen", || async {
            (count(&seen) > 10 * from + 50).then_some(())
        })
        .await;
        server.kill9();
        server.restart().await;
        publishing.await.unwrap();
    }
    eventually(PATIENCE, "everything is seen", || async {
        (count(&seen) == 2_100).then_some(())
    })
    .await;
    check(&seen, 10, 210);
    worker.stop().await;
}
