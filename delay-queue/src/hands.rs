//! What a job does when its time has come: one action, or the question whether there is anything to do.
//!
//! Everything that goes out carries an id that derives from the job, the action and its target: the same at every attempt, so that
//! whoever gets it twice can tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use moorline_mqtt::Publish;
use moorline_push_service::delayed::{
    AmqpPublish, Check, Webhook, action_id, push_target, read_push,
};
use moorline_push_service::push::{Context, SubmitError};
use moorline_router::jobs::{DelayedPublication, TopicEvents, event_of_message};
use moorline_router::rabbit::Publishing;
use moorline_router::rabbit::publisher::sender_hash;
use moorline_router::{
    ActionKind, Clock, EventName, Job, JobAction, Jobs, MessageId, StoreError, UpstreamMessage,
};
use moorline_upstream_worker::backoff::random_fraction;
use moorline_upstream_worker::call::{self, Attempt, Failures};
use moorline_upstream_worker::webhook::{self, CloudEvent, Signer};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Method, Request, Url};
use serde_json::json;

use crate::hosts::{Hosts, Turn};
use crate::{Config, Outlets};

const DUE: &str = "moorline.delay.due";

/// What became of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Done {
    /// It is done.
    Yes,
    /// It may succeed later.
    Later {
        reason: String,
        /// What the backend asks for.
        retry_after: Option<Duration>,
    },
    /// It was not begun, for want of room.
    Busy {
        reason: String,
        /// For how long there is likely to be none.
        wait: Duration,
    },
    /// It will not succeed.
    Never(String),
}

/// What a check said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Checked {
    Fire,
    Skip,
    /// Nothing; as an action that may succeed later.
    Not(Done),
}

pub(crate) struct Hands {
    outlets: Outlets,
    jobs: Arc<dyn Jobs>,
    clock: Clock,
    /// Events that come of what devices publish.
    events: TopicEvents,
    client: Client,
    hosts: Hosts,
    signer: Option<Signer>,
    timeout: Duration,
    source: String,
}

impl Hands {
    pub(crate) fn new(
        config: &Config,
        outlets: Outlets,
        jobs: Arc<dyn Jobs>,
        clock: Clock,
    ) -> Result<Self, String> {
        let client = call::client(config.authorities()?)
            .map_err(|error| format!("no HTTP client: {error}"))?;
        let number = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let each = number(config.webhook_concurrency);
        Ok(Self {
            outlets,
            jobs,
            clock,
            events: config.topic_events(),
            client,
            hosts: Hosts::new(each, number(config.concurrency)),
            signer: config.webhook_secret.signer()?,
            timeout: config.webhook_timeout,
            source: config.source.clone(),
        })
    }

    /// Asks whether there is anything to do.
    pub(crate) async fn check(&self, job: &Job, spec: &[u8]) -> Checked {
        let check = match Check::from_spec(spec) {
            Ok(check) => check,
            Err(reason) => return Checked::Not(Done::Never(format!("check: {reason}"))),
        };
        let id = action_id(job, usize::MAX, &check.url);
        let request = self.request(&check.url, Method::GET, &check.headers);
        let request = request.map(|mut request| {
            webhook::identify(
                request.headers_mut(),
                id.as_str(),
                b"",
                self.signer.as_ref(),
            );
            request
        });
        let (attempt, answer) = match request {
            Ok(request) => match self.turn(&request).await {
                Ok(_turn) => call::ask(&self.client, request).await,
                Err(busy) => return Checked::Not(busy),
            },
            Err(reason) => return Checked::Not(Done::Never(format!("check: {reason}"))),
        };
        match attempt {
            Attempt::Done if says_no(&answer) => Checked::Skip,
            Attempt::Done => Checked::Fire,
            Attempt::Retry {
                reason,
                retry_after,
            } => Checked::Not(Done::Later {
                reason: format!("check: {reason}"),
                retry_after,
            }),
            // Not knowing is no reason to give up: whoever answers may be mended.
            Attempt::Refused(reason) => Checked::Not(Done::Later {
                reason: format!("check: {reason}"),
                retry_after: None,
            }),
        }
    }

    /// Does one action. Sets `begun` before anything of it can have happened.
    pub(crate) async fn act(
        &self,
        job: &Job,
        at: usize,
        action: &JobAction,
        begun: &AtomicBool,
    ) -> Done {
        if action.kind != ActionKind::Webhook {
            begun.store(true, Ordering::Relaxed);
        }
        match action.kind {
            ActionKind::Push => self.push(job, at, &action.spec).await,
            ActionKind::Webhook => self.call(job, at, &action.spec, begun).await,
            ActionKind::Amqp => self.publish_amqp(job, at, &action.spec).await,
            ActionKind::Publish => self.publish(job, at, &action.spec).await,
        }
    }

    async fn push(&self, job: &Job, at: usize, spec: &[u8]) -> Done {
        let push = match read_push(spec, &self.outlets.http, &self.outlets.device_topics) {
            Ok(push) => push,
            Err(reason) => return Done::Never(reason),
        };
        let context = Context {
            once: Some(action_id(job, at, &push_target(&push))),
            traceparent: None,
        };
        match self.outlets.submitter.submit(push, context).await {
            // The id is this action's: what was accepted under it came from an earlier attempt.
            Ok(_) | Err(SubmitError::Conflict(_)) => Done::Yes,
            Err(error) if error.is_retryable() => Done::Later {
                reason: error.to_string(),
                retry_after: None,
            },
            Err(error) => Done::Never(error.to_string()),
        }
    }

    async fn call(&self, job: &Job, at: usize, spec: &[u8], begun: &AtomicBool) -> Done {
        let webhook = match Webhook::from_spec(spec) {
            Ok(webhook) => webhook,
            Err(reason) => return Done::Never(reason),
        };
        let request = match self.webhook_request(job, at, webhook) {
            Ok(request) => request,
            Err(reason) => return Done::Never(reason),
        };
        let turn = match self.turn(&request).await {
            Ok(turn) => turn,
            Err(busy) => return busy,
        };
        begun.store(true, Ordering::Relaxed);
        let attempt = call::attempt(&self.client, request, Failures::OfServers).await;
        drop(turn);
        match attempt {
            Attempt::Done => Done::Yes,
            Attempt::Retry {
                reason,
                retry_after,
            } => Done::Later {
                reason,
                retry_after,
            },
            Attempt::Refused(reason) => Done::Never(reason),
        }
    }

    async fn turn(&self, request: &Request) -> Result<Turn, Done> {
        let url = request.url();
        let host = match (url.host_str(), url.port_or_known_default()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            _ => String::new(),
        };
        let turn = self.hosts.turn(&host, random_fraction()).await;
        turn.map_err(|wait| Done::Busy {
            reason: format!("{host} has as many calls as it may have"),
            wait,
        })
    }

    fn request(
        &self,
        url: &str,
        method: Method,
        headers: &[(String, String)],
    ) -> Result<Request, String> {
        let url = Url::parse(url).map_err(|error| format!("{url:?} is not a URL: {error}"))?;
        let mut request = Request::new(method, url);
        *request.timeout_mut() = Some(self.timeout);
        add_headers(request.headers_mut(), headers)?;
        Ok(request)
    }

    fn webhook_request(&self, job: &Job, at: usize, webhook: Webhook) -> Result<Request, String> {
        let method = Method::from_bytes(webhook.method.as_bytes())
            .map_err(|_| format!("{:?} is not a method", webhook.method))?;
        let mut request = self.request(&webhook.url, method, &webhook.headers)?;
        let (body, content_type) = match webhook.body {
            Some(body) => (body, webhook.content_type),
            None => (
                default_body(job).into(),
                Some("application/json".to_owned()),
            ),
        };
        let id = action_id(job, at, &webhook.url);
        let headers = request.headers_mut();
        let content_type = content_type
            .as_deref()
            .unwrap_or("application/octet-stream");
        let content_type = HeaderValue::try_from(content_type)
            .map_err(|_| "content_type cannot stand in a header".to_owned())?;
        headers.insert(CONTENT_TYPE, content_type);
        webhook::identify(headers, id.as_str(), &body, self.signer.as_ref());
        let event = CloudEvent {
            id: id.as_str(),
            source: &self.source,
            kind: webhook.kind.as_deref().unwrap_or(DUE),
            subject: job.id.as_str(),
            at_ms: job.fire_at_ms,
        };
        event.write(headers);
        *request.body_mut() = Some(body.into());
        Ok(request)
    }

    async fn publish_amqp(&self, job: &Job, at: usize, spec: &[u8]) -> Done {
        let Some(publisher) = &self.outlets.publisher else {
            return Done::Never("there is no RabbitMQ here: set rabbitmq.url".to_owned());
        };
        let publish = match AmqpPublish::from_spec(spec) {
            Ok(publish) => publish,
            Err(reason) => return Done::Never(reason),
        };
        let target = publish.target();
        let (body, content_type) = match publish.body {
            Some(body) => (body, publish.content_type),
            None => (
                default_body(job).into(),
                Some("application/json".to_owned()),
            ),
        };
        let mut headers = FieldTable::default();
        for (name, value) in publish.headers {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        headers.insert(
            "job_id".into(),
            AMQPValue::LongString(job.id.as_str().into()),
        );
        let mut properties = BasicProperties::default()
            .with_headers(headers)
            .with_timestamp(job.fire_at_ms / 1_000);
        if let Some(content_type) = content_type {
            properties = properties.with_content_type(content_type.into());
        }
        let publishing = Publishing {
            exchange: ShortString::from(publish.exchange),
            routing_key: ShortString::from(publish.routing_key),
            id: action_id(job, at, &target),
            properties,
            persistent: true,
            mandatory: true,
            body,
        };
        let published = publisher.publish(sender_hash(&target), publishing, None);
        stored(published.await)
    }

    /// The events that come of a publication; none of one to the topics of a device.
    fn events_of(&self, publish: &Publish) -> Vec<EventName> {
        let topic = publish.topic.as_str();
        match topic.split_once('/') {
            Some((first, _)) if first == self.outlets.device_topics => Vec::new(),
            _ => self.events.names(topic, &publish.payload),
        }
    }

    /// As the device that asked for it would do it now.
    async fn publish(&self, job: &Job, at: usize, spec: &[u8]) -> Done {
        let publication = match DelayedPublication::from_spec(spec) {
            Ok(publication) => publication,
            Err(reason) => return Done::Never(reason),
        };
        let publish = publication.publish;
        let id: MessageId = action_id(job, at, publish.topic.as_str());
        let queues = self.outlets.routes.queues_for(&publish.topic);
        if !queues.is_empty() {
            let message = UpstreamMessage {
                id: id.clone(),
                client: publication.client,
                topic: publish.topic.clone(),
                qos: publish.qos,
                properties: publish.properties.clone(),
                payload: publish.payload.clone(),
                received_at_ms: moorline_router::unix_ms(),
            };
            let done = stored(self.outlets.upstream.publish(vec![(message, queues)]).await);
            if done != Done::Yes {
                return done;
            }
        }
        for name in self.events_of(&publish) {
            let event = event_of_message(name, &id, self.clock.now_ms());
            let done = stored(self.jobs.event(&event).await.map(drop));
            if done != Done::Yes {
                return done;
            }
        }
        stored(self.outlets.nodes.publish(id, publish).await.map(drop))
    }
}

fn stored(result: Result<(), StoreError>) -> Done {
    match result {
        Ok(()) => Done::Yes,
        Err(error) if error.is_retryable() => Done::Later {
            reason: error.to_string(),
            retry_after: None,
        },
        Err(error) => Done::Never(error.to_string()),
    }
}

fn add_headers(to: &mut HeaderMap, headers: &[(String, String)]) -> Result<(), String> {
    for (name, value) in headers {
        let wrong = || format!("{name:?} cannot be a header");
        let name = HeaderName::try_from(name).map_err(|_| wrong())?;
        let value = HeaderValue::try_from(value).map_err(|_| wrong())?;
        to.append(name, value);
    }
    Ok(())
}

/// For an action that says nothing itself.
fn default_body(job: &Job) -> String {
    json!({
        "id": job.id.as_str(),
        "created_at": webhook::time(job.created_ms),
        "fire_at": webhook::time(job.fire_at_ms),
    })
    .to_string()
}

/// Whether the answer of a check is `{"fire": false}`.
fn says_no(answer: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(answer)
        .is_ok_and(|answer| answer["fire"] == json!(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_no_skips_a_job() {
        assert!(says_no(br#"{"fire": false, "why": "paid"}"#));
        for answer in [
            &b""[..],
            b"{}",
            b"no",
            br#"{"fire": true}"#,
            br#"{"fire": "false"}"#,
            b"[]",
        ] {
            assert!(!says_no(answer));
        }
    }
}
