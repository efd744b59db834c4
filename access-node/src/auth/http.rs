//! A backend that is asked about each device with a POST.
//!
//! Equal questions are asked once: while one is under way the others wait for its answer, and the
//! answer is kept for a while. What happens when the backend does not answer is configured.

use std::collections::HashMap;
use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use moorline_mqtt::Version;
use moorline_router::unix_ms;
use parking_lot::Mutex;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, Response, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use super::cache::{Cache, Fingerprint, Hasher};
use super::config::{HttpAuthConfig, OnError, RuleConfig};
use super::{Accepted, Credentials, Refusal, Verdict, acl};
use crate::deadlines::Clock;
use crate::rate::LogLimit;

/// Bytes of the longest answer.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// After a call that nobody answered, the next is not tried before this.
const DOWN_PAUSE: Duration = Duration::from_millis(500);

/// A client without redirects and without the proxy of the environment.
pub(super) fn client(timeout: Duration) -> Result<Client, String> {
    Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .tcp_nodelay(true)
        .timeout(timeout)
        .user_agent(concat!("moorline/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| format!("cannot make an HTTP client: {}", innermost(&error)))
}

/// The error itself; its wrappers repeat the URL.
pub(super) fn innermost(error: &reqwest::Error) -> String {
    let mut found = error.source();
    let mut text = error.to_string();
    while let Some(source) = found {
        text = source.to_string();
        found = source.source();
    }
    text
}

/// The whole answer, if it is not too long.
pub(super) async fn read_answer(
    mut response: Response,
    bytes_max: usize,
) -> Result<(StatusCode, Vec<u8>), String> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| innermost(&error))? {
        if body.len() + chunk.len() > bytes_max {
            return Err(format!("the answer is longer than {bytes_max} bytes"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok((response.status(), body))
}

/// What is asked.
#[derive(Serialize)]
struct Question {
    client_id: String,
    username: Option<String>,
    password: Option<String>,
    /// In place of `password` where that is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    password_base64: Option<String>,
    peer_address: Option<SocketAddr>,
    certificate: Option<String>,
    protocol: &'static str,
}

/// What the backend says.
#[derive(Deserialize)]
struct Answer {
    result: Decision,
    #[serde(default)]
    acl: Vec<RuleConfig>,
    client_id: Option<String>,
    username: Option<String>,
    /// Seconds.
    expires_in: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Decision {
    Allow,
    Deny,
    Ignore,
}

/// What came of a question.
#[derive(Clone)]
enum Outcome {
    Allow(Accepted),
    Deny,
    Ignore,
    Failed,
}

/// The authenticator.
pub(super) struct HttpAuth {
    calls: Arc<Calls>,
    hasher: Arc<Hasher>,
    runtime: Handle,
}

/// What the calls share.
struct Calls {
    config: HttpAuthConfig,
    client: Client,
    authorization: Option<HeaderValue>,
    answers: Cache<Outcome>,
    under_way: Mutex<HashMap<Fingerprint, watch::Receiver<Option<Outcome>>>>,
    turns: Semaphore,
    down_until: Mutex<Option<Instant>>,
    /// Whoever connects makes the backend fail as often as it likes.
    log_limit: LogLimit,
    clock: Clock,
}

impl HttpAuth {
    pub(super) fn open(
        config: &HttpAuthConfig,
        hasher: Arc<Hasher>,
        runtime: Handle,
    ) -> Result<Self, String> {
        let calls = Calls {
            client: client(config.timeout)?,
            authorization: authorization(config)?,
            answers: Cache::new(config.cache_entries_max),
            under_way: Mutex::default(),
            turns: Semaphore::new(config.calls_max),
            down_until: Mutex::new(None),
            log_limit: LogLimit::default(),
            clock: Clock::new(),
            config: config.clone(),
        };
        Ok(Self {
            calls: Arc::new(calls),
            hasher,
            runtime,
        })
    }

    pub(super) async fn judge(&self, asked: &Credentials<'_>) -> Verdict {
        let fingerprint = self.fingerprint(asked);
        let kept = self.calls.answers.get(&fingerprint, Instant::now());
        let outcome = match kept.filter(Outcome::holds) {
            Some(outcome) => Ok(outcome),
            None => self.ask(fingerprint, asked).await,
        };
        match outcome {
            Ok(Outcome::Allow(mut accepted)) => {
                if accepted.username.is_none() {
                    accepted.username = asked.username.map(Into::into);
                }
                Verdict::Accepted(accepted)
            }
            Ok(Outcome::Deny) => Verdict::Refused(Refusal::BadCredentials),
            Ok(Outcome::Ignore) => Verdict::Unknown,
            Ok(Outcome::Failed) => match self.calls.config.on_error {
                OnError::Refuse => Verdict::Refused(Refusal::Unavailable),
                OnError::Next => {
                    super::count("http", "unavailable");
                    Verdict::Unknown
                }
            },
            Err(refusal) => Verdict::Refused(refusal),
        }
    }

    /// Of everything that the backend is told, but for the port, which is another one each time.
    fn fingerprint(&self, asked: &Credentials<'_>) -> Fingerprint {
        let ip = asked.peer.address.map(|address| address.ip().to_string());
        self.hasher.fingerprint(&[
            Some(b"http"),
            Some(asked.client_id.as_bytes()),
            asked.username.map(str::as_bytes),
            asked.password,
            ip.as_deref().map(str::as_bytes),
            asked.peer.certificate_name().map(str::as_bytes),
            Some(protocol(asked.version).as_bytes()),
        ])
    }

    /// Waits for the call that asks the same, or makes it.
    async fn ask(
        &self,
        fingerprint: Fingerprint,
        asked: &Credentials<'_>,
    ) -> Result<Outcome, Refusal> {
        let mut answer = {
            let mut under_way = self.calls.under_way.lock();
            match under_way.get(&fingerprint) {
                Some(answer) => answer.clone(),
                None => {
                    let calls_max = self.calls.config.calls_max + self.calls.config.waiting_max;
                    if under_way.len() >= calls_max {
                        return Err(Refusal::Busy);
                    }
                    let (sender, answer) = watch::channel(None);
                    under_way.insert(fingerprint, answer.clone());
                    let calls = Arc::clone(&self.calls);
                    let question = Question::of(asked);
                    // On a task of its own: whoever asked first may be gone before the others.
                    self.runtime.spawn(async move {
                        let outcome = calls.answer(fingerprint, &question).await;
                        calls.under_way.lock().remove(&fingerprint);
                        let _ = sender.send(Some(outcome));
                    });
                    answer
                }
            }
        };
        let outcome = answer.wait_for(Option::is_some).await;
        let outcome = outcome.ok().and_then(|outcome| outcome.clone());
        Ok(outcome.unwrap_or(Outcome::Failed))
    }
}

impl Calls {
    async fn answer(&self, fingerprint: Fingerprint, question: &Question) -> Outcome {
        let is_down = || {
            let until = *self.down_until.lock();
            until.is_some_and(|until| until > Instant::now())
        };
        if is_down() {
            return Outcome::Failed;
        }
        let _turn = self.turns.acquire().await;
        // It may have been found out while this one waited.
        if is_down() {
            return Outcome::Failed;
        }
        match self.call(question).await {
            Ok(outcome) => {
                *self.down_until.lock() = None;
                let ttl = match outcome {
                    Outcome::Allow(_) => self.config.cache_ttl,
                    _ => self.config.cache_deny_ttl,
                };
                let now = Instant::now();
                self.answers.put(fingerprint, outcome.clone(), ttl, now);
                outcome
            }
            Err((error, is_silent)) => {
                if let Some(suppressed) = self.log_limit.allows(self.clock.now_s()) {
                    tracing::warn!(url = self.config.url, client = question.client_id, %error, suppressed, "no answer about a device");
                }
                if is_silent {
                    *self.down_until.lock() = Some(Instant::now() + DOWN_PAUSE);
                }
                Outcome::Failed
            }
        }
    }

    /// The error also says whether nobody was there at all.
    async fn call(&self, question: &Question) -> Result<Outcome, (String, bool)> {
        let mut request = self.client.post(&self.config.url).json(question);
        if let Some(value) = &self.authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        let sent = request.send().await;
        let response = sent.map_err(|error| (innermost(&error), true))?;
        let read = read_answer(response, ANSWER_BYTES_MAX).await;
        let (status, body) = read.map_err(|error| (error, false))?;
        if status != StatusCode::OK {
            return Err((format!("answered {status}"), false));
        }
        understand(&body)
            .map_err(|error| (format!("answered what is not understood: {error}"), false))
    }
}

fn understand(body: &[u8]) -> Result<Outcome, String> {
    let answer: Answer = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    Ok(match answer.result {
        Decision::Deny => Outcome::Deny,
        Decision::Ignore => Outcome::Ignore,
        Decision::Allow => Outcome::Allow(Accepted {
            username: answer.username.map(Into::into),
            client_id: answer.client_id.map(Into::into),
            own_rules: acl::parse_own(&answer.acl)?,
            expires_at_ms: answer
                .expires_in
                .map(|seconds| unix_ms().saturating_add(seconds.saturating_mul(1000))),
        }),
    })
}

impl Outcome {
    /// Whether it is still true of a device that connects now.
    fn holds(&self) -> bool {
        match self {
            Self::Allow(accepted) => accepted.expires_at_ms.is_none_or(|at| at > unix_ms()),
            _ => true,
        }
    }
}

impl Question {
    fn of(asked: &Credentials<'_>) -> Self {
        let password = asked
            .password
            .map(|bytes| String::from_utf8(bytes.to_vec()).map_err(|_| STANDARD.encode(bytes)));
        let (password, password_base64) = match password {
            None => (None, None),
            Some(Ok(text)) => (Some(text), None),
            Some(Err(encoded)) => (None, Some(encoded)),
        };
        Self {
            client_id: asked.client_id.to_owned(),
            username: asked.username.map(str::to_owned),
            password,
            password_base64,
            peer_address: asked.peer.address,
            certificate: asked.peer.certificate_name().map(str::to_owned),
            protocol: protocol(asked.version),
        }
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::V3_1_1 => "3.1.1",
        Version::V5 => "5.0",
    }
}

fn authorization(config: &HttpAuthConfig) -> Result<Option<HeaderValue>, String> {
    let path = &config.authorization_file;
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let named = |error: &dyn std::fmt::Display| {
        format!("auth.http.authorization_file: {}: {error}", path.display())
    };
    let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
    let line = text.lines().next().unwrap_or_default();
    let mut value = HeaderValue::from_str(line.trim())
        .map_err(|_| named(&"the first line must be the value of a header, like \"Bearer …\""))?;
    value.set_sensitive(true);
    Ok(Some(value))
}
