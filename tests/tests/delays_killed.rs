//! `kill -9` while thousands of delayed jobs become due: all of them fire, none before its time, and whatever fires twice says so.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use moorline_tests::random::rounds;
use moorline_tests::{Api, Backend, Gateway, Random, eventually};
use serde_json::{Value, json};

use crate::support::run;

/// Jobs of one round; ten times as many where more rounds than by default are asked for.
fn jobs() -> usize {
    if rounds() > 10 { 50_000 } else { 5_000 }
}

/// Jobs of one batch.
const BATCH: usize = 500;
/// In which all of them become due.
const SPAN: Duration = Duration::from_secs(6);

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

/// Creates them; the time of each, Unix milliseconds, as the gateway understood it.
async fn create(
    api: &Api,
    backend: &Backend,
    first: Duration,
    random: &mut Random,
) -> HashMap<String, u64> {
    let mut due = HashMap::new();
    let begin = unix_ms() + u64::try_from(first.as_millis()).unwrap();
    for batch in 0..jobs() / BATCH {
        let mut entries = Vec::with_capacity(BATCH);
        for n in 0..BATCH {
            let id = format!("job-{batch}-{n}");
            let at = begin + random.below(u64::try_from(SPAN.as_millis()).unwrap());
            let delay = at.saturating_sub(unix_ms());
            entries.push(json!({"id": id, "delay": format!("{delay}ms"), "retry": {"attempts": 50, "initial": "50ms", "max": "1s"},
                "action": {"webhook": {"url": backend.url("/due"), "body": {"job": id}}}}));
        }
        let answer = api
            .post("/v1/delays/batch", &Value::Array(entries))
            .await
            .expect(200);
        for result in answer["results"].as_array().unwrap() {
            assert_eq!(result["status"], 201, "{result}");
            let at = result["delay"]["fire_at"].as_str().unwrap();
            let id = result["delay"]["id"].as_str().unwrap();
            due.insert(id.to_owned(), parse(at));
        }
    }
    due
}

/// `2027-01-31T08:00:00.123Z` as Unix milliseconds.
fn parse(time: &str) -> u64 {
    let number = |range: std::ops::Range<usize>| time[range].parse::<i64>().unwrap();
    let (year, month, day) = (number(0..4), number(5..7), number(8..10));
    // Days since 1970, after Howard Hinnant's `days_from_civil`.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year - era * 400;
    let of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let seconds = days * 86_400 + number(11..13) * 3_600 + number(14..16) * 60 + number(17..19);
    u64::try_from(seconds * 1_000 + number(20..23)).unwrap()
}

#[test]
fn every_due_job_fires_across_kill_9_and_none_early() {
    run(async {
        assert_eq!(parse("2023-11-14T22:13:20.123Z"), 1_700_000_000_123);
        let mut random = Random::announced("delayed jobs and kill -9");
        let backend = Backend::start().await;
        // A lease ends soon, so that what was begun is begun again soon.
        let config = "[delays]\nlease = \"1s\"\n";
        let mut gateway = Gateway::start_with(moorline_tests::Options::config(config)).await;
        let (began, began_ms) = (Instant::now(), unix_ms());
        let due = create(
            &gateway.api(),
            &backend,
            Duration::from_secs(4),
            &mut random,
        )
        .await;
        for _ in 0..4 {
            tokio::time::sleep(random.millis(500, 2_000)).await;
            gateway.kill9();
            gateway.restart().await;
        }
        let api = gateway.api();
        eventually(Duration::from_secs(120), "every job is fired", || async {
            let counts = api.get("/v1/delays/count").await.expect(200);
            (counts["fired"] == due.len() as u64).then_some(())
        })
        .await;
        let mut ids: HashMap<String, String> = HashMap::new();
        let mut twice = 0;
        for call in backend.calls() {
            let body: Value = serde_json::from_slice(&call.body).unwrap();
            let job = body["job"].as_str().unwrap().to_owned();
            let at_ms = began_ms + u64::try_from((call.at - began).as_millis()).unwrap();
            // Both clocks are read with the precision of a millisecond.
            assert!(
                at_ms + 2 >= due[&job],
                "{job} fired {} ms early",
                due[&job] - at_ms
            );
            let id = call.header("webhook-id").to_owned();
            if let Some(first) = ids.insert(job.clone(), id.clone()) {
                assert_eq!(first, id, "{job}");
                twice += 1;
            }
        }
        assert_eq!(ids.len(), due.len(), "every job was carried out");
        eprintln!("{} jobs, {twice} calls made again", due.len());
        gateway.finish().await;
    });
}
