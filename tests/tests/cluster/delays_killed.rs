//! `kill -9` of one of two delay queues under load: every job fires, none early, and what fires twice says so.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use moorline_tests::{Backend, eventually};
use serde_json::{Value, json};

use super::world::{Shape, World};

const BATCHES: usize = 8;
const BATCH: usize = 250;

#[test]
fn a_killed_delay_queue_loses_no_job_while_another_one_goes_on() {
    const NAME: &str = "a delay queue is killed";
    super::rounds(NAME, async |mut random| {
        let backend = Backend::start().await;
        let mut world = World::start(Shape {
            config: "[delays]\nlease = \"2s\"\n".to_owned(),
            ..Shape::default()
        })
        .await;
        let api = world.api();
        let began = Instant::now();
        let mut due: HashMap<String, Duration> = HashMap::new();
        for batch in 0..BATCHES {
            let mut jobs = Vec::new();
            for n in 0..BATCH {
                let id = format!("job-{batch}-{n}");
                let delay = random.millis(1_000, 8_000);
                // When it was asked for at the latest: the gateway cannot have known before.
                due.insert(id.clone(), began.elapsed() + delay);
                jobs.push(json!({"id": id, "delay": format!("{}ms", delay.as_millis()), "retry": {"attempts": 50, "initial": "50ms", "max": "1s"},
                    "action": {"webhook": {"url": backend.url("/due"), "body": {"job": id}}}}));
            }
            let answer = api
                .post("/v1/delays/batch", &Value::Array(jobs))
                .await
                .expect(200);
            for result in answer["results"].as_array().unwrap() {
                assert_eq!(result["status"], 201, "{result}");
            }
        }
        for victim in [0, 1] {
            tokio::time::sleep(random.millis(500, 2_500)).await;
            world.kill_delays(victim);
            tokio::time::sleep(random.millis(500, 2_500)).await;
            world.start_delays(victim);
        }
        eventually(Duration::from_secs(120), "every job is fired", || async {
            let counts = api.get("/v1/delays/count").await.expect(200);
            (counts["fired"] == due.len() as u64).then_some(())
        })
        .await;
        let mut ids: HashMap<String, String> = HashMap::new();
        for call in backend.calls() {
            let body: Value = serde_json::from_slice(&call.body).unwrap();
            let job = body["job"].as_str().unwrap().to_owned();
            assert!(call.at - began >= due[&job], "{job} fired early");
            let id = call.header("webhook-id").to_owned();
            let first = ids.entry(job).or_insert_with(|| id.clone());
            assert_eq!(*first, id);
        }
        assert_eq!(ids.len(), due.len(), "every job was carried out");
        world.finish().await;
    });
}
