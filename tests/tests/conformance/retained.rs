//! Section 3.3.1.3: retained messages.

use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::wire::{Publish, V3, V5, Value, property};

use super::{pass, shared};
use crate::support::{VERSIONS, run};

#[test]
fn a_message_without_retain_leaves_the_retained_one_alone() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let topic = format!("retained/alone/{version}");
            let mut device = Device::clean(gateway.mqtt(), version, "retained-alone").await;
            device
                .publish(Publish::new(&topic, 1, "kept").retained())
                .await;
            for text in ["passing", ""] {
                device.publish(Publish::new(&topic, 1, text)).await;
            }
            device.subscribe(&topic, 1).await;
            let got = device.take().await;
            assert_eq!((got.text().as_str(), got.retain), ("kept", true));
            device.has_nothing().await;
            device.publish(Publish::new(&topic, 1, "").retained()).await;
        }
    });
}

#[test]
fn the_last_retained_message_is_the_one_whatever_its_qos() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let topic = format!("retained/last/{version}");
            let mut device = Device::clean(gateway.mqtt(), version, "retained-last").await;
            for (text, qos) in [("1", 2), ("2", 0), ("3", 1), ("4", 0)] {
                device
                    .publish(Publish::new(&topic, qos, text).retained())
                    .await;
            }
            let mut late = Device::clean(gateway.mqtt(), version, "retained-last-sub").await;
            late.subscribe(&topic, 2).await;
            let got = late.take().await;
            assert_eq!((got.text().as_str(), got.qos, got.retain), ("4", 0, true));
            late.has_nothing().await;
            device.publish(Publish::new(&topic, 0, "").retained()).await;
        }
    });
}

#[test]
fn clearing_a_retained_message_is_told_to_those_who_are_subscribed_and_stores_nothing() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let topic = format!("retained/clear/{version}");
            let mut live = Device::clean(gateway.mqtt(), version, "retained-clear-sub").await;
            live.subscribe(&topic, 1).await;
            let mut device = Device::clean(gateway.mqtt(), version, "retained-clear").await;
            for text in ["kept", "", ""] {
                device
                    .publish(Publish::new(&topic, 1, text).retained())
                    .await;
                let got = live.take().await;
                assert_eq!((got.text().as_str(), got.retain), (text, false));
            }
            device.subscribe(&topic, 1).await;
            device.has_nothing().await;
        }
    });
}

#[test]
fn retained_messages_do_not_end_with_the_session_of_their_publisher() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let topic = format!("retained/survives/{version}");
            let mut device = Device::clean(gateway.mqtt(), version, "retained-survives").await;
            device
                .publish(Publish::new(&topic, 1, "kept").retained())
                .await;
            device.disconnect().await;
            super::forget(&gateway, version, "retained-survives").await;
            let mut late = Device::clean(gateway.mqtt(), version, "retained-survives-sub").await;
            late.subscribe(&topic, 0).await;
            assert_eq!(late.take().await.text(), "kept");
            late.publish(Publish::new(&topic, 1, "").retained()).await;
        }
    });
}

#[test]
fn a_repeated_subscription_gets_the_retained_messages_again() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let topic = format!("retained/again/{version}");
            let mut device = Device::clean(gateway.mqtt(), version, "retained-again").await;
            device
                .publish(Publish::new(&topic, 1, "kept").retained())
                .await;
            for qos in [1, 0, 2] {
                device.subscribe(&topic, qos).await;
                let got = device.take().await;
                assert_eq!((got.text().as_str(), got.retain), ("kept", true));
                assert_eq!(got.qos, qos.min(1));
                device.has_nothing().await;
            }
            device.publish(Publish::new(&topic, 1, "").retained()).await;
        }
    });
}

#[test]
fn every_matching_subscription_of_a_subscribe_gets_its_retained_messages() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let prefix = format!("retained/many/{version}");
            let mut device = Device::clean(gateway.mqtt(), version, "retained-many").await;
            for name in ["a", "b", "b/c"] {
                let topic = format!("{prefix}/{name}");
                device
                    .publish(Publish::new(&topic, 1, name).retained())
                    .await;
            }
            let filters = [format!("{prefix}/+"), format!("{prefix}/b/#")];
            let asked = [(filters[0].as_str(), 1), (filters[1].as_str(), 1)];
            device.subscribe_with(&Vec::new(), &asked).await;
            let mut got = Vec::new();
            for _ in 0..4 {
                got.push(device.take().await.text());
            }
            got.sort();
            // As if there had been two SUBSCRIBE: `b` matches both.
            assert_eq!(got, ["a", "b", "b", "b/c"]);
            device.has_nothing().await;
            for name in ["a", "b", "b/c"] {
                let topic = format!("{prefix}/{name}");
                device.publish(Publish::new(&topic, 1, "").retained()).await;
            }
        }
    });
}

#[test]
fn a_retained_message_grows_older_and_ends_with_its_expiry() {
    run(async {
        let gateway = shared().await;
        let mut device = Device::clean(gateway.mqtt(), V5, "retained-expiry").await;
        for (name, seconds) in [("short", 1), ("long", 100)] {
            let publish = Publish::new(&format!("retained/expiry/{name}"), 1, name)
                .retained()
                .with(property::MESSAGE_EXPIRY, Value::Four(seconds));
            device.publish(publish).await;
        }
        pass(Duration::from_millis(1500)).await;
        for version in [V3, V5] {
            let mut late = Device::clean(gateway.mqtt(), version, "retained-expiry-sub").await;
            late.subscribe("retained/expiry/+", 1).await;
            let got = late.take().await;
            assert_eq!(got.text(), "long");
            if version == V5 {
                let left = got.property(property::MESSAGE_EXPIRY);
                assert!(matches!(left, Some(Value::Four(80..=99))), "{left:?}");
            }
            late.has_nothing().await;
        }
        device
            .publish(Publish::new("retained/expiry/long", 1, "").retained())
            .await;
    });
}

#[test]
fn what_a_retained_message_says_beside_its_payload_is_kept_with_it() {
    run(async {
        let gateway = shared().await;
        let mut device = Device::clean(gateway.mqtt(), V5, "retained-properties").await;
        let pair = |text: &str| Value::Pair("k".into(), text.into());
        let kept = [
            (0x01, Value::Byte(1)),
            (property::CONTENT_TYPE, Value::Text(b"text/plain".to_vec())),
            (property::RESPONSE_TOPIC, Value::Text(b"answer".to_vec())),
            (property::CORRELATION_DATA, Value::Text(vec![0, 255])),
            (property::USER_PROPERTY, pair("2")),
            (property::USER_PROPERTY, pair("1")),
        ];
        let mut publish = Publish::new("retained/properties", 1, "x").retained();
        publish.properties = kept.to_vec();
        device.publish(publish).await;
        let identifier = vec![(property::SUBSCRIPTION_ID, Value::Var(9))];
        device
            .subscribe_with(&identifier, &[("retained/properties", 1)])
            .await;
        let got = device.take().await;
        for (id, value) in &kept[..4] {
            assert_eq!(got.property(*id), Some(value));
        }
        let users: Vec<_> = got
            .properties
            .iter()
            .filter(|(id, _)| *id == property::USER_PROPERTY)
            .collect();
        assert_eq!(users, [&kept[4], &kept[5]]);
        assert_eq!(
            got.property(property::SUBSCRIPTION_ID),
            Some(&Value::Var(9))
        );
        device
            .publish(Publish::new("retained/properties", 1, "").retained())
            .await;
    });
}
