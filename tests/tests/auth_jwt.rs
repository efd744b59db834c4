//! Tokens in place of passwords: algorithms, claims, keys that change, and the end of a token.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use moorline_tests::device::Device;
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Connect, Publish, V3, V5};
use moorline_tests::{Backend, Gateway, Options, eventually};
use serde_json::{Value, json};

use crate::auth::{answer, as_user, bad_credentials, not_authorized};
use crate::support::{VERSIONS, run};

const SECRET: &str = "a secret of thirty-two bytes or more";

fn key_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("keys")
        .join(name)
}

/// Keys of these tests alone; they open nothing.
fn private(algorithm: Algorithm) -> EncodingKey {
    let pem = |name: &str| std::fs::read(key_file(name)).unwrap();
    match algorithm {
        Algorithm::HS256 => EncodingKey::from_secret(SECRET.as_bytes()),
        Algorithm::RS256 => EncodingKey::from_rsa_pem(&pem("rsa.pem")).unwrap(),
        Algorithm::ES256 => EncodingKey::from_ec_pem(&pem("ec.pem")).unwrap(),
        _ => EncodingKey::from_ed_pem(&pem("ed.pem")).unwrap(),
    }
}

fn in_seconds(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap() + seconds
}

fn claims(more: &Value) -> Value {
    let mut claims = json!({"sub": "ann", "exp": in_seconds(3600)});
    for (name, value) in more.as_object().unwrap() {
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        } else {
            claims[name] = value.clone();
        }
    }
    claims
}

fn signed(algorithm: Algorithm, kid: Option<&str>, claims: &Value, key: &EncodingKey) -> String {
    let mut header = Header::new(algorithm);
    header.kid = kid.map(str::to_owned);
    jsonwebtoken::encode(&header, claims, key).unwrap()
}

fn token(more: &Value) -> String {
    let key = private(Algorithm::HS256);
    signed(Algorithm::HS256, None, &claims(more), &key)
}

fn with_token(version: u8, id: &str, token: &str) -> Connect {
    as_user(version, id, "whoever", token)
}

async fn gateway(jwt: &str) -> (Gateway, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, format!("{SECRET}\n")).unwrap();
    let keys: String = [
        ("HS256", secret),
        ("RS256", key_file("rsa.pub.pem")),
        ("ES256", key_file("ec.pub.pem")),
        ("EdDSA", key_file("ed.pub.pem")),
    ]
    .iter()
    .map(|(algorithm, file)| {
        format!("[[auth.jwt.keys]]\nalgorithm = \"{algorithm}\"\nfile = {file:?}\n")
    })
    .collect();
    let config = format!("[auth]\nchain = [\"jwt\"]\n[auth.jwt]\n{jwt}\n{keys}");
    (
        Gateway::start_with(Options::config(&config).one_node()).await,
        folder,
    )
}

#[test]
fn every_algorithm_is_verified_by_its_own_key_and_no_other() {
    use Algorithm::{ES256, EdDSA, HS256, RS256};
    run(async {
        let (gateway, _folder) = gateway("").await;
        let claims = claims(&json!({}));
        for algorithm in [HS256, RS256, ES256, EdDSA] {
            let good = signed(algorithm, None, &claims, &private(algorithm));
            for version in VERSIONS {
                let code = answer(&gateway, &with_token(version, "car-7", &good)).await;
                assert_eq!(code, 0, "{algorithm:?}");
            }
            // The signature of other claims.
            let (front, signature) = good.rsplit_once('.').unwrap();
            let (header, _) = front.split_once('.').unwrap();
            let forged = URL_SAFE_NO_PAD.encode(r#"{"sub":"bob","exp":99999999999}"#);
            let forged = format!("{header}.{forged}.{signature}");
            assert_eq!(
                answer(&gateway, &with_token(V5, "car-7", &forged)).await,
                0x86
            );
        }
        // A public key is no secret: whoever knows it cannot sign with it.
        for file in ["rsa.pub.pem", "ec.pub.pem", "ed.pub.pem"] {
            let text = std::fs::read(key_file(file)).unwrap();
            for secret in [&text[..], text.trim_ascii_end()] {
                let confused = signed(HS256, None, &claims, &EncodingKey::from_secret(secret));
                assert_eq!(
                    answer(&gateway, &with_token(V5, "car-7", &confused)).await,
                    0x86
                );
            }
        }
        // Longer hashes of the same family are other algorithms.
        for algorithm in [Algorithm::HS384, Algorithm::HS512] {
            let other = signed(algorithm, None, &claims, &private(HS256));
            assert_eq!(
                answer(&gateway, &with_token(V5, "car-7", &other)).await,
                0x86
            );
        }
        let payload = URL_SAFE_NO_PAD.encode(claims.to_string());
        for header in [
            r#"{"alg":"none"}"#,
            r#"{"alg":"None","typ":"JWT"}"#,
            r#"{"alg":""}"#,
            r#"{"typ":"JWT"}"#,
            r#"{"alg":"HS256","crit":["x"],"x":1}"#,
        ] {
            for signature in ["", "AAAA"] {
                let unsigned = format!("{}.{payload}.{signature}", URL_SAFE_NO_PAD.encode(header));
                for version in VERSIONS {
                    let code = answer(&gateway, &with_token(version, "car-7", &unsigned)).await;
                    assert_eq!(code, bad_credentials(version), "{header}");
                }
            }
        }
        gateway.finish().await;
    });
}

#[test]
fn claims_say_for_how_long_for_whom_and_by_whom() {
    run(async {
        let (gateway, _folder) =
            gateway("audience = \"moorline\"\nissuer = \"https://issuer.example\"\n").await;
        let good = json!({"aud": ["other", "moorline"], "iss": "https://issuer.example"});
        let with = |name: &str, value: Value| {
            let mut changed = good.clone();
            changed[name] = value;
            token(&changed)
        };
        for (token, expected) in [
            (token(&good), 0),
            (with("aud", json!("moorline")), 0),
            (with("nbf", json!(in_seconds(-10))), 0),
            (with("exp", json!(in_seconds(-1))), 0x86),
            (with("exp", Value::Null), 0x86),
            (with("exp", json!("tomorrow")), 0x86),
            (with("nbf", json!(in_seconds(60))), 0x86),
            (with("aud", json!("other")), 0x86),
            (with("aud", json!(["other"])), 0x86),
            (with("aud", Value::Null), 0x86),
            (with("iss", json!("https://other.example")), 0x86),
            (with("iss", Value::Null), 0x86),
            ("not a token".to_owned(), 0x86),
        ] {
            let code = answer(&gateway, &with_token(V5, "car-7", &token)).await;
            assert_eq!(code, expected, "{token}");
        }
        assert_eq!(answer(&gateway, &Connect::new(V3, "car-7")).await, 4);
        gateway.finish().await;
    });
}

#[test]
fn a_token_names_its_device_and_what_it_may_do() {
    run(async {
        let (gateway, _folder) = gateway("").await;
        for version in VERSIONS {
            let bound = token(&json!({"client_id": "car-7"}));
            assert_eq!(
                answer(&gateway, &with_token(version, "car-7", &bound)).await,
                0
            );
            let code = answer(&gateway, &with_token(version, "car-8", &bound)).await;
            assert_eq!(code, not_authorized(version));
            for wrong in [json!(7), json!(""), json!({})] {
                let odd = token(&json!({"client_id": wrong}));
                let code = answer(&gateway, &with_token(version, "car-7", &odd)).await;
                assert_eq!(code, not_authorized(version));
            }
        }
        // Without a client id of its own it gets the one of the token.
        let bound = token(&json!({"client_id": "car-7"}));
        let device = Device::connect(gateway.mqtt(), with_token(V5, "", &bound)).await;
        assert!(device.connack.iter().any(|(id, value)| {
            *id == 0x12 && *value == moorline_tests::wire::Value::Text(b"car-7".to_vec())
        }));
        let acl = json!([
            {"permission": "deny", "topics": ["d/{client_id}/secret"]},
            {"permission": "allow", "action": "subscribe", "topics": ["fleet/{username}/#"]},
        ]);
        let ruled = token(&json!({"acl": acl}));
        let mut device = Device::connect(gateway.mqtt(), with_token(V5, "car-9", &ruled)).await;
        assert_eq!(device.subscribe("fleet/ann/#", 1).await, 1);
        assert_eq!(device.subscribe("fleet/whoever/#", 1).await, 0x87);
        assert_eq!(device.subscribe("d/car-9/#", 1).await, 0x87);
        assert_eq!(device.subscribe("d/car-9/open", 1).await, 1);
        assert_eq!(
            device.publish(Publish::new("fleet/ann/x", 1, "x")).await,
            0x87
        );
        for wrong in [
            json!("all"),
            json!([{"topics": ["#"]}]),
            json!([{"permission": "allow", "topics": ["{x}"]}]),
        ] {
            let odd = token(&json!({"acl": wrong}));
            assert_eq!(answer(&gateway, &with_token(V5, "car-9", &odd)).await, 0x87);
        }
        gateway.finish().await;
    });
}

#[test]
fn a_token_can_have_to_name_its_device() {
    run(async {
        let (gateway, _folder) =
            gateway("client_id_required = true\nclient_id_claim = \"sub\"\nfrom = \"username\"\n")
                .await;
        let in_name = |id: &str, token: &str| as_user(V5, id, token, "unused");
        assert_eq!(
            answer(&gateway, &in_name("ann", &token(&json!({})))).await,
            0
        );
        assert_eq!(
            answer(&gateway, &in_name("bob", &token(&json!({})))).await,
            0x87
        );
        let nameless = token(&json!({"sub": null}));
        assert_eq!(answer(&gateway, &in_name("ann", &nameless)).await, 0x87);
        gateway.finish().await;
    });
}

#[test]
fn a_connection_ends_with_its_token() {
    run(async {
        let (gateway, _folder) = gateway("").await;
        let short = token(&json!({"exp": in_seconds(3)}));
        let mut v5 = Device::connect(gateway.mqtt(), with_token(V5, "v5", &short)).await;
        let mut v3 = Device::connect(gateway.mqtt(), with_token(V3, "v3", &short)).await;
        let mut long =
            Device::connect(gateway.mqtt(), with_token(V5, "x", &token(&json!({})))).await;
        v5.ping().await;
        assert_eq!(v5.await_close(SOON).await, Some(0x87));
        assert_eq!(v3.await_close(SOON).await, None);
        let code = answer(&gateway, &with_token(V5, "v5", &short)).await;
        assert_eq!(code, 0x86);
        long.ping().await;
        gateway.finish().await;
    });
}

fn ec_jwk(kid: &str, name: &str) -> Value {
    let text = std::fs::read_to_string(key_file(name)).unwrap();
    let body: String = text.lines().filter(|line| !line.starts_with('-')).collect();
    let der = base64::engine::general_purpose::STANDARD
        .decode(body)
        .unwrap();
    // A public key of P-256 ends with its two coordinates.
    let point = &der[der.len() - 64..];
    json!({
        "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": kid,
        "x": URL_SAFE_NO_PAD.encode(&point[..32]), "y": URL_SAFE_NO_PAD.encode(&point[32..]),
    })
}

fn ed_jwk(kid: &str) -> Value {
    let text = std::fs::read_to_string(key_file("ed.pub.pem")).unwrap();
    let body: String = text.lines().filter(|line| !line.starts_with('-')).collect();
    let der = base64::engine::general_purpose::STANDARD
        .decode(body)
        .unwrap();
    json!({
        "kty": "OKP", "crv": "Ed25519", "kid": kid,
        "x": URL_SAFE_NO_PAD.encode(&der[der.len() - 32..]),
    })
}

#[test]
fn keys_are_fetched_and_change_and_stay_when_the_url_is_down() {
    run(async {
        let set = Arc::new(Mutex::new((
            200,
            json!({"keys": [ec_jwk("one", "ec.pub.pem")]}),
        )));
        let served = Arc::clone(&set);
        let backend = Backend::speaking(move |_, _| {
            let (status, body) = served.lock().unwrap().clone();
            (status, body.to_string(), Duration::ZERO)
        })
        .await;
        let config = format!(
            "[auth]\nchain = [\"jwt\"]\n[auth.jwt]\njwks_url = \"{}\"\n",
            backend.url("/keys")
        );
        let gateway = Gateway::start_with(Options::config(&config).one_node()).await;
        let claims = claims(&json!({}));
        let one = signed(
            Algorithm::ES256,
            Some("one"),
            &claims,
            &private(Algorithm::ES256),
        );
        let two = signed(
            Algorithm::EdDSA,
            Some("two"),
            &claims,
            &private(Algorithm::EdDSA),
        );
        let code = |token: &str| {
            let connect = with_token(V5, "car-7", token);
            let gateway = &gateway;
            async move { answer(gateway, &connect).await }
        };
        eventually(SOON, "the first key", || async {
            (code(&one).await == 0).then_some(())
        })
        .await;
        assert_eq!(code(&two).await, 0x86);
        *set.lock().unwrap() = (
            200,
            json!({"keys": [
                {"kty": "RSA", "use": "enc", "kid": "x", "n": "AQAB", "e": "AQAB"},
                {"kty": "oct", "kid": "two", "k": URL_SAFE_NO_PAD.encode(SECRET)},
                {"kty": "future", "kid": "y"},
                ed_jwk("two"),
            ]}),
        );
        // An unknown key id makes it look again, though not each time.
        eventually(SOON, "the second key", || async {
            (code(&two).await == 0).then_some(())
        })
        .await;
        assert_eq!(code(&one).await, 0x86, "a key that was taken away");
        // A secret that anyone can fetch is none.
        let secret = signed(
            Algorithm::HS256,
            Some("two"),
            &claims,
            &private(Algorithm::HS256),
        );
        assert_eq!(code(&secret).await, 0x86);
        set.lock().unwrap().0 = 500;
        let calls = backend.calls().len();
        let three = signed(
            Algorithm::EdDSA,
            Some("three"),
            &claims,
            &private(Algorithm::EdDSA),
        );
        eventually(SOON, "a fetch that fails", || async {
            assert_eq!(code(&three).await, 0x86);
            (backend.calls().len() > calls).then_some(())
        })
        .await;
        assert_eq!(code(&two).await, 0);
        gateway.finish().await;
    });
}

#[test]
fn unknown_keys_do_not_flood_the_url() {
    run(async {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let backend = Backend::speaking(move |_, _| {
            counted.fetch_add(1, Ordering::SeqCst);
            let body = json!({"keys": [ed_jwk("one")]}).to_string();
            (200, body, Duration::ZERO)
        })
        .await;
        let config = format!(
            "[auth]\nchain = [\"jwt\"]\n[auth.jwt]\njwks_url = \"{}\"\n",
            backend.url("/keys")
        );
        let gateway = Gateway::start_with(Options::config(&config)).await;
        let started = std::time::Instant::now();
        let claims = claims(&json!({}));
        let one = signed(
            Algorithm::EdDSA,
            Some("one"),
            &claims,
            &private(Algorithm::EdDSA),
        );
        let known = with_token(V5, "x", &one);
        eventually(SOON, "the keys", || async {
            (answer(&gateway, &known).await == 0).then_some(())
        })
        .await;
        for number in 0..50 {
            let kid = format!("kid-{number}");
            let key = private(Algorithm::EdDSA);
            let unknown = signed(Algorithm::EdDSA, Some(&kid), &claims, &key);
            assert_eq!(answer(&gateway, &with_token(V5, "x", &unknown)).await, 0x86);
        }
        let allowed = 2 + usize::try_from(started.elapsed().as_secs()).unwrap() / 5;
        assert!(count.load(Ordering::SeqCst) <= allowed, "{count:?} fetches");
        gateway.finish().await;
    });
}

#[test]
fn without_keys_nobody_is_called_a_liar() {
    run(async {
        let backend = Backend::answering(|_, _| (503, Duration::ZERO)).await;
        let config = format!(
            "[auth]\nchain = [\"jwt\"]\n[auth.jwt]\njwks_url = \"{}\"\n",
            backend.url("/keys")
        );
        let gateway = Gateway::start_with(Options::config(&config)).await;
        let claims = claims(&json!({}));
        let token = signed(
            Algorithm::EdDSA,
            Some("one"),
            &claims,
            &private(Algorithm::EdDSA),
        );
        assert_eq!(answer(&gateway, &with_token(V5, "x", &token)).await, 0x88);
        assert_eq!(answer(&gateway, &with_token(V3, "x", &token)).await, 3);
        gateway.finish().await;
    });
}

#[test]
fn a_key_set_in_a_file_is_read_again() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.json");
        let put = |set: Value| {
            let fresh = folder.path().join("fresh");
            std::fs::write(&fresh, set.to_string()).unwrap();
            std::fs::rename(fresh, &file).unwrap();
        };
        put(json!({"keys": [ed_jwk("one")]}));
        let config = format!("[auth]\nchain = [\"jwt\"]\n[auth.jwt]\njwks_file = {file:?}\n");
        let gateway = Gateway::start_with(Options::config(&config)).await;
        let claims = claims(&json!({}));
        let one = signed(
            Algorithm::EdDSA,
            Some("one"),
            &claims,
            &private(Algorithm::EdDSA),
        );
        let two = signed(
            Algorithm::ES256,
            Some("two"),
            &claims,
            &private(Algorithm::ES256),
        );
        assert_eq!(answer(&gateway, &with_token(V5, "x", &one)).await, 0);
        assert_eq!(answer(&gateway, &with_token(V5, "x", &two)).await, 0x86);
        put(json!({"keys": [ec_jwk("two", "ec.pub.pem")]}));
        assert_eq!(answer(&gateway, &with_token(V5, "x", &one)).await, 0x86);
        assert_eq!(answer(&gateway, &with_token(V5, "x", &two)).await, 0);
        gateway.finish().await;
    });
}
