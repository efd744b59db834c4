//! The embedded store under the contract suites.

#![allow(clippy::unwrap_used, reason = "tests")]

mod job_model;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use moorline_router::contract::jobs::JobsBackend;
use moorline_router::contract::{Backend, Settings};
use moorline_router::embedded::{Config, EmbeddedStore};
use moorline_router::{JobLimits, Jobs, Stores};
use tempfile::TempDir;

#[derive(Default)]
struct Embedded {
    running: Option<(TempDir, Config, Arc<EmbeddedStore>)>,
}

#[async_trait]
impl Backend for Embedded {
    async fn start(&mut self, settings: Settings) -> Stores {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().join("data"),
            inbox: settings.inbox,
            receipt_retention: settings.receipt_retention,
            receipts_bytes_max: settings.receipts_bytes_max,
            upstream_queue_bytes_max: settings.upstream_queue_bytes_max,
            upstream_partitions: settings.upstream_partitions,
            ..Config::default()
        };
        let store = EmbeddedStore::open(config.clone()).unwrap();
        let stores = store.stores();
        self.running = Some((dir, config, store));
        stores
    }

    async fn restart(&mut self) -> Stores {
        let (dir, config, store) = self.running.take().unwrap();
        store.close().unwrap();
        let store = EmbeddedStore::open(config.clone()).unwrap();
        let stores = store.stores();
        self.running = Some((dir, config, store));
        stores
    }
}

/// Dies as a killed process does: what it leaves is what its files are at that moment.
#[derive(Default)]
struct Dying {
    running: Option<(TempDir, Config, Arc<EmbeddedStore>)>,
}

impl Dying {
    fn open(&mut self, dir: TempDir, jobs: JobLimits) -> Arc<dyn Jobs> {
        let config = Config {
            data_dir: dir.path().join("data"),
            jobs,
            ..Config::default()
        };
        let store = EmbeddedStore::open(config.clone()).unwrap();
        self.running = Some((dir, config, store.clone()));
        store
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

#[async_trait]
impl JobsBackend for Dying {
    async fn start(&mut self, limits: JobLimits) -> Arc<dyn Jobs> {
        self.open(tempfile::tempdir().unwrap(), limits)
    }

    async fn crash(&mut self) -> Arc<dyn Jobs> {
        let (old, config, store) = self.running.take().unwrap();
        let dir = tempfile::tempdir().unwrap();
        copy(&config.data_dir, &dir.path().join("data"));
        store.close().unwrap();
        drop(old);
        self.open(dir, config.jobs)
    }
}

moorline_router::job_contract!(Dying::default());
moorline_router::inbox_contract!(Embedded::default());
moorline_router::receipt_contract!(Embedded::default());
moorline_router::route_contract!(Embedded::default());
moorline_router::ban_contract!(Embedded::default());
moorline_router::session_contract!(Embedded::default());
moorline_router::upstream_contract!(Embedded::default());

/// One run of the model; each has a store of its own.
fn runs_like_the_reference(steps: Vec<job_model::Step>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(job_model::run(&mut Dying::default(), steps));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(16))]
    #[test]
    fn delayed_jobs_are_those_of_a_simple_reference(steps in job_model::steps()) {
        runs_like_the_reference(steps);
    }
}
