//! A job as it is kept.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::EventName;
use crate::ids::InvalidId;
use crate::{ClientId, NodeId};

/// Names a job: given by its creator or made here. 1 to 200 bytes of UTF-8 without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Arc<str>);

impl JobId {
    /// The longest id, in bytes.
    pub const BYTES_MAX: usize = 200;

    /// A new id, unique and ordered by time.
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().hyphenated().to_string().into())
    }

    /// Checks `text` as a job id.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let problem = match text {
            "" => "must not be empty",
            _ if text.len() > Self::BYTES_MAX => "must not be longer than 200 bytes",
            _ if text.chars().any(char::is_control) => "must not contain control characters",
            _ => return Ok(Self(text.into())),
        };
        Err(InvalidId::of("job id", problem))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who does what an action says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActionKind {
    /// The push service: `spec` is a push.
    Push,
    /// A backend, by HTTP.
    Webhook,
    /// An AMQP exchange.
    Amqp,
    /// Whoever subscribed: an MQTT publication of a device (`$delay/…`).
    Publish,
}

/// One thing that a job does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobAction {
    /// Who does it.
    pub kind: ActionKind,
    /// What, in the words of whoever does it (JSON). Not read here.
    pub spec: Bytes,
}

/// How often and when a failed attempt is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, the first included.
    pub attempts_max: u32,
    /// Before the second attempt, milliseconds; twice as long before each further one.
    pub first_ms: u64,
    /// Never longer than this, milliseconds.
    pub max_ms: u64,
}

/// What a job does when it is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobPlan {
    /// In this order.
    pub actions: Vec<JobAction>,
    /// Who is asked before, whether there is anything to do (JSON). Not read here.
    pub check: Option<Bytes>,
    /// Who hears of the end (JSON). Not read here.
    pub notify: Option<Bytes>,
    /// How often it is tried.
    pub retry: RetryPolicy,
}

impl JobPlan {
    /// About how much of it is stored, in bytes.
    pub fn bytes(&self) -> usize {
        let actions = self.actions.iter().map(|action| action.spec.len() + 8);
        let check = self.check.as_ref().map_or(0, Bytes::len);
        actions.sum::<usize>() + check + self.notify.as_ref().map_or(0, Bytes::len)
    }
}

/// How far one action of a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActionState {
    /// Still to be done.
    Waiting,
    /// Done: not to be done again.
    Done,
    /// Given up.
    Failed,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum JobState {
    /// It waits for its time.
    Pending,
    /// It has begun: somebody carries it out, or did and died.
    Firing,
    /// It has begun, and waits for another attempt.
    Retrying,
    /// It ended: everything was done.
    Fired,
    /// It ended: its check said that there was nothing to do.
    Skipped,
    /// It ended before it began.
    Cancelled,
    /// It ended: given up, and kept as a dead letter.
    Failed,
}

impl JobState {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Firing,
        Self::Retrying,
        Self::Fired,
        Self::Skipped,
        Self::Cancelled,
        Self::Failed,
    ];

    /// Whether nothing more happens to the job by itself.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Fired | Self::Skipped | Self::Cancelled | Self::Failed
        )
    }

    /// Its name, as callers read and write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Firing => "firing",
            Self::Retrying => "retrying",
            Self::Fired => "fired",
            Self::Skipped => "skipped",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// The state of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A fencing token: each claim of a job has a higher one than any before, also than those of an earlier job of
/// the same id. Whatever carries an older one is refused. Zero is the token of no claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ClaimToken(pub u64);

/// A job to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewJob {
    /// Its name.
    pub id: JobId,
    /// Now, Unix milliseconds.
    pub created_ms: u64,
    /// When it is due, Unix milliseconds. In the past is due at once.
    pub fire_at_ms: u64,
    /// What it does.
    pub plan: JobPlan,
    /// The events that cancel it.
    pub cancel_on: Vec<EventName>,
    /// The events that make it due.
    pub trigger_on: Vec<EventName>,
    /// Of the whole request, so that a repetition is told from another job of the same id. The time by which a relative delay ends
    /// is not part of it.
    pub fingerprint: u64,
    /// The device that asked for it itself: it may have [`super::JobLimits::device_jobs_max`].
    pub device: Option<ClientId>,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// Unix milliseconds.
    pub created_ms: u64,
    /// When it is, or was, due: as created, patched or triggered. Unix milliseconds.
    pub fire_at_ms: u64,
    /// What it does.
    pub plan: JobPlan,
    /// The events that cancel it.
    pub cancel_on: Vec<EventName>,
    /// The events that make it due.
    pub trigger_on: Vec<EventName>,
    /// Of the request that created it.
    pub fingerprint: u64,
    /// The device that asked for it itself.
    pub device: Option<ClientId>,
    /// Where it stands.
    pub state: JobState,
    /// The state of each action, in their order.
    pub actions: Vec<ActionState>,
    /// When it may be claimed: [`Self::fire_at_ms`] while it waits, or later where it was put off, the end of the lease while it is
    /// `firing`, the next attempt while it is `retrying`. Of no meaning once it ended.
    pub due_ms: u64,
    /// Attempts that were settled as failed, since it was created or taken out of the dead letters.
    pub attempts: u32,
    /// How often it was claimed in that time. One that is claimed much more often than it is settled may take whoever carries it out
    /// down with it, or has bad luck: a claim whose answer was lost, or whose process was killed for another reason, counts too.
    pub claims: u32,
    /// How often it was begun as a trial since whoever began it last settled it: such a claim is noted before anything is done, so that it
    /// tells the one from the other.
    pub trials: u32,
    /// How often it was taken out of the dead letters.
    pub revived: u32,
    /// A claim before the newest one may have begun it: it never waits again, and so is not cancelled any more.
    pub begun_before: bool,
    /// Of the newest claim.
    pub token: ClaimToken,
    /// Who has the newest claim, while it is `firing`.
    pub holder: Option<NodeId>,
    /// Why the last attempt failed, or why it was put off, for a person.
    pub last_error: Option<String>,
    /// The event that cancelled or triggered it.
    pub by_event: Option<EventName>,
    /// When it ended, Unix milliseconds.
    pub ended_ms: Option<u64>,
}

impl Job {
    /// The job that `new` asks for, waiting.
    pub fn waiting(new: NewJob) -> Self {
        Self {
            state: JobState::Pending,
            actions: vec![ActionState::Waiting; new.plan.actions.len()],
            due_ms: new.fire_at_ms,
            attempts: 0,
            claims: 0,
            trials: 0,
            revived: 0,
            begun_before: false,
            token: ClaimToken::default(),
            holder: None,
            last_error: None,
            by_event: None,
            ended_ms: None,
            id: new.id,
            created_ms: new.created_ms,
            fire_at_ms: new.fire_at_ms,
            plan: new.plan,
            cancel_on: new.cancel_on,
            trigger_on: new.trigger_on,
            fingerprint: new.fingerprint,
            device: new.device,
        }
    }

    /// The time by which it is listed, Unix milliseconds: when it may be claimed, or when it ended.
    pub fn at_ms(&self) -> u64 {
        self.ended_ms.unwrap_or(self.due_ms)
    }

    /// Whether `event` would do something to it.
    pub fn names(&self, event: &EventName) -> bool {
        self.cancel_on.contains(event) || self.trigger_on.contains(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_is_printable_text_of_a_bounded_length() {
        for good in ["a", "order-123", "Bestellung №7 – größer", &"é".repeat(100)] {
            assert_eq!(JobId::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "a\0b", "a\nb", "\u{7f}", "\u{85}", &"x".repeat(201)] {
            assert!(JobId::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn states_are_known_by_name() {
        for state in JobState::ALL {
            assert_eq!(JobState::parse(state.as_str()), Some(state));
        }
        assert_eq!(JobState::parse("lost"), None);
    }
}
