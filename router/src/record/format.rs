//! What the fields of each record are. Layouts carry a version of their own, so that one kind of
//! record can change without touching the others.

use bytes::{Bytes, BytesMut};
use moorline_mqtt::{
    ByteString, PacketId, PublishProperties, QoS, RetainHandling, SubscriptionOptions, TopicName,
    Will,
};

use super::{RecordReader, RecordWriter};
use crate::{
    Ban, BanTarget, ClientId, DeadLetter, Epoch, Message, MessageId, NodeId, Origin, Position,
    QueueName, Receipt, ReceiptState, ReceiptStep, ReceivedPublish, Recipient, SessionRecord,
    Share, StoreError, StoredSubscription, StoredWill, UpstreamMessage,
};

/// Every layout is still the first, but for messages of shared subscriptions.
const V1: u8 = 1;
/// A message with the share it belongs to behind its other fields. Only those have it, so that a
/// store without shared subscriptions can still be read by what came before them.
const V2: u8 = 2;
/// Stands for [`Origin::Session`] where a share follows.
const SHARED_ORIGIN: u8 = 2;

fn read_topic(reader: &mut RecordReader<'_>) -> Result<TopicName, StoreError> {
    let text = ByteString::from(reader.text()?);
    TopicName::parse(text).map_err(|_| reader.damaged("an impossible topic"))
}

fn read_qos(reader: &mut RecordReader<'_>) -> Result<QoS, StoreError> {
    Ok(match reader.u8()? {
        0 => QoS::AtMostOnce,
        1 => QoS::AtLeastOnce,
        2 => QoS::ExactlyOnce,
        _ => return Err(reader.damaged("an impossible QoS")),
    })
}

fn read_message_id(reader: &mut RecordReader<'_>) -> Result<MessageId, StoreError> {
    let text = reader.text()?;
    MessageId::parse(text).map_err(|_| reader.damaged("an impossible message id"))
}

fn read_client(reader: &mut RecordReader<'_>) -> Result<ClientId, StoreError> {
    let text = reader.text()?;
    ClientId::parse(text).map_err(|_| reader.damaged("an impossible client id"))
}

fn write_properties(writer: &mut RecordWriter, properties: Option<&PublishProperties>) {
    writer.option(properties, |writer, properties| {
        let mut bytes = BytesMut::new();
        properties.append_to(&mut bytes);
        writer.bytes(&bytes);
    });
}

fn read_properties(
    reader: &mut RecordReader<'_>,
) -> Result<Option<Box<PublishProperties>>, StoreError> {
    reader.option(|reader| {
        let bytes = reader.bytes()?;
        PublishProperties::from_bytes(Bytes::copy_from_slice(bytes))
            .map(Box::new)
            .map_err(|_| reader.damaged("impossible properties"))
    })
}

/// Refuses properties that MQTT cannot express: no field of a packet is longer than 65,535 bytes.
pub(crate) fn check_properties(properties: Option<&PublishProperties>) -> Result<(), StoreError> {
    let Some(properties) = properties else {
        return Ok(());
    };
    let fits = |len: usize| u16::try_from(len).is_ok();
    let user = &properties.user_properties;
    if fits(properties.correlation_data.as_ref().map_or(0, Bytes::len))
        && fits(
            properties
                .content_type
                .as_ref()
                .map_or(0, |text| text.len()),
        )
        && user
            .iter()
            .all(|(name, value)| fits(name.len()) && fits(value.len()))
        && user
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum::<usize>()
            < 1 << 27
    {
        return Ok(());
    }
    Err(StoreError::Full(
        "a property is longer than 65,535 bytes".into(),
    ))
}

/// What counts against the limit of an inbox.
pub(crate) fn message_bytes(message: &Message) -> u64 {
    let properties = message.properties.as_ref().map_or(0, |properties| {
        let user = properties
            .user_properties
            .iter()
            .map(|(k, v)| k.len() + v.len() + 4);
        let correlation = properties.correlation_data.as_ref().map_or(0, Bytes::len);
        let content_type = properties
            .content_type
            .as_ref()
            .map_or(0, |text| text.len());
        let response = properties
            .response_topic
            .as_ref()
            .map_or(0, |t| t.as_str().len());
        user.sum::<usize>() + correlation + content_type + response
    });
    let share = message.share.as_ref().map_or(0, |share| share.filter.len());
    (message.topic.as_str().len() + message.payload.len() + properties + share) as u64
}

pub(crate) fn message(key: &[u8], message: &Message) -> Vec<u8> {
    let (version, origin) = match (&message.share, message.origin) {
        (Some(_), Origin::Session) => (V2, SHARED_ORIGIN),
        (_, origin) => (V1, origin as u8),
    };
    let mut writer = RecordWriter::new(version, message.payload.len() + 192);
    writer
        .u64(message_bytes(message))
        .u64(message.accepted_at_ms)
        .option(message.expires_at_ms, |w, at| {
            w.u64(at);
        })
        .u8(origin)
        .u8(message.qos as u8)
        .u8(u8::from(message.retain))
        .text(message.id.as_str())
        .text(message.topic.as_str());
    write_properties(&mut writer, message.properties.as_deref());
    writer.option(message.collapse_key.as_deref(), |w, key| {
        w.text(key);
    });
    writer.bytes(&message.payload);
    if let (V2, Some(share)) = (version, &message.share) {
        writer
            .text(&share.filter)
            .u8(share.qos as u8)
            .u8(u8::from(share.retain));
    }
    writer.seal(key)
}

/// The part of a stored message that an inbox keeps in memory.
pub(crate) struct MessageHead {
    pub(crate) bytes: u64,
    pub(crate) accepted_at_ms: u64,
    pub(crate) expires_at_ms: Option<u64>,
    pub(crate) origin: Origin,
    pub(crate) shared: bool,
}

fn read_head(reader: &mut RecordReader<'_>) -> Result<MessageHead, StoreError> {
    let (bytes, accepted_at_ms) = (reader.u64()?, reader.u64()?);
    let expires_at_ms = reader.option(RecordReader::u64)?;
    let (origin, shared) = match reader.u8()? {
        0 => (Origin::Push, false),
        1 => (Origin::Session, false),
        SHARED_ORIGIN => (Origin::Session, true),
        _ => return Err(reader.damaged("an impossible origin")),
    };
    Ok(MessageHead {
        bytes,
        accepted_at_ms,
        expires_at_ms,
        origin,
        shared,
    })
}

fn read_share(reader: &mut RecordReader<'_>) -> Result<Share, StoreError> {
    Ok(Share {
        filter: reader.text()?.into(),
        qos: read_qos(reader)?,
        retain: reader.u8()? != 0,
    })
}

pub(crate) fn parse_message_head(key: &[u8], value: &[u8]) -> Result<MessageHead, StoreError> {
    read_head(&mut RecordReader::open(key, value, V2)?)
}

/// Id and time of acceptance of a stored message.
pub(crate) fn parse_message_id(key: &[u8], value: &[u8]) -> Result<(MessageId, u64), StoreError> {
    let mut reader = RecordReader::open(key, value, V2)?;
    let head = read_head(&mut reader)?;
    let (_qos, _retain) = (reader.u8()?, reader.u8()?);
    Ok((read_message_id(&mut reader)?, head.accepted_at_ms))
}

pub(crate) fn parse_message(key: &[u8], value: &[u8]) -> Result<Message, StoreError> {
    let mut reader = RecordReader::open(key, value, V2)?;
    let head = read_head(&mut reader)?;
    let qos = read_qos(&mut reader)?;
    let retain = reader.u8()? != 0;
    Ok(Message {
        origin: head.origin,
        qos,
        retain,
        id: read_message_id(&mut reader)?,
        topic: read_topic(&mut reader)?,
        properties: read_properties(&mut reader)?,
        collapse_key: reader.option(RecordReader::text)?.map(Box::from),
        payload: Bytes::copy_from_slice(reader.bytes()?),
        accepted_at_ms: head.accepted_at_ms,
        expires_at_ms: head.expires_at_ms,
        share: match head.shared {
            true => Some(Box::new(read_share(&mut reader)?)),
            false => None,
        },
    })
}

fn write_node(writer: &mut RecordWriter, node: Option<&(NodeId, Epoch)>) {
    writer.option(node, |w, (node, epoch)| {
        w.text(node.as_str()).u64(epoch.0);
    });
}

fn read_node(reader: &mut RecordReader<'_>) -> Result<Option<(NodeId, Epoch)>, StoreError> {
    reader.option(|r| Ok((NodeId::from_text(r.text()?), Epoch(r.u64()?))))
}

/// What is known under a message id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MessageRecord {
    /// Of the content, where the caller gave one.
    pub(crate) fingerprint: Option<u64>,
    pub(crate) stage: Stage,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stage {
    /// In an inbox.
    Waiting(ClientId, Position),
    /// Over, since these Unix milliseconds.
    Final(Receipt, u64),
}

const STATES: [ReceiptState; 9] = [
    ReceiptState::Accepted,
    ReceiptState::Sent,
    ReceiptState::Delivered,
    ReceiptState::Rejected,
    ReceiptState::Expired,
    ReceiptState::Replaced,
    ReceiptState::Dropped,
    ReceiptState::TooLarge,
    ReceiptState::Cancelled,
];

fn state_number(state: ReceiptState) -> u8 {
    let index = STATES.iter().position(|known| *known == state);
    u8::try_from(index.expect("every state is listed")).expect("nine states")
}

pub(crate) fn message_record(key: &[u8], record: &MessageRecord) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 128);
    writer.option(record.fingerprint, |w, fingerprint| {
        w.u64(fingerprint);
    });
    match &record.stage {
        Stage::Waiting(client, position) => {
            writer
                .u8(0)
                .text(client.as_str())
                .u64(position.generation)
                .u64(position.sequence);
        }
        Stage::Final(receipt, ended_at_ms) => {
            writer.u8(1).u64(*ended_at_ms);
            match &receipt.to {
                Recipient::Client(client) => writer.u8(0).text(client.as_str()),
                Recipient::Topic(topic) => writer.u8(1).text(topic),
            };
            writer.u32(u32::try_from(receipt.timeline.len()).expect("a few steps"));
            for step in &receipt.timeline {
                writer.u8(state_number(step.state)).u64(step.at_ms);
                write_node(&mut writer, step.node.as_ref());
                writer.option(step.reason_code, |w, code| {
                    w.u8(code);
                });
            }
        }
    }
    writer.seal(key)
}

pub(crate) fn parse_message_record(
    key: &[u8],
    id: &MessageId,
    value: &[u8],
) -> Result<MessageRecord, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let fingerprint = reader.option(RecordReader::u64)?;
    let stage = match reader.u8()? {
        0 => Stage::Waiting(
            read_client(&mut reader)?,
            Position {
                generation: reader.u64()?,
                sequence: reader.u64()?,
            },
        ),
        1 => {
            let ended_at_ms = reader.u64()?;
            let to = match reader.u8()? {
                0 => Recipient::Client(read_client(&mut reader)?),
                1 => Recipient::Topic(reader.text()?.into()),
                _ => return Err(reader.damaged("an impossible recipient")),
            };
            let mut timeline = Vec::new();
            for _ in 0..reader.u32()? {
                let state = STATES.get(usize::from(reader.u8()?)).copied();
                timeline.push(ReceiptStep {
                    state: state.ok_or_else(|| reader.damaged("an impossible state"))?,
                    at_ms: reader.u64()?,
                    node: read_node(&mut reader)?,
                    reason_code: reader.option(RecordReader::u8)?,
                });
            }
            Stage::Final(
                Receipt {
                    id: id.clone(),
                    to,
                    timeline,
                },
                ended_at_ms,
            )
        }
        _ => return Err(reader.damaged("an impossible stage")),
    };
    Ok(MessageRecord { fingerprint, stage })
}

/// How far an inbox was handed to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SentNote {
    pub(crate) through: Position,
    pub(crate) at_ms: u64,
    pub(crate) node: NodeId,
    pub(crate) epoch: Epoch,
}

pub(crate) fn sent_note(key: &[u8], note: &SentNote) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 96);
    writer
        .u64(note.through.generation)
        .u64(note.through.sequence)
        .u64(note.at_ms)
        .text(note.node.as_str())
        .u64(note.epoch.0);
    writer.seal(key)
}

pub(crate) fn parse_sent_note(key: &[u8], value: &[u8]) -> Result<SentNote, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    Ok(SentNote {
        through: Position {
            generation: reader.u64()?,
            sequence: reader.u64()?,
        },
        at_ms: reader.u64()?,
        node: NodeId::from_text(reader.text()?),
        epoch: Epoch(reader.u64()?),
    })
}

/// A record that is one number.
pub(crate) fn number(key: &[u8], number: u64) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 16);
    writer.u64(number);
    writer.seal(key)
}

pub(crate) fn parse_number(key: &[u8], value: &[u8]) -> Result<u64, StoreError> {
    RecordReader::open(key, value, V1)?.u64()
}

/// A record that is one position.
pub(crate) fn position(key: &[u8], position: Position) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 24);
    writer.u64(position.generation).u64(position.sequence);
    writer.seal(key)
}

pub(crate) fn parse_position(key: &[u8], value: &[u8]) -> Result<Position, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    Ok(Position {
        generation: reader.u64()?,
        sequence: reader.u64()?,
    })
}

pub(crate) fn session(key: &[u8], session: &SessionRecord) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 128);
    writer
        .text(session.client.as_str())
        .u32(session.expiry_interval_s)
        .option(session.disconnected_at_ms, |w, at| {
            w.u64(at);
        });
    writer.u32(u32::try_from(session.subscriptions.len()).expect("bounded by the access node"));
    for subscription in &session.subscriptions {
        let options = subscription.options;
        writer
            .text(&subscription.filter)
            .u8(options.qos as u8)
            .u8(u8::from(options.no_local))
            .u8(u8::from(options.retain_as_published))
            .u8(options.retain_handling as u8)
            .option(subscription.subscription_id, |w, id| {
                w.u32(id);
            });
    }
    writer.seal(key)
}

pub(crate) fn parse_session(key: &[u8], value: &[u8]) -> Result<SessionRecord, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let client = read_client(&mut reader)?;
    let expiry_interval_s = reader.u32()?;
    let disconnected_at_ms = reader.option(RecordReader::u64)?;
    let mut subscriptions = Vec::new();
    for _ in 0..reader.u32()? {
        let filter = reader.text()?.to_owned();
        let options = SubscriptionOptions {
            qos: read_qos(&mut reader)?,
            no_local: reader.u8()? != 0,
            retain_as_published: reader.u8()? != 0,
            retain_handling: match reader.u8()? {
                0 => RetainHandling::Send,
                1 => RetainHandling::SendIfNew,
                2 => RetainHandling::DoNotSend,
                _ => return Err(reader.damaged("an impossible retain handling")),
            },
        };
        let subscription_id = reader.option(RecordReader::u32)?;
        subscriptions.push(StoredSubscription {
            filter,
            options,
            subscription_id,
        });
    }
    Ok(SessionRecord {
        client,
        expiry_interval_s,
        disconnected_at_ms,
        subscriptions,
    })
}

pub(crate) fn will(key: &[u8], will: &StoredWill) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    will.will.append_to(&mut bytes);
    let mut writer = RecordWriter::new(V1, bytes.len() + 32);
    writer.u64(will.epoch.0).bytes(&bytes);
    writer.seal(key)
}

pub(crate) fn parse_will(key: &[u8], value: &[u8]) -> Result<StoredWill, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let epoch = Epoch(reader.u64()?);
    let bytes = reader.bytes()?;
    let will = Will::from_bytes(Bytes::copy_from_slice(bytes))
        .map_err(|_| reader.damaged("an impossible will"))?;
    Ok(StoredWill { epoch, will })
}

pub(crate) fn ban(key: &[u8], ban: &Ban) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 128);
    writer
        .text(ban.target.kind())
        .text(&ban.target.value())
        .text(&ban.reason)
        .u64(ban.since_ms)
        .option(ban.expires_at_ms, |w, at| {
            w.u64(at);
        });
    writer.seal(key)
}

pub(crate) fn parse_ban(key: &[u8], value: &[u8]) -> Result<Ban, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let (kind, value) = (reader.text()?, reader.text()?);
    let target = BanTarget::parse(kind, value);
    Ok(Ban {
        target: target.map_err(|_| reader.damaged("a ban of nobody"))?,
        reason: reader.text()?.into(),
        since_ms: reader.u64()?,
        expires_at_ms: reader.option(RecordReader::u64)?,
    })
}

pub(crate) fn received(key: &[u8], received: &ReceivedPublish) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 64);
    writer
        .u16(received.packet_id.0.get())
        .text(received.message_id.as_str())
        .u8(u8::from(received.done));
    writer.seal(key)
}

pub(crate) fn parse_received(key: &[u8], value: &[u8]) -> Result<ReceivedPublish, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    let packet_id = std::num::NonZeroU16::new(reader.u16()?);
    Ok(ReceivedPublish {
        packet_id: PacketId(packet_id.ok_or_else(|| reader.damaged("packet identifier zero"))?),
        message_id: read_message_id(&mut reader)?,
        done: reader.u8()? != 0,
    })
}

fn write_upstream(writer: &mut RecordWriter, message: &UpstreamMessage) {
    writer
        .text(message.id.as_str())
        .text(message.client.as_str())
        .text(message.topic.as_str())
        .u8(message.qos as u8);
    write_properties(writer, message.properties.as_deref());
    writer.u64(message.received_at_ms).bytes(&message.payload);
}

fn read_upstream(reader: &mut RecordReader<'_>) -> Result<UpstreamMessage, StoreError> {
    Ok(UpstreamMessage {
        id: read_message_id(reader)?,
        client: read_client(reader)?,
        topic: read_topic(reader)?,
        qos: read_qos(reader)?,
        properties: read_properties(reader)?,
        received_at_ms: reader.u64()?,
        payload: Bytes::copy_from_slice(reader.bytes()?),
    })
}

pub(crate) fn upstream(key: &[u8], message: &UpstreamMessage) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, message.payload.len() + 160);
    write_upstream(&mut writer, message);
    writer.seal(key)
}

pub(crate) fn parse_upstream(key: &[u8], value: &[u8]) -> Result<UpstreamMessage, StoreError> {
    read_upstream(&mut RecordReader::open(key, value, V1)?)
}

pub(crate) fn dead_letter(key: &[u8], letter: &DeadLetter) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, letter.message.payload.len() + 256);
    writer
        .text(letter.queue.as_str())
        .text(&letter.reason)
        .u32(letter.attempts)
        .u64(letter.at_ms);
    write_upstream(&mut writer, &letter.message);
    writer.seal(key)
}

pub(crate) fn parse_dead_letter(key: &[u8], value: &[u8]) -> Result<DeadLetter, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    Ok(DeadLetter {
        queue: QueueName::new(reader.text()?),
        reason: reader.text()?.into(),
        attempts: reader.u32()?,
        at_ms: reader.u64()?,
        message: read_upstream(&mut reader)?,
    })
}

/// What is known of an upstream queue as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueRecord {
    /// Of its messages and dead letters.
    pub(crate) bytes: u64,
    pub(crate) partitions: u16,
}

pub(crate) fn queue(key: &[u8], record: QueueRecord) -> Vec<u8> {
    let mut writer = RecordWriter::new(V1, 16);
    writer.u64(record.bytes).u16(record.partitions);
    writer.seal(key)
}

pub(crate) fn parse_queue(key: &[u8], value: &[u8]) -> Result<QueueRecord, StoreError> {
    let mut reader = RecordReader::open(key, value, V1)?;
    Ok(QueueRecord {
        bytes: reader.u64()?,
        partitions: reader.u16()?,
    })
}
