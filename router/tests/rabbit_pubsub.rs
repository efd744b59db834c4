//! Pub/sub between nodes over a real RabbitMQ, with the notes in a real Redis.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::print_stdout,
    reason = "a measurement is for the person who runs it"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use moorline_mqtt::{Publish, QoS, TopicName};
use moorline_router::pubsub::{Feed, FeedDelivery, QueueRegistry};
use moorline_router::rabbit::{Config, RabbitPubSub};
use moorline_router::redis::{self, RedisStore};
use moorline_router::{
    ClientId, GroupMember, MessageId, NodeId, PubSub, Publication, StoreError, unix_ms,
};
use moorline_tests::servers::{RabbitServer, RedisServer, VirtualHost, unique};
use moorline_tests::waiting::{eventually, soon};

const PATIENCE: Duration = Duration::from_secs(90);

struct World {
    config: Config,
    registry: Arc<RedisStore>,
    vhost: VirtualHost,
}

impl World {
    async fn new() -> Self {
        Self::on(RabbitServer::shared().await).await
    }

    async fn on(rabbit: &RabbitServer) -> Self {
        let vhost = rabbit.vhost().await;
        let redis = redis::Config {
            url: RedisServer::shared().await.url(),
            key_prefix: unique("pubsub"),
            ..redis::Config::default()
        };
        Self {
            config: Config {
                url: vhost.url.clone(),
                heartbeat: Duration::from_secs(5),
                queue_messages_max: 1000,
                ..Config::default()
            },
            registry: RedisStore::open(&redis, redis::Limits::default()).unwrap(),
            vhost,
        }
    }

    fn node(&self, name: &str) -> Arc<RabbitPubSub> {
        let id = NodeId::from_text(name);
        RabbitPubSub::open(&self.config, &id, self.registry.clone())
    }

    async fn queues(&self) -> Vec<(String, u64)> {
        RabbitServer::shared().await.queues(&self.vhost).await
    }
}

fn publication(topic: &str, qos: QoS, payload: &str) -> Publication {
    Publication {
        id: MessageId::generate(),
        from: Some(ClientId::parse("publisher").unwrap()),
        publish: Publish {
            dup: false,
            qos,
            retain: false,
            topic: TopicName::parse(topic.into()).unwrap(),
            packet_id: None,
            properties: None,
            payload: Bytes::copy_from_slice(payload.as_bytes()),
        },
        published_at_ms: unix_ms(),
    }
}

fn text_of(delivery: &FeedDelivery) -> String {
    String::from_utf8(delivery.publication.publish.payload.to_vec()).unwrap()
}

async fn next(feed: &mut Feed) -> String {
    let delivery = soon("a publication", feed.next()).await.unwrap();
    let text = text_of(&delivery);
    delivery.ack.done();
    text
}

async fn in_force(feed: &Feed) {
    if let Some(settled) = feed.filters().settled() {
        tokio::time::timeout(PATIENCE, settled).await.unwrap();
    }
}

async fn publish(from: &RabbitPubSub, topic: &str, qos: QoS, payload: &str) {
    let published = from.publish(publication(topic, qos, payload), None);
    let published = tokio::time::timeout(PATIENCE, published).await.unwrap();
    published.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_what_others_publish_and_its_filters_ask_for() {
    let world = World::new().await;
    let (one, other) = (world.node("one"), world.node("other"));
    let mut feed = one.open_node_feed();
    for filter in ["a/+/c", "b.c/#", "exact", "/", "x/#"] {
        feed.filters().add(filter);
    }
    in_force(&feed).await;
    let long = format!("x/{}", "y".repeat(400));
    publish(&one, "exact", QoS::AtLeastOnce, "own").await;
    for topic in [
        "a/b/c",
        "a//c",
        "nobody",
        "b.c",
        "b.c/d.e/*",
        "b",
        "/",
        &long,
    ] {
        publish(&other, topic, QoS::AtLeastOnce, topic).await;
    }
    publish(&other, "exact", QoS::AtMostOnce, "last").await;
    let mut seen = Vec::new();
    while seen.last().is_none_or(|last: &String| last != "last") {
        seen.push(next(&mut feed).await);
    }
    assert_eq!(
        seen,
        ["a/b/c", "a//c", "b.c", "b.c/d.e/*", "/", &long, "last"]
    );

    feed.filters().remove("exact");
    in_force(&feed).await;
    publish(&other, "exact", QoS::AtLeastOnce, "not any more").await;
    publish(&other, "/", QoS::AtLeastOnce, "the end").await;
    assert_eq!(next(&mut feed).await, "the end");
    drop(feed);
    eventually(PATIENCE, "the queue to go with its reader", || async {
        let queues = world.queues().await;
        queues
            .iter()
            .all(|(name, _)| !name.contains(".node."))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_gets_everything_whoever_holds_it_and_qos_0_never() {
    let world = World::new().await;
    let (one, other) = (world.node("one"), world.node("other"));
    let filters = ["a/#".to_owned(), "b".to_owned()];
    let mut first = one.open_shard_feed(7, &filters);
    in_force(&first).await;
    publish(&other, "a/1", QoS::AtMostOnce, "never").await;
    for n in 0..3 {
        publish(&one, "a/1", QoS::AtLeastOnce, &n.to_string()).await;
    }
    assert_eq!(next(&mut first).await, "0");
    let kept = soon("the second", first.next()).await.unwrap();
    assert_eq!(text_of(&kept), "1");
    // Another holder, while the first has not noticed: nothing comes to it until that one goes.
    let mut second = other.open_shard_feed(7, &filters[1..]);
    in_force(&second).await;
    let early = tokio::time::timeout(Duration::from_millis(500), second.next()).await;
    assert!(early.is_err(), "two readers of one shard");
    drop(first);
    drop(kept);
    assert_eq!(next(&mut second).await, "1");
    assert_eq!(next(&mut second).await, "2");
    // The new holder wants less than the old one did.
    publish(&one, "a/1", QoS::AtLeastOnce, "nobody asks").await;
    publish(&one, "b", QoS::ExactlyOnce, "asked").await;
    assert_eq!(next(&mut second).await, "asked");
    let bound = world.registry.bound("moorline.sessions.7").await.unwrap();
    assert_eq!(bound, ["b"]);
    drop(second);
    // Nobody reads now.
    publish(&one, "b", QoS::AtLeastOnce, "waits").await;
    let mut third = one.open_shard_feed(7, &filters[1..]);
    assert_eq!(next(&mut third).await, "waits");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_shard_refuses() {
    let mut world = World::new().await;
    world.config.queue_messages_max = 20;
    let one = world.node("one");
    let feed = one.open_shard_feed(1, &["a".to_owned()]);
    in_force(&feed).await;
    drop(feed);
    let refused = async {
        loop {
            let published = one.publish(publication("a", QoS::AtLeastOnce, "x"), None);
            if let Err(error) = published.await {
                return error;
            }
        }
    };
    let error = soon("a refusal", refused).await;
    assert!(matches!(error, StoreError::Full(_)), "{error}");
    publish(&one, "nobody", QoS::AtLeastOnce, "x").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_gets_each_message_once_over_all_its_feeds() {
    let world = World::new().await;
    let (one, other) = (world.node("one"), world.node("other"));
    let name = "$share/g/a/+";
    let (first, second) = (
        GroupMember::Node(NodeId::from_text("one")),
        GroupMember::Shard(3),
    );
    let group = one.join_group(name, &first).await.unwrap();
    assert_eq!(other.join_group(name, &second).await.unwrap(), group);
    assert_eq!(other.groups_of(&second).await.unwrap(), [name]);
    // Nobody is connected: it waits.
    publish(&one, "a/b", QoS::AtLeastOnce, "0").await;
    publish(&one, "a/b/c", QoS::AtLeastOnce, "not for it").await;
    let mut feeds = [one.open_group_feed(&group), other.open_group_feed(&group)];
    for n in 1..40 {
        publish(&one, "a/b", QoS::AtLeastOnce, &n.to_string()).await;
    }
    let mut seen = Vec::new();
    let mut held = Vec::new();
    while seen.len() + held.len() < 40 {
        let [one, other] = &mut feeds;
        let delivery = soon("a message", async {
            tokio::select! { delivery = one.next() => delivery, delivery = other.next() => delivery }
        });
        let delivery = delivery.await.unwrap();
        match seen.len() % 4 {
            // What is not acknowledged goes to another.
            0 if held.len() < 5 => held.push(delivery),
            _ => {
                seen.push(text_of(&delivery));
                delivery.ack.done();
            }
        }
    }
    let [gone, mut left] = feeds;
    drop(gone);
    drop(held);
    while seen.len() < 40 {
        seen.push(next(&mut left).await);
    }
    let numbers: BTreeSet<String> = (0..40).map(|n: u32| n.to_string()).collect();
    assert_eq!(seen.iter().cloned().collect::<BTreeSet<_>>(), numbers);

    // A member that ends hands back what it did not acknowledge.
    let back = publication("a/b", QoS::AtLeastOnce, "back");
    assert!(one.give_back(name, back.clone()).await.unwrap());
    assert_eq!(next(&mut left).await, "back");
    drop(left);

    // The first is gone without a word, the second leaves: nothing of the group stays.
    other.leave_group(name, &second).await.unwrap();
    other.sweep_groups(&[]).await.unwrap();
    assert!(!one.give_back(name, back).await.unwrap());
    let queues = world.queues().await;
    assert!(
        queues.iter().all(|(name, _)| !name.contains(".share.")),
        "{queues:?}"
    );
    // Its next life begins empty.
    let third = world.node("third");
    let again = third.join_group(name, &first).await.unwrap();
    assert!(again.generation > group.generation);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feed_that_ends_still_acknowledges() {
    let world = World::new().await;
    let one = world.node("one");
    let member = GroupMember::Shard(1);
    let group = one.join_group("$share/g/a", &member).await.unwrap();
    let mut feed = one.open_group_feed(&group);
    for n in 0..5 {
        publish(&one, "a", QoS::AtLeastOnce, &n.to_string()).await;
    }
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(soon("a message", feed.next()).await.unwrap());
    }
    drop(feed);
    for delivery in held {
        delivery.ack.done();
    }
    let mut feed = one.open_group_feed(&group);
    let rest = [next(&mut feed).await, next(&mut feed).await];
    assert_eq!(
        BTreeSet::from(rest),
        BTreeSet::from(["3".to_owned(), "4".to_owned()])
    );
    let early = tokio::time::timeout(Duration::from_millis(500), feed.next()).await;
    assert!(early.is_err(), "acknowledged and delivered again");
}

const MESSAGES: u32 = 1500;

/// Publishes from before, during and after a restart; nothing that was confirmed to a durable queue is missing.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_confirmed_is_missing_after_the_broker_was_killed() {
    let mut rabbit = RabbitServer::start().await;
    let world = World::on(&rabbit).await;
    let (one, other) = (world.node("one"), world.node("other"));
    let mut shard = one.open_shard_feed(2, &["a".to_owned()]);
    let mut node = one.open_node_feed();
    node.filters().add("b");
    in_force(&shard).await;
    in_force(&node).await;
    let (progress, mut going) = tokio::sync::watch::channel(0);
    let publishing = {
        let other = Arc::clone(&other);
        tokio::spawn(async move {
            let mut confirmed = Vec::new();
            let mut waiting = std::collections::VecDeque::new();
            for n in 0..MESSAGES {
                let text = n.to_string();
                waiting.push_back((
                    n,
                    other.publish(publication("a", QoS::AtLeastOnce, &text), None),
                ));
                if waiting.len() > 50 {
                    let (n, published) = waiting.pop_front().unwrap();
                    published.await.unwrap();
                    confirmed.push(n);
                    progress.send_replace(confirmed.len());
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            for (n, published) in waiting {
                published.await.unwrap();
                confirmed.push(n);
            }
            confirmed
        })
    };
    // A broker that is killed forgets what was declared in its last seconds: nobody has promised anything on that yet.
    rabbit.write_declarations().await;
    let midst = going.wait_for(|confirmed| *confirmed > MESSAGES as usize / 4);
    soon("a quarter of them", midst).await.unwrap();
    rabbit.restart().await;
    let mut first_seen: Vec<u32> = Vec::new();
    while first_seen.len() < MESSAGES as usize {
        let delivery = tokio::time::timeout(PATIENCE, shard.next())
            .await
            .unwrap()
            .unwrap();
        let n: u32 = text_of(&delivery).parse().unwrap();
        delivery.ack.done();
        if !first_seen.contains(&n) {
            first_seen.push(n);
        }
    }
    let confirmed = publishing.await.unwrap();
    assert_eq!(confirmed.len(), MESSAGES as usize);
    assert_eq!(first_seen, confirmed, "in the order of publishing");
    // The node's queue is there again, and bound again.
    eventually(PATIENCE, "the node's queue", || async {
        let queues = rabbit.queues(&world.vhost).await;
        queues
            .iter()
            .any(|(name, _)| name.contains(".node."))
            .then_some(())
    })
    .await;
    let heard = async {
        loop {
            publish(&other, "b", QoS::AtMostOnce, "again").await;
            let heard = tokio::time::timeout(Duration::from_millis(300), node.next()).await;
            if let Ok(Some(delivery)) = heard {
                return text_of(&delivery);
            }
        }
    };
    assert_eq!(
        tokio::time::timeout(PATIENCE, heard).await.unwrap(),
        "again"
    );
}

/// What a storm costs the broker, and how long the last of it waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_devices_with_own_topics_is_bound_soon() {
    let world = World::new().await;
    let (one, other) = (world.node("one"), world.node("other"));
    let mut feed = one.open_node_feed();
    let begun = std::time::Instant::now();
    for n in 0..10_000 {
        feed.filters().add(&format!("dev/{n}/cmd"));
    }
    in_force(&feed).await;
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
    publish(&other, "dev/9999/cmd", QoS::AtLeastOnce, "hello").await;
    assert_eq!(next(&mut feed).await, "hello");
    let bindings = RabbitServer::shared().await;
    let name = &world.vhost.name;
    let count = bindings
        .eval(&format!(
            "length([B || B <- rabbit_binding:list(<<\"{name}\">>), element(2, B) =:= {{resource, <<\"{name}\">>, exchange, <<\"moorline.pubsub\">>}}])"
        ))
        .await;
    assert_eq!(count, "1");
    println!("10,000 filters in force after {took:?}");
}
