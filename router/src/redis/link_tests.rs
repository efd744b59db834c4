//! The link against a real server.

use std::time::{Duration, Instant};

use redis::Value;

use super::reply::parse;
use super::script::Call;
use super::testing::Fixture;
use crate::{Fence, StoreError};

fn push(value: &str) -> Call {
    Call::command("RPUSH", "list").arg(value)
}

async fn list(redis: &Fixture) -> Vec<String> {
    let all = Call::command("LRANGE", "list").arg(0).arg(-1);
    parse(redis.store.link.read(all).await.unwrap()).unwrap()
}

#[tokio::test]
async fn writes_of_one_name_stay_in_the_order_of_their_calls() {
    let redis = Fixture::start();
    let mut last = None;
    for n in 0..3_000 {
        // Most futures are dropped unpolled: the call is made anyway.
        last = Some(redis.store.link.submit("name", push(&n.to_string())));
    }
    last.unwrap().await.unwrap();
    let wanted: Vec<String> = (0..3_000).map(|n| n.to_string()).collect();
    assert_eq!(list(&redis).await, wanted);
}

#[tokio::test]
async fn a_lost_connection_is_made_again_and_noticed_while_nothing_is_asked() {
    let mut redis = Fixture::start();
    redis.write("name", push("before")).await.unwrap();
    redis.kill();
    redis.start_again();
    // The loss was noticed before this call, so that it is not among what may or may not have been done.
    tokio::time::sleep(Duration::from_millis(200)).await;
    redis.write("name", push("after")).await.unwrap();
    assert_eq!(list(&redis).await, ["before", "after"]);
}

#[tokio::test]
async fn a_call_waits_for_a_server_that_is_back_in_time_and_not_for_one_that_stays_away() {
    let mut redis = Fixture::start();
    redis.write("name", push("before")).await.unwrap();
    redis.kill();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let waiting = redis.store.link.submit("name", push("meanwhile"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    redis.start_again();
    waiting.await.unwrap();
    redis.kill();
    let began = Instant::now();
    let lost = redis.write("name", push("lost")).await;
    assert!(matches!(lost, Err(StoreError::Unavailable(_))), "{lost:?}");
    tokio::time::sleep(
        redis
            .config
            .response_timeout
            .saturating_sub(began.elapsed()),
    )
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let began = Instant::now();
    let lost = redis.write("name", push("lost")).await;
    assert!(matches!(lost, Err(StoreError::Unavailable(_))), "{lost:?}");
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    redis.start_again();
    let began = Instant::now();
    while redis.write("name", push("back")).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(list(&redis).await.len(), 3);
}

#[tokio::test]
async fn nothing_passes_a_fence_behind_what_was_refused() {
    let redis = Fixture::start();
    let link = &redis.store.link;
    let fence = Fence::new(false);
    let wrong = Call::command("INCR", "list").arg("too many arguments");
    let first = link.submit_behind(Some(&fence), "name", push("1"));
    let refused = link.submit_behind(Some(&fence), "name", wrong);
    let behind = link.submit_behind(Some(&fence), "name", push("2"));
    let beside = link.submit("name", push("3"));
    assert!(first.await.is_ok() && beside.await.is_ok());
    assert!(refused.await.is_err() && behind.await.is_err());
    assert_eq!(list(&redis).await, ["1", "3"]);
}

#[tokio::test]
async fn what_was_sent_to_a_frozen_server_does_not_overtake_what_is_sent_later() {
    let redis = Fixture::start();
    redis.write("name", push("before")).await.unwrap();
    redis.freeze();
    let lost = redis.write("name", push("lost")).await;
    assert!(matches!(lost, Err(StoreError::Unavailable(_))), "{lost:?}");
    let later = redis.store.link.submit("name", push("later"));
    redis.thaw();
    later.await.unwrap();
    let list = list(&redis).await;
    assert_eq!(list.last().map(String::as_str), Some("later"), "{list:?}");
    // Whatever became of it has become of it by now.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(self::list(&redis).await, list);
}

#[tokio::test]
async fn the_answer_of_a_write_is_seen_by_reads() {
    let redis = Fixture::start();
    for n in 0..200 {
        let set = Call::command("SET", "key").arg(n);
        redis.write("name", set).await.unwrap();
        let read = redis.store.link.read(Call::command("GET", "key")).await;
        assert_eq!(read.unwrap(), Value::BulkString(n.to_string().into_bytes()));
    }
}
