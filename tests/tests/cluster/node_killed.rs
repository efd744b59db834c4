//! `kill -9` of an access node under load.

use std::time::Duration;

use super::ledger::settle;
use super::under_load;
use super::world::{Shape, World};

const BOTS: usize = 300;

#[test]
fn what_was_accepted_follows_the_devices_of_a_killed_node_in_order() {
    const NAME: &str = "a node is killed";
    super::rounds(NAME, async |mut random| {
        let mut world = World::start(Shape::default()).await;
        let pause = Duration::from_millis(1000);
        let (mut bots, pushers) = under_load(&world, BOTS, &mut random, pause).await;
        for _ in 0..2 {
            tokio::time::sleep(random.millis(200, 1500)).await;
            let victim = usize::try_from(random.below(3)).unwrap();
            world.kill_node(victim);
            bots.await_online().await;
            pushers.await_more(BOTS, Duration::from_secs(60)).await;
            world.start_node(victim);
            world.await_ready().await;
        }
        let pushed = pushers.stop().await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        world.finish().await;
    });
}
