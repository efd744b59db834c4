//! Made-up nodes behind the real listener, a made-up registry, and a cable that can be cut.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use moorline_mqtt::{Publish, QoS, TopicName, Version};
use moorline_router::remote::{RemoteNodes, Security, Tls, serve};
use moorline_router::{
    Ban, BanTarget, BanView, Claim, ClientId, Delivery, DeliveryOutcome, Displaced, Epoch, Message,
    MessageId, NodeId, NodeRecord, NodeState, Nodes, Origin, Position, Published, Route, Routes,
    SessionView, Standing, StoreError,
};
use moorline_tests::Authority as Signer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot, watch};
use tokio::task::JoinHandle;

pub(crate) fn node_id(name: &str) -> NodeId {
    NodeId::from_text(name)
}

pub(crate) fn client(name: &str) -> ClientId {
    ClientId::parse(name).unwrap()
}

pub(crate) fn delivery(to: &str, sequence: u64) -> Delivery {
    Delivery {
        client: client(to),
        position: Some(Position {
            generation: 1,
            sequence,
        }),
        message: Message {
            id: MessageId::parse(&format!("{to}-{sequence}")).unwrap(),
            origin: Origin::Push,
            topic: TopicName::from_static("d/car/push"),
            qos: QoS::AtLeastOnce,
            retain: false,
            properties: None,
            payload: Bytes::from(format!("{sequence}")),
            accepted_at_ms: 1,
            expires_at_ms: Some(2),
            collapse_key: None,
            share: None,
        },
    }
}

pub(crate) fn view() -> SessionView {
    SessionView {
        epoch: Epoch(7),
        address: "192.0.2.1:5".to_owned(),
        version: Version::V3_1_1,
        transport: "wss".to_owned(),
        keep_alive_s: 60,
        persistent: true,
        subscriptions: 3,
        in_flight: 2,
    }
}

/// A node that does as it is told.
pub(crate) struct MadeUpNode {
    id: NodeId,
    pub(crate) address: SocketAddr,
    outcomes: Mutex<HashMap<ClientId, DeliveryOutcome>>,
    delivered: Mutex<Vec<Delivery>>,
    pub(crate) calls: AtomicUsize,
    entered: Notify,
    /// Taken by a test, it stops every delivery.
    gate: Semaphore,
    pub(crate) changed: Mutex<Vec<ClientId>>,
    bans: Mutex<Vec<BanView>>,
    pub(crate) bans_changed: Mutex<Vec<BanTarget>>,
    error: Mutex<Option<StoreError>>,
}

impl MadeUpNode {
    pub(crate) fn new(id: &str) -> Arc<Self> {
        Self::at(id, ([127, 0, 0, 1], 0).into())
    }

    fn at(id: &str, address: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            id: node_id(id),
            address,
            outcomes: Mutex::default(),
            delivered: Mutex::default(),
            calls: AtomicUsize::new(0),
            entered: Notify::new(),
            gate: Semaphore::new(1),
            changed: Mutex::default(),
            bans: Mutex::default(),
            bans_changed: Mutex::default(),
            error: Mutex::default(),
        })
    }

    pub(crate) fn outcome_of(&self, client_id: &str, outcome: DeliveryOutcome) {
        self.outcomes
            .lock()
            .unwrap()
            .insert(client(client_id), outcome);
    }

    pub(crate) fn delivered(&self) -> Vec<Delivery> {
        self.delivered.lock().unwrap().clone()
    }

    /// Stops every delivery until what is returned is dropped.
    pub(crate) fn hold(&self) -> SemaphorePermit<'_> {
        self.gate.try_acquire().unwrap()
    }

    /// A delivery has come, since the last time that this was asked.
    pub(crate) async fn entered(&self) {
        self.entered.notified().await;
    }

    pub(crate) fn bans<const N: usize>(&self, bans: [(Ban, bool); N]) {
        let views = bans.map(|(ban, automatic)| BanView { ban, automatic });
        *self.bans.lock().unwrap() = views.to_vec();
    }

    pub(crate) fn fail_with(&self, error: StoreError) {
        *self.error.lock().unwrap() = Some(error);
    }

    fn fails(&self) -> Result<(), StoreError> {
        match &*self.error.lock().unwrap() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Nodes for MadeUpNode {
    async fn deliver(&self, node: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        assert_eq!(*node, self.id);
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.entered.notify_one();
        let _gate = self.gate.acquire().await.unwrap();
        let outcomes = self.outcomes.lock().unwrap();
        let of = |hint: &Delivery| outcomes.get(&hint.client).copied();
        let sent = DeliveryOutcome::Sent { epoch: Epoch(7) };
        let made = deliveries.iter().map(|hint| of(hint).unwrap_or(sent));
        let made = made.collect();
        self.delivered.lock().unwrap().extend(deliveries);
        made
    }

    async fn disconnect(&self, _: &NodeId, client: &ClientId) -> Result<bool, StoreError> {
        self.fails()?;
        Ok(client.as_str() == "car")
    }

    async fn displace(&self, _: &NodeId, _: &ClientId, by: Epoch) -> Result<Displaced, StoreError> {
        self.fails()?;
        Ok(Displaced {
            found: by > Epoch(7),
            session_over: by > Epoch(8),
        })
    }

    async fn session_changed(&self, _: &NodeId, client: &ClientId) -> Result<(), StoreError> {
        self.changed.lock().unwrap().push(client.clone());
        Ok(())
    }

    async fn bans(
        &self,
        after: Option<&BanTarget>,
        limit: usize,
    ) -> Result<Vec<BanView>, StoreError> {
        let bans = self.bans.lock().unwrap();
        let bans = bans.iter().filter(|view| Some(&view.ban.target) > after);
        Ok(bans.take(limit).cloned().collect())
    }

    async fn ban_changed(&self, target: &BanTarget) -> Result<bool, StoreError> {
        self.bans_changed.lock().unwrap().push(target.clone());
        let bans = self.bans.lock().unwrap();
        Ok(bans.iter().any(|view| view.ban.target == *target))
    }

    async fn sessions(
        &self,
        _: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError> {
        let of = |client: &ClientId| (client.as_str() == "car").then(view);
        Ok(clients.iter().map(of).collect())
    }

    async fn publish(&self, _: MessageId, _: Publish) -> Result<Published, StoreError> {
        Ok(Published { matched: Some(1) })
    }
}

/// A node that listens; it ends with this.
pub(crate) struct Running {
    node: Arc<MadeUpNode>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl std::ops::Deref for Running {
    type Target = MadeUpNode;

    fn deref(&self) -> &MadeUpNode {
        &self.node
    }
}

impl Running {
    pub(crate) async fn stop(&mut self) {
        drop(self.stop.take());
        (&mut self.task).await.unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) async fn start(registry: &Registry, id: &str) -> Running {
    let address = ([127, 0, 0, 1], 0).into();
    start_at(registry, id, address, Security::default()).await
}

pub(crate) async fn start_at(
    registry: &Registry,
    id: &str,
    address: SocketAddr,
    security: Security,
) -> Running {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(64).unwrap();
    let node = MadeUpNode::at(id, listener.local_addr().unwrap());
    registry.add(id, &node.address.to_string());
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = serve(
        listener,
        Arc::clone(&node) as Arc<dyn Nodes>,
        security,
        async {
            let _ = stopped.await;
        },
    );
    let task = tokio::spawn(async move { serving.await.unwrap() });
    Running {
        node,
        stop: Some(stop),
        task,
    }
}

/// Knows nodes and routes as a test says.
#[derive(Default)]
pub(crate) struct Registry {
    nodes: Mutex<HashMap<NodeId, NodeRecord>>,
    routes: Mutex<HashMap<ClientId, Route>>,
    pub(crate) look_ups: AtomicUsize,
}

impl Registry {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn with_remote() -> (Arc<Self>, Arc<RemoteNodes>) {
        let registry = Self::new();
        let remote = registry.remote(Security::default());
        (registry, remote)
    }

    pub(crate) fn remote(self: &Arc<Self>, security: Security) -> Arc<RemoteNodes> {
        let routes = Arc::clone(self) as Arc<dyn Routes>;
        Arc::new(RemoteNodes::new(routes, security))
    }

    pub(crate) fn add(&self, id: &str, address: &str) {
        let record = NodeRecord {
            id: node_id(id),
            address: address.to_owned(),
            version: "0".to_owned(),
            state: NodeState::Up,
            connections: 0,
            region: String::new(),
            server_reference: String::new(),
        };
        self.nodes.lock().unwrap().insert(node_id(id), record);
    }

    pub(crate) fn route(&self, client_id: &str, route: Route) {
        self.routes.lock().unwrap().insert(client(client_id), route);
    }
}

#[async_trait]
impl Routes for Registry {
    async fn claim(&self, _: &ClientId, _: &NodeId) -> Result<Claim, StoreError> {
        unreachable!("nobody claims")
    }

    async fn release(&self, _: &ClientId, _: Epoch) -> Result<bool, StoreError> {
        unreachable!("nobody claims")
    }

    async fn look_up(&self, client: &ClientId) -> Result<Option<Route>, StoreError> {
        self.look_ups.fetch_add(1, Ordering::Relaxed);
        Ok(self.routes.lock().unwrap().get(client).cloned())
    }

    async fn list(
        &self,
        _: Option<&ClientId>,
        _: usize,
    ) -> Result<Vec<(ClientId, Route)>, StoreError> {
        unreachable!("nobody lists")
    }

    async fn renew(&self, _: NodeRecord, _: u64) -> Result<bool, StoreError> {
        unreachable!("nobody renews")
    }

    async fn reconcile(
        &self,
        _: &NodeId,
        _: &[(ClientId, Epoch)],
    ) -> Result<Vec<Standing>, StoreError> {
        unreachable!("nobody reconciles")
    }

    async fn leave(&self, _: &NodeId) -> Result<(), StoreError> {
        unreachable!("nobody leaves")
    }

    async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        Ok(self.nodes.lock().unwrap().values().cloned().collect())
    }
}

/// What a [`Cable`] does with bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    Whole,
    /// Connections stay and nothing comes through.
    Frozen,
    /// Connections are broken and none is made.
    Cut,
}

/// Stands between two processes.
pub(crate) struct Cable {
    pub(crate) address: SocketAddr,
    condition: watch::Sender<Condition>,
    task: JoinHandle<()>,
}

impl Cable {
    pub(crate) async fn to(far: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (condition, watched) = watch::channel(Condition::Whole);
        let task = tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                tokio::spawn(Self::carry(near, far, watched.clone()));
            }
        });
        Self {
            address,
            condition,
            task,
        }
    }

    async fn carry(near: TcpStream, far: SocketAddr, mut condition: watch::Receiver<Condition>) {
        if *condition.borrow() == Condition::Cut {
            return;
        }
        let far = TcpStream::connect(far).await.unwrap();
        let ((near_read, near_write), (far_read, far_write)) =
            (near.into_split(), far.into_split());
        let there = Self::pump(near_read, far_write, condition.clone());
        let back = Self::pump(far_read, near_write, condition.clone());
        tokio::select! {
            () = there => {}
            () = back => {}
            _ = condition.wait_for(|now| *now == Condition::Cut) => {}
        }
    }

    async fn pump(
        mut from: tokio::net::tcp::OwnedReadHalf,
        mut to: tokio::net::tcp::OwnedWriteHalf,
        mut condition: watch::Receiver<Condition>,
    ) {
        let mut buffer = vec![0; 65_536];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            if condition
                .wait_for(|now| *now != Condition::Frozen)
                .await
                .is_err()
            {
                return;
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }

    pub(crate) fn cut(&self) {
        self.condition.send_replace(Condition::Cut);
    }

    pub(crate) fn freeze(&self) {
        self.condition.send_replace(Condition::Frozen);
    }

    pub(crate) fn mend(&self) {
        self.condition.send_replace(Condition::Whole);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Longer than a list of nodes is taken for true.
pub(crate) const REGISTRY_SEEN: Duration = Duration::from_millis(2_200);

/// Signs certificates.
pub(crate) struct Authority(Signer);

impl Authority {
    pub(crate) fn new() -> Self {
        Self(Signer::new())
    }

    /// A certificate of this authority for somebody who trusts `trusted`.
    pub(crate) fn issue(&self, trusted: &Self) -> Tls {
        let signed = self.0.server("node");
        Tls {
            certificate: std::fs::read(signed.certificate).unwrap(),
            key: std::fs::read(signed.key).unwrap(),
            ca: std::fs::read(trusted.0.file()).unwrap(),
            server_name: None,
        }
    }
}

/// What the binary does when it starts.
pub(crate) fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
