//! Cases of [`crate::UpstreamBus`]: order in a partition, settling, dead letters, limits.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use moorline_mqtt::{PublishProperties, QoS};

use super::{Backend, Settings, client, topic};
use crate::{
    MessageId, Position, QueueName, Settlement, StoreError, UpstreamBus, UpstreamDelivery,
    UpstreamMessage, unix_ms,
};

/// Runs every case of this suite.
#[macro_export]
macro_rules! upstream_contract {
    ($backend:expr) => {
        $crate::contract_cases!($backend, upstream:
            one_devices_messages_stay_in_one_partition_in_order,
            devices_are_spread_over_partitions_the_same_in_every_run,
            a_message_for_two_queues_is_settled_in_each,
            fetch_waits_for_what_comes,
            what_is_not_settled_comes_again_after_a_restart,
            dead_letters_are_listed_and_can_be_tried_again,
            every_dead_letter_is_on_some_page_and_can_be_tried_again,
            a_full_queue_refuses_the_whole_call_and_takes_more_when_it_is_settled,
            a_message_comes_back_as_it_was_published,
        );
    };
}

pub fn message(from: &str, payload: &str) -> UpstreamMessage {
    UpstreamMessage {
        id: MessageId::generate(),
        client: client(from),
        topic: topic("up/reading"),
        qos: QoS::AtLeastOnce,
        properties: None,
        payload: Bytes::copy_from_slice(payload.as_bytes()),
        received_at_ms: unix_ms(),
    }
}

fn queue(name: &str) -> QueueName {
    QueueName::new(name)
}

async fn publish(bus: &dyn UpstreamBus, message: UpstreamMessage, queues: &[&str]) {
    let queues = queues.iter().copied().map(queue).collect();
    bus.publish(vec![(message, queues)]).await.unwrap();
}

/// Everything in a queue, by partition.
async fn all(bus: &dyn UpstreamBus, name: &str) -> Vec<(u16, Vec<UpstreamDelivery>)> {
    let mut partitions = Vec::new();
    for partition in 0..bus.partitions(&queue(name)) {
        let queue = queue(name);
        let fetch = bus.fetch(&queue, partition, Position::START, 10_000);
        // An empty partition waits; what is there comes at once.
        let page = tokio::time::timeout(Duration::from_millis(100), fetch).await;
        partitions.push((partition, page.map_or(Vec::new(), Result::unwrap)));
    }
    partitions
}

async fn count(bus: &dyn UpstreamBus, name: &str) -> usize {
    all(bus, name)
        .await
        .iter()
        .map(|(_, page)| page.len())
        .sum()
}

fn text(delivery: &UpstreamDelivery) -> &str {
    std::str::from_utf8(&delivery.message.payload).unwrap()
}

pub async fn one_devices_messages_stay_in_one_partition_in_order(backend: &mut dyn Backend) {
    let bus = backend.start(Settings::default()).await.upstream;
    assert_eq!(bus.partitions(&queue("rule")), 4);
    let mut calls = Vec::new();
    for n in 0..100 {
        for device in ["a", "b", "c", "d", "e"] {
            let message = message(device, &n.to_string());
            calls.push(bus.publish(vec![(message, vec![queue("rule")])]));
        }
    }
    for call in calls {
        call.await.unwrap();
    }
    let mut seen = HashSet::new();
    for (partition, page) in all(&*bus, "rule").await {
        assert!(
            page.windows(2)
                .all(|pair| pair[0].position.is_followed_by(pair[1].position))
        );
        for device in ["a", "b", "c", "d", "e"] {
            let of_device = page.iter().filter(|d| d.message.client == client(device));
            let texts: Vec<_> = of_device.map(text).collect();
            if !texts.is_empty() {
                assert_eq!(texts, (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
                assert!(
                    seen.insert(device),
                    "{device} is in partition {partition} as well"
                );
            }
        }
    }
    assert_eq!(seen.len(), 5);
}

pub async fn devices_are_spread_over_partitions_the_same_in_every_run(backend: &mut dyn Backend) {
    let mut bus = backend.start(Settings::default()).await.upstream;
    let mut spread = Vec::new();
    for round in 1..=2 {
        for n in 0..40 {
            publish(&*bus, message(&format!("device-{n}"), "x"), &["rule"]).await;
        }
        let sizes: Vec<_> = all(&*bus, "rule")
            .await
            .iter()
            .map(|(_, p)| p.len())
            .collect();
        assert!(sizes.iter().all(|size| *size > 0), "{sizes:?}");
        spread.push(sizes.iter().map(|size| size / round).collect::<Vec<_>>());
        bus = backend.restart().await.upstream;
    }
    assert_eq!(spread[0], spread[1]);
}

pub async fn a_message_for_two_queues_is_settled_in_each(backend: &mut dyn Backend) {
    let bus = backend.start(Settings::default()).await.upstream;
    publish(&*bus, message("a", "x"), &["one", "two"]).await;
    let one = all(&*bus, "one").await;
    let (partition, page) = one.iter().find(|(_, page)| !page.is_empty()).unwrap();
    bus.settle(
        &queue("one"),
        *partition,
        page[0].position,
        Settlement::Done,
    )
    .await
    .unwrap();
    // Settling again does no harm.
    bus.settle(
        &queue("one"),
        *partition,
        page[0].position,
        Settlement::Done,
    )
    .await
    .unwrap();
    assert_eq!(
        (count(&*bus, "one").await, count(&*bus, "two").await),
        (0, 1)
    );
}

pub async fn fetch_waits_for_what_comes(backend: &mut dyn Backend) {
    let settings = Settings {
        upstream_partitions: 1,
        ..Settings::default()
    };
    let bus = backend.start(settings).await.upstream;
    let mut after = Position::START;
    for n in 0..5 {
        let waiting = {
            let bus = bus.clone();
            tokio::spawn(async move { bus.fetch(&queue("rule"), 0, after, 10).await })
        };
        tokio::task::yield_now().await;
        publish(&*bus, message("a", &n.to_string()), &["rule"]).await;
        let page = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        let page = page.unwrap().unwrap().unwrap();
        assert_eq!(page.iter().map(text).collect::<Vec<_>>(), [n.to_string()]);
        after = page[0].position;
    }
}

pub async fn what_is_not_settled_comes_again_after_a_restart(backend: &mut dyn Backend) {
    let settings = Settings {
        upstream_partitions: 1,
        ..Settings::default()
    };
    let mut bus = backend.start(settings).await.upstream;
    for n in 0..10 {
        publish(&*bus, message("a", &n.to_string()), &["rule"]).await;
    }
    let page = bus
        .fetch(&queue("rule"), 0, Position::START, 10)
        .await
        .unwrap();
    for delivery in &page[..4] {
        bus.settle(&queue("rule"), 0, delivery.position, Settlement::Done)
            .await
            .unwrap();
    }
    bus = backend.restart().await.upstream;
    let again = bus
        .fetch(&queue("rule"), 0, Position::START, 10)
        .await
        .unwrap();
    assert_eq!(again, page[4..]);
    for delivery in &again {
        bus.settle(&queue("rule"), 0, delivery.position, Settlement::Done)
            .await
            .unwrap();
    }
    let last = again.last().unwrap().position;
    bus = backend.restart().await.upstream;
    publish(&*bus, message("a", "next"), &["rule"]).await;
    let page = bus.fetch(&queue("rule"), 0, last, 10).await.unwrap();
    assert_eq!(
        page.iter().map(text).collect::<Vec<_>>(),
        ["next"],
        "positions do not go back"
    );
}

/// Messages that two queues gave up on at different times, and an id that a device used twice.
pub async fn every_dead_letter_is_on_some_page_and_can_be_tried_again(backend: &mut dyn Backend) {
    let bus = backend.start(Settings::default()).await.upstream;
    let messages: Vec<_> = ["1", "2", "3"]
        .map(|payload| message("device", payload))
        .into();
    for one in &messages {
        publish(&*bus, one.clone(), &["a", "b"]).await;
    }
    let again = UpstreamMessage {
        id: messages[0].id.clone(),
        ..message("device", "again")
    };
    publish(&*bus, again, &["a"]).await;
    for name in ["a", "b"] {
        for (partition, deliveries) in all(&*bus, name).await {
            for delivery in deliveries {
                let dead = Settlement::DeadLetter {
                    reason: "no".into(),
                    attempts: 1,
                };
                bus.settle(&queue(name), partition, delivery.position, dead)
                    .await
                    .unwrap();
            }
        }
    }
    let (mut listed, mut after) = (0, None);
    loop {
        let page = bus.dead_letters(after.as_ref(), 1).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.message.id.clone());
        listed += page.len();
    }
    assert_eq!(listed, 7);
    for one in &messages {
        assert!(bus.retry_dead_letter(&one.id).await.unwrap());
    }
    assert!(bus.dead_letters(None, 10).await.unwrap().is_empty());
    let waiting = |partitions: Vec<(u16, Vec<UpstreamDelivery>)>| {
        partitions
            .iter()
            .map(|(_, deliveries)| deliveries.len())
            .sum::<usize>()
    };
    assert_eq!(waiting(all(&*bus, "a").await), 4);
    assert_eq!(waiting(all(&*bus, "b").await), 3);
}

pub async fn dead_letters_are_listed_and_can_be_tried_again(backend: &mut dyn Backend) {
    let settings = Settings {
        upstream_partitions: 1,
        ..Settings::default()
    };
    let mut bus = backend.start(settings).await.upstream;
    let messages: Vec<_> = (0..3).map(|n| message("a", &n.to_string())).collect();
    for message in &messages {
        publish(&*bus, message.clone(), &["rule"]).await;
    }
    for delivery in bus
        .fetch(&queue("rule"), 0, Position::START, 10)
        .await
        .unwrap()
    {
        let reason = format!("answered 400 to {}", text(&delivery));
        let settlement = Settlement::DeadLetter {
            reason,
            attempts: 2,
        };
        bus.settle(&queue("rule"), 0, delivery.position, settlement)
            .await
            .unwrap();
    }
    assert_eq!(count(&*bus, "rule").await, 0);
    bus = backend.restart().await.upstream;
    let letters = bus.dead_letters(None, 2).await.unwrap();
    assert_eq!(
        letters.iter().map(|l| &l.message).collect::<Vec<_>>(),
        [&messages[0], &messages[1]]
    );
    assert_eq!(
        (&*letters[0].reason, letters[0].attempts),
        ("answered 400 to 0", 2)
    );
    assert_eq!(letters[0].queue, queue("rule"));
    let rest = bus.dead_letters(Some(&messages[1].id), 10).await.unwrap();
    assert_eq!(
        rest.iter().map(|l| &l.message).collect::<Vec<_>>(),
        [&messages[2]]
    );
    assert!(bus.retry_dead_letter(&messages[0].id).await.unwrap());
    assert!(!bus.retry_dead_letter(&messages[0].id).await.unwrap());
    assert!(!bus.retry_dead_letter(&MessageId::generate()).await.unwrap());
    let page = bus
        .fetch(&queue("rule"), 0, Position::START, 10)
        .await
        .unwrap();
    assert_eq!(
        page.iter().map(|d| &d.message).collect::<Vec<_>>(),
        [&messages[0]]
    );
    assert_eq!(bus.dead_letters(None, 10).await.unwrap().len(), 2);
}

pub async fn a_full_queue_refuses_the_whole_call_and_takes_more_when_it_is_settled(
    backend: &mut dyn Backend,
) {
    let settings = Settings {
        upstream_partitions: 1,
        upstream_queue_bytes_max: 10_000,
        ..Settings::default()
    };
    let mut bus = backend.start(settings).await.upstream;
    let large = || message("a", &"x".repeat(3_000));
    for _ in 0..3 {
        publish(&*bus, large(), &["full"]).await;
    }
    let both = || {
        vec![
            (message("a", "small"), vec![queue("other")]),
            (large(), vec![queue("full")]),
        ]
    };
    assert!(matches!(
        bus.publish(both()).await,
        Err(StoreError::Full(_))
    ));
    assert_eq!(
        count(&*bus, "other").await,
        0,
        "nothing of the call was stored"
    );
    bus = backend.restart().await.upstream;
    assert!(matches!(
        bus.publish(both()).await,
        Err(StoreError::Full(_))
    ));
    let page = bus
        .fetch(&queue("full"), 0, Position::START, 1)
        .await
        .unwrap();
    let dead = Settlement::DeadLetter {
        reason: "no".into(),
        attempts: 1,
    };
    bus.settle(&queue("full"), 0, page[0].position, dead)
        .await
        .unwrap();
    assert!(
        bus.publish(both()).await.is_err(),
        "a dead letter still takes its room"
    );
    let page = bus
        .fetch(&queue("full"), 0, Position::START, 1)
        .await
        .unwrap();
    bus.settle(&queue("full"), 0, page[0].position, Settlement::Done)
        .await
        .unwrap();
    bus.publish(both()).await.unwrap();
    assert_eq!(count(&*bus, "other").await, 1);
}

pub async fn a_message_comes_back_as_it_was_published(backend: &mut dyn Backend) {
    let bus = backend.start(Settings::default()).await.upstream;
    let properties = PublishProperties {
        correlation_data: Some(Bytes::from_static(b"\0\xff")),
        user_properties: vec![("k".into(), "v".into())],
        ..PublishProperties::default()
    };
    let message = UpstreamMessage {
        qos: QoS::ExactlyOnce,
        properties: Some(Box::new(properties)),
        payload: Bytes::from_static(&[0, 159, 146, 150]),
        topic: topic("up/é"),
        ..message("é/1", "")
    };
    publish(&*bus, message.clone(), &[QueueName::DEFAULT]).await;
    assert_eq!(bus.partitions(&queue(QueueName::DEFAULT)), 1);
    let bus = backend.restart().await.upstream;
    let default = queue(QueueName::DEFAULT);
    let page = bus.fetch(&default, 0, Position::START, 10).await.unwrap();
    assert_eq!(
        page.iter().map(|d| &d.message).collect::<Vec<_>>(),
        [&message]
    );
}
