//! Two thousand devices that change nodes as fast as they can.

use std::time::Duration;

use moorline_tests::eventually;

use super::bots::{Bots, Habits};
use super::ledger::settle;
use super::pushers::Pushers;
use super::world::{Shape, World};

const BOTS: usize = 2_000;
const HOPPING: Duration = Duration::from_secs(15);

#[test]
fn devices_that_hop_between_nodes_lose_nothing_and_are_in_one_place() {
    const NAME: &str = "devices hop";
    super::rounds(NAME, async |mut random| {
        let world = World::start(Shape::default()).await;
        let habits = Habits {
            hops_within: Some(Duration::from_millis(500)),
            says_every: Duration::from_secs(5),
            has_will: false,
        };
        let mut bots = Bots::start(BOTS, &world.mqtt, &mut random, habits).await;
        let pause = Duration::from_secs(6);
        let pushers = Pushers::start(&bots.names, &world.http, &mut random, pause);
        bots.hop(true);
        let begun = connects(&bots);
        tokio::time::sleep(HOPPING).await;
        pushers.await_more(BOTS, Duration::from_secs(90)).await;
        let hops = connects(&bots) - begun;
        bots.hop(false);
        let pushed = pushers.stop().await;
        bots.await_online().await;
        // Every node is asked, and the connections of all of them together are those of the devices.
        eventually(
            Duration::from_secs(60),
            "each session in one place",
            || async {
                let mut sum = 0.0;
                for node in 0..3 {
                    sum += world.node_metric(node, "moorline_mqtt_connections").await;
                }
                (sum as usize == BOTS).then_some(())
            },
        )
        .await;
        let api = world.api();
        for (at, name) in bots.names.iter().enumerate().step_by(10) {
            let client = api.get(&format!("/v1/clients/{name}")).await.expect(200);
            let node = bots.memories[at].lock().unwrap().node.unwrap();
            let at = client["node"].as_str().unwrap_or_default();
            assert!(
                at.starts_with(&world.nodes[node].name),
                "{name} is on node {node}, the API says {client}"
            );
        }
        eprintln!("{NAME}: {hops} hops");
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        assert_eq!(bots.left_open(), 0, "old connections are closed");
        world.finish().await;
    });
}

fn connects(bots: &Bots) -> u64 {
    bots.memories
        .iter()
        .map(|memory| memory.lock().unwrap().connects)
        .sum()
}
