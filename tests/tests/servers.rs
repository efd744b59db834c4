//! The fixtures themselves: a fault that a fixture only pretends to make would prove nothing.

use std::time::Duration;

use moorline_tests::servers::{Proxy, RabbitServer, RedisCluster, RedisServer, Reply, Sentinels};
use moorline_tests::soon;

use crate::support::run;

#[test]
fn redis_keeps_what_it_answered_when_it_is_killed_and_comes_back_on_its_port() {
    run(async {
        let mut redis = RedisServer::start().await;
        let address = redis.address();
        assert_eq!(redis.command(&["SET", "a", "1"]).await.text(), "OK");
        redis.kill9();
        assert!(Reply::of(address, &["PING"]).await.is_err());
        redis.restart().await;
        assert_eq!(redis.address(), address);
        assert_eq!(redis.command(&["GET", "a"]).await.text(), "1");
        let server = redis.command(&["INFO", "server"]).await;
        assert_eq!(server.field("process_id"), Some(redis.pid().to_string()));
        redis.flush().await;
        assert_eq!(redis.command(&["GET", "a"]).await, Reply::Nil);
        redis.stop().await;
        redis.restart().await;
        assert_eq!(redis.command(&["DBSIZE"]).await.number(), 0);
    });
}

#[test]
fn a_frozen_redis_answers_nothing_until_it_goes_on() {
    run(async {
        let redis = RedisServer::start().await;
        redis.freeze();
        let answer = tokio::time::timeout(
            Duration::from_millis(300),
            Reply::of(redis.address(), &["PING"]),
        );
        assert!(answer.await.is_err());
        redis.thaw();
        assert_eq!(redis.command(&["PING"]).await.text(), "PONG");
    });
}

#[test]
fn the_proxy_passes_cuts_freezes_and_delays() {
    run(async {
        let redis = RedisServer::start().await;
        let proxy = Proxy::to(redis.address()).await;
        let ping = || Reply::of(proxy.address(), &["PING"]);
        assert_eq!(ping().await.unwrap().text(), "PONG");
        proxy.cut();
        assert!(ping().await.is_err());
        proxy.heal();
        assert_eq!(ping().await.unwrap().text(), "PONG");
        proxy.freeze();
        let waiting = tokio::spawn(Reply::of(proxy.address(), &["PING"]));
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!waiting.is_finished());
        proxy.heal();
        assert_eq!(
            soon("the answer", waiting).await.unwrap().unwrap().text(),
            "PONG"
        );
        proxy.delay(Duration::from_millis(100));
        let started = std::time::Instant::now();
        assert_eq!(ping().await.unwrap().text(), "PONG");
        assert!(started.elapsed() >= Duration::from_millis(200));
        assert_eq!(proxy.accepted(), 5);
    });
}

#[test]
fn rabbitmq_has_virtual_hosts_an_alarm_and_comes_back_on_its_port() {
    run(async {
        let mut rabbit = RabbitServer::start().await;
        let vhost = rabbit.vhost().await;
        assert_eq!(rabbit.queues(&vhost).await, []);
        assert_eq!(
            rabbit.eval("os:getpid()").await,
            format!("{:?}", rabbit.pid().to_string())
        );
        rabbit.memory_alarm(true).await;
        rabbit.memory_alarm(false).await;
        rabbit.kill9();
        rabbit.restart().await;
        let hosts = rabbit.eval("rabbit_vhost:list()").await;
        assert!(hosts.contains(&vhost.name), "{hosts}");
        rabbit.delete_vhost(&vhost).await;
        rabbit.stop().await;
        rabbit.restart().await;
        let hosts = rabbit.eval("rabbit_vhost:list()").await;
        assert!(!hosts.contains(&vhost.name), "{hosts}");
    });
}

#[test]
fn sentinels_make_another_redis_the_master() {
    run(async {
        let mut all = Sentinels::start().await;
        let master = all.master().await;
        assert_eq!(master, 0);
        let set = all.servers[master].command(&["SET", "a", "1"]).await;
        assert_eq!(set.text(), "OK");
        assert_eq!(
            all.servers[master]
                .command(&["WAIT", "2", "5000"])
                .await
                .number(),
            2
        );
        let (old, new) = all.fail_over().await;
        assert_ne!(old, new);
        assert_eq!(all.servers[new].command(&["GET", "a"]).await.text(), "1");
        assert_eq!(
            all.servers[new].command(&["SET", "a", "2"]).await.text(),
            "OK"
        );
    });
}

#[test]
fn redis_cluster_serves_every_slot_after_it_lost_a_master() {
    run(async {
        let mut cluster = RedisCluster::start().await;
        let master = cluster.master_of("a").await;
        assert_eq!(
            cluster.servers[master]
                .command(&["SET", "a", "1"])
                .await
                .text(),
            "OK"
        );
        assert_eq!(
            cluster.servers[master]
                .command(&["WAIT", "1", "5000"])
                .await
                .number(),
            1
        );
        let (old, new) = cluster.fail_over("a").await;
        assert_eq!(old, master);
        assert_eq!(
            cluster.servers[new].command(&["GET", "a"]).await.text(),
            "1"
        );
    });
}
