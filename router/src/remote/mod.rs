//! The seam [`Nodes`](crate::Nodes) between processes: gRPC, package `moorline.node.v1`.
//!
//! ```text
//! push-service ─▶ RemoteNodes ─▶ lane (a stream of batches, one of two a peer) ─▶ serve ─▶ the node's own Nodes
//!                     └────────── single calls: disconnect, displace, sessions, bans …  ──▶
//! ```
//!
//! Hints travel in batches over streams that stay open; each batch is answered with one outcome a hint. A hint never waits
//! long: a node that is out of reach makes it [`Busy`](crate::DeliveryOutcome::Busy), and the inbox has the message. It keeps no
//! state that could be lost.
//!
//! Read in this order: `messages` (what is said), [`security`] (who may say it), `server`, `lane` (one stream of
//! batches), `peer` (one node), `directory` (which nodes there are), `client`.

mod client;
mod directory;
mod lane;
mod messages;
mod peer;
pub mod security;
mod server;
mod status;

use std::time::Duration;

pub use client::RemoteNodes;
pub use security::{InvalidSecurity, Security, Tls};
pub use server::{ServeError, serve};

/// The service, as it stands in the path of a call.
macro_rules! method {
    ($name:literal) => {
        concat!("/moorline.node.v1.Node/", $name)
    };
}

/// The paths of the calls.
mod path {
    pub(super) const DELIVER: &str = method!("Deliver");
    pub(super) const DISCONNECT: &str = method!("Disconnect");
    pub(super) const DISPLACE: &str = method!("Displace");
    pub(super) const SESSION_CHANGED: &str = method!("SessionChanged");
    pub(super) const SESSIONS: &str = method!("Sessions");
    pub(super) const BANS: &str = method!("Bans");
    pub(super) const BAN_CHANGED: &str = method!("BanChanged");
}

/// In the metadata of every call and answer: the version of the program that sent it.
const VERSION_KEY: &str = "moorline-version";
/// In the metadata of the answer to `Deliver`: how many batches may be unanswered.
const WINDOW_KEY: &str = "moorline-window";
/// In the metadata of an error: the epoch in force.
const EPOCH_KEY: &str = "moorline-epoch";

/// Streams of hints to one node; each keeps the order of its clients.
const LANES: usize = 2;
/// Hints of one batch, unless one caller brought more at once.
const BATCH_MAX: usize = 64;
/// Bytes of messages after which a batch is closed.
const BATCH_BYTES: usize = 1 << 20;
/// Batches of one stream that are not answered yet.
const WINDOW: usize = 8;
/// Windows of HTTP/2: bytes that one stream, or one connection, may have on its way.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// The largest batch that is read: more than the largest MQTT message.
const MESSAGE_BYTES_MAX: usize = 272 << 20;
/// For a connection to be made, and for a stream to be opened on it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// For the answer to a batch.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// For the answer to a single call. Longer than a node takes to end a connection that is displaced.
const CALL_TIMEOUT: Duration = Duration::from_secs(6);
/// A connection on which nothing comes is asked for a sign of life.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
