//! What is lent to machines, as it is written down: before each change, until it is undone.
//!
//! Only the host's present boot counts: the next one begins with all its drivers and no mediated
//! devices. So these records need not wait for the disk.

use rusqlite::Transaction;

use crate::devices::binding::Change;

/// Some rows of the table.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    /// Of one loan.
    Loan(&'a str),
    /// Of one instance.
    Instance(&'a str),
    /// About one device.
    Device(&'a str),
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lent {
    pub(super) loan: String,
    pub(super) instance_id: String,
    pub(super) change: Change,
}

impl Lent {
    pub(super) fn insert(&self, records: &Transaction<'_>, boot_id: &str) -> rusqlite::Result<()> {
        let statement = "INSERT INTO loans (name, loan, instance_id, boot_id, json)
            VALUES (?1, ?2, ?3, ?4, ?5)";
        let json = serde_json::to_string(&self.change)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
        let values = (self.change.name(), &self.loan, &self.instance_id, boot_id, json);
        records.execute(statement, values).map(drop)
    }

    pub(super) fn remove(&self, records: &Transaction<'_>) -> rusqlite::Result<()> {
        records.execute("DELETE FROM loans WHERE name = ?1", [self.change.name()]).map(drop)
    }

    pub(super) fn find(records: &Transaction<'_>, rows: Rows<'_>) -> rusqlite::Result<Vec<Self>> {
        let (column, key) = match rows {
            Rows::Loan(key) => ("loan", key),
            Rows::Instance(key) => ("instance_id", key),
            Rows::Device(key) => ("name", key),
        };
        let query = format!("SELECT name, loan, instance_id, json FROM loans WHERE {column} = ?1");
        let mut statement = records.prepare(&query)?;
        let rows = statement.query_map([key], |row| {
            let (name, json): (String, String) = (row.get(0)?, row.get(3)?);
            let change = serde_json::from_str(&json);
            if let Err(error) = &change {
                tracing::error!(name, %error, "Record of a loan is unreadable");
            }
            let lent = |change| Ok(Self { loan: row.get(1)?, instance_id: row.get(2)?, change });
            change.ok().map(lent).transpose()
        })?;
        let found: rusqlite::Result<Vec<Option<Self>>> = rows.collect();
        Ok(found?.into_iter().flatten().collect())
    }

    /// Instances to which something is lent.
    pub(super) fn instances(records: &Transaction<'_>) -> rusqlite::Result<Vec<String>> {
        let mut statement = records.prepare("SELECT DISTINCT instance_id FROM loans")?;
        let rows = statement.query_map([], |row| row.get(0))?;
        rows.collect()
    }

    /// Forgets what an earlier boot of the host has undone.
    pub(super) fn forget_others(records: &Transaction<'_>, boot_id: &str) -> rusqlite::Result<()> {
        records.execute("DELETE FROM loans WHERE boot_id <> ?1", [boot_id]).map(drop)
    }
}
