//! The node: what every connection of it shares.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ahash::RandomState;
use dashmap::DashMap;
use moorline_mqtt::TopicFilter;
use moorline_router::upstream::UpstreamRoutes;
use moorline_router::{BanTarget, ClientId, NodeId, NodeRecord, NodeState, StoreError, Stores};
use tokio::sync::{Mutex, MutexGuard, Notify, Semaphore};

use crate::admission::Admission;
use crate::auth::Auth;
use crate::bans::Bans;
use crate::close_reason::{CloseReason, Refusal};
use crate::cluster::{Cluster, Membership};
use crate::config::Config;
use crate::deadlines::{Clock, Wheel};
use crate::delayed::DelayRules;
use crate::flapping::FlappingClients;
use crate::handovers::Handovers;
use crate::metrics::Metrics;
use crate::rate::{DeviceRates, LogLimit};
use crate::retained::RetainedMessages;
use crate::session::Session;
use crate::shared::SharedSubscriptions;
use crate::subscriptions::{Subscriber, Subscriptions};
use crate::timers::Timers;

/// Length of the node's lease and how often it is renewed (DESIGN section 3).
pub(crate) const LEASE_MS: u64 = 10_000;
pub(crate) const LEASE: Duration = Duration::from_millis(LEASE_MS);
pub(crate) const RENEW_EVERY: Duration = Duration::from_secs(3);
const STRIPES: usize = 1024;
/// TLS handshakes that compute at the same time. One turn takes below a millisecond, and everything
/// else on its thread comes before the next: a storm of handshakes delays devices by this many.
const HANDSHAKE_TURNS: usize = 4;

/// One access node.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) config: Config,
    pub(crate) auth: Auth,
    pub(crate) stores: Stores,
    pub(crate) upstream: UpstreamRoutes,
    pub(crate) delays: DelayRules,
    /// Every session of the node, connected or not. Entries change only under the client's stripe.
    pub(crate) sessions: DashMap<ClientId, Arc<Session>, RandomState>,
    pub(crate) subscriptions: Subscriptions<Session>,
    pub(crate) shared: SharedSubscriptions,
    pub(crate) retained: RetainedMessages,
    pub(crate) clock: Clock,
    pub(crate) wheel: Wheel,
    pub(crate) timers: Timers,
    pub(crate) handovers: Handovers,
    pub(crate) metrics: Metrics,
    pub(crate) bans: Arc<Bans>,
    pub(crate) admission: Admission,
    flapping: FlappingClients,
    pub(crate) device_rates: DeviceRates,
    /// For lines that a peer can provoke at will.
    pub(crate) log_limit: LogLimit,
    /// Serialises connect, end and expiry of one client id, which wait for stores in between.
    stripes: Box<[Mutex<()>]>,
    hasher: RandomState,
    /// Turns of computing a TLS handshake.
    pub(crate) handshake_turns: Semaphore,
    /// Present where there are several nodes.
    pub(crate) cluster: Option<Membership>,
    draining: AtomicBool,
    drains: Notify,
}

impl Node {
    pub(crate) fn new(
        id: NodeId,
        config: Config,
        auth: Auth,
        stores: Stores,
        upstream: UpstreamRoutes,
        delays: DelayRules,
        cluster: Option<Cluster>,
    ) -> Self {
        let bans = Arc::new(Bans::default());
        Self {
            id,
            admission: Admission::new(&config, Arc::clone(&bans)),
            bans,
            flapping: FlappingClients::new(&config.flapping),
            device_rates: DeviceRates::new(&config.per_device),
            log_limit: LogLimit::default(),
            config,
            auth,
            stores,
            upstream,
            delays,
            sessions: DashMap::default(),
            subscriptions: Subscriptions::default(),
            shared: SharedSubscriptions::default(),
            retained: RetainedMessages::default(),
            clock: Clock::new(),
            wheel: Wheel::new(),
            timers: Timers::default(),
            handovers: Handovers::default(),
            metrics: Metrics::new(),
            stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            hasher: RandomState::new(),
            handshake_turns: Semaphore::new(HANDSHAKE_TURNS),
            cluster: cluster.map(Membership::new),
            draining: AtomicBool::new(false),
            drains: Notify::new(),
        }
    }

    /// Holds off every other connect, end and expiry of `client` (and of some others) meanwhile.
    pub(crate) async fn owning(&self, client: &ClientId) -> MutexGuard<'_, ()> {
        let at = usize::try_from(self.hasher.hash_one(client) % STRIPES as u64).expect("small");
        self.stripes[at].lock().await
    }

    /// A number that nobody outside can foretell, another for each client.
    pub(crate) fn random(&self, client: &ClientId) -> u64 {
        self.hasher.hash_one(client)
    }

    /// Where the node runs, by the operator's word.
    pub(crate) fn region(&self) -> &str {
        self.cluster
            .as_ref()
            .map_or("", |cluster| &cluster.given.region)
    }

    pub(crate) fn session(&self, client: &ClientId) -> Option<Arc<Session>> {
        self.sessions.get(client).map(|held| Arc::clone(&held))
    }

    /// Adds or replaces a subscription of whichever kind; says whether the session did not hold it
    /// before.
    pub(crate) fn subscribe(
        &self,
        key: &Arc<str>,
        filter: &TopicFilter,
        subscriber: Subscriber<Session>,
    ) -> bool {
        let is_new = if filter.share().is_some() {
            self.shared.add(key, filter, subscriber)
        } else {
            self.subscriptions.add(key, filter, subscriber)
        };
        if let (true, Some(cluster)) = (is_new, &self.cluster) {
            cluster.exchange.added(self, filter);
        }
        is_new
    }

    /// Removes a subscription; says whether the session held it.
    pub(crate) fn unsubscribe(&self, filter: &str, session: &Arc<Session>) -> bool {
        let is_shared = SharedSubscriptions::is_shared(filter);
        let was_held = match is_shared {
            true => self.shared.remove(filter, session),
            false => self.subscriptions.remove(filter, session),
        };
        if let (true, Some(cluster)) = (was_held, &self.cluster) {
            cluster.exchange.removed(self, filter, is_shared);
        }
        was_held
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Takes no new devices from now on.
    pub(crate) fn begin_drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.drains.notify_waiters();
        if let Some(cluster) = &self.cluster {
            // The others are to know at once.
            cluster.link.doubt();
        }
    }

    /// Resolves when the node takes no new devices any more.
    pub(crate) async fn drain_begun(&self) {
        loop {
            let notified = self.drains.notified();
            if self.is_draining() {
                return;
            }
            notified.await;
        }
    }

    /// Counts and logs a connection that was not let in.
    pub(crate) fn refused(&self, refusal: Refusal, listener: &str, peer: SocketAddr) {
        self.metrics.refused(refusal.label());
        if let Some(suppressed) = self.log_limit.allows(self.clock.now_s()) {
            let reason = refusal.label();
            tracing::info!(listener, %peer, reason, suppressed, "connection refused");
        }
    }

    /// Notes how a connection of `client` ended, and bans a client for which that happens too often.
    pub(crate) fn note_flap(&self, client: &ClientId, reason: CloseReason) {
        if reason.is_flap() && self.flapping.ended(client, self.clock.now_s()) {
            let target = BanTarget::Client(client.clone());
            self.bans.give(target, "flapping", self.config.flapping.ban);
        }
    }

    /// Closes every connection.
    pub(crate) fn close_all(&self, reason: CloseReason) {
        for session in &self.sessions {
            if let Some(link) = &mut session.lock().link {
                link.close(reason);
            }
        }
    }

    /// Takes or renews the lease once; says whether it was known.
    pub(crate) async fn renew_lease(&self) -> Result<bool, StoreError> {
        let given = self.cluster.as_ref().map(|cluster| &cluster.given);
        let record = NodeRecord {
            id: self.id.clone(),
            address: given.map_or_else(String::new, |given| given.address.clone()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: if self.is_draining() {
                NodeState::Draining
            } else {
                NodeState::Up
            },
            connections: self.admission.gate.open() as u64,
            region: given.map_or_else(String::new, |given| given.region.clone()),
            server_reference: given
                .map_or_else(String::new, |given| given.server_reference.clone()),
        };
        self.stores.routes.renew(record, LEASE_MS).await
    }

    /// Renews the lease from the runtime that serves devices: a stuck node loses it.
    pub(crate) async fn keep_lease(self: Arc<Self>) {
        let mut every = tokio::time::interval(RENEW_EVERY);
        let mut failing = false;
        loop {
            every.tick().await;
            let result = self.renew_lease().await;
            if let (Err(error), false) = (&result, failing) {
                tracing::warn!(%error, "node lease not renewed");
            }
            failing = result.is_err();
        }
    }
}
