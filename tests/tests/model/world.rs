//! What a gateway owes its clients, in the words of the specification and without any gateway: the
//! state that every packet sent to it changes, and against which every packet from it is held.
//!
//! Nothing here does I/O. What cannot be known (an acknowledgement that a cut connection may have
//! swallowed) is kept as that: [`Due::doubtful`].

use std::collections::BTreeMap;

use moorline_tests::wire::{Publish, V5, Value, property};

/// One message as one client must get it.
#[derive(Debug, Clone)]
pub(crate) struct Due {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) subscription_ids: Vec<u32>,
    /// It belongs to the client id, not to the session.
    pub(crate) push: bool,
    /// It may be missing without a fault.
    pub(crate) doubtful: bool,
    /// Doubtful because its PUBLISH to the server may have been lost.
    unpublished: bool,
    /// Those of one number were published at one moment and come in any order.
    pub(crate) group: Option<u64>,
    /// Its place in the order of the client.
    order: u64,
    /// An earlier connection may have been sent it.
    dup_allowed: bool,
    packet_id: Option<u16>,
    stage: Stage,
}

/// How far a QoS 1 or 2 message has come on its way to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Not sent on this connection; for QoS 2 PUBREC may have been given on an earlier one.
    Waits { received: Received },
    /// PUBLISH has come on this connection.
    Sent { received: Received },
    /// PUBREC was given on this connection, or the server knows of an earlier one: PUBREL is due.
    Recorded,
    /// PUBREL has come on this connection.
    Released,
    /// The last acknowledgement was sent on this connection: of what had been released, or a refusal,
    /// which a killed process may have forgotten.
    Acknowledged { received: Received },
}

/// What the server knows of a PUBREC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Received {
    No,
    /// It was sent, and may have been lost.
    Maybe,
    /// PUBREL has come: PUBLISH must not come again.
    Yes,
}

/// A subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subscription {
    pub(crate) filter: String,
    pub(crate) qos: u8,
    pub(crate) no_local: bool,
    pub(crate) retain_as_published: bool,
    pub(crate) retain_handling: u8,
    pub(crate) id: u32,
}

/// What the server keeps of a client's session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Session {
    pub(crate) persistent: bool,
    pub(crate) subscriptions: Vec<Subscription>,
    /// It has been persistent.
    stored: bool,
}

/// A will.
#[derive(Debug, Clone)]
pub(crate) struct Will {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    /// Longer than any test, or at once.
    pub(crate) delayed: bool,
}

/// One client id.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) name: String,
    pub(crate) version: u8,
    pub(crate) online: bool,
    /// Its connection was cut without a word: the server may send to it for a while.
    pub(crate) cut: bool,
    /// Messages in flight to it at most.
    pub(crate) window: usize,
    pub(crate) session: Option<Session>,
    pub(crate) will: Option<Will>,
    /// Published, or taken away by a DISCONNECT, which a killed process may not have noted.
    discarded_will: Option<Will>,
    /// A stored session ended with the last connection; a process killed at once may not have noted it.
    pub(crate) ended_unnoted: bool,
    /// The delayed will of a connection that has ended.
    pub(crate) delayed_will: Option<Will>,
    /// QoS 1 and 2.
    pub(crate) due: Vec<Due>,
    /// QoS 0.
    pub(crate) live: Vec<Due>,
    /// Acknowledged, and perhaps not durably so: a killed process may send them again.
    ended: Vec<Due>,
}

/// All clients of one gateway and what they share.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) clients: Vec<Client>,
    /// By topic.
    pub(crate) retained: BTreeMap<String, Due>,
    next_order: u64,
}

/// How much is known of a message that is being published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Certainty {
    Certain,
    Doubtful,
}

impl Client {
    pub(crate) fn new(name: String, version: u8) -> Self {
        Self {
            name,
            version,
            online: false,
            cut: false,
            window: 0,
            session: None,
            will: None,
            discarded_will: None,
            ended_unnoted: false,
            delayed_will: None,
            due: Vec::new(),
            live: Vec::new(),
            ended: Vec::new(),
        }
    }

    pub(crate) fn is_persistent(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.persistent)
    }

    fn in_flight(&self) -> usize {
        self.due
            .iter()
            .filter(|due| !matches!(due.stage, Stage::Waits { .. } | Stage::Acknowledged { .. }))
            .count()
    }

    /// What has to arrive before anything else happens, if anything.
    pub(crate) fn awaits(&self) -> Option<String> {
        if !self.online {
            return None;
        }
        if let Some(due) = self.live.iter().find(|due| !due.doubtful) {
            return Some(format!("QoS 0 {}", due.describe()));
        }
        let recorded = |due: &&Due| matches!(due.stage, Stage::Recorded);
        if let Some(due) = self.due.iter().find(recorded) {
            return Some(format!("PUBREL of {}", due.describe()));
        }
        if self.in_flight() >= self.window {
            return None;
        }
        self.due
            .iter()
            .find(|due| !due.doubtful && matches!(due.stage, Stage::Waits { .. }))
            .map(Due::describe)
    }

    /// A PUBLISH has come.
    pub(crate) fn on_publish(&mut self, publish: &Publish) -> Result<(), String> {
        if publish.qos == 0 {
            return self.on_live(publish);
        }
        let id = publish.packet_id;
        let in_use = self.due.iter().find(|due| {
            due.packet_id == Some(id)
                && !matches!(due.stage, Stage::Waits { .. } | Stage::Acknowledged { .. })
        });
        if let Some(other) = in_use {
            return Err(format!("packet id {id} is in use by {}", other.describe()));
        }
        // Session messages and pushes have one order where they wait in one place.
        let is_push = publish.topic.starts_with("d/");
        let one_lane = self.session.as_ref().is_some_and(|session| session.stored);
        let mut passed = Vec::new();
        let mut found = None;
        // The same message may be due twice; one that must come is taken for it rather than one that may.
        let mut doubtful_copy = None;
        // And one that had this packet identifier before rather than any other.
        let is_again = |due: &Due| {
            due.packet_id == Some(id)
                && matches!(due.stage, Stage::Waits { .. })
                && due.is(publish, self.version)
        };
        let had_id = self.due.iter().any(is_again);
        // A member of the group that is being looked through which may not be passed over.
        let mut owed: Option<&Due> = None;
        for (at, due) in self.due.iter().enumerate() {
            if !matches!(due.stage, Stage::Waits { .. }) || !(one_lane || due.push == is_push) {
                continue;
            }
            if owed.is_some_and(|owed| due.group.is_none() || owed.group != due.group) {
                break;
            }
            if due.is(publish, self.version) && (!had_id || due.packet_id == Some(id)) {
                if !due.doubtful || due.packet_id == Some(id) {
                    found = Some(at);
                    break;
                }
                if due.packet_id.is_none() {
                    doubtful_copy = doubtful_copy.or(Some(at));
                }
                continue;
            }
            if due.doubtful || due.may_be_released_instead() {
                passed.push(due.order);
            } else {
                owed = Some(due);
            }
        }
        let Some(at) = found.or(doubtful_copy) else {
            return Err(match owed {
                Some(owed) => format!("{} was to come first", owed.describe()),
                None => "nothing of the kind is due".into(),
            });
        };
        let due = &mut self.due[at];
        if publish.dup && !due.dup_allowed {
            return Err("DUP on the first attempt".into());
        }
        if due.packet_id.is_some_and(|before| before != id) {
            return Err(format!(
                "it had packet id {:?} before [MQTT-4.4.0-1]",
                due.packet_id
            ));
        }
        let Stage::Waits { received } = due.stage else {
            return Err("found as waiting".into());
        };
        if received == Received::Yes {
            return Err("PUBLISH again after PUBREL".into());
        }
        due.packet_id = Some(id);
        due.doubtful = false;
        due.unpublished = false;
        due.stage = Stage::Sent { received };
        // Whatever doubtful was passed over has ended, but for what may still come in the same group.
        let found_order = due.order;
        let group = due.group;
        self.due.retain(|due| {
            !(due.doubtful && due.order < found_order && passed.contains(&due.order))
                || (group.is_some() && due.group == group)
        });
        if self.in_flight() > self.window {
            return Err(format!("more than {} in flight", self.window));
        }
        Ok(())
    }

    fn on_live(&mut self, publish: &Publish) -> Result<(), String> {
        for at in 0..self.live.len() {
            if self.live[at].is(publish, self.version) {
                self.live.drain(..=at);
                return Ok(());
            }
            if !self.live[at].doubtful && self.live[at].group.is_none() {
                return Err(format!("{} was to come first", self.live[at].describe()));
            }
        }
        Err("nothing of the kind is due at QoS 0".into())
    }

    /// A PUBREL has come.
    pub(crate) fn on_pubrel(&mut self, packet_id: u16) -> Result<(), String> {
        let found = self.due.iter_mut().find(|due| {
            due.packet_id == Some(packet_id)
                && due.qos == 2
                && match due.stage {
                    Stage::Waits { received } => received != Received::No,
                    Stage::Recorded => true,
                    _ => false,
                }
        });
        let Some(due) = found else {
            return Err(format!("no PUBREC was given for {packet_id}"));
        };
        due.stage = Stage::Released;
        due.doubtful = false;
        Ok(())
    }

    /// Messages that may be acknowledged now: `(packet id, QoS, whether PUBREL has come)`.
    pub(crate) fn acknowledgeable(&self) -> Vec<(u16, u8, bool)> {
        self.due
            .iter()
            .filter_map(|due| {
                let id = due.packet_id?;
                match due.stage {
                    Stage::Sent { .. } => Some((id, due.qos, false)),
                    Stage::Released => Some((id, 2, true)),
                    _ => None,
                }
            })
            .collect()
    }

    fn sent(&mut self, packet_id: u16) -> &mut Due {
        self.due
            .iter_mut()
            .find(|due| {
                due.packet_id == Some(packet_id)
                    && matches!(due.stage, Stage::Sent { .. } | Stage::Released)
            })
            .expect("only what has come is acknowledged")
    }

    /// PUBREC was sent.
    pub(crate) fn recorded(&mut self, packet_id: u16) {
        self.sent(packet_id).stage = Stage::Recorded;
    }

    /// PUBACK, PUBCOMP or a refusal was sent.
    pub(crate) fn acknowledged(&mut self, packet_id: u16) {
        let due = self.sent(packet_id);
        due.doubtful = true;
        let received = match due.stage {
            Stage::Released => Received::Yes,
            _ => Received::No,
        };
        due.stage = Stage::Acknowledged { received };
    }

    /// The server has read everything that was sent to it.
    pub(crate) fn all_is_read(&mut self) {
        let (ended, due) = std::mem::take(&mut self.due)
            .into_iter()
            .partition(|due| matches!(due.stage, Stage::Acknowledged { .. }));
        self.due = due;
        self.ended.extend::<Vec<Due>>(ended);
    }

    /// The connection is gone, whoever ended it.
    fn connection_ended(&mut self) {
        self.online = false;
        self.live.clear();
        if self.is_persistent() {
            self.due.iter_mut().for_each(Due::connection_ended);
        } else {
            self.end_session();
        }
    }

    /// The session has ended: what is left are pushes, as if they had never been sent.
    fn end_session(&mut self) {
        self.session = None;
        self.due.retain(|due| due.push);
        for due in &mut self.due {
            due.connection_ended();
            due.packet_id = None;
            due.stage = Stage::Waits {
                received: Received::No,
            };
        }
        self.ended.retain(|due| due.push);
        self.live.clear();
    }
}

impl Due {
    pub(crate) fn describe(&self) -> String {
        format!(
            "{} {:?} on {} (QoS {}, retain {}, ids {:?}, packet id {:?}, {:?})",
            if self.push { "push" } else { "message" },
            String::from_utf8_lossy(&self.payload),
            self.topic,
            self.qos,
            self.retain,
            self.subscription_ids,
            self.packet_id,
            self.stage
        )
    }

    fn is(&self, publish: &Publish, version: u8) -> bool {
        let ids = subscription_ids(publish);
        self.topic == publish.topic
            && self.payload == publish.payload
            && self.qos == publish.qos
            && self.retain == publish.retain
            && (version != V5 || self.subscription_ids == ids)
    }

    /// PUBREL may come at any place among the messages.
    fn may_be_released_instead(&self) -> bool {
        matches!(self.stage, Stage::Waits { received } if received != Received::No)
    }

    fn connection_ended(&mut self) {
        self.dup_allowed = true;
        let received = match self.stage {
            Stage::Waits { received } => received,
            Stage::Sent { received } | Stage::Acknowledged { received } => received,
            Stage::Recorded => Received::Maybe,
            Stage::Released => Received::Yes,
        };
        self.stage = Stage::Waits { received };
    }
}

impl Will {
    fn publish(&self) -> Publish {
        Publish {
            topic: self.topic.clone(),
            payload: self.payload.clone(),
            qos: self.qos,
            retain: self.retain,
            ..Publish::default()
        }
    }
}

impl World {
    pub(crate) fn of(clients: Vec<Client>) -> Self {
        Self {
            clients,
            ..Self::default()
        }
    }

    /// Everyone gets what is published as of their subscriptions. Says whether the acknowledgement of it
    /// has to wait for the disk.
    pub(crate) fn publish(
        &mut self,
        from: usize,
        publish: &Publish,
        certainty: Certainty,
        group: Option<u64>,
    ) -> bool {
        let doubtful = certainty == Certainty::Doubtful;
        let mut due = Due {
            topic: publish.topic.clone(),
            payload: publish.payload.clone(),
            qos: publish.qos,
            retain: publish.retain,
            subscription_ids: Vec::new(),
            push: false,
            doubtful,
            unpublished: doubtful,
            group,
            order: 0,
            dup_allowed: false,
            packet_id: None,
            stage: Stage::Waits {
                received: Received::No,
            },
        };
        if let Some(rest) = publish.topic.strip_prefix("d/") {
            let owner = rest.split('/').next().unwrap_or_default();
            due.push = true;
            due.retain = false;
            let found = self.clients.iter().position(|client| client.name == owner);
            if let Some(at) = found {
                self.hand_over(at, due);
            }
            return publish.qos > 0 && found.is_some();
        }
        let mut stored = publish.qos > 0 && publish.retain;
        if publish.retain && !doubtful {
            if publish.payload.is_empty() {
                self.retained.remove(&publish.topic);
            } else {
                let mut kept = due.clone();
                kept.group = None;
                self.retained.insert(publish.topic.clone(), kept);
            }
        }
        for at in 0..self.clients.len() {
            let Some(session) = &self.clients[at].session else {
                continue;
            };
            let matching: Vec<&Subscription> = session
                .subscriptions
                .iter()
                .filter(|held| matches(&held.filter, &publish.topic))
                .filter(|held| !(held.no_local && at == from))
                .collect();
            let Some(qos) = matching.iter().map(|held| held.qos).max() else {
                continue;
            };
            let mut copy = due.clone();
            copy.qos = qos.min(publish.qos);
            copy.retain = publish.retain && matching.iter().any(|held| held.retain_as_published);
            copy.subscription_ids = matching
                .iter()
                .map(|held| held.id)
                .filter(|id| *id > 0)
                .collect();
            copy.subscription_ids.sort_unstable();
            stored |= copy.qos > 0 && self.clients[at].is_persistent();
            self.hand_over(at, copy);
        }
        stored
    }

    /// A message for one client: kept where there is somebody to keep it for.
    fn hand_over(&mut self, at: usize, mut due: Due) {
        self.next_order += 1;
        due.order = self.next_order;
        let client = &mut self.clients[at];
        due.dup_allowed = client.cut;
        if due.qos == 0 {
            if client.online {
                client.live.push(due);
            }
        } else if client.online || due.push || client.is_persistent() {
            client.due.push(due);
        }
    }

    /// A doubtful publish was repeated and acknowledged: everyone it was for is owed it now, and a second copy
    /// may come where the QoS or the guarantees allow (`may_double`).
    pub(crate) fn repeat(&mut self, from: usize, publish: &Publish, may_double: bool) {
        for client in &mut self.clients {
            for due in client.due.iter_mut().chain(&mut client.live) {
                if due.payload == publish.payload && due.unpublished {
                    due.doubtful = false;
                    due.unpublished = false;
                }
            }
        }
        let before = self.next_order;
        self.publish(from, publish, Certainty::Doubtful, None);
        for (at, client) in self.clients.iter_mut().enumerate() {
            client.due.retain(|due| due.order <= before || may_double);
            // What the publisher itself gets at QoS 0 went to the old connection or goes to the new one.
            client
                .live
                .retain(|due| due.order <= before || may_double || at == from);
            for due in client.due.iter_mut().chain(&mut client.live) {
                due.unpublished = false;
            }
        }
    }

    /// Whether there is room for the retained messages of all these at once. Where there is not, they come later,
    /// as they are then: which ones is not followed here.
    pub(crate) fn has_room_for_retained(&self, at: usize, wanted: &[Subscription]) -> bool {
        let client = &self.clients[at];
        let matching = |one: &Subscription| {
            let topics = self.retained.keys();
            topics.filter(|topic| matches(&one.filter, topic)).count()
        };
        let found: usize = wanted.iter().map(matching).sum();
        let waits = |due: &Due| matches!(due.stage, Stage::Waits { .. });
        found == 0 || (client.due.len() + found <= client.window && !client.due.iter().any(waits))
    }

    /// A subscription was made; its retained messages follow.
    pub(crate) fn subscribe(&mut self, at: usize, wanted: Subscription) {
        let Some(session) = &mut self.clients[at].session else {
            return;
        };
        let held = session
            .subscriptions
            .iter_mut()
            .find(|held| held.filter == wanted.filter);
        let is_new = held.is_none();
        match held {
            Some(held) => *held = wanted.clone(),
            None => session.subscriptions.push(wanted.clone()),
        }
        let sends = match wanted.retain_handling {
            0 => true,
            1 => is_new,
            _ => false,
        };
        if !sends {
            return;
        }
        let found: Vec<Due> = self
            .retained
            .values()
            .filter(|kept| matches(&wanted.filter, &kept.topic))
            .cloned()
            .collect();
        for mut due in found {
            due.qos = due.qos.min(wanted.qos);
            due.retain = true;
            due.subscription_ids = if wanted.id > 0 {
                vec![wanted.id]
            } else {
                Vec::new()
            };
            self.hand_over(at, due);
        }
    }

    /// Says whether there was such a subscription.
    pub(crate) fn unsubscribe(&mut self, at: usize, filter: &str) -> bool {
        let Some(session) = &mut self.clients[at].session else {
            return false;
        };
        let before = session.subscriptions.len();
        session.subscriptions.retain(|held| held.filter != filter);
        session.subscriptions.len() < before
    }

    /// A client is being let in; says whether it has a session. Whoever was connected is not any more.
    pub(crate) fn connect(
        &mut self,
        at: usize,
        clean_start: bool,
        persistent: bool,
        window: usize,
        will: Option<Will>,
    ) -> bool {
        let resumes = self.clients[at].is_persistent() && !clean_start;
        if self.clients[at].online {
            let old = self.clients[at].will.take();
            self.clients[at].online = false;
            self.clients[at].live.clear();
            if let Some(old) = old
                && !(old.delayed && resumes)
            {
                self.publish_will(at, &old, None);
            }
            self.clients[at].connection_ended();
        }
        let delayed = self.clients[at].delayed_will.take();
        if !resumes {
            self.clients[at].end_session();
            if let Some(delayed) = delayed {
                self.publish_will(at, &delayed, None);
            }
        }
        let client = &mut self.clients[at];
        client.online = true;
        client.cut = false;
        client.window = window;
        client.will = will;
        client.ended_unnoted = false;
        let session = client.session.get_or_insert_default();
        session.persistent = persistent;
        session.stored |= persistent;
        resumes
    }

    /// A connection has ended; `with_will` unless a DISCONNECT took it away.
    pub(crate) fn disconnect(&mut self, at: usize, with_will: bool) {
        let client = &mut self.clients[at];
        let will = client.will.take();
        if !with_will {
            client.discarded_will = will.clone();
        }
        let will = will.filter(|_| with_will);
        let goes_on = client.is_persistent();
        client.ended_unnoted = !goes_on && client.session.as_ref().is_some_and(|held| held.stored);
        client.connection_ended();
        match will {
            Some(will) if will.delayed && goes_on => self.clients[at].delayed_will = Some(will),
            Some(will) => self.publish_will(at, &will, None),
            None => {}
        }
    }

    fn publish_will(&mut self, at: usize, will: &Will, group: Option<u64>) {
        // That it was published may not be noted when the process is killed.
        self.clients[at].discarded_will = Some(will.clone());
        self.publish(at, &will.publish(), Certainty::Certain, group);
    }

    /// Something became durable behind everything that had been read.
    pub(crate) fn all_is_durable(&mut self) {
        for client in &mut self.clients {
            client.ended.clear();
            client.discarded_will = None;
        }
    }

    /// The process was killed and is back.
    pub(crate) fn killed(&mut self) {
        for client in &mut self.clients {
            client.all_is_read();
            let again: Vec<Due> = std::mem::take(&mut client.ended);
            client.due.extend(again);
            client.due.sort_by_key(|due| due.order);
        }
        self.stopped();
        let group = self.next_order + 1;
        for at in 0..self.clients.len() {
            let goes_on = self.clients[at].session.is_some();
            let discarded = self.clients[at].discarded_will.take();
            match self.clients[at].will.take() {
                Some(will) if will.delayed && goes_on => {
                    self.clients[at].delayed_will = Some(will);
                }
                Some(will) => self.publish_will(at, &will, Some(group)),
                None => {}
            }
            if let Some(will) = discarded {
                let doubtful = Certainty::Doubtful;
                self.publish(at, &will.publish(), doubtful, Some(group));
            }
        }
    }

    /// Every connection has ended with the process; wills are kept.
    pub(crate) fn stopped(&mut self) {
        for client in &mut self.clients {
            client.connection_ended();
        }
    }
}

/// In ascending order.
fn subscription_ids(publish: &Publish) -> Vec<u32> {
    let properties = publish.properties.iter();
    let mut ids: Vec<u32> = properties
        .filter_map(|(id, value)| match value {
            Value::Var(number) if *id == property::SUBSCRIPTION_ID => Some(*number),
            _ => None,
        })
        .collect();
    ids.sort_unstable();
    ids
}

/// Whether a filter matches a topic, by section 4.7; level by level.
fn matches(filter: &str, topic: &str) -> bool {
    fn levels(filter: &[&str], topic: &[&str]) -> bool {
        match (filter, topic) {
            (["#"], _) | ([], []) => true,
            (["+", filter @ ..], [_, topic @ ..]) => levels(filter, topic),
            ([wanted, filter @ ..], [found, topic @ ..]) => {
                wanted == found && levels(filter, topic)
            }
            _ => false,
        }
    }
    let filter: Vec<_> = filter.split('/').collect();
    let topic: Vec<_> = topic.split('/').collect();
    levels(&filter, &topic)
}
