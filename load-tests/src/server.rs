//! Servers that a comparison starts itself: a process with a fresh data directory on free ports.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

const START_TIMEOUT: Duration = Duration::from_secs(20);
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// The gateway of this repository.
    Moorline,
    /// Eclipse Mosquitto.
    Mosquitto,
}

impl Kind {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Moorline => "moorline",
            Self::Mosquitto => "mosquitto",
        }
    }
}

/// A running server. Dropping it kills the process.
pub(crate) struct Server {
    /// Where devices connect.
    pub(crate) mqtt: SocketAddr,
    /// Its process.
    pub(crate) pid: u32,
    child: Child,
    _directory: TempDir,
}

impl Server {
    /// Starts it and waits until it listens.
    pub(crate) async fn start(kind: Kind, program: &Path) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        match kind {
            Kind::Moorline => Self::moorline(program, directory).await,
            Kind::Mosquitto => Self::mosquitto(program, directory).await,
        }
        .with_context(|| format!("cannot start {}", program.display()))
    }

    async fn moorline(program: &Path, directory: TempDir) -> Result<Self> {
        let mut child = Command::new(program)
            .arg("--data-dir")
            .arg(directory.path().join("data"))
            .args([
                "--mqtt-listen",
                "127.0.0.1:0",
                "--ws-listen",
                "127.0.0.1:0",
                "--http-listen",
                "127.0.0.1:0",
            ])
            .env("MOORLINE_API_KEY", "load-tests")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
        let ready = async {
            let mut mqtt = None;
            while let Some(line) = lines.next_line().await? {
                if let Some(address) = line.strip_prefix("listening mqtt ") {
                    mqtt = Some(
                        address
                            .trim()
                            .parse()
                            .with_context(|| format!("an address in {line:?}"))?,
                    );
                } else if line == "ready" {
                    return mqtt.context("it did not say where it listens for MQTT");
                }
            }
            bail!("it ended before it was ready")
        };
        let mqtt = timeout(START_TIMEOUT, ready)
            .await
            .context("not ready within 20 s")??;
        // Keeps the pipe open and empty: a server that can't write its output must not fail for it.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self::of(child, mqtt, directory)
    }

    async fn mosquitto(program: &Path, directory: TempDir) -> Result<Self> {
        // It can't choose a port by itself. Should another process take the free one meanwhile,
        // mosquitto ends at once, which is an error here and not a measurement of something else.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let file = directory.path().join("mosquitto.conf");
        std::fs::write(&file, mosquitto_config(free.port()))?;
        let mut child = Command::new(program)
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let listening = async {
            while TcpStream::connect(free).await.is_err() {
                if let Some(status) = child.try_wait()? {
                    bail!("it ended with {status}");
                }
                sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        };
        timeout(START_TIMEOUT, listening)
            .await
            .context("not listening within 20 s")??;
        Self::of(child, free, directory)
    }

    fn of(mut child: Child, mqtt: SocketAddr, directory: TempDir) -> Result<Self> {
        if let Some(status) = child.try_wait()? {
            bail!("it ended with {status}");
        }
        let pid = child.id().context("it has ended")?;
        Ok(Self {
            mqtt,
            pid,
            child,
            _directory: directory,
        })
    }

    /// Ends it with SIGTERM, or by force if it does not end.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.pid)
            .ok()
            .and_then(Pid::from_raw)
            .context("a pid")?;
        kill_process(pid, Signal::TERM).context("cannot send SIGTERM")?;
        if timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            self.child.kill().await.context("cannot kill it")?;
        }
        Ok(())
    }
}

/// Without limits of its own, without persistence, and as the user that runs it.
fn mosquitto_config(port: u16) -> String {
    let mut text = format!(
        "listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_type error\n"
    );
    text.push_str("max_connections -1\nmax_inflight_messages 0\nmax_queued_messages 0\nset_tcp_nodelay true\n");
    if rustix::process::geteuid().is_root() {
        // Otherwise it changes to a user that may have a lower limit on open files.
        let _ = writeln!(text, "user root");
    }
    text
}

/// Where a program is: the path itself, or one of `PATH` and the places for system programs.
pub(crate) fn find(program: &Path) -> Result<PathBuf> {
    if program.components().count() > 1 {
        return if program.is_file() {
            Ok(program.to_owned())
        } else {
            bail!(
                "there is no {} (build it with: cargo build --release)",
                program.display()
            )
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            format!(
                "{} is not installed (Debian: apt-get install mosquitto)",
                program.display()
            )
        })
}

/// What a program says of its version, on one line.
pub(crate) async fn version(kind: Kind, program: &Path) -> String {
    let argument = if kind == Kind::Moorline {
        "--version"
    } else {
        "-h"
    };
    let output = Command::new(program).arg(argument).output().await;
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    text.lines().next().unwrap_or(kind.name()).trim().to_owned()
}
