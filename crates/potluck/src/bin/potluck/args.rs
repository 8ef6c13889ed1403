//! Owns the command line's words: verbs, options, defaults and the help that a person learns from.
//! Never does what they say.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use clap_complete::Shell;
use potluck_core::id::Query;
use potluck_core::limit::Limit as Rate;
use potluck_core::trust::Invitation;

/// What `potluck` alone prints.
pub(crate) const OVERVIEW: &str = "\
potluck sends a file or folder to every machine you own or trust. Whoever takes
a copy serves it to the others: sending to many takes hardly longer than to one.

To begin with:
  potluck demo                  see it work, on this machine alone, in seconds
  potluck share PATH            share a file or folder; prints a code
  potluck get CODE              on another machine: fetch it by that code

Further:
  potluck ls                    what there is           (potluck get NAME)
  potluck status                what this machine does  (potluck down stops it)
  potluck index                 a network that stands: one index, many machines

  potluck help                  all verbs
  potluck help VERB             one verb, with examples
";

/// What `potluck help exit-codes` says.
pub(crate) const EXIT_CODES: &str = "\
How potluck ends, for scripts:

    0  done
    1  failed otherwise; the message says why
    2  the command was not understood
    3  not found: no such content, name, file or machine (or nothing runs)
    4  refused: this machine is not a member, or may not do this
    5  no peer has what is missing (after --timeout)
    6  the index does not answer
    7  integrity: bytes are not what they should be
    8  the disk is full, or too small
    9  partly done
   10  exists already: a file at the target, or the name
  130  interrupted (Ctrl-C); the same command goes on where it stopped

With --json a failure is also the last line on stdout:
  {\"v\":1,\"event\":\"failed\",\"code\":3,\"error\":\"…\",\"hint\":\"…\"}";

const ROOT_EXAMPLES: &str = "\
Examples:
  potluck share ./llama-70b              share a folder, and print a code
  potluck get potluck1…@10.0.0.5:7700    fetch it on another machine
  potluck get llama-70b                  fetch by name, once joined

Results go to stdout, progress to stderr. Settings come from the flag, else
from POTLUCK_STATE, POTLUCK_LISTEN, POTLUCK_LABEL, POTLUCK_LIMIT_UP and
POTLUCK_LIMIT_DOWN, else the default.
Exit codes: potluck help exit-codes";

/// Send big files and folders to every machine you own or trust
///
/// One machine keeps the index, every other is a peer. Whoever takes a copy serves it to the others
/// from its first verified piece on. Only members of your network can see or fetch anything, and
/// every byte is checked against its hash.
#[derive(Debug, Parser)]
#[command(
    name = "potluck",
    version,
    max_term_width = 80,
    after_help = ROOT_EXAMPLES,
    disable_help_subcommand = false,
    subcommand_value_name = "VERB",
    subcommand_help_heading = "Verbs"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) verb: Option<Verb>,
}

/// Options of every verb.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Common {
    /// Folder of this machine's key, memberships and records
    ///
    /// One peer runs for each such folder. [default: $XDG_STATE_HOME/potluck, else
    /// ~/.local/state/potluck]
    #[arg(long, global = true, env = "POTLUCK_STATE", hide_env_values = true, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Print events as JSON on stdout, one object a line
    ///
    /// Every line has "v":1 and "event"; the last one is the result, or "failed". [default: text
    /// for people]
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say less: no progress, no remarks, results only [default: off]
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Say more; twice: everything (for peers and indexes in the foreground) [default: off]
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

/// Options of verbs that may start a peer.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "When this starts the peer")]
pub(crate) struct Listen {
    /// Where the peer serves other peers (TCP)
    ///
    /// A port alone means all addresses. [default: 7701, or any free port]
    #[arg(long, env = "POTLUCK_LISTEN", hide_env_values = true, value_name = "ADDR:PORT",
          value_parser = address)]
    pub(crate) listen: Option<SocketAddr>,
    /// What others see this machine called [default: its host name]
    #[arg(long, env = "POTLUCK_LABEL", hide_env_values = true, value_name = "NAME")]
    pub(crate) label: Option<String>,
    /// The host (and port) by which others reach this machine
    ///
    /// Needed only where an address in an invitation would be wrong, such as behind port
    /// forwarding. [default: the address others see]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) advertise: Option<String>,
    /// How fast the peer may send, all transfers together (20MB, 500k, 1MiB, 1Mbit)
    ///
    /// A second, and while that peer runs; a peer that runs already keeps to it from now on.
    /// [default: as potluck limit was told, else off]
    #[arg(long, env = "POTLUCK_LIMIT_UP", hide_env_values = true, value_name = "RATE")]
    pub(crate) limit_up: Option<Rate>,
    /// How fast the peer may receive, likewise
    ///
    /// [default: as potluck limit was told, else off]
    #[arg(long, env = "POTLUCK_LIMIT_DOWN", hide_env_values = true, value_name = "RATE")]
    pub(crate) limit_down: Option<Rate>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Share a file or folder
    ///
    /// Nothing is copied: the file is hashed and served from where it is. The work is handed to
    /// the peer process of this machine, which goes on serving it; where none runs, one is started
    /// in the background. Where no network was joined, this machine becomes its own index, and a
    /// code is printed that another machine can fetch with.
    #[command(
        visible_alias = "send",
        after_help = "\
Examples:
  potluck share ./llama-70b              share a folder under its own name
  potluck share build.tar --name nightly a new version of the name each time
  potluck share film.mkv --foreground    serve it until Ctrl-C"
    )]
    Share(Share),
    /// Fetch a file or folder, and serve it on
    ///
    /// It comes from as many machines as have any of it, every piece is checked before it is
    /// written, and pieces that are here are served to others at once. Stopped by anything (Ctrl-C,
    /// a crash, a full disk), the same command goes on where it was. Prints the path.
    #[command(
        visible_alias = "recv",
        after_help = "\
Examples:
  potluck get potluck1…@10.0.0.5:7700    join by a code and fetch what it is for
  potluck get llama-70b -o /models/      by name, into a folder
  potluck get nightly@3 --overwrite      a version, replacing what is there"
    )]
    Get(Get),
    /// List what the network has
    ///
    /// COPIES counts machines that have all of it, HOSTS those that have any.
    #[command(after_help = "\
Examples:
  potluck ls
  potluck ls 'llama*'                    names that match
  potluck ls --watch                     and then every change")]
    Ls {
        /// Which names: * any run, ? any character
        #[arg(default_value = "*")]
        glob: String,
        /// Stay, and print changes as they happen (as potluck watch) [default: off]
        #[arg(long)]
        watch: bool,
    },
    /// Show which machines have a file or folder
    #[command(
        visible_alias = "search",
        after_help = "\
Examples:
  potluck find llama-70b
  potluck find nightly@3 --json          for scripts"
    )]
    Find {
        /// A name, name@version or id
        #[arg(value_parser = query)]
        what: String,
    },
    /// Show the listing, then changes as they happen
    ///
    /// A line for each change: + added, ~ changed, - removed. Ends with Ctrl-C.
    #[command(after_help = "\
Examples:
  potluck watch
  potluck watch 'nightly*' --json        one JSON object a change")]
    Watch {
        /// Which names: * any run, ? any character
        #[arg(default_value = "*")]
        glob: String,
    },
    /// Stop sharing (no file is deleted)
    #[command(
        visible_alias = "rm",
        after_help = "\
Examples:
  potluck unshare llama-70b              by name
  potluck unshare ./llama-70b            by path"
    )]
    Unshare {
        /// A name, id or path
        what: String,
    },
    /// Show what this machine shares and fetches
    ///
    /// Starts nothing: where no peer runs it says so and ends with exit code 3.
    #[command(after_help = "\
Examples:
  potluck status
  potluck status --stats                 and what happened since it began
  potluck status --json                  for scripts")]
    Status {
        /// Say what happened since the peer began: counts, and where the time went [default: off]
        ///
        /// With --json it is there in any case.
        #[arg(long)]
        stats: bool,
    },
    /// Show connections to other machines, and what went over them
    ///
    /// Starts nothing: where no peer runs it says so and ends with exit code 3.
    #[command(after_help = "\
Example:
  potluck peers")]
    Peers,
    /// Show or change how fast this machine sends and receives
    ///
    /// For all transfers together, from now on, and remembered for the next start. Counted is what
    /// goes over the sockets: the pieces, and what encryption adds (under 1 %). RATE is bytes a
    /// second: k, M and G are thousands (20MB), KiB, MiB and GiB 1024; kbit, Mbit and Gbit are
    /// eighths (1Mbit). 16 kB is the least. Starts nothing: where no peer runs it says so and ends
    /// with exit code 3.
    #[command(after_help = "\
Examples:
  potluck limit                          show the limits
  potluck limit --up 20MB --down off
  potluck limit --up 1.5Mbit")]
    Limit {
        /// How fast it may send, or off [default: as it is]
        #[arg(long, value_name = "RATE")]
        up: Option<Rate>,
        /// How fast it may receive, or off [default: as it is]
        #[arg(long, value_name = "RATE")]
        down: Option<Rate>,
    },
    /// Check what this machine shares against its hashes
    ///
    /// Reads every byte again. A piece that is wrong is served no more, and the exit code is 7.
    #[command(after_help = "\
Examples:
  potluck verify                         all of it
  potluck verify llama-70b               one content")]
    Verify {
        /// A name, id or path [default: everything]
        what: Option<String>,
    },
    /// Join a network by an invitation
    ///
    /// Once for each machine. A peer is started in the background where none runs, so that the
    /// membership is kept up.
    #[command(after_help = "\
Examples:
  potluck join potluck1…@10.0.0.5:7700
  potluck join - < invitation.txt        read it from stdin, not from the command")]
    Join {
        /// potluck1…@host:port, or - to read it from stdin
        #[arg(value_name = "INVITATION", value_parser = invitation)]
        invitation: String,
        #[command(flatten)]
        listen: Listen,
    },
    /// Forget the network (no file is deleted)
    #[command(after_help = "\
Example:
  potluck leave")]
    Leave,
    /// Make an invitation to the network
    ///
    /// On the index's machine, or on a member's that is an admin. Prints the invitation alone on
    /// stdout.
    #[command(after_help = "\
Examples:
  potluck invite                         one machine, within 24 hours
  potluck invite --uses 40 --valid 7d    for a whole lab
  potluck invite --role read             it may fetch, but not publish")]
    Invite(Invite),
    /// List the machines of the network, or remove one
    ///
    /// On the index's machine, or on a member's that is an admin.
    #[command(
        after_help = "\
Examples:
  potluck members
  potluck members rm bob                 by name or id; it is out at once
  potluck members rm invitation:4f2a…    all who joined by one invitation",
        args_conflicts_with_subcommands = true
    )]
    Members {
        #[command(subcommand)]
        what: Option<MembersVerb>,
    },
    /// Run a standing index: where the machines of a network find each other
    ///
    /// It keeps who has what; the files go from machine to machine and never over it. It runs until
    /// Ctrl-C or potluck down --index, and prints an invitation for your machines. On a terminal it
    /// shows how it is, second by second.
    ///
    /// --metrics ADDR:PORT serves /metrics (for Prometheus), /healthz and /readyz by HTTP to whoever
    /// reaches that address: counts, never a name or an id.
    ///
    /// --config FILE sets limits, and is read again at SIGHUP; a file with anything wrong in it is
    /// refused, and what was set holds on. Lines `name = value`, all of them optional: members,
    /// contents, registrations, registrations_a_member, names, versions, versions_a_publisher,
    /// watchers, sessions_a_member, requests_a_second (of one member, twice as many at once; who asks
    /// faster is told to slow down, and what it sends is passed over unread), memory = "1GiB" (reckoned;
    /// from there on nothing more is taken), log = "info" (as POTLUCK_LOG). What is given on the command
    /// line, --workers too, holds until the index is started anew.
    #[command(after_help = "\
Examples:
  potluck index
  potluck index --listen 0.0.0.0:7700 --advertise potluck.example.org:7700
  potluck index --metrics 9700 --config /etc/potluck/index.toml
  potluck index --json --listen 127.0.0.1:0    any free port, for scripts")]
    Index(Index),
    /// Run the peer in the foreground (services, containers)
    ///
    /// The other verbs start a peer in the background when they need one; where a supervisor should
    /// own it, this does. It runs until Ctrl-C, SIGTERM or potluck down.
    #[command(after_help = "\
Examples:
  potluck up
  potluck up --json --listen 0.0.0.0:7701 --state /var/lib/potluck")]
    Up(Up),
    /// Stop the peer of this machine, and wait until it is gone
    ///
    /// What is being fetched is kept and goes on with the next potluck up or potluck get. Where
    /// nothing runs it says so; that is no failure.
    #[command(after_help = "\
Examples:
  potluck down
  potluck down --index                   stop a standing index as well")]
    Down {
        /// Stop a standing index of the same state folder as well [default: the peer alone]
        #[arg(long)]
        index: bool,
    },
    /// See it work: an index and four peers, on this machine alone
    ///
    /// Shares a file and a folder, fetches them on several peers at once, stops the first and
    /// fetches from the others, and compares every byte. Everything is in a temporary folder and
    /// gone afterwards.
    #[command(after_help = "\
Examples:
  potluck demo                           with made-up data
  potluck demo ./photos                  with your own (nothing leaves this machine)")]
    Demo {
        /// A file or folder to try it with [default: 64 MiB and a small folder, made up]
        path: Option<PathBuf>,
    },
    /// Print completions for a shell
    #[command(after_help = "\
Examples:
  potluck completions bash > ~/.local/share/bash-completion/completions/potluck
  potluck completions zsh > ~/.zfunc/_potluck
  potluck completions fish > ~/.config/fish/completions/potluck.fish")]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// What each exit code means
    #[command(hide = true, override_help = EXIT_CODES)]
    ExitCodes,
}

#[derive(Debug, Args)]
pub(crate) struct Share {
    /// The file or folder
    pub(crate) path: PathBuf,
    /// The name to share it under
    ///
    /// Sharing under a name of yours again makes its next version. [default: the file's own name,
    /// unless somebody else has that name]
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub(crate) name: Option<String>,
    /// Serve from this process until Ctrl-C, not in the background [default: off]
    #[arg(long)]
    pub(crate) foreground: bool,
    #[command(flatten)]
    pub(crate) listen: Listen,
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// A name, name@version, id, or a code (potluck1…@host:port)
    #[arg(value_parser = query_or_invitation)]
    pub(crate) what: String,
    /// The file or folder to make, or a folder to put it in
    ///
    /// [default: the current folder, under the content's name]
    #[arg(short, long, value_name = "PATH")]
    pub(crate) output: Option<PathBuf>,
    /// Where the target exists: replace it, once the new one is complete [default: refuse]
    #[arg(long, group = "exists")]
    pub(crate) overwrite: bool,
    /// Where the target exists: take the first free "NAME (2)", "NAME (3)" … [default: refuse]
    #[arg(long, group = "exists")]
    pub(crate) rename: bool,
    /// Where the target exists: leave it and report success [default: refuse]
    #[arg(long, group = "exists")]
    pub(crate) skip: bool,
    /// Give up after so long without any machine to fetch from
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// Fetch in this process and end when it is complete, with no peer left in the background
    /// [default: off]
    #[arg(long)]
    pub(crate) foreground: bool,
    /// With --foreground: serve it to others for so long afterwards
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration,
          requires = "foreground")]
    pub(crate) seed: Duration,
    /// At the end, say what happened on the way: counts, and where the time went [default: off]
    ///
    /// On stderr, as a table; with --json it is in the event "done" in any case.
    #[arg(long)]
    pub(crate) stats: bool,
    #[command(flatten)]
    pub(crate) listen: Listen,
}

#[derive(Debug, Args)]
pub(crate) struct Invite {
    /// How many machines may join by it
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) uses: u32,
    /// For how long (30m, 24h, 7d)
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub(crate) valid: Duration,
    /// What those who join may do: fetch, also publish, or also invite and remove
    #[arg(long, default_value = "publish", value_parser = ["read", "publish", "admin"])]
    pub(crate) role: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MembersVerb {
    /// Remove a machine, or all who joined by one invitation
    ///
    /// It is out with its next word to the index, and other machines cut it off within seconds.
    #[command(after_help = "\
Examples:
  potluck members rm bob
  potluck members rm invitation:4f2a91c07d3b5e68")]
    Rm {
        /// A machine's name or id (or its first characters), or invitation:ID
        who: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Index {
    /// Where it listens, UDP and TCP; a port alone means all addresses [default: 7700]
    #[arg(long, env = "POTLUCK_LISTEN", hide_env_values = true, value_name = "ADDR:PORT",
          value_parser = address)]
    pub(crate) listen: Option<SocketAddr>,
    /// The host and port that invitations name
    ///
    /// Needed where others reach this machine by another address than it knows. [default: its own
    /// address and port]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
    /// How many machines may join by the invitation it prints
    #[arg(long, value_name = "N", default_value_t = 50,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) uses: u32,
    /// For how long that invitation is good
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub(crate) valid: Duration,
    /// Threads that answer datagrams [default: one for each core, at most 4]
    ///
    /// They are started with the index: another number takes a restart, SIGHUP does not change it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) workers: Option<u16>,
    /// Where machines read how it is, by HTTP; a port alone means this machine only [default: nowhere]
    #[arg(long, value_name = "ADDR:PORT", value_parser = own_address)]
    pub(crate) metrics: Option<SocketAddr>,
    /// A file with limits, read again at SIGHUP [default: none]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Seconds between the reports of its members: short ones are for trying what a loss does.
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 25,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) heartbeat: u16,
    /// End when stdin ends: so that whoever started it takes it along.
    #[arg(long, hide = true)]
    pub(crate) leash: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub(crate) listen: Listen,
    /// How the other verbs start it in the background.
    #[arg(long, hide = true)]
    pub(crate) detach: bool,
    /// End when stdin ends: so that whoever started it takes it along.
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub(crate) leash: bool,
}

/// Whether `what` is meant as an invitation and not as a name.
pub(crate) fn is_invitation(what: &str) -> bool {
    what.starts_with("potluck1") && what.contains('@')
}

fn invitation(text: &str) -> Result<String, String> {
    if text == "-" {
        return Ok(text.to_owned());
    }
    checked_invitation(text)
}

/// The invitation without blanks around it, if it is whole.
pub(crate) fn checked_invitation(text: &str) -> Result<String, String> {
    let text = text.trim();
    text.parse::<Invitation>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn query(text: &str) -> Result<String, String> {
    text.parse::<Query>().map(|query| query.to_string()).map_err(|error| error.to_string())
}

fn query_or_invitation(text: &str) -> Result<String, String> {
    if is_invitation(text.trim()) { checked_invitation(text) } else { query(text) }
}

fn name(text: &str) -> Result<String, String> {
    text.parse::<potluck_core::id::Name>()
        .map(|name| name.to_string())
        .map_err(|error| error.to_string())
}

fn address(text: &str) -> Result<SocketAddr, String> {
    address_or_port(text, [0, 0, 0, 0])
}

/// Where a port alone is one of this machine only.
fn own_address(text: &str) -> Result<SocketAddr, String> {
    address_or_port(text, [127, 0, 0, 1])
}

fn address_or_port(text: &str, alone: [u8; 4]) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').unwrap_or(text).parse::<u16>();
    port.map(|port| SocketAddr::from((alone, port)))
        .or_else(|_| text.parse())
        .map_err(|_| "an address looks like 0.0.0.0:7700 or [::]:7700, or is a port alone".into())
}

/// `30s`, `10m`, `24h`, `7d`, `1h30m`; a number alone is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a time looks like 30s, 10m, 24h, 7d or 1h30m".to_owned();
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let (mut seconds, mut rest) = (0_u64, text);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = rest[digits..].chars().next().ok_or_else(wrong)?;
        let each = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(wrong()),
        };
        seconds =
            number.checked_mul(each).and_then(|n| seconds.checked_add(n)).ok_or_else(wrong)?;
        rest = &rest[digits + unit.len_utf8()..];
    }
    if text.is_empty() { Err(wrong()) } else { Ok(Duration::from_secs(seconds)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        let seconds = |text| duration(text).map(|d| d.as_secs()).ok();
        assert_eq!(seconds("30s"), Some(30));
        assert_eq!(seconds("1h30m"), Some(5400));
        assert_eq!(seconds("7d"), Some(604_800));
        assert_eq!(seconds("45"), Some(45));
        for bad in [
            "",
            "s",
            "10x",
            "10m5",
            "-3s",
            "1 h",
            "99999999999999999999s",
            "9999999999999999d",
            "1é",
        ] {
            assert_eq!(seconds(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_address_may_be_a_port_alone() {
        let read = |text| address(text).map(|a| a.to_string()).ok();
        assert_eq!(read("7700").as_deref(), Some("0.0.0.0:7700"));
        assert_eq!(read(":7700").as_deref(), Some("0.0.0.0:7700"));
        assert_eq!(read("[::]:0").as_deref(), Some("[::]:0"));
        assert_eq!(read("localhost"), None);
        assert_eq!(own_address("9700"), Ok(SocketAddr::from(([127, 0, 0, 1], 9700))));
        assert_eq!(own_address("0.0.0.0:9700"), address("9700"));
    }
}
