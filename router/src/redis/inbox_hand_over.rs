//! Moves entries of shared subscriptions from one inbox to another.
//!
//! The inboxes are in two slots, so this cannot be one write. The entry is claimed where it stands, which lets one of several
//! that try succeed; appended where it goes; and only then ended. Who dies in between leaves it in both inboxes, with the same
//! message id, or claimed: then it can be handed over again when the claim is over. It is never lost.
//! What is asked for meanwhile is done next, all of it together and in the order in which it was called.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt, join_all};
use parking_lot::Mutex;
use redis::Value;
use tokio::sync::oneshot;

use super::inbox_answer as answer;
use super::inboxes::InboxParts;
use crate::{
    Append, Appended, ClientId, End, EndReason, HandedOver, MessageId, Position, StoreError,
};

/// So many are moved together.
const TOGETHER: usize = 64;
/// So many may wait.
const QUEUE_MAX: usize = 100_000;
/// Far longer than a move takes that nobody died over.
const CLAIM_MS: u64 = 30_000;

struct Move {
    client: ClientId,
    position: Position,
    to: Option<Append>,
    answer: oneshot::Sender<Result<HandedOver, StoreError>>,
}

/// What waits to be moved.
#[derive(Default)]
pub(super) struct HandOvers {
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    moves: VecDeque<Move>,
    /// Whether a task sees to them.
    is_seen_to: bool,
}

impl InboxParts {
    /// See [`crate::Inboxes::hand_over`].
    pub(super) fn hand_over(
        self: &Arc<Self>,
        client: &ClientId,
        position: Position,
        to: Option<Append>,
    ) -> BoxFuture<'static, Result<HandedOver, StoreError>> {
        let (answer, answered) = oneshot::channel();
        let begin = {
            let mut queue = self.hand_overs.queue.lock();
            if queue.moves.len() < QUEUE_MAX {
                queue.moves.push_back(Move {
                    client: client.clone(),
                    position,
                    to,
                    answer,
                });
            }
            !std::mem::replace(&mut queue.is_seen_to, true)
        };
        if begin {
            tokio::spawn(self.clone().move_queued());
        }
        let unanswered = |_| {
            let overloaded = "too many messages are being handed over";
            Err(StoreError::Unavailable(overloaded.to_owned()))
        };
        async move { answered.await.unwrap_or_else(unanswered) }.boxed()
    }

    async fn move_queued(self: Arc<Self>) {
        loop {
            let moves: Vec<Move> = {
                let mut queue = self.hand_overs.queue.lock();
                if queue.moves.is_empty() {
                    queue.is_seen_to = false;
                    return;
                }
                let count = queue.moves.len().min(TOGETHER);
                queue.moves.drain(..count).collect()
            };
            self.move_together(moves).await;
        }
    }

    async fn move_together(self: &Arc<Self>, moves: Vec<Move>) {
        let claims = moves.iter().map(|one| {
            let call = match one.to {
                Some(_) => {
                    let claim = MessageId::generate();
                    self.calls
                        .claim(&one.client, one.position, claim.as_str(), CLAIM_MS)
                }
                None => self.calls.take(&one.client, one.position),
            };
            self.link.submit(one.client.as_str(), call)
        });
        let claimed = join_all(claims.collect::<Vec<_>>()).await;
        let mut appends = Vec::new();
        for (one, claimed) in moves.into_iter().zip(claimed) {
            let claimed = claimed.and_then(|value| self.read_claimed(&one.client, value));
            match (claimed.as_deref(), &one.to) {
                (Ok("claimed"), Some(append)) => {
                    let appended = self.append(append, None);
                    appends.push(async move { (one, appended.await) });
                }
                (Ok("taken"), _) => drop(one.answer.send(Ok(HandedOver::Taken))),
                (Ok(_), _) => drop(one.answer.send(Ok(HandedOver::Gone))),
                (Err(error), _) => drop(one.answer.send(Err(error.clone()))),
            }
        }
        let settled = join_all(appends).await.into_iter().map(|(one, appended)| {
            let parts = self.clone();
            async move {
                let outcome = parts.settle(&one.client, one.position, appended).await;
                let _ = one.answer.send(outcome);
            }
        });
        join_all(settled.collect::<Vec<_>>()).await;
    }

    fn read_claimed(&self, client: &ClientId, value: Value) -> Result<String, StoreError> {
        let [ended, listed, word] = answer::exactly(value)?;
        self.tidy_emptied(client, ended, listed)?;
        answer::text(word)
    }

    /// Ends the entry that went elsewhere, or gives it free.
    async fn settle(
        self: &Arc<Self>,
        client: &ClientId,
        position: Position,
        appended: Result<Appended, StoreError>,
    ) -> Result<HandedOver, StoreError> {
        if let Ok(Appended::Stored { .. } | Appended::Repeated { .. }) = appended {
            let end = End {
                client: client.clone(),
                position,
                reason: EndReason::SessionEnded,
            };
            if let Err(error) = self.end_now(client, vec![end.clone()]).await {
                tracing::debug!(%client, %error, "a message that was handed over stays for now");
                self.end(client.clone(), vec![end]);
            }
        } else {
            let unclaim = self.calls.unclaim(client, position);
            self.link.note(client.as_str(), unclaim);
        }
        appended.map(HandedOver::Moved)
    }
}
