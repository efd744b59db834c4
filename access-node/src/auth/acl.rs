//! Who may publish and subscribe to what: rules, in order, the first that decides wins.
//!
//! A publish names one topic. A subscription names a set of them, so a rule may hold for a part of
//! what is wanted: an allowing rule decides only for a filter that it covers whole, a denying one
//! for every filter that it touches. What is allowed is therefore allowed to the last topic; a
//! filter that only several rules together would allow is denied.
//!
//! No I/O, and nothing of who a device is: that is [`super::identity`].

use std::sync::Arc;

use super::config::{AclConfig, Action, Permission, RuleConfig};

/// Rules of one answer of an authenticator.
const RULES_MAX: usize = 64;
/// Topics of the same, over all of its rules.
const TOPICS_MAX: usize = 256;

/// What the placeholders of a rule stand for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names<'a> {
    pub(crate) client: &'a str,
    pub(crate) username: Option<&'a str>,
    pub(crate) certificate: Option<&'a str>,
}

/// What somebody wants to do, with a topic name or a topic filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish<'a> {
    Publish(&'a str),
    /// Without the `$share/{group}/` of a shared subscription.
    Subscribe(&'a str),
}

/// The rules that hold for every device.
#[derive(Debug)]
pub(crate) struct Acl {
    rules: Vec<Rule>,
    default: Permission,
}

impl Acl {
    /// The configured rules, then those that give a device its own topics and no other device's.
    pub(crate) fn new(config: &AclConfig, device_topics: &str) -> Result<Self, String> {
        let mut rules = Vec::new();
        for (at, rule) in config.rules.iter().enumerate() {
            let rule = Rule::parse(rule);
            rules.push(rule.map_err(|error| format!("acl.rules[{at}]: {error}"))?);
        }
        let own = format!("{device_topics}/{{client_id}}/#");
        let others = format!("{device_topics}/#");
        for (permission, action, topics) in [
            (Permission::Allow, Action::All, vec![own]),
            (Permission::Deny, Action::All, vec![others]),
            (
                Permission::Allow,
                Action::Publish,
                vec!["up/#".to_owned(), "req/#".to_owned()],
            ),
        ] {
            rules.push(Rule::parse(&RuleConfig {
                permission,
                action,
                topics,
                users: Vec::new(),
            })?);
        }
        Ok(Self {
            rules,
            default: config.default,
        })
    }

    /// Whether `wish` is granted; `own` are the rules of this device alone and come first.
    pub(crate) fn allows(&self, own: &[Rule], wish: Wish<'_>, names: Names<'_>) -> bool {
        let decision = own
            .iter()
            .chain(&self.rules)
            .find_map(|rule| rule.decide(wish, names));
        decision.unwrap_or(self.default) == Permission::Allow
    }
}

/// The rules that an authenticator gave to one device.
pub(crate) fn parse_own(rules: &[RuleConfig]) -> Result<Arc<[Rule]>, String> {
    let topics: usize = rules.iter().map(|rule| rule.topics.len()).sum();
    if rules.len() > RULES_MAX || topics > TOPICS_MAX {
        return Err(format!(
            "more than {RULES_MAX} rules or {TOPICS_MAX} topics"
        ));
    }
    rules.iter().map(Rule::parse).collect()
}

/// One rule.
#[derive(Debug)]
pub(crate) struct Rule {
    permission: Permission,
    action: Action,
    /// Empty for everyone.
    users: Box<[Box<str>]>,
    topics: Box<[Pattern]>,
}

impl Rule {
    pub(crate) fn parse(config: &RuleConfig) -> Result<Self, String> {
        if config.topics.is_empty() {
            return Err("topics must name at least one topic filter".to_owned());
        }
        let topics: Result<_, _> = config
            .topics
            .iter()
            .map(|text| Pattern::parse(text))
            .collect();
        Ok(Self {
            permission: config.permission,
            action: config.action,
            users: config
                .users
                .iter()
                .map(|user| user.as_str().into())
                .collect(),
            topics: topics?,
        })
    }

    fn decide(&self, wish: Wish<'_>, names: Names<'_>) -> Option<Permission> {
        let is_for = matches!(
            (self.action, wish),
            (Action::All, _)
                | (Action::Publish, Wish::Publish(_))
                | (Action::Subscribe, Wish::Subscribe(_))
        );
        let is_for_user = self.users.is_empty()
            || names
                .username
                .is_some_and(|name| self.users.iter().any(|user| **user == *name));
        if !is_for || !is_for_user {
            return None;
        }
        let decides = self.topics.iter().any(|pattern| match wish {
            Wish::Publish(topic) => pattern.relation_to(topic, true, names) == Relation::Covers,
            Wish::Subscribe(filter) => match pattern.relation_to(filter, false, names) {
                Relation::Covers => true,
                Relation::Overlaps => self.permission == Permission::Deny,
                Relation::Apart => false,
            },
        });
        decides.then_some(self.permission)
    }
}

/// How the topics of a pattern lie to those of a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    /// No topic is in both.
    Apart,
    /// Some topic is in both.
    Overlaps,
    /// Every topic of the filter is in the pattern.
    Covers,
}

/// A topic filter with placeholders.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pattern(Box<[Level]>);

#[derive(Debug, PartialEq, Eq)]
enum Level {
    Text(Box<str>),
    /// With placeholders.
    Template(Box<[Part]>),
    /// `+`
    Any,
    /// `#`
    Rest,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    Name(Placeholder),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placeholder {
    ClientId,
    Username,
    Certificate,
}

impl Placeholder {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "client_id" => Some(Self::ClientId),
            "username" => Some(Self::Username),
            "certificate" => Some(Self::Certificate),
            _ => None,
        }
    }

    /// `None` where the value must not stand in a topic: it would be more than one level, a
    /// wildcard, or nothing at all.
    fn value<'n>(self, names: Names<'n>) -> Option<&'n str> {
        let value = match self {
            Self::ClientId => Some(names.client),
            Self::Username => names.username,
            Self::Certificate => names.certificate,
        }?;
        (!value.is_empty() && !value.contains(['/', '+', '#', '\0'])).then_some(value)
    }
}

/// A level of a filter that somebody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted<'f> {
    Text(&'f str),
    Any,
    Rest,
}

/// The levels of a topic name or filter; `#` alone is given as what it is, `+/#`.
fn levels(filter: &str, is_topic: bool) -> impl Iterator<Item = Wanted<'_>> {
    let alone = (filter == "#" && !is_topic).then_some(Wanted::Any);
    alone
        .into_iter()
        .chain(filter.split('/').map(move |level| match level {
            "+" if !is_topic => Wanted::Any,
            "#" if !is_topic => Wanted::Rest,
            text => Wanted::Text(text),
        }))
}

impl Pattern {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        // The placeholders are no wildcards: what is left of the text must be a topic filter.
        moorline_mqtt::TopicFilter::parse(text.into())
            .map_err(|error| format!("{text:?}: {error}"))?;
        if text.starts_with("$share/") {
            return Err(format!(
                "{text:?}: rules name topics; a shared subscription is judged by its filter without $share/{{group}}/"
            ));
        }
        let mut parsed = Vec::new();
        if text == "#" {
            parsed.push(Level::Any);
        }
        for level in text.split('/') {
            parsed.push(match level {
                "+" => Level::Any,
                "#" => Level::Rest,
                level if level.contains(['{', '}']) => {
                    Level::Template(parts(level).map_err(|error| format!("{text:?}: {error}"))?)
                }
                level => Level::Text(level.into()),
            });
        }
        Ok(Self(parsed.into()))
    }

    /// Compares level by level. `is_topic` takes `filter` as the name of one topic.
    fn relation_to(&self, filter: &str, is_topic: bool, names: Names<'_>) -> Relation {
        if !self.is_usable(names) {
            return Relation::Apart;
        }
        let mut own = self.0.iter();
        let mut wanted = levels(filter, is_topic);
        let mut all = true;
        let mut is_first = true;
        loop {
            match (own.next(), wanted.next()) {
                // Also where the filter has ended: "sport/#" matches "sport" (section 4.7.1.2).
                (Some(Level::Rest), _) | (None, None) => break,
                (_, Some(Wanted::Rest)) => {
                    all = false;
                    break;
                }
                (None, Some(_)) | (Some(_), None) => return Relation::Apart,
                // [MQTT-4.7.2-1]: a wildcard in front does not reach topics that begin with '$'.
                (Some(Level::Any), Some(Wanted::Text(text)))
                    if is_first && text.starts_with('$') =>
                {
                    return Relation::Apart;
                }
                (Some(level), Some(Wanted::Any)) if is_first && level.begins_with_dollar() => {
                    return Relation::Apart;
                }
                (Some(Level::Any), Some(_)) => {}
                (Some(_), Some(Wanted::Any)) => all = false,
                (Some(level), Some(Wanted::Text(text))) => {
                    if !level.is(text, names) {
                        return Relation::Apart;
                    }
                }
            }
            is_first = false;
        }
        if all {
            Relation::Covers
        } else {
            Relation::Overlaps
        }
    }

    /// Whether every placeholder has a value that may stand in a topic.
    fn is_usable(&self, names: Names<'_>) -> bool {
        self.0.iter().enumerate().all(|(at, level)| match level {
            Level::Template(parts) => parts.iter().enumerate().all(|(part_at, part)| match part {
                Part::Text(_) => true,
                // Nobody gets at the server's own topics by a name.
                Part::Name(name) => name
                    .value(names)
                    .is_some_and(|value| !(at == 0 && part_at == 0 && value.starts_with('$'))),
            }),
            _ => true,
        })
    }
}

impl Level {
    fn is(&self, text: &str, names: Names<'_>) -> bool {
        match self {
            Self::Text(own) => **own == *text,
            Self::Template(parts) => {
                let rest = parts.iter().try_fold(text, |left, part| match part {
                    Part::Text(own) => left.strip_prefix(&**own),
                    Part::Name(name) => left.strip_prefix(name.value(names)?),
                });
                rest == Some("")
            }
            Self::Any | Self::Rest => true,
        }
    }

    /// A name in front never does, see [`Pattern::is_usable`].
    fn begins_with_dollar(&self) -> bool {
        match self {
            Self::Text(text) => text.starts_with('$'),
            Self::Template(parts) => {
                matches!(parts.first(), Some(Part::Text(text)) if text.starts_with('$'))
            }
            Self::Any | Self::Rest => false,
        }
    }
}

fn parts(level: &str) -> Result<Box<[Part]>, String> {
    let wrong = || {
        "a placeholder must be {client_id}, {username} or {certificate}, and other braces cannot stand in a rule"
            .to_owned()
    };
    let mut parts = Vec::new();
    let mut rest = level;
    while let Some((text, behind)) = rest.split_once('{') {
        let (name, behind) = behind.split_once('}').ok_or_else(wrong)?;
        if !text.is_empty() {
            parts.push(Part::Text(text.into()));
        }
        parts.push(Part::Name(Placeholder::parse(name).ok_or_else(wrong)?));
        rest = behind;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.into()));
    }
    let has_brace = |part: &Part| matches!(part, Part::Text(text) if text.contains('}'));
    if parts.iter().any(has_brace) {
        return Err(wrong());
    }
    Ok(parts.into())
}

#[cfg(test)]
mod tests;
