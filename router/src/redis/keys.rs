//! The names of everything, layout version 1.
//!
//! Everything about one client has its id as hash tag: `{prefix}1:{client}:kind`, so that a Redis Cluster keeps it on one
//! server and one script can change it at once. What is found by other ways than the client's id hangs on shards:
//! `{prefix}1:shard:{s07}:kind`. Delayed jobs have shards of their own, `{prefix}1:jobs:{j07}:kind` (see `lua/job.lua`). Programs of different layout versions would not see each other's keys.
//!
//! The client's `route` is a hash. `last` is the newest epoch that the client was ever given: what an older connection wants
//! to write is refused by it. `node`, `epoch` and `at` (Unix milliseconds) are there while the client is connected.

use std::fmt::Write as _;

use crate::{ClientId, MessageId};

/// Shards: of clients on no node, and of the indexes over clients. Part of the layout.
pub(crate) const SHARDS: u16 = 16;

/// Makes keys.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    /// The configured prefix and the version of the layout.
    prefix: String,
}

impl Keys {
    /// For a deployment.
    pub(crate) fn new(prefix: &str) -> Self {
        Self {
            prefix: format!("{prefix}1:"),
        }
    }

    /// Something of a client.
    pub(crate) fn client(&self, client: &ClientId, kind: &str) -> String {
        let name = client.as_str();
        let mut key = String::with_capacity(self.prefix.len() + name.len() + kind.len() + 4);
        key.push_str(&self.prefix);
        key.push('{');
        push_escaped(&mut key, name);
        key.push_str("}:");
        key.push_str(kind);
        key
    }

    /// What is known of a message by its id alone. The id may hold any braces: each is in the slot that it falls into.
    pub(crate) fn message(&self, id: &MessageId) -> String {
        format!("{}m:{id}", self.prefix)
    }

    /// Something of a shard.
    pub(crate) fn shard(&self, shard: u16, kind: &str) -> String {
        format!("{}shard:{{s{shard:02}}}:{kind}", self.prefix)
    }

    /// What everything about the jobs of a shard hangs on, and about the event names that fall into it.
    pub(crate) fn jobs(&self, shard: u16) -> String {
        format!("{}jobs:{{j{shard:02}}}", self.prefix)
    }

    /// Something of the whole deployment, in the slot of `tag`.
    pub(crate) fn global(&self, tag: &str, kind: &str) -> String {
        format!("{}{{{tag}}}!{kind}", self.prefix)
    }
}

/// Braces would end the hash tag early.
fn push_escaped(key: &mut String, name: &str) {
    for char in name.chars() {
        match char {
            '{' | '}' | '%' => {
                let _ = write!(key, "%{:02X}", u32::from(char));
            }
            _ => key.push(char),
        }
    }
}

/// The shard of a client. Part of the layout.
pub(crate) fn shard_of(client: &ClientId) -> u16 {
    client.part_of(SHARDS)
}

#[cfg(test)]
mod tests {
    use super::super::script::slot;
    use super::*;

    fn client(text: &str) -> ClientId {
        ClientId::parse(text).unwrap()
    }

    #[test]
    fn everything_of_a_client_is_in_one_slot() {
        let keys = Keys::new("moorline");
        for name in ["car-7", "a}b", "{", "}{", "{}", "%7D", "ü{x}"] {
            let (route, session) = (
                keys.client(&client(name), "route"),
                keys.client(&client(name), "session"),
            );
            assert_eq!(slot(route.as_bytes()), slot(session.as_bytes()), "{name}");
        }
        assert_eq!(
            keys.client(&client("car-7"), "route"),
            "moorline1:{car-7}:route"
        );
    }

    #[test]
    fn different_clients_have_different_keys() {
        let keys = Keys::new("p");
        let names = ["}", "{", "%7D", "%257D", "a}:x", "a", "s07", "shard"];
        let made: std::collections::HashSet<_> = names
            .iter()
            .map(|name| keys.client(&client(name), "k"))
            .collect();
        assert_eq!(made.len(), names.len());
        assert!(!made.contains(&keys.shard(7, "k")));
        assert!(!made.contains(&keys.global("shard", "k")));
    }

    #[test]
    fn shards_are_about_even_and_never_change() {
        let mut counts = [0_u32; SHARDS as usize];
        for n in 0..16_000 {
            counts[usize::from(shard_of(&client(&format!("device-{n}"))))] += 1;
        }
        assert!(
            counts.iter().all(|count| (800..1_200).contains(count)),
            "{counts:?}"
        );
        assert_eq!(
            shard_of(&client("123456789")),
            (0xCBF4_3926_u32 % 16) as u16
        );
    }
}
