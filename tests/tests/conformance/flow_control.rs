//! Section 4.9: how many messages may be on their way.

use moorline_tests::Gateway;
use moorline_tests::device::{Arrived, Device};
use moorline_tests::gateway::Options;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect, Packet, Publish, V5, Value, property};

use super::shared;
use crate::support::{QUIET, run};

/// Publishes that have arrived and are not acknowledged.
async fn arrived(device: &mut Device, count: usize) -> Vec<Publish> {
    let mut open = Vec::new();
    for _ in 0..count {
        open.push(device.next_publish().await);
    }
    device.has_nothing().await;
    open
}

#[test]
fn the_server_keeps_to_the_receive_maximum_in_every_qos() {
    run(async {
        let gateway = shared().await;
        let topic = "flow/control";
        for persistent in [false, true] {
            let connect =
                Connect::new(V5, "flow-narrow").with(property::RECEIVE_MAXIMUM, Value::Two(2));
            let connect = if persistent {
                connect.persistent()
            } else {
                connect
            };
            let mut device = Device::connect(gateway.mqtt(), connect).await;
            device.subscribe(topic, 2).await;
            let mut publisher = Device::clean(gateway.mqtt(), V5, "flow-narrow-pub").await;
            for n in 0..6_u8 {
                publisher
                    .publish(Publish::new(topic, 1 + n % 2, vec![n]))
                    .await;
            }
            let open = arrived(&mut device, 2).await;
            // Everything else goes on: QoS 0, SUBACK, PUBACK, PINGRESP.
            publisher.publish(Publish::new(topic, 0, "zero")).await;
            assert_eq!(device.next_publish().await.text(), "zero");
            device.subscribe("flow/other", 1).await;
            device.publish(Publish::new("flow/nobody", 1, "x")).await;
            // QoS 1: PUBACK makes room for one.
            device.send(&wire::puback(open[0].packet_id)).await.unwrap();
            let third = arrived(&mut device, 1).await;
            assert_eq!(third[0].payload, [2]);
            // QoS 2: PUBREC does not, PUBCOMP does.
            device.send(&wire::pubrec(open[1].packet_id)).await.unwrap();
            device
                .await_packet("a PUBREL", |packet| {
                    matches!(packet, Packet::PubRel { .. }).then_some(())
                })
                .await;
            device.has_nothing().await;
            device
                .send(&wire::pubcomp(open[1].packet_id))
                .await
                .unwrap();
            let fourth = arrived(&mut device, 1).await;
            assert_eq!((fourth[0].payload.as_slice(), fourth[0].qos), (&[3][..], 2));
            // A refusing PUBREC does too.
            let [high, low] = fourth[0].packet_id.to_be_bytes();
            device
                .send(&wire::packet(0x50, &[high, low, 0x80]))
                .await
                .unwrap();
            let fifth = arrived(&mut device, 1).await;
            device.acknowledge(&third[0]).await;
            device.acknowledge(&fifth[0]).await;
            assert_eq!(device.take().await.payload, [5]);
            device.has_nothing().await;
            device.disconnect().await;
            super::forget(&gateway, V5, "flow-narrow").await;
        }
    });
}

#[test]
fn what_comes_again_after_a_reconnect_is_within_the_receive_maximum() {
    run(async {
        let gateway = shared().await;
        let connect = |maximum| {
            Connect::new(V5, "flow-again")
                .persistent()
                .with(property::RECEIVE_MAXIMUM, Value::Two(maximum))
        };
        let mut device = Device::connect(gateway.mqtt(), connect(5)).await;
        device.subscribe("flow/again", 2).await;
        let mut publisher = Device::clean(gateway.mqtt(), V5, "flow-again-pub").await;
        for n in 0..5_u8 {
            publisher
                .publish(Publish::new("flow/again", 1 + n % 2, vec![n]))
                .await;
        }
        let sent = arrived(&mut device, 5).await;
        drop(device);
        let mut device = Device::connect(gateway.mqtt(), connect(1)).await;
        for before in &sent {
            let again = arrived(&mut device, 1).await.remove(0);
            assert_eq!((again.packet_id, again.dup), (before.packet_id, true));
            assert_eq!(again.payload, before.payload);
            device.acknowledge(&again).await;
        }
        device.has_nothing().await;
        device.disconnect().await;
        super::forget(&gateway, V5, "flow-again").await;
    });
}

#[test]
fn a_device_that_exceeds_the_receive_maximum_is_told() {
    run(async {
        let gateway = Gateway::start_with(Options::config("[mqtt]\nreceive_maximum = 3\n")).await;
        let mut device = Device::clean(gateway.mqtt(), V5, "flow-wide").await;
        assert!(
            device
                .connack
                .contains(&(property::RECEIVE_MAXIMUM, Value::Two(3)))
        );
        // Three at a time are fine, again and again; QoS 1 gives its place back with PUBACK.
        for _ in 0..3 {
            for id in 1..=3 {
                let mut publish = Publish::new("flow/wide", 2, "x");
                publish.packet_id = id;
                device.send(&wire::publish(V5, &publish)).await.unwrap();
                assert_eq!(device.await_pubrec(id).await & 0x80, 0);
            }
            // A repetition is no further one.
            let mut publish = Publish::new("flow/wide", 2, "x");
            (publish.packet_id, publish.dup) = (2, true);
            device.send(&wire::publish(V5, &publish)).await.unwrap();
            device.await_pubrec(2).await;
            for id in 1..=3 {
                device.send(&wire::pubrel(id)).await.unwrap();
            }
            for _ in 0..3 {
                let completed =
                    |packet: &Packet| matches!(packet, Packet::PubComp { .. }).then_some(());
                device.await_packet("a PUBCOMP", completed).await;
            }
        }
        for id in 1..=4 {
            let mut publish = Publish::new("flow/wide", 2, "x");
            publish.packet_id = id;
            device.send(&wire::publish(V5, &publish)).await.unwrap();
        }
        assert_eq!(device.await_close(SOON).await, Some(0x93));
        // 3.1.1 knows no such limit.
        let mut old = Device::clean(gateway.mqtt(), wire::V3, "flow-old").await;
        for id in 1..=10 {
            let mut publish = Publish::new("flow/wide", 2, "x");
            publish.packet_id = id;
            old.send(&wire::publish(wire::V3, &publish)).await.unwrap();
            old.await_pubrec(id).await;
        }
        assert_eq!(old.receive(QUIET).await, Arrived::Nothing);
        gateway.finish().await;
    });
}
