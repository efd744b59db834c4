//! Cases of [`crate::Inboxes`]: entries of shared subscriptions, which may move to another inbox.

use moorline_mqtt::QoS;

use super::{Backend, Settings, client, of_session, payloads, push, read_all, stored};
use crate::embedded::{InboxLimits, OverflowPolicy};
use crate::{Append, Appended, Epoch, HandedOver, Message, NodeId, Share};

fn of_share(payload: &str, qos: QoS) -> Message {
    let filter = "$share/g/a/#".into();
    let retain = true;
    Message {
        qos,
        share: Some(Box::new(Share {
            filter,
            qos: QoS::ExactlyOnce,
            retain,
        })),
        ..of_session(payload)
    }
}

fn to(name: &str, message: &Message) -> Option<Append> {
    Some(Append {
        client: client(name),
        message: message.clone(),
        fingerprint: None,
    })
}

pub async fn a_shared_entry_is_handed_over_once_and_outlives_a_clean_start(
    backend: &mut dyn Backend,
) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let (a, b) = (client("a"), client("b"));
    let message = of_share("1", QoS::AtLeastOnce);
    let first = stored(&*inboxes, &a, message.clone()).await;
    let ordinary = stored(&*inboxes, &a, of_session("2")).await;
    inboxes.mark_sent(&a, ordinary, &NodeId::from_text("node"), Epoch(1));
    inboxes.end_session(&a, None).await.unwrap();
    let inboxes = backend.restart().await.inboxes;
    let page = read_all(&*inboxes, &a).await;
    assert_eq!(page.entries.len(), 1);
    assert_eq!(page.entries[0].message, message, "the share came back too");

    let tries = [(); 2].map(|()| inboxes.hand_over(&a, first, to("b", &message)));
    let [won, lost] = tries;
    let won = won.await.unwrap();
    assert!(
        matches!(won, HandedOver::Moved(Appended::Stored { .. })),
        "{won:?}"
    );
    assert_eq!(lost.await.unwrap(), HandedOver::Gone);
    assert_eq!(payloads(&read_all(&*inboxes, &a).await), [""; 0]);
    let moved = read_all(&*inboxes, &b).await;
    assert_eq!(payloads(&moved), ["1"]);
    assert!(!moved.entries[0].maybe_sent, "not to this client");

    let position = moved.entries[0].position;
    let taken = inboxes.hand_over(&b, position, None).await.unwrap();
    assert_eq!(taken, HandedOver::Taken);
    assert_eq!(
        inboxes.hand_over(&b, position, None).await.unwrap(),
        HandedOver::Gone
    );
    let ordinary = stored(&*inboxes, &b, of_session("3")).await;
    assert_eq!(
        inboxes.hand_over(&b, ordinary, None).await.unwrap(),
        HandedOver::Gone,
        "only shared entries are handed over"
    );
    assert_eq!(payloads(&read_all(&*inboxes, &b).await), ["3"]);
}

pub async fn a_shared_entry_stays_where_the_other_inbox_is_full(backend: &mut dyn Backend) {
    for overflow in [OverflowPolicy::Reject, OverflowPolicy::DropNew] {
        let inbox = InboxLimits {
            entries_max: 1,
            overflow,
            ..InboxLimits::default()
        };
        let settings = Settings {
            inbox,
            ..Settings::default()
        };
        let inboxes = backend.start(settings).await.inboxes;
        let a = client(&format!("a{overflow:?}"));
        let full = format!("full{overflow:?}");
        stored(&*inboxes, &client(&full), push("1")).await;
        let message = of_share("2", QoS::AtLeastOnce);
        let position = stored(&*inboxes, &a, message.clone()).await;
        let answer = inboxes.hand_over(&a, position, to(&full, &message)).await;
        assert!(
            matches!(
                answer,
                Ok(HandedOver::Moved(Appended::Full | Appended::Dropped))
            ),
            "{answer:?}"
        );
        assert_eq!(payloads(&read_all(&*inboxes, &a).await), ["2"]);
        assert_eq!(payloads(&read_all(&*inboxes, &client(&full)).await), ["1"]);
    }
}

pub async fn a_qos_2_entry_that_may_have_been_sent_is_nobody_elses(backend: &mut dyn Backend) {
    let inboxes = backend.start(Settings::default()).await.inboxes;
    let a = client("a");
    let message = of_share("x", QoS::ExactlyOnce);
    let sent = stored(&*inboxes, &a, message.clone()).await;
    let unsent = stored(&*inboxes, &a, message.clone()).await;
    inboxes.mark_sent(&a, sent, &NodeId::from_text("node"), Epoch(1));
    let over = inboxes
        .hand_over(&a, sent, to("b", &message))
        .await
        .unwrap();
    assert_eq!(over, HandedOver::Gone);
    let over = inboxes.hand_over(&a, unsent, to("b", &message)).await;
    assert!(matches!(over, Ok(HandedOver::Moved(_))), "{over:?}");
    assert_eq!(read_all(&*inboxes, &a).await.entries.len(), 0);
    assert_eq!(read_all(&*inboxes, &client("b")).await.entries.len(), 1);
}
