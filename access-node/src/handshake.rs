//! From an accepted socket to a CONNECT: PROXY header, TLS, WebSocket upgrade; [`begin`] makes a session of it.
//!
//! All of it runs in the connection's own task, boxed and under one deadline, so that neither a
//! silent peer nor a slow store holds up anyone else, and nothing of it stays in the task.

mod begin;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{
    ConnAck, ConnAckProperties, Connect, DecodeError, Decoder, Packet, ReasonCode, Version,
};
use moorline_router::StoreError;
use tokio::net::TcpStream;

use crate::admission::HalfOpen;
use crate::auth;
use crate::auth::identity::Identity;
use crate::certificates;
use crate::close_reason::Refusal;
use crate::connack;
use crate::connection::Connection;
use crate::node::Node;
use crate::peer::Peer;
use crate::proxy::{self, ProxyError};
use crate::reader::{ReadError, Reader};
use crate::refusal::Telling;
use crate::session::Transport;
use crate::tls::{self, TlsError};
use crate::wire::Wire;
use crate::ws;

/// Why no session came of a socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("the first packet is not CONNECT")]
    NotConnect,
    #[error("no CONNECT within {0:?}")]
    TimedOut(std::time::Duration),
    #[error("the device takes no packet as large as the CONNACK")]
    AnswerTooLarge,
    #[error("refused: {0:?}")]
    Refused(ReasonCode),
    #[error("refused: {}", .0.label())]
    NotAdmitted(Refusal),
    #[error("refused: {:?}", .0.reason_code())]
    NotAuthenticated(auth::Refusal),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl HandshakeError {
    /// The value of the metric label `reason`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Read(ReadError::Ended | ReadError::Network(_)) => "connection_lost",
            Self::Read(ReadError::WebSocket(_)) => "not_websocket",
            Self::Proxy(ProxyError::Network(_)) | Self::Tls(TlsError::Network(_)) => {
                "connection_lost"
            }
            Self::Read(ReadError::Tls(_)) | Self::Tls(_) => "tls",
            Self::Proxy(_) => "proxy_header",
            Self::Decode(_) => "malformed",
            Self::NotConnect => "not_connect",
            Self::TimedOut(_) => "handshake_timeout",
            Self::Refused(ReasonCode::ClientIdentifierNotValid) => "client_id",
            Self::Refused(ReasonCode::NotAuthorized) => "not_authorized",
            Self::Refused(ReasonCode::ServerUnavailable) => "server_shutting_down",
            Self::Refused(_) => "refused",
            Self::AnswerTooLarge => "answer_too_large",
            Self::NotAdmitted(refusal) => refusal.label(),
            Self::NotAuthenticated(refusal) => refusal.reason(),
            Self::Store(_) => "store_unavailable",
        }
    }
}

/// Runs the handshake; gives the connection and what came behind its CONNECT. What is learned of
/// the peer on the way goes into `peer`.
pub(crate) async fn accept(
    node: &Arc<Node>,
    stream: TcpStream,
    peer: &mut Peer,
    half_open: &mut HalfOpen,
) -> Result<(Connection, Bytes), HandshakeError> {
    let limit = peer.listener.handshake_timeout;
    // Only the device is timed: what follows changes sessions and must not be cut off half-way.
    let opening = tokio::time::timeout(limit, async {
        tokio::select! {
            opened = open(node, stream, peer, half_open) => opened,
            () = node.drain_begun() => Err(HandshakeError::Refused(ReasonCode::ServerUnavailable)),
        }
    })
    .await;
    let (asked, rest) = opening.map_err(|_| HandshakeError::TimedOut(limit))??;
    let version = asked.connect.version;
    let answer_bytes_max = connack::device_packet_bytes_max(&asked.connect);
    let wire = Arc::clone(&asked.wire);
    match begin::begin(node, asked).await {
        Ok(connection) => Ok((connection, rest)),
        Err(error) => {
            let reason = match &error {
                HandshakeError::Refused(reason) => *reason,
                HandshakeError::NotAdmitted(refusal) => refusal.reason_code(),
                HandshakeError::AnswerTooLarge => ReasonCode::PacketTooLarge,
                HandshakeError::NotAuthenticated(refusal) => refusal.reason_code(),
                _ => ReasonCode::ServerUnavailable,
            };
            refuse(
                &wire,
                peer.listener.transport,
                version,
                reason,
                answer_bytes_max,
            );
            Err(error)
        }
    }
}

/// Reads up to and with the CONNECT; gives what came behind it.
async fn open(
    node: &Node,
    stream: TcpStream,
    peer: &mut Peer,
    half_open: &mut HalfOpen,
) -> Result<(Asked, Bytes), HandshakeError> {
    let settings = Arc::clone(&peer.listener);
    let proxied = read_proxy_header(&stream, peer).await?;
    if let Some(client) = proxied {
        let admitted = half_open.locate(client.ip(), &node.clock);
        admitted.map_err(HandshakeError::NotAdmitted)?;
    }
    let tls = match &settings.tls {
        Some(certificates) => {
            let tls = tls::accept(&stream, certificates.current(), &node.handshake_turns).await?;
            let chain = tls.agreed().peer_certificates().unwrap_or_default();
            peer.certificate = certificates::of_peer(chain)?.map(Arc::new);
            Some(tls)
        }
        None => None,
    };
    let (read, write) = stream.into_split();
    // Nobody knows yet who this is, and many of them may be kept waiting at once.
    let connect_bytes_max = settings.packet_bytes_max.min(node.config.connect_bytes_max);
    let mut reader = Reader::new(read, Decoder::server(connect_bytes_max));
    let wire = Arc::new(Wire::new(write, node.clock.now_s(), tls, proxied));
    let mut first = Bytes::new();
    if settings.transport == Transport::WebSocket {
        first = upgrade(&mut reader, &wire).await?;
        reader.speak_websocket();
    }
    match read_connect(&mut reader, &wire, first).await {
        Ok((connect, rest)) => {
            reader
                .decoder
                .set_packet_bytes_max(settings.packet_bytes_max);
            let asked = Asked {
                connect,
                peer: peer.clone(),
                wire,
                reader,
                identity: None,
            };
            Ok((asked, rest))
        }
        Err(error) => {
            if let HandshakeError::Decode(error) = &error {
                refuse_undecodable(&wire, settings.transport, error);
            }
            Err(error)
        }
    }
}

/// The client's own address, where the listener is behind a proxy and the proxy tells it.
async fn read_proxy_header(
    stream: &TcpStream,
    peer: &mut Peer,
) -> Result<Option<SocketAddr>, HandshakeError> {
    if peer.listener.proxy_protocol_from.is_empty() {
        return Ok(None);
    }
    if !peer
        .address
        .is_some_and(|from| peer.listener.trusts(from.ip()))
    {
        return Err(ProxyError::Untrusted.into());
    }
    let proxied = proxy::read_header(stream).await?;
    peer.address = proxied.or(peer.address);
    Ok(proxied)
}

/// A CONNECT that was read, with everything needed to answer it.
struct Asked {
    connect: Box<Connect>,
    peer: Peer,
    wire: Arc<Wire>,
    reader: Reader,
    /// Who it is, once that is known.
    identity: Option<Arc<Identity>>,
}

/// Answers the WebSocket upgrade; gives what came behind it.
async fn upgrade(reader: &mut Reader, wire: &Wire) -> Result<Bytes, HandshakeError> {
    let mut request = BytesMut::new();
    loop {
        request.extend_from_slice(&poll_fn(|context| reader.poll_raw(context, wire)).await?);
        match ws::upgrade(&request) {
            Ok(None) => {}
            Ok(Some((used, response))) => {
                send_all(wire, &response);
                return Ok(request.freeze().slice(used..));
            }
            Err(error) => {
                send_all(wire, &ws::refusal(&error));
                return Err(ReadError::from(error).into());
            }
        }
    }
}

async fn read_connect(
    reader: &mut Reader,
    wire: &Wire,
    first: Bytes,
) -> Result<(Box<Connect>, Bytes), HandshakeError> {
    let mut received = reader.accept(first)?;
    loop {
        if let Some(answer) = &received.answer {
            send_all(wire, &answer.frames);
            if answer.closed {
                return Err(ReadError::Ended.into());
            }
        }
        let mut data = received.data;
        match reader.next_packet(&mut data)? {
            Some(Packet::Connect(connect)) => return Ok((connect, data)),
            Some(_) => return Err(HandshakeError::NotConnect),
            None => received = poll_fn(|context| reader.poll_receive(context, wire)).await?,
        }
    }
}

/// A fresh socket takes a few hundred bytes at once; one that does not is dropped.
fn send_all(wire: &Wire, bytes: &[u8]) {
    let mut unsent = BytesMut::from(bytes);
    // The next read tells of an error.
    let _ = wire.write(&mut unsent);
}

fn refuse(
    wire: &Wire,
    transport: Transport,
    version: Version,
    reason: ReasonCode,
    packet_bytes_max: usize,
) {
    let telling = Telling {
        version,
        packet_bytes_max,
        explains: true,
    };
    let encoded = telling.explained(why_refused(reason), |reason_string| {
        Packet::ConnAck(Box::new(ConnAck {
            session_present: false,
            reason,
            properties: ConnAckProperties {
                reason_string,
                ..ConnAckProperties::default()
            },
        }))
    });
    let mut out = BytesMut::new();
    if transport == Transport::WebSocket {
        ws::begin_frame(encoded.len(), &mut out);
        out.extend_from_slice(&encoded);
        ws::close_frame(&mut out);
    } else {
        out = encoded;
    }
    send_all(wire, &out);
    wire.finish_sending();
}

/// For the Reason String; silent about what may help to guess credentials.
fn why_refused(reason: ReasonCode) -> &'static str {
    match reason {
        ReasonCode::ClientIdentifierNotValid => "the client identifier cannot be used",
        ReasonCode::BadAuthenticationMethod => "enhanced authentication is not offered",
        ReasonCode::TopicNameInvalid => "the will's topic begins with $ or has too many levels",
        ReasonCode::ServerUnavailable => "not ready to take devices; connect again later",
        ReasonCode::PacketTooLarge => "the Maximum Packet Size leaves no room for a CONNACK",
        _ => "",
    }
}

/// A CONNECT of another version is told so ([MQTT-3.1.2-2]); other bytes get no answer, because
/// what sent them may not be a client of MQTT at all.
fn refuse_undecodable(wire: &Wire, transport: Transport, error: &DecodeError) {
    if error.reason_code() == ReasonCode::UnsupportedProtocolVersion {
        refuse(
            wire,
            transport,
            Version::V3_1_1,
            ReasonCode::UnsupportedProtocolVersion,
            usize::MAX,
        );
    }
}
