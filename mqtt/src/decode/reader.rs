//! The data types of section 1.5, read from one packet or from one block of properties.

use std::num::NonZeroU16;

use bytes::{Buf, Bytes};
use bytestring::ByteString;

use super::DecodeError;
use crate::packet_type::PacketType;
use crate::{PacketId, TopicName};

/// What is left of a packet. Every slice it hands out shares the packet's buffer.
pub(crate) struct Reader(Bytes);

impl Reader {
    pub(crate) fn new(bytes: Bytes) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Everything that is left.
    pub(crate) fn rest(self) -> Bytes {
        self.0
    }

    /// For packets that have nothing more to say.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        match self.is_empty() {
            true => Ok(()),
            false => Err(DecodeError::Malformed("bytes after the end of the packet")),
        }
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.0.try_get_u8().map_err(|_| cut())
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.0.try_get_u16().map_err(|_| cut())
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.0.try_get_u32().map_err(|_| cut())
    }

    pub(crate) fn varint(&mut self) -> Result<u32, DecodeError> {
        let (value, bytes) = super::remaining_length(&self.0)?.ok_or_else(cut)?;
        self.0.advance(bytes);
        Ok(value as u32)
    }

    pub(crate) fn take(&mut self, bytes: usize) -> Result<Bytes, DecodeError> {
        if bytes > self.0.len() {
            return Err(cut());
        }
        Ok(self.0.split_to(bytes))
    }

    /// Binary Data (section 1.5.6).
    pub(crate) fn binary(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.u16()?;
        self.take(length.into())
    }

    /// A UTF-8 Encoded String (section 1.5.4).
    pub(crate) fn text(&mut self) -> Result<ByteString, DecodeError> {
        let text = self.unchecked_text()?;
        if text.as_bytes().contains(&0) {
            return Err(DecodeError::Malformed("text with U+0000"));
        }
        Ok(text)
    }

    /// As [`Reader::text`], for what is searched for U+0000 by its type.
    pub(crate) fn unchecked_text(&mut self) -> Result<ByteString, DecodeError> {
        ByteString::try_from(self.binary()?)
            .map_err(|_| DecodeError::Malformed("text that is not UTF-8"))
    }

    pub(crate) fn topic_name(&mut self) -> Result<TopicName, DecodeError> {
        Ok(TopicName::parse(self.unchecked_text()?)?)
    }

    pub(crate) fn packet_id(&mut self) -> Result<PacketId, DecodeError> {
        let id = NonZeroU16::new(self.u16()?);
        id.map(PacketId)
            .ok_or(DecodeError::Protocol("packet identifier 0"))
    }

    /// A byte that may be only 0 or 1.
    pub(crate) fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Protocol(
                "a flag property that is neither 0 nor 1",
            )),
        }
    }

    /// A block of properties: its length, then `set` for the identifier of each, which reads the
    /// value and says whether the identifier may stand here.
    pub(crate) fn properties(
        &mut self,
        packet: PacketType,
        set: impl FnMut(u8, &mut Self) -> Result<bool, DecodeError>,
    ) -> Result<(), DecodeError> {
        let length = self.varint()? as usize;
        if length == 0 {
            return Ok(());
        }
        Self::new(self.take(length)?).all_properties(packet, set)
    }

    /// As [`Reader::properties`], where the properties are all that is left.
    pub(crate) fn all_properties(
        mut self,
        packet: PacketType,
        mut set: impl FnMut(u8, &mut Self) -> Result<bool, DecodeError>,
    ) -> Result<(), DecodeError> {
        while !self.is_empty() {
            // A Variable Byte Integer by name, but none above 127 is defined.
            let id = self.u8()?;
            if !set(id, &mut self)? {
                return Err(DecodeError::IllegalProperty { packet, id });
            }
        }
        Ok(())
    }
}

fn cut() -> DecodeError {
    DecodeError::Malformed("a field that reaches beyond the end of its packet or properties")
}

/// Sets a property that may stand only once.
pub(crate) fn once<T>(slot: &mut Option<T>, id: u8, value: T) -> Result<(), DecodeError> {
    if slot.is_some() {
        return Err(DecodeError::RepeatedProperty { id });
    }
    *slot = Some(value);
    Ok(())
}
