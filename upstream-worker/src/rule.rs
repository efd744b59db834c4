//! A rule ready for work: what a message becomes as an HTTP request.

use std::fmt::Write as _;
use std::time::Duration;

use moorline_router::{QueueName, UpstreamMessage};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Url};

use crate::config::{self, Retry};
use crate::webhook::{self, Signer};

const CLIENT_ID: &str = "{client_id}";
const TOPIC: &str = "{topic}";

/// A URL with places for what differs between messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UrlTemplate(String);

impl UrlTemplate {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let schemes = ["http://", "https://"];
        let Some(rest) = schemes.iter().find_map(|scheme| text.strip_prefix(scheme)) else {
            return Err(format!("{text:?} must begin with http:// or https://"));
        };
        let host = rest.split(['/', '?', '#']).next().unwrap_or("");
        if host.contains(['{', '}']) {
            return Err(format!("{text:?} must not have placeholders in its host"));
        }
        let plain = text.replace(CLIENT_ID, "x").replace(TOPIC, "x");
        if let Some(at) = plain.find(['{', '}']) {
            let found: String = plain[at..].chars().take(20).collect();
            return Err(format!(
                "has an unknown placeholder at {found:?}; there are {CLIENT_ID} and {TOPIC}"
            ));
        }
        let url = Url::parse(&plain).map_err(|error| format!("{text:?} is not a URL: {error}"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("must not hold a user name or password; use headers".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    /// The URL of one message; an error says why it cannot have one.
    fn expand(&self, message: &UpstreamMessage) -> Result<Url, String> {
        let mut url = self.0.clone();
        let values = [
            (CLIENT_ID, "client id", message.client.as_str()),
            (TOPIC, "topic", message.topic.as_str()),
        ];
        // The topic last: what a client id holds is encoded, so that it cannot look like `{topic}`.
        for (placeholder, what, value) in values {
            if !url.contains(placeholder) {
                continue;
            }
            // URLs resolve these even where they are encoded: they would lead to another path.
            if matches!(value, "." | "..") {
                return Err(format!("the {what} {value:?} cannot stand in a URL"));
            }
            url = url.replace(placeholder, &percent_encoded(value, is_unreserved));
        }
        Url::parse(&url).map_err(|error| format!("{url:?} is not a URL: {error}"))
    }
}

/// RFC 3986 section 2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// What can stand in a header as it is and is the same after percent-decoding.
fn is_plain_in_header(byte: u8) -> bool {
    byte.is_ascii_graphic() && byte != b'%'
}

pub(crate) fn percent_encoded(text: &str, is_plain: fn(u8) -> bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if is_plain(byte) {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("writing to a string cannot fail");
        }
    }
    encoded
}

/// A rule with everything parsed.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    pub(crate) queue: QueueName,
    pub(crate) timeout: Duration,
    pub(crate) retry: Retry,
    method: Method,
    url: UrlTemplate,
    headers: HeaderMap,
    signer: Option<Signer>,
}

impl Rule {
    pub(crate) fn new(rule: &config::Rule) -> Result<Self, String> {
        let mut headers = HeaderMap::with_capacity(rule.headers.len());
        for (name, value) in &rule.headers {
            let (name, value) = config::parse_header(name, value)?;
            headers.insert(name, value);
        }
        Ok(Self {
            queue: QueueName::new(&rule.name),
            timeout: rule.timeout,
            retry: rule.retry.clone(),
            method: config::parse_method(&rule.method)?,
            url: UrlTemplate::parse(&rule.url)?,
            headers,
            signer: rule.secret.signer()?,
        })
    }

    /// The call that hands `message` to the backend; an error says why there cannot be one.
    pub(crate) fn request(&self, message: &UpstreamMessage) -> Result<reqwest::Request, String> {
        let mut request = reqwest::Request::new(self.method.clone(), self.url.expand(message)?);
        *request.headers_mut() = self.request_headers(message);
        *request.timeout_mut() = Some(self.timeout);
        *request.body_mut() = Some(message.payload.clone().into());
        Ok(request)
    }

    fn request_headers(&self, message: &UpstreamMessage) -> HeaderMap {
        let mut headers = self.headers.clone();
        let mut set = |name: &'static str, value: &str| {
            let name = HeaderName::from_static(name);
            let value = percent_encoded(value, is_plain_in_header);
            headers.insert(
                name,
                HeaderValue::try_from(value).expect("visible ASCII characters"),
            );
        };
        set("moorline-client-id", message.client.as_str());
        set("moorline-topic", message.topic.as_str());
        set(
            "moorline-received-at",
            &webhook::time(message.received_at_ms),
        );
        let signer = self.signer.as_ref();
        webhook::identify(&mut headers, message.id.as_str(), &message.payload, signer);
        let properties = message.properties.as_deref();
        let content_type = properties
            .and_then(|properties| properties.content_type.as_deref())
            .and_then(|text| HeaderValue::from_str(text).ok());
        if let Some(content_type) = content_type {
            headers.insert(CONTENT_TYPE, content_type);
        } else if !headers.contains_key(CONTENT_TYPE) {
            headers.insert(
                CONTENT_TYPE,
                HeaderValue::from_static("application/octet-stream"),
            );
        }
        let traceparent = properties
            .and_then(|p| {
                p.user_properties
                    .iter()
                    .find(|(name, _)| name == "traceparent")
            })
            .and_then(|(_, value)| HeaderValue::from_str(value).ok());
        if let Some(traceparent) = traceparent {
            headers.insert(HeaderName::from_static("traceparent"), traceparent);
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use moorline_mqtt::{PublishProperties, QoS, TopicName};
    use moorline_router::{ClientId, MessageId};

    use super::*;

    fn message(client: &str, topic: &'static str) -> UpstreamMessage {
        UpstreamMessage {
            id: MessageId::parse("m-1").unwrap(),
            client: ClientId::parse(client).unwrap(),
            topic: TopicName::parse(topic.into()).unwrap(),
            qos: QoS::AtLeastOnce,
            properties: None,
            payload: Bytes::from_static(b"hi"),
            received_at_ms: 1_700_000_000_123,
        }
    }

    fn expand(template: &str, client: &str, topic: &'static str) -> Result<String, String> {
        UrlTemplate::parse(template)?
            .expand(&message(client, topic))
            .map(String::from)
    }

    #[test]
    fn what_a_device_names_stays_inside_its_place_in_the_url() {
        let url = "http://b:1/in/{client_id}?t={topic}";
        assert_eq!(
            expand(url, "car-7", "up/a").unwrap(),
            "http://b:1/in/car-7?t=up%2Fa"
        );
        assert_eq!(
            expand(url, "a/../b?x#y&z", "up/é").unwrap(),
            "http://b:1/in/a%2F..%2Fb%3Fx%23y%26z?t=up%2F%C3%A9"
        );
        assert_eq!(
            expand(url, "{topic}", "up").unwrap(),
            "http://b:1/in/%7Btopic%7D?t=up"
        );
        assert!(
            expand(url, "..", "up")
                .unwrap_err()
                .contains("cannot stand in a URL")
        );
        assert!(expand("http://b/x", "..", "up").is_ok());
    }

    #[test]
    fn a_template_is_refused_for_a_reason() {
        let error = |text: &str| UrlTemplate::parse(text).unwrap_err();
        assert!(UrlTemplate::parse("https://b/{topic}").is_ok());
        assert!(error("b/x").contains("must begin with http:// or https://"));
        assert!(error("ftp://b/x").contains("must begin with http:// or https://"));
        assert!(error("http://{client_id}.b/").contains("host"));
        assert!(error("http://b/{client}").contains("unknown placeholder at \"{client}\""));
        assert!(error("http://").contains("not a URL"));
        assert!(error("http://u:p@b/").contains("headers"));
    }

    #[test]
    fn a_request_carries_the_message_and_says_where_it_is_from() {
        let json = r#"{"name": "r", "filter": "up/#", "url": "http://b/", "headers": {"x-key": "k", "content-type": "text/x"}}"#;
        let rule = Rule::new(&serde_json::from_str(json).unwrap()).unwrap();
        let mut message = message("kühl 50%", "up/a b");
        let header = |message: &UpstreamMessage, name: &str| {
            let request = rule.request(message).unwrap();
            request
                .headers()
                .get(name)
                .map(|value| value.to_str().unwrap().to_owned())
        };
        let expected = [
            ("webhook-id", "m-1"),
            ("moorline-client-id", "k%C3%BChl%2050%25"),
            ("moorline-topic", "up/a%20b"),
            ("moorline-received-at", "2023-11-14T22:13:20.123Z"),
            ("x-key", "k"),
            ("content-type", "text/x"),
        ];
        for (name, value) in expected {
            assert_eq!(header(&message, name).as_deref(), Some(value), "{name}");
        }
        assert_eq!(header(&message, "traceparent"), None);
        message.properties = Some(Box::new(PublishProperties {
            content_type: Some("application/json".into()),
            user_properties: vec![("traceparent".into(), "00-a-b-01".into())],
            ..PublishProperties::default()
        }));
        assert_eq!(
            header(&message, "content-type").as_deref(),
            Some("application/json")
        );
        assert_eq!(
            header(&message, "traceparent").as_deref(),
            Some("00-a-b-01")
        );
        let request = rule.request(&message).unwrap();
        assert_eq!(request.body().unwrap().as_bytes(), Some(b"hi".as_slice()));
        assert_eq!(request.method(), "POST");
    }
}
