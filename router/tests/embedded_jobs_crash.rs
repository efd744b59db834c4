//! Processes killed while delayed jobs are created, cancelled and fired: what was answered is so after the next start. Each job
//! that was created fires unless it was cancelled, none that was cancelled does, none early, and none again once it was settled.
//!
//! The test runs itself again as the process that is killed; that one prints a line only after the store answered.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::print_stdout,
    reason = "the child reports through its standard output"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use moorline_router::contract::job_events::event;
use moorline_router::contract::jobs::{id, job, name};
use moorline_router::embedded::{Config, EmbeddedStore};
use moorline_router::{
    Clock, JobChange, JobCreated, JobSettlement, JobState, Jobs, NewJob, NodeId, Settled, unix_ms,
};

const DIR: &str = "MOORLINE_JOBS_CRASH_TEST_DIR";
const TEST: &str = "delayed_jobs_survive_kill_9";
const ROUNDS: u64 = 6;
const CREATORS: u64 = 4;

fn open(dir: &Path) -> Arc<EmbeddedStore> {
    EmbeddedStore::open(Config {
        data_dir: dir.into(),
        ..Config::default()
    })
    .unwrap()
}

/// The full stop tells a line from one that the kill has cut.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line} .")
        .and_then(|()| out.flush())
        .unwrap();
}

async fn create_for_ever(store: Arc<EmbeddedStore>, clock: Clock, creator: u64) {
    let run = unix_ms();
    for turn in 0_u64.. {
        let text = format!("job-{run}-{creator}-{turn}");
        let paid = format!("paid:{text}");
        let now_ms = clock.now_ms();
        let fire_at_ms = now_ms + turn * 7 % 200;
        let new = NewJob {
            created_ms: now_ms,
            cancel_on: vec![name(&paid)],
            ..job(&text, fire_at_ms)
        };
        let JobCreated::Created(_) = store.create(new).await.unwrap() else {
            panic!("{text} is not new");
        };
        say(&format!("created {text} {fire_at_ms}"));
        let is_cancelled = match turn % 5 {
            0 => {
                let change = store.cancel(&id(&text), clock.now_ms()).await.unwrap();
                matches!(change, JobChange::Changed(_))
            }
            1 => {
                let outcome = store.event(&event(&paid, clock.now_ms())).await.unwrap();
                outcome.cancelled == 1
            }
            _ => false,
        };
        if is_cancelled {
            say(&format!("cancelled {text} 0"));
        }
    }
}

async fn fire_for_ever(store: Arc<EmbeddedStore>, clock: Clock) {
    let holder = NodeId::for_this_run("queue");
    let mut earlier = store.earlier(0);
    loop {
        earlier.mark_unchanged();
        let now_ms = clock.now_ms();
        let claimed = store.claim(0, &holder, now_ms, 50, 60_000).await.unwrap();
        for job in &claimed.jobs {
            // This is the action. What is killed from here on may be done again.
            say(&format!("fired {} {}", job.id, clock.now_ms()));
            let fired = JobSettlement::Fired;
            let settled = store.settle(&job.id, job.token, fired, now_ms).await;
            if settled.unwrap() == Settled::Done {
                say(&format!("settled {} 0", job.id));
            }
        }
        let next_ms = claimed.next_due_ms.unwrap_or(u64::MAX);
        tokio::select! {
            () = clock.wait_until(next_ms) => {}
            changed = earlier.changed() => changed.unwrap(),
        }
    }
}

async fn work_for_ever(dir: &Path) {
    let (store, clock) = (open(dir), Clock::of_machine());
    let creators =
        (0..CREATORS).map(|n| tokio::spawn(create_for_ever(store.clone(), clock.clone(), n)));
    let creators: Vec<_> = creators.collect();
    fire_for_ever(store, clock).await;
    drop(creators);
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the killed processes have said.
#[derive(Default)]
struct Said {
    fire_at_ms: BTreeMap<String, u64>,
    cancelled: BTreeSet<String>,
    fired: BTreeMap<String, u64>,
    settled: BTreeSet<String>,
}

impl Said {
    fn note(&mut self, line: &str) {
        let words: Vec<_> = line.split(' ').collect();
        let [what, job, number, "."] = words[..] else {
            return;
        };
        let number: u64 = number.parse().unwrap();
        match what {
            "created" => drop(self.fire_at_ms.insert(job.into(), number)),
            "cancelled" => {
                assert!(!self.fired.contains_key(job), "{job} fired before");
                self.cancelled.insert(job.into());
            }
            "fired" => self.fires(job, number),
            "settled" => drop(self.settled.insert(job.into())),
            _ => panic!("{line}"),
        }
    }

    fn fires(&mut self, job: &str, now_ms: u64) {
        assert!(!self.cancelled.contains(job), "{job} was cancelled");
        assert!(!self.settled.contains(job), "{job} was settled");
        // One whose creation was not said may fire, too.
        if let Some(fire_at_ms) = self.fire_at_ms.get(job) {
            assert!(now_ms >= *fire_at_ms, "{job} is early");
        }
        *self.fired.entry(job.into()).or_default() += 1;
    }
}

/// Starts the process, kills it after `lines` lines, and takes what it had said until then.
fn run_and_kill(dir: &Path, lines: u64, said: &mut Said) {
    let mut child = KillOnDrop(
        Command::new(std::env::current_exe().unwrap())
            .args([TEST, "--exact", "--nocapture"])
            .env(DIR, dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut seen = 0;
    for line in BufReader::new(child.0.stdout.take().unwrap()).lines() {
        let Ok(line) = line else { break };
        if line.ends_with(" .") {
            said.note(&line);
            seen += 1;
        }
        if seen == lines {
            child.0.kill().unwrap();
        }
    }
    assert!(seen >= lines, "it ended by itself after {seen} lines");
}

/// Lets fire what is left.
async fn drain(dir: &Path, said: &mut Said) {
    let store = open(dir);
    let holder = NodeId::from_text("last");
    // Everything was to fire within moments.
    let now_ms = unix_ms() + 1_000;
    loop {
        let claimed = store.claim(0, &holder, now_ms, 500, 60_000).await.unwrap();
        if claimed.jobs.is_empty() {
            break;
        }
        for job in claimed.jobs {
            said.fires(job.id.as_str(), now_ms);
            let fired = JobSettlement::Fired;
            let settled = store.settle(&job.id, job.token, fired, now_ms).await;
            assert_eq!(settled.unwrap(), Settled::Done);
        }
    }
    let counts = store.counts().await.unwrap();
    assert_eq!(counts.pending + counts.firing + counts.retrying, 0);
    // A job may have fired without anybody having heard that it was created, but not the other way round.
    assert!(counts.fired >= said.settled.len() as u64);
    assert!(counts.cancelled >= said.cancelled.len() as u64);
    let mut unsaid = 0;
    for job in said.fire_at_ms.keys() {
        if !said.cancelled.contains(job) && !said.fired.contains_key(job) {
            // Its cancellation was durable, but the kill came before it was said.
            let kept = store.get(&id(job)).await.unwrap();
            let state = kept.map(|job| job.state);
            assert_eq!(state, Some(JobState::Cancelled), "{job} is lost");
            unsaid += 1;
        }
    }
    assert!(unsaid <= ROUNDS * CREATORS, "{unsaid}");
}

#[test]
fn delayed_jobs_survive_kill_9() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    if let Some(dir) = std::env::var_os(DIR) {
        runtime.block_on(work_for_ever(Path::new(&dir)));
        return;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut random = u64::from(since.unwrap().subsec_nanos()) | 1;
    println!("seed {random}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let mut said = Said::default();
    for _ in 0..ROUNDS {
        // Xorshift: enough to move the moment of the kill about.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        run_and_kill(&path, 1 + random % 3_000, &mut said);
    }
    runtime.block_on(drain(&path, &mut said));
    let again = said.fired.values().filter(|times| **times > 1).count();
    println!(
        "{} jobs over {ROUNDS} kills: {} cancelled, {} fired, {again} of them again",
        said.fire_at_ms.len(),
        said.cancelled.len(),
        said.fired.len()
    );
}
