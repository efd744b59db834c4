//! API keys: who may call what.
//!
//! Keys are kept as SHA-256 of random text; a bearer token is hashed and compared with every key
//! in constant time, so that neither the time nor a memory dump tells a key.

use std::fmt;

use axum::http::{HeaderMap, header};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::problem::{Problem, ProblemKind};

/// What a key allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Push and cancel.
    Push,
    /// Look at messages, clients, inboxes, nodes and dead letters.
    Read,
    /// Disconnect devices, retry dead letters, delete consumers.
    Admin,
    /// Read and acknowledge what devices sent.
    Upstream,
    /// Create, change and cancel delayed jobs, and tell of events.
    Delay,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 5] = [
        Self::Push,
        Self::Read,
        Self::Admin,
        Self::Upstream,
        Self::Delay,
    ];

    /// The name as it stands in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Push => "push",
            Self::Read => "read",
            Self::Admin => "admin",
            Self::Upstream => "upstream",
            Self::Delay => "delay",
        }
    }
}

/// One key. Not `Serialize`, and its `Debug` shows no hash.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKeyRecord {
    name: String,
    hash: [u8; 32],
    scopes: Vec<Scope>,
}

impl ApiKeyRecord {
    /// The name of the key that every deployment has.
    pub const DEFAULT_NAME: &'static str = "default";

    /// A key that allows everything.
    pub fn with_every_scope(name: &str, plain: &str) -> Self {
        Self::from_plain(name, plain, &Scope::ALL)
    }

    /// The key whose secret is `plain`. `name` appears in logs and separates the
    /// Idempotency-Keys of different callers.
    pub fn from_plain(name: &str, plain: &str, scopes: &[Scope]) -> Self {
        Self {
            name: name.to_owned(),
            hash: Sha256::digest(plain.as_bytes()).into(),
            scopes: scopes.to_vec(),
        }
    }

    /// The key whose secret has the SHA-256 `hex`; `None` where that is not 64 hexadecimal digits.
    pub fn from_sha256_hex(name: &str, hex: &str, scopes: &[Scope]) -> Option<Self> {
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        let mut hash = [0; 32];
        for (at, byte) in hash.iter_mut().enumerate() {
            *byte = u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(Self {
            name: name.to_owned(),
            hash,
            scopes: scopes.to_vec(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it allows `scope`.
    pub fn allows(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }
}

impl fmt::Debug for ApiKeyRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKeyRecord")
            .field("name", &self.name)
            .field("scopes", &self.scopes)
            .finish_non_exhaustive()
    }
}

/// Every key of the deployment.
#[derive(Debug, Clone, Default)]
pub struct Keys(Vec<ApiKeyRecord>);

impl Keys {
    /// The keys in force.
    pub fn new(keys: Vec<ApiKeyRecord>) -> Self {
        Self(keys)
    }

    /// The key that a request with `headers` carries, if it allows `scope`.
    pub(crate) fn authorize(
        &self,
        headers: &HeaderMap,
        scope: Scope,
    ) -> Result<&ApiKeyRecord, Problem> {
        let key = self.authenticate(headers)?;
        if !key.allows(scope) {
            let (name, scope) = (key.name(), scope.as_str());
            let detail = format!("the key {name:?} has no scope {scope:?}");
            return Err(Problem::new(ProblemKind::Forbidden, detail));
        }
        Ok(key)
    }

    fn authenticate(&self, headers: &HeaderMap) -> Result<&ApiKeyRecord, Problem> {
        let unauthorized = |detail| Problem::new(ProblemKind::Unauthorized, detail);
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Err(unauthorized("send the header `Authorization: Bearer KEY`"));
        };
        let value = value.as_bytes();
        let token = match value.split_at_checked(7) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token.trim_ascii(),
            _ => {
                return Err(unauthorized(
                    "the Authorization header must be `Bearer KEY`",
                ));
            }
        };
        self.find(token)
            .ok_or_else(|| unauthorized("this API key is not known"))
    }

    /// The key whose secret is `token`. Looks at all of them, whichever it is.
    pub(crate) fn find(&self, token: &[u8]) -> Option<&ApiKeyRecord> {
        let hash: [u8; 32] = Sha256::digest(token).into();
        let mut found = None;
        for key in &self.0 {
            let equal: Choice = key.hash.ct_eq(&hash);
            if bool::from(equal) {
                found = Some(key);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_its_secret_only() {
        let keys = Keys::new(vec![
            ApiKeyRecord::from_plain("a", "secret-a", &[Scope::Push]),
            ApiKeyRecord::from_plain("b", "secret-b", &Scope::ALL),
        ]);
        assert_eq!(keys.find(b"secret-a").map(ApiKeyRecord::name), Some("a"));
        assert_eq!(keys.find(b"secret-b").map(ApiKeyRecord::name), Some("b"));
        assert_eq!(keys.find(b"secret-"), None);
        assert_eq!(keys.find(b""), None);
        assert!(!keys.find(b"secret-a").unwrap().allows(Scope::Admin));
    }

    #[test]
    fn a_key_can_be_given_by_its_hash() {
        // printf abc | sha256sum
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let key = ApiKeyRecord::from_sha256_hex("k", hex, &[Scope::Read]).unwrap();
        assert_eq!(key, ApiKeyRecord::from_plain("k", "abc", &[Scope::Read]));
        assert_eq!(ApiKeyRecord::from_sha256_hex("k", &hex[1..], &[]), None);
        assert_eq!(
            ApiKeyRecord::from_sha256_hex("k", &hex.replace('b', "x"), &[]),
            None
        );
        assert_eq!(
            ApiKeyRecord::from_sha256_hex("k", &"é".repeat(32), &[]),
            None
        );
    }

    #[test]
    fn debug_output_holds_no_hash() {
        let key = ApiKeyRecord::from_plain("k", "abc", &[Scope::Read]);
        assert_eq!(
            format!("{key:?}"),
            "ApiKeyRecord { name: \"k\", scopes: [Read], .. }"
        );
    }
}
