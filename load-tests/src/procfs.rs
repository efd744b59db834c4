//! What the kernel says about a process and about this machine (`/proc`; Linux only).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// The memory of a process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    pub(crate) rss: u64,
    pub(crate) rss_anon: u64,
}

/// CPU time that a process has used over all of its threads, ended ones included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cpu {
    pub(crate) user: Duration,
    pub(crate) system: Duration,
}

impl Cpu {
    /// User and system together.
    pub(crate) fn total(self) -> Duration {
        self.user + self.system
    }

    /// What was used since `earlier`.
    pub(crate) fn since(self, earlier: Cpu) -> Cpu {
        Cpu {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
        }
    }
}

/// Reads `/proc/PID/status`.
pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let text = read(pid, "status")?;
    let field =
        |name| kib(&text, name).with_context(|| format!("/proc/{pid}/status has no {name}"));
    Ok(Memory {
        rss: field("VmRSS")?,
        rss_anon: field("RssAnon")?,
    })
}

/// The proportional set size in bytes. Walks the whole address space: not to be asked often.
pub(crate) fn pss(pid: u32) -> Result<u64> {
    let text = read(pid, "smaps_rollup")?;
    kib(&text, "Pss").with_context(|| format!("/proc/{pid}/smaps_rollup has no Pss"))
}

/// Reads `/proc/PID/stat`.
pub(crate) fn cpu(pid: u32) -> Result<Cpu> {
    let text = read(pid, "stat")?;
    parse_stat(&text, rustix::param::clock_ticks_per_second())
        .with_context(|| format!("/proc/{pid}/stat reads {text:?}"))
}

fn read(pid: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}: is the server running?"))
}

/// The value of a `Name:   123 kB` line, in bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let value: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    value.checked_mul(1024)
}

/// Fields 14 and 15. The command name (field 2) may hold spaces and brackets: count from its end.
fn parse_stat(text: &str, ticks_per_second: u64) -> Option<Cpu> {
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut next = || {
        let ticks: u64 = fields.next()?.parse().ok()?;
        Some(Duration::from_nanos(
            ticks.checked_mul(1_000_000_000)? / ticks_per_second.max(1),
        ))
    };
    Some(Cpu {
        user: next()?,
        system: next()?,
    })
}

/// The machine under which a report was made.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu_model: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    pub(crate) load_average_before: String,
    pub(crate) load_average_after: String,
    pub(crate) open_files_max: u64,
}

impl Machine {
    /// Looks at the machine; what can't be read is said to be unknown.
    pub(crate) fn look(open_files_max: u64) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let model = text("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
            .map_or_else(
                || String::from("unknown"),
                |(_, model)| model.trim().to_owned(),
            );
        Self {
            cpu_model: model,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib(&text("/proc/meminfo"), "MemTotal").unwrap_or(0),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_average_before: load_average(),
            load_average_after: String::new(),
            open_files_max,
        }
    }
}

/// The three load averages.
pub(crate) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_ascii_whitespace()
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_by_their_whole_name() {
        let status =
            "Name:\tx\nVmRSSx:\t   1 kB\nVmRSS:\t  2048 kB\nRssAnon:\t     4 kB\nThreads:\t3\n";
        assert_eq!(kib(status, "VmRSS"), Some(2048 * 1024));
        assert_eq!(kib(status, "RssAnon"), Some(4096));
        assert_eq!(kib(status, "Threads"), None);
        assert_eq!(kib(status, "VmSwap"), None);
    }

    #[test]
    fn cpu_times_are_read_behind_any_command_name() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 1 2 3 4 250 75 5 6 20 0 3 0 100 1000 200";
        let cpu = parse_stat(stat, 100).expect("well formed");
        assert_eq!(
            cpu,
            Cpu {
                user: Duration::from_millis(2_500),
                system: Duration::from_millis(750)
            }
        );
        assert_eq!(cpu.total(), Duration::from_millis(3_250));
        assert_eq!(parse_stat("42 (x) S 1 2", 100), None);
        assert_eq!(parse_stat("", 100), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let pid = std::process::id();
        let memory = memory(pid).expect("own status");
        assert!(memory.rss >= memory.rss_anon && memory.rss_anon > 0);
        assert!(pss(pid).expect("own smaps") <= memory.rss * 2);
        cpu(pid).expect("own stat");
    }
}
