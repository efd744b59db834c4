//! From a CONNECT to a session: who it is, whether it may, take over, claim the route, resume or make the
//! session, CONNACK.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use bytes::BytesMut;
use moorline_mqtt::{Connect, QoS, ReasonCode, SubscriptionOptions, TopicFilter, Version};
use moorline_router::{
    Claim, ClientId, Epoch, Position, SessionRecord, StoredSubscription, StoredWill,
};

use super::{Asked, HandshakeError};
use crate::aliases::SentAliases;
use crate::auth::Known;
use crate::auth::identity::Identity;
use crate::close_reason::{CloseReason, Refusal};
use crate::cluster::{
    self,
    connecting::{self, UnderWay},
};
use crate::connack::Granted;
use crate::connection::{Connection, ReceivedId};
use crate::ending;
use crate::listener_config::CertificateIdentity;
use crate::node::Node;
use crate::peer::Peer;
use crate::publish;
use crate::redispatch;
use crate::session::{HeldSubscription, InboxCursor, Link, Session};

/// Makes or takes over the session and answers CONNACK.
pub(super) async fn begin(
    node: &Arc<Node>,
    mut asked: Asked,
) -> Result<Connection, HandshakeError> {
    if node.is_draining() {
        return Err(HandshakeError::Refused(ReasonCode::ServerUnavailable));
    }
    if let Some(cluster) = &node.cluster {
        cluster.admits()?;
    }
    let connect = &asked.connect;
    if connect.properties.authentication_method.is_some() {
        // Enhanced authentication is not offered ([MQTT-4.12.0-1]).
        return Err(HandshakeError::Refused(ReasonCode::BadAuthenticationMethod));
    }
    if let Some(will) = connect.will.as_deref()
        && let Some(refusal) = publish::refuse_topic(&will.topic, &node.config)
    {
        return Err(HandshakeError::Refused(refusal.reason));
    }
    if Named::said(&asked).is_banned(node) {
        return Err(HandshakeError::NotAdmitted(Refusal::Banned));
    }
    // Before the claim: whoever may not have the client id must not displace whoever has it.
    let (client, assigned, identity) = identify(node, &asked).await?;
    asked.identity = identity;
    let connect = &asked.connect;
    let named = Named::known(&client, &asked);
    if named.is_banned(node) {
        return Err(HandshakeError::NotAdmitted(Refusal::Banned));
    }
    let granted = Granted::new(
        connect,
        &client,
        assigned,
        &node.config,
        asked.peer.listener.packet_bytes_max,
    );
    if !granted.fits(connect, &node.config) {
        return Err(HandshakeError::AnswerTooLarge);
    }
    let owning = node.owning(&client).await;
    let (claim, under_way) = match &node.cluster {
        Some(cluster) => {
            let (claim, under_way) = connecting::claim(node, cluster, &client).await?;
            (claim, Some(under_way))
        }
        None => (node.stores.routes.claim(&client, &node.id).await?, None),
    };
    let result = begin_owned(node, asked, &client, &granted, &claim, under_way.as_ref()).await;
    match (&result, &node.cluster) {
        (Ok(_), None) => {}
        (Ok(_), Some(cluster)) => cluster.online(node, &client, &claim),
        (Err(_), Some(cluster)) => connecting::abandon(node, cluster, &client, &claim).await,
        (Err(_), None) => {
            ending::abandon(node, &client).await;
            // Best effort: a route without a connection answers "not here", nothing worse.
            let _ = node.stores.routes.release(&client, claim.epoch).await;
        }
    }
    drop(under_way);
    drop(owning);
    // A ban that was made meanwhile found no connection to close.
    if let Ok(connection) = &result
        && named.is_banned(node)
        && let Some(link) = connection.session.lock().link_of(connection.epoch)
    {
        link.close(CloseReason::Banned);
    }
    result
}

/// What of a device may be banned.
struct Named {
    client: Option<ClientId>,
    username: Option<Box<str>>,
    address: Option<IpAddr>,
}

impl Named {
    /// What it says of itself, looked at before it costs anything to see whether that is true.
    fn said(asked: &Asked) -> Self {
        Self {
            client: ClientId::parse(&asked.connect.client_id).ok(),
            username: asked.connect.username.as_deref().map(Into::into),
            address: asked.peer.address.map(|address| address.ip()),
        }
    }

    fn known(client: &ClientId, asked: &Asked) -> Self {
        let said = Self::said(asked);
        Self {
            client: Some(client.clone()),
            username: match &asked.identity {
                Some(identity) => identity.username.clone(),
                None => said.username,
            },
            address: said.address,
        }
    }

    /// The address is looked at again: a ban may be newer than the connection.
    fn is_banned(&self, node: &Node) -> bool {
        let bans = &node.bans;
        let username = self.username.as_deref();
        let client = self.client.as_ref();
        client.is_some_and(|client| bans.forbids_client(client))
            || username.is_some_and(|name| bans.forbids_username(name))
            || self
                .address
                .is_some_and(|address| bans.forbids_address(address))
    }
}

/// Finds out who the device is and what it may be called; also whether the server chose that name.
async fn identify(
    node: &Arc<Node>,
    asked: &Asked,
) -> Result<(ClientId, bool, Option<Arc<Identity>>), HandshakeError> {
    let connect = &asked.connect;
    let authenticated = tokio::select! {
        known = node.auth.authenticate(&asked.peer, connect) => known,
        () = node.drain_begun() => {
            return Err(HandshakeError::Refused(ReasonCode::ServerUnavailable));
        }
    };
    let known = authenticated.map_err(HandshakeError::NotAuthenticated)?;
    let bound = known.as_ref().and_then(Known::client_id);
    let (client, assigned) = client_id(connect, &asked.peer, bound)?;
    let identity = known.map(|known| known.identity(&client));
    if let (Some(identity), Some(will)) = (&identity, &connect.will)
        && !identity.may_publish(will.topic.as_str())
    {
        node.metrics.denied_will.increment(1);
        return Err(HandshakeError::Refused(ReasonCode::NotAuthorized));
    }
    Ok((client, assigned, identity))
}

/// The id to go by, and whether CONNACK has to tell it: that of the certificate or the CONNECT, or else
/// the one that the device is bound to, or a new one.
fn client_id(
    connect: &Connect,
    peer: &Peer,
    bound: Option<&str>,
) -> Result<(ClientId, bool), HandshakeError> {
    let refused = || HandshakeError::Refused(ReasonCode::ClientIdentifierNotValid);
    if peer.certificate.is_some() && peer.takes_client_id_from_certificate() {
        let name = peer.certified(CertificateIdentity::ClientId);
        let id = name.and_then(|name| ClientId::parse(name).ok());
        let id = id.ok_or_else(refused)?;
        let said = &connect.client_id;
        return match said.is_empty() || **said == *id.as_str() {
            true => Ok((id, said.is_empty())),
            false => Err(refused()),
        };
    }
    let named = match connect.client_id.as_ref() {
        "" => bound.map(|bound| (bound, true)),
        own => Some((own, false)),
    };
    if let Some((named, assigned)) = named {
        let parsed = ClientId::parse(named);
        return parsed
            .map(|id| (id, assigned))
            .map_err(|_| HandshakeError::Refused(ReasonCode::ClientIdentifierNotValid));
    }
    if connect.version == Version::V3_1_1 && !connect.clean_start {
        // [MQTT-3.1.3-8]: nobody could come back to such a session.
        return Err(HandshakeError::Refused(
            ReasonCode::ClientIdentifierNotValid,
        ));
    }
    let made = format!("auto-{}", moorline_router::MessageId::generate());
    let id = ClientId::parse(&made).expect("a short ASCII text");
    Ok((id, true))
}

async fn begin_owned(
    node: &Arc<Node>,
    asked: Asked,
    client: &ClientId,
    granted: &Granted,
    claim: &Claim,
    under_way: Option<&UnderWay<'_>>,
) -> Result<Connection, HandshakeError> {
    let epoch = claim.epoch;
    let connect = &asked.connect;
    let (session, session_present) =
        take_session(node, client, connect, claim, granted.expiry_interval_s).await?;
    let mut denied = Vec::new();
    if !session_present {
        forget_deliveries(node, client, epoch).await?;
    } else if let Some(identity) = &asked.identity {
        denied = drop_denied(node, &session, identity);
    }
    if !denied.is_empty() && node.cluster.is_some() {
        silence(node, &session, epoch, &denied).await?;
    }
    save(node, &session, connect, epoch).await?;
    // Behind that write, so that what the connection before has noted is seen.
    let received = load_received(node, &session, session_present).await?;
    let attach = || attach(node, &session, &asked, granted, epoch, session_present);
    match under_way {
        Some(under_way) => under_way.attach(epoch, attach)?,
        None => attach(),
    }
    node.metrics.connections.increment(1.0);
    node.metrics.connects_accepted.increment(1);
    tracing::debug!(%client, %epoch, transport = asked.peer.listener.transport.label(asked.wire.is_encrypted()), session_present, "connected");
    let address = asked.peer.address;
    let exempt = address.is_none_or(|address| node.admission.is_exempt(address.ip()));
    Ok(Connection {
        node: Arc::clone(node),
        session,
        wire: asked.wire,
        epoch,
        version: connect.version,
        explains: connect.properties.request_problem_information == Some(true),
        reader: asked.reader,
        pending: VecDeque::new(),
        pending_bytes: 0,
        received,
        page: None,
        aliases: None,
        feeding: true,
        fences: None,
        waiting: None,
        meter: node.device_rates.meter(),
        may_flap: !exempt,
    })
}

/// The session to go on with, and whether there was one. Whoever held it is closed first.
async fn take_session(
    node: &Arc<Node>,
    client: &ClientId,
    connect: &Connect,
    claim: &Claim,
    expiry_interval_s: u32,
) -> Result<(Arc<Session>, bool), HandshakeError> {
    if let Some(cluster) = &node.cluster {
        make_room(node)?;
        let taken =
            connecting::take_session(node, cluster, client, connect, claim, expiry_interval_s);
        return Ok(taken.await?);
    }
    if let Some(session) = node.session(client) {
        let (settled, old, resumes) = {
            let mut state = session.lock();
            let resumes = state.is_persistent() && !connect.clean_start && !state.ended;
            let settled = node.handovers.await_settled(client, &state);
            (settled, take_over(&mut state), resumes)
        };
        settled.wait(ending::SETTLED_TIMEOUT).await;
        if let Some(mut old) = old {
            node.metrics.closed(CloseReason::TakenOver);
            ending::will_of_taken_over(node, client, &mut old, resumes).await;
        }
        if resumes {
            node.timers.cancel_expiry(client);
            if let Some((epoch, _)) = node.timers.take_will(client) {
                // Back in time: the delayed will is not published [MQTT-3.1.3-9].
                node.stores.sessions.delete_will(client, epoch).await?;
            }
            session.lock().expiry_interval_s = expiry_interval_s;
            return Ok((session, true));
        }
        ending::end_session(node, &session).await?;
        if let Some((epoch, will)) = node.timers.take_will(client) {
            // The session has ended, and the will is published no later than that.
            ending::publish_will(node, client, epoch, &will).await;
        }
    }
    make_room(node)?;
    let session = Arc::new(Session::new(client.clone(), expiry_interval_s));
    node.sessions.insert(client.clone(), Arc::clone(&session));
    node.metrics.sessions.increment(1.0);
    Ok((session, false))
}

fn make_room(node: &Node) -> Result<(), HandshakeError> {
    let sessions_max = node.config.sessions_max;
    if sessions_max > 0 && node.sessions.len() >= sessions_max {
        return Err(HandshakeError::NotAdmitted(Refusal::SessionsMax));
    }
    Ok(())
}

fn take_over(state: &mut crate::session::State) -> Option<Link> {
    if let Some(link) = &mut state.link {
        link.close(CloseReason::TakenOver);
    }
    state.detach()
}

/// Ends what the resumed session is subscribed to and this device may not have (any more), and gives it.
fn drop_denied(node: &Node, session: &Arc<Session>, identity: &Identity) -> Vec<HeldSubscription> {
    let may = |held: &HeldSubscription| {
        let filter = TopicFilter::parse(held.filter.as_ref().into());
        filter.is_ok_and(|filter| identity.may_subscribe(&filter))
    };
    let denied: Vec<HeldSubscription> = {
        let mut state = session.lock();
        let (kept, denied) = std::mem::take(&mut state.subscriptions)
            .into_iter()
            .partition(may);
        state.subscriptions = kept;
        if let Some(feed) = &mut state.feed {
            // Of what is retained, too, it has got only a part so far.
            denied.iter().for_each(|held| feed.remove(&held.filter));
        }
        denied
    };
    for held in &denied {
        node.metrics.denied_resume.increment(1);
        tracing::info!(client = %session.client, filter = &*held.filter, "subscription ended, the device may no longer have it");
        node.unsubscribe(&held.filter, session);
    }
    denied
}

/// Has whoever matches for this session go on without what is `denied`, before the device is let in. Until that is done it
/// stays in the stored session, as subscriptions of QoS 0, for which nobody matches there: so the next connect finds
/// it and tries again.
async fn silence(
    node: &Arc<Node>,
    session: &Session,
    epoch: Epoch,
    denied: &[HeldSubscription],
) -> Result<(), HandshakeError> {
    let mut record = SessionRecord {
        disconnected_at_ms: None,
        ..session.lock().record(&session.client)
    };
    let silenced = denied.iter().map(|held| StoredSubscription {
        options: SubscriptionOptions {
            qos: QoS::AtMostOnce,
            ..held.options
        },
        ..held.stored()
    });
    record.subscriptions.extend(silenced);
    node.stores.sessions.save(epoch, record).await?;
    cluster::session_changed(node, &session.client).await?;
    Ok(())
}

/// A new session gets what waits for the client as if for the first time. The call also stands behind
/// the acknowledgements of the connection before, so that nothing acknowledged is read again.
async fn forget_deliveries(
    node: &Node,
    client: &ClientId,
    epoch: Epoch,
) -> Result<(), HandshakeError> {
    let inboxes = &node.stores.inboxes;
    let known = matches!(
        inboxes.tails(std::slice::from_ref(client)).await?[..],
        [Some(_)]
    );
    // Of what waits since before a restart the tails know nothing.
    let waits = known || {
        let page = inboxes.read(client, Position::START, 1, 1).await?;
        !page.entries.is_empty()
    };
    if waits && inboxes.end_session(client, Some(epoch)).await? > 0 {
        redispatch::from_inbox(node, client).await?;
    }
    Ok(())
}

async fn load_received(
    node: &Node,
    session: &Session,
    session_present: bool,
) -> Result<BTreeMap<moorline_mqtt::PacketId, ReceivedId>, HandshakeError> {
    if !session_present {
        return Ok(BTreeMap::new());
    }
    let received = node.stores.sessions.received(&session.client).await?;
    let by_id = received.into_iter().map(|one| {
        (
            one.packet_id,
            ReceivedId {
                message_id: Some(one.message_id),
                done: one.done,
                here: false,
            },
        )
    });
    Ok(by_id.collect())
}

/// What must outlive the process is durable before CONNACK says so.
async fn save(
    node: &Node,
    session: &Session,
    connect: &Connect,
    epoch: Epoch,
) -> Result<(), HandshakeError> {
    let record = {
        let mut state = session.lock();
        state.disconnected_at_ms = 0;
        state.stored |= state.is_persistent();
        // Also where it ends with this connection from now on: a process that dies ends it too.
        state.stored.then(|| SessionRecord {
            disconnected_at_ms: None,
            ..state.record(&session.client)
        })
    };
    if let Some(record) = record {
        node.stores.sessions.save(epoch, record).await?;
    }
    if let Some(will) = connect.will.as_deref() {
        let will = StoredWill {
            epoch,
            will: will.clone(),
        };
        node.stores
            .sessions
            .save_will(&session.client, will)
            .await?;
    }
    Ok(())
}

/// Puts the connection into the session. From here on deliverers write to it, so CONNACK is the
/// first thing in its buffer.
fn attach(
    node: &Node,
    session: &Arc<Session>,
    asked: &Asked,
    granted: &Granted,
    epoch: Epoch,
    session_present: bool,
) {
    let connect = &asked.connect;
    let properties = &connect.properties;
    let device_window = properties.receive_maximum.map_or(u16::MAX, NonZeroU16::get);
    let mut link = Link {
        wire: Arc::clone(&asked.wire),
        epoch,
        version: connect.version,
        transport: asked.peer.listener.transport,
        keep_alive_s: granted.keep_alive_s,
        window: device_window.min(node.config.in_flight_max),
        packet_bytes_max: properties.maximum_packet_size.unwrap_or(u32::MAX),
        aliases: SentAliases::new(
            properties.topic_alias_maximum.unwrap_or(0),
            node.config.topic_alias_max,
        ),
        unsent: BytesMut::new(),
        corked: false,
        closing: None,
        settled: false,
        // A will is kept as long as the connection: it must not hold on to the read buffer.
        had_will: connect.will.is_some(),
        will: connect.will.as_ref().map(|will| Box::new(will.copied())),
        identity: asked.identity.clone(),
        is_new: !session_present,
    };
    link.append_bytes(&granted.connack(connect, &node.config, session_present));
    let mut state = session.lock();
    state.inbox = InboxCursor::START;
    link.flush();
    state.link = Some(link);
    state.call_for_page();
    drop(state);
    let now_s = node.clock.now_s();
    node.wheel
        .watch(session, epoch, now_s, granted.keep_alive_s);
}
