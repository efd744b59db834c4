//! Telling of the end of a job: a job of its own, which is due at once.
//!
//! It is created before the end is written, so that a process that dies in between tells it again, under the same id, rather than never;
//! and it has the attempts and the dead letter of any other job. A store that is full takes it all the same.

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
    // The same whoever carries the job out, and however often. It may fail again after it was taken out of the dead letters, and that
    // is news.
    let what = format!("{} {} {}", ending.name(), job.created_ms, job.revived);
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
        fingerprint: u64::from(job.revived),
        device: None,
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
    match jobs.create_notice(notice).await {
        Ok(JobCreated::Created(_) | JobCreated::Same(_)) => Ok(()),
        Ok(JobCreated::Conflict(other)) => {
            tracing::warn!(job = %job.id, other = %other.id, "nobody is told of the end of a job: its notice has the id of another job");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use moorline_router::ClaimToken;

    use super::*;

    #[test]
    fn an_end_is_told_under_one_id_whoever_claims_the_job_and_another_end_under_another() {
        let retry = RetryPolicy {
            attempts_max: 3,
            first_ms: 1,
            max_ms: 1,
        };
        let action = |url: &str| json!({"webhook": {"url": url}});
        let notify = json!({"on_fired": action("http://f/"), "on_failed": action("http://x/")});
        let job = Job::waiting(NewJob {
            id: JobId::parse("order-1").unwrap(),
            created_ms: 5,
            fire_at_ms: 6,
            plan: JobPlan {
                actions: Vec::new(),
                check: None,
                notify: Some(notify.to_string().into()),
                retry,
            },
            cancel_on: Vec::new(),
            trigger_on: Vec::new(),
            fingerprint: 1,
            device: None,
        });
        let told = |job: &Job, ending| {
            let notice = notice(job, ending, 9, retry).unwrap();
            (notice.id, notice.fingerprint)
        };
        let again = Job {
            token: ClaimToken(7),
            claims: 4,
            attempts: 2,
            ..job.clone()
        };
        let failed = told(&job, Ending::Failed("no"));
        assert_eq!(failed, told(&again, Ending::Failed("no answer")));
        assert_eq!(told(&job, Ending::Fired), told(&again, Ending::Fired));
        assert_ne!(failed, told(&job, Ending::Fired));
        let revived = Job {
            revived: 1,
            ..again
        };
        assert_ne!(failed, told(&revived, Ending::Failed("no")));
    }
}
