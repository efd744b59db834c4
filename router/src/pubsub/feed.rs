//! What a node takes publications from, whatever brings them there.
//!
//! A feed has two ends. [`Feed`] is the reader's. `FeedSource` is that of the backend, which lasts over broken connections: to
//! the reader nothing happens but a pause, after which what was not acknowledged comes again.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use super::Publication;
use super::bindings::{Bindings, Changes};

/// The filters of a feed; what they match comes, and more may.
#[derive(Debug, Clone)]
pub struct Filters(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
    /// Up to which change everything is in force.
    settled: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    bindings: Bindings,
    /// Not yet handed to the backend.
    pending: Changes,
    /// Counts changes.
    changes: u64,
}

impl Filters {
    /// At most `patterns_max` patterns stand for them.
    pub fn new(patterns_max: usize) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                bindings: Bindings::new(patterns_max),
                pending: Changes::default(),
                changes: 0,
            }),
            changed: Notify::new(),
            settled: watch::Sender::new(0),
        }))
    }

    /// Adds a filter, or counts it once more. It is that behind the group in a shared subscription.
    pub fn add(&self, filter: &str) {
        self.change(|bindings| bindings.add(filter));
    }

    /// Counts a filter once less.
    pub fn remove(&self, filter: &str) {
        self.change(|bindings| bindings.remove(filter));
    }

    fn change(&self, change: impl FnOnce(&mut Bindings) -> Changes) {
        let mut state = self.0.state.lock();
        let changes = change(&mut state.bindings);
        if !changes.is_empty() {
            state.pending.merge(changes);
            state.changes += 1;
            drop(state);
            self.0.changed.notify_one();
        }
    }

    /// Resolves when what was added up to now is in force; `None` where it is already.
    pub fn settled(&self) -> Option<impl Future<Output = ()> + Send + use<>> {
        let wanted = self.0.state.lock().changes;
        let mut settled = self.0.settled.subscribe();
        if *settled.borrow() >= wanted {
            return None;
        }
        Some(async move {
            // The sender is in `self.0`, which may have gone with the feed: then nobody is there to be told.
            let _ = settled.wait_for(|reached| *reached >= wanted).await;
        })
    }

    /// Everything there is to bind, for a queue that may not be bound to anything. With the number for
    /// [`Filters::in_force`].
    pub(crate) fn all(&self) -> (Vec<String>, u64) {
        let mut state = self.0.state.lock();
        state.pending = Changes::default();
        (state.bindings.patterns(), state.changes)
    }

    /// What changed since the last call.
    pub(crate) fn take(&self) -> (Changes, u64) {
        let mut state = self.0.state.lock();
        (std::mem::take(&mut state.pending), state.changes)
    }

    pub(crate) async fn changed(&self) {
        self.0.changed.notified().await;
    }

    pub(crate) fn in_force(&self, changes: u64) {
        self.0.settled.send_replace(changes);
    }
}

/// Acknowledgements on their way to the queue that the deliveries came from.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    settled: Mutex<Vec<(u64, bool)>>,
    changed: Notify,
}

impl Acks {
    /// Tags, each with whether it is done or to be given to another.
    pub(crate) fn take(&self) -> Vec<(u64, bool)> {
        std::mem::take(&mut *self.settled.lock())
    }

    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// What became of one delivery. Dropped without a word it goes to another reader, or to this one again.
#[derive(Debug)]
pub struct Ack {
    tag: u64,
    to: Option<Arc<Acks>>,
}

impl Ack {
    pub(crate) fn new(tag: u64, to: &Arc<Acks>) -> Self {
        Self {
            tag,
            to: Some(Arc::clone(to)),
        }
    }

    /// The publication is where it belongs.
    pub fn done(mut self) {
        self.settle(true);
    }

    fn settle(&mut self, done: bool) {
        if let Some(acks) = self.to.take() {
            acks.settled.lock().push((self.tag, done));
            acks.changed.notify_one();
        }
    }
}

impl Drop for Ack {
    fn drop(&mut self) {
        self.settle(false);
    }
}

/// A publication that was fed.
#[derive(Debug)]
pub struct FeedDelivery {
    /// What.
    pub publication: Publication,
    /// To be told when it is where it belongs.
    pub ack: Ack,
    /// How often it was given back before, as far as the queue counts that.
    pub given_back: u64,
}

/// The reader's end. Ends when it is dropped.
#[derive(Debug)]
pub struct Feed {
    filters: Filters,
    deliveries: mpsc::Receiver<FeedDelivery>,
}

/// The backend's end.
#[derive(Debug)]
pub(crate) struct FeedSource {
    pub(crate) filters: Filters,
    /// Ends with the reader.
    pub(crate) deliveries: mpsc::Sender<FeedDelivery>,
}

impl Feed {
    pub(crate) fn new(filters: Filters, capacity: usize) -> (Self, FeedSource) {
        let (sender, deliveries) = mpsc::channel(capacity);
        let source = FeedSource {
            filters: filters.clone(),
            deliveries: sender,
        };
        let feed = Self {
            filters,
            deliveries,
        };
        (feed, source)
    }

    /// What comes.
    pub fn filters(&self) -> &Filters {
        &self.filters
    }

    /// The next publication; `None` when the backend has ended.
    pub async fn next(&mut self) -> Option<FeedDelivery> {
        self.deliveries.recv().await
    }

    /// The next ones, at least one and at most `limit`, into `into`; says how many.
    pub async fn next_many(&mut self, into: &mut Vec<FeedDelivery>, limit: usize) -> usize {
        self.deliveries.recv_many(into, limit).await
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn filters_are_settled_when_their_patterns_are_in_force() {
        let filters = Filters::new(8);
        assert!(filters.settled().is_none());
        filters.add("a");
        let settled = filters.settled().unwrap();
        filters.add("a");
        let (changes, number) = filters.take();
        assert_eq!(changes.bind, ["a"]);
        filters.add("b");
        let later = filters.settled().unwrap();
        filters.in_force(number);
        assert!(settled.now_or_never().is_some());
        assert!(later.now_or_never().is_none());
        let (patterns, number) = filters.all();
        assert_eq!(patterns.len(), 2);
        assert!(filters.take().0.is_empty());
        filters.in_force(number);
        assert!(filters.settled().is_none());
    }

    #[test]
    fn a_delivery_that_nobody_sees_to_goes_to_another() {
        let acks = Arc::new(Acks::default());
        Ack::new(1, &acks).done();
        drop(Ack::new(2, &acks));
        assert_eq!(acks.take(), [(1, true), (2, false)]);
        assert!(acks.take().is_empty());
    }
}
