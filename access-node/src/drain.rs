//! Parting with devices at a rate that the other nodes can bear.

use std::time::Duration;

use moorline_mqtt::ByteString;
use moorline_router::{ClientId, NodeRecord, NodeState};
use tokio::time::Instant;

use crate::close_reason::CloseReason;
use crate::node::Node;

/// How often is looked where devices can go.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long connections that were just made or are just ending are waited for before the next look.
const PAUSE: Duration = Duration::from_millis(50);

/// How a node that is to stop parts with its devices.
#[derive(Debug, Clone, Copy)]
pub struct Drain {
    /// Devices that are asked to leave in a second.
    pub rate: u32,
    /// After this time it is over, whoever is still there.
    pub timeout: Duration,
}

/// Asks every device to leave; resolves when none is connected any more.
pub(crate) async fn run(node: &Node, rate: u32) {
    let between = Duration::from_secs(1) / rate.max(1);
    let mut destinations = Destinations::default();
    let mut at = Instant::now();
    loop {
        let connected = connected(node);
        if connected.is_empty() {
            return;
        }
        for client in connected {
            destinations.look(node).await;
            // Somewhere in its part of the second: devices of one make come back in step otherwise.
            let jitter = node.random(&client) % 1_000;
            let jitter = between.mul_f64(f64::from(u32::try_from(jitter).expect("small")) / 1e3);
            tokio::time::sleep_until(at + jitter).await;
            at = (at + between).max(Instant::now() - between);
            ask_to_leave(node, &client, destinations.next());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn connected(node: &Node) -> Vec<ClientId> {
    let sessions = node.sessions.iter();
    let connected = sessions.filter(|session| {
        let state = session.lock();
        state
            .link
            .as_ref()
            .is_some_and(|link| link.closing.is_none())
    });
    connected.map(|session| session.client.clone()).collect()
}

fn ask_to_leave(node: &Node, client: &ClientId, destination: Option<ByteString>) {
    let Some(session) = node.session(client) else {
        return;
    };
    if let Some(link) = &mut session.lock().link {
        match destination {
            Some(reference) => link.close_referring(CloseReason::Drained, Some(&reference)),
            None => link.close(CloseReason::ServerShuttingDown),
        }
    }
}

/// Where devices that leave are sent, in turn.
#[derive(Default)]
struct Destinations {
    looked: Option<Instant>,
    references: Vec<ByteString>,
    turn: usize,
}

impl Destinations {
    async fn look(&mut self, node: &Node) {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return;
        }
        self.looked = Some(Instant::now());
        // Where the registry does not answer, the places of before are as good as any.
        if let Ok(records) = node.stores.routes.nodes().await {
            let region = node.region();
            let others = records.iter().filter(|record| record.id != node.id);
            self.references = places(others, region);
        }
    }

    fn next(&mut self) -> Option<ByteString> {
        self.turn = self.turn.wrapping_add(1);
        let references = &self.references;
        references.get(self.turn % references.len().max(1)).cloned()
    }
}

/// Server references of nodes that take devices: those of `region` if there are any.
fn places<'a>(records: impl Iterator<Item = &'a NodeRecord>, region: &str) -> Vec<ByteString> {
    let up = records
        .filter(|record| record.state == NodeState::Up && !record.server_reference.is_empty());
    let up: Vec<_> = up.collect();
    let near = up.iter().filter(|record| record.region == region);
    let mut references: Vec<ByteString> = near.map(|record| reference(record)).collect();
    if references.is_empty() {
        references = up.iter().map(|record| reference(record)).collect();
    }
    references.sort();
    references.dedup();
    references
}

fn reference(record: &NodeRecord) -> ByteString {
    ByteString::from(record.server_reference.as_str())
}

#[cfg(test)]
mod tests {
    use moorline_router::NodeId;

    use super::*;

    fn node(name: &str, region: &str, state: NodeState) -> NodeRecord {
        NodeRecord {
            id: NodeId::from_text(name),
            address: String::new(),
            version: String::new(),
            state,
            connections: 0,
            region: region.to_owned(),
            server_reference: name.to_owned(),
        }
    }

    #[test]
    fn devices_are_sent_to_the_same_region_first_and_to_nobody_who_leaves() {
        let records = [
            node("far", "west", NodeState::Up),
            node("leaving", "east", NodeState::Draining),
            node("", "east", NodeState::Up),
        ];
        assert_eq!(places(records.iter(), "east"), ["far"]);
        let mut records = records.to_vec();
        records.extend([
            node("near-2", "east", NodeState::Up),
            node("near-1", "east", NodeState::Up),
        ]);
        assert_eq!(places(records.iter(), "east"), ["near-1", "near-2"]);
        assert_eq!(places(records.iter(), "south"), ["far", "near-1", "near-2"]);
        let nowhere = [node("leaving", "east", NodeState::Draining)];
        assert!(places(nowhere.iter(), "east").is_empty());
    }
}
