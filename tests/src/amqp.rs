//! RabbitMQ as somebody else's program uses it: upstream messages of the default queue, and events of devices.

use base64::Engine as _;
use futures_util::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties, Consumer, ExchangeKind};
use serde_json::{Value, json};

/// Takes and acknowledges every message that is in a queue now; each looks as `GET /v1/upstream` would show it.
///
/// # Panics
/// When the queue cannot be read.
pub async fn drain(url: &str, queue: &str) -> Vec<Value> {
    let connection = connect(url).await;
    let channel = connection.create_channel().await.expect("a channel");
    let mut all = Vec::new();
    loop {
        let got = channel
            .basic_get(queue.into(), BasicGetOptions::default())
            .await;
        let message = match got {
            Ok(Some(message)) => message,
            Ok(None) => break,
            // A queue is made with its first message, and a quorum queue that is being made has no leader yet.
            Err(error) if is_not_there_yet(&error) => break,
            Err(error) => panic!("{queue}: {error}"),
        };
        all.push(as_upstream(&message.properties, &message.data));
        message
            .ack(BasicAckOptions::default())
            .await
            .expect("an open channel takes acknowledgements");
    }
    // It may be gone with the server by now.
    _ = connection.close(200, "done".into()).await;
    all
}

fn is_not_there_yet(error: &lapin::Error) -> bool {
    let text = error.to_string();
    text.contains("noproc") || text.contains("NOT_FOUND - no queue")
}

/// What is published to a topic exchange from now on, as `(routing key, body)`.
#[derive(Debug)]
pub struct Listener {
    _connection: Connection,
    consumer: Consumer,
}

impl Listener {
    /// Listens to everything of `exchange`.
    ///
    /// # Panics
    /// When there is an exchange of that name and another kind.
    pub async fn of(url: &str, exchange: &str) -> Self {
        let connection = connect(url).await;
        let channel = connection.create_channel().await.expect("a channel");
        // Whoever comes first makes it.
        let options = ExchangeDeclareOptions {
            durable: true,
            ..ExchangeDeclareOptions::default()
        };
        channel
            .exchange_declare(
                exchange.into(),
                ExchangeKind::Topic,
                options,
                FieldTable::default(),
            )
            .await
            .unwrap_or_else(|error| panic!("{exchange}: {error}"));
        let options = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = channel
            .queue_declare("".into(), options, FieldTable::default())
            .await
            .expect("a queue of its own");
        let name = queue.name().clone();
        channel
            .queue_bind(
                name.clone(),
                exchange.into(),
                "#".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap_or_else(|error| panic!("{exchange}: {error}"));
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let consumer = channel
            .basic_consume(name, "".into(), options, FieldTable::default())
            .await
            .expect("a consumer");
        Self {
            _connection: connection,
            consumer,
        }
    }

    /// Everything that has come and comes until `quiet` has gone by without anything.
    pub async fn take(&mut self, quiet: std::time::Duration) -> Vec<(String, String)> {
        let mut all = Vec::new();
        while let Ok(Some(Ok(delivery))) = tokio::time::timeout(quiet, self.consumer.next()).await {
            all.push((
                delivery.routing_key.to_string(),
                String::from_utf8_lossy(&delivery.data).into_owned(),
            ));
        }
        all
    }
}

async fn connect(url: &str) -> Connection {
    _ = rustls::crypto::ring::default_provider().install_default();
    Connection::connect(url, ConnectionProperties::default())
        .await
        .unwrap_or_else(|error| panic!("{url}: {error}"))
}

fn as_upstream(properties: &BasicProperties, body: &[u8]) -> Value {
    let header = |name: &str| {
        let value = properties.headers().as_ref()?.inner().get(name)?;
        Some(match value {
            AMQPValue::LongString(text) => json!(String::from_utf8_lossy(text.as_bytes())),
            AMQPValue::LongLongInt(number) => json!(number),
            other => json!(format!("{other:?}")),
        })
    };
    let mut message = json!({
        "id": properties.message_id().as_ref().map(ToString::to_string),
        "client": header("client_id"),
        "topic": header("topic"),
        "qos": header("qos"),
        "at": header("received_at"),
    });
    match std::str::from_utf8(body) {
        Ok(text) => message["payload"] = json!(text),
        Err(_) => {
            let text = base64::engine::general_purpose::STANDARD.encode(body);
            message["payload_base64"] = json!(text);
        }
    }
    message
}

/// Publishes to an exchange and waits until the broker has it.
///
/// # Panics
/// When it is not taken.
pub async fn publish(url: &str, exchange: &str, routing_key: &str, body: &str) {
    let connection = connect(url).await;
    let channel = connection.create_channel().await.expect("a channel");
    let selected = channel.confirm_select(lapin::options::ConfirmSelectOptions::default());
    selected.await.expect("confirms");
    let published = channel
        .basic_publish(
            exchange.into(),
            routing_key.into(),
            lapin::options::BasicPublishOptions::default(),
            body.as_bytes(),
            BasicProperties::default(),
        )
        .await
        .unwrap_or_else(|error| panic!("{exchange}: {error}"));
    published.await.expect("a confirm");
    _ = connection.close(200, "done".into()).await;
}
