//! One client id, two connections: the newest wins, and nothing falls between them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use moorline_tests::device::{Arrived, Device};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Connect, Packet, Publish, V3, V5};
use moorline_tests::{Gateway, soon};
use tokio::task::JoinSet;

use crate::support::{QUIET, await_waiting, resume, run};

const SESSION_TAKEN_OVER: u8 = 0x8E;

#[test]
fn the_older_connection_is_told_session_taken_over() {
    run(async {
        let gateway = Gateway::start().await;
        let mut older = Device::clean(gateway.mqtt(), V5, "car").await;
        let mut newer = Device::clean(gateway.mqtt(), V5, "car").await;
        assert_eq!(older.await_close(SOON).await, Some(SESSION_TAKEN_OVER));
        newer.ping().await;
        let mut newest = Device::clean(gateway.mqtt(), V3, "car").await;
        assert_eq!(newer.await_close(SOON).await, Some(SESSION_TAKEN_OVER));
        let mut last = Device::clean(gateway.mqtt(), V5, "car").await;
        assert_eq!(
            newest.await_close(SOON).await,
            None,
            "3.1.1 has no reason to give"
        );
        last.ping().await;
        gateway.finish().await;
    });
}

/// Takes what comes until the connection ends or `stop` is set.
async fn take_all(mut device: Device, stop: Arc<AtomicBool>) -> (Vec<usize>, Option<u8>) {
    let (mut numbers, mut reason) = (Vec::new(), None);
    loop {
        match device.receive(QUIET).await {
            Arrived::Packet(Packet::Publish(publish)) => {
                numbers.push(publish.text().parse().unwrap());
                device.acknowledge(&publish).await;
            }
            Arrived::Packet(Packet::Disconnect { reason: given, .. }) => reason = Some(given),
            Arrived::Packet(other) => panic!("unexpected {other:?}"),
            Arrived::Closed => return (numbers, reason),
            Arrived::Nothing if stop.load(Ordering::Acquire) => return (numbers, reason),
            Arrived::Nothing => {}
        }
    }
}

#[test]
fn a_takeover_under_load_loses_nothing_and_the_older_gets_nothing_after_it() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let stop = Arc::new(AtomicBool::new(false));
        let begun = Arc::new(AtomicUsize::new(0));
        let pushing = {
            let (stop, begun) = (Arc::clone(&stop), Arc::clone(&begun));
            tokio::spawn(async move {
                let mut number = 0;
                while !stop.load(Ordering::Acquire) {
                    begun.store(number + 1, Ordering::Release);
                    api.push_text("car", &number.to_string()).await;
                    number += 1;
                }
                number
            })
        };
        // Connection n may only have numbers below `limits[n]`: those begun when its successor was in.
        let mut limits = Vec::new();
        let mut connections = Vec::new();
        let mut tasks = JoinSet::new();
        let last_stop = Arc::new(AtomicBool::new(false));
        for n in 0..20 {
            let device = resume(&gateway, V5, "car").await;
            limits.push(begun.load(Ordering::Acquire));
            let taking = take_all(device, Arc::clone(&last_stop));
            tasks.spawn(async move { (n, taking.await) });
            let from = begun.load(Ordering::Acquire);
            while begun.load(Ordering::Acquire) < from + 20 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        stop.store(true, Ordering::Release);
        let pushed = pushing.await.unwrap();
        await_waiting(&gateway.api(), "car", 0).await;
        last_stop.store(true, Ordering::Release);
        while let Some(done) = tasks.join_next().await {
            connections.push(done.unwrap());
        }
        connections.sort_by_key(|(n, _)| *n);
        let mut all = BTreeSet::new();
        for (n, (numbers, reason)) in &connections {
            assert!(numbers.is_sorted(), "connection {n} got {numbers:?}");
            if *n < 19 {
                assert_eq!(*reason, Some(SESSION_TAKEN_OVER), "connection {n}");
                let limit = limits[n + 1];
                assert!(
                    numbers.iter().all(|number| *number < limit),
                    "connection {n} got {numbers:?} though {limit} was begun after it had lost the session"
                );
            }
            all.extend(numbers.iter().copied());
        }
        assert_eq!(all, (0..pushed).collect(), "every push arrived somewhere");
        gateway.finish().await;
    });
}

#[test]
fn a_takeover_keeps_the_subscriptions_of_a_persistent_session() {
    run(async {
        let gateway = Gateway::start().await;
        for version in [V3, V5] {
            let id = format!("car-{version}");
            let mut older = resume(&gateway, version, &id).await;
            older.subscribe("news", 1).await;
            let mut newer = resume(&gateway, version, &id).await;
            assert!(newer.session_present);
            older.await_close(SOON).await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "publisher").await;
            publisher.publish(Publish::new("news", 1, "hello")).await;
            assert_eq!(soon("the message", newer.take()).await.text(), "hello");
            publisher.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_clean_start_takes_over_and_drops_what_the_session_had_but_no_push() {
    run(async {
        let gateway = Gateway::start().await;
        let mut older = resume(&gateway, V5, "car").await;
        older.subscribe("news", 1).await;
        older.disconnect().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "publisher").await;
        publisher
            .publish(Publish::new("news", 1, "of the session"))
            .await;
        gateway.api().push_text("car", "of the backend").await;
        let mut fresh = Device::connect(gateway.mqtt(), Connect::new(V5, "car")).await;
        assert!(!fresh.session_present);
        assert_eq!(fresh.take().await.text(), "of the backend");
        fresh.has_nothing().await;
        gateway.finish().await;
    });
}
