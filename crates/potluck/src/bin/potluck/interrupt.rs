//! Owns Ctrl-C (and SIGTERM, SIGHUP): the first is told to whoever works, the second ends the
//! process. Never decides what is kept.

use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

struct State {
    happened: bool,
    hook: Option<Box<dyn FnOnce() + Send>>,
}

static STATE: Mutex<State> = Mutex::new(State { happened: false, hook: None });

/// Whether an interruption came.
pub(crate) fn happened() -> bool {
    state().happened
}

/// From here on an interruption runs `hook` (at once, where one came already) and nothing else. The
/// hook lasts until the result is dropped.
pub(crate) fn hooked(hook: impl FnOnce() + Send + 'static) -> Hooked {
    listen();
    let mut state = state();
    if state.happened {
        drop(state);
        hook();
    } else {
        state.hook = Some(Box::new(hook));
    }
    Hooked(())
}

/// Takes the hook away when dropped.
pub(crate) struct Hooked(());

impl Drop for Hooked {
    fn drop(&mut self) {
        state().hook = None;
    }
}

/// Catches the signals, once a process.
fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let wanted = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored(*signal));
        // Where this fails a signal ends the process as it would any other.
        let Ok(mut signals) = Signals::new(wanted) else { return };
        let watch = move || {
            for _ in signals.forever() {
                let mut state = state();
                if state.happened {
                    std::process::exit(130); // it takes too long for whoever waits
                }
                state.happened = true;
                let hook = state.hook.take();
                drop(state);
                if let Some(hook) = hook {
                    hook();
                }
            }
        };
        let _ = thread::Builder::new().name("signals".into()).spawn(watch);
    });
}

/// Whether whoever started this wants the signal ignored, as `nohup` does with SIGHUP.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}
