//! The `moorline` binary: command line, configuration and the wiring of roles. The roles
//! themselves are libraries.

mod cli;
mod config;
mod device;
mod migrate;
mod passwd;
mod roles;
mod welcome;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command, ConfigCommand};
use crate::roles::Role;

/// Why the program ends other than by a clean drain.
#[derive(Debug)]
enum Failure {
    /// Wrong usage or configuration: exit code 2.
    Usage(String),
    /// Anything else: exit code 1.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(why)) => {
            say_why(&why);
            ExitCode::from(2)
        }
        Err(Failure::Other(error)) => {
            say_why(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the one line that says why the program ended"
)]
fn say_why(why: &str) {
    eprintln!("moorline: {why}");
}

#[expect(clippy::print_stdout, reason = "the output of `config` commands")]
fn run() -> Result<(), Failure> {
    let cli = Cli::parse();
    // One provider of cryptography for the whole process, chosen here.
    rustls::crypto::ring::default_provider()
        .install_default()
        .expect("nothing was installed before");
    let run = |role| {
        let config = config::load(&cli.options).map_err(Failure::Usage)?;
        roles::run(role, config)
    };
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => run(Role::All),
        Command::AccessNode => run(Role::AccessNode),
        Command::PushService => run(Role::PushService),
        Command::UpstreamWorker => run(Role::UpstreamWorker),
        Command::DelayQueue => run(Role::DelayQueue),
        Command::Passwd(options) => passwd::run(&options, &cli.options),
        Command::Migrate(asked) => {
            let config = config::load(&cli.options).map_err(Failure::Usage)?;
            migrate::run(&asked, &config)
        }
        Command::Device(device) => device::run(&device).map_err(Failure::from),
        Command::Config {
            command: ConfigCommand::Check,
        } => {
            config::load(&cli.options).map_err(Failure::Usage)?;
            println!("configuration is valid");
            Ok(())
        }
        Command::Config {
            command: ConfigCommand::Default,
        } => {
            print!("{}", config::default_toml());
            Ok(())
        }
    }
}
