//! What a change to a delayed job does, on the writer thread.
//!
//! A job is in one place of one index (`d`): under its state, by the time of [`Job::at_ms`]. Every change goes through
//! [`Transaction::put_job`], which moves it there and keeps the counts.

use std::ops::Bound;

use super::engine::Lookup;
use super::job_keys;
use super::keys::after_prefix;
use super::transaction::Transaction;
use crate::jobs::CLAIM_BYTES_MAX;
use crate::record::{format, job as record};
use crate::{
    ActionState, ClaimToken, Claimed, ClientId, Job, JobChange, JobCreated, JobId, JobPatch,
    JobSettlement, JobState, NewJob, NodeId, Settled, StoreError,
};

/// What is kept of the text of an error.
const ERROR_BYTES_MAX: usize = 1_000;
/// States whose jobs are claimed when their time has come.
const CLAIMABLE: [JobState; 3] = [JobState::Pending, JobState::Retrying, JobState::Firing];

pub(super) fn job_cost(job: &NewJob) -> usize {
    let names = job.cancel_on.iter().chain(&job.trigger_on);
    let names: usize = names.map(|name| 2 * name.as_str().len() + 200).sum();
    job.plan.bytes() + names + 512
}

fn bounded(mut error: String) -> String {
    if error.len() > ERROR_BYTES_MAX {
        error.truncate(error.floor_char_boundary(ERROR_BYTES_MAX));
    }
    error
}

/// A place in the index.
struct Place {
    at_ms: u64,
    id: JobId,
    key: Vec<u8>,
}

impl Transaction {
    pub(super) fn job(&self, id: &JobId) -> Result<Option<Job>, StoreError> {
        let key = job_keys::job(id);
        let value = self.get(&key)?;
        value
            .map(|value| record::parse_job(&key, &value))
            .transpose()
    }

    /// Puts a job where it belongs; `before` is its place until now.
    pub(super) fn put_job(
        &mut self,
        before: Option<(JobState, u64)>,
        job: &Job,
    ) -> Result<(), StoreError> {
        let place = (job.state, job.at_ms());
        if before != Some(place) {
            if let Some((state, at_ms)) = before {
                self.staged.delete(job_keys::due(state, at_ms, &job.id));
                let count = self.jobs.counts.of(state);
                *count = count.saturating_sub(1);
            }
            let key = job_keys::due(job.state, job.at_ms(), &job.id);
            self.jobs.lower_floor(&key[..2], &key);
            self.staged.put(key, Vec::new());
            *self.jobs.counts.of(job.state) += 1;
            if CLAIMABLE.contains(&job.state) {
                self.jobs.due(job.due_ms);
            }
        }
        let key = job_keys::job(&job.id);
        let value = record::job(&key, job);
        self.staged.put(key, value);
        let was_open = before.is_some_and(|(state, _)| !state.is_final());
        match &job.device {
            Some(device) if was_open == job.state.is_final() => {
                self.count_of_device(device, !was_open)
            }
            _ => Ok(()),
        }
    }

    /// Jobs of a device that have not ended.
    fn jobs_of_device(&self, device: &ClientId) -> Result<u64, StoreError> {
        let key = job_keys::device(device);
        let value = self.get(&key)?;
        let count = value.map(|value| format::parse_number(&key, &value));
        Ok(count.transpose()?.unwrap_or(0))
    }

    fn count_of_device(&mut self, device: &ClientId, is_more: bool) -> Result<(), StoreError> {
        let count = self.jobs_of_device(device)?;
        let count = match is_more {
            true => count + 1,
            false => count.saturating_sub(1),
        };
        let key = job_keys::device(device);
        match count {
            0 => self.staged.delete(key),
            count => {
                let value = format::number(&key, count);
                self.staged.put(key, value);
            }
        }
        Ok(())
    }

    /// With `is_notice` also at the limit.
    pub(super) fn create_job(
        &mut self,
        new: NewJob,
        is_notice: bool,
    ) -> Result<JobCreated, StoreError> {
        if let Some(job) = self.job(&new.id)? {
            return Ok(match job.fingerprint == new.fingerprint {
                true => JobCreated::Same(job),
                false => JobCreated::Conflict(job),
            });
        }
        let limit = self.shared.config.jobs.jobs_max;
        if self.jobs.counts.total() >= limit && !is_notice {
            return Err(StoreError::Full(format!(
                "there are {limit} delayed jobs, which is the limit"
            )));
        }
        let limit = self.shared.config.jobs.device_jobs_max;
        if let Some(device) = &new.device
            && self.jobs_of_device(device)? >= limit
        {
            return Err(StoreError::Quota(format!(
                "{device} has {limit} delayed jobs, which is the limit"
            )));
        }
        let now_ms = new.created_ms;
        let mut job = Job::waiting(new);
        self.apply_earlier_events(&mut job, now_ms)?;
        for name in job.cancel_on.iter().chain(&job.trigger_on) {
            let key = job_keys::named_by(name, &job.id);
            let number = format::number(&key, self.next_number());
            self.staged.put(key, number);
        }
        self.put_job(None, &job)?;
        Ok(JobCreated::Created(job))
    }

    /// Changes a job in one of the states `from`; any other is refused.
    fn change_job(
        &mut self,
        id: &JobId,
        from: JobState,
        change: impl FnOnce(&mut Job),
    ) -> Result<JobChange, StoreError> {
        let Some(mut job) = self.job(id)? else {
            return Ok(JobChange::NotFound);
        };
        if job.state != from {
            return Ok(JobChange::Refused(job));
        }
        let before = (job.state, job.at_ms());
        change(&mut job);
        self.put_job(Some(before), &job)?;
        Ok(JobChange::Changed(job))
    }

    pub(super) fn patch_job(
        &mut self,
        id: &JobId,
        patch: JobPatch,
    ) -> Result<JobChange, StoreError> {
        if let Some(expected) = &patch.instead_of
            && let Some(job) = self.job(id)?
            && job.state == JobState::Pending
            && job.plan != *expected
            && patch.plan.as_ref() != Some(&job.plan)
        {
            return Ok(JobChange::Outdated);
        }
        self.change_job(id, JobState::Pending, |job| {
            if let Some(fire_at_ms) = patch.fire_at_ms {
                job.wait_until(fire_at_ms, None);
            }
            if let Some(plan) = patch.plan {
                job.actions = vec![ActionState::Waiting; plan.actions.len()];
                job.plan = plan;
            }
        })
    }

    pub(super) fn cancel_job(&mut self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        let answer = self.change_job(id, JobState::Pending, |job| {
            job.end(JobState::Cancelled, now_ms);
        })?;
        Ok(match answer {
            JobChange::Refused(job) if job.state == JobState::Cancelled => JobChange::Changed(job),
            answer => answer,
        })
    }

    pub(super) fn trigger_job(&mut self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        self.change_job(id, JobState::Pending, |job| {
            job.wait_until(job.fire_at_ms.min(now_ms), None);
        })
    }

    pub(super) fn retry_failed_job(
        &mut self,
        id: &JobId,
        now_ms: u64,
    ) -> Result<JobChange, StoreError> {
        self.change_job(id, JobState::Failed, |job| job.try_again(now_ms))
    }

    /// At most `limit` places of the index from `from` up to, without, `to`, staged changes included. One that makes no sense leads to no
    /// job: it is removed.
    fn places(
        &mut self,
        from: Vec<u8>,
        to: Vec<u8>,
        limit: usize,
    ) -> Result<Vec<Place>, StoreError> {
        let mut from = Bound::Included(from);
        let mut places = Vec::new();
        loop {
            let wanted = limit - places.len();
            let keys = self
                .staged
                .first_keys(&self.engine, from, to.clone(), wanted)?;
            let is_last = keys.len() < wanted;
            from = Bound::Excluded(keys.last().cloned().unwrap_or_default());
            for key in keys {
                match job_keys::due_of(&key) {
                    Ok((at_ms, id)) => places.push(Place { at_ms, id, key }),
                    Err(error) => {
                        tracing::error!(%error, "a place of a delayed job makes no sense and is removed");
                        self.staged.delete(key);
                    }
                }
            }
            if is_last || places.len() >= limit {
                return Ok(places);
            }
        }
    }

    /// The places of a state up to and with `until_ms`, at most `limit`, and the time of the first one after it, if there
    /// are no more. `limit` is not zero.
    fn places_until(
        &mut self,
        state: JobState,
        until_ms: u64,
        limit: usize,
    ) -> Result<(Vec<Place>, Option<u64>), StoreError> {
        let run = job_keys::state(state);
        let end = after_prefix(&run);
        let until = job_keys::from(state, until_ms.saturating_add(1));
        let floor = self.jobs.floor(&run);
        let found = match floor < until {
            true => self.places(floor.clone(), until.clone(), limit)?,
            false => Vec::new(),
        };
        let mut first = found.first().map(|first| first.key.clone());
        let mut next_ms = None;
        if found.len() < limit {
            let next = self.places(floor.max(until), end.clone(), 1)?.pop();
            next_ms = next.as_ref().map(|next| next.at_ms);
            first = first.or(next.map(|next| next.key));
        }
        self.jobs.raise_floor(&run, first.unwrap_or(end));
        Ok((found, next_ms))
    }

    pub(super) fn claim_jobs(
        &mut self,
        holder: &NodeId,
        now_ms: u64,
        limit: usize,
        lease_ms: u64,
    ) -> Result<Claimed, StoreError> {
        let limit = limit.max(1);
        let mut places = self.left_by_an_earlier_run(limit)?;
        let mut next_due_ms = None;
        // Of each run that the limit cut short, where it went on: what cannot be read leaves less than the limit to be claimed.
        let mut cut_short = Vec::new();
        let mut next = |at_ms: u64| {
            let earliest = next_due_ms.map_or(at_ms, |next: u64| next.min(at_ms));
            next_due_ms = Some(earliest);
        };
        if places.is_empty() {
            for state in CLAIMABLE {
                let (found, next_ms) = self.places_until(state, now_ms, limit + 1)?;
                if found.len() > limit {
                    cut_short.extend(found.last().map(|last| last.at_ms));
                }
                places.extend(found);
                next_ms.into_iter().for_each(&mut next);
            }
            places.sort_by(|a, b| (a.at_ms, &a.id).cmp(&(b.at_ms, &b.id)));
        } else {
            next(now_ms);
        }
        cut_short.into_iter().for_each(&mut next);
        let mut jobs = Vec::with_capacity(places.len().min(limit));
        let mut bytes = 0;
        for place in places {
            if jobs.len() >= limit || (bytes >= CLAIM_BYTES_MAX && !jobs.is_empty()) {
                next(place.at_ms);
                break;
            }
            let Some(job) = self.claim_one(&place, holder, now_ms, lease_ms)? else {
                continue;
            };
            next(job.due_ms);
            bytes += job.plan.bytes();
            jobs.push(job);
        }
        self.jobs.told(next_due_ms);
        Ok(Claimed { jobs, next_due_ms })
    }

    /// Claims that an earlier run of the process has left, whatever their leases say: nobody carries them out any more.
    fn left_by_an_earlier_run(&mut self, limit: usize) -> Result<Vec<Place>, StoreError> {
        let mut left = Vec::new();
        while left.is_empty()
            && let Some(from) = self.jobs.recovered_to.take()
        {
            let end = after_prefix(&job_keys::state(JobState::Firing));
            let found = self.places(from, end, limit)?;
            let mut next = found.last().map(|last| last.key.clone());
            if let Some(next) = &mut next {
                next.push(0);
            }
            self.jobs.recovered_to = next;
            for place in found {
                let job = self.job(&place.id);
                // What cannot be read is dealt with when its lease has ended.
                if let Ok(Some(job)) = job
                    && job.token.0 <= self.shared.jobs.earlier_run
                {
                    left.push(place);
                }
            }
        }
        Ok(left)
    }

    /// `None` where what is stored of the job makes no sense: that must not stop the others.
    fn claim_one(
        &mut self,
        place: &Place,
        holder: &NodeId,
        now_ms: u64,
        lease_ms: u64,
    ) -> Result<Option<Job>, StoreError> {
        let mut job = match self.job(&place.id) {
            Ok(Some(job)) if job_keys::due(job.state, job.at_ms(), &job.id) == place.key => job,
            Err(error @ (StoreError::Unavailable(_) | StoreError::Full(_))) => return Err(error),
            unreadable => {
                let error = unreadable.err().map(|error| error.to_string());
                tracing::error!(job = %place.id, error, "a delayed job cannot be read and is passed over");
                self.forget_place(place);
                return Ok(None);
            }
        };
        let before = (job.state, job.at_ms());
        job.claim(
            ClaimToken(self.next_number()),
            holder.clone(),
            now_ms + lease_ms,
        );
        self.put_job(Some(before), &job)?;
        Ok(Some(job))
    }

    fn forget_place(&mut self, place: &Place) {
        let code = usize::from(place.key[1]);
        if let Some(state) = JobState::ALL.get(code) {
            let count = self.jobs.counts.of(*state);
            *count = count.saturating_sub(1);
        }
        self.staged.delete(place.key.clone());
    }

    /// The job, if `token` is that of its newest claim.
    fn claimed(&self, id: &JobId, token: ClaimToken) -> Result<Option<Job>, StoreError> {
        Ok(self.job(id)?.filter(|job| job.token == token))
    }

    pub(super) fn settle_job(
        &mut self,
        id: &JobId,
        token: ClaimToken,
        settlement: JobSettlement,
        now_ms: u64,
    ) -> Result<Settled, StoreError> {
        let Some(mut job) = self.claimed(id, token)? else {
            return Ok(Settled::Stale);
        };
        if job.state == JobState::Firing {
            let before = (job.state, job.at_ms());
            job.settle(settlement, now_ms);
            job.last_error = job.last_error.take().map(bounded);
            self.put_job(Some(before), &job)?;
        }
        Ok(Settled::Done)
    }

    pub(super) fn extend_job(
        &mut self,
        id: &JobId,
        token: ClaimToken,
        until_ms: u64,
        actions: Vec<ActionState>,
        is_trial: bool,
    ) -> Result<Settled, StoreError> {
        let claimed = self.claimed(id, token)?;
        let Some(mut job) = claimed.filter(|job| job.state == JobState::Firing) else {
            return Ok(Settled::Stale);
        };
        let before = (job.state, job.at_ms());
        job.due_ms = job.due_ms.max(until_ms);
        job.set_actions(actions);
        job.trials = job.trials.saturating_add(u32::from(is_trial));
        self.put_job(Some(before), &job)?;
        Ok(Settled::Done)
    }

    /// Removes jobs that ended long enough ago; says how many, at most `limit`.
    pub(super) fn sweep_jobs(&mut self, now_ms: u64, limit: usize) -> Result<usize, StoreError> {
        let mut removed = 0;
        for state in JobState::ALL.into_iter().filter(|state| state.is_final()) {
            let retention_ms = self.shared.config.jobs.retention_ms(state);
            let left = limit - removed;
            let Some(until_ms) = now_ms.checked_sub(retention_ms).filter(|_| left > 0) else {
                continue;
            };
            let (found, _) = self.places_until(state, until_ms, left)?;
            for place in found {
                self.remove_job(&place)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn remove_job(&mut self, place: &Place) -> Result<(), StoreError> {
        match self.job(&place.id) {
            Ok(Some(job)) if job_keys::due(job.state, job.at_ms(), &job.id) == place.key => {
                for name in job.cancel_on.iter().chain(&job.trigger_on) {
                    self.staged.delete(job_keys::named_by(name, &job.id));
                }
                self.staged.delete(job_keys::job(&job.id));
            }
            Err(error @ (StoreError::Unavailable(_) | StoreError::Full(_))) => return Err(error),
            Err(StoreError::Damaged(_)) => self.staged.delete(job_keys::job(&place.id)),
            _ => {}
        }
        self.forget_place(place);
        Ok(())
    }
}
