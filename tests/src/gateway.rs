//! The gateway: started as a user starts it, on free ports, killed and started again. One process over the embedded
//! store, or, with `MOORLINE_TEST_FIXTURE=cluster`, several over Redis and RabbitMQ.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::{self, Stores};
use crate::role::{Log, Role};
use crate::servers::process::bound_to_this_program;
use crate::waiting::SOON;
use crate::{Api, amqp};

/// The key that the tests' gateways know.
pub const API_KEY: &str = "key-of-the-black-box-tests";

/// Where a cluster keeps what no upstream rule takes.
const DEFAULT_QUEUE: &str = "moorline.upstream";

/// How a gateway is started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The text of a configuration file.
    pub config: Option<String>,
    /// Arguments after the listeners and the data directory.
    pub args: Vec<String>,
    /// Environment besides the API key.
    pub env: Vec<(String, String)>,
    /// Where the data goes; a temporary directory otherwise.
    pub data_dir: Option<PathBuf>,
    /// Adds neither listeners nor a data directory to the command line.
    pub bare: bool,
    /// Parts of ERROR lines that the test provokes.
    pub expected_errors: Vec<String>,
    /// One access node also in a cluster: what is tested is a limit or a memory of each node.
    pub one_node: bool,
}

impl Options {
    /// With a configuration file.
    pub fn config(text: &str) -> Self {
        Self {
            config: Some(text.to_owned()),
            ..Self::default()
        }
    }

    /// Allows ERROR lines that contain `part`.
    #[must_use]
    pub fn expecting_error(mut self, part: &str) -> Self {
        self.expected_errors.push(part.to_owned());
        self
    }

    /// With one access node, also in a cluster.
    #[must_use]
    pub fn one_node(mut self) -> Self {
        self.one_node = true;
        self
    }

    /// With this data directory.
    #[must_use]
    pub fn data_dir(mut self, path: &Path) -> Self {
        self.data_dir = Some(path.to_owned());
        self
    }

    /// With one more argument.
    #[must_use]
    pub fn arg(mut self, argument: &str) -> Self {
        self.args.push(argument.to_owned());
        self
    }

    /// With one more environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A process that came to its end.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it logged.
    pub stderr: String,
}

impl Ended {
    /// Asserts the exit code and that standard error has exactly one line, which is returned.
    ///
    /// # Panics
    /// When it is otherwise.
    #[track_caller]
    pub fn one_line(&self, code: i32) -> &str {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        let lines: Vec<&str> = self
            .stderr
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        assert_eq!(lines.len(), 1, "one clear line was expected: {self:?}");
        assert!(!self.stdout.contains("ready"), "{self:?}");
        lines[0]
    }
}

/// A running gateway. Dropping it kills it, and fails the test when it logged an unexpected ERROR.
#[derive(Debug)]
pub struct Gateway {
    /// One process, or those of a cluster, access nodes first; none when it was stopped.
    roles: Vec<Role>,
    /// What the processes of a cluster share.
    stores: Option<Stores>,
    options: Options,
    log: Log,
    work: TempDir,
    mqtt: Vec<SocketAddr>,
    ws: Vec<SocketAddr>,
    /// Counts who asked for an address, so that devices spread over the nodes.
    asked: AtomicUsize,
    /// Where the HTTP API listens.
    pub http: SocketAddr,
    /// The `[[listeners]]`, in their order; in a cluster those of the first node.
    pub further: Vec<SocketAddr>,
}

/// The binary under test.
///
/// # Panics
/// When there is none.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MOORLINE_BIN") {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "MOORLINE_BIN={} is not a file",
            path.display()
        );
        return path
            .canonicalize()
            .expect("an existing file has an absolute path");
    }
    let mut target = std::env::current_exe().expect("a running program has a path");
    while target.pop() {
        for profile in ["release", "debug"] {
            let candidate = target.join(profile).join("moorline");
            if candidate.is_file() {
                return candidate;
            }
        }
    }
    panic!("no moorline binary: run `cargo build --release` first or set MOORLINE_BIN");
}

impl Gateway {
    /// Starts a gateway with no configuration but free ports.
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    /// Starts a gateway and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn start_with(options: Options) -> Self {
        let stores = match cluster::wanted() {
            true => Some(Stores::shared().await),
            false => None,
        };
        let work = tempfile::Builder::new()
            .prefix("moorline-test-")
            .tempdir()
            .expect("a temporary directory can be made");
        let mut gateway = Self {
            roles: Vec::new(),
            stores,
            options,
            log: Log::default(),
            work,
            mqtt: Vec::new(),
            ws: Vec::new(),
            asked: AtomicUsize::new(0),
            http: SocketAddr::from(([127, 0, 0, 1], 0)),
            further: Vec::new(),
        };
        gateway.launch();
        gateway
    }

    /// Runs the binary with `options` until it ends by itself.
    ///
    /// # Panics
    /// When it does not end.
    pub fn run_to_end(options: &Options) -> Ended {
        let work = tempfile::tempdir().expect("a temporary directory can be made");
        let child = command(options, work.path())
            .spawn()
            .expect("the binary can be started");
        wait_with_output(child, SOON)
    }

    /// The configuration, the data and what else belongs to this gateway lie here.
    pub fn work_dir(&self) -> &Path {
        self.work.path()
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        data_dir(&self.options, self.work.path())
    }

    fn launch(&mut self) {
        self.roles = match &self.stores {
            None => {
                let command = command(&self.options, self.work.path());
                vec![Role::launch("", command, &self.log)]
            }
            Some(stores) => cluster::launch(&self.options, stores, self.work.path(), &self.log),
        };
        let all = |kind: &str| -> Vec<SocketAddr> {
            self.roles
                .iter()
                .filter_map(|role| role.listener(kind))
                .collect()
        };
        // The first ones are those of `[listen]`, which no test with others turns off.
        let (mqtt, ws, http) = (all("mqtt"), all("ws"), all("http"));
        for (what, addresses) in [("mqtt", &mqtt), ("ws", &ws), ("http", &http)] {
            assert!(
                !addresses.is_empty(),
                "no `listening {what}` line before `ready`"
            );
        }
        (self.mqtt, self.ws, self.http) = (mqtt, ws, http[0]);
        let (mut seen_mqtt, mut seen_ws) = (false, false);
        self.further = self.roles[0]
            .listeners
            .iter()
            .filter(|(kind, _)| match kind.as_str() {
                "mqtt" => std::mem::replace(&mut seen_mqtt, true),
                "ws" => std::mem::replace(&mut seen_ws, true),
                kind => matches!(kind, "mqtts" | "wss"),
            })
            .map(|(_, address)| *address)
            .collect();
    }

    /// Where MQTT listens; in a cluster another node each time.
    pub fn mqtt(&self) -> SocketAddr {
        let turn = self.asked.fetch_add(1, Ordering::Relaxed);
        self.mqtt[turn % self.mqtt.len()]
    }

    /// Where MQTT over WebSocket listens; in a cluster another node each time.
    pub fn ws(&self) -> SocketAddr {
        let turn = self.asked.fetch_add(1, Ordering::Relaxed);
        self.ws[turn % self.ws.len()]
    }

    /// The HTTP API with the key of the tests.
    pub fn api(&self) -> Api {
        Api::new(self.http, Some(API_KEY))
    }

    /// What `/metrics` says; in a cluster the lines of all processes, of which those of one name and labels add up.
    pub async fn metrics(&self) -> String {
        let mut all = Vec::new();
        for role in &self.roles {
            let http = role.listener("http").or_else(|| role.listener("admin"));
            let api = Api::new(http.expect("every process has metrics"), Some(API_KEY));
            all.push(api.get("/metrics").await.text);
        }
        match all.len() {
            1 => all.remove(0),
            _ => sum(&all),
        }
    }

    /// Everything that no rule took, once: from `GET /v1/upstream` for `consumer`, in a cluster from the default queue.
    pub async fn drain_upstream(&self, consumer: &str) -> Vec<Value> {
        match &self.stores {
            None => self.api().drain_upstream(consumer).await,
            Some(stores) => amqp::drain(&stores.rabbit.url, DEFAULT_QUEUE).await,
        }
    }

    /// So many messages that no rule took, and that nobody has drained yet.
    ///
    /// # Panics
    /// When they do not come.
    pub async fn await_upstream(&self, count: usize) -> Vec<Value> {
        let mut all = Vec::new();
        let began = Instant::now();
        while all.len() < count {
            assert!(began.elapsed() < SOON, "{count} messages upstream: {all:?}");
            all.extend(self.drain_upstream("awaiting").await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        all
    }

    /// The process id; in a cluster that of the first access node.
    ///
    /// # Panics
    /// When it was stopped.
    pub fn pid(&self) -> u32 {
        self.roles.first().expect("the gateway runs").pid()
    }

    /// Ends every process as a power cut would, as far as they can see.
    ///
    /// # Panics
    /// When one had ended by itself.
    pub fn kill9(&mut self) {
        assert!(!self.roles.is_empty(), "the gateway runs");
        for role in self.roles.drain(..) {
            role.kill9();
        }
    }

    /// Asks every process to stop; does not wait.
    ///
    /// # Panics
    /// When one does not run.
    pub fn send_sigterm(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends every process a signal.
    ///
    /// # Panics
    /// When one does not run.
    pub fn signal(&self, signal: Signal) {
        assert!(!self.roles.is_empty(), "the gateway runs");
        for role in &self.roles {
            role.signal(signal);
        }
    }

    /// Waits for the end of every process; the first status that is not a clean one.
    ///
    /// # Panics
    /// When one does not end in time.
    pub async fn wait(&mut self) -> ExitStatus {
        let mut all = None;
        for mut role in self.roles.drain(..) {
            let status = role.wait(2 * SOON).await;
            if all.is_none_or(|before: ExitStatus| before.success()) {
                all = Some(status);
            }
        }
        all.expect("the gateway runs")
    }

    /// Stops every process with SIGTERM and asserts a clean end.
    ///
    /// # Panics
    /// When it ends with another code than 0.
    pub async fn sigterm(&mut self) {
        self.send_sigterm();
        let status = self.wait().await;
        assert_eq!(status.code(), Some(0), "SIGTERM is a clean stop: {status}");
    }

    /// Starts again on the same data, on other free ports.
    ///
    /// # Panics
    /// When it still runs.
    pub async fn restart(&mut self) {
        assert!(self.roles.is_empty(), "stop it first");
        self.launch();
    }

    /// Starts again with other options on the same data.
    ///
    /// # Panics
    /// When it still runs.
    pub async fn restart_with(&mut self, mut options: Options) {
        assert!(self.roles.is_empty(), "stop it first");
        options.data_dir = Some(self.data_dir());
        self.options = options;
        self.launch();
    }

    /// Stops cleanly and checks the log; the proper end of a test.
    pub async fn finish(mut self) {
        self.sigterm().await;
    }

    /// Resident memory in bytes, of all processes.
    ///
    /// # Panics
    /// When one does not run.
    pub fn rss_bytes(&self) -> u64 {
        self.roles.iter().map(Role::rss_bytes).sum()
    }

    /// The same once it has started whatever it starts: several processes go on with that after they are ready.
    ///
    /// # Panics
    /// When it goes on growing by itself.
    pub async fn rss_bytes_at_rest(&self) -> u64 {
        let mut before = self.rss_bytes();
        for _ in 0..60 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let now = self.rss_bytes();
            if now < before + (1 << 20) {
                return now;
            }
            before = now;
        }
        panic!("idle processes grow: {before} bytes by now");
    }

    /// What was printed and logged since the first start.
    pub fn log(&self) -> Vec<String> {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn unexpected_errors(&self) -> Vec<String> {
        self.log()
            .into_iter()
            .filter(|line| is_error(line))
            .filter(|line| {
                !self
                    .options
                    .expected_errors
                    .iter()
                    .any(|part| line.contains(part))
            })
            .collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let mut died = None;
        for mut role in self.roles.drain(..) {
            died = died.or(role.ended());
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.len().saturating_sub(60);
            eprintln!("--- the gateway's last lines ({} in all)", log.len());
            for line in &log[tail..] {
                eprintln!("    {line}");
            }
            return;
        }
        assert!(died.is_none(), "the gateway ended by itself: {died:?}");
        let errors = self.unexpected_errors();
        assert!(errors.is_empty(), "unexpected ERROR lines: {errors:#?}");
    }
}

/// The samples of several processes as if they were those of one.
fn sum(all: &[String]) -> String {
    let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
    for line in all.iter().flat_map(|text| text.lines()) {
        if let Some((series, value)) = line.rsplit_once(' ')
            && !line.starts_with('#')
        {
            let value: f64 = value.parse().expect("a sample ends with a number");
            *sums.entry(series).or_default() += value;
        }
    }
    let lines = sums.into_iter();
    lines
        .map(|(series, value)| format!("{series} {value}\n"))
        .collect()
}

/// Whether a line of a log says that something is wrong.
pub fn is_error(line: &str) -> bool {
    // As a level: the words of others may have it too.
    line.contains(" ERROR ") || line.contains("\"ERROR\"") || line.contains("panicked at")
}

fn data_dir(options: &Options, work: &Path) -> PathBuf {
    options
        .data_dir
        .clone()
        .unwrap_or_else(|| work.join("data"))
}

/// The command line of a gateway; every listener that `options` does not place gets a free port.
fn command(options: &Options, work: &Path) -> Command {
    let mut command = clean_command(work);
    for flag in ["--mqtt-listen", "--ws-listen", "--http-listen"] {
        let variable = format!("MOORLINE_{}", flag[2..].to_uppercase().replace('-', "_"));
        let placed = options.args.iter().any(|argument| argument == flag)
            || options.env.iter().any(|(name, _)| *name == variable);
        if !placed && !options.bare {
            command.args([flag, "127.0.0.1:0"]);
        }
    }
    if !options.bare && !options.args.iter().any(|argument| argument == "--data-dir") {
        command.arg("--data-dir").arg(data_dir(options, work));
    }
    if let Some(text) = &options.config {
        let path = work.join("moorline.toml");
        std::fs::write(&path, text).expect("the work directory is writable");
        command.arg("--config").arg(path);
    }
    command.args(&options.args);
    command.envs(options.env.iter().map(|(name, value)| (name, value)));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The binary with the API key of the tests and nothing else of ours in its environment. It is killed when the test
/// program ends.
pub fn clean_command(work: &Path) -> Command {
    let binary = binary();
    let mut command = bound_to_this_program(&binary.to_string_lossy());
    command.current_dir(work);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MOORLINE_") {
            command.env_remove(name);
        }
    }
    command.env("MOORLINE_API_KEY", API_KEY);
    command
}

/// Waits until `child` has ended.
///
/// # Panics
/// When it does not within `patience`.
pub fn wait_with_output(mut child: Child, patience: Duration) -> Ended {
    let out = child.stdout.take().expect("stdout is piped");
    let err = child.stderr.take().expect("stderr is piped");
    let read = |mut source: Box<dyn Read + Send>| {
        let (sender, receiver) = sync_channel(1);
        std::thread::spawn(move || {
            let mut text = Vec::new();
            _ = source.read_to_end(&mut text);
            _ = sender.send(String::from_utf8_lossy(&text).into_owned());
        });
        receiver
    };
    let (out, err) = (read(Box::new(out)), read(Box::new(err)));
    let deadline = Instant::now() + patience;
    let text = |receiver: &Receiver<String>| {
        receiver.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    };
    let (Ok(stdout), Ok(stderr)) = (text(&out), text(&err)) else {
        // It may have ended this very moment.
        _ = child.kill();
        _ = child.wait();
        panic!("the program did not end within {patience:?}");
    };
    Ended {
        status: child.wait().expect("a child can be waited for"),
        stdout,
        stderr,
    }
}
