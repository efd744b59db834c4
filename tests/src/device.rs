//! A device on a bare socket that does exactly what a test tells it, and nothing by itself.
//!
//! It reads only when asked, so that "a device that does not read" is one, and acknowledges only
//! when asked, unless a method says otherwise.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::waiting::SOON;
use crate::wire::{self, Connect, Packet, Publish, V5};

/// What a read brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrived {
    /// A packet.
    Packet(Packet),
    /// The server closed the connection.
    Closed,
    /// Nothing in the time given.
    Nothing,
}

/// What a connection can go over.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sync + std::fmt::Debug {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync + std::fmt::Debug> Stream for T {}

/// One MQTT connection.
#[derive(Debug)]
pub struct Device {
    stream: Box<dyn Stream>,
    version: u8,
    buffer: Vec<u8>,
    /// Read while something else was awaited.
    waiting: VecDeque<Packet>,
    next_id: u16,
    /// Whether the server had a session.
    pub session_present: bool,
    /// What the server said in its CONNACK.
    pub connack: wire::Properties,
}

impl Device {
    /// Opens a socket and sends nothing.
    pub async fn socket(address: SocketAddr, version: u8) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::on(stream, version))
    }

    /// On a connection that there is; sends nothing.
    pub fn on(stream: impl Stream + 'static, version: u8) -> Self {
        Self {
            stream: Box::new(stream),
            version,
            buffer: Vec::new(),
            waiting: VecDeque::new(),
            next_id: 0,
            session_present: false,
            connack: Vec::new(),
        }
    }

    /// Connects as told.
    ///
    /// # Panics
    /// When the server does not accept.
    pub async fn connect(address: SocketAddr, connect: Connect) -> Self {
        let id = connect.client_id.clone();
        match Self::try_connect(address, connect).await {
            Ok(device) => device,
            Err(problem) => panic!("{id} could not connect: {problem}"),
        }
    }

    /// Connects as told, or says why not.
    pub async fn try_connect(address: SocketAddr, connect: Connect) -> Result<Self, String> {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| error.to_string())?;
        stream
            .set_nodelay(true)
            .map_err(|error| error.to_string())?;
        Self::try_connect_on(stream, connect).await
    }

    /// The same on a connection that there is.
    pub async fn try_connect_on(
        stream: impl Stream + 'static,
        connect: Connect,
    ) -> Result<Self, String> {
        let mut device = Self::on(stream, connect.version);
        device
            .send(&wire::connect(&connect))
            .await
            .map_err(|error| error.to_string())?;
        match device.receive(SOON).await {
            Arrived::Packet(Packet::ConnAck {
                session_present,
                code: 0,
                properties,
            }) => {
                device.session_present = session_present;
                device.connack = properties;
                Ok(device)
            }
            other => Err(format!("instead of an accepting CONNACK: {other:?}")),
        }
    }

    /// A device with a clean session and nothing special.
    pub async fn clean(address: SocketAddr, version: u8, id: &str) -> Self {
        Self::connect(address, Connect::new(version, id)).await
    }

    /// Writes bytes as they are.
    pub async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// A packet identifier that was not used lately.
    pub fn packet_id(&mut self) -> u16 {
        self.next_id = self.next_id % u16::MAX + 1;
        self.next_id
    }

    /// The next packet, in at most `patience`.
    ///
    /// # Panics
    /// When the server sends what is not MQTT.
    pub async fn receive(&mut self, patience: Duration) -> Arrived {
        if let Some(packet) = self.waiting.pop_front() {
            return Arrived::Packet(packet);
        }
        match tokio::time::timeout(patience, self.read_packet()).await {
            Ok(Some(packet)) => Arrived::Packet(packet),
            Ok(None) => Arrived::Closed,
            Err(_) => Arrived::Nothing,
        }
    }

    async fn read_packet(&mut self) -> Option<Packet> {
        loop {
            match wire::decode(self.version, &mut self.buffer) {
                Ok(Some(packet)) => return Some(packet),
                Ok(None) => {}
                Err(problem) => panic!("the server sent what is not MQTT: {problem}"),
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// The first packet that `wanted` takes; publishes read meanwhile are kept for later.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn await_packet<T>(
        &mut self,
        what: &str,
        wanted: impl Fn(&Packet) -> Option<T>,
    ) -> T {
        if let Some(at) = self
            .waiting
            .iter()
            .position(|packet| wanted(packet).is_some())
            && let Some(found) = self.waiting.remove(at).and_then(|packet| wanted(&packet))
        {
            return found;
        }
        let deadline = tokio::time::Instant::now() + SOON;
        loop {
            match tokio::time::timeout_at(deadline, self.read_packet()).await {
                Ok(Some(packet)) => match wanted(&packet) {
                    Some(found) => return found,
                    None => self.waiting.push_back(packet),
                },
                Ok(None) => panic!("the connection ended instead of {what}"),
                Err(_) => panic!("not within {SOON:?}: {what}; meanwhile {:?}", self.waiting),
            }
        }
    }

    /// Subscribes to one filter and returns the granted QoS or reason code.
    ///
    /// # Panics
    /// When no SUBACK comes.
    pub async fn subscribe(&mut self, filter: &str, options: u8) -> u8 {
        self.subscribe_with(&Vec::new(), &[(filter, options)]).await[0]
    }

    /// Subscribes and returns one code a filter.
    ///
    /// # Panics
    /// When no SUBACK comes.
    pub async fn subscribe_with(
        &mut self,
        properties: &wire::Properties,
        filters: &[(&str, u8)],
    ) -> Vec<u8> {
        let id = self.packet_id();
        let bytes = wire::subscribe(self.version, id, properties, filters);
        self.send(&bytes).await.expect("the connection is open");
        self.await_packet("a SUBACK", |packet| match packet {
            Packet::SubAck { packet_id, codes } if *packet_id == id => Some(codes.clone()),
            _ => None,
        })
        .await
    }

    /// Ends one subscription.
    ///
    /// # Panics
    /// When no UNSUBACK comes.
    pub async fn unsubscribe(&mut self, filter: &str) {
        let id = self.packet_id();
        let bytes = wire::unsubscribe(self.version, id, &[filter]);
        self.send(&bytes).await.expect("the connection is open");
        self.await_packet("an UNSUBACK", |packet| match packet {
            Packet::UnsubAck { packet_id, .. } if *packet_id == id => Some(()),
            _ => None,
        })
        .await;
    }

    /// Publishes and waits until the server has taken it; returns the reason code.
    ///
    /// # Panics
    /// When the server does not answer.
    pub async fn publish(&mut self, mut publish: Publish) -> u8 {
        if publish.qos > 0 && publish.packet_id == 0 {
            publish.packet_id = self.packet_id();
        }
        let id = publish.packet_id;
        let bytes = wire::publish(self.version, &publish);
        self.send(&bytes).await.expect("the connection is open");
        match publish.qos {
            0 => 0,
            1 => self.await_puback(id).await,
            _ => {
                let reason = self.await_pubrec(id).await;
                if reason >= 0x80 {
                    return reason;
                }
                self.send(&wire::pubrel(id))
                    .await
                    .expect("the connection is open");
                self.await_packet("a PUBCOMP", |packet| match packet {
                    Packet::PubComp { packet_id, reason } if *packet_id == id => Some(*reason),
                    _ => None,
                })
                .await
            }
        }
    }

    /// The PUBACK of `id`.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn await_puback(&mut self, id: u16) -> u8 {
        self.await_packet("a PUBACK", |packet| match packet {
            Packet::PubAck { packet_id, reason } if *packet_id == id => Some(*reason),
            _ => None,
        })
        .await
    }

    /// The PUBREC of `id`.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn await_pubrec(&mut self, id: u16) -> u8 {
        self.await_packet("a PUBREC", |packet| match packet {
            Packet::PubRec { packet_id, reason } if *packet_id == id => Some(*reason),
            _ => None,
        })
        .await
    }

    /// The next PUBLISH, not acknowledged.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn next_publish(&mut self) -> Publish {
        self.await_packet("a PUBLISH", |packet| match packet {
            Packet::Publish(publish) => Some(publish.clone()),
            _ => None,
        })
        .await
    }

    /// The next PUBLISH, acknowledged as its QoS asks.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn take(&mut self) -> Publish {
        let publish = self.next_publish().await;
        self.acknowledge(&publish).await;
        publish
    }

    /// The next PUBLISH, acknowledged, or `None` when none comes in `patience` or the connection ends.
    pub async fn take_within(&mut self, patience: Duration) -> Option<Publish> {
        loop {
            match self.receive(patience).await {
                Arrived::Packet(Packet::Publish(publish)) => {
                    self.acknowledge(&publish).await;
                    return Some(publish);
                }
                Arrived::Packet(_) => {}
                Arrived::Closed | Arrived::Nothing => return None,
            }
        }
    }

    /// Answers a PUBLISH as its QoS asks; for QoS 2 up to the PUBCOMP.
    ///
    /// # Panics
    /// When a PUBREL does not come.
    pub async fn acknowledge(&mut self, publish: &Publish) {
        let id = publish.packet_id;
        match publish.qos {
            0 => {}
            // A connection that is gone by now is found by the next read.
            1 => _ = self.send(&wire::puback(id)).await,
            _ => {
                _ = self.send(&wire::pubrec(id)).await;
                self.await_packet("a PUBREL", |packet| match packet {
                    Packet::PubRel { packet_id, .. } if *packet_id == id => Some(()),
                    _ => None,
                })
                .await;
                _ = self.send(&wire::pubcomp(id)).await;
            }
        }
    }

    /// Proves that the connection works in both directions, and that everything the server had sent
    /// before has arrived.
    ///
    /// # Panics
    /// When no PINGRESP comes.
    pub async fn ping(&mut self) {
        self.send(&wire::PINGREQ)
            .await
            .expect("the connection is open");
        self.await_packet("a PINGRESP", |packet| {
            matches!(packet, Packet::PingResp).then_some(())
        })
        .await;
    }

    /// Asserts that no PUBLISH has arrived: by a round trip, not by waiting.
    ///
    /// # Panics
    /// When one has.
    pub async fn has_nothing(&mut self) {
        self.ping().await;
        let publishes: Vec<_> = self
            .waiting
            .iter()
            .filter(|packet| matches!(packet, Packet::Publish(_)))
            .collect();
        assert!(
            publishes.is_empty(),
            "nothing should have arrived, but {publishes:?}"
        );
    }

    /// Ends the connection the proper way and waits until the server has closed its side.
    pub async fn disconnect(self) {
        self.disconnect_with(0, &Vec::new()).await;
    }

    /// Ends the connection with a reason and properties (MQTT 5.0).
    pub async fn disconnect_with(mut self, reason: u8, properties: &wire::Properties) {
        _ = self
            .send(&wire::disconnect(self.version, reason, properties))
            .await;
        while !matches!(self.receive(SOON).await, Arrived::Closed | Arrived::Nothing) {}
    }

    /// Reads until the server closes; returns the reason of its DISCONNECT if there was one.
    ///
    /// # Panics
    /// When it does not close.
    pub async fn await_close(&mut self, patience: Duration) -> Option<u8> {
        let mut given = None;
        loop {
            match self.receive(patience).await {
                Arrived::Packet(Packet::Disconnect { reason, .. }) => {
                    assert_eq!(self.version, V5, "3.1.1 has no DISCONNECT from a server");
                    given = Some(reason);
                }
                Arrived::Packet(_) => {}
                Arrived::Closed => return given,
                Arrived::Nothing => panic!("the server did not close within {patience:?}"),
            }
        }
    }
}
