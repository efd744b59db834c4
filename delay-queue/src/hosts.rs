//! How many calls go to one host at the same time: a slow backend takes no more than its own.
//!
//! A job that waits for its turn holds a place that others could have. So only a short line waits at each host. Behind it, a job waits
//! for a moment where the host keeps up, and is sent away at once where it does not: into the store, for as long as the host is likely to
//! need for those that were sent away before. A host with a hundred thousand jobs that are due is so asked for by as many as it can
//! answer, and not by all of them again and again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Hosts that are remembered without a call under way.
const IDLE_MAX: usize = 1_024;
/// How long a job in the line waits for its turn.
const LINE_PATIENCE: Duration = Duration::from_secs(5);
/// How long one behind the line does. A host that lets it wait longer is slow.
const CROWD_PATIENCE: Duration = Duration::from_millis(500);
/// How long a call takes as long as none has ended.
const CALL_TIME: Duration = Duration::from_secs(1);
/// How long a job is sent away at least.
const AWAY_MIN: Duration = Duration::from_millis(200);
/// And at most: a host that has recovered is not idle for longer.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// The calls under way, by host.
pub(crate) struct Hosts {
    each: usize,
    line_max: usize,
    by_host: Mutex<HashMap<String, Arc<Host>>>,
}

struct Host {
    turns: Arc<Semaphore>,
    load: Mutex<Load>,
}

/// What is known of a host.
struct Load {
    /// Jobs that wait for their turns.
    waiting: usize,
    /// A job behind the line has waited in vain, and the line was not empty since.
    is_slow: bool,
    /// How long a call takes, about.
    call_time: Duration,
    /// When those that were sent away are likely to have had their turns.
    busy_until: Option<Instant>,
}

impl Host {
    fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Load {
    /// For how long the next one is sent away; `fraction` is from 0 to 1.
    fn send_away(&mut self, each: usize, now: Instant, fraction: f64) -> Duration {
        let each = u32::try_from(each).unwrap_or(u32::MAX).max(1);
        let free = self.busy_until.unwrap_or(now).max(now) + self.call_time / each;
        self.busy_until = Some(free.min(now + AWAY_MAX));
        match free < now + AWAY_MAX {
            true => (free - now).max(AWAY_MIN),
            // Not all of them at the same time.
            false => AWAY_MAX.mul_f64(0.5 + fraction / 2.0),
        }
    }
}

/// A call may be made, for as long as this is kept.
pub(crate) struct Turn {
    host: Arc<Host>,
    since: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut load = self.host.load();
        load.call_time = (load.call_time * 7 + self.since.elapsed()) / 8;
    }
}

/// One of those that wait.
struct Waiting<'h>(&'h Host);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.load().waiting -= 1;
    }
}

impl Hosts {
    /// At most `each` calls to one host, of `concurrency` jobs at the same time.
    pub(crate) fn new(each: usize, concurrency: usize) -> Self {
        Self {
            each,
            line_max: each.min(concurrency / 4).max(1),
            by_host: Mutex::default(),
        }
    }

    /// Waits for its turn; those that wait get it in the order in which they came. Says how long to stay away where there is no room to
    /// wait; `fraction`, from 0 to 1, spreads those that do.
    pub(crate) async fn turn(&self, name: &str, fraction: f64) -> Result<Turn, Duration> {
        let host = self.of(name);
        let turn = |permit| Turn {
            host: Arc::clone(&host),
            since: Instant::now(),
            _permit: permit,
        };
        if let Ok(permit) = Arc::clone(&host.turns).try_acquire_owned() {
            // Nobody waits.
            host.load().is_slow = false;
            return Ok(turn(permit));
        }
        let (patience, _waiting) = {
            let mut load = host.load();
            let is_in_line = load.waiting < self.line_max;
            if load.is_slow && !is_in_line {
                return Err(load.send_away(self.each, Instant::now(), fraction));
            }
            load.waiting += 1;
            match is_in_line {
                true => (LINE_PATIENCE, Waiting(&host)),
                false => (CROWD_PATIENCE, Waiting(&host)),
            }
        };
        let permit = Arc::clone(&host.turns).acquire_owned();
        match tokio::time::timeout(patience, permit).await {
            Ok(permit) => Ok(turn(permit.expect("never closed"))),
            Err(_) => {
                let mut load = host.load();
                load.is_slow = true;
                Err(load.send_away(self.each, Instant::now(), fraction))
            }
        }
    }

    fn of(&self, name: &str) -> Arc<Host> {
        let mut by_host = self.by_host.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = by_host.get(name) {
            return Arc::clone(host);
        }
        if by_host.len() >= IDLE_MAX {
            by_host.retain(|_, host| Arc::strong_count(host) > 1);
        }
        let host = Arc::new(Host {
            turns: Arc::new(Semaphore::new(self.each)),
            load: Mutex::new(Load {
                waiting: 0,
                is_slow: false,
                call_time: CALL_TIME,
                busy_until: None,
            }),
        });
        by_host.insert(name.to_owned(), Arc::clone(&host));
        host
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_host_has_no_more_than_its_own_and_takes_nothing_from_others() {
        let hosts = Hosts::new(2, 100);
        let turn = async |name: &str| hosts.turn(name, 0.5).await.ok().unwrap();
        let _busy = [turn("a").await, turn("a").await];
        tokio::select! {
            biased;
            _ = turn("a") => panic!("a third call"),
            _ = turn("b") => {}
        }
        assert_eq!(hosts.of("a").load().waiting, 0, "who left waits no more");
        for n in 0..3 * IDLE_MAX {
            drop(turn(&n.to_string()).await);
        }
        assert!(hosts.by_host.lock().unwrap().len() <= IDLE_MAX);
        assert!(
            hosts.by_host.lock().unwrap().contains_key("a"),
            "it has calls"
        );
    }

    #[tokio::test]
    async fn behind_the_line_of_a_slow_host_nobody_waits_until_it_is_through() {
        let hosts = Arc::new(Hosts::new(1, 8));
        let busy = hosts.turn("a", 0.5).await.ok().unwrap();
        let in_line = Arc::clone(&hosts);
        let in_line = tokio::spawn(async move { in_line.turn("a", 0.5).await.is_ok() });
        while hosts.of("a").load().waiting == 0 {
            tokio::task::yield_now().await;
        }
        let began = Instant::now();
        let first = hosts.turn("a", 0.5).await.err();
        let waited = began.elapsed();
        let second = hosts.turn("a", 0.5).await.err();
        let at_once = began.elapsed() - waited;
        assert!(waited >= CROWD_PATIENCE, "{waited:?}");
        assert!(at_once < CROWD_PATIENCE, "{at_once:?}");
        assert!(first >= Some(AWAY_MIN) && second > first, "{second:?}");
        drop(busy);
        assert!(in_line.await.unwrap());
        // Nobody waited any more: it keeps up, and a crowd may wait again.
        drop(hosts.turn("a", 0.5).await);
        assert!(!hosts.of("a").load().is_slow);
    }

    #[test]
    fn whoever_is_sent_away_comes_back_when_the_host_is_likely_to_have_room() {
        let now = Instant::now();
        let mut load = Load {
            waiting: 0,
            is_slow: true,
            call_time: Duration::from_secs(2),
            busy_until: None,
        };
        let away: Vec<_> = (0..10_000).map(|_| load.send_away(4, now, 0.25)).collect();
        assert_eq!(away[0], Duration::from_millis(500));
        assert_eq!(away[9], Duration::from_secs(5));
        assert!(away.is_sorted_by_key(|away| *away.min(&(AWAY_MAX / 2))));
        assert_eq!(away[9_999], AWAY_MAX.mul_f64(0.625));
        // As time passes the line of those gets shorter.
        let later = load.send_away(4, now + AWAY_MAX, 0.25);
        assert_eq!(later, Duration::from_millis(500));
    }
}
