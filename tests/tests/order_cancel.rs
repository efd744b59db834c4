//! The example `examples/order-cancel`, as its README walks through it.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use moorline_tests::device::Device;
use moorline_tests::servers::process::bound_to_this_program;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::V5;
use moorline_tests::{API_KEY, Api, Gateway, Options, eventually};
use serde_json::{Value, json};

use crate::support::{QUIET, resume, run};

const SECRET: &str = "whsec_dGhlIHNlY3JldCBvZiB0aGUgb3JkZXIgZXhhbXBsZQ==";

/// The shop as a process; ended when dropped.
struct Shop {
    process: Child,
    api: Api,
}

impl Shop {
    fn start(gateway: &Gateway, pay_within: &str) -> Self {
        let program =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/order-cancel/shop.py");
        let mut process = bound_to_this_program("python3")
            .arg(program)
            .env("MOORLINE_URL", format!("http://{}", gateway.http))
            .env("MOORLINE_API_KEY", API_KEY)
            .env("PAY_WITHIN", pay_within)
            .env("WEBHOOK_SECRET", SECRET)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is there");
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let listening = lines.next().unwrap().unwrap();
        // What it logs later is read, so that it never waits for us.
        std::thread::spawn(move || lines.for_each(drop));
        let address = listening
            .strip_prefix("listening http://")
            .expect(&listening);
        let address: SocketAddr = address.parse().unwrap();
        let api = Api::new(address, None);
        Self { process, api }
    }

    async fn order(&self, seat: &str, phone: &str) -> String {
        let body = json!({"seat": seat, "phone": phone});
        let order = self.api.post("/orders", &body).await.expect(201);
        assert_eq!(order["state"], "open");
        order["order"].as_str().unwrap().to_owned()
    }

    async fn seats(&self) -> Value {
        self.api.get("/seats").await.expect(200)
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn options() -> Options {
    Options::config(&format!("[delays]\nwebhook_secret = \"{SECRET}\"\n"))
}

#[test]
fn an_order_that_is_paid_in_time_stays() {
    run(async {
        let gateway = Gateway::start_with(options()).await;
        let shop = Shop::start(&gateway, "1500ms");
        let mut phone = Device::clean(gateway.mqtt(), V5, "ann-phone").await;
        let order = shop.order("14C", "ann-phone").await;
        let taken = shop
            .api
            .post("/orders", &json!({"seat": "14C", "phone": "bob"}))
            .await;
        taken.expect(409);
        let paid = shop
            .api
            .post(&format!("/orders/{order}/pay"), &json!({}))
            .await;
        assert_eq!(paid.expect(200)["state"], "paid");
        let job = gateway
            .api()
            .get(&format!("/v1/delays/order-{order}"))
            .await
            .expect(200);
        assert_eq!(
            (&job["state"], &job["by_event"]),
            (&json!("cancelled"), &json!(format!("order.paid:{order}")))
        );
        tokio::time::sleep(Duration::from_millis(1_500) + QUIET).await;
        assert_eq!(shop.seats().await, json!({"14C": order}));
        assert!(
            phone.take_within(QUIET).await.is_none(),
            "nothing was pushed"
        );
        gateway.finish().await;
    });
}

#[test]
fn an_order_that_nobody_pays_is_cancelled_and_the_phone_hears_of_it() {
    run(async {
        let mut gateway = Gateway::start_with(options()).await;
        let shop = Shop::start(&gateway, "1s");
        let mut phone = Device::clean(gateway.mqtt(), V5, "ann-phone").await;
        let began = Instant::now();
        let order = shop.order("14D", "ann-phone").await;
        assert_eq!(shop.seats().await, json!({"14D": order}));
        let pushed = phone.take().await;
        assert!(
            began.elapsed() >= Duration::from_secs(1),
            "not before its time"
        );
        let pushed: Value = serde_json::from_slice(&pushed.payload).unwrap();
        assert_eq!(pushed, json!({"order": order, "state": "cancelled"}));
        assert_eq!(shop.seats().await, json!({}));
        let late = shop
            .api
            .post(&format!("/orders/{order}/pay"), &json!({}))
            .await;
        late.expect(410);
        // A phone that is away, and a gateway that is killed meanwhile: it happens all the same.
        let order = shop.order("2A", "bob-phone").await;
        gateway.kill9();
        gateway.restart().await;
        eventually(SOON, "the order is cancelled", || async {
            let order = shop.api.get(&format!("/orders/{order}")).await.expect(200);
            (order["state"] == "cancelled").then_some(())
        })
        .await;
        let mut phone = resume(&gateway, V5, "bob-phone").await;
        let pushed: Value = serde_json::from_slice(&phone.take().await.payload).unwrap();
        assert_eq!(pushed["order"], order);
        gateway.finish().await;
    });
}

#[test]
fn the_shop_believes_nobody_else() {
    run(async {
        let gateway = Gateway::start_with(options()).await;
        let shop = Shop::start(&gateway, "1h");
        let order = shop.order("9F", "ann-phone").await;
        let forged = shop
            .api
            .post(&format!("/orders/{order}/expire"), &json!({}))
            .await;
        forged.expect(401);
        assert_eq!(shop.seats().await, json!({"9F": order}));
        gateway.finish().await;
    });
}
