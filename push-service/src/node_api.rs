//! The HTTP face of a process that is no push service: health, metrics, and the order to drain.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};

use crate::api::{metrics_response, no_such_method, no_such_path};
use crate::keys::{Keys, Scope};
use crate::problem::{Problem, ProblemKind};
use crate::{ApiKeyRecord, Config, MetricsHandle, Readiness, ServeError, connections};

/// What the HTTP face of an access node or of a worker is given.
pub struct NodeApi {
    /// The `[http]` section; must be valid.
    pub config: Config,
    /// Keys beside those of the configuration.
    pub keys: Vec<ApiKeyRecord>,
    /// What `/metrics` renders.
    pub metrics: MetricsHandle,
    /// What `/readyz` says.
    pub readiness: Readiness,
    /// Told by `POST /admin/drain`, which the process has where this is present.
    pub drain: Option<Arc<Notify>>,
}

struct Served {
    keys: Keys,
    metrics: MetricsHandle,
    readiness: Readiness,
    drain: Option<Arc<Notify>>,
}

type Shared = State<Arc<Served>>;

/// Serves until `shutdown` resolves, then finishes the requests in flight for at most `http.shutdown_timeout`.
///
/// # Errors
/// When the configuration is wrong or the listener fails.
pub async fn serve_node_api(
    listener: TcpListener,
    node: NodeApi,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let limits = node.config.limits();
    let shutdown_timeout = node.config.shutdown_timeout;
    let metrics = node.metrics.clone();
    let (stop_sender, stop) = watch::channel(false);
    let app = app(node).map_err(ServeError::Config)?;
    let server = connections::run(listener, app, limits, stop);
    crate::until_stopped(server, stop_sender, shutdown, shutdown_timeout, metrics).await
}

fn app(node: NodeApi) -> Result<Router, String> {
    let mut keys = node.config.key_records()?;
    keys.extend(node.keys);
    let mut router = Router::new()
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics));
    if node.drain.is_some() {
        router = router.route("/admin/drain", post(drain));
    }
    let served = Served {
        keys: Keys::new(keys),
        metrics: node.metrics,
        readiness: node.readiness,
        drain: node.drain,
    };
    Ok(router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .with_state(Arc::new(served)))
}

async fn alive() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn ready(State(served): Shared) -> Response {
    served.readiness.respond(false).await
}

async fn metrics(State(served): Shared) -> Response {
    metrics_response(&served.metrics)
}

/// As SIGTERM does it, but the process stays: its devices leave, and no new ones come.
async fn drain(
    State(served): Shared,
    headers: HeaderMap,
) -> Result<(StatusCode, Json<Value>), Problem> {
    served.keys.authorize(&headers, Scope::Admin)?;
    let Some(drain) = &served.drain else {
        return Err(Problem::new(ProblemKind::NotFound, "no devices are here"));
    };
    drain.notify_one();
    Ok((StatusCode::ACCEPTED, Json(json!({"state": "draining"}))))
}
