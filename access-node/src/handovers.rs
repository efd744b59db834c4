//! What a connection owes the one that displaces it: to have seen its own last packets through.
//!
//! A device whose connection breaks sends again what was not acknowledged, on the next connection. Whether
//! that is a repetition is known from what the older connection left in the stores, and its task may
//! be in the middle of it. So the newer one waits until the older takes no more packets and all it
//! took is stored or refused; that is one turn of its task and one commit.

use std::collections::HashMap;
use std::time::Duration;

use ahash::RandomState;
use moorline_router::{ClientId, Epoch};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::session::{Session, State};

/// The displaced connections of a node that somebody waits for.
#[derive(Debug, Default)]
pub(crate) struct Handovers {
    /// By client and epoch: clients of a cluster take their epochs from several clocks.
    awaited: Mutex<HashMap<(ClientId, Epoch), oneshot::Sender<()>, RandomState>>,
}

/// Resolves when a displaced connection has settled.
#[derive(Debug)]
pub(crate) struct Settled(Option<oneshot::Receiver<()>>);

impl Handovers {
    /// To be called for a session whose connection is about to be taken away, under its lock.
    pub(crate) fn await_settled(&self, client: &ClientId, state: &State) -> Settled {
        let unsettled = state.link.as_ref().filter(|link| !link.settled);
        Settled(unsettled.map(|link| {
            let (sender, receiver) = oneshot::channel();
            let key = (client.clone(), link.epoch);
            self.awaited.lock().insert(key, sender);
            receiver
        }))
    }

    /// The connection `epoch` has taken its last packet, and everything before is stored or refused.
    pub(crate) fn settled(&self, session: &Session, epoch: Epoch) {
        let mut state = session.lock();
        if let Some(link) = state.link_of(epoch) {
            link.settled = true;
            return;
        }
        drop(state);
        let key = (session.client.clone(), epoch);
        if let Some(waits) = self.awaited.lock().remove(&key) {
            // Nobody waits any more where the newer connection has gone as well.
            let _ = waits.send(());
        }
    }
}

impl Settled {
    /// Waits at most `limit`: a store that does not answer stops the newer connection by itself.
    pub(crate) async fn wait(self, limit: Duration) {
        if let Some(receiver) = self.0 {
            let _ = tokio::time::timeout(limit, receiver).await;
        }
    }
}
