//! One connection to one server, made again when it is lost.
//!
//! What was sent over a connection that is lost may or may not have been done; it could even be done *later*, where
//! the server was frozen and finds it in its buffers when it goes on. A new connection therefore first ends the
//! one before it: nothing that is sent over the new one is overtaken by anything older.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::Counter;
use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, PushInfo, PushKind, Value};

use super::finder::Finder;
use super::{link_metrics, scripts};
use crate::StoreError;

const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    pub(super) response: Duration,
}

/// A connection in use; `number` tells it from those before and after.
pub(super) struct Connected {
    pub(super) number: u64,
    pub(super) connection: MultiplexedConnection,
}

/// How the server knows a connection: its run and its number for us in that run.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    run: String,
    client: i64,
}

#[derive(Default)]
struct State {
    live: Option<(u64, MultiplexedConnection)>,
    made: u64,
    /// The newest connection that was made, whether it lives or not.
    newest: Option<Identity>,
    down: Option<Down>,
}

struct Down {
    since: Instant,
    failures: u32,
    retry_at: Instant,
    why: String,
}

impl State {
    fn lost(&mut self, number: u64, why: &str) {
        if self.live.as_ref().is_some_and(|(live, _)| *live == number) {
            self.live = None;
            let now = Instant::now();
            self.down = Some(Down {
                since: now,
                failures: 0,
                retry_at: now,
                why: why.to_owned(),
            });
            tracing::warn!(why, "lost a connection to redis");
        }
    }

    fn failed(&mut self, why: String) {
        let now = Instant::now();
        let down = self.down.get_or_insert_with(|| Down {
            since: now,
            failures: 0,
            retry_at: now,
            why: String::new(),
        });
        let backoff = BACKOFF_MAX.min(BACKOFF_MIN * 2_u32.saturating_pow(down.failures.min(10)));
        // Not all at once: nodes that lost the server together.
        let spread = ahash::RandomState::new().hash_one(down.failures) % 1_000;
        let jitter = backoff.mul_f64(f64::from(u32::try_from(spread).unwrap_or(0)) / 2_000.0);
        down.failures += 1;
        down.retry_at = now + backoff + jitter;
        down.why = why;
    }
}

/// One connection, whichever it is at the moment.
pub(super) struct Port {
    finder: Arc<Finder>,
    timeouts: Timeouts,
    state: Arc<Mutex<State>>,
    /// Whoever makes the connection.
    making: tokio::sync::Mutex<()>,
    connects: Counter,
}

impl Port {
    pub(super) fn new(finder: Arc<Finder>, timeouts: Timeouts) -> Self {
        Self {
            finder,
            timeouts,
            state: Arc::default(),
            making: tokio::sync::Mutex::default(),
            connects: link_metrics::connects(),
        }
    }

    /// The connection; makes it if there is none and it is time for another attempt.
    pub(super) async fn get(&self) -> Result<Connected, StoreError> {
        if let Some(live) = self.live() {
            return Ok(live);
        }
        let _making = match self.is_down_for_long() {
            // Somebody tries already, and there is little hope.
            true => self.making.try_lock().map_err(|_| self.why_down())?,
            false => self.making.lock().await,
        };
        if let Some(live) = self.live() {
            return Ok(live);
        }
        if let Some(down) = &self.state.lock().down
            && down.retry_at > Instant::now()
        {
            return Err(StoreError::Unavailable(down.why.clone()));
        }
        match self.make().await {
            Ok(live) => Ok(live),
            Err(why) => {
                self.state.lock().failed(why);
                Err(self.why_down())
            }
        }
    }

    /// A connection of its own that listens; what it hears is given to `heard`.
    pub(super) async fn listen(
        &self,
        channels: &[String],
        heard: impl Fn(PushInfo) -> Result<(), ()> + Send + Sync + 'static,
    ) -> Result<MultiplexedConnection, String> {
        let text = |error: redis::RedisError| error.to_string();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeouts.connect))
            .set_response_timeout(Some(self.timeouts.response))
            .set_push_sender(heard);
        let client = self.finder.client(self.finder.find().await?)?;
        let opening = client.get_multiplexed_async_connection_with_config(&config);
        let mut connection = Box::pin(opening).await.map_err(text)?;
        connection.subscribe(channels).await.map_err(text)?;
        Ok(connection)
    }

    fn live(&self) -> Option<Connected> {
        let state = self.state.lock();
        state.live.as_ref().map(|(number, connection)| Connected {
            number: *number,
            connection: connection.clone(),
        })
    }

    /// The connection `number` is of no use any more.
    pub(super) fn lost(&self, number: u64, why: &str) {
        self.state.lock().lost(number, why);
    }

    /// Whether there is no connection that was there, or was tried for.
    pub(super) fn is_down(&self) -> bool {
        self.state.lock().down.is_some()
    }

    /// Whether there has been no connection for longer than anybody waits for an answer.
    pub(super) fn is_down_for_long(&self) -> bool {
        let state = self.state.lock();
        state
            .down
            .as_ref()
            .is_some_and(|down| down.since.elapsed() > self.timeouts.response)
    }

    fn why_down(&self) -> StoreError {
        let state = self.state.lock();
        let why = state
            .down
            .as_ref()
            .map_or("no connection", |down| &down.why);
        StoreError::Unavailable(why.to_owned())
    }

    async fn make(&self) -> Result<Connected, String> {
        let number = {
            let mut state = self.state.lock();
            state.made += 1;
            state.made
        };
        let limit = self.timeouts.connect * 2;
        let opened = tokio::time::timeout(limit, self.open(number)).await;
        let (connection, identity) = opened.map_err(|_| "no answer to a new connection")??;
        let mut state = self.state.lock();
        self.connects.increment(1);
        state.newest = Some(identity);
        state.live = Some((number, connection.clone()));
        if state.down.take().is_some() {
            tracing::info!("connected to redis again");
        }
        Ok(Connected { number, connection })
    }

    async fn open(&self, number: u64) -> Result<(MultiplexedConnection, Identity), String> {
        let text = |error: redis::RedisError| error.to_string();
        let info = self.finder.find().await?;
        let state = Arc::downgrade(&self.state);
        let on_push = move |push: PushInfo| {
            if push.kind == PushKind::Disconnection
                && let Some(state) = state.upgrade()
            {
                state.lock().lost(number, "the connection was closed");
            }
            Ok::<(), ()>(())
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeouts.connect))
            .set_response_timeout(Some(self.timeouts.response))
            .set_push_sender(on_push);
        let client = self.finder.client(info)?;
        let opening = client.get_multiplexed_async_connection_with_config(&config);
        let mut connection = Box::pin(opening).await.map_err(text)?;
        let identity = introduce(&mut connection).await?;
        let earlier = self.state.lock().newest.clone();
        let mut first = redis::pipe();
        first.cmd("PING");
        for script in scripts() {
            first.add_command(script.load());
        }
        let loading = first.query_async::<Vec<Value>>(&mut connection);
        loading.await.map_err(text)?;
        if let Some(earlier) = earlier.filter(|earlier| earlier.run == identity.run) {
            let mut end = redis::cmd("CLIENT");
            end.arg("KILL").arg("ID").arg(earlier.client);
            match end.query_async::<Value>(&mut connection).await {
                Err(error) if error.is_unrecoverable_error() || error.is_timeout() => {
                    return Err(error.to_string());
                }
                // Without the right to do so there is order all the same, but for what a frozen server finds when it goes on.
                Err(error) => {
                    tracing::warn!(%error, "an earlier connection to redis cannot be ended")
                }
                Ok(_) => {}
            }
        }
        Ok((connection, identity))
    }
}

/// Learns how the server knows the connection, and that it is a master.
async fn introduce(connection: &mut MultiplexedConnection) -> Result<Identity, String> {
    let mut questions = redis::pipe();
    questions.cmd("CLIENT").arg("ID");
    questions.cmd("INFO").arg("server");
    questions.cmd("ROLE");
    let (client, info, role): (i64, String, Vec<Value>) = questions
        .query_async(connection)
        .await
        .map_err(|error| error.to_string())?;
    let role = role
        .into_iter()
        .next()
        .map(redis::from_redis_value::<String>);
    if !matches!(&role, Some(Ok(role)) if role == "master") {
        return Err("the server is a replica".into());
    }
    let run = info.lines().find_map(|line| line.strip_prefix("run_id:"));
    Ok(Identity {
        run: run.unwrap_or_default().to_owned(),
        client,
    })
}
