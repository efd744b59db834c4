//! Delayed jobs and events as they are stored.
//!
//! A job has two parts: its *body*, which is as it was created but for a patch, and its *progress*, which every claim and
//! settlement changes. One store keeps both in one record, another one keeps the progress where its scripts can change it.

use bytes::Bytes;

use super::{RecordReader, RecordWriter};
use crate::{
    ActionKind, ActionState, ClaimToken, ClientId, EventKind, EventName, EventOutcome, Job,
    JobAction, JobCounts, JobEvent, JobId, JobPlan, JobState, MessageId, NewJob, NodeId,
    RetryPolicy, StoreError,
};

/// Every layout is still the first.
const V1: u8 = 1;

/// The number that stands for a value of an enum: its place among `values`.
fn code<T: PartialEq>(values: &[T], value: &T) -> u8 {
    let place = values.iter().position(|known| known == value);
    u8::try_from(place.expect("every value has a code")).expect("few values")
}

fn read_code<T: Copy>(
    reader: &mut RecordReader<'_>,
    values: &[T],
    what: &str,
) -> Result<T, StoreError> {
    let place = reader.u8()?;
    let value = values.get(usize::from(place)).copied();
    value.ok_or_else(|| reader.damaged(what))
}

/// In the order of their codes: new ones go to the end.
const KINDS: [ActionKind; 4] = [
    ActionKind::Push,
    ActionKind::Webhook,
    ActionKind::Amqp,
    ActionKind::Publish,
];
const ACTION_STATES: [ActionState; 3] =
    [ActionState::Waiting, ActionState::Done, ActionState::Failed];
const EVENT_KINDS: [EventKind; 2] = [EventKind::Happened, EventKind::Withdrawal];

/// The code of a state, which is also its place in an index.
pub(crate) fn state_code(state: JobState) -> u8 {
    code(&JobState::ALL, &state)
}

fn read_job_id(reader: &mut RecordReader<'_>) -> Result<JobId, StoreError> {
    let text = reader.text()?;
    JobId::parse(text).map_err(|_| reader.damaged("an impossible job id"))
}

fn read_device(reader: &mut RecordReader<'_>) -> Result<ClientId, StoreError> {
    let text = reader.text()?;
    ClientId::parse(text).map_err(|_| reader.damaged("an impossible device"))
}

fn read_name(reader: &mut RecordReader<'_>) -> Result<EventName, StoreError> {
    let text = reader.text()?;
    EventName::parse(text).map_err(|_| reader.damaged("an impossible event name"))
}

pub(crate) fn write_names(writer: &mut RecordWriter, names: &[EventName]) {
    writer.u16(u16::try_from(names.len()).expect("the names of a job are few"));
    for name in names {
        writer.text(name.as_str());
    }
}

pub(crate) fn read_names(reader: &mut RecordReader<'_>) -> Result<Vec<EventName>, StoreError> {
    let count = reader.u16()?;
    (0..count).map(|_| read_name(reader)).collect()
}

pub(crate) fn write_plan(writer: &mut RecordWriter, plan: &JobPlan) {
    writer.u16(u16::try_from(plan.actions.len()).expect("the actions of a job are few"));
    for action in &plan.actions {
        writer.u8(code(&KINDS, &action.kind)).bytes(&action.spec);
    }
    for part in [&plan.check, &plan.notify] {
        writer.option(part.as_ref(), |w, part| {
            w.bytes(part);
        });
    }
    writer
        .u32(plan.retry.attempts_max)
        .u64(plan.retry.first_ms)
        .u64(plan.retry.max_ms);
}

pub(crate) fn read_plan(reader: &mut RecordReader<'_>) -> Result<JobPlan, StoreError> {
    let count = reader.u16()?;
    let actions = (0..count).map(|_| {
        Ok(JobAction {
            kind: read_code(reader, &KINDS, "an impossible action")?,
            spec: Bytes::copy_from_slice(reader.bytes()?),
        })
    });
    let actions = actions.collect::<Result<_, StoreError>>()?;
    let mut part = || {
        Ok::<_, StoreError>(
            reader
                .option(RecordReader::bytes)?
                .map(Bytes::copy_from_slice),
        )
    };
    let (check, notify) = (part()?, part()?);
    Ok(JobPlan {
        actions,
        check,
        notify,
        retry: RetryPolicy {
            attempts_max: reader.u32()?,
            first_ms: reader.u64()?,
            max_ms: reader.u64()?,
        },
    })
}

/// What of a job is as it was created.
pub(crate) fn write_body(writer: &mut RecordWriter, job: &Job) {
    writer
        .text(job.id.as_str())
        .u64(job.created_ms)
        .u64(job.fingerprint);
    write_names(writer, &job.cancel_on);
    write_names(writer, &job.trigger_on);
    write_plan(writer, &job.plan);
}

/// A job that waits since it was created, as far as its body says: it is due at zero.
pub(crate) fn read_body(reader: &mut RecordReader<'_>) -> Result<Job, StoreError> {
    Ok(Job::waiting(NewJob {
        id: read_job_id(reader)?,
        created_ms: reader.u64()?,
        fingerprint: reader.u64()?,
        cancel_on: read_names(reader)?,
        trigger_on: read_names(reader)?,
        plan: read_plan(reader)?,
        fire_at_ms: 0,
        device: None,
    }))
}

fn write_progress(writer: &mut RecordWriter, job: &Job) {
    writer
        .u8(state_code(job.state))
        .u64(job.fire_at_ms)
        .u64(job.due_ms)
        .u16(u16::try_from(job.actions.len()).expect("the actions of a job are few"));
    for state in &job.actions {
        writer.u8(code(&ACTION_STATES, state));
    }
    writer
        .u32(job.attempts)
        .u32(job.claims)
        .u8(u8::from(job.begun_before))
        .u64(job.token.0)
        .option(job.holder.as_ref(), |w, holder| {
            w.text(holder.as_str());
        })
        .option(job.last_error.as_deref(), |w, error| {
            w.text(error);
        })
        .option(job.by_event.as_ref(), |w, name| {
            w.text(name.as_str());
        })
        .option(job.ended_ms, |w, at| {
            w.u64(at);
        })
        .u32(job.trials)
        .u32(job.revived)
        .option(job.device.as_ref(), |w, device| {
            w.text(device.as_str());
        });
}

fn read_progress(reader: &mut RecordReader<'_>, job: &mut Job) -> Result<(), StoreError> {
    job.state = read_code(reader, &JobState::ALL, "an impossible state")?;
    job.fire_at_ms = reader.u64()?;
    job.due_ms = reader.u64()?;
    let count = reader.u16()?;
    job.actions = (0..count)
        .map(|_| read_code(reader, &ACTION_STATES, "an impossible state of an action"))
        .collect::<Result<_, _>>()?;
    job.attempts = reader.u32()?;
    job.claims = reader.u32()?;
    job.begun_before = reader.u8()? != 0;
    job.token = ClaimToken(reader.u64()?);
    job.holder = reader.option(RecordReader::text)?.map(NodeId::from_text);
    job.last_error = reader.option(RecordReader::text)?.map(Into::into);
    job.by_event = reader.option(read_name)?;
    job.ended_ms = reader.option(RecordReader::u64)?;
    // Older records end here.
    if !reader.is_at_end() {
        job.trials = reader.u32()?;
        job.revived = reader.u32()?;
        job.device = reader.option(read_device)?;
    }
    Ok(())
}

/// A whole job.
pub(crate) fn job(key: &[u8], job: &Job) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, job.plan.bytes() + 256);
    write_body(&mut writer, job);
    write_progress(&mut writer, job);
    writer.seal(key)
}

pub(crate) fn parse_job(key: &[u8], value: &[u8]) -> Result<Job, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let mut job = read_body(&mut reader)?;
    read_progress(&mut reader, &mut job)?;
    Ok(job)
}

/// An event, as long as it is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventRecord {
    pub(crate) event: JobEvent,
    /// What it has changed so far.
    pub(crate) outcome: EventOutcome,
    /// How far it was driven; `None` once every job has answered.
    pub(crate) driven: Option<Driven>,
    /// Its place in the order in which the store took events and jobs: jobs with a higher number came later.
    pub(crate) number: u64,
}

/// How far an event was driven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Driven {
    /// Jobs up to and with this one have answered, in the order of ids.
    pub(crate) through: Option<JobId>,
}

pub(crate) fn event(key: &[u8], record: &EventRecord) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 128);
    writer
        .text(record.event.id.as_str())
        .text(record.event.name.as_str())
        .u8(code(&EVENT_KINDS, &record.event.kind))
        .u64(record.event.at_ms)
        .u64(record.outcome.cancelled)
        .u64(record.outcome.triggered)
        .option(record.driven.as_ref(), |w, driven| {
            w.option(driven.through.as_ref(), |w, id| {
                w.text(id.as_str());
            });
        })
        .u64(record.number);
    writer.seal(key)
}

pub(crate) fn parse_event(key: &[u8], value: &[u8]) -> Result<EventRecord, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let id = reader.text()?;
    let id = MessageId::parse(id).map_err(|_| reader.damaged("an impossible event id"))?;
    Ok(EventRecord {
        event: JobEvent {
            id,
            name: read_name(&mut reader)?,
            kind: read_code(&mut reader, &EVENT_KINDS, "an impossible kind of event")?,
            at_ms: reader.u64()?,
        },
        outcome: EventOutcome {
            cancelled: reader.u64()?,
            triggered: reader.u64()?,
        },
        driven: reader.option(|r| {
            Ok(Driven {
                through: r.option(read_job_id)?,
            })
        })?,
        // Older records end here: every job came before.
        number: match reader.is_at_end() {
            true => u64::MAX,
            false => reader.u64()?,
        },
    })
}

/// How much there is: jobs by state, and events.
pub(crate) fn job_counts(key: &[u8], mut counts: JobCounts, events: u64) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 72);
    for state in JobState::ALL {
        writer.u64(*counts.of(state));
    }
    writer.u64(events);
    writer.seal(key)
}

pub(crate) fn parse_job_counts(key: &[u8], value: &[u8]) -> Result<(JobCounts, u64), StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let mut counts = JobCounts::default();
    for state in JobState::ALL {
        *counts.of(state) = reader.u64()?;
    }
    Ok((counts, reader.u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Job {
        let name = |text| EventName::parse(text).unwrap();
        let action = |kind, spec| JobAction {
            kind,
            spec: Bytes::from_static(spec),
        };
        Job {
            state: JobState::Retrying,
            actions: vec![ActionState::Done, ActionState::Waiting, ActionState::Failed],
            due_ms: 77,
            attempts: 3,
            claims: 4,
            trials: 2,
            revived: 1,
            begun_before: true,
            token: ClaimToken(u64::MAX),
            holder: Some(NodeId::from_text("queue-1")),
            last_error: Some("503 Service Unavailable".into()),
            by_event: Some(name("order.late:7")),
            ended_ms: Some(99),
            ..Job::waiting(NewJob {
                id: JobId::parse("order-7 – größer").unwrap(),
                created_ms: 5,
                fire_at_ms: 66,
                plan: JobPlan {
                    actions: vec![
                        action(ActionKind::Push, b"{}"),
                        action(ActionKind::Publish, b""),
                        action(ActionKind::Webhook, &[0, 255]),
                    ],
                    check: Some(Bytes::from_static(b"check")),
                    notify: None,
                    retry: RetryPolicy {
                        attempts_max: 5,
                        first_ms: 1_000,
                        max_ms: 60_000,
                    },
                },
                cancel_on: vec![name("order.paid:7"), name("order.gone:7")],
                trigger_on: vec![name("order.late:7")],
                fingerprint: 42,
                device: Some(ClientId::parse("car-7").unwrap()),
            })
        }
    }

    #[test]
    fn a_job_comes_back_as_it_was_and_only_under_its_key() {
        let bytes = job(b"j", &example());
        assert_eq!(parse_job(b"j", &bytes).unwrap(), example());
        // An older one ends before what was added since.
        let mut older = RecordWriter::new(V1, 8);
        write_body(&mut older, &example());
        write_progress(&mut older, &example());
        let mut bytes_of_older = older.seal(b"j");
        bytes_of_older.truncate(bytes_of_older.len() - 4 - (4 + 4 + 1 + 4 + "car-7".len()));
        let checksum = super::super::crc32(&[b"j", &bytes_of_older]);
        bytes_of_older.extend_from_slice(&checksum.to_be_bytes());
        let expected = Job {
            trials: 0,
            revived: 0,
            device: None,
            ..example()
        };
        assert_eq!(parse_job(b"j", &bytes_of_older).unwrap(), expected);
        assert!(parse_job(b"k", &bytes).is_err());
        for state in JobState::ALL {
            let one = Job {
                state,
                holder: None,
                last_error: None,
                by_event: None,
                ended_ms: None,
                ..example()
            };
            assert_eq!(parse_job(b"j", &job(b"j", &one)).unwrap(), one);
        }
    }

    #[test]
    fn a_body_alone_is_a_job_that_waits() {
        let mut writer = RecordWriter::new(V1, 8);
        write_body(&mut writer, &example());
        let bytes = writer.seal(b"j");
        let mut reader = RecordReader::open(b"j", &bytes, V1).unwrap();
        let job = read_body(&mut reader).unwrap();
        assert_eq!(job.plan, example().plan);
        assert_eq!(job.actions, [ActionState::Waiting; 3]);
        assert_eq!((job.state, job.fire_at_ms), (JobState::Pending, 0));
    }

    #[test]
    fn an_event_and_the_counts_come_back_as_they_were() {
        let driven = [
            None,
            Some(Driven { through: None }),
            Some(Driven {
                through: Some(JobId::parse("a").unwrap()),
            }),
        ];
        for (driven, kind) in driven.into_iter().zip(EVENT_KINDS.into_iter().cycle()) {
            let record = EventRecord {
                event: JobEvent {
                    id: MessageId::parse("e-1").unwrap(),
                    name: EventName::parse("a:b").unwrap(),
                    kind,
                    at_ms: 9,
                },
                outcome: EventOutcome {
                    cancelled: 1,
                    triggered: 2,
                },
                driven,
                number: 17,
            };
            assert_eq!(parse_event(b"o", &event(b"o", &record)).unwrap(), record);
        }
        let counts = JobCounts {
            pending: 1,
            firing: 2,
            retrying: 3,
            fired: 4,
            skipped: 5,
            cancelled: 6,
            failed: 7,
        };
        let bytes = job_counts(b"J", counts, 8);
        assert_eq!(parse_job_counts(b"J", &bytes).unwrap(), (counts, 8));
    }
}
