//! A server as a child process that never outlives the test program.
//!
//! Every child asks the kernel to be killed with the thread that started it, so one thread that lives as long as the
//! program starts them all. Their files lie under one folder, which a small shell removes when its standard input ends,
//! which is when the program has ended, however it did.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::random::Random;
use crate::waiting::SOON;

/// Starts `program` with `arguments` so that it is killed when this test program ends.
///
/// # Panics
/// When `setpriv` is not there (it is in Debian's `util-linux`).
pub fn bound_to_this_program(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// Starts a command of [`bound_to_this_program`] from the one thread whose end is the program's.
///
/// # Errors
/// As [`Command::spawn`].
pub fn spawn(command: Command) -> io::Result<Child> {
    type Order = (Command, SyncSender<io::Result<Child>>);
    static KEEPER: OnceLock<SyncSender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, orders) = sync_channel::<Order>(16);
        std::thread::spawn(move || {
            while let Ok((mut command, answer)) = orders.recv() {
                _ = answer.send(command.spawn());
            }
        });
        sender
    });
    let (answer, child) = sync_channel(1);
    keeper
        .send((command, answer))
        .expect("the thread lives as long as the program");
    child.recv().expect("every order is answered")
}

/// A folder that is removed when it is dropped, or else when the program ends.
///
/// # Panics
/// When none can be made.
pub fn folder(name: &str) -> TempDir {
    static ALL: OnceLock<PathBuf> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let path = tempfile::Builder::new()
            .prefix("moorline-servers-")
            .tempdir()
            .expect("a temporary directory can be made")
            .keep();
        let mut sweeper = Command::new("sh");
        sweeper
            .args([
                "-c",
                "trap '' INT TERM HUP; cat >/dev/null; sleep 1; rm -rf -- \"$1\"",
                "sweeper",
            ])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = sweeper.spawn().expect("there is a shell");
        // Its input ends when this program does.
        std::mem::forget(child);
        path
    });
    tempfile::Builder::new()
        .prefix(&format!("{name}-"))
        .tempdir_in(all)
        .expect("a temporary directory can be made")
}

/// A port that was free a moment ago, outside of those that the kernel gives to outgoing connections: a server that is
/// stopped finds it free again.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    static RANDOM: Mutex<Option<Random>> = Mutex::new(None);
    let mut random = RANDOM.lock().unwrap_or_else(PoisonError::into_inner);
    let random = random.get_or_insert_with(|| {
        let clock = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |since| u64::from(since.subsec_nanos()));
        Random::from_seed(clock ^ u64::from(std::process::id()) << 32)
    });
    for _ in 0..1000 {
        let port = 10_000 + u16::try_from(random.below(12_000)).unwrap_or(0);
        // Redis Cluster takes the port 10,000 above its own as well.
        let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        if free(port) && free(port + 10_000) {
            return port;
        }
    }
    panic!("no free port in a thousand tries");
}

/// One child process.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Option<Child>,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; what it prints goes to `log`.
    ///
    /// # Panics
    /// When the program is not there.
    pub fn start(name: &'static str, mut command: Command, log: &Path) -> Self {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("the folder is writable");
        let other = file.try_clone().expect("a file handle can be copied");
        command.stdout(file).stderr(other);
        Self::start_with_output(name, command, log)
    }

    /// Starts `command`, whose output somebody copies to `log`.
    ///
    /// # Panics
    /// When the program is not there.
    pub fn start_with_output(name: &'static str, command: Command, log: &Path) -> Self {
        let child = spawn(command)
            .unwrap_or_else(|error| panic!("{name}: {error}; scripts/test installs it"));
        Self {
            name,
            child: Some(child),
            log: log.to_owned(),
        }
    }

    /// The child, to take its pipes.
    ///
    /// # Panics
    /// When it was stopped.
    pub fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("the process runs")
    }

    /// The process id.
    ///
    /// # Panics
    /// When it was stopped.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the process runs").id()
    }

    /// Whether it was started and not stopped.
    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// What it printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a process id is not zero");
        kill_process(pid, signal).expect("a running child takes signals");
    }

    /// Stops it in the middle of whatever it does; its connections stay open and silent.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Ends it as a power cut would, as far as it can see.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            _ = child.kill();
            _ = child.wait();
        }
    }

    /// Asks it to end and waits.
    ///
    /// # Panics
    /// When it does not end in time.
    pub async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended(2 * SOON).await
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end within `patience`.
    pub async fn ended(&mut self, patience: Duration) -> ExitStatus {
        let name = self.name;
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child().try_wait().expect("a child can be asked") {
                self.child = None;
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "{name} did not end in {patience:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until this very process listens on `address`. False when it ended instead, as it does when somebody else took
    /// the port.
    ///
    /// # Panics
    /// When neither happens in time.
    pub async fn listens(&mut self, address: SocketAddr) -> bool {
        let deadline = Instant::now() + 3 * SOON;
        loop {
            if self
                .child()
                .try_wait()
                .expect("a child can be asked")
                .is_some()
            {
                self.child = None;
                return false;
            }
            if owns_listener(self.pid(), address) {
                return true;
            }
            assert!(
                Instant::now() < deadline,
                "{} does not listen on {address}: {}",
                self.name,
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.is_some() && std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines.len().saturating_sub(15);
            eprintln!("--- the last lines of {}", self.name);
            for line in &lines[tail..] {
                eprintln!("    {line}");
            }
        }
        self.kill9();
    }
}

/// Whether the process has the socket that listens on `address` among its open files.
pub fn owns_listener(pid: u32, address: SocketAddr) -> bool {
    let SocketAddr::V4(address) = address else {
        return false;
    };
    let wanted = format!(
        "{:08X}:{:04X}",
        u32::from_le_bytes(address.ip().octets()),
        address.port()
    );
    let Ok(table) = std::fs::read_to_string("/proc/net/tcp") else {
        return false;
    };
    let inode = table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // 0A is LISTEN.
        (fields.get(1) == Some(&wanted.as_str()) && fields.get(3) == Some(&"0A"))
            .then(|| fields.get(9).map(|inode| format!("socket:[{inode}]")))
            .flatten()
    });
    let (Some(inode), Ok(files)) = (inode, std::fs::read_dir(format!("/proc/{pid}/fd"))) else {
        return false;
    };
    files
        .flatten()
        .filter_map(|file| std::fs::read_link(file.path()).ok())
        .any(|target| target.as_os_str() == inode.as_str())
}
