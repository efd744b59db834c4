//! Watches the server's process while a scenario runs: its memory and how much CPU it takes.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::clock::Clock;
use crate::procfs::{self, Memory};
use crate::report::{Line, Plot};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(250);
/// Memory has settled when it stayed within this for [`QUIET_LOOKS`] looks.
const QUIET_BYTES: u64 = 64 * 1024;
const QUIET_LOOKS: u32 = 6;
const SETTLE_LOOKS_MAX: u32 = 80;

struct Sample {
    at_ns: u64,
    memory: Memory,
    cpu: Duration,
}

/// A task that takes a sample every quarter of a second until it is dropped.
pub(crate) struct Sampler {
    samples: Arc<Mutex<Vec<Sample>>>,
    task: JoinHandle<()>,
}

impl Sampler {
    /// Begins; `None` without a process to watch.
    pub(crate) fn start(pid: Option<u32>, clock: Clock) -> Option<Self> {
        let pid = pid?;
        let samples = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&samples);
        let task = tokio::spawn(async move {
            let mut tick = interval(EVERY);
            tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                tick.tick().await;
                let (Ok(memory), Ok(cpu)) = (procfs::memory(pid), procfs::cpu(pid)) else {
                    return;
                };
                into.lock().push(Sample {
                    at_ns: clock.now_ns(),
                    memory,
                    cpu: cpu.total(),
                });
            }
        });
        Some(Self { samples, task })
    }

    /// Memory and CPU over time.
    pub(crate) fn plots(&self) -> Vec<Plot> {
        let samples = self.samples.lock();
        let begun_ns = samples.first().map_or(0, |first| first.at_ns);
        let seconds = |sample: &Sample| (sample.at_ns - begun_ns) as f64 / 1e9;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let rss = samples
            .iter()
            .map(|s| (seconds(s), mib(s.memory.rss)))
            .collect();
        // Over a second, since the kernel counts in hundredths of one.
        let cores = samples
            .windows(5)
            .map(|w| {
                let wall = (w[4].at_ns - w[0].at_ns) as f64 / 1e9;
                (
                    seconds(&w[4]),
                    w[4].cpu.saturating_sub(w[0].cpu).as_secs_f64() / wall,
                )
            })
            .collect();
        vec![
            Plot::over_time(
                "Server memory",
                "MiB resident",
                vec![Line::new("server", rss)],
            ),
            Plot::over_time(
                "Server CPU",
                "cores in use",
                vec![Line::new("server", cores)],
            ),
        ]
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until the memory of a process stays where it is (20 s at most) and says what it is.
pub(crate) async fn settled_memory(pid: u32) -> anyhow::Result<Memory> {
    let mut last = procfs::memory(pid)?;
    let mut quiet = 0;
    for _ in 0..SETTLE_LOOKS_MAX {
        sleep(EVERY).await;
        let now = procfs::memory(pid)?;
        if now.rss.abs_diff(last.rss) <= QUIET_BYTES {
            quiet += 1;
            if quiet == QUIET_LOOKS {
                return Ok(now);
            }
        } else {
            quiet = 0;
            last = now;
        }
    }
    Ok(last)
}
