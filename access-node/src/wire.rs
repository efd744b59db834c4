//! One network connection as everyone but its own task sees it.
//!
//! The connection's task alone reads. Whoever delivers writes, under the session's lock, straight
//! to the socket; only what the socket does not take at once is kept and left to the task. An idle
//! connection therefore holds no buffer and wakes nobody. Where there is TLS, its lock is taken after
//! the session's and before nothing.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;

use crate::tls::{Tls, TlsError};

/// The connection is to be closed.
pub(crate) const CLOSING: u8 = 1;
/// Bytes wait for the socket to become writable.
pub(crate) const UNSENT: u8 = 2;
/// The inbox holds what the session has not been handed.
pub(crate) const BEHIND: u8 = 4;
/// Retained messages are still to be looked up, once others had their turn.
pub(crate) const FEEDING: u8 = 8;
/// They had it.
pub(crate) const YIELDED: u8 = 16;
/// The stores have lost what they are to have of the connection.
pub(crate) const RESTORE: u8 = 32;
/// It is this side that does not read: nothing is to be concluded from the device's silence.
pub(crate) const UNREAD: u8 = 64;

/// The part of a connection that its task and its deliverers share without a lock.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: OwnedWriteHalf,
    /// The connection's task.
    task: AtomicWaker,
    signals: AtomicU8,
    /// Seconds of the node's clock when the last byte came.
    last_received_s: AtomicU32,
    tls: Option<Box<Mutex<Tls>>>,
    /// The client's own address, where a proxy has told it.
    proxied: Option<Box<SocketAddr>>,
}

impl Wire {
    pub(crate) fn new(
        socket: OwnedWriteHalf,
        now_s: u32,
        tls: Option<Tls>,
        proxied: Option<SocketAddr>,
    ) -> Self {
        Self {
            socket,
            tls: tls.map(|tls| Box::new(Mutex::new(tls))),
            proxied: proxied.map(Box::new),
            task: AtomicWaker::new(),
            signals: AtomicU8::new(0),
            last_received_s: AtomicU32::new(now_s),
        }
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        self.socket.as_ref()
    }

    /// Where the device is.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match &self.proxied {
            Some(address) => Some(**address),
            None => self.stream().peer_addr().ok(),
        }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Tells the connection's task that there is something to do.
    pub(crate) fn signal(&self, signal: u8) {
        if self.signals.fetch_or(signal, Ordering::AcqRel) & signal == 0 {
            self.task.wake();
        }
    }

    pub(crate) fn clear(&self, signal: u8) {
        self.signals.fetch_and(!signal, Ordering::AcqRel);
    }

    pub(crate) fn is_signalled(&self, signal: u8) -> bool {
        self.signals.load(Ordering::Acquire) & signal != 0
    }

    /// Called by the connection's task before it looks at the signals.
    pub(crate) fn register(&self, context: &Context<'_>) {
        self.task.register(context.waker());
    }

    pub(crate) fn received(&self, now_s: u32) {
        self.last_received_s.store(now_s, Ordering::Relaxed);
    }

    pub(crate) fn last_received_s(&self) -> u32 {
        self.last_received_s.load(Ordering::Relaxed)
    }

    pub(crate) fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_write_ready(context)
    }

    /// Ends the sending direction once the kernel has sent what it holds. The peer's answer to it,
    /// or the end of the lingering time, lets the task drop the socket: closing at once, with bytes
    /// unread, would reset the connection and could take the last packet from the peer.
    pub(crate) fn finish_sending(&self) {
        if let Some(tls) = &self.tls {
            tls.lock().finish(self.stream());
        }
        // An error means that the connection is gone already.
        let _ = SockRef::from(self.stream()).shutdown(std::net::Shutdown::Write);
    }

    /// Writes as much as the socket takes; what is left stays in `unsent`, and is signalled.
    pub(crate) fn write(&self, unsent: &mut BytesMut) -> io::Result<()> {
        let Some(tls) = &self.tls else {
            let result = self.write_plain(unsent);
            self.note_unsent(result.is_ok() && !unsent.is_empty());
            return result;
        };
        let mut tls = tls.lock();
        let result = tls.write(self.stream(), unsent);
        if result.is_err() {
            tls.forget_sealed();
            // Not only the network fails here but also keys that are used up: let the reader see it.
            let _ = SockRef::from(self.stream()).shutdown(std::net::Shutdown::Both);
        }
        // Under the lock: the reader signals what it has to answer as well.
        self.note_unsent(result.is_ok() && (tls.has_sealed() || !unsent.is_empty()));
        result
    }

    fn note_unsent(&self, something: bool) {
        if something {
            self.signal(UNSENT);
        } else {
            self.clear(UNSENT);
        }
    }

    fn write_plain(&self, unsent: &mut BytesMut) -> io::Result<()> {
        while !unsent.is_empty() {
            match self.socket.try_write(unsent) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) if written == unsent.len() => unsent.clear(),
                Ok(written) => unsent.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What was decrypted before anyone read; `None` at the end of what the peer says.
    pub(crate) fn take_opened(&self) -> Option<BytesMut> {
        let Some(tls) = &self.tls else {
            return Some(BytesMut::new());
        };
        let mut tls = tls.lock();
        let opened = tls.take_opened();
        (!opened.is_empty() || !tls.has_ended()).then_some(opened)
    }

    /// Decrypts what was read and appends it to `out`; answers what the protocol asks for.
    pub(crate) fn open(&self, received: BytesMut, out: &mut BytesMut) -> Result<(), TlsError> {
        let Some(tls) = &self.tls else {
            out.unsplit(received);
            return Ok(());
        };
        let mut tls = tls.lock();
        let result = tls.open(received, out);
        if tls.has_sealed() && !self.is_signalled(UNSENT) {
            // The next read tells of an error.
            let _ = tls.write(self.stream(), &mut BytesMut::new());
            self.note_unsent(tls.has_sealed());
        }
        result
    }
}

const POOLED_BUFFER_BYTES: usize = 4 * 1024;
const POOLED_BUFFERS_MAX: usize = 32;

thread_local! {
    /// Buffers between two writes: a session holds one only while something waits in it.
    static POOL: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer.
pub(crate) fn take_buffer() -> BytesMut {
    POOL.with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| BytesMut::with_capacity(POOLED_BUFFER_BYTES))
}

/// Gives a buffer back.
pub(crate) fn return_buffer(mut buffer: BytesMut) {
    buffer.clear();
    let capacity = buffer.capacity();
    if (POOLED_BUFFER_BYTES..=4 * POOLED_BUFFER_BYTES).contains(&capacity) {
        POOL.with_borrow_mut(|pool| {
            if pool.len() < POOLED_BUFFERS_MAX {
                pool.push(buffer);
            }
        });
    }
}
