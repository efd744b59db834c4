//! The store on Redis under the contract suites: one server.

#![allow(clippy::unwrap_used, reason = "tests")]

mod redis_support;

use redis_support::Single;

moorline_router::route_contract!(Single::default());
moorline_router::ban_contract!(Single::default());
moorline_router::session_contract!(Single::default());
