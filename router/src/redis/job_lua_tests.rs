//! Each Lua function of delayed jobs by itself, also in what no caller sees: the indexes, and what half a write leaves behind.

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

#[tokio::test]
async fn create_writes_a_job_once_and_gives_it_back_as_it_was() {
    let lua = Lua::start();
    let job = lua.create("a", NOW + 5).await;
    assert_eq!(job, Job::waiting(new_job("a", NOW + 5)));
    let again = lua
        .create_with(&new_job("a", NOW + 9), "t2", false, &Early::default())
        .await;
    assert_eq!(refused(again), job);
    assert_eq!(lua.get("a").await, Some(job));
    assert_eq!(lua.get("b").await, None);
    assert_eq!(lua.scores("a", "in:p").await, [("a".into(), NOW + 5)]);
    assert_eq!(lua.scores("a", "ids").await, [("a".into(), 0)]);
    // Where there is no room a job that is there is still known.
    let early = Early::default();
    let full = lua.create_with(&new_job("b", NOW), "t", true, &early).await;
    assert_eq!(full, Became::Nothing);
    refused(lua.create_with(&new_job("a", NOW), "t", true, &early).await);
}

#[tokio::test]
async fn create_heeds_events_that_came_before_or_meanwhile() {
    let lua = Lua::start();
    let time: Vec<u64> = parse(lua.call(lua.calls.time()).await).unwrap();
    let registered_ms = time[0] * 1_000;
    let early = |event| Early {
        registered_ms,
        event,
    };
    let before = early(Some((Does::Cancel, name("paid:1"))));
    let job = done(
        lua.create_with(&new_job("a", NOW + 5), "t1", false, &before)
            .await,
    );
    assert_eq!((job.state, job.ended_ms), (JobState::Cancelled, Some(NOW)));
    assert_eq!(job.by_event, Some(name("paid:1")));
    assert_eq!(lua.scores("a", "in:x").await, [("a".into(), NOW)]);
    assert!(lua.scores("a", "in:p").await.is_empty());

    let before = early(Some((Does::Trigger, name("now:1"))));
    let job = done(
        lua.create_with(&new_job("b", NOW + 5), "t2", false, &before)
            .await,
    );
    assert_eq!((job.state, job.fire_at_ms), (JobState::Pending, NOW));

    // An event that was driven to a job which is still to be written.
    let paid = event("paid:1", "e1", EventKind::Happened, NOW);
    let named = Named {
        id: id("c"),
        does: Does::Cancel,
        token: "t3".into(),
    };
    let applied: i8 = parse(
        lua.call(lua.calls.event_apply(&id("c"), &named, &paid))
            .await,
    )
    .unwrap();
    assert_eq!(applied, -1);
    let job = done(
        lua.create_with(&new_job("c", NOW + 5), "t3", false, &before)
            .await,
    );
    assert_eq!(job.state, JobState::Cancelled, "cancelling is stronger");
    // Another registration has nothing to do with it.
    let job = done(
        lua.create_with(&new_job("d", NOW + 5), "t4", false, &early(None))
            .await,
    );
    assert_eq!(job.state, JobState::Pending);

    let late = Early {
        registered_ms: registered_ms - 100_000,
        event: None,
    };
    let became = lua
        .create_with(&new_job("e", NOW + 5), "t5", false, &late)
        .await;
    assert_eq!(became, Became::Again);
    assert_eq!(lua.get("e").await, None);
}

#[tokio::test]
async fn patch_changes_what_waits_and_keeps_the_rest() {
    let lua = Lua::start();
    let job = lua.create("a", NOW + 5).await;
    let patch = lua.calls.patch(&id("a"), Some(NOW + 9), None);
    let patched = done(Became::parse(lua.call(patch).await).unwrap());
    assert_eq!(
        patched,
        Job {
            fire_at_ms: NOW + 9,
            due_ms: NOW + 9,
            ..job.clone()
        }
    );
    assert_eq!(lua.scores("a", "in:p").await, [("a".into(), NOW + 9)]);
    let other = plan(&["three"]);
    let (bytes, actions) = (write_plan(&id("a"), &other), waiting(&other));
    let patch = || lua.calls.patch(&id("a"), None, Some((&bytes, &actions)));
    let patched = done(Became::parse(lua.call(patch()).await).unwrap());
    assert_eq!(patched.plan, other);
    assert_eq!(patched.actions, [ActionState::Waiting]);
    assert_eq!(
        (&patched.cancel_on, patched.fire_at_ms),
        (&job.cancel_on, NOW + 9)
    );

    lua.claim(shard_of("a"), NOW + 9, 1).await;
    assert_eq!(
        refused(Became::parse(lua.call(patch()).await).unwrap()).state,
        JobState::Firing
    );
    let unknown = lua.calls.patch(&id("b"), Some(NOW), None);
    assert_eq!(
        Became::parse(lua.call(unknown).await).unwrap(),
        Became::Nothing
    );
}

#[tokio::test]
async fn cancel_ends_what_waits_and_nothing_else() {
    let lua = Lua::start();
    lua.create("a", NOW + 5).await;
    let cancel = |text: &str| lua.calls.cancel(&id(text), NOW + 1);
    for _ in 0..2 {
        let job = done(Became::parse(lua.call(cancel("a")).await).unwrap());
        assert_eq!(
            (job.state, job.ended_ms),
            (JobState::Cancelled, Some(NOW + 1))
        );
    }
    assert_eq!(lua.claim(shard_of("a"), NOW + 5, 9).await, (None, vec![]));
    assert_eq!(
        Became::parse(lua.call(cancel("b")).await).unwrap(),
        Became::Nothing
    );
    lua.create("c", NOW).await;
    lua.claim(shard_of("c"), NOW, 9).await;
    assert_eq!(
        refused(Became::parse(lua.call(cancel("c")).await).unwrap()).state,
        JobState::Firing
    );
}

#[tokio::test]
async fn trigger_makes_due_now_and_never_later() {
    let lua = Lua::start();
    lua.create("a", NOW + 5).await;
    for (now_ms, expected) in [(NOW + 1, NOW + 1), (NOW + 3, NOW + 1)] {
        let trigger = lua.calls.trigger(&id("a"), now_ms);
        let job = done(Became::parse(lua.call(trigger).await).unwrap());
        assert_eq!((job.fire_at_ms, job.due_ms), (expected, expected));
    }
    lua.claim(shard_of("a"), NOW + 1, 9).await;
    let trigger = lua.calls.trigger(&id("a"), NOW);
    refused(Became::parse(lua.call(trigger).await).unwrap());
}

#[tokio::test]
async fn claim_takes_what_is_due_in_order_and_again_when_the_lease_has_ended() {
    let lua = Lua::start();
    // Of one shard, so that one claim sees all of them.
    let names: Vec<String> = (0..400)
        .map(|n| format!("j{n}"))
        .filter(|name| shard_of(name) == 3)
        .take(6)
        .collect();
    let at = [NOW + 3, NOW + 1, NOW + 1, NOW + 2, NOW + 9, NOW];
    for (name, at) in names.iter().zip(at) {
        lua.create(name, at).await;
    }
    let ids = |jobs: &[Job]| {
        jobs.iter()
            .map(|job| job.id.to_string())
            .collect::<Vec<_>>()
    };
    let mut tied = [names[1].clone(), names[2].clone()];
    tied.sort();
    let (next, first) = lua.claim(3, NOW + 3, 2).await;
    assert_eq!(ids(&first), [names[5].clone(), tied[0].clone()]);
    assert_eq!(next, Some(NOW + 1), "the limit ended it");
    let (next, rest) = lua.claim(3, NOW + 3, 9).await;
    assert_eq!(
        ids(&rest),
        [tied[1].clone(), names[3].clone(), names[0].clone()]
    );
    assert_eq!(next, Some(NOW + 9));
    for job in first.iter().chain(&rest) {
        assert_eq!((job.state, job.claims), (JobState::Firing, 1));
        assert_eq!(job.due_ms, NOW + 3 + 1_000);
        assert_eq!(job.holder, Some(node("n")));
    }
    assert_eq!(lua.claim(3, NOW + 8, 9).await, (Some(NOW + 9), vec![]));
    // Leases end; what waits comes in between by its own time.
    let (_, again) = lua.claim(3, NOW + 2_000, 9).await;
    let mut all = vec![names[4].clone()];
    let mut before = ids(&first);
    before.extend(ids(&rest));
    before.sort();
    all.extend(before);
    assert_eq!(ids(&again), all);
    let token = |job: &Job| job.token;
    let of = |jobs: &[Job], name: &str| jobs.iter().find(|job| job.id.as_str() == name).map(token);
    assert!(of(&again, &names[5]) > of(&first, &names[5]));
    assert_eq!(again[1].claims, 2);
}

#[tokio::test]
async fn claim_does_not_believe_an_index_that_the_job_contradicts() {
    let lua = Lua::start();
    let shard = shard_of("a");
    // Half of a write: an index without a job, and one that says what the job is not any more.
    lua.raw("ZADD", "a", "in:p", &["1", "ghost"]).await;
    lua.raw("ZADD", "a", "in:c", &["1", "ghost"]).await;
    assert_eq!(lua.claim(shard, NOW, 9).await, (None, vec![]));
    assert!(lua.scores("a", "in:p").await.is_empty() && lua.scores("a", "in:c").await.is_empty());

    lua.create("a", NOW).await;
    let cancel = lua.calls.cancel(&id("a"), NOW);
    done(Became::parse(lua.call(cancel).await).unwrap());
    lua.raw("ZADD", "a", "in:p", &["1", "a"]).await;
    lua.raw("ZADD", "a", "in:r", &["1", "a"]).await;
    lua.raw("ZREM", "a", "in:x", &["a"]).await;
    assert_eq!(lua.claim(shard, NOW, 9).await, (None, vec![]));
    assert_eq!(
        lua.scores("a", "in:x").await,
        [("a".into(), NOW)],
        "it is forgotten some day"
    );
    assert!(lua.scores("a", "in:p").await.is_empty() && lua.scores("a", "in:r").await.is_empty());

    lua.create("b", NOW + 9).await;
    lua.raw("ZADD", "b", "in:p", &["1", "b"]).await;
    let (next, jobs) = lua.claim(shard_of("b"), NOW, 9).await;
    assert_eq!((next, jobs), (Some(NOW + 9), vec![]), "it is not due");
}

#[tokio::test]
async fn extend_and_settle_count_under_the_newest_token_only() {
    let lua = Lua::start();
    lua.create("a", NOW).await;
    let shard = shard_of("a");
    let old = lua.claim(shard, NOW, 1).await.1.remove(0);
    let extend = |job: &Job, until_ms, actions: &[ActionState]| {
        let actions = write_actions(actions);
        lua.call(lua.calls.extend(&job.id, job.token, until_ms, &actions))
    };
    let half = [ActionState::Done, ActionState::Waiting];
    assert_eq!(extend(&old, NOW + 3_000, &half).await, Value::Int(1));
    assert_eq!(
        lua.claim(shard, NOW + 2_999, 1).await,
        (Some(NOW + 3_000), vec![])
    );
    let new = lua.claim(shard, NOW + 3_000, 1).await.1.remove(0);
    assert_eq!(new.actions, half, "what is done stays done");
    assert!(new.token > old.token);
    assert_eq!(extend(&old, NOW + 9_000, &half).await, Value::Int(0));
    assert!(!lua.settle(&old, JobState::Fired, 0).await);
    assert_eq!(lua.get("a").await.unwrap(), new);
    for _ in 0..2 {
        assert!(
            lua.settle(&new, JobState::Fired, 0).await,
            "the same twice is the same"
        );
    }
    assert_eq!(extend(&new, NOW + 9_000, &half).await, Value::Int(0));
    let fired = lua.get("a").await.unwrap();
    assert_eq!((fired.state, fired.ended_ms), (JobState::Fired, Some(NOW)));
    assert_eq!(fired.actions, [ActionState::Done, ActionState::Done]);
    assert_eq!((fired.holder, fired.attempts), (None, 0));
    assert!(lua.scores("a", "in:c").await.is_empty());
}

#[tokio::test]
async fn settle_has_a_job_tried_again_given_up_and_given_back() {
    let lua = Lua::start();
    lua.create("a", NOW).await;
    let shard = shard_of("a");
    let job = lua.claim(shard, NOW, 1).await.1.remove(0);
    assert!(lua.settle(&job, JobState::Pending, NOW).await);
    let back = lua.get("a").await.unwrap();
    assert_eq!(
        (back.state, back.claims, back.due_ms),
        (JobState::Pending, 0, NOW)
    );

    let job = lua.claim(shard, NOW, 1).await.1.remove(0);
    let ends = Ends {
        due_ms: NOW + 50,
        actions: "dw".into(),
        error: "no answer".into(),
        ..Ends::of(JobState::Retrying)
    };
    assert_eq!(
        lua.call(lua.calls.settle(&job.id, job.token, &ends, NOW))
            .await,
        Value::Int(1)
    );
    let retrying = lua.get("a").await.unwrap();
    assert_eq!((retrying.state, retrying.attempts), (JobState::Retrying, 1));
    assert_eq!((retrying.fire_at_ms, retrying.due_ms), (NOW, NOW + 50));
    assert_eq!(retrying.last_error.as_deref(), Some("no answer"));
    let cancel = lua.calls.cancel(&id("a"), NOW);
    refused(Became::parse(lua.call(cancel).await).unwrap());

    // What had begun does not wait again.
    let job = lua.claim(shard, NOW + 50, 1).await.1.remove(0);
    assert!(lua.settle(&job, JobState::Pending, NOW + 60).await);
    let back = lua.get("a").await.unwrap();
    assert_eq!((back.state, back.due_ms), (JobState::Retrying, NOW + 60));

    let job = lua.claim(shard, NOW + 60, 1).await.1.remove(0);
    assert!(lua.settle(&job, JobState::Failed, 0).await);
    let failed = lua.get("a").await.unwrap();
    assert_eq!((failed.state, failed.attempts), (JobState::Failed, 2));
    assert_eq!(lua.scores("a", "in:d").await, [("a".into(), NOW)]);
}

#[tokio::test]
async fn revive_tries_again_what_failed_and_keeps_what_is_done() {
    let lua = Lua::start();
    lua.create("a", NOW).await;
    let revive = || lua.calls.revive(&id("a"), NOW + 7);
    refused(Became::parse(lua.call(revive()).await).unwrap());
    let job = lua.claim(shard_of("a"), NOW, 1).await.1.remove(0);
    let ends = Ends {
        actions: "df".into(),
        error: "400".into(),
        ..Ends::of(JobState::Failed)
    };
    lua.call(lua.calls.settle(&job.id, job.token, &ends, NOW))
        .await;
    let revived = done(Became::parse(lua.call(revive()).await).unwrap());
    assert_eq!(
        (revived.state, revived.due_ms),
        (JobState::Retrying, NOW + 7)
    );
    assert_eq!(
        (revived.attempts, revived.claims, revived.ended_ms),
        (0, 0, None)
    );
    assert_eq!(revived.actions, [ActionState::Done, ActionState::Waiting]);
    assert!(lua.scores("a", "in:d").await.is_empty());
    assert_eq!(lua.claim(shard_of("a"), NOW + 7, 1).await.1.len(), 1);
}

#[tokio::test]
async fn list_goes_on_in_the_middle_of_jobs_of_one_moment() {
    let lua = Lua::start();
    let mut names: Vec<String> = (0..400)
        .map(|n| format!("j{n}"))
        .filter(|name| shard_of(name) == 5)
        .take(12)
        .collect();
    names.sort();
    for (n, name) in names.iter().enumerate() {
        lua.create(name, if n < 10 { NOW } else { NOW + n as u64 })
            .await;
    }
    let list = async |after: Option<(u64, &JobId)>, times, limit| {
        let list = lua.calls.list(
            5,
            &[JobState::Pending, JobState::Fired],
            after,
            times,
            limit,
        );
        let fields: Vec<String> = parse(lua.call(list).await).unwrap();
        fields
            .chunks(2)
            .map(|pair| pair[0].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(list(None, (0, None), 3).await, names[..3]);
    for at in 0..12 {
        let after = id(&names[at]);
        let at_ms = if at < 10 { NOW } else { NOW + at as u64 };
        let page = list(Some((at_ms, &after)), (0, None), 4).await;
        assert_eq!(page, names[at + 1..(at + 5).min(12)], "after {at}");
    }
    assert_eq!(list(None, (NOW + 1, None), 9).await, names[10..]);
    assert_eq!(list(None, (NOW, Some(NOW + 11)), 99).await, names[..11]);
    assert!(list(None, (NOW + 99, None), 9).await.is_empty());
}

#[tokio::test]
async fn over_and_forget_leave_nothing_of_a_job_and_touch_no_later_one() {
    let lua = Lua::start();
    lua.create("a", NOW).await;
    let over = async |now_ms| {
        let over = lua
            .calls
            .over(shard_of("a"), JobState::Cancelled, now_ms, 9);
        Told::parse_all(lua.call(over).await).unwrap()
    };
    let forget = |token: &str| lua.calls.forget(&id("a"), token);
    assert_eq!(lua.call(forget("t1")).await, Value::Int(0), "it waits");
    lua.call(lua.calls.cancel(&id("a"), NOW)).await;
    assert!(over(NOW + RETENTION_MS - 1).await.is_empty());
    let found = over(NOW + RETENTION_MS).await;
    assert_eq!((found.len(), found[0].token.as_str()), (1, "t1"));
    assert_eq!(lua.call(forget("t0")).await, Value::Int(0));
    assert_eq!(lua.call(forget("t1")).await, Value::Int(1));
    assert_eq!(lua.call(forget("t1")).await, Value::Int(0));
    let keys: Vec<String> = parse(lua.redis.command("KEYS", &["*jobs*"]).await).unwrap();
    assert!(keys.is_empty(), "{keys:?}");
    // An entry that leads to nothing, or to a job that goes on, is put right.
    lua.create("a", NOW).await;
    lua.raw("ZADD", "a", "in:x", &["1", "a", "1", "ghost"])
        .await;
    lua.raw("ZREM", "a", "in:p", &["a"]).await;
    assert!(over(NOW + RETENTION_MS).await.is_empty());
    assert!(lua.scores("a", "in:x").await.is_empty());
    assert_eq!(lua.scores("a", "in:p").await, [("a".into(), NOW)]);
}

#[tokio::test]
async fn a_sweep_takes_away_old_registrations_without_a_job() {
    let lua = Lua::start();
    let paid = name("paid:1");
    let shard = shard_of("paid:1");
    let named = |n: u32, token: &str| Named {
        id: id(&format!("job-{n:03}")),
        does: Does::Cancel,
        token: token.into(),
    };
    let (old, young) = ("0000000000100000000", super::job_creation::new_token());
    for n in 0..40 {
        lua.call(lua.calls.name(&paid, &named(n, old))).await;
    }
    lua.call(lua.calls.name(&paid, &named(50, &young))).await;
    let kept = new_job("job-007", NOW + 5);
    done(lua.create_with(&kept, old, false, &Early::default()).await);
    for _ in 0..4 {
        crate::Jobs::sweep(&*lua.redis.store.jobs(), shard, NOW, 10)
            .await
            .unwrap();
    }
    let members = lua.call(lua.calls.event_whom(&paid, &[], &[], 99)).await;
    let members: Vec<String> = parse(members).unwrap();
    let left: Vec<Named> = members
        .iter()
        .map(|member| Named::parse(member).unwrap())
        .collect();
    assert_eq!(left, [named(7, old), named(50, &young)]);
}

#[tokio::test]
async fn name_registers_under_a_name_and_tells_the_newest_event_of_it() {
    let lua = Lua::start();
    let paid = name("paid:1");
    let named = |text: &str, token: &str| Named {
        id: id(text),
        does: Does::Cancel,
        token: token.into(),
    };
    let register = async |named: &Named| {
        let answer = lua.call(lua.calls.name(&paid, named)).await;
        parse::<(u64, Option<String>)>(answer).unwrap().1
    };
    assert_eq!(register(&named("a", "t1")).await, None);
    for (event_id, at_ms) in [("e2", NOW + 2), ("e1", NOW + 1)] {
        let event = event("paid:1", event_id, EventKind::Happened, at_ms);
        lua.call(lua.calls.event_begin(&event, false)).await;
    }
    let withdrawal = event("paid:1", "e3", EventKind::Withdrawal, NOW + 3);
    lua.call(lua.calls.event_begin(&withdrawal, false)).await;
    assert_eq!(
        register(&named("b", "t2")).await,
        Some(format!("{} e2", NOW + 2))
    );
    lua.call(lua.calls.unname(&paid, &named("a", "t0"))).await;
    lua.call(lua.calls.unname(&paid, &named("b", "t2"))).await;
    let whom = lua.calls.event_whom(&paid, &[], &[], 9);
    let members: Vec<String> = parse(lua.call(whom).await).unwrap();
    assert_eq!(members.len(), 1);
    assert_eq!(Named::parse(&members[0]).unwrap(), named("a", "t1"));
}

#[tokio::test]
async fn whom_an_event_concerns_is_told_in_pages_and_by_prefix() {
    let lua = Lua::start();
    let (paid, longer) = (name("paid:1"), name("paid:12"));
    let named = |text: &str| Named {
        id: id(text),
        does: Does::Trigger,
        token: "t".into(),
    };
    for text in ["b", "a", "ab", "c"] {
        lua.call(lua.calls.name(&paid, &named(text))).await;
        lua.call(lua.calls.name(&longer, &named(text))).await;
    }
    let whom = async |low: &[u8], high: &[u8], limit| {
        let members = lua
            .call(lua.calls.event_whom(&paid, low, high, limit))
            .await;
        let members: Vec<String> = parse(members).unwrap();
        let id = |member: &String| Named::parse(member).unwrap().id.to_string();
        (
            members.iter().map(id).collect::<Vec<_>>(),
            members.last().cloned(),
        )
    };
    let (first, last) = whom(b"", b"", 3).await;
    assert_eq!(first, ["a", "ab", "b"]);
    assert_eq!(whom(last.unwrap().as_bytes(), b"", 3).await.0, ["c"]);
    assert_eq!(whom(b"a", b"a\xFF", 9).await.0, ["a", "ab"]);
}

#[tokio::test]
async fn an_event_is_applied_once_and_known_again() {
    let lua = Lua::start();
    let apply = async |text: &str, token: &str, does, event: &JobEvent| {
        let named = Named {
            id: id(text),
            does,
            token: token.into(),
        };
        let apply = lua.calls.event_apply(&named.id, &named, event);
        parse::<i8>(lua.call(apply).await).unwrap()
    };
    let paid = event("paid:1", "e1", EventKind::Happened, NOW + 1);
    lua.create("a", NOW + 5).await;
    for _ in 0..2 {
        assert_eq!(apply("a", "t1", Does::Cancel, &paid).await, 1);
    }
    let job = lua.get("a").await.unwrap();
    assert_eq!(
        (job.state, job.ended_ms),
        (JobState::Cancelled, Some(NOW + 1))
    );
    assert_eq!(job.by_event, Some(name("paid:1")));
    let other = event("paid:1", "e2", EventKind::Happened, NOW + 2);
    assert_eq!(
        apply("a", "t1", Does::Cancel, &other).await,
        0,
        "it was cancelled before"
    );

    let now = event("now:1", "e3", EventKind::Happened, NOW + 1);
    lua.create("b", NOW + 5).await;
    for _ in 0..2 {
        assert_eq!(apply("b", "t1", Does::Trigger, &now).await, 1);
    }
    assert_eq!(lua.get("b").await.unwrap().fire_at_ms, NOW + 1);
    lua.create("c", NOW).await;
    assert_eq!(
        apply("c", "t1", Does::Trigger, &now).await,
        0,
        "it is due already"
    );
    lua.claim(shard_of("c"), NOW, 9).await;
    assert_eq!(
        apply("c", "t1", Does::Cancel, &paid).await,
        0,
        "it has begun"
    );

    // Marks for jobs that are still to be written go by themselves; a withdrawal leaves none.
    let withdrawal = event("paid:1", "e4", EventKind::Withdrawal, NOW + 1);
    assert_eq!(apply("d", "t9", Does::Cancel, &withdrawal).await, -1);
    assert_eq!(lua.raw("EXISTS", "d", "early:t9", &[]).await, Value::Int(0));
    assert_eq!(apply("d", "t9", Does::Cancel, &paid).await, -1);
    let left = lua.raw("PTTL", "d", "early:t9", &[]).await;
    assert!(matches!(left, Value::Int(ms) if ms > 500_000), "{left:?}");
    assert_eq!(
        apply("b", "t0", Does::Cancel, &paid).await,
        -1,
        "another job of that id"
    );

    // One that came before the job, and what it does to a job that was created long after.
    lua.create("e", NOW + 5).await;
    let window_ms = JobLimits::default().event_window_ms();
    let old = event("paid:1", "e5", EventKind::Happened, NOW - window_ms - 1);
    assert_eq!(apply("e", "t1", Does::Cancel, &old).await, 0);
    let withdrawal = event("paid:1", "e6", EventKind::Withdrawal, NOW - 1);
    assert_eq!(apply("e", "t1", Does::Cancel, &withdrawal).await, 0);
    let within = event("paid:1", "e7", EventKind::Happened, NOW - window_ms);
    assert_eq!(apply("e", "t1", Does::Cancel, &within).await, 1);
    // A patch is not undone by an event that is driven again.
    lua.create("f", NOW + 5).await;
    assert_eq!(apply("f", "t1", Does::Trigger, &now).await, 1);
    lua.call(lua.calls.patch(&id("f"), Some(NOW + 9), None))
        .await;
    assert_eq!(apply("f", "t1", Does::Trigger, &now).await, 1);
    assert_eq!(lua.get("f").await.unwrap().fire_at_ms, NOW + 9);
}

#[tokio::test]
async fn an_event_stays_open_until_it_was_driven_and_is_remembered_for_its_window() {
    let lua = Lua::start();
    let paid = event("paid:1", "e1", EventKind::Happened, NOW);
    let begin = async |event: &JobEvent, is_full| {
        let answer = lua.call(lua.calls.event_begin(event, is_full)).await;
        parse::<Option<String>>(answer).unwrap()
    };
    assert_eq!(begin(&paid, true).await, None);
    assert_eq!(begin(&paid, false).await.unwrap(), format!("{NOW} h"));
    let later = event("paid:1", "e1", EventKind::Withdrawal, NOW + 5);
    assert_eq!(
        begin(&later, true).await.unwrap(),
        format!("{NOW} h"),
        "as it was first"
    );
    let shard = shard_of("paid:1");
    let open = async |before_ms| {
        let open = lua.call(lua.calls.event_open(shard, before_ms, 9)).await;
        parse::<Vec<String>>(open).unwrap()
    };
    assert!(open(NOW).await.is_empty());
    assert_eq!(
        open(NOW + 1).await,
        ["paid:1\0e1".to_owned(), format!("{NOW} h")]
    );
    let window_ms = JobLimits::default().event_window_ms();
    let sweep = async |now_ms| lua.call(lua.calls.event_sweep(shard, now_ms, 9)).await;
    assert_eq!(
        sweep(NOW + window_ms + 1).await,
        Value::Int(0),
        "it is open"
    );
    let end = async |came_to: &str| {
        let end = lua.call(lua.calls.event_end(&paid, came_to)).await;
        parse::<String>(end).unwrap()
    };
    assert_eq!(end("2 1").await, "2 1");
    assert_eq!(end("0 0").await, "2 1", "whoever was first");
    assert!(open(NOW + 1).await.is_empty());
    assert_eq!(begin(&paid, false).await.unwrap(), format!("{NOW} h 2 1"));
    assert_eq!(sweep(NOW + window_ms).await, Value::Int(0));
    assert_eq!(sweep(NOW + window_ms + 1).await, Value::Int(1));
    let keys: Vec<String> = parse(lua.redis.command("KEYS", &["*jobs*"]).await).unwrap();
    assert!(keys.is_empty(), "{keys:?}");
    // Half of a write.
    lua.raw("ZADD", "paid:1", "open", &["1", "paid:1\0e9"])
        .await;
    assert!(open(NOW).await.is_empty() && lua.scores("paid:1", "open").await.is_empty());
}

#[tokio::test]
async fn shards_are_spread_evenly_and_left_to_others() {
    let lua = Lua::start();
    let hold = async |who: &str, lease_ms| {
        let held = lua.call(lua.calls.hold(&node(who), lease_ms)).await;
        parse::<Vec<u16>>(held).unwrap()
    };
    let all: Vec<u16> = (0..SHARDS).collect();
    assert_eq!(hold("a", 60_000).await, all);
    assert!(hold("b", 60_000).await.is_empty(), "nobody is robbed");
    let of_a = hold("a", 60_000).await;
    assert_eq!(of_a.len(), 8);
    let of_b = hold("b", 60_000).await;
    assert_eq!(of_b.len(), 8);
    assert!(of_a.iter().all(|shard| !of_b.contains(shard)));
    assert_eq!(hold("a", 60_000).await, of_a, "nothing moves without need");
    hold("c", 300).await;
    let (of_a, of_b) = (hold("a", 60_000).await, hold("b", 60_000).await);
    let of_c = hold("c", 300).await;
    let mut counts = [of_a.len(), of_b.len(), of_c.len()];
    counts.sort_unstable();
    assert_eq!(counts, [5, 5, 6]);
    let mut together = [of_a, of_b, of_c].concat();
    together.sort_unstable();
    assert_eq!(together, all);
    // One that says nothing any more, and one that says goodbye.
    let mut of_a = 0;
    for _ in 0..200 {
        of_a = hold("a", 60_000).await.len();
        if of_a == 8 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(of_a, 8);
    assert!(hold("b", 0).await.is_empty());
    assert_eq!(hold("a", 60_000).await, all);
}

#[tokio::test]
async fn whoever_waits_is_told_of_what_is_earlier_and_of_nothing_else() {
    let lua = Lua::start();
    let shard = shard_of("a");
    let mut earlier = crate::Jobs::earlier(&*lua.redis.store.jobs(), shard);
    // The connection is there once it has said so.
    tokio::time::timeout(Duration::from_secs(5), earlier.changed())
        .await
        .unwrap()
        .unwrap();
    let told = async |earlier: &mut tokio::sync::watch::Receiver<u64>| {
        let changed = tokio::time::timeout(Duration::from_millis(300), earlier.changed());
        changed.await.is_ok()
    };
    lua.create("a", NOW + 5).await;
    assert!(told(&mut earlier).await);
    let same = |n: usize| {
        (0..)
            .map(|i| format!("k{i}"))
            .filter(|name| shard_of(name) == shard)
            .nth(n)
            .unwrap()
    };
    lua.create(&same(0), NOW + 6).await;
    assert!(!told(&mut earlier).await, "it is later than another one");
    lua.create(&same(1), NOW + 4).await;
    assert!(told(&mut earlier).await);
    lua.call(lua.calls.trigger(&id("a"), NOW)).await;
    assert!(told(&mut earlier).await);
    let other = (0..)
        .map(|i| format!("k{i}"))
        .find(|name| shard_of(name) != shard)
        .unwrap();
    lua.create(&other, NOW).await;
    assert!(!told(&mut earlier).await, "another shard");
}

#[test]
fn a_registration_is_read_as_it_was_written() {
    for text in ["a", "ct", "ä:1"] {
        for does in [Does::Cancel, Does::Trigger] {
            let named = Named {
                id: id(text),
                does,
                token: "0123".into(),
            };
            assert_eq!(Named::parse(&named.member()).unwrap(), named);
        }
    }
    assert!(Named::parse("a").is_err() && Named::parse("a\0x1").is_err());
    let all = Named::all_of(&new_job("a", NOW), "t");
    let does: Vec<_> = all
        .iter()
        .map(|(name, named)| (name.as_str(), named.does))
        .collect();
    assert_eq!(does, [("paid:1", Does::Cancel), ("now:1", Does::Trigger)]);
}

#[tokio::test]
async fn a_job_that_cannot_be_read_is_given_up_and_stands_in_nobodys_way() {
    let lua = Lua::start();
    let jobs = lua.redis.store.jobs();
    let shard = shard_of("a");
    let beside = (0..)
        .map(|n| format!("k{n}"))
        .find(|name| shard_of(name) == shard)
        .unwrap();
    lua.create("a", NOW).await;
    lua.create(&beside, NOW + 1).await;
    lua.raw("HSET", "a", "body", &["a", "no body"]).await;
    let filter = crate::JobFilter::default();
    let page = crate::Jobs::list(&*jobs, &filter, None, 10).await.unwrap();
    assert_eq!(page.jobs.len(), 1, "the others are listed");
    let read = crate::Jobs::get(&*jobs, &id("a")).await;
    assert!(
        matches!(read, Err(crate::StoreError::Damaged(_))),
        "{read:?}"
    );
    let claimed = crate::Jobs::claim(&*jobs, shard, &node("n"), NOW + 1, 10, 1_000).await;
    let claimed = claimed.unwrap().jobs;
    assert_eq!(claimed.len(), 1);
    assert_eq!(claimed[0].id.as_str(), beside);
    let counts = crate::Jobs::counts(&*jobs).await.unwrap();
    assert_eq!((counts.failed, counts.firing, counts.pending), (1, 1, 0));
    // An event comes past it, and it is forgotten like any other.
    let named = Named {
        id: id("a"),
        does: Does::Cancel,
        token: "t1".into(),
    };
    let paid = event("paid:1", "e1", EventKind::Happened, NOW);
    let applied = lua
        .call(lua.calls.event_apply(&named.id, &named, &paid))
        .await;
    assert_eq!(applied, Value::Int(0));
    let later = NOW + 100 * 24 * RETENTION_MS;
    let swept = crate::Jobs::sweep(&*jobs, shard, later, 10).await.unwrap();
    assert_eq!(swept.jobs, 1);
}
