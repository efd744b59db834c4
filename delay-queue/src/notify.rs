//! Telling of the end of a job: a job of its own, which is due at once.
//!
//! It is created before the end is written, so that a process that dies in between tells it again rather than never; and it has
//! the attempts and the dead letter of any other job.

use moorline_push_service::delayed::{Notify, event_id};
use moorline_router::{
    Job, JobAction, JobCreated, JobId, JobPlan, Jobs, NewJob, RetryPolicy, StoreError,
};
use moorline_upstream_worker::webhook;
use serde_json::{Value, json};

/// How a job ended, for whoever is told.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ending<'a> {
    Fired,
    Failed(&'a str),
}

impl Ending<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Fired => "fired",
            Self::Failed(_) => "failed",
        }
    }
}

/// The job that tells of it, if somebody wants to know.
fn notice(job: &Job, ending: Ending<'_>, now_ms: u64, retry: RetryPolicy) -> Option<NewJob> {
    let notify = Notify::from_spec(job.plan.notify.as_deref()?);
    let notify = notify
        .inspect_err(
            |error| tracing::warn!(job = %job.id, %error, "nobody is told of the end of a job"),
        )
        .ok()?;
    let action = match ending {
        Ending::Fired => notify.fired,
        Ending::Failed(_) => notify.failed,
    }?;
    // A job fires once. It may fail again after it was taken out of the dead letters, and that is news.
    let claim = match ending {
        Ending::Fired => 0,
        Ending::Failed(_) => job.token.0,
    };
    let what = format!("{} {} {claim}", ending.name(), job.created_ms);
    let id = event_id(&what, job.id.as_str());
    let id = JobId::parse(&format!("{}-{id}", ending.name())).expect("a word and a UUID");
    Some(NewJob {
        id,
        created_ms: now_ms,
        fire_at_ms: now_ms,
        plan: JobPlan {
            actions: vec![with_body(&action, job, ending)],
            check: None,
            notify: None,
            retry,
        },
        cancel_on: Vec::new(),
        trigger_on: Vec::new(),
        fingerprint: claim,
    })
}

/// The action with a body that says what happened, if it has none.
fn with_body(action: &JobAction, job: &Job, ending: Ending<'_>) -> JobAction {
    let Ok(Value::Object(mut spec)) = serde_json::from_slice(&action.spec) else {
        return action.clone();
    };
    let kind = format!("moorline.delay.{}", ending.name());
    if !spec.contains_key("body") && !spec.contains_key("body_base64") {
        let mut body = json!({
            "type": kind,
            "id": job.id.as_str(),
            "state": ending.name(),
            "created_at": webhook::time(job.created_ms),
            "fire_at": webhook::time(job.fire_at_ms),
        });
        if let Ending::Failed(error) = ending {
            body["error"] = json!(error);
        }
        spec.insert("body".to_owned(), body);
    }
    if action.kind == moorline_router::ActionKind::Webhook {
        spec.entry("type").or_insert_with(|| json!(kind));
    }
    JobAction {
        kind: action.kind,
        spec: Value::Object(spec).to_string().into(),
    }
}

/// Makes sure that whoever wants to know is told.
pub(crate) async fn tell(
    jobs: &dyn Jobs,
    job: &Job,
    ending: Ending<'_>,
    now_ms: u64,
    retry: RetryPolicy,
) -> Result<(), StoreError> {
    let Some(notice) = notice(job, ending, now_ms, retry) else {
        return Ok(());
    };
    match jobs.create(notice).await {
        Ok(JobCreated::Created(_) | JobCreated::Same(_)) => Ok(()),
        Ok(JobCreated::Conflict(other)) => {
            tracing::warn!(job = %job.id, other = %other.id, "nobody is told of the end of a job: its notice has the id of another job");
            Ok(())
        }
        // A full store must not keep jobs from ending: that is what makes room.
        Err(StoreError::Full(error)) => {
            tracing::warn!(job = %job.id, %error, "nobody is told of the end of a job");
            Ok(())
        }
        Err(error) => Err(error),
    }
}
