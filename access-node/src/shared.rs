//! Shared subscriptions: of the members of a `$share/{group}/{filter}`, which one gets a message
//! (MQTT 5.0 section 4.8.2).
//!
//! Here are the groups, how a topic finds them, and the choice. How a message then reaches the
//! member is in `publish`; what becomes of it when the member leaves, in `redispatch`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ahash::RandomState;
use dashmap::DashMap;
use moorline_mqtt::{QoS, RetainHandling, SubscriptionOptions, TopicFilter};
use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::config::Config;
use crate::session::{Session, State};
use crate::subscriptions::{Subscriber, Subscriptions};

const PREFIX: &str = "$share/";

/// Members that a message was offered to in vain.
pub(crate) type PassedOver = SmallVec<[Arc<Session>; 2]>;

/// The members of one shared subscription. Groups of one name with different filters have nothing
/// to do with each other.
#[derive(Debug)]
pub(crate) struct Group {
    /// `$share/{group}/{filter}`, as the members wrote it.
    pub(crate) filter: Arc<str>,
    /// Locked before a session, never while one is.
    members: Mutex<Members>,
}

#[derive(Debug, Default)]
struct Members {
    list: Vec<Subscriber<Session>>,
    /// Whose turn it is.
    next: usize,
}

/// How well a member can take a message now; what comes first is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// Connected, and it would be sent at once.
    Room,
    /// Connected; this many messages are before it.
    Loaded(u64),
    /// Not connected: it waits in the inbox.
    Away,
    /// Connected, and it would be dropped.
    Full,
}

impl Group {
    /// Takes turns among the members that are connected and have room in their window: whoever is slow
    /// or away gets less, and a group whose members keep up shares evenly. If none has room, the
    /// one with the least before it; if none is connected, the persistent sessions take turns.
    /// `qos` is that of the publish.
    pub(crate) fn choose(
        &self,
        qos: QoS,
        passed_over: &[Arc<Session>],
        limits: &Config,
    ) -> Option<Subscriber<Session>> {
        let mut members = self.members.lock();
        let count = members.list.len();
        let mut best: Option<(Standing, usize)> = None;
        for step in 0..count {
            let at = (members.next + step) % count;
            let member = &members.list[at];
            if passed_over
                .iter()
                .any(|other| Arc::ptr_eq(other, &member.session))
            {
                continue;
            }
            let granted = qos.min(member.options.qos);
            let Some(standing) = standing(&member.session.lock(), granted, limits) else {
                continue;
            };
            if best.is_none_or(|(held, _)| standing < held) {
                best = Some((standing, at));
            }
            if standing == Standing::Room {
                break;
            }
        }
        let (_, at) = best?;
        members.next = (at + 1) % count;
        Some(members.list[at].duplicate())
    }

    /// Adds or replaces that session's membership: a second SUBSCRIBE makes nobody a member twice.
    fn put(&self, new: Subscriber<Session>) -> bool {
        let mut members = self.members.lock();
        let held = members
            .list
            .iter_mut()
            .find(|held| Arc::ptr_eq(&held.session, &new.session));
        match held {
            Some(held) => {
                *held = new;
                false
            }
            None => {
                members.list.push(new);
                true
            }
        }
    }

    /// `(removed, now empty)`.
    fn remove(&self, session: &Arc<Session>) -> (bool, bool) {
        let mut members = self.members.lock();
        let at = members
            .list
            .iter()
            .position(|held| Arc::ptr_eq(&held.session, session));
        if let Some(at) = at {
            members.list.remove(at);
            if at < members.next {
                members.next -= 1;
            }
        }
        (at.is_some(), members.list.is_empty())
    }
}

/// `None` for who can get nothing: the session has ended, or ends with a connection that is gone.
fn standing(state: &State, qos: QoS, limits: &Config) -> Option<Standing> {
    if state.ended {
        return None;
    }
    let link = state.link.as_ref().filter(|link| link.closing.is_none());
    let Some(link) = link else {
        return (qos > QoS::AtMostOnce && state.is_persistent()).then_some(Standing::Away);
    };
    if qos == QoS::AtMostOnce {
        let takes = link.unsent.len() < limits.unsent_bytes_max;
        return Some(if takes {
            Standing::Room
        } else {
            Standing::Full
        });
    }
    let cursor = &state.inbox;
    if state.queue.is_none() && !cursor.behind && state.has_room(limits.unsent_bytes_max) {
        return Some(Standing::Room);
    }
    let is_full = state
        .queue
        .as_ref()
        .is_some_and(|queue| queue.is_full(limits));
    if is_full && !state.keeps_inbox() {
        return Some(Standing::Full);
    }
    let unread = match cursor.heard.generation == cursor.read_to.generation {
        true => cursor
            .heard
            .sequence
            .saturating_sub(cursor.read_to.sequence),
        false => 0,
    };
    let before = state.in_flight.len() + state.queue.as_ref().map_or(0, |queue| queue.len());
    Some(Standing::Loaded(before as u64 + unread))
}

/// Every shared subscription of the node.
#[derive(Debug, Default)]
pub(crate) struct SharedSubscriptions {
    /// By the whole text, which is what UNSUBSCRIBE names.
    groups: DashMap<Arc<str>, Arc<Group>, RandomState>,
    /// By the filter behind the group. Changes while the group's place in `groups` is locked.
    index: Subscriptions<Group>,
    /// Read before anything else is: a publish on a node without groups costs this one look.
    count: AtomicUsize,
}

impl SharedSubscriptions {
    /// Whether `filter` is that of a shared subscription.
    pub(crate) fn is_shared(filter: &str) -> bool {
        filter.starts_with(PREFIX)
    }

    /// Adds or replaces a membership; says whether the session was none before. `key` is `filter` as
    /// the session keeps it.
    pub(crate) fn add(
        &self,
        key: &Arc<str>,
        filter: &TopicFilter,
        subscriber: Subscriber<Session>,
    ) -> bool {
        match self.groups.entry(Arc::clone(key)) {
            dashmap::Entry::Occupied(group) => group.get().put(subscriber),
            dashmap::Entry::Vacant(free) => {
                let Some((_, plain)) = filter.share() else {
                    return false;
                };
                let group = Arc::new(Group {
                    filter: Arc::clone(key),
                    members: Mutex::default(),
                });
                group.put(subscriber);
                let entry = Subscriber {
                    session: Arc::clone(&group),
                    options: UNUSED,
                    subscription_id: 0,
                };
                free.insert(group);
                // The wildcards of the whole are those of the filter: a group has none.
                self.index.add(&plain.into(), filter, entry);
                self.count.fetch_add(1, Ordering::Release);
                true
            }
        }
    }

    /// Removes a membership; says whether there was one.
    pub(crate) fn remove(&self, key: &str, session: &Arc<Session>) -> bool {
        let mut removed = false;
        self.groups.remove_if_mut(key, |_, group| {
            let (was, empty) = group.remove(session);
            removed = was;
            if empty && let Some((_, plain)) = share_of(key) {
                self.index.remove(plain, group);
                self.count.fetch_sub(1, Ordering::Release);
            }
            empty
        });
        removed
    }

    /// The group of that whole text, if it has members.
    pub(crate) fn group(&self, key: &str) -> Option<Arc<Group>> {
        self.groups.get(key).map(|group| Arc::clone(&group))
    }

    /// The groups whose filter matches `topic`, each of which gets the message once.
    pub(crate) fn matching(&self, topic: &str) -> SmallVec<[Arc<Group>; 2]> {
        let mut groups = SmallVec::new();
        if self.count.load(Ordering::Acquire) > 0 {
            self.index
                .for_each_match(topic, |entry| groups.push(Arc::clone(&entry.session)));
        }
        groups
    }
}

/// A group has no options: each member has its own.
const UNUSED: SubscriptionOptions = SubscriptionOptions {
    qos: QoS::ExactlyOnce,
    no_local: false,
    retain_as_published: false,
    retain_handling: RetainHandling::DoNotSend,
};

/// Group and filter in the text of a shared subscription.
fn share_of(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(PREFIX)?.split_once('/')
}

#[cfg(test)]
#[path = "shared_tests.rs"]
mod tests;
