//! Delayed jobs against a reference that is simple enough to be right: a map, a list of events, and a time that is a number.
//!
//! Any store can be run against it. Each step is done to both; their answers have to be alike, and in the end the same jobs must have fired,
//! none of them early, none after it was cancelled.

mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::SignedDuration;
use moorline_router::contract::jobs::{JobsBackend, id, job, name, plan};
use moorline_router::{
    ActionState, ClaimToken, EventKind, Job, JobChange, JobCounts, JobCreated, JobEvent, JobFilter,
    JobLimits, JobPatch, JobSettlement, JobState, Jobs, MessageId, NewJob, NodeId, Settled,
};

use steps::How;
pub(crate) use steps::{Step, steps};

const BEGINNING: u64 = 1_800_000_000_000;
const LEASE: u64 = 500;
const WINDOW: u64 = 1_000;
const RETENTION: u64 = 2_000;
const FAILED_RETENTION: u64 = 4_000;
/// Ids of jobs.
const IDS: usize = 6;
const NAMES: usize = 3;

/// A job of the reference.
#[derive(Debug, Clone, PartialEq)]
struct Known {
    created_ms: u64,
    fire_at_ms: u64,
    due_ms: u64,
    state: JobState,
    plan: String,
    fingerprint: u64,
    cancel_on: Vec<usize>,
    trigger_on: Vec<usize>,
    attempts: u32,
    claims: u32,
    begun_before: bool,
    token: ClaimToken,
    ended_ms: Option<u64>,
    by_event: Option<usize>,
    action: ActionState,
}

impl Known {
    fn end(&mut self, state: JobState, now_ms: u64) {
        self.state = state;
        self.ended_ms = Some(now_ms);
    }

    fn wait_until(&mut self, fire_at_ms: u64, by_event: Option<usize>) {
        self.fire_at_ms = fire_at_ms;
        self.due_ms = fire_at_ms;
        self.by_event = by_event;
    }
}

struct Happened {
    event: JobEvent,
    name: usize,
    outcome: (u64, u64),
}

/// One run: the store, the reference, and what both have seen.
struct Run<'r> {
    backend: &'r mut dyn JobsBackend,
    jobs: Arc<dyn Jobs>,
    now_ms: u64,
    known: BTreeMap<usize, Known>,
    events: Vec<Happened>,
    claims: Vec<Job>,
    /// So many of the claims were made by a process that died since.
    of_the_dead: usize,
    tokens: BTreeMap<usize, ClaimToken>,
    fired: BTreeSet<(String, ClaimToken)>,
    expected_fired: BTreeSet<(String, ClaimToken)>,
}

fn text(number: usize) -> String {
    // Beside each other in every order, and not only letters.
    ["a", "a ", "ab", "b:1", "№", "a*"][number].into()
}

fn number(job: &Job) -> usize {
    (0..IDS)
        .find(|number| text(*number) == job.id.as_str())
        .unwrap()
}

fn event_name(number: usize) -> String {
    format!("t:{}", ["1", "10", "1 "][number])
}

/// Runs the steps on a new store and on the reference.
pub(crate) async fn run(backend: &mut dyn JobsBackend, steps: Vec<Step>) {
    let ms = |ms: u64| SignedDuration::from_millis(ms as i64);
    let limits = JobLimits {
        retention: ms(RETENTION),
        failed_retention: ms(FAILED_RETENTION),
        event_window: ms(WINDOW),
        ..JobLimits::default()
    };
    let jobs = backend.start(limits).await;
    let mut run = Run {
        backend,
        jobs,
        now_ms: BEGINNING,
        known: BTreeMap::new(),
        events: Vec::new(),
        claims: Vec::new(),
        of_the_dead: 0,
        tokens: BTreeMap::new(),
        fired: BTreeSet::new(),
        expected_fired: BTreeSet::new(),
    };
    for step in steps {
        run.step(step).await;
        run.compare().await;
    }
    run.let_everything_fire().await;
    assert_eq!(run.fired, run.expected_fired);
}

impl Run<'_> {
    async fn step(&mut self, step: Step) {
        match step {
            Step::Create { .. } => self.create(step).await,
            Step::Patch {
                job,
                delay_ms,
                plan: number,
            } => {
                let (now_ms, spec) = (self.now_ms, number.map(|number| number.to_string()));
                let patch = JobPatch {
                    fire_at_ms: delay_ms.map(|delay_ms| now_ms + delay_ms),
                    plan: spec.as_deref().map(plan),
                    ..JobPatch::default()
                };
                let answer = self.jobs.patch(&id(&text(job)), patch).await.unwrap();
                self.change(job, JobState::Pending, answer, |known| {
                    if let Some(delay_ms) = delay_ms {
                        known.wait_until(now_ms + delay_ms, None);
                    }
                    known.plan = spec.unwrap_or_else(|| known.plan.clone());
                });
            }
            Step::Cancel(job) => {
                let now_ms = self.now_ms;
                let answer = self.jobs.cancel(&id(&text(job)), now_ms).await.unwrap();
                let is_done = self
                    .known
                    .get(&job)
                    .is_some_and(|known| known.state == JobState::Cancelled);
                match is_done {
                    true => assert!(matches!(answer, JobChange::Changed(_))),
                    false => self.change(job, JobState::Pending, answer, |known| {
                        known.end(JobState::Cancelled, now_ms);
                    }),
                }
            }
            Step::Trigger(job) => {
                let now_ms = self.now_ms;
                let answer = self.jobs.trigger(&id(&text(job)), now_ms).await.unwrap();
                self.change(job, JobState::Pending, answer, |known| {
                    known.wait_until(known.fire_at_ms.min(now_ms), None);
                });
            }
            Step::RetryFailed(job) => {
                let now_ms = self.now_ms;
                let answer = self.jobs.retry_failed(&id(&text(job)), now_ms).await;
                self.change(job, JobState::Failed, answer.unwrap(), |known| {
                    known.state = JobState::Retrying;
                    known.due_ms = now_ms;
                    known.ended_ms = None;
                    (known.attempts, known.claims) = (0, 0);
                    known.action = ActionState::Waiting;
                });
            }
            Step::Event {
                name,
                kind,
                is_repeated,
            } => self.event(name, kind, is_repeated).await,
            Step::Pass(ms) => self.now_ms += ms,
            Step::Claim => self.claim().await,
            Step::Settle { claim, how } => self.settle(claim, how).await,
            Step::Extend { claim, by_ms } => self.extend(claim, by_ms).await,
            Step::Sweep => self.sweep().await,
            Step::Crash => {
                self.jobs = self.backend.crash().await;
                // A store may end the leases of a process that died sooner, or leave them as they are.
                self.now_ms += LEASE + 10_000;
                self.of_the_dead = self.claims.len();
            }
        }
    }

    /// Compares the answer to a change of a job that is in state `from`, and makes the same change here.
    fn change(
        &mut self,
        job: usize,
        from: JobState,
        answer: JobChange,
        change: impl FnOnce(&mut Known),
    ) {
        match (self.known.get_mut(&job), answer) {
            (None, JobChange::NotFound) => {}
            (Some(known), JobChange::Refused(job)) if known.state != from => {
                assert_eq!(job.state, known.state);
            }
            (Some(known), JobChange::Changed(job)) if known.state == from => {
                change(known);
                assert_eq!(job.state, known.state);
            }
            (known, answer) => panic!("{answer:?} for {known:?}"),
        }
    }

    async fn create(&mut self, step: Step) {
        let Step::Create {
            job: number,
            delay_ms,
            cancel_on,
            trigger_on,
            fingerprint,
        } = step
        else {
            return;
        };
        let names = |numbers: &[usize]| {
            let names = numbers.iter().map(|number| name(&event_name(*number)));
            names.collect()
        };
        let fire_at_ms = self.now_ms + delay_ms;
        let new = NewJob {
            created_ms: self.now_ms,
            cancel_on: names(&cancel_on),
            trigger_on: names(&trigger_on),
            fingerprint,
            ..job(&text(number), fire_at_ms)
        };
        let answer = self.jobs.create(new).await.unwrap();
        match (self.known.get(&number), answer) {
            (Some(known), JobCreated::Same(_)) => assert_eq!(known.fingerprint, fingerprint),
            (Some(known), JobCreated::Conflict(_)) => assert_ne!(known.fingerprint, fingerprint),
            (None, JobCreated::Created(_)) => {
                let mut known = Known {
                    created_ms: self.now_ms,
                    fire_at_ms,
                    due_ms: fire_at_ms,
                    state: JobState::Pending,
                    plan: "{}".into(),
                    fingerprint,
                    cancel_on,
                    trigger_on,
                    attempts: 0,
                    claims: 0,
                    begun_before: false,
                    token: ClaimToken::default(),
                    ended_ms: None,
                    by_event: None,
                    action: ActionState::Waiting,
                };
                let recent = |name: &&usize| {
                    self.events.iter().any(|happened| {
                        happened.name == **name
                            && happened.event.kind == EventKind::Happened
                            && self.now_ms <= happened.event.at_ms + WINDOW
                    })
                };
                if let Some(name) = known.cancel_on.iter().find(recent) {
                    known.by_event = Some(*name);
                    known.end(JobState::Cancelled, self.now_ms);
                } else if let Some(name) = known.trigger_on.iter().find(recent) {
                    known.wait_until(self.now_ms, Some(*name));
                }
                self.known.insert(number, known);
            }
            (known, answer) => panic!("{answer:?} for {known:?}"),
        }
    }

    async fn event(&mut self, number: usize, kind: EventKind, is_repeated: bool) {
        let before = self
            .events
            .iter()
            .rev()
            .filter(|happened| happened.name == number)
            // What was swept is another event when it comes again.
            .find(|happened| self.now_ms <= happened.event.at_ms + WINDOW);
        if let Some(before) = before.filter(|_| is_repeated) {
            let again = JobEvent {
                at_ms: self.now_ms,
                ..before.event.clone()
            };
            let outcome = self.jobs.event(&again).await.unwrap();
            assert_eq!((outcome.cancelled, outcome.triggered), before.outcome);
            return;
        }
        let event = JobEvent {
            id: MessageId::generate(),
            name: name(&event_name(number)),
            kind,
            at_ms: self.now_ms,
        };
        let mut expected = (0, 0);
        for known in self.known.values_mut() {
            if known.state != JobState::Pending {
                continue;
            }
            if known.cancel_on.contains(&number) {
                known.by_event = Some(number);
                known.end(JobState::Cancelled, self.now_ms);
                expected.0 += 1;
            } else if kind == EventKind::Happened
                && known.trigger_on.contains(&number)
                && known.fire_at_ms > self.now_ms
                && known.by_event != Some(number)
            {
                known.wait_until(self.now_ms, Some(number));
                expected.1 += 1;
            }
        }
        let outcome = self.jobs.event(&event).await.unwrap();
        assert_eq!((outcome.cancelled, outcome.triggered), expected);
        self.events.push(Happened {
            event,
            name: number,
            outcome: expected,
        });
    }

    async fn claim(&mut self) {
        let mut claimed = BTreeMap::new();
        let mut next_due_ms: Option<u64> = None;
        for shard in 0..self.jobs.shards() {
            let holder = NodeId::from_text("queue");
            loop {
                let got = self
                    .jobs
                    .claim(shard, &holder, self.now_ms, 3, LEASE)
                    .await
                    .unwrap();
                let is_last = got.next_due_ms.is_none_or(|next| next > self.now_ms);
                for job in got.jobs {
                    let twice = claimed.insert(number(&job), job);
                    assert!(twice.is_none(), "claimed twice: {twice:?}");
                }
                if is_last {
                    next_due_ms = [next_due_ms, got.next_due_ms].into_iter().flatten().min();
                    break;
                }
            }
        }
        for (number, known) in &mut self.known {
            let is_due = !known.state.is_final() && known.due_ms <= self.now_ms;
            assert_eq!(
                claimed.contains_key(number),
                is_due,
                "{:?} at {}: {known:?}",
                text(*number),
                self.now_ms
            );
            if let Some(job) = claimed.get(number) {
                let newest = self.tokens.insert(*number, job.token);
                assert!(newest.is_none_or(|newest| newest < job.token));
                known.begun_before |= known.state != JobState::Pending;
                known.state = JobState::Firing;
                known.token = job.token;
                known.claims += 1;
                known.due_ms = self.now_ms + LEASE;
            }
        }
        assert!(claimed.keys().all(|number| self.known.contains_key(number)));
        let open = self.known.values().filter(|known| !known.state.is_final());
        assert_eq!(next_due_ms, open.map(|known| known.due_ms).min());
        self.claims.extend(claimed.into_values());
    }

    /// One of the newest claims; of more, those before the last ones are old.
    fn held(&self, claim: usize) -> Option<Job> {
        let newest = self.claims.len().checked_sub(1 + claim)?;
        self.claims.get(newest).cloned()
    }

    async fn settle(&mut self, claim: usize, how: How) {
        let Some(job) = self.held(claim) else {
            return;
        };
        let settlement = match how {
            How::Fired => JobSettlement::Fired,
            How::Skipped => JobSettlement::Skipped,
            How::Failed => JobSettlement::Failed {
                actions: vec![ActionState::Failed],
                error: "no".into(),
            },
            How::Retry(in_ms) => JobSettlement::Retry {
                at_ms: self.now_ms + in_ms,
                actions: vec![ActionState::Waiting],
                error: "not yet".into(),
            },
            How::PutOff(in_ms, begun) => JobSettlement::PutOff {
                at_ms: self.now_ms + in_ms,
                actions: vec![ActionState::Waiting],
                begun,
                reason: "busy".into(),
            },
        };
        let settled = self
            .jobs
            .settle(&job.id, job.token, settlement, self.now_ms)
            .await
            .unwrap();
        let known = self.known.get_mut(&number(&job));
        let Some(known) = known.filter(|known| known.token == job.token) else {
            assert_eq!(settled, Settled::Stale);
            return;
        };
        assert_eq!(settled, Settled::Done);
        if known.state != JobState::Firing {
            return;
        }
        let now_ms = self.now_ms;
        match how {
            How::Fired => {
                known.end(JobState::Fired, now_ms);
                known.action = ActionState::Done;
                self.expected_fired
                    .insert((job.id.as_str().into(), job.token));
            }
            How::Skipped => known.end(JobState::Skipped, now_ms),
            How::Failed => {
                known.end(JobState::Failed, now_ms);
                known.attempts += 1;
                known.action = ActionState::Failed;
            }
            How::Retry(in_ms) => {
                known.state = JobState::Retrying;
                known.attempts += 1;
                known.due_ms = now_ms + in_ms;
                known.action = ActionState::Waiting;
            }
            How::PutOff(in_ms, begun) => {
                known.claims -= 1;
                known.state = match begun || known.begun_before {
                    true => JobState::Retrying,
                    false => JobState::Pending,
                };
                known.due_ms = now_ms + in_ms;
                known.action = ActionState::Waiting;
            }
        }
    }

    async fn extend(&mut self, claim: usize, by_ms: u64) {
        // Whoever is dead extends nothing.
        if self.claims.len() <= self.of_the_dead + claim {
            return;
        }
        let Some(job) = self.held(claim) else {
            return;
        };
        let until_ms = self.now_ms + by_ms;
        let actions = vec![ActionState::Done];
        let extended = self
            .jobs
            .extend(&job.id, job.token, until_ms, actions, false);
        let extended = extended.await.unwrap();
        let known = self.known.get_mut(&number(&job));
        let known =
            known.filter(|known| known.token == job.token && known.state == JobState::Firing);
        match known {
            None => assert_eq!(extended, Settled::Stale),
            Some(known) => {
                assert_eq!(extended, Settled::Done);
                known.due_ms = known.due_ms.max(until_ms);
                known.action = ActionState::Done;
            }
        }
    }

    async fn sweep(&mut self) {
        let mut swept = 0;
        for shard in 0..self.jobs.shards() {
            swept += self
                .jobs
                .sweep(shard, self.now_ms, 1_000)
                .await
                .unwrap()
                .jobs;
        }
        let before = self.known.len() as u64;
        let now_ms = self.now_ms;
        self.known.retain(|_, known| {
            let kept_ms = match known.state {
                JobState::Failed => FAILED_RETENTION,
                _ => RETENTION,
            };
            known.ended_ms.is_none_or(|ended| ended + kept_ms > now_ms)
        });
        assert_eq!(swept, before - self.known.len() as u64);
    }

    /// What is kept of every job, what is counted and what is listed has to be what is known here.
    async fn compare(&mut self) {
        let mut counts = JobCounts::default();
        for number in 0..IDS {
            let kept = self.jobs.get(&id(&text(number))).await.unwrap();
            let kept = kept.map(|job| Known {
                created_ms: job.created_ms,
                fire_at_ms: job.fire_at_ms,
                due_ms: job.due_ms,
                state: job.state,
                plan: String::from_utf8(job.plan.actions[0].spec.to_vec()).unwrap(),
                fingerprint: job.fingerprint,
                cancel_on: numbers(&job.cancel_on),
                trigger_on: numbers(&job.trigger_on),
                attempts: job.attempts,
                claims: job.claims,
                begun_before: job.begun_before,
                token: job.token,
                ended_ms: job.ended_ms,
                by_event: job.by_event.map(|name| numbers(&[name])[0]),
                action: job.actions[0],
            });
            let mut known = self.known.get(&number).cloned();
            // Of no meaning once it ended.
            if let (Some(known), Some(kept)) = (&mut known, &kept)
                && known.state.is_final()
            {
                known.due_ms = kept.due_ms;
            }
            assert_eq!(kept, known, "{:?}", text(number));
            if let Some(known) = known {
                *counts.of(known.state) += 1;
            }
        }
        assert_eq!(self.jobs.counts().await.unwrap(), counts);
        let listed = self.jobs.list(&JobFilter::default(), None, 100).await;
        assert_eq!(listed.unwrap().jobs.len(), self.known.len());
        for job in self
            .known
            .iter()
            .filter(|(_, known)| known.state == JobState::Fired)
        {
            self.fired.insert((text(*job.0), job.1.token));
        }
    }

    /// Time passes until nothing waits any more.
    async fn let_everything_fire(&mut self) {
        while self.known.values().any(|known| !known.state.is_final()) {
            self.now_ms += 1_000;
            let before = self.claims.len();
            self.claim().await;
            for claim in 0..self.claims.len() - before {
                self.settle(claim, How::Fired).await;
            }
            self.compare().await;
        }
    }
}

fn numbers(names: &[moorline_router::EventName]) -> Vec<usize> {
    let number = |name: &moorline_router::EventName| {
        (0..NAMES)
            .find(|number| event_name(*number) == name.as_str())
            .unwrap()
    };
    names.iter().map(number).collect()
}
