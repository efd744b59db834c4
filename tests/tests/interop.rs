//! Clients that others wrote, over TCP and WebSocket.

use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::others::{Running, mosquitto, python, run as run_program};
use moorline_tests::wire::{Publish, V5};
use moorline_tests::{API_KEY, Gateway, soon};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};

use crate::support::{await_state, run};

#[test]
fn rumqttc_3_1_1_subscribes_publishes_and_gets_pushes() {
    run(async {
        let gateway = Gateway::start().await;
        let mut options = MqttOptions::new("rumqttc", "127.0.0.1", gateway.mqtt().port());
        options
            .set_keep_alive(Duration::from_secs(5))
            .set_clean_session(false);
        let (client, mut events) = AsyncClient::new(options, 10);
        for (filter, qos) in [
            ("q0", QoS::AtMostOnce),
            ("q1", QoS::AtLeastOnce),
            ("q2", QoS::ExactlyOnce),
        ] {
            client.subscribe(filter, qos).await.unwrap();
            client.publish(filter, qos, false, filter).await.unwrap();
        }
        client
            .publish("up/r", QoS::ExactlyOnce, false, "upstream")
            .await
            .unwrap();
        let mut got = Vec::new();
        let api = gateway.api();
        let mut pushed = None;
        while got.len() < 4 {
            match soon("an event", events.poll()).await.unwrap() {
                Event::Incoming(Packet::Publish(publish)) => {
                    got.push(String::from_utf8(publish.payload.to_vec()).unwrap());
                }
                Event::Incoming(Packet::ConnAck(_)) => {
                    pushed = Some(api.push_text("rumqttc", "push").await)
                }
                _ => {}
            }
        }
        got.sort();
        assert_eq!(got, ["push", "q0", "q1", "q2"]);
        let id = pushed.unwrap();
        let polling = tokio::spawn(async move { while events.poll().await.is_ok() {} });
        await_state(&api, &id, "delivered").await;
        let upstream = gateway.await_upstream(1).await;
        assert_eq!(upstream[0]["payload"], "upstream");
        polling.abort();
        gateway.finish().await;
    });
}

#[test]
fn rumqttc_5_0_subscribes_publishes_and_gets_pushes() {
    use rumqttc::v5::mqttbytes::QoS;
    use rumqttc::v5::mqttbytes::v5::Packet;
    use rumqttc::v5::{AsyncClient, Event, MqttOptions};
    run(async {
        let gateway = Gateway::start().await;
        let mut options = MqttOptions::new("rumqttc5", "127.0.0.1", gateway.mqtt().port());
        options
            .set_keep_alive(Duration::from_secs(5))
            .set_clean_start(true);
        let (client, mut events) = AsyncClient::new(options, 10);
        for (filter, qos) in [
            ("q0", QoS::AtMostOnce),
            ("q1", QoS::AtLeastOnce),
            ("q2", QoS::ExactlyOnce),
        ] {
            client.subscribe(filter, qos).await.unwrap();
            client.publish(filter, qos, false, filter).await.unwrap();
        }
        let api = gateway.api();
        let mut got = Vec::new();
        let mut message_id = None;
        let mut pushed = None;
        while got.len() < 4 {
            match soon("an event", events.poll()).await.unwrap() {
                Event::Incoming(Packet::Publish(publish)) => {
                    let text = String::from_utf8(publish.payload.to_vec()).unwrap();
                    if text == "push" {
                        let properties = publish.properties.unwrap().user_properties;
                        message_id = properties.into_iter().find(|(key, _)| key == "message-id");
                    }
                    got.push(text);
                }
                Event::Incoming(Packet::ConnAck(_)) => {
                    pushed = Some(api.push_text("rumqttc5", "push").await)
                }
                _ => {}
            }
        }
        got.sort();
        assert_eq!(got, ["push", "q0", "q1", "q2"]);
        assert_eq!(message_id.unwrap().1, pushed.unwrap());
        gateway.finish().await;
    });
}

#[test]
fn mosquitto_clients_talk_to_each_other_in_every_version_and_qos() {
    run(async {
        let gateway = Gateway::start().await;
        for version in ["mqttv311", "mqttv5"] {
            for qos in ["0", "1", "2"] {
                let topic = format!("m/{version}/{qos}");
                let subscriber = Running::start(&mut mosquitto(
                    "mosquitto_sub",
                    gateway.mqtt(),
                    &[
                        "-V", version, "-q", qos, "-t", "m/+/#", "-t", "ready", "-v", "-i", "sub",
                    ],
                ));
                // It does not say when it has its SUBACK.
                let mut asker = Device::clean(gateway.mqtt(), V5, "asker").await;
                let mut line = None;
                for round in 0..200 {
                    asker.publish(Publish::new("ready", 1, "?")).await;
                    line = subscriber.line_within(Duration::from_millis(100)).await;
                    if line.is_some() {
                        assert_eq!(line.as_deref(), Some("ready ?"), "{round}");
                        break;
                    }
                }
                assert!(line.is_some(), "it never had a subscription");
                asker.disconnect().await;
                let done = run_program(mosquitto(
                    "mosquitto_pub",
                    gateway.mqtt(),
                    &["-V", version, "-q", qos, "-t", &topic, "-m", "hello world"],
                ))
                .await;
                assert!(done.status.success(), "{done:?}");
                let mut line = subscriber.line().await;
                while line == "ready ?" {
                    line = subscriber.line().await;
                }
                assert_eq!(line, format!("{topic} hello world"));
                let id = gateway.api().push_text("sub", "pushed").await;
                assert_eq!(subscriber.line().await, "d/sub/push pushed");
                // Before it is ended: else the next one of that id gets the push once more.
                await_state(&gateway.api(), &id, "delivered").await;
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn mosquitto_sub_with_a_persistent_session_gets_what_it_missed() {
    run(async {
        let gateway = Gateway::start().await;
        let subscribe = ["-i", "keeper", "-c", "-q", "1", "-t", "news", "-E"];
        let done = run_program(mosquitto("mosquitto_sub", gateway.mqtt(), &subscribe)).await;
        assert!(done.status.success(), "{done:?}");
        for text in ["one", "two"] {
            let publish = ["-q", "1", "-t", "news", "-m", text];
            let done = run_program(mosquitto("mosquitto_pub", gateway.mqtt(), &publish)).await;
            assert!(done.status.success(), "{done:?}");
        }
        let resume = ["-i", "keeper", "-c", "-q", "1", "-t", "news", "-C", "2"];
        let done = run_program(mosquitto("mosquitto_sub", gateway.mqtt(), &resume)).await;
        assert_eq!(done.stdout, "one\ntwo\n", "{done:?}");
        gateway.finish().await;
    });
}

async fn paho(gateway: &Gateway, transport: &str, version: &str) {
    let port = if transport == "websockets" {
        gateway.ws().port()
    } else {
        gateway.mqtt().port()
    };
    let mut command = python("paho_client.py");
    command
        .args([
            transport,
            version,
            &port.to_string(),
            &format!("http://{}", gateway.http),
        ])
        .env("MOORLINE_API_KEY", API_KEY);
    let done = run_program(command).await;
    assert!(done.status.success(), "{}\n{}", done.stdout, done.stderr);
    assert!(done.stdout.ends_with("all passed\n"), "{}", done.stdout);
    let upstream = gateway.await_upstream(3).await;
    let payloads: Vec<_> = upstream.iter().map(|one| &one["payload"]).collect();
    assert_eq!(
        payloads,
        ["to the backend 0", "to the backend 1", "to the backend 2"]
    );
}

#[test]
fn paho_works_over_tcp_in_both_versions() {
    run(async {
        let gateway = Gateway::start().await;
        paho(&gateway, "tcp", "3.1.1").await;
        paho(&gateway, "tcp", "5.0").await;
        gateway.finish().await;
    });
}

#[test]
fn paho_works_over_websocket_in_both_versions() {
    run(async {
        let gateway = Gateway::start().await;
        paho(&gateway, "websockets", "3.1.1").await;
        paho(&gateway, "websockets", "5.0").await;
        gateway.finish().await;
    });
}
