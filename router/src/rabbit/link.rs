//! A connection to the broker that is made again when it is lost.

use std::sync::Arc;
use std::time::Duration;

use ::metrics::Counter;
use lapin::uri::AMQPUri;
use lapin::{Channel, Connect, Connection, ConnectionProperties, ConnectionStatus};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Config, metrics};
use crate::StoreError;

/// For the handshake of a new connection. A broker that is stopped accepts connections and says nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// For one answer of the broker on a connection that works.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A connection with one purpose, either to publish or to consume: a broker that blocks publishers
/// blocks their whole connection.
pub struct Link {
    name: String,
    uri: Result<AMQPUri, String>,
    authorities: Result<Option<String>, String>,
    state: Mutex<State>,
    status: parking_lot::Mutex<Option<ConnectionStatus>>,
    connects: Counter,
}

#[derive(Default)]
struct State {
    connection: Option<Connection>,
    failures: u32,
    not_before: Option<Instant>,
}

impl Link {
    /// A link that is not connected yet; `name` is what an operator of the broker sees.
    pub fn new(config: &Config, name: &str) -> Arc<Self> {
        let read = |path: &std::path::PathBuf| {
            std::fs::read_to_string(path)
                .map_err(|error| format!("rabbitmq.ca {} cannot be read: {error}", path.display()))
        };
        Arc::new(Self {
            name: name.to_owned(),
            uri: config.uri(),
            authorities: config.ca.as_ref().map(read).transpose(),
            state: Mutex::default(),
            status: parking_lot::Mutex::default(),
            connects: metrics::connects(name),
        })
    }

    /// A new channel, on a new connection if there is none. After a failure the next attempt waits, longer each time.
    ///
    /// # Errors
    /// When the broker is out of reach or refuses; asking again is always right.
    pub async fn channel(&self) -> Result<Channel, StoreError> {
        let mut state = self.state.lock().await;
        if let Some(connection) = &state.connection {
            if let Ok(Ok(channel)) = timeout(ANSWER_TIMEOUT, connection.create_channel()).await {
                return Ok(channel);
            }
            state.connection = None;
        }
        if let Some(not_before) = state.not_before {
            sleep_until(not_before).await;
        }
        match self.connect().await {
            Ok((connection, channel)) => {
                tracing::info!(link = self.name, "connected to RabbitMQ");
                self.connects.increment(1);
                *self.status.lock() = Some(connection.status().clone());
                *state = State {
                    connection: Some(connection),
                    ..State::default()
                };
                Ok(channel)
            }
            Err(error) => {
                if state.failures == 0 {
                    tracing::warn!(link = self.name, %error, "RabbitMQ is out of reach, trying again");
                }
                let doubled = BACKOFF_MIN.saturating_mul(1 << state.failures.min(16));
                state.failures = state.failures.saturating_add(1);
                state.not_before = Some(Instant::now() + doubled.min(BACKOFF_MAX));
                Err(error)
            }
        }
    }

    /// Gives the connection up, so that the next channel is on a new one.
    pub async fn reset(&self) {
        self.state.lock().await.connection = None;
    }

    /// Whether there is a connection that works, as far as is known.
    pub fn is_connected(&self) -> bool {
        let status = self.status.lock();
        status.as_ref().is_some_and(ConnectionStatus::connected)
    }

    /// Whether the broker takes nothing for now, as in a memory or disk alarm.
    pub fn is_blocked(&self) -> bool {
        let status = self.status.lock();
        status.as_ref().is_some_and(ConnectionStatus::blocked)
    }

    async fn connect(&self) -> Result<(Connection, Channel), StoreError> {
        let uri = self.uri.clone().map_err(StoreError::Unavailable)?;
        let tls = lapin::tcp::OwnedTLSConfig {
            cert_chain: self.authorities.clone().map_err(StoreError::Unavailable)?,
            ..lapin::tcp::OwnedTLSConfig::default()
        };
        let properties =
            ConnectionProperties::default().with_connection_name(self.name.clone().into());
        let runtime = lapin::runtime::default_runtime().map_err(unavailable)?;
        let attempt = async {
            let connection = uri.connect_with_config(properties, tls, runtime).await?;
            let channel = connection.create_channel().await?;
            Ok((connection, channel))
        };
        match timeout(CONNECT_TIMEOUT, attempt).await {
            Ok(connected) => connected.map_err(unavailable),
            Err(_) => Err(StoreError::Unavailable("RabbitMQ does not answer".into())),
        }
    }
}

pub(super) fn unavailable(error: lapin::Error) -> StoreError {
    StoreError::Unavailable(format!("RabbitMQ: {error}"))
}

/// Awaits an answer of the broker, at most [`ANSWER_TIMEOUT`].
pub(super) async fn answered<T>(
    answer: impl Future<Output = lapin::Result<T>>,
) -> Result<T, StoreError> {
    match timeout(ANSWER_TIMEOUT, answer).await {
        Ok(answer) => answer.map_err(unavailable),
        Err(_) => Err(StoreError::Unavailable("RabbitMQ does not answer".into())),
    }
}
