//! The Lua functions of delayed jobs as calls. What they answer is in `job_answer`; nothing is decided here, see `jobs`.

use std::sync::Arc;

use super::job_answer::{Does, Named, letter, write_actions, write_body};
use super::keys::{Keys, SHARDS};
use super::script::{Call, Script, script};
use crate::{
    ClaimToken, ClientId, EventKind, EventName, Job, JobEvent, JobId, JobLimits, JobState, NewJob,
    NodeId,
};

static NAME: Script = script!("job_event.lua", "job_name.lua");
static CREATE: Script = script!("job.lua", "job_create.lua");
static GET: Script = script!("job.lua", "job_get.lua");
static PATCH: Script = script!("job.lua", "job_patch.lua");
static CANCEL: Script = script!("job.lua", "job_cancel.lua");
static TRIGGER: Script = script!("job.lua", "job_trigger.lua");
static REVIVE: Script = script!("job.lua", "job_revive.lua");
static CLAIM: Script = script!("job.lua", "job_claim.lua");
static EXTEND: Script = script!("job.lua", "job_extend.lua");
static SETTLE: Script = script!("job.lua", "job_settle.lua");
static LIST: Script = script!("job.lua", "job_list.lua");
static OVER: Script = script!("job.lua", "job_over.lua");
static FORGET: Script = script!("job.lua", "job_forget.lua");
static EVENT_BEGIN: Script = script!("job_event.lua", "job_event_begin.lua");
static EVENT_WHOM: Script = script!("job_event.lua", "job_event_whom.lua");
static EVENT_APPLY: Script = script!("job.lua", "job_event_apply.lua");
static EVENT_END: Script = script!("job_event.lua", "job_event_end.lua");
static EVENT_OPEN: Script = script!("job_event.lua", "job_event_open.lua");
static EVENT_SWEEP: Script = script!("job_event.lua", "job_event_sweep.lua");
static IMPORT: Script = script!("job.lua", "job_import.lua");
static SHARDS_HOLD: Script = script!("leases.lua", "job_shards.lua");

pub(super) static SCRIPTS: [&Script; 21] = [
    &NAME,
    &CREATE,
    &GET,
    &PATCH,
    &CANCEL,
    &TRIGGER,
    &REVIVE,
    &CLAIM,
    &EXTEND,
    &SETTLE,
    &LIST,
    &OVER,
    &FORGET,
    &EVENT_BEGIN,
    &EVENT_WHOM,
    &EVENT_APPLY,
    &EVENT_END,
    &EVENT_OPEN,
    &EVENT_SWEEP,
    &IMPORT,
    &SHARDS_HOLD,
];

/// The shard of a job's id, and of an event's name. Part of the layout.
pub(super) fn shard_of(text: &str) -> u16 {
    let hash = crate::record::crc32(&[text.as_bytes()]);
    u16::try_from(hash % u32::from(SHARDS)).expect("below the number of shards")
}

/// What is known when a job is written about the events that it names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Early {
    /// When the first name was registered, by the clock of its server, Unix milliseconds; 0 where there is none.
    pub(super) registered_ms: u64,
    /// An event that came before, and what it does.
    pub(super) event: Option<(Does, EventName)>,
}

/// A job as it is written.
pub(super) struct Written<'a> {
    pub(super) id: &'a JobId,
    pub(super) body: &'a [u8],
    pub(super) fire_at_ms: u64,
    pub(super) actions: &'a str,
    /// Under which its names are registered.
    pub(super) token: &'a str,
    pub(super) now_ms: u64,
    pub(super) device: &'a str,
}

/// How a claim ends.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    /// Of the state, or of how it is put off.
    pub(super) letter: &'static str,
    /// When it is due again, where it is.
    pub(super) due_ms: u64,
    /// Where they do not fit: as before.
    pub(super) actions: String,
    /// Empty: as before.
    pub(super) error: String,
}

impl Ends {
    /// In `state`.
    pub(super) fn of(state: JobState) -> Self {
        Self::with(letter(state))
    }

    /// As if it had not been claimed.
    pub(super) fn put_off(begun: bool) -> Self {
        Self::with(if begun { "b" } else { "p" })
    }

    fn with(letter: &'static str) -> Self {
        Self {
            letter,
            due_ms: 0,
            actions: String::new(),
            error: String::new(),
        }
    }
}

/// Makes the calls of one deployment.
#[derive(Debug, Clone)]
pub(super) struct JobCalls {
    keys: Keys,
    limits: JobLimits,
    shards: Arc<Vec<ShardKeys>>,
}

/// Every key of a shard. A call names all that its function may touch: while a slot moves to another server of a cluster, key by key,
/// Redis has such a call wait.
#[derive(Debug)]
struct ShardKeys {
    jobs: Vec<String>,
    events: Vec<String>,
}

impl JobCalls {
    pub(super) fn new(keys: Keys, limits: JobLimits) -> Self {
        let of_shard = |shard| {
            let key = |kind: &str| format!("{}:{kind}", keys.jobs(shard));
            let states = JobState::ALL.map(|state| key(&format!("in:{}", letter(state))));
            ShardKeys {
                jobs: ["head", "body", "ids", "devices"]
                    .map(key)
                    .into_iter()
                    .chain(states)
                    .collect(),
                events: ["names", "recent", "event", "events", "open", "order"]
                    .map(key)
                    .to_vec(),
            }
        };
        Self {
            shards: Arc::new((0..SHARDS).map(of_shard).collect()),
            keys,
            limits,
        }
    }

    pub(super) fn limits(&self) -> &JobLimits {
        &self.limits
    }

    fn keys_of(&self, shard: u16) -> &ShardKeys {
        &self.shards[usize::from(shard % SHARDS)]
    }

    fn on(&self, script: &'static Script, shard: u16) -> Call {
        Call::script(script, &self.keys_of(shard).jobs)
    }

    fn on_job(&self, script: &'static Script, id: &JobId) -> Call {
        self.on(script, shard_of(id.as_str())).arg(id.as_str())
    }

    /// With the events that the job of a registration learns of when it is written.
    fn on_new_job(&self, script: &'static Script, id: &JobId, token: &str) -> Call {
        let shard = shard_of(id.as_str());
        let early = self.key(shard, &format!("early:{token}"));
        let jobs = self.keys_of(shard).jobs.iter().cloned();
        let keys: Vec<String> = jobs.chain(std::iter::once(early)).collect();
        Call::script(script, &keys).arg(id.as_str())
    }

    fn on_events(&self, script: &'static Script, shard: u16) -> Call {
        Call::script(script, &self.keys_of(shard).events)
    }

    fn on_name(&self, script: &'static Script, name: &EventName) -> Call {
        self.on_events(script, shard_of(name.as_str()))
            .arg(name.as_str())
    }

    fn key(&self, shard: u16, kind: &str) -> String {
        format!("{}:{kind}", self.keys.jobs(shard))
    }

    /// Where the notices of a shard are published.
    pub(super) fn channel(&self, shard: u16) -> String {
        self.key(shard, "notice")
    }

    pub(super) fn time(&self) -> Call {
        Call::of_server("TIME", &self.keys.jobs(0))
    }

    pub(super) fn name(&self, name: &EventName, named: &Named) -> Call {
        self.on_name(&NAME, name).arg(named.member())
    }

    pub(super) fn unname(&self, name: &EventName, named: &Named) -> Call {
        // Whatever its place: '/' is the byte behind the '.' before that.
        let member = format!("{name}\0{}", named.member());
        Call::command(
            "ZREMRANGEBYLEX",
            &self.key(shard_of(name.as_str()), "names"),
        )
        .arg(format!("[{member}"))
        .arg(format!("({member}/"))
    }

    /// Registrations of a shard in order, from after `after` on.
    pub(super) fn names(&self, shard: u16, after: &str, limit: usize) -> Call {
        let low = match after {
            "" => "-".to_owned(),
            after => format!("({after}"),
        };
        Call::command("ZRANGEBYLEX", &self.key(shard, "names"))
            .arg(low)
            .arg("+")
            .arg("LIMIT")
            .arg(0)
            .arg(limit)
    }

    pub(super) fn create(&self, job: &Written<'_>, is_full: bool, early: &Early) -> Call {
        let (does, event) = match &early.event {
            Some((does, event)) => (does.letter(), event.as_str()),
            None => ("", ""),
        };
        self.on_new_job(&CREATE, job.id, job.token)
            .arg(job.body)
            .arg(job.fire_at_ms)
            .arg(job.actions)
            .arg(job.token)
            .arg(job.now_ms)
            .arg(u8::from(is_full))
            .arg(early.registered_ms)
            .arg(does)
            .arg(event)
            .arg(job.device)
    }

    /// Jobs of one shard.
    pub(super) fn get(&self, shard: u16, ids: &[&str]) -> Call {
        self.on(&GET, shard).arg(ids)
    }

    /// `plan` comes with the actions that it has; `instead_of` is empty where that does not matter.
    pub(super) fn patch(
        &self,
        id: &JobId,
        at_ms: Option<u64>,
        plan: Option<(&[u8], &str)>,
        instead_of: &[u8],
    ) -> Call {
        let (plan, actions) = plan.unwrap_or_default();
        self.on_job(&PATCH, id)
            .arg(at_ms.map_or_else(String::new, |at_ms| at_ms.to_string()))
            .arg(plan)
            .arg(actions)
            .arg(instead_of)
    }

    pub(super) fn cancel(&self, id: &JobId, now_ms: u64) -> Call {
        self.on_job(&CANCEL, id).arg(now_ms)
    }

    pub(super) fn trigger(&self, id: &JobId, now_ms: u64) -> Call {
        self.on_job(&TRIGGER, id).arg(now_ms)
    }

    pub(super) fn revive(&self, id: &JobId, now_ms: u64) -> Call {
        self.on_job(&REVIVE, id).arg(now_ms)
    }

    pub(super) fn claim(
        &self,
        shard: u16,
        holder: &NodeId,
        now_ms: u64,
        limit: usize,
        until_ms: u64,
    ) -> Call {
        self.on(&CLAIM, shard)
            .arg(now_ms)
            .arg(limit)
            .arg(until_ms)
            .arg(holder.as_str())
            .arg(crate::jobs::CLAIM_BYTES_MAX)
    }

    pub(super) fn extend(
        &self,
        id: &JobId,
        token: ClaimToken,
        until_ms: u64,
        actions: &str,
        is_trial: bool,
    ) -> Call {
        self.on_job(&EXTEND, id)
            .arg(token.0)
            .arg(until_ms)
            .arg(actions)
            .arg(u8::from(is_trial))
    }

    pub(super) fn settle(&self, id: &JobId, token: ClaimToken, ends: &Ends, now_ms: u64) -> Call {
        self.on_job(&SETTLE, id)
            .arg(token.0)
            .arg(ends.letter)
            .arg(now_ms)
            .arg(ends.due_ms)
            .arg(&ends.actions)
            .arg(&ends.error)
    }

    /// Ids of a shard in order, as `ZRANGEBYLEX` takes the ends of a range.
    pub(super) fn ids(&self, shard: u16, low: &[u8], high: &[u8], limit: usize) -> Call {
        Call::command("ZRANGEBYLEX", &self.key(shard, "ids"))
            .arg(low)
            .arg(high)
            .arg("LIMIT")
            .arg(0)
            .arg(limit)
    }

    /// Times and ids of a shard in order, for each state.
    pub(super) fn list(
        &self,
        shard: u16,
        states: &[JobState],
        after: Option<(u64, &JobId)>,
        times: (u64, Option<u64>),
        limit: usize,
    ) -> Call {
        let letters: String = states.iter().map(|state| letter(*state)).collect();
        let (at_ms, id) = match after {
            Some((at_ms, id)) => (at_ms.to_string(), id.as_str()),
            None => (String::new(), ""),
        };
        self.on(&LIST, shard)
            .arg(letters)
            .arg(at_ms)
            .arg(id)
            .arg(times.0)
            .arg(
                times
                    .1
                    .map_or_else(|| "+inf".to_owned(), |to_ms| to_ms.to_string()),
            )
            .arg(limit)
    }

    pub(super) fn count(&self, shard: u16, state: JobState) -> Call {
        Call::command("ZCARD", &self.key(shard, &format!("in:{}", letter(state))))
    }

    /// Jobs of a shard in all states.
    pub(super) fn count_jobs(&self, shard: u16) -> Call {
        Call::command("HLEN", &self.key(shard, "head"))
    }

    /// Jobs of a shard that a device asked for and that have not ended.
    pub(super) fn count_of_device(&self, shard: u16, device: &ClientId) -> Call {
        Call::command("HGET", &self.key(shard, "devices")).arg(device.as_str())
    }

    /// How many events of a shard are driven to the end, or are not.
    pub(super) fn count_events(&self, shard: u16, open: bool) -> Call {
        let kind = if open { "open" } else { "events" };
        Call::command("ZCARD", &self.key(shard, kind))
    }

    /// Jobs that ended in `state` long enough ago.
    pub(super) fn over(&self, shard: u16, state: JobState, now_ms: u64, limit: usize) -> Call {
        let call = self.on(&OVER, shard).arg(letter(state));
        match now_ms.checked_sub(self.limits.retention_ms(state)) {
            Some(up_to_ms) => call.arg(up_to_ms).arg(limit),
            None => call.arg("-inf").arg(limit),
        }
    }

    pub(super) fn forget(&self, id: &JobId, token: &str) -> Call {
        self.on_job(&FORGET, id).arg(token)
    }

    pub(super) fn event_begin(&self, event: &JobEvent, is_full: bool) -> Call {
        let kind = match event.kind {
            EventKind::Happened => "h",
            EventKind::Withdrawal => "w",
        };
        self.on_name(&EVENT_BEGIN, &event.name)
            .arg(event.id.as_str())
            .arg(kind)
            .arg(event.at_ms)
            .arg(u8::from(is_full))
    }

    /// Jobs under a name from after `low` and, where that is not empty, before `high`.
    pub(super) fn event_whom(
        &self,
        name: &EventName,
        low: &[u8],
        high: &[u8],
        limit: usize,
    ) -> Call {
        self.on_name(&EVENT_WHOM, name)
            .arg(low)
            .arg(high)
            .arg(limit)
    }

    /// `came_later`: the job was registered after the event was taken.
    pub(super) fn event_apply(
        &self,
        id: &JobId,
        named: &Named,
        event: &JobEvent,
        came_later: bool,
    ) -> Call {
        let counts_for_later_ms = match event.kind {
            EventKind::Happened => self.limits.event_window_ms(),
            EventKind::Withdrawal => 0,
        };
        let created_up_to_ms = match (came_later, counts_for_later_ms) {
            (false, _) => u64::MAX,
            (true, 0) => 0,
            (true, window_ms) => event.at_ms.saturating_add(window_ms),
        };
        self.on_new_job(&EVENT_APPLY, id, &named.token)
            .arg(&named.token)
            .arg(named.does.letter())
            .arg(event.name.as_str())
            .arg(event.id.as_str())
            .arg(event.at_ms)
            .arg(created_up_to_ms)
            .arg(u8::from(counts_for_later_ms > 0))
    }

    pub(super) fn event_end(&self, event: &JobEvent, came_to: &str) -> Call {
        self.on_name(&EVENT_END, &event.name)
            .arg(event.id.as_str())
            .arg(came_to)
            .arg(event.at_ms)
    }

    pub(super) fn event_open(&self, shard: u16, before_ms: u64, limit: usize) -> Call {
        self.on_events(&EVENT_OPEN, shard).arg(before_ms).arg(limit)
    }

    /// Events whose window is over.
    pub(super) fn event_sweep(&self, shard: u16, now_ms: u64, limit: usize) -> Call {
        let before_ms = now_ms.saturating_sub(self.limits.event_window_ms());
        self.on_events(&EVENT_SWEEP, shard)
            .arg(before_ms)
            .arg(limit)
    }

    /// A job as it is.
    pub(super) fn import(&self, job: &Job, token: &str) -> Call {
        let asked_for = NewJob {
            id: job.id.clone(),
            created_ms: job.created_ms,
            fire_at_ms: job.fire_at_ms,
            plan: job.plan.clone(),
            cancel_on: job.cancel_on.clone(),
            trigger_on: job.trigger_on.clone(),
            fingerprint: job.fingerprint,
            device: None,
        };
        self.on_job(&IMPORT, &job.id)
            .arg(write_body(&asked_for))
            .arg(letter(job.state))
            .arg(job.fire_at_ms)
            .arg(job.due_ms)
            .arg(job.token.0)
            .arg(job.claims)
            .arg(job.attempts)
            .arg(u8::from(job.begun_before))
            .arg(token)
            .arg(job.by_event.as_ref().map_or("", EventName::as_str))
            .arg("")
            .arg(job.ended_ms.unwrap_or(0))
            .arg(write_actions(&job.actions))
            .arg(job.holder.as_ref().map_or("", NodeId::as_str))
            .arg(job.last_error.as_deref().unwrap_or_default())
            .arg(job.trials)
            .arg(job.revived)
            .arg(job.device.as_ref().map_or("", ClientId::as_str))
    }

    /// With a length of 0 the holder leaves.
    pub(super) fn hold(&self, holder: &NodeId, lease_ms: u64) -> Call {
        let keys = ["leases", "times"].map(|kind| self.keys.global("jobs", kind));
        Call::script(&SHARDS_HOLD, &keys)
            .arg(holder.as_str())
            .arg(lease_ms)
            .arg(SHARDS)
    }
}
