//! Owns the database in which an index's memory survives: written by one thread, in groups. Never
//! decides what is saved (the registrar does), and never keeps anybody waiting: where the disk fails,
//! the index goes on from memory.
//!
//! A database that failed once is not trusted again: after a failed fsync nobody knows which pages the
//! disk has. All that is in memory is written to a new file, which then takes the place of the old
//! one; so a disk that was full, slow or broken is made up for by the same few lines.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use potluck_core::registrar::{Change, Table, Walk};
use potluck_core::time::Moment;
use potluck_core::wire::desk::{Answer, DeskCode, DeskRefusal};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use tracing::{debug, error, info, warn};

use crate::clock;
use crate::error::{Error, Result};
use crate::state::Hold;

/// Memory that the database may use: its file is read once, when the index starts.
const CACHE: usize = 8 << 20;
/// Rows that may wait to be written, about 50 MB: for more, all is written anew once there is time.
const MOST_WAITING: usize = 1 << 17;
/// Rows copied at once where all is written anew: nobody else thinks meanwhile.
const ROWS_AT_ONCE: usize = 4_096;
/// The wait before a disk that failed is tried again: at first …
const SHORTEST_WAIT: Duration = Duration::from_secs(1);
/// … and at most.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What the writing thread does, in order.
pub(super) enum Write {
    Change(Change),
    /// Let this answer go once everything before it is on disk.
    Answer(Sender<Option<Answer>>, Box<Answer>),
    /// Write what came before this, and end.
    Stop,
}

/// What is to be written, and how writing goes: shared by who thinks and who writes.
pub(super) struct Queue {
    writes: Sender<Write>,
    /// A change was left out: all has to be written anew.
    behind: AtomicBool,
    trouble: Mutex<Option<String>>,
    pub(super) commits: AtomicU64,
    pub(super) rows: AtomicU64,
    pub(super) failures: AtomicU64,
}

impl Queue {
    pub(super) fn new(writes: Sender<Write>) -> Self {
        let (commits, rows, failures) = Default::default();
        let (behind, trouble) = (false.into(), Mutex::default());
        Self { writes, behind, trouble, commits, rows, failures }
    }

    /// Never waits. What finds no room is left out, and made up for.
    pub(super) fn push(&self, write: Write) {
        if matches!(write, Write::Change(_)) && self.writes.len() >= MOST_WAITING {
            self.behind.store(true, Ordering::Release);
            return;
        }
        drop(self.writes.send(write));
    }

    /// Rows that wait.
    pub(super) fn waiting(&self) -> usize {
        self.writes.len()
    }

    /// Why what changes now would be lost at a restart, where it would.
    pub(super) fn trouble(&self) -> Option<String> {
        self.troubled().clone()
    }

    fn troubled(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A saved row: its table, key and value.
type SavedRow = (Table, Vec<u8>, Vec<u8>);
/// Makes or opens the database at a path.
type Open = Box<dyn Fn(&Path) -> Result<Database, DatabaseError> + Send>;
/// The next rows of all there are, from where the walk stands.
type Rows = Box<dyn Fn(&mut Walk, usize) -> Vec<Change> + Send>;

/// The database, or the wait for one.
pub(super) struct Journal {
    path: PathBuf,
    open: Open,
    state: State,
    _lock: Hold,
}

enum State {
    Well(Database),
    /// What comes is in memory only, until all of it is written to a new file.
    Ailing {
        wait: Duration,
        next_try: Moment,
    },
}

impl Journal {
    /// Opens the database in `dir`; all rows that can be read.
    ///
    /// # Errors
    /// It cannot be opened, and not because it is damaged.
    pub(super) fn open(dir: &Path, lock: Hold) -> Result<(Self, Vec<SavedRow>)> {
        let open = |path: &Path| Database::builder().set_cache_size(CACHE).create(path);
        Self::open_by(Box::new(open), dir, lock)
    }

    fn open_by(open: Open, dir: &Path, lock: Hold) -> Result<(Self, Vec<SavedRow>)> {
        let path = dir.join("index.redb");
        let mut rows = vec![];
        let read = match open(&path) {
            Ok(database) => read_all(&database, &mut rows).map(|()| database),
            Err(DatabaseError::Storage(redb::StorageError::Io(e)))
                if e.kind() != std::io::ErrorKind::InvalidData =>
            {
                return Err(Error::io(format_args!("cannot open {}", path.display()), &e));
            }
            Err(e) => Err(e.into()),
        };
        let state = match read {
            Ok(database) => State::Well(database),
            Err(e) => {
                // What could not be read the members know, almost all of it, and register it again.
                let kept = path.with_extension("redb.damaged");
                error!(error = %e, kept = %kept.display(), rows = rows.len(), "the index's database is damaged: going on with what can be read");
                fs::rename(&path, &kept).map_err(|e| {
                    Error::io(format_args!("cannot move {} aside", path.display()), &e)
                })?;
                ailing(clock::now())
            }
        };
        Ok((Self { path, open, state, _lock: lock }, rows))
    }

    /// Writes what comes, until it is told to stop.
    pub(super) fn run(mut self, queue: &Queue, writes: &Receiver<Write>, all: &Rows) {
        let mut stop = false;
        while !stop {
            let first = match &self.state {
                State::Well(_) => writes.recv().map_err(|_| RecvTimeoutError::Disconnected),
                State::Ailing { next_try, .. } => writes.recv_timeout(next_try.since(clock::now())),
            };
            if matches!(first, Err(RecvTimeoutError::Disconnected)) {
                return;
            }
            let mut batch = Batch::default();
            stop = batch.gather(first.into_iter().chain(writes.try_iter()));
            self.write(clock::now(), batch, queue, all, stop);
        }
    }

    /// Commits a batch, and lets its answers go. One that is the last tries once more what failed.
    fn write(&mut self, now: Moment, batch: Batch, queue: &Queue, all: &Rows, last: bool) {
        if queue.behind.swap(false, Ordering::AcqRel) {
            warn!(waiting = MOST_WAITING, "the disk is slower than the index: writing all anew");
            self.state = ailing(now);
        }
        let done = match &self.state {
            State::Well(database) => commit(database, &batch.changes),
            State::Ailing { next_try, .. } if *next_try > now && !last => {
                return batch.refuse();
            }
            State::Ailing { .. } => self.renew(&batch.changes, all).map(|database| {
                self.state = State::Well(database);
            }),
        };
        match done {
            Ok(()) => {
                queue.commits.fetch_add(1, Ordering::Relaxed);
                queue.rows.fetch_add(batch.changes.len() as u64, Ordering::Relaxed);
                if queue.troubled().take().is_some() {
                    info!("the index's state is on disk again, all of it");
                }
                batch.release();
            }
            Err(e) => {
                queue.failures.fetch_add(1, Ordering::Relaxed);
                let folder = self.path.parent().unwrap_or(&self.path).display();
                if queue.troubled().replace(e.to_string()).is_none() {
                    error!(error = %e, %folder, "the index cannot save its state: it goes on from memory and tries again; were it to end now, what changes from here on would be lost");
                } else {
                    debug!(error = %e, %folder, "the index still cannot save its state");
                }
                let wait = match &self.state {
                    State::Well(_) => SHORTEST_WAIT,
                    State::Ailing { wait, .. } => (*wait * 2).min(LONGEST_WAIT),
                };
                self.state = State::Ailing { wait, next_try: now + wait };
                batch.refuse();
            }
        }
    }

    /// Writes all there is to a new file, then the changes `since` it was last written, and puts it in the place of the old.
    /// Each row is as it was at some moment since this began, and every change after that moment is
    /// among what came or comes: so in the end all are as they are.
    fn renew(&self, since: &[Change], all: &Rows) -> Result<Database, redb::Error> {
        let fresh = self.path.with_extension("redb.new");
        match fs::remove_file(&fresh) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let database = (self.open)(&fresh)?;
        let transaction = database.begin_write()?;
        let mut walk = Walk::default();
        loop {
            let rows = all(&mut walk, ROWS_AT_ONCE);
            if rows.is_empty() {
                break;
            }
            put(&transaction, &rows)?;
        }
        put(&transaction, since)?;
        transaction.commit()?;
        fs::rename(&fresh, &self.path)?;
        if let Some(folder) = self.path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(database)
    }
}

/// It will be written anew as soon as there is time.
const fn ailing(now: Moment) -> State {
    State::Ailing { wait: SHORTEST_WAIT, next_try: now }
}

/// What is written together.
#[derive(Default)]
struct Batch {
    changes: Vec<Change>,
    answers: Vec<(Sender<Option<Answer>>, Box<Answer>)>,
}

impl Batch {
    /// Says whether to stop.
    fn gather(&mut self, writes: impl Iterator<Item = Write>) -> bool {
        let mut stop = false;
        for write in writes {
            match write {
                Write::Change(change) => self.changes.push(change),
                Write::Answer(reply, answer) => self.answers.push((reply, answer)),
                Write::Stop => stop = true,
            }
        }
        stop
    }

    fn release(self) {
        for (reply, answer) in self.answers {
            let _ = reply.try_send(Some(*answer));
        }
    }

    fn refuse(self) {
        for (reply, _) in self.answers {
            let _ = reply.try_send(Some(Answer::Refused(DeskRefusal {
                code: DeskCode::NotDurable,
                text: "the index cannot write its state (is its disk full?); nothing was promised"
                    .into(),
            })));
        }
    }
}

/// One redb table for each of the registrar's, keys and values as it encodes them.
fn table(of: Table) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
    TableDefinition::new(of.name())
}

fn commit(database: &Database, changes: &[Change]) -> Result<(), redb::Error> {
    if changes.is_empty() {
        return Ok(());
    }
    let transaction = database.begin_write()?;
    put(&transaction, changes)?;
    Ok(transaction.commit()?)
}

fn put(transaction: &redb::WriteTransaction, changes: &[Change]) -> Result<(), redb::Error> {
    for run in changes.chunk_by(|a, b| a.table == b.table) {
        let mut table = transaction.open_table(table(run[0].table))?;
        for change in run {
            match &change.value {
                Some(value) => drop(table.insert(&*change.key, &**value)?),
                None => drop(table.remove(&*change.key)?),
            }
        }
    }
    Ok(())
}

fn read_all(database: &Database, rows: &mut Vec<SavedRow>) -> Result<(), redb::Error> {
    let transaction = database.begin_read()?;
    for of in Table::ALL {
        match transaction.open_table(table(of)) {
            Ok(saved) => {
                for row in saved.iter()? {
                    let (key, value) = row?;
                    rows.push((of, key.value().to_vec(), value.value().to_vec()));
                }
            }
            Err(redb::TableError::TableDoesNotExist(_)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU8;

    use crossbeam_channel::{bounded, unbounded};
    use potluck_core::registrar::{Boot, Output, Registrar, Settings};
    use potluck_core::time::WallTime;
    use potluck_core::trust::{MachineKey, Role};
    use potluck_core::wire::desk::InviteTerms;
    use redb::StorageBackend;
    use redb::backends::FileBackend;

    use super::*;
    use crate::state::hold;

    const WALL: WallTime = WallTime(1_800_000_000);
    const WELL: u8 = 0;
    const FULL: u8 = 1;
    const BAD_WRITE: u8 = 2;
    const BAD_SYNC: u8 = 3;

    /// A disk that fails as it is told.
    #[derive(Clone, Debug)]
    struct Disk(Arc<AtomicU8>);

    #[derive(Debug)]
    struct Backend {
        file: FileBackend,
        disk: Disk,
    }

    impl Disk {
        fn is(&self, state: u8) {
            self.0.store(state, Ordering::SeqCst);
        }

        fn fails(&self, by: u8, error: rustix::io::Errno) -> std::io::Result<()> {
            if self.0.load(Ordering::SeqCst) == by { Err(error.into()) } else { Ok(()) }
        }

        fn open(&self) -> Open {
            let disk = self.clone();
            Box::new(move |path| {
                let mut file = File::options();
                file.read(true).write(true).create(true).truncate(false);
                let file = FileBackend::new(file.open(path).unwrap())?;
                Database::builder().create_with_backend(Backend { file, disk: disk.clone() })
            })
        }
    }

    impl StorageBackend for Backend {
        fn len(&self) -> std::io::Result<u64> {
            self.file.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
            self.file.read(offset, out)
        }
        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.disk.fails(FULL, rustix::io::Errno::NOSPC)?;
            self.file.set_len(len)
        }
        fn sync_data(&self) -> std::io::Result<()> {
            self.disk.fails(BAD_SYNC, rustix::io::Errno::IO)?;
            self.file.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            self.disk.fails(FULL, rustix::io::Errno::NOSPC)?;
            self.disk.fails(BAD_WRITE, rustix::io::Errno::IO)?;
            self.file.write(offset, data)
        }
    }

    /// An index's memory and the journal it is written to.
    struct Desk {
        registrar: Arc<Mutex<Registrar>>,
        journal: Journal,
        queue: Queue,
        writes: Receiver<Write>,
        all: Rows,
        now: Moment,
    }

    impl Desk {
        fn new(dir: &Path, disk: &Disk) -> Self {
            let (journal, rows) = Journal::open_by(disk.open(), dir, hold(dir).unwrap()).unwrap();
            let boot = Boot { id: 1, cookie_key: [1; 32], dice: 1, secret_seed: [7; 32] };
            let key = MachineKey::from_seed([9; 32]);
            let now = clock::now();
            let registrar =
                Registrar::new(key, boot, Settings::default(), rows.into_iter(), now, WALL);
            let registrar = Arc::new(Mutex::new(registrar.unwrap()));
            let (sender, writes) = unbounded();
            let at = Arc::clone(&registrar);
            let all: Rows = Box::new(move |walk, about| at.lock().unwrap().rows(walk, about));
            let queue = Queue::new(sender);
            let mut desk = Self { registrar, journal, queue, writes, all, now };
            desk.carry();
            desk.turn(false);
            desk
        }

        fn carry(&self) {
            let mut registrar = self.registrar.lock().unwrap();
            while let Some(output) = registrar.poll_output() {
                if let Output::Save(change) = output {
                    self.queue.push(Write::Change(change));
                }
            }
        }

        fn turn(&mut self, last: bool) {
            let mut batch = Batch::default();
            batch.gather(self.writes.try_iter());
            self.journal.write(self.now, batch, &self.queue, &self.all, last);
        }

        /// Makes an invitation; whether it was said to be on disk.
        fn invites(&mut self, last: bool) -> bool {
            let terms = InviteTerms {
                role: Role::Publish,
                uses: 1,
                expires: WALL.plus(Duration::from_secs(60)),
            };
            let made = self.registrar.lock().unwrap().make_invitation(self.now, WALL, terms);
            assert!(made.is_ok());
            self.carry();
            let (reply, answer) = bounded(1);
            self.queue.push(Write::Answer(reply, Box::new(Answer::Removed(0))));
            self.turn(last);
            match answer.try_recv().unwrap() {
                Some(Answer::Removed(0)) => true,
                Some(Answer::Refused(refused)) => {
                    assert_eq!(refused.code, DeskCode::NotDurable);
                    false
                }
                _ => panic!("another answer"),
            }
        }

        fn waits(&mut self, time: Duration) {
            self.now = self.now + time;
        }

        fn memory(&self) -> Vec<SavedRow> {
            let (mut walk, mut rows) = (Walk::default(), vec![]);
            loop {
                let some = (self.all)(&mut walk, 3);
                if some.is_empty() {
                    rows.sort();
                    return rows;
                }
                rows.extend(some.into_iter().map(|c| (c.table, c.key, c.value.unwrap())));
            }
        }
    }

    fn on_disk(dir: &Path) -> Vec<SavedRow> {
        let mut rows = Journal::open(dir, hold(dir).unwrap()).unwrap().1;
        rows.sort();
        rows
    }

    #[test]
    fn a_disk_that_fails_is_survived_said_and_made_up_for() {
        for failure in [FULL, BAD_WRITE, BAD_SYNC] {
            let (dir, disk) = (tempfile::tempdir().unwrap(), Disk(Arc::new(WELL.into())));
            let mut desk = Desk::new(dir.path(), &disk);
            assert!(desk.invites(false));
            disk.is(failure);
            assert!(!desk.invites(false), "nothing is promised that is not on disk");
            let trouble = desk.queue.trouble().expect("it is said");
            assert!(trouble.contains("I/O"), "{trouble}");
            assert!(!desk.invites(false), "nor tried again at once");
            assert_eq!(desk.queue.failures.load(Ordering::Relaxed), 1);
            desk.waits(SHORTEST_WAIT);
            assert!(!desk.invites(false), "tried again, in vain");
            assert_eq!(desk.queue.failures.load(Ordering::Relaxed), 2);
            disk.is(WELL);
            desk.waits(SHORTEST_WAIT);
            assert!(!desk.invites(false), "the waits grow");
            desk.waits(SHORTEST_WAIT);
            assert!(desk.invites(false), "all of it is on disk again");
            assert_eq!(desk.queue.trouble(), None);
            let memory = desk.memory();
            assert_eq!(memory.len(), 7, "six invitations and a secret");
            assert!(desk.invites(false), "and what comes is added to it");
            let memory_now = desk.memory();
            drop(desk);
            assert!(on_disk(dir.path()) == memory_now && memory_now.len() > memory.len());
        }
    }

    #[test]
    fn an_index_that_ends_while_its_disk_fails_tries_once_more() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), Disk(Arc::new(WELL.into())));
        let mut desk = Desk::new(dir.path(), &disk);
        disk.is(BAD_SYNC);
        assert!(!desk.invites(false));
        disk.is(WELL);
        assert!(desk.invites(true));
        let memory = desk.memory();
        drop(desk);
        assert!(on_disk(dir.path()) == memory);
    }

    #[test]
    fn where_the_disk_is_slower_than_the_index_what_was_left_out_is_written_in_the_end() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), Disk(Arc::new(WELL.into())));
        let mut desk = Desk::new(dir.path(), &disk);
        let row = || Change { table: Table::Invitations, key: vec![7; 8], value: None };
        for _ in 0..MOST_WAITING {
            desk.queue.push(Write::Change(row()));
        }
        assert!(desk.invites(false));
        assert_eq!(desk.queue.waiting(), 0);
        let memory = desk.memory();
        drop(desk);
        assert!(on_disk(dir.path()) == memory && memory.len() == 2);
    }

    #[test]
    fn of_a_damaged_file_nothing_wrong_is_taken_and_a_new_one_is_written() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), Disk(Arc::new(WELL.into())));
        let mut desk = Desk::new(dir.path(), &disk);
        assert!(desk.invites(false));
        drop(desk);
        let path = dir.path().join("index.redb");
        let length = fs::metadata(&path).unwrap().len();
        // Torn: the end is missing, and then the beginning is another's.
        for torn in [fs::read(&path).unwrap()[..length as usize / 3].to_vec(), vec![0x5a; 9_000]] {
            fs::write(&path, &torn).unwrap();
            let mut desk = Desk::new(dir.path(), &disk);
            assert!(fs::read(dir.path().join("index.redb.damaged")).unwrap() == torn);
            assert!(desk.invites(false), "it goes on");
            let memory = desk.memory();
            drop(desk);
            assert!(on_disk(dir.path()) == memory);
        }
    }
}
