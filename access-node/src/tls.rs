//! TLS of one connection, between the socket and the MQTT (or WebSocket) stream.
//!
//! The record layer holds no buffer of its own: what comes is decrypted in the buffer that the
//! thread lends, and of what goes only the record that the socket did not take is kept. Plaintext is
//! encrypted when the socket has taken the record before, never earlier, so what waits for a slow
//! device waits as plaintext where the session's limits count it.
//!
//! Not certificates: those are [`crate::certificates`].

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::{Buf as _, BytesMut};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, InsufficientSizeError,
    UnbufferedStatus,
};
use rustls::{CommonState, ServerConfig};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::wire;

/// Plaintext of one record: two pooled buffers hold it.
const RECORD_BYTES: usize = 8 * 1024;
/// Bytes of a handshake that may be gathered before they make sense. The largest message that is
/// taken has 64 KiB.
const GATHERED_BYTES_MAX: usize = 80 * 1024;
/// Answers of the record layer itself that a peer may leave untaken.
const UNTAKEN_BYTES_MAX: usize = 64 * 1024;

/// Why there is no TLS, or no more of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("TLS: {0}")]
    Protocol(#[from] rustls::Error),
    #[error("TLS: the peer sends messages that have no end, or takes no answers")]
    Unbounded,
    #[error("TLS: broken off before")]
    Broken,
    #[error("TLS: the device's certificate was found good but cannot be read")]
    Certificate,
    #[error(transparent)]
    Network(#[from] io::Error),
}

/// What is to be said besides whatever the protocol itself asks for.
#[derive(Clone, Copy)]
enum Saying<'a> {
    Nothing,
    Data(&'a [u8]),
    Goodbye,
}

/// The state of one connection's TLS.
pub(crate) struct Tls {
    connection: UnbufferedServerConnection,
    /// The beginning of a record or of a message. The record layer may hold offsets into it, so it
    /// goes into every call.
    gathered: BytesMut,
    /// Decrypted and not read yet; empty but within a call, and after the handshake.
    opened: BytesMut,
    /// Encrypted and not taken by the socket yet.
    sealed: BytesMut,
    /// The peer says no more.
    ended: bool,
    /// An error was met; there is nothing to go on with.
    broken: bool,
}

impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tls")
            .field("gathered", &self.gathered.len())
            .field("sealed", &self.sealed.len())
            .finish_non_exhaustive()
    }
}

/// Runs the handshake. `turns` are those of computing, which takes its turn with everything else on
/// the thread; waiting for the peer takes none.
pub(crate) async fn accept(
    stream: &TcpStream,
    config: Arc<ServerConfig>,
    turns: &Semaphore,
) -> Result<Tls, TlsError> {
    let mut tls = Tls::new(config)?;
    loop {
        let open = {
            let _turn = turns.acquire().await.expect("never closed");
            // Devices that are connected come first.
            tokio::task::yield_now().await;
            tls.advance(Saying::Nothing)
        };
        // An alert is to be sent as well.
        let sent = send_all(stream, &mut tls.sealed).await;
        if open? {
            sent?;
            tls.release();
            return Ok(tls);
        }
        sent?;
        if tls.ended {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        tls.gather(stream).await?;
    }
}

async fn send_all(stream: &TcpStream, sealed: &mut BytesMut) -> io::Result<()> {
    while !sealed.is_empty() {
        stream.writable().await?;
        write(stream, sealed)?;
    }
    Ok(())
}

/// Writes as much as the socket takes.
fn write(stream: &TcpStream, sealed: &mut BytesMut) -> io::Result<()> {
    while !sealed.is_empty() {
        match stream.try_write(sealed) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => sealed.advance(written),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Tls {
    fn new(config: Arc<ServerConfig>) -> Result<Self, TlsError> {
        Ok(Self {
            connection: UnbufferedServerConnection::new(config)?,
            gathered: BytesMut::new(),
            opened: BytesMut::new(),
            sealed: BytesMut::new(),
            ended: false,
            broken: false,
        })
    }

    /// What the handshake agreed on.
    pub(crate) fn agreed(&self) -> &CommonState {
        &self.connection
    }

    pub(crate) fn has_sealed(&self) -> bool {
        !self.sealed.is_empty()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// What was decrypted with the end of the handshake.
    pub(crate) fn take_opened(&mut self) -> BytesMut {
        std::mem::take(&mut self.opened)
    }

    async fn gather(&mut self, stream: &TcpStream) -> Result<(), TlsError> {
        loop {
            stream.readable().await?;
            self.gathered.reserve(1024);
            match stream.try_read_buf(&mut self.gathered) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Decrypts `received` and appends the plaintext to `out`. What is torn at its end is kept.
    pub(crate) fn open(&mut self, received: BytesMut, out: &mut BytesMut) -> Result<(), TlsError> {
        let lent = self.gathered.is_empty();
        if lent {
            self.gathered = received;
        } else {
            self.gathered.extend_from_slice(&received);
        }
        std::mem::swap(&mut self.opened, out);
        let result = self.advance(Saying::Nothing);
        std::mem::swap(&mut self.opened, out);
        if lent {
            // What is torn must not hold the buffer that the thread lent.
            self.gathered = BytesMut::from(&self.gathered[..]);
        }
        self.release();
        result.map(|_| ())
    }

    /// Encrypts and writes as much of `plaintext` as the socket takes; what is left stays in it.
    pub(crate) fn write(&mut self, stream: &TcpStream, plaintext: &mut BytesMut) -> io::Result<()> {
        loop {
            write(stream, &mut self.sealed)?;
            if !self.sealed.is_empty() {
                return Ok(());
            }
            if plaintext.is_empty() {
                wire::return_buffer(std::mem::take(&mut self.sealed));
                return Ok(());
            }
            let length = plaintext.len().min(RECORD_BYTES);
            let open = self.advance(Saying::Data(&plaintext[..length]));
            if !open.map_err(io::Error::other)? {
                return Err(io::ErrorKind::NotConnected.into());
            }
            if length == plaintext.len() {
                plaintext.clear();
            } else {
                plaintext.advance(length);
            }
        }
    }

    /// Says that no more will come, if the socket takes it.
    pub(crate) fn finish(&mut self, stream: &TcpStream) {
        // The end of the connection says the same to a peer that does not take it.
        if write(stream, &mut self.sealed).is_ok()
            && self.sealed.is_empty()
            && self.advance(Saying::Goodbye).is_ok()
        {
            let _ = write(stream, &mut self.sealed);
        }
        self.forget_sealed();
    }

    pub(crate) fn forget_sealed(&mut self) {
        self.sealed = BytesMut::new();
    }

    /// Holds on to nothing but what is needed.
    fn release(&mut self) {
        if self.sealed.is_empty() && self.sealed.capacity() > 0 {
            wire::return_buffer(std::mem::take(&mut self.sealed));
        }
        if self.gathered.is_empty() {
            self.gathered = BytesMut::new();
        }
    }

    /// Takes the connection as far as it goes with what was gathered, then says `saying`. Whether
    /// the handshake is over, and was.
    fn advance(&mut self, saying: Saying<'_>) -> Result<bool, TlsError> {
        if self.broken {
            return Err(TlsError::Broken);
        }
        loop {
            let UnbufferedStatus { discard, state, .. } =
                self.connection.process_tls_records(&mut self.gathered);
            let mut discard = discard;
            let (mut stands, mut failed) = (None, None);
            match state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    seal_message(&mut self.sealed, &mut data)?;
                }
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        self.opened.extend_from_slice(record.payload);
                    }
                }
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    let size = |error| match error {
                        EncryptError::InsufficientSize(size) => Some(size),
                        EncryptError::EncryptExhausted => None,
                    };
                    match saying {
                        Saying::Nothing => {}
                        Saying::Data(data) => seal(&mut self.sealed, data.len() + 64, |out| {
                            traffic.encrypt(data, out).map_err(size)
                        })?,
                        Saying::Goodbye => seal(&mut self.sealed, 64, |out| {
                            traffic.queue_close_notify(out).map_err(size)
                        })?,
                    }
                    stands = Some(true);
                }
                Ok(ConnectionState::BlockedHandshake) => stands = Some(false),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                    self.ended = true;
                    stands = Some(false);
                }
                // Early data is not offered, and there are no other states.
                Ok(_) => return Err(TlsError::Unbounded),
                Err(error) => failed = Some(error),
            }
            self.gathered.advance(discard);
            if let Some(error) = failed {
                self.broken = true;
                self.seal_alert();
                return Err(error.into());
            }
            if let Some(open) = stands {
                let unbounded = self.gathered.len() > GATHERED_BYTES_MAX
                    || self.sealed.len() > UNTAKEN_BYTES_MAX;
                return if unbounded {
                    Err(TlsError::Unbounded)
                } else {
                    Ok(open)
                };
            }
        }
    }
}

impl Tls {
    /// After an error: what is to be told of it. Nothing more is read then, as the record layer
    /// would come upon the same error again.
    fn seal_alert(&mut self) {
        while self.connection.wants_write() {
            let status = self.connection.process_tls_records(&mut self.gathered);
            let Ok(ConnectionState::EncodeTlsData(mut data)) = status.state else {
                return;
            };
            if seal_message(&mut self.sealed, &mut data).is_err() {
                return;
            }
        }
    }
}

fn seal_message(
    sealed: &mut BytesMut,
    message: &mut EncodeTlsData<'_, ServerConnectionData>,
) -> Result<(), TlsError> {
    seal(sealed, 0, |out| {
        message.encode(out).map_err(|error| match error {
            EncodeError::InsufficientSize(size) => Some(size),
            EncodeError::AlreadyEncoded => None,
        })
    })
}

/// Appends what `write` puts into a buffer of `room` bytes, or of as many as it asks for.
fn seal(
    sealed: &mut BytesMut,
    mut room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<InsufficientSizeError>>,
) -> Result<(), TlsError> {
    if sealed.capacity() == 0 {
        *sealed = wire::take_buffer();
    }
    let before = sealed.len();
    loop {
        sealed.resize(before + room, 0);
        match write(&mut sealed[before..]) {
            Ok(written) => {
                sealed.truncate(before + written);
                return Ok(());
            }
            Err(Some(size)) if size.required_size > room => room = size.required_size,
            Err(_) => {
                sealed.truncate(before);
                return Err(rustls::Error::EncryptError.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::version::{TLS12, TLS13};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
    use std::io::{Read as _, Write as _};

    /// A server and a client that trusts it, with the bytes on their way.
    struct Pair {
        tls: Tls,
        client: ClientConnection,
        /// What the server decrypted.
        heard: BytesMut,
    }

    impl Pair {
        fn new(version: &'static SupportedProtocolVersion) -> Self {
            let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
            let certificate: CertificateDer<'static> = made.cert.der().clone();
            let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![certificate.clone()], key)
                .unwrap();
            let mut roots = RootCertStore::empty();
            roots.add(certificate).unwrap();
            let client = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[version])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            Self {
                tls: Tls::new(Arc::new(server)).unwrap(),
                client: ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap())
                    .unwrap(),
                heard: BytesMut::new(),
            }
        }

        /// What the client has to send.
        fn client_says(&mut self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.client.wants_write() {
                self.client.write_tls(&mut bytes).unwrap();
            }
            bytes
        }

        fn server_hears(&mut self, bytes: &[u8], segment: usize) -> Result<(), TlsError> {
            for part in bytes.chunks(segment) {
                self.tls.open(BytesMut::from(part), &mut self.heard)?;
            }
            Ok(())
        }

        fn client_hears(&mut self) -> Vec<u8> {
            let sealed = std::mem::take(&mut self.tls.sealed);
            let mut rest = &sealed[..];
            let mut text = Vec::new();
            while !rest.is_empty() {
                self.client.read_tls(&mut rest).unwrap();
                self.client.process_new_packets().unwrap();
                // Nothing more at the moment is an error here.
                let _ = self.client.reader().read_to_end(&mut text);
            }
            text
        }

        fn shake_hands(&mut self, segment: usize) {
            for _ in 0..4 {
                let bytes = self.client_says();
                self.server_hears(&bytes, segment).unwrap();
                self.client_hears();
            }
            assert!(!self.client.is_handshaking());
            assert!(!self.tls.agreed().is_handshaking());
        }
    }

    #[test]
    fn bytes_go_both_ways_and_nothing_is_held_when_idle() {
        for version in [&TLS12, &TLS13] {
            for segment in [1, 100, 100_000] {
                let mut pair = Pair::new(version);
                pair.shake_hands(segment);
                let long: Vec<u8> = (0..60_000u32).map(|n| n as u8).collect();
                pair.client.writer().write_all(&long).unwrap();
                let bytes = pair.client_says();
                pair.server_hears(&bytes, segment.max(100)).unwrap();
                assert!(pair.heard[..] == long[..], "{version:?} by {segment}");
                for part in long.chunks(RECORD_BYTES) {
                    assert!(pair.tls.advance(Saying::Data(part)).unwrap());
                    assert_eq!(pair.client_hears(), part);
                }
                let held = [&pair.tls.gathered, &pair.tls.opened, &pair.tls.sealed];
                assert_eq!(held.map(BytesMut::capacity), [0; 3], "{version:?}");
                pair.tls.advance(Saying::Goodbye).unwrap();
                pair.client_hears();
                pair.client.send_close_notify();
                let bytes = pair.client_says();
                pair.server_hears(&bytes, segment).unwrap();
                assert!(pair.tls.has_ended());
            }
        }
    }

    /// Each connected device has one, besides what the record layer allocates for its keys.
    #[test]
    fn an_idle_connection_is_small() {
        let size = size_of::<Tls>();
        assert!(size <= 1400, "Tls grew to {size} bytes");
    }

    #[test]
    fn writing_goes_on_between_the_parts_of_a_torn_record() {
        let mut pair = Pair::new(&TLS13);
        pair.shake_hands(1000);
        pair.client.writer().write_all(&[7; 5000]).unwrap();
        for part in pair.client_says().chunks(500) {
            pair.server_hears(part, 500).unwrap();
            pair.tls.advance(Saying::Data(b"meanwhile")).unwrap();
            assert_eq!(pair.client_hears(), b"meanwhile");
        }
        assert_eq!(pair.heard[..], [7; 5000]);
    }

    #[test]
    fn a_message_may_be_torn_over_many_records_while_others_look() {
        for version in [&TLS12, &TLS13] {
            let mut pair = Pair::new(version);
            let hello = pair.client_says();
            let (header, payload) = hello.split_at(5);
            for part in payload.chunks(40) {
                let length = u16::try_from(part.len()).unwrap().to_be_bytes();
                pair.server_hears(&[&header[..3], &length, part].concat(), 7)
                    .unwrap();
                // As a deliverer would, with nothing new from the peer.
                pair.tls.advance(Saying::Nothing).unwrap();
            }
            pair.client_hears();
            pair.shake_hands(1000);
        }
    }

    #[test]
    fn keys_are_updated_but_not_endlessly() {
        let mut pair = Pair::new(&TLS13);
        pair.shake_hands(1000);
        for _ in 0..3 {
            pair.client.refresh_traffic_keys().unwrap();
            pair.client.writer().write_all(b"x").unwrap();
            let bytes = pair.client_says();
            pair.server_hears(&bytes, 10).unwrap();
            pair.tls.advance(Saying::Data(b"y")).unwrap();
            assert_eq!(pair.client_hears(), b"y");
        }
        assert_eq!(pair.heard[..], b"xxx"[..]);
        let mut sealed_max = 0;
        let ended = (0..10_000).find_map(|_| {
            pair.client.refresh_traffic_keys().unwrap();
            let bytes = pair.client_says();
            let result = pair.server_hears(&bytes, 100_000);
            sealed_max = sealed_max.max(pair.tls.sealed.len());
            result.err()
        });
        assert!(ended.is_some(), "a flood of key updates ends");
        assert!(sealed_max < UNTAKEN_BYTES_MAX, "{sealed_max}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn damaged_bytes_are_refused_and_never_panic(
            at in 0usize..2_000,
            with in 1u8..=255,
            late in any::<bool>(),
            old in any::<bool>(),
            segment in 1usize..700,
        ) {
            let mut pair = Pair::new(if old { &TLS12 } else { &TLS13 });
            if late { pair.shake_hands(segment); }
            pair.client.writer().write_all(&[1; 1500]).unwrap();
            let mut bytes = pair.client_says();
            let at = at % bytes.len();
            bytes[at] ^= with;
            let result = pair.server_hears(&bytes, segment);
            // Some bytes mean nothing, such as the version in a record of TLS 1.3: what is heard in spite
            // of them is what was said.
            if late {
                let is_true = pair.heard.is_empty() || pair.heard[..] == [1; 1500];
                prop_assert!(result.is_err() || is_true);
            }
            // Whoever writes meanwhile gets an answer too.
            let _ = pair.tls.advance(Saying::Data(b"x"));
            let _ = pair.server_hears(&bytes, segment);
            let _ = pair.tls.advance(Saying::Goodbye);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), record in any::<bool>()) {
            let mut pair = Pair::new(&TLS13);
            let bytes = if record { [&[22, 3, 1, 0, 200][..], &bytes].concat() } else { bytes };
            let _ = pair.server_hears(&bytes, 50);
            let _ = pair.tls.advance(Saying::Nothing);
        }
    }
}
