//! The built gateway seen from outside. Every name is a sentence about it.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::print_stderr,
    reason = "a test speaks to the person who runs it"
)]

mod abuse;
mod acl;
mod api;
mod auth;
mod auth_http;
mod auth_jwt;
mod cluster;
mod conformance;
mod delays;
mod delays_amqp;
mod delays_api;
mod delays_devices;
mod delays_killed;
mod disk_full;
mod embedded_only;
mod interop;
mod killed;
mod late_stores;
mod limits;
mod malformed;
mod migrate;
mod model;
mod negotiated;
mod operations;
mod order_cancel;
mod proxy;
mod pubsub;
mod push;
mod roles;
mod servers;
mod sessions;
mod shared;
mod shared_faults;
mod slow_reader;
mod startup;
mod support;
mod takeover;
mod tls;
mod upstream;
