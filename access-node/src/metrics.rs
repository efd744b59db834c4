//! Counters of the node, looked up once and held.

use metrics::{Counter, Gauge, counter, gauge};

use crate::close_reason::CloseReason;

/// Handles of everything the node counts.
pub(crate) struct Metrics {
    pub(crate) connections: Gauge,
    pub(crate) sessions: Gauge,
    pub(crate) connects_accepted: Counter,
    pub(crate) connects_refused: Counter,
    /// By QoS.
    pub(crate) received: [Counter; 3],
    /// By QoS.
    pub(crate) sent: [Counter; 3],
    pub(crate) received_bytes: Counter,
    pub(crate) paused: Counter,
    pub(crate) dropped_slow: Counter,
    pub(crate) dropped_queue_full: Counter,
    pub(crate) dropped_too_large: Counter,
    pub(crate) dropped_expired: Counter,
    pub(crate) dropped_retained_full: Counter,
    pub(crate) dropped_no_member: Counter,
    pub(crate) shared_redispatched: Counter,
    pub(crate) denied_publish: Counter,
    pub(crate) denied_subscribe: Counter,
    pub(crate) denied_will: Counter,
    pub(crate) denied_resume: Counter,
    pub(crate) upstream_refused: Counter,
    pub(crate) wills_published: Counter,
    pub(crate) reconciled: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let by_qos = |name: &'static str| ["0", "1", "2"].map(|qos| counter!(name, "qos" => qos));
        let dropped = |reason: &'static str| counter!("moorline_mqtt_messages_dropped_total", "reason" => reason);
        let denied =
            |action: &'static str| counter!("moorline_acl_denied_total", "action" => action);
        Self {
            connections: gauge!("moorline_mqtt_connections"),
            sessions: gauge!("moorline_mqtt_sessions"),
            connects_accepted: counter!("moorline_mqtt_connects_total", "result" => "accepted"),
            connects_refused: counter!("moorline_mqtt_connects_total", "result" => "refused"),
            received: by_qos("moorline_mqtt_messages_received_total"),
            sent: by_qos("moorline_mqtt_messages_sent_total"),
            received_bytes: counter!("moorline_mqtt_received_bytes_total"),
            paused: counter!("moorline_mqtt_reading_paused_total"),
            dropped_slow: dropped("slow_receiver"),
            dropped_queue_full: dropped("queue_full"),
            dropped_too_large: dropped("larger_than_maximum_packet_size"),
            dropped_expired: dropped("expired"),
            dropped_retained_full: dropped("not_retained"),
            dropped_no_member: dropped("no_other_member"),
            shared_redispatched: counter!("moorline_mqtt_shared_redispatched_total"),
            denied_publish: denied("publish"),
            denied_subscribe: denied("subscribe"),
            denied_will: denied("will"),
            denied_resume: denied("resume"),
            upstream_refused: counter!("moorline_upstream_refused_total"),
            wills_published: counter!("moorline_mqtt_wills_published_total"),
            reconciled: counter!("moorline_inbox_reconciled_total"),
        }
    }

    /// Counts a connection that came to nothing.
    pub(crate) fn refused(&self, reason: &'static str) {
        self.connects_refused.increment(1);
        counter!("moorline_mqtt_connections_refused_total", "reason" => reason).increment(1);
    }

    /// Counts the end of a connection; rare enough to look the label up.
    pub(crate) fn closed(&self, reason: CloseReason) {
        self.connections.decrement(1.0);
        counter!("moorline_mqtt_disconnects_total", "reason" => reason.label()).increment(1);
    }
}
