//! Persistent sessions: what outlives the connection, and for how long.

use moorline_tests::Gateway;
use moorline_tests::device::Device;
use moorline_tests::wire::{self, Connect, Publish, V3, V5, Value, property};

use crate::support::{VERSIONS, await_waiting, resume, run};

#[test]
fn a_persistent_session_gets_what_was_published_while_it_was_away() {
    run(async {
        let mut gateway = Gateway::start().await;
        for version in VERSIONS {
            let id = format!("car-{version}");
            let mut device = resume(&gateway, version, &id).await;
            assert!(!device.session_present);
            device.subscribe("news/#", 2).await;
            device.subscribe(&format!("own/{version}"), 1).await;
            device.disconnect().await;
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        for n in 0..50 {
            publisher
                .publish(Publish::new("news/x", 1 + n % 2, n.to_string()))
                .await;
        }
        for version in VERSIONS {
            let mut device = resume(&gateway, version, &format!("car-{version}")).await;
            assert!(device.session_present);
            for n in 0..25 {
                let got = device.take().await;
                assert_eq!((got.text(), got.qos), (n.to_string(), 1 + n % 2));
            }
            device.disconnect().await;
        }
        gateway.sigterm().await;
        gateway.restart().await;
        for version in VERSIONS {
            let mut device = resume(&gateway, version, &format!("car-{version}")).await;
            assert!(device.session_present, "after the restart");
            for n in 25..50 {
                assert_eq!(device.take().await.text(), n.to_string());
            }
            device.has_nothing().await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            publisher
                .publish(Publish::new(&format!("own/{version}"), 1, "live"))
                .await;
            assert_eq!(
                device.take().await.text(),
                "live",
                "the subscription outlived the restart"
            );
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn what_was_not_acknowledged_comes_again_with_dup_and_the_same_packet_identifier() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let id = format!("car-{version}");
            let mut device = resume(&gateway, version, &id).await;
            device.subscribe("a", 1).await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
            for n in 0..3 {
                publisher.publish(Publish::new("a", 1, n.to_string())).await;
            }
            let first: Vec<Publish> = [
                device.next_publish().await,
                device.next_publish().await,
                device.next_publish().await,
            ]
            .into();
            // The second alone is acknowledged.
            device
                .send(&wire::puback(first[1].packet_id))
                .await
                .unwrap();
            device.ping().await;
            drop(device);
            let mut device = resume(&gateway, version, &id).await;
            for expected in [&first[0], &first[2]] {
                let again = device.take().await;
                assert_eq!(again.text(), expected.text());
                assert_eq!(again.packet_id, expected.packet_id, "[MQTT-4.4.0-1]");
                assert!(again.dup, "[MQTT-3.3.1-1]");
            }
            device.has_nothing().await;
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_clean_session_leaves_nothing_behind() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "car").await;
            device.subscribe("a", 1).await;
            device.disconnect().await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "pub").await;
            publisher.publish(Publish::new("a", 1, "missed")).await;
            let mut again = resume(&gateway, version, "car").await;
            assert!(!again.session_present);
            again.has_nothing().await;
            // For the next round: drop what `resume` made.
            drop(again);
            Device::clean(gateway.mqtt(), version, "car")
                .await
                .disconnect()
                .await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_session_ends_with_its_expiry_interval() {
    run(async {
        let gateway = Gateway::start().await;
        let connect = |clean_start| Connect {
            clean_start,
            ..Connect::new(V5, "car").with(property::SESSION_EXPIRY, Value::Four(1))
        };
        let mut device = Device::connect(gateway.mqtt(), connect(true)).await;
        device.subscribe("a", 1).await;
        device.disconnect().await;
        let back = Device::connect(gateway.mqtt(), connect(false)).await;
        assert!(back.session_present, "within the interval");
        back.disconnect().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publisher
            .publish(Publish::new("a", 1, "of the session"))
            .await;
        gateway.api().push_text("car", "of the backend").await;
        // The session's entry ends with it.
        await_waiting(&gateway.api(), "car", 1).await;
        let mut late = Device::connect(gateway.mqtt(), connect(false)).await;
        assert!(!late.session_present, "after the interval");
        assert_eq!(
            late.take().await.text(),
            "of the backend",
            "pushes belong to the client id"
        );
        late.has_nothing().await;
        gateway.finish().await;
    });
}

#[test]
fn a_disconnect_can_change_the_expiry_interval() {
    run(async {
        let gateway = Gateway::start().await;
        let device = resume(&gateway, V5, "car").await;
        let zero = vec![(property::SESSION_EXPIRY, Value::Four(0))];
        device.disconnect_with(0, &zero).await;
        assert!(!resume(&gateway, V5, "car").await.session_present);
        gateway.finish().await;
    });
}

#[test]
fn a_qos_2_publish_repeated_with_dup_is_one_message() {
    run(async {
        let gateway = Gateway::start().await;
        let mut subscriber = Device::clean(gateway.mqtt(), V5, "sub").await;
        subscriber.subscribe("a", 2).await;
        for version in VERSIONS {
            let mut device = resume(&gateway, version, "pub").await;
            let mut publish = Publish::new("a", 2, "once");
            publish.packet_id = 9;
            device
                .send(&wire::publish(version, &publish))
                .await
                .unwrap();
            device.await_pubrec(9).await;
            publish.dup = true;
            for _ in 0..2 {
                drop(device);
                device = resume(&gateway, version, "pub").await;
                assert!(device.session_present);
                device
                    .send(&wire::publish(version, &publish))
                    .await
                    .unwrap();
                device.await_pubrec(9).await;
            }
            device.send(&wire::pubrel(9)).await.unwrap();
            device
                .await_packet("a PUBCOMP", |packet| {
                    matches!(packet, wire::Packet::PubComp { packet_id: 9, .. }).then_some(())
                })
                .await;
            assert_eq!(subscriber.take().await.text(), "once");
            subscriber.has_nothing().await;
            // After the PUBREL the identifier stands for a new message.
            publish.dup = false;
            assert!(device.publish(publish).await < 0x80);
            assert_eq!(subscriber.take().await.text(), "once");
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_session_can_be_resumed_by_the_other_version() {
    run(async {
        let gateway = Gateway::start().await;
        let mut device = resume(&gateway, V3, "car").await;
        device.subscribe("a", 1).await;
        device.disconnect().await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "pub").await;
        publisher.publish(Publish::new("a", 1, "x")).await;
        let mut device = resume(&gateway, V5, "car").await;
        assert!(device.session_present);
        assert_eq!(device.take().await.text(), "x");
        gateway.finish().await;
    });
}

#[test]
fn what_was_acknowledged_does_not_come_again_on_a_fast_reconnect() {
    run(async {
        let gateway = Gateway::start().await;
        let api = gateway.api();
        for round in 0..20 {
            let mut device = Device::clean(gateway.mqtt(), V5, "quick").await;
            api.push_text("quick", &round.to_string()).await;
            assert_eq!(device.take().await.text(), round.to_string());
            device.disconnect().await;
        }
        let mut device = Device::clean(gateway.mqtt(), V5, "quick").await;
        device.has_nothing().await;
        gateway.finish().await;
    });
}
