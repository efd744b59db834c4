//! A backend that the gateway calls: it records every call and answers as the test says.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// One HTTP call.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "the parts of an HTTP request")]
pub struct Call {
    pub method: String,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub at: Instant,
}

impl Call {
    /// A header as text, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("")
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// What to answer: a status, after a while.
pub type Reply = (u16, Duration);

/// What to answer: a status and a body, after a while.
pub type FullReply = (u16, String, Duration);

type Decide = dyn Fn(&Call, usize) -> FullReply + Send + Sync;

/// A running backend; ended when dropped.
#[derive(Debug)]
pub struct Backend {
    /// Where it listens.
    pub address: SocketAddr,
    calls: Arc<Mutex<Vec<Call>>>,
    task: JoinHandle<()>,
}

impl Backend {
    /// Starts a backend that answers 200.
    pub async fn start() -> Self {
        Self::answering(|_, _| (200, Duration::ZERO)).await
    }

    /// Starts a backend that asks `decide` what to answer; the number counts the calls before this one.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn answering(decide: impl Fn(&Call, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::speaking(move |call, number| {
            let (status, after) = decide(call, number);
            (status, String::new(), after)
        })
        .await
    }

    /// As [`Backend::answering`], with a body.
    ///
    /// # Panics
    /// When no port is free.
    pub async fn speaking(
        decide: impl Fn(&Call, usize) -> FullReply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let calls = Arc::new(Mutex::new(Vec::new()));
        let decide: Arc<Decide> = Arc::new(decide);
        let record = Arc::clone(&calls);
        let app = Router::new()
            .fallback(move |request: Request| answer(request, record.clone(), decide.clone()));
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                eprintln!("the test's backend ended: {error}");
            }
        });
        Self {
            address,
            calls,
            task,
        }
    }

    /// Its address with a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until there were at least `count` calls.
    pub async fn await_calls(&self, count: usize) -> Vec<Call> {
        crate::eventually(
            crate::waiting::SOON,
            &format!("{count} calls of the backend"),
            || async {
                let calls = self.calls();
                (calls.len() >= count).then_some(calls)
            },
        )
        .await
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(
    request: Request,
    record: Arc<Mutex<Vec<Call>>>,
    decide: Arc<Decide>,
) -> axum::response::Response {
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, 16 << 20).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let call = Call {
        method: parts.method.to_string(),
        path: parts.uri.to_string(),
        headers: parts.headers,
        body: body.to_vec(),
        at: Instant::now(),
    };
    let (status, body, after) = {
        let mut calls = record.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = decide(&call, calls.len());
        calls.push(call);
        reply
    };
    tokio::time::sleep(after).await;
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::IM_A_TEAPOT);
    (status, body).into_response()
}
