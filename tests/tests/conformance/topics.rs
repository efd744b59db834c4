//! Section 4.7: topic names and filters.

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Publish, V5};

use super::shared;
use crate::support::{VERSIONS, run};

#[test]
fn topics_are_matched_as_they_are_written() {
    run(async {
        let gateway = shared().await;
        // Pairs that look alike: case, composed and decomposed é, an ideographic space, a byte
        // order mark, empty levels, a dot segment, an escape.
        let topics = [
            "topics/Same",
            "topics/same",
            "topics/caf\u{E9}",
            "topics/cafe\u{301}",
            "topics/a b",
            "topics/a\u{3000}b",
            "topics/\u{FEFF}x",
            "topics/x",
            "topics//x",
            "topics/x/",
            "/topics/x",
            "topics/./x",
            "topics/%78",
            "topics/\u{1F600}",
        ];
        for version in VERSIONS {
            let mut publisher = Device::clean(gateway.mqtt(), version, "topics-same-pub").await;
            for mine in topics {
                let mut device = Device::clean(gateway.mqtt(), version, "topics-same").await;
                device.subscribe(mine, 1).await;
                for topic in topics {
                    publisher.publish(Publish::new(topic, 1, topic)).await;
                }
                let got = device.take().await;
                assert_eq!((got.topic.as_str(), got.text().as_str()), (mine, mine));
                device.has_nothing().await;
            }
        }
    });
}

#[test]
fn wildcards_stand_alone_in_their_level_and_hash_stands_last() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            for bad in [
                "sport/tennis#",
                "sport/#/x",
                "##",
                "#/",
                "sport+",
                "+sport/x",
                "a/b+/c",
                "++",
                "",
            ] {
                for unsubscribe in [false, true] {
                    let mut device = Device::clean(gateway.mqtt(), version, "topics-bad").await;
                    let bytes = if unsubscribe {
                        wire::unsubscribe(version, 1, &[bad])
                    } else {
                        wire::subscribe(version, 1, &Vec::new(), &[(bad, 0)])
                    };
                    device.send(&bytes).await.unwrap();
                    let told = device.await_close(SOON).await;
                    assert_eq!(told, (version == V5).then_some(0x8F), "{bad:?}");
                }
            }
            let mut device = Device::clean(gateway.mqtt(), version, "topics-good").await;
            for good in [
                "topics/+/good/#",
                "+/topics/+",
                "#",
                "+",
                "/",
                "+/+/+",
                "topics/good",
            ] {
                assert_eq!(device.subscribe(good, 1).await, 1, "{good}");
            }
        }
    });
}

#[test]
fn a_topic_may_be_as_long_as_a_string_can_be() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "topics-long").await;
            let longest = "x".repeat(65_535);
            assert_eq!(device.subscribe(&longest, 1).await, 1);
            device.publish(Publish::new(&longest, 1, "x")).await;
            assert_eq!(device.take().await.topic.len(), 65_535);
        }
    });
}

#[test]
fn topics_with_a_dollar_are_hidden_from_leading_wildcards() {
    run(async {
        let gateway = shared().await;
        for version in VERSIONS {
            let mut device = Device::clean(gateway.mqtt(), version, "topics-dollar").await;
            for filter in ["#", "+/monitor/topics", "/#", "+/#"] {
                device.subscribe(filter, 0).await;
            }
            let mut other = Device::clean(gateway.mqtt(), version, "topics-dollar-pub").await;
            // Devices may not publish there at all, and nothing of it leaks.
            for topic in ["$SYS/monitor/topics", "$topics/monitor/topics", "$"] {
                other.publish(Publish::new(topic, 1, "x")).await;
            }
            other
                .publish(Publish::new("topics/dollar/end", 1, "end"))
                .await;
            loop {
                let got = device.take().await;
                assert!(!got.topic.starts_with('$'), "{}", got.topic);
                if got.topic == "topics/dollar/end" {
                    break;
                }
            }
        }
    });
}
