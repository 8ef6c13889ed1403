//! Owns the yardsticks of an index: processes that take datagrams in batches and send back as many
//! bytes as an index would, opened and sealed or bare, and think nothing. Nobody who authenticates and
//! encrypts can do less than the first; nobody who answers can do less than the second.

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;

use anyhow::{Context, Result};
use potluck_core::id::{MemberNumber, NetworkId};
use potluck_core::seal::{EpochSecret, ReplyHead, RequestHead, SessionKeys, open, seal_in_place};
use potluck_core::wire::datagram::{HEAD_BYTES, TAG_BYTES};

use super::storm::Batches;
use crate::proc::{self, Running};

/// What an echo is told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Bytes of a reply to an R, an S and an O, all in all
    #[arg(long, num_args = 3)]
    sizes: Vec<usize>,
    /// Send back what came, neither opened nor sealed
    #[arg(long)]
    bare: bool,
    /// How many sessions there are
    #[arg(long)]
    sessions: u32,
}

/// The session of every member with the echo.
pub(super) fn session(member: MemberNumber) -> SessionKeys {
    EpochSecret([7; 32]).session(NetworkId([8; 32]), member, 0)
}

/// Starts an echo on a core of its own; where it listens.
pub(super) fn start(
    core: usize,
    bare: bool,
    sizes: [usize; 3],
    sessions: u32,
) -> Result<(Running, SocketAddr)> {
    let mut command = proc::on_core(Some(core), &std::env::current_exe()?);
    command.args(["echo", "--sessions", &sessions.to_string(), "--sizes"]);
    command.args(sizes.map(|size| size.to_string()));
    if bare {
        command.arg("--bare");
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Running(command.spawn().context("cannot run the echo")?);
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().context("it has no stdout")?).read_line(&mut line)?;
    let address = line.trim().parse().with_context(|| format!("the echo said {line:?}"))?;
    Ok((child, address))
}

/// The echo itself: says where it listens, and ends with its stdin.
pub(crate) fn serve(args: &Args) -> Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    println!("{}", socket.local_addr()?);
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut vec![]);
        std::process::exit(0);
    });
    let keys = |number| {
        let keys = session(MemberNumber(number));
        (keys.to_index, keys.reply_key(0))
    };
    let keys: Vec<([u8; 16], [u8; 16])> = (0..args.sessions).map(keys).collect();
    let mut batches = Batches::new(socket)?;
    let (mut bytes, mut all, mut counter): (Vec<u8>, Vec<_>, u64) = (vec![], vec![], 0);
    loop {
        batches.take(true)?;
        bytes.clear();
        all.clear();
        for (from, datagram) in batches.taken() {
            let start = bytes.len();
            let Ok(head) = RequestHead::decode(datagram) else { continue };
            let RequestHead { kind, epoch, member, salt, .. } = head;
            let size = args.sizes[b"RSO".iter().position(|k| *k == kind).unwrap_or(0)];
            let (to_index, reply) = &keys[member.0 as usize % keys.len()];
            if args.bare {
                bytes.extend_from_slice(&datagram[..HEAD_BYTES + 8]);
                bytes.resize(start + size, 0);
            } else {
                let Some(plaintext) = open(to_index, head.counter, datagram) else { continue };
                counter += 1;
                let (boot, revocations, flags) = (0, 0, 0);
                ReplyHead { kind: b'A', epoch, member, salt, counter, boot, revocations, flags }
                    .encode(&mut bytes);
                let most = size - HEAD_BYTES - TAG_BYTES;
                bytes.extend_from_slice(&plaintext[..plaintext.len().min(most)]);
                bytes.resize(start + size, 0);
                seal_in_place(reply, counter, &mut bytes[start..]);
            }
            all.push((from, start..bytes.len()));
        }
        batches.give(all.iter().map(|(to, range)| (*to, &bytes[range.clone()])))?;
    }
}
