//! Owns what a folder is: its canonical manifest, whose hash is the folder's id, and the one place
//! where hostile names are told from harmless ones. Never touches a disk and never repairs a name.
//!
//! ```text
//! "potluck manifest v1\n"                       20 bytes
//! entries, in ascending order of their path's bytes, each:
//!   kind    u8    0 file · 1 executable file · 2 empty folder
//!   path    u16 length, UTF-8, components apart by "/"
//!   size    u64   files only
//!   id      32    files only: BLAKE3 of the file
//! ```
//!
//! A folder is listed only where nothing lies in it; the others follow from the paths.

use std::collections::HashSet;
use std::fmt;

use unicode_normalization::UnicodeNormalization;

use crate::id::{ContentId, is_deceptive};
use crate::layout::{Layout, TooLarge};
use crate::wire::bytes::{Malformed, Reader, Writer};

/// What every manifest begins with.
pub const HEADER: &[u8] = b"potluck manifest v1\n";
/// The longest manifest, 32 MiB: about 400,000 files with names of 40 bytes; it is held in memory.
pub const MAX_BYTES: usize = 32 << 20;
/// The most files and folders, so that names of one letter cannot make the check for clashes large.
pub const MAX_NAMES: usize = 1 << 20;
/// The longest path in bytes: Linux's `PATH_MAX`.
pub const MAX_PATH: usize = 4_096;
/// The longest component of a path in bytes: `NAME_MAX` of every common file system.
pub const MAX_COMPONENT: usize = 255;
/// The most components of a path: a walk over a tree holds one descriptor a level.
pub const MAX_DEPTH: usize = 64;

/// Why a path is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// Nothing, or nothing between two slashes, or a slash at either end.
    #[error("a part of it is empty, or it begins or ends with a slash")]
    Empty,
    /// `.` or `..`.
    #[error("a part of it is . or ..")]
    Dots,
    /// Control, bidirectional or invisible characters.
    #[error("it holds control, direction or invisible characters")]
    Deceptive,
    /// A backslash: another system's separator.
    #[error("it holds a backslash")]
    Backslash,
    /// A part begins like a drive of another system.
    #[error("a part of it begins with a drive letter (as C:)")]
    Drive,
    /// A part that means a device on Windows.
    #[error("a part of it is a device's name on Windows (as CON, NUL, COM1)")]
    Device,
    /// A part ends with a dot or a blank, which Windows drops.
    #[error("a part of it ends with a dot or a blank")]
    Trailing,
    /// A part is longer than [`MAX_COMPONENT`].
    #[error("a part of it is longer than {MAX_COMPONENT} bytes")]
    LongComponent,
    /// It is longer than [`MAX_PATH`].
    #[error("it is longer than {MAX_PATH} bytes")]
    LongPath,
    /// It is deeper than [`MAX_DEPTH`].
    #[error("it is more than {MAX_DEPTH} folders deep")]
    Deep,
}

/// A path within a folder that is harmless on every system: relative, of plain components.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelPath(String);

impl RelPath {
    /// Checks `path`, whose components are apart by `/`.
    pub fn new(path: impl Into<String>) -> Result<Self, BadPath> {
        let path = path.into();
        check_path(&path)?;
        Ok(Self(path))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The folder it lies in; `None` at the top.
    pub fn parent(&self) -> Option<&str> {
        self.0.rsplit_once('/').map(|(folder, _)| folder)
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A file.
    File {
        /// Bytes.
        size: u64,
        /// Whether it may be executed: the only mode bit that travels.
        executable: bool,
        /// BLAKE3 of the file.
        id: [u8; 32],
    },
    /// A folder in which nothing lies.
    EmptyFolder,
}

/// One line of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it lies in the folder.
    pub path: RelPath,
    /// What it is.
    pub what: What,
}

/// A file of a manifest; its position among the files is its number in the [`Layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileEntry<'a> {
    /// Where it lies in the folder.
    pub path: &'a RelPath,
    /// Bytes.
    pub size: u64,
    /// Whether it may be executed.
    pub executable: bool,
    /// BLAKE3 of the file.
    pub id: [u8; 32],
}

/// Why bytes or entries are no manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not the format.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A path that is not harmless everywhere.
    #[error("the name {path:?} cannot be shared: {why}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: BadPath,
    },
    /// Two paths that are one on a system which ignores case or Unicode's spellings, or a file
    /// where another entry needs a folder.
    #[error(
        "the name {path:?} clashes with another one (some systems ignore upper and lower case)"
    )]
    Clash {
        /// The later of the two.
        path: String,
    },
    /// A file of no bytes must have the id of no bytes: no piece would ever prove it.
    #[error("the file {path:?} is empty, but its id is not that of an empty file")]
    EmptyFile {
        /// The file.
        path: String,
    },
    /// More than [`MAX_BYTES`].
    #[error("its list of files is longer than {} MiB", MAX_BYTES >> 20)]
    TooLong,
    /// More than [`MAX_NAMES`].
    #[error("it has more than {MAX_NAMES} files and folders")]
    TooMany,
}

/// The canonical list of what lies in a folder: sorted, every path harmless, no two clashing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
}

impl Manifest {
    /// The manifest of these entries, in any order.
    ///
    /// # Errors
    /// Clashing paths, an empty file with a wrong id, or more than the limits allow.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self, ManifestError> {
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let manifest = Self { entries };
        manifest.validate()?;
        if manifest.entries.iter().map(encoded_len).sum::<usize>() + HEADER.len() > MAX_BYTES {
            return Err(ManifestError::TooLong);
        }
        Ok(manifest)
    }

    /// The canonical bytes: the same folder always has the same.
    pub fn encode(&self) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(HEADER.len() + self.entries.iter().map(encoded_len).sum::<usize>());
        out.put(HEADER);
        for Entry { path, what } in &self.entries {
            let kind = match what {
                What::File { executable: false, .. } => 0,
                What::File { executable: true, .. } => 1,
                What::EmptyFolder => 2,
            };
            out.u8(kind);
            out.bytes16(path.as_str().as_bytes());
            if let What::File { size, id, .. } = what {
                out.u64(*size);
                out.put(id);
            }
        }
        out
    }

    /// Reads what [`Manifest::encode`] wrote, and nothing else: any other order, a hostile name or
    /// a byte too many is refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_BYTES {
            return Err(ManifestError::TooLong);
        }
        let mut r = Reader::new(bytes);
        if r.take(HEADER.len()).ok() != Some(HEADER) {
            return Err(Malformed("it does not begin as a manifest of version 1").into());
        }
        let mut entries: Vec<Entry> = Vec::new();
        while !r.rest().is_empty() {
            let kind = r.u8()?;
            let path =
                std::str::from_utf8(r.bytes16()?).map_err(|_| Malformed("a path is not UTF-8"))?;
            let path =
                RelPath::new(path).map_err(|why| ManifestError::Path { path: path.into(), why })?;
            let what = match kind {
                0 | 1 => What::File { size: r.u64()?, executable: kind == 1, id: r.array()? },
                2 => What::EmptyFolder,
                _ => return Err(Malformed("an entry is a file or an empty folder").into()),
            };
            match entries.last() {
                Some(last) if last.path == path => {
                    return Err(ManifestError::Clash { path: path.0 });
                }
                Some(last) if last.path > path => {
                    return Err(Malformed("the entries are not in order").into());
                }
                _ => entries.push(Entry { path, what }),
            }
            if entries.len() > MAX_NAMES {
                return Err(ManifestError::TooMany);
            }
        }
        let manifest = Self { entries };
        manifest.validate()?;
        Ok(manifest)
    }

    /// The folder's id.
    pub fn id(&self) -> ContentId {
        ContentId::folder(*blake3::hash(&self.encode()).as_bytes())
    }

    /// Everything listed, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The files, in order: the n-th is file n of [`Manifest::layout`].
    pub fn files(&self) -> impl Iterator<Item = FileEntry<'_>> {
        self.entries.iter().filter_map(|entry| match entry.what {
            What::File { size, executable, id } => {
                Some(FileEntry { path: &entry.path, size, executable, id })
            }
            What::EmptyFolder => None,
        })
    }

    /// The folders that are listed because nothing lies in them.
    pub fn empty_folders(&self) -> impl Iterator<Item = &RelPath> {
        self.entries.iter().filter(|e| e.what == What::EmptyFolder).map(|e| &e.path)
    }

    /// How its files are cut into pieces.
    pub fn layout(&self) -> Result<Layout, TooLarge> {
        Layout::new(self.files().map(|file| file.size))
    }

    /// What holds between entries that are in order and singly harmless.
    fn validate(&self) -> Result<(), ManifestError> {
        check_clashes(self.entries.iter().map(|entry| &entry.path))?;
        let nothing = blake3::hash(b"");
        match self.files().find(|f| f.size == 0 && f.id != *nothing.as_bytes()) {
            Some(file) => Err(ManifestError::EmptyFile { path: file.path.0.clone() }),
            None => Ok(()),
        }
    }
}

/// Whether paths, given in ascending order, can all lie in one folder on every system.
///
/// # Errors
/// [`ManifestError::Clash`] and [`ManifestError::TooMany`].
pub fn check_clashes<'a>(
    paths: impl IntoIterator<Item = &'a RelPath>,
) -> Result<(), ManifestError> {
    // Paths of one folder follow each other when sorted, so each folder comes up once: whatever is
    // not the folder of the path before must be a new name, whichever way it is spelled.
    let mut names: HashSet<(u32, String)> = HashSet::new();
    let mut open: Vec<(&str, u32)> = Vec::new();
    for path in paths {
        let clash = || ManifestError::Clash { path: path.0.clone() };
        let folders = path.0.split('/').count() - 1;
        let same = open.iter().zip(path.0.split('/').take(folders));
        let same = same.take_while(|((name, _), part)| name == part).count();
        open.truncate(same);
        for part in path.0.split('/').skip(same) {
            let folder = open.last().map_or(0, |(_, number)| *number);
            if !names.insert((folder, folded(part))) {
                return Err(clash());
            }
            if names.len() > MAX_NAMES {
                return Err(ManifestError::TooMany);
            }
            open.push((part, names.len() as u32));
        }
        open.truncate(folders);
    }
    Ok(())
}

/// A component as a system sees it that ignores case and Unicode's many spellings.
fn folded(part: &str) -> String {
    if part.is_ascii() {
        return part.to_ascii_lowercase();
    }
    // Folding can undo normal form, so normalise on both sides (Unicode 3.13, D145).
    let folded = caseless::default_case_fold_str(&part.nfd().collect::<String>());
    folded.nfc().collect()
}

fn encoded_len(entry: &Entry) -> usize {
    let fixed = if entry.what == What::EmptyFolder { 3 } else { 43 };
    fixed + entry.path.0.len()
}

fn check_path(path: &str) -> Result<(), BadPath> {
    if path.len() > MAX_PATH {
        return Err(BadPath::LongPath);
    }
    if path.chars().any(is_deceptive) {
        return Err(BadPath::Deceptive);
    }
    if path.contains('\\') {
        return Err(BadPath::Backslash);
    }
    for (depth, part) in path.split('/').enumerate() {
        check_component(part)?;
        if depth == MAX_DEPTH {
            return Err(BadPath::Deep);
        }
    }
    Ok(())
}

fn check_component(part: &str) -> Result<(), BadPath> {
    if part.is_empty() {
        return Err(BadPath::Empty);
    }
    if part == "." || part == ".." {
        return Err(BadPath::Dots);
    }
    if part.len() > MAX_COMPONENT {
        return Err(BadPath::LongComponent);
    }
    if let [letter, b':', ..] = part.as_bytes()
        && letter.is_ascii_alphabetic()
    {
        return Err(BadPath::Drive);
    }
    if is_device(part) {
        return Err(BadPath::Device);
    }
    if part.ends_with(|c: char| c == '.' || c.is_whitespace()) {
        return Err(BadPath::Trailing);
    }
    Ok(())
}

/// Whether Windows opens a device under this name, whatever follows a dot or a colon
/// (<https://learn.microsoft.com/windows/win32/fileio/naming-a-file>).
fn is_device(part: &str) -> bool {
    let stem = part.split(['.', ':']).next().unwrap_or(part).trim_end();
    let upper = stem.to_uppercase();
    if matches!(&*upper, "CON" | "PRN" | "AUX" | "NUL" | "CONIN$" | "CONOUT$" | "CLOCK$") {
        return true;
    }
    let number = upper.strip_prefix("COM").or_else(|| upper.strip_prefix("LPT"));
    let mut digits = number.unwrap_or("").chars();
    let digit = digits.next().is_some_and(|c| c.is_ascii_digit() || "¹²³".contains(c));
    digit && digits.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(path: &str) -> Entry {
        let what = What::File { size: 3, executable: false, id: [7; 32] };
        Entry { path: RelPath::new(path).unwrap(), what }
    }

    fn empty(path: &str) -> Entry {
        Entry { path: RelPath::new(path).unwrap(), what: What::EmptyFolder }
    }

    /// The bytes of one file's entry, whatever its name.
    fn raw(path: &[u8]) -> Vec<u8> {
        let mut out = HEADER.to_vec();
        out.u8(0);
        out.bytes16(path);
        out.u64(3);
        out.put(&[7; 32]);
        out
    }

    #[test]
    fn a_manifest_is_the_same_in_whatever_order_its_entries_came() {
        let entries = vec![file("b"), file("a/c"), empty("a/d"), file("a-b"), file("ä/ö")];
        let manifest = Manifest::new(entries.clone()).unwrap();
        let backwards = Manifest::new(entries.into_iter().rev().collect()).unwrap();
        assert_eq!(manifest, backwards);
        let paths: Vec<_> = manifest.entries().iter().map(|e| e.path.as_str()).collect();
        assert_eq!(paths, ["a-b", "a/c", "a/d", "b", "ä/ö"]);
        assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest.clone()));
        assert_eq!(manifest.id().hash, *blake3::hash(&manifest.encode()).as_bytes());
        assert_eq!(manifest.files().count(), 4);
        assert_eq!(manifest.layout().unwrap().pieces(), 4);
    }

    #[test]
    fn the_format_is_what_it_was() {
        let run = Entry {
            path: RelPath::new("bin/run").unwrap(),
            what: What::File { size: 258, executable: true, id: [9; 32] },
        };
        let manifest = Manifest::new(vec![empty("z"), run]).unwrap();
        let mut bytes = b"potluck manifest v1\n\x01\0\x07bin/run\0\0\0\0\0\0\x01\x02".to_vec();
        bytes.extend([9; 32]);
        bytes.extend(b"\x02\0\x01z");
        assert_eq!(manifest.encode(), bytes);
        let nothing = Manifest::new(Vec::new()).unwrap();
        assert_eq!(nothing.encode(), HEADER);
        assert_eq!(Manifest::decode(HEADER), Ok(nothing));
    }

    #[test]
    fn hostile_names_are_refused_with_the_reason() {
        use BadPath::{
            Backslash, Deceptive, Deep, Device, Dots, Drive, Empty, LongComponent, LongPath,
            Trailing,
        };
        let long = "x".repeat(256);
        let deep = "d/".repeat(64) + "f";
        let long_path = ("x".repeat(99) + "/").repeat(41);
        let wide = "é".repeat(128);
        let table: &[(&str, BadPath)] = &[
            ("", Empty),
            ("/", Empty),
            ("/etc/passwd", Empty),
            ("//server/share", Empty),
            ("a//b", Empty),
            ("a/", Empty),
            ("a/b//", Empty),
            (".", Dots),
            ("..", Dots),
            ("./a", Dots),
            ("../a", Dots),
            ("a/..", Dots),
            ("a/.", Dots),
            ("a/../b", Dots),
            ("a/./b", Dots),
            ("../../../../etc/shadow", Dots),
            ("a\0", Deceptive),
            ("a\0b", Deceptive),
            ("a\nb", Deceptive),
            ("a\rb", Deceptive),
            ("a\tb", Deceptive),
            ("\u{1b}[31mred", Deceptive),
            ("a\u{7f}", Deceptive),
            ("a\u{85}b", Deceptive),
            ("photo\u{202e}gpj.exe", Deceptive),
            ("\u{202d}a", Deceptive),
            ("a\u{2066}b", Deceptive),
            ("a\u{2069}b", Deceptive),
            ("a\u{200f}b", Deceptive),
            ("a\u{200b}b", Deceptive),
            ("a\u{feff}b", Deceptive),
            ("a\u{61c}b", Deceptive),
            ("a\u{2028}b", Deceptive),
            ("a\\b", Backslash),
            ("..\\..\\windows", Backslash),
            ("\\\\server\\share", Backslash),
            ("\\", Backslash),
            ("C:", Drive),
            ("c:evil", Drive),
            ("C:/windows", Drive),
            ("a/Z:x", Drive),
            ("CON", Device),
            ("con", Device),
            ("Con.txt", Device),
            ("a/con/b", Device),
            ("con.tar.gz", Device),
            ("CON .txt", Device),
            ("prn", Device),
            ("AUX", Device),
            ("aux.c", Device),
            ("NUL", Device),
            ("nul.", Device),
            ("nul:stream", Device),
            ("COM0", Device),
            ("COM1", Device),
            ("com9.log", Device),
            ("COM¹", Device),
            ("LPT1", Device),
            ("lpt³.txt", Device),
            ("CONIN$", Device),
            ("conout$", Device),
            ("CLOCK$", Device),
            ("a.", Trailing),
            ("a...", Trailing),
            ("...", Trailing),
            ("a ", Trailing),
            (" ", Trailing),
            ("a /b", Trailing),
            ("a./b", Trailing),
            ("a\u{a0}", Trailing),
            ("a\u{3000}", Trailing),
            (&long, LongComponent),
            (&wide, LongComponent),
            (&deep, Deep),
            (&long_path, LongPath),
        ];
        assert!(table.len() >= 60);
        for (path, why) in table {
            assert_eq!(RelPath::new(*path), Err(*why), "{path:?}");
            let refused = ManifestError::Path { path: (*path).into(), why: *why };
            assert_eq!(Manifest::decode(&raw(path.as_bytes())), Err(refused), "{path:?}");
        }
        for bytes in [b"\xff".as_slice(), b"a\xc3", b"\xed\xa0\x80", b"\xc0\xaf"] {
            assert!(matches!(Manifest::decode(&raw(bytes)), Err(ManifestError::Malformed(_))));
        }
    }

    #[test]
    fn everyday_names_are_shared() {
        let longest = "x".repeat(255);
        let deepest = "d/".repeat(63) + "f";
        for path in [
            "a",
            ".git/config",
            "a b",
            " a",
            "..a",
            "a..b",
            "Ünïcödé/日本語",
            "café",
            "e\u{301}",
            "com",
            "com10",
            "comet",
            "console.log",
            "auxiliary",
            "null",
            "lpt",
            "ab:c",
            "10:30",
            "-rf",
            "~",
            "$HOME",
            "a'b\"c",
            "*?<>|",
            "🎉.txt",
            &longest,
            &deepest,
        ] {
            let path = RelPath::new(path).unwrap();
            let manifest = Manifest::decode(&raw(path.as_str().as_bytes())).unwrap();
            assert_eq!(manifest.entries()[0].path, path);
        }
    }

    #[test]
    fn names_that_are_one_on_some_system_clash() {
        for (a, b) in [
            ("a", "A"),
            ("a/b", "A/c"),
            ("a/x/b", "a/X/b"),
            ("é", "e\u{301}"),
            ("É", "e\u{301}"),
            ("straße", "STRASSE"),
            ("ς", "σ"),
            ("\u{212a}", "k"),
            ("a", "a/b"),
            ("A", "a/b"),
            ("a/b", "a/b/c"),
        ] {
            for made in [vec![file(a), file(b)], vec![empty(a), file(b)]] {
                let made = Manifest::new(made);
                assert!(matches!(made, Err(ManifestError::Clash { .. })), "{a} {b}: {made:?}");
            }
        }
        // The folder lies between its file and its content when sorted: a, a-b, a/c.
        let between = Manifest::new(vec![file("a"), file("a-b"), file("a/c")]);
        assert!(matches!(between, Err(ManifestError::Clash { .. })));
        assert!(Manifest::new(vec![file("a"), file("a")]).is_err());
        assert!(Manifest::new(vec![file("x/a"), file("y/a"), file("y/b/a")]).is_ok());
    }

    #[test]
    fn what_is_not_canonical_is_refused() {
        let good = Manifest::new(vec![file("a"), file("b")]).unwrap().encode();
        assert!(Manifest::decode(&good).is_ok());
        for len in 0..good.len() {
            let cut_between = len == HEADER.len() || len == HEADER.len() + 44;
            assert_eq!(Manifest::decode(&good[..len]).is_ok(), cut_between, "{len}");
        }
        let mut swapped = HEADER.to_vec();
        swapped.extend(&good[HEADER.len() + 44..]);
        swapped.extend(&good[HEADER.len()..HEADER.len() + 44]);
        assert!(Manifest::decode(&swapped).is_err());
        let mut twice = good.clone();
        twice.extend(&good[HEADER.len() + 44..]);
        assert!(matches!(Manifest::decode(&twice), Err(ManifestError::Clash { .. })));
        let mut kind = good.clone();
        kind[HEADER.len()] = 3;
        assert!(Manifest::decode(&kind).is_err());
        let mut version = good;
        version[18] = b'2';
        assert!(Manifest::decode(&version).is_err());
    }

    #[test]
    fn an_empty_file_must_have_the_id_of_nothing() {
        let made = |id| {
            let what = What::File { size: 0, executable: false, id };
            Manifest::new(vec![Entry { path: RelPath::new("e").unwrap(), what }])
        };
        assert!(matches!(made([0; 32]), Err(ManifestError::EmptyFile { .. })));
        let good = made(*blake3::hash(b"").as_bytes()).unwrap();
        assert_eq!(good.layout().unwrap().pieces(), 0);
    }

    #[test]
    fn a_manifest_over_its_limits_is_refused() {
        assert_eq!(Manifest::decode(&vec![0; MAX_BYTES + 1]), Err(ManifestError::TooLong));
        let pad = "p".repeat(250);
        let folder = format!("{pad}/{pad}/{pad}/{pad}/{pad}/{pad}/{pad}/{pad}/{pad}/{pad}");
        let many = (0..14_000).map(|n| file(&format!("{folder}/{n}"))).collect();
        assert_eq!(Manifest::new(many).err(), Some(ManifestError::TooLong));
        let deep = "d/".repeat(62);
        let many = (0..20_000).map(|n| empty(&format!("{n}/{deep}e"))).collect();
        assert_eq!(Manifest::new(many).err(), Some(ManifestError::TooMany));
    }

    proptest! {
        #[test]
        fn any_bytes_are_the_one_encoding_of_a_manifest_or_refused(
            tail in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = [HEADER, &tail].concat();
            if let Ok(manifest) = Manifest::decode(&bytes) {
                prop_assert_eq!(manifest.encode(), bytes);
            }
        }

        #[test]
        fn whatever_can_be_made_can_be_read_back(
            paths in prop::collection::btree_set("[a-c\u{e4}.]{1,3}(/[a-cA \u{e4}]{1,2}){0,3}", 0..12),
            size in 1u64..9,
        ) {
            let entries = paths.into_iter().filter_map(|path| {
                let path = RelPath::new(path).ok()?;
                let what = What::File { size, executable: size % 2 == 0, id: [size as u8; 32] };
                Some(Entry { path, what })
            });
            if let Ok(manifest) = Manifest::new(entries.collect()) {
                prop_assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
            }
        }
    }
}
