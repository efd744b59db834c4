//! The command line.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use moorline_mqtt::Version;

use crate::console::parse_duration;
use crate::server::Kind;
use crate::stamp::STAMP_BYTES;

/// Puts load on an MQTT server with real clients, checks that nothing was lost, and reports.
///
/// Exit codes: 0 all checks held, 1 a check failed or the server could not be reached, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "load-tests", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) scenario: Scenario,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Flags of every scenario.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Where devices connect
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:1883", value_parser = parse_address)]
    pub(crate) mqtt: SocketAddr,
    /// Where backends call
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:8080", value_parser = parse_address)]
    pub(crate) http: SocketAddr,
    /// The key for the HTTP API
    #[arg(long, global = true, env = "MOORLINE_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// The server's process, whose memory and CPU are then measured
    #[arg(long, global = true, value_name = "PID")]
    pub(crate) server_pid: Option<u32>,
    /// What devices speak
    #[arg(long, global = true, default_value = "5")]
    pub(crate) mqtt_version: MqttVersion,
    /// Devices ping at half of it; 0 is never
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) keep_alive: u16,
    /// Handshakes under way at the same time
    #[arg(long, global = true, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) at_once: u16,
    /// Bytes of a payload
    #[arg(long, global = true, value_name = "BYTES", default_value_t = 128, value_parser = clap::value_parser!(u16).range(i64::from(STAMP_BYTES)..))]
    pub(crate) payload: u16,
    /// Where to write report.json and report.html
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) report: Option<PathBuf>,
}

/// The protocol versions by their common names.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum MqttVersion {
    #[value(name = "3.1.1")]
    V3_1_1,
    #[value(name = "5")]
    V5,
}

impl From<MqttVersion> for Version {
    fn from(version: MqttVersion) -> Self {
        match version {
            MqttVersion::V3_1_1 => Self::V3_1_1,
            MqttVersion::V5 => Self::V5,
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Scenario {
    /// Idle devices: what one costs the server
    Connect(Connect),
    /// HTTP in, PUBLISH and PUBACK out
    Push(Push),
    /// Devices publish upstream, a consumer reads it
    Upstream(Upstream),
    /// Delayed jobs: many that wait, many that become due
    Delay(Delay),
    /// Device to device in pairs, against any broker
    Pubsub(Pubsub),
    /// connect and pubsub on moorline and on mosquitto, side by side
    Compare(Compare),
}

/// `connect`
#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// How many
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) devices: u32,
    /// Connects per second; as fast as the server takes them if not given
    #[arg(long, value_name = "PER_SECOND", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    /// What each subscribes to, {id} being its client id; empty for nothing
    #[arg(long, value_name = "FILTER", default_value = "d/{id}/x")]
    pub(crate) subscribe: String,
    /// How long they stay at least
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub(crate) hold: Duration,
}

/// The open loop of a scenario.
#[derive(Debug, Args)]
pub(crate) struct Load {
    /// Messages per second, all devices together
    #[arg(long, value_name = "PER_SECOND", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: u32,
    /// How long is measured
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) duration: Duration,
    /// What comes before, at the same rate, checked but not measured
    #[arg(long, default_value = "2s", value_parser = parse_duration)]
    pub(crate) warmup: Duration,
}

/// `push`
#[derive(Debug, Args)]
pub(crate) struct Push {
    /// How many receive
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) devices: u32,
    #[command(flatten)]
    pub(crate) load: Load,
    /// HTTP connections; each has its own devices and calls in turn
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) callers: u16,
}

/// `upstream`
#[derive(Debug, Args)]
pub(crate) struct Upstream {
    /// How many publish
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) devices: u32,
    #[command(flatten)]
    pub(crate) load: Load,
    /// Messages without a PUBACK, per device
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(crate) window: u16,
    /// Messages in one page of the consumer
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(crate) page: u16,
}

/// `delay`
#[derive(Debug, Args)]
pub(crate) struct Delay {
    /// Jobs that wait and do not become due
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub(crate) pending: u64,
    /// How many receive
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) devices: u32,
    /// Jobs that become due in a second
    #[arg(long, value_name = "PER_SECOND", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: u32,
    /// For how long
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) duration: Duration,
    /// Jobs that are created and cancelled in a second meanwhile
    #[arg(long, value_name = "PER_SECOND", default_value_t = 100)]
    pub(crate) churn: u32,
    /// How long the server is left alone before
    #[arg(long, default_value = "20s", value_parser = parse_duration)]
    pub(crate) idle: Duration,
    /// HTTP connections
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) callers: u16,
    /// The server's data directory, whose size is then told
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// `pubsub`
#[derive(Debug, Args)]
pub(crate) struct Pubsub {
    /// How many publishers, and as many subscribers
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pairs: u32,
    #[command(flatten)]
    pub(crate) load: Load,
    /// Messages without a PUBACK, per publisher
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(crate) window: u16,
}

/// `compare`
#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// Idle devices, and twice the number of pairs
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) devices: u32,
    /// Messages per second, all pairs together
    #[arg(long, value_name = "PER_SECOND", default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: u32,
    /// How long messages are measured
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) duration: Duration,
    /// Which servers, in this order
    #[arg(long, value_delimiter = ',', default_value = "moorline,mosquitto")]
    pub(crate) servers: Vec<Kind>,
    /// The gateway's program
    #[arg(long, value_name = "PATH", default_value = "target/release/moorline")]
    pub(crate) moorline: PathBuf,
    /// Mosquitto's program
    #[arg(long, value_name = "PATH", default_value = "mosquitto")]
    pub(crate) mosquitto: PathBuf,
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let mut found = text
        .to_socket_addrs()
        .map_err(|error| format!("{text:?} is not HOST:PORT: {error}"))?;
    found
        .next()
        .ok_or_else(|| format!("{text:?} has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_every_scenario_may_follow_its_name() {
        let cli = Cli::try_parse_from([
            "x",
            "connect",
            "--devices",
            "5",
            "--mqtt",
            "127.0.0.1:7",
            "--hold",
            "1s",
        ])
        .unwrap();
        assert_eq!(cli.common.mqtt, SocketAddr::from(([127, 0, 0, 1], 7)));
        assert!(matches!(
            cli.scenario,
            Scenario::Connect(Connect { devices: 5, .. })
        ));
    }

    #[test]
    fn nonsense_is_refused() {
        for args in [
            &["x"][..],
            &["x", "connect", "--devices", "0"],
            &["x", "push", "--rate", "0"],
            &["x", "push", "--mqtt", "nowhere"],
            &["x", "compare", "--servers", "emqx"],
            &["x", "pubsub", "--duration", "1h30"],
        ] {
            assert_eq!(
                Cli::try_parse_from(args).unwrap_err().exit_code(),
                2,
                "{args:?}"
            );
        }
    }
}
