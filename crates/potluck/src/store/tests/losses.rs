//! Pieces that were there and are lost: nothing claims them, whatever fails meanwhile.

use super::super::journal::{FAIL_WRITES, Record};
use super::*;

const PIECES: u32 = 9;

/// A file of nine pieces, all of which are here, durable and claimed; nothing is made durable any more
/// but by hand.
struct Held {
    from: Bench,
    to: Bench,
    source: Arc<Replica>,
    replica: Option<Arc<Replica>>,
}

impl Held {
    fn new() -> Self {
        let (from, to) = (Bench::new(), Bench::new());
        fs::write(from.at("f"), some_bytes(PIECES as usize * PIECE, 8)).unwrap();
        let source = from.share("f");
        let replica = to.fetch(&source, "f").unwrap();
        to.kill();
        carry(&source, &replica, shuffled(&source, 1));
        to.store().flush().unwrap();
        Self { from, to, source, replica: Some(replica) }
    }

    fn part(&self) -> PathBuf {
        files::part_path(&self.to.at("f"), &self.source.id())
    }

    fn rots(&self, piece: u32) {
        let part = File::options().write(true).open(self.part()).unwrap();
        part.write_all_at(b"rot", u64::from(piece) * PIECE as u64).unwrap();
    }

    fn journal(&self) -> PathBuf {
        let mut journals = fs::read_dir(self.to.at("state/peer/journal")).unwrap();
        journals.next().unwrap().unwrap().path()
    }

    fn records(&self) -> Vec<Record> {
        Journal::open(&self.journal()).unwrap().unwrap().2
    }

    fn replica(&self) -> &Arc<Replica> {
        self.replica.as_ref().unwrap()
    }

    /// The process ends here, and another one begins.
    fn restarts(&mut self) {
        self.replica = None; // and with it the lock on the part
        self.replica = self.to.restart().pop();
        self.to.kill();
    }

    fn is_whole_in_the_end(&self) {
        carry(&self.source, self.replica(), shuffled(&self.source, 2));
        self.replica().finish().unwrap();
        assert!(fs::read(self.to.at("f")).unwrap() == fs::read(self.from.at("f")).unwrap());
    }
}

fn held(pieces: impl IntoIterator<Item = u32>) -> Record {
    Record::Held(pieces.into_iter().map(Piece).collect())
}

/// A loss that could not be noted was forgotten: the piece was claimed from before, whatever became of
/// it afterwards.
#[test]
fn a_loss_that_cannot_be_noted_is_noted_before_anything_is_claimed_or_named() {
    let it = Held::new();
    it.rots(3);
    let growing = it.replica().as_growing().unwrap();
    growing.fail_journal(u32::MAX);
    assert!(it.replica().suspect(Piece(3)));
    assert!(!it.replica().have().has(Piece(3)) && !growing.is_flushed());
    assert!(it.to.store().flush().is_err());
    carry(&it.source, it.replica(), [Piece(3)]);
    assert!(it.replica().is_complete());
    assert!(it.to.store().flush().is_err());
    assert!(it.replica().finish().is_err());
    let at = growing.at();
    let moved = At { part: it.to.at("elsewhere"), ..at.clone() };
    assert!(growing.retarget(moved).is_err() && growing.at() == at);
    assert!(!it.to.at("f").exists());
    assert_eq!(it.records(), [held(0..PIECES)]);

    growing.fail_journal(0);
    it.to.store().flush().unwrap();
    assert_eq!(it.records(), [held(0..PIECES), Record::Lost(vec![Piece(3)]), held([3])]);
    it.is_whole_in_the_end();
}

#[test]
fn a_process_that_ends_before_a_loss_is_noted_leaves_a_journal_that_is_not_believed() {
    let mut it = Held::new();
    it.rots(3);
    it.replica().as_growing().unwrap().fail_journal(1);
    assert!(it.replica().suspect(Piece(3)));
    it.restarts();
    assert!(it.replica().have().is_empty());
    // From here on as ever.
    carry(&it.source, it.replica(), [Piece(5)]);
    it.to.store().flush().unwrap();
    it.restarts();
    assert_eq!(it.replica().have().iter().collect::<Vec<_>>(), [Piece(5)]);
    it.is_whole_in_the_end();
}

#[test]
fn a_loss_is_noted_by_itself_once_that_is_possible() {
    let (from, to) = (Bench::new(), Bench::new());
    fs::write(from.at("f"), some_bytes(3 * PIECE, 8)).unwrap();
    let source = from.share("f");
    let replica = to.fetch(&source, "f").unwrap();
    carry(&source, &replica, [Piece(1)]);
    to.store().flush().unwrap();
    let growing = replica.as_growing().unwrap();
    growing.fail_journal(3);
    fs::write(growing.at().part, "").unwrap();
    assert!(replica.suspect(Piece(1)));
    while !growing.is_flushed() {
        std::thread::yield_now();
    }
}

/// It was left out until the next start, and whoever fetched it again lost what was there.
#[test]
fn a_download_is_taken_up_although_a_loss_cannot_be_noted() {
    let mut it = Held::new();
    let part = File::options().write(true).open(it.part()).unwrap();
    part.set_len(5 * PIECE as u64).unwrap();
    FAIL_WRITES.set(2);
    it.restarts();
    FAIL_WRITES.set(0);
    assert_eq!(it.replica().have().count(), 5);
    assert!(!it.replica().as_growing().unwrap().is_flushed());
    it.to.store().flush().unwrap();
    let lost = Record::Lost((5..PIECES).map(Piece).collect());
    assert_eq!(it.records(), [held(0..PIECES), lost]);
    it.is_whole_in_the_end();
}

/// The journal of a download that could not be taken up was still there when its part was made anew, of
/// the right size and with nothing in it.
#[test]
fn what_could_not_be_taken_up_claims_nothing_of_what_is_begun_in_its_place() {
    let mut it = Held::new();
    let part = it.part();
    it.replica = None;
    it.to.store = None;
    let other = File::open(&part).unwrap();
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert!(it.to.start().is_empty());
    drop(other);
    // It ends here: with the new part, and before it has a journal.
    FAIL_WRITES.set(1);
    it.to.fetch(&it.source, "f").unwrap_err();
    FAIL_WRITES.set(0);
    File::create(&part).unwrap().set_len(u64::from(PIECES) * PIECE as u64).unwrap();
    assert!(it.to.restart().is_empty());
    it.replica = Some(it.to.fetch(&it.source, "f").unwrap());
    assert!(it.replica().have().is_empty());
    it.is_whole_in_the_end();
}

/// A part whose disk was away for a while was gone on with although the journal claimed pieces that
/// this process had not looked for.
#[test]
fn a_part_that_comes_back_later_is_begun_anew() {
    let mut it = Held::new();
    let (part, away) = (it.part(), it.to.at("somewhere"));
    fs::rename(&part, &away).unwrap();
    it.restarts();
    assert!(it.replica().have().is_empty());
    File::options().write(true).open(&away).unwrap().set_len(0).unwrap();
    fs::rename(&away, &part).unwrap();
    carry(&it.source, it.replica(), [Piece(PIECES - 1)]);
    it.to.store().flush().unwrap();
    it.restarts();
    assert_eq!(it.replica().have().iter().collect::<Vec<_>>(), [Piece(PIECES - 1)]);
    it.is_whole_in_the_end();
}

/// A file that others had cut was given its size before its pieces were noted as lost.
#[test]
fn what_others_have_cut_keeps_its_size_until_its_loss_is_noted() {
    let mut it = Held::new();
    File::options().write(true).open(it.part()).unwrap().set_len(PIECE as u64).unwrap();
    it.replica().as_growing().unwrap().fail_journal(2);
    assert_eq!(it.replica().finish().unwrap_err().kind, ErrorKind::Integrity);
    assert_eq!(it.part().metadata().unwrap().len(), PIECE as u64);
    assert!(it.replica().have().is_empty());
    it.restarts();
    assert_eq!(it.replica().have().count(), 1);
    it.is_whole_in_the_end();
}

/// `verify` looked for the part under its temporary name, and withdrew what had just got its final one.
#[test]
fn what_gets_its_final_name_while_it_is_looked_at_is_looked_at_there() {
    let (from, to) = (Bench::new(), Bench::new());
    fs::create_dir(from.at("tree")).unwrap();
    for n in 0..30 {
        fs::write(from.at(&format!("tree/{n}")), some_bytes(33 * PIECE, n)).unwrap();
    }
    let source = from.share("tree");
    let replica = to.fetch(&source, "tree").unwrap();
    carry(&source, &replica, shuffled(&source, 1));
    let once = Once::new();
    let finish = |_, _| once.call_once(|| drop(replica.finish().unwrap()));
    assert_eq!(replica.recheck(&finish, &AtomicBool::new(false)).unwrap(), []);
    assert!(replica.is_complete() && !replica.is_growing() && !replica.changed());
}

/// The thread that thinks waited for the disk of whatever was being begun, finished or withdrawn.
#[test]
fn what_is_withdrawn_waits_for_no_disk_and_is_gone_for_whoever_begins_later() {
    let mut it = Held::new();
    let (id, part) = (it.source.id(), it.part());
    it.to.store().set_note("name", Some(b"n")).unwrap();
    {
        // As somebody holds them who waits for a disk.
        let _beginning = lock(&it.to.store().changing);
        let _finishing = it.replica().placing_alone();
        it.to.store().retire(&id, vec!["name".into()]);
        assert!(it.replica().is_growing() && it.replica().path() == it.to.at("f"));
        assert!(part.exists() && it.to.store().note("name").unwrap().is_some());
    }
    // Before anything was removed.
    let again = it.to.fetch(&it.source, "f").unwrap();
    assert!(again.have().is_empty() && !Arc::ptr_eq(&again, it.replica()));
    assert_eq!(it.to.store().note("name").unwrap(), None);
    it.to.store().clean();
    it.replica = Some(again);
    it.is_whole_in_the_end();
    it.to.store().retire(&id, Vec::new());
    it.replica = Some(it.to.share("f"));
    it.to.store().clean();
    it.restarts();
    assert!(it.replica().is_complete() && !it.replica().is_growing());
}
