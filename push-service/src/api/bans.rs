//! `/v1/bans`: who may not connect.

use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use moorline_router::{Ban, BanTarget, BanView, duration, unix_ms};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::document::{BodyProblems, CallProblems, FullProblem, NotFoundProblem, StoreProblem};
use super::extract::{Admin, Caller, JsonBody, Params, Read};
use super::payload::time;
use super::{Api, Shared};
use crate::problem::{Problem, ProblemKind};
use crate::request::{TtlRequest, malformed};

/// Bans of one page.
const PAGE_MAX: usize = 1_000;
/// Bans that an operator can make.
const BANS_MAX: usize = 100_000;
/// Characters of a reason.
const REASON_MAX: usize = 1_000;
/// Longer than this is for ever, which is said by leaving `ttl` out.
const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A ban in force.
#[derive(Serialize, ToSchema)]
#[schema(as = Ban)]
pub(super) struct BanBody {
    /// `address`, `client` or `username`.
    kind: &'static str,
    /// Which one; an address may be a network.
    #[schema(example = "192.0.2.0/24")]
    value: String,
    /// Why, for people.
    reason: String,
    /// When it was made, RFC 3339.
    #[schema(format = DateTime)]
    since: String,
    /// RFC 3339; absent where it never ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// Whether a node gave it by itself, to one that connected again and again.
    automatic: bool,
}

impl From<BanView> for BanBody {
    fn from(BanView { ban, automatic }: BanView) -> Self {
        Self {
            kind: ban.target.kind(),
            value: ban.target.value(),
            reason: ban.reason.into(),
            since: time(ban.since_ms),
            expires_at: ban.expires_at_ms.map(time),
            automatic,
        }
    }
}

/// One page of bans.
#[derive(Serialize, ToSchema)]
#[schema(as = Bans)]
pub(super) struct BansBody {
    /// In the order of kind and value.
    bans: Vec<BanBody>,
    /// The `after` of the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// What a ban is to be.
#[derive(Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct BanRequest {
    /// How long it lasts; for ever where none is given.
    #[schema(value_type = TtlRequest, required = false)]
    ttl: Option<Value>,
    /// Why, for people: at most 1,000 characters.
    reason: String,
}

/// Whom the path names.
pub(super) struct PathTarget(BanTarget);

impl FromRequestParts<std::sync::Arc<Api>> for PathTarget {
    type Rejection = Problem;

    async fn from_request_parts(
        parts: &mut Parts,
        api: &std::sync::Arc<Api>,
    ) -> Result<Self, Problem> {
        let invalid = |field, detail| Problem::field(ProblemKind::InvalidRequest, field, detail);
        let Path((kind, value)) = Path::<(String, String)>::from_request_parts(parts, api)
            .await
            .map_err(|_| invalid("value", "must be UTF-8, percent-encoded".to_owned()))?;
        let field = match BanTarget::KINDS.contains(&kind.as_str()) {
            true => "value",
            false => "kind",
        };
        BanTarget::parse(&kind, &value)
            .map(Self)
            .map_err(|error| invalid(field, error.to_string()))
    }
}

/// List the bans.
///
/// Those that operators made, and short ones that the nodes gave by themselves.
#[utoipa::path(
    get, path = "/v1/bans", tag = "bans", security(("key" = ["read"])),
    params(
        ("after" = Option<String>, Query, description = "The `next` of the page before: a kind, a slash and a value"),
        ("limit" = Option<usize>, Query, description = "1 to 1000, default 100"),
    ),
    responses((status = 200, description = "One page", body = BansBody), CallProblems, StoreProblem)
)]
pub(super) async fn list(
    State(api): Shared,
    _: Caller<Read>,
    mut params: Params,
) -> Result<Json<BansBody>, Problem> {
    let after = params.text("after").and_then(|text| {
        let target = text
            .split_once('/')
            .and_then(|(kind, value)| BanTarget::parse(kind, value).ok());
        if target.is_none() {
            params.wrong("after", "must be a `next` as an earlier answer gave it");
        }
        target
    });
    let limit = params.limit(PAGE_MAX);
    params.finish()?;
    let bans = api.nodes.bans(after.as_ref(), limit).await?;
    let next = bans.last().filter(|_| bans.len() == limit).map(|view| {
        let target = &view.ban.target;
        format!("{}/{}", target.kind(), target.value())
    });
    Ok(Json(BansBody {
        bans: bans.into_iter().map(BanBody::from).collect(),
        next,
    }))
}

/// Ban a client id, a user name or addresses.
///
/// Durable when it is answered. Whoever it names is disconnected (MQTT 5.0: reason 0x98, administrative action; by user
/// name only where devices are authenticated, else it counts from the next connect on) and is
/// refused from then on: an address when it connects, the others with reason 0x8A, banned (MQTT 3.1.1: return code 5).
/// A ban of the same kind and value is replaced.
#[utoipa::path(
    put, path = "/v1/bans/{kind}/{value}", tag = "bans", security(("key" = ["admin"])),
    params(
        ("kind" = String, Path, description = "`address`, `client` or `username`"),
        ("value" = String, Path, description = "Which one, percent-encoded; an address may be a network: `192.0.2.0%2F24`"),
    ),
    request_body(content = BanRequest, content_type = "application/json"),
    responses((status = 200, description = "It is in force", body = BanBody), CallProblems, BodyProblems, FullProblem, StoreProblem)
)]
pub(super) async fn put(
    State(api): Shared,
    caller: Caller<Admin>,
    PathTarget(target): PathTarget,
    JsonBody(body): JsonBody,
) -> Result<Json<BanBody>, Problem> {
    let ban = read(target, &body)?;
    let known = api.stores.bans.get(&ban.target).await?.is_some();
    if !known && api.stores.bans.load_all().await?.len() >= BANS_MAX {
        return Err(Problem::new(
            ProblemKind::LimitReached,
            format!("there are {BANS_MAX} bans already; networks can replace many addresses"),
        ));
    }
    api.stores.bans.save(ban.clone()).await?;
    api.nodes.ban_changed(&ban.target).await?;
    tracing::info!(key = caller.name, target = %ban.target, reason = %ban.reason, "ban made");
    let automatic = false;
    Ok(Json(BanView { ban, automatic }.into()))
}

fn read(target: BanTarget, body: &[u8]) -> Result<Ban, Problem> {
    let request: BanRequest = match body {
        b"" => BanRequest::default(),
        // By way of a map: a list is no request, though a list of fields could be read as one.
        body => serde_json::from_slice::<Map<String, Value>>(body)
            .and_then(|map| serde_json::from_value(Value::Object(map)))
            .map_err(|error| malformed(&error))?,
    };
    let invalid = |field, detail| Problem::field(ProblemKind::InvalidRequest, field, detail);
    if request.reason.chars().count() > REASON_MAX {
        let detail = format!("must be at most {REASON_MAX} characters long");
        return Err(invalid("reason", detail));
    }
    let ttl = match &request.ttl {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(duration::parse(text).ok()),
        Some(value) => Some(value.as_u64().map(Duration::from_secs)),
    };
    let ttl = match ttl {
        Some(Some(ttl)) if !ttl.is_zero() && ttl <= TTL_MAX => Some(ttl),
        Some(_) => {
            let detail = "must be a duration like \"15m\" or \"24h\", or whole seconds, greater than 0 and \
                          at most 10 years; leave it out for ever";
            return Err(invalid("ttl", detail.to_owned()));
        }
        None => None,
    };
    let since_ms = unix_ms();
    Ok(Ban {
        target,
        reason: request.reason.into(),
        since_ms,
        expires_at_ms: ttl
            .map(|ttl| since_ms + u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX / 2)),
    })
}

/// Lift a ban.
///
/// Exactly the one of that kind and value: a banned network still forbids its addresses.
#[utoipa::path(
    delete, path = "/v1/bans/{kind}/{value}", tag = "bans", security(("key" = ["admin"])),
    params(
        ("kind" = String, Path, description = "`address`, `client` or `username`"),
        ("value" = String, Path, description = "Which one, percent-encoded"),
    ),
    responses((status = 204, description = "It was in force and is not any more"), CallProblems, NotFoundProblem, StoreProblem)
)]
pub(super) async fn delete(
    State(api): Shared,
    caller: Caller<Admin>,
    PathTarget(target): PathTarget,
) -> Result<StatusCode, Problem> {
    let stored = api.stores.bans.delete(&target).await?;
    let in_force = api.nodes.ban_changed(&target).await?;
    if stored || in_force {
        tracing::info!(key = caller.name, %target, "ban lifted");
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Problem::new(
        ProblemKind::NotFound,
        format!("there is no ban of {target}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ban(body: &str) -> Result<Ban, Problem> {
        read(
            BanTarget::parse("client", "car-7").unwrap(),
            body.as_bytes(),
        )
    }

    #[test]
    fn a_ban_may_have_an_end_and_a_reason() {
        let forever = ban("").unwrap();
        assert_eq!((forever.expires_at_ms, &*forever.reason), (None, ""));
        let short = ban(r#"{"ttl": "15m", "reason": "spam"}"#).unwrap();
        assert_eq!(short.expires_at_ms, Some(short.since_ms + 900_000));
        assert_eq!(&*short.reason, "spam");
        let seconds = ban(r#"{"ttl": 60}"#).unwrap();
        assert_eq!(seconds.expires_at_ms, Some(seconds.since_ms + 60_000));
    }

    #[test]
    fn what_cannot_be_a_ban_is_refused_by_field() {
        for body in [
            r#"{"ttl": 0}"#,
            r#"{"ttl": "soon"}"#,
            r#"{"ttl": -5}"#,
            r#"{"ttl": "4000d"}"#,
            r#"{"ttl": true}"#,
        ] {
            assert_eq!(ban(body).unwrap_err().errors()[0].field, "ttl", "{body}");
        }
        let long = format!(r#"{{"reason": "{}"}}"#, "x".repeat(REASON_MAX + 1));
        assert_eq!(ban(&long).unwrap_err().errors()[0].field, "reason");
        assert!(ban(r#"{"until": 5}"#).is_err());
        assert!(ban("[]").is_err());
    }
}
