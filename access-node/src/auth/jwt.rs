//! JSON Web Tokens (RFC 7519), by default in place of the password.
//!
//! A token says which key it was signed with; it does not say how that key is used. `exp` must be
//! there, and the connection ends with it.

use std::sync::Arc;

use jsonwebtoken::{Header, Validation, decode_header};
use moorline_router::unix_ms;
use serde_json::{Map, Value};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::config::{JwtConfig, JwtField, RuleConfig};
use super::jwks::JwksUrl;
use super::keys::{self, Key};
use super::watched::Watched;
use super::{Accepted, Credentials, Refusal, Verdict, acl};

/// Bytes of the longest token.
const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// Keys tried for a token that names none.
const TRIES_MAX: usize = 8;
/// Signatures verified at the same time.
const VERIFYING_MAX: usize = 4;

type Claims = Map<String, Value>;

/// The authenticator.
pub(super) struct Jwt {
    config: JwtConfig,
    files: Vec<Watched<Vec<Key>>>,
    url: Option<Arc<JwksUrl>>,
    verifying: Arc<Semaphore>,
    blocking: Handle,
}

impl Jwt {
    pub(super) fn open(config: &JwtConfig, blocking: Handle) -> Result<Self, String> {
        let mut files = Vec::new();
        for (at, key) in config.keys.iter().enumerate() {
            let of_file = {
                let key = key.clone();
                move |bytes: &[u8]| keys::of_file(&key, bytes)
            };
            let file = Watched::open(&key.file, blocking.clone(), of_file);
            files.push(file.map_err(|error| format!("auth.jwt.keys[{at}]: {error}"))?);
        }
        if !config.jwks_file.as_os_str().is_empty() {
            let of_set = |bytes: &[u8]| keys::of_set(bytes, false);
            let file = Watched::open(&config.jwks_file, blocking.clone(), of_set);
            files.push(file.map_err(|error| format!("auth.jwt.jwks_file: {error}"))?);
        }
        let url = match config.jwks_url.as_str() {
            "" => None,
            _ => Some(Arc::new(JwksUrl::new(config)?)),
        };
        Ok(Self {
            config: config.clone(),
            files,
            url,
            verifying: Arc::new(Semaphore::new(VERIFYING_MAX)),
            blocking,
        })
    }

    pub(super) fn refreshing(&self) -> Option<impl Future<Output = ()> + Send + use<>> {
        self.url.clone().map(JwksUrl::run)
    }

    pub(super) async fn judge(&self, asked: &Credentials<'_>) -> Verdict {
        let field = match self.config.from {
            JwtField::Password => asked.password,
            JwtField::Username => asked.username.map(str::as_bytes),
        };
        let Some(token) = field.filter(|bytes| looks_like_token(bytes)) else {
            return Verdict::Unknown;
        };
        match self.verify(token).await {
            Ok(claims) => match self.accept(&claims, asked.client_id) {
                Ok(accepted) => Verdict::Accepted(accepted),
                Err(refusal) => Verdict::Refused(refusal),
            },
            Err(refusal) => Verdict::Refused(refusal),
        }
    }

    async fn verify(&self, token: &[u8]) -> Result<Claims, Refusal> {
        // Also for an algorithm that is none of RFC 7518's signatures, such as "none".
        let header = decode_header(token).map_err(|_| Refusal::BadCredentials)?;
        if header.crit.is_some() {
            // Extensions that must be understood, and none is (RFC 7515 section 4.1.11).
            return Err(Refusal::BadCredentials);
        }
        let mut sets = self.sets().await;
        let fits = |sets: &[Arc<Vec<Key>>]| {
            let mut keys = sets.iter().flat_map(|set| set.iter());
            keys.any(|key| key.fits(header.alg, header.kid.as_deref()))
        };
        if !fits(&sets)
            && let (Some(url), Some(_)) = (&self.url, &header.kid)
        {
            url.look_again().await;
            sets = self.sets().await;
        }
        if !fits(&sets) {
            let has_none = self.url.as_ref().is_some_and(|url| url.keys().is_none());
            // Without the set nobody can say whether the key is in it.
            return Err(match has_none {
                true => Refusal::Unavailable,
                false => Refusal::BadCredentials,
            });
        }
        let verifying = Arc::clone(&self.verifying).acquire_owned().await;
        let (token, validations) = (token.to_vec(), self.validation(&header));
        let verified = self.blocking.spawn_blocking(move || {
            let _verifying = verifying;
            verify_with(&token, &header, &validations, &sets)
        });
        let claims = verified.await.map_err(|_| Refusal::Unavailable)?;
        claims.ok_or(Refusal::BadCredentials)
    }

    async fn sets(&self) -> Vec<Arc<Vec<Key>>> {
        let mut sets = Vec::new();
        for file in &self.files {
            sets.push(file.get().await.0);
        }
        sets.extend(self.url.as_ref().and_then(|url| url.keys()));
        sets
    }

    /// What must be true of the claims. The algorithm is that of the header, and only keys of that
    /// algorithm are tried.
    fn validation(&self, header: &Header) -> Validation {
        let mut validation = Validation::new(header.alg);
        let mut required = vec!["exp"];
        validation.leeway = self.config.leeway.as_secs();
        validation.validate_nbf = true;
        validation.validate_aud = !self.config.audience.is_empty();
        if validation.validate_aud {
            validation.set_audience(&[&self.config.audience]);
            required.push("aud");
        }
        if !self.config.issuer.is_empty() {
            validation.set_issuer(&[&self.config.issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        validation
    }

    fn accept(&self, claims: &Claims, client_id: &str) -> Result<Accepted, Refusal> {
        let config = &self.config;
        let client = text_claim(claims, &config.client_id_claim)?;
        if client.is_none() && config.client_id_required {
            tracing::info!(
                client = client_id,
                claim = config.client_id_claim,
                "token without the claim that names its client id"
            );
            return Err(Refusal::NotAuthorized);
        }
        let own_rules = match claims.get(&config.acl_claim) {
            None => Arc::default(),
            Some(value) => rules_of(value).map_err(|error| {
                tracing::info!(client = client_id, claim = config.acl_claim, %error, "token with rules that cannot be read");
                Refusal::NotAuthorized
            })?,
        };
        let expires_s = claims.get("exp").and_then(Value::as_f64);
        let expires_s = expires_s.ok_or(Refusal::BadCredentials)? + config.leeway.as_secs_f64();
        // A float casts to the nearest integer that there is.
        let expires_at_ms = (expires_s * 1000.0) as u64;
        if expires_at_ms <= unix_ms() {
            // "On or after" it is too late (RFC 7519 section 4.1.4).
            return Err(Refusal::BadCredentials);
        }
        Ok(Accepted {
            username: text_claim(claims, &config.username_claim)?.map(Into::into),
            client_id: client.map(Into::into),
            own_rules,
            expires_at_ms: Some(expires_at_ms),
        })
    }
}

/// Whether it is meant as a token: three parts of base64url, the first a JSON object.
fn looks_like_token(bytes: &[u8]) -> bool {
    let is_base64url = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    bytes.starts_with(b"eyJ")
        && bytes.len() <= TOKEN_BYTES_MAX
        && bytes.iter().filter(|byte| **byte == b'.').count() == 2
        && bytes.iter().all(is_base64url)
}

fn verify_with(
    token: &[u8],
    header: &Header,
    validation: &Validation,
    sets: &[Arc<Vec<Key>>],
) -> Option<Claims> {
    let keys = sets.iter().flat_map(|set| set.iter());
    keys.filter(|key| key.fits(header.alg, header.kid.as_deref()))
        .take(TRIES_MAX)
        .find_map(|key| {
            let verified = jsonwebtoken::decode::<Claims>(token, &key.key, validation);
            verified.ok().map(|token| token.claims)
        })
}

/// A claim that must be text where it is there.
fn text_claim<'c>(claims: &'c Claims, name: &str) -> Result<Option<&'c str>, Refusal> {
    match claims.get(name) {
        None => Ok(None),
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text)),
        Some(_) => Err(Refusal::NotAuthorized),
    }
}

fn rules_of(value: &Value) -> Result<Arc<[acl::Rule]>, String> {
    use serde::Deserialize as _;
    let rules = Vec::<RuleConfig>::deserialize(value).map_err(|error| error.to_string())?;
    acl::parse_own(&rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_taken_for_a_token() {
        for token in ["eyJhbGciOiJub25lIn0.e30.", "eyJ.e30.c2ln"] {
            assert!(looks_like_token(token.as_bytes()), "{token}");
        }
        for password in [
            "",
            "secret",
            "a.b.c",
            "eyJhbGciOiJub25lIn0",
            "eyJ a.b.c",
            "eyJ.b.c.d",
        ] {
            assert!(!looks_like_token(password.as_bytes()), "{password}");
        }
        let long = format!("eyJ.{}.x", "a".repeat(TOKEN_BYTES_MAX));
        assert!(!looks_like_token(long.as_bytes()));
    }

    #[test]
    fn a_claim_of_the_wrong_kind_is_refused() {
        let claims: Claims = serde_json::from_str(r#"{"a": "x", "b": 1, "c": ""}"#).unwrap();
        assert_eq!(text_claim(&claims, "a"), Ok(Some("x")));
        assert_eq!(text_claim(&claims, "d"), Ok(None));
        for wrong in ["b", "c"] {
            assert_eq!(text_claim(&claims, wrong), Err(Refusal::NotAuthorized));
        }
    }
}
