//! A push service on a real socket over a real store; only the access node is made up, so that a
//! test decides what becomes of a hint.

#![allow(unreachable_pub, dead_code, reason = "shared by several test programs")]

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use async_trait::async_trait;
use moorline_mqtt::{Publish, Version};
use moorline_push_service::{
    ApiKeyRecord, Config, Delays, Dependency, MetricsHandle, PushService, Readiness, Scope,
    ServeError, Submitter, UpstreamReading, serve,
};
use moorline_router::embedded::{self, EmbeddedStore};
use moorline_router::{
    BanTarget, BanView, ClientId, Clock, Delivery, DeliveryOutcome, Displaced, Epoch, MessageId,
    NodeId, NodeRecord, NodeState, Nodes, Published, RetryPolicy, SessionView, StoreError,
};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const KEY: &str = "key-with-every-scope";
pub const PUSH_KEY: &str = "key-that-only-pushes";

/// An access node that does as it is told.
pub struct MadeUpNode {
    pub outcome: Mutex<DeliveryOutcome>,
    pub publish_error: Mutex<Option<StoreError>>,
    pub delivered: Mutex<Vec<Delivery>>,
    pub published: Mutex<Vec<(MessageId, Publish)>>,
    pub disconnected: Mutex<Vec<ClientId>>,
    pub bans: Mutex<BTreeMap<BanTarget, BanView>>,
    pub store: OnceLock<Arc<EmbeddedStore>>,
}

#[async_trait]
impl Nodes for MadeUpNode {
    async fn deliver(&self, _: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        let outcome = *self.outcome.lock().unwrap();
        let outcomes = vec![outcome; deliveries.len()];
        self.delivered.lock().unwrap().extend(deliveries);
        outcomes
    }

    async fn disconnect(&self, _: &NodeId, client: &ClientId) -> Result<bool, StoreError> {
        self.disconnected.lock().unwrap().push(client.clone());
        Ok(true)
    }

    async fn displace(&self, _: &NodeId, _: &ClientId, _: Epoch) -> Result<Displaced, StoreError> {
        Ok(Displaced::default())
    }

    async fn session_changed(&self, _: &NodeId, _: &ClientId) -> Result<(), StoreError> {
        Ok(())
    }

    async fn bans(
        &self,
        after: Option<&BanTarget>,
        limit: usize,
    ) -> Result<Vec<BanView>, StoreError> {
        let bans = self.bans.lock().unwrap();
        let after = bans.range((
            after.map_or(Bound::Unbounded, Bound::Excluded),
            Bound::Unbounded,
        ));
        Ok(after.take(limit).map(|(_, view)| view.clone()).collect())
    }

    async fn ban_changed(&self, target: &BanTarget) -> Result<bool, StoreError> {
        let stores = self.store.get().expect("set at the start");
        let now = moorline_router::Bans::get(&**stores, target).await?;
        let automatic = false;
        let mut bans = self.bans.lock().unwrap();
        Ok(match now {
            Some(ban) => bans.insert(target.clone(), BanView { ban, automatic }),
            None => bans.remove(target),
        }
        .is_some())
    }

    async fn sessions(
        &self,
        _: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError> {
        let view = SessionView {
            epoch: Epoch(1),
            address: "127.0.0.1:9".into(),
            version: Version::V5,
            transport: "ws".to_owned(),
            keep_alive_s: 60,
            persistent: true,
            subscriptions: 2,
            in_flight: 0,
        };
        Ok(vec![Some(view); clients.len()])
    }

    async fn publish(&self, id: MessageId, publish: Publish) -> Result<Published, StoreError> {
        if let Some(error) = self.publish_error.lock().unwrap().clone() {
            return Err(error);
        }
        self.published.lock().unwrap().push((id, publish));
        Ok(Published { matched: Some(3) })
    }
}

pub struct Service {
    pub base: String,
    pub store: Arc<EmbeddedStore>,
    pub node: Arc<MadeUpNode>,
    pub node_id: NodeId,
    pub draining: Arc<AtomicBool>,
    pub stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<Result<(), ServeError>>,
    http: reqwest::Client,
    _directory: tempfile::TempDir,
}

impl Service {
    pub async fn start() -> Self {
        Self::start_with(Config::default()).await
    }

    pub async fn start_with(config: Config) -> Self {
        Self::start_over(config, embedded::Config::default()).await
    }

    pub async fn start_over(config: Config, store: embedded::Config) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path().join("data");
        let store = EmbeddedStore::open(embedded::Config { data_dir, ..store }).unwrap();
        let node = Arc::new(MadeUpNode {
            outcome: Mutex::new(DeliveryOutcome::Sent { epoch: Epoch(7) }),
            publish_error: Mutex::default(),
            delivered: Mutex::default(),
            published: Mutex::default(),
            disconnected: Mutex::default(),
            bans: Mutex::default(),
            store: OnceLock::from(Arc::clone(&store)),
        });
        let draining = Arc::new(AtomicBool::new(false));
        let service = PushService {
            config,
            stores: store.stores(),
            nodes: node.clone(),
            upstream: UpstreamReading::Here(store.clone()),
            keys: vec![
                ApiKeyRecord::with_every_scope(ApiKeyRecord::DEFAULT_NAME, KEY),
                ApiKeyRecord::from_plain("pusher", PUSH_KEY, &[Scope::Push]),
            ],
            metrics: MetricsHandle::detached(),
            readiness: Readiness {
                draining: draining.clone(),
                dependencies: vec![Dependency::embedded(Arc::clone(&store))],
            },
            device_topics: "d".into(),
            submitter: Arc::new(Submitter::new(store.stores(), node.clone())),
            delays: Delays {
                clock: Clock::of_machine(),
                retry: RetryPolicy {
                    attempts_max: 12,
                    first_ms: 1_000,
                    max_ms: 600_000,
                },
                amqp: false,
            },
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(listener, service, async { drop(stopped.await) }));
        // Installed before, by another test of this process, is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let node_id = NodeId::for_this_run("test");
        Self {
            base,
            store,
            node,
            node_id,
            draining,
            stop: Some(stop),
            task,
            http,
            _directory: directory,
        }
    }

    /// Makes `client` look connected.
    pub async fn connect(&self, client: &str) {
        let routes = self.store.stores().routes;
        let record = NodeRecord {
            id: self.node_id.clone(),
            address: String::new(),
            version: "0".into(),
            state: NodeState::Up,
            connections: 1,
            region: String::new(),
            server_reference: String::new(),
        };
        routes.renew(record, 60_000).await.unwrap();
        routes
            .claim(&ClientId::parse(client).unwrap(), &self.node_id)
            .await
            .unwrap();
    }

    /// A request without a key.
    pub fn bare(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.bare(method, path).bearer_auth(KEY)
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        answer(self.request(Method::GET, path)).await
    }

    pub async fn delete(&self, path: &str) -> (StatusCode, Value) {
        answer(self.request(Method::DELETE, path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        answer(self.request(Method::POST, path).json(body)).await
    }

    /// Pushes `body` and expects it to be accepted; its id.
    pub async fn push(&self, body: &Value) -> String {
        let (status, answer) = self.post("/v1/push", body).await;
        assert_eq!(status, 202, "{answer}");
        answer["id"].as_str().unwrap().to_owned()
    }
}

/// Status and JSON of an answer; null where there is no body. A problem must be declared as one.
pub async fn answer(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.unwrap();
    let status = response.status();
    let kind = response
        .headers()
        .get("content-type")
        .map(|kind| kind.to_str().unwrap().to_owned());
    let body = response.bytes().await.unwrap();
    if body.is_empty() {
        return (status, Value::Null);
    }
    let value: Value = serde_json::from_slice(&body).unwrap();
    if status.is_client_error() || (status.is_server_error() && value.get("ready").is_none()) {
        assert_eq!(kind.as_deref(), Some("application/problem+json"), "{value}");
        assert_eq!(value["status"], status.as_u16(), "{value}");
        for member in ["type", "title", "detail"] {
            assert!(
                value[member].as_str().is_some_and(|text| !text.is_empty()),
                "{member}: {value}"
            );
        }
    }
    (status, value)
}
