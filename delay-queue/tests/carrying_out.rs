//! The delay queue over a real store and real backends; the clock is set by hand where the time matters.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::{Duration, Instant};

use moorline_delay_queue::Config;
use moorline_router::{ActionKind, ActionState, Clock, JobChange, JobState, NodeId, Settled};
use serde_json::json;
use support::watched::Watched;
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
    let (url, calls) = backend(Duration::ZERO).await;
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
        let claimed = world.jobs.claim(0, &doomed, now_ms, 10, 1).await.unwrap();
        let deadly = claimed.jobs.iter().find(|job| job.id.as_str() == "deadly");
        let deadly = deadly.unwrap();
        let waiting = vec![ActionState::Waiting];
        let begun = world
            .jobs
            .extend(&deadly.id, deadly.token, 0, waiting, true);
        assert_eq!(begun.await.unwrap(), Settled::Done);
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
    assert_eq!(
        calls.lock().unwrap().len(),
        1,
        "only the good one is called"
    );
    running.stop().await;
}

#[tokio::test]
async fn what_was_claimed_and_never_begun_is_carried_out_however_often_that_happened() {
    let world = World::new(Clock::of_machine());
    let (url, calls) = backend(Duration::ZERO).await;
    for n in 0..200 {
        world.call(&n.to_string(), 0, &url).await;
    }
    // Killed before they began anything, or they never heard the answer.
    for n in 0..10 {
        let now_ms = world.clock.now_ms() + 2 * n;
        let unlucky = NodeId::for_this_run("unlucky");
        let claimed = world.jobs.claim(0, &unlucky, now_ms, 200, 1).await;
        assert_eq!(claimed.unwrap().jobs.len(), 200);
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    let running = world.run(Config::default());
    for n in 0..200 {
        let job = world.await_state(&n.to_string(), JobState::Fired).await;
        assert_eq!(job.attempts, 0, "{job:?}");
    }
    assert_eq!(calls.lock().unwrap().len(), 200, "each was called once");
    running.stop().await;
}

#[tokio::test]
async fn a_slow_host_keeps_no_other_job_waiting_and_asks_for_its_own_now_and_then() {
    let mut world = World::new(Clock::of_machine());
    let watched = Watched::of(&world.jobs);
    world.jobs = watched.clone();
    let (slow, slow_calls) = backend(Duration::from_secs(60)).await;
    let (fast, _) = backend(Duration::ZERO).await;
    for n in 0..400 {
        world.call(&format!("slow-{n:03}"), 0, &slow).await;
    }
    for n in 0..20 {
        world.call(&format!("fast-{n}"), 1, &fast).await;
    }
    let running = world.run(Config {
        concurrency: 16,
        webhook_concurrency: 2,
        webhook_timeout: Duration::from_secs(60),
        ..Config::default()
    });
    for n in 0..20 {
        world
            .await_state(&format!("fast-{n}"), JobState::Fired)
            .await;
    }
    let counts = world.jobs.counts().await.unwrap();
    assert!(counts.pending >= 380, "{counts:?}");
    assert_eq!(counts.retrying, 0, "{counts:?}");
    assert_eq!(slow_calls.lock().unwrap().len(), 2);
    // Nothing of it was begun: no attempt is counted, and it can be cancelled.
    let waiting = world.job("slow-399").await;
    assert_eq!((waiting.attempts, waiting.claims), (0, 0), "{waiting:?}");
    let cancelled = world.jobs.cancel(&waiting.id, world.clock.now_ms()).await;
    assert!(matches!(cancelled, Ok(JobChange::Changed(_))));
    // None of them is claimed over and over.
    let before = watched.claims();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let claims = watched.claims() - before;
    assert!(claims < 50, "{claims} claims in two seconds");
    running.stop().await;
}

#[tokio::test]
async fn nothing_is_done_again_because_nobody_could_be_told_of_it() {
    let mut world = World::new(Clock::of_machine());
    let watched = Watched::of(&world.jobs);
    watched.refuse(true);
    world.jobs = watched.clone();
    let (url, calls) = backend(Duration::ZERO).await;
    let (to_tell, told) = backend(Duration::ZERO).await;
    let tell = json!({"webhook": {"url": to_tell}});
    let notify = json!({"on_fired": tell, "on_failed": tell}).to_string();
    let webhook = json!({"url": url, "body": "done"}).to_string();
    let no_rabbit = r#"{"exchange":"","routing_key":"q"}"#;
    for (id, kind, spec) in [
        ("fires", ActionKind::Webhook, webhook.as_str()),
        ("fails", ActionKind::Amqp, no_rabbit),
    ] {
        world
            .create_with(id, 0, kind, spec, Some(notify.clone()))
            .await;
    }
    let running = world.run(Config::default());
    // Each was carried out, and claimed again since.
    watched.await_refusals(2, 2).await;
    for (id, actions) in [("fires", ActionState::Done), ("fails", ActionState::Failed)] {
        let job = world.job(id).await;
        assert!(
            matches!(job.state, JobState::Retrying | JobState::Firing),
            "{job:?}"
        );
        assert_eq!((job.attempts, job.actions), (0, vec![actions]));
    }
    assert_eq!(calls.lock().unwrap().len(), 1);
    watched.refuse(false);
    let fired = world.await_state("fires", JobState::Fired).await;
    let failed = world.await_state("fails", JobState::Failed).await;
    assert_eq!(fired.attempts, 0);
    assert!(failed.last_error.unwrap().contains("RabbitMQ"));
    let deadline = Instant::now() + DEADLINE;
    while told.lock().unwrap().len() < 2 {
        assert!(Instant::now() < deadline, "nobody is told");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(calls.lock().unwrap().len(), 1, "it was not done again");
    running.stop().await;
}

#[tokio::test]
async fn a_store_without_room_takes_what_tells_of_an_end() {
    let world = World::with_room_for(1);
    let (url, _) = backend(Duration::ZERO).await;
    let (to_tell, told) = backend(Duration::ZERO).await;
    let notify = json!({"on_fired": {"webhook": {"url": to_tell}}}).to_string();
    let webhook = json!({"url": url}).to_string();
    world
        .create_with("a", 0, ActionKind::Webhook, &webhook, Some(notify))
        .await;
    let running = world.run(Config::default());
    world.await_state("a", JobState::Fired).await;
    let deadline = Instant::now() + DEADLINE;
    while told.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "nobody is told");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.stop().await;
}

#[tokio::test]
async fn a_backend_that_breaks_is_asked_again_and_one_that_refuses_is_not() {
    let world = World::new(Clock::of_machine());
    for (id, status, attempts) in [("breaks", 500, 3), ("refuses", 404, 1)] {
        let (url, calls) = support::answering(status, Duration::ZERO).await;
        world.call(id, 0, &url).await;
        let running = world.run(Config::default());
        let job = world.await_state(id, JobState::Failed).await;
        assert_eq!(job.attempts, attempts, "{job:?}");
        assert_eq!(calls.lock().unwrap().len(), attempts as usize);
        assert_eq!(job.actions, [ActionState::Failed]);
        running.stop().await;
    }
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
