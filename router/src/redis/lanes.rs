//! Order: a write takes its place when it is called.
//!
//! Calls that have to stay in order among each other carry the same name, mostly a client's id, which decides on one of
//! several lanes. A lane gathers what was called while its last pipeline was on its way and sends that as the next
//! one: the busier it is, the more it sends at once.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use redis::Value;
use tokio::sync::{Notify, oneshot};

use super::flight::{Servers, Way};
use super::script::Call;
use crate::{Fence, StoreError};

const LANES: usize = 8;
const BATCH_CALLS: usize = 512;
const BATCH_BYTES: usize = 1 << 20;
/// What one lane may hold; beyond it calls are refused.
const QUEUE_BYTES: usize = 32 << 20;
const FLUSH_POLL: Duration = Duration::from_millis(2);

type Answer = oneshot::Sender<Result<Value, StoreError>>;

struct Queued {
    /// Of the name.
    order: u64,
    call: Call,
    cost: usize,
    fence: Option<Fence>,
    answer: Option<Answer>,
}

#[derive(Default)]
struct Queue {
    calls: VecDeque<Queued>,
    bytes: usize,
    /// A pipeline is on its way.
    busy: bool,
    closed: bool,
}

#[derive(Default)]
struct Lane {
    queue: Mutex<Queue>,
    wake: Notify,
}

/// The lanes of one link. Their tasks end when it is dropped, after what was called has been sent.
pub(super) struct Lanes {
    lanes: Vec<Arc<Lane>>,
    hasher: RandomState,
}

impl Lanes {
    pub(super) fn start(servers: &Arc<Servers>) -> Self {
        let start = |_| {
            let lane = Arc::<Lane>::default();
            tokio::spawn(run(lane.clone(), servers.clone()));
            lane
        };
        Self {
            lanes: (0..LANES).map(start).collect(),
            hasher: RandomState::new(),
        }
    }

    /// Puts a call behind every earlier one of the same name.
    pub(super) fn push(
        &self,
        name: &str,
        call: Call,
        fence: Option<&Fence>,
        answer: Option<Answer>,
    ) -> Result<(), StoreError> {
        let order = self.hasher.hash_one(name);
        let lane = &self.lanes[usize::try_from(order % LANES as u64).unwrap_or(0)];
        let cost = call.cost();
        {
            let mut queue = lane.queue.lock();
            if queue.bytes + cost > QUEUE_BYTES && !queue.calls.is_empty() {
                let overloaded = "too much waits for redis already";
                return Err(StoreError::Unavailable(overloaded.to_owned()));
            }
            queue.bytes += cost;
            queue.calls.push_back(Queued {
                order,
                call,
                cost,
                fence: fence.cloned(),
                answer,
            });
        }
        lane.wake.notify_one();
        Ok(())
    }

    /// As [`Self::push`], with a future that resolves with the answer. The call is made whether it is polled or not.
    pub(super) fn submit(
        &self,
        name: &str,
        call: Call,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<Value, StoreError>> {
        let (answer, answered) = oneshot::channel();
        let pushed = self.push(name, call, fence, Some(answer));
        if let (Some(fence), Err(error)) = (fence, &pushed) {
            fence.refused(error);
        }
        async move {
            pushed?;
            let ended = |_| {
                Err(StoreError::Unavailable(
                    "the link to redis has ended".into(),
                ))
            };
            answered.await.unwrap_or_else(ended)
        }
        .boxed()
    }
}

impl Lanes {
    /// Waits until nothing that was called is on its way any more.
    pub(super) async fn flush(&self) {
        let idle = |lane: &Arc<Lane>| {
            let queue = lane.queue.lock();
            queue.calls.is_empty() && !queue.busy
        };
        while !self.lanes.iter().all(idle) {
            tokio::time::sleep(FLUSH_POLL).await;
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.queue.lock().closed = true;
            lane.wake.notify_one();
        }
    }
}

/// Takes what goes out next. Of the calls behind one fence only the first: whether the next may be made depends on what
/// becomes of it, and with it wait all later ones of the same name.
fn gather(queue: &mut Queue) -> Vec<Queued> {
    let mut taken = Vec::new();
    let mut bytes = 0;
    let mut fenced = HashSet::new();
    let mut held_back = HashSet::new();
    let mut stay = VecDeque::new();
    while let Some(queued) = queue.calls.pop_front() {
        let waits = held_back.contains(&queued.order)
            || (queued.fence.is_some() && !fenced.insert(queued.order));
        if waits {
            held_back.insert(queued.order);
            stay.push_back(queued);
            continue;
        }
        bytes += queued.cost;
        queue.bytes -= queued.cost;
        taken.push(queued);
        if taken.len() == BATCH_CALLS || bytes > BATCH_BYTES || stay.len() == BATCH_CALLS {
            break;
        }
    }
    while let Some(queued) = stay.pop_back() {
        queue.calls.push_front(queued);
    }
    taken
}

async fn run(lane: Arc<Lane>, servers: Arc<Servers>) {
    loop {
        let (batch, closed) = {
            let mut queue = lane.queue.lock();
            let batch = gather(&mut queue);
            queue.busy = !batch.is_empty();
            (batch, queue.closed)
        };
        if batch.is_empty() {
            if closed {
                return;
            }
            lane.wake.notified().await;
            continue;
        }
        let mut calls = Vec::with_capacity(batch.len());
        let mut waiting = Vec::with_capacity(batch.len());
        for queued in batch {
            match queued.fence.as_ref().map_or(Ok(()), Fence::check) {
                Ok(()) => {
                    calls.push(queued.call);
                    waiting.push((queued.answer, queued.fence));
                }
                Err(refused) => tell(queued.answer, queued.fence, Err(refused)),
            }
        }
        if calls.is_empty() {
            continue;
        }
        let answers = Box::pin(servers.fly(Way::Write, &calls)).await;
        for ((answer, fence), outcome) in waiting.into_iter().zip(answers) {
            tell(answer, fence, outcome);
        }
    }
}

fn tell(answer: Option<Answer>, fence: Option<Fence>, outcome: Result<Value, StoreError>) {
    if let (Some(fence), Err(error)) = (&fence, &outcome) {
        fence.refused(error);
    }
    match answer {
        // The caller may have gone: what was done stands anyway.
        Some(answer) => drop(answer.send(outcome)),
        None => {
            if let Err(error) = outcome {
                tracing::debug!(%error, "a note to redis may be lost");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued(order: u64, name: &str, fence: Option<&Fence>) -> Queued {
        Queued {
            order,
            call: Call::command("GET", name),
            cost: 10,
            fence: fence.cloned(),
            answer: None,
        }
    }

    fn names(batch: &[Queued]) -> Vec<String> {
        let name = |queued: &Queued| match queued.call.cmd.args_iter().nth(1) {
            Some(redis::Arg::Simple(name)) => String::from_utf8(name.to_vec()).unwrap(),
            _ => unreachable!("every call has a key"),
        };
        batch.iter().map(name).collect()
    }

    #[test]
    fn calls_behind_one_fence_go_out_one_after_the_other_and_hold_up_nobody_else() {
        let fence = Fence::new(false);
        let mut queue = Queue {
            bytes: 60,
            ..Queue::default()
        };
        for (order, name, fenced) in [
            (1, "a1", true),
            (2, "b1", false),
            (1, "a2", true),
            (1, "a3", false),
            (2, "b2", false),
            (1, "a4", true),
        ] {
            queue
                .calls
                .push_back(queued(order, name, fenced.then_some(&fence)));
        }
        assert_eq!(names(&gather(&mut queue)), ["a1", "b1", "b2"]);
        assert_eq!(names(&gather(&mut queue)), ["a2", "a3"]);
        assert_eq!(names(&gather(&mut queue)), ["a4"]);
        assert_eq!(queue.bytes, 0);
        assert!(gather(&mut queue).is_empty());
    }

    #[test]
    fn a_batch_is_bounded() {
        let mut queue = Queue::default();
        for n in 0..BATCH_CALLS as u64 + 3 {
            queue.bytes += 10;
            queue.calls.push_back(queued(n, "x", None));
        }
        assert_eq!(gather(&mut queue).len(), BATCH_CALLS);
        assert_eq!(gather(&mut queue).len(), 3);
    }
}
