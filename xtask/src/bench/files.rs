//! Owns the measurement of many small files, from one source to one fetcher, beside other tools.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::race::{Digest, race};
use super::{CHUNK, Setting};
use crate::proc;
use crate::tools::{Curl, Libtorrent, Rsync, Tool};

/// The made-up folder: so many files …
const FILES: usize = 10_000;
/// … of so many bytes, …
const BYTES: usize = 4096;
/// … so many in each folder of it.
const IN_ONE: usize = 1000;

pub(super) fn run(setting: &Setting) -> Result<()> {
    let small = setting.dir.join("small");
    make_up_folder(&small)?;
    one(setting, &small, &format!("{FILES} files of {BYTES} bytes"))?;
    fs::remove_dir_all(&small)?;
    match toolchain() {
        Some(lib) => one(setting, &lib, "the Rust toolchain's lib folder"),
        None => {
            println!(
                "## Files: the Rust toolchain's lib folder\n\nNot measured: rustc is not here.\n"
            );
            Ok(())
        }
    }
}

fn one(setting: &Setting, what: &Path, title: &str) -> Result<()> {
    let dir = setting.dir.join("race");
    fs::create_dir(&dir)?;
    let rsync = Rsync::default();
    let against = [("rsync", rsync.name())];
    let tools: Vec<Box<dyn Tool>> =
        vec![Box::new(rsync), Box::new(Curl::http()), Box::<Libtorrent>::default()];
    let Digest { files, bytes, .. } = Digest::of(what)?;
    let setting = Setting { potluck: setting.potluck.clone(), dir, ..*setting };
    let race = race(&setting, what, tools)?;
    println!("## Files: {title} ({files} files, {} MiB)\n", bytes >> 20);
    println!("{}", race.table(&against));
    fs::remove_dir_all(&setting.dir)?;
    Ok(())
}

fn make_up_folder(at: &Path) -> Result<()> {
    let mut stream = blake3::Hasher::new().update(b"many small files").finalize_xof();
    let mut bytes = vec![0; CHUNK];
    for nth in 0..FILES {
        let folder = at.join(format!("{:02}", nth / IN_ONE));
        if nth % IN_ONE == 0 {
            fs::create_dir_all(&folder)?;
        }
        let part = nth * BYTES % CHUNK;
        if part == 0 {
            stream.fill(&mut bytes);
        }
        fs::write(folder.join(format!("file{nth:05}")), &bytes[part..part + BYTES])?;
    }
    Ok(())
}

/// Where the compiler has its libraries.
fn toolchain() -> Option<PathBuf> {
    let mut rustc = Command::new(proc::find("rustc")?);
    let sysroot = proc::output(rustc.args(["--print", "sysroot"])).ok()?;
    Some(Path::new(sysroot.trim()).join("lib")).filter(|lib| lib.is_dir())
}
