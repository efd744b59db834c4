//! A device that does not read stops nobody, costs little, and loses nothing.

use std::time::{Duration, Instant};

use moorline_tests::Gateway;
use moorline_tests::device::Device;
use moorline_tests::wire::{self, Connect, PINGREQ, V3, V5};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::support::{await_waiting, resume, run};

const PUSHES: usize = 10_000;
/// What the server may grow by: the store's caches and journal, not 10,000 messages per stuck device.
const GROWTH_BYTES_MAX: u64 = 96 << 20;
/// Another device's push may take this long, generously.
const OTHERS_WAIT_MAX: Duration = Duration::from_secs(2);

fn text(number: usize) -> String {
    format!("{number:06} {}", "x".repeat(500))
}

/// Pushes everything to `stuck` while `other` gets pushes of its own and must not notice.
async fn push_while_others_live(
    gateway: &Gateway,
    stuck: &mut Device,
    stuck_id: &str,
    other_id: &str,
) {
    let api = gateway.api();
    let before = gateway.rss_bytes_at_rest().await;
    let mut other = Device::clean(gateway.mqtt(), V5, other_id).await;
    let mut highest = before;
    let mut slowest = Duration::ZERO;
    for number in 0..PUSHES {
        api.push_text(stuck_id, &text(number)).await;
        if number % 100 == 0 {
            let asked = Instant::now();
            api.push_text(other_id, "quick").await;
            assert_eq!(other.take().await.text(), "quick");
            slowest = slowest.max(asked.elapsed());
            highest = highest.max(gateway.rss_bytes());
            // A sign of life, as a device that is merely slow would give.
            stuck.send(&PINGREQ).await.unwrap();
        }
    }
    eprintln!(
        "{stuck_id}: server memory {} -> {} MiB, slowest other push {slowest:?}",
        before >> 20,
        highest >> 20
    );
    assert!(
        highest - before < GROWTH_BYTES_MAX,
        "grew by {} MiB",
        (highest - before) >> 20
    );
    assert!(
        slowest < OTHERS_WAIT_MAX,
        "another device waited {slowest:?}"
    );
}

#[test]
fn a_device_that_stops_reading_and_reads_again_gets_everything_in_order() {
    run(async {
        let gateway = Gateway::start().await;
        let mut stuck = resume(&gateway, V5, "stuck").await;
        push_while_others_live(&gateway, &mut stuck, "stuck", "other").await;
        for number in 0..PUSHES {
            assert_eq!(stuck.take().await.text(), text(number));
        }
        await_waiting(&gateway.api(), "stuck", 0).await;
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_stops_reading_and_reconnects_gets_everything_in_order() {
    run(async {
        let gateway = Gateway::start().await;
        let mut stuck =
            Device::connect(gateway.mqtt(), Connect::new(V3, "stuck").persistent()).await;
        push_while_others_live(&gateway, &mut stuck, "stuck", "other").await;
        drop(stuck);
        let mut again = resume(&gateway, V3, "stuck").await;
        for number in 0..PUSHES {
            assert_eq!(again.take().await.text(), text(number));
        }
        await_waiting(&gateway.api(), "stuck", 0).await;
        gateway.finish().await;
    });
}

#[test]
fn a_subscriber_that_stops_reading_does_not_make_the_server_grow() {
    run(async {
        let gateway = Gateway::start().await;
        let mut stuck = Device::clean(gateway.mqtt(), V3, "stuck").await;
        assert_eq!(stuck.subscribe("flood", 0).await, 0);
        let mut live = Device::clean(gateway.mqtt(), V3, "live").await;
        assert_eq!(live.subscribe("flood", 0).await, 0);
        let mut publisher = Device::clean(gateway.mqtt(), V3, "publisher").await;
        let before = gateway.rss_bytes_at_rest().await;
        let payload = vec![b'x'; 4096];
        // 80 MB, far more than any socket buffer takes.
        for n in 0..20_000 {
            let publish = moorline_tests::wire::Publish::new("flood", 0, payload.clone());
            publisher.publish(publish).await;
            if n % 50 == 49 {
                for _ in 0..50 {
                    live.take().await;
                }
            }
        }
        let growth = gateway.rss_bytes().saturating_sub(before);
        assert!(growth < 32 << 20, "grew by {} MiB", growth >> 20);
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_leaves_its_answers_unread_does_not_make_the_server_grow() {
    run(async {
        let gateway = Gateway::start().await;
        let mut socket = TcpStream::connect(gateway.mqtt()).await.unwrap();
        let hello = wire::connect(&Connect::new(V5, "deaf"));
        socket.write_all(&hello).await.unwrap();
        let before = gateway.rss_bytes_at_rest().await;
        let pings = [0xC0, 0].repeat(32 * 1024);
        let mut sent = 0;
        // Ends when the server reads no more, as it should long before the last.
        while sent < 128 << 20 {
            let write = socket.write_all(&pings);
            match tokio::time::timeout(Duration::from_secs(2), write).await {
                Ok(result) => result.unwrap(),
                Err(_) => break,
            }
            sent += pings.len();
        }
        let grown = gateway.rss_bytes().saturating_sub(before);
        assert!(sent < 128 << 20, "the server took everything");
        assert!(
            grown < 16 << 20,
            "grown by {grown} bytes for {sent} bytes of pings"
        );
        let mut other = Device::clean(gateway.mqtt(), V5, "other").await;
        other.ping().await;
        gateway.finish().await;
    });
}
