//! Every process restarted in turn, as an operator does it, under load.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::bots::Bots;
use super::ledger::settle;
use super::pushers::Accepted;
use super::under_load;
use super::world::{Shape, World};

const BOTS: usize = 300;

#[test]
fn a_rolling_restart_of_every_process_loses_nothing() {
    const NAME: &str = "a rolling restart";
    super::rounds(NAME, async |mut random| {
        let mut world = World::start(Shape::default()).await;
        let pause = Duration::from_millis(1000);
        let (mut bots, pushers) = under_load(&world, BOTS, &mut random, pause).await;
        let calm_from = Instant::now();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let calm_to = Instant::now();
        // When each node was on its way out or in.
        let mut rolled = Vec::new();
        for node in 0..3 {
            let from = Instant::now();
            world.roll_node(node).await;
            rolled.push((node, from, Instant::now()));
            bots.await_online().await;
        }
        for at in 0..2 {
            world.roll_service(at).await;
            world.roll_worker(at).await;
            pushers.await_more(BOTS, Duration::from_secs(60)).await;
        }
        let pushed = pushers.stop().await;
        let accepted = pushed.accepted.clone();
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        let latencies = latencies(&bots, &accepted);
        let calm = latencies
            .iter()
            .filter(|one| one.began >= calm_from && one.began < calm_to);
        let elsewhere = latencies.iter().filter(|one| {
            rolled
                .iter()
                .any(|(node, from, to)| one.node != *node && one.began >= *from && one.began < *to)
        });
        eprintln!(
            "{NAME}: push to arrival, p50 and p99: {} before, {} on the other nodes while one restarts",
            percentiles(calm.map(|one| one.took)),
            percentiles(elsewhere.map(|one| one.took)),
        );
        world.finish().await;
    });
}

struct Latency {
    began: Instant,
    took: Duration,
    node: usize,
}

/// From the first call to the arrival, of what was accepted at the first call.
fn latencies(bots: &Bots, accepted: &[Accepted]) -> Vec<Latency> {
    let by_client: HashMap<&str, usize> = bots
        .names
        .iter()
        .enumerate()
        .map(|(at, name)| (name.as_str(), at))
        .collect();
    accepted
        .iter()
        .filter(|push| push.first == push.began || push.began - push.first < TINY)
        .filter_map(|push| {
            let memory = bots.memories[*by_client.get(push.client.as_str())?]
                .lock()
                .unwrap();
            let arrival = memory
                .arrived
                .iter()
                .find(|one| one.number == push.number)?;
            Some(Latency {
                began: push.began,
                took: arrival.at.saturating_duration_since(push.began),
                node: arrival.node,
            })
        })
        .collect()
}

const TINY: Duration = Duration::from_millis(1);

fn percentiles(durations: impl Iterator<Item = Duration>) -> String {
    let mut all: Vec<Duration> = durations.collect();
    all.sort_unstable();
    match all.len() {
        0 => "none".to_owned(),
        count => format!(
            "{:.1?} and {:.1?} ({count} pushes)",
            all[count / 2],
            all[count * 99 / 100]
        ),
    }
}
