//! The cluster while parts of it die: three access nodes, two push services and two workers over a real Redis and a real
//! RabbitMQ, hundreds of bots that count every message, and a ledger that must come out even.
//!
//! Read in this order: [`world`] (the processes and the servers), [`bots`] (devices), [`pushers`] (backends that push),
//! [`ledger`] (what became of each message). The rest is one fault a file. Each test prints its seed.
//!
//! They take the whole machine, so they run one after the other, and a plain `cargo test` runs one round of each;
//! `MOORLINE_TEST_CHAOS_ROUNDS` says otherwise.

mod bots;
mod ledger;
mod pushers;
mod world;

mod cut_off;
mod delays_killed;
mod hopping;
mod node_killed;
mod one_process;
mod rabbit_away;
mod redis_away;
mod rolling;
mod services_killed;
mod subscribers;

use std::time::Duration;

use moorline_tests::Random;

use bots::{Bots, Habits};
use pushers::Pushers;
use world::World;

/// Runs `test` as often as asked, each time with a seed of its own, alone among the tests of this module.
fn rounds(name: &str, test: impl AsyncFn(Random)) {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let rounds: u64 = std::env::var("MOORLINE_TEST_CHAOS_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    let mut seeds = Random::announced(name);
    for round in 0..rounds {
        let seed = if round == 0 {
            seeds.seed()
        } else {
            seeds.next()
        };
        eprintln!("{name}: round {} of {rounds}, seed {seed}", round + 1);
        let started = std::time::Instant::now();
        crate::support::run(test(Random::from_seed(seed)));
        eprintln!("{name}: round {} took {:.0?}", round + 1, started.elapsed());
    }
}

/// So many devices on `world`, and backends that push to each with `pause` in between. Resolves when as many pushes were
/// accepted as there are devices.
async fn under_load(
    world: &World,
    devices: usize,
    random: &mut Random,
    pause: Duration,
) -> (Bots, Pushers) {
    let bots = Bots::start(devices, &world.mqtt, random, Habits::STEADY).await;
    let pushers = Pushers::start(&bots.names, &world.http, random, pause);
    pushers.await_more(devices, Duration::from_secs(60)).await;
    (bots, pushers)
}
