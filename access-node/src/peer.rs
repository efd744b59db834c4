//! Who is at the other end of a connection, as far as its transport knows.

use std::net::SocketAddr;

use tokio::net::TcpStream;

/// What is known of a device before it has said anything in MQTT.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// Where it connects from. `None` once it is gone again.
    pub(crate) address: Option<SocketAddr>,
}

impl Peer {
    /// What the socket itself tells.
    pub(crate) fn of(stream: &TcpStream) -> Self {
        Self {
            address: stream.peer_addr().ok(),
        }
    }
}
