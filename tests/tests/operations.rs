//! To be run: health, metrics, logs, a clean stop, the terminal device.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use moorline_tests::device::Device;
use moorline_tests::gateway::binary;
use moorline_tests::others::Running;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Publish, V3, V5};
use moorline_tests::{Arrived, Gateway, Options, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{await_state, metric, push_numbered, resume, run, to, warm_up};

#[test]
fn health_readiness_and_metrics_are_served() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        assert_eq!(api.get("/healthz").await.status, 200);
        assert_eq!(api.get("/readyz").await.status, 200);
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        let id = api.push_text("car", "x").await;
        car.take().await;
        await_state(&api, &id, "delivered").await;
        car.publish(Publish::new("up/x", 1, "y")).await;
        let text = gateway.metrics().await;
        assert_eq!(
            metric(&text, "moorline_mqtt_connections"),
            Some(1.0),
            "{text}"
        );
        for line in text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
        {
            assert!(
                line.starts_with("moorline_") || line.starts_with("process_"),
                "{line}"
            );
            assert!(!line.contains("car"), "no label names a device: {line}");
        }
        gateway.finish().await;
    });
}

#[test]
fn sigterm_under_load_loses_nothing() {
    run(async {
        let mut gateway = Gateway::start().await;
        warm_up(&gateway).await;
        let mut publishers = JoinSet::new();
        for n in 0..20 {
            let address = gateway.mqtt();
            publishers.spawn(async move {
                let mut device = Device::clean(
                    address,
                    if n % 2 == 0 { V3 } else { V5 },
                    &format!("car-{n}"),
                )
                .await;
                let mut acknowledged = Vec::new();
                let mut told = None;
                for number in 0_u64.. {
                    let mut publish = Publish::new("up/x", 1, format!("{n}:{number}"));
                    publish.packet_id = device.packet_id();
                    let id = publish.packet_id;
                    let bytes =
                        moorline_tests::wire::publish(if n % 2 == 0 { V3 } else { V5 }, &publish);
                    if device.send(&bytes).await.is_err() {
                        break;
                    }
                    match device.receive(SOON).await {
                        Arrived::Packet(moorline_tests::wire::Packet::PubAck {
                            packet_id,
                            reason: 0,
                        }) => {
                            assert_eq!(packet_id, id);
                            acknowledged.push(format!("{n}:{number}"));
                        }
                        Arrived::Packet(moorline_tests::wire::Packet::Disconnect {
                            reason,
                            ..
                        }) => {
                            told = Some(reason);
                            break;
                        }
                        Arrived::Closed => break,
                        other => panic!("{other:?}"),
                    }
                }
                (n, acknowledged, told)
            });
        }
        let mut pushers = JoinSet::new();
        for n in 0..10 {
            let api = gateway.api();
            pushers.spawn(async move {
                let mut accepted = Vec::new();
                for number in 0_u64.. {
                    let request = api.request(reqwest::Method::POST, "/v1/push");
                    match api
                        .try_send(request.json(&to(&format!("phone-{n}"), &number.to_string())))
                        .await
                    {
                        Ok(answer) if answer.status == 202 => accepted.push(number.to_string()),
                        Ok(answer) => {
                            assert_eq!(answer.status, 503, "{answer:?}");
                            break;
                        }
                        Err(_) => break,
                    }
                }
                (n, accepted)
            });
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let asked = Instant::now();
        gateway.sigterm().await;
        assert!(
            asked.elapsed() < Duration::from_secs(15),
            "stopped after {:?}",
            asked.elapsed()
        );
        let publishers = publishers.join_all().await;
        let pushers = pushers.join_all().await;
        gateway.restart().await;
        let upstream: std::collections::HashSet<String> = gateway
            .drain_upstream("checker")
            .await
            .iter()
            .map(|message| message["payload"].as_str().unwrap().to_owned())
            .collect();
        for (n, acknowledged, told) in publishers {
            assert!(!acknowledged.is_empty(), "no load");
            for one in acknowledged {
                assert!(upstream.contains(&one), "{one} had its PUBACK");
            }
            if n % 2 == 1 {
                assert_eq!(told, Some(0x8B), "5.0 is told that the server shuts down");
            }
        }
        for (n, accepted) in pushers {
            assert!(!accepted.is_empty(), "no load");
            let mut phone = Device::clean(gateway.mqtt(), V5, &format!("phone-{n}")).await;
            for number in accepted {
                assert_eq!(phone.take().await.text(), number, "phone-{n}");
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn pushes_accepted_before_sigterm_arrive_after_the_restart() {
    run(async {
        let mut gateway = Gateway::start().await;
        let mut car = resume(&gateway, V5, "car").await;
        push_numbered(&gateway.api(), "car", 0..200).await;
        for number in 0..100 {
            assert_eq!(car.take().await.text(), number.to_string());
        }
        car.ping().await;
        gateway.sigterm().await;
        drop(car);
        gateway.restart().await;
        let mut car = resume(&gateway, V5, "car").await;
        for number in 100..200 {
            assert_eq!(car.take().await.text(), number.to_string());
        }
        car.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn sigterm_answers_long_polls_and_closes_idle_devices_promptly() {
    run(async {
        let mut gateway = Gateway::start().await;
        let mut idle = Vec::new();
        for n in 0..50 {
            idle.push(Device::clean(gateway.mqtt(), V5, &format!("idle-{n}")).await);
        }
        let api = gateway.api();
        let poll = tokio::spawn(async move { api.get("/v1/upstream?consumer=x&wait=50s").await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        let asked = Instant::now();
        gateway.sigterm().await;
        assert!(
            asked.elapsed() < Duration::from_secs(10),
            "stopped after {:?}",
            asked.elapsed()
        );
        let answer = poll.await.unwrap();
        assert!(matches!(answer.status, 200 | 503), "{answer:?}");
        for device in &mut idle {
            assert_eq!(device.await_close(SOON).await, Some(0x8B));
        }
    });
}

#[test]
fn interrupting_it_on_a_terminal_is_a_clean_stop_too() {
    run(async {
        let mut gateway = Gateway::start().await;
        gateway.signal(rustix::process::Signal::INT);
        assert_eq!(gateway.wait().await.code(), Some(0));
    });
}

#[test]
fn logs_are_json_when_asked_for() {
    run(async {
        let gateway = Gateway::start_with(Options::config(
            "[log]\nformat = \"json\"\nlevel = \"debug\"\n",
        ))
        .await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car-7").await;
        let id = gateway.api().push_text("car-7", "secret text").await;
        car.take().await;
        car.disconnect().await;
        await_state(&gateway.api(), &id, "delivered").await;
        let lines: Vec<String> = gateway
            .log()
            .iter()
            .filter_map(|line| line.split_once("log: "))
            .map(|(_, line)| line.to_owned())
            .collect();
        assert!(!lines.is_empty());
        for line in &lines {
            let value: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
            assert!(
                value["level"].is_string() && value["timestamp"].is_string(),
                "{line}"
            );
        }
        assert!(
            lines.iter().any(|line| line.contains("car-7")),
            "lines name the client: {lines:#?}"
        );
        assert!(
            !lines.iter().any(|line| line.contains("secret text")),
            "no payload is logged"
        );
        assert!(
            !gateway
                .log()
                .iter()
                .any(|line| line.contains(moorline_tests::API_KEY)),
            "no key is logged"
        );
        gateway.finish().await;
    });
}

#[test]
fn the_terminal_device_prints_pushes_and_sends_lines_upstream() {
    run(async {
        let gateway = Gateway::start().await;
        let mut terminal = Running::start(Command::new(binary()).args([
            "device",
            "phone-1",
            "--mqtt",
            &gateway.mqtt().to_string(),
        ]));
        eventually(SOON, "it is online", || async {
            (gateway.api().get("/v1/clients/phone-1").await.json()["online"] == true).then_some(())
        })
        .await;
        gateway.api().push_text("phone-1", "hello there").await;
        terminal.line_with("hello there").await;
        let mut input = terminal.stdin();
        writeln!(input, "first line").unwrap();
        writeln!(input, "second line").unwrap();
        let messages = gateway.await_upstream(2).await;
        assert_eq!(messages[0]["payload"], "first line");
        assert_eq!(messages[1]["payload"], "second line");
        assert_eq!(messages[0]["topic"], "up/phone-1");
        drop(terminal);
        gateway.finish().await;
    });
}

#[test]
fn an_http_caller_that_does_not_finish_its_request_is_closed() {
    run(async {
        let config = "[http]\nrequest_timeout = \"1s\"\nconnections_max = 2\n";
        let gateway = Gateway::start_with(Options::config(config)).await;
        let head = "POST /v1/push HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
        let key = moorline_tests::gateway::API_KEY;
        let body = format!("{head}Authorization: Bearer {key}\r\nContent-Length: 9\r\n\r\n{{");
        let mut slow = Vec::new();
        for bytes in [head, &body] {
            let mut caller = TcpStream::connect(gateway.http).await.unwrap();
            caller.write_all(bytes.as_bytes()).await.unwrap();
            slow.push(caller);
        }
        // Both places are taken: this one waits for the first that is given up.
        assert_eq!(gateway.api().get("/healthz").await.status, 200);
        let mut answers = Vec::new();
        for mut caller in slow {
            let mut answer = String::new();
            // A reset is an end as well.
            let _ = tokio::time::timeout(SOON, caller.read_to_string(&mut answer))
                .await
                .unwrap();
            answers.push(answer);
        }
        assert!(
            answers[1].contains("the body did not arrive within 1s"),
            "{answers:?}"
        );
        gateway.finish().await;
    });
}
