//! Several nodes in one process on a real Redis and a real RabbitMQ, each reaching the others by function calls.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use moorline_access_node::{
    Access, AccessNode, Cluster, Config, DelayRules, ListenerConfig, ListenerSettings, Protocol,
};
use moorline_mqtt::{Publish, QoS, TopicFilter, TopicName};
use moorline_router::embedded::{Config as EmbeddedConfig, EmbeddedStore};
use moorline_router::rabbit::{Config as RabbitConfig, RabbitPubSub};
use moorline_router::redis::{Config as RedisConfig, Limits, RedisStore};
use moorline_router::upstream::UpstreamRoutes;
use moorline_router::{
    Append, Appended, BanTarget, BanView, ClientId, Delivery, DeliveryOutcome, Displaced, Epoch,
    Events, Message, MessageId, NodeId, Nodes, Origin, Position, Presence, PresenceChange,
    Published, SessionView, Shards, StoreError, Stores, unix_ms,
};
use moorline_tests::servers::{RabbitServer, RedisServer, VirtualHost};
use parking_lot::Mutex;
use tempfile::TempDir;

/// The way between the nodes of one process; a node that is not in it is out of reach.
#[derive(Default)]
pub(crate) struct Directory {
    nodes: Mutex<HashMap<NodeId, Arc<dyn Nodes>>>,
}

impl Directory {
    fn find(&self, node: &NodeId) -> Result<Arc<dyn Nodes>, StoreError> {
        let found = self.nodes.lock().get(node).cloned();
        found.ok_or_else(|| StoreError::Unavailable(format!("{node} is not there")))
    }
}

#[async_trait]
impl Nodes for Directory {
    async fn deliver(&self, node: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        match self.find(node) {
            Ok(found) => found.deliver(node, deliveries).await,
            Err(_) => vec![DeliveryOutcome::Busy; deliveries.len()],
        }
    }

    async fn disconnect(&self, node: &NodeId, client: &ClientId) -> Result<bool, StoreError> {
        self.find(node)?.disconnect(node, client).await
    }

    async fn displace(
        &self,
        node: &NodeId,
        client: &ClientId,
        by: Epoch,
    ) -> Result<Displaced, StoreError> {
        self.find(node)?.displace(node, client, by).await
    }

    async fn session_changed(&self, node: &NodeId, client: &ClientId) -> Result<(), StoreError> {
        self.find(node)?.session_changed(node, client).await
    }

    async fn bans(&self, _: Option<&BanTarget>, _: usize) -> Result<Vec<BanView>, StoreError> {
        Ok(Vec::new())
    }

    async fn ban_changed(&self, _: &BanTarget) -> Result<bool, StoreError> {
        Ok(false)
    }

    async fn sessions(
        &self,
        node: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError> {
        self.find(node)?.sessions(node, clients).await
    }

    async fn publish(&self, _: MessageId, _: Publish) -> Result<Published, StoreError> {
        Err(StoreError::Unavailable("nobody to ask".to_owned()))
    }
}

/// Everything that was told of devices, in order.
#[derive(Default)]
pub(crate) struct Told(Mutex<Vec<Presence>>);

impl Events for Told {
    fn presence(&self, presence: Presence) {
        self.0.lock().push(presence);
    }
}

impl Told {
    /// What was told of one: `online`, or why it went offline.
    pub(crate) fn of(&self, client: &str) -> Vec<&'static str> {
        let told = self.0.lock();
        let told = told.iter().filter(|told| told.client.as_str() == client);
        told.map(|told| match told.change {
            PresenceChange::Online => "online",
            PresenceChange::Offline { reason } => reason,
        })
        .collect()
    }
}

/// One node.
pub(crate) struct TestNode {
    pub(crate) id: NodeId,
    pub(crate) mqtt: SocketAddr,
    pub(crate) node: AccessNode,
}

/// All of them.
pub(crate) struct World {
    pub(crate) redis: RedisServer,
    pub(crate) stores: Stores,
    pub(crate) shards: Arc<dyn Shards>,
    pub(crate) told: Arc<Told>,
    pub(crate) directory: Arc<Directory>,
    vhost: VirtualHost,
    _upstream: TempDir,
    upstream: Arc<EmbeddedStore>,
}

impl World {
    pub(crate) async fn new() -> Self {
        let redis = RedisServer::start().await;
        let folder = tempfile::tempdir().unwrap();
        let config = EmbeddedConfig {
            data_dir: folder.path().join("data"),
            ..EmbeddedConfig::default()
        };
        let upstream = EmbeddedStore::open(config).unwrap();
        let (stores, shards) = stores(&redis.url(), &upstream);
        Self {
            redis,
            stores,
            shards,
            told: Arc::default(),
            directory: Arc::default(),
            vhost: RabbitServer::shared().await.vhost().await,
            _upstream: folder,
            upstream,
        }
    }

    pub(crate) async fn node(&self, name: &str) -> TestNode {
        self.node_on(name, &self.redis.url()).await
    }

    /// A node that reaches Redis at `url`.
    pub(crate) async fn node_on(&self, name: &str, url: &str) -> TestNode {
        self.node_for(name, url, Access::default()).await
    }

    /// A node that lets in whom `access` says.
    pub(crate) async fn node_for(&self, name: &str, url: &str, access: Access) -> TestNode {
        let (stores, redis) = stores(url, &self.upstream);
        let id = NodeId::for_this_run(name);
        let mut config = Config {
            threads: 1,
            ..Config::default()
        };
        config.flapping.client_connects = 0;
        let rabbit = RabbitConfig {
            url: self.vhost.url.clone(),
            ..RabbitConfig::default()
        };
        let pubsub = RabbitPubSub::open(&rabbit, &id, redis.clone());
        let cluster = Cluster {
            shards: redis,
            peers: self.directory.clone(),
            pubsub,
            events: self.told.clone(),
            address: String::new(),
            region: String::new(),
            server_reference: format!("{name}.example"),
        };
        let filter = TopicFilter::parse(UpstreamRoutes::DEFAULT_FILTER.into()).unwrap();
        let routes = UpstreamRoutes::new(filter, Vec::new());
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let mqtt = socket.local_addr().unwrap();
        let listener = ListenerConfig {
            name: name.to_owned(),
            protocol: Protocol::Mqtt,
            address: mqtt,
            proxy_protocol_from: Vec::new(),
            connections_max: None,
            half_open_max: None,
            connects_per_second: None,
            handshake_timeout: None,
            packet_bytes_max: None,
            tls: None,
        };
        let settings = ListenerSettings::load(&listener, &config).unwrap();
        let started = AccessNode::start(
            id.clone(),
            config,
            access,
            stores,
            routes,
            DelayRules::default(),
            Some(cluster),
        );
        let mut node = started.await.unwrap();
        node.listen(&socket, settings).unwrap();
        self.directory
            .nodes
            .lock()
            .insert(id.clone(), node.local_nodes());
        TestNode { id, mqtt, node }
    }

    /// Ends a node as a killed process ends: nothing of it says goodbye.
    pub(crate) fn kill(&self, node: TestNode) {
        self.directory.nodes.lock().remove(&node.id);
        drop(node);
    }

    /// Cuts the way to a node, not that of the node to the store.
    pub(crate) fn cut_off(&self, node: &TestNode) {
        self.directory.nodes.lock().remove(&node.id);
    }

    /// Undoes [`Self::cut_off`].
    pub(crate) fn reconnect(&self, node: &TestNode) {
        let mut nodes = self.directory.nodes.lock();
        nodes.insert(node.id.clone(), node.node.local_nodes());
    }

    /// A push of QoS 1 as the push service does it.
    pub(crate) async fn push(&self, to: &str, payload: &str) {
        let client = client(to);
        let message = Message {
            id: MessageId::generate(),
            origin: Origin::Push,
            topic: TopicName::parse(format!("d/{to}/push").as_str().into()).unwrap(),
            qos: QoS::AtLeastOnce,
            retain: false,
            properties: None,
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            accepted_at_ms: unix_ms(),
            expires_at_ms: None,
            collapse_key: None,
            share: None,
        };
        let append = Append {
            client: client.clone(),
            message: message.clone(),
            fingerprint: None,
        };
        let outcome = self
            .stores
            .inboxes
            .append(vec![append])
            .await
            .unwrap()
            .pop();
        if let Some(Appended::Stored { position, route }) = outcome {
            if let Some(route) = route {
                let position = Some(position);
                let delivery = Delivery {
                    client,
                    position,
                    message,
                };
                self.directory.deliver(&route.node, vec![delivery]).await;
            }
        } else {
            panic!("not stored: {outcome:?}");
        }
    }

    /// The payloads that wait for a client.
    pub(crate) async fn waiting(&self, of: &str) -> Vec<String> {
        let page = self
            .stores
            .inboxes
            .read(&client(of), Position::START, 1_000, 1 << 20)
            .await
            .unwrap();
        let entries = page.entries.into_iter();
        entries
            .map(|entry| String::from_utf8(entry.message.payload.to_vec()).unwrap())
            .collect()
    }
}

fn stores(url: &str, upstream: &Arc<EmbeddedStore>) -> (Stores, Arc<RedisStore>) {
    let config = RedisConfig {
        url: url.to_owned(),
        ..RedisConfig::default()
    };
    let redis = RedisStore::open(&config, Limits::default()).unwrap();
    let stores = Stores {
        routes: redis.clone(),
        inboxes: redis.clone(),
        sessions: redis.clone(),
        retained: redis.clone(),
        bans: redis.clone(),
        upstream: upstream.clone(),
        jobs: redis.jobs(),
    };
    (stores, redis)
}

pub(crate) fn client(id: &str) -> ClientId {
    ClientId::parse(id).unwrap()
}
