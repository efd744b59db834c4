//! Sections 3.1.2.5 and 3.1.3.2: wills.

use moorline_tests::device::Device;
use moorline_tests::wire::{Connect, V5, Value, Will, property};

use super::{forget, kept_for, pass, shared};
use crate::support::{QUIET, VERSIONS, run};

fn will(topic: &str) -> Will {
    Will {
        topic: topic.to_owned(),
        payload: b"gone".to_vec(),
        qos: 1,
        ..Will::default()
    }
}

fn delayed(topic: &str, seconds: u32) -> Will {
    Will {
        properties: vec![(property::WILL_DELAY, Value::Four(seconds))],
        ..will(topic)
    }
}

#[test]
fn a_will_is_retained_only_when_it_asks_for_it() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            for retain in [false, true] {
                let topic = format!("wills/retain/{version}");
                let mut watcher = Device::clean(gateway.mqtt(), version, "wills-retain-1").await;
                watcher.subscribe(&topic, 1).await;
                let will = Will {
                    retain,
                    ..will(&topic)
                };
                let connect = Connect::new(version, "wills-retain").with_will(will);
                drop(Device::connect(gateway.mqtt(), connect).await);
                assert!(!watcher.take().await.retain);
                let mut late = Device::clean(gateway.mqtt(), version, "wills-retain-2").await;
                late.subscribe(&topic, 1).await;
                if retain {
                    let got = late.take().await;
                    assert_eq!((got.text().as_str(), got.retain), ("gone", true));
                    let clear = moorline_tests::wire::Publish::new(&topic, 1, "").retained();
                    late.publish(clear).await;
                } else {
                    late.has_nothing().await;
                }
            }
        }
    });
}

#[test]
fn a_will_is_published_once_and_belongs_to_its_connection() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let topic = format!("wills/once/{version}");
            let id = format!("wills-once-{version}");
            let mut watcher = Device::clean(gateway.mqtt(), version, "wills-once-watcher").await;
            watcher.subscribe(&topic, 2).await;
            let connect = Connect::new(version, &id).persistent();
            drop(Device::connect(gateway.mqtt(), connect.clone().with_will(will(&topic))).await);
            assert_eq!(watcher.take().await.text(), "gone");
            // The same session without a will: nothing is left of the first.
            for _ in 0..2 {
                drop(Device::connect(gateway.mqtt(), connect.clone()).await);
            }
            // Its end has been seen to once the session can be had again.
            Device::connect(gateway.mqtt(), connect)
                .await
                .disconnect()
                .await;
            watcher.has_nothing().await;
            forget(&gateway, version, &id).await;
        }
    });
}

#[test]
fn the_properties_of_a_will_travel_with_it() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "wills-properties-watcher").await;
        watcher.subscribe("wills/properties", 1).await;
        let pair = |key: &str, value: &str| {
            (
                property::USER_PROPERTY,
                Value::Pair(key.into(), value.into()),
            )
        };
        let users = [pair("b", "1"), pair("a", "2"), pair("b", "1"), pair("", "")];
        let kept = [
            (0x01, Value::Byte(1)),
            (property::CONTENT_TYPE, Value::Text(b"text/plain".to_vec())),
            (property::RESPONSE_TOPIC, Value::Text("antwort/é".into())),
            (property::CORRELATION_DATA, Value::Text(vec![0, 1, 255])),
        ];
        let mut properties = users.to_vec();
        properties.extend(kept.clone());
        properties.push((property::MESSAGE_EXPIRY, Value::Four(100)));
        let will = Will {
            properties,
            ..will("wills/properties")
        };
        let connect = Connect::new(V5, "wills-properties").with_will(will);
        drop(Device::connect(gateway.mqtt(), connect).await);
        let got = watcher.take().await;
        for (id, value) in &kept {
            assert_eq!(got.property(*id), Some(value));
        }
        let expiry = got.property(property::MESSAGE_EXPIRY);
        assert!(matches!(expiry, Some(Value::Four(95..=100))), "{expiry:?}");
        assert_eq!(got.property(property::WILL_DELAY), None);
        let seen: Vec<_> = got
            .properties
            .into_iter()
            .filter(|(id, _)| *id == property::USER_PROPERTY)
            .collect();
        assert_eq!(seen, users, "in their order [MQTT-3.1.3-10]");
    });
}

#[test]
fn a_delayed_will_comes_no_later_than_the_end_of_its_session() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "wills-end-watcher").await;
        watcher.subscribe("wills/end", 1).await;
        // A session that ends with its connection, one that ends a second later, and one that a
        // clean start ends.
        for seconds in [0, 1] {
            let connect = kept_for("wills-end", seconds).with_will(delayed("wills/end", 600));
            drop(Device::connect(gateway.mqtt(), connect).await);
            assert_eq!(watcher.take().await.text(), "gone", "{seconds}");
        }
        let connect = kept_for("wills-end", 600).with_will(delayed("wills/end", 600));
        drop(Device::connect(gateway.mqtt(), connect).await);
        watcher.has_nothing().await;
        forget(&gateway, V5, "wills-end").await;
        assert_eq!(
            watcher.take().await.text(),
            "gone",
            "the clean start has ended the session"
        );
    });
}

#[test]
fn a_delayed_will_is_cancelled_by_a_return_in_time_and_only_by_that() {
    run(async {
        let gateway = shared().await;
        let id = "wills-delay";
        let mut watcher = Device::clean(gateway.mqtt(), V5, "wills-delay-watcher").await;
        watcher.subscribe("wills/delay", 1).await;
        let connect = kept_for(id, 600).with_will(delayed("wills/delay", 1));
        // Back at once, over the broken connection and after it.
        let first = Device::connect(gateway.mqtt(), connect.clone()).await;
        let second = Device::connect(gateway.mqtt(), connect.clone()).await;
        drop(second);
        drop(first);
        let back = Device::connect(gateway.mqtt(), kept_for(id, 600)).await;
        assert!(back.session_present);
        pass(std::time::Duration::from_secs(1) + QUIET).await;
        watcher.has_nothing().await;
        back.disconnect().await;
        // A DISCONNECT takes the will away, delayed or not.
        Device::connect(gateway.mqtt(), connect.clone())
            .await
            .disconnect()
            .await;
        // And nobody back in time.
        let broken = std::time::Instant::now();
        drop(Device::connect(gateway.mqtt(), connect).await);
        assert_eq!(watcher.take().await.text(), "gone");
        assert!(broken.elapsed() >= std::time::Duration::from_millis(900));
        watcher.has_nothing().await;
        forget(&gateway, V5, id).await;
    });
}

#[test]
fn the_will_of_a_displaced_connection_is_published() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let topic = format!("wills/displaced/{version}");
            let id = format!("wills-displaced-{version}");
            let mut watcher = Device::clean(gateway.mqtt(), V5, "wills-displaced").await;
            watcher.subscribe(&topic, 1).await;
            let connect = Connect::new(version, &id).with_will(will(&topic));
            let older = Device::connect(gateway.mqtt(), connect).await;
            let newer = Device::clean(gateway.mqtt(), version, &id).await;
            assert_eq!(watcher.take().await.text(), "gone");
            drop(older);
            newer.disconnect().await;
            watcher.has_nothing().await;
        }
    });
}
