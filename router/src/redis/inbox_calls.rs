//! The functions of inboxes, and what they are called with.

use super::config::Limits;
use super::inbox_answer::{position_text, reason_letter};
use super::keys::Keys;
use super::script::{Call, Script, digest};
use crate::embedded::OverflowPolicy;
use crate::record::format;
use crate::{Append, ClientId, End, Epoch, MessageId, NodeId, Origin, Position};

/// Makes a [`Script`] of a file under `lua/` with what inboxes have in common before it.
macro_rules! inbox_script {
    ($file:literal) => {
        Script::new(
            concat!(
                include_str!("lua/inbox.lua"),
                include_str!(concat!("lua/", $file))
            ),
            || {
                digest(concat!(
                    include_str!("lua/inbox.lua"),
                    include_str!(concat!("lua/", $file))
                ))
            },
        )
    };
}

static APPEND: Script = inbox_script!("inbox_append.lua");
static IMPORT: Script = inbox_script!("inbox_import.lua");
static READ: Script = inbox_script!("inbox_read.lua");
static SENT: Script = inbox_script!("inbox_sent.lua");
static RECEIVED: Script = inbox_script!("inbox_received.lua");
static END: Script = inbox_script!("inbox_end.lua");
static END_SESSION: Script = inbox_script!("inbox_end_session.lua");
static TAKE: Script = inbox_script!("inbox_take.lua");
static CANCEL: Script = inbox_script!("inbox_cancel.lua");
static STATUS: Script = inbox_script!("inbox_status.lua");
static RECEIPT: Script = inbox_script!("inbox_receipt.lua");
static LISTED: Script = inbox_script!("inbox_listed.lua");
static RECORD: Script = super::script::script!("receipt_record.lua");

/// Every function of inboxes.
pub(super) static SCRIPTS: [&Script; 13] = [
    &APPEND,
    &IMPORT,
    &READ,
    &SENT,
    &RECEIVED,
    &END,
    &END_SESSION,
    &TAKE,
    &CANCEL,
    &STATUS,
    &RECEIPT,
    &LISTED,
    &RECORD,
];

/// So many entries are ended by one call.
pub(super) const ENDS_MAX: usize = 64;
/// What one client's final receipts may take, whatever the limit of all is: those of all clients together are not counted.
const RECEIPTS_BYTES_MAX: u64 = 1 << 20;
/// How long it is remembered where a message went that never expires.
const POINTER_MS_MAX: u64 = 400 * 24 * 3_600_000;

/// Makes the calls.
#[derive(Debug, Clone)]
pub(super) struct InboxCalls {
    keys: Keys,
    limits: Limits,
}

impl InboxCalls {
    pub(super) fn new(keys: Keys, limits: Limits) -> Self {
        Self { keys, limits }
    }

    /// How long a final receipt is kept.
    pub(super) fn retention_ms(&self) -> u64 {
        u64::try_from(self.limits.receipt_retention.as_millis()).unwrap_or(0)
    }

    fn inbox(&self, client: &ClientId) -> String {
        self.keys.client(client, "inbox")
    }

    fn on(&self, script: &'static Script, keys: &[String]) -> Call {
        let receipts_max = self.limits.receipts_bytes_max.min(RECEIPTS_BYTES_MAX);
        Call::script(script, keys)
            .arg(self.retention_ms())
            .arg(receipts_max)
    }

    fn call(&self, script: &'static Script, client: &ClientId) -> Call {
        self.on(script, &[self.inbox(client)])
    }

    pub(super) fn append(&self, append: &Append) -> Call {
        let policy = match self.limits.inbox.overflow {
            OverflowPolicy::DropOldest => "o",
            OverflowPolicy::DropNew => "n",
            OverflowPolicy::Reject => "r",
        };
        let client = &append.client;
        let keys = [self.inbox(client), self.keys.client(client, "route")];
        with_message(self.on(&APPEND, &keys), append)
            .arg(self.limits.inbox.entries_max)
            .arg(self.limits.inbox.bytes_max)
            .arg(policy)
    }

    /// Takes an entry over from another store.
    pub(super) fn import(
        &self,
        append: &Append,
        position: Position,
        sent: bool,
        received: bool,
    ) -> Call {
        with_message(self.call(&IMPORT, &append.client), append)
            .arg(position_text(position))
            .arg(u8::from(sent))
            .arg(u8::from(received))
    }

    pub(super) fn read(
        &self,
        client: &ClientId,
        after: Position,
        limit: usize,
        bytes_max: usize,
    ) -> Call {
        self.call(&READ, client)
            .arg(position_text(after))
            .arg(limit)
            .arg(bytes_max)
    }

    pub(super) fn sent(
        &self,
        client: &ClientId,
        position: Position,
        node: &NodeId,
        epoch: Epoch,
    ) -> Call {
        self.call(&SENT, client)
            .arg(position_text(position))
            .arg(epoch.0)
            .arg(node.as_str().replace('\n', " "))
    }

    pub(super) fn received(&self, client: &ClientId, position: Position) -> Call {
        self.call(&RECEIVED, client).arg(position_text(position))
    }

    /// `ends` are of `client`, at most [`ENDS_MAX`].
    pub(super) fn end(&self, client: &ClientId, ends: &[End]) -> Call {
        let mut call = self.call(&END, client);
        for end in ends {
            let (letter, code) = reason_letter(end.reason);
            call = call.arg(position_text(end.position)).arg(letter).arg(code);
        }
        call
    }

    pub(super) fn end_session(
        &self,
        client: &ClientId,
        epoch: Option<Epoch>,
        after: &str,
        up_to: &str,
    ) -> Call {
        let keys = [self.inbox(client), self.keys.client(client, "route")];
        self.on(&END_SESSION, &keys)
            .arg(after)
            .arg(up_to)
            .arg(epoch.map_or(String::new(), |epoch| epoch.0.to_string()))
    }

    /// Takes a shared entry out.
    pub(super) fn take(&self, client: &ClientId, position: Position) -> Call {
        self.claim(client, position, "take", 0)
    }

    /// Claims a shared entry for `hold_ms`.
    pub(super) fn claim(
        &self,
        client: &ClientId,
        position: Position,
        claim: &str,
        hold_ms: u64,
    ) -> Call {
        self.call(&TAKE, client)
            .arg(position_text(position))
            .arg(claim)
            .arg(hold_ms)
    }

    /// Gives a claim up.
    pub(super) fn unclaim(&self, client: &ClientId, position: Position) -> Call {
        let meta = format!("{}:meta", self.inbox(client));
        Call::command("HDEL", &meta).arg(format!("claim:{}", position_text(position)))
    }

    pub(super) fn cancel(&self, client: &ClientId, id: &MessageId) -> Call {
        self.call(&CANCEL, client).arg(id.as_str())
    }

    pub(super) fn status(&self, client: &ClientId) -> Call {
        self.call(&STATUS, client)
    }

    /// Answers generation, sequence and entries.
    pub(super) fn tail(&self, client: &ClientId) -> Call {
        let meta = format!("{}:meta", self.inbox(client));
        Call::command("HMGET", &meta).arg("g").arg("t").arg("c")
    }

    pub(super) fn receipt(&self, client: &ClientId, id: &MessageId) -> Call {
        self.call(&RECEIPT, client).arg(id.as_str())
    }

    pub(super) fn listed(&self, client: &ClientId) -> Call {
        self.call(&LISTED, client)
    }

    fn pointer(&self, id: &MessageId) -> String {
        // No braces: a message id may hold any, and each is in a slot of its own.
        self.keys.message(id)
    }

    /// Notes to whom a push goes. With `claim` it answers what was noted before, which then stays.
    pub(super) fn point(&self, append: &Append, now_ms: u64, claim: bool) -> Call {
        let waits_ms = match append.message.expires_at_ms {
            Some(at) => at.saturating_sub(now_ms).saturating_add(1_000),
            None => POINTER_MS_MAX,
        };
        let keep_ms = waits_ms
            .saturating_add(self.retention_ms())
            .min(POINTER_MS_MAX);
        let set = Call::command("SET", &self.pointer(&append.message.id))
            .arg(format!("c{}", append.client))
            .arg("PX")
            .arg(keep_ms);
        if claim { set.arg("NX").arg("GET") } else { set }
    }

    /// Answers what is noted of a message: see `receipt_record.lua`.
    pub(super) fn pointed(&self, id: &MessageId) -> Call {
        Call::command("GET", &self.pointer(id))
    }

    /// A push has ended: its receipt goes in a while, and so does what points to it.
    pub(super) fn unpoint(&self, id: &MessageId) -> Call {
        Call::command("PEXPIRE", &self.pointer(id)).arg(self.retention_ms().saturating_add(1_000))
    }

    pub(super) fn record(
        &self,
        id: &MessageId,
        fingerprint: Option<u64>,
        receipt: &[u8],
        mistaken: &[u8],
    ) -> Call {
        Call::script(&RECORD, &[self.pointer(id)])
            .arg(fingerprint.map_or(String::new(), |number| number.to_string()))
            .arg(receipt)
            .arg(self.retention_ms().max(1))
            .arg(mistaken)
    }

    /// The index of the clients of a shard that something waits for.
    pub(super) fn waiting(&self, shard: u16) -> String {
        self.keys.shard(shard, "waiting")
    }
}

/// The arguments that make an entry.
fn with_message(call: Call, append: &Append) -> Call {
    let Append {
        client,
        message,
        fingerprint,
    } = append;
    let fingerprint = fingerprint.filter(|_| message.origin == Origin::Push);
    let origin = match (message.origin, &message.share) {
        (Origin::Push, _) => 0,
        (Origin::Session, None) => 1,
        (Origin::Session, Some(_)) => 2,
    };
    call.arg(message.id.as_str())
        .arg(fingerprint.map_or(String::new(), |number| number.to_string()))
        .arg(format::message_bytes(message))
        .arg(message.accepted_at_ms)
        .arg(message.expires_at_ms.map_or(0, |at| at.max(1)))
        .arg(origin)
        .arg(message.qos as u8)
        .arg(format::message(client.as_str().as_bytes(), message))
}
