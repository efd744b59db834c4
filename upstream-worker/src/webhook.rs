//! What makes a call to a backend a webhook: a signature as Standard Webhooks says, and the headers of a CloudEvent
//! in binary mode.
//!
//! A backend that knows the secret can tell that a call comes from this gateway, that nobody changed its body, and how old it is.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use moorline_router::unix_ms;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const PREFIX: &str = "whsec_";
/// Bytes of a secret, as Standard Webhooks asks.
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// Secrets that sign at once: an old and a new one while one replaces the other, and some to spare.
const SECRETS_MAX: usize = 4;
/// Bytes that HMAC-SHA256 works on at a time.
const BLOCK: usize = 64;

/// The secrets that calls are signed with: `whsec_` and standard base64 of 24 to 64 random bytes; several, with spaces between,
/// while one replaces another. Empty: calls are not signed. Never shown.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SigningSecret(String);

impl SigningSecret {
    /// The secrets as they stand in a configuration.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Checks what the type cannot; the error says what would be right and shows no secret.
    pub fn validate(&self) -> Result<(), String> {
        self.signer().map(|_| ())
    }

    /// What signs with them; none where there are none.
    pub fn signer(&self) -> Result<Option<Signer>, String> {
        let expected = || {
            format!(
                "must be \"{PREFIX}\" and standard base64 of {} to {} random bytes, like `echo {PREFIX}$(openssl rand -base64 32)` prints",
                SECRET_BYTES.start(),
                SECRET_BYTES.end()
            )
        };
        let keys = self.0.split_whitespace().map(|text| {
            let encoded = text.strip_prefix(PREFIX).ok_or_else(expected)?;
            let key = STANDARD.decode(encoded).map_err(|_| expected())?;
            if !SECRET_BYTES.contains(&key.len()) {
                return Err(expected());
            }
            Ok(padded(&key))
        });
        let keys: Vec<_> = keys.collect::<Result<_, _>>()?;
        if keys.len() > SECRETS_MAX {
            return Err(format!("must be at most {SECRETS_MAX} secrets"));
        }
        Ok((!keys.is_empty()).then_some(Signer { keys }))
    }
}

impl fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "none" } else { "…" })
    }
}

/// Signs calls.
#[derive(Clone)]
pub struct Signer {
    keys: Vec<[u8; BLOCK]>,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

impl Signer {
    /// The value of `webhook-signature`: one `v1,` signature a secret, with spaces between.
    fn signature(&self, id: &str, timestamp_s: u64, body: &[u8]) -> String {
        let timestamp = timestamp_s.to_string();
        let parts = [id.as_bytes(), b".", timestamp.as_bytes(), b".", body];
        let signed = self.keys.iter().map(|key| {
            let code = hmac_sha256(key, &parts);
            format!("v1,{}", STANDARD.encode(code))
        });
        signed.collect::<Vec<_>>().join(" ")
    }
}

/// Names a call to its backend: the same `id` at every attempt, the time of this attempt, and a signature where there is a secret.
/// `id` consists of visible ASCII characters.
pub fn identify(headers: &mut HeaderMap, id: &str, body: &[u8], signer: Option<&Signer>) {
    let timestamp_s = unix_ms() / 1_000;
    set(headers, "webhook-id", id);
    set(headers, "webhook-timestamp", &timestamp_s.to_string());
    if let Some(signer) = signer {
        let signature = signer.signature(id, timestamp_s, body);
        set(headers, "webhook-signature", &signature);
    }
}

/// The context attributes of a CloudEvent 1.0.
#[derive(Debug, Clone)]
pub struct CloudEvent<'a> {
    /// Unique for its source; the same at every attempt.
    pub id: &'a str,
    /// Where it happened.
    pub source: &'a str,
    /// What happened, like `moorline.delay.fired`.
    pub kind: &'a str,
    /// To what.
    pub subject: &'a str,
    /// When, Unix milliseconds.
    pub at_ms: u64,
}

impl CloudEvent<'_> {
    /// Adds the attributes as headers (binary mode of the HTTP binding). `Content-Type` is the caller's to set.
    pub fn write(&self, headers: &mut HeaderMap) {
        set(headers, "ce-specversion", "1.0");
        set(headers, "ce-id", self.id);
        set(headers, "ce-source", self.source);
        set(headers, "ce-type", self.kind);
        set(headers, "ce-subject", self.subject);
        set(headers, "ce-time", &time(self.at_ms));
    }
}

/// What no header can hold is percent-encoded, as both standards ask.
fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    let plain =
        |byte: u8| byte == b' ' || (byte.is_ascii_graphic() && !matches!(byte, b'%' | b'"'));
    let value = crate::rule::percent_encoded(value, plain);
    let value = HeaderValue::try_from(value).expect("visible ASCII characters and spaces");
    headers.insert(HeaderName::from_static(name), value);
}

/// RFC 3339 with milliseconds, in UTC.
pub fn time(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| unix_ms.to_string(), |time| format!("{time:.3}"))
}

fn padded(key: &[u8]) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[..key.len()].copy_from_slice(key);
    block
}

/// RFC 2104, for keys that are not longer than a block.
fn hmac_sha256(key: &[u8; BLOCK], parts: &[&[u8]]) -> [u8; 32] {
    let keyed = |mask: u8| Sha256::new_with_prefix(key.map(|byte| byte ^ mask));
    let mut inner = keyed(0x36);
    for part in parts {
        inner.update(part);
    }
    let mut outer = keyed(0x5c);
    outer.update(inner.finalize());
    outer.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_codes_are_those_of_rfc_4231() {
        let code = hmac_sha256(&padded(&[0x0b; 20]), &[b"Hi", b" There"]);
        assert_eq!(
            hex(&code),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
        );
        let code = hmac_sha256(&padded(b"Jefe"), &[b"what do ya want for nothing?"]);
        assert_eq!(
            hex(&code),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    /// The example of the reference implementations of Standard Webhooks.
    #[test]
    fn a_signature_is_the_one_that_standard_webhooks_expects() {
        let secret = SigningSecret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let signer = secret.signer().unwrap().unwrap();
        let signature = signer.signature(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn while_a_secret_is_replaced_both_sign() {
        let old = SigningSecret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let both = SigningSecret::new(
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        );
        let sign =
            |secret: &SigningSecret| secret.signer().unwrap().unwrap().signature("a", 1, b"");
        let signatures = sign(&both);
        let signatures: Vec<_> = signatures.split(' ').collect();
        assert_eq!(signatures.len(), 2);
        assert_eq!(signatures[0], sign(&old));
        assert_ne!(signatures[0], signatures[1]);
    }

    #[test]
    fn a_secret_is_checked_and_never_shown() {
        assert_eq!(SigningSecret::default().validate(), Ok(()));
        for wrong in ["secret", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64"] {
            let error = SigningSecret::new(wrong).validate().unwrap_err();
            assert!(error.starts_with("must be \"whsec_\""), "{error}");
            assert!(!error.contains("c2hvcnQ="), "{error}");
        }
        let secret = SigningSecret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        assert!(!format!("{secret:?} {:?}", secret.signer()).contains("MfKQ"));
    }

    #[test]
    fn what_no_header_holds_is_encoded() {
        let mut headers = HeaderMap::new();
        let event = CloudEvent {
            id: "e-1",
            source: "/moorline",
            kind: "moorline.delay.fired",
            subject: "réservation 7%",
            at_ms: 1_700_000_000_123,
        };
        event.write(&mut headers);
        assert_eq!(headers["ce-subject"], "r%C3%A9servation 7%25");
        assert_eq!(headers["ce-time"], "2023-11-14T22:13:20.123Z");
        assert_eq!(headers["ce-specversion"], "1.0");
    }
}
