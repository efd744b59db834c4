//! A key set that is fetched from a URL: in the rhythm of the configuration, and once more when a
//! token names a key that is not in it. While the URL does not answer, the keys it gave stay.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tokio::sync::{Notify, watch};

use super::config::JwtConfig;
use super::http::{client, read_answer};
use super::keys::{self, Key};

/// Unknown key ids do not fetch more often than this: whoever sends them need not be a device.
const FETCH_PAUSE: Duration = Duration::from_secs(5);
/// The first pause after a fetch that failed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of the largest set.
const SET_BYTES_MAX: usize = 1024 * 1024;

/// The set and how it is fetched.
pub(super) struct JwksUrl {
    url: String,
    client: reqwest::Client,
    refresh: Duration,
    timeout: Duration,
    /// `None` before the first fetch that succeeded.
    current: RwLock<Option<Arc<Vec<Key>>>>,
    attempted: RwLock<Option<Instant>>,
    wanted: Notify,
    /// Counts the fetches.
    fetched: watch::Sender<u64>,
}

impl JwksUrl {
    pub(super) fn new(config: &JwtConfig) -> Result<Self, String> {
        Ok(Self {
            url: config.jwks_url.clone(),
            client: client(config.jwks_timeout)?,
            refresh: config.jwks_refresh,
            timeout: config.jwks_timeout,
            current: RwLock::new(None),
            attempted: RwLock::new(None),
            wanted: Notify::new(),
            fetched: watch::Sender::new(0),
        })
    }

    /// The keys; `None` where there never were any.
    pub(super) fn keys(&self) -> Option<Arc<Vec<Key>>> {
        self.current.read().clone()
    }

    /// Fetches because a key is missing, unless that was tried a moment ago.
    pub(super) async fn look_again(&self) {
        let mut fetched = self.fetched.subscribe();
        if self.is_recent() {
            return;
        }
        self.wanted.notify_one();
        let _ = tokio::time::timeout(self.timeout, fetched.changed()).await;
    }

    fn is_recent(&self) -> bool {
        let attempted = *self.attempted.read();
        attempted.is_some_and(|at| at.elapsed() < FETCH_PAUSE)
    }

    /// Fetches again and again.
    pub(super) async fn run(self: Arc<Self>) {
        let mut failures = 0u32;
        loop {
            *self.attempted.write() = Some(Instant::now());
            match self.fetch().await {
                Ok(keys) => {
                    if failures > 0 {
                        tracing::info!(url = self.url, "key set fetched again");
                    }
                    failures = 0;
                    *self.current.write() = Some(Arc::new(keys));
                }
                Err(error) => {
                    if failures == 0 {
                        tracing::warn!(url = self.url, %error, "key set not fetched, the keys it had stay in force");
                    }
                    failures += 1;
                }
            }
            self.fetched.send_modify(|count| *count += 1);
            let pause = match failures {
                0 => self.refresh,
                n => (RETRY_PAUSE * (1 << (n - 1).min(10))).min(self.refresh),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.wanted_once() => {}
            }
        }
    }

    async fn wanted_once(&self) {
        loop {
            self.wanted.notified().await;
            // A notice may be left over from before the last fetch.
            if !self.is_recent() {
                return;
            }
        }
    }

    async fn fetch(&self) -> Result<Vec<Key>, String> {
        let request = self.client.get(&self.url);
        let response = request
            .send()
            .await
            .map_err(|error| super::http::innermost(&error))?;
        let (status, body) = read_answer(response, SET_BYTES_MAX).await?;
        if status != reqwest::StatusCode::OK {
            return Err(format!("answered {status}"));
        }
        keys::of_set(&body, true)
    }
}
