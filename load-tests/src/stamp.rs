//! What a bot writes into a payload, and reads from it at the other end.
//!
//! Plain text of a fixed width, so that it can travel in a JSON body as it is, padded to the payload
//! size under test.

use std::fmt::Write as _;

/// One message's identity and times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp<'a> {
    /// The run that sent it.
    pub(crate) run: &'a str,
    /// Which device it is for (or from).
    pub(crate) device: u32,
    /// Counts up from 0 per device.
    pub(crate) sequence: u32,
    /// When it had to be sent, on the run's clock.
    pub(crate) due_ns: u64,
    /// When it was sent, on the run's clock.
    pub(crate) sent_ns: u64,
}

/// Shortest payload that holds a stamp.
pub(crate) const STAMP_BYTES: u16 = 60;

impl<'a> Stamp<'a> {
    /// Replaces what `out` holds with this stamp, padded with dots to `size` bytes.
    pub(crate) fn write(&self, size: usize, out: &mut String) {
        out.clear();
        write!(
            out,
            "{} {:08x} {:08x} {:016x} {:016x}",
            self.run, self.device, self.sequence, self.due_ns, self.sent_ns
        )
        .expect("a String takes whatever is written");
        if out.len() < size {
            out.push(' ');
            out.extend(std::iter::repeat_n('.', size - out.len()));
        }
    }

    /// Reads a stamp; `None` for a payload that is no bot's.
    pub(crate) fn parse(payload: &'a [u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(payload).ok()?.split(' ');
        Some(Self {
            run: words.next().filter(|run| !run.is_empty())?,
            device: u32::from_str_radix(words.next()?, 16).ok()?,
            sequence: u32::from_str_radix(words.next()?, 16).ok()?,
            due_ns: u64::from_str_radix(words.next()?, 16).ok()?,
            sent_ns: u64::from_str_radix(words.next()?, 16).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp<'static> = Stamp {
        run: "c0ffee00",
        device: 17,
        sequence: u32::MAX,
        due_ns: u64::MAX,
        sent_ns: 1,
    };

    #[test]
    fn a_stamp_survives_the_way_at_any_size() {
        let least = usize::from(STAMP_BYTES);
        for size in [0, least, least + 1, least + 2, 128, 4_096] {
            let mut text = String::from("left over from before");
            STAMP.write(size, &mut text);
            assert_eq!(text.len(), size.max(least));
            assert_eq!(Stamp::parse(text.as_bytes()), Some(STAMP));
        }
    }

    #[test]
    fn other_payloads_are_not_stamps() {
        for payload in [
            &b""[..],
            b"hello",
            b" 0 0 0 0",
            b"run 0 0 0",
            b"run zz 0 0 0",
            b"\xff 0 0 0 0",
        ] {
            assert_eq!(Stamp::parse(payload), None, "{payload:?}");
        }
    }
}
