//! Processes killed while they write: whatever was acknowledged is there after the next start.
//!
//! The test runs itself again as the process that writes; that one prints an id only after the
//! store answered. This shows survival of a killed process, not of lost power.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::print_stdout,
    reason = "the child reports through its standard output"
)]

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moorline_router::contract::{client, push, topic};
use moorline_router::embedded::{Config, EmbeddedStore};
use moorline_router::{
    Append, Appended, End, EndReason, Inboxes, MessageId, Position, QueueName, Routes, UpstreamBus,
    UpstreamMessage, unix_ms,
};

const DIR: &str = "MOORLINE_CRASH_TEST_DIR";
const CLIENTS: usize = 8;
const ROUNDS: u64 = 8;

fn open(dir: &str) -> Arc<EmbeddedStore> {
    EmbeddedStore::open(Config {
        data_dir: dir.into(),
        ..Config::default()
    })
    .unwrap()
}

fn device(number: usize) -> moorline_router::ClientId {
    client(&format!("device-{number}"))
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
}

/// Writes until it is killed.
async fn write_for_ever(dir: &str) {
    let store = open(dir);
    let claim = store
        .claim(&device(0), &moorline_router::NodeId::from_text("n"))
        .await
        .unwrap();
    say(&format!("epoch {} 0", claim.epoch.0));
    let writers = (0..CLIENTS).map(|number| tokio::spawn(write_one(store.clone(), number)));
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

async fn write_one(store: Arc<EmbeddedStore>, number: usize) {
    let client = device(number);
    for turn in 0_u64.. {
        let message = push(&"x".repeat(200));
        let id = message.id.clone();
        let append = Append {
            client: client.clone(),
            message,
            fingerprint: Some(turn),
        };
        let Appended::Stored { position, .. } = store.append(vec![append]).await.unwrap().remove(0)
        else {
            panic!("not stored");
        };
        say(&format!("push {number} {id}"));
        if turn % 3 == 0 {
            let reason = EndReason::Delivered;
            say(&format!("end {number} {id}"));
            store.end(vec![End {
                client: client.clone(),
                position,
                reason,
            }]);
        }
        let message = UpstreamMessage {
            id: MessageId::generate(),
            client: client.clone(),
            topic: topic("up/x"),
            qos: moorline_mqtt::QoS::AtLeastOnce,
            properties: None,
            payload: turn.to_string().into(),
            received_at_ms: unix_ms(),
        };
        let id = message.id.clone();
        store
            .publish(vec![(message, vec![QueueName::new("rule")])])
            .await
            .unwrap();
        say(&format!("upstream {number} {id}"));
    }
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the killed process had acknowledged.
#[derive(Default)]
struct Acknowledged {
    epoch: u64,
    pushed: HashMap<usize, Vec<String>>,
    /// Ended without waiting: may be there or not.
    ended: HashSet<String>,
    upstream: HashMap<usize, Vec<String>>,
}

impl Acknowledged {
    fn note(&mut self, line: &str) {
        let mut words = line.split(' ');
        let (Some(what), Some(number), Some(id)) = (words.next(), words.next(), words.next())
        else {
            return;
        };
        let number: u64 = number.parse().unwrap();
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        match what {
            "epoch" => self.epoch = self.epoch.max(number),
            "push" => self.pushed.entry(index).or_default().push(id.into()),
            "end" => drop(self.ended.insert(id.into())),
            "upstream" => self.upstream.entry(index).or_default().push(id.into()),
            _ => {}
        }
    }
}

/// Starts the writer, kills it after `lines` lines, and reads what it had said until then.
fn run_and_kill(dir: &str, lines: u64, acknowledged: &mut Acknowledged) {
    let program = std::env::current_exe().unwrap();
    let mut child = KillOnDrop(
        Command::new(program)
            .args([
                "acknowledged_writes_survive_kill_9",
                "--exact",
                "--nocapture",
            ])
            .env(DIR, dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut seen = 0;
    let out = BufReader::new(child.0.stdout.take().unwrap());
    for line in out.lines() {
        // The last line may be cut by the kill; a cut id is a different id.
        let Ok(line) = line else { break };
        acknowledged.note(&line);
        seen += 1;
        if seen == lines {
            child.0.kill().unwrap();
        }
    }
    assert!(
        seen >= lines,
        "the writer ended by itself after {seen} lines"
    );
}

async fn check(store: &EmbeddedStore, acknowledged: &Acknowledged) {
    for (number, ids) in &acknowledged.pushed {
        let page = store
            .read(&device(*number), Position::START, usize::MAX, usize::MAX)
            .await
            .unwrap();
        let waiting: Vec<_> = page
            .entries
            .iter()
            .map(|entry| entry.message.id.as_str().to_owned())
            .collect();
        let present: HashSet<_> = waiting.iter().cloned().collect();
        for id in ids {
            let known = store.receipt(&MessageId::parse(id).unwrap()).await.unwrap();
            assert!(known.is_some(), "no receipt of {id}");
            assert!(
                present.contains(id) || acknowledged.ended.contains(id),
                "lost {id}"
            );
        }
        let order: Vec<_> = ids.iter().filter(|id| present.contains(*id)).collect();
        let known: HashSet<_> = ids.iter().collect();
        let stored: Vec<_> = waiting.iter().filter(|id| known.contains(id)).collect();
        assert_eq!(stored, order, "order of device {number}");
    }
    let mut spool: HashMap<String, Vec<String>> = HashMap::new();
    let rule = QueueName::new("rule");
    for partition in 0..store.partitions(&rule) {
        let mut after = Position::START;
        loop {
            let fetch = store.fetch(&rule, partition, after, 1_000);
            // What is there comes at once; an empty rest waits.
            let page = tokio::time::timeout(Duration::from_millis(200), fetch).await;
            let Ok(page) = page else { break };
            for delivery in page.unwrap() {
                after = delivery.position;
                let ids = spool
                    .entry(delivery.message.client.to_string())
                    .or_default();
                ids.push(delivery.message.id.to_string());
            }
        }
    }
    for (number, ids) in &acknowledged.upstream {
        let stored = &spool[device(*number).as_str()];
        let known: HashSet<_> = ids.iter().collect();
        let stored: Vec<_> = stored.iter().filter(|id| known.contains(id)).collect();
        assert_eq!(
            stored,
            ids.iter().collect::<Vec<_>>(),
            "upstream of device {number}"
        );
    }
}

#[test]
fn acknowledged_writes_survive_kill_9() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    if let Ok(dir) = std::env::var(DIR) {
        runtime.block_on(write_for_ever(&dir));
        return;
    }
    let seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    println!("seed {seed}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let path = path.to_str().unwrap();
    let mut acknowledged = Acknowledged::default();
    let mut random = u64::from(seed) | 1;
    for round in 0..ROUNDS {
        // Xorshift: enough to move the moment of the kill about.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let epoch_before = acknowledged.epoch;
        run_and_kill(path, 1 + random % 3_000, &mut acknowledged);
        assert!(
            acknowledged.epoch > epoch_before,
            "seed {seed}, round {round}: epochs rise"
        );
        let store = open(path);
        runtime.block_on(check(&store, &acknowledged));
    }
    let pushes: usize = acknowledged.pushed.values().map(Vec::len).sum();
    println!("{pushes} pushes over {ROUNDS} kills, none lost");
}
