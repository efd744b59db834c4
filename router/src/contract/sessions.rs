//! Cases of [`crate::Sessions`] and [`crate::Retained`].

use std::num::NonZeroU16;

use bytes::Bytes;
use moorline_mqtt::{PacketId, PublishProperties, QoS, RetainHandling, SubscriptionOptions, Will};

use super::{Backend, Settings, client, push, topic};
use crate::{
    Epoch, Message, MessageId, ReceivedPublish, SessionRecord, StoredSubscription, StoredWill,
};

/// Runs every case of this suite.
#[macro_export]
macro_rules! session_contract {
    ($backend:expr) => {
        $crate::contract_cases!($backend, sessions:
            a_session_is_kept_replaced_and_deleted,
            received_packet_ids_are_kept_until_released,
            deleting_a_session_forgets_its_packet_ids_and_no_others,
            writes_take_their_place_when_they_are_called,
            a_newer_connection_knows_all_that_older_ones_may_note_of_packets,
            an_older_connection_writes_nothing_any_more,
            a_will_is_deleted_only_by_its_own_epoch,
            a_retained_message_is_the_last_one_set,
        );
    };
}

fn session(name: &str, filters: &[&str]) -> SessionRecord {
    let options = SubscriptionOptions {
        qos: QoS::ExactlyOnce,
        no_local: true,
        retain_as_published: false,
        retain_handling: RetainHandling::SendIfNew,
    };
    let subscription = |filter: &&str| StoredSubscription {
        filter: (*filter).into(),
        options,
        subscription_id: Some(9),
    };
    SessionRecord {
        client: client(name),
        expiry_interval_s: 3_600,
        disconnected_at_ms: None,
        subscriptions: filters.iter().map(subscription).collect(),
    }
}

fn received(packet_id: u16, done: bool) -> ReceivedPublish {
    ReceivedPublish {
        packet_id: PacketId(NonZeroU16::new(packet_id).unwrap()),
        message_id: MessageId::generate(),
        done,
    }
}

pub async fn a_session_is_kept_replaced_and_deleted(backend: &mut dyn Backend) {
    let sessions = backend.start(Settings::default()).await.sessions;
    sessions
        .save(Epoch(1), session("a", &["x/#", "$share/g/y/+"]))
        .await
        .unwrap();
    sessions.save(Epoch(1), session("b", &["z"])).await.unwrap();
    let replaced = SessionRecord {
        expiry_interval_s: u32::MAX,
        disconnected_at_ms: Some(123),
        ..session("a", &["x/#"])
    };
    sessions.save(Epoch(1), replaced.clone()).await.unwrap();
    let sessions = backend.restart().await.sessions;
    assert_eq!(
        sessions.load_all().await.unwrap(),
        [replaced, session("b", &["z"])]
    );
    sessions.delete(&client("a"), None).await.unwrap();
    sessions.delete(&client("nobody"), None).await.unwrap();
    assert_eq!(sessions.load_all().await.unwrap(), [session("b", &["z"])]);
}

pub async fn received_packet_ids_are_kept_until_released(backend: &mut dyn Backend) {
    let sessions = backend.start(Settings::default()).await.sessions;
    let device = client("device");
    let (first, second) = (received(1, false), received(65_535, false));
    sessions
        .save_received(&device, Epoch(1), first.clone())
        .await
        .unwrap();
    sessions
        .save_received(&device, Epoch(1), second.clone())
        .await
        .unwrap();
    let done = ReceivedPublish {
        done: true,
        ..first
    };
    sessions
        .save_received(&device, Epoch(1), done.clone())
        .await
        .unwrap();
    let sessions = backend.restart().await.sessions;
    assert_eq!(
        sessions.received(&device).await.unwrap(),
        [done.clone(), second.clone()]
    );
    assert!(
        sessions
            .received(&client("other"))
            .await
            .unwrap()
            .is_empty()
    );
    sessions
        .release_received(&device, Epoch(1), done.packet_id)
        .await
        .unwrap();
    sessions
        .release_received(&device, Epoch(1), done.packet_id)
        .await
        .unwrap();
    assert_eq!(sessions.received(&device).await.unwrap(), [second]);
}

pub async fn deleting_a_session_forgets_its_packet_ids_and_no_others(backend: &mut dyn Backend) {
    let sessions = backend.start(Settings::default()).await.sessions;
    let kept = received(2, false);
    sessions
        .save_received(&client("a"), Epoch(1), received(1, false))
        .await
        .unwrap();
    sessions
        .save_received(&client("aa"), Epoch(1), kept.clone())
        .await
        .unwrap();
    // Also what was called for before and is not durable yet.
    let before = sessions.save_received(&client("a"), Epoch(1), received(3, true));
    sessions.delete(&client("a"), None).await.unwrap();
    before.await.unwrap();
    assert!(sessions.received(&client("a")).await.unwrap().is_empty());
    assert_eq!(sessions.received(&client("aa")).await.unwrap(), [kept]);
}

pub async fn writes_take_their_place_when_they_are_called(backend: &mut dyn Backend) {
    let sessions = backend.start(Settings::default()).await.sessions;
    for _ in 0..50 {
        let first = sessions.save(Epoch(1), session("a", &["old"]));
        let second = sessions.save(Epoch(1), session("a", &["new"]));
        second.await.unwrap();
        first.await.unwrap();
        assert_eq!(sessions.load_all().await.unwrap(), [session("a", &["new"])]);
    }
}

pub async fn a_will_is_deleted_only_by_its_own_epoch(backend: &mut dyn Backend) {
    let sessions = backend.start(Settings::default()).await.sessions;
    let device = client("device");
    let will = |epoch: u64, payload: &'static str| StoredWill {
        epoch: Epoch(epoch),
        will: Will {
            topic: topic("status/device"),
            payload: Bytes::from_static(payload.as_bytes()),
            qos: QoS::AtLeastOnce,
            retain: true,
            delay_interval_s: 30,
            properties: Some(Box::new(PublishProperties {
                content_type: Some("text/plain".into()),
                ..PublishProperties::default()
            })),
        },
    };
    sessions.save_will(&device, will(1, "old")).await.unwrap();
    sessions.save_will(&device, will(2, "new")).await.unwrap();
    sessions.delete_will(&device, Epoch(1)).await.unwrap();
    let sessions = backend.restart().await.sessions;
    assert_eq!(
        sessions.load_wills().await.unwrap(),
        [(device.clone(), will(2, "new"))]
    );
    sessions.delete_will(&device, Epoch(2)).await.unwrap();
    sessions.delete_will(&device, Epoch(2)).await.unwrap();
    assert!(sessions.load_wills().await.unwrap().is_empty());
}

pub async fn a_retained_message_is_the_last_one_set(backend: &mut dyn Backend) {
    let retained = backend.start(Settings::default()).await.retained;
    let message = |name: &str, payload: &str| Message {
        topic: topic(name),
        qos: QoS::AtMostOnce,
        retain: true,
        ..push(payload)
    };
    let (a, b) = (message("a", "1"), message("a/b", "2"));
    retained
        .set(&a.topic, Some(&message("a", "0")), None)
        .await
        .unwrap();
    retained.set(&a.topic, Some(&a), None).await.unwrap();
    retained.set(&b.topic, Some(&b), None).await.unwrap();
    let retained = backend.restart().await.retained;
    assert_eq!(retained.load_all().await.unwrap(), [a.clone(), b.clone()]);
    retained.set(&a.topic, None, None).await.unwrap();
    retained.set(&topic("never"), None, None).await.unwrap();
    assert_eq!(retained.load_all().await.unwrap(), [b]);
}

pub async fn a_newer_connection_knows_all_that_older_ones_may_note_of_packets(
    backend: &mut dyn Backend,
) {
    let stores = backend.start(Settings::default()).await;
    let (routes, sessions) = (&stores.routes, &stores.sessions);
    let node = super::routes::node("n");
    routes.renew(node.clone(), 600_000).await.unwrap();
    let device = client("a");
    let note = |epoch, received: &ReceivedPublish| {
        sessions.save_received(&device, epoch, received.clone())
    };
    let done = |received: &ReceivedPublish| ReceivedPublish {
        done: true,
        ..received.clone()
    };
    let old = routes.claim(&device, &node.id).await.unwrap().epoch;
    sessions.save(old, session("a", &["old"])).await.unwrap();
    let [first, second, late] = [1, 2, 3].map(|id| received(id, false));
    note(old, &first).await.unwrap();
    let new = routes.claim(&device, &node.id).await.unwrap().epoch;
    // Between the claim and the take-over: as before.
    note(old, &second).await.unwrap();
    let unseen = note(old, &late);
    sessions.save(new, session("a", &["new"])).await.unwrap();
    unseen.await.unwrap();
    assert_eq!(
        sessions.received(&device).await.unwrap(),
        [first.clone(), second.clone(), late.clone()]
    );
    // From then on the newer one would not hear of it.
    let is_refused = |noted: Result<(), crate::StoreError>| {
        let refused = matches!(noted, Err(crate::StoreError::Stale { current }) if current == new);
        assert!(refused, "{noted:?}");
    };
    is_refused(note(old, &received(4, false)).await);
    is_refused(note(old, &received(1, false)).await);
    is_refused(note(old, &received(5, true)).await);
    note(old, &done(&second)).await.unwrap();
    // The newer one goes on, and what the older one still has to say is about something else.
    sessions
        .release_received(&device, new, first.packet_id)
        .await
        .unwrap();
    let next = received(1, false);
    note(new, &next).await.unwrap();
    is_refused(note(old, &done(&first)).await);
    is_refused(
        sessions
            .release_received(&device, old, next.packet_id)
            .await,
    );
    assert_eq!(
        sessions.received(&device).await.unwrap(),
        [next, done(&second), late]
    );
    // A session that begins anew knows none of it, and is told of nothing afterwards either.
    let newest = routes.claim(&device, &node.id).await.unwrap().epoch;
    sessions.delete(&device, Some(newest)).await.unwrap();
    let refused = note(new, &received(6, false)).await;
    assert!(
        matches!(refused, Err(crate::StoreError::Stale { current }) if current == newest),
        "{refused:?}"
    );
    assert!(sessions.received(&device).await.unwrap().is_empty());
}

pub async fn an_older_connection_writes_nothing_any_more(backend: &mut dyn Backend) {
    let stores = backend.start(Settings::default()).await;
    let (routes, sessions) = (&stores.routes, &stores.sessions);
    let node = super::routes::node("n");
    routes.renew(node.clone(), 600_000).await.unwrap();
    let device = client("a");
    let old = routes.claim(&device, &node.id).await.unwrap().epoch;
    sessions.save(old, session("a", &["old"])).await.unwrap();
    let before = received(1, false);
    sessions
        .save_received(&device, old, before.clone())
        .await
        .unwrap();
    let new = routes.claim(&device, &node.id).await.unwrap().epoch;
    let refused = sessions.save(old, session("a", &["late"])).await;
    assert!(
        matches!(refused, Err(crate::StoreError::Stale { current }) if current == new),
        "{refused:?}"
    );
    // What it had taken before it sees through: the newer one loads that.
    let done = ReceivedPublish {
        done: true,
        ..before
    };
    sessions
        .save_received(&device, old, done.clone())
        .await
        .unwrap();
    assert_eq!(
        sessions.received(&device).await.unwrap(),
        std::slice::from_ref(&done)
    );
    sessions
        .release_received(&device, old, done.packet_id)
        .await
        .unwrap();
    let refused = sessions.delete(&device, Some(old)).await;
    assert!(
        matches!(refused, Err(crate::StoreError::Stale { .. })),
        "{refused:?}"
    );
    let refused = stores.inboxes.end_session(&device, Some(old)).await;
    assert!(
        matches!(refused, Err(crate::StoreError::Stale { .. })),
        "{refused:?}"
    );
    assert_eq!(
        sessions.load(&device).await.unwrap(),
        Some(session("a", &["old"]))
    );
    sessions.save(new, session("a", &["new"])).await.unwrap();
    assert_eq!(
        sessions.load(&device).await.unwrap(),
        Some(session("a", &["new"]))
    );
    assert_eq!(sessions.load(&client("nobody")).await.unwrap(), None);
    assert!(sessions.received(&device).await.unwrap().is_empty());
    stores
        .inboxes
        .end_session(&device, Some(new))
        .await
        .unwrap();
    sessions.delete(&device, Some(new)).await.unwrap();
    assert_eq!(sessions.load(&device).await.unwrap(), None);
}
