//! Who is let in: the password file, the codes of a refusal, and what a refused device cannot do.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use moorline_tests::device::{Arrived, Device};
use moorline_tests::gateway::{binary, wait_with_output};
use moorline_tests::others::{mosquitto, run as run_program};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::{Connect, Packet, Publish, V3, V5};
use moorline_tests::{Ended, Gateway, Options, eventually};

use crate::support::{VERSIONS, metric, run};

/// Runs `moorline passwd` with `password` on its standard input.
pub(crate) fn passwd(file: &Path, args: &[&str], password: &str) -> Ended {
    let mut child = Command::new(binary())
        .arg("passwd")
        .arg("--file")
        .arg(file)
        .args(args)
        .env_remove("MOORLINE_API_KEY")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments does not read.
    _ = writeln!(child.stdin.take().unwrap(), "{password}");
    wait_with_output(child, SOON)
}

/// A folder with a password file for `ann` and `bob`.
pub(crate) fn users() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("passwords");
    for (user, password) in [("ann", "ann's secret"), ("bob", "bob's secret")] {
        let done = passwd(&file, &[user], password);
        assert!(done.status.success(), "{done:?}");
    }
    (folder, file)
}

/// A gateway that lets `ann` and `bob` in, and what else `config` says.
pub(crate) async fn with_users(config: &str) -> (Gateway, tempfile::TempDir) {
    let (options, folder) = options_with_users(config);
    (Gateway::start_with(options).await, folder)
}

/// The same on one node: what it has read of the file, and remembers of passwords, is a node's own.
async fn with_users_on_one_node(config: &str) -> (Gateway, tempfile::TempDir) {
    let (options, folder) = options_with_users(config);
    (Gateway::start_with(options.one_node()).await, folder)
}

fn options_with_users(config: &str) -> (Options, tempfile::TempDir) {
    let (folder, file) = users();
    let text = format!(
        "[auth]\nchain = [\"password_file\"]\n[auth.password_file]\nfile = {file:?}\n{config}"
    );
    (Options::config(&text), folder)
}

pub(crate) fn as_user(version: u8, id: &str, user: &str, password: &str) -> Connect {
    Connect {
        user_name: Some(user.to_owned()),
        password: Some(password.as_bytes().to_vec()),
        ..Connect::new(version, id)
    }
}

pub(crate) fn ann(version: u8, id: &str) -> Connect {
    as_user(version, id, "ann", "ann's secret")
}

/// The code of the CONNACK; the connection is dropped.
pub(crate) async fn answer(gateway: &Gateway, connect: &Connect) -> u8 {
    let mut device = Device::socket(gateway.mqtt(), connect.version)
        .await
        .unwrap();
    device
        .send(&moorline_tests::wire::connect(connect))
        .await
        .unwrap();
    match device.receive(2 * SOON).await {
        Arrived::Packet(Packet::ConnAck { code, .. }) => code,
        other => panic!("instead of a CONNACK: {other:?}"),
    }
}

pub(crate) fn bad_credentials(version: u8) -> u8 {
    if version == V5 { 0x86 } else { 4 }
}

pub(crate) fn not_authorized(version: u8) -> u8 {
    if version == V5 { 0x87 } else { 5 }
}

#[test]
fn the_password_file_decides_and_does_not_tell_who_exists() {
    run(async {
        let (gateway, _folder) = with_users("").await;
        for version in VERSIONS {
            assert_eq!(answer(&gateway, &ann(version, "car-7")).await, 0);
            let wrong = bad_credentials(version);
            for (user, password) in [
                ("ann", "bob's secret"),
                ("nobody", "x"),
                ("ann", ""),
                ("", ""),
            ] {
                let connect = as_user(version, "car-7", user, password);
                assert_eq!(answer(&gateway, &connect).await, wrong, "{user} {password}");
            }
            let anonymous = Connect::new(version, "car-7");
            assert_eq!(answer(&gateway, &anonymous).await, wrong);
            let nameless = Connect {
                user_name: Some("ann".into()),
                ..Connect::new(version, "car-7")
            };
            assert_eq!(answer(&gateway, &nameless).await, wrong);
        }
        let text = gateway.metrics().await;
        assert!(
            text.contains(
                r#"moorline_auth_total{authenticator="password_file",result="accepted"} 2"#
            ),
            "{text}"
        );
        assert!(text.contains(r#"result="refused""#) && text.contains(r#"result="unknown""#));
        for line in gateway.log() {
            assert!(!line.contains("secret"), "a password in the log: {line}");
        }
        gateway.finish().await;
    });
}

#[test]
fn the_file_is_read_again_when_it_changes() {
    use std::os::unix::fs::PermissionsExt as _;
    run(async {
        let (gateway, folder) = with_users_on_one_node("").await;
        let file = folder.path().join("passwords");
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(answer(&gateway, &ann(V5, "a")).await, 0);
        assert!(passwd(&file, &["ann"], "changed").status.success());
        assert_eq!(answer(&gateway, &ann(V5, "a")).await, 0x86);
        let changed = as_user(V5, "a", "ann", "changed");
        assert_eq!(answer(&gateway, &changed).await, 0);
        let done = passwd(&file, &["--delete", "ann"], "");
        assert!(done.stdout.contains("removed"), "{done:?}");
        assert_eq!(answer(&gateway, &changed).await, 0x86);
        assert!(passwd(&file, &["carol"], "new").status.success());
        assert_eq!(answer(&gateway, &as_user(V3, "c", "carol", "new")).await, 0);
        // What cannot be read changes nothing.
        std::fs::write(&file, "carol:plain text\n").unwrap();
        assert_eq!(answer(&gateway, &as_user(V3, "c", "carol", "new")).await, 0);
        assert_eq!(answer(&gateway, &ann(V3, "a")).await, 4);
        gateway.finish().await;
    });
}

#[test]
fn passwd_says_what_is_wrong() {
    let (_folder, file) = users();
    for (args, input, expected) in [
        (vec!["--delete", "nobody"], "", "has no user \"nobody\""),
        (vec!["#x"], "x", "cannot be a user name"),
        (vec!["x"], "", "must not be empty"),
    ] {
        let ended = passwd(&file, &args, input);
        assert!(ended.one_line(2).contains(expected), "{ended:?}");
    }
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{before}nonsense\n")).unwrap();
    let ended = passwd(&file, &["ann"], "x");
    assert!(
        ended.one_line(2).contains("line 3: must be user:hash"),
        "{ended:?}"
    );
}

#[test]
fn without_its_password_file_it_does_not_start() {
    let config = "[auth]\nchain = [\"password_file\"]\n";
    let ended = Gateway::run_to_end(&Options::config(config));
    let line = ended.one_line(2);
    assert!(
        line.contains("passwords") && line.contains("moorline passwd"),
        "{line}"
    );
    for (config, expected) in [
        ("[auth]\nchain = [\"jwt\"]\n", "auth.jwt.keys"),
        ("[auth]\nchain = [\"http\"]\n", "auth.http.url"),
        (
            "[auth]\nchain = [\"certificate\", \"certificate\"]\n",
            "at most once",
        ),
        ("[auth]\nchain = [\"ldap\"]\n", "ldap"),
        (
            "[[acl.rules]]\npermission = \"allow\"\ntopics = [\"a/{user}\"]\n",
            "{username}",
        ),
        (
            "[[acl.rules]]\npermission = \"allow\"\ntopics = []\n",
            "acl.rules[0]",
        ),
    ] {
        let ended = Gateway::run_to_end(&Options::config(config));
        assert!(ended.one_line(2).contains(expected), "{config}: {ended:?}");
    }
}

#[test]
fn beyond_loopback_is_for_devices_that_say_who_they_are() {
    let check = |config: &str| {
        let mut options = Options::config(config);
        options.bare = true;
        Gateway::run_to_end(&options.arg("config").arg("check"))
    };
    let ended = check("[listen]\nmqtt = \"0.0.0.0:1883\"\n");
    let line = ended.one_line(2);
    assert!(
        line.contains("auth.chain") && line.contains("loopback"),
        "{line}"
    );
    let ended = check("[listen]\nmqtt = \"0.0.0.0:1883\"\n[auth]\nchain = [\"password_file\"]\n");
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn wrong_credentials_displace_nobody() {
    run(async {
        let (gateway, _folder) = with_users("").await;
        for version in VERSIONS {
            let mut device =
                Device::connect(gateway.mqtt(), ann(version, "car-7").persistent()).await;
            for connect in [
                as_user(version, "car-7", "ann", "guess"),
                as_user(version, "car-7", "mallory", "guess"),
                Connect::new(version, "car-7"),
            ] {
                assert_eq!(answer(&gateway, &connect).await, bad_credentials(version));
            }
            device.ping().await;
            gateway.api().push_text("car-7", "still here").await;
            assert_eq!(device.take().await.text(), "still here");
            device.disconnect().await;
        }
        gateway.finish().await;
    });
}

#[test]
fn a_user_can_be_bound_to_the_client_id_of_its_name() {
    run(async {
        let (gateway, _folder) = with_users("client_id = \"username\"\n").await;
        for version in VERSIONS {
            assert_eq!(answer(&gateway, &ann(version, "ann")).await, 0);
            assert_eq!(answer(&gateway, &ann(version, "")).await, 0);
            assert_eq!(
                answer(&gateway, &ann(version, "bob")).await,
                not_authorized(version)
            );
        }
        gateway.finish().await;
    });
}

#[test]
fn mosquitto_clients_log_in() {
    run(async {
        let (gateway, _folder) = with_users("").await;
        for version in ["mqttv311", "mqttv5"] {
            let publish = |password: &'static str| {
                mosquitto(
                    "mosquitto_pub",
                    gateway.mqtt(),
                    &[
                        "-V", version, "-u", "ann", "-P", password, "-q", "1", "-t", "up/x", "-m",
                        "hi",
                    ],
                )
            };
            let done = run_program(publish("ann's secret")).await;
            assert!(done.status.success(), "{done:?}");
            let done = run_program(publish("wrong")).await;
            assert!(!done.status.success(), "{done:?}");
        }
        gateway.finish().await;
    });
}

#[test]
fn a_storm_of_known_devices_is_not_hashed_again() {
    run(async {
        let config = "hashing_max = 1\nwaiting_max = 1000\n";
        let (gateway, _folder) = with_users_on_one_node(config).await;
        assert_eq!(answer(&gateway, &ann(V5, "first")).await, 0);
        let started = std::time::Instant::now();
        let mut storm = tokio::task::JoinSet::new();
        for number in 0..500 {
            let address = gateway.mqtt();
            storm.spawn(async move {
                Device::connect(address, ann(V5, &format!("car-{number}"))).await
            });
        }
        assert_eq!(storm.join_all().await.len(), 500);
        // One core hashes a few dozen passwords a second at best.
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "{:?}",
            started.elapsed()
        );
        gateway.finish().await;
    });
}

#[test]
fn a_flood_of_wrong_passwords_is_bounded() {
    run(async {
        let config = "hashing_max = 2\nwaiting_max = 20\n";
        let (gateway, _folder) = with_users_on_one_node(config).await;
        let mut known = Device::connect(gateway.mqtt(), ann(V5, "known")).await;
        let before = gateway.rss_bytes_at_rest().await;
        let mut flood = tokio::task::JoinSet::new();
        for number in 0..400 {
            let address = gateway.mqtt();
            flood.spawn(async move {
                let connect = as_user(V5, "x", &format!("user-{number}"), "guess");
                Device::try_connect(address, connect).await.unwrap_err()
            });
        }
        let answers = flood.join_all().await;
        let count = |code: &str| {
            answers
                .iter()
                .filter(|answer| answer.contains(code))
                .count()
        };
        assert!(
            count("code: 137") > 0,
            "nobody was told that the server is busy"
        );
        assert_eq!(count("code: 134") + count("code: 137"), 400, "{answers:?}");
        let grown = gateway.rss_bytes().saturating_sub(before);
        assert!(grown < 100 << 20, "grew by {grown} bytes");
        known.ping().await;
        assert_eq!(answer(&gateway, &ann(V5, "later")).await, 0);
        gateway.finish().await;
    });
}

#[test]
fn authentication_by_exchange_is_refused_by_its_method() {
    use moorline_tests::wire::Value;
    run(async {
        let (gateway, _folder) = with_users("").await;
        let connect = ann(V5, "a").with(0x15, Value::Text(b"SCRAM-SHA-256".to_vec()));
        assert_eq!(answer(&gateway, &connect).await, 0x8C);
        gateway.finish().await;
    });
}

#[test]
fn anonymous_devices_on_loopback_are_let_in_and_denied_nothing() {
    run(async {
        let gateway = Gateway::start().await;
        for version in VERSIONS {
            let mut device = Device::connect(gateway.mqtt(), ann(version, "x")).await;
            assert_eq!(device.subscribe("#", 0).await, 0);
            let code = device.publish(Publish::new("d/other/push", 1, "x")).await;
            assert!(code < 0x80);
        }
        let text = gateway.metrics().await;
        assert_eq!(
            metric(&text, "moorline_acl_denied_total").unwrap_or(0.0),
            0.0
        );
        eventually(SOON, "the push waits", || async {
            (crate::support::waiting(&gateway.api(), "other").await == 2).then_some(())
        })
        .await;
        gateway.finish().await;
    });
}
