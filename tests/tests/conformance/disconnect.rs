//! Sections 3.12 to 3.14: PINGREQ and DISCONNECT.

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Publish, V5, Value, Will, property};

use super::raw::Raw;
use super::{kept_for, shared};
use crate::support::{VERSIONS, run};

#[test]
fn every_pingreq_is_answered() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let connect = Connect::new(version, "disconnect-ping");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            raw.send(&[0xC0, 0, 0xC0, 0, 0xC0, 0]).await;
            for _ in 0..3 {
                let frame = raw.frame().await.unwrap();
                assert_eq!((frame.first, frame.body.len()), (0xD0, 0));
            }
        }
    });
}

#[test]
fn nothing_behind_a_disconnect_is_obeyed_and_the_server_closes() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "disconnect-watcher").await;
        watcher.subscribe("disconnect/behind", 1).await;
        for version in VERSIONS {
            let connect = Connect::new(version, "disconnect-behind");
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            let publish =
                |text: &str| wire::publish(version, &Publish::new("disconnect/behind", 0, text));
            let mut bytes = publish("before");
            bytes.extend(wire::disconnect(version, 0, &Vec::new()));
            bytes.extend(publish("behind"));
            raw.send(&bytes).await;
            assert_eq!(
                raw.frames_to_end().await,
                [],
                "a server answers no DISCONNECT"
            );
            assert_eq!(watcher.take().await.text(), "before");
            watcher.has_nothing().await;
        }
    });
}

#[test]
fn reserved_bits_of_a_disconnect_end_the_connection_with_its_will() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "disconnect-bits-watcher").await;
        watcher.subscribe("disconnect/bits", 1).await;
        for version in VERSIONS {
            let will = Will {
                topic: "disconnect/bits".into(),
                payload: b"gone".to_vec(),
                ..Will::default()
            };
            let connect = Connect::new(version, "disconnect-bits").with_will(will);
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            device.send(&[0xE1, 0]).await.unwrap();
            let told = (version == V5).then_some(0x81);
            assert_eq!(device.await_close(SOON).await, told);
            assert_eq!(watcher.take().await.text(), "gone", "it was no DISCONNECT");
        }
    });
}

#[test]
fn a_server_says_goodbye_once_and_last_and_without_a_session_expiry() {
    run(async {
        let gateway = shared().await;
        // Several things wrong at once: a bad packet, another behind it, then good ones.
        for bad in [
            &[0x00, 0x00][..],
            &[0x36, 7, 0, 1, b'a', 0, 1, 0, b'x'],
            &[0xF0, 2, 0x18, 0],
        ] {
            let connect = kept_for("disconnect-server", 60);
            let (mut raw, _) = Raw::connect(gateway.mqtt(), &connect).await;
            let bytes = [bad, bad, &wire::PINGREQ].concat();
            raw.send(&bytes).await;
            let frames = raw.frames_to_end().await;
            assert_eq!(frames.len(), 1, "{frames:02x?}");
            assert_eq!(frames[0].first, 0xE0);
            assert!(frames[0].body[0] >= 0x80);
            let properties = frames[0].body.get(2..).unwrap_or_default();
            assert_ne!(properties.first(), Some(&property::SESSION_EXPIRY));
        }
        super::forget(&gateway, V5, "disconnect-server").await;
    });
}

#[test]
fn a_disconnect_changes_the_session_expiry_but_cannot_make_one() {
    run(async {
        let gateway = shared().await;
        let id = "disconnect-expiry";
        let expiry = |seconds| vec![(property::SESSION_EXPIRY, Value::Four(seconds))];
        // Longer, shorter, gone.
        for (seconds, present) in [(7200, true), (60, true), (0, false)] {
            let device = Device::connect(gateway.mqtt(), kept_for(id, 3600)).await;
            device.disconnect_with(0, &expiry(seconds)).await;
            let back = Device::connect(gateway.mqtt(), kept_for(id, 3600)).await;
            assert_eq!(back.session_present, present, "{seconds}");
            back.disconnect().await;
        }
        super::forget(&gateway, V5, id).await;
        // From 0 to anything else is a Protocol Error.
        let mut device = Device::clean(gateway.mqtt(), V5, id).await;
        device
            .send(&wire::disconnect(V5, 0, &expiry(60)))
            .await
            .unwrap();
        assert_eq!(device.await_close(SOON).await, Some(0x82));
        let back = Device::connect(gateway.mqtt(), kept_for(id, 0)).await;
        assert!(!back.session_present);
        // From 0 to 0 is none.
        back.disconnect_with(0, &expiry(0)).await;
    });
}

#[test]
fn every_reason_that_a_client_may_give_ends_the_connection() {
    run(async {
        let gateway = shared().await;
        let mut watcher = Device::clean(gateway.mqtt(), V5, "disconnect-reason-watcher").await;
        watcher.subscribe("disconnect/reason", 1).await;
        for reason in [
            0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99,
        ] {
            let will = Will {
                topic: "disconnect/reason".into(),
                payload: vec![reason],
                ..Will::default()
            };
            let connect = Connect::new(V5, "disconnect-reason").with_will(will);
            let device = Device::connect(gateway.mqtt(), connect).await;
            let properties = vec![
                (0x1F, Value::Text(b"why not".to_vec())),
                (property::USER_PROPERTY, Value::Pair("k".into(), "v".into())),
            ];
            device.disconnect_with(reason, &properties).await;
            if reason > 0 {
                assert_eq!(
                    watcher.take().await.payload,
                    [reason],
                    "the will is published"
                );
            } else {
                watcher.has_nothing().await;
            }
        }
    });
}
