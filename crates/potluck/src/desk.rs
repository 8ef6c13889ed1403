//! Owns the way to the index's desk and the desk's side of it: one TLS connection, one question, one
//! answer, all of it within a few seconds. Never decides what the answer is.

use std::io::{self, ErrorKind as Io, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use potluck_core::id::{NetworkId, PeerId};
pub(crate) use potluck_core::registrar::Caller;
use potluck_core::time::Moment;
use potluck_core::trust::MachineKey;
use potluck_core::wire::desk::{Answer, Ask, DeskCode, DeskRefusal, MAX_FRAME};
use rustls::{
    ClientConnection, ConnectionCommon, ServerConfig, ServerConnection, SideData, Stream,
};

use zeroize::Zeroizing;

use crate::door::{Door, Pass, Timed, time_left};
use crate::error::{Error, ErrorKind, Result};
use crate::{clock, tls};

/// The label under which TLS exports what a join is bound to (RFC 8446 §7.5); no context.
const EXPORTER: &[u8] = b"EXPORTER-potluck-join-v1";
/// A caller has said who it is, asked and taken its answer within this.
const VISIT: Duration = Duration::from_secs(5);
/// Callers that have not asked yet; for one more, the oldest is sent away.
const MAX_IN_DOOR: usize = 32;
/// Questions being answered; one more is hung up on.
const MAX_AT_DESK: usize = 32;
/// The longest question: strangers may send that much.
const MAX_ASK: usize = 1_024;

/// Whose desk it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// This network's.
    Pinned(NetworkId),
    /// That of the network whose key has a BLAKE3 that begins so (an invitation's).
    Hash([u8; 16]),
}

/// Asks the index: the first of `index` (`host:port`, each resolved) that answers as `expect`. `make`
/// makes the question, once, from what the connection exports and the network found. Returns the
/// network, the answer and the address it came from.
///
/// # Errors
/// `IndexUnreachable`: nobody answers in time. `Refused`: another machine answers, or the index
/// hangs up on the question (what it does to strangers).
pub(crate) fn ask(
    key: &MachineKey,
    index: &[String],
    expect: Expect,
    make: impl FnOnce(&[u8; 32], NetworkId) -> Ask,
    timeout: Duration,
) -> Result<(NetworkId, Answer, SocketAddr)> {
    let deadline = clock::now() + timeout;
    let mut failures = vec![];
    let mut addresses = vec![];
    for text in index {
        match text.to_socket_addrs() {
            Ok(found) => addresses.extend(found),
            Err(error) => failures.push(format!("{text}: {error}")),
        }
    }
    let mut refused = None;
    for (i, address) in addresses.iter().enumerate() {
        // What is left of the time is shared by who is left.
        let left = deadline.since(clock::now()) / (addresses.len() - i) as u32;
        let call = match Call::connect(key, expect, *address, clock::now() + left) {
            Ok(call) => call,
            Err(Failure::OtherMachine) => {
                refused = Some(other_machine(*address, expect));
                continue;
            }
            Err(Failure::Io(error)) => {
                failures.push(format!("{address}: {}", told(&error)));
                continue;
            }
        };
        let question = make(&call.exporter, call.network);
        let network = call.network;
        return match call.ask(&question, deadline) {
            Ok(Some(answer)) => Ok((network, answer, *address)),
            Ok(None) => Err(hung_up(*address)),
            Err(error) => Err(unreachable_index(&format!("{address}: {}", told(&error)))),
        };
    }
    Err(refused.unwrap_or_else(|| {
        if failures.is_empty() {
            failures.push("no address is known".to_owned());
        }
        unreachable_index(&failures.join("; "))
    }))
}

fn unreachable_index(why: &str) -> Error {
    Error::new(ErrorKind::IndexUnreachable, format!("the index does not answer ({why})"))
        .hint("check that the index runs there and that its TCP port can be reached from here")
}

fn other_machine(address: SocketAddr, expect: Expect) -> Error {
    let (whose, hint) = match expect {
        Expect::Pinned(_) => (
            "the index of this network",
            "if the index was set up anew, leave the network and join again with a new invitation",
        ),
        Expect::Hash(_) => ("the index that invited", "ask for a fresh invitation"),
    };
    Error::new(
        ErrorKind::Refused,
        format!("the machine at {address} is not {whose}: it holds another key"),
    )
    .hint(hint)
}

fn hung_up(address: SocketAddr) -> Error {
    Error::new(
        ErrorKind::Refused,
        format!("the index at {address} hung up: it does not know this machine or invitation"),
    )
    .hint("ask an admin of the network for a new invitation")
}

/// An I/O error in words a person can use.
fn told(error: &io::Error) -> String {
    match error.kind() {
        Io::TimedOut | Io::WouldBlock => "no answer in time".to_owned(),
        Io::UnexpectedEof => "it hung up".to_owned(),
        Io::ConnectionRefused => "nothing listens there".to_owned(),
        _ if tls_error(error).is_some() => format!("it is no potluck index ({error})"),
        _ => error.to_string(),
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// A connection to a desk that has proved whose it is.
struct Call {
    socket: Timed,
    tls: ClientConnection,
    exporter: [u8; 32],
    network: NetworkId,
}

enum Failure {
    OtherMachine,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match tls_error(&error) {
            Some(error) if tls::is_wrong_key(error) => Self::OtherMachine,
            _ => Self::Io(error),
        }
    }
}

impl From<rustls::Error> for Failure {
    fn from(error: rustls::Error) -> Self {
        Self::Io(io::Error::other(error))
    }
}

impl Call {
    fn connect(
        key: &MachineKey,
        expect: Expect,
        address: SocketAddr,
        deadline: Moment,
    ) -> Result<Self, Failure> {
        let expect = match expect {
            Expect::Pinned(network) => tls::Expect::Key(network.0),
            Expect::Hash(hash) => tls::Expect::Hash(hash),
        };
        let left = time_left(deadline)?;
        let socket = Arc::new(TcpStream::connect_timeout(&address, left)?);
        let mut socket = Timed::new(socket, deadline)?;
        let config = Arc::new(tls::client(key, expect, tls::DESK)?);
        let mut tls = ClientConnection::new(config, tls::no_name())?;
        shake_hands(&mut tls, &mut socket)?;
        let key =
            tls::key_of(tls.peer_certificates()).ok_or(rustls::Error::NoCertificatesPresented)?;
        let exporter = tls.export_keying_material([0; 32], EXPORTER, None)?;
        Ok(Self { socket, tls, exporter, network: NetworkId(key) })
    }

    /// The answer; `None`: the desk hung up on purpose.
    fn ask(mut self, question: &Ask, deadline: Moment) -> io::Result<Option<Answer>> {
        self.socket.until(deadline);
        let mut desk = Stream::new(&mut self.tls, &mut self.socket);
        write_frame(&mut desk, &question.encode().into())?;
        let mut len = [0; 4];
        // An end that TLS vouches for is a decision; any other is an accident.
        match desk.read(&mut len)? {
            0 => return Ok(None),
            n => desk.read_exact(&mut len[n..])?,
        }
        let answer = read_body(&mut desk, len, MAX_FRAME)?;
        self.tls.send_close_notify();
        let _ = self.tls.write_tls(&mut self.socket);
        Answer::decode(&answer).map(Some).map_err(|e| io::Error::new(Io::InvalidData, e))
    }
}

/// What a refusal means to the person who asked.
pub(crate) fn refused(refusal: &DeskRefusal) -> Error {
    let (kind, hint) = match refusal.code {
        DeskCode::Expired | DeskCode::UsedUp | DeskCode::Withdrawn => {
            (ErrorKind::Refused, "ask for a new one: potluck invite")
        }
        DeskCode::Removed => {
            (ErrorKind::Refused, "an admin has to invite it again under a new key")
        }
        DeskCode::NotAllowed => (ErrorKind::Refused, "ask an admin of the network"),
        DeskCode::NotFound => (ErrorKind::NotFound, "potluck members lists them"),
        DeskCode::Full => (ErrorKind::Other, "remove members that are gone: potluck members rm"),
        DeskCode::NotDurable => (ErrorKind::Other, "make room on the index's disk and try again"),
        DeskCode::BadRequest => (ErrorKind::Other, "are both machines of the same version?"),
    };
    Error::new(kind, format!("the index refuses: {}", refusal.text)).hint(hint)
}

/// The index answered something else than it was asked.
pub(crate) fn unexpected() -> Error {
    Error::new(ErrorKind::Other, "the index answered something else than it was asked")
        .hint("are both machines of the same version?")
}

/// The desk's side; dropping it closes the desk.
pub(crate) struct Desk {
    _door: Door,
}

/// Serves the desk at `listener` under the index's `key`: `handle` answers, or not (`None`: the
/// caller is hung up on without a byte). It runs on the caller's thread, several at once.
///
/// # Errors
/// The system gives no thread or descriptor.
#[expect(clippy::needless_pass_by_value, reason = "the shape all users were promised")]
pub(crate) fn serve(
    listener: TcpListener,
    key: Arc<MachineKey>,
    handle: impl Fn(Caller, Ask) -> Option<Answer> + Send + Sync + 'static,
) -> Result<Desk> {
    let config = tls::server(&key, tls::DESK)
        .map_err(|e| Error::new(ErrorKind::Other, format!("TLS cannot be set up: {e}")))?;
    let (config, at_desk) = (Arc::new(config), AtomicUsize::new(0));
    let door = Door::open(listener, MAX_IN_DOOR, "potluck desk", move |socket, from, pass| {
        if let Err(error) = attend(&config, socket, pass, &at_desk, &handle) {
            tracing::debug!(%from, %error, "a call at the desk failed");
        }
    })?;
    Ok(Desk { _door: door })
}

fn attend(
    config: &Arc<ServerConfig>,
    socket: Arc<TcpStream>,
    pass: Pass,
    at_desk: &AtomicUsize,
    handle: &(impl Fn(Caller, Ask) -> Option<Answer> + Send + Sync + 'static),
) -> io::Result<()> {
    let mut socket = Timed::new(socket, clock::now() + VISIT)?;
    let mut tls = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
    shake_hands(&mut tls, &mut socket)?;
    let peer = tls::key_of(tls.peer_certificates())
        .filter(|_| tls.alpn_protocol() == Some(tls::DESK))
        .ok_or_else(|| io::Error::other("it speaks another protocol"))?;
    let exporter = tls.export_keying_material([0; 32], EXPORTER, None).map_err(io::Error::other)?;
    let mut caller = Stream::new(&mut tls, &mut socket);
    let mut len = [0; 4];
    caller.read_exact(&mut len)?;
    let ask = read_body(&mut caller, len, MAX_ASK)?;
    let ask = Ask::decode(&ask).map_err(|e| io::Error::new(Io::InvalidData, e))?;
    pass.let_in();
    let others = at_desk.fetch_add(1, Ordering::Relaxed);
    let answer = match others {
        n if n < MAX_AT_DESK => Some(handle(Caller { peer: PeerId(peer), exporter }, ask)),
        _ => None,
    };
    at_desk.fetch_sub(1, Ordering::Relaxed);
    let Some(answer) = answer else {
        return Err(io::Error::other("too many questions at once"));
    };
    if let Some(answer) = answer {
        write_frame(&mut caller, &answer.encode().into())?;
    }
    tls.send_close_notify();
    tls.write_tls(&mut socket).map(drop)
}

fn shake_hands<S: SideData>(tls: &mut ConnectionCommon<S>, socket: &mut Timed) -> io::Result<()> {
    while tls.is_handshaking() {
        tls.complete_io(socket)?;
    }
    Ok(())
}

/// Erases its copies: an answer may hold keys.
fn write_frame(to: &mut impl Write, body: &Zeroizing<Vec<u8>>) -> io::Result<()> {
    let mut frame = Zeroizing::new(Vec::with_capacity(4 + body.len()));
    frame.extend_from_slice(&(body.len() as u32).to_be_bytes());
    frame.extend_from_slice(body);
    to.write_all(&frame)?;
    to.flush()
}

/// Reads a frame whose length was read.
fn read_body(from: &mut impl Read, len: [u8; 4], most: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let len = u32::from_be_bytes(len) as usize;
    if len > most {
        return Err(io::Error::new(Io::InvalidData, "a frame is too long"));
    }
    // Room for all of it at once: keys would stay behind where it had to move. A stranger's is short.
    let mut body = Zeroizing::new(Vec::with_capacity(len));
    from.take(len as u64).read_to_end(&mut body)?;
    if body.len() < len {
        return Err(Io::UnexpectedEof.into());
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_core::trust::{Invitation, join_tag};
    use potluck_core::wire::desk::{DeskCode, DeskRefusal, InviteTerms, Join, Removal};

    const LONG: Duration = Duration::from_secs(30);

    fn index() -> Arc<MachineKey> {
        Arc::new(MachineKey::from_seed([1; 32]))
    }

    fn member() -> MachineKey {
        MachineKey::from_seed([2; 32])
    }

    /// A desk of the index, where it is, and nothing else.
    fn desk(
        handle: impl Fn(Caller, Ask) -> Option<Answer> + Send + Sync + 'static,
    ) -> (Desk, Vec<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (serve(listener, index(), handle).unwrap(), vec![address])
    }

    fn members(_: &[u8; 32], _: NetworkId) -> Ask {
        Ask::Members
    }

    fn pinned() -> Expect {
        Expect::Pinned(index().network())
    }

    #[test]
    fn a_question_is_answered_and_both_sides_know_each_other() {
        let (_desk, at) = desk(|caller, ask| {
            assert_eq!(caller.peer, member().peer());
            assert!(ask == Ask::Remove(Removal::Peer(PeerId([7; 32]))));
            Some(Answer::Removed(3))
        });
        let question = |_: &[u8; 32], network| {
            assert_eq!(network, index().network());
            Ask::Remove(Removal::Peer(PeerId([7; 32])))
        };
        let (network, answer, used) = ask(&member(), &at, pinned(), question, LONG).unwrap();
        assert_eq!((network, used.to_string()), (index().network(), at[0].clone()));
        assert!(answer == Answer::Removed(3));
    }

    #[test]
    fn a_join_is_bound_to_its_connection_and_key() {
        let secret = [9; 16];
        let (_desk, at) = desk(move |caller, ask| {
            let Ask::Join(join) = ask else { return None };
            let fits = join.tag == join_tag(&secret, &caller.exporter, caller.peer);
            Some(Answer::Removed(fits.into()))
        });
        let far = potluck_core::time::WallTime(4_000_000_000);
        let invitation = Invitation::new(index().network(), secret, far, at.clone());
        let join = |exporter: &[u8; 32], _| {
            let tag = join_tag(&secret, exporter, member().peer());
            Ask::Join(Join { invitation: invitation.id(), tag, label: "bob".to_owned() })
        };
        let expect = Expect::Hash(invitation.network_hash);
        let (network, answer, _) = ask(&member(), &at, expect, join, LONG).unwrap();
        assert!(answer == Answer::Removed(1) && network == index().network());
    }

    #[test]
    fn another_index_than_the_expected_one_is_told_nothing() {
        let (_desk, at) = desk(|_, _| panic!("it was asked"));
        for expect in [Expect::Hash([5; 16]), Expect::Pinned(NetworkId([5; 32]))] {
            let never = |_: &[u8; 32], _| -> Ask { panic!("a question was made") };
            let error = ask(&member(), &at, expect, never, LONG).err().unwrap();
            assert_eq!(error.kind, ErrorKind::Refused, "{error}");
            assert!(error.hint.is_some());
        }
    }

    #[test]
    fn an_index_that_is_not_there_is_unreachable_and_the_next_address_is_tried() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let nowhere = [free.clone(), "nowhere:without-port".to_owned()];
        for at in [&nowhere[..], &[]] {
            let error = ask(&member(), at, pinned(), members, LONG).err().unwrap();
            assert_eq!(error.kind, ErrorKind::IndexUnreachable, "{error}");
            assert!(error.hint.is_some());
        }
        let (_desk, at) = desk(|_, _| Some(Answer::Removed(0)));
        let at = [vec![free], at].concat();
        assert_eq!(ask(&member(), &at, pinned(), members, LONG).ok().unwrap().2.to_string(), at[1]);
    }

    #[test]
    fn a_server_that_says_nothing_is_unreachable_after_the_time_given() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = [silent.local_addr().unwrap().to_string()];
        let error = ask(&member(), &at, pinned(), members, Duration::from_millis(50));
        assert_eq!(error.err().unwrap().kind, ErrorKind::IndexUnreachable);
    }

    #[test]
    fn a_server_of_another_kind_is_no_index() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = [other.local_addr().unwrap().to_string()];
        let web = std::thread::spawn(move || {
            let mut caller = other.accept().unwrap().0;
            let _ = caller.read(&mut [0; 4096]);
            caller.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        });
        let error = ask(&member(), &at, pinned(), members, LONG).err().unwrap();
        assert_eq!(error.kind, ErrorKind::IndexUnreachable, "{error}");
        web.join().unwrap().unwrap();
    }

    #[test]
    fn who_is_not_answered_is_refused() {
        let (_desk, at) = desk(|_, _| None);
        let error = ask(&member(), &at, pinned(), members, LONG).err().unwrap();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    }

    #[test]
    fn a_refusal_is_an_answer() {
        let refusal = DeskRefusal { code: DeskCode::NotAllowed, text: "only an admin".to_owned() };
        let told = refusal.clone();
        let (_desk, at) = desk(move |_, _| Some(Answer::Refused(told.clone())));
        let terms = InviteTerms {
            role: potluck_core::trust::Role::Read,
            uses: 1,
            expires: potluck_core::time::WallTime(1),
        };
        let answer = ask(&member(), &at, pinned(), |_, _| Ask::Invite(terms), LONG).unwrap().1;
        assert!(answer == Answer::Refused(refusal));
    }

    #[test]
    fn callers_that_say_nothing_do_not_keep_an_honest_one_out() {
        let (_desk, at) = desk(|_, _| Some(Answer::Removed(0)));
        let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(&at[0]).unwrap()).collect();
        assert!(ask(&member(), &at, pinned(), members, LONG).is_ok());
        drop(silent);
    }

    #[test]
    fn a_question_that_is_too_long_or_none_gets_no_byte() {
        let (_desk, at) = desk(|_, _| panic!("it was asked"));
        for bad in [&[0, 0, 4, 1, 1][..], &[255; 64], &[0, 0, 0, 1, 99], &[0, 0, 0, 0]] {
            let key = tls::Expect::Key(index().public());
            let config = Arc::new(tls::client(&member(), key, tls::DESK).unwrap());
            let mut tls = ClientConnection::new(config, tls::no_name()).unwrap();
            let mut socket = TcpStream::connect(&at[0]).unwrap();
            let mut desk = Stream::new(&mut tls, &mut socket);
            desk.write_all(bad).unwrap();
            let mut answer = vec![];
            let _ = desk.read_to_end(&mut answer);
            assert_eq!(answer, b"");
        }
    }
}
