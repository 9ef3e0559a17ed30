//! Records on disk: one SQLite file, in write-ahead mode.
//!
//! What a commit has returned from survives the death of this process at any moment, and a loss of
//! power: each commit waits for the disk (`synchronous = FULL`), but for those that only say what
//! is about to be done. What a record names is brought to the disk by its maker before the record
//! says that it is there.
//!
//! The schema is a list of steps; `user_version` says how many of them a file has seen. Steps are
//! only ever added.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, Transaction};

/// The schema, as steps from an empty file.
const STEPS: &[&str] = &[
    include_str!("store/0001_instances.sql"),
    include_str!("store/0002_volumes.sql"),
    include_str!("store/0003_devices.sql"),
];

/// How many those are.
#[expect(clippy::cast_possible_truncation, reason = "a list written by hand")]
const KNOWN: u32 = STEPS.len() as u32;

/// How long a statement waits for another process, such as a person with sqlite3.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The records. Clones are the same file.
#[derive(Debug, Clone)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
}

impl Store {
    /// Opens the file at `path`, made and brought up to date if need be.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; the file is as before.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut connection = connect(path)?;
        migrate(&mut connection, path)?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)) })
    }

    /// Does `work` in one transaction: all of it is kept, or on an error none.
    ///
    /// Statements here take tens of microseconds and a commit as long as the disk does, so that
    /// callers in async code do not leave it.
    ///
    /// # Errors
    ///
    /// What `work` says, or SQLite of the commit.
    pub fn transact<T, E: From<rusqlite::Error>>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        commit(&mut self.lock(), work)
    }

    /// As [`Self::transact`], but does not wait for the disk: for what nobody is told of, such as
    /// that something is about to be done. A loss of power may take it, unless a transaction that
    /// did wait came after it; the death of this process does not.
    ///
    /// # Errors
    ///
    /// As [`Self::transact`].
    pub fn intend<T, E: From<rusqlite::Error>>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = self.lock();
        connection.pragma_update(None, "synchronous", "normal")?;
        let outcome = commit(&mut connection, work);
        connection.pragma_update(None, "synchronous", "full")?;
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic in `work` has rolled its transaction back: the connection is as good as before.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn commit<T, E: From<rusqlite::Error>>(
    connection: &mut Connection,
    work: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
) -> Result<T, E> {
    let transaction = connection.transaction()?;
    let result = work(&transaction)?;
    transaction.commit()?;
    Ok(result)
}

/// Opens the file at `path` for one user of it, made if need be, as it is.
///
/// # Errors
///
/// [`StoreError::Open`].
pub fn connect(path: &Path) -> Result<Connection, StoreError> {
    let open = || {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "full")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        Ok(connection)
    };
    open().map_err(|source| StoreError::Open { path: path.to_owned(), source })
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Open { path: path.to_owned(), source };
    let transaction = connection.transaction().map_err(failed)?;
    let seen: u32 =
        transaction.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
    if seen > KNOWN {
        return Err(StoreError::Newer { path: path.to_owned(), seen, known: KNOWN });
    }
    for (_, step) in (0..).zip(STEPS).filter(|&(number, _)| number >= seen) {
        transaction.execute_batch(step).map_err(failed)?;
    }
    transaction.pragma_update(None, "user_version", KNOWN).map_err(failed)?;
    transaction.commit().map_err(failed)
}

/// Why the records cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite refuses the file.
    #[error("Failed to open records {path}", path = path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The file is of a later version of this program.
    #[error(
        "Records {path} are of a newer version: {seen} schema steps, {known} known",
        path = path.display()
    )]
    Newer {
        /// Which.
        path: PathBuf,
        /// Steps the file has seen.
        seen: u32,
        /// Steps this version knows.
        known: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_kept_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records");
        let insert = "INSERT INTO instances (id, name, json) VALUES (?1, ?2, '{}')";
        let store = Store::open(&path).unwrap();
        store.transact(|records| records.execute(insert, ["a", "one"])).unwrap();

        let refused = store.transact(|records| {
            records.execute(insert, ["b", "two"])?;
            records.execute(insert, ["c", "one"])
        });

        assert!(refused.is_err(), "a name is taken once");
        let again = Store::open(&path).unwrap();
        let count = "SELECT count(*) FROM instances";
        let count = again.transact(|records| records.query_row(count, [], |row| row.get(0)));
        assert_eq!(count, Ok(1));
    }

    /// A loss of power cannot be had in a test; that SQLite is told to reckon with one can.
    #[test]
    fn commits_wait_for_the_disk_but_for_intentions() {
        const NORMAL: i64 = 1;
        const FULL: i64 = 2;
        let synchronous = |records: &Transaction<'_>| -> rusqlite::Result<i64> {
            records.pragma_query_value(None, "synchronous", |row| row.get(0))
        };
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("records")).unwrap();

        let at_first = store.transact(synchronous);
        let intended = store.intend(synchronous);
        let failed = store.intend(|records| records.execute("no statement", []));
        let afterwards = store.transact(synchronous);

        assert_eq!((at_first, intended, afterwards), (Ok(FULL), Ok(NORMAL), Ok(FULL)));
        assert!(failed.is_err());
    }

    #[test]
    fn a_file_of_a_later_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records");
        let store = Store::open(&path).unwrap();
        store.transact(|records| records.pragma_update(None, "user_version", 99)).unwrap();

        assert!(matches!(Store::open(&path), Err(StoreError::Newer { seen: 99, .. })));
    }
}
