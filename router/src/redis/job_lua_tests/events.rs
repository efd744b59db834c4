//! Names, events, leases and notices, function by function.

use super::*;

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
        place: 0,
    };
    let applied: i8 = parse(
        lua.call(lua.calls.event_apply(&id("c"), &named, &paid, false))
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
async fn a_sweep_takes_away_old_registrations_without_a_job() {
    let lua = Lua::start();
    let paid = name("paid:1");
    let shard = shard_of("paid:1");
    let named = |n: u32, token: &str| Named {
        id: id(&format!("job-{n:03}")),
        does: Does::Cancel,
        token: token.into(),
        place: 0,
    };
    let (old, young) = (
        "0000000000100000000",
        super::super::job_creation::new_token(),
    );
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
        .map(|member| Named {
            place: 0,
            ..Named::parse(member).unwrap()
        })
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
        place: 0,
    };
    let register = async |named: &Named| {
        let answer = lua.call(lua.calls.name(&paid, named)).await;
        parse::<(u64, Option<String>)>(answer).unwrap().1
    };
    // The second time nobody had heard the answer.
    for _ in 0..2 {
        assert_eq!(register(&named("a", "t1")).await, None);
    }
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
    let first = Named {
        place: 1,
        ..named("a", "t1")
    };
    assert_eq!(Named::parse(&members[0]).unwrap(), first);
}

#[tokio::test]
async fn whom_an_event_concerns_is_told_in_pages_and_by_prefix() {
    let lua = Lua::start();
    let (paid, longer) = (name("paid:1"), name("paid:12"));
    let named = |text: &str| Named {
        id: id(text),
        does: Does::Trigger,
        token: "t".into(),
        place: 0,
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
            place: 0,
        };
        // The jobs are created at `NOW`.
        let came_later = event.at_ms < NOW;
        let apply = lua.calls.event_apply(&named.id, &named, event, came_later);
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
    lua.call(lua.calls.patch(&id("f"), Some(NOW + 9), None, b""))
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
    assert_eq!(begin(&paid, false).await.unwrap(), format!("{NOW} h1"));
    let later = event("paid:1", "e1", EventKind::Withdrawal, NOW + 5);
    assert_eq!(
        begin(&later, true).await.unwrap(),
        format!("{NOW} h1"),
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
        ["paid:1\0e1".to_owned(), format!("{NOW} h1")]
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
    assert_eq!(begin(&paid, false).await.unwrap(), format!("{NOW} h1 2 1"));
    assert_eq!(sweep(NOW + window_ms).await, Value::Int(0));
    assert_eq!(sweep(NOW + window_ms + 1).await, Value::Int(1));
    let keys: Vec<String> = parse(lua.redis.command("KEYS", &["*jobs*"]).await).unwrap();
    assert!(keys.iter().all(|key| key.ends_with(":order")), "{keys:?}");
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
                place: 0,
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
