//! What becomes of subscriptions that a device may no longer have.

use moorline_access_node::{Access, AclConfig, AuthConfig, AuthenticatorKind, hash_password};
use moorline_tests::device::Device;
use moorline_tests::waiting::{SOON, eventually};
use moorline_tests::wire::{Publish, V5};

use super::nodes::{World, client};
use super::persistent;

/// Lets in `user` with `secret`, who may do anything but subscribe to `secrets/#`.
fn access() -> (tempfile::TempDir, Access) {
    let folder = tempfile::tempdir().unwrap();
    let line = format!("user:{}\n", hash_password(b"secret").unwrap());
    std::fs::write(folder.path().join("passwords"), line).unwrap();
    let auth = AuthConfig {
        chain: vec![AuthenticatorKind::PasswordFile],
        ..AuthConfig::default()
    };
    let rules = serde_json::json!({
        "default": "allow",
        "rules": [{ "permission": "deny", "action": "subscribe", "topics": ["secrets/#"] }],
    });
    let acl: AclConfig = serde_json::from_value(rules).unwrap();
    let data_dir = folder.path().to_owned();
    let access = Access {
        auth,
        acl,
        data_dir,
    };
    (folder, access)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_is_denied_ends_although_its_holder_is_out_of_reach_at_first() {
    let world = World::new().await;
    let a = world.node("a").await;
    let (_folder, access) = access();
    let b = world.node_for("b", &world.redis.url(), access).await;
    let mut held_by_a = None;
    for number in 0..1_000 {
        let id = format!("device-{number}");
        let shard = world.shards.shard_of(&client(&id));
        let holder = eventually(SOON, "the shard is held", || async {
            world.shards.holder(shard).await.unwrap()
        })
        .await;
        if holder == a.id {
            held_by_a = Some(id);
            break;
        }
    }
    let id = held_by_a.expect("a holds about half of the shards");
    let mut before = Device::connect(a.mqtt, persistent(V5, &id)).await;
    assert_eq!(before.subscribe("secrets/#", 1).await, 1);
    assert_eq!(before.subscribe("news/#", 1).await, 1);
    before.disconnect().await;
    let mut connect = persistent(V5, &id);
    connect.user_name = Some("user".to_owned());
    connect.password = Some(b"secret".to_vec());
    world.cut_off(&a);
    for _ in 0..2 {
        let refused = Device::try_connect(b.mqtt, connect.clone()).await;
        assert!(refused.is_err(), "whoever matches for it cannot be told");
    }
    world.reconnect(&a);
    let let_in = Device::connect(b.mqtt, connect).await;
    assert!(let_in.session_present);
    let_in.disconnect().await;
    let mut sender = Device::clean(a.mqtt, V5, "sender").await;
    for topic in ["secrets/x", "news/x"] {
        assert_eq!(sender.publish(Publish::new(topic, 1, topic)).await, 0);
    }
    eventually(SOON, "what it may have waits for it", || async {
        let waiting = world.waiting(&id).await;
        waiting.contains(&"news/x".to_owned()).then_some(())
    })
    .await;
    assert_eq!(world.waiting(&id).await, ["news/x"]);
    let record = world.stores.sessions.load(&client(&id)).await.unwrap();
    assert_eq!(record.unwrap().subscriptions.len(), 1);
}
