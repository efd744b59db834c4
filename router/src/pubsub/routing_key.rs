//! Topics as the routing keys of an AMQP topic exchange, and filters as its binding patterns.
//!
//! A level becomes a word: `/` turns into `.`, the wildcard `+` into `*`, `#` stays. What would be read as one of
//! these is escaped as `%` and two hexadecimal digits; a `%` alone is the empty level. In front stands the *class* of
//! the publication, `0` for QoS 0 and `1` for the rest, so that a durable queue need not take what nobody waits for.
//!
//! A key ends at 255 bytes. A topic that does not fit has no key of its own but [`LONG`], and a filter that may match
//! such a topic is bound to that as well; which topic it is says the publication itself.

use moorline_mqtt::QoS;

/// Bytes of an AMQP short string.
const KEY_BYTES_MAX: usize = 255;
/// Bytes of the class and the dot behind it.
const CLASS_BYTES: usize = 2;
/// The word in place of a topic that is too long for a key. It is none that a topic could have.
pub const LONG: &str = "%l";

/// The routing key of a publication.
pub fn routing_key(topic: &str, qos: QoS) -> String {
    let mut key = String::with_capacity(topic.len() + CLASS_BYTES);
    key.push_str(match qos {
        QoS::AtMostOnce => "0.",
        QoS::AtLeastOnce | QoS::ExactlyOnce => "1.",
    });
    for (at, level) in topic.split('/').enumerate() {
        if at > 0 {
            key.push('.');
        }
        push_word(&mut key, level);
        if key.len() > KEY_BYTES_MAX {
            key.truncate(CLASS_BYTES);
            key.push_str(LONG);
            break;
        }
    }
    key
}

/// A filter in words, without the class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Words {
    /// Without a last `#`.
    pub(crate) words: Vec<Box<str>>,
    /// Whether any words may follow.
    pub(crate) open: bool,
    /// Whether a topic may match that is too long for a key.
    pub(crate) long: bool,
}

impl Words {
    /// The words of `filter`, which is that behind the group in a shared subscription. Where they do not fit into a
    /// key, as many as do, and whatever follows.
    pub(crate) fn of(filter: &str) -> Self {
        let mut words = Vec::new();
        let mut open = false;
        let mut long = false;
        let mut length = CLASS_BYTES - 1;
        for level in filter.split('/') {
            if level == "#" {
                (open, long) = (true, true);
                break;
            }
            let mut word = String::with_capacity(level.len());
            if level == "+" {
                word.push('*');
                long = true;
            } else {
                push_word(&mut word, level);
            }
            // Room is left for ".#".
            if length + 1 + word.len() + 2 > KEY_BYTES_MAX {
                (open, long) = (true, true);
                break;
            }
            length += 1 + word.len();
            words.push(word.into());
        }
        Self { words, open, long }
    }

    /// The binding pattern, without the class.
    #[cfg(test)]
    pub(crate) fn pattern(&self) -> String {
        pattern(&self.words, self.open)
    }
}

/// The pattern of `words`; where it is `open`, of whatever begins with them.
pub(crate) fn pattern<W: AsRef<str>>(words: &[W], open: bool) -> String {
    let mut text = String::new();
    let words = words.iter().map(AsRef::as_ref);
    for word in words.chain(open.then_some("#")) {
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(word);
    }
    text
}

fn push_word(out: &mut String, level: &str) {
    if level.is_empty() {
        out.push('%');
        return;
    }
    for character in level.chars() {
        match character {
            '.' => out.push_str("%2E"),
            '*' => out.push_str("%2A"),
            '#' => out.push_str("%23"),
            '%' => out.push_str("%25"),
            other => out.push(other),
        }
    }
}

/// Whether a topic exchange would take `key` to a queue that is bound with `pattern`.
#[cfg(test)]
pub(crate) fn exchange_matches(pattern: &str, key: &str) -> bool {
    fn words_match(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => {
                words_match(rest, key) || (!key.is_empty() && words_match(pattern, &key[1..]))
            }
            (Some((word, rest)), Some((found, others))) => {
                (*word == "*" || word == found) && words_match(rest, others)
            }
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let key: Vec<&str> = key.split('.').collect();
    words_match(&pattern, &key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_become_keys() {
        for (topic, key) in [
            ("a/b", "1.a.b"),
            ("a.b/c", "1.a%2Eb.c"),
            ("a//b/", "1.a.%.b.%"),
            ("/", "1.%.%"),
            ("100%/*", "1.100%25.%2A"),
            ("é/日本", "1.é.日本"),
        ] {
            assert_eq!(routing_key(topic, QoS::AtLeastOnce), key);
        }
        assert_eq!(routing_key("a", QoS::AtMostOnce), "0.a");
        let longest = "x".repeat(253);
        assert_eq!(routing_key(&longest, QoS::ExactlyOnce).len(), 255);
        let long = format!("{longest}y");
        assert_eq!(routing_key(&long, QoS::ExactlyOnce), "1.%l");
    }

    #[test]
    fn filters_become_patterns() {
        for (filter, pattern, long) in [
            ("a/b", "a.b", false),
            ("a/+/c", "a.*.c", true),
            ("#", "#", true),
            ("a/#", "a.#", true),
            ("+/a.b//#", "*.a%2Eb.%.#", true),
        ] {
            let words = Words::of(filter);
            assert_eq!((words.pattern().as_str(), words.long), (pattern, long));
        }
        let long = format!("a/{}/b", "x".repeat(260));
        assert_eq!(Words::of(&long).pattern(), "a.#");
        let levels = vec!["+"; 200].join("/");
        let words = Words::of(&levels);
        assert!(words.open && words.pattern().len() <= 253);
    }
}
