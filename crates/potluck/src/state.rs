//! Owns the state folder: where things lie in it, who may read them, and that one process at a time
//! uses each half. Never knows what the files mean.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use potluck_core::trust::MachineKey;
use rustix::fs::{FlockOperation, flock};
use zeroize::Zeroizing;

use crate::clock;
use crate::error::{Error, ErrorKind, Result};

/// One half of a state folder: `peer` or `index`.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
}

/// A folder held by this process, until dropped.
#[derive(Debug)]
pub(crate) struct Hold(File);

impl Drop for Hold {
    fn drop(&mut self) {
        // Not left to closing it: a child just being started may have it open for a moment longer.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes a folder, by the lock on the file `lock` in it.
///
/// # Errors
/// `Other` where another process has it.
pub(crate) fn hold(dir: &Path) -> Result<Hold> {
    let path = dir.join("lock");
    let failed = |e: &std::io::Error| Error::io(format_args!("cannot lock {}", path.display()), e);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(|e| failed(&e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Hold(file)),
        Err(rustix::io::Errno::AGAIN) => {
            let what = format!("another potluck process is using {}", dir.display());
            Err(Error::new(ErrorKind::Other, what).hint(
                "stop it with potluck down, or give this one a folder of its own: --state DIR",
            ))
        }
        Err(error) => Err(failed(&error.into())),
    }
}

impl StateDir {
    /// Makes `<state>/<half>` (mode 0700) where it is missing.
    pub(crate) fn open(state: &Path, half: &str) -> Result<Self> {
        let path = state.join(half);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(|e| {
            Error::io(format_args!("cannot make the state folder {}", path.display()), &e)
        })?;
        Ok(Self { path })
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The key in the file `key`, made at the first call (mode 0600, durable before it is used).
    pub(crate) fn key(&self) -> Result<MachineKey> {
        let path = self.path.join("key");
        let problem = |e: &std::io::Error| {
            Error::io(format_args!("cannot use the key {}", path.display()), e)
        };
        match File::open(&path) {
            Ok(mut file) => {
                let mode = file.metadata().map_err(|e| problem(&e))?.permissions().mode();
                if mode & 0o077 != 0 {
                    return Err(Error::new(
                        ErrorKind::Other,
                        format!(
                            "the key {} can be read by others (mode {:o})",
                            path.display(),
                            mode & 0o777
                        ),
                    )
                    .hint(format!("chmod 600 {}", path.display())));
                }
                let mut seed = Zeroizing::new([0; 32]);
                file.read_exact(&mut *seed).map_err(|e| problem(&e))?;
                Ok(MachineKey::from_seed(*seed))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let seed = Zeroizing::new(clock::random::<32>());
                self.write_durably("key", &*seed)?;
                Ok(MachineKey::from_seed(*seed))
            }
            Err(e) => Err(problem(&e)),
        }
    }

    /// Replaces the file `name` as a whole: after a crash it is the old one or the new one.
    fn write_durably(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, fresh) = (self.path.join(name), self.path.join(format!("{name}.new")));
        (|| {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(&self.path)?.sync_all()
        })()
        .map_err(|e| Error::io(format_args!("cannot write {}", path.display()), &e))
    }
}
