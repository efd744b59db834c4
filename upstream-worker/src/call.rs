//! One attempt to hand a message to its backend, and what its end means.
//!
//! What can succeed later is tried again: a connection refused or broken, a timeout, 429, and 502, 503
//! and 504 or every 5xx, as the caller says. Everything else will not get better by itself: other answers than 2xx make a dead letter at
//! once, redirects included.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, Response, StatusCode};

/// Bytes of an answer that are read; more than that costs the connection its reuse.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a refusal that go into the reason of a dead letter.
const EXCERPT_BYTES_MAX: usize = 200;
/// Idle connections kept for each backend.
const IDLE_CONNECTIONS: usize = 64;

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// The backend has it.
    Done,
    /// It may take it later.
    Retry {
        /// For a person.
        reason: String,
        /// What the backend asks for.
        retry_after: Option<Duration>,
    },
    /// It will not take it.
    Refused(String),
}

/// The client of calls: no redirects, no proxy of the environment. Certificates of backends are signed
/// by what the system trusts, or by `authorities`.
pub fn client(authorities: Vec<Certificate>) -> Result<Client, reqwest::Error> {
    Client::builder()
        .tls_certs_merge(authorities)
        .redirect(Policy::none())
        .no_proxy()
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .tcp_nodelay(true)
        .user_agent(concat!("moorline/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// Which answers of a server that failed are worth another attempt. 429 always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failures {
    /// 502, 503 and 504: of what stands before the backend, or of one that is busy.
    OfGateways,
    /// Every 5xx, as of a webhook, whose receiver may be broken for a while.
    OfServers,
}

impl Failures {
    fn include(self, status: u16) -> bool {
        match self {
            Self::OfGateways => (502..=504).contains(&status),
            Self::OfServers => (500..=599).contains(&status),
        }
    }
}

/// Makes one call; bounded by the request's own timeout.
pub async fn attempt(client: &Client, request: reqwest::Request, retried: Failures) -> Attempt {
    exchange(client, request, EXCERPT_BYTES_MAX, retried)
        .await
        .0
}

/// Makes one call whose answer is of interest: with its body, cut at 64 KiB.
pub async fn ask(client: &Client, request: reqwest::Request) -> (Attempt, Vec<u8>) {
    exchange(client, request, ANSWER_BYTES_MAX, Failures::OfServers).await
}

async fn exchange(
    client: &Client,
    request: reqwest::Request,
    bytes_max: usize,
    retried: Failures,
) -> (Attempt, Vec<u8>) {
    match client.execute(request).await {
        Ok(response) => read(response, bytes_max, retried).await,
        Err(error) => (failed(&error), Vec::new()),
    }
}

fn failed(error: &reqwest::Error) -> Attempt {
    let what = if error.is_timeout() {
        "no answer in time"
    } else if error.is_connect() {
        "cannot connect"
    } else if error.is_builder() {
        return Attempt::Refused(format!("no such call can be made: {}", innermost(error)));
    } else {
        "the connection broke"
    };
    Attempt::Retry {
        reason: format!("{what}: {}", innermost(error)),
        retry_after: None,
    }
}

/// The error itself; its wrappers repeat the URL.
fn innermost(error: &reqwest::Error) -> String {
    let mut error: &dyn std::error::Error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

async fn read(mut response: Response, bytes_max: usize, retried: Failures) -> (Attempt, Vec<u8>) {
    let status = response.status();
    let retry_after = retry_after(&response);
    let mut body = Vec::new();
    let mut bytes = 0;
    // An answer that breaks off says by its status what there is to know. What is read to its end
    // gives its connection back to the pool.
    while let Ok(Some(chunk)) = response.chunk().await {
        bytes += chunk.len();
        let room = bytes_max.saturating_sub(body.len());
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if bytes > ANSWER_BYTES_MAX {
            break;
        }
    }
    let excerpt = &body[..body.len().min(EXCERPT_BYTES_MAX)];
    (judge(status, retried, retry_after, excerpt), body)
}

fn judge(
    status: StatusCode,
    retried: Failures,
    retry_after: Option<Duration>,
    excerpt: &[u8],
) -> Attempt {
    if status.is_success() {
        return Attempt::Done;
    }
    let text = String::from_utf8_lossy(excerpt);
    let text = text.trim();
    let reason = match text {
        "" => format!("answered {status}"),
        text => format!("answered {status}: {text}"),
    };
    match status.as_u16() {
        status if status == 429 || retried.include(status) => Attempt::Retry {
            reason,
            retry_after,
        },
        _ => Attempt::Refused(reason),
    }
}

/// Seconds; a date is not looked at.
fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_succeed_later_is_tried_again() {
        let judge = |status: u16, retried| {
            let status = StatusCode::from_u16(status).unwrap();
            judge(status, retried, None, b"")
        };
        let judged = |status| judge(status, Failures::OfGateways);
        for status in [200, 201, 202, 204, 299] {
            assert_eq!(judged(status), Attempt::Done, "{status}");
        }
        for status in [429, 502, 503, 504] {
            assert!(matches!(judged(status), Attempt::Retry { .. }), "{status}");
        }
        for status in [301, 304, 400, 401, 404, 408, 410, 422, 500, 501, 505] {
            assert!(matches!(judged(status), Attempt::Refused(_)), "{status}");
        }
        let judged = |status| judge(status, Failures::OfServers);
        for status in [429, 500, 501, 502, 503, 504, 505, 599] {
            assert!(matches!(judged(status), Attempt::Retry { .. }), "{status}");
        }
        for status in [301, 400, 401, 404, 408, 410, 422] {
            assert!(matches!(judged(status), Attempt::Refused(_)), "{status}");
        }
    }

    #[test]
    fn a_reason_repeats_what_the_backend_said() {
        let attempt = judge(
            StatusCode::BAD_REQUEST,
            Failures::OfServers,
            None,
            b" no such order \n",
        );
        assert_eq!(
            attempt,
            Attempt::Refused("answered 400 Bad Request: no such order".into())
        );
    }
}
