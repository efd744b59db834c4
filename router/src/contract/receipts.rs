//! Cases of the receipts in [`crate::Inboxes`]: what became of a push, and what is refused as repeated.

use jiff::SignedDuration;

use super::{Backend, Settings, append, client, end, eventually, of_session, push, stored};
use crate::embedded::{InboxLimits, OverflowPolicy};
use crate::{
    Append, Appended, EndReason, Epoch, Inboxes, Message, MessageId, NodeId, Receipt, ReceiptState,
    ReceiptStep, Recipient, unix_ms,
};

/// Runs every case of this suite.
#[macro_export]
macro_rules! receipt_contract {
    ($backend:expr) => {
        $crate::contract_cases!($backend, receipts:
            a_receipt_follows_the_message_to_its_end,
            every_reason_has_its_state,
            session_entries_have_no_receipt,
            an_expired_push_says_so_without_a_read,
            what_overflow_dropped_says_so,
            a_cancelled_push_is_not_delivered_any_more,
            a_repeated_id_is_refused_while_it_waits_and_after,
            a_repetition_within_one_call_is_refused,
            receipts_survive_a_restart,
            receipts_are_forgotten_after_their_time,
            receipts_are_bounded_in_bytes,
            a_recorded_receipt_is_found_and_not_recorded_twice,
            a_receipt_recorded_again_takes_the_place_of_the_first,
        );
    };
}

async fn states(inboxes: &dyn Inboxes, id: &MessageId) -> Vec<ReceiptState> {
    let receipt = inboxes.receipt(id).await.unwrap();
    receipt.map_or(Vec::new(), |receipt| {
        receipt.timeline.iter().map(|step| step.state).collect()
    })
}

pub async fn a_receipt_follows_the_message_to_its_end(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let message = push("x");
    let position = stored(&*inboxes, &device, message.clone()).await;
    let receipt = inboxes.receipt(&message.id).await.unwrap().unwrap();
    assert_eq!(receipt.to, Recipient::Client(device.clone()));
    assert_eq!(receipt.timeline[0].at_ms, message.accepted_at_ms);
    assert_eq!(
        states(&*inboxes, &message.id).await,
        [ReceiptState::Accepted]
    );
    let node = (NodeId::from_text("n-1"), Epoch(7));
    inboxes.mark_sent(&device, position, &node.0, node.1);
    let sent = [ReceiptState::Accepted, ReceiptState::Sent];
    eventually("it is sent", || async {
        states(&*inboxes, &message.id).await == sent
    })
    .await;
    end(&*inboxes, &device, position, EndReason::Delivered).await;
    let receipt = inboxes.receipt(&message.id).await.unwrap().unwrap();
    assert_eq!(receipt.state(), ReceiptState::Delivered);
    assert_eq!(receipt.timeline.len(), 3);
    assert_eq!(receipt.timeline[1].node, Some(node.clone()));
    assert_eq!(receipt.timeline[2].node, Some(node));
    assert!(
        receipt
            .timeline
            .windows(2)
            .all(|pair| pair[0].at_ms <= pair[1].at_ms)
    );
    assert_eq!(inboxes.receipt(&MessageId::generate()).await.unwrap(), None);
}

pub async fn every_reason_has_its_state(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    for (reason, state) in [
        (EndReason::Delivered, ReceiptState::Delivered),
        (EndReason::Rejected(0x99), ReceiptState::Rejected),
        (EndReason::Expired, ReceiptState::Expired),
        (EndReason::Replaced, ReceiptState::Replaced),
        (EndReason::Dropped, ReceiptState::Dropped),
        (EndReason::TooLarge, ReceiptState::TooLarge),
        (EndReason::Cancelled, ReceiptState::Cancelled),
    ] {
        let message = push("x");
        let position = stored(&*inboxes, &device, message.clone()).await;
        end(&*inboxes, &device, position, reason).await;
        let receipt = inboxes.receipt(&message.id).await.unwrap().unwrap();
        assert_eq!(receipt.state(), state);
        let code = (reason == EndReason::Rejected(0x99)).then_some(0x99);
        assert_eq!(receipt.timeline.last().unwrap().reason_code, code);
    }
}

pub async fn session_entries_have_no_receipt(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let message = of_session("x");
    let position = stored(&*inboxes, &device, message.clone()).await;
    assert_eq!(inboxes.receipt(&message.id).await.unwrap(), None);
    end(&*inboxes, &device, position, EndReason::Delivered).await;
    assert_eq!(inboxes.receipt(&message.id).await.unwrap(), None);
    // So the same message may wait for many sessions.
    let again = Append {
        client: client("b"),
        message,
        fingerprint: Some(1),
    };
    let answers = inboxes.append(vec![again.clone(), again]).await.unwrap();
    assert!(
        answers
            .iter()
            .all(|answer| matches!(answer, Appended::Stored { .. }))
    );
}

pub async fn an_expired_push_says_so_without_a_read(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let message = Message {
        expires_at_ms: Some(unix_ms() + 20),
        ..push("x")
    };
    stored(&*inboxes, &client("device"), message.clone()).await;
    let expired = [ReceiptState::Accepted, ReceiptState::Expired];
    eventually("it has expired", || async {
        states(&*inboxes, &message.id).await == expired
    })
    .await;
    eventually("it has left the inbox", || async {
        inboxes.status(&client("device")).await.unwrap().entries == 0
    })
    .await;
    assert_eq!(states(&*inboxes, &message.id).await, expired);
}

pub async fn what_overflow_dropped_says_so(backend: &mut dyn Backend) {
    for overflow in [OverflowPolicy::DropOldest, OverflowPolicy::DropNew] {
        let inbox = InboxLimits {
            entries_max: 1,
            bytes_max: 1_000,
            overflow,
        };
        let inboxes = backend
            .start(Settings {
                inbox,
                ..Settings::default()
            })
            .await
            .inboxes;
        let (old, new) = (push("old"), push("new"));
        stored(&*inboxes, &client("device"), old.clone()).await;
        append(&*inboxes, &client("device"), new.clone()).await;
        let (dropped, kept) = match overflow {
            OverflowPolicy::DropOldest => (old, new),
            _ => (new, old),
        };
        let gone = [ReceiptState::Accepted, ReceiptState::Dropped];
        assert_eq!(states(&*inboxes, &dropped.id).await, gone, "{overflow:?}");
        assert_eq!(states(&*inboxes, &kept.id).await, [ReceiptState::Accepted]);
    }
}

pub async fn a_cancelled_push_is_not_delivered_any_more(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let message = push("x");
    let position = stored(&*inboxes, &device, message.clone()).await;
    let receipt = inboxes.cancel(&message.id).await.unwrap().unwrap();
    assert_eq!(receipt.state(), ReceiptState::Cancelled);
    assert!(super::read_all(&*inboxes, &device).await.entries.is_empty());
    // A late PUBACK changes nothing, and neither does a second cancel.
    end(&*inboxes, &device, position, EndReason::Delivered).await;
    assert_eq!(inboxes.cancel(&message.id).await.unwrap().unwrap(), receipt);
    assert_eq!(
        inboxes.receipt(&message.id).await.unwrap().unwrap(),
        receipt
    );
    assert_eq!(inboxes.cancel(&MessageId::generate()).await.unwrap(), None);
    let delivered = push("y");
    let position = stored(&*inboxes, &device, delivered.clone()).await;
    end(&*inboxes, &device, position, EndReason::Delivered).await;
    let receipt = inboxes.cancel(&delivered.id).await.unwrap().unwrap();
    assert_eq!(receipt.state(), ReceiptState::Delivered);
}

pub async fn a_repeated_id_is_refused_while_it_waits_and_after(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let message = push("x");
    let append = |fingerprint| {
        let (client, message) = (device.clone(), message.clone());
        inboxes.append(vec![Append {
            client,
            message,
            fingerprint: Some(fingerprint),
        }])
    };
    let Appended::Stored { position, .. } = append(5).await.unwrap().remove(0) else {
        panic!("not stored");
    };
    for fingerprint in [5, 6] {
        match append(fingerprint).await.unwrap().remove(0) {
            Appended::Repeated {
                fingerprint,
                receipt,
            } => {
                assert_eq!((fingerprint, receipt.state()), (5, ReceiptState::Accepted));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(super::read_all(&*inboxes, &device).await.entries.len(), 1);
    end(&*inboxes, &device, position, EndReason::Delivered).await;
    match append(5).await.unwrap().remove(0) {
        Appended::Repeated {
            fingerprint,
            receipt,
        } => {
            assert_eq!((fingerprint, receipt.state()), (5, ReceiptState::Delivered));
        }
        other => panic!("{other:?}"),
    }
    assert!(super::read_all(&*inboxes, &device).await.entries.is_empty());
}

pub async fn a_repetition_within_one_call_is_refused(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let append = Append {
        client: client("device"),
        message: push("x"),
        fingerprint: Some(5),
    };
    let answers = inboxes.append(vec![append.clone(), append]).await.unwrap();
    assert!(matches!(answers[0], Appended::Stored { .. }));
    assert!(matches!(
        answers[1],
        Appended::Repeated { fingerprint: 5, .. }
    ));
}

pub async fn receipts_survive_a_restart(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let device = client("device");
    let (ended, waiting) = (push("ended"), push("waiting"));
    let position = stored(&*inboxes, &device, ended.clone()).await;
    stored(&*inboxes, &device, waiting.clone()).await;
    inboxes.mark_sent(&device, position, &NodeId::from_text("n"), Epoch(7));
    end(&*inboxes, &device, position, EndReason::Delivered).await;
    let before = inboxes.receipt(&ended.id).await.unwrap();
    let inboxes = backend.restart().await.inboxes;
    assert_eq!(inboxes.receipt(&ended.id).await.unwrap(), before);
    assert_eq!(
        states(&*inboxes, &waiting.id).await,
        [ReceiptState::Accepted]
    );
}

pub async fn receipts_are_forgotten_after_their_time(backend: &mut dyn Backend) {
    let receipt_retention = SignedDuration::from_millis(50);
    let inboxes = backend
        .start(Settings {
            receipt_retention,
            ..Settings::default()
        })
        .await
        .inboxes;
    let (ended, waiting) = (push("ended"), push("waiting"));
    let position = stored(&*inboxes, &client("device"), ended.clone()).await;
    stored(&*inboxes, &client("device"), waiting.clone()).await;
    end(&*inboxes, &client("device"), position, EndReason::Delivered).await;
    eventually("the receipt is forgotten", || async {
        inboxes.receipt(&ended.id).await.unwrap().is_none()
    })
    .await;
    assert_eq!(
        states(&*inboxes, &waiting.id).await,
        [ReceiptState::Accepted]
    );
}

pub async fn receipts_are_bounded_in_bytes(backend: &mut dyn Backend) {
    let settings = Settings {
        receipts_bytes_max: 2_000,
        ..Settings::default()
    };
    let inboxes = backend.start(settings).await.inboxes;
    let device = client("device");
    let mut ids = Vec::new();
    for _ in 0..50 {
        let message = push("x");
        ids.push(message.id.clone());
        let position = stored(&*inboxes, &device, message).await;
        end(&*inboxes, &device, position, EndReason::Delivered).await;
    }
    eventually("the oldest have gone", || async {
        inboxes.receipt(&ids[0]).await.unwrap().is_none()
            && inboxes.receipt(&ids[25]).await.unwrap().is_none()
    })
    .await;
    assert!(
        inboxes.receipt(&ids[49]).await.unwrap().is_some(),
        "the newest stays"
    );
}

pub async fn a_recorded_receipt_is_found_and_not_recorded_twice(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let step = ReceiptStep {
        state: ReceiptState::Sent,
        at_ms: unix_ms(),
        node: None,
        reason_code: None,
    };
    let receipt = Receipt {
        id: MessageId::generate(),
        to: Recipient::Topic("news/today".into()),
        timeline: vec![step],
    };
    assert_eq!(
        inboxes.record(receipt.clone(), Some(3)).await.unwrap(),
        None
    );
    assert_eq!(
        inboxes.receipt(&receipt.id).await.unwrap(),
        Some(receipt.clone())
    );
    let repeated = Appended::Repeated {
        fingerprint: 3,
        receipt: receipt.clone(),
    };
    assert_eq!(
        inboxes.record(receipt.clone(), Some(4)).await.unwrap(),
        Some(repeated)
    );
    let inboxes = backend.restart().await.inboxes;
    assert_eq!(inboxes.receipt(&receipt.id).await.unwrap(), Some(receipt));
}

pub async fn a_receipt_recorded_again_takes_the_place_of_the_first(backend: &mut dyn Backend) {
    let receipts_bytes_max = 2_000;
    let settings = Settings {
        receipts_bytes_max,
        ..Settings::default()
    };
    let inboxes = backend.start(settings).await.inboxes;
    let id = MessageId::generate();
    let receipt = |state| Receipt {
        id: id.clone(),
        to: Recipient::Topic("news/today".into()),
        timeline: vec![ReceiptStep {
            state,
            at_ms: unix_ms(),
            node: None,
            reason_code: None,
        }],
    };
    inboxes
        .record(receipt(ReceiptState::Accepted), Some(3))
        .await
        .unwrap();
    // Often enough to be over the limit of bytes if each counted.
    for _ in 0..100 {
        let again = inboxes
            .record(receipt(ReceiptState::Sent), None)
            .await
            .unwrap();
        assert_eq!(again, None);
    }
    let other = push("x");
    let position = stored(&*inboxes, &client("device"), other.clone()).await;
    end(&*inboxes, &client("device"), position, EndReason::Delivered).await;
    let kept = inboxes.receipt(&id).await.unwrap().unwrap();
    assert_eq!(kept.state(), ReceiptState::Sent);
    let repeated = inboxes
        .record(receipt(ReceiptState::Sent), Some(4))
        .await
        .unwrap();
    assert!(
        matches!(repeated, Some(Appended::Repeated { fingerprint: 3, .. })),
        "{repeated:?}"
    );
}
