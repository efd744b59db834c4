//! One process of the gateway: started on free ports, followed, stopped, killed, started again.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::servers::process::spawn;
use crate::waiting::SOON;

/// What processes of one gateway printed and logged, in the order in which it was read.
pub type Log = Arc<Mutex<Vec<String>>>;

/// A running process. Dropping it kills it.
#[derive(Debug)]
pub struct Role {
    child: Child,
    /// What it announced: `("mqtt", 127.0.0.1:…)`.
    pub listeners: Vec<(String, SocketAddr)>,
}

impl Role {
    /// Starts `command` and waits until it says `ready`. Each line goes to `log` behind `name`.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn launch(name: &str, command: Command, log: &Log) -> Self {
        Self::begin(name, command, log).ready()
    }

    /// Starts `command` without waiting: several can become ready beside each other.
    ///
    /// # Panics
    /// When there is no such program.
    pub fn begin(name: &str, mut command: Command, log: &Log) -> Starting {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn(command).expect("the binary can be started");
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let lines = follow(stdout, Arc::clone(log), format!("{name}out"));
        drop(follow(stderr, Arc::clone(log), format!("{name}log")));
        Starting {
            role: Self {
                child,
                listeners: Vec::new(),
            },
            lines,
        }
    }

    /// The first listener of a kind.
    pub fn listener(&self, kind: &str) -> Option<SocketAddr> {
        self.listeners
            .iter()
            .find(|(one, _)| one == kind)
            .map(|(_, address)| *address)
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the process has ended.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a process id is not zero");
        kill_process(pid, signal).expect("a running child takes signals");
    }

    /// How it ended, if it has.
    ///
    /// # Panics
    /// When the child cannot be asked.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be asked")
    }

    /// Ends the process as a power cut would, as far as it can see.
    ///
    /// # Panics
    /// When it had ended by itself.
    pub fn kill9(mut self) {
        let status = self.ended();
        assert!(
            status.is_none(),
            "the process had ended by itself: {status:?}"
        );
        self.child.kill().expect("a running child can be killed");
        self.child.wait().expect("a killed child ends");
    }

    /// Waits for the end of the process.
    ///
    /// # Panics
    /// When it does not end within `patience`.
    pub async fn wait(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the process did not end within {patience:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Resident memory in bytes.
    ///
    /// # Panics
    /// When the process has ended.
    pub fn rss_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .expect("a running process has a status");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("it has an RSS");
        let kilobytes: u64 = line
            .split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .expect("VmRSS is a number of kB");
        kilobytes * 1024
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // Nothing more can be done about a child that cannot be killed.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// A process that was started and is not known to be ready.
#[derive(Debug)]
pub struct Starting {
    role: Role,
    lines: Receiver<String>,
}

impl Starting {
    /// The process, which nobody expects to become ready.
    pub fn into_role(self) -> Role {
        self.role
    }

    /// Waits until it says `ready`.
    ///
    /// # Panics
    /// When it does not.
    pub fn ready(mut self) -> Role {
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => panic!("the gateway was not ready in {SOON:?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the gateway ended before it was ready")
                }
            };
            if line == "ready" {
                return self.role;
            }
            if let Some((kind, address)) = line
                .strip_prefix("listening ")
                .and_then(|rest| rest.split_once(' '))
            {
                let address = address.parse().expect("a listener has an address");
                self.role.listeners.push((kind.to_owned(), address));
            }
        }
    }
}

/// Copies lines into the log and, as long as somebody listens, to the caller.
fn follow(source: impl Read + Send + 'static, log: Log, name: String) -> Receiver<String> {
    let (sender, receiver) = sync_channel(1000);
    std::thread::spawn(move || {
        for line in BufReader::new(source).lines() {
            let Ok(line) = line else { return };
            log.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(format!("{name}: {line}"));
            // Nobody listens after `ready`.
            _ = sender.try_send(line);
        }
    });
    receiver
}
