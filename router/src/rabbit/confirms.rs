//! Publishing on a channel, and what comes back: confirms and returned messages as the client library hands them out.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::protocol::{AMQPErrorKind, AMQPHardError};
use lapin::{Channel, Confirmation, ErrorKind};

use super::publisher::Publishing;

/// The confirm of the message with this number in its window.
pub(super) type Confirm = BoxFuture<'static, (u64, lapin::Result<Confirmation>)>;

/// Everything that is ready now.
pub(super) async fn gather(
    confirms: &mut FuturesUnordered<Confirm>,
    confirmed: &mut Vec<(u64, lapin::Result<Confirmation>)>,
) {
    while let Some(Some(next)) = confirms.next().now_or_never() {
        confirmed.push(next);
    }
}

/// Returns when the confirms that the client library is in the middle of resolving are resolved.
///
/// The broker sends a returned message before its confirm, and the library hands it to the next confirm that it resolves,
/// whichever that is: with one confirm of many messages in no order at all. While it resolves them it holds the lock that is taken
/// here. So after this every returned message whose own confirm was seen before is in a confirm that is ready.
pub(super) fn pass_behind_confirms(channel: &Channel) {
    // Taken when it is first polled; what it would then wait for is of no interest.
    let _ = channel.wait_for_confirms().now_or_never();
}

pub(super) async fn poll_once(confirm: &mut Confirm) -> Poll<(u64, lapin::Result<Confirmation>)> {
    poll_fn(|cx| Poll::Ready(Pin::new(&mut *confirm).poll(cx))).await
}

pub(super) fn publish(
    channel: &Channel,
    publishing: &Publishing,
) -> impl Future<Output = lapin::Result<Confirmation>> + Send + 'static {
    let channel = channel.clone();
    let options = BasicPublishOptions {
        mandatory: publishing.mandatory,
        immediate: false,
    };
    let mode = if publishing.persistent { 2 } else { 1 };
    let properties = publishing
        .properties
        .clone()
        .with_message_id(publishing.id.as_str().into())
        .with_delivery_mode(mode);
    let exchange = publishing.exchange.clone();
    let routing_key = publishing.routing_key.clone();
    let body = publishing.body.clone();
    async move {
        let published = channel.basic_publish(exchange, routing_key, options, &body, properties);
        let confirm = published.await?;
        // A channel that somebody holds stays open: the confirm is all that is needed from here.
        drop(channel);
        confirm.await
    }
}

/// Whether the broker closed the channel or the connection for what was published on it.
pub(super) fn is_about_a_message(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else {
        return false;
    };
    match error.kind() {
        AMQPErrorKind::Soft(_) => true,
        AMQPErrorKind::Hard(kind) => !matches!(
            kind,
            AMQPHardError::CONNECTIONFORCED
                | AMQPHardError::INTERNALERROR
                | AMQPHardError::RESOURCEERROR
                | AMQPHardError::CHANNELERROR
        ),
    }
}
