//! What devices publish to be done later, and what they say that makes it moot: `$delay/{seconds}/{topic}`, and events.
//!
//! Both end in the store of delayed jobs, and the acknowledgement waits for it. Nothing is carried out here: that is the delay queue's.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use moorline_mqtt::{Publish, QoS, ReasonCode, TopicName};
use moorline_router::jobs::{DelayedPublication, TopicEvents, event_of_message, job_id_of_device};
use moorline_router::{
    ActionKind, ClientId, Clock, JobAction, JobCreated, JobPlan, MessageId, NewJob, RetryPolicy,
    StoreError,
};

use crate::cluster::again_until_stored;
use crate::message_parts::stable_hash;
use crate::node::Node;
use crate::publish::Durable;
use crate::refusal::Refusal;

const PREFIX: &str = "$delay/";

/// What a node knows of delayed jobs.
#[derive(Debug, Clone)]
pub struct DelayRules {
    /// The clock by which they become due.
    pub clock: Clock,
    /// When publishing fails.
    pub retry: RetryPolicy,
    /// The longest delay that a device may ask for; none where it is zero.
    pub delay_max: Duration,
    /// Events that come of what devices publish.
    pub events: TopicEvents,
}

impl Default for DelayRules {
    fn default() -> Self {
        Self {
            clock: Clock::of_machine(),
            retry: RetryPolicy {
                attempts_max: 12,
                first_ms: 1_000,
                max_ms: 600_000,
            },
            delay_max: Duration::from_secs(7 * 24 * 3600),
            events: TopicEvents::default(),
        }
    }
}

/// When, and where to.
pub(crate) struct Later {
    delay: Duration,
    pub(crate) topic: TopicName,
}

/// What `topic` asks for, if it asks for a delay.
pub(crate) fn later(topic: &TopicName, rules: &DelayRules) -> Option<Result<Later, Refusal>> {
    let rest = topic.as_str().strip_prefix(PREFIX)?;
    let refused = |reason, why| Some(Err(Refusal::new(reason, why)));
    if rules.delay_max.is_zero() {
        let why = "the server publishes nothing later";
        return refused(ReasonCode::TopicNameInvalid, why);
    }
    let parts = rest.split_once('/').and_then(|(seconds, topic)| {
        let digits = !seconds.is_empty() && seconds.bytes().all(|byte| byte.is_ascii_digit());
        let topic = TopicName::parse(topic.to_owned().into()).ok()?;
        digits.then_some((seconds, topic))
    });
    let Some((seconds, topic)) = parts else {
        let why = "the topic must be $delay/{seconds}/{topic}, with whole seconds";
        return refused(ReasonCode::TopicNameInvalid, why);
    };
    // More digits than fit are more than anybody may ask for.
    let delay = seconds.parse().map_or(Duration::MAX, Duration::from_secs);
    if delay > rules.delay_max {
        let why = "the delay is longer than the server allows";
        return refused(ReasonCode::QuotaExceeded, why);
    }
    Some(Ok(Later { delay, topic }))
}

/// Stores what `client` publishes to be published later.
pub(crate) fn store(
    node: &Arc<Node>,
    client: &ClientId,
    later: Later,
    publish: &Publish,
    id: &MessageId,
) -> Durable {
    let rules = &node.delays;
    let qos = publish.qos;
    let mut publish = Publish {
        dup: false,
        packet_id: None,
        topic: later.topic,
        ..publish.clone()
    };
    if let Some(properties) = &mut publish.properties {
        properties.topic_alias = None;
        properties.subscription_ids.clear();
    }
    let fingerprint = stable_hash([publish.topic.as_str().as_bytes(), &publish.payload]);
    let spec = DelayedPublication {
        client: client.clone(),
        publish,
    };
    let now_ms = rules.clock.now_ms();
    let delay_ms = u64::try_from(later.delay.as_millis()).unwrap_or(u64::MAX);
    let job = NewJob {
        id: job_id_of_device(client, id),
        created_ms: now_ms,
        fire_at_ms: now_ms.saturating_add(delay_ms),
        plan: JobPlan {
            actions: vec![JobAction {
                kind: ActionKind::Publish,
                spec: spec.to_spec(),
            }],
            check: None,
            notify: None,
            retry: rules.retry,
        },
        cancel_on: Vec::new(),
        trigger_on: Vec::new(),
        fingerprint,
        device: Some(client.clone()),
    };
    let (node, client) = (Arc::clone(node), client.clone());
    at_once(async move {
        let create = async |job: NewJob| {
            let create = move |node: &Node| -> BoxFuture<'static, _> {
                let (jobs, job) = (Arc::clone(&node.stores.jobs), job.clone());
                Box::pin(async move { jobs.create(job).await })
            };
            kept(&node, qos, create).await
        };
        if let JobCreated::Conflict(_) = create(job.clone()).await? {
            // The id is another message's: this one needs its own.
            let id = job_id_of_device(&client, &MessageId::generate());
            create(NewJob { id, ..job }).await?;
        }
        Ok(())
    })
}

/// Tells the events that come of what a device publishes.
pub(crate) fn tell_events(
    node: &Arc<Node>,
    publish: &Publish,
    id: impl FnOnce() -> MessageId,
) -> Option<Durable> {
    let names = node
        .delays
        .events
        .names(publish.topic.as_str(), &publish.payload);
    if names.is_empty() {
        return None;
    }
    let (id, now_ms) = (id(), node.delays.clock.now_ms());
    let (node, qos) = (Arc::clone(node), publish.qos);
    Some(at_once(async move {
        for name in names {
            let event = event_of_message(name, &id, now_ms);
            let tell = move |node: &Node| -> BoxFuture<'static, _> {
                let (jobs, event) = (Arc::clone(&node.stores.jobs), event.clone());
                Box::pin(async move { jobs.event(&event).await })
            };
            kept(&node, qos, tell).await?;
        }
        Ok(())
    }))
}

/// In a cluster a device that waits for its acknowledgement waits for a store that is away, too. What is told again is known by its id.
async fn kept<T>(
    node: &Arc<Node>,
    qos: QoS,
    tell: impl Fn(&Node) -> BoxFuture<'static, Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let first = tell(node);
    match qos {
        QoS::AtMostOnce => first.await,
        _ => again_until_stored(node, first, tell).await,
    }
}

/// Begun now, also where nobody waits for it, and ended also where its device leaves.
fn at_once(work: impl Future<Output = Result<(), StoreError>> + Send + 'static) -> Durable {
    let task = tokio::spawn(work);
    Box::pin(async move {
        let ended = task.await;
        ended.unwrap_or_else(|error| Err(StoreError::Unavailable(error.to_string())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(topic: &'static str) -> Option<Result<(u64, String), ReasonCode>> {
        let topic = TopicName::parse(topic.into()).unwrap();
        let asked = later(&topic, &DelayRules::default())?;
        Some(match asked {
            Ok(later) => Ok((later.delay.as_secs(), later.topic.as_str().to_owned())),
            Err(refusal) => Err(refusal.reason),
        })
    }

    #[test]
    fn a_delay_is_whole_seconds_before_a_topic() {
        assert_eq!(asked("up/x"), None);
        assert_eq!(
            asked("$delay/60/up/x/y"),
            Some(Ok((60, "up/x/y".to_owned())))
        );
        assert_eq!(asked("$delay/0//"), Some(Ok((0, "/".to_owned()))));
        let invalid = Some(Err(ReasonCode::TopicNameInvalid));
        for topic in [
            "$delay/60",
            "$delay//x",
            "$delay/1.5/x",
            "$delay/-1/x",
            "$delay/1e3/x",
            "$delay/60/",
        ] {
            assert_eq!(asked(topic), invalid, "{topic}");
        }
    }

    #[test]
    fn what_is_too_far_away_is_refused() {
        assert!(asked("$delay/604800/x").unwrap().is_ok());
        let refused = Some(Err(ReasonCode::QuotaExceeded));
        assert_eq!(asked("$delay/604801/x"), refused);
        assert_eq!(asked("$delay/99999999999999999999999/x"), refused);
    }
}
