//! Owns what the project's own measurements and tests need beyond the public face: a member's session
//! without a peer around it, a desk without an index behind it. No part of the interface: it may change
//! at any time, and programs never use it.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use potluck_core::registrar::Caller;
use potluck_core::trust::{Invitation, MachineKey, join_tag};
use potluck_core::wire::desk::{Answer, Ask, Join, Session};

use crate::desk::{self, Expect};
use crate::error::Result;

/// How long each of the two questions may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Joins the network of `invitation` as the machine that holds `key`, and fetches keys for speaking
/// UDP to its index. Returns them and the address of the index that gave them.
///
/// # Errors
/// As joining: `Refused`, `IndexUnreachable`.
pub fn session(key: &MachineKey, invitation: &Invitation) -> Result<(Session, SocketAddr)> {
    let label = String::from("measurement");
    let join = |exporter: &[u8; 32], _| {
        let tag = join_tag(&invitation.secret, exporter, key.peer());
        Ask::Join(Join { invitation: invitation.id(), tag, label: label.clone() })
    };
    let whose = Expect::Hash(invitation.network_hash);
    let (network, answer, _) = desk::ask(key, &invitation.index, whose, join, PATIENCE)?;
    let certificate = match answer {
        Answer::Welcome(certificate) => Some(*certificate),
        other => return Err(refused(&other)),
    };
    let question = Ask::Session { label, revocations: 0, certificate };
    let whose = Expect::Pinned(network);
    match desk::ask(key, &invitation.index, whose, |_, _| question, PATIENCE)? {
        (_, Answer::Session(session), from) => Ok((*session, from)),
        (_, other, _) => Err(refused(&other)),
    }
}

/// Serves a desk at `listener` under an index's `key`; `handle` answers what it likes, or hangs up
/// (`None`). It closes when what is returned is dropped.
///
/// # Errors
/// The system gives no thread or descriptor.
pub fn serve_desk(
    listener: TcpListener,
    key: Arc<MachineKey>,
    handle: impl Fn(Caller, Ask) -> Option<Answer> + Send + Sync + 'static,
) -> Result<impl Send> {
    desk::serve(listener, key, handle)
}

fn refused(answer: &Answer) -> crate::Error {
    match answer {
        Answer::Refused(refusal) => desk::refused(refusal),
        _ => desk::unexpected(),
    }
}
