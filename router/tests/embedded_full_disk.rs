//! Disks that are full, on a small file system of their own: nothing is acknowledged that is not
//! kept, and the store works again by itself once there is room.
//!
//! Needs the right to mount a tmpfs; says so and ends where that is missing.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::print_stderr, reason = "a skipped test says why")]

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use moorline_router::contract::jobs::{NOW, claim, id, job};
use moorline_router::contract::{client, eventually, payloads, push, read_all, stored};
use moorline_router::embedded::{Config, EmbeddedStore, Health, OpenError};
use moorline_router::{
    Append, Appended, Inboxes, JobChange, Jobs, MessageId, Position, StoreError,
};

const BALLAST_BYTES: usize = 80 << 20;
const PAYLOAD_BYTES: usize = 50_000;

/// A mounted tmpfs.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(dir.path())
            .output();
        match mount {
            Ok(output) if output.status.success() => Some(Self(dir)),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                eprintln!("skipped: cannot mount a tmpfs: {}", why.trim());
                None
            }
            Err(error) => {
                eprintln!("skipped: cannot run mount: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn config(disk: &SmallDisk, min_free_bytes: u64) -> Config {
    Config {
        data_dir: disk.path().join("data"),
        min_free_bytes,
        ..Config::default()
    }
}

/// Appends until the store refuses; gives what was acknowledged, by client, and why it refused.
async fn fill(store: &EmbeddedStore) -> (HashMap<String, Vec<MessageId>>, String) {
    let mut acknowledged: HashMap<String, Vec<MessageId>> = HashMap::new();
    let payload = "x".repeat(PAYLOAD_BYTES);
    let deadline = Instant::now() + Duration::from_secs(60);
    for turn in 0_u32.. {
        assert!(Instant::now() < deadline, "the disk never became full");
        let name = format!("device-{}", turn / 10);
        let calls: Vec<_> = (0..8)
            .map(|_| {
                let message = push(&payload);
                let id = message.id.clone();
                let append = Append {
                    client: client(&name),
                    message,
                    fingerprint: None,
                };
                (id, store.append(vec![append]))
            })
            .collect();
        let mut refused = None;
        for (id, call) in calls {
            match call.await {
                Ok(answers) => {
                    assert!(matches!(answers[0], Appended::Stored { .. }));
                    acknowledged.entry(name.clone()).or_default().push(id);
                }
                Err(StoreError::Unavailable(cause)) => refused = Some(cause),
                Err(error) => panic!("{error}"),
            }
        }
        if let Some(cause) = refused {
            return (acknowledged, cause);
        }
    }
    unreachable!("the loop ends by a refusal or the deadline")
}

async fn works_again(store: &EmbeddedStore) {
    eventually("the store takes messages again", || async {
        let append = Append {
            client: client("late"),
            message: push("x"),
            fingerprint: None,
        };
        store.append(vec![append]).await.is_ok()
    })
    .await;
    assert_eq!(store.health(), Health::Ready);
}

async fn all_there(store: &EmbeddedStore, acknowledged: &HashMap<String, Vec<MessageId>>) {
    for (name, ids) in acknowledged {
        let page = store
            .read(&client(name), Position::START, usize::MAX, usize::MAX)
            .await
            .unwrap();
        let stored: Vec<_> = page
            .entries
            .iter()
            .map(|entry| &entry.message.id)
            .filter(|id| ids.contains(id))
            .collect();
        let lost = ids.iter().filter(|id| !stored.contains(id)).count();
        assert_eq!(lost, 0, "of {} messages for {name}", ids.len());
        assert!(stored.iter().copied().eq(ids), "order of {name}");
    }
}

async fn full_and_over_it(min_free_bytes: u64, expected_cause: &str) {
    let Some(disk) = SmallDisk::mount("size=260m") else {
        return;
    };
    fs::write(disk.ballast(), vec![1; BALLAST_BYTES]).unwrap();
    let store = EmbeddedStore::open(config(&disk, min_free_bytes)).unwrap();
    // A connection that has read everything before the outage goes on behind it afterwards.
    let device = client("connected");
    stored(&*store, &device, push("before")).await;
    let cursor = read_all(&*store, &device).await.read_to;
    let (acknowledged, cause) = fill(&store).await;
    assert!(cause.contains(expected_cause), "{cause}");
    assert!(acknowledged.values().map(Vec::len).sum::<usize>() > 100);
    fs::remove_file(disk.ballast()).unwrap();
    works_again(&store).await;
    all_there(&store, &acknowledged).await;
    let position = stored(&*store, &device, push("after")).await;
    assert!(position > cursor, "no position is given out twice");
    let page = store.read(&device, cursor, 10, usize::MAX).await.unwrap();
    assert_eq!(payloads(&page), ["after"]);
    store.close().unwrap();
    let store = EmbeddedStore::open(config(&disk, 0)).unwrap();
    all_there(&store, &acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reserve_keeps_the_disk_from_filling_and_ends_by_itself() {
    full_and_over_it(64 << 20, "disk: ").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_a_byte_left_is_gotten_over() {
    full_and_over_it(0, "disk: ").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delayed_jobs_are_what_was_answered_when_the_disk_was_full() {
    let Some(disk) = SmallDisk::mount("size=260m") else {
        return;
    };
    fs::write(disk.ballast(), vec![1; BALLAST_BYTES]).unwrap();
    let store = EmbeddedStore::open(config(&disk, 0)).unwrap();
    let mut waiting = HashSet::new();
    for n in 0..400 {
        store.create(job(&format!("job-{n}"), NOW)).await.unwrap();
        waiting.insert(id(&format!("job-{n}")));
    }
    let cancel = async |n| {
        let id = id(&format!("job-{n}"));
        (Jobs::cancel(&*store, &id, NOW).await, id)
    };
    let mut cancels = Vec::new();
    for n in 0..100 {
        cancels.push(cancel(n).await);
    }
    let (_, cause) = fill(&store).await;
    assert!(cause.contains("disk: "), "{cause}");
    for n in 100..200 {
        cancels.push(cancel(n).await);
    }
    let mut unknown = HashSet::new();
    for (answer, id) in cancels {
        match answer {
            Ok(JobChange::Changed(_)) => assert!(waiting.remove(&id)),
            Ok(other) => panic!("{other:?}"),
            // It may have happened or not.
            Err(StoreError::Unavailable(_)) => drop(unknown.insert(id)),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(!unknown.is_empty(), "nothing was refused");
    let mut earlier = store.earlier(0);
    fs::remove_file(disk.ballast()).unwrap();
    works_again(&store).await;
    // Whoever sleeps looks again after an outage.
    assert!(earlier.changed().await.is_ok());
    let claimed = claim(&*store, NOW).await;
    let counts = store.counts().await.unwrap();
    assert_eq!(counts.total(), 400);
    assert_eq!(counts.firing, claimed.len() as u64);
    assert_eq!(counts.cancelled + counts.firing, 400);
    let claimed: HashSet<_> = claimed.into_iter().map(|job| job.id).collect();
    assert!(claimed.is_subset(&waiting), "what was cancelled fires");
    let missing: HashSet<_> = waiting.difference(&claimed).cloned().collect();
    assert!(missing.is_subset(&unknown), "what waited is lost");
}

#[tokio::test]
async fn a_read_only_directory_is_refused_by_name() {
    let Some(disk) = SmallDisk::mount("size=1m,ro") else {
        return;
    };
    match EmbeddedStore::open(config(&disk, 0)) {
        Err(OpenError::Io { path, source, .. }) => {
            assert_eq!(path, disk.path().join("data"));
            assert_eq!(source.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was opened"),
    }
}
