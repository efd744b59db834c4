//! Redis restarted, flushed, frozen for longer than a lease, and failed over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moorline_tests::amqp::Listener;
use moorline_tests::device::{Arrived, Device};
use moorline_tests::servers::{MASTER_NAME, Sentinels};
use moorline_tests::wire::{Packet, V5};
use moorline_tests::{Random, eventually};

use super::bots::{Bots, Habits};
use super::ledger::settle;
use super::pushers::Pushers;
use super::world::{Shape, World};

const BOTS: usize = 300;
const PAUSE: Duration = Duration::from_millis(1000);
/// Longer than the ten seconds of a lease.
const FROZEN: Duration = Duration::from_secs(20);

const WITH_WILLS: Habits = Habits {
    has_will: true,
    ..Habits::STEADY
};

/// A device that counts the wills of the others.
struct Mourner {
    wills: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Mourner {
    async fn start(world: &World) -> Self {
        let address = world.mqtt.get(0).unwrap();
        let mut device = Device::clean(address, V5, "mourner").await;
        assert_eq!(device.subscribe("wills/#", 0).await, 0);
        let wills = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&wills);
        let task = tokio::spawn(async move {
            loop {
                match device.receive(Duration::from_secs(3600)).await {
                    Arrived::Packet(Packet::Publish(_)) => {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Arrived::Closed => panic!("the mourner was disconnected"),
                    _ => {}
                }
            }
        });
        Self { wills, task }
    }

    fn check(self) {
        assert!(!self.task.is_finished(), "the mourner stays connected");
        self.task.abort();
        let wills = self.wills.load(Ordering::Relaxed);
        assert_eq!(wills, 0, "wills of devices that never went");
    }
}

/// What watches that nothing happens which must not.
struct Watch {
    mourner: Mourner,
    events: Listener,
    epochs: Vec<u64>,
}

/// Everything that must not have happened while devices stayed.
async fn check_calm(world: &World, bots: &Bots, watch: Watch) {
    let Watch {
        mourner,
        mut events,
        epochs: before,
    } = watch;
    for (key, body) in events.take(Duration::from_millis(500)).await {
        assert_ne!(key, "device.offline", "of a device that never went: {body}");
    }
    assert_eq!(bots.lost(), 0, "connected devices stay");
    let after = world.epochs(&bots.names).await;
    for ((name, before), after) in bots.names.iter().zip(&before).zip(&after) {
        assert!(after >= before, "{name}: epoch {after} after {before}");
    }
    mourner.check();
}

async fn begin(world: &World, random: &mut Random) -> (Bots, Pushers, Watch) {
    let bots = Bots::start(BOTS, &world.mqtt, random, WITH_WILLS).await;
    let events = Listener::of(&world.stores.rabbit.url, "moorline.events").await;
    let mourner = Mourner::start(world).await;
    let epochs = world.epochs(&bots.names).await;
    let pushers = Pushers::start(&bots.names, &world.http, random, PAUSE);
    pushers.await_more(BOTS, Duration::from_secs(60)).await;
    let watch = Watch {
        mourner,
        events,
        epochs,
    };
    (bots, pushers, watch)
}

#[test]
fn a_restart_of_redis_loses_nothing_and_disconnects_nobody() {
    const NAME: &str = "redis restarts";
    super::rounds(NAME, async |mut random| {
        let mut world = World::start(Shape::default()).await;
        let (mut bots, pushers, watch) = begin(&world, &mut random).await;
        for _ in 0..2 {
            tokio::time::sleep(random.millis(200, 1500)).await;
            world.redis().kill9();
            tokio::time::sleep(random.millis(200, 2000)).await;
            world.redis().restart().await;
            pushers.await_more(BOTS, Duration::from_secs(60)).await;
        }
        let pushed = pushers.stop().await;
        check_calm(&world, &bots, watch).await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        world.finish().await;
    });
}

#[test]
fn after_a_flush_of_redis_everything_accepted_since_arrives() {
    const NAME: &str = "redis is flushed";
    super::rounds(NAME, async |mut random| {
        let mut world = World::start(Shape::default()).await;
        let (mut bots, pushers, watch) = begin(&world, &mut random).await;
        tokio::time::sleep(random.millis(200, 1500)).await;
        world.redis().flush().await;
        let flushed = Instant::now();
        pushers.await_more(2 * BOTS, Duration::from_secs(60)).await;
        let pushed = pushers.stop().await;
        // Routes are written again by themselves.
        check_calm(&world, &bots, watch).await;
        settle(NAME, &world.witness(), &mut bots, pushed, Some(flushed)).await;
        world.finish().await;
    });
}

#[test]
fn a_redis_frozen_for_longer_than_a_lease_ends_no_session() {
    const NAME: &str = "redis is frozen";
    super::rounds(NAME, async |mut random| {
        let mut world = World::start(Shape::default()).await;
        let (mut bots, pushers, watch) = begin(&world, &mut random).await;
        let refused = pushers.refused();
        world.redis().freeze();
        let frozen = Instant::now();
        tokio::time::sleep(FROZEN).await;
        let still = Instant::now();
        world.redis().thaw();
        let false_accepts = pushers.count_within(frozen, still);
        assert_eq!(
            false_accepts, 0,
            "pushes accepted by a store that is frozen"
        );
        assert!(
            pushers.refused() > refused,
            "pushes are answered 503 meanwhile"
        );
        pushers.await_more(BOTS, Duration::from_secs(60)).await;
        let pushed = pushers.stop().await;
        check_calm(&world, &bots, watch).await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        world.finish().await;
    });
}

#[test]
fn a_failover_of_redis_keeps_what_a_replica_has_confirmed() {
    const NAME: &str = "redis fails over";
    super::rounds(NAME, async |mut random| {
        let mut redis = Sentinels::start().await;
        let urls = redis.urls();
        let mut world = World::start(Shape {
            redis_section: Some(format!(
                "mode = \"sentinel\"\nurls = {urls:?}\nmaster_name = \"{MASTER_NAME}\"\nwait_replicas = 1\n"
            )),
            ..Shape::default()
        })
        .await;
        let (mut bots, pushers, watch) = begin(&world, &mut random).await;
        tokio::time::sleep(random.millis(200, 1500)).await;
        let started = Instant::now();
        redis.fail_over().await;
        eprintln!("{NAME}: a new master after {:.1?}", started.elapsed());
        pushers.await_more(BOTS, Duration::from_secs(60)).await;
        let pushed = pushers.stop().await;
        check_calm(&world, &bots, watch).await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        // Whoever reads this list of servers must have outlived the world.
        eventually(Duration::from_secs(1), "a master", || async {
            Some(redis.master().await)
        })
        .await;
        world.expect_error("redis");
        world.finish().await;
    });
}
