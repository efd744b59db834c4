//! What is tested on the embedded store only, and why. Everything else runs a second time against a cluster
//! (`MOORLINE_TEST_FIXTURE=cluster`).

/// Tests, or the beginnings of their names, with the reason.
const LIST: &[(&str, &str)] = &[
    ("disk_full::", "fills the disk under the embedded store"),
    (
        "startup::",
        "the command line and the data directory of the one process",
    ),
    ("delays_amqp::", "a RabbitMQ of its own beside one machine"),
    (
        "migrate::",
        "begins on one machine and ends on a cluster of its own",
    ),
    ("upstream::a_long_poll", QUEUE),
    ("upstream::consumers_have_a_cursor", QUEUE),
    ("upstream::messages_are_read_in_order", QUEUE),
    ("upstream::server_sent_events", QUEUE),
    ("upstream::the_cursor_of_a_page", QUEUE),
    (
        "upstream::what_follows_a_refused_publish",
        "fills the spool of the one process; `rabbit_publisher` has the same of a full queue",
    ),
    (
        "operations::sigterm_answers_long_polls",
        "long polls are those of `GET /v1/upstream`",
    ),
    (
        "model::",
        "takes PINGRESP for the end of a step, and wills to come with the restart instead of the end of a lease",
    ),
    (
        "negotiated::retained_messages_go_on_where_they_stopped",
        "how far retained messages have got is in the memory of the node, and a session leaves that with its connection",
    ),
    (
        "limits::the_number_of_sessions_is_bounded",
        "a node of several holds no session of a device that is away; `maxmemory` of Redis bounds those",
    ),
    ("servers::", "the servers themselves; no gateway takes part"),
    ("late_stores::", "a cluster of its own in any case"),
    ("cluster::", "a cluster of its own in any case"),
    ("shared::a_full_inbox_sends", GROUP_QUEUE),
    ("shared::an_absent_member_gets_nothing", GROUP_QUEUE),
    (
        "shared::what_waited_for_a_persistent_session_goes",
        GROUP_QUEUE,
    ),
    ("shared::members_take_turns", TURNS),
    (
        "shared_faults::persistent_members_get_every_acknowledged_qos_1",
        "a node that is killed between inbox and broker has a message go to a second member, under its id (docs/guarantees.md)",
    ),
    (
        "shared_faults::a_qos_2_message_is_shown_to_one_member_only",
        "the same of QoS 2 messages",
    ),
    (
        "shared_faults::persistent_members_complete_every_acknowledged_qos_2",
        "the same of QoS 2 messages",
    ),
    ("shared::groups_and_ordinary_subscriptions", TURNS),
    ("shared::mosquitto_subscribers_share", TURNS),
    ("shared::a_member_without_room_is_left_out", TURNS),
    (
        "shared::a_message_that_no_member_takes",
        "counts the offers of the one node",
    ),
];

/// Consumers read it by AMQP, as `docs/amqp.md` shows.
const QUEUE: &str = "what no rule takes waits in a queue of RabbitMQ, and is not read over HTTP";
/// What is true there instead is shown by `cluster::subscribers`.
const GROUP_QUEUE: &str =
    "what no connected member takes waits in the queue of the group, not in somebody's inbox";
const TURNS: &str =
    "members of one node take turns; between nodes the broker divides, by what each takes";

/// Why the test with this path is not run against a cluster.
pub(crate) fn reason(test: &str) -> Option<&'static str> {
    let name = test.split_once("::").map_or(test, |(_, name)| name);
    LIST.iter()
        .find(|(prefix, _)| name.starts_with(prefix))
        .map(|(_, reason)| *reason)
}
