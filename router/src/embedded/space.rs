//! How much room the disk has: nothing that adds data is accepted below the declared reserve, so
//! that what frees room (acknowledgements, expiry, compaction) can still be written.

use std::path::Path;
use std::time::{Duration, Instant};

/// Asking costs a system call, so a batch may go by what was found this long ago.
const CHECK_EVERY: Duration = Duration::from_millis(50);

/// Says what is missing, if anything is.
pub(super) fn shortage(path: &Path, min_free_bytes: u64) -> Option<String> {
    match rustix::fs::statvfs(path) {
        Ok(disk) => {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            (free < min_free_bytes)
                .then(|| format!("disk: {free} bytes free of {min_free_bytes} needed"))
        }
        Err(error) => Some(format!("disk: {error}")),
    }
}

/// Watches one path on behalf of the writer.
#[derive(Default)]
pub(super) struct SpaceWatch {
    checked: Option<Instant>,
    short: Option<String>,
}

impl SpaceWatch {
    /// Says what is missing, as of at most a moment ago, and logs when that begins and ends.
    pub(super) fn shortage(&mut self, path: &Path, min_free_bytes: u64) -> Option<&str> {
        if self
            .checked
            .is_none_or(|checked| checked.elapsed() >= CHECK_EVERY)
        {
            self.checked = Some(Instant::now());
            let now = shortage(path, min_free_bytes);
            match (&self.short, &now) {
                (None, Some(shortage)) => {
                    tracing::error!(%shortage, "not enough disk space, new data is refused");
                }
                (Some(_), None) => tracing::info!("enough disk space again"),
                _ => {}
            }
            self.short = now;
        }
        self.short.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_larger_than_the_disk_is_a_shortage_and_none_is_not() {
        let path = Path::new("/");
        assert_eq!(shortage(path, 0), None);
        assert!(shortage(path, u64::MAX).unwrap().contains("bytes free of"));
        assert!(shortage(Path::new("/no/such/place"), 0).is_some());
    }
}
