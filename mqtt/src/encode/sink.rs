//! Where a walk over the fields of a packet leads: to a number of bytes, or to the bytes.

use bytes::{BufMut, BytesMut};

use super::{EncodeError, REMAINING_LENGTH_MAX};
use crate::topic::TEXT_BYTES_MAX;

/// Takes the fields of a packet in their order on the wire.
pub(crate) trait Sink: Sized {
    fn bytes(&mut self, bytes: &[u8]);
    fn u8(&mut self, value: u8);
    fn u16(&mut self, value: u16);
    fn u32(&mut self, value: u32);

    /// A Variable Byte Integer (section 1.5.5) in its shortest form.
    fn varint(&mut self, value: usize) -> Result<(), EncodeError> {
        if value > REMAINING_LENGTH_MAX {
            return Err(EncodeError::PacketTooLong);
        }
        let mut rest = value;
        while rest > 0x7F {
            self.u8((rest & 0x7F) as u8 | 0x80);
            rest >>= 7;
        }
        self.u8(rest as u8);
        Ok(())
    }

    /// Binary Data (section 1.5.6); `what` names it if it is too long.
    fn binary(&mut self, what: &'static str, bytes: &[u8]) -> Result<(), EncodeError> {
        if bytes.len() > TEXT_BYTES_MAX {
            return Err(EncodeError::FieldTooLong(what));
        }
        self.u16(bytes.len() as u16);
        self.bytes(bytes);
        Ok(())
    }

    /// A UTF-8 Encoded String (section 1.5.4).
    fn text(&mut self, what: &'static str, text: &str) -> Result<(), EncodeError> {
        self.binary(what, text.as_bytes())
    }

    /// A property length and its properties.
    fn properties(&mut self, set: &impl PropertySet) -> Result<(), EncodeError> {
        let mut counter = Counter::default();
        set.write(&mut counter)?;
        self.varint(counter.bytes())?;
        set.write(self)
    }
}

/// Properties that know how to be written, without their length in front.
pub(crate) trait PropertySet {
    fn write<S: Sink>(&self, to: &mut S) -> Result<(), EncodeError>;
}

/// Counts bytes and keeps none.
#[derive(Debug, Default)]
pub(crate) struct Counter(usize);

impl Counter {
    pub(crate) fn bytes(&self) -> usize {
        self.0
    }
}

impl Sink for Counter {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0 += bytes.len();
    }

    fn u8(&mut self, _: u8) {
        self.0 += 1;
    }

    fn u16(&mut self, _: u16) {
        self.0 += 2;
    }

    fn u32(&mut self, _: u32) {
        self.0 += 4;
    }
}

impl Sink for BytesMut {
    fn bytes(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }

    fn u8(&mut self, value: u8) {
        self.put_u8(value);
    }

    fn u16(&mut self, value: u16) {
        self.put_u16(value);
    }

    fn u32(&mut self, value: u32) {
        self.put_u32(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_byte_integers_are_those_of_the_specification() {
        for (value, expected) in [
            (0, &[0x00][..]),
            (127, &[0x7F]),
            (128, &[0x80, 0x01]),
            (16_383, &[0xFF, 0x7F]),
            (16_384, &[0x80, 0x80, 0x01]),
            (2_097_151, &[0xFF, 0xFF, 0x7F]),
            (2_097_152, &[0x80, 0x80, 0x80, 0x01]),
            (268_435_455, &[0xFF, 0xFF, 0xFF, 0x7F]),
        ] {
            let mut out = BytesMut::new();
            out.varint(value).unwrap();
            assert_eq!(&out[..], expected);
        }
        let too_much = BytesMut::new().varint(268_435_456);
        assert_eq!(too_much, Err(EncodeError::PacketTooLong));
    }
}
