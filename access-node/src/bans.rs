//! Who is banned: the operators' list as the store has it, and short bans that the node gives itself.
//!
//! Looked at when a connection is accepted (addresses) and when its CONNECT has been read (client
//! id, user name). The list is small or empty nearly everywhere, and an empty one costs one load.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use moorline_router::{Ban, BanTarget, BanView, ClientId, StoreError, unix_ms};
use parking_lot::RwLock;

use crate::close_reason::CloseReason;
use crate::node::Node;

/// Beyond it the node gives no bans of its own; what would have been banned is limited only.
const AUTOMATIC_MAX: usize = 100_000;
/// How often a node of several reads the operators' list again.
const RELOAD_EVERY: Duration = Duration::from_secs(30);
/// How often bans that are over are forgotten.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// Every ban in force.
#[derive(Debug, Default)]
pub(crate) struct Bans {
    table: RwLock<Table>,
    any: AtomicBool,
    /// Held while the store is asked and the answer put into the table, so that of two changes the
    /// later one stays.
    reading: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Table {
    bans: BTreeMap<BanTarget, BanView>,
    /// How many banned networks there are of each length, so that only those are looked for.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Table {
    fn put(&mut self, view: BanView) -> Option<BanView> {
        let target = view.ban.target.clone();
        if let (Some(length), false) = (length_of(&target), self.bans.contains_key(&target)) {
            *self.lengths.entry(length).or_default() += 1;
        }
        self.bans.insert(target, view)
    }

    fn take(&mut self, target: &BanTarget) -> Option<BanView> {
        let taken = self.bans.remove(target)?;
        if let Some(length) = length_of(target)
            && let Some(count) = self.lengths.get_mut(&length)
        {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length);
            }
        }
        Some(taken)
    }

    fn has(&self, target: &BanTarget, now_ms: u64) -> bool {
        let found = self.bans.get(target);
        found.is_some_and(|view| !view.ban.is_over(now_ms))
    }
}

fn length_of(target: &BanTarget) -> Option<(bool, u8)> {
    match target {
        BanTarget::Address(net) => Some((net.addr().is_ipv6(), net.prefix_len())),
        BanTarget::Client(_) | BanTarget::Username(_) => None,
    }
}

impl Bans {
    fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.table.write();
        let changed = change(&mut table);
        self.any.store(!table.bans.is_empty(), Ordering::Release);
        changed
    }

    fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Whether `address` lies in a banned network.
    pub(crate) fn forbids_address(&self, address: IpAddr) -> bool {
        if self.is_empty() {
            return false;
        }
        let address = address.to_canonical();
        let now_ms = unix_ms();
        let table = self.table.read();
        table
            .lengths
            .keys()
            .filter(|(is_v6, _)| *is_v6 == address.is_ipv6())
            .filter_map(|(_, length)| IpNet::new(address, *length).ok())
            .any(|net| table.has(&BanTarget::Address(net.trunc()), now_ms))
    }

    /// Whether `client` is banned.
    pub(crate) fn forbids_client(&self, client: &ClientId) -> bool {
        !self.is_empty() && self.forbids(&BanTarget::Client(client.clone()))
    }

    /// Whether the user `name` is banned.
    pub(crate) fn forbids_username(&self, name: &str) -> bool {
        !self.is_empty() && self.forbids(&BanTarget::Username(name.into()))
    }

    fn forbids(&self, target: &BanTarget) -> bool {
        self.table.read().has(target, unix_ms())
    }

    /// Bans `target` for what the node has seen of it. An operator's ban stands as it is.
    pub(crate) fn give(&self, target: BanTarget, reason: &str, time: Duration) {
        let now_ms = unix_ms();
        let ban_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 4);
        let ban = Ban {
            target,
            reason: reason.into(),
            since_ms: now_ms,
            expires_at_ms: Some(now_ms + ban_ms),
        };
        self.change(|table| {
            let held = table.bans.get(&ban.target);
            let by_operator = held.is_some_and(|view| !view.automatic && !view.ban.is_over(now_ms));
            if !by_operator && (held.is_some() || table.bans.len() < AUTOMATIC_MAX) {
                tracing::info!(target = %ban.target, reason, seconds = time.as_secs(), "banned");
                let automatic = true;
                table.put(BanView { ban, automatic });
            }
        });
    }

    /// A page of the bans in force.
    pub(crate) fn list(&self, after: Option<&BanTarget>, limit: usize) -> Vec<BanView> {
        let now_ms = unix_ms();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let table = self.table.read();
        table
            .bans
            .range((from, Bound::Unbounded))
            .map(|(_, view)| view)
            .filter(|view| !view.ban.is_over(now_ms))
            .take(limit)
            .cloned()
            .collect()
    }

    /// Takes out what is over; gives what the store has of it.
    fn take_over(&self, now_ms: u64) -> Vec<BanTarget> {
        if self.is_empty() {
            return Vec::new();
        }
        self.change(|table| {
            let over = table.bans.values().filter(|view| view.ban.is_over(now_ms));
            let over: Vec<BanTarget> = over.map(|view| view.ban.target.clone()).collect();
            let taken = over.into_iter().filter_map(|target| table.take(&target));
            taken
                .filter(|view| !view.automatic)
                .map(|view| view.ban.target)
                .collect()
        })
    }
}

/// Loads the operators' list.
pub(crate) async fn load(node: &Node) -> Result<(), StoreError> {
    let bans = node.stores.bans.load_all().await?;
    node.bans.change(|table| {
        for ban in bans {
            let automatic = false;
            table.put(BanView { ban, automatic });
        }
    });
    Ok(())
}

/// Reads the operators' list again: a node that could not be told of a change learns of it here.
async fn reload(node: &Node) -> Result<(), StoreError> {
    let new: Vec<BanTarget> = {
        let _reading = node.bans.reading.lock().await;
        let bans = node.stores.bans.load_all().await?;
        node.bans.change(|table| {
            let listed: HashSet<&BanTarget> = bans.iter().map(|ban| &ban.target).collect();
            let lifted = table.bans.values().filter(|view| !view.automatic);
            let lifted = lifted.map(|view| &view.ban.target);
            let lifted: Vec<BanTarget> = lifted
                .filter(|target| !listed.contains(target))
                .cloned()
                .collect();
            for target in lifted {
                table.take(&target);
            }
            let automatic = false;
            let put = bans.into_iter().filter_map(|ban| {
                let target = ban.target.clone();
                let known = table.put(BanView { ban, automatic });
                known.is_none_or(|view| view.automatic).then_some(target)
            });
            put.collect()
        })
    };
    for target in new {
        close_banned(node, &target);
    }
    Ok(())
}

/// Reads the ban of `target` again and closes connections that it forbids; says whether there was
/// one before.
pub(crate) async fn changed(node: &Node, target: &BanTarget) -> Result<bool, StoreError> {
    let before = {
        let _reading = node.bans.reading.lock().await;
        let now = node.stores.bans.get(target).await?;
        node.bans.change(|table| {
            let automatic = false;
            match now {
                Some(ban) => table.put(BanView { ban, automatic }),
                None => table.take(target),
            }
        })
    };
    close_banned(node, target);
    Ok(before.is_some_and(|view| !view.ban.is_over(unix_ms())))
}

/// Closes what `target` names, if it is banned.
fn close_banned(node: &Node, target: &BanTarget) {
    if !node.bans.forbids(target) {
        return;
    }
    tracing::info!(%target, "banned by an operator");
    if let BanTarget::Client(client) = target {
        if let Some(session) = node.session(client)
            && let Some(link) = &mut session.lock().link
        {
            link.close(CloseReason::Banned);
        }
        return;
    }
    for session in &node.sessions {
        let mut state = session.lock();
        if let Some(link) = &mut state.link
            && target.names(link)
        {
            link.close(CloseReason::Banned);
        }
    }
}

/// What of a connection a ban can name.
trait Names {
    fn names(&self, link: &crate::session::Link) -> bool;
}

impl Names for BanTarget {
    fn names(&self, link: &crate::session::Link) -> bool {
        match self {
            Self::Address(net) => link
                .wire
                .address()
                .is_some_and(|address| net.contains(&address.ip().to_canonical())),
            // Nobody has said whether an anonymous device has the name that it gives.
            Self::Username(name) => link
                .identity
                .as_ref()
                .is_some_and(|identity| identity.username.as_deref() == Some(&**name)),
            // Found by its id.
            Self::Client(_) => false,
        }
    }
}

/// Forgets bans that are over until the node stops, in the store as well.
pub(crate) async fn run(node: Arc<Node>) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut reloaded = Instant::now();
    loop {
        every.tick().await;
        if node.cluster.is_some() && reloaded.elapsed() >= RELOAD_EVERY {
            reloaded = Instant::now();
            if let Err(error) = reload(&node).await {
                tracing::debug!(%error, "list of bans not read again");
            }
        }
        for target in node.bans.take_over(unix_ms()) {
            let _reading = node.bans.reading.lock().await;
            // An operator may have made it anew meanwhile.
            let deleted = match node.stores.bans.get(&target).await {
                Ok(Some(ban)) if ban.is_over(unix_ms()) => {
                    node.stores.bans.delete(&target).await.map(|_| ())
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = deleted {
                // The next start finds it over and leaves it to this loop again.
                tracing::debug!(%target, %error, "a ban that is over was not deleted");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(kind: &str, value: &str) -> BanTarget {
        BanTarget::parse(kind, value).unwrap()
    }

    fn put(bans: &Bans, target: BanTarget, expires_at_ms: Option<u64>) {
        let ban = Ban {
            target,
            reason: "".into(),
            since_ms: 0,
            expires_at_ms,
        };
        let automatic = false;
        bans.change(|table| table.put(BanView { ban, automatic }));
    }

    #[test]
    fn an_address_is_found_in_networks_of_any_length() {
        let bans = Bans::default();
        let forbids = |address: &str| bans.forbids_address(address.parse().unwrap());
        assert!(!forbids("192.0.2.7"));
        for net in [
            "192.0.2.0/24",
            "198.51.100.9",
            "2001:db8::/32",
            "10.0.0.0/8",
        ] {
            put(&bans, target("address", net), None);
        }
        for address in [
            "192.0.2.7",
            "::ffff:192.0.2.7",
            "198.51.100.9",
            "2001:db8:1::1",
            "10.9.9.9",
        ] {
            assert!(forbids(address), "{address}");
        }
        for address in [
            "192.0.3.7",
            "198.51.100.8",
            "2001:db9::1",
            "11.0.0.0",
            "::1",
        ] {
            assert!(!forbids(address), "{address}");
        }
        bans.change(|table| table.take(&target("address", "192.0.2.0/24")));
        assert!(!forbids("192.0.2.7"));
        assert!(forbids("10.9.9.9"));
    }

    #[test]
    fn a_ban_that_is_over_forbids_nothing_and_is_taken_out() {
        let bans = Bans::default();
        let client = ClientId::parse("car-7").unwrap();
        put(&bans, BanTarget::Client(client.clone()), Some(1));
        put(&bans, target("username", "anna"), None);
        assert!(!bans.forbids_client(&client));
        assert!(bans.forbids_username("anna"));
        assert!(!bans.forbids_username("ann"));
        assert_eq!(bans.list(None, 10).len(), 1);
        assert_eq!(
            bans.take_over(unix_ms()),
            [BanTarget::Client(client.clone())]
        );
        bans.change(|table| table.take(&target("username", "anna")));
        assert!(bans.is_empty());
    }

    #[test]
    fn an_automatic_ban_ends_by_itself_and_never_shortens_an_operators() {
        let bans = Bans::default();
        let client = ClientId::parse("car-7").unwrap();
        let by_client = BanTarget::Client(client.clone());
        bans.give(by_client.clone(), "flapping", Duration::from_secs(60));
        assert!(bans.forbids_client(&client));
        assert!(bans.list(None, 10)[0].automatic);
        put(&bans, by_client.clone(), None);
        bans.give(by_client.clone(), "flapping", Duration::ZERO);
        assert!(bans.forbids_client(&client));
        assert!(!bans.list(None, 10)[0].automatic);
        bans.change(|table| table.take(&by_client));
        bans.give(by_client, "flapping", Duration::ZERO);
        assert!(!bans.forbids_client(&client));
        // What was never in the store is not to be deleted there.
        assert!(bans.take_over(unix_ms()).is_empty());
    }

    #[test]
    fn the_list_comes_in_pages() {
        let bans = Bans::default();
        for number in 0..10 {
            put(&bans, target("client", &format!("c{number}")), None);
            put(&bans, target("address", &format!("192.0.2.{number}")), None);
        }
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let page = bans.list(after.as_ref(), 3);
            let Some(last) = page.last() else { break };
            after = Some(last.ban.target.clone());
            seen.extend(page.into_iter().map(|view| view.ban.target));
        }
        assert_eq!(seen.len(), 20);
        assert!(seen.is_sorted());
    }
}
