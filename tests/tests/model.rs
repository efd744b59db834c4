//! A model of sessions against the real gateway: random steps of a few clients (subscriptions, publishes and
//! acknowledgements of every QoS in any order, connections cut, taken over, resumed or begun anew, the process
//! stopped and killed), and after each everything that MQTT promises.
//!
//! [`world`] is the model, [`walk`] takes the steps. A failure prints the steps and the seed that repeats them.

mod walk;
mod world;

use std::time::{Duration, Instant};

use moorline_tests::{Gateway, Options, Random, random};

use crate::support::run;
use walk::{IN_FLIGHT_MAX, Walk};

/// Steps of one walk.
const STEPS: usize = 120;
/// Where `MOORLINE_TEST_ROUNDS` says nothing else, walks begin for this long.
const PATIENCE: Duration = Duration::from_secs(12);

#[test]
fn sessions_behave_as_their_model_says_whatever_happens() {
    run(async {
        let seed = Random::announced("model of a session").seed();
        let walks = std::env::var_os("MOORLINE_TEST_ROUNDS").map(|_| random::rounds() * 4);
        let options = Options::default()
            .env("MOORLINE_MQTT__IN_FLIGHT_MAX", &IN_FLIGHT_MAX.to_string())
            .env("MOORLINE_MQTT__FLAPPING__CLIENT_CONNECTS", "0");
        let mut gateway = Gateway::start_with(options).await;
        let started = Instant::now();
        for number in 0_u64.. {
            let over = match walks {
                Some(walks) => number >= walks,
                None => started.elapsed() > PATIENCE,
            };
            if over {
                eprintln!("{number} walks in {:?}", started.elapsed());
                break;
            }
            let seed = seed.wrapping_add(number);
            eprintln!("walk of seed {seed} (MOORLINE_TEST_SEED={seed} repeats it)");
            let mut walk = Walk::begin(&mut gateway, seed).await;
            for _ in 0..STEPS {
                walk.step().await;
            }
            walk.end().await;
        }
        gateway.finish().await;
    });
}
