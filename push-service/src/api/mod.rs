//! The resources of the HTTP API, one file each, and what all of them share: the state, the
//! routes, the log line of a request.

mod bans;
mod clients;
mod dead_letters;
mod delay_body;
mod delays;
mod document;
mod events;
mod extract;
mod messages;
mod operations;
mod payload;
mod push;
mod upstream;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use moorline_router::{Nodes, Stores};
use tokio::sync::watch;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::keys::Keys;
use crate::problem::{Problem, ProblemKind};
use crate::push::Submitter;
use crate::{Config, Delays, MetricsHandle, PushService, Readiness, UpstreamReading};

pub(crate) use operations::metrics_response;

pub(crate) struct Api {
    config: Config,
    stores: Stores,
    nodes: Arc<dyn Nodes>,
    upstream: UpstreamReading,
    keys: Keys,
    metrics: MetricsHandle,
    readiness: Readiness,
    device_topics: String,
    delays: Delays,
    submitter: Arc<Submitter>,
    document: Bytes,
    stop: watch::Receiver<bool>,
}

type Shared = State<Arc<Api>>;

/// Resolves when the server is told to stop, at once if it was already.
pub(crate) async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error says that the sender is gone, which ends the server too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Every route with its description.
fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::with_openapi(document::Document::openapi())
        .routes(routes!(push::push))
        .routes(routes!(messages::get, messages::cancel))
        .routes(routes!(clients::list))
        .routes(routes!(clients::get))
        .routes(routes!(clients::inbox))
        .routes(routes!(clients::disconnect))
        .routes(routes!(bans::list))
        .routes(routes!(bans::put, bans::delete))
        .routes(routes!(upstream::read))
        .routes(routes!(upstream::acknowledge))
        .routes(routes!(upstream::consumers))
        .routes(routes!(upstream::delete_consumer))
        .routes(routes!(dead_letters::list))
        .routes(routes!(dead_letters::retry))
        .routes(routes!(
            delays::list,
            delays::create,
            delays::cancel_by_event
        ))
        .routes(routes!(delays::create_batch))
        .routes(routes!(delays::count))
        .routes(routes!(delays::get, delays::patch, delays::cancel))
        .routes(routes!(delays::trigger))
        .routes(routes!(delays::retry))
        .routes(routes!(events::tell))
        .routes(routes!(operations::nodes))
        .routes(routes!(operations::alive))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::metrics))
        .routes(routes!(operations::document))
}

/// The API as a service; an error says what is wrong with the configuration.
pub(crate) fn app(service: PushService, stop: watch::Receiver<bool>) -> Result<Router, String> {
    let (router, document) = routes().split_for_parts();
    let mut keys = service.config.key_records()?;
    keys.extend(service.keys);
    let api = Arc::new(Api {
        submitter: service.submitter,
        keys: Keys::new(keys),
        document: document::to_json(&document).into(),
        config: service.config,
        stores: service.stores,
        nodes: service.nodes,
        upstream: service.upstream,
        metrics: service.metrics,
        readiness: service.readiness,
        device_topics: service.device_topics,
        delays: service.delays,
        stop,
    });
    Ok(router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&api), observe))
        .with_state(api))
}

pub(crate) async fn no_such_path(request: Request) -> Problem {
    let path = request.uri().path();
    Problem::new(
        ProblemKind::NotFound,
        format!("there is no {path}; see /openapi.json for what there is"),
    )
}

pub(crate) async fn no_such_method(request: Request) -> Problem {
    let detail = format!(
        "{} has no {}; the Allow header says what it has",
        request.uri().path(),
        request.method()
    );
    Problem::new(ProblemKind::MethodNotAllowed, detail)
}

/// Counts and logs each request.
async fn observe(State(api): Shared, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let path = tracing::enabled!(tracing::Level::DEBUG).then(|| request.uri().path().to_owned());
    let response = next.run(request).await.into_response();
    let status = response.status();
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    api.submitter
        .metrics()
        .request_ended(route, &method, status);
    if let Some(path) = path {
        let micros = started.elapsed().as_micros();
        tracing::debug!(%method, path, status = status.as_u16(), micros, "request");
    }
    response
}
