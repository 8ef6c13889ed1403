//! Owns the database in which an index's memory survives: written by one thread, in groups. Never
//! decides what is saved (the registrar does).

use std::path::Path;

use crossbeam_channel::{Receiver, Sender};
use potluck_core::registrar::{Change, Table};
use potluck_core::wire::desk::{Answer, DeskCode, DeskRefusal};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tracing::{error, info, warn};

use crate::error::{Error, ErrorKind, Result};
use crate::state::{Hold, StateDir};

/// Memory that the database may use: its file is read once, when the index starts.
const CACHE: usize = 8 << 20;

/// What the writing thread does, in order.
pub(super) enum Write {
    Change(Change),
    /// Let this answer go once everything before it is on disk.
    Answer(Sender<Option<Answer>>, Box<Answer>),
    /// Write what came before this, and end.
    Stop,
}

/// The thread that owns the database: commits what has gathered, then lets the answers go.
pub(super) fn write_all(database: &Database, _lock: Hold, folder: &Path, writes: &Receiver<Write>) {
    let (mut healthy, mut stop) = (true, false);
    while !stop && let Ok(first) = writes.recv() {
        let mut changes = Vec::new();
        let mut answers = Vec::new();
        for write in std::iter::once(first).chain(writes.try_iter()) {
            match write {
                Write::Change(change) => changes.push(change),
                Write::Answer(reply, answer) => answers.push((reply, answer)),
                Write::Stop => stop = true,
            }
        }
        let result =
            if changes.is_empty() && healthy { Ok(()) } else { commit(database, &changes) };
        match &result {
            Ok(()) if !healthy => info!("the index's database takes changes again"),
            Err(e) if healthy => {
                error!(error = %e, folder = %folder.display(), "the index cannot save its state: it goes on from memory; what changes now is lost at a restart");
            }
            _ => {}
        }
        healthy = result.is_ok();
        for (reply, answer) in answers {
            let answer = if healthy { *answer } else { not_durable() };
            let _ = reply.try_send(Some(answer));
        }
    }
}

fn not_durable() -> Answer {
    Answer::Refused(DeskRefusal {
        code: DeskCode::NotDurable,
        text: "the index cannot write its state (is its disk full?); nothing was promised".into(),
    })
}

/// One redb table for each of the registrar's, keys and values as it encodes them.
fn table(of: Table) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
    TableDefinition::new(of.name())
}

fn commit(database: &Database, changes: &[Change]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for change in changes {
        let mut table = transaction.open_table(table(change.table))?;
        match &change.value {
            Some(value) => drop(table.insert(&*change.key, &**value)?),
            None => drop(table.remove(&*change.key)?),
        }
    }
    Ok(transaction.commit()?)
}

/// A row of the database: its table, key and value.
type SavedRow = (Table, Vec<u8>, Vec<u8>);

pub(super) fn load(database: &Database) -> Result<Vec<SavedRow>> {
    let mut saved = Vec::new();
    let mut read = || -> Result<(), redb::Error> {
        let transaction = database.begin_read()?;
        for of in Table::ALL {
            match transaction.open_table(table(of)) {
                Ok(rows) => {
                    for row in rows.iter()? {
                        let (key, value) = row?;
                        saved.push((of, key.value().to_vec(), value.value().to_vec()));
                    }
                }
                Err(redb::TableError::TableDoesNotExist(_)) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    };
    read().map_err(|e| {
        Error::new(ErrorKind::Integrity, format!("cannot read the index's database: {e}"))
    })?;
    Ok(saved)
}

pub(super) fn open_database(dir: &StateDir) -> Result<Database> {
    let path = dir.path().join("index.redb");
    let create = || Database::builder().set_cache_size(CACHE).create(&path);
    match create() {
        Ok(database) => Ok(database),
        Err(redb::DatabaseError::Storage(redb::StorageError::Io(e)))
            if e.kind() != std::io::ErrorKind::InvalidData =>
        {
            Err(Error::io(format_args!("cannot open {}", path.display()), &e))
        }
        Err(e) => {
            // The members know almost all of it and register it again: begin anew, keep the old file.
            let aside = path.with_extension("redb.damaged");
            warn!(error = %e, kept = %aside.display(), "the index's database is damaged: beginning a new one");
            std::fs::rename(&path, &aside)
                .map_err(|e| Error::io(format_args!("cannot move {} aside", path.display()), &e))?;
            create().map_err(|e| {
                Error::new(ErrorKind::Other, format!("cannot make {}: {e}", path.display()))
            })
        }
    }
}
