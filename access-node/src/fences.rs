//! What keeps a connection's durable writes in order over a refusal.

use moorline_router::Fence;

/// Behind which everything durable of a connection stands.
#[derive(Debug)]
pub(crate) struct Fences {
    /// What goes to the bus, to other nodes and, on one machine, into inboxes. A refusal ends the connection.
    pub(crate) publishes: Fence,
    /// What goes to other devices' own topics. In a cluster these writes wait for a store that is out of reach, each in its turn: a refusal is not
    /// the end, and must not pass for one of the others.
    pub(crate) pushes: Fence,
    /// The store answers again, and what was refused behind the first is written one by one. Until that is done nothing more is read,
    /// or a device that never pauses would be served one by one for ever.
    recovering: bool,
}

impl Fences {
    /// `told`: the device is told of a full queue and goes on without that message. `waits`: in a cluster.
    pub(crate) fn new(told: bool, waits: bool) -> Self {
        let publishes = Fence::new(told);
        Self {
            pushes: match waits {
                true => Fence::new(told),
                false => publishes.clone(),
            },
            publishes,
            recovering: false,
        }
    }

    /// Something durable has been seen through; `last` says that nothing waits behind it. Says whether these fences have served their time.
    pub(crate) fn seen_through(&mut self, last: bool) -> bool {
        let is_broken = self.pushes.is_broken();
        self.recovering = is_broken && !last;
        is_broken && last
    }

    pub(crate) fn is_recovering(&self) -> bool {
        self.recovering
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moorline_router::StoreError;

    #[test]
    fn nothing_is_read_until_what_a_refusal_held_up_is_through() {
        let mut fences = Fences::new(true, true);
        assert!(!fences.seen_through(false) && !fences.is_recovering());
        fences
            .pushes
            .refused(&StoreError::Unavailable(String::new()));
        assert!(fences.publishes.check().is_ok());
        assert!(!fences.is_recovering(), "the store does not answer yet");
        assert!(!fences.seen_through(false) && fences.is_recovering());
        assert!(fences.seen_through(true) && !fences.is_recovering());
        let alone = Fences::new(true, false);
        alone
            .pushes
            .refused(&StoreError::Unavailable(String::new()));
        assert!(alone.publishes.check().is_err(), "one store, one order");
    }
}
