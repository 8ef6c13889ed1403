//! Owns the making of a content from what lies on the disk: the walk over a folder, the hashing, the
//! reuse of what was hashed before. Never writes and never follows a link.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use potluck_core::id::{ContentId, Piece};
use potluck_core::layout::Layout;
use potluck_core::manifest::{Entry, MAX_NAMES, Manifest, RelPath, What, check_clashes};
use potluck_core::proof::{Proof, VALUE, fold};
use potluck_core::wire::stream::MAX_META;
use walkdir::WalkDir;

use super::content::{Content, FileName};
use super::files::{For, Stamp, is_part, lock, open_beneath, open_file, open_folder};
use super::hashing::{Progress, in_parallel};
use super::replica::Whole;
use crate::clock;
use crate::error::{Error, ErrorKind, Result};

/// Names of skipped things that are told; the rest is counted.
const MAX_SKIPPED_NAMED: usize = 8;

/// What a walk over a folder left out: links, special files, and downloads still under way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Skipped {
    /// How many.
    pub(crate) count: u64,
    /// The first few of them.
    pub(crate) first: Vec<PathBuf>,
}

/// A content as it was found and hashed.
pub(super) struct Made {
    pub(super) content: Content,
    pub(super) whole: Whole,
    pub(super) skipped: Skipped,
    /// Bytes that had to be hashed.
    pub(super) hashed: u64,
}

/// What lies at a path, before anything is hashed.
struct Survey {
    root: PathBuf,
    is_folder: bool,
    /// In the manifest's order; a single file has no path of its own.
    files: Vec<Found>,
    empty: Vec<RelPath>,
    skipped: Skipped,
}

struct Found {
    path: Option<RelPath>,
    executable: bool,
    stamp: Stamp,
}

/// What is known of the same path from an earlier sharing.
pub(super) struct Known<'a> {
    pub(super) content: &'a Content,
    pub(super) whole: &'a Whole,
}

/// Makes a content of the file or folder at `root` (absolute, free of links), hashing only what is
/// not known.
pub(super) fn make(
    root: &Path,
    known: Option<&Known<'_>>,
    progress: Progress<'_>,
    cancel: &AtomicBool,
) -> Result<Made> {
    let hashed_at = clock::wall();
    let survey = survey(root)?;
    let sizes = survey.files.iter().map(|file| file.stamp.size);
    let layout = Layout::new(sizes).map_err(|e| too_large(root, &e.to_string()))?;
    let listed: usize =
        (0..layout.files()).map(|f| layout.pieces_of(f).len()).filter(|n| *n > 1).sum();
    if listed * VALUE > MAX_META {
        return Err(too_large(root, "the hashes of its pieces alone are larger than 64 MiB"));
    }
    let values = known_values(&survey, &layout, known);
    let hashed = values.iter().zip(0..).filter(|(value, _)| value.is_none());
    let hashed = hashed.map(|(_, piece)| u64::from(layout.len_of(Piece(piece)))).sum();
    let values = hash_unknown(&survey, &layout, values, progress, cancel)?;
    let content = content(&survey, layout, &values)?;
    let stamps = survey.files.iter().map(|file| file.stamp).collect();
    let whole = Whole { path: survey.root, stamps, hashed: hashed_at };
    Ok(Made { content, whole, skipped: survey.skipped, hashed })
}

fn too_large(root: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Other, format!("cannot share {}: {why}", root.display()))
        .hint("share its parts one by one")
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::io(format!("cannot read {}", path.display()), error)
}

fn survey(root: &Path) -> Result<Survey> {
    let meta = root.symlink_metadata().map_err(|e| unreadable(root, &e))?;
    let mut survey = Survey {
        root: root.to_owned(),
        is_folder: meta.is_dir(),
        files: Vec::new(),
        empty: Vec::new(),
        skipped: Skipped::default(),
    };
    if meta.is_file() {
        let stamp = Stamp::of(&meta);
        survey.files.push(Found { path: None, executable: false, stamp });
    } else if meta.is_dir() {
        survey_folder(root, &mut survey)?;
    } else {
        let what = format!("cannot share {}: it is neither a file nor a folder", root.display());
        return Err(Error::new(ErrorKind::Other, what));
    }
    Ok(survey)
}

fn survey_folder(root: &Path, survey: &mut Survey) -> Result<()> {
    let mut folders: BTreeSet<RelPath> = BTreeSet::new();
    let mut walk = WalkDir::new(root).min_depth(1).into_iter();
    while let Some(item) = walk.next() {
        let item = item.map_err(|e| {
            let path = e.path().unwrap_or(root).to_owned();
            let io = e.into_io_error().unwrap_or_else(|| io::Error::other("links form a loop"));
            unreadable(&path, &io)
        })?;
        let kind = item.file_type();
        let own_part = item.file_name().to_str().is_some_and(is_part);
        if own_part || !(kind.is_file() || kind.is_dir()) {
            survey.skipped.count += 1;
            if survey.skipped.first.len() < MAX_SKIPPED_NAMED {
                survey.skipped.first.push(item.path().to_owned());
            }
            if own_part && kind.is_dir() {
                walk.skip_current_dir();
            }
            continue;
        }
        let path = shareable(root, item.path())?;
        if kind.is_dir() {
            folders.insert(path);
        } else {
            let meta = item.metadata().map_err(|e| unreadable(item.path(), &e.into()))?;
            let executable = std::os::unix::fs::MetadataExt::mode(&meta) & 0o111 != 0;
            survey.files.push(Found { path: Some(path), executable, stamp: Stamp::of(&meta) });
        }
        if survey.files.len() + folders.len() > MAX_NAMES {
            return Err(too_large(
                root,
                &format!("it has more than {MAX_NAMES} files and folders"),
            ));
        }
    }
    survey.files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    let mut paths: BTreeSet<&RelPath> = folders.iter().collect();
    let filled: BTreeSet<&str> = survey
        .files
        .iter()
        .filter_map(|file| file.path.as_ref())
        .chain(&folders)
        .filter_map(RelPath::parent)
        .collect();
    paths.retain(|folder| !filled.contains(folder.as_str()));
    survey.empty = paths.iter().map(|folder| (*folder).clone()).collect();
    // Before hours of hashing rather than after.
    paths.extend(survey.files.iter().filter_map(|file| file.path.as_ref()));
    check_clashes(paths).map_err(|error| refused(root, &error.to_string()))
}

/// The path within `root`, if it is harmless on every system.
fn shareable(root: &Path, path: &Path) -> Result<RelPath> {
    let within = path.strip_prefix(root).unwrap_or(path);
    let text = within
        .to_str()
        .ok_or_else(|| refused(root, &format!("the name {within:?} is not UTF-8")))?;
    RelPath::new(text)
        .map_err(|why| refused(root, &format!("the name {within:?} cannot be used: {why}")))
}

fn refused(root: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Other, format!("cannot share {}: {why}", root.display()))
        .hint("rename it, or move it out of the folder")
}

/// The values of all pieces whose files did not change since they were hashed.
fn known_values(
    survey: &Survey,
    layout: &Layout,
    known: Option<&Known<'_>>,
) -> Vec<Option<[u8; VALUE]>> {
    let mut values = vec![None; layout.pieces() as usize];
    let Some(Known { content, whole }) = known else { return values };
    let old: BTreeMap<Option<&RelPath>, u32> =
        content.files.iter().map(|file| file.path.as_ref()).zip(0..).collect();
    for (found, file) in survey.files.iter().zip(0..) {
        let Some(&old_file) = old.get(&found.path.as_ref()) else { continue };
        let stamp = whole.stamps[old_file as usize];
        let (pieces, old_pieces) = (layout.pieces_of(file), content.layout.pieces_of(old_file));
        if stamp != found.stamp || stamp.is_racy(whole.hashed) {
            continue;
        }
        let own = &content.proof.values()[old_pieces.start as usize..old_pieces.end as usize];
        let slots = &mut values[pieces.start as usize..pieces.end as usize];
        if let [slot] = slots {
            // One piece now, however many before: its value is the file's id.
            *slot = fold(own);
        } else if content.layout.piece_size() == layout.piece_size() {
            for (slot, value) in slots.iter_mut().zip(own) {
                *slot = Some(*value);
            }
        }
    }
    values
}

fn hash_unknown(
    survey: &Survey,
    layout: &Layout,
    values: Vec<Option<[u8; VALUE]>>,
    progress: Progress<'_>,
    cancel: &AtomicBool,
) -> Result<Vec<[u8; VALUE]>> {
    let folder = survey.is_folder.then(|| open_folder(&survey.root)).transpose();
    let folder = folder.map_err(|e| unreadable(&survey.root, &e))?;
    let open = |file: u32| open_found(survey, folder.as_ref(), file);
    let name = |file: u32| match &survey.files[file as usize].path {
        Some(path) => survey.root.join(path.as_str()),
        None => survey.root.clone(),
    };
    let known = values.iter().map(Option::is_some).collect::<Vec<_>>();
    let values = Mutex::new(values.into_iter().map(Option::unwrap_or_default).collect::<Vec<_>>());
    in_parallel(layout, &open, progress, cancel, &|hand, run| {
        for piece in run {
            let file = layout.place(Piece(piece)).map_or(0, |place| place.file);
            if known[piece as usize] {
                continue;
            }
            let changed = || {
                let what = format!("{} changed while it was being read", name(file).display());
                Error::new(ErrorKind::Other, what).hint("share it again when nothing writes to it")
            };
            let (value, after) = hand.hash(Piece(piece)).map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => changed(),
                _ => unreadable(&name(file), &e),
            })?;
            let after = after.metadata().map_err(|e| unreadable(&name(file), &e))?;
            if Stamp::of(&after) != survey.files[file as usize].stamp {
                return Err(changed());
            }
            lock(&values)[piece as usize] = value;
        }
        Ok(())
    })?;
    Ok(values.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn open_found(survey: &Survey, folder: Option<&File>, file: u32) -> io::Result<File> {
    match (&survey.files[file as usize].path, folder) {
        (Some(path), Some(folder)) => open_beneath(folder, path, For::Reading),
        _ => open_file(&survey.root),
    }
}

fn content(survey: &Survey, layout: Layout, values: &[[u8; VALUE]]) -> Result<Content> {
    let nothing = *blake3::hash(b"").as_bytes();
    let mut ids = (0..layout.files()).map(|file| {
        let pieces = layout.pieces_of(file);
        fold(&values[pieces.start as usize..pieces.end as usize]).unwrap_or(nothing)
    });
    let list: Vec<u8> = (0..layout.files())
        .map(|file| layout.pieces_of(file))
        .filter(|pieces| pieces.len() > 1)
        .flat_map(|pieces| values[pieces.start as usize..pieces.end as usize].as_flattened())
        .copied()
        .collect();
    let unexpected = |e: &dyn std::fmt::Display| refused(&survey.root, &e.to_string());
    if !survey.is_folder {
        let id = ids.next().unwrap_or(nothing);
        let proof = Proof::of_file(id, &layout, &list).map_err(|e| unexpected(&e))?;
        let files = vec![FileName { path: None, executable: false }];
        let id = ContentId::file(id);
        return Ok(Content { id, layout, proof, manifest: Vec::new(), files, empty: Vec::new() });
    }
    let files = survey.files.iter().zip(ids).filter_map(|(found, id)| {
        let what = What::File { size: found.stamp.size, executable: found.executable, id };
        Some(Entry { path: found.path.clone()?, what })
    });
    let empty =
        survey.empty.iter().map(|path| Entry { path: path.clone(), what: What::EmptyFolder });
    let manifest = Manifest::new(files.chain(empty).collect()).map_err(|e| unexpected(&e))?;
    let proof = Proof::of_folder(&manifest, &layout, &list).map_err(|e| unexpected(&e))?;
    Ok(Content::of_folder(&manifest, layout, proof))
}
