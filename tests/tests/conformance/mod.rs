//! What the texts of MQTT 3.1.1 and 5.0 ask of a server, statement by statement.
//!
//! `mqtt/CONFORMANCE.md` says which test shows which statement; what other themes show already is
//! not repeated here. The tests share a gateway, so every one of them keeps to its own topics and
//! client ids: both begin with its chapter.

mod acks;
mod aliases;
mod auth;
mod connack;
mod connect;
mod disconnect;
mod flow_control;
mod packet_size;
mod publish;
pub(crate) mod raw;
mod retained;
mod sessions;
mod subscribe;
mod topics;
mod unsubscribe;
mod wills;

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use moorline_tests::Gateway;
use moorline_tests::device::Device;
use moorline_tests::wire::{Connect, V5, Value, property};

/// The gateway of whichever of these tests run now; the last one to end stops it.
async fn shared() -> Arc<Gateway> {
    static SHARED: Mutex<Weak<Gateway>> = Mutex::new(Weak::new());
    let running = || {
        SHARED
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .upgrade()
    };
    if let Some(gateway) = running() {
        return gateway;
    }
    let fresh = Arc::new(Gateway::start().await);
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    // Two may start one at a time; the second gives way.
    if let Some(gateway) = shared.upgrade() {
        return gateway;
    }
    *shared = Arc::downgrade(&fresh);
    fresh
}

/// A connection that resumes its session and keeps it for `seconds` (MQTT 5.0).
fn kept_for(id: &str, seconds: u32) -> Connect {
    Connect {
        clean_start: false,
        ..Connect::new(V5, id).with(property::SESSION_EXPIRY, Value::Four(seconds))
    }
}

/// Ends the session of `id` for good.
async fn forget(gateway: &Gateway, version: u8, id: &str) {
    Device::clean(gateway.mqtt(), version, id)
        .await
        .disconnect()
        .await;
}

/// Lets time pass that is the matter of the test itself: an expiry, a delay.
async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}
