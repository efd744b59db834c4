//! One access node as another process reaches it: two lanes for hints, one connection for single calls.

use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use futures_util::Stream;
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::lane::Lane;
use super::messages::{DeliverAnswer, DeliverBatch};
use super::{
    CALL_TIMEOUT, CONNECT_TIMEOUT, CONNECTION_WINDOW, LANES, MESSAGE_BYTES_MAX, PING_EVERY,
    PING_TIMEOUT, STREAM_WINDOW, Security, VERSION_KEY, path, status,
};
use crate::{Delivery, DeliveryOutcome, NodeId, StoreError};

/// How long a node that did not answer is not asked again, but by one caller that tries.
const ILL_FOR: Duration = Duration::from_secs(1);

/// A node in another process.
pub(super) struct Peer {
    pub(super) address: String,
    lanes: [Lane; LANES],
    calls: Line,
    hasher: RandomState,
}

impl Peer {
    /// No connection is made before it is needed.
    pub(super) fn new(
        node: &NodeId,
        address: &str,
        security: &Security,
    ) -> Result<Self, StoreError> {
        let health = Arc::<Health>::default();
        let line = || Line::new(address, security, &health);
        Ok(Self {
            address: address.to_owned(),
            lanes: [
                Lane::start(node.clone(), line()?),
                Lane::start(node.clone(), line()?),
            ],
            calls: line()?,
            hasher: RandomState::with_seeds(1, 2, 3, 4),
        })
    }

    /// Hands hints to the lanes of their clients; one outcome a hint, in order. They take their places in the lanes
    /// when this is called.
    pub(super) fn deliver(
        &self,
        deliveries: Vec<Delivery>,
    ) -> impl Future<Output = Vec<DeliveryOutcome>> + Send + use<> {
        let number = deliveries.len();
        let mut parts: [(Vec<usize>, Vec<Delivery>); LANES] = Default::default();
        for (place, delivery) in deliveries.into_iter().enumerate() {
            let hash = self.hasher.hash_one(delivery.client.as_str());
            let lane = usize::try_from(hash % LANES as u64).expect("few lanes");
            parts[lane].0.push(place);
            parts[lane].1.push(delivery);
        }
        let parts = parts.into_iter().zip(&self.lanes);
        let parts: Vec<_> = parts
            .filter(|((places, _), _)| !places.is_empty())
            .map(|((places, part), lane)| (places, lane.deliver(part)))
            .collect();
        async move {
            let mut outcomes = vec![DeliveryOutcome::Busy; number];
            for (places, answer) in parts {
                for (place, outcome) in places.into_iter().zip(answer.await) {
                    outcomes[place] = outcome;
                }
            }
            outcomes
        }
    }

    /// One call. Fails at once while the node is known not to answer.
    pub(super) async fn call<Q, A>(&self, path: &'static str, asked: Q) -> Result<A, StoreError>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        if !self.calls.health.may_try() {
            return Err(out_of_reach(&self.address, "it did not answer just now"));
        }
        let called = tokio::time::timeout(CALL_TIMEOUT, self.calls.unary(path, asked)).await;
        match called {
            Ok(Ok(answer)) => {
                self.calls.is_well();
                Ok(answer)
            }
            Ok(Err(status)) if is_of_transport(&status) => {
                self.calls.is_ill();
                Err(out_of_reach(&self.address, status.message()))
            }
            Ok(Err(status)) => {
                self.calls.is_well();
                Err(status::to_error(&status))
            }
            Err(_) => {
                self.calls.is_ill();
                Err(out_of_reach(&self.address, "no answer in time"))
            }
        }
    }
}

fn out_of_reach(address: &str, why: &str) -> StoreError {
    StoreError::Unavailable(format!("access node at {address} is out of reach: {why}"))
}

/// Whether the call did not get to the node, rather than that the node answered so.
fn is_of_transport(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Whether the node answers, as its lanes and calls have seen.
#[derive(Default)]
struct Health {
    /// Not asked before this, but by one caller.
    ill_until: Mutex<Option<Instant>>,
}

impl Health {
    fn may_try(&self) -> bool {
        let mut ill_until = self.ill_until.lock();
        let now = Instant::now();
        match *ill_until {
            Some(until) if now < until => false,
            // This one tries; the others wait for what comes of it.
            Some(_) => {
                *ill_until = Some(now + CALL_TIMEOUT);
                true
            }
            None => true,
        }
    }
}

/// A connection to a node, made when it is needed and again when it broke.
#[derive(Clone)]
pub(super) struct Line {
    channel: Channel,
    security: Security,
    health: Arc<Health>,
}

impl Line {
    fn new(address: &str, security: &Security, health: &Arc<Health>) -> Result<Self, StoreError> {
        let unusable = |error| StoreError::Unavailable(format!("node address {address}: {error}"));
        let scheme = if security.is_encrypted() {
            "https"
        } else {
            "http"
        };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(unusable)?;
        let mut endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true);
        if let Some(tls) = security.of_client() {
            endpoint = endpoint.tls_config(tls).map_err(unusable)?;
        }
        Ok(Self {
            channel: endpoint.connect_lazy(),
            security: security.clone(),
            health: Arc::clone(health),
        })
    }

    pub(super) fn is_well(&self) {
        *self.health.ill_until.lock() = None;
    }

    pub(super) fn is_ill(&self) {
        *self.health.ill_until.lock() = Some(Instant::now() + ILL_FOR);
    }

    fn request<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        if let Some(bearer) = self.security.bearer() {
            metadata.insert("authorization", bearer.clone());
        }
        let version = env!("CARGO_PKG_VERSION").parse();
        metadata.insert(
            VERSION_KEY,
            version.expect("a version can stand in metadata"),
        );
        request
    }

    async fn ready(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        grpc.ready()
            .await
            .map_err(|error| Status::from_error(error.into()))?;
        Ok(grpc)
    }

    async fn unary<Q, A>(&self, path: &'static str, asked: Q) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let path = PathAndQuery::from_static(path);
        let codec = ProstCodec::<Q, A>::default();
        let mut grpc = self.ready().await?;
        let answer = grpc.unary(self.request(asked), path, codec).await?;
        Ok(answer.into_inner())
    }

    /// Opens a stream of batches; resolves when the node has agreed to it.
    pub(super) async fn stream(
        &self,
        batches: impl Stream<Item = DeliverBatch> + Send + 'static,
    ) -> Result<Response<Streaming<DeliverAnswer>>, Status> {
        let path = PathAndQuery::from_static(path::DELIVER);
        let codec = ProstCodec::<DeliverBatch, DeliverAnswer>::default();
        let mut grpc = self.ready().await?;
        grpc.streaming(self.request(batches), path, codec).await
    }
}
