//! TLS: who gets in and who does not, certificates that change, and what a hostile peer can do.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use moorline_tests::authority::{Authority, Client, Signed};
use moorline_tests::device::{Arrived, Device};
use moorline_tests::others::{mosquitto, run as run_program};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Packet, Publish, V3, V5};
use moorline_tests::{Gateway, Options, eventually};
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::run;

static VERSIONS_OF_TLS: [&[&SupportedProtocolVersion]; 2] = [&[&TLS12], &[&TLS13]];

/// A `[[listeners]]` table with a certificate; `tls` goes on inside of its `tls`.
fn listener(name: &str, protocol: &str, server: &Signed, tls: &str) -> String {
    format!(
        "[[listeners]]\nname = {name:?}\nprotocol = {protocol:?}\naddress = \"127.0.0.1:0\"\n\
         tls = {{ certificate = {:?}, key = {:?}{tls} }}\n",
        server.certificate, server.key
    )
}

async fn gateway(listeners: &[String]) -> Gateway {
    Gateway::start_with(Options::config(&listeners.concat())).await
}

async fn connect(client: &Client<'_>, to: SocketAddr, connect: Connect) -> Result<Device, String> {
    let stream = client.connect(to).await;
    let stream = stream.map_err(|error| format!("TLS: {error}"))?;
    Device::try_connect_on(stream, connect).await
}

#[test]
fn other_peoples_clients_speak_both_versions_of_tls() {
    run(async {
        let authority = Authority::new();
        let gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        let at = SocketAddr::from((gateway.further[0].ip(), gateway.further[0].port()));
        let ca = authority.file();
        for version in ["tlsv1.2", "tlsv1.3"] {
            let secure = ["--cafile", ca.to_str().unwrap(), "--tls-version", version];
            for qos in ["0", "1", "2"] {
                let topic = format!("news/{qos}");
                let message = ["-t", &topic, "-r", "-q", qos, "-m", version];
                let args = [&secure[..], &message].concat();
                let ended = run_program(mosquitto("mosquitto_pub", at, &args)).await;
                assert!(ended.status.success(), "{ended:?}");
            }
            let args = [&secure[..], &["-t", "news/#", "-q", "2", "-C", "3", "-v"]].concat();
            let ended = run_program(mosquitto("mosquitto_sub", at, &args)).await;
            let mut lines: Vec<&str> = ended.stdout.lines().collect();
            lines.sort_unstable();
            let all = ["0", "1", "2"].map(|qos| format!("news/{qos} {version}"));
            assert_eq!(lines, all, "{ended:?}");
        }
        gateway.finish().await;
    });
}

#[test]
fn an_unknown_authority_keeps_a_client_away_and_the_gateway_serves_on() {
    run(async {
        let (authority, other) = (Authority::new(), Authority::new());
        let gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        let refused = other.client().connect(gateway.further[0]).await;
        let why = refused.unwrap_err().to_string();
        assert!(why.contains("invalid peer certificate"), "{why}");
        for versions in VERSIONS_OF_TLS {
            let client = authority.client().only(versions);
            let mut device = connect(&client, gateway.further[0], Connect::new(V5, "known"))
                .await
                .unwrap();
            device.ping().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn the_protocol_is_agreed_on_where_the_client_asks() {
    run(async {
        let authority = Authority::new();
        let server = authority.server("s");
        let gateway = gateway(&[
            listener("tls", "mqtt", &server, ""),
            listener("wss", "ws", &server, ""),
        ])
        .await;
        for (at, own) in gateway.further.iter().zip(["mqtt", "http/1.1"]) {
            for versions in VERSIONS_OF_TLS {
                let client = authority.client().only(versions);
                let agreed = client.clone().offering(&["x", own]).connect(*at).await;
                let agreed = agreed.unwrap();
                assert_eq!(agreed.get_ref().1.alpn_protocol(), Some(own.as_bytes()));
                let silent = client.connect(*at).await.unwrap();
                assert_eq!(silent.get_ref().1.alpn_protocol(), None);
                let refused = client.offering(&["h2", "x"]).connect(*at).await;
                let why = refused.unwrap_err().to_string();
                assert!(why.contains("NoApplicationProtocol"), "{why}");
            }
        }
        gateway.finish().await;
    });
}

fn with_clients(authority: &Authority, mode: &str, identity: &str) -> String {
    format!(
        ", client_ca = {:?}, client_certificate = {mode:?}, identity = {identity:?}",
        authority.file()
    )
}

#[test]
fn where_a_certificate_is_required_nobody_comes_without_a_good_one() {
    run(async {
        let (authority, other) = (Authority::new(), Authority::new());
        let required = with_clients(&authority, "required", "none");
        let server = authority.server("s");
        let gateway = gateway(&[listener("mtls", "mqtt", &server, &required)]).await;
        let at = gateway.further[0];
        let good = authority.device("meter-1");
        let (foreign, expired) = (other.device("meter-1"), authority.expired_device("meter-1"));
        for versions in VERSIONS_OF_TLS {
            let client = authority.client().only(versions);
            let bad = [
                client.clone(),
                client.clone().showing(&foreign),
                client.clone().showing(&expired),
            ];
            for client in bad {
                // In TLS 1.3 the client only learns of it from its first read.
                let refused = connect(&client, at, Connect::new(V5, "meter-1")).await;
                assert!(refused.is_err(), "{client:?}");
            }
            let client = client.showing(&good);
            let mut device = connect(&client, at, Connect::new(V5, "any-id"))
                .await
                .unwrap();
            device.ping().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_certificate_names_the_client() {
    run(async {
        let authority = Authority::new();
        let server = authority.server("s");
        let required = with_clients(&authority, "required", "client_id");
        let optional = with_clients(&authority, "optional", "client_id");
        let gateway = gateway(&[
            listener("required", "mqtt", &server, &required),
            listener("optional", "mqtt", &server, &optional),
        ])
        .await;
        let (meter, by_dns) = (
            authority.device("meter-1"),
            authority.device_by_dns_name("meter-2.example"),
        );
        let client = authority.client().showing(&meter);
        for at in gateway.further.clone() {
            for version in [V3, V5] {
                connect(&client, at, Connect::new(version, "meter-1"))
                    .await
                    .unwrap();
                let refused = connect(&client, at, Connect::new(version, "meter-9")).await;
                let code = if version == V5 {
                    "code: 133"
                } else {
                    "code: 2"
                };
                let why = refused.unwrap_err();
                assert!(why.contains(code), "{why}");
                let taken = connect(&client, at, Connect::new(version, ""))
                    .await
                    .unwrap();
                let body = gateway.api().get("/v1/clients/meter-1").await.expect(200);
                assert_eq!(body["transport"], "tls", "{body}");
                if version == V5 {
                    let assigned = wire::Value::Text(b"meter-1".to_vec());
                    assert!(
                        taken.connack.contains(&(0x12, assigned)),
                        "{:?}",
                        taken.connack
                    );
                }
            }
            let client = authority.client().showing(&by_dns);
            connect(&client, at, Connect::new(V5, "meter-2.example"))
                .await
                .unwrap();
        }
        // Without a certificate there is nothing to hold a device to.
        let nobody = authority.client();
        let anyone = connect(&nobody, gateway.further[1], Connect::new(V5, "any-id"));
        anyone.await.unwrap().ping().await;
        gateway.finish().await;
    });
}

/// The certificate that a new connection is shown.
async fn shown(client: &Client<'_>, at: SocketAddr) -> Vec<u8> {
    let stream = client.connect(at).await.unwrap();
    let (_, session) = stream.get_ref();
    session.peer_certificates().unwrap()[0].to_vec()
}

fn put(from: &Signed, to: &Signed) {
    std::fs::copy(&from.certificate, &to.certificate).unwrap();
    std::fs::copy(&from.key, &to.key).unwrap();
}

#[test]
fn a_new_certificate_is_taken_without_a_restart_and_a_broken_one_is_not() {
    run(async {
        let authority = Authority::new();
        let (used, new, newer) = (
            authority.server("used"),
            authority.server("new"),
            authority.server("newer"),
        );
        let gateway = gateway(&[listener("tls", "mqtt", &used, "")]).await;
        let at = gateway.further[0];
        let client = authority.client();
        let mut device = connect(&client, at, Connect::new(V5, "stays"))
            .await
            .unwrap();
        let first = shown(&client, at).await;

        put(&new, &used);
        let second = eventually(SOON, "the new certificate is shown", || async {
            let second = shown(&client, at).await;
            (second != first).then_some(second)
        })
        .await;
        device.ping().await;

        std::fs::write(&used.certificate, "half a certi").unwrap();
        let name = used.certificate.display().to_string();
        eventually(SOON, "a warning that names the file", || async {
            let log = gateway.log();
            let warned = |line: &&String| line.contains("WARN") && line.contains(&name);
            log.iter().find(warned).map(|_| ())
        })
        .await;
        assert_eq!(shown(&client, at).await, second);

        put(&newer, &used);
        let pid = rustix::process::Pid::from_raw(gateway.pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        eventually(SOON, "the newer certificate is shown", || async {
            (shown(&client, at).await != second).then_some(())
        })
        .await;
        device.ping().await;
        let warnings = gateway
            .log()
            .iter()
            .filter(|line| line.contains("WARN"))
            .count();
        assert!(
            warnings <= 2,
            "a broken file is said once: {:#?}",
            gateway.log()
        );
        gateway.finish().await;
    });
}

#[test]
fn garbage_and_torn_handshakes_disturb_nobody() {
    run(async {
        let authority = Authority::new();
        let gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        let at = gateway.further[0];
        let mut oversized = vec![22, 3, 1, 0xFF, 0xFF];
        oversized.resize(70_000, 1);
        let endless = [
            &[22, 3, 1, 0x3F, 0xFF, 1, 0xFF, 0xFF, 0xFF][..],
            &[0; 16_374],
        ]
        .concat();
        let garbage: Vec<Vec<u8>> = vec![
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            wire::connect(&Connect::new(V5, "plain")),
            vec![0; 5000],
            vec![0xFF; 5000],
            oversized,
            endless,
            vec![21, 3, 3, 0, 2, 2, 40],
            vec![20, 3, 3, 0, 1, 1],
            vec![23, 3, 3, 0, 5, 1, 2, 3, 4, 5],
        ];
        for bytes in garbage {
            let mut stream = TcpStream::connect(at).await.unwrap();
            // It may be closed before the end.
            _ = stream.write_all(&bytes).await;
            let mut answer = Vec::new();
            let closed = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
            assert!(
                closed.is_ok(),
                "closed after {:?}",
                &bytes[..9.min(bytes.len())]
            );
            assert!(answer.len() < 100, "an alert at most: {answer:?}");
        }
        connect(&authority.client(), at, Connect::new(V5, "ordinary"))
            .await
            .unwrap()
            .ping()
            .await;
        gateway.finish().await;
    });
}

/// Hands bytes on one by one, both ways.
async fn byte_by_byte(to: SocketAddr) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (near, _) = listener.accept().await.unwrap();
        let far = TcpStream::connect(to).await.unwrap();
        far.set_nodelay(true).unwrap();
        let (mut near_read, mut near_write) = near.into_split();
        let (mut far_read, mut far_write) = far.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut far_read, &mut near_write).await });
        while let Ok(byte) = near_read.read_u8().await {
            if far_write.write_u8(byte).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    });
    address
}

#[test]
fn a_handshake_may_come_a_byte_at_a_time() {
    run(async {
        let authority = Authority::new();
        let gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        for versions in VERSIONS_OF_TLS {
            let slow = byte_by_byte(gateway.further[0]).await;
            let client = authority.client().only(versions);
            let mut device = connect(&client, slow, Connect::new(V5, "slow"))
                .await
                .unwrap();
            device.subscribe("a", 1).await;
            device.publish(Publish::new("a", 1, "x".repeat(3000))).await;
            assert_eq!(device.take().await.payload.len(), 3000);
        }
        gateway.finish().await;
    });
}

#[test]
fn half_open_handshakes_hold_up_nobody_and_end_by_themselves() {
    run(async {
        let authority = Authority::new();
        let server = authority.server("s");
        let short = listener("tls", "mqtt", &server, "")
            .replace("protocol", "handshake_timeout = \"3s\"\nprotocol");
        let gateway = gateway(&[short]).await;
        let at = gateway.further[0];
        // The beginning of a ClientHello that does not go on, or nothing.
        let mut half_open = Vec::new();
        for number in 0..200 {
            let mut stream = TcpStream::connect(at).await.unwrap();
            if number % 2 == 0 {
                stream
                    .write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 0xFC])
                    .await
                    .unwrap();
            }
            half_open.push(stream);
        }
        let asked = Instant::now();
        let mut device = connect(&authority.client(), at, Connect::new(V5, "quick"))
            .await
            .unwrap();
        device.ping().await;
        let waited = asked.elapsed();
        assert!(waited < Duration::from_secs(2), "waited {waited:?}");
        for mut stream in half_open {
            let mut rest = Vec::new();
            // A reset is an end as well.
            let ended = tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await;
            assert!(ended.is_ok(), "closed at its deadline");
        }
        device.ping().await;
        gateway.finish().await;
    });
}

#[test]
fn a_large_message_goes_both_ways() {
    run(async {
        let authority = Authority::new();
        let gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        let payload: Vec<u8> = (0..1_000_000u32).map(|n| (n * 7) as u8).collect();
        for versions in VERSIONS_OF_TLS {
            let client = authority.client().only(versions);
            let mut device = connect(&client, gateway.further[0], Connect::new(V5, "large"))
                .await
                .unwrap();
            for qos in 0..=2 {
                device.subscribe("large", qos).await;
                let sent = Publish::new("large", qos, payload.clone());
                assert_eq!(device.publish(sent).await, 0);
                assert!(device.take().await.payload == payload, "QoS {qos}");
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn a_device_that_stops_reading_costs_little_and_gets_everything_in_order() {
    const PUSHES: usize = 600;
    let text = |number: usize| format!("{number:06} {}", "x".repeat(20_000));
    run(async {
        let authority = Authority::new();
        let gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        let at = gateway.further[0];
        let client = authority.client();
        let mut stuck = connect(&client, at, Connect::new(V5, "stuck").persistent())
            .await
            .unwrap();
        let mut other = connect(&client, at, Connect::new(V5, "other"))
            .await
            .unwrap();
        let before = gateway.rss_bytes_at_rest().await;
        let mut highest = before;
        for number in 0..PUSHES {
            gateway.api().push_text("stuck", &text(number)).await;
            if number % 50 == 0 {
                gateway.api().push_text("other", "quick").await;
                assert_eq!(other.take().await.text(), "quick");
                highest = highest.max(gateway.rss_bytes());
            }
        }
        // Twelve megabytes were pushed; the rest is the store's caches and journal.
        assert!(
            highest - before < 96 << 20,
            "{} MiB",
            (highest - before) >> 20
        );
        for number in 0..PUSHES {
            assert_eq!(stuck.take().await.text(), text(number));
        }
        stuck.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn a_device_learns_why_it_is_closed_and_tls_ends_properly() {
    run(async {
        let authority = Authority::new();
        let mut gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        let at = gateway.further[0];
        let mut device = connect(&authority.client(), at, Connect::new(V5, "told"))
            .await
            .unwrap();
        let mut raw = authority.client().connect(at).await.unwrap();
        raw.write_all(&wire::connect(&Connect::new(V3, "raw")))
            .await
            .unwrap();
        let mut connack = [0; 4];
        raw.read_exact(&mut connack).await.unwrap();
        gateway.send_sigterm();
        assert_eq!(device.await_close(SOON).await, Some(0x8B));
        // An end without close_notify would be an error here.
        assert_eq!(raw.read(&mut connack).await.unwrap(), 0);
        drop((device, raw));
        assert_eq!(gateway.wait().await.code(), Some(0));
    });
}

#[test]
fn listeners_have_limits_of_their_own() {
    run(async {
        let authority = Authority::new();
        let server = authority.server("s");
        let small = listener("small", "mqtt", &server, "").replace(
            "protocol",
            "connections_max = 2\npacket_bytes_max = 1000\nprotocol",
        );
        let gateway = gateway(&[small, listener("other", "mqtt", &server, "")]).await;
        let (at, other) = (gateway.further[0], gateway.further[1]);
        let client = authority.client();
        let first = connect(&client, at, Connect::new(V5, "first"))
            .await
            .unwrap();
        let size = wire::Value::Four(1000);
        assert!(first.connack.contains(&(0x27, size)), "{:?}", first.connack);
        let mut second = connect(&client, at, Connect::new(V5, "second"))
            .await
            .unwrap();
        assert!(
            connect(&client, at, Connect::new(V5, "third"))
                .await
                .is_err()
        );
        connect(&client, other, Connect::new(V5, "third"))
            .await
            .unwrap();
        let large = wire::publish(V5, &Publish::new("a", 0, "x".repeat(2000)));
        second.send(&large).await.unwrap();
        assert_eq!(second.await_close(SOON).await, Some(0x95));
        eventually(SOON, "the place is free", || async {
            connect(&client, at, Connect::new(V5, "third")).await.ok()
        })
        .await;
        gateway.finish().await;
    });
}

#[test]
fn mistakes_in_a_listener_are_told_with_what_would_be_right() {
    let authority = Authority::new();
    let (server, other) = (authority.server("s"), authority.server("other"));
    let good = listener("tls", "mqtt", &server, "");
    let path = |signed: &std::path::Path| signed.display().to_string();
    let key = path(&server.key);
    let cases = [
        (
            good.replace(&key, "/no/such.key"),
            "tls.key: cannot read /no/such.key",
        ),
        (
            good.replace(&key, &path(&other.key)),
            "is not the key of the certificate",
        ),
        (
            good.replace(&key, &path(&server.certificate)),
            "has no key in it",
        ),
        (
            good.replace(&path(&server.certificate), &key),
            "has no certificate in it",
        ),
        (
            good.replace("protocol", "protocl"),
            "did you mean `listeners[0].protocol`?",
        ),
        (
            good.replace("key =", "kee ="),
            "did you mean `listeners[0].tls.key`?",
        ),
        (good.replace("127.0.0.1:0", "nowhere"), "listeners"),
        (
            good.replace("\"tls\"", "\"mqtt\""),
            "name \"mqtt\" is that of another listener",
        ),
        (good.replace("127.0.0.1:0", "0.0.0.0:0"), "is not loopback"),
        (
            good.replace("key =", "identity = \"username\", key ="),
            "tls.identity needs",
        ),
    ];
    for (config, expected) in cases {
        let ended = Gateway::run_to_end(&Options::config(&config));
        let line = ended.one_line(2);
        assert!(line.contains(expected), "{line}\nof\n{config}");
    }
}

#[test]
fn a_resumed_session_of_mqtt_does_not_depend_on_the_connection_under_it() {
    run(async {
        let authority = Authority::new();
        let gateway = gateway(&[listener("tls", "mqtt", &authority.server("s"), "")]).await;
        let client = authority.client();
        let connect_again = || {
            connect(
                &client,
                gateway.further[0],
                Connect::new(V5, "moves").persistent(),
            )
        };
        let device = connect_again().await.unwrap();
        drop(device);
        gateway.api().push_text("moves", "kept").await;
        let mut plain =
            Device::connect(gateway.mqtt(), Connect::new(V5, "moves").persistent()).await;
        assert!(plain.session_present);
        let kept = plain.next_publish().await;
        assert_eq!(kept.text(), "kept");
        let mut device = connect_again().await.unwrap();
        assert_eq!(device.take().await.text(), "kept");
        match plain.receive(SOON).await {
            Arrived::Packet(Packet::Disconnect { reason, .. }) => assert_eq!(reason, 0x8E),
            other => panic!("{other:?}"),
        }
        gateway.finish().await;
    });
}

/// A backend that answers every call over TLS; gives the first line of each.
async fn backend(server: &Signed) -> (SocketAddr, tokio::sync::mpsc::Receiver<String>) {
    let acceptor = server.acceptor();
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let (calls, called) = tokio::sync::mpsc::channel(100);
    tokio::spawn(async move {
        while let Ok((stream, _)) = socket.accept().await {
            // A caller that does not trust this server breaks off.
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut request = Vec::new();
            while !request.ends_with(b"hello") {
                match stream.read_u8().await {
                    Ok(byte) => request.push(byte),
                    Err(_) => break,
                }
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let line = request.lines().next().unwrap_or("").to_owned();
            _ = calls.send(line).await;
            let answer = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
            _ = stream.write_all(answer).await;
            _ = stream.shutdown().await;
        }
    });
    (address, called)
}

#[test]
fn a_backend_is_called_over_tls_if_its_authority_is_known() {
    run(async {
        let (authority, unknown) = (Authority::new(), Authority::new());
        let (known_at, mut known_calls) = backend(&authority.server("known")).await;
        let (other_at, mut other_calls) = backend(&unknown.server("other")).await;
        let rule = |name: &str, at: SocketAddr| {
            format!(
                "[[upstream.rules]]\nname = {name:?}\nfilter = \"up/{name}\"\nurl = \"https://localhost:{}/in\"\n\
                 ca = {:?}\nretry = {{ attempts = 1, initial = \"10ms\", max = \"10ms\" }}\n",
                at.port(),
                authority.file()
            )
        };
        let config = [rule("known", known_at), rule("other", other_at)].concat();
        let gateway = Gateway::start_with(Options::config(&config)).await;
        let mut device = Device::clean(gateway.mqtt(), V5, "meter").await;
        for topic in ["up/other", "up/known"] {
            assert_eq!(device.publish(Publish::new(topic, 1, "hello")).await, 0);
        }
        let call = tokio::time::timeout(SOON, known_calls.recv())
            .await
            .unwrap();
        assert_eq!(call.as_deref(), Some("POST /in HTTP/1.1"));
        eventually(SOON, "the other call is a dead letter", || async {
            let letters = gateway.api().get("/v1/dead-letters").await;
            letters.text.contains("certificate").then_some(())
        })
        .await;
        assert!(other_calls.try_recv().is_err(), "nothing was said to it");
        gateway.finish().await;
    });
}
