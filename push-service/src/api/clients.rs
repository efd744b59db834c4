//! `/v1/clients`: who is connected, and what waits for whom.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use moorline_mqtt::Version;
use moorline_router::{
    ClientId, InboxEntry, NodeId, Origin, Position, Route, SessionView, StoreError,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::document::{CallProblems, NotFoundProblem, StoreProblem};
use super::extract::{Admin, Caller, Params, PathId, Read, cursor};
use super::payload::{Payload, Properties, time};
use super::{Api, Shared};
use crate::problem::{Problem, ProblemKind};

/// Clients of one page.
const CLIENTS_MAX: usize = 1_000;
/// Look-ups of one request that run at once.
const LOOK_UPS: usize = 16;
/// Store pages that one request reads while it looks for clients that match its filters.
const SCANS_MAX: usize = 16;
/// Inbox entries of one page.
const ENTRIES_MAX: usize = 1_000;
/// Bytes of one page of an inbox.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// A client: connected, or one that something waits for.
#[derive(Serialize, ToSchema)]
pub(super) struct Client {
    /// Client id.
    id: String,
    /// Whether it is connected.
    online: bool,
    /// What waits for it.
    inbox: Inbox,
    #[serde(flatten)]
    connection: Option<Connection>,
}

/// How full an inbox is.
#[derive(Serialize, ToSchema)]
pub(super) struct Inbox {
    /// Messages that wait or await their acknowledgement.
    entries: u64,
    /// Their size in bytes.
    bytes: u64,
}

/// Of a client that is online.
#[derive(Serialize, ToSchema)]
pub(super) struct Connection {
    /// The node that holds the connection.
    node: String,
    /// Higher with each connect of this client.
    epoch: u64,
    /// When it connected, RFC 3339.
    #[schema(format = DateTime)]
    since: String,
    #[serde(flatten)]
    details: Option<Details>,
}

/// As the node sees the connection; absent while it is being made or broken.
#[derive(Serialize, ToSchema)]
pub(super) struct Details {
    /// `address:port` of the peer.
    #[schema(example = "127.0.0.1:50412")]
    address: String,
    /// MQTT version: `3.1.1` or `5.0`.
    protocol: &'static str,
    /// `tcp`, `tls`, `ws` or `wss`.
    transport: String,
    /// Seconds; 0 is off.
    keep_alive: u16,
    /// Whether the session outlives the connection.
    persistent: bool,
    /// Subscriptions held.
    subscriptions: usize,
    /// QoS 1 and 2 messages sent and not acknowledged.
    in_flight: usize,
}

impl From<SessionView> for Details {
    fn from(view: SessionView) -> Self {
        Self {
            address: view.address,
            protocol: match view.version {
                Version::V3_1_1 => "3.1.1",
                Version::V5 => "5.0",
            },
            transport: view.transport,
            keep_alive: view.keep_alive_s,
            persistent: view.persistent,
            subscriptions: view.subscriptions,
            in_flight: view.in_flight,
        }
    }
}

/// One page of clients.
#[derive(Serialize, ToSchema)]
pub(super) struct Clients {
    /// In the order of their ids.
    clients: Vec<Client>,
    /// The `after` of the next page; absent on the last. A page may be short or even empty and have a next.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// One message that waits.
#[derive(Serialize, ToSchema)]
pub(super) struct Entry {
    /// Message id.
    id: String,
    /// Where it arrives.
    topic: String,
    /// 1 or 2.
    qos: u8,
    /// `push`, or `session` for what a subscription of the persistent session brought.
    origin: &'static str,
    /// Whether a connection may have been sent it already.
    maybe_sent: bool,
    /// RFC 3339.
    #[schema(format = DateTime)]
    accepted_at: String,
    /// RFC 3339; absent where it never expires.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    #[serde(flatten)]
    payload: Payload,
    #[serde(flatten)]
    properties: Properties,
}

impl From<&InboxEntry> for Entry {
    fn from(entry: &InboxEntry) -> Self {
        let message = &entry.message;
        Self {
            id: message.id.to_string(),
            topic: message.topic.as_str().to_owned(),
            qos: message.qos as u8,
            origin: match message.origin {
                Origin::Push => "push",
                Origin::Session => "session",
            },
            maybe_sent: entry.maybe_sent,
            accepted_at: time(message.accepted_at_ms),
            expires_at: message.expires_at_ms.map(time),
            payload: Payload::from(&message.payload),
            properties: Properties::from(message.properties.as_deref()),
        }
    }
}

/// One page of an inbox.
#[derive(Serialize, ToSchema)]
pub(super) struct Entries {
    /// In the order in which they will be delivered.
    entries: Vec<Entry>,
    /// The `after` of the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// A client as far as the stores know it.
type Found = (ClientId, Option<Route>);

/// List clients that are connected or that something waits for.
#[utoipa::path(
    get, path = "/v1/clients", tag = "clients", security(("key" = ["read"])),
    params(
        ("after" = Option<String>, Query, description = "Begin after this client id"),
        ("limit" = Option<usize>, Query, description = "1 to 1000, default 100"),
        ("prefix" = Option<String>, Query, description = "Only client ids that begin with this"),
        ("online" = Option<bool>, Query, description = "Only connected clients, or only others"),
    ),
    responses((status = 200, description = "One page", body = Clients), CallProblems, StoreProblem)
)]
pub(super) async fn list(
    State(api): Shared,
    _: Caller<Read>,
    mut params: Params,
) -> Result<Json<Clients>, Problem> {
    let after = params.id::<ClientId>("after");
    let limit = params.limit(CLIENTS_MAX);
    let prefix = params.id::<ClientId>("prefix");
    let online = params.flag("online");
    params.finish()?;
    let (found, next) = find(&api, after, prefix.as_ref(), online, limit).await?;
    let clients = describe(&api, found).await?;
    Ok(Json(Clients {
        clients,
        next: next.map(|id| id.to_string()),
    }))
}

/// Clients that match, and from where to go on.
async fn find(
    api: &Api,
    after: Option<ClientId>,
    prefix: Option<&ClientId>,
    online: Option<bool>,
    limit: usize,
) -> Result<(Vec<Found>, Option<ClientId>), StoreError> {
    let mut found = Vec::new();
    let mut after = after;
    if let Some(prefix) = prefix
        && after.as_ref().is_none_or(|after| after < prefix)
    {
        // Pages begin after a client, so that the one that is all prefix is asked for by itself.
        found.extend(
            look_up_one(api, prefix)
                .await?
                .filter(|client| matches(client, online)),
        );
        after = Some(prefix.clone());
    }
    for _ in 0..SCANS_MAX {
        if found.len() >= limit {
            return Ok((found, after));
        }
        let wanted = limit - found.len();
        let page = merge(api, after.as_ref(), wanted, online).await?;
        let Some((last, _)) = page.last() else {
            return Ok((found, None));
        };
        let last = last.clone();
        for client in page {
            if prefix.is_some_and(|prefix| !client.0.as_str().starts_with(prefix.as_str())) {
                return Ok((found, None));
            }
            found.extend(Some(client).filter(|client| matches(client, online)));
        }
        after = Some(last);
    }
    Ok((found, after))
}

fn matches((_, route): &Found, online: Option<bool>) -> bool {
    online.is_none_or(|online| online == route.is_some())
}

async fn look_up_one(api: &Api, client: &ClientId) -> Result<Option<Found>, StoreError> {
    let route = api.stores.routes.look_up(client).await?;
    let known = route.is_some() || api.stores.inboxes.status(client).await?.entries > 0;
    Ok(known.then(|| (client.clone(), route)))
}

/// The next clients of routes and inboxes together.
async fn merge(
    api: &Api,
    after: Option<&ClientId>,
    limit: usize,
    online: Option<bool>,
) -> Result<Vec<Found>, StoreError> {
    if online == Some(true) {
        let routes = api.stores.routes.list(after, limit).await?;
        return Ok(routes
            .into_iter()
            .map(|(client, route)| (client, Some(route)))
            .collect());
    }
    let waiting = api.stores.inboxes.clients_waiting(after, limit).await?;
    if online == Some(false) {
        let look_ups = waiting.into_iter().map(|client| async move {
            let route = api.stores.routes.look_up(&client).await?;
            Ok::<Found, StoreError>((client, route))
        });
        return stream::iter(look_ups)
            .buffered(LOOK_UPS)
            .try_collect()
            .await;
    }
    let routes = api.stores.routes.list(after, limit).await?;
    let mut merged: BTreeMap<_, _> = waiting.into_iter().map(|client| (client, None)).collect();
    merged.extend(
        routes
            .into_iter()
            .map(|(client, route)| (client, Some(route))),
    );
    // Beyond the limit one of the two lists may have holes.
    Ok(merged.into_iter().take(limit).collect())
}

async fn describe(api: &Api, found: Vec<Found>) -> Result<Vec<Client>, StoreError> {
    let mut details = sessions(api, &found).await;
    let ids: Vec<ClientId> = found.iter().map(|(client, _)| client.clone()).collect();
    let look_ups = ids
        .into_iter()
        .map(|id| async move { api.stores.inboxes.status(&id).await });
    let statuses: Vec<_> = stream::iter(look_ups)
        .buffered(LOOK_UPS)
        .try_collect()
        .await?;
    let clients = found
        .into_iter()
        .zip(statuses)
        .map(|((id, route), status)| Client {
            online: route.is_some(),
            inbox: Inbox {
                entries: status.entries,
                bytes: status.bytes,
            },
            connection: route.map(|route| Connection {
                node: route.node.to_string(),
                epoch: route.epoch.0,
                since: time(route.connected_at_ms),
                details: details.remove(&id),
            }),
            id: id.to_string(),
        });
    Ok(clients.collect())
}

/// What the nodes know of the connections. A node out of reach leaves its part out.
async fn sessions(api: &Api, found: &[Found]) -> HashMap<ClientId, Details> {
    let mut by_node: HashMap<&NodeId, Vec<ClientId>> = HashMap::new();
    for (client, route) in found {
        if let Some(route) = route {
            by_node.entry(&route.node).or_default().push(client.clone());
        }
    }
    let mut details = HashMap::new();
    for (node, clients) in by_node {
        match api.nodes.sessions(node, &clients).await {
            Ok(views) => {
                let known = clients.into_iter().zip(views);
                details.extend(known.filter_map(|(client, view)| Some((client, view?.into()))));
            }
            Err(error) => tracing::debug!(%node, %error, "a node did not describe its sessions"),
        }
    }
    details
}

/// One client.
///
/// Any id is answered: nobody needs to have seen a client to push to it.
#[utoipa::path(
    get, path = "/v1/clients/{id}", tag = "clients", security(("key" = ["read"])),
    params(("id" = String, Path, description = "Client id, percent-encoded")),
    responses((status = 200, description = "Where it is and what waits for it", body = Client), CallProblems, StoreProblem)
)]
pub(super) async fn get(
    State(api): Shared,
    _: Caller<Read>,
    PathId(id): PathId<ClientId>,
) -> Result<Json<Client>, Problem> {
    let route = api.stores.routes.look_up(&id).await?;
    let client = describe(&api, vec![(id, route)]).await?.pop();
    client
        .map(Json)
        .ok_or_else(|| Problem::new(ProblemKind::Internal, "a client was lost on the way"))
}

/// What waits for a client.
#[utoipa::path(
    get, path = "/v1/clients/{id}/inbox", tag = "clients", security(("key" = ["read"])),
    params(
        ("id" = String, Path, description = "Client id, percent-encoded"),
        ("after" = Option<String>, Query, description = "The `next` of the page before"),
        ("limit" = Option<usize>, Query, description = "1 to 1000, default 100"),
    ),
    responses((status = 200, description = "One page", body = Entries), CallProblems, StoreProblem)
)]
pub(super) async fn inbox(
    State(api): Shared,
    _: Caller<Read>,
    PathId(id): PathId<ClientId>,
    mut params: Params,
) -> Result<Json<Entries>, Problem> {
    let after = params.cursor("after").unwrap_or(Position::START);
    let limit = params.limit(ENTRIES_MAX);
    params.finish()?;
    let page = api
        .stores
        .inboxes
        .read(&id, after, limit, PAGE_BYTES)
        .await?;
    Ok(Json(Entries {
        entries: page.entries.iter().map(Entry::from).collect(),
        next: page.more.then(|| cursor(page.read_to)),
    }))
}

/// Disconnect a client.
///
/// It is told (MQTT 5.0: reason 0x98, administrative action) and may connect again at once.
#[utoipa::path(
    delete, path = "/v1/clients/{id}/connection", tag = "clients", security(("key" = ["admin"])),
    params(("id" = String, Path, description = "Client id, percent-encoded")),
    responses((status = 204, description = "It was connected and is not any more"), CallProblems, NotFoundProblem, StoreProblem)
)]
pub(super) async fn disconnect(
    State(api): State<Arc<Api>>,
    _: Caller<Admin>,
    PathId(id): PathId<ClientId>,
) -> Result<StatusCode, Problem> {
    if let Some(route) = api.stores.routes.look_up(&id).await?
        && api.nodes.disconnect(&route.node, &id).await?
    {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Problem::new(
        ProblemKind::NotFound,
        format!("client {id} is not connected"),
    ))
}
