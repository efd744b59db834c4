//! Retained messages on their way to new subscriptions of one session.
//!
//! They are sent as room appears, not all at once: a filter may match a hundred thousand. What is
//! kept meanwhile is where each filter has got to, not the messages. A persistent session gets those of
//! QoS 1 and 2 through its inbox, a window's worth at a time, so that they never push out what
//! waits there.

use std::collections::VecDeque;
use std::sync::Arc;

use moorline_mqtt::{QoS, TopicFilter};
use moorline_router::{Append, Appended, Message, Origin};

use crate::cluster::retained_changes::before_feeding;
use crate::connection::{Connection, PendingAnswer};
use crate::fan_out::FanOut;
use crate::inbound::Turn;
use crate::node::Node;
use crate::outbound::{Corked, for_device};
use crate::publish::Durable;
use crate::session::{Session, State};
use crate::wire::FEEDING;

/// Messages looked up at a time.
const PAGE: usize = 64;
/// Pages before other devices have their turn.
const PAGES_AT_ONCE: usize = 8;

/// The filters of a session that have not got all of their retained messages.
#[derive(Debug, Default)]
pub(crate) struct RetainedFeed {
    filters: VecDeque<Fed>,
    /// Of the last filter that was added.
    asked: u64,
    /// A part is being made durable in the inbox.
    appending: bool,
    /// How many are waiting for what other nodes have changed.
    catching_up: u32,
}

/// One filter.
#[derive(Debug, Clone)]
pub(crate) struct Fed {
    pub(crate) filter: TopicFilter,
    pub(crate) qos: QoS,
    /// 0 is none.
    pub(crate) subscription_id: u32,
    /// Tells a filter from the same one subscribed to again.
    asked: u64,
    /// The last topic that was dealt with.
    after: Option<Arc<str>>,
}

impl Fed {
    pub(crate) fn new(filter: &TopicFilter, qos: QoS, subscription_id: u32) -> Self {
        Self {
            filter: filter.copied(),
            qos,
            subscription_id,
            asked: 0,
            after: None,
        }
    }
}

impl RetainedFeed {
    /// A filter subscribed to again begins again; one that has to wait before it may begin is not forgotten over that.
    pub(crate) fn add(&mut self, new: Fed) {
        if self.catching_up == 0 {
            self.remove(new.filter.as_str());
        }
        self.asked += 1;
        let asked = self.asked;
        self.filters.push_back(Fed { asked, ..new });
    }

    pub(crate) fn remove(&mut self, filter: &str) {
        self.filters.retain(|fed| fed.filter.as_str() != filter);
    }

    /// The connection that was being fed is gone: its part is looked up again.
    pub(crate) fn interrupted(&mut self) {
        self.appending = false;
        self.catching_up = 0;
    }

    /// The filter `asked` has got to `topic`, and to its end where there is no more; unless it was
    /// taken away meanwhile, or subscribed to again.
    fn advance(&mut self, asked: u64, topic: Option<Arc<str>>, more: bool) {
        let Some(front) = self.filters.front_mut() else {
            return;
        };
        if front.asked != asked {
            return;
        }
        if topic.is_some() {
            front.after = topic;
        }
        if !more {
            self.filters.pop_front();
        }
    }
}

/// What became of one message.
enum Fate {
    Sent,
    NoRoom,
    /// It goes through the inbox.
    Append(Append),
}

impl Connection {
    /// In a cluster nothing is sent before it is known what other nodes have changed.
    pub(crate) fn catch_up_before_feeding(&mut self) {
        if self.node.cluster.is_none() {
            return;
        }
        if let Some(feed) = &mut self.session.lock().feed {
            feed.catching_up += 1;
        }
        let session = Arc::clone(&self.session);
        let epoch = self.epoch;
        // Begun when everything before it in the line is done: messages that are published from then on find the subscription.
        let node = Arc::clone(&self.node);
        let caught_up = Box::pin(async move {
            before_feeding(&node).await;
            let mut state = session.lock();
            if state.link_of(epoch).is_some()
                && let Some(feed) = &mut state.feed
            {
                feed.catching_up = feed.catching_up.saturating_sub(1);
            }
            Ok(())
        });
        self.put_in_line(Some(caught_up), PendingAnswer::Encoded(bytes::Bytes::new()));
    }

    /// Sends retained messages as far as there is room.
    pub(crate) fn feed_retained(&mut self, turn: &mut Turn) {
        let mut pages = 0;
        while self.feeding && !self.wire.is_signalled(FEEDING) {
            if pages == PAGES_AT_ONCE {
                self.wire.signal(FEEDING);
                return;
            }
            pages += 1;
            let front = {
                let mut state = self.session.lock();
                if state.link_of(self.epoch).is_none() {
                    return;
                }
                match &state.feed {
                    Some(feed) if feed.appending || feed.catching_up > 0 => return,
                    feed => match feed.as_ref().and_then(|feed| feed.filters.front()) {
                        Some(front) => front.clone(),
                        None => {
                            state.feed = None;
                            self.feeding = false;
                            return;
                        }
                    },
                }
            };
            if !self.feed_filter(&front, turn) {
                return;
            }
        }
    }

    /// Says whether it makes sense to go on at once.
    fn feed_filter(&mut self, fed: &Fed, turn: &mut Turn) -> bool {
        let after = fed.after.as_deref();
        let page = self.node.retained.page(&fed.filter, after, PAGE);
        let mut appends = Vec::new();
        let mut last: Option<Arc<str>> = None;
        let mut all = true;
        for message in &page.messages {
            let mut state = self.session.lock();
            let fate = feed_one(&mut state, self, fed, message, appends.len());
            turn.corked.add(&self.session, &mut state);
            drop(state);
            match fate {
                Fate::Sent => {}
                Fate::NoRoom => {
                    all = false;
                    break;
                }
                Fate::Append(append) => appends.push(append),
            }
            last = Some(message.topic.as_str().into());
        }
        let more = page.reached.is_some() || !all;
        if all {
            last = page.reached.or(last);
        }
        let mut state = self.session.lock();
        let Some(feed) = &mut state.feed else {
            return false;
        };
        if appends.is_empty() {
            feed.advance(fed.asked, last, more);
            return all;
        }
        feed.appending = true;
        drop(state);
        let reached = (fed.asked, last, more);
        let appended = append(&self.node, &self.session, appends, reached);
        // Nothing is answered, but the line waits for it: what the device publishes next is
        // acknowledged after it.
        self.put_in_line(Some(appended), PendingAnswer::Encoded(bytes::Bytes::new()));
        false
    }
}

fn feed_one(
    state: &mut State,
    connection: &Connection,
    fed: &Fed,
    message: &Arc<Message>,
    appending: usize,
) -> Fate {
    let node = &connection.node;
    let qos = message.qos.min(fed.qos);
    let is_ours = state.link_of(connection.epoch).is_some();
    if !is_ours || !state.has_room_for(qos, appending, node) {
        return Fate::NoRoom;
    }
    let ids: &[u32] = match &fed.subscription_id {
        0 => &[],
        id => std::slice::from_ref(id),
    };
    if qos > QoS::AtMostOnce && state.keeps_inbox() {
        let mut message = Message {
            origin: Origin::Session,
            qos,
            ..Message::clone(message)
        };
        if !ids.is_empty() {
            let properties = message.properties.get_or_insert_default();
            properties.subscription_ids = ids.to_vec();
        }
        return Fate::Append(Append {
            client: connection.session.client.clone(),
            message,
            fingerprint: None,
        });
    }
    let publish = for_device(connection.version, message);
    let encoded = FanOut::new(&publish).encoded(connection.version, qos, true, ids);
    state.deliver_live(&encoded, message.expires_at_ms, node);
    Fate::Sent
}

fn append(
    node: &Arc<Node>,
    session: &Arc<Session>,
    appends: Vec<Append>,
    (asked, last, more): (u64, Option<Arc<str>>, bool),
) -> Durable {
    let messages: Vec<Message> = appends
        .iter()
        .map(|append| append.message.clone())
        .collect();
    let appended = node.stores.inboxes.append(appends);
    let (node, session) = (Arc::clone(node), Arc::clone(session));
    Box::pin(async move {
        let outcomes = appended.await?;
        let mut corked = Corked::new();
        let mut state = session.lock();
        for (outcome, message) in outcomes.iter().zip(&messages) {
            match outcome {
                Appended::Stored { position, .. } => {
                    state.deliver_hint(&session.client, *position, message, &node);
                }
                Appended::Full | Appended::Dropped => node.metrics.dropped_queue_full.increment(1),
                Appended::Repeated { .. } => {}
            }
        }
        if let Some(feed) = &mut state.feed {
            feed.appending = false;
            feed.advance(asked, last, more);
        }
        corked.add(&session, &mut state);
        Ok(())
    })
}
