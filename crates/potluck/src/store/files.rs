//! Owns how files are reached: opened without leaving their folder, stamped so that a change shows,
//! kept open for a while, given room. Never knows what a piece is.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use potluck_core::id::ContentId;
use potluck_core::manifest::{MAX_COMPONENT, RelPath};
use potluck_core::time::WallTime;
use potluck_core::wire::bytes::{Malformed, Reader, Writer};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};

/// Files kept open over the whole store; a process may have 1,024 descriptors and sockets want most.
const MAX_OPEN: usize = 128;
/// A file touched less than this before it was hashed could have been touched again within the same
/// tick of the file system's clock (FAT: 2 s), so its stamp proves nothing (git's "racy" files).
const RACY_S: i64 = 2;
/// Room left free on a disk by whoever fetches, or a hundredth of a smaller disk.
const RESERVE: u64 = 64 << 20;
/// What the temporary name of something being fetched ends in.
const PART: &str = ".potluck-part";

/// The lock, also after a thread that held it panicked: every state kept under one is whole between
/// any two statements that can panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What changes when a file does. The device is left out: its number may differ after a restart
/// (btrfs, NFS, device mapper) although the file does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
    inode: u64,
}

impl Stamp {
    pub(super) const BYTES: usize = 48;

    pub(super) fn of(meta: &Metadata) -> Self {
        Self {
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            inode: meta.ino(),
        }
    }

    /// Whether the file may have changed without a trace since it was hashed at `hashed`.
    pub(super) fn is_racy(&self, hashed: WallTime) -> bool {
        let touched = self.modified.0.max(self.changed.0);
        touched.saturating_add(RACY_S) >= i64::try_from(hashed.0).unwrap_or(i64::MAX)
    }

    #[expect(clippy::unnecessary_cast, reason = "the widths depend on the machine")]
    fn of_stat(stat: &rustix::fs::Stat) -> Self {
        Self {
            size: stat.st_size as u64,
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
            inode: stat.st_ino as u64,
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.u64(self.size);
        for time in [self.modified.0, self.modified.1, self.changed.0, self.changed.1] {
            out.put(&time.to_be_bytes());
        }
        out.u64(self.inode);
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let size = r.u64()?;
        let mut time = || Ok::<_, Malformed>(i64::from_be_bytes(r.array()?));
        let modified = (time()?, time()?);
        let changed = (time()?, time()?);
        Ok(Self { size, modified, changed, inode: r.u64()? })
    }
}

/// Opens a regular file to read it; not a link, and never waiting for what is at a pipe's other end.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    regular(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Opens a regular file to read and write it; not a link.
pub(super) fn open_file_to_update(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    regular(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Opens a folder itself, not through a link in its place.
pub(super) fn open_folder(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

fn regular(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::NotFound, "it is no longer a regular file"))
    }
}

/// What a file beneath a folder is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    Reading,
    /// Reading and writing what is there.
    Updating,
    /// The same; it and the folders above it are made where they are missing.
    Making {
        executable: bool,
    },
}

impl For {
    fn flags(self) -> OFlags {
        let common = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match self {
            Self::Reading => common | OFlags::RDONLY,
            Self::Updating => common | OFlags::RDWR,
            Self::Making { .. } => common | OFlags::RDWR | OFlags::CREATE,
        }
    }

    fn makes(self) -> bool {
        matches!(self, Self::Making { .. })
    }

    fn mode(self) -> Mode {
        match self {
            Self::Reading | Self::Updating => Mode::empty(),
            Self::Making { executable: false } => Mode::from_raw_mode(0o666),
            Self::Making { executable: true } => Mode::from_raw_mode(0o777),
        }
    }
}

/// Opens a regular file beneath `root`, through no link on the way, wherever others move things.
pub(super) fn open_beneath(root: &File, path: &RelPath, what_for: For) -> io::Result<File> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let name = path.as_str();
    match rustix::fs::openat2(root, name, what_for.flags(), what_for.mode(), resolve) {
        Ok(fd) => regular(fd.into()),
        // Old kernels have no openat2, some containers forbid it, and a race can make it give up.
        Err(Errno::NOSYS | Errno::PERM | Errno::AGAIN) => walk_and_open(root, path, what_for),
        Err(Errno::NOENT) if what_for.makes() => walk_and_open(root, path, what_for),
        Err(error) => Err(error.into()),
    }
}

/// The same, folder by folder; makes the folders where it writes.
fn walk_and_open(root: &File, path: &RelPath, what_for: For) -> io::Result<File> {
    let (folder, name) = path.as_str().rsplit_once('/').unwrap_or(("", path.as_str()));
    let folder = walk(root, folder, what_for.makes())?;
    regular(rustix::fs::openat(&folder, name, what_for.flags(), what_for.mode())?.into())
}

/// Makes a folder and those above it beneath `root`.
pub(super) fn make_folder(root: &File, path: &RelPath) -> io::Result<()> {
    walk(root, path.as_str(), true).map(drop)
}

/// Opens a folder beneath `root` (`""`: itself), through no link.
pub(super) fn walk(root: &File, folder: &str, make: bool) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = root.try_clone()?;
    for part in folder.split('/').filter(|part| !part.is_empty()) {
        let open = || rustix::fs::openat(&at, part, flags, Mode::empty());
        let next = match open() {
            Err(Errno::NOENT) if make => {
                match rustix::fs::mkdirat(&at, part, Mode::from_raw_mode(0o777)) {
                    Ok(()) | Err(Errno::EXIST) => open()?,
                    Err(error) => return Err(error.into()),
                }
            }
            other => other?,
        };
        at = next.into();
    }
    Ok(at)
}

/// Parts that the system reads or writes in one call (`UIO_MAXIOV` of Linux).
const MAX_PARTS: usize = 1_024;

/// Fills `parts` from `offset` on.
pub(super) fn read_exact_at(
    file: &File,
    mut parts: &mut [IoSliceMut<'_>],
    mut offset: u64,
) -> io::Result<()> {
    while !parts.is_empty() {
        let most = parts.len().min(MAX_PARTS);
        match rustix::io::preadv(file, &mut parts[..most], offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                offset += n as u64;
                IoSliceMut::advance_slices(&mut parts, n);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes `parts`, one behind the other, from `offset` on.
pub(super) fn write_all_at(file: &File, parts: &[&[u8]], mut offset: u64) -> io::Result<()> {
    let mut parts: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut parts = &mut parts[..];
    while !parts.is_empty() {
        match rustix::io::pwritev(file, &parts[..parts.len().min(MAX_PARTS)], offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                offset += n as u64;
                IoSlice::advance_slices(&mut parts, n);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A look at many files beneath a folder, one after another, through no link: those of one folder
/// are looked at from there, which spares the system the way to each.
pub(super) struct Looks<'a> {
    root: &'a File,
    folder: &'a str,
    at: Option<File>,
}

impl<'a> Looks<'a> {
    pub(super) fn beneath(root: &'a File) -> Self {
        Self { root, folder: "", at: None }
    }

    /// The stamp of a regular file; an error where it is none.
    pub(super) fn at(&mut self, path: &'a RelPath) -> io::Result<Stamp> {
        let (folder, name) = path.as_str().rsplit_once('/').unwrap_or(("", path.as_str()));
        if self.folder != folder {
            self.at = Some(walk(self.root, folder, false)?);
            self.folder = folder;
        }
        let at = self.at.as_ref().unwrap_or(self.root);
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            Ok(Stamp::of_stat(&stat))
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

/// Which file: a replica's serial and the file's position, or [`ROOT`].
pub(super) type FileKey = (u64, u32);
/// The folder itself rather than a file in it.
pub(super) const ROOT: u32 = u32::MAX;

/// Descriptors kept for the next read or write; the one used longest ago goes first.
#[derive(Debug, Default)]
pub(super) struct OpenFiles(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    files: BTreeMap<FileKey, (Arc<File>, u64)>,
    uses: u64,
}

impl OpenFiles {
    /// The file under `key`, opened now unless it is kept.
    pub(super) fn get(
        &self,
        key: FileKey,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<Arc<File>> {
        {
            let kept = &mut *lock(&self.0);
            kept.uses += 1;
            if let Some((file, used)) = kept.files.get_mut(&key) {
                *used = kept.uses;
                return Ok(Arc::clone(file));
            }
        }
        let file = Arc::new(open()?);
        let kept = &mut *lock(&self.0);
        if kept.files.len() >= MAX_OPEN
            && let Some(oldest) = kept.files.iter().min_by_key(|(_, (_, used))| *used)
        {
            let oldest = *oldest.0;
            kept.files.remove(&oldest);
        }
        kept.files.insert(key, (Arc::clone(&file), kept.uses));
        Ok(file)
    }

    /// Closes what is kept of the replica numbered `serial`.
    pub(super) fn close(&self, serial: u64) {
        lock(&self.0).files.retain(|key, _| key.0 != serial);
    }
}

/// The hidden name beside `target` under which `id` grows.
pub(super) fn part_path(target: &Path, id: &ContentId) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let mut end = name.len().min(MAX_COMPONENT - PART.len() - 10);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let digits = u32::from_be_bytes([id.hash[0], id.hash[1], id.hash[2], id.hash[3]]);
    target.with_file_name(format!(".{}.{digits:08x}{PART}", &name[..end]))
}

/// Whether a name is that of something being fetched, which is never shared.
pub(super) fn is_part(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(PART)
}

/// Refuses what does not fit on the disk of `folder`, of which `promised` bytes are spoken for.
pub(super) fn check_space(folder: &Path, need: u64, promised: u64) -> Result<()> {
    let disk = rustix::fs::statvfs(folder).map_err(|e| {
        Error::io(format!("cannot see the free space of {}", folder.display()), &e.into())
    })?;
    if disk.f_blocks == 0 {
        // Some network file systems do not say.
        return Ok(());
    }
    let block = disk.f_frsize.max(1);
    let free = disk.f_bavail.saturating_mul(block).saturating_sub(promised);
    let reserve = RESERVE.min(disk.f_blocks.saturating_mul(block) / 100);
    if need.saturating_add(reserve) <= free {
        return Ok(());
    }
    let message = format!(
        "the disk is too small: {} needed and {} kept free, but only {} free on the disk of {}",
        bytes(need),
        bytes(reserve),
        bytes(free),
        folder.display(),
    );
    Err(Error::new(ErrorKind::DiskFull, message).hint("free some space, or fetch to another disk"))
}

/// A number of bytes as people write it.
fn bytes(n: u64) -> String {
    let units = ["kB", "MB", "GB", "TB", "PB", "EB"];
    let Some(power) = n.checked_ilog(1000).filter(|power| *power > 0) else {
        return format!("{n} B");
    };
    let unit = 1000u64.pow(power);
    format!("{}.{} {}", n / unit, n % unit / (unit / 10), units[power as usize - 1])
}

/// Gives a new file its size, and its room where that costs nothing. Where it does not, a write can
/// still find the disk full.
pub(super) fn preallocate(file: &File, size: u64) -> io::Result<()> {
    if size == 0 {
        return Ok(());
    }
    if is_memory(file) {
        return file.set_len(size);
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(size),
        other => Ok(other?),
    }
}

/// Makes a hole of this range, which reads as zeroes and takes no room. False where the file system
/// cannot.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> bool {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, offset, len).is_ok()
}

/// Whether a file lies in memory. A disk's file system gives a gigabyte in a millisecond by noting
/// where it is; one in memory clears every page of it, a quarter of a second in which nothing flows.
fn is_memory(file: &File) -> bool {
    // From linux/magic.h.
    const TMPFS: u32 = 0x0102_1994;
    const RAMFS: u32 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|fs| matches!(fs.f_type as u32, TMPFS | RAMFS))
}

/// Makes what was renamed or made in `folder` survive a power cut.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes a file, link or folder; nothing there is fine.
pub(super) fn remove_any(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Gives `part` the name `target` and fails with `AlreadyExists` where that is taken.
pub(super) fn rename_new(part: &Path, target: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags};
    match rustix::fs::renameat_with(CWD, part, CWD, target, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rename_new_by_hand(part, target),
        other => Ok(other?),
    }
}

/// The same where the file system cannot: a hard link takes a name only if it is free. For folders
/// there is no such thing, but a rename never replaces a folder with anything in it.
fn rename_new_by_hand(part: &Path, target: &Path) -> io::Result<()> {
    if !part.symlink_metadata()?.is_dir() && std::fs::hard_link(part, target).is_ok() {
        return std::fs::remove_file(part);
    }
    match target.symlink_metadata() {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::fs::rename(part, target),
        Err(error) => Err(error),
    }
}

/// Gives `part` the name `target`; what had it is gone afterwards, and never before.
pub(super) fn rename_over(part: &Path, target: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags};
    let folder_at = |path: &Path| path.symlink_metadata().map(|meta| meta.is_dir());
    match folder_at(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return rename_new(part, target),
        Ok(false) if !folder_at(part)? => return std::fs::rename(part, target),
        other => drop(other?),
    }
    match rustix::fs::renameat_with(CWD, part, CWD, target, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            let aside = part.with_extension("potluck-old");
            std::fs::rename(target, &aside)?;
            std::fs::rename(part, target).inspect_err(|_| {
                // Put it back; if that fails too it still lies beside, under a name that tells.
                let _ = std::fs::rename(&aside, target);
            })?;
            remove_any(&aside)
        }
        other => {
            other?;
            remove_any(part)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelPath {
        RelPath::new(text).unwrap()
    }

    #[test]
    fn nothing_is_opened_through_a_link_or_outside_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::create_dir(dir.path().join("out")).unwrap();
        std::fs::write(dir.path().join("out/secret"), "s").unwrap();
        std::fs::write(root.join("in/file"), "f").unwrap();
        std::os::unix::fs::symlink("../out", root.join("door")).unwrap();
        std::os::unix::fs::symlink("in", root.join("alias")).unwrap();
        std::os::unix::fs::symlink("../../out/secret", root.join("in/link")).unwrap();
        let root = open_folder(&root).unwrap();
        for open in [open_beneath, walk_and_open] {
            for what_for in [For::Reading, For::Making { executable: false }] {
                assert!(open(&root, &path("in/file"), what_for).is_ok());
                for bad in ["door/secret", "alias/file", "in/link", "in", "door/new"] {
                    assert!(open(&root, &path(bad), what_for).is_err(), "{bad}");
                }
            }
        }
        assert!(make_folder(&root, &path("door/new")).is_err());
        assert_eq!(std::fs::read_dir(dir.path().join("out")).unwrap().count(), 1);
    }

    #[test]
    fn files_written_to_come_with_their_folders_and_executable_bit() {
        let dir = tempfile::tempdir().unwrap();
        let root = open_folder(dir.path()).unwrap();
        open_beneath(&root, &path("a/b/run"), For::Making { executable: true }).unwrap();
        open_beneath(&root, &path("a/b/data"), For::Making { executable: false }).unwrap();
        let mode = |name| dir.path().join(name).metadata().unwrap().mode();
        assert_ne!(mode("a/b/run") & 0o100, 0);
        assert_eq!(mode("a/b/data") & 0o111, 0);
    }

    #[test]
    fn only_so_many_files_stay_open_and_the_longest_unused_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::open(dir.path());
        let files = OpenFiles::default();
        files.get((0, 0), open).unwrap();
        for n in 1..300 {
            files.get((1, n), open).unwrap();
            files.get((0, 0), || panic!("it is in use and should be kept")).unwrap();
        }
        assert_eq!(lock(&files.0).files.len(), MAX_OPEN);
        files.close(1);
        assert_eq!(lock(&files.0).files.len(), 1);
    }

    #[test]
    fn temporary_names_lie_beside_the_target_and_fit_into_a_name() {
        let id = ContentId::file([0xab; 32]);
        let part = part_path(Path::new("/x/film.mkv"), &id);
        assert_eq!(part, Path::new("/x/.film.mkv.abababab.potluck-part"));
        let part = part_path(&Path::new("/x").join("ü".repeat(127)), &id);
        let name = part.file_name().unwrap().to_str().unwrap();
        assert!(name.len() <= 255 && name.len() >= 253 && is_part(name));
    }

    #[test]
    fn what_was_in_the_way_is_gone_only_when_it_may_be() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let make = |name: &str, folder: bool, with: &str| {
            remove_any(&at(name)).unwrap();
            if folder {
                std::fs::create_dir(at(name)).unwrap();
                std::fs::write(at(name).join("f"), with).unwrap();
            } else {
                std::fs::write(at(name), with).unwrap();
            }
        };
        let with = |name: &str| {
            std::fs::read_to_string(at(name))
                .or_else(|_| std::fs::read_to_string(at(name).join("f")))
        };
        for (new, old) in [(false, false), (false, true), (true, false), (true, true)] {
            for rename in [rename_new, rename_new_by_hand] {
                make("new", new, "new");
                make("old", old, "old");
                let error = rename(&at("new"), &at("old")).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
                assert_eq!(
                    (with("new").unwrap(), with("old").unwrap()),
                    ("new".into(), "old".into())
                );
                remove_any(&at("old")).unwrap();
                rename(&at("new"), &at("old")).unwrap();
                assert_eq!(with("old").unwrap(), "new");
            }
            make("new", new, "new");
            make("old", old, "old");
            rename_over(&at("new"), &at("old")).unwrap();
            assert_eq!(with("old").unwrap(), "new");
            assert!(with("new").is_err());
        }
    }

    #[test]
    fn a_stamp_is_written_and_read_back_and_young_files_are_racy() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), "x").unwrap();
        let stamp = Stamp::of(&dir.path().join("f").metadata().unwrap());
        let mut bytes = Vec::new();
        stamp.encode(&mut bytes);
        assert_eq!(bytes.len(), Stamp::BYTES);
        assert_eq!(Stamp::decode(&mut Reader::new(&bytes)), Ok(stamp));
        let touched = stamp.modified.0 as u64;
        assert!(stamp.is_racy(WallTime(touched)) && stamp.is_racy(WallTime(touched + 2)));
        assert!(!stamp.is_racy(WallTime(touched + 3)));
    }

    #[test]
    fn numbers_of_bytes_are_written_for_people() {
        for (n, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (131_400_000_000, "131.4 GB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }
}
