//! A backend that is asked about each device.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Connect, Publish, V3, V5};
use moorline_tests::{Backend, Call, Gateway, Options};
use serde_json::{Value, json};

use crate::auth::{ann, answer, as_user, bad_credentials, not_authorized, users};
use crate::support::{VERSIONS, run};

/// On one node: what it remembers of answers is a node's own.
async fn gateway(url: &str, more: &str) -> Gateway {
    let config = format!("[auth]\nchain = [\"http\"]\n[auth.http]\nurl = \"{url}\"\n{more}");
    Gateway::start_with(Options::config(&config).one_node()).await
}

fn question(call: &Call) -> Value {
    serde_json::from_slice(&call.body).unwrap()
}

async fn backend(decide: impl Fn(&Value) -> Value + Send + Sync + 'static) -> Backend {
    Backend::speaking(move |call, _| (200, decide(&question(call)).to_string(), Duration::ZERO))
        .await
}

#[test]
fn the_backend_decides_and_says_what_a_device_may_do() {
    run(async {
        let backend = backend(|asked| match asked["username"].as_str() {
            Some("ann") => json!({
                "result": "allow",
                "acl": [{"permission": "allow", "action": "subscribe", "topics": ["fleet/{username}"]}],
            }),
            Some("bound") => json!({"result": "allow", "client_id": "car-7", "username": "driver"}),
            Some("short") => json!({"result": "allow", "expires_in": 2}),
            Some("ignored") => json!({"result": "ignore"}),
            _ => json!({"result": "deny"}),
        })
        .await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("authorization");
        std::fs::write(&file, "Bearer of-the-tests\n").unwrap();
        let more = format!("authorization_file = {file:?}\n");
        let gateway = gateway(&backend.url("/auth"), &more).await;
        for version in VERSIONS {
            let mut device = Device::connect(gateway.mqtt(), ann(version, "car-1")).await;
            assert_eq!(device.subscribe("fleet/ann", 1).await, 1);
            assert!(device.subscribe("fleet/bob", 1).await >= 0x80);
            let call = backend.calls().pop().unwrap();
            assert_eq!(
                (call.method.as_str(), call.path.as_str()),
                ("POST", "/auth")
            );
            assert_eq!(call.header("authorization"), "Bearer of-the-tests");
            let asked = question(&call);
            assert_eq!(asked["client_id"], "car-1");
            assert_eq!(asked["password"], "ann's secret");
            assert!(
                asked["peer_address"]
                    .as_str()
                    .unwrap()
                    .starts_with("127.0.0.1:")
            );
            assert_eq!(asked["certificate"], Value::Null);
            assert_eq!(
                asked["protocol"],
                if version == V5 { "5.0" } else { "3.1.1" }
            );
            for user in ["ignored", "mallory"] {
                let code = answer(&gateway, &as_user(version, "car-1", user, "x")).await;
                assert_eq!(code, bad_credentials(version));
            }
            let bound = as_user(version, "car-7", "bound", "x");
            assert_eq!(answer(&gateway, &bound).await, 0);
            let bound = as_user(version, "car-8", "bound", "x");
            assert_eq!(answer(&gateway, &bound).await, not_authorized(version));
        }
        let short = as_user(V5, "car-2", "short", "x");
        let mut device = Device::connect(gateway.mqtt(), short).await;
        assert_eq!(device.await_close(SOON).await, Some(0x87));
        // Binary passwords travel as base64.
        let binary = Connect {
            password: Some(vec![0xff, 0]),
            ..as_user(V5, "car-3", "ann", "")
        };
        assert_eq!(answer(&gateway, &binary).await, 0);
        let asked = question(&backend.calls().pop().unwrap());
        assert_eq!(asked["password_base64"], "/wA=");
        gateway.finish().await;
    });
}

#[test]
fn five_hundred_equal_questions_are_one_call() {
    run(async {
        let backend = Backend::speaking(|_, _| {
            (
                200,
                json!({"result": "deny"}).to_string(),
                Duration::from_secs(1),
            )
        })
        .await;
        let gateway = gateway(&backend.url("/"), "cache_deny_ttl = \"1m\"\n").await;
        let address = gateway.mqtt();
        let mut storm = tokio::task::JoinSet::new();
        for _ in 0..500 {
            storm.spawn(async move { Device::try_connect(address, ann(V5, "car-7")).await });
        }
        let answers = storm.join_all().await;
        assert!(
            answers
                .iter()
                .all(|one| one.as_ref().is_err_and(|why| why.contains("code: 134")))
        );
        assert_eq!(backend.calls().len(), 1);
        // And the answer is kept, a refusal too.
        assert_eq!(answer(&gateway, &ann(V5, "car-7")).await, 0x86);
        assert_eq!(backend.calls().len(), 1);
        // Another password is another question.
        assert_eq!(
            answer(&gateway, &as_user(V5, "car-7", "ann", "x")).await,
            0x86
        );
        assert_eq!(backend.calls().len(), 2);
        gateway.finish().await;
    });
}

#[test]
fn answers_are_kept_for_their_time() {
    run(async {
        let backend = backend(|_| json!({"result": "allow"})).await;
        let more = "cache_ttl = \"2s\"\n";
        let gateway = gateway(&backend.url("/"), more).await;
        for _ in 0..5 {
            assert_eq!(answer(&gateway, &ann(V5, "car-7")).await, 0);
        }
        assert_eq!(backend.calls().len(), 1);
        moorline_tests::eventually(SOON, "it is asked again", || async {
            assert_eq!(answer(&gateway, &ann(V5, "car-7")).await, 0);
            (backend.calls().len() == 2).then_some(())
        })
        .await;
        gateway.finish().await;
    });
}

#[test]
fn calls_at_the_same_time_are_limited() {
    run(async {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (inside, highest) = (Arc::clone(&now), Arc::clone(&most));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let app = axum::Router::new().fallback(move || {
            let (inside, highest) = (Arc::clone(&inside), Arc::clone(&highest));
            async move {
                highest.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(50)).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                json!({"result": "allow"}).to_string()
            }
        });
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let gateway = gateway(&url, "calls_max = 4\nwaiting_max = 1000\n").await;
        let address = gateway.mqtt();
        let mut storm = tokio::task::JoinSet::new();
        for number in 0..100 {
            storm.spawn(async move {
                Device::connect(address, ann(V3, &format!("car-{number}"))).await
            });
        }
        assert_eq!(storm.join_all().await.len(), 100);
        assert!(most.load(Ordering::SeqCst) <= 4, "{most:?} calls at once");
        server.abort();
        gateway.finish().await;
    });
}

#[test]
fn when_the_backend_is_down_it_is_the_gateway_that_is_sorry() {
    run(async {
        let nowhere = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}/", listener.local_addr().unwrap())
        };
        let wrong = Backend::speaking(|call, _| {
            let (status, body) = match call.path.as_str() {
                "/500" => (500, json!({"result": "allow"}).to_string()),
                "/words" => (200, "allow".to_owned()),
                "/else" => (200, json!({"result": "perhaps"}).to_string()),
                "/rules" => (200, json!({"result": "allow", "acl": [{}]}).to_string()),
                "/moved" => (302, json!({"result": "allow"}).to_string()),
                _ => (
                    200,
                    format!(
                        "{{\"result\": \"allow\", \"x\": \"{}\"}}",
                        "x".repeat(100_000)
                    ),
                ),
            };
            (status, body, Duration::ZERO)
        })
        .await;
        let mut urls = vec![nowhere];
        for path in ["/500", "/words", "/else", "/rules", "/moved", "/long"] {
            urls.push(wrong.url(path));
        }
        for url in urls {
            let gateway = gateway(&url, "").await;
            assert_eq!(answer(&gateway, &ann(V5, "car-7")).await, 0x88, "{url}");
            assert_eq!(answer(&gateway, &ann(V3, "car-7")).await, 3, "{url}");
            gateway.finish().await;
        }
    });
}

#[test]
fn a_backend_that_hangs_has_a_deadline_and_the_next_is_asked_if_so_declared() {
    run(async {
        let backend = Backend::speaking(|_, _| {
            (
                200,
                json!({"result": "allow"}).to_string(),
                Duration::from_secs(30),
            )
        })
        .await;
        let (_folder, file) = users();
        let config = format!(
            "[auth]\nchain = [\"http\", \"password_file\"]\n[auth.password_file]\nfile = {file:?}\n\
             [auth.http]\nurl = \"{}\"\ntimeout = \"500ms\"\non_error = \"next\"\n",
            backend.url("/")
        );
        let gateway = Gateway::start_with(Options::config(&config)).await;
        let started = Instant::now();
        let mut device = Device::connect(gateway.mqtt(), ann(V5, "car-7")).await;
        assert!(started.elapsed() < Duration::from_secs(10));
        assert!(device.publish(Publish::new("up/x", 1, "x")).await < 0x80);
        let wrong = as_user(V5, "car-8", "ann", "guess");
        assert_eq!(answer(&gateway, &wrong).await, 0x86);
        gateway.finish().await;
    });
}
