//! Asking devices to leave: some at a time, so that the other nodes are not overrun.

use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;

use crate::close_reason::CloseReason;
use crate::node::Node;
use crate::session::Session;

/// Between two groups of devices.
const TURN: Duration = Duration::from_millis(50);
const TURNS_PER_SECOND: u32 = 20;

/// Closes every connection, about `per_second` of them (0 is all at once), with the address of another server for those that understand it.
/// Resolves when all have been asked.
pub(crate) async fn run(node: &Arc<Node>, per_second: u32, server_reference: Option<&str>) {
    let hasher = RandomState::new();
    let mut asked = 0;
    let mut turn = 0;
    loop {
        let mut held: Vec<Arc<Session>> = node
            .sessions
            .iter()
            .filter(|session| is_open(session))
            .map(|session| Arc::clone(&session))
            .collect();
        if held.is_empty() {
            tracing::info!(connections = asked, "devices asked to leave");
            return;
        }
        // In no order, so that devices that connected together do not come together again.
        held.sort_by_cached_key(|session| hasher.hash_one(&session.client));
        asked += held.len();
        let mut held = held.into_iter().peekable();
        while held.peek().is_some() {
            turn += 1;
            let now = match per_second {
                0 => usize::MAX,
                _ => jittered(&hasher, turn, per_second),
            };
            for session in held.by_ref().take(now) {
                if let Some(link) = &mut session.lock().link {
                    link.close_referring(CloseReason::Drained, server_reference);
                }
            }
            tokio::time::sleep(TURN).await;
        }
    }
}

fn is_open(session: &Session) -> bool {
    let state = session.lock();
    state
        .link
        .as_ref()
        .is_some_and(|link| link.closing.is_none())
}

/// How many leave in this turn: half to one and a half times the share of a turn.
fn jittered(hasher: &RandomState, turn: usize, per_second: u32) -> usize {
    let percent = 50 + hasher.hash_one(turn) % 101;
    let hundredths = u64::from(per_second) * percent / u64::from(TURNS_PER_SECOND);
    let rest = u64::from(hasher.hash_one((turn, per_second)) % 100 < hundredths % 100);
    usize::try_from(hundredths / 100 + rest).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_on_the_whole() {
        let hasher = RandomState::new();
        for per_second in [1, 7, 100, 2_000] {
            let turns = usize::try_from(TURNS_PER_SECOND * 200).unwrap();
            let left: usize = (0..turns)
                .map(|turn| jittered(&hasher, turn, per_second))
                .sum();
            let wanted = usize::try_from(per_second * 200).unwrap();
            assert!(
                left.abs_diff(wanted) <= wanted / 5 + 40,
                "{left} of {wanted}"
            );
        }
    }
}
