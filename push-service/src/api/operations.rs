//! What operators and their machines ask: nodes, health, metrics, this API's description.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use moorline_router::{NodeRecord, NodeState};
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use super::document::{CallProblems, StoreProblem};
use super::extract::{Caller, Read};
use crate::MetricsHandle;
use crate::problem::Problem;
use crate::readiness::ReadinessBody;

/// An access node.
#[derive(Serialize, ToSchema)]
pub(super) struct Node {
    /// Names one run of its process.
    id: String,
    /// Where other services reach it; absent where it lives in this process.
    #[serde(skip_serializing_if = "String::is_empty")]
    address: String,
    /// The program's version.
    version: String,
    /// `up` or `draining`.
    state: &'static str,
    /// Connections held, as of the last renewal of its lease.
    connections: u64,
    /// Where it runs, by the operator's word; absent where nothing was said.
    #[serde(skip_serializing_if = "String::is_empty")]
    region: String,
}

impl From<NodeRecord> for Node {
    fn from(node: NodeRecord) -> Self {
        Self {
            id: node.id.to_string(),
            address: node.address,
            version: node.version,
            state: match node.state {
                NodeState::Up => "up",
                NodeState::Draining => "draining",
            },
            connections: node.connections,
            region: node.region,
        }
    }
}

/// Every access node.
#[derive(Serialize, ToSchema)]
pub(super) struct Nodes {
    /// Those whose lease is valid.
    nodes: Vec<Node>,
}

/// List the access nodes.
#[utoipa::path(
    get, path = "/v1/nodes", tag = "operations", security(("key" = ["read"])),
    responses((status = 200, description = "Nodes that are alive", body = Nodes), CallProblems, StoreProblem)
)]
pub(super) async fn nodes(State(api): Shared, _: Caller<Read>) -> Result<Json<Nodes>, Problem> {
    let nodes = api.stores.routes.nodes().await?;
    Ok(Json(Nodes {
        nodes: nodes.into_iter().map(Node::from).collect(),
    }))
}

/// The process is alive.
#[derive(Serialize, ToSchema)]
pub(super) struct Alive {
    /// Always `ok`.
    status: &'static str,
}

/// Whether the process is alive.
#[utoipa::path(
    get, path = "/healthz", tag = "operations", security(()),
    responses((status = 200, description = "It is", body = Alive))
)]
pub(super) async fn alive() -> Json<Alive> {
    Json(Alive { status: "ok" })
}

/// Whether new devices and pushes are taken.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(()),
    responses(
        (status = 200, description = "They are", body = ReadinessBody),
        (status = 503, description = "They are not: the process is leaving, or its store cannot make things durable", body = ReadinessBody,
            headers(("Retry-After" = u32, description = "Seconds"))),
    )
)]
pub(super) async fn ready(State(api): Shared) -> Response {
    let is_stopping = *api.stop.borrow();
    api.readiness.respond(is_stopping).await
}

/// What is counted, in the Prometheus text format.
#[utoipa::path(
    get, path = "/metrics", tag = "operations", security(()),
    responses((status = 200, description = "Every metric of this process", body = String, content_type = "text/plain; version=0.0.4"))
)]
pub(super) async fn metrics(State(api): Shared) -> Response {
    metrics_response(&api.metrics)
}

pub(crate) fn metrics_response(metrics: &MetricsHandle) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], metrics.render()).into_response()
}

/// This description of the API.
#[utoipa::path(
    get, path = "/openapi.json", tag = "operations", security(()),
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value))
)]
pub(super) async fn document(State(api): Shared) -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], api.document.clone()).into_response()
}
