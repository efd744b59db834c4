//! How records are written: a version byte, the fields, and a checksum over key and value.
//!
//! Every backend keeps its records in this form, under keys of its own. A store that replays a journal
//! which is damaged in the middle as if it had ended there needs a checksum over the key as well: it finds
//! whatever slips through, and a value that ended up under another key. What the fields mean is in `format`.

pub(crate) mod format;
pub(crate) mod job;

use bytes::BufMut;

use crate::StoreError;

const CHECKSUM_LEN: usize = 4;

/// CRC-32 (IEEE 802.3) of several slices as one text.
pub(crate) fn crc32(parts: &[&[u8]]) -> u32 {
    let mut crc = u32::MAX;
    for byte in parts.iter().copied().flatten() {
        crc = CRC_TABLE[usize::from((crc as u8) ^ byte)] ^ (crc >> 8);
    }
    !crc
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                0xEDB8_8320 ^ (crc >> 1)
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

/// Collects the fields of one record.
pub(crate) struct RecordWriter(Vec<u8>);

impl RecordWriter {
    /// `capacity` is the expected length; a longer record grows.
    pub(crate) fn new(version: u8, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity + CHECKSUM_LEN);
        bytes.push(version);
        Self(bytes)
    }
    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.0.put_u8(value);
        self
    }
    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.0.put_u16(value);
        self
    }
    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.put_u32(value);
        self
    }
    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.put_u64(value);
        self
    }
    /// Length-prefixed bytes.
    pub(crate) fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.0
            .put_u32(u32::try_from(value.len()).expect("packets are shorter than 256 MiB"));
        self.0.put_slice(value);
        self
    }
    pub(crate) fn text(&mut self, value: &str) -> &mut Self {
        self.bytes(value.as_bytes())
    }
    pub(crate) fn option<T>(
        &mut self,
        value: Option<T>,
        write: impl FnOnce(&mut Self, T),
    ) -> &mut Self {
        self.u8(u8::from(value.is_some()));
        if let Some(value) = value {
            write(self, value);
        }
        self
    }
    /// The value to be stored under `key`.
    pub(crate) fn seal(self, key: &[u8]) -> Vec<u8> {
        let mut value = self.0;
        let checksum = crc32(&[key, &value]);
        value.extend_from_slice(&checksum.to_be_bytes());
        value
    }
}

/// Reads the fields of one record back, in the order in which they were written.
pub(crate) struct RecordReader<'r> {
    rest: &'r [u8],
    key: &'r [u8],
}

impl<'r> RecordReader<'r> {
    /// Checks the checksum; `version_max` is the newest layout that the caller can read.
    pub(crate) fn open(
        key: &'r [u8],
        value: &'r [u8],
        version_max: u8,
    ) -> Result<Self, StoreError> {
        let damaged = |what: &str| {
            Err(StoreError::Damaged(format!(
                "{what} under {}",
                key.escape_ascii()
            )))
        };
        let Some((body, checksum)) = value.split_last_chunk::<CHECKSUM_LEN>() else {
            return damaged("a value too short for a checksum");
        };
        if crc32(&[key, body]) != u32::from_be_bytes(*checksum) {
            return damaged("wrong checksum");
        }
        match body.split_first() {
            Some((&version, _)) if version > version_max => damaged("a layout of a newer version"),
            Some((_, rest)) => Ok(Self { rest, key }),
            None => damaged("an empty value"),
        }
    }
    /// Whether no field is left: an older record may have fewer of them.
    pub(crate) fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }
    pub(crate) fn damaged(&self, what: &str) -> StoreError {
        StoreError::Damaged(format!("{what} under {}", self.key.escape_ascii()))
    }
    fn take(&mut self, len: usize) -> Result<&'r [u8], StoreError> {
        let Some((field, rest)) = self.rest.split_at_checked(len) else {
            return Err(self.damaged("a field cut short"));
        };
        self.rest = rest;
        Ok(field)
    }
    fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN], StoreError> {
        Ok(self
            .take(LEN)?
            .try_into()
            .expect("just that many were taken"))
    }
    pub(crate) fn u8(&mut self) -> Result<u8, StoreError> {
        Ok(u8::from_be_bytes(self.array()?))
    }
    pub(crate) fn u16(&mut self) -> Result<u16, StoreError> {
        Ok(u16::from_be_bytes(self.array()?))
    }
    pub(crate) fn u32(&mut self) -> Result<u32, StoreError> {
        Ok(u32::from_be_bytes(self.array()?))
    }
    pub(crate) fn u64(&mut self) -> Result<u64, StoreError> {
        Ok(u64::from_be_bytes(self.array()?))
    }
    pub(crate) fn bytes(&mut self) -> Result<&'r [u8], StoreError> {
        let len = self.u32()? as usize;
        self.take(len)
    }
    pub(crate) fn text(&mut self) -> Result<&'r str, StoreError> {
        let bytes = self.bytes()?;
        std::str::from_utf8(bytes).map_err(|_| self.damaged("text that is not UTF-8"))
    }
    pub(crate) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        match self.u8()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(self.damaged("an option that is neither there nor absent")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_the_one_everybody_knows() {
        assert_eq!(crc32(&[b"1234", b"56789"]), 0xCBF4_3926);
    }

    #[test]
    fn fields_come_back_in_order() {
        let mut writer = RecordWriter::new(1, 8);
        writer
            .u8(7)
            .u16(300)
            .u32(70_000)
            .u64(u64::MAX)
            .text("é")
            .bytes(&[0, 255]);
        writer
            .option(Some(5), |w, v| {
                w.u8(v);
            })
            .option(None::<u8>, |w, v| {
                w.u8(v);
            });
        let value = writer.seal(b"key");
        let mut reader = RecordReader::open(b"key", &value, 1).unwrap();
        assert_eq!(reader.u8().unwrap(), 7);
        assert_eq!(reader.u16().unwrap(), 300);
        assert_eq!(reader.u32().unwrap(), 70_000);
        assert_eq!(reader.u64().unwrap(), u64::MAX);
        assert_eq!(reader.text().unwrap(), "é");
        assert_eq!(reader.bytes().unwrap(), [0, 255]);
        assert_eq!(reader.option(|r| r.u8()).unwrap(), Some(5));
        assert_eq!(reader.option(|r| r.u8()).unwrap(), None);
        assert!(matches!(reader.u8(), Err(StoreError::Damaged(_))));
    }

    #[test]
    fn every_single_flipped_bit_is_noticed() {
        let mut writer = RecordWriter::new(1, 8);
        writer.text("a message");
        let value = writer.seal(b"key");
        for bit in 0..value.len() * 8 {
            let mut damaged = value.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(
                RecordReader::open(b"key", &damaged, u8::MAX).is_err(),
                "bit {bit}"
            );
        }
        assert!(
            RecordReader::open(b"other", &value, 1).is_err(),
            "a value under another key"
        );
        assert!(
            RecordReader::open(b"key", &value, 0).is_err(),
            "a newer layout"
        );
    }
}
