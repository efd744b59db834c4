//! The queue before the writer thread: order of submission is order of writing.
//!
//! Bounded in bytes and in jobs. A caller is never made to wait for room, because its place in the
//! order is taken when it calls: where there is no room it is refused as overloaded and may try again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::transaction::Transaction;
use crate::StoreError;

/// Called with the outcome of the commit.
pub(super) type Finish = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Runs on the writer thread, or is refused with the reason; what it returns is called after the commit.
pub(super) type Run =
    Box<dyn FnOnce(Result<&mut Transaction, StoreError>) -> Option<Finish> + Send>;

/// What a job asks of the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Adds data, and somebody waits until it is durable. Refused while space is short.
    Add,
    /// Removes or changes little, and somebody waits until it is durable.
    Change,
    /// Nobody waits: it rides with the next commit.
    Note,
}

pub(super) struct Job {
    pub(super) kind: Kind,
    /// Bytes held until it is done.
    pub(super) cost: usize,
    pub(super) run: Run,
}

const JOBS_MAX: usize = 1 << 17;
/// Notes are small and losing one costs a repetition, so they are let in for longer.
const JOBS_AND_NOTES_MAX: usize = 4 * JOBS_MAX;
const BATCH_JOBS_MAX: usize = 512;
const BATCH_BYTES_MAX: usize = 1 << 20;
/// How long notes alone wait for company.
const NOTES_WAIT: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Inner {
    jobs: VecDeque<Job>,
    bytes: usize,
    awaited: usize,
    first_note: Option<Instant>,
    writer_sleeps: bool,
    closed: bool,
}

pub(super) struct Queue {
    inner: Mutex<Inner>,
    changed: Condvar,
    bytes_max: usize,
}

/// What the writer gets.
pub(super) enum Taken {
    /// In order; empty when `idle` passed without any.
    Jobs(Vec<Job>),
    /// Nothing is left and nothing more will come.
    Closed,
}

impl Queue {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            inner: Mutex::default(),
            changed: Condvar::new(),
            bytes_max,
        }
    }

    /// Takes a place in the order, or says why not.
    pub(super) fn push(&self, job: Job) -> Result<(), StoreError> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(StoreError::Unavailable("the store is closed".into()));
        }
        let jobs_max = if job.kind == Kind::Note {
            JOBS_AND_NOTES_MAX
        } else {
            JOBS_MAX
        };
        let over_bytes = job.kind == Kind::Add
            && inner.bytes > 0
            && inner.bytes.saturating_add(job.cost) > self.bytes_max;
        if inner.jobs.len() >= jobs_max || over_bytes {
            return Err(StoreError::Unavailable(
                "overloaded: too much waits to be written".into(),
            ));
        }
        inner.bytes = inner.bytes.saturating_add(job.cost);
        if job.kind == Kind::Note {
            inner.first_note.get_or_insert_with(Instant::now);
        } else {
            inner.awaited += 1;
        }
        let wake = inner.writer_sleeps && (job.kind != Kind::Note || inner.jobs.is_empty());
        inner.jobs.push_back(job);
        drop(inner);
        if wake {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Waits for jobs, at most `idle`, and takes as many as make one batch.
    pub(super) fn take(&self, idle: Duration) -> Taken {
        let idle_until = Instant::now() + idle;
        let mut inner = self.inner.lock();
        while inner.awaited == 0 && !inner.closed {
            let until = inner
                .first_note
                .map_or(idle_until, |first| first + NOTES_WAIT);
            if Instant::now() >= until {
                break;
            }
            inner.writer_sleeps = true;
            self.changed.wait_until(&mut inner, until);
            inner.writer_sleeps = false;
        }
        if inner.closed && inner.jobs.is_empty() {
            return Taken::Closed;
        }
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < BATCH_JOBS_MAX && bytes < BATCH_BYTES_MAX {
            let Some(job) = inner.jobs.pop_front() else {
                break;
            };
            bytes += job.cost;
            inner.awaited -= usize::from(job.kind != Kind::Note);
            batch.push(job);
        }
        if inner.jobs.is_empty() {
            inner.first_note = None;
        }
        Taken::Jobs(batch)
    }

    /// The batch is done; its bytes are free again.
    pub(super) fn done(&self, bytes: usize) {
        let mut inner = self.inner.lock();
        inner.bytes = inner.bytes.saturating_sub(bytes);
    }

    /// Takes everything, after at most `wait`; says whether the queue is closed.
    pub(super) fn drain(&self, wait: Duration) -> (Vec<Job>, bool) {
        let mut inner = self.inner.lock();
        if !inner.closed && inner.jobs.is_empty() {
            inner.writer_sleeps = true;
            self.changed.wait_for(&mut inner, wait);
            inner.writer_sleeps = false;
        }
        inner.bytes = 0;
        inner.awaited = 0;
        inner.first_note = None;
        (inner.jobs.drain(..).collect(), inner.closed)
    }

    /// Takes no more jobs; what is there is still done.
    pub(super) fn close(&self) {
        self.inner.lock().closed = true;
        self.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(kind: Kind, cost: usize) -> Job {
        Job {
            kind,
            cost,
            run: Box::new(|_| None),
        }
    }

    fn taken(queue: &Queue) -> Option<usize> {
        match queue.take(Duration::ZERO) {
            Taken::Jobs(jobs) => {
                queue.done(jobs.iter().map(|job| job.cost).sum());
                Some(jobs.len())
            }
            Taken::Closed => None,
        }
    }

    #[test]
    fn bytes_are_bounded_for_what_adds_data_only() {
        let queue = Queue::new(100);
        queue.push(job(Kind::Add, 60)).unwrap();
        assert!(matches!(
            queue.push(job(Kind::Add, 60)),
            Err(StoreError::Unavailable(_))
        ));
        queue.push(job(Kind::Change, 60)).unwrap();
        queue.push(job(Kind::Note, 60)).unwrap();
        assert_eq!(taken(&queue), Some(3));
        queue.push(job(Kind::Add, 1_000)).unwrap();
    }

    #[test]
    fn jobs_are_bounded() {
        let queue = Queue::new(100);
        for _ in 0..JOBS_MAX {
            queue.push(job(Kind::Change, 0)).unwrap();
        }
        assert!(queue.push(job(Kind::Change, 0)).is_err());
        assert!(queue.push(job(Kind::Note, 0)).is_ok());
        assert_eq!(taken(&queue), Some(BATCH_JOBS_MAX));
    }

    #[test]
    fn a_closed_queue_gives_what_it_has_and_takes_nothing() {
        let queue = Queue::new(100);
        queue.push(job(Kind::Note, 1)).unwrap();
        queue.close();
        assert!(queue.push(job(Kind::Change, 1)).is_err());
        assert_eq!(taken(&queue), Some(1));
        assert_eq!(taken(&queue), None);
    }
}
