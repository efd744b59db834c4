//! How many devices this machine lets one process hold.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that are open besides the devices' sockets: the runtime's, HTTP connections, reports.
const OTHER_FILES: u64 = 200;

/// Lifts the soft limit on open files to the hard one and says what holds then.
pub(crate) fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            return limit.maximum.unwrap_or(u64::MAX);
        }
    }
    limit.current.unwrap_or(u64::MAX)
}

/// How many devices to run with, and the sentence to say if those are fewer than wanted.
pub(crate) fn devices_within(wanted: usize, open_files: u64) -> (usize, Option<String>) {
    let room = usize::try_from(open_files.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX);
    if wanted <= room {
        return (wanted, None);
    }
    let said = format!(
        "this machine allows {open_files} open files; running with {room} devices instead of {wanted}"
    );
    (room, Some(said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_devices_are_left_alone() {
        assert_eq!(devices_within(10_000, 20_000), (10_000, None));
        assert_eq!(devices_within(19_800, 20_000), (19_800, None));
        assert_eq!(devices_within(5, u64::MAX), (5, None));
    }

    #[test]
    fn too_many_are_cut_and_it_is_said() {
        let (devices, said) = devices_within(50_000, 20_000);
        assert_eq!(devices, 19_800);
        assert_eq!(
            said.as_deref(),
            Some(
                "this machine allows 20000 open files; running with 19800 devices instead of 50000"
            )
        );
        assert_eq!(devices_within(1, 100).0, 0);
    }

    #[test]
    fn the_soft_limit_ends_at_the_hard_one() {
        let allowed = raise_open_files();
        assert_eq!(
            getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            allowed
        );
    }
}
