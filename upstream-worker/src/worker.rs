//! The work on one partition of one rule's queue: in order, one message at a time.
//!
//! A message that is tried again holds up its partition and nothing else. The permit that bounds a
//! backend's concurrency is held during a call, never during a wait. While the backend's circuit breaker is open, and where a page
//! takes long, the partition is parked: what was fetched and is not settled is given back to the bus.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{Counter, Histogram, counter, describe_counter, describe_histogram, histogram};
use moorline_router::{MessageId, Position, Settlement, StoreError, UpstreamBus, UpstreamDelivery};
use reqwest::Client;
use tokio::sync::{Semaphore, watch};

use crate::backoff::{backoff, random_fraction};
use crate::breaker::Breaker;
use crate::call::{self, Attempt, Failures};
use crate::config::{Config, Retry};
use crate::rule::Rule;

/// Deliveries of one page.
const PAGE: usize = 64;
/// Wait after the bus failed.
const BUS_RETRY: Duration = Duration::from_secs(1);
/// What was fetched is given back after so long: a bus may take what is held for longer for lost.
const HOLD_MAX: Duration = Duration::from_secs(5 * 60);
/// How long a call may go on once the worker is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What the partitions of one rule share.
struct Shared {
    rule: Rule,
    permits: Semaphore,
    breaker: Breaker,
    metrics: Metrics,
}

struct Metrics {
    done: Counter,
    dead: Counter,
    retried: Counter,
    duration: Histogram,
}

impl Metrics {
    fn new(rule: &str) -> Self {
        describe_counter!(
            "moorline_upstream_calls_total",
            "Calls to backends by rule and how they ended"
        );
        describe_histogram!(
            "moorline_upstream_call_duration_seconds",
            "Seconds of one call to a backend"
        );
        let calls = |result: &'static str| counter!("moorline_upstream_calls_total", "rule" => rule.to_owned(), "result" => result);
        Self {
            done: calls("done"),
            dead: calls("dead_letter"),
            retried: calls("retry"),
            duration: histogram!("moorline_upstream_call_duration_seconds", "rule" => rule.to_owned()),
        }
    }
}

/// One partition.
pub(crate) struct Partition {
    bus: Arc<dyn UpstreamBus>,
    client: Client,
    shared: Arc<Shared>,
    partition: u16,
    stop: watch::Receiver<bool>,
    /// The message that was tried last, and how often: it stays the first one while its partition is parked.
    tried: Option<(MessageId, u32)>,
    /// This partition makes the one call that shows whether the backend is back.
    probes: bool,
}

/// The worker was told to stop; what is not settled will be read again.
struct Stopped;

/// Why a message is not settled.
enum Pause {
    Stopped,
    /// The breaker is open.
    Broken,
    /// It is tried again after so long, which is too long to hold it.
    Long(Duration),
}

impl From<Stopped> for Pause {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

/// Every partition of every rule.
pub(crate) fn partitions(
    bus: &Arc<dyn UpstreamBus>,
    config: &Config,
    stop: &watch::Receiver<bool>,
) -> Result<Vec<Partition>, String> {
    config.validate()?;
    let new_client =
        |authorities| call::client(authorities).map_err(|error| format!("no HTTP client: {error}"));
    let shared_client = new_client(Vec::new())?;
    let mut workers = Vec::new();
    for rule in &config.rules {
        let client = match &rule.ca {
            Some(path) => new_client(crate::config::read_authorities(path)?)?,
            None => shared_client.clone(),
        };
        let shared = Arc::new(Shared {
            metrics: Metrics::new(&rule.name),
            permits: Semaphore::new(usize::from(rule.concurrency)),
            breaker: Breaker::new(rule.retry.initial, rule.retry.max, rule.timeout),
            rule: Rule::new(rule)?,
        });
        for partition in 0..bus.partitions(&shared.rule.queue) {
            workers.push(Partition {
                bus: Arc::clone(bus),
                client: client.clone(),
                shared: Arc::clone(&shared),
                partition,
                stop: stop.clone(),
                tried: None,
                probes: false,
            });
        }
    }
    Ok(workers)
}

impl Partition {
    pub(crate) async fn run(mut self) {
        let mut after = Position::START;
        while let Ok(page) = self.next_page(after).await {
            let fetched = Instant::now();
            for delivery in page {
                let settlement = match self.deliver(&delivery, fetched).await {
                    Ok(settlement) => settlement,
                    Err(Pause::Stopped) => return,
                    Err(pause) => {
                        if self.park(pause).await.is_err() {
                            return;
                        }
                        after = Position::START;
                        break;
                    }
                };
                let Ok(()) = self.settle(delivery.position, settlement).await else {
                    return;
                };
                after = delivery.position;
                let queue = &self.shared.rule.queue;
                if fetched.elapsed() > HOLD_MAX {
                    self.bus.park(queue, self.partition).await;
                    after = Position::START;
                    break;
                }
                if self.bus.is_wanted_elsewhere(queue, self.partition) {
                    break;
                }
            }
        }
    }

    /// Holds nothing until calls may be made again.
    async fn park(&mut self, pause: Pause) -> Result<(), Stopped> {
        let (rule, partition) = (&self.shared.rule.queue, self.partition);
        self.bus.park(rule, partition).await;
        tracing::debug!(%rule, partition, "a partition is parked");
        match pause {
            Pause::Stopped => return Err(Stopped),
            Pause::Long(wait) => self.wait(wait).await?,
            Pause::Broken => {
                self.probes = tokio::select! {
                    probes = self.shared.breaker.ready() => probes,
                    () = self.stopped() => return Err(Stopped),
                };
            }
        }
        Ok(())
    }

    async fn next_page(&self, after: Position) -> Result<Vec<UpstreamDelivery>, Stopped> {
        let queue = &self.shared.rule.queue;
        let fetch = || self.bus.fetch(queue, self.partition, after, PAGE);
        self.until_it_works("fetch", fetch).await
    }

    async fn settle(&self, position: Position, settlement: Settlement) -> Result<(), Stopped> {
        let queue = &self.shared.rule.queue;
        let settle = || {
            self.bus
                .settle(queue, self.partition, position, settlement.clone())
        };
        self.until_it_works("settle", settle).await
    }

    /// Asks the bus again and again: without it there is nothing else to do.
    async fn until_it_works<T, F>(
        &self,
        what: &'static str,
        mut ask: impl FnMut() -> F,
    ) -> Result<T, Stopped>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut failed = false;
        loop {
            let result = tokio::select! {
                biased;
                result = ask() => result,
                () = self.stopped() => return Err(Stopped),
            };
            match result {
                Ok(value) => return Ok(value),
                Err(error) if !failed => {
                    let (rule, partition) = (&self.shared.rule.queue, self.partition);
                    tracing::warn!(%rule, partition, %error, what, "the upstream bus fails, trying again");
                    failed = true;
                }
                Err(_) => {}
            }
            self.wait(BUS_RETRY).await?;
        }
    }

    /// Calls the backend until it takes the message, refuses it or the attempts are used up.
    async fn deliver(
        &mut self,
        delivery: &UpstreamDelivery,
        fetched: Instant,
    ) -> Result<Settlement, Pause> {
        let shared = Arc::clone(&self.shared);
        let (rule, breaker) = (&shared.rule, &shared.breaker);
        let message = &delivery.message;
        let tried = self.tried.take().filter(|(id, _)| *id == message.id);
        let mut attempts = tried.map_or(0, |(_, attempts)| attempts);
        let reason = loop {
            let request = match rule.request(message) {
                Ok(request) => request,
                Err(reason) => break reason,
            };
            if !breaker.is_closed() && !std::mem::take(&mut self.probes) {
                self.tried = Some((message.id.clone(), attempts));
                return Err(Pause::Broken);
            }
            attempts += 1;
            let attempt = self.attempt(request).await?;
            self.tell_breaker(&attempt);
            match attempt {
                Attempt::Done => {
                    shared.metrics.done.increment(1);
                    return Ok(Settlement::Done);
                }
                Attempt::Refused(reason) => break reason,
                Attempt::Retry { reason, .. } if attempts >= rule.retry.attempts => break reason,
                Attempt::Retry {
                    reason,
                    retry_after,
                } => {
                    shared.metrics.retried.increment(1);
                    let Retry { initial, max, .. } = rule.retry;
                    let wait = backoff(initial, max, attempts, retry_after, random_fraction());
                    tracing::debug!(
                        rule = %rule.queue, message_id = %message.id, client_id = %message.client,
                        attempts, reason, wait_ms = wait.as_millis(), "a backend is tried again"
                    );
                    if fetched.elapsed() + wait > HOLD_MAX {
                        self.tried = Some((message.id.clone(), attempts));
                        return Err(Pause::Long(wait));
                    }
                    self.wait(wait).await?;
                }
            }
        };
        shared.metrics.dead.increment(1);
        tracing::info!(
            rule = %rule.queue, message_id = %message.id, client_id = %message.client,
            attempts, reason, "an upstream message is a dead letter"
        );
        Ok(Settlement::DeadLetter { reason, attempts })
    }

    /// A backend that refuses a message is there.
    fn tell_breaker(&self, attempt: &Attempt) {
        let breaker = &self.shared.breaker;
        if !matches!(attempt, Attempt::Retry { .. }) {
            breaker.succeeded();
        } else if breaker.failed() {
            let rule = &self.shared.rule.queue;
            tracing::warn!(%rule, "a backend fails again and again, it is asked by single calls until it answers");
        }
    }

    async fn attempt(&self, request: reqwest::Request) -> Result<Attempt, Stopped> {
        let permit = tokio::select! {
            permit = self.shared.permits.acquire() => permit.map_err(|_| Stopped)?,
            () = self.stopped() => return Err(Stopped),
        };
        let started = Instant::now();
        let attempt = tokio::select! {
            attempt = call::attempt(&self.client, request, Failures::OfGateways) => attempt,
            () = self.grace_over() => return Err(Stopped),
        };
        drop(permit);
        self.shared.metrics.duration.record(started.elapsed());
        Ok(attempt)
    }

    async fn stopped(&self) {
        // An error says that the sender is gone, which is the signal too.
        let _ = self.stop.clone().wait_for(|stop| *stop).await;
    }

    async fn grace_over(&self) {
        self.stopped().await;
        tokio::time::sleep(STOP_GRACE).await;
    }

    async fn wait(&self, duration: Duration) -> Result<(), Stopped> {
        tokio::select! {
            () = tokio::time::sleep(duration) => Ok(()),
            () = self.stopped() => Err(Stopped),
        }
    }
}
