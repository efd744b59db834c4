//! What is counted of the link to Redis.

use std::time::Duration;

use metrics::{Counter, Histogram, counter, describe_counter, describe_histogram, histogram};

use super::flight::Way;
use crate::StoreError;

/// What is counted of calls in one direction.
struct Calls {
    calls: Counter,
    errors: Counter,
    batch: Histogram,
    seconds: Histogram,
}

impl Calls {
    fn new(way: &'static str) -> Self {
        Self {
            calls: counter!("moorline_redis_calls_total", "way" => way),
            errors: counter!("moorline_redis_errors_total", "way" => way),
            batch: histogram!("moorline_redis_batch_calls", "way" => way),
            seconds: histogram!("moorline_redis_batch_seconds", "way" => way),
        }
    }
}

pub(super) struct LinkMetrics {
    writes: Calls,
    reads: Calls,
}

impl LinkMetrics {
    pub(super) fn new() -> Self {
        describe_counter!(
            "moorline_redis_calls_total",
            "Calls of Redis: writes, which take their turn, and reads"
        );
        describe_counter!(
            "moorline_redis_errors_total",
            "Calls that Redis did not answer, or not with what was asked for"
        );
        describe_histogram!(
            "moorline_redis_batch_calls",
            "Calls that went to Redis together"
        );
        describe_histogram!(
            "moorline_redis_batch_seconds",
            "From the sending of such a batch until everything in it is answered, repetitions included"
        );
        Self {
            writes: Calls::new("write"),
            reads: Calls::new("read"),
        }
    }

    /// A batch is through.
    pub(super) fn batch<T>(&self, way: Way, answers: &[Result<T, StoreError>], took: Duration) {
        let of = match way {
            Way::Write => &self.writes,
            Way::Read => &self.reads,
        };
        of.calls.increment(answers.len() as u64);
        of.batch.record(answers.len() as f64);
        of.seconds.record(took.as_secs_f64());
        // What a fence refuses is an answer.
        let is_error = |answer: &&Result<T, StoreError>| matches!(answer, Err(error) if !matches!(error, StoreError::Stale { .. }));
        let errors = answers.iter().filter(is_error).count();
        if errors > 0 {
            of.errors.increment(errors as u64);
        }
    }
}

/// Counts connections that were made.
pub(super) fn connects() -> Counter {
    describe_counter!(
        "moorline_redis_connects_total",
        "Connections that were made to Redis, the first ones included"
    );
    counter!("moorline_redis_connects_total")
}
