//! Sends calls to the servers that have their slots and brings the answers back.
//!
//! What a server refused without having done it (it is loading, not the master any more, another server has the slot, it
//! does not know the script) goes out again, in the order in which it was called, until the time is up. What may
//! have been done does not: the caller is told so, and everything that is called here is fenced or idempotent.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use redis::{ServerError, Value};

use super::link_metrics::LinkMetrics;
use super::port::{Port, Timeouts};
use super::script::Call;
use super::scripts;
use super::topology::{Server, Topology};
use crate::{Epoch, StoreError};

/// How the calls of one flight are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// In order, and durable when answered.
    Write,
    /// Whatever else is going on.
    Read,
}

/// The servers, and what makes a write durable.
pub(super) struct Servers {
    pub(super) topology: Topology,
    pub(super) timeouts: Timeouts,
    pub(super) wait_replicas: u32,
    pub(super) wait_timeout: Duration,
    pub(super) metrics: LinkMetrics,
}

const PAUSE: Duration = Duration::from_millis(20);

/// What became of one call on one server.
enum Outcome {
    Answered(Result<Value, StoreError>),
    /// It was not done, and can be done there or elsewhere.
    Refused {
        why: String,
        cure: Cure,
    },
}

/// What to do before a refused call goes out again.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cure {
    /// Wait a moment.
    Patience,
    /// Wait a moment, and ask who has what.
    Refresh,
    /// Nothing: the map is right now.
    Redirected,
    /// Ask this server, once.
    Ask(String),
    /// The server has been away for long.
    None,
}

struct Pending<'c> {
    index: usize,
    call: &'c Call,
    ask: Option<Arc<Server>>,
}

/// Follows a cluster while one of its servers is away: others get its slots, and nobody waits for it that long.
pub(super) async fn follow(servers: Weak<Servers>) {
    loop {
        tokio::time::sleep(FOLLOW_EVERY).await;
        let Some(servers) = servers.upgrade() else {
            return;
        };
        let is_down = |server: &Arc<Server>| server.writes.is_down() || server.reads.is_down();
        if servers.topology.servers().iter().any(is_down) {
            // Whoever calls the next time finds out what is wrong.
            let _ = servers.topology.refresh().await;
        }
    }
}

const FOLLOW_EVERY: Duration = Duration::from_millis(500);

impl Servers {
    /// Makes every call; answers are in the order of `calls`.
    pub(super) async fn fly(&self, way: Way, calls: &[Call]) -> Vec<Result<Value, StoreError>> {
        let begun = Instant::now();
        let deadline = begun + self.timeouts.response;
        let mut answers: Vec<Option<Result<Value, StoreError>>> = Vec::new();
        answers.resize_with(calls.len(), || None);
        let pending = |(index, call)| Pending {
            index,
            call,
            ask: None,
        };
        let mut todo: Vec<Pending<'_>> = calls.iter().enumerate().map(pending).collect();
        let mut rounds = 0;
        loop {
            let mut refused: Vec<(Pending<'_>, String, Cure)> = Vec::new();
            for (pending, outcome) in self.round(way, todo).await {
                match outcome {
                    Outcome::Answered(answer) => answers[pending.index] = Some(answer),
                    Outcome::Refused { why, cure } => refused.push((pending, why, cure)),
                }
            }
            let late = Instant::now() + PAUSE > deadline;
            refused.retain(|(pending, why, cure)| {
                let stays = !late && *cure != Cure::None;
                if !stays {
                    answers[pending.index] = Some(Err(StoreError::Unavailable(why.clone())));
                }
                stays
            });
            if refused.is_empty() {
                break;
            }
            refused.sort_by_key(|(pending, ..)| pending.index);
            let cures = |wanted: Cure| refused.iter().any(|(.., cure)| *cure == wanted);
            rounds += 1;
            if cures(Cure::Patience) || cures(Cure::Refresh) || rounds > 3 {
                tokio::time::sleep(PAUSE).await;
            }
            if cures(Cure::Refresh) {
                // Tried again with the next round, if it is of no use.
                let _ = self.topology.refresh().await;
            }
            todo = Vec::with_capacity(refused.len());
            for (pending, _, cure) in refused {
                let ask = match cure {
                    Cure::Ask(address) => self.topology.server_at(&address),
                    _ => None,
                };
                todo.push(Pending { ask, ..pending });
            }
        }
        let unanswered = || Err(StoreError::Unavailable("no answer".into()));
        let answers: Vec<_> = answers
            .into_iter()
            .map(|answer| answer.unwrap_or_else(unanswered))
            .collect();
        self.metrics.batch(way, &answers, begun.elapsed());
        answers
    }

    /// One pipeline to each server concerned.
    async fn round<'c>(&self, way: Way, calls: Vec<Pending<'c>>) -> Vec<(Pending<'c>, Outcome)> {
        let mut groups: Vec<(Arc<Server>, Vec<Pending<'c>>)> = Vec::new();
        let mut done = Vec::new();
        for pending in calls {
            let server = match &pending.ask {
                Some(server) => Some(server.clone()),
                None => self.topology.server_of(pending.call.slot),
            };
            let Some(server) = server else {
                let why = "no server is known to have the slot".to_owned();
                let cure = Cure::Refresh;
                done.push((pending, Outcome::Refused { why, cure }));
                continue;
            };
            match groups
                .iter_mut()
                .find(|(known, _)| Arc::ptr_eq(known, &server))
            {
                Some((_, group)) => group.push(pending),
                None => groups.push((server, vec![pending])),
            }
        }
        let flights = groups.into_iter().map(|(server, group)| async move {
            let outcomes = self.send(&server, way, &group).await;
            group.into_iter().zip(outcomes).collect::<Vec<_>>()
        });
        done.extend(join_all(flights).await.into_iter().flatten());
        done
    }

    async fn send(&self, server: &Server, way: Way, calls: &[Pending<'_>]) -> Vec<Outcome> {
        let port = match way {
            Way::Write => &server.writes,
            Way::Read => &server.reads,
        };
        let mut connected = match port.get().await {
            Ok(connected) => connected,
            Err(error) => {
                // A cluster may have given the slots of a dead server to another one by now.
                let cure = match port.is_down_for_long() {
                    true => Cure::None,
                    false => Cure::Refresh,
                };
                let refused = |_: &Pending<'_>| Outcome::Refused {
                    why: format!("{}: {error}", server.name),
                    cure: cure.clone(),
                };
                return calls.iter().map(refused).collect();
            }
        };
        let wait = (way == Way::Write && self.wait_replicas > 0).then_some(self.wait_replicas);
        let mut pipeline = redis::Pipeline::with_capacity(calls.len() + 1);
        for pending in calls {
            if pending.ask.is_some() {
                pipeline.cmd("ASKING");
            }
            pipeline.add_command(pending.call.cmd.clone());
        }
        if let Some(replicas) = wait {
            let ms = u64::try_from(self.wait_timeout.as_millis()).unwrap_or(u64::MAX);
            pipeline.cmd("WAIT").arg(replicas).arg(ms.max(1));
        }
        let count = pipeline.len();
        let sending = connected
            .connection
            .send_packed_commands(&pipeline, 0, count);
        let values = match Box::pin(sending).await {
            Ok(values) if values.len() == count => values,
            Ok(_) => {
                return self.broken(port, connected.number, calls, "a wrong number of answers");
            }
            Err(error) => return self.broken(port, connected.number, calls, &error.to_string()),
        };
        let mut values = values.into_iter();
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(calls.len());
        for pending in calls {
            if pending.ask.is_some() {
                values.next();
            }
            let value = values.next().unwrap_or_default();
            outcomes.push(self.outcome(pending.call, value));
        }
        let is = |wanted: &str| outcomes.iter().any(|outcome| is_refused(outcome, wanted));
        if is("NOSCRIPT") {
            // Somebody emptied the server's scripts.
            let mut load = redis::pipe();
            load.cmd("PING");
            for script in scripts() {
                load.add_command(script.load());
            }
            let loading = load.query_async::<Vec<Value>>(&mut connected.connection);
            if let Err(error) = loading.await {
                tracing::warn!(%error, "redis does not take the scripts");
            }
        }
        if is("READONLY") {
            port.lost(connected.number, "the server is not the master any more");
        }
        if let Some(replicas) = wait {
            let have = match values.next() {
                Some(Value::Int(have)) => have,
                _ => 0,
            };
            if have < i64::from(replicas) {
                let why = format!("{have} of {replicas} replicas have it");
                for outcome in &mut outcomes {
                    if let Outcome::Answered(Ok(_)) = outcome {
                        *outcome = Outcome::Answered(Err(StoreError::Unavailable(why.clone())));
                    }
                }
            }
        }
        outcomes
    }

    /// What was sent may or may not have been done.
    fn broken(&self, port: &Port, number: u64, calls: &[Pending<'_>], why: &str) -> Vec<Outcome> {
        port.lost(number, why);
        let lost = |_: &Pending<'_>| {
            Outcome::Answered(Err(StoreError::Unavailable(format!(
                "no answer to what was sent: {why}"
            ))))
        };
        calls.iter().map(lost).collect()
    }

    fn outcome(&self, call: &Call, value: Value) -> Outcome {
        let Value::ServerError(error) = value else {
            return Outcome::Answered(Ok(value));
        };
        let why = format!("{} {}", error.code(), error.details().unwrap_or_default());
        let cure = match error.code() {
            "MOVED" => match address(&error) {
                Some(address) => {
                    self.topology.moved(call.slot, address);
                    Cure::Redirected
                }
                None => Cure::Refresh,
            },
            "ASK" => match address(&error) {
                Some(address) => Cure::Ask(address.to_owned()),
                None => Cure::Refresh,
            },
            "NOSCRIPT" => Cure::Redirected,
            "STALE" => return Outcome::Answered(Err(stale(&error))),
            "TRYAGAIN" | "LOADING" | "BUSY" => Cure::Patience,
            "CLUSTERDOWN" | "MASTERDOWN" | "READONLY" => Cure::Refresh,
            _ => return Outcome::Answered(Err(StoreError::Unavailable(why))),
        };
        Outcome::Refused { why, cure }
    }
}

/// What a script says to an older connection than the newest.
fn stale(error: &ServerError) -> StoreError {
    match error.details().and_then(|epoch| epoch.trim().parse().ok()) {
        Some(epoch) => StoreError::Stale {
            current: Epoch(epoch),
        },
        None => StoreError::Damaged("a fence without an epoch".into()),
    }
}

fn is_refused(outcome: &Outcome, code: &str) -> bool {
    matches!(outcome, Outcome::Refused { why, .. } if why.starts_with(code))
}

/// Where a redirection points to: `SLOT HOST:PORT`.
fn address(error: &ServerError) -> Option<&str> {
    let (_, address) = error.details()?.split_once(' ')?;
    // Without a host it is the one that answered: found out by asking for the whole map.
    (!address.starts_with(':')).then_some(address)
}
