//! The record of a device, and who has it.
//!
//! A claim is a row beside both records that refers to the device and the instance: the records'
//! own rules give a device to one instance at most, keep it from going while that has it, and free
//! it with the instance, whatever that dies of.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use rusqlite::{OptionalExtension, Row, Transaction};
use serde::{Deserialize, Serialize};

use crate::devices::address::PciAddress;
use crate::devices::errors::ClaimError;
use crate::devices::spec::DeviceName;

/// One device, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) name: DeviceName,
    pub(super) address: PciAddress,
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) is_gpu: bool,
    pub(super) group: u32,
    pub(super) created_at: DateTime<Utc>,
    pub(super) tags: BTreeMap<String, String>,
}

/// A device that an instance is to have, and those that cannot be told apart from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its id.
    pub(super) id: String,
    pub(super) name: DeviceName,
    /// The rest of its IOMMU group.
    pub(super) peers: Vec<PciAddress>,
}

impl Record {
    pub(super) fn insert(&self, records: &Transaction<'_>) -> rusqlite::Result<()> {
        let statement = "INSERT INTO devices (id, name, address, json) VALUES (?1, ?2, ?3, ?4)";
        let json = serde_json::to_string(self)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
        let (name, address) = (self.name.as_str(), self.address.as_str());
        records.execute(statement, (&self.id, name, address, json)).map(drop)
    }

    pub(super) fn remove(&self, records: &Transaction<'_>) -> rusqlite::Result<()> {
        records.execute("DELETE FROM devices WHERE id = ?1", [&self.id]).map(drop)
    }

    /// All of them. One that cannot be read is logged, and keeps no other from being served.
    pub(super) fn all(records: &Transaction<'_>) -> rusqlite::Result<Vec<Self>> {
        let mut statement = records.prepare("SELECT id, json FROM devices")?;
        let rows = statement.query_map([], Self::from_row)?;
        let found: rusqlite::Result<Vec<Option<Self>>> = rows.collect();
        Ok(found?.into_iter().flatten().collect())
    }

    /// The one whose id, or else name, is `key`.
    pub(super) fn find(records: &Transaction<'_>, key: &str) -> rusqlite::Result<Option<Self>> {
        for column in ["id", "name"] {
            let query = format!("SELECT id, json FROM devices WHERE {column} = ?1");
            let found = records.query_row(&query, [key], Self::from_row).optional()?;
            if let Some(record) = found.flatten() {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// The name of the one at `address`, if that is registered.
    pub(super) fn at(
        records: &Transaction<'_>,
        address: &PciAddress,
    ) -> rusqlite::Result<Option<String>> {
        let query = "SELECT name FROM devices WHERE address = ?1";
        records.query_row(query, [address.as_str()], |row| row.get(0)).optional()
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Option<Self>> {
        let (id, json): (String, String) = (row.get(0)?, row.get(1)?);
        let record = serde_json::from_str(&json);
        if let Err(error) = &record {
            tracing::error!(%id, %error, "Record of a device is unreadable");
        }
        Ok(record.ok())
    }
}

/// Who has which device, by the device's id.
pub(super) fn claims(records: &Transaction<'_>) -> rusqlite::Result<BTreeMap<String, String>> {
    let mut statement = records.prepare("SELECT device_id, instance_id FROM device_claims")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// Gives devices to an instance whose record is there, alone: nobody else has one of the same
/// group.
///
/// # Errors
///
/// [`ClaimError`]; the transaction has to be given up then.
pub fn claim(
    records: &Transaction<'_>,
    wanted: &[Wanted],
    instance_id: &str,
) -> Result<(), ClaimError> {
    for Wanted { id, name, peers } in wanted {
        let name = name.to_string();
        if Record::find(records, id)?.is_none_or(|record| record.id != *id) {
            return Err(ClaimError::Missing { device: name });
        }
        let query = "SELECT instance_id FROM device_claims WHERE device_id = ?1";
        let other = records.query_row(query, [id], |row| row.get(0)).optional()?;
        if let Some(instance) = other {
            return Err(ClaimError::Taken { device: name, instance });
        }
        for peer in peers {
            let query = "SELECT devices.name, instance_id FROM device_claims
                JOIN devices ON devices.id = device_id WHERE address = ?1 AND instance_id <> ?2";
            let found = records.query_row(query, (peer.as_str(), instance_id), |row| {
                Ok((row.get(0)?, row.get(1)?))
            });
            if let Some((other, instance)) = found.optional()? {
                return Err(ClaimError::GroupTaken { device: name, other, instance });
            }
        }
        let statement = "INSERT INTO device_claims (device_id, instance_id) VALUES (?1, ?2)";
        records.execute(statement, (id, instance_id))?;
    }
    Ok(())
}
