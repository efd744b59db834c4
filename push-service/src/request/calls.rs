//! What stands in a webhook, a message to an exchange and a check.

use axum::http::{HeaderName, HeaderValue, Uri};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::value::RawValue;

use super::action::{AmqpRequest, CheckRequest, WebhookRequest};
use super::properties::Pairs;
use super::{
    Errors, Fields, Problem, ProblemKind, compact, kind_of, malformed, note_strangers,
    read_content_type, read_text, shown,
};
use crate::delayed::{AmqpPublish, Check, Webhook};

/// Bytes of a URL.
const URL_BYTES_MAX: usize = 2_048;
/// Headers of one call, and bytes of one value.
const HEADERS_MAX: usize = 32;
const HEADER_BYTES_MAX: usize = 4_096;
/// What AMQP can carry as a short string.
const SHORT_BYTES_MAX: usize = 255;
/// Headers that every call has of its own.
const OWN_HEADERS: [&str; 6] = [
    "content-length",
    "content-type",
    "host",
    "transfer-encoding",
    "connection",
    "traceparent",
];
const OWN_PREFIXES: [&str; 2] = ["webhook-", "ce-"];

impl Webhook {
    /// Reads the JSON of a webhook action; the problem names every wrong field.
    pub(crate) fn from_json(json: &[u8], bytes_max: usize) -> Result<Self, Problem> {
        let request: WebhookRequest<'_> =
            serde_json::from_slice(json).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let url = errors.keep("url", read_url(request.url));
        let method = request.method.and_then(|raw| {
            let method = match read_text(raw).as_deref() {
                Ok("POST") => Ok("POST"),
                Ok("PUT") => Ok("PUT"),
                Ok("PATCH") => Ok("PATCH"),
                Ok("DELETE") => Ok("DELETE"),
                _ => Err(format!(
                    "must be \"POST\", \"PUT\", \"PATCH\" or \"DELETE\", is {}",
                    shown(raw)
                )),
            };
            errors.keep("method", method)
        });
        let headers = read_headers(&mut errors, request.headers);
        let body = read_body(&mut errors, request.body, request.body_base64, bytes_max);
        let content_type = request
            .content_type
            .and_then(|raw| errors.keep("content_type", read_content_type(raw)));
        let kind = request.r#type.and_then(|raw| {
            let kind = read_text(raw).and_then(|text| match text.len() {
                1..=SHORT_BYTES_MAX if !text.chars().any(char::is_control) => Ok(text.into_owned()),
                _ => Err(format!("must be text of 1 to {SHORT_BYTES_MAX} bytes")),
            });
            errors.keep("type", kind)
        });
        let Some(url) = errors.finish(url)? else {
            unreachable!("without a URL there is an error");
        };
        Ok(Self {
            url,
            method: method.unwrap_or("POST"),
            headers,
            content_type: content_type
                .map(|text| text.to_string())
                .or_else(|| body.as_ref().and_then(Body::content_type)),
            body: body.map(|body| body.bytes),
            kind,
        })
    }
}

impl AmqpPublish {
    /// Reads the JSON of an AMQP action; the problem names every wrong field.
    pub(crate) fn from_json(json: &[u8], bytes_max: usize) -> Result<Self, Problem> {
        let request: AmqpRequest<'_> = serde_json::from_slice(json).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let mut name = |field: &'static str, raw: Option<&RawValue>| {
            let text = raw.ok_or_else(|| "is required".to_owned());
            let text = text.and_then(|raw| match read_text(raw)? {
                text if text.len() > SHORT_BYTES_MAX => {
                    Err(format!("must be at most {SHORT_BYTES_MAX} bytes long"))
                }
                text => Ok(text.into_owned()),
            });
            errors.keep(field, text).unwrap_or_default()
        };
        let exchange = name("exchange", request.exchange);
        let routing_key = name("routing_key", request.routing_key);
        let headers = read_headers(&mut errors, request.headers);
        let body = read_body(&mut errors, request.body, request.body_base64, bytes_max);
        let content_type = request
            .content_type
            .and_then(|raw| errors.keep("content_type", read_content_type(raw)));
        errors.finish(Some(()))?;
        Ok(Self {
            exchange,
            routing_key,
            headers,
            content_type: content_type
                .map(|text| text.to_string())
                .or_else(|| body.as_ref().and_then(Body::content_type)),
            body: body.map(|body| body.bytes),
        })
    }
}

impl Check {
    /// Reads the JSON of a check; the problem names every wrong field.
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, Problem> {
        let request: CheckRequest<'_> = serde_json::from_slice(json).map_err(|_| {
            let detail = format!("must be {}", CheckRequest::EXPECTED);
            Problem::new(ProblemKind::InvalidRequest, detail)
        })?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let url = errors.keep("url", read_url(request.url));
        let headers = read_headers(&mut errors, request.headers);
        match errors.finish(url)? {
            Some(url) => Ok(Self { url, headers }),
            None => unreachable!("without a URL there is an error"),
        }
    }
}

fn read_url(raw: Option<&RawValue>) -> Result<String, String> {
    let text = read_text(raw.ok_or("is required: http://… or https://…")?)?;
    if text.len() > URL_BYTES_MAX {
        return Err(format!("must be at most {URL_BYTES_MAX} bytes long"));
    }
    let url: Uri = text
        .parse()
        .map_err(|_| format!("must be like \"https://shop.example/orders\", is {text:?}"))?;
    let has_scheme = matches!(url.scheme_str(), Some("http" | "https"));
    let authority = url.authority().map(|authority| authority.as_str());
    match authority {
        Some(authority) if authority.contains('@') => {
            Err("must not hold a user name or password; use headers".into())
        }
        Some(_) if has_scheme && url.host().is_some_and(|host| !host.is_empty()) => {
            Ok(text.into_owned())
        }
        _ => Err(format!(
            "must begin with http:// or https:// and name a host, is {text:?}"
        )),
    }
}

fn read_headers(errors: &mut Errors, raw: Option<&RawValue>) -> Vec<(String, String)> {
    let Some(raw) = raw else { return Vec::new() };
    let Ok(Pairs(pairs)) = serde_json::from_str::<Pairs<'_>>(raw.get()) else {
        errors.add(
            "headers",
            format!("must be an object of texts, is {}", kind_of(raw)),
        );
        return Vec::new();
    };
    if pairs.len() > HEADERS_MAX {
        errors.add(
            "headers",
            format!("must be at most {HEADERS_MAX}, are {}", pairs.len()),
        );
        return Vec::new();
    }
    let mut headers = Vec::with_capacity(pairs.len());
    for (name, value) in pairs {
        match read_header(&name, value) {
            Ok(value) => headers.push((name.to_ascii_lowercase(), value)),
            Err(detail) => errors.add(format!("headers.{name}"), detail),
        }
    }
    headers
}

fn read_header(name: &str, value: &RawValue) -> Result<String, String> {
    let header = HeaderName::try_from(name).map_err(|_| "is not a header name".to_owned())?;
    let own = OWN_HEADERS.contains(&header.as_str())
        || OWN_PREFIXES
            .iter()
            .any(|prefix| header.as_str().starts_with(prefix));
    if own {
        return Err("is set by the gateway".into());
    }
    let value = read_text(value)?;
    if value.len() > HEADER_BYTES_MAX || HeaderValue::try_from(value.as_ref()).is_err() {
        return Err(format!(
            "must be text that a header can hold, of at most {HEADER_BYTES_MAX} bytes"
        ));
    }
    Ok(value.into_owned())
}

struct Body {
    bytes: Bytes,
    is_json: bool,
}

impl Body {
    fn content_type(&self) -> Option<String> {
        self.is_json.then(|| "application/json".to_owned())
    }
}

fn read_body(
    errors: &mut Errors,
    body: Option<&RawValue>,
    base64: Option<&RawValue>,
    bytes_max: usize,
) -> Option<Body> {
    let (field, read) = match (body, base64) {
        (None, None) => return None,
        (Some(_), Some(_)) => {
            errors.add("body_base64", "must not be given together with body");
            return None;
        }
        (Some(raw), None) => {
            let is_json = !raw.get().starts_with('"');
            let bytes = match is_json {
                true => Ok(Bytes::from(compact(raw.get()))),
                false => read_text(raw).map(|text| Bytes::from(text.into_owned())),
            };
            ("body", bytes.map(|bytes| Body { bytes, is_json }))
        }
        (None, Some(raw)) => {
            let bytes = read_text(raw).and_then(|text| {
                STANDARD
                    .decode(text.as_bytes())
                    .map_err(|e| format!("must be standard base64 with padding: {e}"))
            });
            let is_json = false;
            let body = bytes.map(|bytes| Body {
                bytes: bytes.into(),
                is_json,
            });
            ("body_base64", body)
        }
    };
    let read = read.and_then(|body| match body.bytes.len() {
        length if length > bytes_max => Err(format!(
            "is too large: {length} bytes, must be at most {bytes_max}"
        )),
        _ => Ok(body),
    });
    errors.keep(field, read)
}
