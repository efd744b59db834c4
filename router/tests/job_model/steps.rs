//! The steps that are done to a store and to the reference.

use moorline_router::EventKind;
use proptest::prelude::*;

use super::{IDS, NAMES};

/// What is done.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Create {
        job: usize,
        delay_ms: u64,
        cancel_on: Vec<usize>,
        trigger_on: Vec<usize>,
        fingerprint: u64,
    },
    Patch {
        job: usize,
        delay_ms: Option<u64>,
        plan: Option<u8>,
    },
    Cancel(usize),
    Trigger(usize),
    RetryFailed(usize),
    /// A repetition of the event before the last one, or a new one.
    Event {
        name: usize,
        kind: EventKind,
        is_repeated: bool,
    },
    Pass(u64),
    Claim,
    /// Under one of the newest claims, or an old one.
    Settle {
        claim: usize,
        how: How,
    },
    Extend {
        claim: usize,
        by_ms: u64,
    },
    Sweep,
    Crash,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum How {
    Fired,
    Skipped,
    Failed,
    Retry(u64),
    PutOff(u64, bool),
}

/// Any sequence of steps.
pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let delay = || prop_oneof![3 => 0..50_u64, 3 => 0..1_000_u64, 1 => 0..10_000_u64];
    let names = || proptest::collection::vec(0..NAMES, 0..3);
    let create = (0..IDS, delay(), names(), names(), 0..4_u64).prop_map(
        |(job, delay_ms, cancel_on, trigger_on, fingerprint)| Step::Create {
            job,
            delay_ms,
            cancel_on,
            trigger_on,
            fingerprint: fingerprint / 3,
        },
    );
    let patch = (0..IDS, proptest::option::of(delay()), any::<Option<u8>>()).prop_map(
        |(job, delay_ms, plan)| Step::Patch {
            job,
            delay_ms,
            plan,
        },
    );
    let kind = prop_oneof![3 => Just(EventKind::Happened), 1 => Just(EventKind::Withdrawal)];
    let event =
        (0..NAMES, kind, proptest::bool::weighted(0.3)).prop_map(|(name, kind, is_repeated)| {
            Step::Event {
                name,
                kind,
                is_repeated,
            }
        });
    let how = prop_oneof![
        4 => Just(How::Fired),
        1 => Just(How::Skipped),
        1 => Just(How::Failed),
        2 => delay().prop_map(How::Retry),
        1 => (delay(), proptest::bool::ANY).prop_map(|(in_ms, begun)| How::PutOff(in_ms, begun)),
    ];
    let step = prop_oneof![
        6 => create,
        2 => patch,
        2 => (0..IDS).prop_map(Step::Cancel),
        2 => (0..IDS).prop_map(Step::Trigger),
        1 => (0..IDS).prop_map(Step::RetryFailed),
        3 => event,
        5 => delay().prop_map(Step::Pass),
        5 => Just(Step::Claim),
        5 => (0..8_usize, how).prop_map(|(claim, how)| Step::Settle { claim, how }),
        1 => (0..8_usize, delay()).prop_map(|(claim, by_ms)| Step::Extend { claim, by_ms }),
        1 => Just(Step::Sweep),
        1 => Just(Step::Crash),
    ];
    proptest::collection::vec(step, 1..120)
}
