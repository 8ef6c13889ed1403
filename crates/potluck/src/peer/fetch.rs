//! Owns the fetching half of a peer: a content from the wish to the finished file, the swarm of each,
//! the disk's troubles, and what people who wait are told. Never decides which piece is asked of whom
//! (the swarm machine does); its neighbours are in `neighbours`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use potluck_core::id::{ContentId, PeerId, Piece};
use potluck_core::swarm::{Arrived, Counts, Host, Output, Swarm, Waiting, Why};
use potluck_core::time::Moment;
use potluck_core::wire::datagram::Found;
use potluck_core::wire::stream::{Channel, Goodbye, MAX_PIECES, Side};
use tracing::{info, warn};

use super::Replies;
use super::engine::{Content, Engine, Phase, dice};
use super::neighbours::{Known, MAX_NEIGHBOURS, META_PATIENCE, Opened, SEARCH_EVERY};
use super::notes::KnownName;
use super::requests::lie;
use super::stats::Before;
use crate::clock;
use crate::control::{Event, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Put, PutError, Replica};
use crate::transfer::{Command, ConnId};

/// How often a fetch that met a full disk tries again.
const DISK_RETRY: Duration = Duration::from_secs(3);

/// A content being fetched.
pub(super) struct Fetch {
    pub(super) replica: Option<Arc<Replica>>,
    pub(super) swarm: Option<Swarm>,
    pub(super) target: PathBuf,
    pub(super) size: u64,
    /// What a host says of its size, where that is something else.
    pub(super) other_size: Option<u64>,
    /// Why it stands still by decision: a person's, or a failure's.
    pub(super) paused: Option<Error>,
    pub(super) overwrite: bool,
    askers: Vec<Asker>,
    pub(super) known: BTreeMap<PeerId, Known>,
    pub(super) opened: BTreeMap<ConnId, Opened>,
    /// Whom the metadata was asked of, and when.
    pub(super) meta: Option<(ConnId, Moment)>,
    pub(super) preparing: bool,
    pub(super) finishing: bool,
    pub(super) searching: bool,
    pub(super) next_search: Moment,
    /// When there last was a host that has something missing here.
    last_source: Moment,
    /// The disk was full: when to try again.
    disk_retry: Option<Moment>,
    began: Moment,
    /// What had happened before somebody first waited for it.
    before: Option<Before>,
    /// What swarms counted that it had earlier.
    earlier: Counts,
    registered: bool,
    /// Verified bytes from each peer, and what it calls itself.
    got: BTreeMap<PeerId, (String, u64)>,
    pub(super) last_piece: BTreeMap<ConnId, Moment>,
}

/// Somebody who waits for a fetch.
pub(super) struct Asker {
    pub(super) replies: Replies,
    /// Gives up after so long without any source.
    pub(super) timeout: Duration,
}

impl Fetch {
    /// A fetch of something found, to be put at `target`.
    fn new(size: u64, target: PathBuf, overwrite: bool) -> Self {
        let now = clock::now();
        Self {
            replica: None,
            swarm: None,
            target,
            size,
            other_size: None,
            paused: None,
            overwrite,
            askers: Vec::new(),
            known: BTreeMap::new(),
            opened: BTreeMap::new(),
            meta: None,
            preparing: false,
            finishing: false,
            searching: false,
            next_search: now,
            last_source: now,
            disk_retry: None,
            began: now,
            before: None,
            earlier: Counts::default(),
            registered: false,
            got: BTreeMap::new(),
            last_piece: BTreeMap::new(),
        }
    }

    /// A fetch that an earlier run began.
    pub(super) fn resumed(_: ContentId, replica: Arc<Replica>, paused: bool) -> Self {
        let mut fetch = Self::new(replica.size(), replica.path(), false);
        let layout = Arc::new(replica.layout().clone());
        fetch.swarm = Some(Swarm::new(layout, replica.have(), dice()));
        fetch.replica = Some(replica);
        fetch.paused = paused.then(interrupted);
        fetch
    }

    /// Bytes here, verified.
    pub(super) fn have_bytes(&self) -> u64 {
        let Some(replica) = &self.replica else { return 0 };
        let (have, layout) = (replica.have(), replica.layout());
        let missing = have.missing().map(|piece| u64::from(layout.len_of(piece))).sum::<u64>();
        layout.total() - missing
    }

    /// What it counted so far.
    pub(super) fn counts(&self) -> Counts {
        let mut counts = self.earlier;
        counts += self.swarm.as_ref().map(Swarm::counts).unwrap_or_default();
        counts
    }

    /// Tells those who wait that it is called off.
    pub(super) fn call_off(&mut self) {
        self.fail(&Error::new(ErrorKind::Interrupted, "called off by potluck unshare"));
    }

    /// Why it does not move, for a person; `None` while it does.
    pub(super) fn waiting(&self, now: Moment) -> Option<String> {
        if let Some(error) = &self.paused {
            return Some(error.message.clone());
        }
        if self.finishing {
            return Some("making it durable".into());
        }
        let Some(swarm) = &self.swarm else {
            return Some(match (self.preparing, self.opened.is_empty()) {
                (true, _) => "reserving space".into(),
                (false, true) => "looking for hosts".into(),
                (false, false) => "asking for its list of pieces".into(),
            });
        };
        match swarm.waiting(now)? {
            Waiting::Paused => Some("the disk is full".into()),
            Waiting::NoHosts => Some("no host is connected".into()),
            Waiting::Missing(n) => Some(format!("{n} pieces are at no host that is connected")),
            Waiting::AllBusy(_) => Some("all hosts are busy with others".into()),
            Waiting::Silent => Some("the hosts do not answer".into()),
            Waiting::Queued => Some("the hosts serve others first".into()),
        }
    }

    pub(super) fn fail(&mut self, error: &Error) {
        for asker in self.askers.drain(..) {
            asker.replies.fail(error);
        }
    }

    fn sources(&self) -> Vec<Source> {
        self.got
            .iter()
            .map(|(peer, (label, bytes))| Source {
                peer: peer.to_string(),
                label: label.clone(),
                bytes: *bytes,
            })
            .collect()
    }
}

fn interrupted() -> Error {
    Error::new(ErrorKind::Interrupted, "paused").hint("go on with potluck get")
}

impl Engine {
    pub(super) fn fetch_mut(&mut self, id: ContentId) -> Option<&mut Fetch> {
        match &mut self.contents.get_mut(&id)?.phase {
            Phase::Fetching(fetch) => Some(fetch),
            Phase::Whole(_) | Phase::Lost { .. } => None,
        }
    }

    pub(super) fn fetching(&self) -> Vec<ContentId> {
        let fetching = |c: &Content| matches!(&c.phase, Phase::Fetching(_));
        self.contents.iter().filter(|(_, c)| fetching(c)).map(|(id, _)| *id).collect()
    }

    /// Begins to fetch what the index found, for `asker`.
    pub(super) fn begin_fetch(
        &mut self,
        found: &Found,
        name: Option<KnownName>,
        target: PathBuf,
        overwrite: bool,
        asker: Asker,
    ) {
        if !self.contents.contains_key(&found.id) {
            let fetch = Fetch::new(found.size, target, overwrite);
            self.add(found.id, name, Phase::Fetching(Box::new(fetch)));
        }
        self.follow(found.id, asker);
        self.on_found(found);
    }

    /// The same as [`Engine::follow`], for somebody who says where it is to go. A fetch that was all
    /// there but found its place taken takes the new one; any other keeps its own.
    pub(super) fn follow_to(&mut self, id: ContentId, to: &Path, overwrite: bool, asker: Asker) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        let taken = fetch.paused.as_ref().is_some_and(|why| why.kind == ErrorKind::Exists);
        let name = fetch.target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let (true, Some(replica)) = (taken, &fetch.replica) {
            let target = target_of(to, &name);
            if let Err(error) = replica.retarget(&target, overwrite) {
                asker.replies.fail(&error);
                return;
            }
            fetch.target = target;
        }
        self.follow(id, asker);
    }

    /// Adds somebody who waits; a paused fetch goes on.
    pub(super) fn follow(&mut self, id: ContentId, asker: Asker) {
        if let Err(e) = self.notes().set_paused(id, false) {
            asker.replies.fail(&e);
            return;
        }
        let name = self.contents.get(&id).and_then(|c| c.name.clone());
        let now = clock::now();
        let served = self.sharing.counts();
        let Some(fetch) = self.fetch_mut(id) else { return };
        asker.replies.send(Event::Fetching {
            id: id.to_string(),
            version: name.as_ref().map(|n| n.record.version.0),
            name: name.map(|n| n.record.name.to_string()),
            size: fetch.size,
            have: fetch.have_bytes(),
            path: fetch.target.clone(),
        });
        fetch.before.get_or_insert_with(|| Before::now(served));
        fetch.askers.push(asker);
        fetch.last_source = now;
        fetch.next_search = now;
        if fetch.paused.take().is_some() {
            fetch.began = now;
            fetch.disk_retry = None;
            if let Some(swarm) = &mut fetch.swarm {
                swarm.resume(now);
                if swarm.have().is_full() {
                    return self.complete(id);
                }
            }
        }
        self.connect(id);
    }

    /// Stops fetching until asked again; what is here stays.
    pub(super) fn pause(&mut self, id: ContentId, why: Error) {
        if let Err(e) = self.notes().set_paused(id, true) {
            warn!(error = %e, "a pause is not remembered over a restart");
        }
        let now = clock::now();
        let Some(fetch) = self.fetch_mut(id) else { return };
        info!(content = %id, why = %why, "paused");
        if let Some(swarm) = &mut fetch.swarm {
            for conn in std::mem::take(&mut fetch.opened).into_keys() {
                swarm.on_gone(now, Self::host_of(conn));
            }
            swarm.pause(now);
        }
        fetch.opened.clear();
        fetch.meta = None;
        fetch.known.values_mut().for_each(|known| known.conn = None);
        fetch.fail(&why);
        let nothing_here = fetch.replica.is_none() && !fetch.preparing;
        fetch.paused = Some(why);
        self.close_our_channels(id);
        if nothing_here {
            self.remove(id);
        }
    }

    fn close_our_channels(&mut self, id: ContentId) {
        for conn in self.conns.values_mut() {
            conn.ours.retain(|number, content| {
                if *content == id {
                    let channel = Channel { number: *number, opener: Side::Us };
                    conn.connection.tell(Command::Close { channel });
                }
                *content != id
            });
        }
    }

    pub(super) fn on_prepared(
        &mut self,
        content: ContentId,
        from: ConnId,
        result: Result<Arc<Replica>>,
    ) {
        let Some(fetch) = self.fetch_mut(content) else {
            // Unshared meanwhile: nothing of it is to stay.
            if result.is_ok() {
                self.store.retire(&content, Vec::new());
                self.once_clean(|_| ());
            }
            return;
        };
        fetch.preparing = false;
        match result {
            Ok(replica) => {
                let layout = Arc::new(replica.layout().clone());
                let mut swarm = Swarm::new(layout, replica.have(), dice());
                if fetch.paused.is_some() {
                    swarm.pause(clock::now());
                }
                fetch.swarm = Some(swarm);
                fetch.replica = Some(replica.clone());
                let opened: Vec<ConnId> =
                    fetch.opened.iter().filter(|(_, o)| o.answered).map(|(id, _)| *id).collect();
                if let Err(e) = self.keep_name(content) {
                    warn!(error = %e, "a name is not remembered");
                }
                self.host(&replica, false);
                for id in opened {
                    self.attach(id, content);
                }
                self.admit_early(content);
            }
            Err(error) if error.kind == ErrorKind::Integrity => {
                warn!(content = %content, error = %error, "a host sent a false list of pieces");
                self.ban(from);
                self.drop_host(
                    from,
                    Goodbye::BadPiece,
                    "the proof does not fold to the content's id",
                );
                self.want_meta(content);
            }
            Err(error) => {
                fetch.fail(&error);
                self.remove(content);
            }
        }
    }

    fn keep_name(&self, id: ContentId) -> Result<()> {
        let name = self.contents.get(&id).and_then(|c| c.name.as_ref());
        self.notes().set_name_of(id, name)
    }

    pub(super) fn on_piece(
        &mut self,
        id: ConnId,
        channel: u16,
        piece: Piece,
        bytes: u32,
        put: Result<Put, PutError>,
    ) {
        let now = clock::now();
        let Some(content) = self.ours(id, channel) else { return };
        let Some(conn) = self.conns.get(&id) else { return };
        let Some(Content { number, phase: Phase::Fetching(fetch), .. }) =
            self.contents.get_mut(&content)
        else {
            return;
        };
        let arrived = match put {
            Ok(Put::New) => {
                self.received_bytes += u64::from(bytes);
                let entry = fetch.got.entry(conn.peer).or_default();
                entry.0.clone_from(&conn.label);
                entry.1 += u64::from(bytes);
                fetch.last_piece.insert(id, now);
                fetch.last_source = now;
                self.sharing.on_held(*number, &[piece]);
                Arrived::New
            }
            Ok(Put::Duplicate) => Arrived::Duplicate,
            Err(PutError::BadPiece) => {
                warn!(peer = %conn.peer, label = conn.label, content = %content, piece = piece.0, "a bad piece: it is asked of others");
                Arrived::Bad
            }
            Err(PutError::Disk(error)) => {
                self.on_disk_trouble(content, error);
                Arrived::Failed
            }
        };
        self.with_swarm(id, channel, |swarm, now, host| swarm.on_piece(now, host, piece, arrived));
    }

    /// Our own disk does not take a piece: those who wait are told now; a full disk is tried again.
    fn on_disk_trouble(&mut self, content: ContentId, error: Error) {
        let now = clock::now();
        let Some(fetch) = self.fetch_mut(content) else { return };
        if fetch.disk_retry.is_some() || fetch.paused.is_some() {
            return;
        }
        warn!(content = %content, error = %error, "cannot write");
        if error.kind == ErrorKind::DiskFull {
            fetch.disk_retry = Some(now + DISK_RETRY);
            if let Some(swarm) = &mut fetch.swarm {
                swarm.pause(now);
            }
            let error =
                error.hint("free some space: the fetch then goes on by itself (potluck status)");
            fetch.fail(&error);
        } else {
            self.pause(content, error);
        }
    }

    /// Pieces turned bad on our own disk: they are missing again.
    pub(super) fn restart_fetch(&mut self, id: ContentId) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        let Some(replica) = fetch.replica.clone() else { return };
        let layout = Arc::new(replica.layout().clone());
        fetch.earlier = fetch.counts();
        fetch.swarm = Some(Swarm::new(layout, replica.have(), dice()));
        fetch.opened.clear();
        fetch.known.values_mut().for_each(|known| known.conn = None);
        self.host(&replica, false);
        self.register(id);
        self.connect(id);
    }

    /// Does what the swarms want done; true if there was anything.
    pub(super) fn act_for_fetches(&mut self) -> bool {
        let mut busy = false;
        for content in self.fetching() {
            while let Some(output) =
                self.fetch_mut(content).and_then(|f| f.swarm.as_mut()).and_then(Swarm::poll_output)
            {
                busy = true;
                self.act_for_swarm(content, output);
            }
        }
        busy
    }

    fn act_for_swarm(&mut self, content: ContentId, output: Output) {
        match output {
            Output::Ask { host, pieces } => {
                self.tell_host(content, host, |channel| Command::Want { channel, pieces });
            }
            Output::Cancel { host, pieces } => {
                self.tell_host(content, host, |channel| Command::Cancel { channel, pieces });
            }
            Output::Drop { host, why } => {
                let id = Self::conn_of(host);
                match why {
                    Why::Poison => {
                        self.ban(id);
                        self.drop_host(id, Goodbye::BadPiece, "a piece did not match its proof");
                    }
                    Why::Silent => self.drop_host(id, Goodbye::TimedOut, "no piece came"),
                }
            }
            Output::Announce(pieces) => self.announce(content, &pieces),
            Output::NeedHosts => {
                if let Some(fetch) = self.fetch_mut(content)
                    && fetch.next_search > clock::now() + SEARCH_EVERY / 2
                {
                    return;
                }
                self.locate(content);
            }
            Output::Complete => self.complete(content),
        }
    }

    fn tell_host(&self, content: ContentId, host: Host, command: impl FnOnce(u16) -> Command) {
        let id = Self::conn_of(host);
        if let Some(Content { phase: Phase::Fetching(fetch), .. }) = self.contents.get(&content)
            && let (Some(opened), Some(conn)) = (fetch.opened.get(&id), self.conns.get(&id))
        {
            conn.connection.tell(command(opened.channel));
        }
    }

    /// Tells neighbours and the index what is here now.
    fn announce(&mut self, content: ContentId, pieces: &[Piece]) {
        for some in pieces.chunks(MAX_PIECES) {
            self.tell_all(content, |channel| Command::HaveMore { channel, pieces: some.to_vec() });
        }
        let Some(fetch) = self.fetch_mut(content) else { return };
        let held = fetch.replica.as_ref().map_or(0, |replica| replica.thousandths());
        if !std::mem::replace(&mut fetch.registered, true) {
            return self.register(content);
        }
        if let Some(line) = &mut self.line {
            line.link.update_held(clock::now(), content, held);
        }
    }

    fn complete(&mut self, content: ContentId) {
        let Some(fetch) = self.fetch_mut(content) else { return };
        let Some(replica) = fetch.replica.clone() else { return };
        if std::mem::replace(&mut fetch.finishing, true) {
            return;
        }
        let finishing = replica.clone();
        self.job(
            move || finishing.finish(),
            move |engine, result| engine.on_finished(content, replica, result),
        );
    }

    fn on_finished(&mut self, content: ContentId, replica: Arc<Replica>, result: Result<PathBuf>) {
        let now = clock::now();
        let served = self.sharing.counts();
        let Some(fetch) = self.fetch_mut(content) else { return };
        if !fetch.replica.as_ref().is_some_and(|now| Arc::ptr_eq(now, &replica)) {
            return; // it was called off, and begun again since
        }
        fetch.finishing = false;
        let path = match result {
            Ok(path) => path,
            Err(error) if error.kind == ErrorKind::DiskFull => {
                return self.on_disk_trouble(content, error);
            }
            // Pieces were lost behind our back (a failed sync, somebody in the files): fetch them again.
            Err(error) if error.kind == ErrorKind::Integrity => {
                warn!(content = %content, error = %error, "not complete after all");
                return self.restart_fetch(content);
            }
            Err(error) => return self.pause(content, error),
        };
        let seconds = now.since(fetch.began).as_secs_f64();
        let sources = fetch.sources();
        let counts = fetch.counts();
        let stats = Box::new(fetch.before.unwrap_or_default().stats(counts, served));
        let bytes = replica.size();
        info!(content = %content, path = %path.display(), bytes, seconds, "complete");
        for asker in fetch.askers.drain(..) {
            asker.replies.send(Event::Done {
                id: content.to_string(),
                path: path.clone(),
                bytes,
                seconds,
                sources: sources.clone(),
                stats: Some(stats.clone()),
            });
        }
        self.fetched += counts;
        self.close_our_channels(content);
        if let Some(known) = self.contents.get_mut(&content) {
            known.phase = Phase::Whole(replica);
        }
        self.register(content);
    }

    /// Twice a second: connect, search, tell those who wait, notice those who went.
    pub(super) fn tend_fetches(&mut self, now: Moment) {
        for id in self.fetching() {
            self.tend_disk(id, now);
            let Some(fetch) = self.fetch_mut(id) else { continue };
            if fetch.paused.is_some() {
                continue;
            }
            if let Some((from, asked)) = fetch.meta
                && now.since(asked) > META_PATIENCE
            {
                fetch.meta = None;
                fetch.opened.remove(&from); // at once, so that another is asked
                self.drop_host(from, Goodbye::TimedOut, "the list of pieces did not come");
                self.want_meta(id);
            }
            self.leave_silent(id, now);
            self.connect(id);
            self.tell_askers(id, now);
            let Some(fetch) = self.fetch_mut(id) else { continue };
            let few = fetch.opened.len() < MAX_NEIGHBOURS / 2;
            if fetch.next_search <= now && few && !fetch.finishing {
                self.locate(id);
            }
        }
    }

    fn tend_disk(&mut self, id: ContentId, now: Moment) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        if fetch.disk_retry.is_some_and(|at| at <= now) {
            fetch.disk_retry = None;
            if let Some(swarm) = &mut fetch.swarm {
                swarm.resume(now);
                if swarm.have().is_full() {
                    self.complete(id);
                }
            }
        }
    }

    fn tell_askers(&mut self, id: ContentId, now: Moment) {
        let Some(fetch) = self.fetch_mut(id) else { return };
        let recent = |at: &&Moment| now.since(**at) < Duration::from_secs(3);
        let waiting = fetch.waiting(now);
        let stuck = match &fetch.swarm {
            None => !fetch.opened.values().any(|o| o.answered) && !fetch.preparing,
            Some(swarm) => matches!(
                swarm.waiting(now),
                Some(Waiting::NoHosts | Waiting::Missing(_) | Waiting::Silent)
            ),
        };
        if !stuck || fetch.finishing {
            fetch.last_source = now;
        }
        let progress = Event::Progress {
            id: id.to_string(),
            done: fetch.have_bytes(),
            total: fetch.size,
            rate: fetch.swarm.as_ref().map_or(0, Swarm::rate),
            sources: fetch.last_piece.values().filter(recent).count() as u32,
            hosts: fetch.opened.len() as u32,
            waiting,
        };
        let had_askers = !fetch.askers.is_empty();
        fetch.askers.retain(|asker| {
            // A reader that is behind misses some progress; one that is gone is gone.
            asker.replies.send(progress.clone());
            !asker.replies.is_gone()
        });
        if had_askers && fetch.askers.is_empty() {
            return self.pause(id, interrupted());
        }
        let without = now.since(fetch.last_source);
        if had_askers && fetch.askers.iter().all(|asker| asker.timeout <= without) {
            let error = self.no_source(id, without);
            self.pause(id, error);
        }
    }

    fn no_source(&mut self, id: ContentId, without: Duration) -> Error {
        let what = self
            .contents
            .get(&id)
            .and_then(|c| c.name.as_ref())
            .map_or_else(|| id.short(), |n| format!("{}@{}", n.record.name, n.record.version));
        let seconds = without.as_secs();
        let reachable = self.line.as_ref().is_some_and(super::network::Line::is_up);
        let certificate = self.line.as_ref().map(|line| &line.membership.certificate);
        let timely = certificate.is_none_or(|c| c.is_timely(clock::wall()).is_ok());
        let Some(fetch) = self.fetch_mut(id) else { return interrupted() };
        let (here, size) = (fetch.have_bytes(), fetch.size);
        if let (None, Some(other)) = (&fetch.swarm, fetch.other_size) {
            return lie(format!(
                "the index says that {what} has {size} bytes, a host says {other}: one of them is wrong"
            ));
        }
        let missing = fetch.swarm.as_ref().map_or_else(
            || format!("all {size} bytes of {what}"),
            |swarm| {
                let have = swarm.have();
                let gone = have.len() - have.count();
                format!(
                    "{gone} of the {} pieces of {what} ({} of {size} bytes)",
                    have.len(),
                    size - here
                )
            },
        );
        let index = if reachable { "" } else { "; the index does not answer either" };
        let clock = if timely {
            ""
        } else {
            ". This machine's clock may be wrong: by it, its own certificate is not valid, nor would others' be"
        };
        Error::new(
            ErrorKind::NoSource,
            format!("no peer that is reachable has {missing}: none came for {seconds} s{index}{clock}"),
        )
        .hint(format!(
            "what came is kept: when a host is back, go on with potluck get {what} (potluck find {what} tells who has it)"
        ))
    }
}

/// The path a content goes to: into `to` where that is a folder, else `to` itself.
pub(super) fn target_of(to: &Path, name: &str) -> PathBuf {
    if to.is_dir() { to.join(name) } else { to.to_owned() }
}

/// The first of `name (2)`, `name (3)` … that is free; the number goes before the extension.
pub(super) fn free_name(target: &Path) -> PathBuf {
    let stem = target.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let extension = target.extension().map(|e| format!(".{}", e.to_string_lossy()));
    (2u32..)
        .map(|n| {
            target.with_file_name(format!("{stem} ({n}){}", extension.as_deref().unwrap_or("")))
        })
        .find(|path| path.symlink_metadata().is_err())
        .unwrap_or_else(|| target.to_owned())
}
