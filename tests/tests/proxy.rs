//! The PROXY protocol: whose word is taken for an address, and what comes of anything else. The same
//! traffic over every transport, also behind a real `haproxy`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use moorline_tests::authority::{Authority, Client};
use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Publish, V3, V5};
use moorline_tests::{Gateway, Options, eventually, websocket};
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::run;

const ONLY_TLS12: &[&SupportedProtocolVersion] = &[&TLS12];
const ONLY_TLS13: &[&SupportedProtocolVersion] = &[&TLS13];

const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// A version 2 header: PROXY or LOCAL, TCP over IPv4.
fn v2(command: u8, body: &[u8]) -> Vec<u8> {
    let mut header = V2_SIGNATURE.to_vec();
    header.extend([0x20 | command, 0x11]);
    header.extend((body.len() as u16).to_be_bytes());
    header.extend(body);
    header
}

/// 203.0.113.7:40001 to 10.0.0.1:1883.
const ADDRESSES: [u8; 12] = [203, 0, 113, 7, 10, 0, 0, 1, 0x9C, 0x41, 0x07, 0x5B];

fn listener(name: &str, from: &str) -> String {
    format!(
        "[[listeners]]\nname = {name:?}\nprotocol = \"mqtt\"\naddress = \"127.0.0.1:0\"\n\
         handshake_timeout = \"2s\"\nproxy_protocol_from = [{from:?}]\n"
    )
}

/// Devices behind a proxy may come from anywhere, so this has to be said.
fn open_to_all(config: &str) -> Options {
    Options::config(config).env("MOORLINE_MQTT__ALLOW_ANONYMOUS_BEYOND_LOOPBACK", "true")
}

/// What the gateway says about where a client is.
async fn address_of(gateway: &Gateway, id: &str) -> String {
    let body = gateway
        .api()
        .get(&format!("/v1/clients/{id}"))
        .await
        .expect(200);
    body["address"].as_str().unwrap_or("none").to_owned()
}

#[test]
fn a_trusted_proxy_tells_the_address_of_a_device() {
    run(async {
        let gateway = Gateway::start_with(open_to_all(&listener("proxied", "127.0.0.0/8"))).await;
        let extras = [
            &ADDRESSES[..],
            &[0x01, 0, 4],
            b"mqtt",
            &[0x20, 1, 0],
            &[7; 256],
        ]
        .concat();
        let own = None;
        let cases: Vec<(Vec<u8>, Option<&str>)> = vec![
            (
                b"PROXY TCP4 203.0.113.7 10.0.0.1 40001 1883\r\n".to_vec(),
                Some("203.0.113.7:40001"),
            ),
            (
                b"PROXY TCP6 2001:db8::7 2001:db8::1 40001 1883\r\n".to_vec(),
                Some("[2001:db8::7]:40001"),
            ),
            (b"PROXY UNKNOWN\r\n".to_vec(), own),
            (v2(1, &ADDRESSES), Some("203.0.113.7:40001")),
            (v2(1, &extras), Some("203.0.113.7:40001")),
            (v2(0, &ADDRESSES), own),
        ];
        for (header, expected) in cases {
            for version in [V3, V5] {
                let mut stream = TcpStream::connect(gateway.further[0]).await.unwrap();
                let from = stream.local_addr().unwrap().to_string();
                stream.write_all(&header).await.unwrap();
                let mut device = Device::try_connect_on(stream, Connect::new(version, "behind"))
                    .await
                    .unwrap();
                device.ping().await;
                let seen = address_of(&gateway, "behind").await;
                assert_eq!(seen, expected.unwrap_or(&from), "{header:?}");
                device.disconnect().await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn nothing_else_gets_through_and_the_log_says_why() {
    run(async {
        let config = [
            listener("trusting", "127.0.0.0/8"),
            listener("strict", "192.0.2.0/24"),
        ];
        let gateway = Gateway::start_with(open_to_all(&config.concat())).await;
        let (trusting, strict) = (gateway.further[0], gateway.further[1]);
        let connect = wire::connect(&Connect::new(V5, "x"));
        let good = v2(1, &ADDRESSES);
        let cases: Vec<(SocketAddr, Vec<u8>, &str)> = vec![
            (strict, good.clone(), "not in proxy_protocol_from"),
            (strict, Vec::new(), "not in proxy_protocol_from"),
            (trusting, Vec::new(), "no PROXY header"),
            (
                trusting,
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
                "no PROXY header",
            ),
            (
                trusting,
                b"PROXY TCP4 1.2.3.4 nobody 1 2\r\n".to_vec(),
                "not valid",
            ),
            (
                trusting,
                [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat(),
                "longer than 107",
            ),
            (trusting, v2(1, &[0; 3]), "not valid"),
            (trusting, v2(9, &ADDRESSES), "not valid"),
            (
                trusting,
                [V2_SIGNATURE, &[0x21, 0x11, 0xFF, 0xFF][..]].concat(),
                "longer than 4096",
            ),
        ];
        for (at, header, why) in cases {
            let before = gateway.log().len();
            let mut stream = TcpStream::connect(at).await.unwrap();
            // It may be closed before the end.
            _ = stream.write_all(&[&header[..], &connect].concat()).await;
            let mut answer = Vec::new();
            let closed = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
            assert!(closed.is_ok(), "closed after {header:?}");
            assert_eq!(answer, b"", "{header:?}");
            eventually(SOON, why, || async {
                let log = gateway.log();
                log[before..]
                    .iter()
                    .any(|line| line.contains(why))
                    .then_some(())
            })
            .await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_header_that_does_not_end_is_waited_for_no_longer_than_a_handshake() {
    run(async {
        let gateway = Gateway::start_with(open_to_all(&listener("proxied", "127.0.0.0/8"))).await;
        for header in [&b"PROXY TCP4 1.2"[..], &v2(1, &ADDRESSES)[..20], b""] {
            let mut stream = TcpStream::connect(gateway.further[0]).await.unwrap();
            stream.write_all(header).await.unwrap();
            let mut answer = Vec::new();
            let closed = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
            assert!(closed.is_ok(), "closed at its deadline");
            assert_eq!(answer, b"");
        }
        gateway.finish().await;
    });
}

/// `haproxy` in front of addresses, each with its own PROXY header.
struct Haproxy {
    child: Child,
    fronts: Vec<SocketAddr>,
    _config: tempfile::NamedTempFile,
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Haproxy {
    async fn start(backends: &[(SocketAddr, &str)]) -> Self {
        let mut text = String::from(
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n",
        );
        let mut fronts = Vec::new();
        for (number, (backend, header)) in backends.iter().enumerate() {
            // Free a moment ago.
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let front = free.local_addr().unwrap();
            text +=
                &format!("listen l{number}\n bind {front}\n server s{number} {backend} {header}\n");
            fronts.push(front);
        }
        let mut config = tempfile::NamedTempFile::new().unwrap();
        config.write_all(text.as_bytes()).unwrap();
        let child = Command::new("haproxy")
            .args(["-db", "-f"])
            .arg(config.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("haproxy: {error}; scripts/test installs it"));
        for front in &fronts {
            eventually(SOON, "haproxy listens", || async {
                TcpStream::connect(front).await.ok().map(drop)
            })
            .await;
        }
        Self {
            child,
            fronts,
            _config: config,
        }
    }
}

/// How a device reaches the gateway.
struct Way<'a> {
    name: &'static str,
    at: SocketAddr,
    tls: Option<Client<'a>>,
    websocket: bool,
    /// What the gateway calls it.
    transport: &'static str,
}

impl Way<'_> {
    /// A device that came this way, and the address that it came from.
    async fn connect(&self, connect: Connect) -> (Device, SocketAddr) {
        let stream = TcpStream::connect(self.at).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let from = stream.local_addr().unwrap();
        let device = match (&self.tls, self.websocket) {
            (None, false) => Device::try_connect_on(stream, connect).await,
            (None, true) => Device::try_connect_on(websocket::over(stream).await, connect).await,
            (Some(client), false) => {
                Device::try_connect_on(client.over(stream).await.unwrap(), connect).await
            }
            (Some(client), true) => {
                let stream = client.over(stream).await.unwrap();
                Device::try_connect_on(websocket::over(stream).await, connect).await
            }
        };
        (
            device.unwrap_or_else(|why| panic!("{}: {why}", self.name)),
            from,
        )
    }
}

/// Connect, subscribe, each QoS in both directions, retained, a push, a ping, a kept session.
async fn traffic(gateway: &Gateway, way: &Way<'_>, version: u8) {
    let id = format!("{}-{version}", way.name);
    let connect = || way.connect(Connect::new(version, &id).persistent());
    let (mut device, from) = connect().await;
    let body = gateway
        .api()
        .get(&format!("/v1/clients/{id}"))
        .await
        .expect(200);
    assert_eq!(body["address"], from.to_string(), "{id}: {body}");
    assert_eq!(body["transport"], way.transport, "{id}: {body}");

    let mut other = Device::clean(gateway.mqtt(), V5, &format!("{id}-other")).await;
    let (to, back) = (format!("to/{id}"), format!("back/{id}"));
    assert_eq!(device.subscribe(&to, 2).await, 2);
    assert_eq!(other.subscribe(&back, 2).await, 2);
    for qos in 0..=2 {
        let payload = format!("{qos} {}", "y".repeat(20_000));
        other.publish(Publish::new(&to, qos, payload.clone())).await;
        let taken = device.take().await;
        assert_eq!((taken.qos, taken.text()), (qos, payload.clone()), "{id}");
        assert_eq!(
            device
                .publish(Publish::new(&back, qos, payload.clone()))
                .await,
            0
        );
        let taken = other.take().await;
        assert_eq!((taken.qos, taken.text()), (qos, payload), "{id}");
    }
    let kept = format!("kept/{id}");
    device
        .publish(Publish::new(&kept, 1, "retained").retained())
        .await;
    device.subscribe(&kept, 1).await;
    let retained = device.take().await;
    assert!(
        retained.retain && retained.text() == "retained",
        "{id}: {retained:?}"
    );
    gateway.api().push_text(&id, "pushed").await;
    assert_eq!(device.take().await.text(), "pushed", "{id}");
    device.ping().await;

    drop(device);
    gateway.api().push_text(&id, "while away").await;
    let (mut device, _) = connect().await;
    assert!(device.session_present, "{id}");
    assert_eq!(device.take().await.text(), "while away", "{id}");
    device.has_nothing().await;
    device.disconnect().await;
}

#[test]
fn the_same_traffic_goes_over_every_transport_and_behind_a_proxy() {
    run(async {
        let authority = Authority::new();
        let server = authority.server("s");
        let tls = format!(
            "tls = {{ certificate = {:?}, key = {:?} }}\n",
            server.certificate, server.key
        );
        let proxied = "proxy_protocol_from = [\"127.0.0.1/32\"]\n";
        let table = |name: &str, protocol: &str, rest: &[&str]| {
            format!(
                "[[listeners]]\nname = {name:?}\nprotocol = {protocol:?}\naddress = \"127.0.0.1:0\"\n{}",
                rest.concat()
            )
        };
        let config = [
            table("tls", "mqtt", &[&tls]),
            table("wss", "ws", &[&tls]),
            table("proxied", "mqtt", &[proxied]),
            table("proxied-tls", "mqtt", &[proxied, &tls]),
            table("proxied-wss", "ws", &[proxied, &tls]),
        ];
        let gateway = Gateway::start_with(open_to_all(&config.concat())).await;
        let at = gateway.further.clone();
        let haproxy = Haproxy::start(&[
            (at[2], "send-proxy-v2"),
            (at[2], "send-proxy"),
            (at[3], "send-proxy-v2"),
            (at[4], "send-proxy-v2"),
        ])
        .await;
        let front = haproxy.fronts.clone();
        let client = || authority.client().offering(&["mqtt"]);
        let way = |name, at, tls, websocket, transport| Way {
            name,
            at,
            tls,
            websocket,
            transport,
        };
        let ways = [
            way("tcp", gateway.mqtt(), None, false, "tcp"),
            way("ws", gateway.ws(), None, true, "ws"),
            way(
                "tls12",
                at[0],
                Some(client().only(ONLY_TLS12)),
                false,
                "tls",
            ),
            way(
                "tls13",
                at[0],
                Some(client().only(ONLY_TLS13)),
                false,
                "tls",
            ),
            way("wss", at[1], Some(authority.client()), true, "wss"),
            way("haproxy-v2", front[0], None, false, "tcp"),
            way("haproxy-v1", front[1], None, false, "tcp"),
            way("haproxy-tls", front[2], Some(client()), false, "tls"),
            way(
                "haproxy-wss",
                front[3],
                Some(authority.client()),
                true,
                "wss",
            ),
        ];
        for way in &ways {
            for version in [V3, V5] {
                let done = tokio::time::timeout(3 * SOON, traffic(&gateway, way, version)).await;
                assert!(done.is_ok(), "{} hangs", way.name);
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn limits_of_an_address_are_those_of_the_device_behind_the_proxy() {
    run(async {
        let config = format!(
            "{}[mqtt.per_address]\nhalf_open_max = 1\n",
            listener("proxied", "127.0.0.0/8").replace("\"2s\"", "\"20s\"")
        );
        let gateway = Gateway::start_with(open_to_all(&config)).await;
        let open = || async {
            let mut stream = TcpStream::connect(gateway.further[0]).await.unwrap();
            stream.write_all(&v2(1, &ADDRESSES)).await.unwrap();
            stream
        };
        let first = open().await;
        // The second one of this address is refused; of others there may be more.
        eventually(SOON, "one of them is refused", || async {
            let mut second = open().await;
            let read = tokio::time::timeout(Duration::from_millis(500), second.read_u8());
            matches!(read.await, Ok(Err(_))).then_some(())
        })
        .await;
        let mut stream = TcpStream::connect(gateway.further[0]).await.unwrap();
        stream
            .write_all(b"PROXY TCP4 203.0.113.8 10.0.0.1 1 2\r\n")
            .await
            .unwrap();
        let mut device = Device::try_connect_on(stream, Connect::new(V5, "next"))
            .await
            .unwrap();
        device.ping().await;
        drop(first);
        gateway.finish().await;
    });
}
