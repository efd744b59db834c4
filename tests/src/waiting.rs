//! Waiting for something to become true. Tests never sleep for a guessed time.

use std::future::Future;
use std::time::{Duration, Instant};

/// How long anything ordinary may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// Asks `check` again and again until it has an answer.
///
/// # Panics
/// When there is none after `deadline`: `what` says what was awaited.
pub async fn eventually<T, F>(deadline: Duration, what: &str, mut check: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let started = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(answer) = check().await {
            return answer;
        }
        assert!(
            started.elapsed() < deadline,
            "not within {deadline:?}: {what}"
        );
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Waits for one future at most [`SOON`].
///
/// # Panics
/// When it takes longer.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(SOON, future).await {
        Ok(done) => done,
        Err(_) => panic!("not within {SOON:?}: {what}"),
    }
}
