//! `moorline passwd`: one line of the password file.
//!
//! The file is replaced, never written in place, so that a running gateway reads it whole or not at
//! all; and only its owner may read it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use moorline_access_node::{edit_passwords, hash_password};
use rustix::fs::{FlockOperation, flock};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use crate::Failure;
use crate::cli::{Options, PasswdOptions};
use crate::config;

/// The longest password that fits into a CONNECT.
const PASSWORD_BYTES_MAX: u64 = 65_535;

/// Changes the file and says what was done.
pub(crate) fn run(asked: &PasswdOptions, options: &Options) -> Result<(), Failure> {
    let path = match &asked.file {
        Some(path) => path.clone(),
        None => {
            let config = config::load(options).map_err(Failure::Usage)?;
            config.auth.password_path(&config.data_dir)
        }
    };
    // Before a password is asked for in vain.
    edit_passwords("", &asked.user, None).map_err(Failure::Usage)?;
    let hash = match asked.delete {
        true => None,
        false => Some(hash_password(&read_password()?).map_err(Failure::Usage)?),
    };
    let had = change(&path, &asked.user, hash.as_deref())?;
    let what = match (had, asked.delete) {
        (false, true) => {
            let why = format!("{} has no user {:?}", path.display(), asked.user);
            return Err(Failure::Usage(why));
        }
        (true, true) => "removed",
        (true, false) => "changed",
        (false, false) => "added",
    };
    crate::roles::say(&format!("{} {what} in {}\n", asked.user, path.display()));
    Ok(())
}

/// Says whether the user had a line.
fn change(path: &Path, user: &str, hash: Option<&str>) -> Result<bool, Failure> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    let named = || path.display().to_string();
    fs::create_dir_all(&folder).with_context(named)?;
    let locked = File::open(&folder).with_context(named)?;
    // Of two changes at the same time the second is made to what the first has left.
    flock(&locked, FlockOperation::LockExclusive)
        .map_err(io::Error::from)
        .with_context(named)?;
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Failure::Usage(format!("{}: {error}", path.display()))),
    };
    let (edited, had) = edit_passwords(&text, user, hash)
        .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
    if edited != text {
        replace(path, &folder, &edited).with_context(named)?;
    }
    Ok(had)
}

fn replace(path: &Path, folder: &Path, text: &str) -> io::Result<()> {
    let mut fresh_name = path.as_os_str().to_owned();
    fresh_name.push(format!(".{}.new", std::process::id()));
    let fresh_path = PathBuf::from(fresh_name);
    let mut fresh = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh_path)?;
    let written = (|| {
        fresh.write_all(text.as_bytes())?;
        if let Ok(old) = fs::metadata(path) {
            // An administrator who changes it must not take it from the gateway.
            let _ = fchown(&fresh, Some(old.uid()), Some(old.gid()));
        }
        fresh.sync_all()?;
        fs::rename(&fresh_path, path)?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        // It may have been renamed already.
        let _ = fs::remove_file(&fresh_path);
    }
    written
}

fn read_password() -> Result<Vec<u8>, Failure> {
    let stdin = io::stdin();
    let password = if stdin.is_terminal() {
        let first = ask("Password: ")?;
        if ask("Once more: ")? != first {
            return Err(Failure::Usage("the passwords differ".to_owned()));
        }
        first
    } else {
        read_line(&mut stdin.lock())?
    };
    if password.is_empty() {
        return Err(Failure::Usage("the password must not be empty".to_owned()));
    }
    Ok(password)
}

/// A line without its end.
fn read_line(source: &mut impl io::BufRead) -> Result<Vec<u8>, Failure> {
    let mut line = Vec::new();
    source
        .take(PASSWORD_BYTES_MAX + 2)
        .read_until(b'\n', &mut line)
        .context("cannot read the password")?;
    if line.last() == Some(&b'\n') {
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
    }
    if line.len() as u64 > PASSWORD_BYTES_MAX {
        return Err(Failure::Usage(format!(
            "the password must not be longer than {PASSWORD_BYTES_MAX} bytes"
        )));
    }
    Ok(line)
}

/// Reads a line of the terminal without showing it.
fn ask(prompt: &str) -> Result<Vec<u8>, Failure> {
    let stdin = io::stdin();
    let mut out = io::stderr();
    // A prompt that cannot be shown does not keep anyone from typing.
    let _ = write!(out, "{prompt}").and_then(|()| out.flush());
    let shown = tcgetattr(&stdin)
        .map_err(io::Error::from)
        .context("terminal")?;
    let mut hidden = shown.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    let set = |modes| tcsetattr(&stdin, OptionalActions::Flush, modes).map_err(io::Error::from);
    set(&hidden).context("terminal")?;
    let line = read_line(&mut stdin.lock());
    set(&shown).context("terminal")?;
    let _ = writeln!(out);
    line
}
