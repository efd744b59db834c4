//! `redis-server` as the promises need it: every write on the disk before it is answered, nothing evicted.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

use super::process::{Process, bound_to_this_program, folder, free_port};
use crate::waiting::eventually;

/// A single Redis with its data in a folder of its own.
#[derive(Debug)]
pub struct RedisServer {
    process: Process,
    folder: TempDir,
    port: u16,
    arguments: Vec<String>,
}

impl RedisServer {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts one with more arguments, such as `["--maxmemory", "10mb"]`; they win over those given here.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start_with(arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
        for _ in 0..10 {
            let folder = folder("redis");
            let port = free_port();
            let process = launch(folder.path(), port, &arguments);
            let mut server = Self {
                process,
                folder,
                port,
                arguments: arguments.clone(),
            };
            if server.ready().await {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    /// The one that the tests of this program share. Whoever kills, freezes or flushes starts one of their own.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<RedisServer> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    async fn ready(&mut self) -> bool {
        let address = self.address();
        if !self.process.listens(address).await {
            return false;
        }
        // It listens before it has read its data.
        eventually(Duration::from_secs(60), "redis answers PING", || async {
            (Reply::of(address, &["PING"]).await.ok()?.text() == "PONG").then_some(())
        })
        .await;
        true
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// `redis://…`.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// One command on a connection of its own, answered or refused.
    ///
    /// # Panics
    /// When no answer comes.
    pub async fn command(&self, words: &[&str]) -> Reply {
        Reply::of(self.address(), words)
            .await
            .unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// Forgets everything.
    ///
    /// # Panics
    /// When it refuses.
    pub async fn flush(&self) {
        assert_eq!(self.command(&["FLUSHALL"]).await.text(), "OK");
    }

    /// Ends it with SIGKILL.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Ends it with SIGTERM.
    pub async fn stop(&mut self) {
        self.process.stop().await;
    }

    /// Starts it again on the same port and data, and waits until it answers. Kills it first when it runs.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn restart(&mut self) {
        self.process.kill9();
        for _ in 0..50 {
            self.process = launch(self.folder.path(), self.port, &self.arguments);
            if self.ready().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("redis-server does not start again: {}", self.process.log());
    }

    /// Stops it in the middle of whatever it does (SIGSTOP).
    pub fn freeze(&self) {
        self.process.freeze();
    }

    /// Lets it go on (SIGCONT).
    pub fn thaw(&self) {
        self.process.thaw();
    }
}

fn launch(folder: &Path, port: u16, arguments: &[String]) -> Process {
    let mut command = bound_to_this_program("redis-server");
    command
        .current_dir(folder)
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
        .args(["--save", "", "--appendonly", "yes"])
        .args(["--appendfsync", "always"])
        .args(["--maxmemory-policy", "noeviction"])
        .args(["--daemonize", "no"])
        .args(arguments)
        .stdin(std::process::Stdio::null());
    Process::start("redis-server", command, &folder.join("redis.log"))
}

/// What Redis answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A status, a string or a number.
    Text(String),
    /// No such thing.
    Nil,
    /// A refusal.
    Error(String),
    /// Several.
    Array(Vec<Reply>),
}

impl Reply {
    /// Sends one command to `address` and reads the answer.
    ///
    /// # Errors
    /// When there is none within five seconds.
    pub async fn of(address: SocketAddr, words: &[&str]) -> std::io::Result<Self> {
        let exchange = async {
            let mut stream = TcpStream::connect(address).await?;
            let mut request = format!("*{}\r\n", words.len()).into_bytes();
            for word in words {
                request.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
            }
            stream.write_all(&request).await?;
            read(&mut BufReader::new(stream)).await
        };
        match tokio::time::timeout(Duration::from_secs(5), exchange).await {
            Ok(reply) => reply,
            Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }

    /// As text; the parts of an array one a line, empty for nil.
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Nil => String::new(),
            Self::Error(text) => format!("ERROR {text}"),
            Self::Array(parts) => {
                let parts: Vec<String> = parts.iter().map(Self::text).collect();
                parts.join("\n")
            }
        }
    }

    /// As a number.
    ///
    /// # Panics
    /// When it is none.
    pub fn number(&self) -> i64 {
        match self.text().parse() {
            Ok(number) => number,
            Err(_) => panic!("not a number: {self:?}"),
        }
    }

    /// A field of an `INFO`-like answer.
    pub fn field(&self, name: &str) -> Option<String> {
        self.text().lines().find_map(|line| {
            let (key, value) = line.trim().split_once(':')?;
            (key == name).then(|| value.to_owned())
        })
    }
}

async fn read<S: AsyncBufRead + Unpin + Send>(stream: &mut S) -> std::io::Result<Reply> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let bad = || std::io::Error::other(format!("not an answer of Redis: {line:?}"));
    let rest = line.get(1..).map(str::trim_end).ok_or_else(bad)?;
    let length = || rest.parse::<i64>().map_err(|_| bad());
    match line.as_bytes()[0] {
        b'+' | b':' => Ok(Reply::Text(rest.to_owned())),
        b'-' => Ok(Reply::Error(rest.to_owned())),
        b'$' => {
            let Ok(length) = usize::try_from(length()?) else {
                return Ok(Reply::Nil);
            };
            let mut text = vec![0; length + 2];
            stream.read_exact(&mut text).await?;
            text.truncate(length);
            Ok(Reply::Text(String::from_utf8_lossy(&text).into_owned()))
        }
        b'*' => {
            let mut parts = Vec::new();
            for _ in 0..length()? {
                parts.push(Box::pin(read(stream)).await?);
            }
            Ok(Reply::Array(parts))
        }
        _ => Err(bad()),
    }
}
