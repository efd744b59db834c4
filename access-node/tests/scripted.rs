//! The scripts of the session fuzz target, as they stand in its corpus and damaged, on a stable toolchain.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../fuzz/fuzz_targets/node.rs"]
mod node;

use std::path::Path;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(3);

#[test]
fn no_script_of_packets_disturbs_the_node_or_another_client() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/session");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files
        .iter()
        .map(|file| std::fs::read(file).unwrap())
        .collect();
    assert!(corpus.len() >= 5, "a corpus");
    let mut node = node::Node::start();
    corpus.iter().for_each(|script| node.run(script));
    let mut state = 0x9E37_79B9_u64;
    let mut below = |end: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % end.max(1)
    };
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let mut script = corpus[below(corpus.len())].clone();
        script.extend_from_slice(&corpus[below(corpus.len())]);
        for _ in 0..1 + below(20) {
            let at = below(script.len());
            script[at] = u8::try_from(below(256)).unwrap();
        }
        node.run(&script);
    }
}
