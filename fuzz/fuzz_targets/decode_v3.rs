//! Any bytes, decoded as MQTT 3.1.1.

#![no_main]

mod check;

use libfuzzer_sys::fuzz_target;
use moorline_mqtt::Version;

fuzz_target!(|data: &[u8]| check::all(data, Version::V3_1_1));
