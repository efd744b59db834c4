//! Events on the writer thread: durable first, then driven to the jobs that name them in steps, each one batch.

use std::ops::Bound;

use super::engine::{Lookup, View};
use super::job_keys::{self, EVENT, EVENT_AT, LATEST, NAMED, UNFINISHED};
use super::keys::{after_prefix, group, group_end, named};
use super::transaction::Transaction;
use crate::record::format;
use crate::record::job::{self as record, Driven, EventRecord};
use crate::{EventKind, EventName, EventOutcome, Job, JobEvent, JobState, MessageId, StoreError};

/// Jobs that one step changes.
const STEP: usize = 256;

/// What an event does to one job.
enum Effect {
    Cancels,
    Triggers,
    None,
}

/// `window_ms`: how long after it an event counts for jobs that are created then. Which came first is not a matter of their times, which
/// may come of different clocks.
fn effect(event: &JobEvent, window_ms: u64, job: &Job, came_later: bool) -> Effect {
    let counts_for_later = event.kind == EventKind::Happened
        && window_ms > 0
        && job.created_ms <= event.at_ms.saturating_add(window_ms);
    let is_too_new = came_later && !counts_for_later;
    let is_late = || job.fire_at_ms > event.at_ms && job.by_event.as_ref() != Some(&event.name);
    if job.state != JobState::Pending || is_too_new {
        Effect::None
    } else if job.cancel_on.contains(&event.name) {
        Effect::Cancels
    } else if event.kind == EventKind::Happened && job.trigger_on.contains(&event.name) && is_late()
    {
        Effect::Triggers
    } else {
        Effect::None
    }
}

impl Transaction {
    fn event_record(
        &self,
        name: &EventName,
        id: &MessageId,
    ) -> Result<Option<EventRecord>, StoreError> {
        let key = job_keys::event(EVENT, name, id);
        let value = self.get(&key)?;
        value
            .map(|value| record::parse_event(&key, &value))
            .transpose()
    }

    fn put_event(&mut self, record: &EventRecord) {
        let key = job_keys::event(EVENT, &record.event.name, &record.event.id);
        let value = record::event(&key, record);
        self.staged.put(key, value);
    }

    /// When an event of this name happened last, as far as that is remembered.
    fn happened(&self, name: &EventName) -> Result<Option<u64>, StoreError> {
        let key = named(LATEST, name.as_str());
        let value = self.get(&key)?;
        value
            .map(|value| format::parse_number(&key, &value))
            .transpose()
    }

    /// Events within the window before a job is created count for it.
    pub(super) fn apply_earlier_events(
        &self,
        job: &mut Job,
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let window_ms = self.shared.config.jobs.event_window_ms();
        if window_ms == 0 {
            return Ok(());
        }
        let counts = |name: &EventName| {
            let happened = self.happened(name)?;
            Ok::<_, StoreError>(
                happened.is_some_and(|at_ms| now_ms <= at_ms.saturating_add(window_ms)),
            )
        };
        for name in job.cancel_on.clone() {
            if counts(&name)? {
                job.end(JobState::Cancelled, now_ms);
                job.by_event = Some(name);
                return Ok(());
            }
        }
        for name in job.trigger_on.clone() {
            if counts(&name)? {
                job.wait_until(job.fire_at_ms.min(now_ms), Some(name));
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes an event, or finds it again; its outcome if it was driven to its end.
    pub(super) fn take_event(
        &mut self,
        event: &JobEvent,
    ) -> Result<Option<EventOutcome>, StoreError> {
        if let Some(known) = self.event_record(&event.name, &event.id)? {
            return Ok(known.driven.is_none().then_some(known.outcome));
        }
        let limit = self.shared.config.jobs.events_max;
        if self.jobs.events >= limit {
            return Err(StoreError::Full(format!(
                "{limit} events are remembered, which is the limit"
            )));
        }
        self.jobs.events += 1;
        let number = self.next_number();
        if event.kind == EventKind::Happened {
            let latest = self.happened(&event.name)?;
            let at_ms = latest.map_or(event.at_ms, |latest| latest.max(event.at_ms));
            let key = named(LATEST, event.name.as_str());
            let value = format::number(&key, at_ms);
            self.staged.put(key, value);
        }
        let at = job_keys::event_at(event.at_ms, &event.name, &event.id);
        self.jobs.lower_floor(&[EVENT_AT], &at);
        self.staged.put(at, Vec::new());
        let unfinished = job_keys::event(UNFINISHED, &event.name, &event.id);
        self.staged.put(unfinished, Vec::new());
        self.put_event(&EventRecord {
            event: event.clone(),
            outcome: EventOutcome::default(),
            driven: Some(Driven { through: None }),
            number,
        });
        self.drive_event(&event.name, &event.id)
    }

    /// Drives an event one step on; its outcome once every job has answered. Whoever else drives it meanwhile takes other
    /// steps.
    pub(super) fn drive_event(
        &mut self,
        name: &EventName,
        id: &MessageId,
    ) -> Result<Option<EventOutcome>, StoreError> {
        let Some(mut record) = self.event_record(name, id)? else {
            return Err(StoreError::Unavailable(format!(
                "event {name} was forgotten while it was driven"
            )));
        };
        let Some(driven) = record.driven.take() else {
            return Ok(Some(record.outcome));
        };
        let from = match &driven.through {
            Some(through) => Bound::Excluded(job_keys::named_by(name, through)),
            None => Bound::Included(group(NAMED, name.as_str())),
        };
        let to = group_end(NAMED, name.as_str());
        let keys = self.staged.first_keys(&self.engine, from, to, STEP)?;
        let mut through = driven.through;
        let is_last = keys.len() < STEP;
        for key in keys {
            let job = job_keys::named_by_of(name, &key)?;
            let came_later = self.number_of(&key)? > record.number;
            self.apply(&mut record, &job, came_later)?;
            through = Some(job);
        }
        record.driven = (!is_last).then_some(Driven { through });
        if is_last {
            self.staged.delete(job_keys::event(UNFINISHED, name, id));
        }
        self.put_event(&record);
        Ok(is_last.then_some(record.outcome))
    }

    /// Where a job stands in the order of jobs and events, by its key under an event's name.
    fn number_of(&self, named_by: &[u8]) -> Result<u64, StoreError> {
        match self.get(named_by)? {
            // Older ones have no number.
            Some(value) if !value.is_empty() => format::parse_number(named_by, &value),
            _ => Ok(0),
        }
    }

    fn apply(
        &mut self,
        record: &mut EventRecord,
        id: &crate::JobId,
        came_later: bool,
    ) -> Result<(), StoreError> {
        let mut job = match self.job(id) {
            Ok(Some(job)) => job,
            // Nothing more is to be done for it: it cannot be claimed either.
            Ok(None) | Err(StoreError::Damaged(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        let before = (job.state, job.at_ms());
        let event = &record.event;
        match effect(
            event,
            self.shared.config.jobs.event_window_ms(),
            &job,
            came_later,
        ) {
            Effect::None => return Ok(()),
            Effect::Cancels => {
                job.end(JobState::Cancelled, event.at_ms);
                job.by_event = Some(event.name.clone());
                record.outcome.cancelled += 1;
            }
            Effect::Triggers => {
                job.wait_until(event.at_ms, Some(event.name.clone()));
                record.outcome.triggered += 1;
            }
        }
        self.put_job(Some(before), &job)
    }

    /// Forgets events whose window is over; says how many, at most `limit`.
    pub(super) fn sweep_events(&mut self, now_ms: u64, limit: usize) -> Result<usize, StoreError> {
        if limit == 0 {
            return Ok(0);
        }
        let window_ms = self.shared.config.jobs.event_window_ms();
        let from = Bound::Included(self.jobs.floor(&[EVENT_AT]));
        let end = after_prefix(&[EVENT_AT]);
        let keys = self.staged.first_keys(&self.engine, from, end, limit)?;
        let first = keys.first().cloned();
        self.jobs.raise_floor(
            &[EVENT_AT],
            first.unwrap_or_else(|| after_prefix(&[EVENT_AT])),
        );
        let mut removed = 0;
        for key in keys {
            let (at_ms, name, id) = job_keys::event_at_of(&key)?;
            if at_ms.saturating_add(window_ms) >= now_ms {
                break;
            }
            let unfinished = job_keys::event(UNFINISHED, &name, &id);
            if self.get(&unfinished)?.is_some() {
                // It is driven to its end first.
                continue;
            }
            if self.happened(&name)?.is_some_and(|latest| latest <= at_ms) {
                self.staged.delete(named(LATEST, name.as_str()));
            }
            self.staged.delete(job_keys::event(EVENT, &name, &id));
            self.staged.delete(key);
            self.jobs.events = self.jobs.events.saturating_sub(1);
            removed += 1;
        }
        Ok(removed)
    }
}

/// Events that came before `before_ms` and were not driven to their ends.
pub(super) fn unfinished(
    view: &View,
    before_ms: u64,
    limit: usize,
) -> Result<Vec<JobEvent>, StoreError> {
    let mut events = Vec::new();
    let all = Bound::Included(vec![UNFINISHED]);
    for pair in view.range(all, after_prefix(&[UNFINISHED])) {
        let (key, _) = pair?;
        let (name, id) = job_keys::event_of(&key)?;
        let key = job_keys::event(EVENT, &name, &id);
        let Some(value) = view.get(&key)? else {
            continue;
        };
        let event = record::parse_event(&key, &value)?.event;
        if event.at_ms < before_ms {
            events.push(event);
        }
        if events.len() >= limit {
            break;
        }
    }
    Ok(events)
}
