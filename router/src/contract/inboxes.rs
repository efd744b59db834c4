//! Cases of [`crate::Inboxes`]: order, pages, sessions, restarts. Their limits are in `inbox_limits`, entries of shared subscriptions in
//! `inbox_sharing`.

use bytes::Bytes;
use moorline_mqtt::{PublishProperties, QoS};

use super::{
    Backend, Settings, append, client, end, eventually, of_session, payloads, push, read_all,
    stored, topic,
};
use crate::{Append, Appended, EndReason, Epoch, Message, NodeId, Position, unix_ms};

/// Runs every case of inboxes.
#[macro_export]
macro_rules! inbox_contract {
    ($backend:expr) => {
        $crate::contract_cases!($backend, inboxes:
            entries_are_read_in_the_order_in_which_their_appends_were_called,
            an_entry_comes_back_as_it_was_appended,
            pages_follow_each_other_without_a_gap_or_a_double,
            a_page_is_bounded_in_bytes_but_never_empty,
            what_is_read_to_is_followed_by_what_is_appended_next,
            one_clients_inbox_is_not_anothers,
            expired_entries_are_not_read,
            what_a_session_was_sent_does_not_expire,
            a_position_that_was_sent_is_never_another_messages,
            a_clean_start_drops_session_entries_only,
            ended_entries_are_gone_and_unknown_ends_do_no_harm,
            what_was_sent_may_be_sent_again,
            a_received_entry_says_so,
            a_restart_keeps_everything,
            positions_rise_across_restarts,
            tails_tell_what_waits,
            clients_waiting_are_listed_in_order_and_in_pages,
            an_append_tells_where_the_client_is,
        );
        $crate::contract_cases!($backend, inbox_limits:
            drop_oldest_makes_room,
            drop_new_keeps_what_is_there,
            reject_answers_full,
            bytes_are_limited_as_well_as_entries,
            a_message_larger_than_an_inbox_is_refused_whatever_the_policy,
        );
        $crate::contract_cases!($backend, inbox_sharing:
            a_shared_entry_is_handed_over_once_and_outlives_a_clean_start,
            a_shared_entry_stays_where_the_other_inbox_is_full,
            a_qos_2_entry_that_may_have_been_sent_is_nobody_elses,
        );
    };
}

pub async fn entries_are_read_in_the_order_in_which_their_appends_were_called(
    backend: &mut dyn Backend,
) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let append = |n: u32| {
        let message = push(&n.to_string());
        inboxes.append(vec![Append {
            client: device.clone(),
            message,
            fingerprint: None,
        }])
    };
    // Called in order, awaited in reverse: the call takes the place.
    let calls: Vec<_> = (0..200).map(append).collect();
    let mut positions = Vec::new();
    for call in calls.into_iter().rev() {
        let Appended::Stored { position, .. } = call.await.unwrap().remove(0) else {
            panic!("not stored");
        };
        positions.push(position);
    }
    positions.reverse();
    assert!(
        positions
            .windows(2)
            .all(|pair| pair[0].is_followed_by(pair[1])),
        "{positions:?}"
    );
    let page = read_all(&*inboxes, &device).await;
    assert_eq!(
        payloads(&page),
        (0..200).map(|n| n.to_string()).collect::<Vec<_>>()
    );
    assert_eq!(
        page.entries
            .iter()
            .map(|entry| entry.position)
            .collect::<Vec<_>>(),
        positions
    );
}

pub async fn an_entry_comes_back_as_it_was_appended(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let properties = PublishProperties {
        payload_is_utf8: Some(true),
        response_topic: Some(topic("answer/here")),
        correlation_data: Some(Bytes::from_static(&[0, 255, 7])),
        user_properties: vec![("b".into(), "1".into()), ("a".into(), "2".into())],
        content_type: Some("text/plain".into()),
        ..PublishProperties::default()
    };
    let message = Message {
        qos: QoS::ExactlyOnce,
        retain: true,
        topic: topic("d/é/push"),
        properties: Some(Box::new(properties)),
        expires_at_ms: Some(unix_ms() + 60_000),
        collapse_key: Some("key".into()),
        ..push("payload")
    };
    stored(&*inboxes, &client("é/1"), message.clone()).await;
    let empty = Message {
        payload: Bytes::new(),
        ..of_session("")
    };
    stored(&*inboxes, &client("é/1"), empty.clone()).await;
    let inboxes = backend.restart().await.inboxes;
    let page = read_all(&*inboxes, &client("é/1")).await;
    let messages: Vec<_> = page
        .entries
        .iter()
        .map(|entry| entry.message.clone())
        .collect();
    assert_eq!(messages, [message, empty]);
}

pub async fn pages_follow_each_other_without_a_gap_or_a_double(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    for n in 0..25 {
        stored(&*inboxes, &device, push(&n.to_string())).await;
    }
    let mut seen = Vec::new();
    let mut cursor = Position::START;
    loop {
        let page = inboxes.read(&device, cursor, 10, usize::MAX).await.unwrap();
        seen.extend(payloads(&page));
        assert!(page.read_to >= cursor);
        cursor = page.read_to;
        if !page.more {
            break;
        }
        assert_eq!(page.entries.len(), 10);
        assert_eq!(page.entries[9].position, cursor);
    }
    assert_eq!(seen, (0..25).map(|n| n.to_string()).collect::<Vec<_>>());
}

pub async fn a_page_is_bounded_in_bytes_but_never_empty(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    for _ in 0..10 {
        stored(&*inboxes, &device, push(&"x".repeat(1_000))).await;
    }
    let page = inboxes
        .read(&device, Position::START, 100, 3_000)
        .await
        .unwrap();
    assert!(
        (2..=4).contains(&page.entries.len()),
        "{}",
        page.entries.len()
    );
    assert!(page.more);
    let page = inboxes
        .read(&device, Position::START, 100, 1)
        .await
        .unwrap();
    assert_eq!(page.entries.len(), 1);
}

pub async fn what_is_read_to_is_followed_by_what_is_appended_next(backend: &mut dyn Backend) {
    let mut inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let mut cursor = read_all(&*inboxes, &device).await.read_to;
    for round in 0..4 {
        let first = stored(&*inboxes, &device, push("one")).await;
        assert!(
            cursor.is_followed_by(first) || (round >= 2 && begins_anew(cursor, first)),
            "round {round}: {cursor:?} {first:?}"
        );
        let second = stored(&*inboxes, &device, push("two")).await;
        assert!(first.is_followed_by(second));
        let page = inboxes.read(&device, cursor, 10, usize::MAX).await.unwrap();
        assert_eq!(page.read_to, second);
        // Rounds with something left, with nothing left, and after a restart of each.
        if round % 2 == 1 {
            for entry in read_all(&*inboxes, &device).await.entries {
                end(&*inboxes, &device, entry.position, EndReason::Delivered).await;
            }
        }
        cursor = inboxes
            .read(&device, second, 10, usize::MAX)
            .await
            .unwrap()
            .read_to;
        assert!(cursor >= second);
        if round >= 1 {
            inboxes = backend.restart().await.inboxes;
            cursor = read_all(&*inboxes, &device).await.read_to;
        }
    }
}

/// A store that cannot be sure that it has everything it had before the restart begins a new generation, and says that
/// something may lie before it.
fn begins_anew(before: Position, next: Position) -> bool {
    next.generation > before.generation && next.sequence > 1
}

pub async fn one_clients_inbox_is_not_anothers(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let names = ["a", "aa", "a/b", "a\u{1}", "b"];
    for name in names {
        stored(&*inboxes, &client(name), push(name)).await;
    }
    for name in names {
        assert_eq!(payloads(&read_all(&*inboxes, &client(name)).await), [name]);
    }
}

pub async fn expired_entries_are_not_read(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let expiring = |payload: &str, in_ms: u64| Message {
        expires_at_ms: Some(unix_ms() + in_ms),
        ..push(payload)
    };
    stored(&*inboxes, &device, expiring("over at once", 0)).await;
    stored(&*inboxes, &device, expiring("soon over", 50)).await;
    let last = stored(&*inboxes, &device, expiring("stays", 600_000)).await;
    eventually("the short one has expired", || async {
        payloads(&read_all(&*inboxes, &device).await) == ["stays"]
    })
    .await;
    assert_eq!(read_all(&*inboxes, &device).await.read_to, last);
    eventually("expired entries are ended without a read", || async {
        inboxes.status(&device).await.unwrap().entries == 1
    })
    .await;
}

pub async fn what_a_session_was_sent_does_not_expire(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let expiring = |message: Message| Message {
        expires_at_ms: Some(unix_ms() + 1_000),
        ..message
    };
    stored(&*inboxes, &device, expiring(of_session("sent"))).await;
    let pushed = stored(&*inboxes, &device, expiring(push("pushed"))).await;
    let node = NodeId::from_text("node");
    inboxes.mark_sent(&device, pushed, &node, Epoch(1));
    stored(&*inboxes, &device, expiring(of_session("waits"))).await;
    eventually("the others are ended", || async {
        inboxes.status(&device).await.unwrap().entries == 1
    })
    .await;
    let page = read_all(&*inboxes, &device).await;
    assert_eq!(payloads(&page), ["sent"]);
    assert!(page.entries[0].maybe_sent);
    inboxes.end_session(&device, None).await.unwrap();
    assert!(read_all(&*inboxes, &device).await.entries.is_empty());
}

pub async fn a_clean_start_drops_session_entries_only(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    stored(&*inboxes, &device, push("1")).await;
    stored(&*inboxes, &device, of_session("2")).await;
    let last = stored(&*inboxes, &device, push("3")).await;
    stored(&*inboxes, &client("other"), of_session("4")).await;
    // What is submitted before is dropped, what is submitted after stays.
    let message = of_session("5");
    let before = inboxes.append(vec![Append {
        client: device.clone(),
        message,
        fingerprint: None,
    }]);
    inboxes.end_session(&device, None).await.unwrap();
    before.await.unwrap();
    inboxes.end_session(&client("nobody"), None).await.unwrap();
    assert_eq!(payloads(&read_all(&*inboxes, &device).await), ["1", "3"]);
    assert_eq!(
        payloads(&read_all(&*inboxes, &client("other")).await),
        ["4"]
    );
    let next = stored(&*inboxes, &device, of_session("6")).await;
    assert!(next > last);
}

pub async fn ended_entries_are_gone_and_unknown_ends_do_no_harm(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let first = stored(&*inboxes, &device, push("1")).await;
    let second = stored(&*inboxes, &device, push("2")).await;
    stored(&*inboxes, &device, push("3")).await;
    end(&*inboxes, &device, second, EndReason::Delivered).await;
    assert_eq!(payloads(&read_all(&*inboxes, &device).await), ["1", "3"]);
    let unknown = Position {
        generation: first.generation,
        sequence: 99,
    };
    end(&*inboxes, &device, unknown, EndReason::Delivered).await;
    end(&*inboxes, &device, second, EndReason::Delivered).await;
    end(&*inboxes, &client("nobody"), first, EndReason::Delivered).await;
    assert_eq!(payloads(&read_all(&*inboxes, &device).await), ["1", "3"]);
    let inboxes = backend.restart().await.inboxes;
    assert_eq!(payloads(&read_all(&*inboxes, &device).await), ["1", "3"]);
}

pub async fn a_position_that_was_sent_is_never_another_messages(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    stored(&*inboxes, &device, push("1")).await;
    let last = stored(&*inboxes, &device, push("2")).await;
    inboxes.mark_sent(&device, last, &NodeId::from_text("node"), Epoch(1));
    // The first stays, so that the inbox lives on; the last was sent, and ends.
    end(&*inboxes, &device, last, EndReason::Delivered).await;
    let inboxes = backend.restart().await.inboxes;
    let next = stored(&*inboxes, &device, push("3")).await;
    assert!(next > last, "{next:?} after {last:?}");
    let page = read_all(&*inboxes, &device).await;
    assert_eq!(payloads(&page), ["1", "3"]);
    assert!(!page.entries[1].maybe_sent);
}

pub async fn what_was_sent_may_be_sent_again(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let first = stored(&*inboxes, &device, push("1")).await;
    stored(&*inboxes, &device, push("2")).await;
    inboxes.mark_sent(&device, first, &NodeId::from_text("n"), Epoch(7));
    let flags = |page: &crate::InboxPage| {
        page.entries
            .iter()
            .map(|entry| entry.maybe_sent)
            .collect::<Vec<_>>()
    };
    eventually("the note is seen", || async {
        flags(&read_all(&*inboxes, &device).await) == [true, false]
    })
    .await;
    let inboxes = backend.restart().await.inboxes;
    assert_eq!(flags(&read_all(&*inboxes, &device).await), [true, false]);
}

pub async fn a_received_entry_says_so(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    stored(
        &*inboxes,
        &device,
        Message {
            qos: QoS::ExactlyOnce,
            ..push("1")
        },
    )
    .await;
    let second = stored(
        &*inboxes,
        &device,
        Message {
            qos: QoS::ExactlyOnce,
            ..push("2")
        },
    )
    .await;
    inboxes.mark_received(&device, second).await.unwrap();
    let nobody = client("nobody");
    inboxes.mark_received(&nobody, second).await.unwrap();
    let flags = |page: &crate::InboxPage| {
        page.entries
            .iter()
            .map(|entry| entry.received)
            .collect::<Vec<_>>()
    };
    assert_eq!(flags(&read_all(&*inboxes, &device).await), [false, true]);
    let inboxes = backend.restart().await.inboxes;
    assert_eq!(flags(&read_all(&*inboxes, &device).await), [false, true]);
    end(&*inboxes, &device, second, EndReason::Delivered).await;
    assert_eq!(flags(&read_all(&*inboxes, &device).await), [false]);
}

pub async fn a_restart_keeps_everything(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let mut positions = Vec::new();
    for n in 0..50 {
        positions.push(stored(&*inboxes, &device, push(&n.to_string())).await);
    }
    // Soft writes, not waited for, are kept by a clean end.
    let ends = positions.iter().take(20).map(|position| crate::End {
        client: device.clone(),
        position: *position,
        reason: EndReason::Delivered,
    });
    inboxes.end(ends.collect());
    let inboxes = backend.restart().await.inboxes;
    let page = read_all(&*inboxes, &device).await;
    assert_eq!(
        payloads(&page),
        (20..50).map(|n| n.to_string()).collect::<Vec<_>>()
    );
    assert_eq!(page.entries[0].position, positions[20]);
    assert_eq!(inboxes.status(&device).await.unwrap().entries, 30);
}

pub async fn positions_rise_across_restarts(backend: &mut dyn Backend) {
    let mut inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let mut last = Position::START;
    for round in 0..3 {
        let position = stored(&*inboxes, &device, push("x")).await;
        assert!(position > last, "round {round}");
        assert_eq!(
            position.sequence, 1,
            "a new generation begins when nothing is left"
        );
        last = position;
        end(&*inboxes, &device, position, EndReason::Delivered).await;
        inboxes = backend.restart().await.inboxes;
    }
    let kept = stored(&*inboxes, &device, push("x")).await;
    let inboxes = backend.restart().await.inboxes;
    let next = stored(&*inboxes, &device, push("x")).await;
    assert!(kept.is_followed_by(next) || begins_anew(kept, next));
}

pub async fn tails_tell_what_waits(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let clients = [client("a"), client("b"), client("c")];
    stored(&*inboxes, &clients[0], push("1")).await;
    let a = stored(&*inboxes, &clients[0], push("2")).await;
    let c = stored(&*inboxes, &clients[2], push("3")).await;
    assert_eq!(
        inboxes.tails(&clients).await.unwrap(),
        [Some(a), None, Some(c)]
    );
    end(&*inboxes, &clients[2], c, EndReason::Delivered).await;
    assert_eq!(
        inboxes.tails(&clients).await.unwrap(),
        [Some(a), None, None]
    );
}

pub async fn clients_waiting_are_listed_in_order_and_in_pages(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    for name in ["b", "a", "c", "aa", "a/b"] {
        for _ in 0..3 {
            stored(&*inboxes, &client(name), push(name)).await;
        }
    }
    let c = read_all(&*inboxes, &client("c")).await;
    for entry in c.entries {
        end(
            &*inboxes,
            &client("c"),
            entry.position,
            EndReason::Delivered,
        )
        .await;
    }
    let first = inboxes.clients_waiting(None, 3).await.unwrap();
    assert_eq!(first, ["a", "a/b", "aa"].map(client));
    let rest = inboxes.clients_waiting(first.last(), 3).await.unwrap();
    assert_eq!(rest, [client("b")]);
}

pub async fn an_append_tells_where_the_client_is(backend: &mut dyn Backend) {
    let stores = backend.start(Settings::default()).await;
    let node = super::routes::node("n");
    stores.routes.renew(node.clone(), 60_000).await.unwrap();
    let claim = stores
        .routes
        .claim(&client("here"), &node.id)
        .await
        .unwrap();
    match append(&*stores.inboxes, &client("here"), push("x")).await {
        Appended::Stored {
            route: Some(route), ..
        } => {
            assert_eq!((route.node, route.epoch), (node.id, claim.epoch));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        append(&*stores.inboxes, &client("gone"), push("x")).await,
        Appended::Stored { route: None, .. }
    ));
}
