//! Lists of jobs over all shards.

use redis::Value;

use super::job_answer::{Named, Told};
use super::job_calls::shard_of;
use super::jobs::RedisJobs;
use super::keys::SHARDS;
use super::reply::parse;
use crate::{EventName, Job, JobCursor, JobFilter, JobId, JobPage, JobState, StoreError};

/// What a page may look at, whatever was asked for.
const LOOK_MAX: usize = 1_000;

/// No text has this byte: behind everything that begins with what stands before it.
const LAST: u8 = 0xFF;

/// A job that a list looks at.
struct Place {
    at_ms: u64,
    id: String,
}

impl RedisJobs {
    pub(super) async fn page(
        &self,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<JobPage, StoreError> {
        let limit = limit.clamp(1, LOOK_MAX);
        let mut places = match &filter.event {
            Some(event) => self.places_by_event(event, filter, after, limit).await?,
            None if filter.prefix.is_some() => self.places_by_id(filter, after, limit).await?,
            None => self.places_by_time(filter, after, limit).await?,
        };
        let may_be_more = places.len() >= limit;
        places.truncate(limit);
        let jobs = self.fetch(&places).await?;
        let next = match places.last() {
            Some(last) if may_be_more => Some(JobCursor {
                at_ms: last.at_ms,
                id: JobId::parse(&last.id)
                    .map_err(|_| StoreError::Damaged("an impossible job id".into()))?,
            }),
            _ => None,
        };
        let jobs = jobs.into_iter().filter(|job| filter.matches(job)).collect();
        Ok(JobPage { jobs, next })
    }

    /// Registrations under one name: a job that was tried to be written twice comes twice.
    async fn places_by_event(
        &self,
        event: &EventName,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<Vec<Place>, StoreError> {
        let prefix = filter.prefix.as_deref().unwrap_or_default();
        let low = after.map(|after| [after.id.as_str().as_bytes(), &[0, LAST]].concat());
        let low = low.unwrap_or_default().max(prefix.as_bytes().to_vec());
        let high = match prefix {
            "" => Vec::new(),
            prefix => [prefix.as_bytes(), &[LAST]].concat(),
        };
        let whom = self.calls.event_whom(event, &low, &high, limit);
        let members: Vec<String> = parse(self.link.read(whom).await?)?;
        let mut places = Vec::with_capacity(members.len());
        for member in members {
            let id = Named::parse(&member)?.id.to_string();
            places.push(Place { at_ms: 0, id });
        }
        Ok(places)
    }

    async fn places_by_id(
        &self,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<Vec<Place>, StoreError> {
        let prefix = filter.prefix.as_deref().unwrap_or_default().as_bytes();
        let from = [b"[", prefix].concat();
        // From the larger of the two on.
        let low = match after.map(|after| after.id.as_str().as_bytes()) {
            Some(after) if after >= prefix => [b"(", after].concat(),
            _ => from,
        };
        let high = [b"(", prefix, &[LAST]].concat();
        let calls = (0..SHARDS).map(|shard| self.calls.ids(shard, &low, &high, limit));
        let mut places = Vec::new();
        for ids in self.link.read_all(calls.collect()).await {
            let ids = parse::<Vec<String>>(ids?)?.into_iter();
            places.extend(ids.map(|id| Place { at_ms: 0, id }));
        }
        places.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(places)
    }

    async fn places_by_time(
        &self,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<Vec<Place>, StoreError> {
        let one = filter.state.map(|state| [state]);
        let states: &[JobState] = one.as_ref().map_or(&JobState::ALL, |one| one);
        let after = after.map(|after| (after.at_ms, &after.id));
        let times = (filter.from_ms.unwrap_or(0), filter.to_ms);
        let calls = (0..SHARDS).map(|shard| self.calls.list(shard, states, after, times, limit));
        let mut places = Vec::new();
        for answer in self.link.read_all(calls.collect()).await {
            let mut fields = parse::<Vec<String>>(answer?)?.into_iter();
            while let (Some(id), Some(at_ms)) = (fields.next(), fields.next()) {
                let at_ms = at_ms
                    .parse()
                    .map_err(|_| StoreError::Damaged("an impossible time of a job".into()))?;
                places.push(Place { at_ms, id });
            }
        }
        places.sort_by(|one, other| (one.at_ms, &one.id).cmp(&(other.at_ms, &other.id)));
        Ok(places)
    }

    /// The jobs at `places`, in their order.
    async fn fetch(&self, places: &[Place]) -> Result<Vec<Job>, StoreError> {
        let mut by_shard: Vec<Vec<&str>> = vec![Vec::new(); usize::from(SHARDS)];
        let mut before = None;
        for place in places {
            if before != Some(&place.id) {
                by_shard[usize::from(shard_of(&place.id))].push(&place.id);
            }
            before = Some(&place.id);
        }
        let asked = (0..SHARDS)
            .zip(&by_shard)
            .filter(|(_, ids)| !ids.is_empty());
        let asked = asked.map(|(shard, ids)| self.calls.get(shard, ids));
        let mut found: std::collections::HashMap<String, Told> = std::collections::HashMap::new();
        for answer in self.link.read_all(asked.collect()).await {
            let answer: Value = answer?;
            let told = Told::parse_all(answer)?.into_iter();
            found.extend(told.map(|told| (told.id.to_string(), told)));
        }
        let told = places.iter().filter_map(|place| found.remove(&place.id));
        let read = told.filter_map(|told| {
            let id = told.id.clone();
            // It is given up when it is due, and does not hide the others until then.
            told.read()
                .inspect_err(
                    |error| tracing::error!(job = %id, %error, "a delayed job cannot be read"),
                )
                .ok()
        });
        Ok(read.collect())
    }
}
