//! `compare`: `connect` and `pubsub` on Moorline and on Mosquitto, each on a process started for it,
//! and one table.

use std::path::PathBuf;

use anyhow::Result;

use super::{Setup, connect, pubsub};
use crate::bot::Target;
use crate::console::say;
use crate::http::Api;
use crate::report::{Axes, Line, Outcome, Plot, Report, Table};
use crate::server::{self, Kind, Server};
use crate::stats::micros;

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// The servers and their programs, in the order in which they are run.
    pub(crate) servers: Vec<(Kind, PathBuf)>,
    /// The idle devices.
    pub(crate) connect: connect::Plan,
    /// The messages.
    pub(crate) pubsub: pubsub::Plan,
}

/// Runs it; fills in the report's servers, outcomes, table and plots.
pub(crate) async fn run(target: &Target, plan: &Plan, report: &mut Report) -> Result<()> {
    let mut connects = Vec::new();
    let mut pubsubs = Vec::new();
    for (kind, program) in &plan.servers {
        let program = server::find(program)?;
        report.servers.push(server::version(*kind, &program).await);
        let name = kind.name();

        say(&format!(
            "{name}: {} idle devices",
            plan.connect.ramp.devices
        ));
        let (running, setup) = start(target, *kind, &program).await?;
        connects.push((
            name,
            connect::run(&setup, &plan.connect, format!("{name}: connect")).await?,
        ));
        running.stop().await?;

        say(&format!(
            "{name}: {} pairs, {} messages/s",
            plan.pubsub.pairs, plan.pubsub.load.rate
        ));
        let (running, setup) = start(target, *kind, &program).await?;
        pubsubs.push((
            name,
            pubsub::run(&setup, &plan.pubsub, format!("{name}: pubsub")).await?,
        ));
        running.stop().await?;
    }
    report.tables.push(table(&connects, &pubsubs));
    report.plots.extend(overlay("connect", &connects));
    report.plots.extend(overlay("pubsub", &pubsubs));
    report.outcomes.extend(
        connects
            .into_iter()
            .chain(pubsubs)
            .map(|(_, outcome)| outcome),
    );
    Ok(())
}

async fn start(target: &Target, kind: Kind, program: &std::path::Path) -> Result<(Server, Setup)> {
    let running = Server::start(kind, program).await?;
    let setup = Setup {
        target: Target {
            address: running.mqtt,
            ..target.clone()
        },
        // Neither scenario calls it.
        api: Api {
            address: running.mqtt,
            key: None,
        },
        server_pid: Some(running.pid),
    };
    Ok((running, setup))
}

/// One figure of a latency.
type Value = fn(&crate::stats::Summary) -> u64;

/// The figures side by side; with two servers also the first as a share of the second.
fn table(connects: &[(&str, Outcome)], pubsubs: &[(&str, Outcome)]) -> Table {
    let mut head = vec![String::new()];
    head.extend(connects.iter().map(|(name, _)| (*name).to_owned()));
    if connects.len() == 2 {
        head.push("ratio".to_owned());
    }
    let mut rows = vec![head];
    for (outcomes, keys) in [
        (
            connects,
            &[
                "rss_bytes_per_device",
                "anon_bytes_per_device",
                "pss_bytes_per_device",
                "connects_per_s",
                "cpu_us_per_connect",
            ][..],
        ),
        (
            pubsubs,
            &[
                "rate",
                "cpu_us_per_message",
                "user_us_per_message",
                "system_us_per_message",
            ][..],
        ),
    ] {
        for key in keys {
            let facts: Vec<_> = outcomes
                .iter()
                .filter_map(|(_, outcome)| outcome.find(key))
                .collect();
            let Some(first) = facts.first() else { continue };
            let cells = facts.iter().map(|fact| (fact.value, fact.text())).collect();
            rows.push(row(first.name, cells));
        }
    }
    let latencies: [(&str, Value); 4] = [
        ("PUBLISH received since sent, p50", |s| s.p50_us),
        ("  p99", |s| s.p99_us),
        ("  p99.9", |s| s.p999_us),
        ("  max", |s| s.max_us),
    ];
    for (name, value) in latencies {
        let since_sent = pubsubs
            .iter()
            .filter_map(|(_, outcome)| outcome.latencies.get(1))
            .map(value);
        rows.push(row(
            name,
            since_sent.map(|us| (us as f64, micros(us))).collect(),
        ));
    }
    Table {
        title: "Side by side".to_owned(),
        rows,
    }
}

fn row(name: &str, cells: Vec<(f64, String)>) -> Vec<String> {
    let ratio = match cells.as_slice() {
        [(a, _), (b, _)] if *b > 0.0 => Some(format!("{:.2}", a / b)),
        _ => None,
    };
    let mut row = vec![name.to_owned()];
    row.extend(cells.into_iter().map(|(_, text)| text));
    row.extend(ratio);
    row
}

/// Plots of the same kind laid over each other, the lines named after the servers.
fn overlay(scenario: &str, outcomes: &[(&str, Outcome)]) -> Vec<Plot> {
    let Some((_, first)) = outcomes.first() else {
        return Vec::new();
    };
    let mut plots = first.plots.clone();
    for plot in &mut plots {
        // Of a latency over time the median and the 99th percentile, of the rest what stands first.
        let lines = if plot.axes == Axes::TimeLatency { 2 } else { 1 };
        let mut overlaid = Vec::new();
        for (server, outcome) in outcomes {
            let same = outcome
                .plots
                .iter()
                .filter(|other| other.title == plot.title);
            for line in same.flat_map(|other| other.lines.iter().take(lines)) {
                let name = match lines {
                    1 => (*server).to_owned(),
                    _ => format!("{server}, {}", line.name),
                };
                overlaid.push(Line::new(name, line.points.clone()));
            }
        }
        plot.lines = overlaid;
        plot.title = format!("{scenario}: {}", lowercase_first(&plot.title));
    }
    plots
}

fn lowercase_first(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_lowercase());
    first.into_iter().flatten().chain(letters).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(rss: f64) -> Outcome {
        let mut outcome = Outcome::new("x");
        outcome.fact("rss_bytes_per_device", "RSS per device", rss, "B");
        outcome.plots.push(Plot::over_time(
            "Server memory",
            "MiB",
            vec![Line::new("server", vec![(0.0, rss)])],
        ));
        outcome
    }

    #[test]
    fn two_servers_get_a_ratio() {
        let connects = [
            ("moorline", outcome(900.0)),
            ("mosquitto", outcome(1_800.0)),
        ];
        let table = table(&connects, &[]);
        assert_eq!(table.rows[0], ["", "moorline", "mosquitto", "ratio"]);
        assert_eq!(
            table.rows[1],
            ["RSS per device", "900 B", "1,800 B", "0.50"]
        );
    }

    #[test]
    fn one_server_stands_alone() {
        let table = table(&[("mosquitto", outcome(1_800.0))], &[]);
        assert_eq!(table.rows[0], ["", "mosquitto"]);
        assert_eq!(table.rows[1], ["RSS per device", "1,800 B"]);
    }

    #[test]
    fn lines_of_the_same_plot_are_laid_over_each_other() {
        let plots = overlay("connect", &[("a", outcome(1.0)), ("b", outcome(2.0))]);
        assert_eq!(plots.len(), 1);
        assert_eq!(plots[0].title, "connect: server memory");
        let names: Vec<_> = plots[0]
            .lines
            .iter()
            .map(|line| line.name.as_str())
            .collect();
        assert_eq!(names, ["a", "b"]);
    }
}
