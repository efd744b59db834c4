//! What the tool says on the terminal, and the durations it reads from the command line.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Writes a line to standard output.
#[expect(clippy::print_stdout, reason = "the one place where this tool speaks")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

/// Writes a line to standard error.
#[expect(
    clippy::print_stderr,
    reason = "the one place where this tool complains"
)]
pub(crate) fn complain(text: &str) {
    eprintln!("{text}");
}

/// A progress bar on standard error; not drawn where that is no terminal.
pub(crate) fn progress(what: &'static str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:>12} {wide_bar:.cyan/blue} {pos}/{len} {msg} {elapsed}",
    )
    .expect("a constant template");
    ProgressBar::new(total).with_style(style).with_prefix(what)
}

/// Reads `250ms`, `10s`, `2m` or whole seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| wanted(text))?;
    match &text[digits.len()..] {
        "ms" => Ok(Duration::from_millis(number)),
        "" | "s" => Ok(Duration::from_secs(number)),
        "m" => number
            .checked_mul(60)
            .map(Duration::from_secs)
            .ok_or_else(|| wanted(text)),
        _ => Err(wanted(text)),
    }
}

fn wanted(text: &str) -> String {
    format!("{text:?} is not a duration such as 250ms, 10s or 2m")
}

/// Lays rows out in columns: the first to the left, the others to the right.
pub(crate) fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|r| r.get(column))
            .map(|c| c.chars().count())
            .max()
    };
    let mut out = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            let width = width(column).unwrap_or(0);
            if column == 0 {
                out.push_str(&format!("  {cell:<width$}"));
            } else {
                out.push_str(&format!("  {cell:>width$}"));
            }
        }
        while out.ends_with(' ') {
            out.pop();
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in [
            "",
            "s",
            "-1s",
            "1.5s",
            "10x",
            "ms10",
            "99999999999999999999s",
            "18446744073709551615m",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".into(), "1".into()],
            vec!["long".into(), "1000".into()],
        ];
        assert_eq!(columns(&rows), "  a        1\n  long  1000\n");
    }
}
