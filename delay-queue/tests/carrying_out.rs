//! The delay queue over a real store and real backends; the clock is set by hand where the time matters.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::{Duration, Instant};

use moorline_delay_queue::Config;
use moorline_router::{ActionKind, Clock, JobState, NodeId};
use support::{DEADLINE, World, backend};

#[tokio::test]
async fn nothing_is_done_before_its_time_whatever_wakes_the_queue() {
    let world = World::new(Clock::by_hand(1_000_000));
    let (url, calls) = backend(Duration::ZERO).await;
    let running = world.run(Config::default());
    world.call("first", 1_000_500, &url).await;
    world.call("second", 1_001_000, &url).await;
    world.clock.set(1_000_499);
    world.call("due", 1_000_499, &url).await;
    world.await_state("due", JobState::Fired).await;
    assert_eq!(world.job("first").await.state, JobState::Pending);
    world.clock.set(1_000_500);
    world.await_state("first", JobState::Fired).await;
    assert_eq!(world.job("second").await.state, JobState::Pending);
    // An earlier one is not kept waiting for the one that was known to be next.
    world.call("earlier", 1_000_600, &url).await;
    world.clock.set(1_000_600);
    world.await_state("earlier", JobState::Fired).await;
    assert_eq!(calls.lock().unwrap().len(), 3);
    running.stop().await;
}

#[tokio::test]
async fn a_flood_is_spread_at_the_rate_in_the_order_of_time() {
    let world = World::new(Clock::of_machine());
    let (url, calls) = backend(Duration::ZERO).await;
    let now_ms = world.clock.now_ms();
    for n in 0..120_u64 {
        world.call(&format!("{n:03}"), now_ms - 200 + n, &url).await;
    }
    let config = Config {
        rate: 100,
        concurrency: 8,
        webhook_concurrency: 1,
        ..Config::default()
    };
    let running = world.run(config);
    world.await_state("119", JobState::Fired).await;
    let calls = calls.lock().unwrap().clone();
    let bodies: Vec<_> = calls.iter().map(|(body, _)| body.clone()).collect();
    let expected: Vec<_> = (0..120).map(|n| format!("{n:03}")).collect();
    assert_eq!(bodies, expected);
    let took = calls[119].1 - calls[0].1;
    assert!(took >= Duration::from_millis(1_100), "{took:?}");
    running.stop().await;
}

#[tokio::test]
async fn a_long_call_keeps_its_lease_and_a_dead_holder_loses_it() {
    let world = World::new(Clock::of_machine());
    let (url, calls) = backend(Duration::from_millis(2_500)).await;
    world.call("long", 0, &url).await;
    world.call("left", 1, &url).await;
    let config = || Config {
        lease: Duration::from_secs(1),
        ..Config::default()
    };
    // Somebody took both and died over them.
    let dead = NodeId::for_this_run("dead");
    let now_ms = world.clock.now_ms();
    let claimed = world.jobs.claim(0, &dead, now_ms, 10, 1_000).await;
    assert_eq!(claimed.unwrap().jobs.len(), 2);
    let (one, other) = (world.run(config()), world.run(config()));
    for id in ["long", "left"] {
        let job = world.await_state(id, JobState::Fired).await;
        assert_eq!(job.claims, 2, "{job:?}");
    }
    assert_eq!(calls.lock().unwrap().len(), 2, "each was called once");
    one.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn what_cannot_be_carried_out_is_given_up_and_holds_up_nobody() {
    let world = World::new(Clock::of_machine());
    let (url, _) = backend(Duration::ZERO).await;
    world.create("nonsense", 0, ActionKind::Webhook, "{").await;
    let no_rabbit = r#"{"exchange":"","routing_key":"q"}"#;
    world
        .create("no-rabbit", 0, ActionKind::Amqp, no_rabbit)
        .await;
    // It ended the processes that took it.
    world.call("deadly", 0, &url).await;
    let doomed = NodeId::for_this_run("doomed");
    for n in 0..6 {
        let now_ms = world.clock.now_ms() + 2 * n;
        world.jobs.claim(0, &doomed, now_ms, 10, 1).await.unwrap();
    }
    assert!(world.job("deadly").await.claims >= 5);
    world.call("good", 1, &url).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let running = world.run(Config::default());
    for id in ["nonsense", "no-rabbit", "deadly"] {
        let job = world.await_state(id, JobState::Failed).await;
        assert!(job.last_error.is_some());
    }
    world.await_state("good", JobState::Fired).await;
    running.stop().await;
}

#[tokio::test]
async fn a_clean_stop_finishes_what_is_quick_and_gives_back_what_is_not() {
    let world = World::new(Clock::of_machine());
    let (quick, _) = backend(Duration::from_millis(800)).await;
    let (slow, calls) = backend(Duration::from_secs(60)).await;
    let running = world.run(Config {
        webhook_timeout: Duration::from_secs(60),
        ..Config::default()
    });
    world.call("quick", 0, &quick).await;
    world.call("slow", 0, &slow).await;
    let deadline = Instant::now() + DEADLINE;
    while calls.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.stop().await;
    assert_eq!(world.job("quick").await.state, JobState::Fired);
    let slow = world.job("slow").await;
    assert_eq!(slow.state, JobState::Retrying, "{slow:?}");
}
