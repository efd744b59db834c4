//! A TCP proxy that a test can cut, freeze and slow down: the network between two processes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What a proxy does with what comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// Everything is passed on.
    Pass,
    /// Connections are reset, and new ones at once.
    Cut,
    /// Connections stay and nothing moves, as when a cable is pulled.
    Freeze,
}

/// A listener on a free port whose connections lead to another address. Dropping it ends them.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    link: watch::Sender<Link>,
    delay: Arc<AtomicU64>,
    accepted: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A proxy in front of `target`, on the runtime of the caller.
    ///
    /// # Panics
    /// When there is no free port.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("there is a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let (link, state) = watch::channel(Link::Pass);
        let delay = Arc::new(AtomicU64::new(0));
        let accepted = Arc::new(AtomicU64::new(0));
        let (slow, count) = (Arc::clone(&delay), Arc::clone(&accepted));
        let task = tokio::spawn(async move {
            let mut all = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                all.spawn(serve(client, target, state.clone(), Arc::clone(&slow)));
                while all.try_join_next().is_some() {}
            }
        });
        Self {
            address,
            link,
            delay,
            accepted,
            task,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it has taken so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Resets every connection, and each new one at once, until [`heal`](Self::heal).
    pub fn cut(&self) {
        self.link.send_replace(Link::Cut);
    }

    /// Keeps every connection and moves nothing, until [`heal`](Self::heal), which then delivers what waited.
    pub fn freeze(&self) {
        self.link.send_replace(Link::Freeze);
    }

    /// Passes everything on again.
    pub fn heal(&self) {
        self.link.send_replace(Link::Pass);
    }

    /// Holds everything up for so long, each way.
    pub fn delay(&self, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.delay.store(micros, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    client: TcpStream,
    target: SocketAddr,
    mut state: watch::Receiver<Link>,
    delay: Arc<AtomicU64>,
) {
    // Whatever ends a connection here ends it with a reset.
    _ = client.set_zero_linger();
    let passing = state.clone();
    let passing = async {
        if passing
            .clone()
            .wait_for(|link| *link != Link::Freeze)
            .await
            .is_err()
        {
            return;
        }
        let Ok(server) = TcpStream::connect(target).await else {
            return;
        };
        // A delay of one segment must not become that of an acknowledgement.
        _ = client.set_nodelay(true);
        _ = server.set_nodelay(true);
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::join!(
            copy(from_client, to_server, passing.clone(), &delay),
            copy(from_server, to_client, passing.clone(), &delay),
        );
    };
    tokio::select! {
        () = passing => {}
        _ = state.wait_for(|link| *link == Link::Cut) => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<Link>,
    delay: &AtomicU64,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let micros = delay.load(Ordering::Relaxed);
        if micros > 0 {
            tokio::time::sleep(Duration::from_micros(micros)).await;
        }
        if state.wait_for(|link| *link != Link::Freeze).await.is_err() {
            break;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
    _ = to.shutdown().await;
}
