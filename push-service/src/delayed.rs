//! What a delayed job does, for whoever carries it out.
//!
//! A job keeps each action as the JSON that asked for it; here it becomes what is to be done. Everything was valid when the job
//! was created. It may not be any more, where the configuration has changed: then the text says why.

use bytes::Bytes;
use moorline_router::jobs::DelayedPublication;
use moorline_router::{
    ActionKind, Clock, EventKind, EventName, EventOutcome, Job, JobAction, JobEvent, Jobs,
    MessageId, RetryPolicy, StoreError,
};
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::problem::Problem;
use crate::push::{Push, Target};
use crate::request;

/// What decides whether a job may be created.
#[derive(Debug, Clone, Copy)]
pub struct DelayRules<'a> {
    /// Limits of pushes and bodies.
    pub config: &'a Config,
    /// The first level of the topics that belong to one device.
    pub device_topics: &'a str,
    /// For jobs that say nothing of it.
    pub retry: RetryPolicy,
    /// Whether there is a RabbitMQ to publish to.
    pub amqp: bool,
}

/// A call to a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// `http://…` or `https://…`.
    pub url: String,
    /// `POST`, `PUT`, `PATCH` or `DELETE`.
    pub method: &'static str,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
    /// `None`: what happened, in JSON.
    pub body: Option<Bytes>,
    /// Of the body.
    pub content_type: Option<String>,
    /// The type of the CloudEvent.
    pub kind: Option<String>,
}

/// A message to an exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AmqpPublish {
    /// Empty for the default exchange.
    pub exchange: String,
    /// At most 255 bytes.
    pub routing_key: String,
    /// As text.
    pub headers: Vec<(String, String)>,
    /// `None`: what happened, in JSON.
    pub body: Option<Bytes>,
    /// Of the body.
    pub content_type: Option<String>,
}

/// Who is asked whether there is anything to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// `http://…` or `https://…`.
    pub url: String,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
}

/// Who is told of the end of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notify {
    /// Everything was done.
    pub fired: Option<JobAction>,
    /// It was given up.
    pub failed: Option<JobAction>,
}

/// Larger than anything that was accepted: a limit that was lowered since is no reason to give up.
const KEPT_BYTES_MAX: usize = usize::MAX;

fn text(problem: Problem) -> String {
    problem.detail().to_owned()
}

impl Webhook {
    /// Of the `spec` of an action.
    pub fn from_spec(spec: &[u8]) -> Result<Self, String> {
        Self::from_json(spec, KEPT_BYTES_MAX).map_err(text)
    }
}

impl AmqpPublish {
    /// Of the `spec` of an action.
    pub fn from_spec(spec: &[u8]) -> Result<Self, String> {
        Self::from_json(spec, KEPT_BYTES_MAX).map_err(text)
    }
}

impl Check {
    /// Of the `check` of a plan.
    pub fn from_spec(spec: &[u8]) -> Result<Self, String> {
        Self::from_json(spec).map_err(text)
    }
}

impl Notify {
    /// Of the `notify` of a plan.
    pub fn from_spec(spec: &[u8]) -> Result<Self, String> {
        let (fired, failed) = request::notify_actions(spec)?;
        Ok(Self { fired, failed })
    }
}

/// The push of the `spec` of an action.
pub fn read_push(spec: &[u8], config: &Config, device_topics: &str) -> Result<Push, String> {
    Push::from_json(spec, config, device_topics).map_err(text)
}

/// The id of what a job does: the same at every attempt, another one for each action, each target, and each job that has the same name in
/// turn.
pub fn action_id(job: &Job, action: usize, target: &str) -> MessageId {
    derive(&[
        "delay".as_bytes(),
        job.id.as_str().as_bytes(),
        &job.created_ms.to_be_bytes(),
        &(action as u64).to_be_bytes(),
        target.as_bytes(),
    ])
}

/// What of a push is its target, see [`action_id`].
pub fn push_target(push: &Push) -> String {
    match &push.target {
        Target::Client(client) => format!("client {client}"),
        Target::Topic(topic) => format!("topic {}", topic.as_str()),
    }
}

impl AmqpPublish {
    /// What of it is its target, see [`action_id`].
    pub fn target(&self) -> String {
        format!("{} {}", self.exchange, self.routing_key)
    }
}

/// The target of an action, see [`action_id`].
pub fn target_of(
    action: &JobAction,
    config: &Config,
    device_topics: &str,
) -> Result<String, String> {
    let spec = &action.spec;
    match action.kind {
        ActionKind::Push => read_push(spec, config, device_topics).map(|push| push_target(&push)),
        ActionKind::Webhook => Webhook::from_spec(spec).map(|webhook| webhook.url),
        ActionKind::Amqp => AmqpPublish::from_spec(spec).map(|publish| publish.target()),
        ActionKind::Publish => DelayedPublication::from_spec(spec)
            .map(|publication| publication.publish.topic.as_str().to_owned()),
    }
}

/// The id of the event that comes of something that has an id itself: the same however often it comes.
pub fn event_id(source: &str, id: &str) -> MessageId {
    derive(&["event".as_bytes(), source.as_bytes(), id.as_bytes()])
}

fn derive(parts: &[&[u8]]) -> MessageId {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    let bytes: [u8; 16] = digest[..16].try_into().expect("SHA-256 has 32 bytes");
    let id = uuid::Uuid::new_v8(bytes).hyphenated().to_string();
    MessageId::parse(&id).expect("a UUID is 36 visible ASCII characters")
}

/// Tells the jobs that something happened; durable and driven to each of them on return.
pub async fn tell(
    jobs: &dyn Jobs,
    clock: &Clock,
    name: EventName,
    id: MessageId,
) -> Result<EventOutcome, StoreError> {
    let event = JobEvent {
        id,
        name,
        kind: EventKind::Happened,
        at_ms: clock.now_ms(),
    };
    jobs.event(&event).await
}

/// The word of an action in requests.
pub fn kind_name(kind: ActionKind) -> &'static str {
    request::kind_name(kind)
}
