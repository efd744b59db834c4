//! RabbitMQ restarted, frozen, and in memory alarm.

use std::time::Duration;

use moorline_tests::eventually;

use super::bots::Bots;
use super::ledger::settle;
use super::pushers::Pushers;
use super::under_load;
use super::world::{Shape, World};

const BOTS: usize = 300;

/// PUBACKs wait and pushes go on.
async fn upstream_waits(bots: &Bots, pushers: &Pushers) {
    // Confirms that were on their way arrive; each device then waits for one PUBACK.
    let before = eventually(Duration::from_secs(20), "PUBACKs wait", || async {
        let before = bots.acknowledged();
        tokio::time::sleep(Duration::from_secs(2)).await;
        (bots.acknowledged() == before).then_some(before)
    })
    .await;
    pushers.await_more(BOTS, Duration::from_secs(60)).await;
    assert_eq!(bots.acknowledged(), before, "a PUBACK without a confirm");
    assert_eq!(bots.lost(), 0, "connected devices stay");
}

async fn upstream_goes_on(bots: &Bots) {
    let before = bots.acknowledged();
    eventually(Duration::from_secs(60), "PUBACKs come again", || async {
        (bots.acknowledged() > before + BOTS).then_some(())
    })
    .await;
}

#[test]
fn without_rabbitmq_pubacks_wait_pushes_go_on_and_nothing_acknowledged_is_missing() {
    const NAME: &str = "rabbitmq is away";
    super::rounds(NAME, async |mut random| {
        let mut world = World::start(Shape {
            own_rabbit: true,
            ..Shape::default()
        })
        .await;
        let pause = Duration::from_millis(1000);
        let (mut bots, pushers) = under_load(&world, BOTS, &mut random, pause).await;

        tokio::time::sleep(random.millis(200, 1500)).await;
        world.rabbit().kill9();
        upstream_waits(&bots, &pushers).await;
        world.rabbit().restart().await;
        upstream_goes_on(&bots).await;

        world.rabbit().freeze();
        upstream_waits(&bots, &pushers).await;
        world.rabbit().thaw();
        upstream_goes_on(&bots).await;

        world.rabbit.memory_alarm(true).await;
        upstream_waits(&bots, &pushers).await;
        world.rabbit.memory_alarm(false).await;
        upstream_goes_on(&bots).await;

        let pushed = pushers.stop().await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        assert_eq!(bots.lost(), 0, "connected devices stay");
        world.finish().await;
    });
}
