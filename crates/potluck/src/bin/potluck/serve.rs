//! Owns the verbs that are the process themselves: `up` and `index`. They serve until they are told
//! to stop.

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crossbeam_channel::RecvTimeoutError;
use potluck::control::Event;
use potluck::daemon::Role;
use potluck::{Error, Index, IndexSettings, Peer, Result};
use signal_hook::consts::SIGHUP;
use signal_hook::iterator::Signals;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

use crate::process::Context;
use crate::render::{count, machine, plain, span};
use crate::screen::Screen;
use crate::{args, config, screen};

pub(crate) fn up(cx: &Context, args: &args::Up) -> Result<()> {
    if args.detach {
        // The terminal's end, and its Ctrl-C, are no longer ours. It fails where it is so already.
        let _ = rustix::process::setsid();
    }
    cx.must_not_run(Role::Peer, "stop it: potluck down; or give another --state")?;
    drop(log(cx));
    let peer = Peer::open(cx.settings(&args.listen))?;
    peer.serve_control()?;
    let ready = peer.ready();
    cx.event(&ready)?;
    if let Event::Ready { listen, network, peer, .. } = &ready {
        let network = network.as_deref().map_or_else(
            || "no network yet (potluck join INVITATION)".into(),
            |network| format!("network {}", machine(network)),
        );
        let peer = peer.as_deref().map(machine).unwrap_or_default();
        cx.say(&format!("peer {peer} serves on {}; {network}", plain(listen)));
    }
    if args.detach {
        // Whoever started this reads no further; what follows belongs to the log.
        rustix::stdio::dup2_stdout(std::io::stderr())
            .map_err(|e| Error::io("cannot turn to the log", &e.into()))?;
    }
    if args.leash {
        end_with_stdin();
    }
    peer.wait();
    peer.stop();
    cx.event(&Event::Stopping)
}

pub(crate) fn index(cx: &Context, args: &args::Index) -> Result<()> {
    cx.must_not_run(Role::Index, "stop it: potluck down --index; or give another --state")?;
    let set_log = log(cx);
    let config = args.config.as_deref().map(config::read).transpose()?.unwrap_or_default();
    config.log.iter().for_each(|filter| set_log(filter));
    let settings = IndexSettings::new(&cx.state);
    let index = Index::open(&IndexSettings {
        listen: args.listen,
        advertise: args.advertise.clone(),
        invite_uses: args.uses,
        invite_valid: args.valid,
        heartbeat_s: args.heartbeat,
        workers: args.workers.map_or(settings.workers, usize::from),
        limits: config.limits,
        metrics: args.metrics,
        ..settings
    })?;
    index.serve_control()?;
    let ready = index.ready();
    cx.event(&ready)?;
    if let Event::Ready { listen, invite, network, .. } = &ready {
        let network = network.as_deref().map(machine).unwrap_or_default();
        cx.say(&format!("index of network {network}, on {} (UDP and TCP)", plain(listen)));
        if let Some(invite) = invite {
            cx.say(&format!("  invitation: {}", plain(invite)));
            cx.remark(&format!(
                "  good for {} within {}\n\
                 next, on every machine:  potluck join INVITATION\n\
                 then:                    potluck share PATH · potluck ls · potluck get NAME\n\
                 more invitations:        potluck invite      (Ctrl-C stops the index)",
                count(args.uses.into(), "machine", "machines"),
                span(args.valid),
            ));
        }
    }
    if args.leash {
        end_with_stdin();
    }
    let limits = Mutex::new(config.limits);
    let reload = |path: &Path| match config::read(path) {
        Ok(config) => {
            index.set_limits(&config.limits);
            *limits.lock().unwrap_or_else(PoisonError::into_inner) = config.limits;
            config.log.iter().for_each(|filter| set_log(filter));
            info!(file = %path.display(), limits = ?config.limits, "settings were read again");
        }
        Err(error) => error!(%error, "the settings stay as they were"),
    };
    let (done, is_done) = crossbeam_channel::bounded::<()>(0);
    let reloads = args.config.as_deref().map(|path| Ok((path, Signals::new([SIGHUP])?)));
    let reloads = reloads.transpose().map_err(|e| Error::io("cannot wait for signals", &e))?;
    let handle = reloads.as_ref().map(|(_, signals)| signals.handle());
    thread::scope(|scope| {
        if let Some((path, mut signals)) = reloads {
            scope.spawn(move || signals.forever().for_each(|_| reload(path)));
        }
        if !cx.json
            && !cx.quiet
            && std::io::stdout().is_terminal()
            && std::io::stderr().is_terminal()
        {
            let (index, limits) = (&index, &limits);
            scope.spawn(move || {
                let mut screen = Screen::new(index.status());
                while is_done.recv_timeout(screen::EVERY) == Err(RecvTimeoutError::Timeout) {
                    let limits = *limits.lock().unwrap_or_else(PoisonError::into_inner);
                    screen.show(index.status(), &limits);
                }
            });
        }
        index.wait();
        handle.iter().for_each(signal_hook::iterator::Handle::close);
        drop(done);
    });
    index.stop();
    cx.event(&Event::Stopping)
}

/// Logs go to stderr: for a person what is odd, for a log file what a user would care about too;
/// more by `-v`, or as `POTLUCK_LOG` says. What is returned sets another filter.
pub(crate) fn log(cx: &Context) -> impl Fn(&str) + Sync {
    let level = match (cx.quiet, cx.verbose) {
        (true, _) => "error",
        (_, 0) if std::io::stderr().is_terminal() => "warn",
        (_, 0) => "info",
        (_, 1) => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("POTLUCK_LOG")
        .unwrap_or_else(|_| EnvFilter::new(format!("warn,potluck={level},potluck_core={level}")));
    let colours = std::io::stderr().is_terminal() && console::colors_enabled_stderr();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| screen::Log)
        .with_ansi(colours)
        .with_filter_reloading();
    let handle = log.reload_handle();
    let _ = log.try_init();
    move |filter| drop(handle.reload(EnvFilter::new(filter)))
}

/// Ends this process when its stdin ends: whoever started it is gone, however that came.
fn end_with_stdin() {
    let wait = || {
        let mut stdin = std::io::stdin();
        let mut nothing = [0; 64];
        while stdin.read(&mut nothing).is_ok_and(|read| read > 0) {}
        std::process::exit(0);
    };
    let _ = thread::Builder::new().name("leash".into()).spawn(wait);
}
