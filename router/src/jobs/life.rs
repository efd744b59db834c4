//! What a change makes of a job. Every backend does the same; one that changes jobs where they are stored does it there.

use super::{ActionState, ClaimToken, EventName, Job, JobSettlement, JobState};
use crate::NodeId;

impl Job {
    /// It waits for another time, made so by an event or by a caller.
    pub(crate) fn wait_until(&mut self, fire_at_ms: u64, by_event: Option<EventName>) {
        self.fire_at_ms = fire_at_ms;
        self.due_ms = fire_at_ms;
        self.by_event = by_event;
    }

    pub(crate) fn end(&mut self, state: JobState, now_ms: u64) {
        self.state = state;
        self.holder = None;
        self.ended_ms = Some(now_ms);
    }

    /// Takes a job out of the dead letters.
    pub(crate) fn try_again(&mut self, now_ms: u64) {
        self.state = JobState::Retrying;
        self.due_ms = now_ms;
        self.ended_ms = None;
        self.attempts = 0;
        self.claims = 0;
        self.trials = 0;
        self.revived = self.revived.saturating_add(1);
        for action in &mut self.actions {
            if *action == ActionState::Failed {
                *action = ActionState::Waiting;
            }
        }
    }

    pub(crate) fn claim(&mut self, token: ClaimToken, holder: NodeId, until_ms: u64) {
        self.begun_before |= self.state != JobState::Pending;
        self.state = JobState::Firing;
        self.token = token;
        self.holder = Some(holder);
        self.due_ms = until_ms;
        self.claims = self.claims.saturating_add(1);
    }

    /// What does not fit the actions of the job is not taken.
    pub(crate) fn set_actions(&mut self, actions: Vec<ActionState>) {
        if actions.len() == self.actions.len() {
            self.actions = actions;
        }
    }

    /// Ends the newest claim.
    pub(crate) fn settle(&mut self, settlement: JobSettlement, now_ms: u64) {
        self.holder = None;
        match settlement {
            JobSettlement::Fired => {
                self.actions.fill(ActionState::Done);
                self.end(JobState::Fired, now_ms);
            }
            JobSettlement::Skipped => self.end(JobState::Skipped, now_ms),
            JobSettlement::Retry {
                at_ms,
                actions,
                error,
            } => {
                self.set_actions(actions);
                self.attempts = self.attempts.saturating_add(1);
                self.last_error = Some(error);
                self.trials = 0;
                self.state = JobState::Retrying;
                self.due_ms = at_ms;
            }
            JobSettlement::Failed { actions, error } => {
                self.set_actions(actions);
                self.attempts = self.attempts.saturating_add(1);
                self.last_error = Some(error);
                self.end(JobState::Failed, now_ms);
            }
            JobSettlement::PutOff {
                at_ms,
                actions,
                begun,
                reason,
            } => {
                self.set_actions(actions);
                self.claims = self.claims.saturating_sub(1);
                if begun {
                    self.trials = 0;
                }
                self.last_error = Some(reason);
                self.state = match begun || self.begun_before {
                    true => JobState::Retrying,
                    false => JobState::Pending,
                };
                self.due_ms = at_ms;
            }
        }
    }
}
