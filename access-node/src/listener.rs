//! Accept loops. They only accept: everything that a peer could delay happens in its own task.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};

use crate::close_reason::CloseReason;
use crate::connection::Connection;
use crate::ending;
use crate::handshake::{self, HandshakeError};
use crate::node::{Counted, Node};
use crate::peer::Peer;
use crate::session::Transport;

/// Rest after an error that accepting again at once would only repeat, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the task is dropped.
pub(crate) async fn run(node: Arc<Node>, listener: std::net::TcpListener, transport: Transport) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot wait for connections");
            return;
        }
    };
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                failing = false;
                let counted = node.count_connection();
                let handshake = handshake(Arc::clone(&node), stream, transport, counted);
                tokio::spawn(serve(Box::pin(handshake)));
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

/// One connection from the first byte to the last. What waits for most of that time is a pointer to
/// the connection: the beginning and the end are boxed and gone when they are over.
async fn serve(handshake: BoxFuture<'static, Option<Begun>>) {
    let Some(Begun {
        mut connection,
        turn,
        counted,
    }) = handshake.await
    else {
        return;
    };
    let reason = connection.run(turn).await;
    Box::pin(ending::finish(connection, reason)).await;
    drop(counted);
}

/// A connection whose handshake is over.
struct Begun {
    connection: Box<Connection>,
    /// What came of the packets that followed the CONNECT at once.
    turn: Result<(), CloseReason>,
    counted: Counted,
}

async fn handshake(
    node: Arc<Node>,
    stream: TcpStream,
    transport: Transport,
    counted: Counted,
) -> Option<Begun> {
    let peer = Peer::of(&stream);
    // Small packets must not wait for each other; a failure only costs latency.
    let _ = stream.set_nodelay(true);
    match handshake::accept(&node, stream, transport).await {
        Ok((mut connection, first)) => {
            let turn = connection.begin(first);
            return Some(Begun {
                connection: Box::new(connection),
                turn,
                counted,
            });
        }
        Err(HandshakeError::Store(error)) => {
            tracing::warn!(peer = ?peer.address, %error, "device refused, the store does not answer");
        }
        Err(error) => tracing::info!(peer = ?peer.address, %error, "no MQTT session"),
    }
    node.metrics.connects_refused.increment(1);
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each connected device keeps one such future for as long as it is connected, nearly all of the
    /// time in the wait of `Connection::run`. Growth here is memory per idle device.
    #[test]
    fn the_task_of_a_connection_is_small() {
        let size = size_of_val(&serve(Box::pin(std::future::ready(None))));
        assert!(size <= 72, "the task of a connection grew to {size} bytes");
    }
}
