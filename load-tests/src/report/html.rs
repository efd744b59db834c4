//! The report as one HTML file that needs nothing else.

use std::fmt::Write as _;

use anyhow::Result;

use super::{Outcome, Plot, Report, latency_rows, plot};
use crate::stats::grouped;

const STYLE: &str = "
:root { color-scheme: light; --ink: #20282d; --soft: #5b666d; --line: #dde2e5; --ok: #2f7d4f; --bad: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f5f7f8; margin: 0; }
main { max-width: 940px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 20px; margin: 36px 0 10px; } h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 4px 0; } .soft { color: var(--soft); }
code { font: 13px/1.4 ui-monospace, monospace; background: #e9edef; padding: 2px 6px; border-radius: 4px; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 6px 20px 18px; margin-top: 18px; }
section h2 { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { white-space: pre-wrap; text-align: left; padding-left: 0; } th { color: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.verdict { display: inline-block; font-weight: 600; color: #fff; border-radius: 5px; padding: 3px 12px; margin: 10px 0; }
.ok { background: var(--ok); } .bad { background: var(--bad); }
ul { list-style: none; padding: 0; margin: 6px 0; } li { margin: 3px 0; }
li b { display: inline-block; min-width: 58px; } li.good b { color: var(--ok); } li.failed b { color: var(--bad); }
figure { margin: 16px 0 0; } figcaption { font-weight: 600; margin-bottom: 2px; } svg { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 8px 0; } dt { color: var(--soft); } dd { margin: 0; }
";

/// Writes the page.
pub(super) fn render(report: &Report) -> Result<String> {
    let ok = report.outcomes.iter().all(Outcome::ok);
    let title = escape(&report.title);
    let mut page = String::new();
    write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\"><title>{title}</title><style>{STYLE}</style></head>\n\
         <body><main><h1>{title}</h1><p class=\"soft\">{} · {:.0} s</p><span class=\"verdict {}\">{}</span>\n",
        escape(&report.started_at.replace('T', " ").replace('Z', " UTC")),
        report.took_s,
        if ok { "ok" } else { "bad" },
        if ok {
            "every check held"
        } else {
            "a check failed"
        },
    )?;
    for found in &report.tables {
        writeln!(
            page,
            "<section><h2>{}</h2>{}</section>",
            escape(&found.title),
            table(&found.rows)
        )?;
    }
    if !report.plots.is_empty() {
        writeln!(
            page,
            "<section><h2>Plots</h2>{}</section>",
            figures(&report.plots)?
        )?;
    }
    for outcome in &report.outcomes {
        page.push_str(&section(outcome, report.plots.is_empty())?);
    }
    page.push_str(&machine(report));
    page.push_str("</main></body></html>\n");
    Ok(page)
}

fn section(outcome: &Outcome, with_plots: bool) -> Result<String> {
    let mut out = format!("<section><h2>{}</h2>", escape(&outcome.label));
    out.push_str("<ul>");
    for check in &outcome.checks {
        let (class, word) = if check.ok {
            ("good", "held")
        } else {
            ("failed", "failed")
        };
        write!(
            out,
            "<li class=\"{class}\"><b>{word}</b> {}: <span class=\"soft\">{}</span></li>",
            escape(&check.name),
            escape(&check.detail)
        )?;
    }
    out.push_str("</ul>");
    let mut facts = vec![vec!["figure".to_owned(), String::new()]];
    facts.extend(
        outcome
            .facts
            .iter()
            .map(|fact| vec![fact.name.to_owned(), fact.text()]),
    );
    out.push_str(&table(&facts));
    if !outcome.latencies.is_empty() {
        out.push_str("<h3>Latency</h3>");
        out.push_str(&table(&latency_rows(&outcome.latencies)));
    }
    for note in &outcome.notes {
        write!(out, "<p class=\"soft\">{}</p>", escape(note))?;
    }
    if with_plots {
        out.push_str(&figures(&outcome.plots)?);
    }
    out.push_str("</section>\n");
    Ok(out)
}

fn figures(plots: &[Plot]) -> Result<String> {
    let mut out = String::new();
    for each in plots {
        if let Some(svg) = plot::draw(each)? {
            write!(
                out,
                "<figure><figcaption>{}</figcaption>{svg}</figure>",
                escape(&each.title)
            )?;
        }
    }
    Ok(out)
}

fn machine(report: &Report) -> String {
    let machine = &report.machine;
    let mut rows = vec![
        (
            "command",
            format!("<code>{}</code>", escape(&report.command)),
        ),
        ("tool", escape(&report.tool)),
    ];
    rows.extend(
        report
            .servers
            .iter()
            .map(|server| ("server", escape(server))),
    );
    rows.extend([
        (
            "processor",
            escape(&format!("{} × {}", machine.cores, machine.cpu_model)),
        ),
        (
            "memory",
            format!(
                "{:.1} GiB",
                machine.memory_bytes as f64 / f64::from(1 << 30)
            ),
        ),
        ("kernel", escape(&machine.kernel)),
        (
            "load average",
            escape(&format!(
                "{} before, {} after",
                machine.load_average_before, machine.load_average_after
            )),
        ),
        (
            "open files",
            format!("{} allowed in one process", grouped(machine.open_files_max)),
        ),
    ]);
    let list: String = rows
        .iter()
        .map(|(name, value)| format!("<dt>{name}</dt><dd>{value}</dd>"))
        .collect();
    format!(
        "<section><h2>How it was measured</h2><dl>{list}</dl><p class=\"soft\">Bots and server share this machine. \
         Latencies count from the moment a message was due, not from when it could be sent. The senders' timers have a \
         resolution of one millisecond, which is part of them.</p></section>\n"
    )
}

fn table(rows: &[Vec<String>]) -> String {
    let mut out = String::from("<table>");
    for (i, row) in rows.iter().enumerate() {
        let tag = if i == 0 { "th" } else { "td" };
        out.push_str("<tr>");
        for cell in row {
            out.push_str(&format!("<{tag}>{}</{tag}>", escape(cell)));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs::Machine;
    use crate::report::Check;

    #[test]
    fn what_a_server_said_is_text_and_not_markup() {
        let mut report = Report::begin("a <b>", Machine::look(1));
        let mut outcome = Outcome::new("<script>");
        outcome.checks.push(Check {
            name: "n".into(),
            ok: false,
            detail: "\"<img>\" & more".into(),
        });
        report.outcomes.push(outcome);
        let page = render(&report).unwrap();
        assert!(!page.contains("<script>") && !page.contains("<img>"));
        assert!(
            page.contains("&quot;&lt;img&gt;&quot; &amp; more") && page.contains("a check failed")
        );
    }
}
