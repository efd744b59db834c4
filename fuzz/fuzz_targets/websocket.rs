//! Any bytes as a WebSocket upgrade, and as frames in front of the decoder.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| moorline_access_node::fuzzing::websocket(data));
