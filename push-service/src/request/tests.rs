use moorline_mqtt::QoS;
use serde_json::Value;
use utoipa::PartialSchema as _;

use super::*;

fn read_as(config: &Config, json: &str) -> Result<Push, Problem> {
    Push::from_json(json.as_bytes(), config, "d")
}

fn read_push(json: &str) -> Push {
    read_as(&Config::default(), json).unwrap_or_else(|problem| panic!("{json}: {problem:?}"))
}

fn errors(json: &str) -> Vec<(String, String)> {
    let problem = read_as(&Config::default(), json).expect_err(json);
    let of = |error: &FieldError| (error.field.to_string(), error.detail.clone());
    problem.errors().iter().map(of).collect()
}

/// The one error of `json`.
fn error(json: &str) -> (String, String) {
    let mut errors = errors(json);
    assert_eq!(errors.len(), 1, "{json}: {errors:?}");
    errors.remove(0)
}

#[test]
fn the_least_push_has_defaults() {
    let push = read_push(r#"{"to": {"client": "car-7"}, "payload": "hello"}"#);
    assert_eq!(
        push.target,
        Target::Client(ClientId::parse("car-7").unwrap())
    );
    assert_eq!(push.topic.as_str(), "d/car-7/push");
    assert_eq!(push.payload, "hello");
    assert_eq!(push.qos, QoS::AtLeastOnce);
    assert_eq!(push.ttl, Some(Duration::from_secs(7 * 24 * 3600)));
    assert_eq!((push.content_type, push.retain), (None, false));
    assert!(push.properties.is_empty());
}

#[test]
fn every_field_is_read() {
    let push = read_push(
        r#"{"to": {"client": "a/b"}, "topic": "x/y", "payload_base64": "/wA=", "qos": 2, "ttl": "24h",
            "content_type": "image/png", "properties": {"k": "v", "a": "é"}}"#,
    );
    assert_eq!(push.topic.as_str(), "x/y");
    assert_eq!(&push.payload[..], [0xff, 0]);
    assert_eq!(push.qos, QoS::ExactlyOnce);
    assert_eq!(push.ttl, Some(Duration::from_secs(24 * 3600)));
    assert_eq!(push.content_type.as_deref(), Some("image/png"));
    let properties: Vec<_> = push.properties.iter().map(|(k, v)| (&**k, &**v)).collect();
    assert_eq!(properties, [("k", "v"), ("a", "é")]);
}

#[test]
fn json_goes_out_compact_and_otherwise_untouched() {
    let payload = |json: &str| {
        let push = read_push(&format!(
            r#"{{"to": {{"client": "c"}}, "payload": {json}}}"#
        ));
        (
            String::from_utf8(push.payload.to_vec()).unwrap(),
            push.content_type.map(|t| t.to_string()),
        )
    };
    let json = Some("application/json".to_owned());
    assert_eq!(
        payload("{\n \"b\" : [1.50, 1e3 ],\t\"a\": \"x \\\" y\\\\\" }"),
        (r#"{"b":[1.50,1e3],"a":"x \" y\\"}"#.into(), json.clone())
    );
    assert_eq!(
        payload("12345678901234567890123"),
        ("12345678901234567890123".into(), json.clone())
    );
    assert_eq!(payload("true"), ("true".into(), json));
    assert_eq!(payload(r#""a\nb \u00e9""#), ("a\nb é".into(), None));
    assert_eq!(payload(r#""""#), (String::new(), None));
}

#[test]
fn a_topic_of_one_device_is_a_push_to_that_device() {
    let push = read_push(r#"{"to": {"topic": "d/car-7/orders"}, "payload": ""}"#);
    assert_eq!(
        push.target,
        Target::Client(ClientId::parse("car-7").unwrap())
    );
    assert_eq!(push.topic.as_str(), "d/car-7/orders");
    assert!(push.ttl.is_some());
    for topic in ["d", "d/", "d//x", "news/d/car-7", "dd/car-7"] {
        let push = read_push(&format!(
            r#"{{"to": {{"topic": "{topic}"}}, "payload": "", "retain": true}}"#
        ));
        assert_eq!(push.target, Target::Topic(push.topic.clone()), "{topic}");
        assert_eq!((push.ttl, push.retain), (None, true));
    }
}

#[test]
fn a_wrong_field_is_named_with_what_would_be_right() {
    let to = r#""to": {"client": "c"}"#;
    let with = |rest: &str| format!(r#"{{{to}, "payload": "", {rest}}}"#);
    let cases = [
        (r#"{"payload": ""}"#.to_owned(), "to", "is required"),
        (
            r#"{"to": "car-7", "payload": ""}"#.into(),
            "to",
            "must be an object like {\"client\": \"car-7\"}, is text",
        ),
        (
            r#"{"to": {}, "payload": ""}"#.into(),
            "to",
            "must name a client or a topic",
        ),
        (
            r#"{"to": {"client": "a", "topic": "b"}, "payload": ""}"#.into(),
            "to",
            "not both",
        ),
        (
            r#"{"to": {"client": ""}, "payload": ""}"#.into(),
            "to.client",
            "must not be empty",
        ),
        (
            r#"{"to": {"client": 7}, "payload": ""}"#.into(),
            "to.client",
            "must be text, is a number",
        ),
        (
            r#"{"to": {"client": "a\u0000"}, "payload": ""}"#.into(),
            "to.client",
            "must not contain U+0000",
        ),
        (
            r#"{"to": {"client": "a", "client": "b"}, "payload": ""}"#.into(),
            "to.client",
            "is given twice",
        ),
        (
            r#"{"to": {"topic": "a/+"}, "payload": ""}"#.into(),
            "to.topic",
            "wildcard",
        ),
        (
            r#"{"to": {"topic": ""}, "payload": ""}"#.into(),
            "to.topic",
            "empty",
        ),
        (
            r#"{"to": {"topic": "$SYS/x"}, "payload": ""}"#.into(),
            "to.topic",
            "must not begin with $",
        ),
        (
            r#"{"to": {"clients": ["a"]}, "payload": ""}"#.into(),
            "to.clients",
            "is not supported yet",
        ),
        (
            r#"{"to": {"group": "a"}, "payload": ""}"#.into(),
            "to.group",
            "is not supported yet",
        ),
        (
            r#"{"to": {"device": "a"}, "payload": ""}"#.into(),
            "to.device",
            "is not a known field",
        ),
        (
            r#"{"to": {"client": "a+b"}, "payload": ""}"#.into(),
            "topic",
            "is required here",
        ),
        (
            format!("{{{to}}}"),
            "payload",
            "is required (or payload_base64)",
        ),
        (
            format!(r#"{{{to}, "payload": null}}"#),
            "payload",
            "must not be null",
        ),
        (
            format!(r#"{{{to}, "payload": "\ud800"}}"#),
            "payload",
            "without lone surrogates",
        ),
        (
            with(r#""payload_base64": """#),
            "payload_base64",
            "must not be given together with payload",
        ),
        (
            format!(r#"{{{to}, "payload_base64": "a b"}}"#),
            "payload_base64",
            "must be standard base64",
        ),
        (
            format!(r#"{{{to}, "payload_base64": 1}}"#),
            "payload_base64",
            "must be text, is a number",
        ),
        (with(r#""qos": 3"#), "qos", "must be 0, 1 or 2, is 3"),
        (with(r#""qos": "1""#), "qos", "must be 0, 1 or 2, is \"1\""),
        (with(r#""ttl": 0"#), "ttl", "must be greater than 0"),
        (with(r#""ttl": -5"#), "ttl", "must be greater than 0"),
        (with(r#""ttl": "0s""#), "ttl", "must be greater than 0"),
        (with(r#""ttl": 1.5"#), "ttl", "whole seconds, is 1.5"),
        (
            with(r#""ttl": "soon""#),
            "ttl",
            "must be a duration like \"15m\"",
        ),
        (
            with(r#""ttl": "31d""#),
            "ttl",
            "must be at most 30d, is \"31d\"",
        ),
        (with(r#""ttl": null"#), "ttl", "is null"),
        (with(r#""topic": "a/#""#), "topic", "wildcard"),
        (with(r#""topic": 1"#), "topic", "must be text"),
        (
            with(r#""content_type": """#),
            "content_type",
            "must be printable ASCII",
        ),
        (
            with(r#""content_type": "é""#),
            "content_type",
            "must be printable ASCII",
        ),
        (
            with(r#""properties": []"#),
            "properties",
            "must be an object of texts, is an array",
        ),
        (
            with(r#""properties": {"a": 1}"#),
            "properties.a",
            "must be text, is a number",
        ),
        (
            with(r#""properties": {"message-id": "x"}"#),
            "properties.message-id",
            "is set by the gateway",
        ),
        (
            with(r#""retain": "yes""#),
            "retain",
            "must be true or false, is \"yes\"",
        ),
        (
            with(r#""retain": true"#),
            "retain",
            "goes with to.topic only",
        ),
        (
            with(r#""collapse_key": "x""#),
            "collapse_key",
            "is not supported yet",
        ),
        (
            with(r#""deliver_at": "x""#),
            "deliver_at",
            "goes with POST /v1/push only",
        ),
        (with(r#""pyload": """#), "pyload", "is not a known field"),
        (with(r#""payload": """#), "payload", "is given twice"),
        (
            r#"{"to": {"topic": "a"}, "topic": "b", "payload": ""}"#.into(),
            "topic",
            "goes with to.client only",
        ),
    ];
    for (json, field, detail) in cases {
        let (named, text) = error(&json);
        assert_eq!(named, field, "{json}: {text}");
        assert!(text.contains(detail), "{json}: {text}");
    }
}

#[test]
fn all_wrong_fields_are_named_at_once() {
    let json =
        r#"{"to": {"client": ""}, "qos": 9, "ttl": 0, "priority": 1, "nonsense": {"a": [1]}}"#;
    let mut fields: Vec<_> = errors(json).into_iter().map(|(field, _)| field).collect();
    fields.sort();
    assert_eq!(
        fields,
        ["nonsense", "payload", "priority", "qos", "to.client", "ttl"]
    );
}

#[test]
fn what_is_no_json_is_said_with_line_and_column() {
    for (body, expected) in [
        ("", "the body is empty"),
        ("{\"to\":\n  oops}", "line 2 column 3"),
        ("{\"to\": {\"client\": \"a\"}", "EOF"),
        ("{} {}", "trailing characters at line 1 column 4"),
    ] {
        let problem = read_as(&Config::default(), body).unwrap_err();
        assert_eq!(problem.kind(), ProblemKind::MalformedJson, "{body}");
        assert!(
            problem.detail().contains(expected),
            "{body}: {}",
            problem.detail()
        );
    }
    let problem = read_as(&Config::default(), "[1]").unwrap_err();
    assert_eq!(problem.kind(), ProblemKind::InvalidRequest);
    assert!(
        problem.detail().contains("expected an object like"),
        "{}",
        problem.detail()
    );
}

#[test]
fn json_that_is_deep_or_not_utf8_does_no_harm() {
    let deep = format!(
        r#"{{"to": {{"client": "c"}}, "payload": {}{}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert_eq!(read_push(&deep).payload.len(), 200_000);
    let problem = Push::from_json(
        b"{\"to\": {\"client\": \"\xff\"}, \"payload\": \"\"}",
        &Config::default(),
        "d",
    );
    assert!(problem.is_err());
}

#[test]
fn the_limit_of_a_payload_holds_for_the_bytes_that_the_device_gets() {
    let config = Config {
        payload_bytes_max: 4,
        ..Config::default()
    };
    let with = |rest: &str| read_as(&config, &format!(r#"{{"to": {{"client": "c"}}, {rest}}}"#));
    assert!(with(r#""payload": "1234""#).is_ok());
    assert!(with(r#""payload": "\u0031\u0032""#).is_ok());
    assert!(with(r#""payload_base64": "MTIzNA==""#).is_ok());
    let problem = with(r#""payload_base64": "MTIzNDU=""#).unwrap_err();
    assert_eq!(problem.kind(), ProblemKind::PayloadTooLarge);
    assert_eq!(problem.errors()[0].field, "payload_base64");
    assert_eq!(
        problem.errors()[0].detail,
        "is 5 bytes long, must be at most 4 bytes"
    );
}

#[test]
fn properties_are_bounded() {
    let many: Vec<_> = (0..65).map(|n| format!("\"k{n}\": \"\"")).collect();
    let push = |properties: &str| {
        format!(r#"{{"to": {{"client": "c"}}, "payload": "", "properties": {{{properties}}}}}"#)
    };
    assert_eq!(
        error(&push(&many.join(", "))).1,
        "must be at most 64, are 65"
    );
    let long = format!("\"k\": \"{}\"", "x".repeat(16 * 1024));
    assert!(
        error(&push(&long))
            .1
            .contains("must be at most 16384 bytes long together")
    );
}

#[test]
fn the_document_names_the_fields_that_are_read_and_no_others() {
    let properties = |schema: utoipa::openapi::RefOr<utoipa::openapi::Schema>| {
        let schema: Value = serde_json::to_value(schema).unwrap();
        let names: Vec<String> = schema["properties"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        names
    };
    for name in properties(PushRequest::schema()) {
        assert!(PushRequest::default().slot(&name).is_some(), "{name}");
    }
    for name in properties(TargetRequest::schema()) {
        assert!(TargetRequest::default().slot(&name).is_some(), "{name}");
    }
    assert_eq!(properties(PushRequest::schema()).len(), 11);
    assert_eq!(properties(TargetRequest::schema()).len(), 2);
}
