//! How events are driven: written down, brought to every job that names them, and only then counted.

use futures_util::future::join_all;
use redis::Value;

use super::job_answer::{Does, Named};
use super::job_orphans::is_settled;
use super::jobs::RedisJobs;
use super::reply::parse;
use crate::{EventKind, EventName, EventOutcome, JobEvent, MessageId, StoreError};

/// Jobs to which an event is driven in one go.
const PAGE: usize = 500;

/// What is known of an event.
struct Known {
    kind: EventKind,
    at_ms: u64,
    /// Registrations with a higher one came later.
    place: u64,
    came_to: Option<EventOutcome>,
}

impl Known {
    fn parse(text: &str) -> Option<Self> {
        let (at_ms, rest) = text.split_once(' ')?;
        let (kind, came_to) = match rest.split_once(' ') {
            Some((kind, came_to)) => (kind, Some(parse_outcome(came_to)?)),
            None => (rest, None),
        };
        let (kind, place) = kind.split_at_checked(1)?;
        let kind = match kind {
            "h" => EventKind::Happened,
            "w" => EventKind::Withdrawal,
            _ => return None,
        };
        Some(Self {
            kind,
            place: match place {
                // Older ones have none: every job came before.
                "" => u64::MAX,
                place => place.parse().ok()?,
            },
            at_ms: at_ms.parse().ok()?,
            came_to,
        })
    }
}

fn parse_outcome(text: &str) -> Option<EventOutcome> {
    let (cancelled, triggered) = text.split_once(' ')?;
    Some(EventOutcome {
        cancelled: cancelled.parse().ok()?,
        triggered: triggered.parse().ok()?,
    })
}

fn damaged() -> StoreError {
    StoreError::Damaged("an impossible event".into())
}

impl RedisJobs {
    /// Takes an event, or goes on with one that was taken.
    pub(super) async fn drive(&self, event: &JobEvent) -> Result<EventOutcome, StoreError> {
        let is_full = self.room_for_events().await? == 0;
        let begin = self.calls.event_begin(event, is_full);
        let known: Option<String> = parse(self.write_event(&event.name, begin).await?)?;
        let known = known.ok_or_else(|| {
            let max = self.calls.limits().events_max;
            StoreError::Full(format!("{max} events are remembered already"))
        })?;
        let known = Known::parse(&known).ok_or_else(damaged)?;
        if let Some(came_to) = known.came_to {
            return Ok(came_to);
        }
        let event = JobEvent {
            kind: known.kind,
            at_ms: known.at_ms,
            ..event.clone()
        };
        let outcome = self.bring(&event, known.place).await?;
        let came_to = format!("{} {}", outcome.cancelled, outcome.triggered);
        let end = self.calls.event_end(&event, &came_to);
        let came_to: String = parse(self.write_event(&event.name, end).await?)?;
        parse_outcome(&came_to).ok_or_else(damaged)
    }

    /// Brings an event to every job that names it.
    async fn bring(&self, event: &JobEvent, place: u64) -> Result<EventOutcome, StoreError> {
        let mut outcome = EventOutcome::default();
        let mut after: Vec<u8> = Vec::new();
        loop {
            let whom = self.calls.event_whom(&event.name, &after, &[], PAGE);
            let page: Vec<String> = parse(self.link.read(whom).await?)?;
            let Some(last) = page.last() else {
                return Ok(outcome);
            };
            after = last.clone().into_bytes();
            let mut named = Vec::with_capacity(page.len());
            for member in &page {
                named.push(Named::parse(member)?);
            }
            named.retain(|named| event.kind == EventKind::Happened || named.does == Does::Cancel);
            let applied = named.iter().map(|named| {
                let came_later = named.place > place;
                let apply = self.calls.event_apply(&named.id, named, event, came_later);
                self.write(&named.id, apply)
            });
            for (named, applied) in named.iter().zip(join_all(applied).await) {
                match (parse::<i8>(applied?)?, named.does) {
                    (1, Does::Cancel) => outcome.cancelled += 1,
                    (1, Does::Trigger) => outcome.triggered += 1,
                    (-1, _) => self.tidy(&event.name, named),
                    _ => {}
                }
            }
        }
    }

    /// Takes a registration away that leads nowhere, unless it is new.
    fn tidy(&self, name: &EventName, named: &Named) {
        if is_settled(named) {
            self.link
                .note(named.id.as_str(), self.calls.unname(name, named));
        }
    }

    /// Events that are not driven to the end.
    pub(super) async fn open_events(
        &self,
        shard: u16,
        before_ms: u64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError> {
        let open = self.calls.event_open(shard, before_ms, limit);
        let fields: Vec<String> = parse(self.link.read(open).await?)?;
        let event = |pair: &[String]| {
            let (name, id) = pair[0].split_once('\0')?;
            let known = Known::parse(&pair[1])?;
            Some(JobEvent {
                id: MessageId::parse(id).ok()?,
                name: EventName::parse(name).ok()?,
                kind: known.kind,
                at_ms: known.at_ms,
            })
        };
        let events = fields.chunks_exact(2).map(event);
        events.collect::<Option<_>>().ok_or_else(damaged)
    }

    pub(super) async fn write_event(
        &self,
        name: &EventName,
        call: super::script::Call,
    ) -> Result<Value, StoreError> {
        self.link.submit(name.as_str(), call).await
    }
}
