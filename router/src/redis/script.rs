//! Lua functions, and calls: one command or one function, with the slot it belongs to.

use std::sync::LazyLock;

use redis::{Cmd, ToRedisArgs};

/// A Lua function that runs in one slot, all or nothing as far as other callers see it.
///
/// Each lies in a file of its own under `lua/`, which begins with what its keys, arguments and answer are. Numbers are
/// doubles in Lua: exact below 2^53, which clocks in µs are; print them with `string.format('%.0f', n)`.
pub(crate) struct Script {
    source: &'static str,
    digest: LazyLock<String, fn() -> String>,
}

/// Makes a [`Script`] from files under `lua/`, one behind the other.
macro_rules! script {
    ($($file:literal),+) => {
        $crate::redis::script::Script::new(
            concat!($(include_str!(concat!("lua/", $file))),+),
            || $crate::redis::script::digest(concat!($(include_str!(concat!("lua/", $file))),+)),
        )
    };
}
pub(crate) use script;

/// By what the server knows a script.
pub(crate) fn digest(source: &str) -> String {
    redis::Script::new(source).get_hash().to_owned()
}

impl Script {
    /// Use `script!`.
    pub(crate) const fn new(source: &'static str, digest: fn() -> String) -> Self {
        Self {
            source,
            digest: LazyLock::new(digest),
        }
    }

    /// Gives the function to a server, which then knows it by its digest.
    pub(super) fn load(&self) -> Cmd {
        let mut cmd = redis::cmd("SCRIPT");
        cmd.arg("LOAD").arg(self.source);
        cmd
    }
}

/// One command, or one script, whose keys are all in one slot.
#[derive(Clone)]
pub(crate) struct Call {
    pub(super) cmd: Cmd,
    pub(super) slot: u16,
}

impl Call {
    /// A script with `keys`, of which there is at least one; arguments follow with [`Self::arg`].
    pub(crate) fn script(script: &'static Script, keys: &[String]) -> Self {
        debug_assert!(
            keys.windows(2)
                .all(|pair| slot(pair[0].as_bytes()) == slot(pair[1].as_bytes())),
            "the keys of a call are in one slot: {keys:?}"
        );
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(script.digest.as_str()).arg(keys.len()).arg(keys);
        let slot = keys.first().map_or(0, |key| slot(key.as_bytes()));
        Self { cmd, slot }
    }

    /// A command whose first argument is `key`.
    pub(crate) fn command(name: &str, key: &str) -> Self {
        let mut cmd = redis::cmd(name);
        cmd.arg(key);
        Self {
            cmd,
            slot: slot(key.as_bytes()),
        }
    }

    /// A command without a key, for the server that has `key`.
    pub(crate) fn of_server(name: &str, key: &str) -> Self {
        Self {
            cmd: redis::cmd(name),
            slot: slot(key.as_bytes()),
        }
    }

    /// The next argument, or arguments.
    pub(crate) fn arg(mut self, arg: impl ToRedisArgs) -> Self {
        self.cmd.arg(arg);
        self
    }

    /// About how many bytes it takes while it waits.
    pub(super) fn cost(&self) -> usize {
        let args = self.cmd.args_iter().map(|arg| match arg {
            redis::Arg::Simple(bytes) => bytes.len(),
            _ => 16,
        });
        args.sum::<usize>() + 128
    }
}

/// Slots of a Redis Cluster.
pub(super) const SLOTS: u16 = 16_384;

/// The slot of a key: CRC-16 (XMODEM) of what stands in its first braces, or of all of it.
pub(super) fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        let close = rest.iter().position(|byte| *byte == b'}')?;
        (close > 0).then(|| &rest[..close])
    });
    let mut crc: u16 = 0;
    for byte in tag.unwrap_or(key) {
        crc ^= u16::from(*byte) << 8;
        for _ in 0..8 {
            crc = if crc & 0x8000 == 0 {
                crc << 1
            } else {
                (crc << 1) ^ 0x1021
            };
        }
    }
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot(b"123456789"), 0x31C3);
        assert_eq!(slot(b"foo"), 12_182);
        assert_eq!(slot(b"a:{foo}:b"), slot(b"foo"));
        assert_eq!(slot(b"{}foo"), slot(b"{}foo"));
        assert_ne!(
            slot(b"{}foo"),
            slot(b"{}bar"),
            "empty braces count for nothing"
        );
        assert_eq!(slot(b"{a}{b}"), slot(b"a"));
    }
}
