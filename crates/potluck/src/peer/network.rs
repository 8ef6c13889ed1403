//! Owns a peer's membership: joining, founding, leaving, the line to the index with its socket and
//! session, the identity that connections are checked against. Never decides what a datagram means
//! (the link does).

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use potluck_core::id::NetworkId;
use potluck_core::link::{Link, Output};
use potluck_core::time::Moment;
use potluck_core::trust::{Invitation, MachineKey, RevocationList, Role, join_tag};
use potluck_core::wire::datagram::MAX_DATAGRAM;
use potluck_core::wire::desk::{Answer, Ask, DeskCode, Join, Session};
use tracing::{debug, info, warn};

use super::engine::{Engine, Input, dice};
use super::notes::Membership;
use super::{Replies, Settings};
use crate::clock;
use crate::control::{Event, Request};
use crate::daemon;
use crate::desk::{self, Expect};
use crate::error::{Error, ErrorKind, Result};
use crate::index::{
    DEFAULT_PORT, FIRST_USES, FIRST_VALID, Index, IndexSettings, invite_terms, spawn,
};
use crate::transfer::{Command, Identity};

/// How long the index's desk may take.
const DESK_PATIENCE: Duration = Duration::from_secs(6);
/// How often the index is told how busy this machine is.
const LOAD_EVERY: Duration = Duration::from_secs(5);

/// The line to the index: the link, and the socket its datagrams go through.
pub(super) struct Line {
    pub(super) link: Link,
    pub(super) membership: Membership,
    socket: Option<Socket>,
    /// A session is being fetched.
    fetching: bool,
    /// The index answered last time.
    reachable: bool,
    /// What was said last of a session that was not given: said once.
    complaint: String,
    next_load: Moment,
}

struct Socket {
    udp: Arc<UdpSocket>,
    index: SocketAddr,
    number: u32,
    closed: Arc<AtomicBool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

impl Line {
    /// Whether the index answers.
    pub(super) fn is_up(&self) -> bool {
        self.socket.is_some() && self.reachable
    }

    /// Says why there is no session, once for as long as it is the same.
    fn complains(&mut self, error: &Error) {
        if self.complaint != error.message {
            self.complaint.clone_from(&error.message);
            warn!(error = %error, hint = error.hint.as_deref(), "this machine is not let in by the index");
        }
    }
}

impl Engine {
    /// Takes the network of last time up again, and the index where this machine founded one.
    pub(super) fn begin_network(&mut self) {
        match self.notes().founded() {
            Ok(Some(listen)) => match open_index(&self.settings, listen.parse().ok()) {
                Ok(index) => self.index = Some(index),
                Err(e) => warn!(error = %e, "the index that this machine founded does not start"),
            },
            Ok(None) => {}
            Err(e) => warn!(error = %e, "cannot read what network this machine is in"),
        }
        match self.notes().membership() {
            Ok(Some(membership)) => self.enter(membership),
            Ok(None) => {}
            Err(e) => warn!(error = %e, "cannot read what network this machine is in"),
        }
    }

    /// Becomes a member in all that this process does.
    fn enter(&mut self, membership: Membership) {
        let mut link = Link::new(dice());
        link.set_port(self.listen.port());
        link.set_load(self.sharing.load());
        self.line = Some(Line {
            link,
            membership,
            socket: None,
            fetching: false,
            reachable: false,
            complaint: String::new(),
            next_load: clock::now(),
        });
        self.publish_identity();
    }

    /// What connections check the other side against, from now on; standing ones check again.
    fn publish_identity(&mut self) {
        let identity = self.line.as_ref().map(|line| {
            let m = &line.membership;
            Arc::new(Identity {
                network: m.network,
                certificate: m.certificate.clone(),
                revoked: m.revocations.peers.clone(),
            })
        });
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = identity;
        for conn in self.conns.values() {
            conn.connection.tell(Command::Recheck);
        }
    }

    /// Joins by an invitation, then does `then`.
    pub(super) fn join(
        &mut self,
        invitation: &Invitation,
        replies: Replies,
        then: impl FnOnce(&mut Self, Result<Replies, (Replies, Error)>) + Send + 'static,
    ) {
        if let Some(line) = &self.line {
            if invitation.is_for(line.membership.network) && !self.was_removed() {
                return then(self, Ok(replies));
            }
            let error = Error::new(ErrorKind::Exists, "this machine is in another network already");
            return then(
                self,
                Err((
                    replies,
                    error.hint("potluck leave first, or use another folder with --state DIR"),
                )),
            );
        }
        let (key, label) = (self.key.clone(), self.settings.label.clone());
        let wanted = invitation.clone();
        self.job(
            move || join_network(&key, &wanted, label),
            move |engine, result| match result.and_then(|m| engine.remember(m)) {
                Ok(()) => then(engine, Ok(replies)),
                Err(error) => then(engine, Err((replies, error))),
            },
        );
    }

    fn was_removed(&self) -> bool {
        let line = self.line.as_ref();
        line.is_some_and(|l| l.membership.revocations.peers.contains(&self.key.peer()))
    }

    fn remember(&mut self, membership: Membership) -> Result<()> {
        self.notes().set_membership(Some(&membership))?;
        info!(network = %membership.network, role = %membership.certificate.role, "joined");
        self.enter(membership);
        let ids: Vec<_> = self.contents.keys().copied().collect();
        for id in ids {
            self.register(id);
        }
        Ok(())
    }

    pub(super) fn joined_event(&self) -> Event {
        let line = self.line.as_ref();
        Event::Joined {
            network: line.map(|l| l.membership.network.to_string()).unwrap_or_default(),
            peer: self.key.peer().to_string(),
            role: line.map(|l| l.membership.certificate.role.to_string()).unwrap_or_default(),
        }
    }

    pub(super) fn leave(&mut self) -> Result<NetworkId> {
        let Some(line) = &self.line else { return Err(no_network()) };
        let network = line.membership.network;
        self.notes().set_membership(None)?;
        self.notes().set_founded(None)?;
        self.hang_up();
        self.index = None;
        Ok(network)
    }

    /// Drops the line; connections end, since nobody is a fellow member any more.
    pub(super) fn hang_up(&mut self) {
        self.line = None;
        self.questions.clear();
        self.publish_identity();
    }

    /// Makes sure that there is a network to share in: the one joined, else the index of this very
    /// state folder, else a new one with its index in this process.
    pub(super) fn with_network(
        &mut self,
        replies: Replies,
        then: impl FnOnce(&mut Self, Result<Replies, (Replies, Error)>) + Send + 'static,
    ) {
        if self.line.is_some() {
            return then(self, Ok(replies));
        }
        let settings = self.settings.clone();
        self.job(
            move || own_network(&settings),
            move |engine, result| match result {
                Ok(own) => engine.enter_own(own, replies, then),
                Err(error) => then(engine, Err((replies, error))),
            },
        );
    }

    fn enter_own(
        &mut self,
        own: OwnNetwork,
        replies: Replies,
        then: impl FnOnce(&mut Self, Result<Replies, (Replies, Error)>) + Send + 'static,
    ) {
        if let Some((index, others)) = own.founded {
            if let Err(error) = self.notes().set_founded(Some(&index.listen().to_string())) {
                return then(self, Err((replies, error)));
            }
            replies.send(Event::Founded { invite: others.to_string() });
            self.index = Some(index);
        }
        self.join(&own.invitation, replies, then);
    }

    /// Keeps the session alive, and tells the index how busy this machine is.
    pub(super) fn tend_line(&mut self, now: Moment) {
        let Some(line) = &mut self.line else { return };
        if line.next_load <= now {
            line.next_load = now + LOAD_EVERY;
            line.link.set_load(self.sharing.load());
            // Issued, or taken over, while a clock was wrong: no peer would let this machine in.
            if line.membership.certificate.is_timely(clock::wall()).is_err() {
                line.link.renew();
            }
        }
    }

    /// Does what the link wants done; true if there was anything.
    pub(super) fn act_for_line(&mut self) -> bool {
        let mut busy = false;
        while let Some(output) = self.line.as_mut().and_then(|line| line.link.poll_output()) {
            busy = true;
            match output {
                Output::Send(datagram) => self.send(&datagram),
                Output::NeedSession => self.fetch_session(),
                Output::RevocationsAt(version) => {
                    let known = self.line.as_ref().map_or(0, |l| l.membership.revocations.version);
                    if version > known {
                        self.fetch_session();
                    }
                }
                Output::Answered { id, result } => {
                    if let Some(then) = self.questions.remove(&id) {
                        then(self, result);
                    }
                }
                Output::Registered(id) => self.on_registered(id),
                Output::Refused(id, refusal) => self.on_refused(id, &refusal),
                Output::Withdrawn(_) => {}
                Output::Changes { rows } => self.on_changes(rows),
                Output::Relist => self.relist(),
                Output::IndexLost => {
                    warn!("the index does not answer; transfers go on, and it is asked again");
                    self.set_reachable(false);
                }
                Output::IndexBack => {
                    debug!("the index answers");
                    self.set_reachable(true);
                }
            }
        }
        busy
    }

    fn set_reachable(&mut self, reachable: bool) {
        if let Some(line) = &mut self.line {
            line.reachable = reachable;
        }
    }

    fn send(&mut self, datagram: &[u8]) {
        if let Some(socket) = self.line.as_ref().and_then(|line| line.socket.as_ref()) {
            // A datagram that does not leave is a lost one: the link asks again.
            let _ = socket.udp.send(datagram);
        }
    }

    pub(super) fn on_datagram(&mut self, number: u32, mut bytes: Vec<u8>) {
        if let Some(line) = &mut self.line
            && line.socket.as_ref().is_some_and(|socket| socket.number == number)
        {
            line.link.on_datagram(clock::now(), &mut bytes);
        }
    }

    fn fetch_session(&mut self) {
        let (key, label) = (self.key.clone(), self.settings.label.clone());
        let Some(line) = &mut self.line else { return };
        if std::mem::replace(&mut line.fetching, true) {
            return;
        }
        let (index, network) = (line.membership.index.clone(), line.membership.network);
        let certificate = Some(line.membership.certificate.clone());
        let revocations = line.membership.revocations.version;
        self.job(
            move || {
                let ask = Ask::Session { label, revocations, certificate };
                let (_, answer, used) =
                    desk::ask(&key, &index, Expect::Pinned(network), |_, _| ask, DESK_PATIENCE)?;
                Ok((answer, used))
            },
            Self::on_session,
        );
    }

    fn on_session(&mut self, result: Result<(Answer, SocketAddr)>) {
        let now = clock::now();
        let Some(line) = &mut self.line else { return };
        line.fetching = false;
        let outcome = result.and_then(|(answer, used)| match answer {
            Answer::Session(session) => self.adopt(*session, used),
            Answer::Refused(refusal) if refusal.code == DeskCode::Removed => {
                self.on_removed(&desk::refused(&refusal));
                Ok(())
            }
            Answer::Refused(refusal) => Err(desk::refused(&refusal)),
            _ => Err(desk::unexpected()),
        });
        let Some(line) = &mut self.line else { return };
        if let Err(error) = outcome {
            debug!(error = %error, "no session with the index");
            if error.kind == ErrorKind::Refused {
                line.complains(&error);
            } else {
                line.reachable = false;
            }
            line.link.on_session_failed(now);
        }
    }

    /// This machine was removed: said once, and from now on the index is seldom asked.
    fn on_removed(&mut self, error: &Error) {
        let Some(line) = &mut self.line else { return };
        line.complains(error);
        line.reachable = false;
        line.link.on_removed(clock::now());
    }

    /// Takes over a session: its keys, the renewed certificate, a newer revocation list.
    fn adopt(&mut self, mut session: Session, used: SocketAddr) -> Result<()> {
        let peer = self.key.peer();
        let Some(line) = &mut self.line else { return Ok(()) };
        let m = &mut line.membership;
        session.certificate.check(m.network, peer, clock::wall()).map_err(|e| {
            Error::new(
                ErrorKind::Refused,
                format!("the index gave a certificate that is no good: {e}"),
            )
            .hint("compare this machine's clock with the index's")
        })?;
        m.certificate = session.certificate.clone();
        if let Some(list) = session.revocations.take()
            && list.version > m.revocations.version
        {
            list.check(m.network).map_err(|e| {
                Error::new(
                    ErrorKind::Refused,
                    format!("the index gave a false list of removed machines: {e}"),
                )
            })?;
            m.revocations = list;
        }
        // After a silence as well: a socket keeps the address that this machine had when it was opened.
        let silent = !line.reachable;
        if line.socket.as_ref().is_none_or(|socket| silent || socket.index != used) {
            self.lines_made += 1;
            line.socket = Some(open_socket(used, self.lines_made, self.inbox.clone())?);
        }
        line.reachable = true;
        line.complaint.clear();
        line.link.on_session(clock::now(), session);
        let membership = line.membership.clone();
        self.notes().set_membership(Some(&membership))?;
        self.publish_identity();
        Ok(())
    }
}

/// The network that a machine without one shares in.
struct OwnNetwork {
    /// For this machine.
    invitation: Invitation,
    /// The index, where it was made just now, and an invitation for others.
    founded: Option<(Index, Invitation)>,
}

/// That of the index of this very state folder, else a new one.
fn own_network(settings: &Settings) -> Result<OwnNetwork> {
    if let Some(invitation) = own_index_invites(settings)? {
        return Ok(OwnNetwork { invitation, founded: None });
    }
    // The usual port where it is free, else any.
    let own = settings.listen.map(|listen| listen.ip());
    let usual = own.map(|ip| SocketAddr::new(ip, DEFAULT_PORT));
    let any = own.map_or((Ipv4Addr::UNSPECIFIED, 0).into(), |ip| SocketAddr::new(ip, 0));
    let index = open_index(settings, usual).or_else(|_| open_index(settings, Some(any)))?;
    let invitation = index.invite(invite_terms(Role::Admin, 1, FIRST_VALID))?;
    let others = index.invite(invite_terms(Role::Publish, FIRST_USES, FIRST_VALID))?;
    Ok(OwnNetwork { invitation, founded: Some((index, others)) })
}

/// An invitation for this machine by the index that runs for this state folder, if one does.
fn own_index_invites(settings: &Settings) -> Result<Option<Invitation>> {
    let socket = daemon::socket_path(&settings.state, daemon::Role::Index);
    let Some(client) = daemon::Client::connect(&socket)? else { return Ok(None) };
    let role = Role::Admin.to_string();
    for event in client.request(&Request::Invite { uses: 1, valid_s: 600, role })? {
        let event = event?;
        if let Some(error) = event.failure() {
            return Err(error);
        }
        if let Event::Invited { invite, .. } = event {
            let invitation = invite.parse();
            return invitation.map(Some).map_err(|_| desk::unexpected());
        }
    }
    Err(desk::unexpected())
}

fn open_index(settings: &Settings, listen: Option<SocketAddr>) -> Result<Index> {
    Index::open(&IndexSettings {
        listen,
        advertise: settings.advertise.clone(),
        workers: 1,
        ..IndexSettings::new(&settings.state)
    })
}

pub(super) fn no_network() -> Error {
    Error::new(ErrorKind::Refused, "this machine is in no network yet").hint(
        "join one with potluck join INVITATION (potluck invite, or potluck index, prints one)",
    )
}

fn join_network(key: &MachineKey, invitation: &Invitation, label: String) -> Result<Membership> {
    if invitation.expires < clock::wall() {
        return Err(Error::new(
            ErrorKind::Refused,
            "the invitation has expired (or this machine's clock is wrong)",
        )
        .hint("ask for a new one: potluck invite"));
    }
    let (secret, id, peer) = (invitation.secret, invitation.id(), key.peer());
    let (network, answer, _) = desk::ask(
        key,
        &invitation.index,
        Expect::Hash(invitation.network_hash),
        |exporter, _| {
            Ask::Join(Join { invitation: id, tag: join_tag(&secret, exporter, peer), label })
        },
        DESK_PATIENCE,
    )?;
    let certificate = match answer {
        Answer::Welcome(certificate) => *certificate,
        Answer::Refused(refusal) => return Err(desk::refused(&refusal)),
        _ => return Err(desk::unexpected()),
    };
    certificate.check(network, peer, clock::wall()).map_err(|e| {
        Error::new(ErrorKind::Refused, format!("the index gave a certificate that is no good: {e}"))
            .hint("compare this machine's clock with the index's")
    })?;
    Ok(Membership {
        network,
        index: invitation.index.clone(),
        certificate,
        revocations: RevocationList { version: 0, peers: BTreeSet::new(), signature: [0; 64] },
    })
}

/// A socket that speaks with the index only, and a thread that hands its datagrams to the engine.
fn open_socket(
    index: SocketAddr,
    number: u32,
    inbox: crossbeam_channel::Sender<Input>,
) -> Result<Socket> {
    let problem = |e: &std::io::Error| Error::io("cannot open a UDP socket to the index", e);
    let any: SocketAddr = match index {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let udp = UdpSocket::bind(any).map_err(|e| problem(&e))?;
    udp.connect(index).map_err(|e| problem(&e))?;
    udp.set_read_timeout(Some(Duration::from_millis(500))).map_err(|e| problem(&e))?;
    let udp = Arc::new(udp);
    let closed = Arc::new(AtomicBool::new(false));
    let (from, done) = (udp.clone(), closed.clone());
    spawn("index-line", move || {
        let mut buffer = [0; MAX_DATAGRAM + 1];
        while !done.load(Ordering::Relaxed) {
            // Errors here are time-outs, or echoes of datagrams that nobody took: both pass.
            let Ok(len) = from.recv(&mut buffer) else { continue };
            let input = Input::Datagram { line: number, bytes: buffer[..len].to_vec() };
            if inbox.send(input).is_err() {
                return;
            }
        }
    })?;
    Ok(Socket { udp, index, number, closed })
}
