//! Each function of inboxes by itself, on a real server. What callers see of them is in the contract suites.

use jiff::SignedDuration;
use redis::Value;

use super::config::Limits;
use super::inbox_answer as answer;
use super::inbox_calls::InboxCalls;
use super::keys::Keys;
use super::script::Call;
use super::testing::Fixture;
use crate::contract::{client, of_session, push};
use crate::embedded::{InboxLimits, OverflowPolicy};
use crate::{Append, ClientId, End, EndReason, Epoch, Message, NodeId, Position, Share, unix_ms};

const META: &str = "moorline1:{device}:inbox:meta";
const INBOX: &str = "moorline1:{device}:inbox";

fn limits(entries_max: u64, overflow: OverflowPolicy) -> Limits {
    Limits {
        inbox: InboxLimits {
            entries_max,
            overflow,
            ..InboxLimits::default()
        },
        ..Limits::default()
    }
}

fn calls(limits: Limits) -> InboxCalls {
    InboxCalls::new(Keys::new("moorline"), limits)
}

fn device() -> ClientId {
    client("device")
}

fn append(message: Message) -> Append {
    Append {
        client: device(),
        message,
        fingerprint: None,
    }
}

fn end(position: Position, reason: EndReason) -> End {
    End {
        client: device(),
        position,
        reason,
    }
}

async fn ask(redis: &Fixture, call: Call) -> Vec<Value> {
    match redis.write("device", call).await.unwrap() {
        Value::Array(parts) => parts,
        one => vec![one],
    }
}

fn words(values: &[Value]) -> Vec<String> {
    let word = |value: &Value| answer::text(value.clone()).unwrap();
    values.iter().map(word).collect()
}

/// Appends and answers the position.
async fn stored(redis: &Fixture, calls: &InboxCalls, message: Message) -> Position {
    let parts = ask(redis, calls.append(&append(message))).await;
    assert_eq!(words(&parts[..1]), ["stored"]);
    answer::position(&answer::text(parts[2].clone()).unwrap()).unwrap()
}

async fn meta(redis: &Fixture, field: &str) -> String {
    let value = redis.command("HGET", &[META, field]).await;
    match value {
        Value::Nil => String::new(),
        value => answer::text(value).unwrap(),
    }
}

async fn exists(redis: &Fixture, key: &str) -> bool {
    redis.command("EXISTS", &[key]).await == Value::Int(1)
}

#[tokio::test]
async fn append_gives_out_positions_and_counts() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let first = ask(&redis, calls.append(&append(push("1")))).await;
    assert_eq!(first[3], Value::Int(1), "the first to wait");
    let second = ask(&redis, calls.append(&append(of_session("2")))).await;
    assert_eq!(second[3], Value::Int(0));
    let at = |parts: &[Value]| answer::position(&answer::text(parts[2].clone()).unwrap()).unwrap();
    assert!(at(&first).is_followed_by(at(&second)));
    assert!(
        at(&first).generation > unix_ms() * 900,
        "a clock in microseconds"
    );
    assert_eq!(
        (
            meta(&redis, "c").await,
            meta(&redis, "o").await,
            meta(&redis, "k").await
        ),
        ("2".into(), "1".into(), "2".into())
    );
    // As another connection left it.
    redis
        .command(
            "HSET",
            &[
                "moorline1:{device}:route",
                "node",
                "n",
                "last",
                "7",
                "at",
                "9",
            ],
        )
        .await;
    let third = ask(&redis, calls.append(&append(push("3")))).await;
    assert_eq!(
        words(&answer::array(third[5].clone()).unwrap()),
        ["n", "7", "9"]
    );
}

#[tokio::test]
async fn append_makes_room_once_for_a_large_message_and_says_what_went() {
    let redis = Fixture::start();
    let mut small = limits(100, OverflowPolicy::DropOldest);
    small.inbox.bytes_max = 2_000;
    let calls = calls(small);
    let mut ids = Vec::new();
    for _ in 0..50 {
        let message = push("0123456789");
        ids.push(message.id.to_string());
        stored(&redis, &calls, message).await;
    }
    let parts = ask(&redis, calls.append(&append(push(&"x".repeat(1_900))))).await;
    let gone = words(&answer::array(parts[1].clone()).unwrap());
    assert_eq!(gone.len() / 2, 45, "no more than had to");
    assert!(
        gone.chunks(2)
            .zip(&ids)
            .all(|(pair, id)| pair[0] == "o" && pair[1] == *id)
    );
    assert_eq!(parts[4], Value::Int(1), "told that it is full");
    assert_eq!(meta(&redis, "c").await, "6");
}

#[tokio::test]
async fn read_looks_at_a_bounded_number_of_entries() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    // Their expiry is known to no index, so that the read itself has to leave them out.
    for n in 0..700 {
        let message = Message {
            expires_at_ms: (n < 600).then_some(1),
            ..push("x")
        };
        let call = calls.append(&append(message));
        redis.store.inboxes.link.note("device", call);
    }
    redis.store.flush().await;
    redis
        .command("DEL", &["moorline1:{device}:inbox:expiry"])
        .await;
    let page = ask(&redis, calls.read(&device(), Position::START, 10, 1_000)).await;
    assert_eq!(page[2], Value::Int(1), "more follows");
    assert!(answer::array(page[4].clone()).unwrap().is_empty());
    let looked_to = answer::position(&answer::text(page[3].clone()).unwrap()).unwrap();
    assert_eq!(looked_to.sequence, 512);
    let page = ask(&redis, calls.read(&device(), looked_to, 10, 1_000_000)).await;
    assert_eq!(answer::array(page[4].clone()).unwrap().len(), 10);
}

#[tokio::test]
async fn sent_only_rises_and_keeps_a_bounded_number_of_notes() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let node = NodeId::from_text("a node\nwith a strange name");
    let mut last = Position::START;
    for _ in 0..40 {
        last = stored(&redis, &calls, push("x")).await;
        ask(&redis, calls.sent(&device(), last, &node, Epoch(9))).await;
    }
    let notes = meta(&redis, "s").await;
    assert_eq!(notes.lines().count(), 16);
    assert!(
        notes
            .lines()
            .all(|note| note.ends_with(" 9 a node with a strange name"))
    );
    let earlier = Position {
        sequence: 3,
        ..last
    };
    assert_eq!(
        ask(&redis, calls.sent(&device(), earlier, &node, Epoch(10))).await,
        [Value::Int(0)]
    );
    assert_eq!(meta(&redis, "st").await, answer::position_text(last));
    let nobody = client("nobody");
    assert_eq!(
        ask(&redis, calls.sent(&nobody, last, &node, Epoch(10))).await,
        [Value::Int(0)]
    );
    assert!(!exists(&redis, "moorline1:{nobody}:inbox:meta").await);
}

#[tokio::test]
async fn received_is_noted_of_entries_only() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let at = stored(&redis, &calls, push("x")).await;
    let unknown = Position { sequence: 9, ..at };
    assert_eq!(
        ask(&redis, calls.received(&device(), at)).await,
        [Value::Int(1)]
    );
    assert_eq!(
        ask(&redis, calls.received(&device(), unknown)).await,
        [Value::Int(0)]
    );
    let received = redis
        .command("SCARD", &["moorline1:{device}:inbox:received"])
        .await;
    assert_eq!(received, Value::Int(1));
}

#[tokio::test]
async fn end_leaves_nothing_behind_but_receipts_that_go_too() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let (one, two) = (push("1"), of_session("2"));
    let id = one.id.to_string();
    let one = stored(&redis, &calls, one).await;
    let two = stored(&redis, &calls, two).await;
    let ends = [
        end(one, EndReason::SessionEnded),
        end(one, EndReason::Delivered),
        end(one, EndReason::Delivered),
        end(two, EndReason::SessionEnded),
    ];
    let parts = ask(&redis, calls.end(&device(), &ends)).await;
    let ended = words(&answer::array(parts[0].clone()).unwrap());
    assert_eq!(
        ended,
        ["d", &id, "s", ""],
        "a push does not end with a session"
    );
    for kind in ["", ":expiry", ":received"] {
        assert!(!exists(&redis, &format!("{INBOX}{kind}")).await, "{kind}");
    }
    for kind in [":meta", ":message", ":final"] {
        let left = redis.command("PTTL", &[&format!("{INBOX}{kind}")]).await;
        assert!(
            matches!(left, Value::Int(ms) if (1..=3_600_000).contains(&ms)),
            "{kind}: {left:?}"
        );
    }
}

#[tokio::test]
async fn end_session_goes_in_parts_and_stops_where_it_began() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    for n in 0..150 {
        let message = if n % 2 == 0 {
            of_session("s")
        } else {
            push("p")
        };
        stored(&redis, &calls, message).await;
    }
    let part = ask(&redis, calls.end_session(&device(), None, "0-0", "")).await;
    let (after, up_to) = (
        answer::text(part[3].clone()).unwrap(),
        answer::text(part[4].clone()).unwrap(),
    );
    assert_eq!(answer::array(part[0].clone()).unwrap().len(), 64);
    assert_eq!(answer::position(&after).unwrap().sequence, 64);
    // What comes meanwhile is the next session's.
    stored(&redis, &calls, of_session("next")).await;
    let mut after = after;
    while !after.is_empty() {
        let part = ask(&redis, calls.end_session(&device(), None, &after, &up_to)).await;
        after = answer::text(part[3].clone()).unwrap();
    }
    assert_eq!(
        (meta(&redis, "c").await, meta(&redis, "o").await),
        ("76".into(), "1".into())
    );
    redis
        .command("HSET", &["moorline1:{device}:route", "last", "8"])
        .await;
    let refused = ask(
        &redis,
        calls.end_session(&device(), Some(Epoch(7)), "0-0", ""),
    )
    .await;
    assert_eq!(words(&refused), ["8"], "the newer connection's epoch");
}

#[tokio::test]
async fn take_lets_one_of_several_have_an_entry_until_its_claim_is_over() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let share = Share {
        filter: "$share/g/a".into(),
        qos: moorline_mqtt::QoS::AtLeastOnce,
        retain: false,
    };
    let message = Message {
        share: Some(Box::new(share)),
        ..of_session("x")
    };
    let at = stored(&redis, &calls, message).await;
    let word = async |call| words(&ask(&redis, call).await[2..]).remove(0);
    assert_eq!(
        word(calls.claim(&device(), at, "one", 60_000)).await,
        "claimed"
    );
    assert_eq!(
        word(calls.claim(&device(), at, "two", 60_000)).await,
        "gone"
    );
    assert_eq!(word(calls.take(&device(), at)).await, "gone");
    assert_eq!(word(calls.claim(&device(), at, "one", 0)).await, "claimed");
    assert_eq!(
        word(calls.claim(&device(), at, "two", 60_000)).await,
        "claimed",
        "the other's was over"
    );
    ask(&redis, calls.unclaim(&device(), at)).await;
    assert_eq!(word(calls.take(&device(), at)).await, "taken");
    assert_eq!(word(calls.take(&device(), at)).await, "gone");
}

#[tokio::test]
async fn cancel_ends_what_waits_and_tells_what_has_ended() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let message = push("x");
    let id = message.id.clone();
    stored(&redis, &calls, message).await;
    for _ in 0..2 {
        let parts = ask(&redis, calls.cancel(&device(), &id)).await;
        let receipt = words(&answer::array(parts[2].clone()).unwrap());
        assert_eq!(receipt[5], "c");
    }
    let unknown = ask(&redis, calls.cancel(&device(), &push("y").id)).await;
    assert!(answer::array(unknown[2].clone()).unwrap().is_empty());
}

#[tokio::test]
async fn status_ends_a_bounded_number_of_what_is_over() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let soon = unix_ms() + 300;
    for _ in 0..100 {
        let message = Message {
            expires_at_ms: Some(soon),
            ..push("x")
        };
        let call = calls.append(&append(message));
        redis.store.inboxes.link.note("device", call);
    }
    redis.store.flush().await;
    let deadline = redis.command("PTTL", &[INBOX]).await;
    assert!(
        matches!(deadline, Value::Int(ms) if (600_000_000..700_000_000).contains(&ms)),
        "an inbox of expiring pushes is forgotten some day: {deadline:?}"
    );
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    let parts = ask(&redis, calls.status(&device())).await;
    assert_eq!(
        (&parts[2], answer::array(parts[0].clone()).unwrap().len()),
        (&Value::Int(36), 128)
    );
    let parts = ask(&redis, calls.status(&device())).await;
    assert_eq!(parts[2], Value::Int(0));
    // What is of a session stays as long as that.
    stored(&redis, &calls, of_session("x")).await;
    assert_eq!(redis.command("PTTL", &[INBOX]).await, Value::Int(-1));
}

#[tokio::test]
async fn receipt_knows_what_waits_what_was_sent_and_what_ended_until_it_is_over() {
    let redis = Fixture::start();
    let calls = calls(Limits {
        receipt_retention: SignedDuration::from_millis(200),
        ..Limits::default()
    });
    let message = push("x");
    let id = message.id.clone();
    let at = stored(&redis, &calls, message).await;
    let state = async || words(&ask(&redis, calls.receipt(&device(), &id)).await);
    assert_eq!(state().await[2..], ["", "", "", "", "", ""]);
    ask(
        &redis,
        calls.sent(&device(), at, &NodeId::from_text("n"), Epoch(u64::MAX)),
    )
    .await;
    assert_eq!(state().await[3..5], [&u64::MAX.to_string(), "n"]);
    ask(
        &redis,
        calls.end(&device(), &[end(at, EndReason::Rejected(0x99))]),
    )
    .await;
    let ended = state().await;
    assert_eq!((ended[5].as_str(), ended[7].as_str()), ("r", "153"));
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(state().await.is_empty());
}

#[tokio::test]
async fn listed_is_noted_where_something_waits() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    assert_eq!(ask(&redis, calls.listed(&device())).await, [Value::Int(0)]);
    let at = stored(&redis, &calls, push("x")).await;
    assert_eq!(ask(&redis, calls.listed(&device())).await, [Value::Int(1)]);
    let parts = ask(
        &redis,
        calls.end(&device(), &[end(at, EndReason::Delivered)]),
    )
    .await;
    assert_eq!(parts[1], Value::Int(1), "to be taken off the list");
}

#[tokio::test]
async fn record_keeps_the_first_fingerprint_and_passes_over_what_leads_nowhere() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let id = push("x").id;
    let record = async |fingerprint, receipt: &[u8], mistaken: &[u8]| {
        let call = calls.record(&id, fingerprint, receipt, mistaken);
        answer::bytes(ask(&redis, call).await.remove(0)).unwrap()
    };
    assert_eq!(record(Some(3), b"one", b"").await, b"");
    assert_eq!(record(Some(4), b"two", b"").await, b"r3\none");
    assert_eq!(record(None, b"two", b"").await, b"");
    assert_eq!(record(Some(4), b"three", b"").await, b"r3\ntwo");
    let point = append(Message {
        id: id.clone(),
        ..push("x")
    });
    ask(&redis, calls.point(&point, unix_ms(), false)).await;
    assert_eq!(record(Some(4), b"three", b"").await, b"cdevice");
    assert_eq!(record(Some(4), b"three", b"cdevice").await, b"");
    assert_eq!(record(Some(5), b"four", b"").await, b"r4\nthree");
}

#[tokio::test]
async fn import_keeps_positions_and_takes_nothing_twice() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let at = |sequence| Position {
        generation: 5,
        sequence,
    };
    let import = |n: u64| calls.import(&append(push("x")), at(n), n == 2, n == 1);
    for (n, taken) in [(1, 1), (2, 1), (1, 0), (2, 0), (7, 1)] {
        assert_eq!(ask(&redis, import(n)).await, [Value::Int(taken)], "{n}");
    }
    let page = ask(
        &redis,
        calls.read(&device(), Position::START, 10, 1_000_000),
    )
    .await;
    let entries = answer::array(page[4].clone()).unwrap();
    let flags: Vec<_> = entries
        .into_iter()
        .map(|entry| words_of(&answer::array(entry).unwrap()[..3]))
        .collect();
    assert_eq!(flags, ["5-1 1 1", "5-2 1 0", "5-7 0 0"]);
    let next = stored(&redis, &calls, push("next")).await;
    assert!(next > at(7) && next.sequence == 8);
}

fn words_of(values: &[Value]) -> String {
    let word = |value: &Value| match value {
        Value::Int(number) => number.to_string(),
        text => answer::text(text.clone()).unwrap(),
    };
    values.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// As a server leaves it that was killed in the middle of a transaction, and started twice since.
#[tokio::test]
async fn an_inbox_that_counted_wrong_counts_anew_and_loses_nothing() {
    let redis = Fixture::start();
    let calls = calls(Limits::default());
    let one = stored(&redis, &calls, push("1")).await;
    stored(&redis, &calls, push("2")).await;
    redis
        .command("HSET", &[META, "c", "1", "k", "0", "b", "3"])
        .await;
    ask(
        &redis,
        calls.end(&device(), &[end(one, EndReason::Delivered)]),
    )
    .await;
    let status = ask(&redis, calls.status(&device())).await;
    assert_eq!(status[2], Value::Int(1), "the other one is there");
    assert_eq!(meta(&redis, "k").await, "1");
    redis.command("DEL", &[META]).await;
    let three = stored(&redis, &calls, push("3")).await;
    assert!(three > one);
    assert_eq!(meta(&redis, "c").await, "2");
}
