//! `CONFORMANCE.md` has every numbered statement of both standards once, each with a module and a
//! test that exist, or with the reason why there is none.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::path::Path;

/// Section, first and last number of its statements: Appendix B of 3.1.1.
const V3: &[(&str, u16, u16)] = &[
    ("1.5.3", 1, 3),
    ("2.2.2", 1, 2),
    ("2.3.1", 1, 7),
    ("3.1.0", 1, 2),
    ("3.1.2", 1, 24),
    ("3.1.3", 1, 11),
    ("3.1.4", 1, 5),
    ("3.2.0", 1, 1),
    ("3.2.2", 1, 6),
    ("3.3.1", 1, 12),
    ("3.3.2", 1, 3),
    ("3.3.4", 1, 1),
    ("3.3.5", 1, 2),
    ("3.6.1", 1, 1),
    ("3.8.1", 1, 1),
    ("3.8.3", 1, 4),
    ("3.8.4", 1, 6),
    ("3.9.3", 1, 2),
    ("3.10.1", 1, 1),
    ("3.10.3", 1, 2),
    ("3.10.4", 1, 6),
    ("3.12.4", 1, 1),
    ("3.14.1", 1, 1),
    ("3.14.4", 1, 3),
    ("4.1.0", 1, 2),
    ("4.3.1", 1, 1),
    ("4.3.2", 1, 2),
    ("4.3.3", 1, 2),
    ("4.4.0", 1, 1),
    ("4.5.0", 1, 2),
    ("4.6.0", 1, 6),
    ("4.7.1", 1, 3),
    ("4.7.2", 1, 1),
    ("4.7.3", 1, 4),
    ("4.8.0", 1, 2),
    ("6.0.0", 1, 4),
    ("7.0.0", 1, 2),
    ("7.1.1", 1, 1),
    ("7.1.2", 1, 1),
];

/// The same of 5.0, whose section 2.2.1 begins with 2.
const V5: &[(&str, u16, u16)] = &[
    ("1.5.4", 1, 3),
    ("1.5.5", 1, 1),
    ("1.5.7", 1, 1),
    ("2.1.3", 1, 1),
    ("2.2.1", 2, 6),
    ("2.2.2", 1, 1),
    ("3.1.0", 1, 2),
    ("3.1.2", 1, 30),
    ("3.1.3", 1, 12),
    ("3.1.4", 1, 6),
    ("3.2.0", 1, 2),
    ("3.2.2", 1, 22),
    ("3.3.1", 1, 13),
    ("3.3.2", 1, 20),
    ("3.3.4", 1, 10),
    ("3.4.2", 1, 3),
    ("3.5.2", 1, 3),
    ("3.6.1", 1, 1),
    ("3.6.2", 1, 3),
    ("3.7.2", 1, 3),
    ("3.8.1", 1, 1),
    ("3.8.3", 1, 5),
    ("3.8.4", 1, 8),
    ("3.9.2", 1, 2),
    ("3.9.3", 1, 2),
    ("3.10.1", 1, 1),
    ("3.10.3", 1, 2),
    ("3.10.4", 1, 6),
    ("3.11.2", 1, 2),
    ("3.11.3", 1, 2),
    ("3.12.4", 1, 1),
    ("3.14.0", 1, 1),
    ("3.14.1", 1, 1),
    ("3.14.2", 1, 4),
    ("3.14.4", 1, 3),
    ("3.15.1", 1, 1),
    ("3.15.2", 1, 3),
    ("4.1.0", 1, 2),
    ("4.2.0", 1, 1),
    ("4.3.1", 1, 1),
    ("4.3.2", 1, 5),
    ("4.3.3", 1, 13),
    ("4.4.0", 1, 2),
    ("4.5.0", 1, 2),
    ("4.6.0", 1, 6),
    ("4.7.0", 1, 1),
    ("4.7.1", 1, 2),
    ("4.7.2", 1, 1),
    ("4.7.3", 1, 4),
    ("4.8.2", 1, 6),
    ("4.9.0", 1, 3),
    ("4.12.0", 1, 7),
    ("4.12.1", 1, 2),
    ("4.13.1", 1, 1),
    ("4.13.2", 1, 1),
    ("6.0.0", 1, 4),
];

/// What stands in a cell that names nothing.
const NONE: &str = "—";

/// A line of a table.
struct Row<'a> {
    statement: &'a str,
    asks: &'a str,
    place: &'a str,
    test: &'a str,
}

fn rows<'a>(text: &'a str, heading: &str) -> Vec<Row<'a>> {
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    section
        .lines()
        .filter(|line| line.starts_with("| MQTT-"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [statement, asks, place, test] = cells[..] else {
                panic!("four cells were expected: {line}");
            };
            Row {
                statement,
                asks,
                place,
                test,
            }
        })
        .collect()
}

/// The names of a cell: each in backticks, commas between them.
fn names(cell: &str) -> Option<Vec<&str>> {
    cell.split(", ")
        .map(|name| name.strip_prefix('`')?.strip_suffix('`'))
        .collect()
}

/// Whether `text` has the function `name` and calls it a test.
fn has_test(text: &str, name: &str) -> bool {
    let signature = format!("fn {name}(");
    text.split_once(&signature).is_some_and(|(before, _)| {
        let lines = before.lines().rev().take(6);
        lines
            .take_while(|line| line.trim() != "}")
            .any(|line| line.trim() == "#[test]")
    })
}

/// What is wrong with a row, if anything is.
fn problem(row: &Row<'_>, root: &Path, read: &mut HashMap<String, String>) -> Option<String> {
    if row.asks.is_empty() {
        return Some("nothing says what it asks".into());
    }
    let why = ["not applicable: ", "not met: "]
        .iter()
        .find_map(|prefix| row.place.strip_prefix(prefix));
    let excused = row.place == "client" || why.is_some_and(|why| !why.is_empty());
    if !excused {
        let Some(places) = names(row.place) else {
            return Some(format!("{:?} is no list of files", row.place));
        };
        if let Some(gone) = places.iter().find(|place| !root.join(place).is_file()) {
            return Some(format!("there is no {gone}"));
        }
    }
    if excused && row.test == NONE {
        return None;
    }
    let Some(tests) = names(row.test) else {
        return Some(format!("{:?} is no list of tests", row.test));
    };
    for test in tests {
        let Some((file, name)) = test.split_once("::") else {
            return Some(format!("{test:?} is not path::test"));
        };
        let text = read
            .entry(file.to_owned())
            .or_insert_with(|| std::fs::read_to_string(root.join(file)).unwrap_or_default());
        if !has_test(text, name) {
            return Some(format!("there is no test {name} in {file}"));
        }
    }
    None
}

fn check(heading: &str, sections: &[(&str, u16, u16)]) {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.parent().unwrap();
    let text = std::fs::read_to_string(manifest.join("CONFORMANCE.md")).unwrap();
    let mut problems = Vec::new();
    let mut read = HashMap::new();
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for row in rows(&text, heading) {
        if let Some(problem) = problem(&row, root, &mut read) {
            problems.push(format!("{}: {problem}", row.statement));
        }
        *seen.entry(row.statement).or_default() += 1;
    }
    for (section, first, last) in sections {
        for number in *first..=*last {
            let statement = format!("MQTT-{section}-{number}");
            match seen.remove(&*statement) {
                Some(1) => {}
                Some(times) => problems.push(format!("{statement} stands {times} times")),
                None => problems.push(format!("{statement} is missing")),
            }
        }
    }
    problems.extend(
        seen.keys()
            .map(|unknown| format!("{unknown} is no statement")),
    );
    assert!(problems.is_empty(), "{heading}: {problems:#?}");
}

#[test]
fn every_statement_of_3_1_1_has_a_place_and_a_test() {
    check("MQTT 3.1.1", V3);
}

#[test]
fn every_statement_of_5_0_has_a_place_and_a_test() {
    check("MQTT 5.0", V5);
}

#[test]
fn a_row_that_names_nothing_real_is_noticed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut read = HashMap::new();
    let good = "`mqtt/tests/conformance.rs::a_row_that_names_nothing_real_is_noticed`";
    let mut with = |place, test| {
        let row = Row {
            statement: "MQTT-0.0.0-0",
            asks: "something",
            place,
            test,
        };
        problem(&row, root, &mut read)
    };
    assert_eq!(with("`mqtt/src/lib.rs`", good), None);
    assert_eq!(with("client", NONE), None);
    assert_eq!(with("not applicable: there is none", NONE), None);
    for (place, test) in [
        ("`mqtt/src/lib.rs`", "`mqtt/tests/conformance.rs::check`"),
        (
            "`mqtt/src/lib.rs`",
            "`mqtt/tests/conformance.rs::a_row_that_names`",
        ),
        ("`mqtt/src/lib.rs`", "`mqtt/tests/nowhere.rs::check`"),
        ("`mqtt/src/lib.rs`", NONE),
        ("`mqtt/src/nowhere.rs`", good),
        ("not applicable: ", NONE),
        ("", good),
        ("client", ""),
    ] {
        assert!(with(place, test).is_some(), "{place} {test}");
    }
}
