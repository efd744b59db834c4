//! How a device that connects to this node gets what it left on another one, and the other way round.
//!
//! A connect claims the route first. Then the node of the connection before closes that one, and answers when what it took
//! from the device is stored or refused; then the stores have everything, and the session is loaded from there. A node
//! that does not answer is passed by: what it may still write carries an epoch that is refused by now.
//!
//! Two connects of one client may be under way on two nodes, each waiting for the other. Neither has a connection that
//! could be closed yet, so the older one is only [noted](Connecting::displaced) as displaced, and gives up when it is about to have one.

use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use dashmap::DashMap;
use moorline_mqtt::Connect;
use moorline_router::{
    Claim, ClientId, Displaced, Epoch, Nodes, SessionRecord, StoreError, TimerKind, unix_ms,
};

use super::departure::{self, Departure, WillFate};
use super::{Membership, Peers, shard};
use crate::close_reason::CloseReason;
use crate::ending::SETTLED_TIMEOUT;
use crate::node::Node;
use crate::restore;
use crate::session::Session;

/// How long a claim may take. Without an answer it may have been made all the same.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the node of the connection before has to close it.
const DISPLACE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects that have claimed, or are about to, and have no connection yet: with the newest epoch that displaces them.
#[derive(Debug, Default)]
pub(crate) struct Connecting {
    under_way: DashMap<ClientId, Option<Epoch>, RandomState>,
}

/// One of them, until it is dropped.
pub(crate) struct UnderWay<'a> {
    of: &'a Connecting,
    client: &'a ClientId,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.of.under_way.remove(self.client);
    }
}

impl Connecting {
    /// To be called before the claim, under the client's stripe.
    fn begin<'a>(&'a self, client: &'a ClientId) -> UnderWay<'a> {
        self.under_way.insert(client.clone(), None);
        UnderWay { of: self, client }
    }

    /// A connect with the epoch `by` displaces the one that is under way, if that is older.
    fn displaced(&self, client: &ClientId, by: Epoch) {
        if let Some(mut newest) = self.under_way.get_mut(client) {
            *newest = newest.max(Some(by));
        }
    }
}

impl UnderWay<'_> {
    /// Makes the connection `epoch` unless it is displaced already: whoever displaces it from now on finds it.
    pub(crate) fn attach(&self, epoch: Epoch, attach: impl FnOnce()) -> Result<(), StoreError> {
        let newest = self.of.under_way.get_mut(self.client);
        match newest.as_deref() {
            Some(Some(newest)) if *newest > epoch => Err(StoreError::Stale { current: *newest }),
            _ => {
                attach();
                Ok(())
            }
        }
    }
}

/// Claims the route of `client`.
pub(crate) async fn claim<'a>(
    node: &Arc<Node>,
    cluster: &'a Membership,
    client: &'a ClientId,
) -> Result<(Claim, UnderWay<'a>), StoreError> {
    cluster.admits()?;
    // What the connection before has not been able to store comes first: it would be refused afterwards.
    cluster
        .link
        .note(departure::finish(node, cluster, client).await)?;
    let under_way = cluster.connecting.begin(client);
    let claim = node.stores.routes.claim(client, &node.id);
    let claimed = match tokio::time::timeout(CLAIM_TIMEOUT, claim).await {
        Ok(claimed) => claimed,
        Err(_) => Err(StoreError::Unavailable("no answer to a claim".to_owned())),
    };
    if matches!(claimed, Err(StoreError::Unavailable(_))) {
        cluster.departures.doubt_claim(client);
    }
    Ok((cluster.link.note(claimed)?, under_way))
}

/// The session to go on with, and whether there was one. Whoever held it is closed first.
pub(crate) async fn take_session(
    node: &Arc<Node>,
    cluster: &Membership,
    client: &ClientId,
    connect: &Connect,
    claim: &Claim,
    expiry_interval_s: u32,
) -> Result<(Arc<Session>, bool), StoreError> {
    let ended_here = close_here(node, client).await?;
    // That of the connection before, not of one that had been displaced already.
    let mut session_over = ended_here.is_some_and(|epoch| {
        let previous = claim.previous.as_ref();
        previous.is_some_and(|route| route.epoch == epoch)
    });
    session_over |= cluster.departures.ended_before(client, claim.epoch);
    if let Some(previous) = claim
        .previous
        .as_ref()
        .filter(|route| route.node != node.id)
    {
        let peers = Peers::of(node);
        let displaced = peers.displace(&previous.node, client, claim.epoch);
        match tokio::time::timeout(DISPLACE_TIMEOUT, displaced).await {
            Ok(Ok(displaced)) => session_over |= displaced.session_over,
            Ok(Err(error)) => {
                tracing::debug!(%client, node = %previous.node, %error, "previous node passed by");
            }
            Err(_) => {
                tracing::debug!(%client, node = %previous.node, "previous node passed by, no answer")
            }
        }
    }
    let sessions = &node.stores.sessions;
    let (record, will) = tokio::join!(sessions.load(client), sessions.will(client));
    let (record, will) = (record?, will?);
    let resumed = match &record {
        Some(record) if !connect.clean_start && !session_over && !is_over(record) => Some(record),
        _ => None,
    };
    if let Some(stored) = will.filter(|stored| stored.epoch < claim.epoch) {
        // As where one node has both connections: a delayed will of a session that goes on is not published
        // [MQTT-3.1.3-9], any other that nobody took back is.
        if stored.will.delay_interval_s > 0 && resumed.is_some() {
            sessions.delete_will(client, stored.epoch).await?;
        } else {
            departure::publish_will_later(node, client, stored.epoch, stored.will);
        }
    }
    let shards = &cluster.given.shards;
    let will_cancelled = shards.cancel_timer(client, TimerKind::Will, claim.epoch);
    let expiry_cancelled = shards.cancel_timer(client, TimerKind::SessionExpiry, claim.epoch);
    will_cancelled.await?;
    expiry_cancelled.await?;
    let session = Arc::new(Session::new(client.clone(), expiry_interval_s));
    if let Some(record) = resumed {
        session.lock().stored = true;
        for stored in &record.subscriptions {
            restore::restore_subscription(node, &session, stored);
        }
    } else if record.is_some() {
        shard::end_stored_session(node, client, claim.epoch).await?;
        super::tell_holder(node, client).await;
    }
    node.sessions.insert(client.clone(), Arc::clone(&session));
    node.metrics.sessions.increment(1.0);
    Ok((session, resumed.is_some()))
}

/// Whether the session ended although nobody has seen to that yet.
fn is_over(record: &SessionRecord) -> bool {
    let ends_at_ms = |ended_ms: u64| ended_ms + u64::from(record.expiry_interval_s) * 1000;
    match record.expiry_interval_s {
        0 => true,
        u32::MAX => false,
        _ => record
            .disconnected_at_ms
            .is_some_and(|at_ms| ends_at_ms(at_ms) <= unix_ms()),
    }
}

/// Closes the connection that this node has of `client`, and forgets its session; gives the epoch of a connection with which the
/// device had ended that.
async fn close_here(node: &Arc<Node>, client: &ClientId) -> Result<Option<Epoch>, StoreError> {
    let Some(session) = node.session(client) else {
        return Ok(None);
    };
    close_session(node, &session).await
}

async fn close_session(
    node: &Arc<Node>,
    session: &Arc<Session>,
) -> Result<Option<Epoch>, StoreError> {
    let (settled, closed) = {
        let mut state = session.lock();
        let settled = node.handovers.await_settled(&session.client, &state);
        if let Some(link) = &mut state.link {
            link.close(CloseReason::TakenOver);
        }
        (settled, state.detach().map(|link| link.epoch))
    };
    if closed.is_some() {
        node.metrics.closed(CloseReason::TakenOver);
    }
    settled.wait(SETTLED_TIMEOUT).await;
    let ends_session = session.lock().expiry_interval_s == 0;
    forget(node, session).await?;
    Ok(closed.filter(|_| ends_session))
}

/// Drops the session from the node's memory: the stores have what goes on.
pub(crate) async fn forget(node: &Arc<Node>, session: &Arc<Session>) -> Result<(), StoreError> {
    let (filters, shared) = {
        let mut state = session.lock();
        (state.end(), state.shared.take())
    };
    for held in &filters {
        node.unsubscribe(&held.filter, session);
    }
    let is_this = |_: &ClientId, current: &Arc<Session>| Arc::ptr_eq(current, session);
    if node.sessions.remove_if(&session.client, is_this).is_some() {
        node.metrics.sessions.decrement(1.0);
    }
    match shared {
        Some(shared) => crate::redispatch::orphans(node, shared.into_orphans()).await,
        None => Ok(()),
    }
}

/// A connect on another node, with the epoch `by`, displaces what this node has of `client`. Resolves when that has
/// ended here.
pub(crate) async fn displace(
    node: &Arc<Node>,
    cluster: &Membership,
    client: &ClientId,
    by: Epoch,
) -> Result<Displaced, StoreError> {
    // Before the connection is looked for: a connect that is about to have one looks at this afterwards.
    cluster.connecting.displaced(client, by);
    let session = node.session(client).filter(|session| {
        let state = session.lock();
        state.link.as_ref().is_some_and(|link| link.epoch < by)
    });
    let found = session.is_some();
    let mut session_over = match session {
        Some(session) => close_session(node, &session).await?.is_some(),
        None => false,
    };
    cluster.departures.over(client).await;
    departure::finish(node, cluster, client).await?;
    session_over |= cluster.departures.ended_before(client, by);
    Ok(Displaced {
        found,
        session_over,
    })
}

/// Undoes a connect that has failed behind its claim.
pub(crate) async fn abandon(
    node: &Arc<Node>,
    cluster: &Membership,
    client: &ClientId,
    claim: &Claim,
) {
    if let Some(session) = node.session(client)
        && let Err(error) = forget(node, &session).await
    {
        tracing::debug!(%client, %error, "session of a failed connect not forgotten");
    }
    let undone = async {
        // A connection that never was has no will.
        let sessions = &node.stores.sessions;
        sessions.delete_will(client, claim.epoch).await?;
        let will = sessions.will(client).await?;
        let record = sessions.load(client).await?;
        Ok::<_, StoreError>((will, record))
    };
    let Ok((will, record)) = cluster.link.note(undone.await) else {
        cluster.departures.doubt_claim(client);
        return;
    };
    let departure = Departure {
        client: client.clone(),
        epoch: claim.epoch,
        node: node.id.clone(),
        // Whoever was connected before has been displaced for nothing.
        offline: claim.previous.as_ref().map(|_| "connect_failed"),
        will: match will {
            Some(stored) if stored.epoch < claim.epoch => WillFate::ByTimer(Box::new(stored.will)),
            _ => WillFate::None,
        },
        record,
        tried: false,
    };
    departure::depart(node, cluster, departure).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> ClientId {
        ClientId::parse("car-7").unwrap()
    }

    #[test]
    fn a_connect_that_is_displaced_on_its_way_never_gets_a_connection() {
        let connecting = Connecting::default();
        let client = client();
        let attached = |under_way: &UnderWay<'_>, epoch| {
            let mut attached = false;
            let result = under_way.attach(Epoch(epoch), || attached = true);
            assert_eq!(result.is_ok(), attached);
            attached
        };
        connecting.displaced(&client, Epoch(9));
        let under_way = connecting.begin(&client);
        assert!(attached(&under_way, 5));
        drop(under_way);
        let under_way = connecting.begin(&client);
        connecting.displaced(&client, Epoch(7));
        connecting.displaced(&client, Epoch(4));
        assert!(!attached(&under_way, 6));
        assert!(attached(&under_way, 8));
        drop(under_way);
        assert!(connecting.under_way.is_empty());
    }

    #[test]
    fn a_session_is_over_when_its_time_is_whoever_has_noticed() {
        let record = |expiry_interval_s, disconnected_at_ms| SessionRecord {
            client: client(),
            expiry_interval_s,
            disconnected_at_ms,
            subscriptions: Vec::new(),
        };
        let now_ms = unix_ms();
        assert!(is_over(&record(0, None)));
        assert!(!is_over(&record(10, None)));
        assert!(!is_over(&record(10, Some(now_ms - 5_000))));
        assert!(is_over(&record(10, Some(now_ms - 10_000))));
        assert!(!is_over(&record(u32::MAX, Some(0))));
    }
}
