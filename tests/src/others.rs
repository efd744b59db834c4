//! Programs that others wrote: `mosquitto_pub`, `mosquitto_sub` and Python scripts on `paho-mqtt`.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use crate::gateway::{Ended, wait_with_output};
use crate::waiting::SOON;

/// A program that runs beside the test and is ended with it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    /// Starts `command` and follows its standard output.
    ///
    /// # Panics
    /// When the program is not there.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}; scripts/test installs it"));
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, lines) = sync_channel(100_000);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// The next line of its standard output.
    ///
    /// # Panics
    /// When there is none in time.
    pub async fn line(&self) -> String {
        crate::eventually(SOON, "a line of output", || async {
            self.lines.try_recv().ok()
        })
        .await
    }

    /// The next line of its output, if it comes so soon.
    pub async fn line_within(&self, patience: Duration) -> Option<String> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            if let Ok(line) = self.lines.try_recv() {
                return Some(line);
            }
            if tokio::time::Instant::now() > deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Reads lines until one contains `part`.
    ///
    /// # Panics
    /// When none does in time.
    pub async fn line_with(&self, part: &str) -> String {
        loop {
            let line = self.line().await;
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Its standard input.
    ///
    /// # Panics
    /// When it was taken before.
    pub fn stdin(&mut self) -> std::process::ChildStdin {
        self.child
            .stdin
            .take()
            .expect("stdin is piped and taken once")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// `mosquitto_pub` or `mosquitto_sub` with where to connect to.
pub fn mosquitto(program: &str, address: SocketAddr, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args([
            "-h",
            &address.ip().to_string(),
            "-p",
            &address.port().to_string(),
        ])
        .args(args);
    command
}

/// Runs a program to its end.
///
/// # Panics
/// When it is not there or does not end.
pub async fn run(mut command: Command) -> Ended {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; scripts/test installs it"));
    tokio::task::spawn_blocking(move || wait_with_output(child, 3 * SOON))
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

/// A script of `tests/python` with its arguments.
///
/// # Panics
/// When there is no Python with the packages of `requirements.txt`.
pub fn python(script: &str) -> Command {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    let mut command = Command::new(interpreter());
    command.arg("-u").arg(folder.join(script));
    command
}

fn interpreter() -> PathBuf {
    if let Some(path) = std::env::var_os("MOORLINE_TEST_PYTHON") {
        return path.into();
    }
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-env/python/bin/python3");
    assert!(
        own.is_file(),
        "no Python environment: run scripts/test, or set MOORLINE_TEST_PYTHON"
    );
    own
}
