//! Cases of [`crate::UpstreamBus`]: order in a partition, settling, dead letters, limits.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use moorline_mqtt::{PublishProperties, QoS};

use super::{Backend, Settings, client, eventually, topic};
use crate::{
    DeadLetter, MessageId, Position, QueueName, Settlement, StoreError, UpstreamBus,
    UpstreamDelivery, UpstreamMessage, unix_ms,
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
            what_is_given_back_comes_again_in_order,
            dead_letters_are_listed_and_can_be_tried_again,
            every_dead_letter_is_on_some_page_and_can_be_tried_again,
            a_full_queue_refuses_and_takes_more_when_it_is_settled,
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

/// Everything in a queue, by partition; how much that has to be is known.
async fn all(
    bus: &dyn UpstreamBus,
    name: &str,
    expected: usize,
) -> Vec<(u16, Vec<UpstreamDelivery>)> {
    let queue = queue(name);
    let mut partitions: Vec<(u16, Vec<UpstreamDelivery>)> = (0..bus.partitions(&queue))
        .map(|partition| (partition, Vec::new()))
        .collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut is_quiet = false;
    loop {
        let total: usize = partitions.iter().map(|(_, page)| page.len()).sum();
        assert!(total <= expected, "{total} instead of {expected} in {name}");
        if total == expected && is_quiet {
            return partitions;
        }
        assert!(Instant::now() < deadline, "{total} of {expected} in {name}");
        // An empty partition waits; what is there comes soon.
        let patience = Duration::from_millis(if total < expected { 1_000 } else { 100 });
        is_quiet = total == expected;
        for (partition, page) in &mut partitions {
            let after = page.last().map_or(Position::START, |last| last.position);
            let fetch = bus.fetch(&queue, *partition, after, 10_000);
            if let Ok(more) = tokio::time::timeout(patience, fetch).await {
                page.extend(more.unwrap());
                is_quiet = false;
            }
        }
    }
}

/// Everything in a queue of one partition.
async fn only(bus: &dyn UpstreamBus, name: &str, expected: usize) -> Vec<UpstreamDelivery> {
    all(bus, name, expected).await.remove(0).1
}

async fn settle(bus: &dyn UpstreamBus, name: &str, delivery: &UpstreamDelivery, how: Settlement) {
    let queue = queue(name);
    bus.settle(&queue, 0, delivery.position, how).await.unwrap();
}

fn messages(deliveries: &[UpstreamDelivery]) -> Vec<&UpstreamMessage> {
    let messages = deliveries.iter().map(|delivery| &delivery.message);
    messages.collect()
}

/// Dead letters are listed soon after they are settled, and every page is one.
async fn listed(bus: &dyn UpstreamBus, expected: usize, limit: usize) -> Vec<DeadLetter> {
    eventually("the dead letters are listed", || async {
        bus.dead_letters(None, usize::MAX / 2).await.unwrap().len() == expected
    })
    .await;
    bus.dead_letters(None, limit).await.unwrap()
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
    for (partition, page) in all(&*bus, "rule", 500).await {
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
        let sizes: Vec<_> = all(&*bus, "rule", 40 * round)
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
    let mut bus = backend.start(Settings::default()).await.upstream;
    publish(&*bus, message("a", "x"), &["one", "two"]).await;
    let one = all(&*bus, "one", 1).await;
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
    bus = backend.restart().await.upstream;
    all(&*bus, "one", 0).await;
    all(&*bus, "two", 1).await;
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
    let page = only(&*bus, "rule", 10).await;
    for delivery in &page[..4] {
        settle(&*bus, "rule", delivery, Settlement::Done).await;
    }
    bus = backend.restart().await.upstream;
    let again = only(&*bus, "rule", 6).await;
    assert_eq!(messages(&again), messages(&page[4..]));
    assert!(again[0].position > page[3].position);
    for delivery in &again {
        settle(&*bus, "rule", delivery, Settlement::Done).await;
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

/// What was fetched and is not settled comes again, in order, whether its reader asks for it from the beginning or gave it back.
pub async fn what_is_given_back_comes_again_in_order(backend: &mut dyn Backend) {
    let settings = Settings {
        upstream_partitions: 1,
        ..Settings::default()
    };
    let bus = backend.start(settings).await.upstream;
    for n in 0..20 {
        publish(&*bus, message("a", &n.to_string()), &["rule"]).await;
    }
    let page = only(&*bus, "rule", 20).await;
    settle(&*bus, "rule", &page[0], Settlement::Done).await;
    assert_eq!(
        messages(&only(&*bus, "rule", 19).await),
        messages(&page[1..])
    );
    bus.park(&queue("rule"), 0).await;
    publish(&*bus, message("a", "20"), &["rule"]).await;
    let again = only(&*bus, "rule", 20).await;
    assert_eq!(messages(&again[..19]), messages(&page[1..]));
    assert_eq!(text(&again[19]), "20");
    settle(&*bus, "rule", &again[0], Settlement::Done).await;
    bus.park(&queue("rule"), 0).await;
    assert_eq!(
        messages(&only(&*bus, "rule", 19).await),
        messages(&again[1..])
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
    for (name, expected) in [("a", 4), ("b", 3)] {
        for (partition, deliveries) in all(&*bus, name, expected).await {
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
    listed(&*bus, 7, 1).await;
    let (mut paged, mut after) = (0, None);
    loop {
        let page = bus.dead_letters(after.as_ref(), 1).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.message.id.clone());
        paged += page.len();
    }
    assert_eq!(paged, 7);
    for one in &messages {
        assert!(bus.retry_dead_letter(&one.id).await.unwrap());
    }
    assert!(bus.dead_letters(None, 10).await.unwrap().is_empty());
    all(&*bus, "a", 4).await;
    all(&*bus, "b", 3).await;
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
    for delivery in only(&*bus, "rule", 3).await {
        let reason = format!("answered 400 to {}", text(&delivery));
        let settlement = Settlement::DeadLetter {
            reason,
            attempts: 2,
        };
        settle(&*bus, "rule", &delivery, settlement).await;
    }
    all(&*bus, "rule", 0).await;
    bus = backend.restart().await.upstream;
    all(&*bus, "rule", 0).await;
    let letters = listed(&*bus, 3, 2).await;
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
    let page = only(&*bus, "rule", 1).await;
    assert_eq!(page[0].message, messages[0]);
    assert_eq!(bus.dead_letters(None, 10).await.unwrap().len(), 2);
}

pub async fn a_full_queue_refuses_and_takes_more_when_it_is_settled(backend: &mut dyn Backend) {
    let settings = Settings {
        upstream_partitions: 1,
        upstream_queue_bytes_max: 10_000,
        ..Settings::default()
    };
    let mut bus = backend.start(settings).await.upstream;
    let large = |n: usize| message("a", &format!("{n} {}", "x".repeat(3_000)));
    let call = |n| bus.publish(vec![(large(n), vec![queue("full")])]);
    let mut accepted = 0;
    loop {
        match call(accepted).await {
            Ok(()) => accepted += 1,
            Err(StoreError::Full(_)) => break,
            Err(other) => panic!("{other}"),
        }
        assert!(accepted < 100, "the limit is reached about where it is");
    }
    assert!(accepted >= 3);
    bus = backend.restart().await.upstream;
    let call = |n| bus.publish(vec![(large(n), vec![queue("full")])]);
    assert!(matches!(call(999).await, Err(StoreError::Full(_))));
    publish(&*bus, message("a", "another queue is not full"), &["other"]).await;
    let page = only(&*bus, "full", accepted).await;
    for (n, delivery) in page.iter().enumerate() {
        assert!(text(delivery).starts_with(&format!("{n} ")));
        settle(&*bus, "full", delivery, Settlement::Done).await;
    }
    eventually("there is room again", || async {
        match call(accepted).await {
            Ok(()) => true,
            Err(StoreError::Full(_)) => false,
            Err(other) => panic!("{other}"),
        }
    })
    .await;
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
    let page = only(&*bus, QueueName::DEFAULT, 1).await;
    assert_eq!(messages(&page), [&message]);
}
