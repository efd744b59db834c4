//! `rabbitmq-server` with a folder, a cookie and a port mapper of its own.
//!
//! The Erlang machine is the child itself (the wrapper's way of letting somebody type into it makes it `exec`), and its
//! standard input is an Erlang shell: what `rabbitmqctl` takes seconds for is a line written there.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::OnceCell;

use super::process::{Process, bound_to_this_program, folder, free_port};
use super::unique;
use crate::waiting::eventually;

/// Where Debian keeps the program that does not change the user first.
const PROGRAM: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

type Answers = Arc<Mutex<HashMap<u64, String>>>;

/// One RabbitMQ node.
#[derive(Debug)]
pub struct RabbitServer {
    process: Process,
    /// The port mapper of Erlang; its own, so that nobody else's is asked.
    mapper: Process,
    shell: Mutex<ChildStdin>,
    answers: Answers,
    next: AtomicU64,
    folder: TempDir,
    ports: Ports,
}

#[derive(Debug, Clone, Copy)]
struct Ports {
    amqp: u16,
    distribution: u16,
    mapper: u16,
}

impl RabbitServer {
    /// Starts one and waits until it takes connections: some five seconds.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start() -> Self {
        for _ in 0..3 {
            let folder = folder("rabbit");
            let ports = Ports {
                amqp: free_port(),
                distribution: free_port(),
                mapper: free_port(),
            };
            prepare(folder.path(), ports);
            let (mapper, process, shell, answers) = launch(folder.path(), ports);
            let mut server = Self {
                process,
                mapper,
                shell: Mutex::new(shell),
                answers,
                next: AtomicU64::new(0),
                folder,
                ports,
            };
            if server.ready().await {
                return server;
            }
        }
        panic!("rabbitmq-server does not start");
    }

    /// The one that the tests of this program share; each takes a [`VirtualHost`] of it. Whoever kills, freezes or
    /// alarms it starts one of their own.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<RabbitServer> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    async fn ready(&mut self) -> bool {
        let address = self.address();
        // It listens last.
        self.process.listens(address).await
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.ports.amqp).into()
    }

    /// `amqp://…` of the default virtual host.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.address())
    }

    /// The process id of the Erlang machine.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it logged: on its console, and warnings and worse in its log file.
    pub fn log(&self) -> String {
        let file = format!("log/moorline{}@localhost.log", self.ports.amqp);
        let file = std::fs::read_to_string(self.folder.path().join(file));
        format!("{}\n{}", self.process.log(), file.unwrap_or_default())
    }

    /// The value of an Erlang expression, evaluated inside, on one line.
    ///
    /// # Panics
    /// When there is no answer in time.
    pub async fn eval(&self, expression: &str) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut shell = self.shell.lock().unwrap_or_else(PoisonError::into_inner);
            // What an expression binds is forgotten, so that the next may use the name again.
            writeln!(
                shell,
                "io:format(\"~n#{number}# ~0tp~n\", [catch (fun() -> {expression} end)()])."
            )
            .and_then(|()| shell.flush())
            .expect("a running node reads its standard input");
        }
        eventually(Duration::from_secs(60), expression, || async {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            answers.remove(&number)
        })
        .await
    }

    /// Lets it write down which queues, exchanges and bindings there are, which it otherwise does some seconds later.
    ///
    /// # Panics
    /// When it does not.
    pub async fn write_declarations(&self) {
        assert_eq!(self.eval("mnesia:sync_log()").await, "ok");
    }

    /// A virtual host of its own, with the usual user.
    ///
    /// # Panics
    /// When it cannot be made.
    pub async fn add_vhost(&self, name: &str) -> VirtualHost {
        let made = self
            .eval(&format!("rabbit_vhost:add(<<\"{name}\">>, <<\"guest\">>), rabbit_auth_backend_internal:set_permissions(<<\"guest\">>, <<\"{name}\">>, <<\".*\">>, <<\".*\">>, <<\".*\">>, <<\"guest\">>)"))
            .await;
        assert_eq!(made, "ok", "the virtual host {name}");
        VirtualHost {
            url: format!("{}/{name}", self.url()),
            name: name.to_owned(),
        }
    }

    /// A virtual host that nobody else has.
    pub async fn vhost(&self) -> VirtualHost {
        self.add_vhost(&unique("vhost")).await
    }

    /// Removes a virtual host and every queue in it.
    pub async fn delete_vhost(&self, vhost: &VirtualHost) {
        let name = &vhost.name;
        _ = self
            .eval(&format!(
                "rabbit_vhost:delete(<<\"{name}\">>, <<\"guest\">>)"
            ))
            .await;
    }

    /// The queues of a virtual host with the number of messages in each, delivered and unacknowledged ones included.
    pub async fn queues(&self, vhost: &VirtualHost) -> Vec<(String, u64)> {
        let name = &vhost.name;
        let text = self
            .eval(&format!(
                "lists:join(10, [[element(4, proplists:get_value(name, Q)), 9, integer_to_binary(proplists:get_value(messages, Q, 0))] || Q <- rabbit_amqqueue:info_all(<<\"{name}\">>, [name, messages]), is_integer(proplists:get_value(messages, Q, 0))])"
            ))
            .await;
        // Erlang prints binaries: [[<<"name">>,9,<<"0">>],10,…]
        let words: Vec<&str> = text
            .split("<<\"")
            .skip(1)
            .filter_map(|part| part.split_once("\">>").map(|(word, _)| word))
            .collect();
        words
            .chunks_exact(2)
            .map(|pair| (pair[0].to_owned(), pair[1].parse().unwrap_or(0)))
            .collect()
    }

    /// Raises or clears the memory alarm: publishers are blocked, consumers go on.
    ///
    /// # Panics
    /// When it refuses.
    pub async fn memory_alarm(&self, on: bool) {
        let mark = if on { "0.00001" } else { "0.6" };
        let set = self
            .eval(&format!(
                "vm_memory_monitor:set_vm_memory_high_watermark({mark})"
            ))
            .await;
        assert_eq!(set, "ok");
        eventually(Duration::from_secs(20), "the alarm", || async {
            let alarms = self.eval("rabbit_alarm:get_alarms()").await;
            (alarms.contains("memory") == on).then_some(())
        })
        .await;
    }

    /// Ends it with SIGKILL.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Ends it as an operator would.
    pub async fn stop(&mut self) {
        {
            let mut shell = self.shell.lock().unwrap_or_else(PoisonError::into_inner);
            _ = writeln!(shell, "init:stop().").and_then(|()| shell.flush());
        }
        self.process.ended(Duration::from_secs(60)).await;
    }

    /// Starts it again on the same ports and data, and waits until it takes connections. Kills it first when it runs.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn restart(&mut self) {
        self.process.kill9();
        self.mapper.kill9();
        for _ in 0..10 {
            let (mapper, process, shell, answers) = launch(self.folder.path(), self.ports);
            self.mapper = mapper;
            self.process = process;
            self.shell = Mutex::new(shell);
            self.answers = answers;
            if self.ready().await {
                return;
            }
            self.mapper.kill9();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("rabbitmq-server does not start again: {}", self.log());
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

/// A virtual host of a [`RabbitServer`].
#[derive(Debug, Clone)]
pub struct VirtualHost {
    /// `amqp://…/name`.
    pub url: String,
    /// Its name.
    pub name: String,
}

fn prepare(folder: &Path, ports: Ports) {
    let write = |name: &str, text: &str| {
        std::fs::write(folder.join(name), text).expect("the folder is writable");
    };
    write("env.conf", "");
    write("plugins", "[].\n");
    write(
        "rabbitmq.conf",
        &format!(
            "listeners.tcp.1 = 127.0.0.1:{}\nlog.console = false\nlog.file.level = warning\n\
             vm_memory_high_watermark.relative = 0.6\nraft.wal_max_size_bytes = 67108864\n",
            ports.amqp
        ),
    );
}

fn launch(folder: &Path, ports: Ports) -> (Process, Process, ChildStdin, Answers) {
    let log = folder.join("console.log");
    let mut mapper = bound_to_this_program("epmd");
    mapper
        .args(["-port", &ports.mapper.to_string()])
        .args(["-address", "127.0.0.1"])
        .stdin(Stdio::null());
    let mapper = Process::start("epmd", mapper, &log);
    let mut command = bound_to_this_program(PROGRAM);
    let inside = |name: &str| folder.join(name);
    command
        .current_dir(folder)
        .env("HOME", folder)
        .env("ERL_EPMD_PORT", ports.mapper.to_string())
        .env("ERL_EPMD_ADDRESS", "127.0.0.1")
        .env(
            "RABBITMQ_NODENAME",
            format!("moorline{}@localhost", ports.amqp),
        )
        .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
        .env("RABBITMQ_NODE_PORT", ports.amqp.to_string())
        .env("RABBITMQ_DIST_PORT", ports.distribution.to_string())
        .env("RABBITMQ_MNESIA_BASE", inside("mnesia"))
        .env("RABBITMQ_LOG_BASE", inside("log"))
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", inside("plugins"))
        .env("RABBITMQ_PID_FILE", inside("pid"))
        .env("RABBITMQ_CONFIG_FILE", inside("rabbitmq"))
        .env("RABBITMQ_CONF_ENV_FILE", inside("env.conf"))
        .env("RABBITMQ_SCHEDULER_BIND_TYPE", "u")
        // Schedulers that wait without spinning: there are others on this machine.
        .env(
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            "+sbwt none +sbwtdcpu none +sbwtdio none",
        )
        .env("RABBITMQ_ALLOW_INPUT", "1")
        .stdin(Stdio::piped());
    let (reader, writer) = std::io::pipe().expect("a pipe can be made");
    let errors = writer.try_clone().expect("a pipe can be shared");
    command.stdout(writer).stderr(errors);
    let mut process = Process::start_with_output("rabbitmq-server", command, &log);
    let shell = process.child().stdin.take().expect("stdin is piped");
    let answers = Answers::default();
    let told = Arc::clone(&answers);
    std::thread::spawn(move || listen(BufReader::new(reader), &log, &told));
    (mapper, process, shell, answers)
}

/// Sorts what the node prints into answers and the rest.
fn listen(output: impl BufRead, log: &Path, answers: &Answers) {
    let Ok(mut log) = std::fs::File::options().create(true).append(true).open(log) else {
        return;
    };
    for line in output.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        let answer = line
            .strip_prefix('#')
            .and_then(|rest| rest.split_once("# "))
            .and_then(|(number, text)| Some((number.parse().ok()?, text.trim().to_owned())));
        match answer {
            Some((number, text)) => {
                let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.insert(number, text);
            }
            None => _ = writeln!(log, "{line}"),
        }
    }
}
