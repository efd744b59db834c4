//! The accounts of what was accepted and what arrived, per device.
//!
//! Not a measure of speed: this is what turns a load test into a check that nothing was lost, doubled
//! or reordered.

use parking_lot::Mutex;
use serde::Serialize;

/// Sequence numbers as a bit set that grows.
#[derive(Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    /// Adds `n`; false if it was there.
    fn insert(&mut self, n: u32) -> bool {
        let (word, bit) = (n as usize / 64, 1 << (n % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }

    fn len(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// How many are here and not in `other`.
    fn without(&self, other: &Bits) -> u64 {
        let theirs = other.0.iter().copied().chain(std::iter::repeat(0));
        self.0
            .iter()
            .zip(theirs)
            .map(|(a, b)| u64::from((a & !b).count_ones()))
            .sum()
    }
}

/// One device's account.
#[derive(Debug, Default)]
struct Account {
    accepted: Bits,
    delivered: Bits,
    highest: Option<u32>,
    duplicates: u64,
    disordered: u64,
}

/// The accounts of all devices of a run.
#[derive(Debug)]
pub(crate) struct Ledger {
    accounts: Vec<Mutex<Account>>,
}

/// The sums over all devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Totals {
    /// Messages whose sender got a positive answer.
    pub(crate) accepted: u64,
    /// Different messages that arrived.
    pub(crate) delivered: u64,
    /// Accepted messages that did not arrive.
    pub(crate) missing: u64,
    /// Messages that arrived without a positive answer to their sender (its outcome was unknown).
    pub(crate) unanswered: u64,
    /// Arrivals of a message that had arrived before.
    pub(crate) duplicates: u64,
    /// First arrivals after a message with a higher number had arrived.
    pub(crate) disordered: u64,
}

impl Ledger {
    /// Empty accounts for `devices` devices.
    pub(crate) fn new(devices: usize) -> Self {
        Self {
            accounts: std::iter::repeat_with(Mutex::default)
                .take(devices)
                .collect(),
        }
    }

    /// The sender of this message got a positive answer.
    pub(crate) fn accept(&self, device: u32, sequence: u32) {
        if let Some(account) = self.accounts.get(device as usize) {
            account.lock().accepted.insert(sequence);
        }
    }

    /// This message arrived. False if it had arrived before.
    pub(crate) fn deliver(&self, device: u32, sequence: u32) -> bool {
        let Some(account) = self.accounts.get(device as usize) else {
            return false;
        };
        let mut account = account.lock();
        if !account.delivered.insert(sequence) {
            account.duplicates += 1;
            return false;
        }
        if account.highest.is_some_and(|highest| highest > sequence) {
            account.disordered += 1;
        } else {
            account.highest = Some(sequence);
        }
        true
    }

    /// What was accepted for this device and has not arrived.
    pub(crate) fn missing(&self, device: usize) -> u64 {
        self.accounts.get(device).map_or(0, |account| {
            let account = account.lock();
            account.accepted.without(&account.delivered)
        })
    }

    /// The sums.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for account in &self.accounts {
            let account = account.lock();
            totals.accepted += account.accepted.len();
            totals.delivered += account.delivered.len();
            totals.missing += account.accepted.without(&account.delivered);
            totals.unanswered += account.delivered.without(&account.accepted);
            totals.duplicates += account.duplicates;
            totals.disordered += account.disordered;
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_run_has_nothing_to_say() {
        let ledger = Ledger::new(2);
        for sequence in 0..200 {
            ledger.accept(1, sequence);
            assert!(ledger.deliver(1, sequence));
        }
        let expected = Totals {
            accepted: 200,
            delivered: 200,
            ..Totals::default()
        };
        assert_eq!(ledger.totals(), expected);
    }

    #[test]
    fn loss_doubles_and_disorder_are_told_apart() {
        let ledger = Ledger::new(1);
        for sequence in [0, 1, 2, 3, 130] {
            ledger.accept(0, sequence);
        }
        for sequence in [0, 2, 1, 1, 64] {
            ledger.deliver(0, sequence);
        }
        let expected = Totals {
            accepted: 5,
            delivered: 4,
            missing: 2,
            unanswered: 1,
            duplicates: 1,
            disordered: 1,
        };
        assert_eq!(ledger.totals(), expected);
        assert_eq!(ledger.missing(0), 2);
    }

    #[test]
    fn a_gap_is_not_disorder() {
        let ledger = Ledger::new(1);
        ledger.deliver(0, 0);
        ledger.deliver(0, 5);
        assert_eq!(ledger.totals().disordered, 0);
    }

    #[test]
    fn a_device_of_nobody_is_ignored() {
        let ledger = Ledger::new(1);
        assert!(!ledger.deliver(1, 0));
        assert_eq!(ledger.totals(), Totals::default());
    }
}
