//! One stream of batches to one node.
//!
//! A task owns the stream. What callers bring while batches are on their way is gathered to the next one, so that a busy
//! stream has large batches and an idle one sends at once. Batches are answered in order. Once the stream breaks, or an
//! answer does not come in time, every hint on its way is [`Busy`](DeliveryOutcome::Busy), and so is every further
//! one until the stream is open again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::messages::{DeliverAnswer, DeliverBatch};
use super::peer::Line;
use super::{ANSWER_TIMEOUT, BATCH_BYTES, BATCH_MAX, CONNECT_TIMEOUT, WINDOW, WINDOW_KEY};
use crate::{Delivery, DeliveryOutcome, NodeId};

/// Calls that wait for their turn; more are told that the node is busy.
const QUEUE_MAX: usize = 4096;
/// Rest before a stream is opened again, doubled each time that fails.
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_secs(1);

/// Hints of one caller, at most [`BATCH_MAX`].
struct Job {
    deliveries: Vec<Delivery>,
    /// Dropped where there is no answer.
    answer: oneshot::Sender<Vec<DeliveryOutcome>>,
}

/// The way into a lane. Its task ends when this is dropped.
pub(super) struct Lane {
    jobs: mpsc::Sender<Job>,
    is_down: Arc<AtomicBool>,
}

impl Lane {
    pub(super) fn start(node: NodeId, line: Line) -> Self {
        let (sender, jobs) = mpsc::channel(QUEUE_MAX);
        let is_down = Arc::new(AtomicBool::new(false));
        let task = Task {
            node,
            line,
            jobs,
            is_down: Arc::clone(&is_down),
        };
        tokio::spawn(task.run());
        Self {
            jobs: sender,
            is_down,
        }
    }

    /// Takes its place in the lane when it is called, not when it is awaited.
    pub(super) fn deliver(
        &self,
        deliveries: Vec<Delivery>,
    ) -> impl Future<Output = Vec<DeliveryOutcome>> + Send + use<> {
        let number = deliveries.len();
        let mut chunks = Vec::with_capacity(number.div_ceil(BATCH_MAX));
        let mut deliveries = deliveries.into_iter();
        while deliveries.len() > 0 {
            let chunk: Vec<_> = deliveries.by_ref().take(BATCH_MAX).collect();
            chunks.push((chunk.len(), self.send(chunk)));
        }
        async move {
            let mut outcomes = Vec::with_capacity(number);
            for (length, answer) in chunks {
                let mut answered = match answer {
                    Some(answer) => answer.await.unwrap_or_default(),
                    None => Vec::new(),
                };
                answered.resize(length, DeliveryOutcome::Busy);
                outcomes.append(&mut answered);
            }
            outcomes
        }
    }

    fn send(&self, deliveries: Vec<Delivery>) -> Option<oneshot::Receiver<Vec<DeliveryOutcome>>> {
        if self.is_down.load(Ordering::Acquire) {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        self.jobs.try_send(Job { deliveries, answer }).ok()?;
        Some(answered)
    }
}

/// The stream while it is open.
struct Open {
    batches: mpsc::Sender<DeliverBatch>,
    answers: Streaming<DeliverAnswer>,
    /// Batches that may be unanswered.
    window: usize,
    /// Number of the last batch.
    last: u64,
    /// Sent and not answered, oldest first.
    unanswered: VecDeque<Unanswered>,
}

struct Unanswered {
    batch: u64,
    until: Instant,
    /// How many hints of the batch are whose.
    callers: Vec<(usize, oneshot::Sender<Vec<DeliveryOutcome>>)>,
}

/// Why a stream is not used any more.
enum Ended {
    /// Nobody has the lane.
    Abandoned,
    Broken(Status),
}

struct Task {
    node: NodeId,
    line: Line,
    jobs: mpsc::Receiver<Job>,
    is_down: Arc<AtomicBool>,
}

impl Task {
    async fn run(mut self) {
        // No stream before there is something to say.
        let Some(mut first) = self.jobs.recv().await.map(Some) else {
            return;
        };
        let mut rest = REST_MIN;
        loop {
            let ended = match self.open().await {
                Ok(open) => {
                    rest = REST_MIN;
                    self.line.is_well();
                    if self.is_down.swap(false, Ordering::AcqRel) {
                        tracing::info!(node = %self.node, "access node answers again");
                    }
                    self.drive(open, first.take()).await
                }
                Err(status) => Ended::Broken(status),
            };
            let Ended::Broken(status) = ended else {
                return;
            };
            drop(first.take());
            if !self.is_down.swap(true, Ordering::AcqRel) {
                let (code, error) = (status.code(), status.message());
                tracing::warn!(node = %self.node, ?code, error, "access node out of reach, hints are left to inboxes");
            }
            if !is_refusal(&status) {
                self.line.is_ill();
            }
            if self.refuse(rest).await.is_err() {
                return;
            }
            rest = (rest * 2).min(REST_MAX);
        }
    }

    async fn open(&self) -> Result<Open, Status> {
        let (batches, outbound) = mpsc::channel(WINDOW);
        let opened = self.line.stream(ReceiverStream::new(outbound));
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, opened).await;
        let response = opened.map_err(|_| Status::deadline_exceeded("no answer in time"))??;
        let granted = response.metadata().get(WINDOW_KEY);
        let granted = granted.and_then(|text| text.to_str().ok()?.parse().ok());
        Ok(Open {
            batches,
            answers: response.into_inner(),
            window: granted.unwrap_or(WINDOW).clamp(1, WINDOW),
            last: 0,
            unanswered: VecDeque::with_capacity(WINDOW),
        })
    }

    /// Sends and settles until the stream ends.
    async fn drive(&mut self, mut open: Open, first: Option<Job>) -> Ended {
        if let Some(job) = first
            && let Err(status) = self.send(&mut open, job)
        {
            return Ended::Broken(status);
        }
        loop {
            let due = open.unanswered.front().map(|oldest| oldest.until);
            let has_credit = open.unanswered.len() < open.window;
            let result = tokio::select! {
                biased;
                answer = open.answers.message() => match answer {
                    Ok(Some(answer)) => open.settle(answer),
                    Ok(None) => Err(Status::unavailable("the node closed the stream")),
                    Err(status) => Err(status),
                },
                job = self.jobs.recv(), if has_credit => match job {
                    Some(job) => self.send(&mut open, job),
                    None => return Ended::Abandoned,
                },
                () = until(due), if due.is_some() => {
                    Err(Status::deadline_exceeded("no answer in time"))
                }
            };
            if let Err(status) = result {
                return Ended::Broken(status);
            }
        }
    }

    /// Sends `job` together with what others have brought meanwhile.
    fn send(&mut self, open: &mut Open, job: Job) -> Result<(), Status> {
        let mut deliveries = Vec::with_capacity(job.deliveries.len());
        let mut callers = Vec::new();
        let mut bytes = 0;
        let mut next = Some(job);
        while let Some(job) = next {
            callers.push((job.deliveries.len(), job.answer));
            bytes += job
                .deliveries
                .iter()
                .map(|d| d.message.payload.len())
                .sum::<usize>();
            deliveries.extend(job.deliveries.into_iter().map(Into::into));
            let is_full = deliveries.len() >= BATCH_MAX || bytes >= BATCH_BYTES;
            next = if is_full {
                None
            } else {
                self.jobs.try_recv().ok()
            };
        }
        open.last += 1;
        let batch = DeliverBatch {
            batch: open.last,
            node: self.node.as_str().to_owned(),
            deliveries,
        };
        open.unanswered.push_back(Unanswered {
            batch: open.last,
            until: Instant::now() + ANSWER_TIMEOUT,
            callers,
        });
        let sent = open.batches.try_send(batch);
        sent.map_err(|_| Status::unavailable("the stream takes no more"))
    }

    /// Refuses what comes for a while, so that nobody waits for a node that is out of reach; an error where the
    /// lane is not needed any more.
    async fn refuse(&mut self, rest: Duration) -> Result<(), ()> {
        let rest = tokio::time::sleep(rest);
        tokio::pin!(rest);
        loop {
            tokio::select! {
                job = self.jobs.recv() => drop(job.ok_or(())?),
                () = &mut rest => return Ok(()),
            }
        }
    }
}

/// Whether the node is well and does not want to talk.
fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented
    )
}

async fn until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}

impl Open {
    fn settle(&mut self, answer: DeliverAnswer) -> Result<(), Status> {
        let expected = self.unanswered.pop_front();
        let Some(oldest) = expected.filter(|oldest| oldest.batch == answer.batch) else {
            return Err(Status::internal("an answer to another batch"));
        };
        let mut outcomes = answer.outcomes.into_iter().map(DeliveryOutcome::from);
        for (length, caller) in oldest.callers {
            // Nobody may be waiting any more.
            let _ = caller.send(outcomes.by_ref().take(length).collect());
        }
        Ok(())
    }
}
