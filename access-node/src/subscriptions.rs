//! Who wants a topic: the node's subscriptions.
//!
//! Filters without wildcards, which is most of them with one filter a device, live in a sharded
//! map; the rest in a trie of levels. Both hold the session itself, so that a match can be
//! delivered without another look-up.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ahash::RandomState;
use dashmap::DashMap;
use moorline_mqtt::{SubscriptionOptions, TopicFilter};
use parking_lot::RwLock;

/// One subscriber of one filter.
#[derive(Debug)]
pub(crate) struct Subscriber<S> {
    pub(crate) session: Arc<S>,
    pub(crate) options: SubscriptionOptions,
    /// MQTT 5.0 subscription identifier; 0 is none.
    pub(crate) subscription_id: u32,
}

/// The subscribers of one filter; nearly always one, which then costs no allocation of its own.
#[derive(Debug)]
enum Subscribers<S> {
    One(Subscriber<S>),
    Many(Vec<Subscriber<S>>),
}

impl<S> Subscribers<S> {
    fn as_slice(&self) -> &[Subscriber<S>] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    /// Adds or replaces that session's subscription; says whether it is new.
    fn put(&mut self, new: Subscriber<S>) -> bool {
        match self {
            Self::One(one) if Arc::ptr_eq(&one.session, &new.session) => {
                *one = new;
                false
            }
            Self::One(one) => {
                *self = Self::Many(vec![one.duplicate(), new]);
                true
            }
            Self::Many(many) => {
                match many
                    .iter_mut()
                    .find(|held| Arc::ptr_eq(&held.session, &new.session))
                {
                    Some(held) => {
                        *held = new;
                        false
                    }
                    None => {
                        many.push(new);
                        true
                    }
                }
            }
        }
    }

    /// Removes that session's subscription. `(removed, now empty)`.
    fn remove(&mut self, session: &Arc<S>) -> (bool, bool) {
        match self {
            Self::One(one) => {
                let same = Arc::ptr_eq(&one.session, session);
                (same, same)
            }
            Self::Many(many) => {
                let at = many
                    .iter()
                    .position(|held| Arc::ptr_eq(&held.session, session));
                if let Some(at) = at {
                    many.swap_remove(at);
                    if many.capacity() > 8 && many.len() * 4 < many.capacity() {
                        many.shrink_to_fit();
                    }
                }
                (at.is_some(), many.is_empty())
            }
        }
    }
}

impl<S> Subscriber<S> {
    /// A clone that does not ask `S` to be `Clone`.
    pub(crate) fn duplicate(&self) -> Self {
        Self {
            session: Arc::clone(&self.session),
            options: self.options,
            subscription_id: self.subscription_id,
        }
    }
}

/// A level of the trie of wildcard filters.
#[derive(Debug)]
struct Level<S> {
    children: HashMap<Box<str>, Level<S>, RandomState>,
    /// The filter that ends here.
    subscribers: Option<Subscribers<S>>,
}

impl<S> Default for Level<S> {
    fn default() -> Self {
        Self {
            children: HashMap::default(),
            subscribers: None,
        }
    }
}

impl<S> Level<S> {
    fn visit(&self, rest: Option<&str>, root: bool, found: &mut impl FnMut(&Subscriber<S>)) {
        // `$` topics are not matched by a wildcard in the first level [MQTT-4.7.2-1].
        let hidden = root && rest.is_some_and(|topic| topic.starts_with('$'));
        if !hidden && let Some(all) = self.children.get("#") {
            all.for_each_here(found);
        }
        let Some(rest) = rest else {
            self.for_each_here(found);
            return;
        };
        let (level, rest) = match rest.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (rest, None),
        };
        if let Some(next) = self.children.get(level) {
            next.visit(rest, false, found);
        }
        if !hidden && let Some(any) = self.children.get("+") {
            any.visit(rest, false, found);
        }
    }

    fn for_each_here(&self, found: &mut impl FnMut(&Subscriber<S>)) {
        for subscriber in self.subscribers.iter().flat_map(Subscribers::as_slice) {
            found(subscriber);
        }
    }

    /// `(removed, this level holds nothing any more)`.
    fn remove(&mut self, rest: Option<&str>, session: &Arc<S>) -> (bool, bool) {
        let removed = match rest {
            None => match &mut self.subscribers {
                None => false,
                Some(held) => {
                    let (removed, empty) = held.remove(session);
                    if empty {
                        self.subscribers = None;
                    }
                    removed
                }
            },
            Some(rest) => {
                let (level, rest) = match rest.split_once('/') {
                    Some((level, rest)) => (level, Some(rest)),
                    None => (rest, None),
                };
                match self.children.get_mut(level) {
                    None => false,
                    Some(child) => {
                        let (removed, empty) = child.remove(rest, session);
                        if empty {
                            self.children.remove(level);
                        }
                        removed
                    }
                }
            }
        };
        (
            removed,
            self.children.is_empty() && self.subscribers.is_none(),
        )
    }
}

/// Every subscription of the node.
#[derive(Debug)]
pub(crate) struct Subscriptions<S> {
    exact: DashMap<Arc<str>, Subscribers<S>, RandomState>,
    wildcard: RwLock<Level<S>>,
    /// Read before the lock is: a node without wildcards never takes it.
    wildcard_count: AtomicUsize,
}

impl<S> Default for Subscriptions<S> {
    fn default() -> Self {
        Self {
            exact: DashMap::default(),
            wildcard: RwLock::default(),
            wildcard_count: AtomicUsize::new(0),
        }
    }
}

impl<S> Subscriptions<S> {
    /// Adds or replaces; says whether the session did not hold this filter before. `key` is `filter` as the
    /// session keeps it, so that both share one copy.
    pub(crate) fn add(
        &self,
        key: &Arc<str>,
        filter: &TopicFilter,
        subscriber: Subscriber<S>,
    ) -> bool {
        if !filter.has_wildcards() {
            return match self.exact.entry(Arc::clone(key)) {
                dashmap::Entry::Occupied(mut held) => held.get_mut().put(subscriber),
                dashmap::Entry::Vacant(free) => {
                    free.insert(Subscribers::One(subscriber));
                    true
                }
            };
        }
        let mut root = self.wildcard.write();
        let mut level = &mut *root;
        for name in key.split('/') {
            // `entry` wants an owned key even for a level that exists, which most do.
            if !level.children.contains_key(name) {
                level.children.insert(name.into(), Level::default());
            }
            level = level.children.get_mut(name).expect("inserted above");
        }
        let new = match &mut level.subscribers {
            Some(held) => held.put(subscriber),
            none => {
                *none = Some(Subscribers::One(subscriber));
                true
            }
        };
        if new {
            self.wildcard_count.fetch_add(1, Ordering::Release);
        }
        new
    }

    /// Removes; says whether the session held the filter.
    pub(crate) fn remove(&self, key: &str, session: &Arc<S>) -> bool {
        let wild = key.split('/').any(|level| level == "+" || level == "#");
        if !wild {
            let mut removed = false;
            self.exact.remove_if_mut(key, |_, held| {
                let (was, empty) = held.remove(session);
                removed = was;
                empty
            });
            return removed;
        }
        let (removed, _) = self.wildcard.write().remove(Some(key), session);
        if removed {
            self.wildcard_count.fetch_sub(1, Ordering::Release);
        }
        removed
    }

    /// Calls `found` for each subscription that matches `topic`; a session with several gets
    /// several calls.
    pub(crate) fn for_each_match(&self, topic: &str, mut found: impl FnMut(&Subscriber<S>)) {
        if let Some(held) = self.exact.get(topic) {
            held.as_slice().iter().for_each(&mut found);
        }
        if self.wildcard_count.load(Ordering::Acquire) > 0 {
            self.wildcard.read().visit(Some(topic), true, &mut found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moorline_mqtt::{QoS, RetainHandling, TopicName};
    use proptest::prelude::*;

    fn options() -> SubscriptionOptions {
        SubscriptionOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: RetainHandling::Send,
        }
    }

    fn add(to: &Subscriptions<u32>, session: &Arc<u32>, filter: &str) -> bool {
        let parsed = TopicFilter::parse(filter.into()).unwrap();
        let subscriber = Subscriber {
            session: Arc::clone(session),
            options: options(),
            subscription_id: 0,
        };
        to.add(&filter.into(), &parsed, subscriber)
    }

    fn matches(of: &Subscriptions<u32>, topic: &str) -> Vec<u32> {
        let mut found = Vec::new();
        of.for_each_match(topic, |subscriber| found.push(*subscriber.session));
        found.sort_unstable();
        found
    }

    #[test]
    fn a_session_replaces_its_own_subscription() {
        let subscriptions = Subscriptions::default();
        let one = Arc::new(1);
        for filter in ["a/b", "a/+"] {
            assert!(add(&subscriptions, &one, filter));
            assert!(!add(&subscriptions, &one, filter));
        }
        assert_eq!(matches(&subscriptions, "a/b"), [1, 1]);
        assert!(subscriptions.remove("a/b", &one));
        assert!(!subscriptions.remove("a/b", &one));
        assert!(subscriptions.remove("a/+", &one));
        assert_eq!(matches(&subscriptions, "a/b"), [0u32; 0]);
        assert!(subscriptions.wildcard.read().children.is_empty());
        assert!(subscriptions.exact.is_empty());
    }

    #[test]
    fn dollar_topics_are_hidden_from_leading_wildcards_only() {
        let subscriptions = Subscriptions::default();
        for (session, filter) in ["#", "+/x", "$sys/#", "$sys/+"].into_iter().enumerate() {
            add(&subscriptions, &Arc::new(session as u32), filter);
        }
        assert_eq!(matches(&subscriptions, "$sys/x"), [2, 3]);
        assert_eq!(matches(&subscriptions, "$sys"), [2]);
        assert_eq!(matches(&subscriptions, "a/x"), [0, 1]);
    }

    fn level() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["", "a", "b", "$x"])
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_matching_one_by_one(
            filters in prop::collection::vec(
                (prop::collection::vec(prop_oneof![level().boxed(), Just("+").boxed()], 1..4), any::<bool>()), 1..20),
            topics in prop::collection::vec(prop::collection::vec(level(), 1..4), 1..10),
            removed in any::<u32>(),
        ) {
            let subscriptions = Subscriptions::default();
            let mut held = Vec::new();
            for (number, (levels, multi)) in filters.iter().enumerate() {
                let mut text = levels.join("/");
                if *multi { text.push_str("/#"); }
                let Ok(filter) = TopicFilter::parse(text.as_str().into()) else { continue };
                let session = Arc::new(number as u32);
                prop_assert!(add(&subscriptions, &session, &text));
                if removed & (1 << number) != 0 {
                    prop_assert!(subscriptions.remove(&text, &session));
                } else {
                    held.push((filter, number as u32));
                }
            }
            for levels in topics {
                let text = levels.join("/");
                let Ok(topic) = TopicName::parse(text.as_str().into()) else { continue };
                let expected: Vec<u32> =
                    held.iter().filter(|(filter, _)| filter.matches(topic.as_str())).map(|(_, n)| *n).collect();
                prop_assert_eq!(matches(&subscriptions, &text), expected, "topic {}", text);
            }
        }
    }
}
