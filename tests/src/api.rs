//! A backend that calls the gateway's HTTP API.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};

/// An HTTP answer, read to its end.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// The body as text.
    pub text: String,
}

impl Answer {
    /// The body as JSON; null when it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or(Value::Null)
    }

    /// A header as text, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("")
    }

    /// Asserts the status and returns the body as JSON.
    ///
    /// # Panics
    /// When the status is another one.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "the answer was: {}", self.text);
        self.json()
    }

    /// Asserts a problem document (RFC 9457) and returns the fields that it names.
    ///
    /// # Panics
    /// When it is not one.
    #[track_caller]
    pub fn problem(&self, status: u16) -> Vec<String> {
        assert_eq!(self.status, status, "the answer was: {}", self.text);
        assert!(
            self.header("content-type")
                .starts_with("application/problem+json"),
            "content type {:?}: {}",
            self.header("content-type"),
            self.text
        );
        let body = self.json();
        assert_eq!(body["status"], status, "{body}");
        assert!(
            body["title"]
                .as_str()
                .is_some_and(|title| !title.is_empty()),
            "{body}"
        );
        body["errors"]
            .as_array()
            .map(|errors| {
                errors
                    .iter()
                    .filter_map(|one| one["field"].as_str())
                    .map(str::to_owned)
                    .collect()
            })
            .unwrap_or_default()
    }
}

/// The API of one gateway with one key.
#[derive(Debug, Clone)]
pub struct Api {
    client: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl Api {
    /// The API at `address` with `key`.
    ///
    /// # Panics
    /// When no HTTP client can be made.
    pub fn new(address: SocketAddr, key: Option<&str>) -> Self {
        // Every client wants a provider of TLS, also one that never uses it. Installed before is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(60))
            .build()
            .expect("an HTTP client without TLS needs nothing");
        Self {
            client,
            base: format!("http://{address}"),
            key: key.map(str::to_owned),
        }
    }

    /// The same API with another key.
    #[must_use]
    pub fn with_key(&self, key: Option<&str>) -> Self {
        Self {
            key: key.map(str::to_owned),
            ..self.clone()
        }
    }

    /// The same client with its open connections, for the API at another address.
    #[must_use]
    pub fn at(&self, address: SocketAddr) -> Self {
        Self {
            base: format!("http://{address}"),
            ..self.clone()
        }
    }

    /// A request to be completed by the test.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Sends a request; `Err` when no answer came.
    pub async fn try_send(&self, request: reqwest::RequestBuilder) -> reqwest::Result<Answer> {
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Answer {
            status,
            headers,
            text: response.text().await?,
        })
    }

    /// Sends a request.
    ///
    /// # Panics
    /// When no answer came.
    pub async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        self.try_send(request).await.expect("the gateway answers")
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// GET, of a process that may not listen yet.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn try_get(&self, path: &str) -> reqwest::Result<Answer> {
        self.try_send(self.request(Method::GET, path)).await
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// POST with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// A push, whatever the answer.
    pub async fn push(&self, body: &Value) -> Answer {
        self.post("/v1/push", body).await
    }

    /// An accepted QoS 1 push of text to a client; returns its id.
    ///
    /// # Panics
    /// When it is not accepted.
    pub async fn push_text(&self, client: &str, text: &str) -> String {
        let answer = self
            .push(&json!({"to": {"client": client}, "payload": text}))
            .await;
        answer.expect(202)["id"]
            .as_str()
            .expect("a push has an id")
            .to_owned()
    }

    /// The state of a message.
    pub async fn state_of(&self, id: &str) -> String {
        let body = self.get(&format!("/v1/messages/{id}")).await.json();
        body["state"].as_str().unwrap_or("").to_owned()
    }

    /// Everything upstream has for `consumer` now, acknowledged page by page.
    ///
    /// # Panics
    /// When the API refuses.
    pub async fn drain_upstream(&self, consumer: &str) -> Vec<Value> {
        let mut all = Vec::new();
        loop {
            let path = format!("/v1/upstream?consumer={consumer}&limit=1000&wait=0s");
            let page = self.get(&path).await.expect(200);
            let messages = page["messages"]
                .as_array()
                .expect("a page has messages")
                .clone();
            if messages.is_empty() {
                return all;
            }
            all.extend(messages);
            let body = json!({"consumer": consumer, "cursor": page["next"]});
            let acknowledged = self.post("/v1/upstream/ack", &body).await;
            assert!(acknowledged.status < 300, "{acknowledged:?}");
        }
    }
}
