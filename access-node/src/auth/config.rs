//! The `[auth]` and `[acl]` sections: who is let in, and what for.
//!
//! No secret is in here: keys and passwords lie in files of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The `[auth]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// Who is asked about a device, in this order; nobody lets anyone in.
    pub chain: Vec<AuthenticatorKind>,
    /// How long all of them together may take; then the device is told that the server is busy.
    #[serde(with = "moorline_router::duration")]
    pub timeout: Duration,
    /// The `password_file` authenticator.
    pub password_file: PasswordFileConfig,
    /// The `jwt` authenticator.
    pub jwt: JwtConfig,
    /// The `http` authenticator.
    pub http: HttpAuthConfig,
}

/// One way to tell who a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthenticatorKind {
    /// User names and argon2id hashes in a file.
    PasswordFile,
    /// A signed token in place of the password.
    Jwt,
    /// A backend is asked.
    Http,
    /// The certificate that TLS has verified.
    Certificate,
}

/// The `[auth.password_file]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PasswordFileConfig {
    /// Lines `user:hash`, made by `moorline passwd`; empty is `passwords` in the data directory.
    pub file: PathBuf,
    /// Which client ids a user may take.
    pub client_id: ClientIdRule,
    /// Passwords hashed at the same time: each takes a core for some hundredths of a second, and 19 MiB that
    /// stay in use.
    pub hashing_max: usize,
    /// Devices that wait for a hash; more are told that the server is busy.
    pub waiting_max: usize,
    /// How long a verified password is known without hashing it again; 0 hashes every time.
    #[serde(with = "moorline_router::duration")]
    pub cache_ttl: Duration,
    /// Passwords known that way.
    pub cache_entries_max: usize,
}

/// Which client ids a user may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientIdRule {
    /// Any: users trust each other, or ids are secret.
    Any,
    /// The user name, or one that the server makes.
    Username,
}

/// The `[auth.jwt]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JwtConfig {
    /// The field of CONNECT that holds the token.
    pub from: JwtField,
    /// Keys in files.
    pub keys: Vec<JwtKeyConfig>,
    /// A file with a JSON Web Key Set.
    pub jwks_file: PathBuf,
    /// Where a JSON Web Key Set is fetched from.
    pub jwks_url: String,
    /// How often it is.
    #[serde(with = "moorline_router::duration")]
    pub jwks_refresh: Duration,
    /// How long one fetch may take.
    #[serde(with = "moorline_router::duration")]
    pub jwks_timeout: Duration,
    /// What `iss` must be; empty takes any.
    pub issuer: String,
    /// What `aud` must be or hold; empty does not look at it.
    pub audience: String,
    /// By how much clocks may differ.
    #[serde(with = "moorline_router::duration")]
    pub leeway: Duration,
    /// The claim that names the one client id that a token is good for.
    pub client_id_claim: String,
    /// Refuses tokens without that claim. Otherwise they are good for any client id.
    pub client_id_required: bool,
    /// The claim that is the user name. (What CONNECT says besides a token is not looked at.)
    pub username_claim: String,
    /// The claim that holds rules in the form of `acl.rules`.
    pub acl_claim: String,
}

/// A field of CONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JwtField {
    /// The password.
    Password,
    /// The user name.
    Username,
}

/// One of `[[auth.jwt.keys]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtKeyConfig {
    /// The only algorithm that this key verifies.
    pub algorithm: JwtAlgorithm,
    /// The secret (HS256) or the public key in PEM (the others).
    pub file: PathBuf,
    /// The `kid` of tokens that it verifies; empty is for tokens of any.
    #[serde(default)]
    pub id: String,
}

/// How tokens are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are RFC 7518's")]
pub enum JwtAlgorithm {
    HS256,
    RS256,
    ES256,
    EdDSA,
}

/// The `[auth.http]` section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpAuthConfig {
    /// Asked with a POST about each device.
    pub url: String,
    /// A file whose first line is sent as `Authorization`.
    pub authorization_file: PathBuf,
    /// How long one call may take.
    #[serde(with = "moorline_router::duration")]
    pub timeout: Duration,
    /// Calls at the same time.
    pub calls_max: usize,
    /// Calls that wait for their turn; more devices are told that the server is busy.
    pub waiting_max: usize,
    /// How long an "allow" holds for the same credentials; 0 asks every time.
    #[serde(with = "moorline_router::duration")]
    pub cache_ttl: Duration,
    /// The same for "deny" and "ignore".
    #[serde(with = "moorline_router::duration")]
    pub cache_deny_ttl: Duration,
    /// Answers kept.
    pub cache_entries_max: usize,
    /// What a device is told that the backend was not there to judge.
    pub on_error: OnError,
}

/// What happens when an authenticator cannot answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// "Server unavailable": the device comes back later.
    Refuse,
    /// The next of the chain is asked.
    Next,
}

/// The `[acl]` section. It holds for devices that were authenticated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AclConfig {
    /// For topics that no rule decides and that belong to no device.
    pub default: Permission,
    /// Looked at in order; the first that decides wins.
    pub rules: Vec<RuleConfig>,
}

/// One of `[[acl.rules]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// What it says.
    pub permission: Permission,
    /// Of what.
    #[serde(default = "all")]
    pub action: Action,
    /// Topic filters; `{client_id}`, `{username}` and `{certificate}` stand for the device's own.
    pub topics: Vec<String>,
    /// User names that it is for; empty is everyone.
    #[serde(default)]
    pub users: Vec<String>,
}

fn all() -> Action {
    Action::All
}

/// What a rule says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the words say it")]
pub enum Permission {
    Allow,
    Deny,
}

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Publishing, wills included.
    Publish,
    /// Subscribing.
    Subscribe,
    /// Both.
    All,
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self {
            chain: Vec::new(),
            timeout: Duration::from_secs(10),
            password_file: PasswordFileConfig::default(),
            jwt: JwtConfig::default(),
            http: HttpAuthConfig::default(),
        }
    }
}

impl Default for PasswordFileConfig {
    fn default() -> Self {
        Self {
            file: PathBuf::new(),
            client_id: ClientIdRule::Any,
            hashing_max: 2,
            waiting_max: 1_000,
            cache_ttl: Duration::from_secs(300),
            cache_entries_max: 100_000,
        }
    }
}

impl Default for JwtConfig {
    fn default() -> Self {
        Self {
            from: JwtField::Password,
            keys: Vec::new(),
            jwks_file: PathBuf::new(),
            jwks_url: String::new(),
            jwks_refresh: Duration::from_secs(600),
            jwks_timeout: Duration::from_secs(5),
            issuer: String::new(),
            audience: String::new(),
            leeway: Duration::ZERO,
            client_id_claim: "client_id".to_owned(),
            client_id_required: false,
            username_claim: "sub".to_owned(),
            acl_claim: "acl".to_owned(),
        }
    }
}

impl Default for HttpAuthConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            authorization_file: PathBuf::new(),
            timeout: Duration::from_secs(3),
            calls_max: 64,
            waiting_max: 10_000,
            cache_ttl: Duration::from_secs(60),
            cache_deny_ttl: Duration::from_secs(5),
            cache_entries_max: 100_000,
            on_error: OnError::Refuse,
        }
    }
}

impl Default for AclConfig {
    fn default() -> Self {
        Self {
            default: Permission::Deny,
            rules: Vec::new(),
        }
    }
}

impl AuthConfig {
    /// Whether devices are asked who they are.
    pub fn is_on(&self) -> bool {
        !self.chain.is_empty()
    }

    /// The password file, which lies in the data directory where nothing else is said.
    pub fn password_path(&self, data_dir: &Path) -> PathBuf {
        match self.password_file.file.as_os_str().is_empty() {
            true => data_dir.join("passwords"),
            false => self.password_file.file.clone(),
        }
    }

    /// Checks what the types cannot; the error names the key and what would be right.
    pub fn validate(&self) -> Result<(), String> {
        for (at, kind) in self.chain.iter().enumerate() {
            if self.chain[..at].contains(kind) {
                return Err("auth.chain must name each authenticator at most once".to_owned());
            }
        }
        if self.timeout.is_zero() {
            return Err("auth.timeout must be greater than 0".to_owned());
        }
        let uses = |kind| self.chain.contains(&kind);
        if uses(AuthenticatorKind::Jwt) {
            self.jwt.validate()?;
        }
        if uses(AuthenticatorKind::Http) {
            self.http.validate()?;
        }
        if uses(AuthenticatorKind::PasswordFile)
            && !(1..=16).contains(&self.password_file.hashing_max)
        {
            return Err("auth.password_file.hashing_max must be from 1 to 16".to_owned());
        }
        Ok(())
    }
}

impl JwtConfig {
    fn validate(&self) -> Result<(), String> {
        let has_no_set = self.jwks_file.as_os_str().is_empty() && self.jwks_url.is_empty();
        if self.keys.is_empty() && has_no_set {
            return Err(
                "auth.chain names jwt, which needs a key: set auth.jwt.keys, jwks_file or jwks_url"
                    .to_owned(),
            );
        }
        if !self.jwks_url.is_empty() {
            check_url("auth.jwt.jwks_url", &self.jwks_url)?;
        }
        if self.jwks_refresh < Duration::from_secs(1) || self.jwks_timeout.is_zero() {
            return Err(
                "auth.jwt.jwks_refresh must be at least 1s, and jwks_timeout greater than 0"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

impl HttpAuthConfig {
    fn validate(&self) -> Result<(), String> {
        check_url("auth.http.url", &self.url)?;
        if self.calls_max == 0 || self.timeout.is_zero() {
            return Err("auth.http.calls_max and timeout must be greater than 0".to_owned());
        }
        Ok(())
    }
}

fn check_url(key: &str, url: &str) -> Result<(), String> {
    let parsed = reqwest::Url::parse(url);
    match parsed {
        // The URL is logged, and what is wrong with one is not to be shown with it.
        Ok(parsed) if !parsed.username().is_empty() || parsed.password().is_some() => Err(format!(
            "{key} must not hold a user name or a password: a secret belongs in a file, as auth.http.authorization_file"
        )),
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") => Ok(()),
        _ => Err(format!(
            "{key} is {url:?}, must be like \"https://backend.example/mqtt\""
        )),
    }
}

impl AclConfig {
    /// Checks what the types cannot; the error names the rule.
    pub fn validate(&self) -> Result<(), String> {
        super::acl::Acl::new(self, "d").map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_holds_no_secret_and_none_is_shown() {
        let error = |url: &str| check_url("auth.http.url", url).err().unwrap_or_default();
        assert_eq!(error("https://backend.example/mqtt"), "");
        assert!(error("backend.example").contains("must be like"));
        for url in ["https://user:s3cret@backend.example/", "ftp://:s3cret@x/"] {
            let error = error(url);
            assert!(error.contains("must not hold"), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
