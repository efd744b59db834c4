//! Starting: what is printed, where settings come from, and every way to be refused.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use moorline_tests::device::Device;
use moorline_tests::gateway::binary;
use moorline_tests::others::{Running, run as run_program};
use moorline_tests::waiting::SOON;
use moorline_tests::wire::V5;
use moorline_tests::{Api, Gateway, Options, eventually};

use crate::support::run;

/// The product's fixed ports, for the one test that uses them.
const FIXED: [u16; 3] = [1883, 8083, 8080];

#[test]
fn with_no_configuration_it_prints_what_to_paste_and_that_works() {
    run(async {
        // Somebody else's program on these ports is not this test's to judge.
        eventually(3 * SOON, "ports 1883, 8083 and 8080 are free", || async {
            FIXED
                .iter()
                .all(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
                .then_some(())
        })
        .await;
        let work = tempfile::tempdir().unwrap();
        let mut command = Command::new(binary());
        command.current_dir(work.path());
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MOORLINE_"))
        {
            command.env_remove(name);
        }
        let gateway = Running::start(&mut command);
        for (kind, port) in [("mqtt", 1883), ("ws", 8083), ("http", 8080)] {
            assert_eq!(
                gateway.line().await,
                format!("listening {kind} 127.0.0.1:{port}")
            );
        }
        assert_eq!(gateway.line().await, "ready");
        assert!(work.path().join("moorline-data").is_dir());
        gateway.line_with("API key").await;
        gateway.line_with("paste these three lines").await;
        let mut script = String::new();
        while script.lines().count() < 3 {
            let line = gateway.line().await;
            if !line.trim().is_empty() {
                script.push_str(&line);
                script.push('\n');
            }
        }
        // As in a person's terminal: an interactive shell, where %1 is a job.
        let mut shell = Command::new("bash");
        shell.args(["-m", "-c", &script]).current_dir(work.path());
        let seen = run_program(shell).await;
        assert!(seen.stdout.contains("hello"), "{script}\n{seen:?}");
        assert!(
            seen.stdout.contains("\"state\":\"sent\""),
            "{script}\n{seen:?}"
        );
        let key = std::fs::read_to_string(work.path().join("moorline-data/api-key")).unwrap();
        let api = Api::new(([127, 0, 0, 1], 8080).into(), Some(key.trim()));
        assert_eq!(api.get("/v1/clients").await.status, 200);
        drop(gateway);
    });
}

#[test]
fn a_taken_port_is_one_line_and_exit_code_2_and_nothing_half_started() {
    run(async {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let work = tempfile::tempdir().unwrap();
        for flag in ["--mqtt-listen", "--ws-listen", "--http-listen"] {
            let data = work.path().join(flag);
            let options = Options::default().arg(flag).arg(&address).data_dir(&data);
            let ended = Gateway::run_to_end(&options);
            let line = ended.one_line(2);
            assert!(line.contains(&address), "{line}");
            assert!(ended.stdout.is_empty(), "{ended:?}");
            assert!(!data.exists(), "{flag}: a data directory was made");
        }
    });
}

#[test]
fn an_unknown_configuration_key_names_the_nearest() {
    run(async {
        let cases = [
            ("[mqtt]\nrecieve_maximum = 10\n", "receive_maximum"),
            ("[store]\nmin_free_byte = 10\n", "min_free_bytes"),
            ("[store.inbox]\nentry_max = 10\n", "entries_max"),
            ("[listne]\nmqtt = \"127.0.0.1:0\"\n", "listen"),
            ("[http]\nttl_maximum = \"1d\"\n", "ttl_max"),
            ("datadir = \"x\"\n", "data_dir"),
        ];
        for (config, nearest) in cases {
            let ended = Gateway::run_to_end(&Options::config(config));
            let line = ended.one_line(2);
            assert!(
                line.contains(nearest) && line.contains("moorline.toml"),
                "{config}: {line}"
            );
        }
        let ended =
            Gateway::run_to_end(&Options::default().env("MOORLINE_MQTT__RECIEVE_MAXIMUM", "3"));
        assert!(
            ended.one_line(2).contains("MOORLINE_MQTT__RECEIVE_MAXIMUM"),
            "{ended:?}"
        );
        // A flag that is none is answered by the command line's own words.
        let ended = Gateway::run_to_end(&Options::default().arg("--mqtt-lisen"));
        assert_eq!(ended.status.code(), Some(2));
        assert!(ended.stderr.contains("--mqtt-listen"), "{ended:?}");
    });
}

#[test]
fn a_bad_value_is_named_in_one_line() {
    run(async {
        let cases = [
            ("[mqtt]\nreceive_maximum = 0\n", "receive_maximum"),
            ("[mqtt]\nreceive_maximum = 70000\n", "receive_maximum"),
            ("[mqtt]\nreceive_maximum = \"many\"\n", "receive_maximum"),
            ("[mqtt]\nack_timeout = \"soon\"\n", "ack_timeout"),
            ("[listen]\nmqtt = \"nowhere\"\n", "mqtt"),
            ("[log]\nlevel = \"loud=very\"\n", "log.level"),
            ("[log]\nformat = \"xml\"\n", "format"),
            ("[store.inbox]\noverflow = \"explode\"\n", "overflow"),
            ("[http]\nttl_max = \"1s\"\n", "ttl_max"),
            (
                "[[upstream.rules]]\nname = \"r\"\nfilter = \"a/#/b\"\nurl = \"http://127.0.0.1:1/\"\n",
                "filter",
            ),
            (
                "[[upstream.rules]]\nname = \"r\"\nfilter = \"up/#\"\nurl = \"nowhere\"\n",
                "url",
            ),
            (
                "[[upstream.rules]]\nname = \"default\"\nfilter = \"up/#\"\nurl = \"http://127.0.0.1:1/\"\n",
                "name",
            ),
            ("[mqtt\n", "moorline.toml:1"),
        ];
        for (config, key) in cases {
            let ended = Gateway::run_to_end(&Options::config(config));
            let line = ended.one_line(2);
            assert!(line.contains(key), "{config}: {line}");
        }
        let ended = Gateway::run_to_end(
            &Options::default()
                .arg("--config")
                .arg("/nowhere/moorline.toml"),
        );
        assert!(ended.one_line(2).contains("/nowhere/moorline.toml"));
        let ended = Gateway::run_to_end(&Options::default().arg("--mqtt-listen").arg("0.0.0.0:0"));
        assert!(ended.one_line(2).contains("loopback"), "{ended:?}");
        let ended = Gateway::run_to_end(&Options::default().env("MOORLINE_API_KEY", "short"));
        assert!(ended.one_line(2).contains("MOORLINE_API_KEY"), "{ended:?}");
    });
}

fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

#[test]
fn flags_win_over_the_environment_over_the_file_over_the_defaults() {
    run(async {
        let [in_file, in_environment, by_flag] = free_ports();
        let file = format!(
            "[listen]\nmqtt = \"127.0.0.1:{in_file}\"\nws = \"127.0.0.1:{in_file}\"\nhttp = \"127.0.0.1:{in_file}\"\n[mqtt]\nreceive_maximum = 11\n"
        );
        let options = Options {
            bare: true,
            config: Some(file),
            env: vec![
                (
                    "MOORLINE_HTTP_LISTEN".into(),
                    format!("127.0.0.1:{in_environment}"),
                ),
                (
                    "MOORLINE_WS_LISTEN".into(),
                    format!("127.0.0.1:{in_environment}"),
                ),
                ("MOORLINE_DATA_DIR".into(), "from-the-environment".into()),
            ],
            args: vec!["--ws-listen".into(), format!("127.0.0.1:{by_flag}")],
            ..Options::default()
        };
        let gateway = Gateway::start_with(options).await;
        assert_eq!(gateway.mqtt().port(), in_file);
        assert_eq!(gateway.http.port(), in_environment);
        assert_eq!(gateway.ws().port(), by_flag);
        assert!(gateway.work_dir().join("from-the-environment").is_dir());
        assert!(!gateway.work_dir().join("moorline-data").exists());
        let device = Device::clean(gateway.mqtt(), V5, "car").await;
        let receive_maximum = device
            .connack
            .iter()
            .find(|(id, _)| *id == moorline_tests::wire::property::RECEIVE_MAXIMUM)
            .map(|(_, value)| value.clone());
        assert_eq!(receive_maximum, Some(moorline_tests::wire::Value::Two(11)));
        drop(device);
        gateway.finish().await;
    });
}

#[test]
fn the_configuration_can_be_checked_and_printed() {
    run(async {
        let printed = Command::new(binary())
            .args(["config", "default"])
            .output()
            .unwrap();
        assert!(printed.status.success());
        let work = tempfile::tempdir().unwrap();
        let file = work.path().join("default.toml");
        std::fs::write(&file, &printed.stdout).unwrap();
        let check = |file: &std::path::Path| {
            Command::new(binary())
                .args(["config", "check", "--config"])
                .arg(file)
                .output()
                .unwrap()
        };
        let good = check(&file);
        assert!(
            good.status.success(),
            "the printed defaults are valid: {good:?}"
        );
        std::fs::write(&file, "[mqtt]\nreceive_maxium = 3\n").unwrap();
        let bad = check(&file);
        assert_eq!(bad.status.code(), Some(2));
        assert!(
            String::from_utf8_lossy(&bad.stderr).contains("receive_maximum"),
            "{bad:?}"
        );
    });
}

#[test]
fn a_data_directory_of_a_newer_version_is_refused_by_name() {
    run(async {
        let mut gateway = Gateway::start().await;
        gateway.api().push_text("car", "keep me").await;
        gateway.sigterm().await;
        let data = gateway.data_dir();
        let file = data.join("FORMAT");
        let before = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, "999\n").unwrap();
        let ended = Gateway::run_to_end(&Options::default().data_dir(&data));
        let line = ended.one_line(2);
        assert!(
            line.contains("999") && line.contains(data.to_str().unwrap()),
            "{line}"
        );
        std::fs::write(&file, before).unwrap();
        gateway.restart().await;
        let mut car = Device::clean(gateway.mqtt(), V5, "car").await;
        assert_eq!(car.take().await.text(), "keep me", "nothing was touched");
        gateway.finish().await;
    });
}

#[test]
fn two_gateways_cannot_share_a_data_directory() {
    run(async {
        let gateway = Gateway::start().await;
        let ended = Gateway::run_to_end(&Options::default().data_dir(&gateway.data_dir()));
        let line = ended.one_line(2);
        assert!(
            line.contains(gateway.data_dir().to_str().unwrap()),
            "{line}"
        );
        assert_eq!(
            gateway.api().get("/readyz").await.status,
            200,
            "the first is not disturbed"
        );
        gateway.finish().await;
    });
}

#[test]
fn the_key_made_at_the_first_start_is_kept() {
    run(async {
        let work = tempfile::tempdir().unwrap();
        let mut keys = HashMap::new();
        for round in 0..2 {
            let mut command = Command::new(binary());
            command
                .current_dir(work.path())
                .env_remove("MOORLINE_API_KEY");
            for flag in ["--mqtt-listen", "--ws-listen", "--http-listen"] {
                command.args([flag, "127.0.0.1:0"]);
            }
            let gateway = Running::start(&mut command);
            let http = gateway.line_with("listening http").await;
            let address = http.rsplit(' ').next().unwrap().parse().unwrap();
            gateway.line_with("ready").await;
            let said = gateway.line_with("API key").await;
            let path = work.path().join("moorline-data/api-key");
            let key = std::fs::read_to_string(&path).unwrap().trim().to_owned();
            assert_eq!(said.contains(&key), round == 0, "shown once: {said}");
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(
                std::fs::metadata(&path).unwrap().permissions().mode() & 0o077,
                0
            );
            assert_eq!(
                Api::new(address, Some(&key))
                    .get("/v1/clients")
                    .await
                    .status,
                200
            );
            assert_eq!(
                Api::new(address, Some("other"))
                    .get("/v1/clients")
                    .await
                    .status,
                401
            );
            keys.insert(key, round);
            drop(gateway);
        }
        assert_eq!(keys.len(), 1);
    });
}

#[test]
fn it_goes_on_when_nobody_reads_its_output() {
    run(async {
        let mut command = Command::new(binary());
        let work = tempfile::tempdir().unwrap();
        let [mqtt, ws, http] = free_ports();
        for (flag, port) in [
            ("--mqtt-listen", mqtt),
            ("--ws-listen", ws),
            ("--http-listen", http),
        ] {
            command.args([flag, &format!("127.0.0.1:{port}")]);
        }
        command
            .current_dir(work.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        eventually(SOON, "it serves", || async {
            TcpStream::connect(("127.0.0.1", http)).ok()
        })
        .await;
        let api = Api::new(([127, 0, 0, 1], http).into(), None);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(api.get("/healthz").await.status, 200);
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    });
}
