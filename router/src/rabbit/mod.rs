//! Everything that is kept on RabbitMQ.
//!
//! Read in this order: [`config`], [`link`] (a connection that is made again when it is lost), [`topology`] (what
//! must exist before anything is published), [`publisher`] (the one way out: ordered, confirmed, bounded; `lane`, `window`, `confirms`), [`upstream`]
//! (the upstream bus: `envelope`, `partition`, `spread`), [`pubsub`], [`events`].
//!
//! Connections are made anew by this module and never recovered by the client library: after a loss nothing of the
//! old connection is in use, so that a confirm that arrives can only be about what went out on the new one. For the same reason a
//! channel that the broker closed takes its connection with it: frames of the old channel that were not yet
//! written would go out on a new channel of the same number and shift its delivery tags.

pub mod config;
pub mod events;
pub mod link;
pub mod publisher;
pub mod pubsub;
pub mod topology;
pub mod upstream;

mod confirms;
mod envelope;
mod lane;
mod metrics;
mod partition;
mod spread;
mod window;

pub use config::Config;
pub use events::RabbitEvents;
pub use link::Link;
pub use publisher::{Publisher, Publishing};
pub use pubsub::RabbitPubSub;
pub use topology::{Declaration, Topology};
pub use upstream::RabbitUpstream;
