//! User names and argon2id hashes in a file.
//!
//! A hash is made slow on purpose, so it is computed on threads of its own, a few at a time, and
//! not again for what was verified a short while ago. A user that is not in the file costs the same
//! hash as one that is.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use argon2::password_hash::PasswordHasher as _;
use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Block, Params, Version};
use parking_lot::Mutex;
use subtle::ConstantTimeEq as _;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::cache::{Cache, Hasher};
use super::config::{ClientIdRule, PasswordFileConfig};
use super::watched::Watched;
use super::{Accepted, Credentials, Refusal, Verdict};

/// Verified in place of a user's hash where there is no such user and no other: of the strength that
/// [`hash`] makes.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Hashes by user name.
#[derive(Default)]
pub(crate) struct Passwords(BTreeMap<String, String>);

/// A hash of `password` for the file, with a fresh salt.
///
/// # Errors
/// When the system gives no random bytes.
pub fn hash(password: &[u8]) -> Result<String, String> {
    Argon2::default()
        .hash_password(password)
        .map(|hash| hash.to_string())
        .map_err(|error| format!("cannot hash: {error}"))
}

impl Passwords {
    /// Reads `user:hash` lines; empty lines and lines that begin with `#` say nothing.
    /// The error names the first line that is neither.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|_| "not UTF-8".to_owned())?;
        let mut by_user = BTreeMap::new();
        for (at, line) in text.lines().enumerate() {
            let wrong = |why: &str| format!("line {}: {why}", at + 1);
            let line = line.trim_end();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            // A user name may hold colons, a hash does not.
            let (user, hash) = line
                .rsplit_once(':')
                .ok_or_else(|| wrong("must be user:hash"))?;
            check_user(user).map_err(|error| wrong(&error))?;
            let parsed = PasswordHash::new(hash)
                .map_err(|_| wrong("the hash must be what `moorline passwd` makes"))?;
            if parsed.algorithm.as_str() != "argon2id" {
                return Err(wrong("the hash must be of argon2id"));
            }
            if by_user.insert(user.to_owned(), hash.to_owned()).is_some() {
                return Err(wrong("this user has a line above"));
            }
        }
        Ok(Self(by_user))
    }

    /// The hash to compare with, and whether it is the user's.
    fn find(&self, user: &str) -> (&str, bool) {
        match self.0.get(user) {
            Some(hash) => (hash, true),
            // Somebody's, so that it takes as long.
            None => (self.0.values().next().map_or(NOBODY, |hash| hash), false),
        }
    }
}

/// The text of a password file with the line of `user` changed: to `hash`, or removed where that is
/// `None`. Comments stay. Also says whether there was such a line.
///
/// # Errors
/// When `text` is no password file, or no line can hold this name.
pub fn edit_passwords(
    text: &str,
    user: &str,
    hash: Option<&str>,
) -> Result<(String, bool), String> {
    check_user(user)?;
    let had = Passwords::parse(text.as_bytes())?.0.contains_key(user);
    let is_users = |line: &&str| {
        !line.starts_with('#') && line.rsplit_once(':').is_some_and(|(name, _)| name == user)
    };
    let fresh = hash.map(|hash| format!("{user}:{hash}"));
    let mut lines: Vec<&str> = text.lines().collect();
    match (lines.iter().position(is_users), &fresh) {
        (Some(at), Some(fresh)) => lines[at] = fresh,
        (Some(at), None) => drop(lines.remove(at)),
        (None, Some(fresh)) => lines.push(fresh),
        (None, None) => {}
    }
    let mut edited = lines.join("\n");
    if !edited.is_empty() {
        edited.push('\n');
    }
    Ok((edited, had))
}

fn check_user(user: &str) -> Result<(), String> {
    let is_bad = user.is_empty()
        || user.starts_with('#')
        || user.trim() != user
        || user.contains(char::is_control);
    if is_bad {
        return Err(format!(
            "{user:?} cannot be a user name: it must not be empty, begin with #, begin or end with a space, or hold control characters"
        ));
    }
    Ok(())
}

/// What a hash is computed in: kept for the next one, because an allocator would leave as much behind
/// in each thread that ever hashed.
type Memory = Vec<Block>;

/// Whether `password` has that hash; `None` where it cannot be computed.
fn matches(password: &[u8], hash: &str, memory: &mut Memory) -> Option<bool> {
    let parsed = PasswordHash::new(hash).ok()?;
    let params = Params::try_from(&parsed).ok()?;
    let version = match parsed.version {
        Some(version) => Version::try_from(version).ok()?,
        None => Version::V0x10,
    };
    let expected = parsed.hash?;
    let mut found = vec![0; expected.len()];
    memory.resize(params.block_count(), Block::default());
    Argon2::new(Algorithm::Argon2id, version, params)
        .hash_password_into_with_memory(password, &parsed.salt?, &mut found, &mut memory[..])
        .ok()?;
    Some(found.ct_eq(expected.as_ref()).into())
}

/// The authenticator.
pub(super) struct PasswordFile {
    file: Watched<Passwords>,
    client_id: ClientIdRule,
    hashing: Arc<Semaphore>,
    memory: Arc<Mutex<Vec<Memory>>>,
    waiting: AtomicUsize,
    waiting_max: usize,
    verified: Cache<()>,
    cache_ttl: Duration,
    hasher: Arc<Hasher>,
    blocking: Handle,
}

impl PasswordFile {
    pub(super) fn open(
        config: &PasswordFileConfig,
        path: &Path,
        hasher: Arc<Hasher>,
        blocking: Handle,
    ) -> Result<Self, String> {
        let file = Watched::open(path, blocking.clone(), Passwords::parse).map_err(|error| {
            format!("the password file cannot be read, `moorline passwd USER` makes one: {error}")
        })?;
        Ok(Self {
            file,
            client_id: config.client_id,
            hashing: Arc::new(Semaphore::new(config.hashing_max)),
            memory: Arc::default(),
            waiting: AtomicUsize::new(0),
            waiting_max: config.waiting_max,
            verified: Cache::new(config.cache_entries_max),
            cache_ttl: config.cache_ttl,
            hasher,
            blocking,
        })
    }

    pub(super) async fn judge(&self, asked: &Credentials<'_>) -> Verdict {
        let (Some(user), Some(password)) = (asked.username, asked.password) else {
            return Verdict::Unknown;
        };
        let (passwords, version) = self.file.get().await;
        let version = version.to_be_bytes();
        let fingerprint = self.hasher.fingerprint(&[
            Some(b"password_file"),
            Some(&version),
            Some(user.as_bytes()),
            Some(password),
        ]);
        if self.verified.get(&fingerprint, Instant::now()).is_none() {
            let (hash, is_known) = passwords.find(user);
            match self.verify(password.to_vec(), hash.to_owned()).await {
                Err(refusal) => return Verdict::Refused(refusal),
                Ok(_) if !is_known => return Verdict::Unknown,
                Ok(false) => return Verdict::Refused(Refusal::BadCredentials),
                Ok(true) => {
                    self.verified
                        .put(fingerprint, (), self.cache_ttl, Instant::now());
                }
            }
        }
        let is_free = self.client_id == ClientIdRule::Any;
        if !is_free && !asked.client_id.is_empty() && asked.client_id != user {
            return Verdict::Refused(Refusal::NotAuthorized);
        }
        Verdict::Accepted(Accepted {
            username: Some(user.into()),
            ..Accepted::default()
        })
    }

    async fn verify(&self, password: Vec<u8>, hash: String) -> Result<bool, Refusal> {
        let _waiting = Waiting::enter(&self.waiting, self.waiting_max).ok_or(Refusal::Busy)?;
        let hashing = Arc::clone(&self.hashing).acquire_owned().await;
        let memory = Arc::clone(&self.memory);
        let verified = self.blocking.spawn_blocking(move || {
            // Given back when it is done, also where nobody waits for it any more.
            let _hashing = hashing;
            let mut own = memory.lock().pop().unwrap_or_default();
            let is_right = matches(&password, &hash, &mut own);
            memory.lock().push(own);
            is_right.unwrap_or(false)
        });
        verified.await.map_err(|_| Refusal::Unavailable)
    }
}

/// A place in a queue of a limited length.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize, max: usize) -> Option<Self> {
        if count.fetch_add(1, Ordering::Relaxed) >= max {
            count.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self(count))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_what_was_set() {
        let first = hash(b"secret").unwrap();
        assert!(first.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"));
        let edit = |text: &str, user: &str, hash| edit_passwords(text, user, hash).unwrap();
        let (text, had) = edit("# ours\n", "ann", Some(&first));
        assert!(!had);
        let (text, had) = edit(&text, "a:b", Some(NOBODY));
        assert!(!had);
        let (text, had) = edit(&text, "ann", Some(NOBODY));
        assert!(had);
        assert_eq!(text, format!("# ours\nann:{NOBODY}\na:b:{NOBODY}\n"));
        let (text, had) = edit(&text, "ann", None);
        assert!(had);
        assert_eq!(edit(&text, "ann", None), (text.clone(), false));
        let read = Passwords::parse(text.as_bytes()).unwrap();
        assert_eq!(read.find("a:b"), (NOBODY, true));
        assert_eq!(read.find("ann"), (NOBODY, false));
        for bad in ["", "#x", " x", "x\n", "a\tb"] {
            assert!(edit_passwords("", bad, Some(NOBODY)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_hash_is_that_of_one_password() {
        let hashed = hash(b"secret").unwrap();
        let memory = &mut Memory::new();
        assert_eq!(matches(b"secret", &hashed, memory), Some(true));
        assert_eq!(matches(b"Secret", &hashed, memory), Some(false));
        assert_eq!(matches(b"", &hashed, memory), Some(false));
        assert_eq!(matches(b"secret", NOBODY, memory), Some(false));
        // A vector of the reference implementation, with the salt "somesalt".
        let of_another =
            "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4";
        assert_eq!(matches(b"password", of_another, memory), Some(true));
        assert_eq!(matches(b"secret", "nonsense", memory), None);
    }

    #[test]
    fn a_wrong_line_is_named() {
        let of = |text: &str| Passwords::parse(text.as_bytes()).err().unwrap_or_default();
        let good = format!("ann:{NOBODY}");
        assert_eq!(of(&format!("# comment\n\n{good}\n")), "");
        assert!(of("ann").starts_with("line 1: must be user:hash"));
        assert!(of("ann:secret").contains("moorline passwd"));
        let other = good.replace("argon2id", "argon2i");
        assert!(of(&other).contains("must be of argon2id"), "{}", of(&other));
        assert!(of(&format!("{good}\n{good}")).starts_with("line 2: this user"));
        assert!(of(&format!(":{NOBODY}")).starts_with("line 1: \"\" cannot be a user name"));
    }

    #[test]
    fn nobody_costs_what_somebody_costs() {
        let ours = hash(b"x").unwrap();
        let settings = |hash: &str| hash.split('$').nth(3).unwrap().to_owned();
        assert_eq!(settings(&ours), settings(NOBODY));
        let nobody = PasswordHash::new(NOBODY).unwrap();
        assert_eq!(nobody.hash.unwrap().len(), 32);
    }
}
