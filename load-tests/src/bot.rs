//! One device: a light MQTT client over TCP that belongs to one task.
//!
//! It holds no buffers while idle, so that one process can be many thousands of devices. It neither
//! reconnects nor repeats: a connection that ends under test is a finding, not something to hide.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes, BytesMut};
use moorline_mqtt::{
    ByteString, Connect, ConnectProperties, Decoder, Disconnect, Packet, PacketId, Publish, QoS,
    ReasonCode, RetainHandling, Subscribe, SubscriptionOptions, TopicFilter, TopicName, Version,
};
use tokio::net::{TcpSocket, TcpStream};

/// Largest packet that a bot takes.
const PACKET_BYTES_MAX: u32 = 1 << 20;
/// Devices that share one local address; the kernel has about 28,000 ports for each.
const DEVICES_PER_SOURCE: usize = 20_000;
/// For CONNECT until CONNACK, and for SUBSCRIBE until SUBACK.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

thread_local! {
    static READ: RefCell<Vec<u8>> = RefCell::new(vec![0; 16 * 1024]);
}

/// Whom bots connect to, and how.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The server.
    pub(crate) address: SocketAddr,
    /// Which protocol the bots speak.
    pub(crate) version: Version,
    /// Seconds; a ping is sent at half of it.
    pub(crate) keep_alive_s: u16,
}

impl Target {
    /// The local address of device `index`. On loopback every 20,000 devices get another one out of
    /// 127/8, so that ports do not run out.
    fn source(&self, index: usize) -> Option<IpAddr> {
        match (self.address.ip(), index / DEVICES_PER_SOURCE) {
            (IpAddr::V4(ip), block @ 1..=253) if ip.is_loopback() => Some(IpAddr::V4(
                Ipv4Addr::new(127, 0, 0, 1 + u8::try_from(block).ok()?),
            )),
            _ => None,
        }
    }
}

/// A connected device.
#[derive(Debug)]
pub(crate) struct Bot {
    stream: TcpStream,
    version: Version,
    decoder: Decoder,
    unread: Bytes,
    unsent: BytesMut,
    last_id: u16,
}

impl Bot {
    /// Connects with a clean start and waits for the CONNACK.
    pub(crate) async fn connect(target: &Target, index: usize, client_id: &str) -> Result<Self> {
        let connecting = Self::open(target, index, client_id);
        tokio::time::timeout(ANSWER_TIMEOUT, connecting)
            .await
            .context("no CONNACK within 30 s")?
    }

    async fn open(target: &Target, index: usize, client_id: &str) -> Result<Self> {
        let socket = if target.address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }
        .context("cannot make a socket")?;
        if let Some(source) = target.source(index) {
            socket
                .bind(SocketAddr::new(source, 0))
                .with_context(|| format!("cannot bind to {source}"))?;
        }
        let stream = socket
            .connect(target.address)
            .await
            .with_context(|| format!("connect to {}", target.address))?;
        stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
        let mut bot = Self {
            stream,
            version: target.version,
            decoder: Decoder::client(target.version, PACKET_BYTES_MAX),
            unread: Bytes::new(),
            unsent: BytesMut::new(),
            last_id: 0,
        };
        bot.send(&Packet::Connect(Box::new(Connect {
            version: target.version,
            clean_start: true,
            keep_alive_s: target.keep_alive_s,
            client_id: ByteString::from(client_id),
            will: None,
            username: None,
            password: None,
            properties: ConnectProperties::default(),
        })))
        .await?;
        match bot.next().await.context("waiting for CONNACK")? {
            Packet::ConnAck(answer) if answer.reason == ReasonCode::Success => Ok(bot),
            Packet::ConnAck(answer) => bail!("CONNECT refused: {:?}", answer.reason),
            other => bail!("expected CONNACK, got {other:?}"),
        }
    }

    /// Subscribes to one filter and waits for the SUBACK.
    pub(crate) async fn subscribe(&mut self, filter: &TopicFilter, qos: QoS) -> Result<()> {
        let packet_id = self.next_id();
        let options = SubscriptionOptions {
            qos,
            no_local: false,
            retain_as_published: false,
            retain_handling: RetainHandling::Send,
        };
        self.send(&Packet::Subscribe(Box::new(Subscribe {
            packet_id,
            filters: vec![(filter.clone(), options)],
            subscription_id: None,
            user_properties: Vec::new(),
        })))
        .await?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.next())
            .await
            .context("no SUBACK within 30 s")??;
        match answer {
            Packet::SubAck(ack) if ack.packet_id == packet_id => match ack.reasons.as_slice() {
                [reason] if !reason.is_error() => Ok(()),
                reasons => bail!("SUBSCRIBE {} refused: {reasons:?}", filter.as_str()),
            },
            other => bail!("expected SUBACK, got {other:?}"),
        }
    }

    /// The next packet from the server. May be dropped and called again without loss.
    pub(crate) async fn next(&mut self) -> Result<Packet> {
        loop {
            if !self.unread.is_empty()
                && let Some(packet) = self
                    .decoder
                    .decode(&mut self.unread)
                    .context("the server sent a bad packet")?
            {
                return Ok(packet);
            }
            self.stream.readable().await.context("connection lost")?;
            self.read()?;
        }
    }

    fn read(&mut self) -> Result<()> {
        READ.with_borrow_mut(|scratch| match self.stream.try_read(scratch) {
            Ok(0) => bail!("the server closed the connection"),
            Ok(n) if self.unread.is_empty() => {
                self.unread = Bytes::copy_from_slice(&scratch[..n]);
                Ok(())
            }
            Ok(n) => {
                let mut joined = BytesMut::with_capacity(self.unread.len() + n);
                joined.extend_from_slice(&self.unread);
                joined.extend_from_slice(&scratch[..n]);
                self.unread = joined.freeze();
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(e).context("connection lost"),
        })
    }

    /// Sends a packet whole.
    pub(crate) async fn send(&mut self, packet: &Packet) -> Result<()> {
        packet
            .encode(self.version, &mut self.unsent)
            .context("cannot encode a packet")?;
        while !self.unsent.is_empty() {
            match self.stream.try_write(&self.unsent) {
                Ok(n) => self.unsent.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.stream.writable().await.context("connection lost")?;
                }
                Err(e) => return Err(e).context("connection lost"),
            }
        }
        Ok(())
    }

    /// Publishes at QoS 1; the PUBACK comes out of [`Bot::next`].
    pub(crate) async fn publish(&mut self, topic: &TopicName, payload: Bytes) -> Result<PacketId> {
        let packet_id = self.next_id();
        self.send(&Packet::Publish(Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: topic.clone(),
            packet_id: Some(packet_id),
            properties: None,
            payload,
        }))
        .await?;
        Ok(packet_id)
    }

    /// Answers a QoS 1 PUBLISH.
    pub(crate) async fn puback(&mut self, packet_id: PacketId) -> Result<()> {
        let ack = moorline_mqtt::Ack {
            packet_id,
            reason: ReasonCode::Success,
            properties: None,
        };
        self.send(&Packet::PubAck(ack)).await
    }

    /// Keeps the connection alive; the PINGRESP comes out of [`Bot::next`].
    pub(crate) async fn ping(&mut self) -> Result<()> {
        self.send(&Packet::PingReq).await
    }

    /// Leaves as a device that means to.
    pub(crate) async fn disconnect(mut self) -> Result<()> {
        self.send(&Packet::Disconnect(Disconnect {
            reason: ReasonCode::Success,
            properties: None,
        }))
        .await
    }

    /// Wraps after 65,535; windows are far smaller, so that an id in use is never met.
    fn next_id(&mut self) -> PacketId {
        self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        PacketId(NonZeroU16::new(self.last_id).unwrap_or(NonZeroU16::MIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_devices_are_spread_over_source_addresses() {
        let mut target = Target {
            address: ([127, 0, 0, 1], 1883).into(),
            version: Version::V5,
            keep_alive_s: 60,
        };
        assert_eq!(target.source(19_999), None);
        assert_eq!(target.source(20_000), Some(IpAddr::from([127, 0, 0, 2])));
        assert_eq!(target.source(59_999), Some(IpAddr::from([127, 0, 0, 3])));
        target.address = ([192, 0, 2, 1], 1883).into();
        assert_eq!(target.source(20_000), None);
    }
}
