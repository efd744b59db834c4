//! Presence on the events exchange of a real RabbitMQ.

#![allow(clippy::unwrap_used, reason = "tests")]

use futures_util::StreamExt;
use lapin::ExchangeKind;
use lapin::options::{
    BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use moorline_router::contract::client;
use moorline_router::events::{Events, Presence, PresenceChange};
use moorline_router::rabbit::{Config, Link, RabbitEvents};
use moorline_router::{Epoch, NodeId};
use moorline_tests::servers::RabbitServer;
use moorline_tests::waiting::soon;

#[tokio::test]
async fn a_device_that_comes_and_goes_is_heard_of_in_order() {
    let config = Config {
        url: RabbitServer::shared().await.vhost().await.url,
        ..Config::default()
    };
    let link = Link::new(&config, "listener");
    let channel = link.channel().await.unwrap();
    let exchange = config.name("events");
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let nothing = FieldTable::default;
    channel
        .exchange_declare(exchange.clone(), ExchangeKind::Topic, durable, nothing())
        .await
        .unwrap();
    let queue = "mine".into();
    channel
        .queue_declare(queue, QueueDeclareOptions::default(), nothing())
        .await
        .unwrap();
    let options = QueueBindOptions::default();
    channel
        .queue_bind(
            "mine".into(),
            exchange,
            "device.*".into(),
            options,
            nothing(),
        )
        .await
        .unwrap();
    let options = BasicConsumeOptions {
        no_ack: true,
        ..BasicConsumeOptions::default()
    };
    let mut heard = channel
        .basic_consume("mine".into(), "".into(), options, nothing())
        .await
        .unwrap();

    let events = RabbitEvents::open(&config);
    for epoch in 1..=50 {
        let change = if epoch % 2 == 1 {
            PresenceChange::Online
        } else {
            PresenceChange::Offline { reason: "normal" }
        };
        events.presence(Presence {
            client: client("car-7"),
            change,
            epoch: Epoch(epoch),
            node: NodeId::from_text("node-a"),
            at_ms: 17,
        });
    }
    for epoch in 1..=50_u64 {
        let event = soon("an event", heard.next()).await.unwrap().unwrap();
        let body: serde_json::Value = serde_json::from_slice(&event.data).unwrap();
        let (name, reason) = if epoch % 2 == 1 {
            ("device.online", serde_json::Value::Null)
        } else {
            ("device.offline", "normal".into())
        };
        assert_eq!(event.routing_key.as_str(), name);
        assert_eq!(body["type"], name);
        assert_eq!(body["reason"], reason);
        assert_eq!(body["client"], "car-7");
        assert_eq!(body["epoch"], epoch);
    }
}
