//! `moorline device`: a device on the terminal, so that a newcomer needs no other MQTT client.
//!
//! It speaks MQTT 5.0, prints what arrives, publishes lines from standard input upstream with
//! QoS 1, and connects again when the connection is lost.

use std::io::Write as _;
use std::num::NonZeroU16;
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use moorline_mqtt::{
    ByteString, Connect, ConnectProperties, Decoder, Disconnect, Packet, PacketId, Publish, QoS,
    ReasonCode, RetainHandling, Subscribe, SubscriptionOptions, TopicFilter, TopicName, Version,
    encode,
};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::cli::DeviceOptions;

const KEEP_ALIVE_S: u16 = 30;
const PACKET_BYTES_MAX: u32 = 268_435_455;
const RECONNECT: Duration = Duration::from_secs(2);
/// Lines that wait for a connection.
const LINES_MAX: usize = 64;

/// Runs until the end of standard input on a terminal, SIGINT or an error that trying again would
/// only repeat.
pub(crate) fn run(options: &DeviceOptions) -> anyhow::Result<()> {
    let topic = options
        .topic
        .clone()
        .unwrap_or_else(|| format!("up/{}", options.client_id));
    let topic = TopicName::parse(topic.into()).context("--topic")?;
    let password = match &options.password_file {
        Some(path) => {
            let text = std::fs::read(path).with_context(|| path.display().to_string())?;
            let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
            Some(Bytes::copy_from_slice(line.trim_ascii_end()))
        }
        None => None,
    };
    let filters = options
        .subscribe
        .iter()
        .map(|text| {
            TopicFilter::parse(text.as_str().into()).with_context(|| format!("--subscribe {text}"))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let mut device = Device {
        options,
        password,
        topic,
        filters,
        next_id: 0,
        unacknowledged: None,
    };
    let result = runtime.block_on(async {
        let lines = read_lines();
        tokio::select! {
            result = device.stay_connected(lines) => result,
            _ = tokio::signal::ctrl_c() => Ok(()),
        }
    });
    // A read of standard input cannot be taken back.
    runtime.shutdown_background();
    result
}

fn read_lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(LINES_MAX);
    tokio::spawn(async move {
        let mut input = BufReader::new(tokio::io::stdin()).lines();
        while let Ok(Some(line)) = input.next_line().await {
            if sender.send(line).await.is_err() {
                return;
            }
        }
        // The end of the input is not the end of the device: pushes go on arriving.
        sender.closed().await;
    });
    lines
}

#[expect(
    clippy::print_stdout,
    reason = "the terminal is what the device is for"
)]
fn show(text: &str) {
    println!("{text}");
    let _ = std::io::stdout().flush();
}

struct Device<'a> {
    options: &'a DeviceOptions,
    password: Option<Bytes>,
    topic: TopicName,
    filters: Vec<TopicFilter>,
    next_id: u16,
    /// The line that was sent last: sent again on the next connection until it is acknowledged.
    unacknowledged: Option<(PacketId, String)>,
}

/// Why a connection ended.
enum Ended {
    Lost(anyhow::Error),
    /// The server does not want this device: connecting again would only fight.
    Final(anyhow::Error),
}

impl From<std::io::Error> for Ended {
    fn from(error: std::io::Error) -> Self {
        Self::Lost(error.into())
    }
}

impl Device<'_> {
    async fn stay_connected(&mut self, mut lines: mpsc::Receiver<String>) -> anyhow::Result<()> {
        let mut reached = false;
        loop {
            match self.connect_once(&mut lines, &mut reached).await {
                Ended::Final(error) => return Err(error),
                Ended::Lost(error) if !reached => {
                    return Err(error).context(format!("cannot connect to {}", self.options.mqtt));
                }
                Ended::Lost(error) => {
                    show(&format!("connection lost ({error:#}), connecting again"));
                    tokio::time::sleep(RECONNECT).await;
                }
            }
        }
    }

    async fn connect_once(
        &mut self,
        lines: &mut mpsc::Receiver<String>,
        reached: &mut bool,
    ) -> Ended {
        match self.serve(lines, reached).await {
            Ok(()) => Ended::Lost(anyhow::anyhow!("closed by the server")),
            Err(ended) => ended,
        }
    }

    async fn serve(
        &mut self,
        lines: &mut mpsc::Receiver<String>,
        reached: &mut bool,
    ) -> Result<(), Ended> {
        let mut stream = TcpStream::connect(&self.options.mqtt).await?;
        let mut out = BytesMut::new();
        write(&self.connect_packet(), &mut out);
        let mut decoder = Decoder::client(Version::V5, PACKET_BYTES_MAX);
        let mut input = BytesMut::new();
        let mut ping = interval(Duration::from_secs(u64::from(KEEP_ALIVE_S)));
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ping.reset();
        let mut heard = Instant::now();
        loop {
            stream.write_all_buf(&mut out).await?;
            tokio::select! {
                read = stream.read_buf(&mut input) => {
                    if read? == 0 {
                        return Ok(());
                    }
                    heard = Instant::now();
                    self.on_bytes(&mut decoder, &mut input, &mut out, reached)?;
                }
                line = lines.recv(), if *reached && self.unacknowledged.is_none() => {
                    if let Some(line) = line {
                        self.send_line(line, false, &mut out);
                    }
                }
                _ = ping.tick() => {
                    if heard.elapsed() > Duration::from_secs(u64::from(KEEP_ALIVE_S) * 2) {
                        return Err(Ended::Lost(anyhow::anyhow!("the server is silent")));
                    }
                    write(&Packet::PingReq, &mut out);
                }
            }
        }
    }

    fn on_bytes(
        &mut self,
        decoder: &mut Decoder,
        input: &mut BytesMut,
        out: &mut BytesMut,
        reached: &mut bool,
    ) -> Result<(), Ended> {
        let mut data = input.split().freeze();
        loop {
            match decoder.decode(&mut data) {
                Ok(Some(packet)) => self.on_packet(packet, out, reached)?,
                Ok(None) => break,
                Err(error) => return Err(Ended::Lost(anyhow::Error::new(error))),
            }
        }
        input.extend_from_slice(&data);
        Ok(())
    }

    fn on_packet(
        &mut self,
        packet: Packet,
        out: &mut BytesMut,
        reached: &mut bool,
    ) -> Result<(), Ended> {
        match packet {
            Packet::ConnAck(ack) if ack.reason == ReasonCode::Success => {
                *reached = true;
                show(&format!(
                    "connected to {} as {}",
                    self.options.mqtt, self.options.client_id
                ));
                self.subscribe(out);
                if let Some((_, line)) = self.unacknowledged.take() {
                    self.send_line(line, true, out);
                }
            }
            Packet::ConnAck(ack) => {
                return Err(Ended::Final(anyhow::anyhow!("refused: {:?}", ack.reason)));
            }
            Packet::Publish(publish) => {
                show(&format!(
                    "{} {}",
                    publish.topic.as_str(),
                    printable(&publish.payload)
                ));
                match (publish.qos, publish.packet_id) {
                    (QoS::AtLeastOnce, Some(id)) => {
                        encode::puback(Version::V5, id, ReasonCode::Success, out)
                    }
                    (QoS::ExactlyOnce, Some(id)) => {
                        encode::pubrec(Version::V5, id, ReasonCode::Success, out)
                    }
                    _ => {}
                }
            }
            Packet::PubRel(rel) => {
                encode::pubcomp(Version::V5, rel.packet_id, ReasonCode::Success, out)
            }
            Packet::PubAck(ack)
                if self
                    .unacknowledged
                    .as_ref()
                    .is_some_and(|(id, _)| *id == ack.packet_id) =>
            {
                self.unacknowledged = None;
                if ack.reason.is_error() {
                    show(&format!("the server refused the line: {:?}", ack.reason));
                }
            }
            Packet::SubAck(ack) => {
                for (filter, reason) in self.filters.iter().zip(&ack.reasons) {
                    if reason.is_error() {
                        show(&format!(
                            "subscription to {} refused: {reason:?}",
                            filter.as_str()
                        ));
                    }
                }
            }
            Packet::Disconnect(Disconnect { reason, .. }) => {
                let error = anyhow::anyhow!("the server disconnected: {reason:?}");
                return Err(match reason {
                    ReasonCode::SessionTakenOver | ReasonCode::AdministrativeAction => {
                        Ended::Final(error)
                    }
                    _ => Ended::Lost(error),
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn connect_packet(&self) -> Packet {
        Packet::Connect(Box::new(Connect {
            version: Version::V5,
            clean_start: true,
            keep_alive_s: KEEP_ALIVE_S,
            client_id: self.options.client_id.as_str().into(),
            will: None,
            username: self.options.username.as_deref().map(Into::into),
            password: self.password.clone(),
            properties: ConnectProperties::default(),
        }))
    }

    fn subscribe(&mut self, out: &mut BytesMut) {
        if self.filters.is_empty() {
            return;
        }
        let options = SubscriptionOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: true,
            retain_handling: RetainHandling::Send,
        };
        let subscribe = Subscribe {
            packet_id: self.new_id(),
            filters: self
                .filters
                .iter()
                .map(|filter| (filter.clone(), options))
                .collect(),
            subscription_id: None,
            user_properties: Vec::new(),
        };
        write(&Packet::Subscribe(Box::new(subscribe)), out);
    }

    fn send_line(&mut self, line: String, dup: bool, out: &mut BytesMut) {
        let packet_id = self.new_id();
        let publish = Publish {
            dup,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: self.topic.clone(),
            packet_id: Some(packet_id),
            properties: None,
            payload: Bytes::copy_from_slice(line.as_bytes()),
        };
        write(&Packet::Publish(publish), out);
        self.unacknowledged = Some((packet_id, line));
    }

    fn new_id(&mut self) -> PacketId {
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        PacketId(NonZeroU16::new(self.next_id).expect("counted from 1"))
    }
}

fn write(packet: &Packet, out: &mut BytesMut) {
    packet
        .encode(Version::V5, out)
        .expect("what a terminal sends is short");
}

/// Text as it is, anything else so that the terminal survives it.
fn printable(payload: &Bytes) -> String {
    match ByteString::try_from(payload.clone()) {
        Ok(text)
            if !text
                .chars()
                .any(|c| c.is_control() && c != '\n' && c != '\t') =>
        {
            text.to_string()
        }
        _ => format!("({} bytes) {}", payload.len(), payload.escape_ascii()),
    }
}
