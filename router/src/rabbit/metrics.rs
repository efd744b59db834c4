//! What is counted of RabbitMQ.

use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

/// What is counted of one lane of a publisher.
pub(super) struct LaneMetrics {
    pub(super) confirmed: Counter,
    pub(super) nacked: Counter,
    pub(super) returned: Counter,
    pub(super) republished: Counter,
    /// Set now and then.
    pub(super) unconfirmed: Gauge,
}

impl LaneMetrics {
    pub(super) fn new(publisher: &str, lane: usize) -> Self {
        describe_counter!(
            "moorline_rabbitmq_confirmed_total",
            "Messages that RabbitMQ confirmed, by publisher"
        );
        describe_counter!(
            "moorline_rabbitmq_nacked_total",
            "Messages that a queue refused, as one at its limit does, by publisher"
        );
        describe_counter!(
            "moorline_rabbitmq_returned_total",
            "Messages that came back because no queue takes them, by publisher"
        );
        describe_counter!(
            "moorline_rabbitmq_republished_total",
            "Messages that were unconfirmed when a channel was lost and went out again, by publisher"
        );
        describe_gauge!(
            "moorline_rabbitmq_unconfirmed",
            "Messages that went out and are not confirmed, by publisher and lane, as of the last second"
        );
        let publisher = publisher.to_owned();
        let count = |name: &'static str| counter!(name, "publisher" => publisher.clone());
        Self {
            confirmed: count("moorline_rabbitmq_confirmed_total"),
            nacked: count("moorline_rabbitmq_nacked_total"),
            returned: count("moorline_rabbitmq_returned_total"),
            republished: count("moorline_rabbitmq_republished_total"),
            unconfirmed: gauge!(
                "moorline_rabbitmq_unconfirmed",
                "publisher" => publisher.clone(), "lane" => lane.to_string()
            ),
        }
    }
}

/// Counts connections that were made; all but the first of a link are made again.
pub(super) fn connects(link: &str) -> Counter {
    describe_counter!(
        "moorline_rabbitmq_connects_total",
        "Connections that were made to RabbitMQ, the first of each link included"
    );
    counter!("moorline_rabbitmq_connects_total", "link" => link.to_owned())
}

/// A partition of an upstream rule that this process consumes, until it is dropped.
pub(super) struct HeldPartition(Gauge);

impl HeldPartition {
    pub(super) fn new() -> Self {
        describe_gauge!(
            "moorline_upstream_partitions_held",
            "Partitions of upstream rules that this process consumes"
        );
        let held = gauge!("moorline_upstream_partitions_held");
        held.increment(1.0);
        Self(held)
    }
}

impl Drop for HeldPartition {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// Counts what a worker took from its partitions.
pub(super) fn taken() -> Counter {
    describe_counter!(
        "moorline_upstream_taken_total",
        "Messages that this process took from partitions of upstream rules, those that came again included"
    );
    counter!("moorline_upstream_taken_total")
}
