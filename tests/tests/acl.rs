//! What a device may do once it was asked who it is.

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Connect, Publish, V3, V5, Value, Will};
use moorline_tests::{Gateway, eventually, soon};

use crate::auth::{ann, answer, as_user, not_authorized, with_users};
use crate::support::{VERSIONS, metric, run, waiting};

fn bob(version: u8, id: &str) -> Connect {
    as_user(version, id, "bob", "bob's secret")
}

fn denied_subscribe(version: u8) -> u8 {
    if version == V5 { 0x87 } else { 0x80 }
}

async fn denied(gateway: &Gateway, action: &str) -> f64 {
    let text = gateway.metrics().await;
    let name = format!("moorline_acl_denied_total{{action=\"{action}\"}}");
    let line = text.lines().find(|line| line.starts_with(&name));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .unwrap_or(0.0)
}

#[test]
fn a_device_has_its_own_topics_and_upstream_and_nothing_else() {
    run(async {
        let (gateway, _folder) = with_users("").await;
        for version in VERSIONS {
            let mut device = Device::connect(gateway.mqtt(), ann(version, "car-7")).await;
            for own in ["d/car-7/#", "d/car-7/push", "$share/g/d/car-7/x"] {
                assert!(
                    device.subscribe(own, 1).await <= 1 || own.starts_with("$share"),
                    "{own}"
                );
            }
            for others in [
                "#",
                "+/#",
                "+/+/push",
                "d/#",
                "d/+/push",
                "d/car-8/push",
                "d/car-70/#",
                "+",
                "up/#",
                "news",
                "$SYS/#",
                "$share/g/#",
                "$share/g/d/car-8/push",
            ] {
                let code = device.subscribe(others, 0).await;
                let is_refused = code == denied_subscribe(version)
                    || (others.starts_with("$share") && code >= 0x80);
                assert!(is_refused, "{others}: {code:#x}");
            }
            for topic in ["d/car-7/note", "up/x", "req/service/path"] {
                for qos in [0, 1, 2] {
                    let code = device.publish(Publish::new(topic, qos, "mine")).await;
                    assert!(code < 0x80, "{topic}: {code:#x}");
                }
            }
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_denied_publish_is_told_or_dropped_and_never_obeyed() {
    run(async {
        let (gateway, _folder) = with_users("").await;
        let before = denied(&gateway, "publish").await;
        let mut v5 = Device::connect(gateway.mqtt(), ann(V5, "v5")).await;
        let mut v3 = Device::connect(gateway.mqtt(), ann(V3, "v3")).await;
        for topic in ["d/car-8/push", "news", "d"] {
            for qos in [1, 2] {
                assert_eq!(
                    v5.publish(Publish::new(topic, qos, "x").retained()).await,
                    0x87
                );
                assert_eq!(
                    v3.publish(Publish::new(topic, qos, "x").retained()).await,
                    0
                );
            }
            for device in [&mut v5, &mut v3] {
                device.publish(Publish::new(topic, 0, "x").retained()).await;
                device.ping().await;
            }
        }
        assert_eq!(denied(&gateway, "publish").await - before, 18.0);
        assert_eq!(waiting(&gateway.api(), "car-8").await, 0);
        let mut other = Device::connect(gateway.mqtt(), bob(V5, "car-8")).await;
        other.has_nothing().await;
        // What is allowed still goes through on the same connections.
        assert!(v5.publish(Publish::new("up/x", 1, "x")).await < 0x80);
        gateway.finish().await;
    });
}

#[test]
fn pushes_reach_a_device_whatever_the_rules_say() {
    run(async {
        let config = "[[acl.rules]]\npermission = \"deny\"\ntopics = [\"#\"]\n";
        let (gateway, _folder) = with_users(config).await;
        for version in VERSIONS {
            let mut device = Device::connect(gateway.mqtt(), ann(version, "car-7")).await;
            assert_eq!(
                device.subscribe("d/car-7/#", 0).await,
                denied_subscribe(version)
            );
            gateway.api().push_text("car-7", "all the same").await;
            assert_eq!(device.take().await.text(), "all the same");
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_will_is_judged_when_it_is_left() {
    run(async {
        let (gateway, _folder) = with_users("").await;
        for version in VERSIONS {
            let will = |topic: &str| Will {
                topic: topic.to_owned(),
                payload: b"gone".to_vec(),
                qos: 1,
                ..Will::default()
            };
            let other = ann(version, "car-7").with_will(will("d/car-8/push"));
            assert_eq!(answer(&gateway, &other).await, not_authorized(version));
            let own = ann(version, "car-7").with_will(will("up/gone"));
            assert_eq!(answer(&gateway, &own).await, 0);
        }
        assert_eq!(denied(&gateway, "will").await, 2.0);
        gateway.finish().await;
    });
}

#[test]
fn rules_are_looked_at_in_order_and_know_who_asks() {
    run(async {
        let config = r##"
[[acl.rules]]
permission = "deny"
action = "publish"
topics = ["news/official"]
[[acl.rules]]
permission = "allow"
topics = ["news/#", "rooms/{username}/{client_id}"]
[[acl.rules]]
permission = "allow"
action = "publish"
topics = ["d/+/push"]
users = ["bob"]
"##;
        let (gateway, _folder) = with_users(config).await;
        let mut car = Device::connect(gateway.mqtt(), ann(V5, "car-7")).await;
        assert_eq!(car.subscribe("news/#", 1).await, 1);
        assert_eq!(car.subscribe("rooms/ann/car-7", 1).await, 1);
        assert_eq!(car.subscribe("rooms/bob/car-7", 1).await, 0x87);
        assert_eq!(car.subscribe("rooms/+/car-7", 1).await, 0x87);
        let mut console = Device::connect(gateway.mqtt(), bob(V5, "console")).await;
        for (topic, qos) in [("news/local", 1), ("d/car-7/push", 1)] {
            let code = console.publish(Publish::new(topic, qos, topic)).await;
            assert!(code < 0x80, "{topic}: {code:#x}");
            assert_eq!(soon("the message", car.take()).await.text(), topic);
        }
        assert_eq!(
            console.publish(Publish::new("news/official", 1, "x")).await,
            0x87
        );
        assert_eq!(
            car.publish(Publish::new("d/console/push", 1, "x")).await,
            0x87
        );
        car.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn allowing_the_rest_leaves_other_devices_alone() {
    run(async {
        let (gateway, _folder) = with_users("[acl]\ndefault = \"allow\"\n").await;
        for version in VERSIONS {
            let mut device = Device::connect(gateway.mqtt(), ann(version, "car-7")).await;
            assert_eq!(device.subscribe("news/#", 1).await, 1);
            for others in ["#", "+/car-8/push", "d/car-8/push"] {
                assert_eq!(device.subscribe(others, 1).await, denied_subscribe(version));
            }
            device.publish(Publish::new("d/car-8/push", 1, "x")).await;
            device.disconnect().await;
        }
        assert_eq!(waiting(&gateway.api(), "car-8").await, 0);
        let text = gateway.metrics().await;
        assert!(metric(&text, "moorline_acl_denied_total") >= Some(8.0));
        gateway.finish().await;
    });
}

#[test]
fn a_resumed_session_loses_what_its_device_may_no_longer_have() {
    run(async {
        let config = r#"
[[acl.rules]]
permission = "allow"
topics = ["news/#"]
users = ["bob"]
[[acl.rules]]
permission = "allow"
topics = ["weather"]
"#;
        let (gateway, _folder) = with_users(config).await;
        for version in VERSIONS {
            let id = format!("car-{version}");
            let mut device = Device::connect(gateway.mqtt(), bob(version, &id).persistent()).await;
            assert_eq!(device.subscribe("news/+", 1).await, 1);
            assert_eq!(device.subscribe("weather", 1).await, 1);
            device.disconnect().await;
            let mut device = Device::connect(gateway.mqtt(), ann(version, &id).persistent()).await;
            assert!(device.session_present);
            let mut sender = Device::connect(gateway.mqtt(), bob(V5, "sender")).await;
            for topic in ["news/x", "weather"] {
                assert!(sender.publish(Publish::new(topic, 1, topic)).await < 0x80);
            }
            assert_eq!(device.take().await.text(), "weather");
            device.has_nothing().await;
            device.disconnect().await;
            // And not only on this connection: it is gone from the stored session.
            let device = Device::connect(gateway.mqtt(), bob(version, &id).persistent()).await;
            assert!(device.session_present);
            eventually(SOON, "one subscription is left", || async {
                let body = gateway.api().get(&format!("/v1/clients/{id}")).await.json();
                let list = &body["subscriptions"];
                let count = list
                    .as_array()
                    .map_or_else(|| list.as_u64(), |all| Some(all.len() as u64));
                (count == Some(1)).then_some(())
            })
            .await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_resumed_session_gets_no_more_of_what_is_retained_either() {
    const RETAINED: usize = 30;
    run(async {
        let config = r#"
[[acl.rules]]
permission = "allow"
topics = ["news/#"]
users = ["bob"]
"#;
        let (gateway, _folder) = with_users(config).await;
        let mut sender = Device::connect(gateway.mqtt(), bob(V5, "sender")).await;
        for number in 0..RETAINED {
            let news = Publish::new(&format!("news/{number}"), 1, "kept").retained();
            assert!(sender.publish(news).await < 0x80);
        }
        let one_at_a_time = bob(V5, "car").persistent().with(0x21, Value::Two(1));
        let mut device = Device::connect(gateway.mqtt(), one_at_a_time).await;
        assert_eq!(device.subscribe("news/#", 1).await, 1);
        device.next_publish().await;
        drop(device);
        let mut device = Device::connect(gateway.mqtt(), ann(V5, "car").persistent()).await;
        assert!(device.session_present);
        // What was handed over before is the session's.
        let mut taken = 0;
        while device.take_within(SOON / 4).await.is_some() {
            taken += 1;
        }
        assert!(taken < RETAINED / 2, "{taken} messages");
        gateway.finish().await;
    });
}
