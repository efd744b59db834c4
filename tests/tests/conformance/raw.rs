//! Frames as they are on the wire, for statements about bytes that [`Device`] would not show.
//!
//! [`Device`]: moorline_tests::device::Device

use std::net::SocketAddr;
use std::time::Duration;

use moorline_tests::waiting::SOON;
use moorline_tests::wire::{self, Connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A packet as it came: its first byte and everything behind its remaining length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) first: u8,
    pub(crate) body: Vec<u8>,
}

impl Frame {
    /// The packet type in the upper half of the first byte.
    pub(crate) fn kind(&self) -> u8 {
        self.first >> 4
    }

    /// How long it was on the wire (for the short packets of these tests).
    pub(crate) fn length(&self) -> usize {
        self.body.len() + if self.body.len() < 128 { 2 } else { 3 }
    }
}

/// A socket that says and shows everything.
pub(crate) struct Raw {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Raw {
    pub(crate) async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// Connects and returns the CONNACK too.
    pub(crate) async fn connect(address: SocketAddr, connect: &Connect) -> (Self, Frame) {
        let mut raw = Self::open(address).await;
        raw.send(&wire::connect(connect)).await;
        let connack = raw.frame().await.expect("a CONNACK");
        assert_eq!((connack.first, connack.body[1]), (0x20, 0), "{connack:?}");
        (raw, connack)
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next packet, or `None` when the server has closed the connection.
    pub(crate) async fn frame(&mut self) -> Option<Frame> {
        self.frame_within(SOON).await.expect("a packet or the end")
    }

    /// The same in a time given; `Err` when neither came.
    pub(crate) async fn frame_within(&mut self, patience: Duration) -> Result<Option<Frame>, ()> {
        let read = async {
            loop {
                if let Some(frame) = self.take_frame() {
                    return Some(frame);
                }
                match self.stream.read_buf(&mut self.buffer).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        tokio::time::timeout(patience, read).await.map_err(|_| ())
    }

    /// Everything until the server closes.
    pub(crate) async fn frames_to_end(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        while let Some(frame) = self.frame().await {
            frames.push(frame);
        }
        assert!(
            self.buffer.is_empty(),
            "half a packet: {:02x?}",
            self.buffer
        );
        frames
    }

    /// Everything that arrives before the answer to a PINGREQ.
    pub(crate) async fn frames_to_pong(&mut self) -> Vec<Frame> {
        self.send(&wire::PINGREQ).await;
        let mut frames = Vec::new();
        loop {
            let frame = self.frame().await.expect("a PINGRESP");
            if frame.kind() == 13 {
                assert_eq!((frame.first, frame.body.len()), (0xD0, 0));
                return frames;
            }
            frames.push(frame);
        }
    }

    fn take_frame(&mut self) -> Option<Frame> {
        let (mut length, mut shift) = (0_usize, 0);
        for (at, byte) in self.buffer.iter().enumerate().skip(1) {
            length |= usize::from(byte & 0x7F) << shift;
            if byte & 0x80 > 0 {
                shift += 7;
                assert!(shift < 28, "a remaining length of more than four bytes");
                continue;
            }
            let end = at + 1 + length;
            if self.buffer.len() < end {
                return None;
            }
            let frame = Frame {
                first: self.buffer[0],
                body: self.buffer[at + 1..end].to_vec(),
            };
            self.buffer.drain(..end);
            return Some(frame);
        }
        None
    }
}
