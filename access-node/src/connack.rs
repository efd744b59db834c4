//! What a CONNACK grants: the limits of the node, and what of the device's wishes it takes over.

use std::num::NonZeroU16;

use bytes::BytesMut;
use moorline_mqtt::{ConnAck, ConnAckProperties, Connect, Packet, ReasonCode, Version};
use moorline_router::ClientId;

use crate::config::Config;

/// What a connection is granted.
#[derive(Debug)]
pub(crate) struct Granted {
    /// Seconds that the session may outlive the connection.
    pub(crate) expiry_interval_s: u32,
    pub(crate) keep_alive_s: u16,
    /// The largest packet taken on this listener.
    packet_bytes_max: u32,
    /// Present where the server made the client id up.
    assigned_client_id: Option<ClientId>,
    /// Where a device may have answers sent to, if it asked (section 3.1.2.11.7).
    response_information: Option<String>,
}

impl Granted {
    pub(crate) fn new(
        connect: &Connect,
        client: &ClientId,
        assigned: bool,
        limits: &Config,
        packet_bytes_max: u32,
    ) -> Self {
        let mut granted = Self {
            packet_bytes_max,
            expiry_interval_s: expiry_interval_s(connect, limits.session_expiry_max_s()),
            keep_alive_s: keep_alive_s(connect, limits.keep_alive_max_s),
            assigned_client_id: assigned.then(|| client.clone()),
            response_information: response_information(connect, client, limits),
        };
        if granted.length(connect, limits) > device_packet_bytes_max(connect) {
            // It is offered, not owed.
            granted.response_information = None;
        }
        granted
    }

    /// Whether the device takes a packet as large as the CONNACK ([MQTT-3.1.2-24]).
    pub(crate) fn fits(&self, connect: &Connect, limits: &Config) -> bool {
        self.length(connect, limits) <= device_packet_bytes_max(connect)
    }

    fn length(&self, connect: &Connect, limits: &Config) -> usize {
        self.connack(connect, limits, false).len()
    }

    /// The encoded CONNACK.
    pub(crate) fn connack(
        &self,
        connect: &Connect,
        limits: &Config,
        session_present: bool,
    ) -> BytesMut {
        let asked_expiry_s = connect.properties.session_expiry_interval_s.unwrap_or(0);
        let differs = asked_expiry_s != self.expiry_interval_s;
        let properties = ConnAckProperties {
            session_expiry_interval_s: differs.then_some(self.expiry_interval_s),
            receive_maximum: NonZeroU16::new(limits.receive_maximum),
            maximum_packet_size: Some(self.packet_bytes_max),
            assigned_client_id: self
                .assigned_client_id
                .as_ref()
                .map(|client| client.as_str().into()),
            topic_alias_maximum: (limits.topic_alias_max > 0).then_some(limits.topic_alias_max),
            server_keep_alive_s: (self.keep_alive_s != connect.keep_alive_s)
                .then_some(self.keep_alive_s),
            response_information: self.response_information.as_deref().map(Into::into),
            ..ConnAckProperties::default()
        };
        let packet = Packet::ConnAck(Box::new(ConnAck {
            session_present,
            reason: ReasonCode::Success,
            properties,
        }));
        let mut encoded = BytesMut::new();
        packet
            .encode(connect.version, &mut encoded)
            .expect("each text in it came in a packet or is short");
        encoded
    }
}

/// The largest packet that the device takes.
pub(crate) fn device_packet_bytes_max(connect: &Connect) -> usize {
    connect
        .properties
        .maximum_packet_size
        .map_or(usize::MAX, |bytes| bytes as usize)
}

fn expiry_interval_s(connect: &Connect, max_s: u32) -> u32 {
    match connect.version {
        Version::V5 => connect
            .properties
            .session_expiry_interval_s
            .unwrap_or(0)
            .min(max_s),
        Version::V3_1_1 if connect.clean_start => 0,
        Version::V3_1_1 => max_s,
    }
}

/// A 3.1.1 device cannot be told of another keep alive than its own.
fn keep_alive_s(connect: &Connect, max_s: u16) -> u16 {
    let asked_s = connect.keep_alive_s;
    let too_long = asked_s == 0 || asked_s > max_s;
    if connect.version == Version::V5 && max_s > 0 && too_long {
        max_s
    } else {
        asked_s
    }
}

/// The device's own topics: what is published there finds it, also after it has moved.
fn response_information(connect: &Connect, client: &ClientId, limits: &Config) -> Option<String> {
    let asked = connect.properties.request_response_information == Some(true);
    // A client id that is no single level has no topics of its own.
    let nameable = !client.as_str().contains(['/', '+', '#']);
    (asked && nameable).then(|| format!("{}/{client}", limits.device_topics))
}
