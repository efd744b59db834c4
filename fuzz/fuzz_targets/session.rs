//! Whole sessions: a few connections of a few clients to a node in this process, over real sockets.

#![no_main]

mod node;

use std::sync::{LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;

static NODE: LazyLock<Mutex<node::Node>> = LazyLock::new(|| Mutex::new(node::Node::start()));

fuzz_target!(|data: &[u8]| NODE.lock().expect("a panic ends the process").run(data));
