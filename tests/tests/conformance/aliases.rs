//! Section 3.3.2.3.4: topic aliases, both ways.

use std::collections::HashMap;

use moorline_tests::Gateway;
use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Publish, V5, Value, property};

use super::shared;
use crate::support::run;

const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;

/// The Topic Alias Maximum of a CONNACK.
fn maximum(device: &Device) -> u16 {
    match device
        .connack
        .iter()
        .find(|(id, _)| *id == TOPIC_ALIAS_MAXIMUM)
    {
        Some((_, Value::Two(maximum))) => *maximum,
        None => 0,
        other => panic!("{other:?}"),
    }
}

fn alias(topic: &str, alias: u16, text: &str) -> Publish {
    Publish::new(topic, 1, text).with(property::TOPIC_ALIAS, Value::Two(alias))
}

#[test]
fn an_alias_of_a_device_stands_for_its_topic() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "aliases-watcher").await;
        watcher.subscribe("aliases/in/+", 1).await;
        let mut device = Device::clean(gateway.mqtt(), V5, "aliases-in").await;
        let maximum = maximum(&device);
        assert!(maximum > 0, "aliases are offered");
        // Each legal value can be set, used and set anew.
        for round in 0..2 {
            for value in 1..=maximum {
                let topic = format!("aliases/in/{value}-{round}");
                device.publish(alias(&topic, value, "named")).await;
                let got = watcher.take().await;
                assert_eq!(
                    (got.topic.as_str(), got.text().as_str()),
                    (topic.as_str(), "named")
                );
                assert_eq!(
                    got.property(property::TOPIC_ALIAS),
                    None,
                    "the device's own"
                );
            }
            for value in (1..=maximum).rev() {
                device.publish(alias("", value, "by alias")).await;
                let got = watcher.take().await;
                assert_eq!(got.topic, format!("aliases/in/{value}-{round}"));
            }
        }
    });
}

#[test]
fn aliases_end_with_their_connection() {
    run(async {
        let gateway = shared().await;
        let connect = Connect::new(V5, "aliases-end").persistent();
        let mut device = Device::connect(gateway.mqtt(), connect.clone()).await;
        device.publish(alias("aliases/end", 1, "x")).await;
        device.disconnect().await;
        let mut device = Device::connect(gateway.mqtt(), connect).await;
        assert!(device.session_present);
        let mut publish = alias("", 1, "x");
        publish.packet_id = 1;
        device.send(&wire::publish(V5, &publish)).await.unwrap();
        assert_eq!(
            device.await_close(SOON).await,
            Some(0x82),
            "it stands for nothing"
        );
        super::forget(&gateway, V5, "aliases-end").await;
        // Those of the server neither: the first message of a connection has its topic.
        let connect = Connect::new(V5, "aliases-end-out")
            .persistent()
            .with(TOPIC_ALIAS_MAXIMUM, Value::Two(10));
        for _ in 0..3 {
            let mut device = Device::connect(gateway.mqtt(), connect.clone()).await;
            device.subscribe("aliases/end/out", 1).await;
            device
                .publish(Publish::new("aliases/end/out", 1, "x"))
                .await;
            assert_eq!(device.take().await.topic, "aliases/end/out");
            device.disconnect().await;
        }
        super::forget(&gateway, V5, "aliases-end-out").await;
    });
}

#[test]
fn an_alias_beyond_what_was_offered_is_told() {
    run(async {
        let gateway = shared().await;
        let device = Device::clean(gateway.mqtt(), V5, "aliases-beyond").await;
        let beyond = maximum(&device).checked_add(1);
        drop(device);
        for value in [0, u16::MAX].into_iter().chain(beyond) {
            let mut device = Device::clean(gateway.mqtt(), V5, "aliases-beyond").await;
            let mut publish = alias("aliases/beyond", value, "x");
            publish.packet_id = 1;
            device.send(&wire::publish(V5, &publish)).await.unwrap();
            assert_eq!(device.await_close(SOON).await, Some(0x94), "{value}");
        }
    });
}

/// What a device with this Topic Alias Maximum gets, read as it has to be read.
async fn read_by_alias(gateway: &Gateway, connect: Connect, maximum: u16) -> usize {
    let mut device = Device::connect(gateway.mqtt(), connect).await;
    device.subscribe("aliases/out/+", 1).await;
    let mut known: HashMap<u16, String> = HashMap::new();
    let mut short = 0;
    for n in 0..60 {
        let topic = format!("aliases/out/{}", n % 4 * (n % 7));
        device
            .publish(Publish::new(&topic, n as u8 % 2, topic.as_str()))
            .await;
        let got = device.take().await;
        let topic = match got.property(property::TOPIC_ALIAS) {
            None => got.topic.clone(),
            Some(Value::Two(alias)) => {
                assert!((1..=maximum).contains(alias), "{alias} of {maximum}");
                if got.topic.is_empty() {
                    short += 1;
                    known[alias].clone()
                } else {
                    known.insert(*alias, got.topic.clone());
                    got.topic.clone()
                }
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(topic, got.text(), "the payload says the topic");
    }
    device.disconnect().await;
    short
}

#[test]
fn the_server_keeps_to_the_aliases_of_the_device() {
    run(async {
        let gateway = shared().await;
        for maximum in [None, Some(0), Some(1), Some(3), Some(u16::MAX)] {
            for persistent in [false, true] {
                let mut connect = Connect::new(V5, "aliases-out");
                if persistent {
                    connect = connect.persistent();
                }
                if let Some(maximum) = maximum {
                    connect = connect.with(TOPIC_ALIAS_MAXIMUM, Value::Two(maximum));
                }
                let short = read_by_alias(&gateway, connect, maximum.unwrap_or(0)).await;
                match maximum {
                    None | Some(0) => assert_eq!(short, 0),
                    // Not asked for by the text: it is what the property is for.
                    Some(maximum) => assert!(short > 0, "no alias of {maximum} was used"),
                }
                super::forget(&gateway, V5, "aliases-out").await;
            }
        }
    });
}
