//! What is tested on the embedded store only, and why. Everything else runs a second time against a cluster
//! (`MOORLINE_TEST_FIXTURE=cluster`).

/// Tests, or the beginnings of their names, with the reason.
const LIST: &[(&str, &str)] = &[
    ("disk_full::", "fills the disk under the embedded store"),
    (
        "startup::",
        "the command line and the data directory of the one process",
    ),
    ("servers::", "the servers themselves; no gateway takes part"),
    ("cluster::", "a cluster of its own in any case"),
];

/// Why the test with this path is not run against a cluster.
pub(crate) fn reason(test: &str) -> Option<&'static str> {
    let name = test.split_once("::").map_or(test, |(_, name)| name);
    LIST.iter()
        .find(|(prefix, _)| name.starts_with(prefix))
        .map(|(_, reason)| *reason)
}
