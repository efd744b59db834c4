//! The life of a job, function by function.

use super::*;

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
async fn patch_changes_what_waits_and_keeps_the_rest() {
    let lua = Lua::start();
    let job = lua.create("a", NOW + 5).await;
    let patch = lua.calls.patch(&id("a"), Some(NOW + 9), None, b"");
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
    let patch = || {
        lua.calls
            .patch(&id("a"), None, Some((&bytes, &actions)), b"")
    };
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
    let unknown = lua.calls.patch(&id("b"), Some(NOW), None, b"");
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
        lua.call(
            lua.calls
                .extend(&job.id, job.token, until_ms, &actions, false),
        )
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
async fn what_was_written_with_fewer_fields_goes_on() {
    let lua = Lua::start();
    lua.create("a", NOW).await;
    let head = format!("{}:head", Keys::new("moorline").jobs(shard_of("a")));
    let cut = "local job = cmsgpack.unpack(redis.call('HGET', KEYS[1], 'a'))
        for field = 15, 17 do job[field] = nil end
        return redis.call('HSET', KEYS[1], 'a', cmsgpack.pack(job))";
    lua.redis.command("EVAL", &[cut, "1", &head]).await;
    let job = lua.get("a").await.unwrap();
    assert_eq!(job, Job::waiting(new_job("a", NOW)));
    let job = lua.claim(shard_of("a"), NOW, 1).await.1.remove(0);
    let extend = lua.calls.extend(&job.id, job.token, NOW, "ww", true);
    assert_eq!(lua.call(extend).await, Value::Int(1));
    assert_eq!(lua.get("a").await.unwrap().trials, 1);
    assert!(lua.settle(&job, JobState::Fired, 0).await);
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
        place: 0,
    };
    let paid = event("paid:1", "e1", EventKind::Happened, NOW);
    let applied = lua
        .call(lua.calls.event_apply(&named.id, &named, &paid, false))
        .await;
    assert_eq!(applied, Value::Int(0));
    let later = NOW + 100 * 24 * RETENTION_MS;
    let swept = crate::Jobs::sweep(&*jobs, shard, later, 10).await.unwrap();
    assert_eq!(swept.jobs, 1);
}
