//! Who may come in: counted and decided when a connection is accepted, before it costs anything.
//!
//! A connection passes a [`Gate`]: that of its listener, and behind it that of the node. Then what
//! its address may use up is looked at. A refused connection is closed at once, without a task and
//! without an answer: no packet of it was read, so not even its protocol is known.
//!
//! Behind a proxy the address is known only after the proxy has named it: such a connection passes
//! its gate without one, and is [located](HalfOpen::locate) later.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use ahash::RandomState;
use dashmap::DashMap;
use ipnet::IpNet;
use moorline_router::BanTarget;
use tokio::sync::Notify;

use crate::bans::Bans;
use crate::close_reason::Refusal;
use crate::config::{Config, Flapping};
use crate::deadlines::Clock;
use crate::flapping::Window;
use crate::rate::Rate;

/// Addresses with something to remember. Beyond it a new one is not limited by itself, only with all.
const ADDRESSES_MAX: usize = 65_536;
/// What may connect at once after a rest: as much as the rate allows in this time.
const BURST: Duration = Duration::from_secs(1);
/// Seconds between two searches for addresses that can be forgotten.
const SWEEP_EVERY_S: u32 = 10;

/// How many may pass a gate; 0 is no limit.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct GateLimits {
    pub(crate) connections_max: usize,
    pub(crate) half_open_max: usize,
    pub(crate) connects_per_second: u32,
}

/// What the connections of a listener, or of all of them, have in common.
#[derive(Debug)]
pub(crate) struct Gate {
    limits: GateLimits,
    rate: Option<Rate>,
    open: AtomicUsize,
    half_open: AtomicUsize,
    connects_due: AtomicU64,
    /// The node's gate behind that of a listener.
    behind: Option<Arc<Gate>>,
    all_gone: Notify,
}

impl Gate {
    fn new(limits: GateLimits, behind: Option<Arc<Self>>) -> Arc<Self> {
        Arc::new(Self {
            limits,
            rate: Rate::new(u64::from(limits.connects_per_second), BURST),
            open: AtomicUsize::new(0),
            half_open: AtomicUsize::new(0),
            connects_due: AtomicU64::new(0),
            behind,
            all_gone: Notify::new(),
        })
    }

    fn and_behind(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |gate| gate.behind.as_deref())
    }

    /// Sockets open now.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// Resolves when no socket is left.
    pub(crate) async fn all_gone(&self) {
        loop {
            let notified = self.all_gone.notified();
            if self.open() == 0 {
                return;
            }
            notified.await;
        }
    }

    /// Whether what was just counted is within the limits. A rate is asked last: what is refused for
    /// another reason takes nothing of it.
    fn check(&self, now_ns: u64) -> Result<(), Refusal> {
        let exceeds = |count: &AtomicUsize, max| max > 0 && count.load(Ordering::Acquire) > max;
        for gate in self.and_behind() {
            if exceeds(&gate.open, gate.limits.connections_max) {
                return Err(Refusal::ConnectionsMax);
            }
            if exceeds(&gate.half_open, gate.limits.half_open_max) {
                return Err(Refusal::HalfOpenMax);
            }
        }
        let admits = |gate: &Self| {
            gate.rate
                .is_none_or(|rate| rate.admits_shared(&gate.connects_due, now_ns))
        };
        if self.and_behind().all(admits) {
            Ok(())
        } else {
            Err(Refusal::ConnectRate)
        }
    }
}

/// One open socket, until it is dropped.
#[derive(Debug)]
pub(crate) struct Open(Arc<Gate>);

impl Open {
    fn count(gate: &Arc<Gate>) -> Self {
        for gate in gate.and_behind() {
            gate.open.fetch_add(1, Ordering::AcqRel);
        }
        Self(Arc::clone(gate))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        for gate in self.0.and_behind() {
            if gate.open.fetch_sub(1, Ordering::AcqRel) == 1 {
                gate.all_gone.notify_waiters();
            }
        }
    }
}

/// One connection that has not finished its CONNECT, until it is dropped.
#[derive(Debug)]
pub(crate) struct HalfOpen {
    gate: Arc<Gate>,
    addresses: Arc<Addresses>,
    /// Where it is counted; nowhere if its address is exempt or not known yet.
    counted_at: Option<AddressKey>,
}

impl HalfOpen {
    fn count(gate: &Arc<Gate>, addresses: &Arc<Addresses>) -> Self {
        for gate in gate.and_behind() {
            gate.half_open.fetch_add(1, Ordering::AcqRel);
        }
        Self {
            gate: Arc::clone(gate),
            addresses: Arc::clone(addresses),
            counted_at: None,
        }
    }

    /// Counts the connection at its address and asks whether that may have one more.
    pub(crate) fn locate(&mut self, address: IpAddr, clock: &Clock) -> Result<(), Refusal> {
        let (key, admitted) = self.addresses.enter(address, clock);
        self.counted_at = key;
        admitted
    }
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        for gate in self.gate.and_behind() {
            gate.half_open.fetch_sub(1, Ordering::AcqRel);
        }
        if let Some(key) = self.counted_at {
            self.addresses.leave(key);
        }
    }
}

/// An admitted connection.
#[derive(Debug)]
pub(crate) struct Admitted {
    /// To be kept as long as the socket.
    pub(crate) open: Open,
    /// To be dropped when the handshake is over.
    pub(crate) half_open: HalfOpen,
}

/// What decides about new connections.
#[derive(Debug)]
pub(crate) struct Admission {
    /// The node's own gate.
    pub(crate) gate: Arc<Gate>,
    addresses: Arc<Addresses>,
}

impl Admission {
    pub(crate) fn new(config: &Config, bans: Arc<Bans>) -> Self {
        let limits = GateLimits {
            connections_max: config.connections_max,
            half_open_max: config.half_open_max,
            connects_per_second: config.connects_per_second,
        };
        Self {
            gate: Gate::new(limits, None),
            addresses: Arc::new(Addresses::new(config, bans)),
        }
    }

    /// Whether what is limited by address does not apply to `address`.
    pub(crate) fn is_exempt(&self, address: IpAddr) -> bool {
        self.addresses.is_exempt(address.to_canonical())
    }

    /// A gate of one listener: its limits hold beside those of the node.
    pub(crate) fn listener_gate(&self, limits: GateLimits) -> Arc<Gate> {
        Gate::new(limits, Some(Arc::clone(&self.gate)))
    }

    /// Decides about a connection that was just accepted. `address` is `None` where a proxy will name
    /// it: see [`HalfOpen::locate`].
    pub(crate) fn accept(
        &self,
        gate: &Arc<Gate>,
        address: Option<IpAddr>,
        clock: &Clock,
    ) -> Result<Admitted, Refusal> {
        // Counted first, so that two at the same time cannot both be the last one.
        let open = Open::count(gate);
        let mut half_open = HalfOpen::count(gate, &self.addresses);
        if let Some(address) = address {
            half_open.locate(address, clock)?;
        }
        gate.check(clock.now_ns())?;
        Ok(Admitted { open, half_open })
    }
}

/// Whose limits: an IPv4 address or an IPv6 network of 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum AddressKey {
    V4(u32),
    V6(u64),
}

impl AddressKey {
    /// All of it, as it is banned.
    fn network(self) -> IpNet {
        let (address, length) = match self {
            Self::V4(bits) => (IpAddr::V4(Ipv4Addr::from_bits(bits)), 32),
            Self::V6(bits) => (IpAddr::V6(Ipv6Addr::from_bits(u128::from(bits) << 64)), 64),
        };
        IpNet::new(address, length).expect("an address is as long")
    }

    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => {
                Self::V6(u64::try_from(address.to_bits() >> 64).expect("64 bits are left"))
            }
        }
    }
}

/// What is remembered of one address.
#[derive(Debug, Default)]
struct Address {
    half_open: u32,
    connects_due: u64,
    connects: Window,
}

/// What addresses use up. Holds those with something to remember, and no more than a declared number.
#[derive(Debug)]
struct Addresses {
    half_open_max: u32,
    rate: Option<Rate>,
    flapping: Flapping,
    exempt: Vec<IpNet>,
    bans: Arc<Bans>,
    known: DashMap<AddressKey, Address, RandomState>,
    swept_s: AtomicU32,
}

impl Addresses {
    fn new(config: &Config, bans: Arc<Bans>) -> Self {
        let limits = &config.per_address;
        Self {
            half_open_max: limits.half_open_max,
            rate: Rate::new(u64::from(limits.connects_per_second), BURST),
            flapping: config.flapping.clone(),
            exempt: limits.exempt.clone(),
            bans,
            known: DashMap::default(),
            swept_s: AtomicU32::new(0),
        }
    }

    fn is_limited(&self) -> bool {
        self.half_open_max > 0 || self.remembers()
    }

    /// Whether an address is remembered when it has no half-open connection.
    fn remembers(&self) -> bool {
        self.rate.is_some() || self.flapping.address_connects > 0
    }

    fn is_exempt(&self, address: IpAddr) -> bool {
        self.exempt.iter().any(|net| net.contains(&address))
    }

    /// Counts one more half-open connection; gives where, and whether it is within the limits.
    fn enter(&self, address: IpAddr, clock: &Clock) -> (Option<AddressKey>, Result<(), Refusal>) {
        let address = address.to_canonical();
        if self.bans.forbids_address(address) {
            return (None, Err(Refusal::Banned));
        }
        if !self.is_limited() || self.is_exempt(address) {
            return (None, Ok(()));
        }
        let key = AddressKey::of(address);
        self.sweep(clock);
        if self.known.len() >= ADDRESSES_MAX && !self.known.contains_key(&key) {
            return (None, Ok(()));
        }
        let mut known = self.known.entry(key).or_default();
        known.half_open += 1;
        let admitted = self.admits(key, &mut known, clock);
        (Some(key), admitted)
    }

    /// Looks at one more connection of an address. The ban list is locked within the address's entry,
    /// never the other way round.
    fn admits(&self, key: AddressKey, known: &mut Address, clock: &Clock) -> Result<(), Refusal> {
        let Flapping {
            address_connects,
            window,
            ban,
            ..
        } = self.flapping;
        if address_connects > 0 && known.connects.count(clock.now_s(), window) > address_connects {
            known.connects = Window::default();
            let target = BanTarget::network(key.network());
            self.bans.give(target, "flapping", ban);
            return Err(Refusal::Banned);
        }
        if self.half_open_max > 0 && known.half_open > self.half_open_max {
            return Err(Refusal::AddressHalfOpenMax);
        }
        match self.rate {
            Some(rate) if !rate.admits(&mut known.connects_due, clock.now_ns()) => {
                Err(Refusal::AddressConnectRate)
            }
            _ => Ok(()),
        }
    }

    fn leave(&self, key: AddressKey) {
        // What is remembered is found by the next sweep.
        let remembers = self.remembers();
        self.known.remove_if_mut(&key, |_, known| {
            known.half_open = known.half_open.saturating_sub(1);
            known.half_open == 0 && !remembers
        });
    }

    /// Forgets addresses that are as new again, now and then.
    fn sweep(&self, clock: &Clock) {
        let now_s = clock.now_s();
        let swept_s = self.swept_s.load(Ordering::Relaxed);
        let due = now_s.saturating_sub(swept_s) >= SWEEP_EVERY_S;
        let mine = || {
            self.swept_s
                .compare_exchange(swept_s, now_s, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        };
        if due && mine() {
            let now_ns = clock.now_ns();
            let window = self.flapping.window;
            self.known.retain(|_, known| {
                known.half_open > 0
                    || known.connects_due > now_ns
                    || !known.connects.is_over(now_s, window)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::default();
        change(&mut config);
        config
    }

    fn admission(config: &Config) -> Admission {
        Admission::new(config, Arc::default())
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    /// How many of `count` connections from `address` come in; all of them are kept.
    fn admitted(admission: &Admission, address: &str, count: usize) -> Vec<Admitted> {
        let clock = Clock::new();
        (0..count)
            .filter_map(|_| admission.accept(&admission.gate, ip(address), &clock).ok())
            .collect()
    }

    #[test]
    fn no_more_than_the_maximum_are_open_and_the_place_of_one_that_left_is_free() {
        let admission = admission(&config(|config| config.connections_max = 3));
        let clock = Clock::new();
        let mut held = admitted(&admission, "192.0.2.1", 10);
        assert_eq!(held.len(), 3);
        let refused = admission.accept(&admission.gate, ip("192.0.2.2"), &clock);
        assert_eq!(refused.unwrap_err(), Refusal::ConnectionsMax);
        held.pop();
        assert_eq!(admitted(&admission, "192.0.2.1", 10).len(), 1);
        drop(held);
        assert_eq!(admission.gate.open(), 0);
    }

    #[test]
    fn only_what_has_not_finished_its_connect_is_half_open() {
        let admission = admission(&config(|config| config.half_open_max = 2));
        let clock = Clock::new();
        let accept = || admission.accept(&admission.gate, ip("192.0.2.1"), &clock);
        let first = accept().unwrap();
        let second = accept().unwrap();
        assert_eq!(accept().unwrap_err(), Refusal::HalfOpenMax);
        drop(first.half_open);
        let third = accept().unwrap();
        assert_eq!(admission.gate.open(), 3);
        drop((first.open, second, third));
        assert_eq!(admission.gate.open(), 0);
    }

    #[test]
    fn a_listeners_limit_holds_beside_the_nodes() {
        let admission = admission(&config(|config| config.connections_max = 3));
        let clock = Clock::new();
        let small = admission.listener_gate(GateLimits {
            connections_max: 1,
            ..GateLimits::default()
        });
        let wide = admission.listener_gate(GateLimits::default());
        let _first = admission.accept(&small, ip("192.0.2.1"), &clock).unwrap();
        let refused = admission.accept(&small, ip("192.0.2.1"), &clock);
        assert_eq!(refused.unwrap_err(), Refusal::ConnectionsMax);
        let _second = admission.accept(&wide, ip("192.0.2.1"), &clock).unwrap();
        let _third = admission.accept(&wide, ip("192.0.2.1"), &clock).unwrap();
        let refused = admission.accept(&wide, ip("192.0.2.1"), &clock);
        assert_eq!(refused.unwrap_err(), Refusal::ConnectionsMax);
        assert_eq!(
            (small.open(), wide.open(), admission.gate.open()),
            (1, 2, 3)
        );
    }

    #[test]
    fn one_address_cannot_use_up_what_another_needs() {
        let admission = admission(&config(|config| config.per_address.half_open_max = 5));
        let held = admitted(&admission, "192.0.2.1", 10);
        assert_eq!(held.len(), 5);
        assert_eq!(admitted(&admission, "192.0.2.2", 10).len(), 5);
        // The same address written as IPv6, and the same network of 64 bits.
        assert_eq!(admitted(&admission, "::ffff:192.0.2.1", 1).len(), 0);
        let network = admitted(&admission, "2001:db8::1", 5);
        assert_eq!(admitted(&admission, "2001:db8::ffff:2", 1).len(), 0);
        assert_eq!(admitted(&admission, "2001:db8:0:1::1", 1).len(), 1);
        drop((held, network));
        assert!(
            admission.addresses.known.is_empty(),
            "nothing is left of them"
        );
    }

    #[test]
    fn connects_in_a_second_are_limited_by_address_and_in_all() {
        let by_address = admission(&config(|c| c.per_address.connects_per_second = 3));
        assert_eq!(admitted(&by_address, "192.0.2.1", 10).len(), 3);
        assert_eq!(admitted(&by_address, "192.0.2.2", 10).len(), 3);
        let in_all = admission(&config(|config| config.connects_per_second = 4));
        assert_eq!(admitted(&in_all, "192.0.2.1", 10).len(), 4);
        assert_eq!(admitted(&in_all, "192.0.2.2", 10).len(), 0);
    }

    #[test]
    fn loopback_is_exempt_by_default_and_what_an_operator_names() {
        let limits = |config: &mut Config| {
            config.per_address.half_open_max = 1;
            config.per_address.connects_per_second = 1;
        };
        let by_default = admission(&config(limits));
        assert_eq!(admitted(&by_default, "127.0.0.1", 100).len(), 100);
        assert_eq!(admitted(&by_default, "::1", 100).len(), 100);
        let admission = admission(&config(|config| {
            limits(config);
            config.per_address.exempt = vec!["198.51.100.0/24".parse().unwrap()];
        }));
        assert_eq!(admitted(&admission, "198.51.100.7", 100).len(), 100);
        assert_eq!(admitted(&admission, "127.0.0.1", 100).len(), 1);
    }

    #[test]
    fn ten_thousand_devices_at_once_behind_one_address_come_in_by_default() {
        let admission = admission(&Config::default());
        assert_eq!(admitted(&admission, "127.0.0.1", 10_000).len(), 10_000);
        assert_eq!(admitted(&admission, "192.0.2.1", 10_000).len(), 10_000);
    }

    #[test]
    fn addresses_beyond_the_table_are_limited_with_all_only() {
        let admission = admission(&config(|c| c.per_address.connects_per_second = 1));
        let clock = Clock::new();
        for number in 0..u32::try_from(ADDRESSES_MAX).unwrap() {
            let address = IpAddr::from((0x0A00_0000 + number).to_be_bytes());
            drop(admission.accept(&admission.gate, Some(address), &clock));
        }
        assert_eq!(admission.addresses.known.len(), ADDRESSES_MAX);
        assert_eq!(admitted(&admission, "192.0.2.1", 10).len(), 10);
        assert_eq!(admission.addresses.known.len(), ADDRESSES_MAX);
    }

    #[test]
    fn a_connection_behind_a_proxy_is_counted_where_the_proxy_says() {
        let admission = admission(&config(|config| config.per_address.half_open_max = 1));
        let clock = Clock::new();
        let mut first = admission.accept(&admission.gate, None, &clock).unwrap();
        let mut second = admission.accept(&admission.gate, None, &clock).unwrap();
        let device = "192.0.2.1".parse().unwrap();
        assert_eq!(first.half_open.locate(device, &clock), Ok(()));
        assert_eq!(
            second.half_open.locate(device, &clock),
            Err(Refusal::AddressHalfOpenMax)
        );
        drop((first, second));
        assert!(admission.addresses.known.is_empty());
    }

    #[test]
    fn an_address_that_connects_without_end_is_banned_and_no_other() {
        let admission = admission(&config(|config| config.flapping.address_connects = 10));
        for (address, neighbour) in [
            ("192.0.2.1", "192.0.2.2"),
            ("2001:db8::1", "2001:db8:0:1::1"),
        ] {
            assert_eq!(admitted(&admission, address, 100).len(), 10);
            let clock = Clock::new();
            let refused = admission.accept(&admission.gate, ip(address), &clock);
            assert_eq!(refused.unwrap_err(), Refusal::Banned);
            assert_eq!(admitted(&admission, neighbour, 5).len(), 5);
        }
        assert_eq!(admitted(&admission, "127.0.0.1", 100).len(), 100);
    }

    #[test]
    fn an_operators_ban_concerns_exempt_addresses_too() {
        let bans = Arc::new(Bans::default());
        let admission = Admission::new(&Config::default(), Arc::clone(&bans));
        let target = BanTarget::parse("address", "127.0.0.0/8").unwrap();
        bans.give(target, "as an operator would", Duration::from_secs(60));
        assert_eq!(admitted(&admission, "127.0.0.1", 5).len(), 0);
        assert_eq!(admitted(&admission, "::1", 5).len(), 5);
    }
}
