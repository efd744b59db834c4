//! Delayed jobs as they are stored in Redis, and what the functions of `lua/job*.lua` answer.
//!
//! What was asked for is one value, the *body*: a length, so many bytes that never change, and the plan, which a patch
//! replaces without reading the rest. What changes is kept by the functions themselves.

use redis::Value;

use super::reply::parse;
use crate::record::{RecordReader, RecordWriter, job as record};
use crate::{
    ActionState, ClaimToken, ClientId, EventName, Job, JobId, JobPlan, JobState, NewJob, NodeId,
    StoreError,
};

/// Fields that later versions add go behind these.
const VERSION: u8 = 1;

/// How a state is written.
pub(super) fn letter(state: JobState) -> &'static str {
    match state {
        JobState::Pending => "p",
        JobState::Firing => "c",
        JobState::Retrying => "r",
        JobState::Fired => "f",
        JobState::Failed => "d",
        JobState::Cancelled => "x",
        JobState::Skipped => "s",
    }
}

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(what.to_owned())
}

fn read_state(text: &str) -> Result<JobState, StoreError> {
    let found = JobState::ALL
        .into_iter()
        .find(|state| letter(*state) == text);
    found.ok_or_else(|| damaged("a job in an impossible state"))
}

/// How the states of actions are written: a letter for each.
pub(super) fn write_actions(actions: &[ActionState]) -> String {
    let letter = |action: &ActionState| match action {
        ActionState::Waiting => 'w',
        ActionState::Done => 'd',
        ActionState::Failed => 'f',
    };
    actions.iter().map(letter).collect()
}

fn read_actions(text: &str) -> Result<Vec<ActionState>, StoreError> {
    let read = |letter| match letter {
        'w' => Ok(ActionState::Waiting),
        'd' => Ok(ActionState::Done),
        'f' => Ok(ActionState::Failed),
        _ => Err(damaged("an action in an impossible state")),
    };
    text.chars().map(read).collect()
}

/// As many actions as `plan` has, all of them waiting.
pub(super) fn waiting(plan: &JobPlan) -> String {
    "w".repeat(plan.actions.len())
}

/// The part of a body that a patch replaces.
pub(super) fn write_plan(id: &JobId, plan: &JobPlan) -> Vec<u8> {
    let mut writer = RecordWriter::new(VERSION, plan.bytes() + 48);
    record::write_plan(&mut writer, plan);
    writer.seal(id.as_str().as_bytes())
}

/// What was asked for. The time of its creation is the first field: scripts read it there.
pub(super) fn write_body(job: &NewJob) -> Vec<u8> {
    let mut writer = RecordWriter::new(VERSION, 64);
    writer.u64(job.created_ms).u64(job.fingerprint);
    record::write_names(&mut writer, &job.cancel_on);
    record::write_names(&mut writer, &job.trigger_on);
    let fixed = writer.seal(job.id.as_str().as_bytes());
    let length = u32::try_from(fixed.len()).expect("names are far below 4 GiB");
    let mut body = length.to_be_bytes().to_vec();
    body.extend_from_slice(&fixed);
    body.extend_from_slice(&write_plan(&job.id, &job.plan));
    body
}

fn read_body(id: JobId, body: &[u8]) -> Result<NewJob, StoreError> {
    let cut = || damaged("the body of a job cut short");
    let (length, rest) = body.split_first_chunk::<4>().ok_or_else(cut)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| cut())?;
    let (fixed, plan) = rest.split_at_checked(length).ok_or_else(cut)?;
    let key = id.as_str().as_bytes();
    let mut fixed = RecordReader::open(key, fixed, VERSION)?;
    let mut plan = RecordReader::open(key, plan, VERSION)?;
    Ok(NewJob {
        created_ms: fixed.u64()?,
        fingerprint: fixed.u64()?,
        cancel_on: record::read_names(&mut fixed)?,
        trigger_on: record::read_names(&mut fixed)?,
        plan: record::read_plan(&mut plan)?,
        fire_at_ms: 0,
        device: None,
        id: id.clone(),
    })
}

/// A job as a function tells it, not yet read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) id: JobId,
    /// Under which its names are registered.
    pub(super) token: String,
    pub(super) fence: ClaimToken,
    fields: Fields,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fields {
    state: String,
    at_ms: u64,
    due_ms: u64,
    claims: u32,
    attempts: u32,
    begun: u8,
    by: String,
    ended_ms: u64,
    actions: String,
    holder: String,
    error: String,
    trials: u32,
    revived: u32,
    device: String,
    body: Vec<u8>,
}

impl Told {
    pub(super) fn parse(value: Value) -> Result<Self, StoreError> {
        let mut fields = parse::<Vec<Value>>(value)?.into_iter();
        let mut next = || fields.next().unwrap_or_default();
        let id: String = parse(next())?;
        let id = JobId::parse(&id).map_err(|_| damaged("an impossible job id"))?;
        let (state, at_ms, due_ms) = (parse(next())?, parse(next())?, parse(next())?);
        let fence = ClaimToken(parse(next())?);
        let (claims, attempts, begun) = (parse(next())?, parse(next())?, parse(next())?);
        let token = parse(next())?;
        let fields = Fields {
            state,
            at_ms,
            due_ms,
            claims,
            attempts,
            begun,
            by: parse(next())?,
            ended_ms: parse(next())?,
            actions: parse(next())?,
            holder: parse(next())?,
            error: parse(next())?,
            trials: parse(next())?,
            revived: parse(next())?,
            device: parse(next())?,
            body: parse(next())?,
        };
        Ok(Self {
            id,
            token,
            fence,
            fields,
        })
    }

    pub(super) fn parse_all(value: Value) -> Result<Vec<Self>, StoreError> {
        let jobs = parse::<Vec<Value>>(value)?;
        jobs.into_iter().map(Self::parse).collect()
    }

    /// A job whose body was left out, because the caller has it.
    pub(super) fn with_body(mut self, body: Vec<u8>) -> Self {
        self.fields.body = body;
        self
    }

    /// The job.
    pub(super) fn read(self) -> Result<Job, StoreError> {
        let fields = self.fields;
        let some = |text: String| (!text.is_empty()).then_some(text);
        let by = some(fields.by)
            .map(|by| EventName::parse(&by).map_err(|_| damaged("an impossible event name")));
        let device = some(fields.device)
            .map(|device| ClientId::parse(&device).map_err(|_| damaged("an impossible device")));
        let state = read_state(&fields.state)?;
        let new = read_body(self.id, &fields.body)?;
        Ok(Job {
            fire_at_ms: fields.at_ms,
            state,
            actions: read_actions(&fields.actions)?,
            due_ms: fields.due_ms,
            attempts: fields.attempts,
            claims: fields.claims,
            trials: fields.trials,
            revived: fields.revived,
            device: device.transpose()?,
            begun_before: fields.begun != 0,
            token: self.fence,
            holder: some(fields.holder).map(|holder| NodeId::from_text(&holder)),
            last_error: some(fields.error),
            by_event: by.transpose()?,
            ended_ms: state.is_final().then_some(fields.ended_ms),
            ..Job::waiting(new)
        })
    }
}

/// What became of a call on one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Became {
    /// It was done; the job as it is now.
    Done(Told),
    /// It was not; the job as it is.
    Refused(Told),
    /// It was not: it took too long to be sure that no event was missed, so that the names have to be registered again; or the job has
    /// another plan meanwhile.
    Again,
    /// There is no such job; or no room for it.
    Nothing,
}

impl Became {
    pub(super) fn parse(value: Value) -> Result<Self, StoreError> {
        let mut fields = parse::<Vec<Value>>(value)?.into_iter();
        let Some(what) = fields.next() else {
            return Ok(Self::Nothing);
        };
        let what: String = parse(what)?;
        if what == "again" {
            return Ok(Self::Again);
        }
        let job = Told::parse(fields.next().unwrap_or_default())?;
        match what.as_str() {
            "done" => Ok(Self::Done(job)),
            "refused" => Ok(Self::Refused(job)),
            _ => Err(damaged("an impossible answer about a job")),
        }
    }
}

/// What an event does to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Does {
    /// Cancels it.
    Cancel,
    /// Makes it due.
    Trigger,
}

impl Does {
    pub(super) fn letter(self) -> &'static str {
        match self {
            Self::Cancel => "c",
            Self::Trigger => "t",
        }
    }
}

/// A job under an event name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) id: JobId,
    pub(super) does: Does,
    pub(super) token: String,
    /// In which order it was registered; 0 where that is not known.
    pub(super) place: u64,
}

impl Named {
    /// Behind the name, as a member of the sorted set, without its place.
    pub(super) fn member(&self) -> String {
        format!("{}\0{}{}", self.id, self.does.letter(), self.token)
    }

    pub(super) fn parse(member: &str) -> Result<Self, StoreError> {
        let damaged = || damaged("an impossible job under an event name");
        let (id, rest) = member.rsplit_once('\0').ok_or_else(damaged)?;
        let does = match rest.get(..1) {
            Some("c") => Does::Cancel,
            Some("t") => Does::Trigger,
            _ => return Err(damaged()),
        };
        // Older ones have no place.
        let (token, place) = rest[1..].split_once('.').unwrap_or((&rest[1..], "0"));
        Ok(Self {
            id: JobId::parse(id).map_err(|_| damaged())?,
            does,
            token: token.to_owned(),
            place: place.parse().map_err(|_| damaged())?,
        })
    }

    /// Under what a new job is registered.
    pub(super) fn all_of(job: &NewJob, token: &str) -> Vec<(EventName, Self)> {
        Self::of(&job.id, &job.cancel_on, &job.trigger_on, token)
    }

    /// Under what a job is registered: what cancels it does not trigger it, too.
    pub(super) fn of(
        id: &JobId,
        cancel_on: &[EventName],
        trigger_on: &[EventName],
        token: &str,
    ) -> Vec<(EventName, Self)> {
        let mut all: Vec<(EventName, Self)> = Vec::new();
        let cancels = cancel_on.iter().map(|name| (name, Does::Cancel));
        let triggers = trigger_on.iter().map(|name| (name, Does::Trigger));
        for (name, does) in cancels.chain(triggers) {
            if !all.iter().any(|(known, _)| known == name) {
                let named = Self {
                    id: id.clone(),
                    does,
                    token: token.to_owned(),
                    place: 0,
                };
                all.push((name.clone(), named));
            }
        }
        all
    }
}
