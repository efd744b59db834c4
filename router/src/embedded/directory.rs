//! The data directory: who may use it, and which format it has.
//!
//! `FORMAT` holds one number. A directory of a newer format is refused; an older one is migrated
//! step by step before anything else reads it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::engine::Engine;
use super::migrate;
use crate::StoreError;

/// The format that this program writes.
pub const FORMAT_VERSION: u32 = 1;

const FORMAT_FILE: &str = "FORMAT";
const LOCK_FILE: &str = "LOCK";
const STORE_DIR: &str = "store";

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It was written by a newer program.
    #[error("data directory {} has format {found}; this program reads formats up to {supported}: use the program that wrote it, or another directory", .path.display())]
    NewerFormat {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest one that can be read.
        supported: u32,
    },
    /// Its `FORMAT` file holds no number.
    #[error("{} holds {found:?} instead of a format number", .path.display())]
    UnreadableFormat {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
    /// Another process uses it.
    #[error("data directory {} is in use by {holder}", .path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// `process 123`, or `another process` where it did not say.
        holder: String,
    },
    /// The operating system refused.
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io {
        /// A verb.
        doing: &'static str,
        /// A file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What it holds cannot be opened or read.
    #[error("cannot open the store in {}: {cause}", .path.display())]
    Store {
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: String,
    },
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io {
        doing,
        path: path.into(),
        source,
    }
}

/// A data directory held by this process.
pub(super) struct Directory {
    path: PathBuf,
    /// Held for its lock.
    lock: Mutex<Option<File>>,
}

impl Directory {
    /// Makes the directory if need be and takes it for this process.
    pub(super) fn lock(path: &Path) -> Result<Self, OpenError> {
        fs::create_dir_all(path).map_err(io_error("make the data directory", path))?;
        let lock_path = path.join(LOCK_FILE);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(io_error("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError::InUse {
                    path: path.into(),
                    holder: holder(&mut lock),
                });
            }
            Err(TryLockError::Error(source)) => {
                return Err(OpenError::Io {
                    doing: "lock",
                    path: lock_path,
                    source,
                });
            }
        }
        lock.set_len(0)
            .and_then(|()| write!(lock, "{}", std::process::id()))
            .map_err(io_error("write", &lock_path))?;
        Ok(Self {
            path: path.into(),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// Lets another process have it.
    pub(super) fn release(&self) {
        drop(self.lock.lock().take());
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn store_path(&self) -> PathBuf {
        self.path.join(STORE_DIR)
    }

    /// Opens the engine, after whatever migration the directory needs.
    pub(super) fn open_engine(&self, cache_bytes: u64) -> Result<Engine, OpenError> {
        let found = self.format()?;
        if found.is_some_and(|found| found > FORMAT_VERSION) {
            return Err(OpenError::NewerFormat {
                path: self.path.clone(),
                found: found.unwrap_or_default(),
                supported: FORMAT_VERSION,
            });
        }
        let fresh = found.is_none() && !self.store_path().exists();
        let cause = |cause: String| OpenError::Store {
            path: self.path.clone(),
            cause,
        };
        let engine =
            Engine::open(&self.store_path(), cache_bytes).map_err(|e| cause(e.to_string()))?;
        if !fresh {
            // A store without a format number is from before there was one.
            for version in found.unwrap_or(0)..FORMAT_VERSION {
                tracing::info!(
                    from = version,
                    to = version + 1,
                    "migrating the data directory"
                );
                migrate::step(&engine, version).map_err(|e: StoreError| cause(e.to_string()))?;
            }
        }
        if found != Some(FORMAT_VERSION) {
            self.write_format()?;
        }
        Ok(engine)
    }

    fn format(&self) -> Result<Option<u32>, OpenError> {
        let path = self.path.join(FORMAT_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        match text.trim().parse() {
            Ok(version) => Ok(Some(version)),
            Err(_) => Err(OpenError::UnreadableFormat {
                path,
                found: text.trim().chars().take(40).collect(),
            }),
        }
    }

    fn write_format(&self) -> Result<(), OpenError> {
        let path = self.path.join(FORMAT_FILE);
        let new_path = self.path.join("FORMAT.new");
        let write = || {
            let mut file = File::create(&new_path)?;
            writeln!(file, "{FORMAT_VERSION}")?;
            file.sync_all()?;
            fs::rename(&new_path, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(io_error("write", &path))
    }
}

fn holder(lock: &mut File) -> String {
    let mut text = String::new();
    let read = lock.rewind().and_then(|()| lock.read_to_string(&mut text));
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!("process {pid}"),
        _ => "another process".into(),
    }
}
