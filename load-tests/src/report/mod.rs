//! What a run found, as values: facts, latencies, checks and plots; and how they are written down.
//!
//! Scenarios return an [`Outcome`]; `main` wraps one or several into a [`Report`].

mod html;
mod plot;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::console::{columns, say};
use crate::ledger::Totals;
use crate::procfs::{Machine, load_average};
use crate::stats::{Summary, grouped, micros};

/// One measured figure.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Fact {
    /// Name for programs that read the report.
    pub(crate) key: &'static str,
    /// Name for people.
    pub(crate) name: &'static str,
    /// The figure.
    pub(crate) value: f64,
    /// What it counts.
    pub(crate) unit: &'static str,
}

impl Fact {
    /// The figure with its unit.
    pub(crate) fn text(&self) -> String {
        let number = match self.value.abs() {
            v if v >= 1_000.0 || v.fract() == 0.0 => format!(
                "{}{}",
                if self.value < 0.0 { "-" } else { "" },
                grouped(v.round() as u64)
            ),
            v if v >= 10.0 => format!("{:.1}", self.value),
            _ => format!("{:.2}", self.value),
        };
        format!("{number} {}", self.unit).trim_end().to_owned()
    }
}

/// Something that had to hold.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) ok: bool,
    pub(crate) detail: String,
}

impl Check {
    /// Nothing lost, doubled or reordered; `waiting` is what the server still holds for its devices.
    pub(crate) fn accounts(totals: &Totals, waiting: u64) -> Vec<Check> {
        let check = |name: &str, ok, detail| Check {
            name: name.to_owned(),
            ok,
            detail,
        };
        vec![
            check(
                "accepted = delivered + waiting",
                totals.accepted > 0 && totals.missing == waiting,
                format!(
                    "{} accepted, {} of them not delivered, {} waiting at the server; {} more arrived without an answer to their sender",
                    grouped(totals.accepted),
                    grouped(totals.missing),
                    grouped(waiting),
                    grouped(totals.unanswered)
                ),
            ),
            check(
                "no duplicates",
                totals.duplicates == 0,
                format!("{} duplicates", totals.duplicates),
            ),
            check(
                "in order",
                totals.disordered == 0,
                format!("{} out of order", totals.disordered),
            ),
        ]
    }
}

/// Points to be drawn as one line.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

impl Line {
    /// A named line.
    pub(crate) fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.into(),
            points,
        }
    }
}

/// How a plot's axes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Axes {
    /// Seconds to the right, a linear scale upwards from 0.
    Time,
    /// Seconds to the right, microseconds upwards on a logarithmic scale.
    TimeLatency,
    /// Nines to the right (1 is 90 %), microseconds upwards on a logarithmic scale.
    Percentiles,
}

/// A diagram.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Plot {
    pub(crate) title: String,
    pub(crate) unit: String,
    pub(crate) axes: Axes,
    pub(crate) lines: Vec<Line>,
}

impl Plot {
    /// Something over the seconds of the run.
    pub(crate) fn over_time(title: &str, unit: &str, lines: Vec<Line>) -> Self {
        Self {
            title: title.to_owned(),
            unit: unit.to_owned(),
            axes: Axes::Time,
            lines,
        }
    }

    /// The percentile curves of several latencies.
    pub(crate) fn percentiles(summaries: &[Summary]) -> Self {
        let lines = summaries
            .iter()
            .map(|s| Line::new(s.name.clone(), s.curve.clone()))
            .collect();
        Self {
            title: "Latency by percentile".to_owned(),
            unit: "latency".to_owned(),
            axes: Axes::Percentiles,
            lines,
        }
    }

    /// How fast, and with what latency, second by second.
    pub(crate) fn seconds(summary: &Summary) -> Vec<Self> {
        let by_second = |value: fn(&crate::stats::Second) -> u64| {
            summary
                .seconds
                .iter()
                .map(|s| (s.second as f64, value(s) as f64))
                .collect::<Vec<_>>()
        };
        let rate = Line::new(summary.name.clone(), by_second(|s| s.count));
        let latency = vec![
            Line::new("p50", by_second(|s| s.p50_us)),
            Line::new("p99", by_second(|s| s.p99_us)),
            Line::new("max", by_second(|s| s.max_us)),
        ];
        vec![
            Self::over_time("Rate", "messages per second", vec![rate]),
            Self {
                title: format!("Latency over time: {}", summary.name),
                unit: "latency".to_owned(),
                axes: Axes::TimeLatency,
                lines: latency,
            },
        ]
    }
}

/// What one scenario found on one server.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
    pub(crate) label: String,
    pub(crate) facts: Vec<Fact>,
    pub(crate) latencies: Vec<Summary>,
    pub(crate) checks: Vec<Check>,
    pub(crate) notes: Vec<String>,
    pub(crate) plots: Vec<Plot>,
}

impl Outcome {
    /// An empty one.
    pub(crate) fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            facts: Vec::new(),
            latencies: Vec::new(),
            checks: Vec::new(),
            notes: Vec::new(),
            plots: Vec::new(),
        }
    }

    /// Adds a figure.
    pub(crate) fn fact(
        &mut self,
        key: &'static str,
        name: &'static str,
        value: f64,
        unit: &'static str,
    ) {
        self.facts.push(Fact {
            key,
            name,
            value,
            unit,
        });
    }

    /// The figure of that key.
    pub(crate) fn find(&self, key: &str) -> Option<&Fact> {
        self.facts.iter().find(|fact| fact.key == key)
    }

    /// Whether all checks held.
    pub(crate) fn ok(&self) -> bool {
        self.checks.iter().all(|check| check.ok)
    }

    fn say(&self) {
        say(&format!("\n{}", self.label));
        let facts: Vec<_> = self
            .facts
            .iter()
            .map(|f| vec![f.name.to_owned(), f.text()])
            .collect();
        say(columns(&facts).trim_end());
        if !self.latencies.is_empty() {
            say("");
            say(columns(&latency_rows(&self.latencies)).trim_end());
        }
        say("");
        for check in &self.checks {
            say(&format!(
                "  {}  {}: {}",
                if check.ok { "ok    " } else { "FAILED" },
                check.name,
                check.detail
            ));
        }
        for note in &self.notes {
            say(&format!("  note: {note}"));
        }
    }
}

/// A table of latencies with its head.
fn latency_rows(latencies: &[Summary]) -> Vec<Vec<String>> {
    let head = ["latency", "count", "p50", "p90", "p99", "p99.9", "max"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(latencies.iter().map(|s| {
        let mut row = vec![s.name.clone(), grouped(s.count)];
        row.extend([s.p50_us, s.p90_us, s.p99_us, s.p999_us, s.max_us].map(micros));
        row
    }));
    rows
}

/// Rows of text that compare outcomes; the first row is the head.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Table {
    pub(crate) title: String,
    pub(crate) rows: Vec<Vec<String>>,
}

/// A whole report.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) title: String,
    pub(crate) tool: String,
    pub(crate) command: String,
    pub(crate) started_at: String,
    pub(crate) took_s: f64,
    pub(crate) servers: Vec<String>,
    pub(crate) machine: Machine,
    pub(crate) tables: Vec<Table>,
    pub(crate) outcomes: Vec<Outcome>,
    /// Drawn in place of the outcomes' own: theirs, laid over each other.
    pub(crate) plots: Vec<Plot>,
}

impl Report {
    /// An empty report that begins now.
    pub(crate) fn begin(title: &str, machine: Machine) -> Self {
        Self {
            title: title.to_owned(),
            tool: format!("moorline-load-tests {}", env!("CARGO_PKG_VERSION")),
            command: command_line(std::env::args()),
            started_at: jiff::Timestamp::now()
                .round(jiff::Unit::Second)
                .unwrap_or_default()
                .to_string(),
            took_s: 0.0,
            servers: Vec::new(),
            machine,
            tables: Vec::new(),
            outcomes: Vec::new(),
            plots: Vec::new(),
        }
    }

    /// Says it all on the terminal, writes it to `directory` if one is given, and returns whether
    /// every check held.
    pub(crate) fn finish(mut self, took: Duration, directory: Option<&Path>) -> Result<bool> {
        self.took_s = took.as_secs_f64();
        self.machine.load_average_after = load_average();
        for outcome in &self.outcomes {
            outcome.say();
        }
        for table in &self.tables {
            say(&format!("\n{}", table.title));
            say(columns(&table.rows).trim_end());
        }
        if let Some(directory) = directory {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
            let write = |name: &str, bytes: &[u8]| {
                let path = directory.join(name);
                std::fs::write(&path, bytes)
                    .with_context(|| format!("cannot write {}", path.display()))?;
                say(&format!("wrote {}", path.display()));
                anyhow::Ok(())
            };
            say("");
            write("report.json", &serde_json::to_vec_pretty(&self)?)?;
            write("report.html", html::render(&self)?.as_bytes())?;
        }
        Ok(self.outcomes.iter().all(Outcome::ok))
    }
}

/// The arguments as they were typed, but for the API key.
fn command_line(args: impl Iterator<Item = String>) -> String {
    let mut words = vec!["load-tests".to_owned()];
    let mut secret = false;
    for arg in args.skip(1) {
        if secret {
            words.push("…".to_owned());
            secret = false;
        } else if arg.starts_with("--api-key=") {
            words.push("--api-key=…".to_owned());
        } else {
            secret = arg == "--api-key";
            words.push(arg);
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_key_stays_out_of_the_report() {
        let line = |args: &[&str]| command_line(args.iter().map(|&a| a.to_owned()));
        assert_eq!(
            line(&["x", "push", "--api-key", "s3cret", "--rate", "5"]),
            "load-tests push --api-key … --rate 5"
        );
        assert_eq!(
            line(&["x", "push", "--api-key=s3cret"]),
            "load-tests push --api-key=…"
        );
    }

    #[test]
    fn facts_are_written_with_sensible_digits() {
        let text = |value| {
            Fact {
                key: "k",
                name: "n",
                value,
                unit: "B",
            }
            .text()
        };
        assert_eq!(text(1_843.2), "1,843 B");
        assert_eq!(text(-1_843.2), "-1,843 B");
        assert_eq!(text(12.345), "12.3 B");
        assert_eq!(text(1.234), "1.23 B");
        assert_eq!(text(7.0), "7 B");
    }

    #[test]
    fn a_missing_message_fails_unless_it_waits() {
        let totals = Totals {
            accepted: 10,
            delivered: 8,
            missing: 2,
            ..Totals::default()
        };
        assert!(!Check::accounts(&totals, 0)[0].ok);
        assert!(Check::accounts(&totals, 2)[0].ok);
        assert!(
            !Check::accounts(&Totals::default(), 0)[0].ok,
            "a run that moved nothing proves nothing"
        );
    }
}
