//! Owns the wait for SIGTERM and SIGINT. Never decides what stopping means.

use std::thread::JoinHandle;

use crossbeam_channel::Sender;

use crate::error::{Error, Result};
use crate::index::spawn;

/// Sends into `stop` at SIGTERM or SIGINT, until dropped.
pub(crate) fn stop_on_signals(stop: Sender<()>) -> Result<impl Drop> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::iterator::{Handle, Signals};

    struct Until(Handle, Option<JoinHandle<()>>);
    impl Drop for Until {
        fn drop(&mut self) {
            self.0.close();
            if let Some(thread) = self.1.take() {
                let _ = thread.join();
            }
        }
    }
    let mut signals =
        Signals::new([SIGINT, SIGTERM]).map_err(|e| Error::io("cannot wait for signals", &e))?;
    let handle = signals.handle();
    let thread = spawn("signals", move || {
        for _ in signals.forever() {
            let _ = stop.try_send(());
        }
    })?;
    Ok(Until(handle, Some(thread)))
}
