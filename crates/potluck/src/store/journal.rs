//! Owns the file beside a running download that says what is already there, so that a crash costs
//! next to nothing. Never claims a piece by itself: whoever appends has made it durable before.
//!
//! ```text
//! magic      8   "PLJRNL\0\1"; "PLJRNL?\1" while its claims are in doubt
//! length     u32 of the head's body
//! check      8   of the head's body
//! body           id: kind u8, hash 32 · size u64 · overwrite u8 · target u32 length, bytes
//!                manifest u32 length, bytes · proof u32 length, bytes
//! records, each:
//!   kind     u8  1 held · 2 lost · 3 nothing held · 4 target · 5 renaming
//!   length   u32 of the body
//!   body         1, 2: runs of pieces, first u32, count u32
//!                4: overwrite u8, target (the rest) · 5: inode u64 of what gets its final name
//!   check    8   of kind, length and body
//! ```
//! Numbers are big-endian. A check is the beginning of the BLAKE3 of the content's hash, the position
//! in the file, and the bytes, so a record is good only where it was written. The first record that
//! is not whole ends the journal; what follows it is overwritten.
//!
//! A loss that the disk does not let it note is kept and goes before whatever is noted next, so that
//! no claim and no final name outruns it. Meanwhile the file claims what is not there, and a process
//! that ends now leaves it so. Hence it is put in doubt, by one byte in a block that it has already,
//! which most disks take even when they are full: the next process then believes none of its claims
//! and fetches again. Where the disk refuses that too, only trying again is left, twice a second.
//! Removing the file instead would need the same disk's consent, and lose where the download was to
//! lie.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use potluck_core::id::{ContentId, Kind, Piece};
use potluck_core::wire::bytes::{Malformed, Reader, Writer};

const MAGIC: &[u8; 8] = b"PLJRNL\0\x01";
/// In its place while a loss could not be noted.
const IN_DOUBT: &[u8; 8] = b"PLJRNL?\x01";
/// The longest journal that is read: metadata at its limits and millions of pieces one by one.
const MAX_BYTES: u64 = 512 << 20;
const CHECK: usize = 8;

/// What a download is, written once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) id: ContentId,
    pub(super) size: u64,
    pub(super) manifest: Vec<u8>,
    pub(super) proof: Vec<u8>,
    pub(super) target: PathBuf,
    pub(super) overwrite: bool,
}

/// What happened to a download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// These pieces are durably there.
    Held(Vec<Piece>),
    /// These are not, whatever was said before.
    Lost(Vec<Piece>),
    /// Nothing is there: it begins anew.
    Nothing,
    /// It will lie here instead.
    Target(PathBuf, bool),
    /// Whatever has this inode is whole and is about to get its final name.
    Renaming(u64),
}

/// A journal open for appending.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    id: ContentId,
    end: u64,
    /// Lost, whatever was claimed, and not noted yet.
    unnoted: BTreeSet<Piece>,
    /// The file may say that its claims are in doubt.
    in_doubt: bool,
    /// So many of the next writes fail.
    #[cfg(test)]
    pub(super) fail_writes: u32,
}

#[cfg(test)]
thread_local! {
    /// [`Journal::fail_writes`] of those that this thread makes or opens.
    pub(super) static FAIL_WRITES: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

impl Journal {
    fn new(file: File, path: PathBuf, id: ContentId, end: usize) -> Self {
        Self {
            file,
            path,
            id,
            end: end as u64,
            unnoted: BTreeSet::new(),
            in_doubt: false,
            #[cfg(test)]
            fail_writes: FAIL_WRITES.get(),
        }
    }

    /// Where the journal of `id` lies.
    fn path(folder: &Path, id: &ContentId) -> PathBuf {
        let kind = if id.kind == Kind::Folder { "folder" } else { "file" };
        folder.join(format!("{}.{kind}", ContentId::file(id.hash)))
    }

    /// Begins a journal; durable when this returns.
    pub(super) fn create(folder: &Path, head: &Head) -> io::Result<Self> {
        let path = Self::path(folder, &head.id);
        let bytes = encode_head(head);
        let new = path.with_extension("new");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let mut journal = Self::new(options.open(&new)?, path, head.id, bytes.len());
        journal.put(&bytes, 0)?;
        std::fs::rename(&new, &journal.path)?;
        super::files::sync_folder(folder)?;
        Ok(journal)
    }

    /// Removes, durably, what an earlier download of `id` may have left.
    pub(super) fn remove_old(folder: &Path, id: &ContentId) -> io::Result<()> {
        match std::fs::remove_file(Self::path(folder, id)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.and_then(|()| super::files::sync_folder(folder)),
        }
    }

    /// Reads a journal and opens it for more. `None` where it is no journal.
    pub(super) fn open(path: &Path) -> io::Result<Option<(Self, Head, Vec<Record>)>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() > MAX_BYTES {
            return Ok(None);
        }
        let bytes = std::fs::read(path)?;
        let Some((head, mut records, end)) = parse(&bytes) else { return Ok(None) };
        let mut journal = Self::new(file, path.to_owned(), head.id, end);
        if bytes.starts_with(IN_DOUBT) {
            journal.in_doubt = true;
            for record in &records {
                if let Record::Held(pieces) = record {
                    journal.unnoted.extend(pieces);
                }
            }
            records.push(Record::Nothing);
        }
        Ok(Some((journal, head, records)))
    }

    /// Appends a record, after all losses; durable when this returns. After an error it was not
    /// appended.
    ///
    /// One at a time: of several, the last of an attempt that failed half-way could come to lie just
    /// behind a shorter first of the next, and be believed.
    pub(super) fn append(&mut self, record: &Record) -> io::Result<()> {
        self.note_losses()?;
        self.write(record)
    }

    /// These pieces are not there, whatever was claimed. After an error that is not noted yet: nothing
    /// is appended before it is.
    pub(super) fn lose(&mut self, pieces: &[Piece]) -> io::Result<()> {
        self.unnoted.extend(pieces);
        self.note_losses()
    }

    /// Notes what could not be noted before.
    pub(super) fn note_losses(&mut self) -> io::Result<()> {
        if !self.unnoted.is_empty() {
            let lost = Record::Lost(self.unnoted.iter().copied().collect());
            if let Err(error) = self.write(&lost) {
                // Also where this fails it may have been written.
                self.in_doubt = true;
                let _ = self.put(IN_DOUBT, 0);
                return Err(error);
            }
            self.unnoted.clear();
        }
        if self.in_doubt {
            self.put(MAGIC, 0)?;
            self.in_doubt = false;
        }
        Ok(())
    }

    /// Whether every loss is noted.
    pub(super) fn is_right(&self) -> bool {
        self.unnoted.is_empty() && !self.in_doubt
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let mut bytes = Vec::new();
        encode_record(&self.id, self.end, record, &mut bytes);
        self.put(&bytes, self.end)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Writes bytes at their place, durably.
    fn put(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        #[cfg(test)]
        if self.fail_writes > 0 {
            self.fail_writes -= 1;
            return Err(rustix::io::Errno::NOSPC.into());
        }
        self.file.write_all_at(bytes, at)?;
        self.file.sync_data()
    }

    /// Removes the file: the download is done or given up.
    pub(super) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

fn check(id: &ContentId, at: u64, bytes: &[u8]) -> [u8; CHECK] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&id.hash).update(&at.to_be_bytes()).update(bytes);
    let mut check = [0; CHECK];
    hasher.finalize_xof().fill(&mut check);
    check
}

fn encode_head(head: &Head) -> Vec<u8> {
    let mut body = Vec::new();
    body.content(&head.id);
    body.u64(head.size);
    body.u8(head.overwrite.into());
    for part in [head.target.as_os_str().as_bytes(), &head.manifest, &head.proof] {
        body.u32(part.len() as u32);
        body.put(part);
    }
    let mut out = MAGIC.to_vec();
    out.u32(body.len() as u32);
    out.put(&check(&head.id, 0, &body));
    out.put(&body);
    out
}

/// Appends a record to `out`, whose own beginning will lie at `from` in the file.
fn encode_record(id: &ContentId, from: u64, record: &Record, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    let kind = match record {
        Record::Held(pieces) => {
            encode_runs(pieces, &mut body);
            1
        }
        Record::Lost(pieces) => {
            encode_runs(pieces, &mut body);
            2
        }
        Record::Nothing => 3,
        Record::Target(target, overwrite) => {
            body.u8((*overwrite).into());
            body.put(target.as_os_str().as_bytes());
            4
        }
        Record::Renaming(inode) => {
            body.u64(*inode);
            5
        }
    };
    let begin = out.len();
    out.u8(kind);
    out.u32(body.len() as u32);
    out.put(&body);
    let check = check(id, from + begin as u64, &out[begin..]);
    out.put(&check);
}

fn encode_runs(pieces: &[Piece], out: &mut Vec<u8>) {
    let mut sorted: Vec<u32> = pieces.iter().map(|piece| piece.0).collect();
    sorted.sort_unstable();
    sorted.dedup();
    for run in sorted.chunk_by(|a, b| a + 1 == *b) {
        out.u32(run[0]);
        out.u32(run.len() as u32);
    }
}

/// The head, the records up to the first that is not whole, and where that one begins.
fn parse(bytes: &[u8]) -> Option<(Head, Vec<Record>, usize)> {
    let mut r = Reader::new(bytes);
    let magic = r.take(MAGIC.len()).ok()?;
    if magic != MAGIC && magic != IN_DOUBT {
        return None;
    }
    let length = r.u32().ok()?;
    let checked: [u8; CHECK] = r.array().ok()?;
    let body = r.take(length as usize).ok()?;
    let head = decode_head(body).ok()?;
    if checked != check(&head.id, 0, body) {
        return None;
    }
    let mut records = Vec::new();
    loop {
        let at = bytes.len() - r.rest().len();
        match decode_record(&head.id, at as u64, &mut r) {
            Ok(record) => records.push(record),
            Err(Malformed(_)) => return Some((head, records, at)),
        }
    }
}

fn decode_head(body: &[u8]) -> Result<Head, Malformed> {
    let mut r = Reader::new(body);
    let id = r.content()?;
    let size = r.u64()?;
    let overwrite = r.u8()? != 0;
    let mut bytes = || {
        let length = r.u32()?;
        Ok::<_, Malformed>(r.take(length as usize)?.to_vec())
    };
    let target = PathBuf::from(OsStr::from_bytes(&bytes()?));
    let (manifest, proof) = (bytes()?, bytes()?);
    r.end()?;
    Ok(Head { id, size, manifest, proof, target, overwrite })
}

fn decode_record(id: &ContentId, at: u64, r: &mut Reader<'_>) -> Result<Record, Malformed> {
    let begin = r.rest();
    let kind = r.u8()?;
    let length = r.u32()?;
    let mut body = Reader::new(r.take(length as usize)?);
    let whole = &begin[..5 + length as usize];
    if r.array()? != check(id, at, whole) {
        return Err(Malformed("a record's check is wrong"));
    }
    let record = match kind {
        1 => Record::Held(decode_runs(&mut body)?),
        2 => Record::Lost(decode_runs(&mut body)?),
        3 => Record::Nothing,
        4 => {
            let overwrite = body.u8()? != 0;
            Record::Target(PathBuf::from(OsStr::from_bytes(body.take_rest())), overwrite)
        }
        5 => Record::Renaming(body.u64()?),
        _ => return Err(Malformed("a record of another kind")),
    };
    body.end()?;
    Ok(record)
}

fn decode_runs(r: &mut Reader<'_>) -> Result<Vec<Piece>, Malformed> {
    let mut pieces = Vec::new();
    while !r.rest().is_empty() {
        let (first, count) = (r.u32()?, r.u32()?);
        // A run claims no piece that no content has: a made-up count must not fill the memory.
        let end = first.checked_add(count).filter(|end| *end <= potluck_core::layout::MAX_PIECES);
        let end = end.ok_or(Malformed("a run past all pieces"))?;
        if pieces.len() + count as usize > potluck_core::layout::MAX_PIECES as usize {
            return Err(Malformed("more pieces than a content has"));
        }
        pieces.extend((first..end).map(Piece));
    }
    Ok(pieces)
}

/// A journal as a hostile disk could have it: every check is right, whatever it says. Each record of
/// `script` is a kind, a length and so many bytes. It names no place but the head's.
#[cfg(any(test, fuzzing))]
pub(super) fn forged(head: &Head, mut script: &[u8]) -> Vec<u8> {
    let mut out = encode_head(head);
    while let [kind, length, rest @ ..] = script {
        let (body, rest) = rest.split_at(rest.len().min((*length).into()));
        script = rest;
        let begin = out.len();
        if *kind == 4 {
            let target = Record::Target(head.target.clone(), body.first() == Some(&1));
            encode_record(&head.id, begin as u64, &target, &mut out);
            continue;
        }
        out.u8(*kind);
        out.u32(body.len() as u32);
        out.put(body);
        let check = check(&head.id, begin as u64, &out[begin..]);
        out.put(&check);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head() -> Head {
        Head {
            id: ContentId::file([3; 32]),
            size: 99,
            manifest: vec![1, 2, 3],
            proof: vec![4; 64],
            target: PathBuf::from("/ä/ö"),
            overwrite: true,
        }
    }

    fn records() -> Vec<Record> {
        vec![
            Record::Held(vec![Piece(0), Piece(1), Piece(2), Piece(7)]),
            Record::Lost(vec![Piece(1)]),
            Record::Nothing,
            Record::Held(Vec::new()),
            Record::Target("/b".into(), false),
            Record::Renaming(77),
            Record::Held(vec![Piece(5)]),
        ]
    }

    fn written(folder: &Path) -> PathBuf {
        let mut journal = Journal::create(folder, &head()).unwrap();
        for record in records() {
            journal.append(&record).unwrap();
        }
        journal.path.clone()
    }

    #[test]
    fn what_was_appended_is_read_back_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let (mut journal, read, mut all) = Journal::open(&path).unwrap().unwrap();
        assert_eq!((read, all.clone()), (head(), records()));
        for more in [Record::Nothing, Record::Held(vec![Piece(9)])] {
            journal.append(&more).unwrap();
            all.push(more);
        }
        assert_eq!(Journal::open(&path).unwrap().unwrap().2, all);
        journal.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_journal_torn_at_any_length_keeps_the_whole_records_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let whole = std::fs::read(&path).unwrap();
        let first = encode_head(&head()).len();
        let mut most = 0;
        for len in 0..=whole.len() {
            let Some((read, some, end)) = parse(&whole[..len]) else {
                assert!(len < first);
                continue;
            };
            assert_eq!(read, head());
            assert_eq!(some, records()[..some.len()]);
            assert!(end <= len && some.len() >= most);
            most = some.len();
            // Whatever the disk made of the lost tail, it claims nothing.
            for junk in [0, 0xff, 1] {
                let mut torn = whole[..len].to_vec();
                torn.resize(whole.len() + 9, junk);
                let (_, claimed, _) = parse(&torn).unwrap();
                assert_eq!(claimed, records()[..claimed.len()]);
            }
        }
        assert_eq!(most, records().len());
        // And one can go on from there.
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let (mut journal, _, mut rest) = Journal::open(&path).unwrap().unwrap();
        assert_eq!(rest.len(), records().len() - 1);
        journal.append(&Record::Nothing).unwrap();
        rest.push(Record::Nothing);
        assert_eq!(Journal::open(&path).unwrap().unwrap().2, rest);
    }

    #[test]
    fn a_record_is_good_only_where_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let bytes = std::fs::read(&path).unwrap();
        let first = encode_head(&head()).len();
        let moved = [&bytes[..first], &bytes[first..], &bytes[first..]].concat();
        assert_eq!(parse(&moved).unwrap().1, records());
        let mut other = head();
        other.id = ContentId::file([4; 32]);
        let foreign = [encode_head(&other).as_slice(), &bytes[first..]].concat();
        assert_eq!(parse(&foreign).unwrap().1, []);
    }

    #[test]
    fn a_loss_that_cannot_be_noted_goes_before_what_comes_later_and_puts_the_rest_in_doubt() {
        let dir = tempfile::tempdir().unwrap();
        for in_doubt in [true, false] {
            let mut journal = Journal::create(dir.path(), &head()).unwrap();
            let held = |pieces: &[u32]| Record::Held(pieces.iter().copied().map(Piece).collect());
            let records = |journal: &Journal| Journal::open(&journal.path).unwrap().unwrap().2;
            journal.append(&held(&[0, 1, 2])).unwrap();
            // Neither the loss nor, in the second round, that there is doubt.
            journal.fail_writes = if in_doubt { 1 } else { 2 };
            journal.lose(&[Piece(1)]).unwrap_err();
            assert!(!journal.is_right());
            let believed = if in_doubt { vec![Record::Nothing] } else { vec![] };
            assert_eq!(records(&journal), [vec![held(&[0, 1, 2])], believed].concat());
            journal.fail_writes = 2;
            journal.append(&held(&[1])).unwrap_err();
            let (mut other, _, _) = Journal::open(&journal.path).unwrap().unwrap();
            assert_eq!(other.is_right(), !in_doubt);

            journal.append(&held(&[1])).unwrap();
            assert!(journal.is_right());
            let lost = Record::Lost(vec![Piece(1)]);
            let all = [held(&[0, 1, 2]), lost, held(&[1])];
            assert_eq!(records(&journal), all);
            // As the next process does it, where this one died in between.
            if in_doubt {
                other.append(&Record::Nothing).unwrap();
                let lost = Record::Lost([0, 1, 2].map(Piece).to_vec());
                assert_eq!(records(&other), [held(&[0, 1, 2]), lost, Record::Nothing]);
            }
        }
    }

    proptest! {
        #[test]
        fn a_flipped_bit_never_invents_a_record(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = encode_head(&head());
            for record in records() {
                let from = bytes.len() as u64;
                let mut one = Vec::new();
                encode_record(&head().id, from, &record, &mut one);
                bytes.extend(one);
            }
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Some((read, some, _)) = parse(&bytes) {
                prop_assert_eq!(read, head());
                prop_assert_eq!(&some, &records()[..some.len()]);
                prop_assert!(some.len() < records().len());
            }
        }

        #[test]
        fn hostile_bytes_with_good_checks_never_panic(kind in 0u8..8, body in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut bytes = encode_head(&head());
            let begin = bytes.len();
            bytes.u8(kind);
            bytes.u32(body.len() as u32);
            bytes.put(&body);
            let check = check(&head().id, begin as u64, &bytes[begin..]);
            bytes.put(&check);
            let (_, records, _) = parse(&bytes).unwrap();
            prop_assert!(records.len() <= 1);
        }

        #[test]
        fn any_bytes_are_read_without_panic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse(&tail).is_none());
            let bytes = [MAGIC.as_slice(), &tail].concat();
            prop_assert!(parse(&bytes).is_none());
        }
    }
}
