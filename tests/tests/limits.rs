//! What one device, one address or everybody together may use up, and who is banned.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use moorline_tests::device::{Arrived, Device};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Packet, Publish, V3, V5, Will};
use moorline_tests::{Api, Gateway, Options, eventually};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};

use crate::auth::{ann, as_user, with_users};
use crate::support::run;

const BANNED: u8 = 0x8A;
const ADMINISTRATIVE_ACTION: u8 = 0x98;

/// A connection whose other end sees it come from `from`: all of 127.0.0.0/8 is this machine.
async fn stream_from(from: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let from: IpAddr = from.parse().unwrap();
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(from, 0))?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What a CONNECT comes to.
#[derive(Debug)]
enum Outcome {
    Accepted(Device),
    Refused(u8),
    Closed,
}

impl Outcome {
    fn code(&self) -> Option<u8> {
        match self {
            Self::Accepted(_) => Some(0),
            Self::Refused(code) => Some(*code),
            Self::Closed => None,
        }
    }
}

async fn attempt_on(stream: std::io::Result<TcpStream>, connect: &Connect) -> Outcome {
    let Ok(stream) = stream else {
        return Outcome::Closed;
    };
    let mut device = Device::on(stream, connect.version);
    // A server that has closed already may have reset the connection.
    _ = device.send(&wire::connect(connect)).await;
    match device.receive(SOON).await {
        Arrived::Packet(Packet::ConnAck { code: 0, .. }) => Outcome::Accepted(device),
        Arrived::Packet(Packet::ConnAck { code, .. }) => Outcome::Refused(code),
        Arrived::Closed => Outcome::Closed,
        other => panic!("{other:?}"),
    }
}

async fn attempt(gateway: &Gateway, connect: &Connect) -> Outcome {
    attempt_on(TcpStream::connect(gateway.mqtt()).await, connect).await
}

/// Connects again and again until it is accepted.
async fn accepted(gateway: &Gateway, connect: &Connect) -> Device {
    let what = format!("{} is let in", connect.client_id);
    eventually(SOON, &what, || async {
        match attempt(gateway, connect).await {
            Outcome::Accepted(device) => Some(device),
            _ => None,
        }
    })
    .await
}

/// How many connections were refused for `reason`.
async fn refused(gateway: &Gateway, reason: &str) -> u64 {
    let text = gateway.metrics().await;
    let label = format!("reason=\"{reason}\"");
    let line = text.lines().find(|line| {
        line.starts_with("moorline_mqtt_connections_refused_total{") && line.contains(&label)
    });
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .unwrap_or(0)
}

async fn ban(api: &Api, target: &str, body: &Value) {
    let path = format!("/v1/bans/{target}");
    let request = api.request(Method::PUT, &path).json(body);
    api.send(request).await.expect(200);
}

#[test]
fn no_more_devices_than_the_maximum_are_connected() {
    run(async {
        let gateway =
            Gateway::start_with(Options::config("[mqtt]\nconnections_max = 3\n").one_node()).await;
        let mut held = Vec::new();
        for number in 0..3 {
            held.push(Device::clean(gateway.mqtt(), V5, &format!("d{number}")).await);
        }
        let further = Connect::new(V5, "further");
        assert_eq!(attempt(&gateway, &further).await.code(), None);
        for device in &mut held {
            device.ping().await;
        }
        assert_eq!(refused(&gateway, "connections_max").await, 1);
        held.pop().unwrap().disconnect().await;
        accepted(&gateway, &further).await.ping().await;
        gateway.finish().await;
    });
}

#[test]
fn silent_connections_do_not_keep_devices_out_for_longer_than_the_handshake_timeout() {
    run(async {
        let config = "[mqtt]\nhalf_open_max = 5\nhandshake_timeout = \"1s\"\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let mut before = Device::clean(gateway.mqtt(), V5, "before").await;
        let mut silent = Vec::new();
        while refused(&gateway, "half_open_max").await == 0 {
            assert!(silent.len() < 1_000, "nothing is refused");
            silent.push(TcpStream::connect(gateway.mqtt()).await.unwrap());
            tokio::task::yield_now().await;
        }
        assert!(silent.len() > 5, "{} were too many already", silent.len());
        before.ping().await;
        // They are still there, but no longer half-open: the server has given them up.
        accepted(&gateway, &Connect::new(V5, "after"))
            .await
            .ping()
            .await;
        assert!(refused(&gateway, "handshake_timeout").await > 0);
        gateway.finish().await;
    });
}

#[test]
fn silent_connections_of_one_address_keep_no_other_out() {
    run(async {
        let config = "[mqtt]\nhandshake_timeout = \"60s\"\nper_address = { half_open_max = 3, exempt = [] }\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let mut silent = Vec::new();
        while refused(&gateway, "address_half_open_max").await == 0 {
            assert!(silent.len() < 1_000, "nothing is refused");
            silent.push(stream_from("127.0.0.2", gateway.mqtt()).await.unwrap());
        }
        let connect = Connect::new(V5, "d");
        let same = attempt_on(stream_from("127.0.0.2", gateway.mqtt()).await, &connect).await;
        assert_eq!(same.code(), None);
        let other = attempt_on(stream_from("127.0.0.3", gateway.mqtt()).await, &connect).await;
        assert_eq!(other.code(), Some(0));
        gateway.finish().await;
    });
}

#[test]
fn more_connects_in_a_second_than_declared_are_closed_at_once() {
    run(async {
        let config = "[mqtt]\nper_address = { connects_per_second = 5, exempt = [] }\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let mut codes = Vec::new();
        for number in 0..50 {
            let connect = Connect::new(V5, &format!("d{number}"));
            let stream = stream_from("127.0.0.2", gateway.mqtt()).await;
            codes.push(attempt_on(stream, &connect).await.code());
        }
        let let_in = codes.iter().filter(|code| **code == Some(0)).count();
        assert!(let_in >= 5, "{codes:?}");
        assert!(codes.contains(&None), "{codes:?}");
        let counted = refused(&gateway, "address_connects_per_second").await;
        assert_eq!(counted, 50 - let_in as u64);
        let other = stream_from("127.0.0.3", gateway.mqtt()).await;
        let other = attempt_on(other, &Connect::new(V5, "other")).await;
        assert_eq!(other.code(), Some(0));
        gateway.finish().await;
    });
}

#[test]
fn a_listener_has_limits_of_its_own_beside_those_of_all() {
    run(async {
        let config = "[mqtt]\nconnections_max = 3\n\n[[listeners]]\nname = \"small\"\nprotocol = \"mqtt\"\n\
                      address = \"127.0.0.1:0\"\nconnections_max = 1\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let small = gateway.further[0];
        let on_small = async |id: &str| {
            attempt_on(TcpStream::connect(small).await, &Connect::new(V5, id)).await
        };
        let first = on_small("a").await;
        assert_eq!(first.code(), Some(0));
        assert_eq!(on_small("b").await.code(), None);
        let _second = Device::clean(gateway.mqtt(), V5, "c").await;
        let _third = Device::clean(gateway.mqtt(), V5, "d").await;
        assert_eq!(attempt(&gateway, &Connect::new(V5, "e")).await.code(), None);
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_sends_too_fast_is_slowed_down_and_loses_nothing() {
    run(async {
        let config = "[mqtt]\nper_device = { packets_per_second = 100, burst = \"1s\" }\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut receiver = Device::clean(gateway.mqtt(), V5, "receiver").await;
        receiver.subscribe("fast/#", 0).await;
        // Its keep alive is shorter than it is made to wait; and it knows of no Receive Maximum.
        let connect = Connect::new(V3, "sender").keep_alive(1);
        let mut sender = Device::connect(gateway.mqtt(), connect).await;
        let mut burst = Vec::new();
        for number in 1..=500u16 {
            let mut publish = Publish::new("fast/x", 1, number.to_string());
            publish.packet_id = number;
            burst.extend(wire::publish(V3, &publish));
        }
        let began = Instant::now();
        sender.send(&burst).await.unwrap();
        for number in 1..=500u16 {
            assert_eq!(receiver.take().await.text(), number.to_string());
        }
        for number in 1..=500u16 {
            assert_eq!(sender.await_puback(number).await, 0);
        }
        sender.ping().await;
        // 500 of which 100 are the burst; what was read together counts afterwards.
        let least = Duration::from_secs(2);
        assert!(began.elapsed() > least, "nothing slowed it down");
        gateway.finish().await;
    });
}

#[test]
fn bytes_are_limited_as_well_as_packets() {
    run(async {
        let config = "[mqtt]\nper_device = { bytes_per_second = 200000, burst = \"1s\" }\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut sender = Device::clean(gateway.mqtt(), V3, "sender").await;
        let began = Instant::now();
        for _ in 0..10 {
            sender
                .publish(Publish::new("big", 1, vec![0; 80_000]))
                .await;
        }
        assert!(
            began.elapsed() > Duration::from_secs(1),
            "nothing slowed it down"
        );
        gateway.finish().await;
    });
}

#[test]
fn or_a_device_that_sends_too_fast_is_told_so_and_disconnected() {
    run(async {
        let config = "[mqtt]\nper_device = { packets_per_second = 50, burst = \"1s\", excess = \"disconnect\" }\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let mut calm = Device::clean(gateway.mqtt(), V5, "calm").await;
        let mut fast = Device::clean(gateway.mqtt(), V5, "fast").await;
        fast.send(&wire::PINGREQ.repeat(1_000)).await.unwrap();
        assert_eq!(fast.await_close(SOON).await, Some(0x96));
        calm.ping().await;
        let text = gateway.metrics().await;
        assert!(
            text.contains("moorline_mqtt_disconnects_total{reason=\"rate_exceeded\"} 1"),
            "{text}"
        );
        gateway.finish().await;
    });
}

#[test]
fn the_number_of_sessions_is_bounded() {
    run(async {
        let gateway = Gateway::start_with(Options::config("[mqtt]\nsessions_max = 3\n")).await;
        for number in 0..3 {
            let connect = Connect::new(V5, &format!("kept-{number}")).persistent();
            Device::connect(gateway.mqtt(), connect)
                .await
                .disconnect()
                .await;
        }
        let further = |version| Connect::new(version, "further").persistent();
        assert_eq!(attempt(&gateway, &further(V5)).await.code(), Some(0x97));
        assert_eq!(attempt(&gateway, &further(V3)).await.code(), Some(3));
        // Whoever has one goes on with it, or begins it anew.
        let again = Connect::new(V5, "kept-0").persistent();
        let again = Device::connect(gateway.mqtt(), again).await;
        assert!(again.session_present);
        again.disconnect().await;
        Device::clean(gateway.mqtt(), V5, "kept-1")
            .await
            .disconnect()
            .await;
        accepted(&gateway, &further(V5)).await.ping().await;
        assert_eq!(refused(&gateway, "sessions_max").await, 2);
        gateway.finish().await;
    });
}

#[test]
fn a_client_that_comes_and_goes_without_end_is_banned_for_a_while() {
    run(async {
        let config = "[mqtt]\nper_address = { exempt = [] }\n\
                      flapping = { client_connects = 5, window = \"60s\", ban = \"3s\" }\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let flapping = Connect::new(V5, "flapping");
        for _ in 0..5 {
            Device::connect(gateway.mqtt(), flapping.clone())
                .await
                .disconnect()
                .await;
        }
        assert_eq!(attempt(&gateway, &flapping).await.code(), Some(BANNED));
        assert_eq!(
            attempt(&gateway, &Connect::new(V3, "flapping"))
                .await
                .code(),
            Some(5)
        );
        Device::clean(gateway.mqtt(), V5, "other")
            .await
            .ping()
            .await;
        let bans = gateway.api().get("/v1/bans").await.expect(200);
        assert_eq!(bans["bans"][0]["value"], "flapping", "{bans}");
        assert_eq!(bans["bans"][0]["automatic"], true, "{bans}");
        accepted(&gateway, &flapping).await.ping().await;
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_operators_or_deadlines_close_is_not_flapping() {
    run(async {
        let config = "[mqtt]\nper_address = { exempt = [] }\n\
                      flapping = { client_connects = 3, window = \"60s\", ban = \"60s\" }\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let api = gateway.api();
        for _ in 0..6 {
            let mut device = Device::clean(gateway.mqtt(), V5, "patient").await;
            assert_eq!(
                api.delete("/v1/clients/patient/connection").await.status,
                204
            );
            assert_eq!(device.await_close(SOON).await, Some(ADMINISTRATIVE_ACTION));
        }
        Device::clean(gateway.mqtt(), V5, "patient")
            .await
            .ping()
            .await;
        gateway.finish().await;
    });
}

#[test]
fn an_address_that_connects_without_end_is_banned_and_no_other() {
    run(async {
        let config = "[mqtt]\nper_address = { exempt = [] }\n\
                      flapping = { client_connects = 0, address_connects = 10, window = \"60s\", ban = \"60s\" }\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let connect = Connect::new(V5, "d");
        for _ in 0..30 {
            // Nothing is said: it need not come to a session to be counted.
            drop(stream_from("127.0.0.2", gateway.mqtt()).await);
        }
        let same = attempt_on(stream_from("127.0.0.2", gateway.mqtt()).await, &connect).await;
        assert_eq!(same.code(), None);
        let other = attempt_on(stream_from("127.0.0.3", gateway.mqtt()).await, &connect).await;
        assert_eq!(other.code(), Some(0));
        let lifted = gateway.api().delete("/v1/bans/address/127.0.0.2").await;
        assert_eq!(lifted.status, 204, "{lifted:?}");
        let same = attempt_on(stream_from("127.0.0.2", gateway.mqtt()).await, &connect).await;
        assert_eq!(same.code(), Some(0));
        gateway.finish().await;
    });
}

#[test]
fn a_banned_client_is_disconnected_and_refused_also_after_kill_9() {
    run(async {
        let mut gateway = Gateway::start().await;
        let api = gateway.api();
        let mut bad = Device::clean(gateway.mqtt(), V5, "bad/one").await;
        let mut good = Device::clean(gateway.mqtt(), V5, "good").await;
        ban(&api, "client/bad%2Fone", &json!({"reason": "stolen"})).await;
        assert_eq!(bad.await_close(SOON).await, Some(ADMINISTRATIVE_ACTION));
        good.ping().await;
        let code = async |gateway: &Gateway, version| {
            attempt(gateway, &Connect::new(version, "bad/one"))
                .await
                .code()
        };
        assert_eq!(code(&gateway, V5).await, Some(BANNED));
        assert_eq!(code(&gateway, V3).await, Some(5));
        gateway.kill9();
        gateway.restart().await;
        assert_eq!(code(&gateway, V5).await, Some(BANNED));
        let api = gateway.api();
        let list = api.get("/v1/bans").await.expect(200);
        assert_eq!(list["bans"][0]["reason"], "stolen", "{list}");
        assert_eq!(api.delete("/v1/bans/client/bad%2Fone").await.status, 204);
        assert_eq!(code(&gateway, V5).await, Some(0));
        gateway.finish().await;
    });
}

#[test]
fn a_banned_network_is_disconnected_and_refused_at_the_door() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        let connect = |id: &str| Connect::new(V5, id);
        let from = async |address: &str, id: &str| {
            attempt_on(stream_from(address, gateway.mqtt()).await, &connect(id)).await
        };
        let Outcome::Accepted(mut bad) = from("127.9.9.9", "bad").await else {
            panic!("not accepted")
        };
        let Outcome::Accepted(mut good) = from("127.8.9.9", "good").await else {
            panic!("not accepted")
        };
        ban(&api, "address/127.9.0.0%2F16", &json!({"ttl": "1h"})).await;
        assert_eq!(bad.await_close(SOON).await, Some(ADMINISTRATIVE_ACTION));
        good.ping().await;
        assert_eq!(from("127.9.0.1", "bad").await.code(), None);
        assert!(refused(&gateway, "banned").await > 0);
        assert_eq!(from("127.8.0.1", "other").await.code(), Some(0));
        // A ban that is not exactly that one is not lifted by it.
        api.delete("/v1/bans/address/127.9.9.9").await.problem(404);
        assert_eq!(
            api.delete("/v1/bans/address/127.9.0.0%2F16").await.status,
            204
        );
        assert_eq!(from("127.9.0.1", "bad").await.code(), Some(0));
        gateway.finish().await;
    });
}

#[test]
fn a_banned_user_is_refused_until_the_ban_is_over() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        ban(&api, "username/anna", &json!({"ttl": "2s"})).await;
        let named = |name: &str| Connect {
            user_name: Some(name.to_owned()),
            ..Connect::new(V5, "phone")
        };
        assert_eq!(attempt(&gateway, &named("anna")).await.code(), Some(BANNED));
        assert_eq!(attempt(&gateway, &named("ann")).await.code(), Some(0));
        accepted(&gateway, &named("anna")).await.ping().await;
        let list = api.get("/v1/bans").await.expect(200);
        assert_eq!(list["bans"], json!([]));
        gateway.finish().await;
    });
}

#[test]
fn a_banned_user_is_disconnected_whatever_the_client_id() {
    run(async {
        let (gateway, _folder) = with_users("").await;
        let mut first = Device::connect(gateway.mqtt(), ann(V5, "phone")).await;
        let mut second = Device::connect(gateway.mqtt(), ann(V5, "tablet")).await;
        let bob = as_user(V5, "other", "bob", "bob's secret");
        let mut bob = Device::connect(gateway.mqtt(), bob).await;
        ban(&gateway.api(), "username/ann", &json!({})).await;
        for device in [&mut first, &mut second] {
            assert_eq!(device.await_close(SOON).await, Some(ADMINISTRATIVE_ACTION));
        }
        bob.ping().await;
        let code = attempt(&gateway, &ann(V5, "phone")).await.code();
        assert_eq!(code, Some(BANNED));
        gateway.finish().await;
    });
}

#[test]
fn a_flood_of_refusals_is_no_flood_of_log_lines() {
    run(async {
        let config = "[mqtt]\nconnections_max = 1\n";
        let gateway = Gateway::start_with(Options::config(config).one_node()).await;
        let _only = Device::clean(gateway.mqtt(), V5, "only").await;
        for _ in 0..500 {
            drop(TcpStream::connect(gateway.mqtt()).await);
        }
        eventually(SOON, "all are refused", || async {
            (refused(&gateway, "connections_max").await == 500).then_some(())
        })
        .await;
        let log = gateway.log();
        let lines = log
            .iter()
            .filter(|line| line.contains("connection refused"))
            .count();
        assert!((1..100).contains(&lines), "{lines} lines");
        gateway.finish().await;
    });
}

#[test]
fn topics_with_too_many_levels_are_refused_wherever_they_stand() {
    run(async {
        let gateway = Gateway::start_with(Options::config("[mqtt]\ntopic_levels_max = 4\n")).await;
        let with_will = |version, topic: &str| {
            Connect::new(version, "mortal").with_will(Will {
                topic: topic.to_owned(),
                payload: b"gone".to_vec(),
                ..Will::default()
            })
        };
        for bad in ["a/b/c/d/e", "d/x/c/d/e", "$SYS/x"] {
            assert_eq!(
                attempt(&gateway, &with_will(V5, bad)).await.code(),
                Some(0x90),
                "{bad}"
            );
            let old = attempt(&gateway, &with_will(V3, bad)).await.code();
            assert!(old.is_some_and(|code| code > 0), "{bad}: {old:?}");
            let mut device = Device::clean(gateway.mqtt(), V5, "d").await;
            assert_eq!(
                device.publish(Publish::new(bad, 1, "x")).await,
                0x90,
                "{bad}"
            );
            assert_eq!(
                device.publish(Publish::new(bad, 2, "x")).await,
                0x90,
                "{bad}"
            );
            device.ping().await;
        }
        let mut device = Device::clean(gateway.mqtt(), V5, "d").await;
        for bad in ["a/b/c/d/e", "a/+/c/d/#", "$share/g/a/b/c/d/#"] {
            assert_eq!(device.subscribe(bad, 0).await, 0x8F, "{bad}");
        }
        for good in ["a/b/c/d", "a/b/c/#", "$share/g/a/b/c/d"] {
            assert_eq!(device.subscribe(good, 0).await, 0, "{good}");
        }
        assert_eq!(
            attempt(&gateway, &with_will(V5, "a/b/c/d")).await.code(),
            Some(0)
        );
        assert_eq!(device.take().await.text(), "gone");
        gateway.finish().await;
    });
}
