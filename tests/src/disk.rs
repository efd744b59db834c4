//! A small disk that can be filled: a tmpfs of its own.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A mounted tmpfs; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    mount: TempDir,
}

impl SmallDisk {
    /// Mounts a disk of `mebibytes`, or says why this machine does not allow it.
    pub fn mount(mebibytes: u32) -> Result<Self, String> {
        let mount = tempfile::tempdir().map_err(|error| error.to_string())?;
        let size = format!("size={mebibytes}m");
        let args = ["-t", "tmpfs", "-o", &size, "moorline-test"];
        let mut command = if rustix::process::geteuid().is_root() {
            Command::new("mount")
        } else {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "mount"]);
            sudo
        };
        let done = command
            .args(args)
            .arg(mount.path())
            .output()
            .map_err(|error| format!("mount: {error}"))?;
        if done.status.success() {
            Ok(Self { mount })
        } else {
            Err(String::from_utf8_lossy(&done.stderr).into_owned())
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    fn ballast(&self) -> PathBuf {
        self.mount.path().join("ballast")
    }

    /// Fills it until not one more block fits.
    ///
    /// # Panics
    /// When writing fails for another reason.
    pub fn fill(&self) {
        let mut file = File::create(self.ballast()).expect("the disk takes a file");
        let block = vec![0xAA; 64 * 1024];
        for size in [block.len(), 4096] {
            while let Ok(written) = file.write(&block[..size]) {
                if written == 0 {
                    break;
                }
            }
        }
    }

    /// Fills it but for about `bytes`.
    ///
    /// # Panics
    /// When writing fails.
    pub fn fill_but(&self, bytes: u64) {
        let free = self.free_bytes();
        let mut file = File::create(self.ballast()).expect("the disk takes a file");
        let block = vec![0xAA; 64 * 1024];
        for _ in 0..free.saturating_sub(bytes) / block.len() as u64 {
            file.write_all(&block)
                .expect("there is room for the ballast");
        }
    }

    /// What is left.
    ///
    /// # Panics
    /// When the file system cannot be asked.
    pub fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.mount.path()).expect("a mounted disk can be asked");
        stat.f_bavail * stat.f_frsize
    }

    /// Makes room again.
    ///
    /// # Panics
    /// When there was no ballast.
    pub fn make_room(&self) {
        std::fs::remove_file(self.ballast()).expect("the ballast can be removed");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let program = if rustix::process::geteuid().is_root() {
            "umount"
        } else {
            "sudo"
        };
        let mut command = Command::new(program);
        if program == "sudo" {
            command.args(["-n", "umount"]);
        }
        // Lazily, because a process that was killed a moment ago may still hold files.
        if let Err(error) = command.arg("-l").arg(self.mount.path()).status() {
            eprintln!("could not unmount {}: {error}", self.mount.path().display());
        }
    }
}
