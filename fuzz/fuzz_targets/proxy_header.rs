//! Any bytes where a PROXY header is expected.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| moorline_access_node::fuzzing::proxy_header(data));
