//! Accept loops. They only accept: everything that a peer could delay happens in its own task.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use crate::ending;
use crate::handshake::{self, HandshakeError};
use crate::node::{Counted, Node};
use crate::session::Transport;

/// Rest after an error that accepting again at once would only repeat, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the task is dropped.
pub(crate) async fn run(node: Arc<Node>, listener: TcpListener, transport: Transport) {
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                failing = false;
                let counted = node.count_connection();
                tokio::spawn(serve(Arc::clone(&node), stream, transport, counted));
            }
            Err(error) if is_of_one_peer(&error) => {}
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "cannot accept connections");
                }
                failing = true;
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether the error concerns a peer that is gone again, not this process.
fn is_of_one_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// One connection from the first byte to the last. The beginning and the end are boxed: in
/// between, which is most of the time, the task holds only what waiting needs.
async fn serve(node: Arc<Node>, stream: TcpStream, transport: Transport, counted: Counted) {
    let accepted = Box::pin(handshake(&node, stream, transport)).await;
    drop(node);
    let Some((mut connection, first)) = accepted else {
        return;
    };
    let reason = connection.run(first).await;
    Box::pin(ending::finish(connection, reason)).await;
    drop(counted);
}

async fn handshake(
    node: &Arc<Node>,
    stream: TcpStream,
    transport: Transport,
) -> Option<(crate::connection::Connection, bytes::Bytes)> {
    let peer = stream.peer_addr().ok();
    // Small packets must not wait for each other; a failure only costs latency.
    let _ = stream.set_nodelay(true);
    match handshake::accept(node, stream, transport).await {
        Ok(connected) => return Some(connected),
        Err(HandshakeError::Store(error)) => {
            tracing::warn!(?peer, %error, "device refused, the store does not answer");
        }
        Err(error) => tracing::info!(?peer, %error, "no MQTT session"),
    }
    node.metrics.connects_refused.increment(1);
    None
}
