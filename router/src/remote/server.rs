//! The internal listener of an access node.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{BoxFuture, ready};
use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::Grpc;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::messages::{
    BansAnswer, BansAsked, DeliverAnswer, DeliverBatch, DisplaceAnswer, Found, NotUnderstood,
    OfClient, SessionsAnswer, SessionsAsked, WireSession, WireTarget, client,
};
use super::{
    CONNECTION_WINDOW, MESSAGE_BYTES_MAX, PING_EVERY, PING_TIMEOUT, STREAM_WINDOW, Security,
    VERSION_KEY, WINDOW, WINDOW_KEY, path, status,
};
use crate::{BanTarget, Delivery, DeliveryOutcome, Displaced, Epoch, NodeId, Nodes, StoreError};

/// Single calls that run at once; more are refused, and their callers may try again.
const CALLS_MAX: usize = 512;
/// Streams and calls of one connection.
const STREAMS_MAX: u32 = 1024;
/// Rest after an error that accepting again at once would only repeat, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the internal listener ended, or did not begin.
#[derive(Debug, thiserror::Error)]
#[error("the internal listener failed: {0}")]
pub struct ServeError(#[from] tonic::transport::Error);

/// Answers other services for `nodes`, the node of this process, until `shutdown` resolves: then what is being answered
/// is finished and the streams end.
///
/// # Errors
/// When certificates cannot be used, or the listener fails.
pub async fn serve(
    listener: TcpListener,
    nodes: Arc<dyn Nodes>,
    security: Security,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let (stop_sender, stop) = watch::channel(false);
    let mut server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT));
    if let Some(tls) = security.of_server() {
        server = server.tls_config(tls)?;
    }
    let service = NodeService(Arc::new(Shared {
        nodes,
        security,
        calls: Semaphore::new(CALLS_MAX),
        stop,
    }));
    let shutdown = async {
        shutdown.await;
        stop_sender.send_replace(true);
    };
    server
        .serve_with_incoming_shutdown(service, connections(listener), shutdown)
        .await?;
    Ok(())
}

/// Connections as they come. An error of accepting is no end.
fn connections(listener: TcpListener) -> impl Stream<Item = std::io::Result<TcpStream>> {
    stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Small answers must not wait for each other; a failure only costs latency.
                    let _ = stream.set_nodelay(true);
                    return Some((Ok(stream), listener));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept internal connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

struct Shared {
    nodes: Arc<dyn Nodes>,
    security: Security,
    calls: Semaphore,
    stop: watch::Receiver<bool>,
}

#[derive(Clone)]
struct NodeService(Arc<Shared>);

impl Service<http::Request<Body>> for NodeService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        let authorization = request.headers().get(http::header::AUTHORIZATION);
        if !shared
            .security
            .admits(authorization.map(http::HeaderValue::as_bytes))
        {
            tracing::warn!("an internal call with a wrong or no cluster.secret was refused");
            let status = Status::unauthenticated("the secret of this cluster is another");
            return Box::pin(ready(Ok(status.into_http())));
        }
        Box::pin(async move {
            let mut response = dispatch(shared, request).await;
            let version = http::HeaderValue::from_static(env!("CARGO_PKG_VERSION"));
            response.headers_mut().insert(VERSION_KEY, version);
            Ok(response)
        })
    }
}

async fn dispatch(shared: Arc<Shared>, request: http::Request<Body>) -> http::Response<Body> {
    if request.uri().path() == path::DELIVER {
        let codec = ProstCodec::<DeliverAnswer, DeliverBatch>::default();
        let mut grpc = Grpc::new(codec).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let deliver = Call(move |request| ready(Ok(deliver(&shared, request))));
        return grpc.streaming(deliver, request).await;
    }
    let Ok(_permit) = shared.calls.try_acquire() else {
        return Status::unavailable("too many calls at once").into_http();
    };
    let nodes = Arc::clone(&shared.nodes);
    match request.uri().path() {
        path::DISCONNECT => unary(request, |asked| disconnect(nodes, asked)).await,
        path::DISPLACE => unary(request, |asked| displace(nodes, asked)).await,
        path::SESSION_CHANGED => unary(request, |asked| session_changed(nodes, asked)).await,
        path::SESSIONS => unary(request, |asked| sessions(nodes, asked)).await,
        path::BANS => unary(request, |asked| bans(nodes, asked)).await,
        path::BAN_CHANGED => unary(request, |asked| ban_changed(nodes, asked)).await,
        // A later version's: the caller does without.
        path => Status::unimplemented(format!("there is no {path} in this version")).into_http(),
    }
}

/// A function as a service.
struct Call<F>(F);

impl<F, Q, A, Answered> Service<Request<Q>> for Call<F>
where
    F: FnMut(Request<Q>) -> Answered,
    Answered: Future<Output = Result<Response<A>, Status>>,
{
    type Response = Response<A>;
    type Error = Status;
    type Future = Answered;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Q>) -> Answered {
        (self.0)(request)
    }
}

async fn unary<Q, A, Answered>(
    request: http::Request<Body>,
    answer: impl FnOnce(Q) -> Answered + Send,
) -> http::Response<Body>
where
    Q: prost::Message + Default + Send + 'static,
    A: prost::Message + Send + 'static,
    Answered: Future<Output = Result<A, Failed>> + Send,
{
    let codec = ProstCodec::<A, Q>::default();
    let mut grpc = Grpc::new(codec).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut answer = Some(answer);
    let call = Call(move |request: Request<Q>| {
        let answered = answer.take().map(|answer| answer(request.into_inner()));
        async move {
            match answered {
                Some(answered) => Ok(Response::new(answered.await?)),
                None => Err(Status::internal("called twice")),
            }
        }
    });
    grpc.unary(call, request).await
}

/// Why a call has no answer.
enum Failed {
    Store(StoreError),
    NotUnderstood(NotUnderstood),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<NotUnderstood> for Failed {
    fn from(error: NotUnderstood) -> Self {
        Self::NotUnderstood(error)
    }
}

impl From<Failed> for Status {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Store(error) => status::of_error(&error),
            Failed::NotUnderstood(error) => Self::invalid_argument(error.to_string()),
        }
    }
}

/// One batch after the other: the next is read when the one before is answered, which keeps the order and slows down
/// whoever sends more than this node takes.
fn deliver(
    shared: &Shared,
    request: Request<Streaming<DeliverBatch>>,
) -> Response<BoxStream<'static, Result<DeliverAnswer, Status>>> {
    let nodes = Arc::clone(&shared.nodes);
    let mut stop = shared.stop.clone();
    let stopped = async move {
        // An error says that the sender is gone, which is the end too.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let answers = request.into_inner().then(move |batch| {
        let nodes = Arc::clone(&nodes);
        async move { Ok(answer(&*nodes, batch?).await) }
    });
    let mut response = Response::new(answers.take_until(Box::pin(stopped)).boxed());
    response.metadata_mut().insert(WINDOW_KEY, WINDOW.into());
    response
}

async fn answer(nodes: &dyn Nodes, batch: DeliverBatch) -> DeliverAnswer {
    let mut outcomes = vec![DeliveryOutcome::Busy; batch.deliveries.len()];
    let mut understood = Vec::with_capacity(batch.deliveries.len());
    let mut places = Vec::with_capacity(batch.deliveries.len());
    for (place, delivery) in batch.deliveries.into_iter().enumerate() {
        match Delivery::try_from(delivery) {
            Ok(delivery) => {
                understood.push(delivery);
                places.push(place);
            }
            // The inbox has it.
            Err(error) => tracing::debug!(%error, "a hint of another version is not understood"),
        }
    }
    let node = NodeId::from_text(&batch.node);
    let made = nodes.deliver(&node, understood).await;
    for (place, outcome) in places.into_iter().zip(made) {
        outcomes[place] = outcome;
    }
    DeliverAnswer {
        batch: batch.batch,
        outcomes: outcomes.into_iter().map(Into::into).collect(),
    }
}

async fn disconnect(nodes: Arc<dyn Nodes>, asked: OfClient) -> Result<Found, Failed> {
    let node = NodeId::from_text(&asked.node);
    let found = nodes.disconnect(&node, &client(&asked.client)?).await?;
    Ok(Found { found })
}

async fn displace(nodes: Arc<dyn Nodes>, asked: OfClient) -> Result<DisplaceAnswer, Failed> {
    let node = NodeId::from_text(&asked.node);
    let by = Epoch(asked.by);
    let Displaced {
        found,
        session_over,
    } = nodes.displace(&node, &client(&asked.client)?, by).await?;
    Ok(DisplaceAnswer {
        found,
        session_over,
    })
}

async fn session_changed(nodes: Arc<dyn Nodes>, asked: OfClient) -> Result<Found, Failed> {
    let node = NodeId::from_text(&asked.node);
    nodes
        .session_changed(&node, &client(&asked.client)?)
        .await?;
    Ok(Found { found: true })
}

async fn sessions(nodes: Arc<dyn Nodes>, asked: SessionsAsked) -> Result<SessionsAnswer, Failed> {
    let node = NodeId::from_text(&asked.node);
    let clients = asked.clients.iter().map(|text| client(text));
    let clients = clients.collect::<Result<Vec<_>, _>>()?;
    let views = nodes.sessions(&node, &clients).await?;
    let sessions = views.into_iter().map(|view| WireSession {
        view: view.map(Into::into),
    });
    Ok(SessionsAnswer {
        sessions: sessions.collect(),
    })
}

async fn bans(nodes: Arc<dyn Nodes>, asked: BansAsked) -> Result<BansAnswer, Failed> {
    let after = asked.after.map(BanTarget::try_from).transpose()?;
    let limit = usize::try_from(asked.limit).unwrap_or(usize::MAX);
    let bans = nodes.bans(after.as_ref(), limit).await?;
    Ok(BansAnswer {
        bans: bans.into_iter().map(Into::into).collect(),
    })
}

async fn ban_changed(nodes: Arc<dyn Nodes>, asked: WireTarget) -> Result<Found, Failed> {
    let found = nodes.ban_changed(&asked.try_into()?).await?;
    Ok(Found { found })
}
