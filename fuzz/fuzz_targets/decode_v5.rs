//! Any bytes, decoded as MQTT 5.0.

#![no_main]

mod check;

use libfuzzer_sys::fuzz_target;
use moorline_mqtt::Version;

fuzz_target!(|data: &[u8]| check::all(data, Version::V5));
