//! The description of the API: OpenAPI 3.1, from the same attributes that make the routes. A copy stands in
//! `docs/openapi.json`.

use std::collections::BTreeMap;

use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, Header, OpenApi, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, Modify};

use crate::problem::{Document as ProblemDocument, FieldError};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Moorline",
        description = "Push to devices on long MQTT connections, see what became of it, read what devices send. Every answer that is not what was asked for is a problem document (RFC 9457).",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    components(schemas(ProblemDocument, FieldError)),
    tags(
        (name = "push", description = "To devices and topics"),
        (name = "messages", description = "What became of a push"),
        (name = "clients", description = "Devices and what waits for them"),
        (name = "bans", description = "Who may not connect"),
        (name = "delays", description = "What is to be done later, unless something happens before"),
        (name = "upstream", description = "What devices sent"),
        (name = "dead letters", description = "What could not be handed to its backend"),
        (name = "operations", description = "Health, metrics, nodes"),
    ),
    modifiers(&Key),
)]
pub(super) struct Document;

struct Key;

impl Modify for Key {
    fn modify(&self, document: &mut OpenApi) {
        let key = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some(
                "An API key; its scopes are push, read, admin, upstream and delay",
            ))
            .build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(key));
    }
}

/// As it is served and committed.
pub(super) fn to_json(document: &OpenApi) -> String {
    let mut json = document
        .to_pretty_json()
        .expect("the document is made of text, numbers and lists");
    json.push('\n');
    json
}

type Responses = BTreeMap<String, RefOr<Response>>;

fn problem(status: &str, description: &str) -> (String, RefOr<Response>) {
    let content = Content::new(Some(RefOr::<utoipa::openapi::Schema>::Ref(
        Ref::from_schema_name("Problem"),
    )));
    let mut response = ResponseBuilder::new()
        .description(description)
        .content("application/problem+json", content);
    if matches!(status, "429" | "503") {
        let mut header = Header::default();
        header.description = Some("Seconds until the same request may succeed".to_owned());
        response = response.header("Retry-After", header);
    }
    (status.to_owned(), RefOr::T(response.build()))
}

macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident: $(($status:literal, $description:literal)),+;)+) => {
        $($(#[$doc])*
        pub(super) enum $name {}
        impl IntoResponses for $name {
            fn responses() -> Responses {
                [$(problem($status, $description)),+].into()
            }
        })+
    };
}

problems! {
    /// Of every call that needs a key.
    CallProblems:
        ("400", "A parameter, a header or a field of the body is wrong; `errors` names each"),
        ("401", "No API key, or one that is not known"),
        ("403", "The API key lacks the scope");
    /// Of every call with a body.
    BodyProblems:
        ("413", "The body or the payload is too large"),
        ("415", "The body is not declared as JSON");
    ConflictProblem:
        ("409", "The Idempotency-Key was used for another request, or the first request with it is still running");
    EndedProblem: ("409", "The message has ended already");
    DelayProblem: ("409", "The job has begun or ended, or there is another one of this id; `state` says how it is");
    FullProblem: ("429", "An inbox or a queue is full and its policy is to reject, or there are too many consumers");
    NotFoundProblem: ("404", "There is no such thing");
    ReceiptProblem: ("404", "No receipt of this message: it was never accepted, or its receipt has expired");
    StoreProblem: ("503", "The store cannot make things durable at this moment; nothing was promised");
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    const COPY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    const REGENERATE: &str = "MOORLINE_WRITE_OPENAPI=1 cargo test -p moorline-push-service openapi";

    fn current() -> String {
        super::to_json(super::super::routes().get_openapi())
    }

    #[test]
    fn the_committed_openapi_document_is_that_of_the_code() {
        let current = current();
        if std::env::var_os("MOORLINE_WRITE_OPENAPI").is_some() {
            std::fs::write(COPY, &current).unwrap();
        }
        let committed = std::fs::read_to_string(COPY).unwrap_or_default();
        assert!(
            committed == current,
            "docs/openapi.json is out of date; write it anew with\n  {REGENERATE}"
        );
    }

    #[test]
    fn every_operation_of_the_openapi_document_says_what_can_go_wrong() {
        let document: Value = serde_json::from_str(&current()).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let mut operations = 0;
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                operations += 1;
                let of = format!("{method} {path}");
                assert!(
                    operation["summary"]
                        .as_str()
                        .is_some_and(|text| !text.is_empty()),
                    "{of}"
                );
                let has = |status: &str| operation["responses"].get(status).is_some();
                let open = !path.starts_with("/v1/");
                assert_eq!(operation["security"][0].get("key").is_none(), open, "{of}");
                for status in ["400", "401", "403"] {
                    assert_eq!(has(status), !open, "{of} {status}");
                }
                assert_eq!(has("415"), operation.get("requestBody").is_some(), "{of}");
                let error = &operation["responses"]["401"]["content"]["application/problem+json"];
                assert_eq!(
                    error["schema"]["$ref"] == "#/components/schemas/Problem",
                    !open,
                    "{of}"
                );
            }
        }
        assert_eq!(operations, 32);
    }
}
