//! Leases: of nodes and of shards, by the clock of Redis.
//!
//! They are all in one slot and judged in one place, so that nobody loses a lease because the store was away (see
//! `lua/leases.lua`). What was learned of the nodes is kept for a moment: a look-up asks for the route only.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use redis::Value;

use super::keys::Keys;
use super::link::Link;
use super::reply::parse;
use super::script::{Call, Script, script};
use crate::record::{RecordReader, RecordWriter};
use crate::{NodeId, NodeRecord, NodeState, Route, StoreError};

static NODE_LOOK: Script = script!("leases.lua", "node_look.lua", "nodes.lua");
static NODE_RENEW: Script = script!("leases.lua", "node_renew.lua", "nodes.lua");
static NODE_LEAVE: Script = script!("leases.lua", "node_leave.lua", "nodes.lua");
static SHARD_HOLD: Script = script!("leases.lua", "shard_hold.lua");
static SHARD_LET_GO: Script = script!("leases.lua", "shard_let_go.lua");
static SHARD_HOLDER: Script = script!("leases.lua", "shard_holder.lua");

pub(super) static SCRIPTS: &[&Script] = &[
    &NODE_LOOK,
    &NODE_RENEW,
    &NODE_LEAVE,
    &SHARD_HOLD,
    &SHARD_LET_GO,
    &SHARD_HOLDER,
];

/// How long an answer about nodes is good for; a node that it does not name is asked for sooner.
const FRESH: Duration = Duration::from_millis(500);
/// What is stored already does not wait for longer: the registry may be in a part of a cluster that is gone.
const PATIENCE: Duration = Duration::from_millis(200);
const FRESH_FOR_STRANGERS: Duration = Duration::from_millis(5);

/// The nodes whose lease is valid.
#[derive(Debug, Clone)]
pub(super) struct Nodes {
    at: Instant,
    /// The registry is to be asked several times in each lease: it would take more for an outage.
    fresh_until: Instant,
    /// Whether the one that renewed had its lease until then.
    known: bool,
    /// Since the registry was made, and the longest lease.
    age: Duration,
    longest_lease: Duration,
    alive: HashMap<NodeId, (Instant, NodeRecord)>,
}

impl Nodes {
    /// Whether the store said so: it also gives more time to leases that nobody could renew, which no clock here knows of.
    pub(super) fn is_alive(&self, node: &NodeId) -> bool {
        self.alive.contains_key(node)
    }

    /// Whether that is still to be relied on.
    fn is_alive_for_sure(&self, node: &NodeId) -> bool {
        let now = Instant::now();
        let until = self.alive.get(node).map(|(until, _)| *until);
        self.fresh_until > now && until.is_some_and(|until| until > now)
    }

    /// Whether a node that is not alive is dead: after the registry was emptied not before every node had the time to
    /// say that it is there. Where nobody is alive it was emptied a moment ago, and how long a lease is has still to be said.
    pub(super) fn is_dead(&self, node: &NodeId) -> bool {
        !self.alive.is_empty() && !self.is_alive(node) && self.age > self.longest_lease
    }

    pub(super) fn records(self) -> Vec<NodeRecord> {
        let mut nodes: Vec<_> = self.alive.into_values().map(|(_, record)| record).collect();
        nodes.sort_by(|one, other| one.id.cmp(&other.id));
        nodes
    }
}

/// The registry, and what was learned from it last.
pub(super) struct Registry {
    link: Arc<Link>,
    keys: Keys,
    last: Mutex<Option<Nodes>>,
    asking: tokio::sync::Mutex<()>,
}

/// Leases keep their order among each other: a renewal that was called earlier does not undo a leave.
const ORDER: &str = "\0leases";

impl Registry {
    pub(super) fn new(link: Arc<Link>, keys: Keys) -> Self {
        Self {
            link,
            keys,
            last: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        }
    }

    /// The route if its node has its lease. It is left as it is where that cannot be found out at once: a hint that goes
    /// to a dead node does no harm.
    pub(super) async fn valid_route(&self, route: Option<Route>) -> Option<Route> {
        let route = route?;
        match tokio::time::timeout(PATIENCE, self.nodes_with(&route.node)).await {
            Ok(Ok(nodes)) if !nodes.is_alive(&route.node) => None,
            _ => Some(route),
        }
    }

    fn lease_keys(&self, records: bool) -> Vec<String> {
        let kinds = ["leases", "times", "records"];
        let count = if records { 3 } else { 2 };
        let key = |kind: &&str| self.keys.global("nodes", kind);
        kinds[..count].iter().map(key).collect()
    }

    /// Nodes as they are now.
    pub(super) async fn fresh_nodes(&self) -> Result<Nodes, StoreError> {
        let look = Call::script(&NODE_LOOK, &self.lease_keys(true));
        let began = Instant::now();
        let answer = self.link.submit(ORDER, look).await?;
        self.learn(began, answer)
    }

    /// Nodes as they were a moment ago; where that did not know `node`, as they are.
    pub(super) async fn nodes_with(&self, node: &NodeId) -> Result<Nodes, StoreError> {
        let fresh = || {
            let last = self.last.lock();
            let last = last.as_ref()?;
            let stranger = !last.is_alive(node) && last.at.elapsed() < FRESH_FOR_STRANGERS;
            (stranger || last.is_alive_for_sure(node)).then(|| last.clone())
        };
        if let Some(nodes) = fresh() {
            return Ok(nodes);
        }
        let _asking = self.asking.lock().await;
        match fresh() {
            Some(nodes) => Ok(nodes),
            None => self.fresh_nodes().await,
        }
    }

    pub(super) async fn renew_lease(
        &self,
        node: &NodeRecord,
        lease_ms: u64,
    ) -> Result<bool, StoreError> {
        let keys = self.lease_keys(true);
        let record = write_node(keys[2].as_bytes(), node);
        let renew = Call::script(&NODE_RENEW, &keys)
            .arg(node.id.as_str())
            .arg(lease_ms)
            .arg(record);
        let began = Instant::now();
        let answer = self.link.submit(ORDER, renew).await?;
        Ok(self.learn(began, answer)?.known)
    }

    pub(super) async fn give_lease_up(&self, node: &NodeId) -> Result<(), StoreError> {
        let leave = Call::script(&NODE_LEAVE, &self.lease_keys(true)).arg(node.as_str());
        let began = Instant::now();
        let answer = self.link.submit(ORDER, leave).await?;
        self.learn(began, answer).map(|_| ())
    }

    /// `began` is before the answer was made: no lease is thought to last longer than it does.
    fn learn(&self, began: Instant, answer: Value) -> Result<Nodes, StoreError> {
        let records = self.keys.global("nodes", "records");
        let mut answer = parse::<Vec<Value>>(answer)?.into_iter();
        let known: u8 = parse(answer.next().unwrap_or_default())?;
        let age_ms: u64 = parse(answer.next().unwrap_or_default())?;
        let longest_ms: u64 = parse(answer.next().unwrap_or_default())?;
        let mut alive = HashMap::new();
        let mut fresh_until = began + FRESH;
        for node in answer {
            let (id, left_ms, length_ms, record): (String, u64, u64, Vec<u8>) = parse(node)?;
            let id = NodeId::from_text(&id);
            let record = read_node(records.as_bytes(), id.clone(), &record)?;
            fresh_until = fresh_until.min(began + Duration::from_millis(length_ms) / 4);
            alive.insert(id, (began + Duration::from_millis(left_ms), record));
        }
        let nodes = Nodes {
            at: began,
            fresh_until,
            known: known == 1,
            age: Duration::from_millis(age_ms),
            longest_lease: Duration::from_millis(longest_ms),
            alive,
        };
        let mut last = self.last.lock();
        if last.as_ref().is_none_or(|last| last.at < began) {
            *last = Some(nodes.clone());
        }
        Ok(nodes)
    }

    pub(super) async fn hold_shard(
        &self,
        shard: u16,
        node: &NodeId,
        lease_ms: u64,
    ) -> Result<bool, StoreError> {
        let hold = Call::script(&SHARD_HOLD, &self.lease_keys(false))
            .arg(shard)
            .arg(node.as_str())
            .arg(lease_ms);
        Ok(parse::<u8>(self.link.submit(ORDER, hold).await?)? == 1)
    }

    pub(super) async fn let_shard_go(&self, shard: u16, node: &NodeId) -> Result<(), StoreError> {
        let let_go = Call::script(&SHARD_LET_GO, &self.lease_keys(false))
            .arg(shard)
            .arg(node.as_str());
        self.link.submit(ORDER, let_go).await.map(|_| ())
    }

    pub(super) async fn shard_holder(&self, shard: u16) -> Result<Option<NodeId>, StoreError> {
        let ask = Call::script(&SHARD_HOLDER, &self.lease_keys(false)).arg(shard);
        let holder: Option<String> = parse(self.link.submit(ORDER, ask).await?)?;
        Ok(holder.map(|node| NodeId::from_text(&node)))
    }
}

/// Fields that later versions add go behind these.
const RECORD_VERSION: u8 = 1;

fn write_node(key: &[u8], node: &NodeRecord) -> Vec<u8> {
    let mut writer = RecordWriter::new(RECORD_VERSION, 128);
    writer
        .text(&node.address)
        .text(&node.version)
        .u8(match node.state {
            NodeState::Up => 0,
            NodeState::Draining => 1,
        })
        .u64(node.connections)
        .text(&node.region)
        .text(&node.server_reference);
    writer.seal(key)
}

fn read_node(key: &[u8], id: NodeId, value: &[u8]) -> Result<NodeRecord, StoreError> {
    let mut reader = RecordReader::open(key, value, RECORD_VERSION)?;
    Ok(NodeRecord {
        id,
        address: reader.text()?.into(),
        version: reader.text()?.into(),
        state: match reader.u8()? {
            0 => NodeState::Up,
            _ => NodeState::Draining,
        },
        connections: reader.u64()?,
        region: reader.text()?.into(),
        server_reference: reader.text()?.into(),
    })
}
