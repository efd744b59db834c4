//! In a cluster, publishes that wait until a QoS 2 PUBLISH before them is noted.
//!
//! The packet identifiers of a persistent session are in one store, and what its device publishes goes to another. A message that went on
//! before its identifier was noted would go on again, as another message, if the device repeated it to a node that knows nothing of the
//! first. So it waits, and with it whatever the device publishes next; notes are under way together. On one machine both are
//! in the same store, which keeps them in order by itself.

use std::collections::VecDeque;
use std::task::{Context, Poll};

use moorline_mqtt::Publish;
use moorline_router::{MessageId, StoreError};
use tokio::sync::oneshot;

use crate::close_reason::CloseReason;
use crate::connection::Connection;
use crate::inbound::Turn;
use crate::outbound::Corked;
use crate::publish::Durable;

type Routed = Result<Option<Durable>, StoreError>;

/// One publish that waits for its turn.
struct UnroutedPublish {
    publish: Publish,
    id: Option<MessageId>,
    /// What has to be noted first, of this one.
    noted: Option<Durable>,
    /// To whoever waits for it to be durable.
    routed: oneshot::Sender<Routed>,
}

/// What a connection has taken and not passed on, in order.
#[derive(Default)]
pub(crate) struct Unrouted {
    publishes: VecDeque<UnroutedPublish>,
    /// Of their payloads.
    bytes: usize,
}

impl Unrouted {
    /// Puts `publish` behind the others. The future resolves when it has been passed on and is durable.
    fn push(&mut self, publish: Publish, id: Option<MessageId>, noted: Option<Durable>) -> Durable {
        let (routed, durable) = oneshot::channel::<Routed>();
        self.bytes += publish.payload.len();
        self.publishes.push_back(UnroutedPublish {
            publish,
            id,
            noted,
            routed,
        });
        Box::pin(async move {
            let ended = |_| Err(StoreError::Unavailable("the connection ended".to_owned()));
            match durable.await.unwrap_or_else(ended)? {
                Some(durable) => durable.await,
                None => Ok(()),
            }
        })
    }

    fn pop(&mut self) -> Option<UnroutedPublish> {
        let first = self.publishes.pop_front()?;
        self.bytes -= first.publish.payload.len();
        Some(first)
    }

    fn poll_noted(&mut self, context: &mut Context<'_>) -> Poll<Result<(), StoreError>> {
        match self.publishes.front_mut() {
            Some(UnroutedPublish {
                noted: Some(noted), ..
            }) => noted.as_mut().poll(context),
            Some(_) => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.publishes.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.publishes.is_empty()
    }
}

impl Connection {
    /// Passes `publish` on behind what waits, and what of it is to be `noted` first. The future resolves when it is durable.
    pub(crate) fn route_later(
        &mut self,
        publish: &Publish,
        id: Option<MessageId>,
        noted: Option<Durable>,
    ) -> Durable {
        let unrouted = &mut self.waiting.get_or_insert_default().unrouted;
        unrouted.push(publish.clone(), id, noted)
    }

    /// Resolves when the first of those that wait may be passed on, or never can be.
    pub(crate) fn poll_noted(&mut self, context: &mut Context<'_>) -> Poll<Result<(), StoreError>> {
        match &mut self.waiting {
            Some(waiting) => waiting.unrouted.poll_noted(context),
            None => Poll::Pending,
        }
    }

    /// Passes the first of them on, once it is noted.
    pub(crate) fn on_noted(&mut self, noted: Result<(), StoreError>) -> Result<(), CloseReason> {
        if noted.is_err() {
            // Nor does what stands behind it; and what has been waited for once must not be waited for again.
            self.forget_unrouted();
        }
        match noted {
            Ok(()) => {}
            // The device is connected elsewhere, where nobody would hear of it: it does not go on from here.
            Err(StoreError::Stale { .. }) => return Err(CloseReason::TakenOver),
            Err(error) => {
                tracing::debug!(client = %self.session.client, %error, "publish not noted");
                return Err(CloseReason::StoreUnavailable);
            }
        }
        let mut turn = Turn::new();
        self.route_first(&mut turn.corked);
        self.finish_turn(turn);
        Ok(())
    }

    fn forget_unrouted(&mut self) {
        if let Some(waiting) = &mut self.waiting {
            waiting.unrouted = Unrouted::default();
        }
        self.drop_empty_waiting();
    }

    fn route_first(&mut self, corked: &mut Corked) {
        let Some(waiting) = &mut self.waiting else {
            return;
        };
        let first = waiting.unrouted.pop();
        self.drop_empty_waiting();
        if let Some(UnroutedPublish {
            publish,
            id,
            routed,
            ..
        }) = first
        {
            let durable = self.route_now(&publish, id, corked).durable;
            // Nobody waits for QoS 0.
            let _ = routed.send(Ok(durable));
        }
    }

    /// Passes everything on that was noted, at the end of a connection. What is not noted does not go on, nor does what comes
    /// after it: the device repeats it.
    pub(crate) async fn route_rest(&mut self) {
        while let Some(first) = self
            .waiting
            .as_mut()
            .and_then(|waiting| waiting.unrouted.publishes.front_mut())
        {
            if let Some(noted) = first.noted.take()
                && noted.await.is_err()
            {
                return self.forget_unrouted();
            }
            self.route_first(&mut Corked::new());
        }
    }
}
