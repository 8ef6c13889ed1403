//! Owns the serving half of a peer: who opened what here, what is sent to whom, and that a file that
//! changed is withdrawn. Never decides who is served next (the sharing machine does).

use std::sync::Arc;
use std::time::Duration;

use potluck_core::id::{ContentId, Piece};
use potluck_core::sharing::Output;
use potluck_core::time::Moment;
use potluck_core::wire::stream::{Channel, MAX_HOSTS, Side};
use tracing::{debug, warn};

use super::engine::{Content, Engine, Phase, shuffle};
use crate::clock;
use crate::store::{ReadError, Replica};
use crate::transfer::{Command, ConnId};

/// How often the files of shared contents are looked at for changes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

impl Engine {
    /// Makes a content known to the sharing machine.
    pub(super) fn host(&mut self, replica: &Arc<Replica>, whole_from_start: bool) {
        if let Some(content) = self.contents.get(&replica.id()) {
            let layout = Arc::new(replica.layout().clone());
            self.sharing.add(content.number, layout, &replica.have(), whole_from_start);
        }
    }

    pub(super) fn replica_of(&self, id: ContentId) -> Option<&Arc<Replica>> {
        match &self.contents.get(&id)?.phase {
            Phase::Whole(replica) => Some(replica),
            Phase::Fetching(fetch) => fetch.replica.as_ref(),
            Phase::Lost { .. } => None,
        }
    }

    /// The content on a channel that the other side opened.
    fn theirs(&self, id: ConnId, channel: u16) -> Option<(ContentId, &Content)> {
        let content = *self.conns.get(&id)?.theirs.get(&channel)?;
        Some((content, self.contents.get(&content)?))
    }

    pub(super) fn on_wants_open(&mut self, id: ConnId, channel: u16, content: ContentId) {
        let replica = self.replica_of(content).cloned();
        let others = self.known_hosts(content, id);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let known = self.contents.get(&content);
        let (Some(replica), Some(known)) = (replica, known) else {
            if known.is_some_and(|known| matches!(known.phase, Phase::Fetching(_))) {
                conn.early.insert(channel, content);
                // It may know the content already, and have some of it.
                self.open_on(id, content);
            } else {
                conn.connection.tell(Command::Refuse { channel });
            }
            return;
        };
        conn.early.remove(&channel);
        conn.theirs.insert(channel, content);
        conn.connection.tell(Command::Admit { channel, replica });
        if !others.is_empty() {
            conn.connection.tell(Command::Hosts { channel, hosts: others });
        }
        self.sharing.on_open(clock::now(), Self::host_of(id), known.number);
        // Who fetches it may well hold pieces that are missing here.
        self.open_on(id, content);
    }

    /// A content is known now: those who opened it before are answered.
    pub(super) fn admit_early(&mut self, content: ContentId) {
        let early: Vec<(ConnId, u16)> = self
            .conns
            .iter()
            .flat_map(|(id, conn)| conn.early.iter().map(|(channel, of)| (*id, *channel, *of)))
            .filter_map(|(id, channel, of)| (of == content).then_some((id, channel)))
            .collect();
        for (id, channel) in early {
            self.on_wants_open(id, channel, content);
        }
    }

    /// Further hosts of a content: any of those this machine exchanges it with.
    fn known_hosts(
        &self,
        content: ContentId,
        except: ConnId,
    ) -> Vec<(potluck_core::id::PeerId, std::net::SocketAddr)> {
        let mut hosts: Vec<_> = self
            .conns
            .iter()
            .filter(|(id, c)| **id != except && c.up)
            .filter(|(_, c)| {
                let open = c.ours.values().chain(c.theirs.values()).chain(c.early.values());
                open.into_iter().any(|there| *there == content)
            })
            .map(|(_, c)| (c.peer, c.address))
            .collect();
        shuffle(&mut hosts);
        hosts.truncate(MAX_HOSTS);
        hosts
    }

    pub(super) fn on_wants(&mut self, id: ConnId, channel: u16, pieces: &[Piece]) {
        if let Some((_, content)) = self.theirs(id, channel) {
            let number = content.number;
            self.sharing.on_want(clock::now(), Self::host_of(id), number, pieces);
        }
    }

    pub(super) fn on_cancelled(&mut self, id: ConnId, channel: u16, pieces: &[Piece]) {
        if let Some((_, content)) = self.theirs(id, channel) {
            let number = content.number;
            self.sharing.on_cancel(clock::now(), Self::host_of(id), number, pieces);
        }
    }

    pub(super) fn on_sent(&mut self, id: ConnId, channel: u16, piece: Piece, bytes: u32) {
        self.sent_bytes += u64::from(bytes);
        if let Some((_, content)) = self.theirs(id, channel) {
            let number = content.number;
            self.sharing.on_sent(clock::now(), Self::host_of(id), number, piece);
        }
    }

    /// Somebody says that a piece we sent is wrong: look at it again, away from this thread.
    pub(super) fn on_rejected(&mut self, id: ConnId, channel: u16, piece: Piece) {
        let Some((content, _)) = self.theirs(id, channel) else { return };
        self.suspect(content, piece);
    }

    fn suspect(&mut self, content: ContentId, piece: Piece) {
        let Some(replica) = self.replica_of(content).cloned() else { return };
        if !self.being_checked.insert(content) {
            return;
        }
        self.job(
            move || Ok(replica.suspect(piece)),
            move |engine, bad| {
                engine.being_checked.remove(&content);
                if bad == Ok(true) {
                    engine
                        .lose(content, "a piece of it is not what was shared any more (bit rot?)");
                }
            },
        );
    }

    pub(super) fn on_unsent(&mut self, id: ConnId, channel: u16, piece: Piece) {
        if let Some((_, content)) = self.theirs(id, channel) {
            let number = content.number;
            self.sharing.on_unsent(clock::now(), Self::host_of(id), number, piece);
        }
    }

    pub(super) fn on_unreadable(
        &mut self,
        id: ConnId,
        channel: u16,
        piece: Piece,
        error: ReadError,
    ) {
        self.on_unsent(id, channel, piece);
        let Some((content, _)) = self.theirs(id, channel) else { return };
        match error {
            ReadError::NotHeld => {
                self.tell_all(content, |channel| Command::Lost { channel, pieces: vec![piece] });
            }
            ReadError::Changed => self.lose(content, "the file changed after it was shared"),
            ReadError::Disk(error) => self.lose(content, &error.message),
        }
    }

    /// Withdraws a content that is no longer what it was; what is on the disk stays as it is.
    pub(super) fn lose(&mut self, id: ContentId, why: &str) {
        let Some(content) = self.remove(id) else { return };
        let (path, size) = match content.phase {
            Phase::Whole(replica) => (replica.path(), replica.size()),
            Phase::Fetching(fetch) => {
                // What is being fetched heals itself: the bad pieces count as missing now.
                self.add(id, content.name, Phase::Fetching(fetch));
                return self.restart_fetch(id);
            }
            Phase::Lost { path, size, .. } => (path, size),
        };
        warn!(content = %id, path = %path.display(), why, "withdrawn: share it again as it is now");
        if let Some(line) = &mut self.line {
            line.link.withdraw(clock::now(), id);
        }
        self.store.retire(&id, Vec::new());
        self.once_clean(|_| ());
        self.add(id, content.name, Phase::Lost { path, size, why: why.to_owned() });
    }

    /// Looks at the files of shared contents, away from this thread.
    pub(super) fn tend_files(&mut self, now: Moment) {
        if now < self.next_check {
            return;
        }
        self.next_check = now + LOOK_EVERY;
        let whole: Vec<Arc<Replica>> = self
            .contents
            .values()
            .filter_map(|c| match &c.phase {
                Phase::Whole(replica) => Some(replica.clone()),
                Phase::Fetching(_) | Phase::Lost { .. } => None,
            })
            .collect();
        if whole.is_empty() {
            return;
        }
        // The next look begins when this one is done.
        self.next_check = now + Duration::from_secs(3600);
        self.job(
            move || Ok(whole.iter().filter(|r| r.changed()).map(|r| r.id()).collect::<Vec<_>>()),
            |engine, changed| {
                engine.next_check = clock::now() + LOOK_EVERY;
                for id in changed.unwrap_or_default() {
                    engine.lose(id, "the file changed, moved or went away after it was shared");
                }
            },
        );
    }

    /// Does what the sharing machine wants done; true if there was anything.
    pub(super) fn act_for_sharing(&mut self) -> bool {
        let mut busy = false;
        while let Some(output) = self.sharing.poll_output() {
            busy = true;
            let (host, number) = match &output {
                Output::Serve { host, content, .. }
                | Output::Busy { host, content, .. }
                | Output::Grant { host, content, .. }
                | Output::ShowHave { host, content } => (*host, *content),
            };
            let Some(&id) = self.numbers.get(&number) else { continue };
            let Some(conn) = self.conns.get(&Self::conn_of(host)) else { continue };
            let Some((&channel, _)) = conn.theirs.iter().find(|(_, c)| **c == id) else { continue };
            conn.connection.tell(match output {
                Output::Serve { piece, .. } => Command::Serve { channel, piece },
                Output::Busy { pieces, wait, .. } => Command::Busy {
                    channel,
                    pieces,
                    wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
                },
                Output::Grant { pieces, .. } => Command::Grant { channel, pieces },
                Output::ShowHave { .. } => {
                    let Some(replica) = self.replica_of(id) else { continue };
                    let channel = Channel { number: channel, opener: Side::Them };
                    debug!(peer = %conn.peer.short(), content = ?id, "shows what it has");
                    Command::Have { channel, bitfield: replica.have() }
                }
            });
        }
        busy
    }
}
