//! The record of a volume, and who has it.
//!
//! A record in another phase than `Kept` belongs to an operation under way, which the next server
//! undoes or finishes. Attachments are rows beside it that refer to both the volume and the
//! instance: the records' own rules keep a volume from going while somebody has it, and take an
//! instance's attachments away with the instance, whatever that dies of.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use rusqlite::{OptionalExtension, Row, Transaction};
use serde::{Deserialize, Serialize};

use crate::volumes::errors::AttachError;
use crate::volumes::spec::{VolumeId, VolumeName};

/// One volume, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: VolumeId,
    pub(super) name: VolumeName,
    pub(super) size_gib: u64,
    pub(super) created_at: DateTime<Utc>,
    pub(super) tags: BTreeMap<String, String>,
    pub(super) phase: Phase,
}

/// Whether an operation on a volume is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// Being made: nobody was told of it.
    Creating,
    /// There.
    Kept,
    /// Being removed: nobody has it, or may get it.
    Deleting,
}

/// An instance that has a volume, whether or not it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Which.
    pub instance_id: String,
    /// Where in its guest.
    pub mount_path: String,
    /// It cannot write to the volume; what it writes may go into a layer of its own.
    pub read_only: bool,
}

impl Record {
    pub(super) fn insert(&self, records: &Transaction<'_>) -> rusqlite::Result<()> {
        let statement = "INSERT INTO volumes (id, name, json) VALUES (?1, ?2, ?3)";
        let (id, name) = (self.id.as_str(), self.name.as_str());
        records.execute(statement, (id, name, &self.json()?)).map(drop)
    }

    pub(super) fn update(&self, records: &Transaction<'_>) -> rusqlite::Result<()> {
        let statement = "UPDATE volumes SET json = ?2 WHERE id = ?1";
        records.execute(statement, (self.id.as_str(), &self.json()?)).map(drop)
    }

    pub(super) fn remove(id: &str, records: &Transaction<'_>) -> rusqlite::Result<()> {
        records.execute("DELETE FROM volumes WHERE id = ?1", [id]).map(drop)
    }

    /// All records by id. One that cannot be read is logged and `None`: it must not keep the others
    /// from being served.
    pub(super) fn all(
        records: &Transaction<'_>,
    ) -> rusqlite::Result<BTreeMap<String, Option<Self>>> {
        let mut statement = records.prepare("SELECT id, json FROM volumes")?;
        let rows = statement.query_map([], Self::from_row)?;
        rows.collect()
    }

    /// Those whose id, or else name, is `key`.
    pub(super) fn named(records: &Transaction<'_>, key: &str) -> rusqlite::Result<Vec<Self>> {
        for column in ["id", "name"] {
            let query = format!("SELECT id, json FROM volumes WHERE {column} = ?1");
            let mut statement = records.prepare(&query)?;
            let rows = statement.query_map([key], Self::from_row)?;
            let mut found = Vec::new();
            for row in rows {
                found.extend(row?.1.filter(|record| record.phase == Phase::Kept));
            }
            if !found.is_empty() {
                return Ok(found);
            }
        }
        Ok(Vec::new())
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<(String, Option<Self>)> {
        let (id, json): (String, String) = (row.get(0)?, row.get(1)?);
        let record = serde_json::from_str(&json);
        if let Err(error) = &record {
            tracing::error!(%id, %error, "Record of a volume is unreadable");
        }
        Ok((id, record.ok()))
    }

    fn json(&self) -> rusqlite::Result<String> {
        serde_json::to_string(self)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
    }
}

/// Who has which volume, by the volume's id.
pub(super) fn attachments(
    records: &Transaction<'_>,
) -> rusqlite::Result<BTreeMap<String, Vec<Attachment>>> {
    let query = "SELECT volume_id, instance_id, mount_path, read_only FROM attachments
        ORDER BY volume_id, instance_id";
    let mut statement = records.prepare(query)?;
    let rows = statement.query_map([], |row| {
        let attachment = Attachment {
            instance_id: row.get(1)?,
            mount_path: row.get(2)?,
            read_only: row.get(3)?,
        };
        Ok((row.get(0)?, attachment))
    })?;
    let mut found: BTreeMap<String, Vec<Attachment>> = BTreeMap::new();
    for row in rows {
        let (volume, attachment): (String, Attachment) = row?;
        found.entry(volume).or_default().push(attachment);
    }
    Ok(found)
}

/// Gives a volume to an instance whose record is there: alone, or beside others that only read.
///
/// # Errors
///
/// [`AttachError`]; the transaction has to be given up then.
pub fn attach(
    records: &Transaction<'_>,
    id: &str,
    attachment: &Attachment,
) -> Result<(), AttachError> {
    let Attachment { instance_id, mount_path, read_only } = attachment;
    if Record::named(records, id)?.iter().all(|record| record.id.as_str() != id) {
        return Err(AttachError::Missing { volume: id.to_owned() });
    }
    let query = "SELECT instance_id, read_only FROM attachments
        WHERE volume_id = ?1 AND (instance_id = ?2 OR NOT (read_only AND ?3)) LIMIT 1";
    let other = records.query_row(query, (id, instance_id, read_only), |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, bool>(1)?))
    });
    match other.optional()? {
        Some((other, _)) if other == *instance_id => {
            return Err(AttachError::Twice { volume: id.to_owned() });
        }
        Some((other, others_read_only)) => {
            return Err(AttachError::Taken {
                volume: id.to_owned(),
                instance: other,
                how: if others_read_only { "to read" } else { "to write" },
            });
        }
        None => {}
    }
    let statement = "INSERT INTO attachments (volume_id, instance_id, mount_path, read_only)
        VALUES (?1, ?2, ?3, ?4)";
    records.execute(statement, (id, instance_id, mount_path, read_only))?;
    Ok(())
}

/// Takes a volume away from an instance.
///
/// # Errors
///
/// SQLite's.
pub fn detach(records: &Transaction<'_>, id: &str, instance_id: &str) -> rusqlite::Result<()> {
    let statement = "DELETE FROM attachments WHERE volume_id = ?1 AND instance_id = ?2";
    records.execute(statement, (id, instance_id)).map(drop)
}
