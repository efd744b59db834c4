//! What an operator can set of an access node.

use std::time::Duration;

use crate::retained::RetainedLimits;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The protocol's own limit of a packet.
pub(crate) const PACKET_BYTES_MAX: u32 = 268_435_460;

/// The `[mqtt]` section: limits of connections and sessions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Threads that serve devices; 0 is one for two cores.
    pub threads: usize,
    /// Connections at the same time, whatever they are doing. Fewer where the system allows fewer
    /// open files.
    pub connections_max: usize,
    /// Time for the whole CONNECT to arrive: PROXY header, TLS handshake and WebSocket upgrade
    /// included.
    #[serde(with = "moorline_router::duration")]
    pub handshake_timeout: Duration,
    /// Bytes of the largest packet taken from a device.
    pub packet_bytes_max: u32,
    /// The same for the CONNECT, its will included: what a device may make the gateway hold before
    /// it has said who it is.
    pub connect_bytes_max: u32,
    /// QoS 1 and 2 PUBLISH of one device that may await their acknowledgement (Receive Maximum).
    pub receive_maximum: u16,
    /// QoS 1 and 2 messages in flight to one device, whatever larger Receive Maximum it asks for.
    pub in_flight_max: u16,
    /// Messages that wait for a slow device that has no persistent session. (Persistent sessions and
    /// pushes wait in the inbox instead.)
    pub queued_messages_max: usize,
    /// Bytes of the same.
    pub queued_bytes_max: usize,
    /// Which message is dropped where that is not enough.
    pub queued_overflow: QueueOverflow,
    /// Bytes that the socket of a slow device did not take yet; QoS 0 is dropped beyond it, the
    /// rest waits.
    pub unsent_bytes_max: usize,
    /// A message in flight this long without a byte from the device means a dead link.
    #[serde(with = "moorline_router::duration")]
    pub ack_timeout: Duration,
    /// The same for a device that is alive but does not acknowledge.
    #[serde(with = "moorline_router::duration")]
    pub slow_ack_timeout: Duration,
    /// Longest session expiry interval granted; MQTT 3.1.1 sessions get this one.
    #[serde(with = "moorline_router::duration")]
    pub session_expiry_max: Duration,
    /// Topic aliases that a device may use, and that it is sent if it takes them; 0 is none.
    pub topic_alias_max: u16,
    /// Longest keep alive of a device, in seconds; 5.0 devices that ask for more, or for none, are told to
    /// use this one. 0 leaves it to the device.
    pub keep_alive_max_s: u16,
    /// Subscriptions of one device.
    pub subscriptions_max: usize,
    /// Levels of a topic name or filter.
    pub topic_levels_max: usize,
    /// Retained messages of the node.
    pub retained_messages_max: usize,
    /// Bytes of their topics, payloads and properties.
    pub retained_bytes_max: usize,
    /// What devices publish below it is a push to the device that the next level names.
    pub device_topics: String,
    /// Lets anyone connect on an address that is not loopback. Off unless said in as many words.
    pub allow_anonymous_beyond_loopback: bool,
    /// Connections that have not finished their CONNECT; 0 is no limit.
    pub half_open_max: usize,
    /// New connections in a second, with as many at once; 0 is no limit.
    pub connects_per_second: u32,
    /// Sessions, connected or not; a CONNECT that would need one more is refused. 0 is no limit.
    pub sessions_max: usize,
    /// The `[mqtt.per_address]` section.
    pub per_address: PerAddress,
    /// The `[mqtt.per_device]` section.
    pub per_device: PerDevice,
    /// The `[mqtt.flapping]` section.
    pub flapping: Flapping,
}

/// What one address may use up: an IPv4 address, or an IPv6 network of 64 bits, which is what one
/// subscriber usually has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PerAddress {
    /// Connections that have not finished their CONNECT; 0 is no limit. Many devices may share an
    /// address.
    pub half_open_max: u32,
    /// New connections in a second, with as many at once; 0 is no limit.
    pub connects_per_second: u32,
    /// Networks to which none of this applies.
    pub exempt: Vec<IpNet>,
}

/// What one connection may send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PerDevice {
    /// MQTT packets of any kind; 0 is no limit.
    pub packets_per_second: u32,
    /// Bytes; 0 is no limit.
    pub bytes_per_second: u64,
    /// What may come at once after a rest: as much as the rate allows in this time.
    #[serde(with = "moorline_router::duration")]
    pub burst: Duration,
    /// What is done about more.
    pub excess: Excess,
}

/// Who connects again and again is banned for a while. Networks in `mqtt.per_address.exempt` are
/// exempt from this too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Flapping {
    /// Connections of one client id that end within the window; 0 is no limit.
    pub client_connects: u32,
    /// Connections from one address that begin within the window, with a session or without; 0 is no
    /// limit. Many devices may share an address.
    pub address_connects: u32,
    /// The time in which they are counted.
    #[serde(with = "moorline_router::duration")]
    pub window: Duration,
    /// How long a ban lasts.
    #[serde(with = "moorline_router::duration")]
    pub ban: Duration,
}

impl Default for Flapping {
    fn default() -> Self {
        Self {
            client_connects: 600,
            address_connects: 0,
            window: Duration::from_secs(300),
            ban: Duration::from_secs(60),
        }
    }
}

/// What becomes of a device that sends more than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Excess {
    /// Its bytes wait in the network until the pace is right: nothing is lost, and it notices.
    Pause,
    /// It is disconnected with reason 0x96, message rate too high.
    Disconnect,
}

impl Default for PerAddress {
    fn default() -> Self {
        let loopback = ["127.0.0.0/8", "::1/128"];
        Self {
            half_open_max: 10_000,
            connects_per_second: 0,
            exempt: loopback.map(|net| net.parse().expect("a network")).to_vec(),
        }
    }
}

impl Default for PerDevice {
    fn default() -> Self {
        Self {
            packets_per_second: 0,
            bytes_per_second: 0,
            burst: Duration::from_secs(2),
            excess: Excess::Pause,
        }
    }
}

/// Which message goes when a queue in memory is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QueueOverflow {
    /// The one that waits longest.
    DropOldest,
    /// The one that came last.
    DropNew,
}

/// As much as one run of deliveries gathers before it writes: less would look full when nothing is.
const UNSENT_BYTES_LEAST: usize = 2 * crate::outbound::GATHER_BYTES;

impl Default for Config {
    fn default() -> Self {
        Self {
            threads: 0,
            connections_max: 1_000_000,
            handshake_timeout: Duration::from_secs(10),
            packet_bytes_max: 1024 * 1024,
            connect_bytes_max: 128 * 1024,
            receive_maximum: 256,
            in_flight_max: 128,
            queued_messages_max: 1_000,
            queued_bytes_max: 1024 * 1024,
            queued_overflow: QueueOverflow::DropOldest,
            unsent_bytes_max: 128 * 1024,
            ack_timeout: Duration::from_secs(30),
            slow_ack_timeout: Duration::from_secs(300),
            session_expiry_max: Duration::from_secs(30 * 24 * 3600),
            topic_alias_max: 16,
            keep_alive_max_s: 0,
            subscriptions_max: 1_000,
            topic_levels_max: 32,
            retained_messages_max: 100_000,
            retained_bytes_max: 64 * 1024 * 1024,
            device_topics: "d".to_owned(),
            allow_anonymous_beyond_loopback: false,
            half_open_max: 20_000,
            connects_per_second: 0,
            sessions_max: 1_000_000,
            per_address: PerAddress::default(),
            per_device: PerDevice::default(),
            flapping: Flapping::default(),
        }
    }
}

impl Config {
    /// Checks what the types cannot; the error names the key and what would be right.
    pub fn validate(&self) -> Result<(), String> {
        let positive = [
            ("connections_max", self.connections_max as u64),
            ("packet_bytes_max", u64::from(self.packet_bytes_max)),
            ("connect_bytes_max", u64::from(self.connect_bytes_max)),
            ("receive_maximum", u64::from(self.receive_maximum)),
            ("in_flight_max", u64::from(self.in_flight_max)),
            ("topic_levels_max", self.topic_levels_max as u64),
            (
                "handshake_timeout",
                self.handshake_timeout.as_millis() as u64,
            ),
            ("ack_timeout", self.ack_timeout.as_secs()),
            ("slow_ack_timeout", self.slow_ack_timeout.as_secs()),
            ("per_device.burst", self.per_device.burst.as_millis() as u64),
            ("flapping.window", self.flapping.window.as_secs()),
            ("flapping.ban", self.flapping.ban.as_millis() as u64),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("mqtt.{key} must be greater than 0"));
        }
        if self.packet_bytes_max > PACKET_BYTES_MAX {
            return Err(format!(
                "mqtt.packet_bytes_max must be at most {PACKET_BYTES_MAX}, the protocol's limit"
            ));
        }
        if self.unsent_bytes_max < UNSENT_BYTES_LEAST {
            return Err(format!(
                "mqtt.unsent_bytes_max must be at least {UNSENT_BYTES_LEAST}"
            ));
        }
        if self.topic_alias_max > 256 {
            // Each may hold a topic of 64 KB, and they are looked through.
            return Err("mqtt.topic_alias_max must be at most 256".into());
        }
        let prefix = &self.device_topics;
        if prefix.is_empty() || prefix.contains(['/', '+', '#', '\0']) || prefix.starts_with('$') {
            return Err(format!(
                "mqtt.device_topics is {prefix:?}, must be one topic level without wildcards, like \"d\""
            ));
        }
        Ok(())
    }

    pub(crate) fn retained_limits(&self) -> RetainedLimits {
        RetainedLimits {
            messages_max: self.retained_messages_max,
            bytes_max: self.retained_bytes_max,
        }
    }

    /// The longest session expiry in the protocol's unit; 0xFFFFFFFF would be "never".
    pub(crate) fn session_expiry_max_s(&self) -> u32 {
        u32::try_from(self.session_expiry_max.as_secs()).unwrap_or(u32::MAX)
    }
}
