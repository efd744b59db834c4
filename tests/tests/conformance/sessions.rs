//! Sections 4.1 and 4.5: what belongs to a session, and how long.

use moorline_tests::device::Device;
use moorline_tests::wire::{Connect, Publish, V5, Value, property};

use super::{forget, kept_for, shared};
use crate::support::{VERSIONS, resume, run};

#[test]
fn a_session_without_expiry_lasts_as_long_as_its_connection() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "sessions-brief").await;
            device.subscribe("sessions/brief", 2).await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "sessions-brief-pub").await;
            publisher
                .publish(Publish::new("sessions/brief", 2, "1"))
                .await;
            let open = device.next_publish().await;
            for n in 2..5 {
                publisher
                    .publish(Publish::new("sessions/brief", 2, n.to_string()))
                    .await;
                assert_eq!(device.take().await.text(), n.to_string());
            }
            device.acknowledge(&open).await;
            device.has_nothing().await;
            drop(device);
            let back = resume(&gateway, version, "sessions-brief").await;
            assert!(!back.session_present, "it has ended with its connection");
            back.disconnect().await;
            forget(&gateway, version, "sessions-brief").await;
        }
    });
}

#[test]
fn a_message_is_added_to_every_session_that_matches() {
    run(async {
        let gateway = shared().await;
        let mut ids = Vec::new();
        for version in VERSIONS {
            for n in 0..5 {
                let id = format!("sessions-every-{version}-{n}");
                let mut device = resume(&gateway, version, &id).await;
                let filter = [
                    "sessions/every",
                    "sessions/+",
                    "sessions/every/#",
                    "+/every",
                    "sessions/#",
                ][n];
                device.subscribe(filter, 1).await;
                device.disconnect().await;
                ids.push((version, id));
            }
        }
        let mut publisher = Device::clean(gateway.mqtt(), V5, "sessions-every-pub").await;
        publisher
            .publish(Publish::new("sessions/every", 2, "x"))
            .await;
        publisher.disconnect().await;
        for (version, id) in ids {
            let mut device = resume(&gateway, version, &id).await;
            let mut texts = Vec::new();
            loop {
                let got = device.take().await;
                if got.topic == "sessions/every" {
                    texts.push((got.text(), got.qos));
                    break;
                }
            }
            assert_eq!(texts, [("x".to_owned(), 1)]);
            device.disconnect().await;
            forget(&gateway, version, &id).await;
        }
    });
}

#[test]
fn the_expiry_interval_is_that_of_the_last_connection() {
    run(async {
        let gateway = shared().await;
        let id = "sessions-last";
        Device::connect(gateway.mqtt(), kept_for(id, 600))
            .await
            .disconnect()
            .await;
        // Resumed without an interval: it ends with this connection.
        let connect = Connect {
            clean_start: false,
            ..Connect::new(V5, id)
        };
        let resumed = Device::connect(gateway.mqtt(), connect).await;
        assert!(resumed.session_present);
        resumed.disconnect().await;
        let late = Device::connect(gateway.mqtt(), kept_for(id, 0)).await;
        assert!(!late.session_present);
        late.disconnect().await;
        // A clean start with an interval makes one that lasts.
        let connect = Connect::new(V5, id).with(property::SESSION_EXPIRY, Value::Four(u32::MAX));
        Device::connect(gateway.mqtt(), connect)
            .await
            .disconnect()
            .await;
        let back = Device::connect(gateway.mqtt(), kept_for(id, 0)).await;
        assert!(back.session_present);
        back.disconnect().await;
    });
}

#[test]
fn an_expiry_interval_that_is_not_granted_is_told() {
    run(async {
        let gateway = shared().await;
        // A month is the most that the default configuration grants; never is more.
        for (asked, told) in [(600, None), (u32::MAX, Some(30 * 24 * 3600))] {
            let device = Device::connect(gateway.mqtt(), kept_for("sessions-told", asked)).await;
            let said = device
                .connack
                .iter()
                .find(|(id, _)| *id == property::SESSION_EXPIRY);
            assert_eq!(said.map(|(_, value)| value), told.map(Value::Four).as_ref());
            device.disconnect().await;
        }
        forget(&gateway, V5, "sessions-told").await;
    });
}

#[test]
fn qos_0_is_not_kept_for_a_device_that_is_away() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let id = format!("sessions-zero-{version}");
            let mut device = resume(&gateway, version, &id).await;
            device.subscribe(&id, 2).await;
            device.disconnect().await;
            let mut publisher = Device::clean(gateway.mqtt(), version, "sessions-zero-pub").await;
            for qos in [1, 0, 2] {
                publisher
                    .publish(Publish::new(&id, qos, qos.to_string()))
                    .await;
            }
            let mut device = resume(&gateway, version, &id).await;
            for qos in [1, 2] {
                let got = device.take().await;
                assert_eq!(
                    (got.text(), got.qos, got.dup),
                    (qos.to_string(), qos, false)
                );
            }
            device.has_nothing().await;
            device.disconnect().await;
            forget(&gateway, version, &id).await;
        }
    });
}
