//! A node under a script of bytes: each says what a connection does next. Most of it is packets that a client
//! might send, in any order and of any client; some is damage.
//!
//! What must hold: no panic in any thread, every connection that was half closed is closed, and a witness
//! beside all this has its PINGRESP after each script.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use moorline_access_node::{
    Access, AccessNode, Config, DelayRules, ListenerConfig, ListenerSettings, Protocol,
};
use moorline_mqtt::TopicFilter;
use moorline_router::NodeId;
use moorline_router::embedded::{Config as StoreConfig, EmbeddedStore};
use moorline_router::upstream::UpstreamRoutes;

const CLIENTS: u8 = 3;
const CONNECTIONS: usize = 4;
const STEPS_MAX: usize = 64;
/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
const TOPICS: [&str; 8] = [
    "a",
    "b",
    "a/b",
    "d/c0/x",
    "d/c1",
    "up/x",
    "$SYS",
    "$delay/1/a",
];
const FILTERS: [&str; 10] = [
    "a",
    "+",
    "#",
    "a/#",
    "+/b",
    "$share/g/#",
    "$share/g/a",
    "d/c0/#",
    "$SYS/#",
    "a/+/",
];

/// The node and the witness.
pub(crate) struct Node {
    address: SocketAddr,
    witness: TcpStream,
    _node: AccessNode,
    _store: std::sync::Arc<EmbeddedStore>,
    _data: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Node {
    pub(crate) fn start() -> Self {
        let memory = std::path::Path::new("/dev/shm");
        let data = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        }
        .expect("a temporary directory can be made");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("the system gives threads");
        let mut store = StoreConfig {
            data_dir: data.path().to_owned(),
            upstream_queue_bytes_max: 1024 * 1024,
            ..StoreConfig::default()
        };
        store.inbox.entries_max = 50;
        let store = EmbeddedStore::open(store).expect("an empty directory is a store");
        let mut config = Config {
            threads: 1,
            packet_bytes_max: 8 * 1024,
            receive_maximum: 8,
            in_flight_max: 8,
            queued_messages_max: 20,
            subscriptions_max: 8,
            retained_messages_max: 20,
            ..Config::default()
        };
        config.flapping.client_connects = 0;
        let socket = TcpListener::bind("127.0.0.1:0").expect("the system gives a port");
        socket.set_nonblocking(true).expect("a socket can be told");
        let address = socket.local_addr().expect("a bound socket has one");
        let listener = ListenerConfig {
            name: "fuzz".into(),
            protocol: Protocol::Mqtt,
            address,
            proxy_protocol_from: Vec::new(),
            connections_max: None,
            half_open_max: None,
            connects_per_second: None,
            handshake_timeout: None,
            packet_bytes_max: None,
            tls: None,
        };
        let settings = ListenerSettings::load(&listener, &config).expect("a plain listener");
        let upstream = TopicFilter::parse(UpstreamRoutes::DEFAULT_FILTER.into());
        let routes = UpstreamRoutes::new(upstream.expect("a filter"), Vec::new());
        let node = runtime.block_on(async {
            let id = NodeId::for_this_run("fuzz");
            let mut node = AccessNode::start(
                id,
                config,
                Access::default(),
                store.stores(),
                routes,
                DelayRules::default(),
                None,
            )
            .await
            .expect("an empty store has no faults");
            node.listen(&socket, settings).expect("one more handle");
            node
        });
        let witness = connection(address);
        let mut node = Self {
            address,
            witness,
            _node: node,
            _store: store,
            _data: data,
            _runtime: runtime,
        };
        node.witness
            .write_all(b"\x10\x0F\x00\x04MQTT\x04\x02\x00\x00\x00\x03wit")
            .expect("the node is there");
        assert_eq!(node.witnessed(4), [0x20, 2, 0, 0]);
        node
    }

    fn witnessed(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.witness
            .read_exact(&mut bytes)
            .expect("the node answers an ordinary client");
        bytes
    }

    /// Plays the script, ends all connections, and looks whether the node is well.
    pub(crate) fn run(&mut self, script: &[u8]) {
        let mut script = Script(script);
        let mut open: [Option<TcpStream>; CONNECTIONS] = Default::default();
        for _ in 0..STEPS_MAX {
            let Some(choice) = script.next() else { break };
            let slot = &mut open[usize::from(choice >> 6)];
            step(choice & 0x3F, slot, self.address, &mut script);
        }
        for connection in open.iter_mut().flatten() {
            // An error says that it is over already.
            _ = connection.shutdown(Shutdown::Write);
        }
        for connection in open.iter_mut().flatten() {
            let mut bytes = [0; 4096];
            loop {
                match connection.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        panic!("a half closed connection was not closed")
                    }
                    Err(_) => break,
                }
            }
        }
        self.forget();
        self.witness
            .write_all(b"\xC0\x00")
            .expect("the node is there");
        assert_eq!(self.witnessed(2), [0xD0, 0]);
    }

    /// Ends the sessions of all clients, so that each script begins with little.
    fn forget(&self) {
        let mut all: Vec<TcpStream> = (0..CLIENTS)
            .map(|client| {
                let mut connection = connection(self.address);
                let connect = connect(4, client, 0x02, &[], &[]);
                _ = connection.write_all(&[&connect[..], b"\xE0\x00"].concat());
                connection
            })
            .collect();
        for connection in &mut all {
            _ = connection.read_to_end(&mut Vec::new());
        }
    }
}

fn connection(address: SocketAddr) -> TcpStream {
    let connection = TcpStream::connect(address).expect("the node listens");
    connection
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket can be told");
    _ = connection.set_nodelay(true);
    connection
}

/// What is left of the script.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn topic(&mut self) -> &'static str {
        TOPICS[usize::from(self.byte()) % TOPICS.len()]
    }
}

fn step(choice: u8, slot: &mut Option<TcpStream>, address: SocketAddr, script: &mut Script<'_>) {
    if choice < 12 || slot.is_none() {
        // The version is not remembered: what follows may be encoded for the other one.
        let flags = script.byte();
        let mut opened = connection(address);
        let properties = properties(script, flags);
        let will = if flags & 0x04 != 0 {
            let mut will = text(script.topic().as_bytes());
            let payload = script.byte();
            will.extend(text(&vec![b'w'; (payload % 20).into()]));
            will
        } else {
            Vec::new()
        };
        let version = if choice & 1 == 0 { 4 } else { 5 };
        _ = opened.write_all(&connect(
            version,
            choice % CLIENTS,
            flags & 0x3E,
            &properties,
            &will,
        ));
        *slot = Some(opened);
        return;
    }
    let Some(open) = slot else { return };
    let id = [0, 1 + script.byte() % 8];
    let bytes = match choice {
        12..=27 => publish(choice, id, script),
        28..=31 => packet(0x40, &id),
        32..=35 => packet(0x50, &id),
        36..=39 => packet(0x62, &id),
        40..=42 => packet(0x70, &id),
        43..=48 => {
            let filter = FILTERS[usize::from(script.byte()) % FILTERS.len()];
            let options = script.byte() & 0x3F;
            let mut body = id.to_vec();
            if choice & 1 == 1 {
                body.extend(properties(script, options));
            }
            body.extend(text(filter.as_bytes()));
            body.push(options);
            packet(0x82, &body)
        }
        49..=50 => {
            let filter = FILTERS[usize::from(script.byte()) % FILTERS.len()];
            let mut body = id.to_vec();
            if choice & 1 == 1 {
                body.push(0);
            }
            body.extend(text(filter.as_bytes()));
            packet(0xA2, &body)
        }
        51..=52 => b"\xC0\x00".to_vec(),
        53 => b"\xE0\x00".to_vec(),
        54 => packet(0xE0, &[4, 0]),
        55 => packet(0xE0, &[0, 5, 0x11, 0, 0, 0, script.byte()]),
        56 => {
            let first = script.byte();
            let length = script.byte() % 32;
            packet(first, script.take(length.into()))
        }
        57..=58 => {
            let length = script.byte();
            script.take(length.into()).to_vec()
        }
        59..=60 => {
            // Takes what has come, so that something is acknowledged later.
            _ = open.set_read_timeout(Some(Duration::from_millis(1)));
            _ = open.read(&mut [0; 2048]);
            _ = open.set_read_timeout(Some(PATIENCE));
            return;
        }
        _ => {
            *slot = None;
            return;
        }
    };
    // An error says that the node has closed it.
    _ = open.write_all(&bytes);
}

fn publish(choice: u8, id: [u8; 2], script: &mut Script<'_>) -> Vec<u8> {
    let flags = script.byte() & 0x0F;
    let mut body = text(script.topic().as_bytes());
    if flags & 6 != 0 {
        body.extend(id);
    }
    if choice & 1 == 1 {
        let bits = script.byte();
        body.extend(properties(script, bits));
    }
    let length = script.byte() % 40;
    body.extend(vec![b'p'; length.into()]);
    packet(0x30 | flags, &body)
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    let length = body.len();
    if length > 127 {
        out.push(0x80 | (length % 128) as u8);
    }
    out.push(if length > 127 { length / 128 } else { length } as u8);
    out.extend(body);
    out
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

/// None, or a few of those that any packet might have.
fn properties(script: &mut Script<'_>, bits: u8) -> Vec<u8> {
    let mut list = Vec::new();
    if bits & 0x80 != 0 {
        let number = script.byte();
        match number >> 4 {
            0..=2 => list.extend([0x11, 0, 0, 0, number & 0x0F]),
            3 => list.extend([0x21, 0, number & 0x0F]),
            4 => list.extend([0x27, 0, 0, 0, 8 * (number & 0x0F)]),
            5..=6 => list.extend([0x22, 0, number & 0x0F]),
            7..=8 => list.extend([0x23, 0, number & 0x0F]),
            9 => list.extend([0x02, 0, 0, 0, number & 0x0F]),
            10 => list.extend([0x0B, number & 0x0F]),
            11 => list.extend([0x26, 0, 1, b'k', 0, 1, b'v']),
            12 => list.extend([0x18, 0, 0, 0, number & 0x0F]),
            13 => list.extend([0x17, number & 1, 0x19, number & 1]),
            _ => list.extend(script.take((number & 0x0F).into())),
        }
    }
    [&[list.len() as u8], &list[..]].concat()
}

fn connect(version: u8, client: u8, flags: u8, properties: &[u8], will: &[u8]) -> Vec<u8> {
    let mut body = b"\x00\x04MQTT".to_vec();
    body.extend([version, flags, 0, 0]);
    if version == 5 {
        body.extend(if properties.is_empty() {
            &[0]
        } else {
            properties
        });
    }
    body.extend([0, 2, b'c', b'0' + client]);
    if flags & 0x04 != 0 {
        if version == 5 {
            body.push(0);
        }
        body.extend(will);
    }
    packet(0x10, &body)
}
