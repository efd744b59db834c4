//! Messages on their way into a store and out of a packet's buffer.
//!
//! Properties are stored as they stand on the wire, without their length in front: the format is
//! the specification's, so it does not change.

use bytes::{BufMut, Bytes, BytesMut};
use bytestring::ByteString;

use crate::decode::reader::Reader;
use crate::decode::{DecodeError, properties};
use crate::encode::{PropertySet, PublishPropertySet};
use crate::topic::{TEXT_BYTES_MAX, copy_text};
use crate::{PublishProperties, QoS, TopicName, Will};

impl PublishProperties {
    /// Appends every property. Text and data that are longer than MQTT can carry, 65,535 bytes,
    /// are left out: no device could be sent them.
    pub fn append_to(&self, out: &mut BytesMut) {
        let start = out.len();
        if PublishPropertySet::of(Some(self)).write(out).is_err() {
            out.truncate(start);
            let mut carried = self.clone();
            carried.drop_unencodable();
            PublishPropertySet::of(Some(&carried))
                .write(out)
                .expect("what cannot be encoded has been dropped");
        }
    }

    /// The bytes of [`PublishProperties::append_to`].
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::new();
        self.append_to(&mut out);
        out.freeze()
    }

    /// Reads what [`PublishProperties::append_to`] wrote.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let properties = properties::stored(Reader::new(bytes))?;
        Ok(properties.map(|boxed| *boxed).unwrap_or_default())
    }

    /// A copy in memory of its own, as [`TopicName::copied`].
    pub fn copied(&self) -> Self {
        Self {
            payload_is_utf8: self.payload_is_utf8,
            message_expiry_interval_s: self.message_expiry_interval_s,
            topic_alias: self.topic_alias,
            response_topic: self.response_topic.as_ref().map(TopicName::copied),
            correlation_data: self.correlation_data.as_deref().map(Bytes::copy_from_slice),
            user_properties: self
                .user_properties
                .iter()
                .map(|(name, value)| (copy_text(name), copy_text(value)))
                .collect(),
            subscription_ids: self.subscription_ids.clone(),
            content_type: self.content_type.as_ref().map(copy_text),
        }
    }

    fn drop_unencodable(&mut self) {
        let fits = |text: &ByteString| text.len() <= TEXT_BYTES_MAX;
        self.user_properties
            .retain(|(name, value)| fits(name) && fits(value));
        self.content_type = self.content_type.take().filter(fits);
        self.correlation_data = self
            .correlation_data
            .take()
            .filter(|data| data.len() <= TEXT_BYTES_MAX);
        self.subscription_ids
            .retain(|id| (1..=268_435_455).contains(id));
    }
}

impl Will {
    /// Appends the will: flags, delay, lengths of topic and payload, then topic, payload and
    /// properties.
    pub fn append_to(&self, out: &mut BytesMut) {
        out.put_u8(self.qos as u8 | u8::from(self.retain) << 2);
        out.put_u32(self.delay_interval_s);
        out.put_u16(u16::try_from(self.topic.as_str().len()).expect("a topic name is that short"));
        out.put_u32(u32::try_from(self.payload.len()).expect("a will payload has 65,535 bytes"));
        out.put_slice(self.topic.as_str().as_bytes());
        out.put_slice(&self.payload);
        if let Some(properties) = &self.properties {
            properties.append_to(out);
        }
    }

    /// Reads what [`Will::append_to`] wrote.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let flags = reader.u8()?;
        if flags > 0b111 {
            return Err(DecodeError::Malformed("unknown flags of a stored will"));
        }
        let delay_interval_s = reader.u32()?;
        let topic_bytes = reader.u16()?.into();
        let payload_bytes = reader.u32()? as usize;
        let topic = ByteString::try_from(reader.take(topic_bytes)?)
            .map_err(|_| DecodeError::Malformed("text that is not UTF-8"))?;
        Ok(Self {
            topic: TopicName::parse(topic)?,
            payload: reader.take(payload_bytes)?,
            qos: QoS::from_bits(flags).ok_or(DecodeError::Malformed("a will with QoS 3"))?,
            retain: flags & 0b100 > 0,
            delay_interval_s,
            properties: properties::stored(reader)?,
        })
    }

    /// A copy in memory of its own, as [`TopicName::copied`].
    pub fn copied(&self) -> Self {
        Self {
            topic: self.topic.copied(),
            payload: Bytes::copy_from_slice(&self.payload),
            qos: self.qos,
            retain: self.retain,
            delay_interval_s: self.delay_interval_s,
            properties: self.properties.as_deref().map(|p| Box::new(p.copied())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_device_could_be_sent_is_left_out_of_a_record() {
        let long = ByteString::from("x".repeat(TEXT_BYTES_MAX + 1));
        let kept = (ByteString::from("k"), ByteString::from("v"));
        let properties = PublishProperties {
            message_expiry_interval_s: Some(9),
            correlation_data: Some(long.as_bytes().clone()),
            user_properties: vec![(long.clone(), kept.1.clone()), kept.clone()],
            subscription_ids: vec![0, 1, 268_435_456],
            content_type: Some(long),
            ..PublishProperties::default()
        };
        let mut record = BytesMut::from("before");
        properties.append_to(&mut record);
        let expected = PublishProperties {
            message_expiry_interval_s: Some(9),
            user_properties: vec![kept],
            subscription_ids: vec![1],
            ..PublishProperties::default()
        };
        let read = PublishProperties::from_bytes(record.freeze().slice(6..));
        assert_eq!(read, Ok(expected));
    }

    #[test]
    fn a_damaged_record_is_refused() {
        let will = Will {
            topic: TopicName::from_static("gone/car-7"),
            payload: Bytes::from_static(b"bye"),
            qos: QoS::AtLeastOnce,
            retain: true,
            delay_interval_s: 5,
            properties: None,
        };
        let mut record = BytesMut::new();
        will.append_to(&mut record);
        let record = record.freeze();
        assert_eq!(Will::from_bytes(record.clone()).as_ref(), Ok(&will));
        for end in 0..record.len() {
            assert!(
                Will::from_bytes(record.slice(..end)).is_err(),
                "{end} bytes of it"
            );
        }
        for (what, damaged) in [("unknown flags", 0b1001), ("QoS 3", 0b0011)] {
            let mut bytes = record.to_vec();
            bytes[0] = damaged;
            assert!(Will::from_bytes(bytes.into()).is_err(), "{what}");
        }
        assert!(PublishProperties::from_bytes(Bytes::from_static(&[0x02, 0])).is_err());
    }
}
