//! potluck, the program: reads what is asked, hands it on, and says how it ended.
//!
//! | module | owns |
//! |---|---|
//! | `args` | verbs, options, help |
//! | `verbs` | what each verb asks, and how its answers look |
//! | `serve` | the verbs that are the process: `up`, `index` |
//! | `process` | the way to the process that does the work |
//! | `config`, `screen` | an index's settings in a file; what a person sees of it |
//! | `demo` | the whole story on one machine |
//! | `progress`, `render`, `interrupt` | bars; text; Ctrl-C |

mod args;
mod config;
mod demo;
mod interrupt;
mod process;
mod progress;
mod render;
mod screen;
mod serve;
mod verbs;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use potluck::control::Event;
use potluck::{Error, ErrorKind, Result};

use crate::args::{Cli, Verb};
use crate::process::Context;
use crate::render::{err, out, plain_lines};

fn main() -> ExitCode {
    let cli = Cli::parse();
    take_all_descriptors();
    let json = cli.common.json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error, json);
            ExitCode::from(error.exit_code())
        }
    }
}

/// A connection needs two descriptors, and the usual soft limit of 1,024 is meant for programs that
/// use select(2). Where it cannot be raised, fewer connections are possible.
fn take_all_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn run(cli: Cli) -> Result<()> {
    let Some(verb) = cli.verb else {
        out(args::OVERVIEW.trim_end());
        return Ok(());
    };
    match &verb {
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "potluck", &mut script);
            out(String::from_utf8_lossy(&script).trim_end());
            return Ok(());
        }
        Verb::ExitCodes => {
            out(args::EXIT_CODES);
            return Ok(());
        }
        _ => {}
    }
    let cx = &Context::new(&cli.common)?;
    match verb {
        Verb::Share(args) => verbs::share(cx, &args),
        Verb::Get(args) => verbs::get(cx, &args),
        Verb::Ls { glob, watch: false } => verbs::ls(cx, &glob),
        Verb::Ls { glob, watch: true } | Verb::Watch { glob } => verbs::watch(cx, &glob),
        Verb::Find { what } => verbs::find(cx, &what),
        Verb::Unshare { what } => verbs::unshare(cx, &what),
        Verb::Status { stats } => verbs::status(cx, stats),
        Verb::Peers => verbs::peers(cx),
        Verb::Limit { up, down } => verbs::limit(cx, up, down),
        Verb::Verify { what } => verbs::verify(cx, what.as_deref()),
        Verb::Join { invitation, listen } => verbs::join(cx, &invitation, &listen),
        Verb::Leave => verbs::leave(cx),
        Verb::Invite(args) => verbs::invite(cx, &args),
        Verb::Members { what } => verbs::members(cx, what.as_ref()),
        Verb::Index(args) => serve::index(cx, &args),
        Verb::Up(args) => serve::up(cx, &args),
        Verb::Down { index } => verbs::down(cx, index),
        Verb::Demo { path } => demo::demo(cx, path.as_deref()),
        Verb::Completions { .. } | Verb::ExitCodes => Ok(()), // done above: they need no state
    }
}

/// Says what failed, why, and what to do: on stderr, and as an event where JSON was asked for.
fn tell(error: &Error, json: bool) {
    if json && let Ok(line) = Event::failed(error).to_line() {
        out(line.trim_end());
    }
    if error.kind == ErrorKind::Interrupted {
        if !error.message.is_empty() {
            err(&plain_lines(&error.message)); // no failure: it was asked for
        }
        return;
    }
    err(&format!("potluck: {}", plain_lines(&error.message)));
    if let Some(hint) = &error.hint {
        err(&format!("  hint: {}", plain_lines(hint)));
    }
}
