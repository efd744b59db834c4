//! Whether a process is willing to take new work, and what stands against it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::future::{BoxFuture, join_all};
use moorline_router::embedded::{EmbeddedStore, Health};
use serde::Serialize;
use utoipa::ToSchema;

/// How long something that the process depends on may take to say how it is.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// What was found of one thing that the process depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// What keeps the process from working; empty where nothing does.
    pub reasons: Vec<String>,
    /// What it can work with, but an operator should know.
    pub warnings: Vec<String>,
}

/// One thing that the process depends on.
#[derive(Clone)]
pub struct Dependency {
    name: &'static str,
    check: Arc<dyn Fn() -> BoxFuture<'static, Findings> + Send + Sync>,
}

impl fmt::Debug for Dependency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dependency").field(&self.name).finish()
    }
}

impl Dependency {
    /// `check` is asked whenever readiness is; what it finds is said to be of `name`.
    pub fn new(
        name: &'static str,
        check: impl Fn() -> BoxFuture<'static, Findings> + Send + Sync + 'static,
    ) -> Self {
        let check = Arc::new(check);
        Self { name, check }
    }

    /// The store of a single machine.
    pub fn embedded(store: Arc<EmbeddedStore>) -> Self {
        Self::new("store", move || {
            let store = Arc::clone(&store);
            Box::pin(async move {
                // It asks the file system.
                let health = tokio::task::spawn_blocking(move || store.health()).await;
                let reason = match health {
                    Ok(Health::Ready) => None,
                    Ok(Health::Unavailable(cause)) => Some(cause),
                    Err(error) => Some(format!("its health is not known: {error}")),
                };
                Findings {
                    reasons: reason.into_iter().collect(),
                    warnings: Vec::new(),
                }
            })
        })
    }

    async fn look(&self) -> Findings {
        let found = tokio::time::timeout(CHECK_TIMEOUT, (self.check)()).await;
        let found = found.unwrap_or_else(|_| Findings {
            reasons: vec![format!("no answer within {CHECK_TIMEOUT:?}")],
            warnings: Vec::new(),
        });
        let named = |texts: Vec<String>| {
            let texts = texts.into_iter();
            texts.map(|text| format!("{}: {text}", self.name)).collect()
        };
        Findings {
            reasons: named(found.reasons),
            warnings: named(found.warnings),
        }
    }
}

/// Whether the process is about to stop, and what it depends on.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    /// Set when the process is to stop.
    pub draining: Arc<AtomicBool>,
    /// What it depends on.
    pub dependencies: Vec<Dependency>,
}

/// Whether new work is taken.
#[derive(Serialize, ToSchema)]
#[schema(as = Readiness)]
pub(crate) struct ReadinessBody {
    /// Whether devices and pushes are welcome.
    ready: bool,
    /// Why not; empty where it is ready.
    reasons: Vec<String>,
    /// What weakens the promises, but keeps nobody away; absent where there is nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

impl Readiness {
    /// The answer of `/readyz`.
    pub(crate) async fn respond(&self, is_stopping: bool) -> Response {
        let looks = self.dependencies.iter().map(Dependency::look);
        let found = join_all(looks).await;
        let mut body = ReadinessBody {
            ready: true,
            reasons: Vec::new(),
            warnings: Vec::new(),
        };
        if is_stopping || self.draining.load(Ordering::Acquire) {
            let why = "draining: this process is about to stop";
            body.reasons.push(why.to_owned());
        }
        for Findings { reasons, warnings } in found {
            body.reasons.extend(reasons);
            body.warnings.extend(warnings);
        }
        body.ready = body.reasons.is_empty();
        if body.ready {
            return Json(body).into_response();
        }
        let retry = [(header::RETRY_AFTER, HeaderValue::from_static("1"))];
        (StatusCode::SERVICE_UNAVAILABLE, retry, Json(body)).into_response()
    }
}
