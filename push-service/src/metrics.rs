//! What the HTTP API counts. Handles are made once and held; no label has a value that a caller
//! can choose.

use std::collections::HashMap;
use std::time::Duration;

use axum::http::{Method, StatusCode};
use metrics::{Counter, Histogram, counter, describe_counter, describe_histogram, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use moorline_router::ReceiptState;
use parking_lot::RwLock;

use crate::push::{Outcome, SubmitError};

/// Renders what every role counts.
#[derive(Debug, Clone)]
pub struct MetricsHandle(PrometheusHandle);

/// Upper bounds in seconds of every `…_seconds` histogram: 50 µs to 10 s.
const BUCKETS: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 10.0,
];

/// Upper bounds of every histogram of how many calls went together.
const COUNTS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0];

/// Makes this process collect metrics; to be called once, before any role is started.
pub fn install_metrics() -> Result<MetricsHandle, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_batch_calls".into()), &COUNTS)?
        .install_recorder()
        .map(MetricsHandle)
}

impl MetricsHandle {
    /// Metrics that are rendered but belong to nobody: for tests that run many services in one process.
    pub fn detached() -> Self {
        Self(PrometheusBuilder::new().build_recorder().handle())
    }

    /// The Prometheus text format.
    pub(crate) fn render(&self) -> String {
        self.0.render()
    }

    /// Folds what was recorded into the buckets, so that memory stays small when nobody scrapes.
    pub(crate) fn fold(&self) {
        self.0.run_upkeep();
    }
}

/// The counters of one route.
type OfRoute = HashMap<(Method, StatusCode), Counter>;

pub(crate) struct Metrics {
    sent: Counter,
    accepted: Counter,
    dropped: Counter,
    replayed: Counter,
    conflict: Counter,
    inbox_full: Counter,
    unavailable: Counter,
    invalid: Counter,
    push_duration: Histogram,
    requests: RwLock<HashMap<String, OfRoute>>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        describe_counter!(
            "moorline_pushes_total",
            "Pushes by what became of them when they were made"
        );
        describe_histogram!(
            "moorline_push_duration_seconds",
            "Seconds from a valid push to its answer, durability and the hint to the node included"
        );
        describe_counter!(
            "moorline_http_requests_total",
            "HTTP requests by route, method and status"
        );
        let pushes = |result: &'static str| counter!("moorline_pushes_total", "result" => result);
        Self {
            sent: pushes("sent"),
            accepted: pushes("accepted"),
            dropped: pushes("dropped"),
            replayed: pushes("replayed"),
            conflict: pushes("conflict"),
            inbox_full: pushes("inbox_full"),
            unavailable: pushes("unavailable"),
            invalid: pushes("invalid"),
            push_duration: histogram!("moorline_push_duration_seconds"),
            requests: RwLock::default(),
        }
    }

    pub(crate) fn push_invalid(&self) {
        self.invalid.increment(1);
    }

    pub(crate) fn push_ended(&self, result: &Result<Outcome, SubmitError>, took: Duration) {
        match result {
            Ok(Outcome { replayed: true, .. }) => &self.replayed,
            Ok(Outcome {
                state: ReceiptState::Sent,
                ..
            }) => &self.sent,
            Ok(Outcome {
                state: ReceiptState::Dropped,
                ..
            }) => &self.dropped,
            Ok(_) => &self.accepted,
            Err(SubmitError::Conflict(_) | SubmitError::InProgress(_)) => &self.conflict,
            Err(SubmitError::InboxFull) => &self.inbox_full,
            Err(SubmitError::Store(_)) => &self.unavailable,
        }
        .increment(1);
        self.push_duration.record(took);
    }

    /// `route` is the pattern of the path, not the path.
    pub(crate) fn request_ended(&self, route: &str, method: &Method, status: StatusCode) {
        let key = (method.clone(), status);
        if let Some(counter) = self.requests.read().get(route).and_then(|of| of.get(&key)) {
            counter.increment(1);
            return;
        }
        // A method is the caller's choice: those that no route has share one label.
        let label = match *method {
            Method::GET | Method::HEAD | Method::POST | Method::DELETE => {
                method.as_str().to_owned()
            }
            _ => "other".to_owned(),
        };
        let counter = counter!(
            "moorline_http_requests_total",
            "route" => route.to_owned(), "method" => label.clone(), "status" => status.as_str().to_owned()
        );
        counter.increment(1);
        if label != "other" {
            self.requests
                .write()
                .entry(route.to_owned())
                .or_default()
                .insert(key, counter);
        }
    }
}
