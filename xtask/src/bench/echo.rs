//! Owns the yardstick of an index: a process that opens each request and sends it back sealed, one
//! datagram at a time, and thinks nothing. Nobody who authenticates and encrypts can do less.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;

use anyhow::{Context, Result};
use potluck_core::id::{MemberNumber, NetworkId};
use potluck_core::seal::{EpochSecret, ReplyHead, RequestHead, SessionKeys, open, seal_reply};
use potluck_core::wire::datagram::MAX_DATAGRAM;

use crate::proc::{self, Running};

/// The session of every member with the echo.
pub(super) fn session(member: MemberNumber) -> SessionKeys {
    EpochSecret([7; 32]).session(NetworkId([8; 32]), member, 0)
}

/// Starts an echo on a core of its own; where it listens.
pub(super) fn start(core: usize) -> Result<(Running, SocketAddr)> {
    let mut command = proc::on_core(Some(core), &std::env::current_exe()?);
    command.arg("echo").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Running(command.spawn().context("cannot run the echo")?);
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().context("it has no stdout")?).read_line(&mut line)?;
    let address = line.trim().parse().with_context(|| format!("the echo said {line:?}"))?;
    Ok((child, address))
}

/// The echo itself: says where it listens, and ends with its stdin.
pub(crate) fn serve() -> Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 8 << 20)?;
    println!("{}", socket.local_addr()?);
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut vec![]);
        std::process::exit(0);
    });
    let mut keys: HashMap<MemberNumber, ([u8; 16], [u8; 16])> = HashMap::new();
    let mut buffer = [0; MAX_DATAGRAM + 1];
    for counter in 0.. {
        let (len, from) = socket.recv_from(&mut buffer)?;
        let Ok(head) = RequestHead::decode(&buffer[..len]) else { continue };
        let RequestHead { epoch, member, salt, .. } = head;
        let (to_index, from_index) = keys.entry(member).or_insert_with(|| {
            let keys = session(member);
            (keys.to_index, keys.reply_key(0))
        });
        let Some(plaintext) = open(to_index, head.counter, &mut buffer[..len]) else { continue };
        let head = ReplyHead {
            kind: b'A',
            epoch,
            member,
            salt,
            counter,
            boot: 0,
            revocations: 0,
            flags: 0,
        };
        socket.send_to(&seal_reply(from_index, &head, plaintext), from)?;
    }
    Ok(())
}
