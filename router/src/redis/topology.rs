//! Which server has a slot.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use redis::{ConnectionAddr, ConnectionInfo};

use super::config::{Config, Mode, parse_url};
use super::finder::{Dial, Finder, at};
use super::port::{Port, Timeouts};
use super::script::SLOTS;
use crate::StoreError;

/// A server, through two connections: what waits for replicas on one does not hold up the reads on the other.
pub(super) struct Server {
    /// For people.
    pub(super) name: String,
    pub(super) writes: Port,
    pub(super) reads: Port,
}

impl Server {
    fn new(name: String, finder: Finder, timeouts: Timeouts) -> Arc<Self> {
        let finder = Arc::new(finder);
        Arc::new(Self {
            name,
            writes: Port::new(finder.clone(), timeouts),
            reads: Port::new(finder, timeouts),
        })
    }
}

/// The servers of a deployment.
pub(super) enum Topology {
    /// One server, or whichever of several the sentinels say.
    One(Arc<Server>),
    /// A cluster.
    Cluster(Box<Cluster>),
}

impl Topology {
    pub(super) fn new(config: &Config) -> Result<Self, String> {
        let authorities = match &config.ca_file {
            Some(file) => Some(
                std::fs::read(file)
                    .map_err(|error| format!("redis.ca_file {}: {error}", file.display()))?,
            ),
            None => None,
        };
        let dial = Dial {
            authorities,
            connect_timeout: config.connect_timeout,
        };
        let timeouts = Timeouts {
            connect: config.connect_timeout,
            response: config.response_timeout,
        };
        let urls: Vec<ConnectionInfo> = config
            .urls
            .iter()
            .map(|url| parse_url(url))
            .collect::<Result<_, _>>()?;
        let one = match config.url.as_str() {
            "" => None,
            url => Some(parse_url(url)?),
        };
        Ok(match config.mode {
            Mode::Single => {
                let info = one.ok_or("redis.url is missing")?;
                let name = info.addr().to_string();
                Self::One(Server::new(name, Finder::fixed(info, dial), timeouts))
            }
            Mode::Sentinel => {
                let name = config.master_name.clone();
                let master = match one {
                    Some(master) => master,
                    None => parse_url("redis://master")?,
                };
                let finder = Finder::sentinels(urls, name.clone(), master, dial);
                Self::One(Server::new(name, finder, timeouts))
            }
            Mode::Cluster => Self::Cluster(Box::new(Cluster {
                seeds: one.into_iter().chain(urls).collect(),
                dial,
                timeouts,
                known: Mutex::default(),
                map: RwLock::new(vec![None; usize::from(SLOTS)]),
                refreshed: tokio::sync::Mutex::new(None),
            })),
        })
    }

    /// The server that has `slot`, as far as is known.
    pub(super) fn server_of(&self, slot: u16) -> Option<Arc<Server>> {
        match self {
            Self::One(server) => Some(server.clone()),
            Self::Cluster(cluster) => cluster.map.read()[usize::from(slot)].clone(),
        }
    }

    /// A server of a cluster by the address that another one gave.
    pub(super) fn server_at(&self, address: &str) -> Option<Arc<Server>> {
        match self {
            Self::One(_) => None,
            Self::Cluster(cluster) => cluster.at_address(address),
        }
    }

    /// Says that `slot` is at `address` now.
    pub(super) fn moved(&self, slot: u16, address: &str) {
        if let Self::Cluster(cluster) = self
            && let Some(server) = cluster.at_address(address)
        {
            cluster.map.write()[usize::from(slot)] = Some(server);
        }
    }

    /// Finds out anew who has what, unless that has just been done.
    pub(super) async fn refresh(&self) -> Result<(), StoreError> {
        match self {
            Self::One(_) => Ok(()),
            Self::Cluster(cluster) => cluster.refresh().await.map_err(StoreError::Unavailable),
        }
    }

    /// Every server that has a slot.
    pub(super) fn servers(&self) -> Vec<Arc<Server>> {
        match self {
            Self::One(server) => vec![server.clone()],
            Self::Cluster(cluster) => {
                let mut servers: Vec<Arc<Server>> = Vec::new();
                for server in cluster.map.read().iter().flatten() {
                    if !servers.iter().any(|known| Arc::ptr_eq(known, server)) {
                        servers.push(server.clone());
                    }
                }
                servers
            }
        }
    }
}

/// A Redis Cluster.
pub(super) struct Cluster {
    seeds: Vec<ConnectionInfo>,
    dial: Dial,
    timeouts: Timeouts,
    /// Every server ever heard of, by its address.
    known: Mutex<HashMap<String, Arc<Server>>>,
    /// By slot.
    map: RwLock<Vec<Option<Arc<Server>>>>,
    /// When, and by whose word.
    refreshed: tokio::sync::Mutex<Option<Instant>>,
}

/// First and last slot, then the servers, the master first: each host, port, and what else there may be.
type Range = Vec<redis::Value>;

/// The slots of a range, and where its master is.
fn read_range(range: Range) -> Option<(u16, u16, Option<String>, u16)> {
    let mut fields = range.into_iter();
    let first = redis::from_redis_value(fields.next()?).ok()?;
    let last = redis::from_redis_value(fields.next()?).ok()?;
    let master: Vec<redis::Value> = redis::from_redis_value(fields.next()?).ok()?;
    let mut master = master.into_iter();
    let host: Option<String> = redis::from_redis_value(master.next()?).ok()?;
    let port = redis::from_redis_value(master.next()?).ok()?;
    let host = host.filter(|host| !host.is_empty() && host != "?");
    Some((first, last, host, port))
}

const REFRESH_MIN: Duration = Duration::from_millis(100);

impl Cluster {
    fn at_address(&self, address: &str) -> Option<Arc<Server>> {
        let (host, port) = address.rsplit_once(':')?;
        self.at(host, port.parse().ok()?)
    }

    fn at(&self, host: &str, port: u16) -> Option<Arc<Server>> {
        let name = format!("{host}:{port}");
        let mut known = self.known.lock();
        if let Some(server) = known.get(&name) {
            return Some(server.clone());
        }
        let info = at(self.seeds.first()?, host, port);
        let finder = Finder::fixed(info, self.dial.clone());
        let server = Server::new(name.clone(), finder, self.timeouts);
        known.insert(name, server.clone());
        Some(server)
    }

    async fn refresh(&self) -> Result<(), String> {
        let mut refreshed = self.refreshed.lock().await;
        if refreshed.is_some_and(|at| at.elapsed() < REFRESH_MIN) {
            return Ok(());
        }
        let mut why = "no server of the cluster is known".to_owned();
        let mut question = redis::cmd("CLUSTER");
        question.arg("SLOTS");
        for (host, info) in self.candidates() {
            match self.dial.ask::<Vec<Range>>(&info, &question).await {
                Ok(ranges) if !ranges.is_empty() => {
                    self.learn(&host, ranges);
                    *refreshed = Some(Instant::now());
                    return Ok(());
                }
                Ok(_) => why = "the cluster has no slots".into(),
                Err(error) => why = error,
            }
        }
        *refreshed = Some(Instant::now());
        Err(format!("no server of the cluster answers: {why}"))
    }

    /// Whom to ask, another one first each time: known servers, then the configured ones.
    fn candidates(&self) -> Vec<(String, ConnectionInfo)> {
        let mut names: Vec<String> = self.known.lock().keys().cloned().collect();
        names.sort();
        if !names.is_empty() {
            let turn = ahash::RandomState::new().hash_one(names.len()) % names.len() as u64;
            names.rotate_left(usize::try_from(turn).unwrap_or(0));
        }
        let known = names.iter().filter_map(|name| {
            let (host, port) = name.rsplit_once(':')?;
            let info = at(self.seeds.first()?, host, port.parse().ok()?);
            Some((host.to_owned(), info))
        });
        let seeds = self.seeds.iter().map(|info| {
            let host = match info.addr() {
                ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host.clone(),
                _ => String::new(),
            };
            (host, info.clone())
        });
        known.chain(seeds).collect()
    }

    /// `asked` is the host that said so: it may not know its own name.
    fn learn(&self, asked: &str, ranges: Vec<Range>) {
        let mut map = vec![None; usize::from(SLOTS)];
        for (first, last, host, port) in ranges.into_iter().filter_map(read_range) {
            let server = self.at(host.as_deref().unwrap_or(asked), port);
            for slot in first..=last.min(SLOTS - 1) {
                map[usize::from(slot)] = server.clone();
            }
        }
        *self.map.write() = map;
    }
}
