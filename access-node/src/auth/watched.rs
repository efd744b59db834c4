//! A file that is read again when it has changed: password file, keys, key sets.
//!
//! Looked at when it is used. A change that cannot be read is told once and changes nothing.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// Bytes of the largest file taken.
const FILE_BYTES_MAX: u64 = 256 * 1024 * 1024;

type Parse<T> = Box<dyn Fn(&[u8]) -> Result<T, String> + Send + Sync>;

/// What a file says.
pub(crate) struct Watched<T> {
    file: Arc<File<T>>,
    current: RwLock<Current<T>>,
    /// One reads it at a time; the others wait for what that one finds.
    reading: Semaphore,
    blocking: Handle,
}

struct File<T> {
    path: PathBuf,
    parse: Parse<T>,
}

struct Current<T> {
    stamp: Stamp,
    version: u64,
    value: Arc<T>,
}

/// Changes with every way to change a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    bytes: u64,
    inode: u64,
}

impl From<Metadata> for Stamp {
    fn from(found: Metadata) -> Self {
        Self {
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
            bytes: found.len(),
            inode: found.ino(),
        }
    }
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Reads the file for the first time. `blocking` has the threads that read it later.
    pub(crate) fn open(
        path: &Path,
        blocking: Handle,
        parse: impl Fn(&[u8]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let file = File {
            path: path.to_owned(),
            parse: Box::new(parse),
        };
        let (stamp, value) = file.read()?;
        Ok(Self {
            file: Arc::new(file),
            current: RwLock::new(Current {
                stamp,
                version: 0,
                value: Arc::new(value),
            }),
            reading: Semaphore::new(1),
            blocking,
        })
    }

    /// What the file says now, and a number that changes with it.
    pub(crate) async fn get(&self) -> (Arc<T>, u64) {
        if self.has_changed() {
            let _reading = self.reading.acquire().await;
            if self.has_changed() {
                self.read_again().await;
            }
        }
        let current = self.current.read();
        (Arc::clone(&current.value), current.version)
    }

    /// A file that is gone counts as unchanged: it may be about to be replaced.
    fn has_changed(&self) -> bool {
        let found = std::fs::metadata(&self.file.path);
        found.is_ok_and(|found| Stamp::from(found) != self.current.read().stamp)
    }

    async fn read_again(&self) {
        let file = Arc::clone(&self.file);
        let read = self.blocking.spawn_blocking(move || {
            let stamp = std::fs::metadata(&file.path).ok().map(Stamp::from);
            (stamp, file.read())
        });
        let Ok((stamp, read)) = read.await else {
            return;
        };
        let path = self.file.path.display();
        let mut current = self.current.write();
        match read {
            Ok((stamp, value)) => {
                current.stamp = stamp;
                current.version += 1;
                current.value = Arc::new(value);
                drop(current);
                tracing::info!(%path, "read again");
            }
            Err(error) => {
                if let Some(stamp) = stamp {
                    // Not tried again before it has changed again.
                    current.stamp = stamp;
                }
                drop(current);
                tracing::warn!(%error, "a changed file is not taken, what it said before still holds");
            }
        }
    }
}

impl<T> File<T> {
    fn read(&self) -> Result<(Stamp, T), String> {
        let named = |error: String| format!("{}: {error}", self.path.display());
        let io = |error: std::io::Error| named(error.to_string());
        // The stamp first: a change while it is read is found by the next look.
        let found = std::fs::metadata(&self.path).map_err(io)?;
        if found.len() > FILE_BYTES_MAX {
            return Err(named(format!("larger than {FILE_BYTES_MAX} bytes")));
        }
        let bytes = std::fs::read(&self.path).map_err(io)?;
        let value = (self.parse)(&bytes).map_err(named)?;
        Ok((found.into(), value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_is_seen_and_a_broken_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        let write = |text: &str| {
            let fresh = folder.path().join("fresh");
            std::fs::write(&fresh, text).unwrap();
            std::fs::rename(&fresh, &path).unwrap();
        };
        let parse = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            text.parse::<u32>().map_err(|error| error.to_string())
        };
        assert!(Watched::open(&path, Handle::current(), parse).is_err());
        write("1");
        let watched = Watched::open(&path, Handle::current(), parse).unwrap();
        assert_eq!(watched.get().await, (Arc::new(1), 0));
        write("2");
        assert_eq!(watched.get().await, (Arc::new(2), 1));
        write("two");
        assert_eq!(watched.get().await, (Arc::new(2), 1));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(watched.get().await, (Arc::new(2), 1));
        write("3");
        assert_eq!(watched.get().await, (Arc::new(3), 2));
    }
}
