//! Accept loops. They only accept: everything that a peer could delay happens in its own task.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};

use crate::close_reason::CloseReason;
use crate::connection::Connection;
use crate::ending;
use crate::handshake::{self, HandshakeError};
use crate::node::Node;
use crate::peer::{ListenerSettings, Peer};

/// Rest after an error that accepting again at once would only repeat, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that devices come to.
pub(crate) struct Listener {
    node: Arc<Node>,
    settings: Arc<ListenerSettings>,
    connections: AtomicUsize,
}

impl Listener {
    pub(crate) fn new(node: Arc<Node>, settings: ListenerSettings) -> Self {
        Self {
            node,
            settings: Arc::new(settings),
            connections: AtomicUsize::new(0),
        }
    }

    /// Counts one socket until the guard is dropped; `None` where there are too many.
    fn count(self: &Arc<Self>) -> Option<Counted> {
        let max = self.settings.connections_max;
        let counted = self
            .connections
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| {
                (open < max).then_some(open + 1)
            });
        counted.ok()?;
        self.node.connection_opened();
        Some(Counted {
            listener: Arc::clone(self),
        })
    }
}

/// One open socket.
struct Counted {
    listener: Arc<Listener>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.listener.connections.fetch_sub(1, Ordering::AcqRel);
        self.listener.node.connection_closed();
    }
}

/// Accepts until the task is dropped.
pub(crate) async fn run(listener: Arc<Listener>, socket: std::net::TcpListener) {
    let name = &listener.settings.name;
    let socket = match TcpListener::from_std(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(listener = %name, %error, "cannot wait for connections");
            return;
        }
    };
    let (mut failing, mut full) = (false, false);
    loop {
        match socket.accept().await {
            Ok((stream, _)) => {
                failing = false;
                let Some(counted) = listener.count() else {
                    if !full {
                        tracing::warn!(listener = %name, max = listener.settings.connections_max, "connections refused, there are too many");
                    }
                    full = true;
                    listener.node.metrics.connects_refused.increment(1);
                    continue;
                };
                full = false;
                tokio::spawn(serve(Box::pin(handshake(stream, counted))));
            }
            Err(error) if is_of_one_peer(&error) => {}
            Err(error) => {
                if !failing {
                    tracing::warn!(listener = %name, %error, "cannot accept connections");
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

async fn handshake(stream: TcpStream, counted: Counted) -> Option<Begun> {
    let Listener { node, settings, .. } = &*counted.listener;
    let peer = Peer::of(&stream, Arc::clone(settings));
    let address = peer.address;
    // Small packets must not wait for each other; a failure only costs latency.
    let _ = stream.set_nodelay(true);
    match handshake::accept(node, stream, peer).await {
        Ok((mut connection, first)) => {
            let turn = connection.begin(first);
            return Some(Begun {
                connection: Box::new(connection),
                turn,
                counted,
            });
        }
        Err(HandshakeError::Store(error)) => {
            tracing::warn!(listener = %settings.name, peer = ?address, %error, "device refused, the store does not answer");
        }
        Err(error) => {
            tracing::info!(listener = %settings.name, peer = ?address, %error, "no MQTT session");
        }
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
