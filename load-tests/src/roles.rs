//! What a connected bot does: wait, receive, or publish on a schedule.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use bytes::Bytes;
use moorline_mqtt::{Packet, PacketId, Publish, TopicName};
use tokio::sync::watch;
use tokio::time::sleep_until;

use crate::bot::Bot;
use crate::clock::{Clock, Schedule};
use crate::fleet::{Stop, Tally, pings};
use crate::ledger::Ledger;
use crate::stamp::Stamp;
use crate::stats::Latency;

/// Stays connected and takes nothing.
pub(crate) async fn idle(mut bot: Bot, mut stop: Stop, keep_alive_s: u16) -> Result<()> {
    let mut ping = pings(keep_alive_s);
    loop {
        tokio::select! {
            packet = bot.next() => expect_quiet(&packet?)?,
            _ = ping.tick() => bot.ping().await?,
            () = stop.stopped() => return bot.disconnect().await,
        }
    }
}

/// Only a PINGRESP comes to a device that nobody sends anything.
fn expect_quiet(packet: &Packet) -> Result<()> {
    match packet {
        Packet::PingResp => Ok(()),
        Packet::Disconnect(end) => bail!("the server disconnected: {:?}", end.reason),
        other => bail!("an unexpected packet: {other:?}"),
    }
}

/// The receiving side of a run, shared by all receivers.
#[derive(Debug)]
pub(crate) struct Receiving {
    /// Of which run messages count.
    pub(crate) run: String,
    /// Its clock.
    pub(crate) clock: Clock,
    /// Where arrivals are entered.
    pub(crate) ledger: Arc<Ledger>,
    /// Different messages that have arrived so far.
    pub(crate) delivered: AtomicU64,
    /// Messages that have arrived before they were due.
    pub(crate) early: AtomicU64,
    /// From the moment a message was due until its receiver had written the PUBACK.
    pub(crate) since_due: Latency,
    /// From the moment a message was sent until its receiver had written the PUBACK.
    pub(crate) since_sent: Latency,
}

impl Receiving {
    /// Nothing received yet.
    pub(crate) fn new(run: &str, clock: Clock, ledger: Arc<Ledger>, what: &str) -> Self {
        Self {
            run: run.to_owned(),
            clock,
            ledger,
            delivered: AtomicU64::new(0),
            early: AtomicU64::new(0),
            since_due: Latency::new(format!("{what} received, from when it was due")),
            since_sent: Latency::new(format!("{what} received, from when it was sent")),
        }
    }

    /// Counts latencies from then on.
    pub(crate) fn count_from(&self, ns: u64) {
        self.since_due.count_from(ns);
        self.since_sent.count_from(ns);
    }

    /// Receives and acknowledges until told to stop. `device` is the account that this bot's messages
    /// belong to.
    pub(crate) async fn play(
        &self,
        mut bot: Bot,
        device: u32,
        mut stop: Stop,
        keep_alive_s: u16,
    ) -> Result<()> {
        let mut ping = pings(keep_alive_s);
        loop {
            tokio::select! {
                packet = bot.next() => match packet? {
                    Packet::Publish(publish) => self.take(&mut bot, device, &publish).await?,
                    other => expect_quiet(&other)?,
                },
                _ = ping.tick() => bot.ping().await?,
                () = stop.stopped() => return bot.disconnect().await,
            }
        }
    }

    async fn take(&self, bot: &mut Bot, device: u32, publish: &Publish) -> Result<()> {
        if let Some(packet_id) = publish.packet_id {
            bot.puback(packet_id).await?;
        }
        let now_ns = self.clock.now_ns();
        let Some(stamp) = Stamp::parse(&publish.payload).filter(|stamp| stamp.run == self.run)
        else {
            return Ok(());
        };
        if stamp.device != device {
            bail!(
                "received a message for device {} on {}",
                stamp.device,
                publish.topic.as_str()
            );
        }
        if now_ns < stamp.due_ns {
            self.early.fetch_add(1, Ordering::Relaxed);
        }
        if self.ledger.deliver(device, stamp.sequence) {
            // Both count the same messages, also at the end of the warm-up.
            if self.since_due.record(stamp.due_ns, now_ns) {
                self.since_sent.record(stamp.sent_ns, now_ns);
            }
            self.delivered.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The bounds of a publisher.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow {
    /// How many messages may be without a PUBACK at the same time, per publisher.
    pub(crate) window: usize,
    /// Bytes of a payload.
    pub(crate) payload_bytes: usize,
}

/// The publishing side of a run, shared by all publishers.
#[derive(Debug)]
pub(crate) struct Publishing {
    /// Marks the messages of this run.
    pub(crate) run: String,
    /// Its clock.
    pub(crate) clock: Clock,
    /// Where positive PUBACKs are entered.
    pub(crate) ledger: Arc<Ledger>,
    /// Where refusals are counted.
    pub(crate) tally: Arc<Tally>,
    /// Set once every device is connected.
    pub(crate) schedule: watch::Receiver<Option<Schedule>>,
    /// Within which bounds it publishes.
    pub(crate) flow: Flow,
    /// Publishers that have sent all and got every answer.
    pub(crate) finished: AtomicU64,
    /// From the moment a message was due until its PUBACK.
    pub(crate) acked: Latency,
    /// How late messages were sent: the timer's resolution, a full window, a busy machine.
    pub(crate) lateness: Latency,
}

/// Waits for the schedule; `None` if there will be none. May be dropped and called again.
async fn begun(started: &mut watch::Receiver<Option<Schedule>>) -> Option<Schedule> {
    started
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|schedule| *schedule)
}

struct InFlight {
    packet_id: PacketId,
    sequence: u32,
    due_ns: u64,
}

impl Publishing {
    /// Nothing published yet; begins when `schedule` has one.
    pub(crate) fn new(
        run: &str,
        clock: Clock,
        ledger: Arc<Ledger>,
        tally: Arc<Tally>,
        schedule: watch::Receiver<Option<Schedule>>,
        flow: Flow,
    ) -> Self {
        Self {
            run: run.to_owned(),
            clock,
            ledger,
            tally,
            schedule,
            flow,
            finished: AtomicU64::new(0),
            acked: Latency::new("PUBACK received, from when it was due"),
            lateness: Latency::new("sent later than due (our own)"),
        }
    }

    /// Counts latencies from then on.
    pub(crate) fn count_from(&self, ns: u64) {
        self.acked.count_from(ns);
        self.lateness.count_from(ns);
    }

    /// Publishes as lane `device` of the schedule, then stays until told to stop.
    pub(crate) async fn play(
        &self,
        mut bot: Bot,
        device: u32,
        topic: TopicName,
        mut stop: Stop,
        keep_alive_s: u16,
    ) -> Result<()> {
        let mut ping = pings(keep_alive_s);
        let mut started = self.schedule.clone();
        let schedule = loop {
            tokio::select! {
                schedule = begun(&mut started) => match schedule {
                    Some(schedule) => break schedule,
                    None => return bot.disconnect().await,
                },
                packet = bot.next() => expect_quiet(&packet?)?,
                _ = ping.tick() => bot.ping().await?,
                () = stop.stopped() => return bot.disconnect().await,
            }
        };
        let mut in_flight: VecDeque<InFlight> = VecDeque::new();
        let mut text = String::new();
        let mut sequence = 0;
        let mut finished = false;
        loop {
            let due_ns = schedule.due_ns(device as usize, u64::from(sequence));
            if due_ns.is_none() && in_flight.is_empty() && !finished {
                finished = true;
                self.finished.fetch_add(1, Ordering::Relaxed);
            }
            let turn = due_ns.filter(|_| in_flight.len() < self.flow.window);
            tokio::select! {
                packet = bot.next() => self.answered(&packet?, device, &mut in_flight)?,
                () = sleep_until(self.clock.at(turn.unwrap_or_default())), if turn.is_some() => {
                    let due_ns = turn.unwrap_or_default();
                    let sent_ns = self.clock.now_ns();
                    Stamp { run: &self.run, device, sequence, due_ns, sent_ns }.write(self.flow.payload_bytes, &mut text);
                    let packet_id = bot.publish(&topic, Bytes::copy_from_slice(text.as_bytes())).await?;
                    self.lateness.record(due_ns, sent_ns);
                    in_flight.push_back(InFlight { packet_id, sequence, due_ns });
                    sequence += 1;
                }
                _ = ping.tick() => bot.ping().await?,
                () = stop.stopped() => return bot.disconnect().await,
            }
        }
    }

    fn answered(
        &self,
        packet: &Packet,
        device: u32,
        in_flight: &mut VecDeque<InFlight>,
    ) -> Result<()> {
        let Packet::PubAck(ack) = packet else {
            return expect_quiet(packet);
        };
        let Some(message) = in_flight
            .iter()
            .position(|m| m.packet_id == ack.packet_id)
            .and_then(|at| in_flight.remove(at))
        else {
            bail!("a PUBACK for a message that was not sent: {ack:?}");
        };
        if ack.reason.is_error() {
            self.tally.error(format!("PUBACK with {:?}", ack.reason));
        } else {
            self.acked.record(message.due_ns, self.clock.now_ns());
            self.ledger.accept(device, message.sequence);
        }
        Ok(())
    }
}
