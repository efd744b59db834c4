//! Backends: one task a device, which pushes one number after the other and repeats each, under the same
//! `Idempotency-Key`, until it is accepted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use moorline_tests::{API_KEY, Api, Random};
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;

use super::world::Addresses;

/// What a push is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is to arrive.
    Ordinary,
    /// To a device that is not there, and not for long.
    ShortLived,
    /// To a device that is not there, and taken back.
    Cancelled,
}

/// A push that was accepted.
#[derive(Debug, Clone)]
pub(crate) struct Accepted {
    pub(crate) client: String,
    pub(crate) number: u64,
    pub(crate) id: String,
    pub(crate) kind: Kind,
    /// When the call that was accepted began, and when the first one did.
    pub(crate) began: Instant,
    pub(crate) first: Instant,
    pub(crate) at: Instant,
}

#[derive(Debug, Default)]
struct Control {
    stop: AtomicBool,
    /// Calls without an answer: they may have been accepted.
    ambiguous: AtomicU64,
    /// Calls that were answered 503 or 429.
    refused: AtomicU64,
}

/// The tasks that push.
#[derive(Debug)]
pub(crate) struct Pushers {
    accepted: Arc<Mutex<Vec<Accepted>>>,
    control: Arc<Control>,
    tasks: JoinSet<()>,
}

/// Devices that never come: what is pushed to them waits, expires or is cancelled.
pub(crate) const ABSENT: usize = 6;

impl Pushers {
    /// Pushes to each of `names`, and to some devices that are not there, every `pause`.
    pub(crate) fn start(
        names: &[String],
        http: &Addresses,
        random: &mut Random,
        pause: Duration,
    ) -> Self {
        let control = Arc::new(Control::default());
        let accepted: Arc<Mutex<Vec<Accepted>>> = Arc::default();
        let mut tasks = JoinSet::new();
        let absent = (0..ABSENT).map(|at| {
            let kind = [Kind::Ordinary, Kind::ShortLived, Kind::Cancelled][at % 3];
            (format!("absent-{at}"), kind)
        });
        let present = names.iter().map(|name| (name.clone(), Kind::Ordinary));
        let client = Api::new(([127, 0, 0, 1], 1).into(), Some(API_KEY));
        for (name, kind) in present.chain(absent) {
            let pusher = Pusher {
                client: name,
                kind,
                http: http.clone(),
                api: client.clone(),
                random: Random::from_seed(random.next()),
                pause,
                control: Arc::clone(&control),
                accepted: Arc::clone(&accepted),
            };
            tasks.spawn(pusher.push());
        }
        Self {
            accepted,
            control,
            tasks,
        }
    }

    /// How many were accepted so far.
    pub(crate) fn count(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }

    /// Accepted by a call that began after `from` and ended before `to`.
    pub(crate) fn count_within(&self, from: Instant, to: Instant) -> usize {
        self.accepted
            .lock()
            .unwrap()
            .iter()
            .filter(|push| push.began >= from && push.at <= to)
            .count()
    }

    /// Calls that were answered 503 or 429 so far.
    pub(crate) fn refused(&self) -> u64 {
        self.control.refused.load(Ordering::Relaxed)
    }

    /// Waits until `more` further pushes were accepted.
    pub(crate) async fn await_more(&self, more: usize, patience: Duration) {
        let wanted = self.count() + more;
        let what = format!("{more} more accepted pushes");
        moorline_tests::eventually(patience, &what, || async {
            (self.count() >= wanted).then_some(())
        })
        .await;
    }

    /// Stops once every push that was begun is accepted, and returns all of them.
    pub(crate) async fn stop(mut self) -> Pushed {
        self.control.stop.store(true, Ordering::Release);
        let ended = async {
            while let Some(done) = self.tasks.join_next().await {
                if let Err(panic) = done {
                    std::panic::resume_unwind(panic.into_panic());
                }
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
        assert!(ended.is_ok(), "pushes are still refused after a minute");
        let accepted = std::mem::take(&mut *self.accepted.lock().unwrap());
        Pushed {
            accepted,
            ambiguous: self.control.ambiguous.load(Ordering::Relaxed),
            refused: self.control.refused.load(Ordering::Relaxed),
        }
    }
}

/// What was pushed in all.
#[derive(Debug)]
pub(crate) struct Pushed {
    pub(crate) accepted: Vec<Accepted>,
    pub(crate) ambiguous: u64,
    pub(crate) refused: u64,
}

struct Pusher {
    client: String,
    kind: Kind,
    http: Addresses,
    api: Api,
    random: Random,
    pause: Duration,
    control: Arc<Control>,
    accepted: Arc<Mutex<Vec<Accepted>>>,
}

impl Pusher {
    async fn push(mut self) {
        let mut number = 0;
        loop {
            let pause = self
                .pause
                .mul_f64(0.5 + self.random.below(100) as f64 / 100.0);
            tokio::time::sleep(pause).await;
            if self.control.stop.load(Ordering::Acquire) {
                return;
            }
            let accepted = self.until_accepted(number).await;
            if self.kind == Kind::Cancelled {
                self.until_cancelled(&accepted.id).await;
            }
            self.accepted.lock().unwrap().push(accepted);
            number += 1;
        }
    }

    async fn until_accepted(&mut self, number: u64) -> Accepted {
        let mut body = json!({"to": {"client": self.client}, "payload": number.to_string()});
        if self.kind == Kind::ShortLived {
            body["ttl"] = json!("500ms");
        }
        let key = format!("{}-{number}", self.client);
        let first = Instant::now();
        loop {
            let began = Instant::now();
            if let Some((status, answer)) = self
                .call(Method::POST, "/v1/push", Some(&key), Some(&body))
                .await
            {
                match status {
                    202 => {
                        return Accepted {
                            client: self.client.clone(),
                            number,
                            id: answer["id"].as_str().expect("a push has an id").to_owned(),
                            kind: self.kind,
                            began,
                            first,
                            at: Instant::now(),
                        };
                    }
                    503 | 429 => _ = self.control.refused.fetch_add(1, Ordering::Relaxed),
                    _ => panic!("push {key} was answered {status}: {answer}"),
                }
            }
            let pause = self.random.millis(100, 500);
            tokio::time::sleep(pause).await;
        }
    }

    async fn until_cancelled(&mut self, id: &str) {
        let path = format!("/v1/messages/{id}");
        loop {
            match self.call(Method::DELETE, &path, None, None).await {
                // A repetition of a call whose answer was lost finds it cancelled.
                Some((200..=299 | 404 | 409, _)) => return,
                Some((503 | 429, _)) => _ = self.control.refused.fetch_add(1, Ordering::Relaxed),
                Some((status, answer)) => panic!("DELETE {path} was answered {status}: {answer}"),
                None => {}
            }
            let pause = self.random.millis(100, 500);
            tokio::time::sleep(pause).await;
        }
    }

    /// One call of any push service; `None` when there was no answer.
    async fn call(
        &mut self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Option<&serde_json::Value>,
    ) -> Option<(u16, serde_json::Value)> {
        let (_, address) = self.http.any(&mut self.random, None)?;
        let mut request = self
            .api
            .at(address)
            .request(method, path)
            .timeout(Duration::from_secs(5));
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        match self.api.try_send(request).await {
            Ok(answer) => Some((answer.status, answer.json())),
            Err(_) => {
                self.control.ambiguous.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }
}
