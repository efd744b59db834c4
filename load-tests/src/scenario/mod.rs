//! The scenarios: each takes a plan, runs it against one server, and returns what it found.

pub(crate) mod compare;
pub(crate) mod connect;
pub(crate) mod pubsub;
pub(crate) mod push;
pub(crate) mod upstream;

use std::time::Duration;

use crate::bot::Target;
use crate::clock::Clock;
use crate::http::Api;

/// The server under test.
#[derive(Clone)]
pub(crate) struct Setup {
    /// Where devices connect.
    pub(crate) target: Target,
    /// Where backends call.
    pub(crate) api: Api,
    /// Its process, to be watched.
    pub(crate) server_pid: Option<u32>,
}

/// From "everyone is connected" to the first message, so that all senders have heard of it.
const START_DELAY_NS: u64 = 200_000_000;
/// Between two looks at whether a run is over.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Looks until `done` says so; false if that took until the clock read `deadline_ns`.
async fn until(clock: Clock, deadline_ns: u64, mut done: impl FnMut() -> bool) -> bool {
    loop {
        if done() {
            return true;
        }
        if clock.now_ns() >= deadline_ns {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
