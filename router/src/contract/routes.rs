//! Cases of [`crate::Routes`]: epochs, compare-and-delete, leases.

use super::{Backend, Settings, client, eventually};
use crate::{ClientId, Epoch, NodeId, NodeRecord, NodeState, Routes, Standing};

/// Runs every case of this suite.
#[macro_export]
macro_rules! route_contract {
    ($backend:expr) => {
        $crate::contract_cases!($backend, routes:
            the_newest_claim_wins_and_tells_whom_it_displaced,
            only_the_owner_releases_a_route,
            epochs_rise_under_concurrent_claims,
            epochs_never_go_back_across_restarts,
            a_route_is_valid_while_its_nodes_lease_is,
            a_node_that_leaves_takes_its_routes_with_it,
            routes_are_listed_in_order_and_in_pages,
            nodes_are_what_was_renewed_last,
            a_node_is_told_what_of_its_connections_the_store_has,
        );
    };
}

pub fn node(name: &str) -> NodeRecord {
    NodeRecord {
        id: NodeId::from_text(name),
        address: String::new(),
        version: "0.1.0".into(),
        state: NodeState::Up,
        connections: 0,
        region: String::new(),
        server_reference: String::new(),
    }
}

const LONG_MS: u64 = 600_000;

pub async fn the_newest_claim_wins_and_tells_whom_it_displaced(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    let (one, two) = (node("one"), node("two"));
    routes.renew(one.clone(), LONG_MS).await.unwrap();
    routes.renew(two.clone(), LONG_MS).await.unwrap();
    let device = client("device");
    assert_eq!(routes.look_up(&device).await.unwrap(), None);
    let first = routes.claim(&device, &one.id).await.unwrap();
    assert_eq!(first.previous, None);
    let second = routes.claim(&device, &two.id).await.unwrap();
    assert!(second.epoch > first.epoch);
    let previous = second.previous.unwrap();
    assert_eq!((previous.node, previous.epoch), (one.id, first.epoch));
    let route = routes.look_up(&device).await.unwrap().unwrap();
    assert_eq!((route.node, route.epoch), (two.id, second.epoch));
}

pub async fn only_the_owner_releases_a_route(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    let node = node("n");
    routes.renew(node.clone(), LONG_MS).await.unwrap();
    let device = client("device");
    let old = routes.claim(&device, &node.id).await.unwrap().epoch;
    let new = routes.claim(&device, &node.id).await.unwrap().epoch;
    assert!(!routes.release(&device, old).await.unwrap());
    assert_eq!(routes.look_up(&device).await.unwrap().unwrap().epoch, new);
    assert!(routes.release(&device, new).await.unwrap());
    assert!(!routes.release(&device, new).await.unwrap());
    assert_eq!(routes.look_up(&device).await.unwrap(), None);
    assert!(routes.claim(&device, &node.id).await.unwrap().epoch > new);
}

pub async fn epochs_rise_under_concurrent_claims(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    let node = node("n");
    routes.renew(node.clone(), LONG_MS).await.unwrap();
    let claims = (0..50).map(|_| {
        let (routes, node) = (routes.clone(), node.id.clone());
        tokio::spawn(async move { routes.claim(&client("device"), &node).await.unwrap() })
    });
    let mut epochs = Vec::new();
    let mut displaced = Vec::new();
    for claim in claims.collect::<Vec<_>>() {
        let claim = claim.await.unwrap();
        epochs.push(claim.epoch);
        displaced.extend(claim.previous.map(|route| route.epoch));
    }
    epochs.sort_unstable();
    displaced.sort_unstable();
    assert!(
        epochs.windows(2).all(|pair| pair[0] < pair[1]),
        "each claim has its own epoch"
    );
    // Each was displaced exactly once, except the last, which is in force.
    assert_eq!(displaced, epochs[..49]);
    let route = routes.look_up(&client("device")).await.unwrap().unwrap();
    assert_eq!(route.epoch, epochs[49]);
}

pub async fn epochs_never_go_back_across_restarts(backend: &mut dyn Backend) {
    let mut routes = backend.start(Settings::default()).await.routes;
    let mut last = Epoch(0);
    for _ in 0..3 {
        for _ in 0..3 {
            let epoch = routes
                .claim(&client("device"), &node("n").id)
                .await
                .unwrap()
                .epoch;
            assert!(epoch > last);
            last = epoch;
        }
        routes = backend.restart().await.routes;
    }
}

pub async fn a_route_is_valid_while_its_nodes_lease_is(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    let node = node("n");
    let device = client("device");
    routes.claim(&device, &node.id).await.unwrap();
    assert_eq!(
        routes.look_up(&device).await.unwrap(),
        None,
        "no lease was taken"
    );
    routes.renew(node.clone(), 50).await.unwrap();
    eventually("the lease has lapsed", || async {
        routes.look_up(&device).await.unwrap().is_none()
    })
    .await;
    assert!(routes.list(None, 10).await.unwrap().is_empty());
    assert!(routes.nodes().await.unwrap().is_empty());
    routes.renew(node, LONG_MS).await.unwrap();
    assert!(
        routes.look_up(&device).await.unwrap().is_some(),
        "the node came back in time"
    );
}

pub async fn a_node_that_leaves_takes_its_routes_with_it(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    let (leaving, staying) = (node("leaving"), node("staying"));
    routes.renew(leaving.clone(), LONG_MS).await.unwrap();
    routes.renew(staying.clone(), LONG_MS).await.unwrap();
    routes.claim(&client("a"), &leaving.id).await.unwrap();
    routes.claim(&client("b"), &staying.id).await.unwrap();
    routes.leave(&leaving.id).await.unwrap();
    assert_eq!(routes.look_up(&client("a")).await.unwrap(), None);
    assert!(routes.look_up(&client("b")).await.unwrap().is_some());
    assert_eq!(routes.nodes().await.unwrap(), [staying]);
}

async fn listed(routes: &dyn Routes, after: Option<&ClientId>, limit: usize) -> Vec<ClientId> {
    let page = routes.list(after, limit).await.unwrap();
    page.into_iter().map(|(client, _)| client).collect()
}

pub async fn routes_are_listed_in_order_and_in_pages(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    let node = node("n");
    routes.renew(node.clone(), LONG_MS).await.unwrap();
    let mut names: Vec<_> = (0..100).map(|n| client(&format!("device-{n}"))).collect();
    for name in &names {
        routes.claim(name, &node.id).await.unwrap();
    }
    names.sort();
    let mut seen: Vec<ClientId> = Vec::new();
    loop {
        let page = listed(&*routes, seen.last(), 30).await;
        if page.is_empty() {
            break;
        }
        assert!(page.len() <= 30);
        seen.extend(page);
    }
    assert_eq!(seen, names);
}

pub async fn nodes_are_what_was_renewed_last(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    routes.renew(node("n"), LONG_MS).await.unwrap();
    let draining = NodeRecord {
        state: NodeState::Draining,
        connections: 7,
        ..node("n")
    };
    routes.renew(draining.clone(), LONG_MS).await.unwrap();
    assert_eq!(routes.nodes().await.unwrap(), [draining]);
}

pub async fn a_node_is_told_what_of_its_connections_the_store_has(backend: &mut dyn Backend) {
    let routes = backend.start(Settings::default()).await.routes;
    let (one, two) = (node("one"), node("two"));
    assert!(!routes.renew(one.clone(), LONG_MS).await.unwrap());
    assert!(routes.renew(one.clone(), LONG_MS).await.unwrap());
    routes.renew(two.clone(), LONG_MS).await.unwrap();
    let (kept, moved, gone) = (client("kept"), client("moved"), client("gone"));
    let kept_epoch = routes.claim(&kept, &one.id).await.unwrap().epoch;
    let moved_epoch = routes.claim(&moved, &one.id).await.unwrap().epoch;
    let current = routes.claim(&moved, &two.id).await.unwrap().epoch;
    let gone_epoch = routes.claim(&gone, &one.id).await.unwrap().epoch;
    assert!(routes.release(&gone, gone_epoch).await.unwrap());
    let held = [
        (kept.clone(), kept_epoch),
        (moved.clone(), moved_epoch),
        (gone.clone(), gone_epoch),
    ];
    let standing = routes.reconcile(&one.id, &held).await.unwrap();
    let lost = Standing::Lost { current };
    assert_eq!(standing, [Standing::Owned, lost, Standing::Restored]);
    let route = routes.look_up(&gone).await.unwrap().unwrap();
    assert_eq!((route.node, route.epoch), (one.id.clone(), gone_epoch));
    assert_eq!(routes.look_up(&moved).await.unwrap().unwrap().node, two.id);
    assert!(routes.claim(&gone, &two.id).await.unwrap().epoch > gone_epoch);
}
