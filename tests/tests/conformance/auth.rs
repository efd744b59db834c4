//! Sections 3.15 and 4.12: AUTH.

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Connect, V5};

use super::raw::Raw;
use super::shared;
use crate::support::run;

#[test]
fn auth_without_a_method_ends_the_connection() {
    run(async {
        let gateway = shared().await;
        let cases: [(&str, &[u8]); 5] = [
            ("reserved flags", &[0xF1, 0]),
            ("no method", &[0xF0, 2, 0x18, 0]),
            ("success from a client", &[0xF0, 0]),
            ("continue", &[0xF0, 6, 0x18, 4, 0x15, 0, 1, b'm']),
            ("re-authenticate", &[0xF0, 6, 0x19, 4, 0x15, 0, 1, b'm']),
        ];
        for (name, bytes) in cases {
            let mut device = Device::clean(gateway.mqtt(), V5, "auth-none").await;
            device.send(bytes).await.unwrap();
            let told = device.await_close(SOON).await;
            assert!(
                matches!(told, Some(0x81 | 0x82 | 0x8C)),
                "{name}: {told:x?}"
            );
        }
    });
}

#[test]
fn a_server_speaks_of_authentication_only_to_who_asked_for_it() {
    run(async {
        let gateway = shared().await;
        let connect = Connect::new(V5, "auth-silent");
        let (mut raw, connack) = Raw::connect(gateway.mqtt(), &connect).await;
        let properties = &connack.body[3..];
        assert!(!properties.windows(3).any(|part| part == [0x15, 0, 1]));
        let frames = raw.frames_to_pong().await;
        assert_eq!(frames, [], "no AUTH either");
        let device = Device::connect(gateway.mqtt(), connect).await;
        assert!(
            device
                .connack
                .iter()
                .all(|(id, _)| ![0x15, 0x16].contains(id))
        );
    });
}
