//! Cases of [`crate::Bans`].

use super::{Backend, Settings};
use crate::{Ban, BanTarget};

/// Runs every case of this suite.
#[macro_export]
macro_rules! ban_contract {
    ($backend:expr) => {
        $crate::contract_cases!($backend, bans:
            a_ban_is_kept_replaced_and_deleted,
            targets_of_different_kinds_are_different,
        );
    };
}

fn ban(kind: &str, value: &str) -> Ban {
    Ban {
        target: BanTarget::parse(kind, value).unwrap(),
        reason: "seen to misbehave".into(),
        since_ms: 5,
        expires_at_ms: None,
    }
}

pub async fn a_ban_is_kept_replaced_and_deleted(backend: &mut dyn Backend) {
    let bans = backend.start(Settings::default()).await.bans;
    let first = ban("address", "192.0.2.0/24");
    bans.save(first.clone()).await.unwrap();
    bans.save(ban("client", "car/7")).await.unwrap();
    let replaced = Ban {
        reason: "".into(),
        since_ms: 6,
        expires_at_ms: Some(7),
        ..ban("client", "car/7")
    };
    bans.save(replaced.clone()).await.unwrap();
    let bans = backend.restart().await.bans;
    assert_eq!(
        bans.get(&replaced.target).await.unwrap(),
        Some(replaced.clone())
    );
    let mut all = bans.load_all().await.unwrap();
    all.sort_by(|a, b| a.target.cmp(&b.target));
    assert_eq!(all, [first.clone(), replaced.clone()]);
    assert!(bans.delete(&replaced.target).await.unwrap());
    assert!(!bans.delete(&replaced.target).await.unwrap());
    assert_eq!(bans.get(&replaced.target).await.unwrap(), None);
    let bans = backend.restart().await.bans;
    assert_eq!(bans.load_all().await.unwrap(), [first]);
}

pub async fn targets_of_different_kinds_are_different(backend: &mut dyn Backend) {
    let bans = backend.start(Settings::default()).await.bans;
    for kind in BanTarget::KINDS {
        bans.save(ban(kind, "192.0.2.7")).await.unwrap();
    }
    bans.save(ban("address", "192.0.2.7/31")).await.unwrap();
    assert_eq!(bans.load_all().await.unwrap().len(), 4);
    let username = BanTarget::parse("username", "192.0.2.7").unwrap();
    assert!(bans.delete(&username).await.unwrap());
    assert_eq!(bans.load_all().await.unwrap().len(), 3);
    let client = BanTarget::parse("client", "192.0.2.7").unwrap();
    assert!(bans.get(&client).await.unwrap().is_some());
}
