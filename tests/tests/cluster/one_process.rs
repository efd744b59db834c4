//! The same bots and the same ledger on one process over the embedded store: what a cluster is measured with is right.

use std::time::Duration;

use moorline_tests::{Backend, Gateway, Options};

use super::bots::{Bots, Habits};
use super::ledger::settle;
use super::pushers::Pushers;
use super::world::{Addresses, Witness, config};

const BOTS: usize = 300;

#[test]
fn the_ledger_of_one_process_comes_out_even_after_kill_9() {
    const NAME: &str = "one process is killed";
    super::rounds(NAME, async |mut random| {
        let backend = Backend::start().await;
        let mut gateway = Gateway::start_with(Options::config(&config("", &backend))).await;
        let (mqtt, http) = (Addresses::one(gateway.mqtt()), Addresses::one(gateway.http));
        let mut bots = Bots::start(BOTS, &mqtt, &mut random, Habits::STEADY).await;
        let pause = Duration::from_millis(1000);
        let pushers = Pushers::start(&bots.names, &http, &mut random, pause);
        for _ in 0..2 {
            pushers.await_more(BOTS, Duration::from_secs(60)).await;
            tokio::time::sleep(random.millis(200, 1500)).await;
            gateway.kill9();
            gateway.restart().await;
            mqtt.set(0, Some(gateway.mqtt()));
            http.set(0, Some(gateway.http));
            bots.await_online().await;
        }
        let pushed = pushers.stop().await;
        let witness = Witness {
            api: gateway.api(),
            backend: &backend,
        };
        settle(NAME, &witness, &mut bots, pushed, None).await;
        gateway.finish().await;
    });
}
