//! Order that survives a refusal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::StoreError;

/// Ties the writes of one sender together: once one of them was refused, every later one is too.
///
/// A device sends on without waiting for acknowledgements. If its first message is refused while
/// the second is stored, and the device then sends both again, the second comes before the first.
#[derive(Debug, Clone)]
pub struct Fence {
    broken: Arc<AtomicBool>,
    passes_full: bool,
}

impl Fence {
    /// `passes_full`: the sender is told of [`StoreError::Full`] and does not send that message
    /// again, so that the rest stays in order without it.
    pub fn new(passes_full: bool) -> Self {
        Self {
            broken: Arc::default(),
            passes_full,
        }
    }

    /// Whether a write may still be made.
    ///
    /// # Errors
    /// When an earlier one was refused.
    pub fn check(&self) -> Result<(), StoreError> {
        if self.is_broken() {
            let cause = "an earlier message of the same sender was refused";
            return Err(StoreError::Unavailable(cause.to_owned()));
        }
        Ok(())
    }

    /// Whether an earlier write was refused, so that every later one is.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Whether the sender goes on without a message that was refused as [`StoreError::Full`].
    pub(crate) fn passes_full(&self) -> bool {
        self.passes_full
    }

    /// A write was refused with `error`.
    pub fn refused(&self, error: &StoreError) {
        if !(self.passes_full && matches!(error, StoreError::Full(_))) {
            self.broken.store(true, Ordering::Release);
        }
    }
}
