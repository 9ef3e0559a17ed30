//! The record of an instance: all that must survive the server, and how it is kept.
//!
//! A record in another phase than `Kept` belongs to an operation under way; after a restart that
//! operation is undone or finished by `reconcile.rs`. What a guest does is not written here
//! as it happens: the events file in the instance's folder has it.

use std::net::Ipv4Addr;

use chrono::{DateTime, Utc};
use rusqlite::{ErrorCode, Transaction};
use serde::{Deserialize, Serialize};

use crate::images::digest::Digest;
use crate::instances::history::Ending;
use crate::instances::reclaim::Hold;
use crate::instances::restart::RestartStatus;
use crate::instances::spec::{InstanceSpec, VolumeMount};
use crate::timeline::Timeline;

/// One instance, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// 24 letters and digits, beginning with a letter.
    pub id: String,
    /// What was asked for.
    pub spec: InstanceSpec,
    /// What the image's name stood for at creation.
    pub digest: Digest,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When it is to be deleted, if ever.
    #[serde(default)]
    pub expires_at: Option<DateTime<Utc>>,
    /// Its address, if it has a network: of its machine, or of the last one.
    #[serde(default)]
    pub address: Option<Ipv4Addr>,
    /// Whether an operation is under way.
    pub phase: Phase,
    /// The moments before there was a worker; after the end, all.
    pub timeline: Timeline,
    /// How and when it ended, once it has; while it is started again, how it had ended.
    pub end: Option<End>,
    /// Memory that its guest was asked to give up.
    #[serde(default)]
    pub hold: Option<Hold>,
    /// How starting it again by itself has gone.
    #[serde(default)]
    pub restart: RestartStatus,
    /// A change of its volumes that is under way in its guest: not acknowledged.
    #[serde(default)]
    pub volume_change: Option<VolumeChange>,
}

/// A change of an instance's volumes. Whoever finds one asks the guest how far it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeChange {
    /// Being attached: nobody else gets the volume any more, and the instance does not have it yet.
    Attaching(VolumeMount),
    /// Being detached: the instance still has it.
    Detaching(VolumeMount),
}

impl VolumeChange {
    /// What is changed.
    pub fn mount(&self) -> &VolumeMount {
        match self {
            Self::Attaching(mount) | Self::Detaching(mount) => mount,
        }
    }
}

/// Whether an operation on a record is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Being created: not acknowledged, so that nobody relies on it.
    Creating,
    /// There.
    Kept,
    /// Being stopped: told to be so, and to stay so.
    Stopping,
    /// Being started again: not acknowledged.
    Starting,
    /// Being deleted: nobody may rely on it any more.
    Deleting,
}

/// How and when an instance ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When.
    pub at: DateTime<Utc>,
    /// When the machine had started, if it had.
    pub started_at: Option<DateTime<Utc>>,
    /// How.
    pub how: Ending,
    /// It was ended for being unhealthy.
    #[serde(default)]
    pub unhealthy: bool,
}

/// Why a record was not written.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// Another record has the name.
    #[error("Instance name {name:?} is taken")]
    NameTaken {
        /// Which.
        name: String,
    },
    /// The records' file system is full.
    #[error(
        "No space is left in the data folder for the record of instance {name:?}: free some, for \
         example with `ovum image rm`"
    )]
    NoSpace {
        /// Which.
        name: String,
    },
    /// SQLite.
    #[error("Failed to keep the record of instance {name:?}")]
    Store {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
}

impl Record {
    /// Adds this record.
    ///
    /// # Errors
    ///
    /// SQLite's; [`ReserveError::from_sqlite`] knows what they mean.
    pub fn insert(&self, records: &Transaction<'_>) -> rusqlite::Result<()> {
        let name = self.spec.name.as_str();
        let statement = "INSERT INTO instances (id, name, json) VALUES (?1, ?2, ?3)";
        records.execute(statement, (&self.id, name, &self.json()?)).map(drop)
    }

    /// Replaces what is kept under this id.
    ///
    /// # Errors
    ///
    /// SQLite's.
    pub fn update(&self, records: &Transaction<'_>) -> rusqlite::Result<()> {
        let statement = "UPDATE instances SET json = ?2 WHERE id = ?1";
        records.execute(statement, (&self.id, &self.json()?)).map(drop)
    }

    /// Removes the record `id`; its name is free again.
    ///
    /// # Errors
    ///
    /// SQLite's.
    pub fn remove(id: &str, records: &Transaction<'_>) -> rusqlite::Result<()> {
        records.execute("DELETE FROM instances WHERE id = ?1", [id]).map(drop)
    }

    /// All records by id. One that cannot be read is logged and `None`: it must not keep the others
    /// from being served.
    ///
    /// # Errors
    ///
    /// SQLite's.
    pub fn all(records: &Transaction<'_>) -> rusqlite::Result<Vec<(String, Option<Self>)>> {
        let mut statement = records.prepare("SELECT id, json FROM instances ORDER BY id")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let mut found = Vec::new();
        for row in rows {
            let (id, json): (String, String) = row?;
            let record = serde_json::from_str(&json);
            if let Err(error) = &record {
                tracing::error!(%id, %error, "Record of an instance is unreadable");
            }
            found.push((id, record.ok()));
        }
        Ok(found)
    }

    fn json(&self) -> rusqlite::Result<String> {
        serde_json::to_string(self)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
    }
}

impl ReserveError {
    /// What `source` means for the instance called `name`.
    pub fn from_sqlite(name: &str, source: rusqlite::Error) -> Self {
        let name = name.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::ConstraintViolation) => Self::NameTaken { name },
            Some(ErrorCode::DiskFull) => Self::NoSpace { name },
            _ => Self::Store { name, source },
        }
    }
}
