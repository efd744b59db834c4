//! Every process of a cluster by name, what they stand on, and a backend for what devices say.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moorline_tests::cluster::{Stores, command};
use moorline_tests::gateway::is_error;
use moorline_tests::role::{Log, Role};
use moorline_tests::servers::{RabbitServer, RedisServer};
use moorline_tests::{API_KEY, Api, Backend, Random, eventually};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tempfile::TempDir;

/// Where the processes of one role can be reached; nobody where one does not run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Addresses(Arc<Mutex<Vec<Option<SocketAddr>>>>);

impl Addresses {
    /// One that runs, at random, other than `not` where there is a choice.
    pub(crate) fn any(
        &self,
        random: &mut Random,
        not: Option<usize>,
    ) -> Option<(usize, SocketAddr)> {
        let all = self.0.lock().unwrap();
        let mut running: Vec<(usize, SocketAddr)> = all
            .iter()
            .enumerate()
            .filter_map(|(at, address)| address.map(|address| (at, address)))
            .collect();
        if running.len() > 1 {
            running.retain(|(at, _)| Some(*at) != not);
        }
        let at = usize::try_from(random.below(running.len().max(1) as u64)).unwrap();
        running.get(at).copied()
    }

    pub(crate) fn get(&self, at: usize) -> Option<SocketAddr> {
        self.0.lock().unwrap()[at]
    }

    /// Of one process.
    pub(crate) fn one(address: SocketAddr) -> Self {
        let addresses = Self::default();
        addresses.set(0, Some(address));
        addresses
    }

    pub(crate) fn set(&self, at: usize, address: Option<SocketAddr>) {
        let mut all = self.0.lock().unwrap();
        if all.len() <= at {
            all.resize(at + 1, None);
        }
        all[at] = address;
    }
}

/// One process, running or not.
#[derive(Debug)]
pub(crate) struct Member {
    role: &'static str,
    pub(crate) name: String,
    /// Its own way to the stores: a proxy may stand in it.
    stores: Stores,
    process: Option<Role>,
}

/// The cluster.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) nodes: Vec<Member>,
    pub(crate) services: Vec<Member>,
    pub(crate) workers: Vec<Member>,
    pub(crate) delays: Vec<Member>,
    /// Where devices connect.
    pub(crate) mqtt: Addresses,
    /// Where backends push.
    pub(crate) http: Addresses,
    /// What each node answers on its operator's port.
    pub(crate) admin: Addresses,
    redis: Option<RedisServer>,
    pub(crate) rabbit: Arc<RabbitServer>,
    pub(crate) stores: Stores,
    pub(crate) backend: Backend,
    /// Parts of ERROR lines that the fault of the test provokes.
    expected_errors: Vec<&'static str>,
    config: String,
    log: Log,
    work: TempDir,
}

/// Who can say what became of a message.
#[derive(Debug)]
pub(crate) struct Witness<'a> {
    /// A push service.
    pub(crate) api: Api,
    /// What devices say goes there.
    pub(crate) backend: &'a Backend,
}

/// How a [`World`] is made.
#[derive(Debug, Default)]
pub(crate) struct Shape {
    /// A RabbitMQ of its own, to be killed.
    pub(crate) own_rabbit: bool,
    /// Redis as each node sees it, by node; where none is given, Redis itself.
    pub(crate) redis_of_node: Vec<SocketAddr>,
    /// The Redis that was started before, for a proxy to lead to.
    pub(crate) redis: Option<RedisServer>,
    /// Instead of a single Redis: the keys of the `[redis]` section.
    pub(crate) redis_section: Option<String>,
    /// Where each node is said to listen for the others, by node, and where it does.
    pub(crate) internal_of_node: Vec<(SocketAddr, SocketAddr)>,
    /// More configuration.
    pub(crate) config: String,
}

const NODES: usize = 3;

impl World {
    pub(crate) async fn start(shape: Shape) -> Self {
        // Bots need file handles.
        let limit = getrlimit(Resource::Nofile);
        _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                maximum: limit.maximum,
            },
        );
        let backend = Backend::start().await;
        let redis = match (shape.redis, &shape.redis_section) {
            (Some(redis), _) => Some(redis),
            (None, Some(_)) => None,
            (None, None) => Some(RedisServer::start().await),
        };
        let rabbit = if shape.own_rabbit {
            Arc::new(RabbitServer::start().await)
        } else {
            shared_rabbit().await
        };
        let url = redis.as_ref().map(RedisServer::url).unwrap_or_default();
        let mut stores = Stores::on(&url, rabbit.vhost().await);
        if let Some(section) = shape.redis_section {
            stores.redis = section;
        }
        let config = config(&shape.config, &backend);
        let of_node = |at: usize| {
            let mut stores = stores.clone();
            if let Some(proxy) = shape.redis_of_node.get(at) {
                stores.redis = format!("url = \"redis://{proxy}\"\n");
            }
            if let Some((advertised, listen)) = shape.internal_of_node.get(at) {
                stores.internal =
                    format!("internal_listen = \"{listen}\"\nadvertise = \"{advertised}\"\n");
            }
            stores
        };
        let member = |role, name: &str, at: usize, stores| Member {
            role,
            name: format!("{name}-{}", at + 1),
            stores,
            process: None,
        };
        let mut world = Self {
            nodes: (0..NODES)
                .map(|at| member("access-node", "node", at, of_node(at)))
                .collect(),
            services: (0..2)
                .map(|at| member("push-service", "push", at, stores.clone()))
                .collect(),
            workers: (0..2)
                .map(|at| member("upstream-worker", "worker", at, stores.clone()))
                .collect(),
            delays: (0..2)
                .map(|at| member("delay-queue", "delay", at, stores.clone()))
                .collect(),
            mqtt: Addresses::default(),
            http: Addresses::default(),
            admin: Addresses::default(),
            redis,
            rabbit,
            stores,
            backend,
            expected_errors: Vec::new(),
            config,
            log: Log::default(),
            work: tempfile::Builder::new()
                .prefix("moorline-cluster-")
                .tempdir()
                .unwrap(),
        };
        for at in 0..NODES {
            world.start_node(at);
        }
        for at in 0..2 {
            world.start_service(at);
            world.start_worker(at);
            world.start_delays(at);
        }
        world.await_ready().await;
        world
    }

    fn launch(&self, member: &Member) -> Role {
        let command = command(
            &member.stores,
            member.role,
            &member.name,
            &self.config,
            self.work.path(),
        );
        Role::launch(&format!("{} ", member.name), command, &self.log)
    }

    pub(crate) fn start_node(&mut self, at: usize) {
        let process = self.launch(&self.nodes[at]);
        self.mqtt.set(at, process.listener("mqtt"));
        self.admin.set(at, process.listener("http"));
        self.nodes[at].process = Some(process);
    }

    pub(crate) fn start_service(&mut self, at: usize) {
        let process = self.launch(&self.services[at]);
        self.http.set(at, process.listener("http"));
        self.services[at].process = Some(process);
    }

    pub(crate) fn start_worker(&mut self, at: usize) {
        self.workers[at].process = Some(self.launch(&self.workers[at]));
    }

    pub(crate) fn start_delays(&mut self, at: usize) {
        self.delays[at].process = Some(self.launch(&self.delays[at]));
    }

    /// Waits until every node takes devices.
    pub(crate) async fn await_ready(&self) {
        for at in 0..self.nodes.len() {
            let Some(address) = self.admin.get(at) else {
                continue;
            };
            let api = Api::new(address, Some(API_KEY));
            eventually(
                Duration::from_secs(60),
                &format!("node {} is ready", at + 1),
                || async {
                    let answer = api.try_send(api.request(reqwest::Method::GET, "/readyz"));
                    (answer.await.ok()?.status == 200).then_some(())
                },
            )
            .await;
        }
    }

    pub(crate) fn kill_node(&mut self, at: usize) {
        self.mqtt.set(at, None);
        self.admin.set(at, None);
        self.nodes[at]
            .process
            .take()
            .expect("the node runs")
            .kill9();
    }

    pub(crate) fn kill_service(&mut self, at: usize) {
        self.http.set(at, None);
        self.services[at]
            .process
            .take()
            .expect("the service runs")
            .kill9();
    }

    pub(crate) fn kill_worker(&mut self, at: usize) {
        self.workers[at]
            .process
            .take()
            .expect("the worker runs")
            .kill9();
    }

    pub(crate) fn kill_delays(&mut self, at: usize) {
        self.delays[at]
            .process
            .take()
            .expect("the delay queue runs")
            .kill9();
    }

    /// The one Redis.
    pub(crate) fn redis(&mut self) -> &mut RedisServer {
        self.redis.as_mut().expect("there is a single Redis")
    }

    /// RabbitMQ, to be harmed.
    pub(crate) fn rabbit(&mut self) -> &mut RabbitServer {
        Arc::get_mut(&mut self.rabbit).expect("it is the test's own")
    }

    /// SIGTERM as its operator sends it, an end without loss, and a new process.
    pub(crate) async fn roll_node(&mut self, at: usize) {
        self.mqtt.set(at, None);
        self.admin.set(at, None);
        Self::drain(&mut self.nodes[at]).await;
        self.start_node(at);
        self.await_ready().await;
    }

    pub(crate) async fn roll_service(&mut self, at: usize) {
        self.http.set(at, None);
        Self::drain(&mut self.services[at]).await;
        self.start_service(at);
    }

    pub(crate) async fn roll_worker(&mut self, at: usize) {
        Self::drain(&mut self.workers[at]).await;
        self.start_worker(at);
    }

    /// The epochs of these clients as the API knows them.
    pub(crate) async fn epochs(&self, names: &[String]) -> Vec<u64> {
        let api = self.api();
        let mut epochs = Vec::new();
        for name in names {
            let path = format!("/v1/clients/{name}");
            let epoch = eventually(Duration::from_secs(45), &path, || async {
                let answer = api.get(&path).await;
                (answer.status == 200)
                    .then(|| answer.json()["epoch"].as_u64())
                    .flatten()
            });
            epochs.push(epoch.await);
        }
        epochs
    }

    /// SIGTERM, and a clean end.
    async fn drain(member: &mut Member) {
        let mut process = member.process.take().expect("the process runs");
        process.signal(Signal::TERM);
        let status = process.wait(Duration::from_secs(60)).await;
        assert_eq!(status.code(), Some(0), "{} after SIGTERM", member.name);
    }

    pub(crate) fn witness(&self) -> Witness<'_> {
        Witness {
            api: self.api(),
            backend: &self.backend,
        }
    }

    /// The API of a push service that runs.
    pub(crate) fn api(&self) -> Api {
        let (_, address) = self
            .http
            .any(&mut Random::from_seed(1), None)
            .expect("a push service runs");
        Api::new(address, Some(API_KEY))
    }

    /// The value of a metric of one node, summed over its labels.
    pub(crate) async fn node_metric(&self, at: usize, name: &str) -> f64 {
        let address = self.admin.get(at).expect("the node runs");
        let text = Api::new(address, Some(API_KEY)).get("/metrics").await.text;
        crate::support::metric(&text, name).unwrap_or(0.0)
    }

    /// The whole log, for a test that looks for something.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// ERROR lines that contain this are no failure.
    pub(crate) fn expect_error(&mut self, part: &'static str) {
        self.expected_errors.push(part);
    }

    /// Stops everything and checks what was logged.
    pub(crate) async fn finish(mut self) {
        for member in self
            .services
            .iter_mut()
            .chain(&mut self.workers)
            .chain(&mut self.delays)
            .chain(&mut self.nodes)
        {
            if member.process.is_some() {
                Self::drain(member).await;
            }
        }
        self.rabbit.delete_vhost(&self.stores.rabbit).await;
        let unexpected: Vec<String> = self
            .log()
            .into_iter()
            .filter(|line| is_error(line))
            .filter(|line| !self.expected_errors.iter().any(|part| line.contains(part)))
            .collect();
        assert!(
            unexpected.is_empty(),
            "unexpected ERROR lines: {unexpected:#?}"
        );
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let kept = std::env::temp_dir().join(format!("moorline-{}.log", self.stores.prefix));
            let rabbit = self.rabbit.log();
            _ = std::fs::write(&kept, format!("{}\n\nRabbitMQ:\n{rabbit}", log.join("\n")));
            eprintln!("--- what all processes logged is in {}", kept.display());
            for line in log.iter().filter(|line| is_error(line)).take(20) {
                eprintln!("    {line}");
            }
        }
    }
}

/// What every process is configured with: no limits on how often devices come, and a backend that is asked again soon.
pub(crate) fn config(more: &str, backend: &Backend) -> String {
    format!(
        "{}\n[mqtt]\nconnects_per_second = 0\nhalf_open_max = 0\n\
         [mqtt.per_address]\nconnects_per_second = 0\nhalf_open_max = 0\nexempt = [\"127.0.0.0/8\"]\n\
         [mqtt.flapping]\nclient_connects = 0\naddress_connects = 0\n\
         [[upstream.rules]]\nname = \"all\"\nfilter = \"up/#\"\nurl = \"{}\"\nconcurrency = 32\n\
         retry = {{ attempts = 1000, initial = \"50ms\", max = \"1s\" }}\n",
        more,
        backend.url("/{client_id}"),
    )
}

/// The one RabbitMQ of the tests that do not harm it.
async fn shared_rabbit() -> Arc<RabbitServer> {
    static SHARED: tokio::sync::OnceCell<Arc<RabbitServer>> = tokio::sync::OnceCell::const_new();
    let start = || async { Arc::new(RabbitServer::start().await) };
    Arc::clone(SHARED.get_or_init(start).await)
}
