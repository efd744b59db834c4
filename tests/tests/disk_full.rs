//! A disk without room: pushes are refused, never falsely accepted, and all goes on when there is room again.

use std::collections::BTreeSet;
use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::disk::SmallDisk;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{V3, V5};
use moorline_tests::{Api, Gateway, Options, eventually};
use serde_json::json;

use crate::support::{resume, run, to};

const DISK_MEBIBYTES: u32 = 200;

/// A small disk, or a loud note that this machine allows none.
fn disk(mebibytes: u32) -> Option<SmallDisk> {
    match SmallDisk::mount(mebibytes) {
        Ok(disk) => Some(disk),
        Err(problem) => {
            eprintln!("SKIPPED: this machine does not let a test mount a tmpfs: {problem}");
            None
        }
    }
}

async fn push_number(api: &Api, number: usize) -> bool {
    let answer = api.push(&to("car", &number.to_string())).await;
    match answer.status {
        202 => true,
        503 => {
            answer.problem(503);
            let seconds: u64 = answer
                .header("retry-after")
                .parse()
                .expect("Retry-After in seconds");
            assert!((1..=60).contains(&seconds));
            false
        }
        _ => panic!("{answer:?}"),
    }
}

async fn full_and_empty_again(options: Options, disk: &SmallDisk, fill: impl Fn(&SmallDisk)) {
    let data = disk.path().join("data");
    let mut gateway = Gateway::start_with(options.data_dir(&data)).await;
    let api = gateway.api();
    let mut connected = Device::clean(gateway.mqtt(), V3, "watcher").await;
    connected.subscribe("chat", 0).await;
    let mut publisher = Device::clean(gateway.mqtt(), V5, "publisher").await;
    let mut accepted = BTreeSet::new();
    for number in 0..100 {
        assert!(push_number(&api, number).await);
        accepted.insert(number);
    }
    assert_eq!(api.get("/readyz").await.status, 200);
    fill(disk);
    let mut number = 100;
    let mut refused = 0;
    let started = std::time::Instant::now();
    // What is on the disk already may take a few more.
    while refused < 20 {
        assert!(
            started.elapsed() < 3 * SOON,
            "the disk is full and pushes are accepted"
        );
        if push_number(&api, number).await {
            accepted.insert(number);
        } else {
            refused += 1;
        }
        number += 1;
    }
    assert_eq!(api.get("/healthz").await.status, 200);
    eventually(SOON, "not ready", || async {
        (api.get("/readyz").await.status == 503).then_some(())
    })
    .await;
    // Who is connected stays so, and what needs no disk goes on.
    publisher
        .publish(moorline_tests::wire::Publish::new("chat", 0, "still here"))
        .await;
    assert_eq!(connected.take().await.text(), "still here");
    eventually(SOON, "a log line says what is wrong", || async {
        let says = |line: &String| {
            let line = line.to_lowercase();
            line.contains("error") && line.contains("disk")
        };
        gateway.log().iter().any(says).then_some(())
    })
    .await;
    disk.make_room();
    eventually(SOON, "a push is accepted again", || {
        number += 1;
        let (api, number) = (api.clone(), number);
        async move { push_number(&api, number).await.then_some(()) }
    })
    .await;
    accepted.insert(number);
    eventually(SOON, "ready again", || async {
        (api.get("/readyz").await.status == 200).then_some(())
    })
    .await;
    gateway.kill9();
    gateway.restart().await;
    let mut car = resume(&gateway, V5, "car").await;
    let mut got = BTreeSet::new();
    let mut highest = None;
    while !accepted.is_subset(&got) {
        let number: usize = car.take().await.text().parse().unwrap();
        assert!(Some(number) > highest, "{number} came after {highest:?}");
        highest = Some(number);
        got.insert(number);
    }
    gateway.finish().await;
}

#[test]
fn below_the_declared_free_space_pushes_get_503_until_there_is_room() {
    run(async {
        let Some(disk) = disk(DISK_MEBIBYTES) else {
            return;
        };
        let options = Options::default()
            .expecting_error("disk")
            .expecting_error("store")
            .expecting_error("space");
        full_and_empty_again(options, &disk, |disk| disk.fill_but(32 << 20)).await;
    });
}

#[test]
fn a_disk_that_is_really_full_loses_nothing_that_was_accepted() {
    run(async {
        let Some(disk) = disk(DISK_MEBIBYTES) else {
            return;
        };
        let options = Options::config("[store]\nmin_free_bytes = 0\n")
            .expecting_error("disk")
            .expecting_error("store")
            .expecting_error("space");
        full_and_empty_again(options, &disk, SmallDisk::fill).await;
    });
}

#[test]
fn upstream_pubacks_wait_or_refuse_while_the_disk_is_full() {
    run(async {
        let Some(disk) = disk(DISK_MEBIBYTES) else {
            return;
        };
        let options = Options::default()
            .data_dir(&disk.path().join("data"))
            .expecting_error("disk")
            .expecting_error("store")
            .expecting_error("space");
        let mut gateway = Gateway::start_with(options).await;
        let mut acknowledged = 0;
        disk.fill_but(32 << 20);
        let mut number = 0;
        eventually(
            3 * SOON,
            "an upstream publish is not acknowledged with success",
            || {
                number += 1;
                let address = gateway.mqtt();
                let publish = moorline_tests::wire::Publish::new("up/x", 1, number.to_string());
                async move {
                    let mut device = Device::clean(address, V5, "car").await;
                    let mut publish = publish;
                    publish.packet_id = 1;
                    device
                        .send(&moorline_tests::wire::publish(V5, &publish))
                        .await
                        .unwrap();
                    match device.receive(Duration::from_secs(1)).await {
                        moorline_tests::Arrived::Packet(moorline_tests::wire::Packet::PubAck {
                            reason: 0,
                            ..
                        }) => None,
                        _ => Some(()),
                    }
                }
            },
        )
        .await;
        acknowledged += number - 1;
        disk.make_room();
        gateway.kill9();
        gateway.restart().await;
        let upstream = gateway.api().drain_upstream("checker").await;
        let numbers: Vec<i32> = upstream
            .iter()
            .map(|message| message["payload"].as_str().unwrap().parse().unwrap())
            .collect();
        for expected in 1..=acknowledged {
            assert!(
                numbers.contains(&expected),
                "{expected} was acknowledged: {numbers:?}"
            );
        }
        gateway.finish().await;
    });
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named_and_nothing_starts() {
    run(async {
        let work = tempfile::tempdir().unwrap();
        let file = work.path().join("a-file");
        std::fs::write(&file, "not a directory").unwrap();
        let ended = Gateway::run_to_end(&Options::default().data_dir(&file.join("data")));
        let line = ended.one_line(ended.status.code().unwrap());
        assert!(matches!(ended.status.code(), Some(1 | 2)), "{ended:?}");
        assert!(line.contains("a-file"), "{line}");

        let Some(disk) = disk(16) else { return };
        let remounted = std::process::Command::new("mount")
            .args(["-o", "remount,ro"])
            .arg(disk.path())
            .status()
            .unwrap();
        assert!(remounted.success());
        let data = disk.path().join("data");
        let ended = Gateway::run_to_end(&Options::default().data_dir(&data));
        let line = ended.one_line(ended.status.code().unwrap());
        assert!(matches!(ended.status.code(), Some(1 | 2)), "{ended:?}");
        assert!(line.contains(data.to_str().unwrap()), "{line}");
    });
}

#[test]
fn an_inbox_at_its_limit_follows_its_declared_policy() {
    run(async {
        for (policy, expected) in [
            ("drop-oldest", vec!["2", "3", "4"]),
            ("drop-new", vec!["0", "1", "2"]),
            ("reject", vec!["0", "1", "2"]),
        ] {
            let config = format!("[store.inbox]\nentries_max = 3\noverflow = \"{policy}\"\n");
            let gateway = Gateway::start_with(Options::config(&config)).await;
            let api = gateway.api();
            let mut states = Vec::new();
            for number in 0..5 {
                let answer = api.push(&to("car", &number.to_string())).await;
                if policy == "reject" && number >= 3 {
                    assert!(matches!(answer.status, 429 | 503 | 507), "{answer:?}");
                    continue;
                }
                states.push(answer.expect(202)["id"].as_str().unwrap().to_owned());
            }
            let dropped = match policy {
                "drop-oldest" => &states[..2],
                "drop-new" => &states[3..],
                _ => &[],
            };
            for id in dropped {
                let receipt = crate::support::await_state(&api, id, "dropped").await;
                assert_eq!(receipt["to"], json!({"client": "car"}));
            }
            let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
            for text in expected {
                assert_eq!(car.take().await.text(), text, "{policy}");
            }
            car.has_nothing().await;
            gateway.finish().await;
        }
    });
}
