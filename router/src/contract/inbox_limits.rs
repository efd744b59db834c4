//! Cases of [`crate::Inboxes`]: what happens at the limits of an inbox.

use super::{Backend, Settings, append, client, end, payloads, push, read_all, stored};
use crate::embedded::{InboxLimits, OverflowPolicy};
use crate::{Append, Appended, EndReason};

fn limited(entries_max: u64, bytes_max: u64, overflow: OverflowPolicy) -> Settings {
    Settings {
        inbox: InboxLimits {
            entries_max,
            bytes_max,
            overflow,
        },
        ..Settings::default()
    }
}

pub async fn drop_oldest_makes_room(backend: &mut dyn Backend) {
    let inboxes = backend
        .start(limited(3, 1 << 20, OverflowPolicy::DropOldest))
        .await
        .inboxes;
    let device = client("device");
    for payload in ["1", "2", "3", "4", "5"] {
        stored(&*inboxes, &device, push(payload)).await;
    }
    assert_eq!(
        payloads(&read_all(&*inboxes, &device).await),
        ["3", "4", "5"]
    );
    assert_eq!(inboxes.status(&device).await.unwrap().entries, 3);
}

pub async fn drop_new_keeps_what_is_there(backend: &mut dyn Backend) {
    let inboxes = backend
        .start(limited(2, 1 << 20, OverflowPolicy::DropNew))
        .await
        .inboxes;
    let device = client("device");
    stored(&*inboxes, &device, push("1")).await;
    stored(&*inboxes, &device, push("2")).await;
    // No position: it would be another message's.
    assert_eq!(
        append(&*inboxes, &device, push("3")).await,
        Appended::Dropped
    );
    assert_eq!(payloads(&read_all(&*inboxes, &device).await), ["1", "2"]);
}

pub async fn reject_answers_full(backend: &mut dyn Backend) {
    let inboxes = backend
        .start(limited(2, 1 << 20, OverflowPolicy::Reject))
        .await
        .inboxes;
    let device = client("device");
    stored(&*inboxes, &device, push("1")).await;
    let second = stored(&*inboxes, &device, push("2")).await;
    assert_eq!(append(&*inboxes, &device, push("3")).await, Appended::Full);
    // Of one call, what fits is stored.
    let other = client("other");
    let appends = [&other, &device, &other].map(|client| Append {
        client: client.clone(),
        message: push("4"),
        fingerprint: None,
    });
    let answers = inboxes.append(appends.into()).await.unwrap();
    assert!(matches!(answers[0], Appended::Stored { .. }));
    assert_eq!(answers[1], Appended::Full);
    assert!(matches!(answers[2], Appended::Stored { .. }));
    end(&*inboxes, &device, second, EndReason::Delivered).await;
    stored(&*inboxes, &device, push("5")).await;
    assert_eq!(payloads(&read_all(&*inboxes, &device).await), ["1", "5"]);
}

pub async fn bytes_are_limited_as_well_as_entries(backend: &mut dyn Backend) {
    let inboxes = backend
        .start(limited(100, 1_000, OverflowPolicy::DropOldest))
        .await
        .inboxes;
    let device = client("device");
    for payload in ["a", "b", "c", "d"] {
        stored(&*inboxes, &device, push(&payload.repeat(400))).await;
    }
    let status = inboxes.status(&device).await.unwrap();
    assert_eq!(status.entries, 2);
    assert!((800..=1_000).contains(&status.bytes), "{status:?}");
    let kept = payloads(&read_all(&*inboxes, &device).await);
    assert_eq!(kept, ["c".repeat(400), "d".repeat(400)]);
}

pub async fn a_message_larger_than_an_inbox_is_refused_whatever_the_policy(
    backend: &mut dyn Backend,
) {
    let inboxes = backend
        .start(limited(100, 1_000, OverflowPolicy::DropOldest))
        .await
        .inboxes;
    let device = client("device");
    stored(&*inboxes, &device, push("small")).await;
    assert_eq!(
        append(&*inboxes, &device, push(&"x".repeat(1_001))).await,
        Appended::Full
    );
    assert_eq!(payloads(&read_all(&*inboxes, &device).await), ["small"]);
}
