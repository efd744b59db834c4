//! The reading half of a connection: bytes from the socket to packets.
//!
//! The bytes of one read are decoded where they lie, in a buffer that the thread lends to whoever
//! reads. Only a packet that is torn at the end of a read is copied and kept, so an idle
//! connection holds no buffer, and one with a torn packet holds what has come of it, never what
//! its header announces. With TLS in between the same goes for records, of which the bytes of one
//! read are decrypted into a second buffer of the thread.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{DecodeError, Decoder, Packet};
use tokio::net::tcp::OwnedReadHalf;
use tokio_util::io::poll_read_buf;

use crate::tls::TlsError;
use crate::wire::Wire;
use crate::ws::{Answer, Deframer, WsError};

const READ_BYTES_MIN: usize = 4 * 1024;
const LENT_BYTES: usize = 64 * 1024;

thread_local! {
    static LENT: RefCell<BytesMut> = RefCell::new(BytesMut::with_capacity(LENT_BYTES));
    /// Where what was decrypted goes.
    static OPENED: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Why reading ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("the connection ended")]
    Ended,
    #[error(transparent)]
    Network(#[from] io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    WebSocket(#[from] WsError),
}

/// The reading half.
#[derive(Debug)]
pub(crate) struct Reader {
    half: OwnedReadHalf,
    /// Present on a WebSocket connection.
    deframer: Option<Box<Deframer>>,
    pub(crate) decoder: Decoder,
    /// The beginning of a packet.
    torn: BytesMut,
    /// Bytes of that packet as far as known; no use to decode before they are there.
    torn_needs: usize,
}

/// What one read brought.
pub(crate) struct Received {
    /// MQTT, maybe not whole packets.
    pub(crate) data: Bytes,
    /// What a WebSocket peer is to be answered.
    pub(crate) answer: Option<Answer>,
    /// Bytes read from the socket.
    pub(crate) read_bytes: usize,
}

impl Reader {
    pub(crate) fn new(half: OwnedReadHalf, decoder: Decoder) -> Self {
        Self {
            half,
            deframer: None,
            decoder,
            torn: BytesMut::new(),
            torn_needs: 0,
        }
    }

    /// The bytes from now on are WebSocket frames.
    pub(crate) fn speak_websocket(&mut self) {
        self.deframer = Some(Box::default());
    }

    /// What comes on the connection, TLS taken off.
    pub(crate) fn poll_raw(
        &mut self,
        context: &mut Context<'_>,
        wire: &Wire,
    ) -> Poll<Result<Bytes, ReadError>> {
        if !wire.is_encrypted() {
            let read = ready!(self.poll_socket(context))?;
            return Poll::Ready(Ok(read.freeze()));
        }
        loop {
            match wire.take_opened() {
                Some(opened) if opened.is_empty() => {}
                Some(opened) => return Poll::Ready(Ok(opened.freeze())),
                None => return Poll::Ready(Err(ReadError::Ended)),
            }
            let read = ready!(self.poll_socket(context))?;
            let opened = OPENED.with_borrow_mut(|out| {
                out.reserve(read.len());
                let result = wire.open(read, out);
                let opened = out.split().freeze();
                result.map(|()| opened)
            })?;
            if !opened.is_empty() {
                return Poll::Ready(Ok(opened));
            }
        }
    }

    fn poll_socket(&mut self, context: &mut Context<'_>) -> Poll<Result<BytesMut, ReadError>> {
        LENT.with_borrow_mut(|lent| {
            if lent.capacity() - lent.len() < READ_BYTES_MIN {
                lent.reserve(LENT_BYTES);
            }
            match ready!(poll_read_buf(Pin::new(&mut self.half), context, lent)) {
                Ok(0) => Poll::Ready(Err(ReadError::Ended)),
                Ok(_) => Poll::Ready(Ok(lent.split())),
                Err(error) => Poll::Ready(Err(error.into())),
            }
        })
    }

    /// Reads once and returns what can be decoded, which may be nothing yet.
    pub(crate) fn poll_receive(
        &mut self,
        context: &mut Context<'_>,
        wire: &Wire,
    ) -> Poll<Result<Received, ReadError>> {
        let chunk = ready!(self.poll_raw(context, wire))?;
        Poll::Ready(self.accept(chunk))
    }

    /// As if `chunk` had just been read.
    pub(crate) fn accept(&mut self, chunk: Bytes) -> Result<Received, ReadError> {
        let read_bytes = chunk.len();
        let mut answer = None;
        let data = match &mut self.deframer {
            Some(deframer) => {
                answer = Some(deframer.feed(&chunk, &mut self.torn)?);
                self.take_torn()
            }
            None if self.torn.is_empty() => chunk,
            None => {
                self.torn.extend_from_slice(&chunk);
                self.take_torn()
            }
        };
        Ok(Received {
            data,
            answer,
            read_bytes,
        })
    }

    fn take_torn(&mut self) -> Bytes {
        if self.torn.len() < self.torn_needs {
            return Bytes::new();
        }
        self.torn_needs = 0;
        std::mem::take(&mut self.torn).freeze()
    }

    /// The next packet of `data`; `None` keeps the rest for the next read.
    pub(crate) fn next_packet(&mut self, data: &mut Bytes) -> Result<Option<Packet>, DecodeError> {
        if data.is_empty() {
            return Ok(None);
        }
        let packet = self.decoder.decode(data)?;
        if packet.is_none() {
            self.torn_needs = self.decoder.needed(data).unwrap_or(0);
            self.torn = match std::mem::take(data).try_into_mut() {
                // A packet that spans many reads stays where it is gathered.
                Ok(whole) if whole.len() > READ_BYTES_MIN => whole,
                Ok(part) => BytesMut::from(&part[..]),
                Err(shared) => BytesMut::from(&shared[..]),
            };
        }
        Ok(packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moorline_mqtt::{Publish, QoS, TopicName, Version};
    use tokio::net::{TcpListener, TcpStream};

    /// A client's unmasked-by-zero frame, which is masked by the letter of the protocol.
    fn frame(payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        [&[0x82, 0x80 | 126], &length[..], &[0; 4], payload].concat()
    }

    fn publish(payload_bytes: usize) -> Vec<u8> {
        let publish = Publish {
            dup: false,
            qos: QoS::AtMostOnce,
            retain: false,
            topic: TopicName::parse("a".into()).unwrap(),
            packet_id: None,
            properties: None,
            payload: Bytes::from(vec![7; payload_bytes]),
        };
        let mut out = BytesMut::new();
        Packet::Publish(publish)
            .encode(Version::V5, &mut out)
            .unwrap();
        out.to_vec()
    }

    /// Feeds `stream` in pieces of `step` bytes and returns the payload sizes that come out.
    async fn read_in_steps(stream: &[u8], step: usize, websocket: bool) -> Vec<usize> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut reader = Reader::new(
            socket.into_split().0,
            Decoder::client(Version::V5, 1_000_000),
        );
        if websocket {
            reader.speak_websocket();
        }
        let mut sizes = Vec::new();
        for piece in stream.chunks(step) {
            let mut data = reader.accept(Bytes::copy_from_slice(piece)).unwrap().data;
            while let Some(packet) = reader.next_packet(&mut data).unwrap() {
                let Packet::Publish(publish) = packet else {
                    panic!("not a PUBLISH")
                };
                sizes.push(publish.payload.len());
            }
        }
        sizes
    }

    #[tokio::test]
    async fn every_packet_comes_out_as_soon_as_it_is_all_there() {
        let sizes = [300, 1, 20_000, 2, 5_000, 0];
        let packets: Vec<Vec<u8>> = sizes.iter().map(|size| publish(*size)).collect();
        for step in [1, 7, 1_000, 4_096, 30_000] {
            assert_eq!(
                read_in_steps(&packets.concat(), step, false).await,
                sizes,
                "step {step}"
            );
            let frames: Vec<u8> = packets.iter().flat_map(|packet| frame(packet)).collect();
            assert_eq!(
                read_in_steps(&frames, step, true).await,
                sizes,
                "frames, step {step}"
            );
        }
    }
}
