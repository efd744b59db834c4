//! One node without its link to Redis for longer than its lease.

use std::time::Duration;

use moorline_tests::eventually;
use moorline_tests::servers::{Proxy, RedisServer};

use super::ledger::settle;
use super::under_load;
use super::world::{Shape, World};

const BOTS: usize = 300;
/// Longer than the ten seconds of a lease.
const CUT: Duration = Duration::from_secs(14);

#[test]
fn a_node_cut_off_from_redis_gives_up_what_moved_and_keeps_what_is_its_own() {
    const NAME: &str = "a node is cut off";
    super::rounds(NAME, async |mut random| {
        let redis = RedisServer::start().await;
        let mut links = Vec::new();
        for _ in 0..3 {
            links.push(Proxy::to(redis.address()).await);
        }
        let world = World::start(Shape {
            redis_of_node: links.iter().map(Proxy::address).collect(),
            redis: Some(redis),
            ..Shape::default()
        })
        .await;
        let pause = Duration::from_millis(1000);
        let (mut bots, pushers) = under_load(&world, BOTS, &mut random, pause).await;
        let node = usize::try_from(random.below(3)).unwrap();
        let there = bots.on_node(node).len();
        if random.one_in(2) {
            links[node].cut();
        } else {
            links[node].freeze();
        }
        let cut = tokio::time::Instant::now();
        bots.leave(node);
        // Devices that moved are elsewhere, and get what is pushed to them.
        eventually(
            Duration::from_secs(60),
            "half of its devices moved",
            || async {
                let left = bots.on_node(node).len();
                (left <= there * 2 / 3 && bots.online() == BOTS as u64).then_some(())
            },
        )
        .await;
        pushers.await_more(2 * BOTS, Duration::from_secs(60)).await;
        tokio::time::sleep_until(cut + CUT).await;
        links[node].heal();
        pushers.await_more(BOTS, Duration::from_secs(60)).await;
        let pushed = pushers.stop().await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        assert_eq!(bots.left_open(), 0, "the old node closes what moved");
        world.finish().await;
    });
}
