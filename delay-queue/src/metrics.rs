//! What is counted of delayed jobs.

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use moorline_router::{JobCounts, JobState};

pub(crate) struct Metrics {
    pub(crate) fired: Counter,
    pub(crate) skipped: Counter,
    pub(crate) retried: Counter,
    pub(crate) put_off: Counter,
    pub(crate) failed: Counter,
    /// Claimed by another since: what was done counts for nothing.
    pub(crate) stale: Counter,
    /// Begun before the time. Nothing does that; counted, so that it would be seen.
    pub(crate) early: Counter,
    pub(crate) lateness: Histogram,
    pub(crate) in_flight: Gauge,
    states: Vec<(JobState, Gauge)>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        describe_counter!(
            "moorline_delays_ended_total",
            "Attempts of delayed jobs by how they ended"
        );
        describe_counter!(
            "moorline_delays_early_total",
            "Delayed jobs that were begun before their time"
        );
        describe_histogram!(
            "moorline_delays_lateness_seconds",
            "Seconds from the time of a delayed job to its beginning"
        );
        describe_gauge!(
            "moorline_delays_in_flight",
            "Delayed jobs that this process carries out"
        );
        describe_gauge!("moorline_delays", "Delayed jobs of the deployment by state");
        let ended =
            |result: &'static str| counter!("moorline_delays_ended_total", "result" => result);
        let state = |state: JobState| (state, gauge!("moorline_delays", "state" => state.as_str()));
        Self {
            fired: ended("fired"),
            skipped: ended("skipped"),
            retried: ended("retried"),
            put_off: ended("put-off"),
            failed: ended("failed"),
            stale: ended("stale"),
            early: counter!("moorline_delays_early_total"),
            lateness: histogram!("moorline_delays_lateness_seconds"),
            in_flight: gauge!("moorline_delays_in_flight"),
            states: JobState::ALL.into_iter().map(state).collect(),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
    pub(crate) fn counted(&self, mut counts: JobCounts) {
        for (state, gauge) in &self.states {
            gauge.set(*counts.of(*state) as f64);
        }
    }
}
