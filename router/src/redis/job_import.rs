//! What a migration writes of delayed jobs.

use futures_util::future::join_all;

use super::job_answer::Named;
use super::job_creation::new_token;
use super::jobs::RedisJobs;
use super::reply::parse;
use crate::record::job::EventRecord;
use crate::{EventName, Job, Jobs as _, StoreError};

impl RedisJobs {
    /// Whether there is any job.
    pub(crate) async fn holds_any(&self) -> Result<bool, StoreError> {
        Ok(self.counts().await?.total() > 0)
    }

    /// Takes jobs over as they are; says how many were not there yet.
    pub(crate) async fn import(&self, jobs: &[Job]) -> Result<u64, StoreError> {
        let tokens: Vec<String> = jobs.iter().map(|_| new_token()).collect();
        let named = jobs
            .iter()
            .zip(&tokens)
            .map(|(job, token)| named(job, token));
        let named: Vec<Vec<(EventName, Named)>> = named.collect();
        let registered = jobs.iter().zip(&named).flat_map(|(job, named)| {
            let names = named.iter();
            names.map(|(name, named)| self.write(&job.id, self.calls.name(name, named)))
        });
        for registered in join_all(registered).await {
            registered?;
        }
        let written = jobs.iter().zip(&tokens);
        let written =
            written.map(|(job, token)| self.write(&job.id, self.calls.import(job, token)));
        let mut taken = 0;
        for (answer, (job, named)) in join_all(written)
            .await
            .into_iter()
            .zip(jobs.iter().zip(named))
        {
            if parse::<u64>(answer?)? == 1 {
                taken += 1;
                continue;
            }
            for (name, named) in named {
                self.link
                    .note(job.id.as_str(), self.calls.unname(&name, &named));
            }
        }
        Ok(taken)
    }

    /// Takes an event over, and what it came to, or that it is still to be driven.
    pub(crate) async fn import_event(&self, record: &EventRecord) -> Result<(), StoreError> {
        let event = &record.event;
        let begin = self.calls.event_begin(event, false);
        self.write_event(&event.name, begin).await?;
        if record.driven.is_none() {
            let came_to = format!("{} {}", record.outcome.cancelled, record.outcome.triggered);
            let end = self.calls.event_end(event, &came_to);
            self.write_event(&event.name, end).await?;
        }
        Ok(())
    }
}

fn named(job: &Job, token: &str) -> Vec<(EventName, Named)> {
    Named::of(&job.id, &job.cancel_on, &job.trigger_on, token)
}
