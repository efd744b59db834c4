//! Accept loops. They only accept and refuse: everything that a peer could delay happens in its own task.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use moorline_router::StoreError;

use crate::admission::{Admitted, Gate, Open};
use crate::certificates;
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
    pub(crate) settings: Arc<ListenerSettings>,
    gate: Arc<Gate>,
}

impl Listener {
    pub(crate) fn new(node: Arc<Node>, settings: ListenerSettings) -> Self {
        let gate = node.admission.listener_gate(settings.gate);
        Self {
            node,
            settings: Arc::new(settings),
            gate,
        }
    }

    /// Decides about a connection that was just accepted. Where a proxy will name the device, its
    /// address counts only then.
    fn admit(&self, from: SocketAddr) -> Option<Admitted> {
        let proxied = !self.settings.proxy_protocol_from.is_empty();
        let address = (!proxied).then(|| from.ip());
        let node = &self.node;
        let admitted = node.admission.accept(&self.gate, address, &node.clock);
        admitted
            .map_err(|refusal| node.refused(refusal, &self.settings.name, from))
            .ok()
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
    let mut failing = false;
    loop {
        match socket.accept().await {
            Ok((stream, from)) => {
                failing = false;
                if let Some(admitted) = listener.admit(from) {
                    let handshake = handshake(Arc::clone(&listener), stream, admitted);
                    tokio::spawn(serve(Box::pin(handshake)));
                }
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

/// Reads certificates again when their files change.
pub(crate) async fn watch_certificates(settings: Arc<ListenerSettings>, wake: Arc<Notify>) {
    let mut every = tokio::time::interval(certificates::LOOK_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let anyway = tokio::select! {
            _ = every.tick() => false,
            () = wake.notified() => true,
        };
        let settings = Arc::clone(&settings);
        let refresh = tokio::task::spawn_blocking(move || {
            if let Some(certificates) = &settings.tls {
                certificates.refresh(&settings.name, anyway);
            }
        });
        // It has said what went wrong.
        let _ = refresh.await;
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
        open,
    }) = handshake.await
    else {
        return;
    };
    let reason = connection.run(turn).await;
    Box::pin(ending::finish(connection, reason)).await;
    drop(open);
}

/// A connection whose handshake is over.
struct Begun {
    connection: Box<Connection>,
    /// What came of the packets that followed the CONNECT at once.
    turn: Result<(), CloseReason>,
    open: Open,
}

async fn handshake(
    listener: Arc<Listener>,
    stream: TcpStream,
    admitted: Admitted,
) -> Option<Begun> {
    let Listener { node, settings, .. } = &*listener;
    let Admitted {
        open,
        mut half_open,
    } = admitted;
    let mut peer = Peer::of(&stream, Arc::clone(settings));
    // Small packets must not wait for each other; a failure only costs latency.
    let _ = stream.set_nodelay(true);
    let result = handshake::accept(node, stream, &mut peer, &mut half_open).await;
    drop(half_open);
    match result {
        Ok((mut connection, first)) => {
            let turn = connection.begin(first);
            Some(Begun {
                connection: Box::new(connection),
                turn,
                open,
            })
        }
        Err(error) => {
            refused(&listener, peer.address, &error);
            None
        }
    }
}

/// Counts and logs a handshake that came to nothing.
fn refused(listener: &Listener, peer: Option<SocketAddr>, error: &HandshakeError) {
    let node = &listener.node;
    node.metrics.refused(error.label());
    let Some(suppressed) = node.log_limit.allows(node.clock.now_s()) else {
        return;
    };
    let listener = &listener.settings.name;
    if let HandshakeError::Store(error @ StoreError::Stale { .. }) = error {
        tracing::info!(%listener, ?peer, %error, suppressed, "the device connected elsewhere meanwhile");
    } else if let HandshakeError::Store(error) = error {
        tracing::warn!(%listener, ?peer, %error, suppressed, "device refused, the store does not answer");
    } else {
        tracing::info!(%listener, ?peer, %error, suppressed, "no MQTT session");
    }
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
