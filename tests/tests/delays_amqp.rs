//! Delayed jobs and RabbitMQ: what they publish, and events that come from there.

use std::time::Duration;

use moorline_tests::amqp::{self, Listener};
use moorline_tests::servers::{RabbitServer, VirtualHost};
use moorline_tests::waiting::SOON;
use moorline_tests::{Gateway, Options, eventually};
use serde_json::{Value, json};

use crate::support::run;

/// One machine with a RabbitMQ beside it, or a cluster with its own.
async fn gateway(more: &str) -> (Gateway, VirtualHost) {
    let vhost = RabbitServer::shared().await.vhost().await;
    let config = format!("{more}\n[rabbitmq]\nurl = \"{}\"\n", vhost.url);
    (Gateway::start_with(Options::config(&config)).await, vhost)
}

#[test]
fn a_job_publishes_to_an_exchange_and_fails_where_no_queue_takes_it() {
    run(async {
        let retry = "[delays.retry]\nattempts = 2\ninitial = \"20ms\"\nmax = \"50ms\"";
        let (gateway, vhost) = gateway(retry).await;
        let mut listener = Listener::of(&vhost.url, "orders").await;
        let api = gateway.api();
        let job = |id: &str, exchange: &str| json!({"id": id, "delay": 0, "action": {"amqp": {"exchange": exchange, "routing_key": "order.due", "body": {"order": 7}}}});
        api.post("/v1/delays", &job("taken", "orders"))
            .await
            .expect(201);
        let arrived = listener.take(Duration::from_secs(3)).await;
        assert_eq!(
            arrived,
            [("order.due".to_owned(), r#"{"order":7}"#.to_owned())]
        );
        for (id, exchange) in [("no-queue", ""), ("no-exchange", "nowhere")] {
            api.post("/v1/delays", &job(id, exchange)).await.expect(201);
            let failed = eventually(3 * SOON, "the job fails", || async {
                let job = api.get(&format!("/v1/delays/{id}")).await.expect(200);
                (job["state"] == "failed").then_some(job)
            })
            .await;
            assert_eq!(failed["attempts"], 2, "{failed}");
        }
        // The way out is as good as before.
        api.post("/v1/delays", &job("again", "orders"))
            .await
            .expect(201);
        assert_eq!(listener.take(Duration::from_secs(3)).await.len(), 1);
        gateway.finish().await;
        RabbitServer::shared().await.delete_vhost(&vhost).await;
    });
}

#[test]
fn an_event_comes_of_a_message_that_a_binding_takes() {
    run(async {
        let vhost = RabbitServer::shared().await.vhost().await;
        // The exchange is the operator's.
        let _listener = Listener::of(&vhost.url, "payments").await;
        let config = format!(
            "[[delays.bindings]]\nname = \"payments\"\nexchange = \"payments\"\nrouting_keys = [\"paid.#\"]\n\
             type = \"order.paid\"\nkey = \"/order\"\n[rabbitmq]\nurl = \"{}\"\n",
            vhost.url
        );
        let mut gateway = Gateway::start_with(Options::config(&config)).await;
        let api = gateway.api();
        let state = async |api: &moorline_tests::Api, id: &str| -> Value {
            api.get(&format!("/v1/delays/{id}")).await.expect(200)["state"].clone()
        };
        for order in 1..4 {
            let job = json!({"id": format!("order-{order}"), "delay": "1h", "cancel_on": [format!("order.paid:{order}")],
                "action": {"webhook": {"url": "http://127.0.0.1:9/"}}});
            api.post("/v1/delays", &job).await.expect(201);
        }
        let queue = "moorline.delay-events.payments";
        eventually(SOON, "the queue is bound", || async {
            let queues = RabbitServer::shared().await.queues(&vhost).await;
            queues.iter().any(|(name, _)| name == queue).then_some(())
        })
        .await;
        amqp::publish(&vhost.url, "payments", "refunded.x", r#"{"order": 2}"#).await;
        amqp::publish(&vhost.url, "payments", "paid.x", "not what was agreed").await;
        amqp::publish(&vhost.url, "payments", "paid.x", r#"{"order": 1}"#).await;
        eventually(SOON, "the order is cancelled", || async {
            (state(&api, "order-1").await == "cancelled").then_some(())
        })
        .await;
        assert_eq!(state(&api, "order-2").await, "pending");
        // What comes while nobody is there is told later.
        gateway.kill9();
        amqp::publish(&vhost.url, "payments", "paid.x", r#"{"order": "3"}"#).await;
        gateway.restart().await;
        let api = gateway.api();
        eventually(SOON, "the order is cancelled", || async {
            (state(&api, "order-3").await == "cancelled").then_some(())
        })
        .await;
        gateway.finish().await;
        RabbitServer::shared().await.delete_vhost(&vhost).await;
    });
}
