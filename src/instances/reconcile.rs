//! After a restart: records against what is really there.
//!
//! | record | folder, worker | becomes |
//! |---|---|---|
//! | `Creating` | any | gone: nobody was told of it |
//! | `Deleting` | any | gone: somebody may have been told so |
//! | of one that ends with its server | any | gone: that server is |
//! | `Starting` | any | stopped, as before: nobody was told of the start |
//! | `Stopping` | a worker | watched again, and told to end once more |
//! | `Kept`, ended | any | stopped, as before |
//! | `Kept` | a worker | as its events say, and watched again |
//! | `Kept`, `Stopping` | no worker | stopped, as its events say |
//! | none | any | gone |
//!
//! A record that cannot be read keeps its folder: somebody may be able to repair it. A change of
//! volumes that was under way in a guest is brought to an end by its owner (`owner/volumes.rs`).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::join_all;

use crate::devices::Loan;
use crate::fleet::journal;
use crate::instances::disks::remove_stray_layers;
use crate::instances::owner::Owner;
use crate::instances::record::{Phase, Record};
use crate::instances::{OpenError, Shared, remove_folder};

/// Makes instances of the records and leaves nothing else behind.
///
/// # Errors
///
/// [`OpenError`]. What goes wrong with one instance is logged and leaves that one as it is.
pub(super) async fn reconcile(shared: &Arc<Shared>) -> Result<(), OpenError> {
    let records = shared.store.transact(Record::all).map_err(OpenError::Records)?;
    let records: BTreeMap<String, Option<Record>> = records.into_iter().collect();
    let failed = |source| OpenError::Dir { path: shared.dir.clone(), source };
    let strays = strays(&shared.dir, &records).map_err(failed)?;
    join_all(strays.iter().map(|id| clear(shared, id))).await;
    let known = records.keys().cloned().collect();
    join_all(records.into_values().flatten().map(|record| settle(shared, record))).await;
    shared.devices.release_strays(&known).await;
    Ok(())
}

/// Names in the folder of instances that no record has.
fn strays(dir: &Path, records: &BTreeMap<String, Option<Record>>) -> io::Result<Vec<String>> {
    let mut strays = Vec::new();
    for entry in fs::read_dir(dir)? {
        match entry?.file_name().into_string() {
            Ok(name) if !records.contains_key(&name) => strays.push(name),
            Ok(_known) => {}
            Err(name) => tracing::warn!(?name, "A file that is not ours lies among instances"),
        }
    }
    Ok(strays)
}

async fn settle(shared: &Arc<Shared>, record: Record) {
    if record.spec.ends_with_server {
        return clear(shared, &record.id).await;
    }
    let owner = match record.phase {
        Phase::Creating | Phase::Deleting => return clear(shared, &record.id).await,
        Phase::Kept | Phase::Stopping => {
            remove_stray_layers(shared, &record);
            revive(shared, record).await
        }
        Phase::Starting => undo_start(shared, record).await,
    };
    Shared::add(shared, owner);
}

/// Ends the machine that nobody was told of. What its disk has of it stays, as after a fall.
async fn undo_start(shared: &Arc<Shared>, mut record: Record) -> Owner {
    let dir = shared.dir_of(&record.id);
    let undone = async {
        end_worker(shared, &dir).await?;
        shared.devices.release(&record.id).await.map_err(io::Error::other)?;
        record.phase = Phase::Kept;
        let written = shared.store.transact(|records| record.update(records));
        written.map_err(io::Error::other)
    };
    let outcome = undone.await;
    let owner = Owner::new(Arc::clone(shared), record);
    match outcome {
        Ok(()) => owner,
        Err(error) => owner.unknown(format!("Failed to undo a start: {error}"), None, None),
    }
}

async fn revive(shared: &Arc<Shared>, record: Record) -> Owner {
    let dir = shared.dir_of(&record.id);
    let has_ended = record.end.is_some();
    let (id, name, need) = (record.id.clone(), record.spec.name.as_str(), record.spec.need());
    let claim = (!has_ended).then(|| shared.resources.count_instance(&id, name, need));
    let address = record.address.filter(|_| record.spec.network.is_some());
    let owner = Owner::new(Arc::clone(shared), record);
    let Some(claim) = claim else {
        release(shared, &id).await;
        return owner;
    };
    let owner = owner.with_claim(claim);
    // Before anyone else is given one.
    let lease = address.map(|address| shared.network.hold(address));
    match shared.fleet.adopt(&dir).await {
        Ok(Some(worker)) => owner.with_worker(worker, lease, loan_of(shared, &id)),
        Ok(None) => {
            release(shared, &id).await;
            match journal::read(&dir) {
                Ok(events) => owner.ended_unseen(&events),
                Err(error) => {
                    owner.unknown(format!("Failed to read its events: {error}"), None, None)
                }
            }
        }
        Err(error) => {
            tracing::error!(%error, cause = %error.source, "An instance is in an unknown state");
            owner.unknown(format!("{error}: {}", error.source), lease, loan_of(shared, &id))
        }
    }
}

/// What is lent to the machine of `id`, which runs.
fn loan_of(shared: &Shared, id: &str) -> Option<Loan> {
    let loan = shared.devices.resume(id);
    loan.inspect_err(|error| tracing::error!(id, %error, "Loans cannot be read")).ok().flatten()
}

/// Gives back what was lent to the machine of `id`, which has ended.
async fn release(shared: &Shared, id: &str) {
    if let Err(error) = shared.devices.release(id).await {
        tracing::error!(id, %error, "A device is still lent");
    }
}

/// Ends what runs in the folder of `id`, removes it, and then the record if there is one.
async fn clear(shared: &Shared, id: &str) {
    let dir = shared.dir_of(id);
    let result = async {
        end_worker(shared, &dir).await?;
        shared.devices.release(id).await.map_err(io::Error::other)?;
        remove_folder(&dir)?;
        let removed = shared.store.transact(|records| Record::remove(id, records));
        removed.map_err(io::Error::other)
    };
    match result.await {
        Ok(()) => tracing::info!(id, "Removed an instance that was half made or half deleted"),
        Err(error) => tracing::error!(id, %error, "Failed to remove a half-made instance"),
    }
}

async fn end_worker(shared: &Shared, dir: &Path) -> io::Result<()> {
    if let Some(mut worker) = shared.fleet.find(dir).map_err(io::Error::other)? {
        worker.kill()?;
        worker.gone().await;
    }
    Ok(())
}
