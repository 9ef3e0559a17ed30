//! Images in the records: one row per name.
//!
//! A row says what must outlive the server: which digest a name stands for and how far that got.
//! Queue places and progress do not.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use chrono::{DateTime, Utc};
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use crate::images::config::ImageConfig;
use crate::images::digest::Digest;

/// The table, as one step of a schema.
pub const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS images (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    json TEXT NOT NULL
) STRICT";

/// The row of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Normalised name.
    pub name: String,
    /// The manifest it stands for.
    pub digest: Digest,
    /// How far that is.
    pub state: RecordState,
    /// The last digest of this name that became ready.
    pub serves: Option<Digest>,
    /// Where its content comes from.
    pub origin: Origin,
    /// What the image says about its processes.
    pub config: ImageConfig,
    /// The caller's labels.
    pub tags: BTreeMap<String, String>,
    /// When the name appeared.
    pub created_at: DateTime<Utc>,
}

/// How far an image was when its row was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordState {
    /// Not done: to be done again after a restart.
    Unfinished,
    /// Done; disk use of the root disk.
    Ready(u64),
    /// Failed, and why.
    Failed(String),
}

/// Where the content of an image can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// From its registry, with what the host knows.
    Registry,
    /// From its registry, with credentials that are not kept.
    RegistryWithCredentials,
    /// From an archive that is gone: only what is in the blob store.
    Archive,
}

impl ImageRecord {
    /// Writes the row, over the one of that name.
    ///
    /// # Errors
    ///
    /// Those of SQLite.
    pub fn upsert(&self, connection: &Connection) -> rusqlite::Result<()> {
        let json = serde_json::to_string(self).map_err(to_sql_error)?;
        let statement = "INSERT INTO images (name, digest, json) VALUES (?1, ?2, ?3)
            ON CONFLICT (name) DO UPDATE SET digest = ?2, json = ?3";
        let mut statement = connection.prepare_cached(statement)?;
        statement.execute(params![self.name, self.digest.to_string(), json]).map(drop)
    }

    /// The row of `name`.
    ///
    /// # Errors
    ///
    /// Those of SQLite, and if it is not what was written.
    pub fn find(connection: &Connection, name: &str) -> rusqlite::Result<Option<Self>> {
        let mut statement = connection.prepare_cached("SELECT json FROM images WHERE name = ?1")?;
        let json: Option<String> = statement.query_row([name], |row| row.get(0)).optional()?;
        json.map(|json| serde_json::from_str(&json).map_err(from_sql_error)).transpose()
    }

    /// All rows, by name.
    ///
    /// # Errors
    ///
    /// As [`ImageRecord::find`].
    pub fn list(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        let mut statement = connection.prepare_cached("SELECT json FROM images ORDER BY name")?;
        let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
        rows.map(|json| serde_json::from_str(&json?).map_err(from_sql_error)).collect()
    }

    /// Removes the row of `name`, if there is one.
    ///
    /// # Errors
    ///
    /// Those of SQLite.
    pub fn delete(connection: &Connection, name: &str) -> rusqlite::Result<()> {
        let mut statement = connection.prepare_cached("DELETE FROM images WHERE name = ?1")?;
        statement.execute([name]).map(drop)
    }
}

fn to_sql_error(error: serde_json::Error) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(error.into())
}

fn from_sql_error(error: serde_json::Error) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error.into())
}

/// The image rows of one database, over a connection of their own.
#[derive(Debug)]
pub struct Records {
    connection: Mutex<Connection>,
}

impl Records {
    /// Uses `connection`, making the table if it is missing.
    ///
    /// # Errors
    ///
    /// Those of SQLite.
    pub fn new(connection: Connection) -> rusqlite::Result<Self> {
        connection.execute_batch(SCHEMA)?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    /// Does `work`, which takes tens of microseconds and may be done in async code.
    ///
    /// # Errors
    ///
    /// Those of `work`.
    pub fn with<T>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        // Each statement is a transaction: a panic between two has broken nothing.
        work(&self.connection.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> ImageRecord {
        ImageRecord {
            name: name.to_owned(),
            digest: Digest::of(name.as_bytes()),
            state: RecordState::Ready(7),
            serves: Some(Digest::of(b"before")),
            origin: Origin::Registry,
            config: ImageConfig { cmd: vec!["sh".to_owned()], ..ImageConfig::default() },
            tags: BTreeMap::from([("team".to_owned(), "a".to_owned())]),
            created_at: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn rows_come_back_as_they_were_written() {
        let records = Records::new(Connection::open_in_memory().unwrap()).unwrap();
        let one = record("one");
        let two = ImageRecord { state: RecordState::Failed("why".to_owned()), ..record("two") };
        for record in [&two, &one, &one] {
            records.with(|rows| record.upsert(rows)).unwrap();
        }

        assert_eq!(records.with(ImageRecord::list), Ok(vec![one.clone(), two.clone()]));
        assert_eq!(records.with(|rows| ImageRecord::find(rows, "two")), Ok(Some(two.clone())));
        records.with(|rows| ImageRecord::delete(rows, "one")).unwrap();
        records.with(|rows| ImageRecord::delete(rows, "one")).unwrap();
        assert_eq!(records.with(ImageRecord::list), Ok(vec![two]));
    }

    /// A file written by this version must be read by all later ones.
    #[test]
    fn a_row_reads_like_this() {
        let text = serde_json::to_string(&record("n")).unwrap();

        let digest = Digest::of(b"n");
        let before = Digest::of(b"before");
        assert_eq!(
            text,
            format!(
                r#"{{"name":"n","digest":"{digest}","state":{{"ready":7}},"serves":"{before}","#
            ) + r#""origin":"registry","config":{"entrypoint":[],"cmd":["sh"],"env":{},"#
                + r#""working_dir":"","user":"","stop_signal":"","labels":{}},"#
                + r#""tags":{"team":"a"},"created_at":"1970-01-01T00:00:00Z"}"#
        );
    }
}
