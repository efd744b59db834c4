//! Peers that mean harm before they have a session, and floods from those that have one: others are
//! served meanwhile, and afterwards the gateway is as large as it was.

use std::time::{Duration, Instant};

use moorline_tests::authority::Authority;
use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, PINGREQ, Packet, Publish, V3, V5, Will};
use moorline_tests::{Gateway, Options, Random, eventually};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::run;

/// What may be left of an attack in the process: its allocator and the store's caches keep some.
const LEFT_BYTES_MAX: u64 = 40 << 20;
/// Another device's exchange may take this long, generously.
const OTHERS_WAIT_MAX: Duration = Duration::from_secs(10);

/// A gateway under attack.
struct Attacked {
    gateway: Gateway,
    before: u64,
    watched: Watched,
}

/// A device that must not notice.
struct Watched {
    device: Device,
    asked: usize,
}

impl Watched {
    /// One message to itself and back, acknowledged both ways.
    async fn is_served(&mut self) {
        self.asked += 1;
        let text = self.asked.to_string();
        let began = Instant::now();
        let publish = Publish::new("watched", 1, text.clone());
        assert_eq!(self.device.publish(publish).await, 0);
        assert_eq!(self.device.take().await.text(), text);
        let took = began.elapsed();
        assert!(took < OTHERS_WAIT_MAX, "another device waited {took:?}");
    }
}

impl Attacked {
    async fn start(config: &str) -> Self {
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut device = Device::clean(gateway.mqtt(), V5, "watched").await;
        assert_eq!(device.subscribe("watched", 1).await, 1);
        let mut watched = Watched { device, asked: 0 };
        // Whatever the first messages of a process need is not the attack's.
        for _ in 0..20 {
            watched.is_served().await;
        }
        Self {
            before: gateway.rss_bytes_at_rest().await,
            gateway,
            watched,
        }
    }

    /// The attack is over: an ordinary client works and memory is back near where it was.
    async fn recovers(mut self) {
        self.watched.is_served().await;
        let mut sender = Device::clean(self.gateway.mqtt(), V3, "ordinary").await;
        let publish = Publish::new("watched", 1, "ordinary");
        assert_eq!(sender.publish(publish).await, 0);
        assert_eq!(self.watched.device.take().await.text(), "ordinary");
        let (gateway, before) = (&self.gateway, self.before);
        let what = format!("memory is back near {} MiB", before >> 20);
        eventually(SOON, &what, || async {
            let now = gateway.rss_bytes();
            (now <= before + LEFT_BYTES_MAX).then_some(())
        })
        .await;
        self.gateway.finish().await;
    }
}

/// Reads to the end, whatever comes.
async fn is_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // A reset is an end as well.
    let read = tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "still open");
}

/// Writes `bytes` again and again until nobody takes them any more, or `most` bytes were taken.
async fn pour(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8], most: usize) -> usize {
    let mut sent = 0;
    while sent < most {
        match tokio::time::timeout(Duration::from_secs(2), stream.write_all(bytes)).await {
            Ok(Ok(())) => sent += bytes.len(),
            Ok(Err(_)) | Err(_) => break,
        }
    }
    sent
}

const UPGRADE: &str = "GET /mqtt HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n";

/// A WebSocket connection without anything in it yet.
async fn websocket(gateway: &Gateway) -> TcpStream {
    let mut stream = TcpStream::connect(gateway.ws()).await.unwrap();
    stream.write_all(UPGRADE.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    stream
}

/// A masked frame. The mask is zero, which leaves the payload as it is.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match u8::try_from(payload.len()) {
        Ok(short) if short <= 125 => bytes.push(0x80 | short),
        _ => {
            bytes.push(0x80 | 127);
            bytes.extend((payload.len() as u64).to_be_bytes());
        }
    }
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes
}

/// Counts PINGRESPs in what a WebSocket brings, which may be framed in any way.
async fn await_pingresps(stream: &mut TcpStream, wanted: usize) {
    let mut found = 0;
    let mut part = [0; 4096];
    let mut last = 0;
    while found < wanted {
        let read = tokio::time::timeout(SOON, stream.read(&mut part)).await;
        let length = read.expect("an answer").expect("an open connection");
        assert!(length > 0, "closed after {found} of {wanted} answers");
        for &byte in &part[..length] {
            found += usize::from(last == 0xD0 && byte == 0);
            last = byte;
        }
    }
}

#[test]
fn handshakes_a_byte_at_a_time_end_with_the_deadline() {
    run(async {
        let mut attacked = Attacked::start("[mqtt]\nhandshake_timeout = \"2s\"\n").await;
        let connect = wire::connect(&Connect::new(V5, &"x".repeat(2_000)));
        let mut slow = JoinSet::new();
        for address in [attacked.gateway.mqtt(), attacked.gateway.ws()] {
            for _ in 0..100 {
                let bytes = match address == attacked.gateway.ws() {
                    true => format!("{UPGRADE}{}", "x".repeat(2_000)).into_bytes(),
                    false => connect.clone(),
                };
                slow.spawn(async move {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    for byte in bytes {
                        if stream.write_all(&[byte]).await.is_err() {
                            return;
                        }
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    panic!("a handshake of 40 s was allowed");
                });
            }
        }
        while !slow.is_empty() {
            tokio::select! {
                ended = slow.join_next() => ended.unwrap().unwrap(),
                () = tokio::time::sleep(Duration::from_millis(200)) => attacked.watched.is_served().await,
            }
        }
        attacked.recovers().await;
    });
}

#[test]
fn two_thousand_connections_opened_and_dropped_leave_nothing() {
    run(async {
        let mut attacked = Attacked::start("").await;
        let connect = wire::connect(&Connect::new(V5, "dropped"));
        for number in 0..2_000 {
            let address = match number % 4 {
                3 => attacked.gateway.ws(),
                _ => attacked.gateway.mqtt(),
            };
            let mut stream = TcpStream::connect(address).await.unwrap();
            match number % 3 {
                0 => {}
                1 => stream.write_all(&connect[..7]).await.unwrap(),
                // Reset rather than closed.
                _ => {
                    stream.write_all(&connect).await.unwrap();
                    stream.set_zero_linger().unwrap();
                }
            }
            drop(stream);
            if number % 200 == 0 {
                attacked.watched.is_served().await;
            }
        }
        let api = attacked.gateway.api();
        eventually(SOON, "no connection is left of them", || async {
            let nodes = api.get("/v1/nodes").await.expect(200);
            (nodes["nodes"][0]["connections"].as_u64() == Some(1)).then_some(())
        })
        .await;
        attacked.recovers().await;
    });
}

#[test]
fn an_upgrade_that_never_ends_is_refused_or_given_up() {
    run(async {
        let mut attacked = Attacked::start("[mqtt]\nhandshake_timeout = \"2s\"\n").await;
        for _ in 0..50 {
            let mut endless = TcpStream::connect(attacked.gateway.ws()).await.unwrap();
            _ = endless.write_all(b"GET /mqtt HTTP/1.1\r\n").await;
            let header = format!("X: {}\r\n", "x".repeat(500));
            let sent = pour(&mut endless, header.as_bytes(), 64 << 20).await;
            assert!(sent < 64 << 20, "it reads a head of 64 MiB");
        }
        let mut silent = Vec::new();
        for _ in 0..50 {
            let mut stream = TcpStream::connect(attacked.gateway.ws()).await.unwrap();
            stream.write_all(&UPGRADE.as_bytes()[..60]).await.unwrap();
            silent.push(stream);
        }
        for stream in &mut silent {
            is_closed(stream).await;
            attacked.watched.is_served().await;
        }
        attacked.recovers().await;
    });
}

#[test]
fn giant_and_endless_websocket_frames_cost_no_memory() {
    run(async {
        let mut attacked = Attacked::start("").await;
        let mut giant = websocket(&attacked.gateway).await;
        // One frame that says it has an exabyte, and has the packets of an ordinary device in it.
        let mut head = vec![0x82, 0x80 | 127];
        head.extend((1u64 << 60).to_be_bytes());
        head.extend([0; 4]);
        head.extend(wire::connect(&Connect::new(V5, "giant")));
        giant.write_all(&head).await.unwrap();
        for _ in 0..100 {
            giant.write_all(&PINGREQ.repeat(100)).await.unwrap();
            await_pingresps(&mut giant, 100).await;
        }
        attacked.watched.is_served().await;
        // Then a packet that is larger than any may be.
        giant
            .write_all(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F])
            .await
            .unwrap();
        is_closed(&mut giant).await;
        attacked.recovers().await;
    });
}

#[test]
fn floods_of_fragments_and_of_websocket_pings_cost_no_memory() {
    run(async {
        let mut attacked = Attacked::start("").await;
        let mut fragments = websocket(&attacked.gateway).await;
        let connect = wire::connect(&Connect::new(V5, "fragments"));
        // Binary, not the last of its message, and then nothing but empty continuations.
        fragments.write_all(&frame(0x02, &connect)).await.unwrap();
        let empty = frame(0x00, &[]).repeat(10_000);
        for _ in 0..20 {
            fragments.write_all(&empty).await.unwrap();
            fragments.write_all(&frame(0x00, &PINGREQ)).await.unwrap();
            await_pingresps(&mut fragments, 1).await;
            attacked.watched.is_served().await;
        }
        let mut pings = websocket(&attacked.gateway).await;
        let connect = wire::connect(&Connect::new(V5, "pings"));
        pings.write_all(&frame(0x82, &connect)).await.unwrap();
        // Nobody reads the pongs: the server must stop to read the pings.
        let flood = frame(0x89, &[b'x'; 125]).repeat(500);
        let sent = pour(&mut pings, &flood, 128 << 20).await;
        assert!(sent < 128 << 20, "the server took everything");
        attacked.watched.is_served().await;
        let grown = attacked.gateway.rss_bytes().saturating_sub(attacked.before);
        assert!(grown < LEFT_BYTES_MAX, "grown by {grown} bytes");
        drop((fragments, pings));
        attacked.recovers().await;
    });
}

#[test]
fn a_flood_on_one_connection_leaves_another_its_pace() {
    run(async {
        let mut attacked = Attacked::start("").await;
        for qos in [0, 1] {
            let mut flooder = TcpStream::connect(attacked.gateway.mqtt()).await.unwrap();
            let hello = wire::connect(&Connect::new(V3, "flooder"));
            flooder.write_all(&hello).await.unwrap();
            let mut publish = Publish::new("flood/x", qos, vec![b'x'; 200]);
            publish.packet_id = 1;
            let flood = wire::publish(V3, &publish).repeat(200);
            let flooding = tokio::spawn(async move {
                let (mut read, mut write) = flooder.into_split();
                let reading = tokio::spawn(async move {
                    tokio::io::copy(&mut read, &mut tokio::io::sink()).await
                });
                let mut sent = 0;
                while write.write_all(&flood).await.is_ok() {
                    sent += flood.len();
                }
                reading.abort();
                sent
            });
            for _ in 0..50 {
                attacked.watched.is_served().await;
            }
            assert!(!flooding.is_finished(), "the flood was still on");
            flooding.abort();
        }
        attacked.recovers().await;
    });
}

#[test]
fn subscribe_packets_with_too_many_filters_stop_nobody_and_leave_nothing() {
    run(async {
        let mut attacked = Attacked::start("").await;
        let mut device = Device::clean(attacked.gateway.mqtt(), V5, "subscriber").await;
        let names: Vec<String> = (0..60_000).map(|number| format!("f/{number}/+")).collect();
        let filters: Vec<(&str, u8)> = names.iter().map(|name| (name.as_str(), 0)).collect();
        for _ in 0..5 {
            let codes = device.subscribe_with(&Vec::new(), &filters).await;
            let granted = codes.iter().filter(|code| **code == 0).count();
            let refused = codes.iter().filter(|code| **code == 0x97).count();
            assert_eq!((granted, granted + refused), (1_000, filters.len()));
            attacked.watched.is_served().await;
        }
        let deep = "a/".repeat(32) + "a";
        assert_eq!(device.subscribe(&deep, 0).await, 0x8F);
        // What goes away is told apart from what never was.
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        device.send(&wire::unsubscribe(V5, 7, &all)).await.unwrap();
        let codes = device
            .await_packet("an UNSUBACK", |packet| match packet {
                Packet::UnsubAck {
                    packet_id: 7,
                    codes,
                } => Some(codes.clone()),
                _ => None,
            })
            .await;
        let removed = codes.iter().filter(|code| **code == 0).count();
        let unknown = codes.iter().filter(|code| **code == 0x11).count();
        assert_eq!((removed, unknown), (1_000, 59_000));
        device.disconnect().await;
        attacked.recovers().await;
    });
}

#[test]
fn answers_that_nobody_reads_stop_the_reading_and_not_the_gateway() {
    run(async {
        let mut attacked = Attacked::start("").await;
        let names: Vec<String> = (0..500).map(|number| format!("f/{number}")).collect();
        let filters: Vec<(&str, u8)> = names.iter().map(|name| (name.as_str(), 0)).collect();
        let flood = wire::subscribe(V3, 1, &Vec::new(), &filters).repeat(20);
        let mut deaf = TcpStream::connect(attacked.gateway.mqtt()).await.unwrap();
        let hello = wire::connect(&Connect::new(V3, "deaf"));
        deaf.write_all(&hello).await.unwrap();
        // 11 bytes of SUBSCRIBE bring one of SUBACK.
        let sent = {
            let pouring = pour(&mut deaf, &flood, 512 << 20);
            tokio::pin!(pouring);
            loop {
                tokio::select! {
                    sent = &mut pouring => break sent,
                    () = tokio::time::sleep(Duration::from_secs(1)) => attacked.watched.is_served().await,
                }
            }
        };
        assert!(sent < 512 << 20, "the server took everything");
        let grown = attacked.gateway.rss_bytes().saturating_sub(attacked.before);
        assert!(grown < LEFT_BYTES_MAX, "grown by {grown} bytes");
        drop(deaf);
        attacked.recovers().await;
    });
}

#[test]
fn retained_messages_stop_at_their_limit() {
    run(async {
        let config = "[mqtt]\nretained_messages_max = 100\nretained_bytes_max = 1000000\n";
        let mut attacked = Attacked::start(config).await;
        let mut witness = Device::clean(attacked.gateway.mqtt(), V5, "witness").await;
        witness.subscribe("flood/over", 1).await;
        let mut flooder = Device::clean(attacked.gateway.mqtt(), V5, "flooder").await;
        for number in 0..2_000 {
            let topic = format!("kept/{number}");
            flooder
                .publish(Publish::new(&topic, 0, "x").retained())
                .await;
        }
        for number in 0..50 {
            let topic = format!("large/{number}");
            let publish = Publish::new(&topic, 1, vec![0; 500_000]).retained();
            flooder.publish(publish).await;
        }
        // Behind it nothing of the flood is on its way any more.
        flooder.publish(Publish::new("flood/over", 1, "x")).await;
        assert_eq!(witness.take().await.topic, "flood/over");
        attacked.watched.is_served().await;
        let mut reader = Device::clean(attacked.gateway.mqtt(), V5, "reader").await;
        reader.subscribe("#", 0).await;
        for _ in 0..100 {
            reader.take().await;
        }
        reader.has_nothing().await;
        attacked.recovers().await;
    });
}

#[test]
fn a_flood_of_wills_arrives_and_leaves_nothing() {
    run(async {
        let mut attacked = Attacked::start("").await;
        let mut reader = Device::clean(attacked.gateway.mqtt(), V5, "reader").await;
        reader.subscribe("wills/#", 1).await;
        for round in 0..5 {
            let mut dying = Vec::new();
            for number in 0..100 {
                let will = Will {
                    topic: format!("wills/{number}"),
                    payload: vec![b'x'; 20_000],
                    qos: 1,
                    ..Will::default()
                };
                let connect = Connect::new(V5, &format!("dying-{number}")).with_will(will);
                dying.push(Device::connect(attacked.gateway.mqtt(), connect).await);
            }
            drop(dying);
            for _ in 0..100 {
                assert_eq!(reader.take().await.payload.len(), 20_000, "round {round}");
            }
            attacked.watched.is_served().await;
        }
        attacked.recovers().await;
    });
}

#[test]
fn qos_2_identifiers_that_are_never_released_are_bounded() {
    run(async {
        let mut attacked = Attacked::start("").await;
        for version in [V3, V5] {
            let mut device = Device::clean(attacked.gateway.mqtt(), version, "hoarder").await;
            let mut flood = Vec::new();
            for packet_id in 1..=u16::MAX {
                let mut publish = Publish::new("hoard", 2, "x");
                publish.packet_id = packet_id;
                flood.extend(wire::publish(version, &publish));
            }
            // The server may close while this is written, and leaves answers that nobody reads.
            let sending = device.send(&flood);
            _ = tokio::time::timeout(Duration::from_secs(3), sending).await;
            if version == V5 {
                // Receive Maximum exceeded.
                assert_eq!(device.await_close(SOON).await, Some(0x93));
            }
            attacked.watched.is_served().await;
        }
        attacked.recovers().await;
    });
}

#[test]
fn garbage_instead_of_tls_leaves_nothing() {
    run(async {
        let authority = Authority::new();
        let server = authority.server("s");
        let config = format!(
            "[mqtt]\nhandshake_timeout = \"2s\"\n\n[[listeners]]\nname = \"tls\"\nprotocol = \"mqtt\"\n\
             address = \"127.0.0.1:0\"\ntls = {{ certificate = {:?}, key = {:?} }}\n",
            server.certificate, server.key
        );
        let mut attacked = Attacked::start(&config).await;
        let mut random = Random::announced("garbage instead of TLS");
        let mut open = Vec::new();
        for round in 0..300 {
            let mut bytes: Vec<u8> = (0..random.below(4_000))
                .map(|_| u8::try_from(random.below(256)).unwrap())
                .collect();
            // A record that says it is a handshake, of a length that never comes.
            if round % 2 == 0 {
                bytes.splice(0..0, [0x16, 3, 1, 0x3F, 0xFF, 1, 0, 0x3F]);
            }
            let mut stream = TcpStream::connect(attacked.gateway.further[0])
                .await
                .unwrap();
            // The server may close while this is written.
            _ = stream.write_all(&bytes).await;
            open.push(stream);
            if round % 50 == 0 {
                attacked.watched.is_served().await;
            }
        }
        for stream in &mut open {
            is_closed(stream).await;
        }
        let stream = authority
            .client()
            .connect(attacked.gateway.further[0])
            .await;
        let device = Device::try_connect_on(stream.unwrap(), Connect::new(V5, "proper")).await;
        device.unwrap().ping().await;
        attacked.recovers().await;
    });
}
