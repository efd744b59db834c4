//! What a node finds when it starts: sessions, retained messages, wills.

use std::sync::Arc;

use moorline_mqtt::{QoS, TopicFilter};
use moorline_router::{Epoch, Position, SessionRecord, StoreError, StoredSubscription, unix_ms};

use crate::ending;
use crate::node::Node;
use crate::session::{HeldSubscription, Session};
use crate::shared::SharedSubscriptions;
use crate::subscriptions::Subscriber;

/// Entries of an inbox that are looked at together.
const PAGE_ENTRIES: usize = 256;
const PAGE_BYTES: usize = 512 * 1024;

/// Loads everything before the first device is let in.
pub(crate) async fn run(node: &Arc<Node>) -> Result<(), StoreError> {
    let sessions = node.stores.sessions.load_all().await?;
    for record in &sessions {
        restore_session(node, record);
        note_maybe_sent(node, record).await?;
    }
    let retained = node.stores.retained.load_all().await?;
    for message in retained {
        let topic = message.topic.clone();
        let limits = node.config.retained_limits();
        if node.retained.put(Arc::new(message), limits, || ()).is_err() {
            tracing::warn!(
                topic = topic.as_str(),
                "retained message left out, the limit is lower than before"
            );
        }
    }
    // Whoever still has a will stored was connected when the last process died.
    for (client, stored) in node.stores.sessions.load_wills().await? {
        let goes_on = node.session(&client).is_some();
        let will = Box::new(stored.will);
        ending::delay_or_publish(node, &client, stored.epoch, will, goes_on).await;
    }
    if !sessions.is_empty() {
        tracing::info!(sessions = sessions.len(), "sessions restored");
    }
    Ok(())
}

fn restore_session(node: &Node, record: &SessionRecord) {
    let session = Arc::new(Session::new(
        record.client.clone(),
        record.expiry_interval_s,
    ));
    // A session that was connected when the process died is counted from now on.
    let disconnected_at_ms = record.disconnected_at_ms.unwrap_or_else(unix_ms);
    {
        let mut state = session.lock();
        state.stored = true;
        state.disconnected_at_ms = disconnected_at_ms;
    }
    for stored in &record.subscriptions {
        restore_subscription(node, &session, stored);
    }
    node.sessions.insert(record.client.clone(), session);
    node.metrics.sessions.increment(1.0);
    ending::set_expiry(
        node,
        &record.client,
        disconnected_at_ms,
        record.expiry_interval_s,
    );
}

/// What had been sent in the last moments of the last process is not known. A QoS 2 message of a
/// shared subscription that may have been is not to reach another member when this session ends
/// [MQTT-4.8.2-5].
pub(crate) async fn note_maybe_sent(node: &Node, record: &SessionRecord) -> Result<(), StoreError> {
    let is_concerned = |held: &StoredSubscription| {
        held.options.qos == QoS::ExactlyOnce && SharedSubscriptions::is_shared(&held.filter)
    };
    let was_connected = record.disconnected_at_ms.is_none();
    if !was_connected || !record.subscriptions.iter().any(is_concerned) {
        return Ok(());
    }
    let inboxes = &node.stores.inboxes;
    let (mut after, mut last) = (Position::START, None);
    loop {
        let page = inboxes
            .read(&record.client, after, PAGE_ENTRIES, PAGE_BYTES)
            .await?;
        let of_share =
            page.entries.iter().rev().find(|entry| {
                entry.message.share.is_some() && entry.message.qos == QoS::ExactlyOnce
            });
        last = of_share.map(|entry| entry.position).or(last);
        if !page.more {
            break;
        }
        after = page.read_to;
    }
    if let Some(last) = last {
        inboxes.mark_sent(&record.client, last, &node.id, Epoch(0));
    }
    Ok(())
}

pub(crate) fn restore_subscription(
    node: &Node,
    session: &Arc<Session>,
    stored: &StoredSubscription,
) {
    let filter = match TopicFilter::parse(stored.filter.as_str().into()) {
        Ok(filter) => filter,
        Err(error) => {
            tracing::warn!(client = %session.client, filter = stored.filter, %error, "stored subscription left out");
            return;
        }
    };
    let key: Arc<str> = stored.filter.as_str().into();
    let subscription_id = stored.subscription_id.unwrap_or(0);
    let options = stored.options;
    let subscriber = Subscriber {
        session: Arc::clone(session),
        options,
        subscription_id,
    };
    node.subscribe(&key, &filter, subscriber);
    session.lock().subscriptions.push(HeldSubscription {
        filter: key,
        options,
        subscription_id,
    });
}
