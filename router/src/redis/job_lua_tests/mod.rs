//! Each Lua function of delayed jobs by itself, also in what no caller sees: the indexes, and what half a write leaves behind.

mod events;
mod jobs;

use std::time::Duration;

use redis::Value;

use super::job_answer::{
    Became, Does, Named, Told, waiting, write_actions, write_body, write_plan,
};
use super::job_calls::{Early, Ends, JobCalls, Written, shard_of};
use super::keys::{Keys, SHARDS};
use super::reply::parse;
use super::script::Call;
use super::testing::Fixture;
use crate::{
    ActionKind, ActionState, EventKind, EventName, Job, JobAction, JobEvent, JobId, JobLimits,
    JobPlan, JobState, MessageId, NewJob, NodeId, RetryPolicy,
};

const NOW: u64 = 1_800_000_000_000;
const RETENTION_MS: u64 = 3_600_000;

fn calls() -> JobCalls {
    JobCalls::new(Keys::new("moorline"), JobLimits::default())
}

fn id(text: &str) -> JobId {
    JobId::parse(text).unwrap()
}

fn name(text: &str) -> EventName {
    EventName::parse(text).unwrap()
}

fn plan(specs: &[&str]) -> JobPlan {
    let action = |spec: &&str| JobAction {
        kind: ActionKind::Webhook,
        spec: bytes::Bytes::copy_from_slice(spec.as_bytes()),
    };
    JobPlan {
        actions: specs.iter().map(action).collect(),
        check: None,
        notify: Some(bytes::Bytes::from_static(b"{}")),
        retry: RetryPolicy {
            attempts_max: 3,
            first_ms: 10,
            max_ms: 100,
        },
    }
}

fn new_job(text: &str, fire_at_ms: u64) -> NewJob {
    NewJob {
        id: id(text),
        created_ms: NOW,
        fire_at_ms,
        plan: plan(&["one", "two"]),
        cancel_on: vec![name("paid:1")],
        trigger_on: vec![name("paid:1"), name("now:1")],
        fingerprint: 7,
        device: None,
    }
}

fn node(text: &str) -> NodeId {
    NodeId::from_text(text)
}

fn event(text: &str, event_id: &str, kind: EventKind, at_ms: u64) -> JobEvent {
    JobEvent {
        id: MessageId::parse(event_id).unwrap(),
        name: name(text),
        kind,
        at_ms,
    }
}

/// A server, and the functions by their names.
struct Lua {
    redis: Fixture,
    calls: JobCalls,
}

impl Lua {
    fn start() -> Self {
        Self {
            redis: Fixture::start(),
            calls: calls(),
        }
    }

    async fn call(&self, call: Call) -> Value {
        self.redis.write("x", call).await.unwrap()
    }

    async fn create_with(&self, job: &NewJob, token: &str, is_full: bool, early: &Early) -> Became {
        let body = write_body(job);
        let written = Written {
            id: &job.id,
            body: &body,
            fire_at_ms: job.fire_at_ms,
            actions: &waiting(&job.plan),
            token,
            now_ms: job.created_ms,
            device: job.device.as_ref().map_or("", crate::ClientId::as_str),
        };
        let answer = self.call(self.calls.create(&written, is_full, early)).await;
        match Became::parse(answer).unwrap() {
            Became::Done(told) => Became::Done(told.with_body(body)),
            other => other,
        }
    }

    async fn create(&self, text: &str, fire_at_ms: u64) -> Job {
        let job = new_job(text, fire_at_ms);
        done(self.create_with(&job, "t1", false, &Early::default()).await)
    }

    async fn claim(&self, shard: u16, now_ms: u64, limit: usize) -> (Option<u64>, Vec<Job>) {
        let call = self
            .calls
            .claim(shard, &node("n"), now_ms, limit, now_ms + 1_000);
        let mut answer = parse::<Vec<Value>>(self.call(call).await)
            .unwrap()
            .into_iter();
        let next = parse(answer.next().unwrap()).unwrap();
        let jobs = Told::parse_all(answer.next().unwrap()).unwrap();
        (
            next,
            jobs.into_iter().map(|told| told.read().unwrap()).collect(),
        )
    }

    async fn get(&self, text: &str) -> Option<Job> {
        let get = self.calls.get(shard_of(text), &[text]);
        let found = Told::parse_all(self.call(get).await).unwrap().pop();
        found.map(|told| told.read().unwrap())
    }

    async fn settle(&self, job: &Job, state: JobState, due_ms: u64) -> bool {
        let ends = Ends {
            due_ms,
            ..Ends::of(state)
        };
        let settle = self.calls.settle(&job.id, job.token, &ends, NOW);
        parse(self.call(settle).await).unwrap()
    }

    /// What a sorted set holds.
    async fn scores(&self, text: &str, kind: &str) -> Vec<(String, u64)> {
        let key = format!("{}:{kind}", Keys::new("moorline").jobs(shard_of(text)));
        let range = Call::command("ZRANGE", &key)
            .arg(0)
            .arg(-1)
            .arg("WITHSCORES");
        let pairs: Vec<(String, f64)> = parse(self.call(range).await).unwrap();
        pairs.into_iter().map(|(id, at)| (id, at as u64)).collect()
    }

    async fn raw(&self, command: &str, text: &str, kind: &str, args: &[&str]) -> Value {
        let key = format!("{}:{kind}", Keys::new("moorline").jobs(shard_of(text)));
        let mut call = Call::command(command, &key);
        for arg in args {
            call = call.arg(arg);
        }
        self.call(call).await
    }
}

fn done(became: Became) -> Job {
    match became {
        Became::Done(told) => told.read().unwrap(),
        other => panic!("{other:?}"),
    }
}

fn refused(became: Became) -> Job {
    match became {
        Became::Refused(told) => told.read().unwrap(),
        other => panic!("{other:?}"),
    }
}
