//! Owns what must hold of a connection whatever the other side says: it does not panic, and what it
//! remembers stays within its limits. Fuzzing and the replay of the corpus run it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, RwLock};

use potluck_core::bitfield::Bitfield;
use potluck_core::id::{MemberNumber, Piece};
use potluck_core::trust::{Certificate, MachineKey, Role};
use potluck_core::wire::stream::{Channel, Frame, Side};

use super::gather::{Gather, Listener};
use super::incoming::opened;
use super::session::Session;
use super::{Command, Connection, Context, Identity};
use crate::clock;
use crate::store::Replica;

/// A member that is up says and makes us say what `script` has: a byte that chooses, a length, and so
/// many bytes of frames; or commands, as an engine would give them. `whole` is shared here, `growing`
/// is fetched.
pub(crate) fn connection(script: &[u8], whole: &Arc<Replica>, growing: &Arc<Replica>) {
    let (index, key, other) = ([1; 32], [2; 32], [3; 32]);
    let (index, key) = (MachineKey::from_seed(index), Arc::new(MachineKey::from_seed(key)));
    let other = MachineKey::from_seed(other).peer();
    let certificate =
        |peer| Certificate::issue(&index, peer, MemberNumber(7), Role::Publish, "x", clock::wall());
    let identity = Identity {
        network: index.network(),
        certificate: certificate(key.peer()),
        revoked: [].into(),
    };
    let (send, events) = crossbeam_channel::unbounded();
    let identity = Arc::new(RwLock::new(Some(Arc::new(identity))));
    let ctx = Arc::new(Context::new(key, identity, send).expect("the algorithms are there"));
    let (mailbox, handle) = Connection::new().expect("a descriptor");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let get = Box::new(move || Some(handle));
    let mut session = Session::new(&ctx, ctx.number(), address, false, mailbox, get);
    let mut gather = Gather::new();
    let _ = session.on_secure(other);
    let hello = certificate(other).encode();
    if session.on_frame(Frame::Hello { certificate: &hello, port: 1 }).is_err() {
        panic!("a member is believed");
    }
    let mut script = script;
    while let [choice, length, rest @ ..] = script {
        let (bytes, rest) = rest.split_at(rest.len().min((*length).into()));
        script = rest;
        let number = u16::from(bytes.first().copied().unwrap_or_default() % 4);
        let pieces = || bytes.iter().map(|byte| Piece(u32::from(byte % 4))).collect::<Vec<_>>();
        let side = if choice & 1 == 0 { Side::Us } else { Side::Them };
        let channel = Channel { number, opener: side };
        let replica = if choice & 1 == 0 { whole } else { growing };
        let done = match choice >> 1 {
            0..=63 => {
                // A frame, its length told right.
                let mut framed = (bytes.len() as u32).to_be_bytes().to_vec();
                framed.extend_from_slice(bytes);
                gather.take(&mut opened(&framed), &mut session)
            }
            64..=71 => gather.take(&mut opened(bytes), &mut session),
            72..=79 => session.on_command(Command::Open { channel: number, id: growing.id() }),
            80..=87 => {
                session.on_command(Command::Admit { channel: number, replica: whole.clone() })
            }
            88..=91 => {
                session.on_command(Command::Attach { channel: number, replica: replica.clone() })
            }
            92..=97 => session.on_command(Command::Want { channel: number, pieces: pieces() }),
            98..=101 => session.on_command(Command::Cancel { channel: number, pieces: pieces() }),
            102..=105 => session.on_command(Command::WantMeta { channel: number }),
            106..=109 => session.on_command(Command::Close { channel }),
            110..=113 => session.on_command(Command::Refuse { channel: number }),
            114..=117 => {
                session.on_command(Command::Busy { channel: number, pieces: pieces(), wait_ms: 1 })
            }
            118..=121 => session.on_command(Command::Have { channel, bitfield: Bitfield::all(3) }),
            122..=124 => session.on_command(Command::HaveMore { channel, pieces: pieces() }),
            _ => {
                session.on_command(Command::Serve { channel: number, piece: Piece(number.into()) })
            }
        };
        session.check();
        if done.and_then(|()| session.hand_over()).is_err() {
            break;
        }
        while events.try_recv().is_ok() {}
    }
}
