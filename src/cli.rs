//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Endpoint;

/// An MQTT gateway that delivers what backends push, and keeps it until it can.
#[derive(Debug, Parser)]
#[command(version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) options: Options,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Settings that win over the file and the environment.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// TOML file with the configuration
    #[arg(long, global = true, value_name = "FILE", env = "MOORLINE_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Where everything durable lives [default: ./moorline-data]
    #[arg(long, global = true, value_name = "DIR", env = "MOORLINE_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// MQTT over TCP, or "off" [default: 127.0.0.1:1883; port 0 takes any free one]
    #[arg(long, global = true, value_name = "ADDR", env = "MOORLINE_MQTT_LISTEN")]
    pub(crate) mqtt_listen: Option<Endpoint>,
    /// MQTT over WebSocket, or "off" [default: 127.0.0.1:8083]
    #[arg(long, global = true, value_name = "ADDR", env = "MOORLINE_WS_LISTEN")]
    pub(crate) ws_listen: Option<Endpoint>,
    /// HTTP API [default: 127.0.0.1:8080]
    #[arg(long, global = true, value_name = "ADDR", env = "MOORLINE_HTTP_LISTEN")]
    pub(crate) http_listen: Option<SocketAddr>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the gateway: every role in one process (the default)
    Serve,
    /// Run one of several access nodes, which hold devices; on Redis and RabbitMQ
    AccessNode,
    /// Run one of several push services, which answer backends; on Redis and RabbitMQ
    PushService,
    /// Run one of several upstream workers, which hand what devices send to backends; on Redis and RabbitMQ
    UpstreamWorker,
    /// Run one of several delay queues, which carry out delayed jobs; on Redis and RabbitMQ
    DelayQueue,
    /// Be a device on the terminal: print what arrives, send lines upstream
    Device(DeviceOptions),
    /// Add or change a user of the password file, or remove one
    Passwd(PasswdOptions),
    /// Copy what an embedded data directory holds into Redis, once, on the way to a cluster
    Migrate(MigrateOptions),
    /// Check or print the configuration
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Say whether file, environment and flags make a valid configuration
    Check,
    /// Print every key with its default
    Default,
}

/// Which line of which password file.
#[derive(Debug, Args)]
pub(crate) struct PasswdOptions {
    /// The password file [default: the one of the configuration, which is DATA_DIR/passwords]
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Remove the user
    #[arg(long)]
    pub(crate) delete: bool,
    /// The user name. The password is asked for, or read from standard input where that is no terminal
    pub(crate) user: String,
}

/// From where to where.
#[derive(Debug, Args)]
pub(crate) struct MigrateOptions {
    /// The Redis to copy to, as redis://HOST:PORT [default: the one of the configuration]
    #[arg(long, value_name = "URL")]
    pub(crate) to: Option<String>,
    /// What its keys begin with [default: redis.key_prefix of the configuration]
    #[arg(long, value_name = "PREFIX")]
    pub(crate) key_prefix: Option<String>,
    /// Copy although this Redis holds something already, as long as it is nothing of the same devices
    #[arg(long)]
    pub(crate) into_existing: bool,
}

/// How the terminal device behaves.
#[derive(Debug, Args)]
pub(crate) struct DeviceOptions {
    /// The client id to connect as
    pub(crate) client_id: String,
    /// MQTT address of the gateway
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:1883")]
    pub(crate) mqtt: String,
    /// The user name to connect with
    #[arg(long, value_name = "USER")]
    pub(crate) username: Option<String>,
    /// A file whose first line is the password to connect with
    #[arg(long, value_name = "FILE", requires = "username")]
    pub(crate) password_file: Option<PathBuf>,
    /// Where lines from standard input are published [default: up/CLIENT_ID]
    #[arg(long, value_name = "TOPIC")]
    pub(crate) topic: Option<String>,
    /// A topic filter to subscribe to; may be repeated. Pushes need none
    #[arg(long, value_name = "FILTER")]
    pub(crate) subscribe: Vec<String>,
}
