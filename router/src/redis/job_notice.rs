//! Notices that a job may be due earlier than was known: published by whatever made it so, over a connection of its own that is made
//! again when it is lost. Whatever was missed meanwhile is made up for by a notice to every shard.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use redis::{PushInfo, PushKind, Value};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::job_calls::JobCalls;
use super::keys::SHARDS;
use super::link::Link;

/// How often the connection is asked whether it lives.
const PING_EVERY: Duration = Duration::from_secs(10);
/// Before the connection is made again.
const PAUSE: Duration = Duration::from_millis(500);

/// One counter a shard.
type Counters = Arc<Vec<watch::Sender<u64>>>;

/// The notices of every shard; listened for once somebody asks.
pub(super) struct Notices {
    link: Weak<Link>,
    channels: Arc<Vec<String>>,
    counters: Counters,
    listening: OnceLock<JoinHandle<()>>,
}

impl Notices {
    pub(super) fn new(link: &Arc<Link>, calls: &JobCalls) -> Self {
        Self {
            link: Arc::downgrade(link),
            channels: Arc::new((0..SHARDS).map(|shard| calls.channel(shard)).collect()),
            counters: Arc::new((0..SHARDS).map(|_| watch::Sender::new(0)).collect()),
            listening: OnceLock::new(),
        }
    }

    pub(super) fn of(&self, shard: u16) -> watch::Receiver<u64> {
        self.listening.get_or_init(|| {
            let (link, channels) = (self.link.clone(), Arc::clone(&self.channels));
            tokio::spawn(listen(link, channels, Arc::clone(&self.counters)))
        });
        // Every shard there is has one.
        let counter = &self.counters[usize::from(shard % SHARDS)];
        counter.subscribe()
    }
}

impl Drop for Notices {
    fn drop(&mut self) {
        if let Some(listening) = self.listening.get() {
            listening.abort();
        }
    }
}

fn notice(counter: &watch::Sender<u64>) {
    counter.send_modify(|count| *count = count.wrapping_add(1));
}

async fn listen(link: Weak<Link>, channels: Arc<Vec<String>>, counters: Counters) {
    let mut was_there = true;
    loop {
        let lost = Arc::new(Notify::new());
        let opened = {
            let Some(link) = link.upgrade() else { return };
            let heard = hear(
                Arc::clone(&channels),
                Arc::clone(&counters),
                Arc::clone(&lost),
            );
            Box::pin(link.subscribe(&channels, heard)).await
        };
        match opened {
            Ok(mut connection) => {
                if !was_there {
                    tracing::info!("notices of delayed jobs arrive again");
                }
                was_there = true;
                counters.iter().for_each(notice);
                loop {
                    tokio::select! {
                        () = lost.notified() => break,
                        () = tokio::time::sleep(PING_EVERY) => {}
                    }
                    let ping = redis::cmd("PING");
                    if ping.query_async::<Value>(&mut connection).await.is_err() {
                        break;
                    }
                }
            }
            Err(error) if was_there => {
                was_there = false;
                tracing::warn!(%error, "no notices of delayed jobs, they are looked for now and then");
            }
            Err(_) => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What is done with what the connection hears.
fn hear(
    channels: Arc<Vec<String>>,
    counters: Counters,
    lost: Arc<Notify>,
) -> impl Fn(PushInfo) -> Result<(), ()> + Send + Sync + 'static {
    move |push| {
        match push.kind {
            PushKind::Message => {
                let channel = match push.data.first() {
                    Some(Value::BulkString(channel)) => channel.as_slice(),
                    Some(Value::SimpleString(channel)) => channel.as_bytes(),
                    _ => &[],
                };
                let shard = channels
                    .iter()
                    .position(|known| known.as_bytes() == channel);
                if let Some(counter) = shard.and_then(|shard| counters.get(shard)) {
                    notice(counter);
                }
            }
            PushKind::Disconnection => lost.notify_one(),
            _ => {}
        }
        Ok(())
    }
}
