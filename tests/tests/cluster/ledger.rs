//! What became of each message: accepted = delivered + waiting + expired + replaced + cancelled + dropped by policy, or the
//! test fails.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use moorline_tests::eventually;

use super::bots::Bots;
use super::pushers::{Accepted, Pushed};
use super::world::Witness;

/// The sums.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    accepted: usize,
    delivered: usize,
    waiting: usize,
    expired: usize,
    replaced: usize,
    cancelled: usize,
    dropped: usize,
    /// Accepted before the store was flushed, and gone with it: nobody promised otherwise.
    flushed: usize,
    duplicates: usize,
    ambiguous: u64,
    refused: u64,
    upstream: usize,
    upstream_duplicates: usize,
    connections_lost: u64,
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "accepted {} = delivered {} + waiting {} + expired {} + replaced {} + cancelled {} + dropped by policy {}",
            self.accepted,
            self.delivered,
            self.waiting,
            self.expired,
            self.replaced,
            self.cancelled,
            self.dropped
        )?;
        if self.flushed > 0 {
            write!(f, " + flushed {}", self.flushed)?;
        }
        write!(
            f,
            "; {} arrived twice with the same id; calls: {} without an answer, {} refused, all repeated; \
             upstream: {} acknowledged and arrived, {} of them twice; {} connections lost",
            self.duplicates,
            self.ambiguous,
            self.refused,
            self.upstream,
            self.upstream_duplicates,
            self.connections_lost
        )
    }
}

/// How long what was accepted may take to arrive once everything runs: longer than the pass that finds lost hints.
const SETTLES: Duration = Duration::from_secs(75);

/// Waits until everything has arrived that is to arrive, checks order, ids and sums, and prints them.
pub(crate) async fn settle(
    name: &str,
    world: &Witness<'_>,
    bots: &mut Bots,
    pushed: Pushed,
    flushed_at: Option<Instant>,
) -> Ledger {
    bots.await_online().await;
    bots.await_acknowledged().await;
    let by_client = by_client(&pushed.accepted);
    let started = Instant::now();
    // What was accepted before a flush may have gone with it.
    let must_arrive = |push: &Accepted| flushed_at.is_none_or(|flushed| push.first > flushed);
    let missing = || {
        let mut missing = Vec::new();
        for (at, client) in bots.names.iter().enumerate() {
            let arrived = bots.memories[at].lock().unwrap();
            let arrived: HashSet<u64> = arrived.arrived.iter().map(|one| one.number).collect();
            for push in by_client.get(client.as_str()).into_iter().flatten() {
                if must_arrive(push) && !arrived.contains(&push.number) {
                    missing.push((*push).clone());
                }
            }
        }
        missing
    };
    while !missing().is_empty() && started.elapsed() < SETTLES {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let settled = started.elapsed();
    let missing = missing();
    if !missing.is_empty() {
        explain(world, bots, &missing).await;
        panic!(
            "{name}: {} accepted messages did not arrive within {SETTLES:?}",
            missing.len()
        );
    }
    let upstream = await_upstream(name, world, bots).await;
    bots.stop().await;

    let mut ledger = Ledger {
        accepted: pushed.accepted.len(),
        ambiguous: pushed.ambiguous,
        refused: pushed.refused,
        connections_lost: bots.lost(),
        ..Ledger::default()
    };
    for (at, client) in bots.names.iter().enumerate() {
        let pushes = by_client.get(client.as_str()).cloned().unwrap_or_default();
        count_arrivals(&mut ledger, client, &pushes, bots, at, flushed_at);
    }
    count_absent(&mut ledger, world, &by_client, flushed_at).await;
    (ledger.upstream, ledger.upstream_duplicates) = upstream;
    let sum = ledger.delivered
        + ledger.waiting
        + ledger.expired
        + ledger.replaced
        + ledger.cancelled
        + ledger.dropped
        + ledger.flushed;
    eprintln!("{name}: {ledger}; settled in {settled:.1?}");
    assert_eq!(ledger.accepted, sum, "{name}: the sums differ");
    assert!(
        ledger.delivered > bots.names.len() && ledger.upstream > bots.names.len(),
        "{name}: no load"
    );
    ledger
}

fn by_client(accepted: &[Accepted]) -> BTreeMap<&str, Vec<&Accepted>> {
    let mut all: BTreeMap<&str, Vec<&Accepted>> = BTreeMap::new();
    for push in accepted {
        all.entry(&push.client).or_default().push(push);
    }
    all
}

/// Counts what one device got, and checks its order and its ids.
fn count_arrivals(
    ledger: &mut Ledger,
    client: &str,
    pushes: &[&Accepted],
    bots: &Bots,
    at: usize,
    flushed_at: Option<Instant>,
) {
    let memory = bots.memories[at].lock().unwrap();
    let mut seen: HashMap<u64, Option<&str>> = HashMap::new();
    let mut highest = None;
    for arrival in &memory.arrived {
        match seen.get(&arrival.number) {
            None => {
                assert!(
                    Some(arrival.number) > highest,
                    "{client}: {} came after {highest:?}",
                    arrival.number
                );
                highest = Some(arrival.number);
                seen.insert(arrival.number, arrival.id.as_deref());
            }
            Some(first) => {
                // After a flush nobody remembers which calls were accepted before.
                if flushed_at.is_none() {
                    assert_eq!(
                        *first,
                        arrival.id.as_deref(),
                        "{client}: {} came again with another id",
                        arrival.number
                    );
                }
                ledger.duplicates += 1;
            }
        }
    }
    for push in pushes {
        match seen.get(&push.number) {
            Some(id) => {
                if flushed_at.is_none() && id.is_some() {
                    assert_eq!(*id, Some(push.id.as_str()), "{client}: {}", push.number);
                }
                ledger.delivered += 1;
            }
            // `settle` has seen that nothing else is missing.
            None => ledger.flushed += 1,
        }
    }
}

/// Asks what became of what was pushed to devices that are not there.
async fn count_absent(
    ledger: &mut Ledger,
    world: &Witness<'_>,
    by_client: &BTreeMap<&str, Vec<&Accepted>>,
    flushed_at: Option<Instant>,
) {
    let api = &world.api;
    for (client, pushes) in by_client {
        if !client.starts_with("absent-") {
            continue;
        }
        // A short life ends when somebody looks.
        let mut waiting = 0;
        for push in pushes {
            let kind = push.kind;
            let path = format!("/v1/messages/{}", push.id);
            let state = eventually(Duration::from_secs(20), &path, || async {
                let answer = api.get(&path).await;
                let state = match answer.status {
                    404 => "gone".to_owned(),
                    _ => answer.expect(200)["state"].as_str()?.to_owned(),
                };
                use super::pushers::Kind::{Cancelled, Ordinary, ShortLived};
                let final_state = match kind {
                    Ordinary => true,
                    ShortLived => state != "accepted",
                    Cancelled => state != "accepted",
                };
                final_state.then_some(state)
            })
            .await;
            match state.as_str() {
                "accepted" | "sent" => {
                    waiting += 1;
                    ledger.waiting += 1;
                }
                "expired" => ledger.expired += 1,
                "replaced" => ledger.replaced += 1,
                "cancelled" => ledger.cancelled += 1,
                "dropped" => ledger.dropped += 1,
                "gone" if flushed_at.is_some_and(|flushed| push.first <= flushed) => {
                    ledger.flushed += 1;
                }
                other => panic!("{client}: message {} of {kind:?} is {other}", push.id),
            }
        }
        let inbox = crate::support::waiting(api, client).await;
        assert_eq!(inbox, waiting, "what waits for {client}");
    }
}

/// What the backend was told, by device; checks that everything acknowledged is there, in order, and returns how many
/// messages that are and how many came twice.
async fn await_upstream(name: &str, world: &Witness<'_>, bots: &Bots) -> (usize, usize) {
    let lacking = || {
        let told = told(world);
        let mut lacking = Vec::new();
        for (at, client) in bots.names.iter().enumerate() {
            let told: HashSet<u64> = told
                .get(client.as_str())
                .into_iter()
                .flatten()
                .map(|(number, _)| *number)
                .collect();
            let memory = bots.memories[at].lock().unwrap();
            let missing = memory.acknowledged.iter().filter(|one| !told.contains(one));
            lacking.extend(missing.map(|number| format!("{client}: {number}")));
        }
        lacking
    };
    let started = Instant::now();
    while !lacking().is_empty() && started.elapsed() < SETTLES {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let lacking = lacking();
    assert!(
        lacking.is_empty(),
        "{name}: {} upstream messages had their PUBACK and did not reach the backend: {:?}",
        lacking.len(),
        &lacking[..lacking.len().min(20)]
    );
    let mut duplicates = 0;
    for (client, numbers) in told(world) {
        let mut seen: HashMap<u64, String> = HashMap::new();
        let mut highest = None;
        for (number, id) in numbers {
            match seen.get(&number) {
                None => {
                    assert!(
                        Some(number) > highest,
                        "{client} said {number} before {highest:?}, the backend heard it after"
                    );
                    highest = Some(number);
                    seen.insert(number, id);
                }
                Some(_) => duplicates += 1,
            }
        }
    }
    let acknowledged = |memory: &std::sync::Arc<std::sync::Mutex<super::bots::Memory>>| {
        memory.lock().unwrap().acknowledged.len()
    };
    (bots.memories.iter().map(acknowledged).sum(), duplicates)
}

/// The numbers and ids that the backend was told, by device, in the order of the calls.
fn told(world: &Witness<'_>) -> HashMap<String, Vec<(u64, String)>> {
    let mut told: HashMap<String, Vec<(u64, String)>> = HashMap::new();
    for call in world.backend.calls() {
        let client = call.path.trim_start_matches('/').to_owned();
        let number = call.text().parse().expect("devices say numbers");
        told.entry(client)
            .or_default()
            .push((number, call.header("webhook-id").to_owned()));
    }
    told
}

/// Says what can be known of messages that did not arrive.
async fn explain(world: &Witness<'_>, bots: &Bots, missing: &[Accepted]) {
    let api = &world.api;
    for push in missing.iter().take(8) {
        let receipt = api.get(&format!("/v1/messages/{}", push.id)).await;
        let client = api.get(&format!("/v1/clients/{}", push.client)).await;
        eprintln!(
            "missing: {} number {}: receipt {} {}; client {} {}",
            push.client, push.number, receipt.status, receipt.text, client.status, client.text
        );
        if let Some(at) = bots.names.iter().position(|name| *name == push.client) {
            let memory = bots.memories[at].lock().unwrap();
            let arrived: Vec<u64> = memory.arrived.iter().map(|one| one.number).collect();
            let from = arrived.len().saturating_sub(12);
            eprintln!(
                "    connects {}, lost {}, on node {:?}, arrived last {:?}",
                memory.connects,
                memory.lost,
                memory.node,
                &arrived[from..]
            );
        }
    }
}
