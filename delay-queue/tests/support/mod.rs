//! A delay queue over a real store, and backends that it calls; only the access nodes are made up.

pub(crate) mod watched;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use moorline_delay_queue::{Config, DelayQueue, Outlets, run};
use moorline_mqtt::Publish;
use moorline_push_service::Submitter;
use moorline_router::embedded::{self, EmbeddedStore};
use moorline_router::upstream::UpstreamRoutes;
use moorline_router::{
    ActionKind, BanTarget, BanView, ClientId, Clock, Delivery, DeliveryOutcome, Displaced, Epoch,
    Job, JobAction, JobCreated, JobId, JobLimits, JobPlan, JobState, Jobs, MessageId, NewJob,
    NodeId, Nodes, Published, RetryPolicy, SessionView, StoreError,
};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// No device is anywhere.
struct Nobody;

#[async_trait]
impl Nodes for Nobody {
    async fn deliver(&self, _: &NodeId, deliveries: Vec<Delivery>) -> Vec<DeliveryOutcome> {
        vec![DeliveryOutcome::NotHere; deliveries.len()]
    }
    async fn disconnect(&self, _: &NodeId, _: &ClientId) -> Result<bool, StoreError> {
        Ok(false)
    }
    async fn displace(&self, _: &NodeId, _: &ClientId, _: Epoch) -> Result<Displaced, StoreError> {
        Ok(Displaced::default())
    }
    async fn session_changed(&self, _: &NodeId, _: &ClientId) -> Result<(), StoreError> {
        Ok(())
    }
    async fn bans(&self, _: Option<&BanTarget>, _: usize) -> Result<Vec<BanView>, StoreError> {
        Ok(Vec::new())
    }
    async fn ban_changed(&self, _: &BanTarget) -> Result<bool, StoreError> {
        Ok(false)
    }
    async fn sessions(
        &self,
        _: &NodeId,
        clients: &[ClientId],
    ) -> Result<Vec<Option<SessionView>>, StoreError> {
        Ok(vec![None; clients.len()])
    }
    async fn publish(&self, _: MessageId, _: Publish) -> Result<Published, StoreError> {
        Ok(Published::default())
    }
}

/// The bodies that a backend was called with, and when.
pub(crate) type Calls = Arc<Mutex<Vec<(String, Instant)>>>;

/// Answers 200 after `after`.
pub(crate) async fn backend(after: Duration) -> (String, Calls) {
    answering(200, after).await
}

/// Answers `status` after `after`.
pub(crate) async fn answering(status: u16, after: Duration) -> (String, Calls) {
    let status = StatusCode::from_u16(status).unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let calls = Calls::default();
    let record = Arc::clone(&calls);
    let app = Router::new().fallback(move |request: Request| {
        let record = Arc::clone(&record);
        async move {
            let body = axum::body::to_bytes(request.into_body(), 1 << 20).await;
            let body = String::from_utf8(body.unwrap().to_vec()).unwrap();
            record.lock().unwrap().push((body, Instant::now()));
            tokio::time::sleep(after).await;
            status
        }
    });
    tokio::spawn(axum::serve(listener, app).into_future());
    (url, calls)
}

pub(crate) struct World {
    pub(crate) jobs: Arc<dyn Jobs>,
    pub(crate) clock: Clock,
    store: Arc<EmbeddedStore>,
    _directory: tempfile::TempDir,
}

pub(crate) struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), String>>,
}

impl Running {
    pub(crate) async fn stop(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }
}

impl World {
    pub(crate) fn new(clock: Clock) -> Self {
        Self::keeping(clock, JobLimits::default())
    }

    pub(crate) fn with_room_for(jobs_max: u64) -> Self {
        let limits = JobLimits {
            jobs_max,
            ..JobLimits::default()
        };
        Self::keeping(Clock::of_machine(), limits)
    }

    fn keeping(clock: Clock, jobs: JobLimits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = embedded::Config {
            data_dir: directory.path().join("data"),
            jobs,
            ..Default::default()
        };
        let store = EmbeddedStore::open(config).unwrap();
        Self {
            jobs: store.stores().jobs,
            store,
            clock,
            _directory: directory,
        }
    }

    pub(crate) fn run(&self, config: Config) -> Running {
        config.validate().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let stores = self.store.stores();
        let queue = DelayQueue {
            config,
            holder: NodeId::for_this_run("test"),
            jobs: Arc::clone(&self.jobs),
            clock: self.clock.clone(),
            outlets: Outlets {
                submitter: Arc::new(Submitter::new(stores.clone(), Arc::new(Nobody))),
                http: moorline_push_service::Config::default(),
                device_topics: "d".to_owned(),
                nodes: Arc::new(Nobody),
                upstream: stores.upstream,
                routes: UpstreamRoutes::default(),
                publisher: None,
            },
            rabbit: None,
        };
        let task = tokio::spawn(run(queue, async { drop(stopped.await) }));
        Running { stop, task }
    }

    pub(crate) async fn create(&self, id: &str, fire_at_ms: u64, kind: ActionKind, spec: &str) {
        self.create_with(id, fire_at_ms, kind, spec, None).await;
    }

    pub(crate) async fn create_with(
        &self,
        id: &str,
        fire_at_ms: u64,
        kind: ActionKind,
        spec: &str,
        notify: Option<String>,
    ) {
        let action = JobAction {
            kind,
            spec: spec.to_owned().into(),
        };
        let job = NewJob {
            id: JobId::parse(id).unwrap(),
            created_ms: self.clock.now_ms(),
            fire_at_ms,
            plan: JobPlan {
                actions: vec![action],
                check: None,
                notify: notify.map(Into::into),
                retry: RetryPolicy {
                    attempts_max: 3,
                    first_ms: 10,
                    max_ms: 50,
                },
            },
            cancel_on: Vec::new(),
            trigger_on: Vec::new(),
            fingerprint: 1,
            device: None,
        };
        let created = self.jobs.create(job).await.unwrap();
        assert!(matches!(created, JobCreated::Created(_)));
    }

    pub(crate) async fn call(&self, id: &str, fire_at_ms: u64, url: &str) {
        let spec = json!({"url": url, "body": id}).to_string();
        self.create(id, fire_at_ms, ActionKind::Webhook, &spec)
            .await;
    }

    pub(crate) async fn job(&self, id: &str) -> Job {
        let id = JobId::parse(id).unwrap();
        self.jobs.get(&id).await.unwrap().unwrap()
    }

    pub(crate) async fn await_state(&self, id: &str, state: JobState) -> Job {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let job = self.job(id).await;
            if job.state == state {
                return job;
            }
            assert!(Instant::now() < deadline, "{id} is not {state}: {job:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
