//! Inboxes and receipts on Redis under their contract suites: one server, restarted with the store.

#![allow(clippy::unwrap_used, reason = "tests")]

mod redis_support;

use redis_support::Single;

moorline_router::inbox_contract!(Single::default());
moorline_router::receipt_contract!(Single::default());
