//! The threads that serve devices: one event loop each, by default one for two cores.
//!
//! A connection stays on the thread that accepted it. Work stealing would buy nothing here, because
//! deliverers write to sockets themselves wherever they run, and would cost a wake-up of another
//! core for a good part of all packets. Fewer loops also mean fuller ones: a loop that finds several
//! sockets ready at once sleeps and wakes less for each packet. The other cores have HTTP, the store
//! and the calls to backends to do.

use std::io;
use std::num::NonZeroUsize;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;

/// Threads beside each loop that read the embedded store. A storm of connects waits its turn at
/// them instead of starting hundreds.
const STORE_READERS: usize = 4;

/// Running event loops.
pub(crate) struct Threads {
    pub(crate) handles: Vec<Handle>,
    threads: Vec<JoinHandle<()>>,
    /// Dropping it ends them.
    stop: watch::Sender<()>,
}

impl Threads {
    /// Starts `count` of them; 0 is one for two cores.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let count = match count {
            0 => std::thread::available_parallelism()
                .map_or(1, NonZeroUsize::get)
                .div_ceil(2),
            count => count,
        };
        let (stop, stopped) = watch::channel(());
        let mut started = Self {
            handles: Vec::new(),
            threads: Vec::new(),
            stop,
        };
        for number in 0..count {
            let runtime = Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(STORE_READERS)
                .build()?;
            started.handles.push(runtime.handle().clone());
            let mut stopped = stopped.clone();
            let thread = std::thread::Builder::new()
                .name(format!("devices-{number}"))
                .spawn(move || {
                    // An error says that the sender is gone, which is the signal.
                    let _ = runtime.block_on(stopped.changed());
                    // A call of a store that still runs may finish, but nobody waits for it.
                    runtime.shutdown_background();
                })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Ends the loops with whatever still runs on them.
    pub(crate) fn stop(self) {
        drop(self.stop);
        for thread in self.threads {
            // A panic of a loop has been reported where it happened.
            let _ = thread.join();
        }
    }
}
