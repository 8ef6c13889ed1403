//! Owns what each verb asks and how its answers look. Never does the work itself.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use console::style;
use potluck::control::{Event, IfExists, Member, Request, Row, Source, Stats, Status};
use potluck::daemon::{self, Client, Role};
use potluck::{Error, ErrorKind, Limit, Peer, Result};
use potluck_core::id::Query;

use crate::args::{self, Get, Invite, Listen, MembersVerb, Share};
use crate::interrupt;
use crate::process::{Context, Line, absolute};
use crate::progress::Meter;
use crate::render::{
    Table, age, content, count, limits, machine, out, pair, path, path_result, permille, plain,
    quoted, rate, size, span, title,
};

/// How long `down` waits for a process to be gone: its journals are written by then.
const STOP_WAIT: Duration = Duration::from_secs(60);
/// An invitation read from stdin is no longer than this.
const INVITATION_LIMIT_BYTES: u64 = 4096;

pub(crate) fn share(cx: &Context, args: &Share) -> Result<()> {
    let request = Request::Share { path: absolute(&args.path)?, name: args.name.clone() };
    // Told before a process is started for it.
    std::fs::metadata(&args.path)
        .map_err(|e| Error::io(format_args!("cannot share {}", args.path.display()), &e))?;
    let line = match args.foreground {
        true => Line::here(cx, &args.listen)?,
        false => Line::to_peer(cx, &args.listen)?,
    };
    let mut code = None;
    let mut meter = Meter::new(cx);
    let mut shared = None;
    line.ask(cx, &request, &mut |event| match event {
        Event::Founded { invite } => {
            cx.remark(&format!(
                "no network joined: this machine is now its own index (potluck down stops it)\n  \
                 code: {invite}"
            ));
            code = Some(invite.clone());
        }
        Event::Hashing { done, total } => meter.hashed("hashing", *done, *total),
        Event::Shared { id, name, version, size } => {
            shared = Some((id.clone(), name.clone(), *version, *size));
        }
        _ => {}
    })?;
    drop(meter);
    if let Some((id, name, version, bytes)) = shared {
        if cx.quiet {
            cx.say(&plain(&id));
        } else {
            cx.say(&format!("{}  {}", title(name.as_deref(), version, &id), size(bytes)));
            cx.say(&format!("  id: {}", plain(&id)));
            let what = code.or(name).unwrap_or(id);
            cx.say(&format!("  on another machine:  potluck get {}", quoted(&what)));
        }
    }
    if let Line::Here(peer) = line {
        cx.remark("serving it from this process; Ctrl-C ends it");
        peer.wait();
        peer.stop();
    }
    Ok(())
}

pub(crate) fn get(cx: &Context, args: &Get) -> Result<()> {
    let to = match &args.output {
        Some(path) => absolute(path)?,
        None => std::env::current_dir()
            .map_err(|e| Error::io("cannot tell what the current folder is", &e))?,
    };
    let line = match args.foreground {
        true => Line::here(cx, &args.listen)?,
        false => Line::to_peer(cx, &args.listen)?,
    };
    let what = if args::is_invitation(&args.what) {
        join_by(cx, &line, args.what.clone())?;
        the_only_content(cx, &line)?
    } else {
        args.what.clone()
    };
    let again = match &args.output {
        Some(output) => format!("{} -o {}", quoted(&what), quoted(&output.display().to_string())),
        None => quoted(&what),
    };
    let exists = match (args.overwrite, args.rename, args.skip) {
        (true, ..) => IfExists::Overwrite,
        (_, true, _) => IfExists::Rename,
        (_, _, true) => IfExists::Skip,
        _ => IfExists::Refuse,
    };
    fetch(
        cx,
        &line,
        &Request::Get { what, to, exists, timeout_s: args.timeout.as_secs() },
        &again,
        args.stats,
    )?;
    if let Line::Here(peer) = line {
        if !args.seed.is_zero() {
            cx.remark(&format!("serving it on for {}; Ctrl-C ends it", span(args.seed)));
            wait_at_most(&peer, args.seed);
        }
        peer.stop();
    }
    Ok(())
}

/// Runs a fetch; `again` is what goes on with it after an interruption, `tell_stats` whether it ends
/// with what happened on the way.
fn fetch(
    cx: &Context,
    line: &Line,
    request: &Request,
    again: &str,
    tell_stats: bool,
) -> Result<()> {
    let mut meter = Meter::new(cx);
    let mut at = None;
    let mut of = String::new();
    let mut done = None;
    let asked = line.ask(cx, request, &mut |event| match event {
        Event::Fetching { id, name, version, size: total, have, path: to } => {
            of = title(name.as_deref(), *version, id);
            let mut text = format!("{of}  {} → {}", size(*total), path(to));
            if *have > 0 {
                text.push_str(&format!("  ({} are here already)", size(*have)));
            }
            cx.remark(&text);
            at = Some((*have, *total));
        }
        Event::Progress { done, total, rate, sources, waiting, .. } => {
            at = Some((*done, *total));
            meter.fetched((*done, *total), *rate, *sources, waiting.as_deref());
        }
        Event::Done { path, bytes, seconds, sources, stats, .. } => {
            done = Some((path.clone(), *bytes, *seconds, sources.clone(), stats.clone()));
        }
        _ => {}
    });
    drop(meter);
    if let (Err(Error { kind: ErrorKind::Interrupted, .. }), Some((done, total))) = (&asked, at) {
        return Err(Error::new(
            ErrorKind::Interrupted,
            format!("paused at {}; continue with: potluck get {again}", pair(done, total)),
        ));
    }
    asked?;
    if let Some((path, bytes, seconds, sources, stats)) = done {
        if !of.is_empty() {
            cx.remark(&summary(&of, bytes, seconds, &sources));
        }
        if let (true, Some(stats)) = (tell_stats, stats) {
            cx.remark(&stats_table(&stats).text());
        }
        cx.say(&path_result(&path));
    }
    Ok(())
}

/// `llama-70b  131.4 GB in 19 min (115 MB/s): 61 % from bob, 39 % from alice`
fn summary(of: &str, bytes: u64, seconds: f64, sources: &[Source]) -> String {
    let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    let mut text = format!("{of}  {} in {}", size(bytes), span(time));
    let received: u64 = sources.iter().map(|source| source.bytes).sum();
    if received == 0 {
        return text;
    }
    if seconds > 0.0 {
        text.push_str(&format!(" ({})", rate((received as f64 / seconds) as u64)));
    }
    let mut sources: Vec<&Source> = sources.iter().collect();
    sources.sort_by_key(|source| std::cmp::Reverse(source.bytes));
    let share = |source: &&Source| {
        let percent = u128::from(source.bytes) * 100 / u128::from(received);
        format!("{percent} % from {}", who(&source.label, &source.peer))
    };
    let shares: Vec<String> = sources.iter().take(SOURCES_SHOWN).map(share).collect();
    text.push_str(": ");
    text.push_str(&shares.join(", "));
    if sources.len() > SOURCES_SHOWN {
        text.push_str(&format!(" and {} more", sources.len() - SOURCES_SHOWN));
    }
    text
}

/// As many sources as fit a line.
const SOURCES_SHOWN: usize = 4;

/// After joining by a code: what there is to fetch, where that is one thing.
fn the_only_content(cx: &Context, line: &Line) -> Result<String> {
    let mut rows = Vec::new();
    line.ask(cx, &Request::List { glob: "*".into() }, &mut |event| {
        if let Event::Listing { rows: all } = event {
            rows.clone_from(all);
        }
    })?;
    match rows.as_slice() {
        [only] => Ok(asked_by(only)),
        [] => Err(Error::new(ErrorKind::NotFound, "joined; nothing is shared there yet")
            .hint("once something is (potluck watch): potluck get NAME")),
        [first, ..] => {
            if !cx.json {
                listing(&rows).print();
            }
            Err(Error::new(
                ErrorKind::Usage,
                format!("joined; there are {} things to fetch: say which", rows.len()),
            )
            .hint(format!("for instance: potluck get {}", quoted(&asked_by(first)))))
        }
    }
}

/// What a person types to get this.
fn asked_by(row: &Row) -> String {
    row.name.clone().unwrap_or_else(|| row.id.clone())
}

/// Serves until the time is over, or somebody stops it before.
fn wait_at_most(peer: &Arc<Peer>, time: Duration) {
    let stopping = peer.clone();
    let (_ended, end) = std::sync::mpsc::channel::<()>();
    let _ = thread::Builder::new().name("seeding".into()).spawn(move || {
        let _ = end.recv_timeout(time);
        stopping.stop();
    });
    peer.wait();
}

pub(crate) fn ls(cx: &Context, glob: &str) -> Result<()> {
    let line = Line::to_known_peer(cx)?;
    line.ask(cx, &Request::List { glob: glob.to_owned() }, &mut |event| {
        if let (Event::Listing { rows }, false) = (event, cx.json) {
            show_listing(cx, rows, glob);
        }
    })
}

pub(crate) fn watch(cx: &Context, glob: &str) -> Result<()> {
    let line = Line::to_known_peer(cx)?;
    line.ask(cx, &Request::Watch { glob: glob.to_owned() }, &mut |event| match event {
        Event::Listing { rows } if !cx.json => show_listing(cx, rows, glob),
        Event::Change { what, row } => cx.say(&change(what, row)),
        _ => {}
    })?;
    if interrupt::happened() {
        return Err(Error::new(ErrorKind::Interrupted, ""));
    }
    Err(Error::new(ErrorKind::Other, "the potluck process has ended")
        .hint("potluck up, or watch again"))
}

fn show_listing(cx: &Context, rows: &[Row], glob: &str) {
    if !rows.is_empty() {
        listing(rows).print();
    } else if glob == "*" {
        cx.tell("nothing is shared yet (potluck share PATH)");
    } else {
        cx.tell(&format!("nothing shared has a name like {glob}"));
    }
}

fn listing(rows: &[Row]) -> Table {
    let mut table = Table::new(&["NAME", ">SIZE", ">COPIES", ">HOSTS", "BY", "ID"]);
    for row in rows {
        let name = row
            .name
            .as_deref()
            .map_or_else(|| "-".into(), |name| title(Some(name), row.version, &row.id));
        table.row([
            name,
            size(row.size),
            row.complete.to_string(),
            row.hosts.to_string(),
            row.publisher.as_deref().map_or_else(|| "-".into(), machine),
            content(&row.id),
        ]);
    }
    table
}

/// `+ llama-70b  131.4 GB  1 copy, 3 hosts`
pub(crate) fn change(what: &str, row: &Row) -> String {
    let mark = match what {
        "added" => style("+").green(),
        "removed" => style("-").red(),
        _ => style("~").yellow(),
    };
    format!(
        "{mark} {}  {}  {}, {}",
        title(row.name.as_deref(), row.version, &row.id),
        size(row.size),
        count(row.complete.into(), "copy", "copies"),
        count(row.hosts.into(), "host", "hosts"),
    )
}

pub(crate) fn find(cx: &Context, what: &str) -> Result<()> {
    let line = Line::to_known_peer(cx)?;
    line.ask(cx, &Request::Find { what: what.to_owned() }, &mut |event| {
        let Event::Found { id, name, version, publisher, size: bytes, hosts_in_all, hosts } = event
        else {
            return;
        };
        let by =
            publisher.as_deref().map_or_else(String::new, |who| format!("  by {}", machine(who)));
        cx.say(&format!("{}  {}{by}", title(name.as_deref(), *version, id), size(*bytes)));
        cx.say(&format!("  id: {}", plain(id)));
        if hosts.is_empty() {
            cx.say("  nobody hosts it at the moment");
        } else if !cx.json {
            let mut table = Table::new(&["MACHINE", "ADDRESS", ">HOLDS", ">BUSY"]);
            for host in hosts {
                let (held, load) = (permille(host.held), permille(host.load));
                table.row([machine(&host.peer), host.address.clone(), held, load]);
            }
            table.print();
            let more = hosts_in_all.saturating_sub(u32::try_from(hosts.len()).unwrap_or(u32::MAX));
            if more > 0 {
                cx.remark(&format!("and {}", count(more.into(), "other host", "other hosts")));
            }
        }
    })
}

/// A name or id goes as it is. What cannot be one is a path, and so is what the process does not
/// know by name where a file of that name lies here.
fn ask_about(
    cx: &Context,
    line: &Line,
    what: &str,
    request: impl Fn(String) -> Request,
    on: &mut dyn FnMut(&Event),
) -> Result<()> {
    let as_path = || -> Result<String> {
        let path = absolute(Path::new(what))?;
        path.into_os_string().into_string().map_err(|_| {
            Error::new(ErrorKind::Usage, "that path is not valid UTF-8")
                .hint("give its id: potluck status")
        })
    };
    if what.parse::<Query>().is_err() {
        return line.ask(cx, &request(as_path()?), on);
    }
    match line.ask(cx, &request(what.to_owned()), on) {
        Err(error) if error.kind == ErrorKind::NotFound && Path::new(what).exists() => {
            line.ask(cx, &request(as_path()?), on)
        }
        other => other,
    }
}

pub(crate) fn unshare(cx: &Context, what: &str) -> Result<()> {
    let line = Line::to_known_peer(cx)?;
    ask_about(cx, &line, what, |what| Request::Unshare { what }, &mut |event| {
        if let Event::Unshared { ids } = event {
            for id in ids {
                cx.say(&format!("no longer shared: {}", plain(id)));
            }
        }
    })
}

pub(crate) fn verify(cx: &Context, what: Option<&str>) -> Result<()> {
    let line = Line::to_known_peer(cx)?;
    let mut meter = Some(Meter::new(cx));
    let mut wrong = 0;
    let mut on = |event: &Event| match event {
        Event::Verifying { done, total } => {
            if let Some(meter) = &mut meter {
                meter.hashed("verifying", *done, *total);
            }
        }
        Event::Verified { good, bad } => {
            meter = None;
            wrong = bad.len();
            for content in bad {
                cx.say(&format!("WRONG  {}  {}", path(&content.path), plain(&content.why)));
                cx.say(&format!("  id: {}", plain(&content.id)));
            }
            let good = count(good.len() as u64, "content is", "contents are");
            cx.say(&format!("{good} what they should be").replace("is what they", "is what it"));
        }
        _ => {}
    };
    match what {
        Some(what) => {
            ask_about(cx, &line, what, |what| Request::Verify { what: Some(what) }, &mut on)?;
        }
        None => line.ask(cx, &Request::Verify { what: None }, &mut on)?,
    }
    if wrong == 0 {
        return Ok(());
    }
    let text =
        format!("{} not what it should be", count(wrong as u64, "content is", "contents are"));
    Err(Error::new(ErrorKind::Integrity, text)
        .hint("it is no longer served from here; potluck get --overwrite mends it from others"))
}

pub(crate) fn join(cx: &Context, invitation: &str, listen: &Listen) -> Result<()> {
    let invitation = match invitation {
        "-" => {
            let mut text = String::new();
            std::io::stdin()
                .take(INVITATION_LIMIT_BYTES)
                .read_to_string(&mut text)
                .map_err(|e| Error::io("cannot read the invitation from stdin", &e))?;
            args::checked_invitation(&text).map_err(|why| Error::new(ErrorKind::Usage, why))?
        }
        given => given.to_owned(),
    };
    let line = Line::to_peer(cx, listen)?;
    join_by(cx, &line, invitation)?;
    cx.remark("next: potluck ls · potluck get NAME · potluck share PATH");
    Ok(())
}

fn join_by(cx: &Context, line: &Line, invitation: String) -> Result<()> {
    line.ask(cx, &Request::Join { invitation }, &mut |event| {
        if let Event::Joined { network, peer, role } = event {
            let text = format!(
                "joined network {} as {} (may {})",
                machine(network),
                machine(peer),
                what_a_role_may(role)
            );
            cx.remark(&text);
        }
    })
}

/// What a machine calls itself, else its short id.
fn who(label: &str, peer: &str) -> String {
    if label.is_empty() { machine(peer) } else { plain(label) }
}

fn what_a_role_may(role: &str) -> String {
    match role {
        "read" => "fetch".into(),
        "publish" => "fetch and publish".into(),
        "admin" => "fetch, publish, invite and remove".into(),
        other => plain(other),
    }
}

pub(crate) fn leave(cx: &Context) -> Result<()> {
    Line::to_known_peer(cx)?.ask(cx, &Request::Leave, &mut |event| {
        if let Event::Left { network } = event {
            cx.say(&format!("left network {}; no file was deleted", machine(network)));
        }
    })
}

pub(crate) fn invite(cx: &Context, args: &Invite) -> Result<()> {
    let Invite { uses, valid, role } = args;
    let request = Request::Invite { uses: *uses, valid_s: valid.as_secs(), role: role.clone() };
    Line::to_authority(cx)?.ask(cx, &request, &mut |event| {
        if let Event::Invited { invite, id, uses, valid_s, role } = event {
            cx.remark(&format!(
                "good for {} within {}; they may {}\n\
                 on such a machine: potluck join INVITATION   (to undo it: potluck members rm \
                 invitation:{id})",
                count((*uses).into(), "machine", "machines"),
                span(Duration::from_secs(*valid_s)),
                what_a_role_may(role),
            ));
            cx.say(&plain(invite));
        }
    })
}

pub(crate) fn members(cx: &Context, what: Option<&MembersVerb>) -> Result<()> {
    let line = Line::to_authority(cx)?;
    let Some(MembersVerb::Rm { who }) = what else {
        return line.ask(cx, &Request::Members, &mut |event| {
            if let (Event::Members { members }, false) = (event, cx.json) {
                member_table(members).print();
            }
        });
    };
    line.ask(cx, &Request::RemoveMember { who: who.clone() }, &mut |event| {
        if let Event::Removed { count: removed } = event {
            cx.say(&format!("removed {}", count((*removed).into(), "machine", "machines")));
        }
    })
}

fn member_table(members: &[Member]) -> Table {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let ago = |seconds: u64| format!("{} ago", age(seconds));
    let mut table = Table::new(&["NAME", "MACHINE", "ROLE", "JOINED", "SEEN", "INVITATION"]);
    for member in members {
        table.row([
            member.label.clone(),
            machine(&member.peer),
            member.role.clone(),
            ago(now.as_secs().saturating_sub(member.joined)),
            member.silent_s.map_or_else(|| "-".into(), |silent| ago(silent.into())),
            member.invitation.clone(),
        ]);
    }
    table
}

pub(crate) fn peers(cx: &Context) -> Result<()> {
    Line::to_running_peer(cx)?.ask(cx, &Request::Peers, &mut |event| {
        let (Event::Peers { peers }, false) = (event, cx.json) else { return };
        if peers.is_empty() {
            cx.tell("no connections at the moment");
            return;
        }
        let mut table =
            Table::new(&["NAME", "MACHINE", "ADDRESS", "DIALLED", "FOR", ">SENT", ">RECEIVED"]);
        for peer in peers {
            table.row([
                peer.label.clone(),
                machine(&peer.peer),
                peer.address.clone(),
                if peer.dialled { "here" } else { "there" }.into(),
                age(peer.seconds),
                size(peer.sent),
                size(peer.received),
            ]);
        }
        table.print();
    })
}

pub(crate) fn limit(cx: &Context, up: Option<Limit>, down: Option<Limit>) -> Result<()> {
    let rate = |limit: Limit| limit.bytes_a_second().unwrap_or(0);
    let request = Request::Limit { up: up.map(rate), down: down.map(rate), keep: true };
    Line::to_running_peer(cx)?.ask(cx, &request, &mut |event| {
        if let Event::Limits { up, down } = event {
            cx.say(&limits(*up, *down));
        }
    })
}

pub(crate) fn status(cx: &Context, stats: bool) -> Result<()> {
    let index = Client::connect(&cx.socket(Role::Index))?.map(|index| index.pid());
    if let Some(pid) = index {
        cx.remark(&format!("a standing index runs (process {pid})"));
    }
    Line::to_running_peer(cx)?.ask(cx, &Request::Status, &mut |event| {
        if let (Event::Status(status), false) = (event, cx.json) {
            show_status(status);
            if stats {
                out("");
                stats_table(&status.stats).print();
            }
        }
    })
}

fn show_status(status: &Status) {
    out(&format!(
        "peer     {}  listens on {}, process {}, for {}",
        machine(&status.peer),
        plain(&status.listen),
        status.pid,
        age(status.seconds),
    ));
    out(&match &status.network {
        None => "network  none (potluck join INVITATION, or potluck share PATH)".into(),
        Some(network) => {
            let index = match (status.is_index, status.index_reachable) {
                (true, _) => "this machine is the index".into(),
                (_, true) => format!("index {} answers", plain(&status.index.join(", "))),
                _ => format!("index {} does NOT answer", plain(&status.index.join(", "))),
            };
            let role = status.role.as_deref().map_or_else(String::new, what_a_role_may);
            format!("network  {}  may {role}; {index}", machine(network))
        }
    });
    out(&format!("traffic  sent {}, received {}", size(status.sent), size(status.received)));
    if status.limit_up.is_some() || status.limit_down.is_some() {
        out(&format!("limits   {}", limits(status.limit_up, status.limit_down)));
    }
    if status.contents.is_empty() {
        return;
    }
    out("");
    let mut table = Table::new(&["NAME", ">SIZE", ">HERE", "STATE", "WHERE"]);
    for content in &status.contents {
        let here = content.have.saturating_mul(100).checked_div(content.size).unwrap_or(100);
        let state = match &content.note {
            Some(note) => format!("{}: {note}", content.state),
            None => content.state.clone(),
        };
        table.row([
            title(content.name.as_deref(), content.version, &content.id),
            size(content.size),
            format!("{here} %"),
            state,
            path(&content.path),
        ]);
    }
    table.print();
}

/// What happened, a line each: how often, how many bytes, how long, and how long for a GiB.
fn stats_table(stats: &Stats) -> Table {
    let mut table = Table::new(&["", ">COUNT", ">SIZE", ">SECONDS", ">S A GIB"]);
    let (fetched, served, time) = (&stats.fetched, &stats.served, &stats.seconds);
    let none = String::new;
    let counted = |table: &mut Table, what: &str, count: u64, bytes: Option<u64>| {
        table.row([what.into(), count.to_string(), bytes.map_or_else(none, size), none(), none()]);
    };
    let took = |table: &mut Table, what: &str, seconds: f64, bytes: u64| {
        let gib = bytes as f64 / f64::from(1 << 30);
        let each = if gib > 0.0 { format!("{:.3}", seconds / gib) } else { none() };
        table.row([what.into(), none(), none(), format!("{seconds:.3}"), each]);
    };
    counted(&mut table, "fetched", fetched.pieces, Some(fetched.bytes));
    counted(&mut table, "  duplicates", fetched.duplicates, Some(fetched.duplicate_bytes));
    for (what, count) in [
        ("  bad", fetched.bad),
        ("  failed to write", fetched.failed),
        ("  stalls of hosts", fetched.stalls),
        ("  stolen from them", fetched.steals),
        ("  retries", fetched.retries),
        ("  busy hosts", fetched.busy),
        ("  asked twice at the end", fetched.endgame),
        ("  grants declined", fetched.declined),
    ] {
        counted(&mut table, what, count, None);
    }
    for (what, seconds) in [
        ("  receive", time.receive),
        ("  open", time.open),
        ("  hash", time.hash),
        ("  write", time.write),
        ("  sync", time.sync),
        ("  wait", time.wait_to_receive),
    ] {
        took(&mut table, what, seconds, fetched.bytes);
    }
    counted(&mut table, "sent", served.pieces, Some(served.bytes));
    for (what, count) in [
        ("  turned away", served.busy),
        ("  granted", served.granted),
        ("  grants withdrawn", served.withdrawn),
        ("  cancelled or unreadable", served.unsent),
        ("  stuck connections", served.stuck),
    ] {
        counted(&mut table, what, count, None);
    }
    for (what, seconds) in [
        ("  read", time.read),
        ("  seal", time.seal),
        ("  send", time.send),
        ("  wait", time.wait_to_send),
    ] {
        took(&mut table, what, seconds, served.bytes);
    }
    took(&mut table, "other", time.other, fetched.bytes + served.bytes);
    table
}

pub(crate) fn down(cx: &Context, index: bool) -> Result<()> {
    let stopped_peer = daemon::stop(&cx.socket(Role::Peer), STOP_WAIT)?;
    let stopped_index = index && daemon::stop(&cx.socket(Role::Index), STOP_WAIT)?;
    if stopped_peer || stopped_index {
        cx.event(&Event::Stopping)?;
    } else {
        let text = format!("nothing runs for {}", cx.state.display());
        cx.event(&Event::Note { text: text.clone() })?;
        cx.remark(&text);
    }
    if stopped_peer {
        cx.say("stopped the peer");
    }
    if stopped_index {
        cx.say("stopped the index");
    }
    if !index && let Some(running) = Client::connect(&cx.socket(Role::Index))? {
        let pid = running.pid();
        cx.remark(&format!("a standing index runs on (process {pid}): potluck down --index"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(label: &str, bytes: u64) -> Source {
        Source { peer: "p".into(), label: label.into(), bytes }
    }

    #[test]
    fn a_fetch_ends_with_one_line_that_says_who_gave_how_much() {
        let sources = [source("alice", 39), source("bob\u{1b}[2J", 61)];
        assert_eq!(
            summary("film", 100, 2.0, &sources),
            "film  100 B in 2.0 s (50 B/s): 61 % from bob\\u{1b}[2J, 39 % from alice"
        );
        assert_eq!(summary("film", 100, 0.0, &[]), "film  100 B in 0 ms");
        let many: Vec<Source> = (0..6).map(|n| source("x", 100 - n)).collect();
        assert!(summary("film", 600, 1.0, &many).ends_with(" and 2 more"));
    }

    #[test]
    fn a_change_is_one_line_with_its_sign() {
        let row = Row {
            id: "ab".repeat(32),
            name: Some("game".into()),
            version: Some(2),
            size: 1_500_000,
            hosts: 3,
            complete: 1,
            publisher: None,
        };
        let line = |what| console::strip_ansi_codes(&change(what, &row)).into_owned();
        assert_eq!(line("added"), "+ game@2  1.5 MB  1 copy, 3 hosts");
        assert!(line("changed").starts_with("~ ") && line("removed").starts_with("- "));
    }
}
