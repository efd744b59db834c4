//! `kill -9` of a push service and of a worker, each under load, while another of each goes on.

use std::time::{Duration, Instant};

use moorline_tests::eventually;
use moorline_tests::servers::Proxy;
use moorline_tests::servers::process::free_port;

use super::bots::{Bots, Habits};
use super::ledger::settle;
use super::pushers::Pushers;
use super::under_load;
use super::world::{Shape, World};

const BOTS: usize = 300;

#[test]
fn a_killed_push_service_or_worker_loses_nothing_while_another_one_goes_on() {
    const NAME: &str = "services are killed";
    super::rounds(NAME, async |mut random| {
        let mut world = World::start(Shape::default()).await;
        let pause = Duration::from_millis(1000);
        let (mut bots, pushers) = under_load(&world, BOTS, &mut random, pause).await;
        for _ in 0..2 {
            let victim = usize::try_from(random.below(2)).unwrap();
            tokio::time::sleep(random.millis(200, 1500)).await;
            world.kill_service(victim);
            pushers.await_more(BOTS, Duration::from_secs(60)).await;
            world.start_service(victim);
            tokio::time::sleep(random.millis(200, 1500)).await;
            world.kill_worker(victim);
            pushers.await_more(BOTS, Duration::from_secs(60)).await;
            world.start_worker(victim);
        }
        let pushed = pushers.stop().await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        assert_eq!(bots.lost(), 0, "devices have nothing to do with it");
        world.finish().await;
    });
}

#[test]
fn a_push_whose_service_died_before_it_told_the_node_arrives_without_a_reconnect() {
    const NAME: &str = "a push service dies between append and delivery";
    super::rounds(NAME, async |mut random| {
        // Between push services and nodes there are links that can be cut.
        let mut internal = Vec::new();
        let mut links = Vec::new();
        for _ in 0..3 {
            let listen = ([127, 0, 0, 1], free_port()).into();
            let link = Proxy::to(listen).await;
            internal.push((link.address(), listen));
            links.push(link);
        }
        let mut world = World::start(Shape {
            internal_of_node: internal,
            ..Shape::default()
        })
        .await;
        let mut bots = Bots::start(BOTS, &world.mqtt, &mut random, Habits::STEADY).await;
        links.iter().for_each(Proxy::freeze);
        let pause = Duration::from_millis(300);
        let pushers = Pushers::start(&bots.names, &world.http, &mut random, pause);
        pushers.await_more(BOTS, Duration::from_secs(60)).await;
        world.kill_service(0);
        world.kill_service(1);
        let dead = Instant::now();
        links.iter().for_each(Proxy::heal);
        // What was accepted is in the inboxes, and nobody is left who could tell.
        eventually(
            Duration::from_secs(35),
            "the pass over all inboxes",
            || async {
                let arrived: usize = bots
                    .memories
                    .iter()
                    .map(|memory| memory.lock().unwrap().arrived.len())
                    .sum();
                (arrived + super::pushers::ABSENT * 10 >= pushers.count()).then_some(())
            },
        )
        .await;
        eprintln!("{NAME}: found after {:.1?}", dead.elapsed());
        world.start_service(0);
        world.start_service(1);
        let pushed = pushers.stop().await;
        settle(NAME, &world.witness(), &mut bots, pushed, None).await;
        assert_eq!(bots.lost(), 0, "nobody had to reconnect");
        world.finish().await;
    });
}
