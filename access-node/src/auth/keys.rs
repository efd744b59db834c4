//! Keys that verify tokens. Each is for one algorithm, whatever a token says of itself: a public key
//! never verifies an HMAC, and nothing verifies "none".

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};

use super::config::{JwtAlgorithm, JwtKeyConfig};

/// Keys of one set.
const KEYS_MAX: usize = 100;
/// RFC 7518 section 3.2: a secret of HS256 has at least as many bits as the hash.
const SECRET_BYTES_MIN: usize = 32;

/// One key and what it is for.
pub(super) struct Key {
    /// The `kid`.
    pub(super) id: Option<Box<str>>,
    pub(super) algorithm: Algorithm,
    pub(super) key: DecodingKey,
}

impl Key {
    /// Whether a token of this header may have been signed with it.
    pub(super) fn fits(&self, algorithm: Algorithm, id: Option<&str>) -> bool {
        let is_named = match (&self.id, id) {
            (Some(own), Some(wanted)) => **own == *wanted,
            _ => true,
        };
        is_named && self.algorithm == algorithm
    }
}

/// The key in a file of its own.
pub(super) fn of_file(config: &JwtKeyConfig, bytes: &[u8]) -> Result<Vec<Key>, String> {
    let pem = |_| format!("must be a public key for {:?} in PEM", config.algorithm);
    let (algorithm, key) = match config.algorithm {
        JwtAlgorithm::HS256 => (Algorithm::HS256, secret(bytes.trim_ascii_end())?),
        JwtAlgorithm::RS256 => (
            Algorithm::RS256,
            DecodingKey::from_rsa_pem(bytes).map_err(pem)?,
        ),
        JwtAlgorithm::ES256 => (
            Algorithm::ES256,
            DecodingKey::from_ec_pem(bytes).map_err(pem)?,
        ),
        JwtAlgorithm::EdDSA => (
            Algorithm::EdDSA,
            DecodingKey::from_ed_pem(bytes).map_err(pem)?,
        ),
    };
    let id = (!config.id.is_empty()).then(|| config.id.as_str().into());
    Ok(vec![Key { id, algorithm, key }])
}

fn secret(bytes: &[u8]) -> Result<DecodingKey, String> {
    if bytes.starts_with(b"-----BEGIN") {
        // Whoever has a public key could sign with it.
        return Err(
            "a secret for HS256 must not be a PEM file: is the algorithm that of another key?"
                .to_owned(),
        );
    }
    if bytes.len() < SECRET_BYTES_MIN {
        return Err(format!(
            "a secret for HS256 must have at least {SECRET_BYTES_MIN} bytes, this one has {}",
            bytes.len()
        ));
    }
    Ok(DecodingKey::from_secret(bytes))
}

/// The usable keys of a JSON Web Key Set (RFC 7517); keys for other purposes are left out. A set
/// that anyone may fetch holds no secrets: `is_public` leaves those out too.
pub(super) fn of_set(bytes: &[u8], is_public: bool) -> Result<Vec<Key>, String> {
    #[derive(serde::Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(bytes)
        .map_err(|error| format!("must be a JSON Web Key Set, {{\"keys\": […]}}: {error}"))?;
    if set.keys.len() > KEYS_MAX {
        return Err(format!("has more than {KEYS_MAX} keys"));
    }
    let keys: Vec<Key> = set
        .keys
        .into_iter()
        .filter_map(|value| of_jwk(&serde_json::from_value(value).ok()?, is_public))
        .collect();
    if keys.is_empty() {
        return Err("has no key for HS256, RS256, ES256 or EdDSA".to_owned());
    }
    Ok(keys)
}

fn of_jwk(jwk: &Jwk, is_public: bool) -> Option<Key> {
    let common = &jwk.common;
    let is_for_signatures = matches!(common.public_key_use, None | Some(PublicKeyUse::Signature));
    if !is_for_signatures {
        return None;
    }
    let (algorithm, declared) = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        AlgorithmParameters::OctetKeyPair(curve) if curve.curve == EllipticCurve::Ed25519 => {
            (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
        }
        AlgorithmParameters::OctetKey(_) if !is_public => (Algorithm::HS256, KeyAlgorithm::HS256),
        _ => return None,
    };
    if common.key_algorithm.is_some_and(|alg| alg != declared) {
        return None;
    }
    let key = DecodingKey::from_jwk(jwk).ok()?;
    let is_short = algorithm == Algorithm::HS256
        && key
            .try_get_as_bytes()
            .is_ok_and(|bytes| bytes.len() < SECRET_BYTES_MIN);
    let id = common.key_id.as_deref().map(Into::into);
    (!is_short).then_some(Key { id, algorithm, key })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_key_is_no_secret() {
        let error = |bytes: &[u8]| secret(bytes).err().unwrap_or_default();
        let pem = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----";
        assert!(error(pem).contains("must not be a PEM file"));
        assert!(error(b"short").contains("at least 32 bytes"));
        assert_eq!(error(&[b'-'; 32]), "");
    }
}
