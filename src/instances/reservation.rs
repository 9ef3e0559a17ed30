//! An instance that is not there yet: what is taken for it, and given up if it never comes to be.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use chrono::Utc;

use crate::devices::{self, ClaimError};
use crate::images::digest::Digest;
use crate::instances::record::{Phase, Record, ReserveError};
use crate::instances::restart::RestartStatus;
use crate::instances::spec::InstanceSpec;
use crate::instances::{CreateError, Shared, remove_folder};
use crate::resources::Claim;
use crate::timeline::Timeline;
use crate::volumes::{self, AttachError, Attachment};

/// A name taken and a folder made, for an instance that is not there yet: dropped, both are free
/// again, unless they were kept.
#[derive(Debug)]
pub(super) struct Reservation {
    shared: Arc<Shared>,
    pub(super) record: Record,
    pub(super) dir: PathBuf,
    /// What the host has promised; gone once it was kept.
    claim: Option<Claim>,
    is_kept: bool,
}

impl Reservation {
    /// # Errors
    ///
    /// [`CreateError`]; nothing is left.
    pub(super) fn make(
        shared: &Arc<Shared>,
        spec: InstanceSpec,
        digest: Digest,
        timeline: Timeline,
    ) -> Result<Self, CreateError> {
        let id = cuid2::create_id();
        let record = Record {
            id: id.clone(),
            spec,
            digest,
            created_at: Utc::now(),
            expires_at: None,
            address: None,
            phase: Phase::Creating,
            timeline,
            end: None,
            hold: None,
            restart: RestartStatus::default(),
            volume_change: None,
        };
        let (name, need) = (record.spec.name.as_str(), record.spec.need());
        let wanted = shared.devices.want(&record.spec.devices)?;
        let claim = Some(shared.resources.claim_instance(&id, name, need)?);
        let reserved = shared.store.intend(|records| {
            record.insert(records)?;
            for mount in &record.spec.volumes {
                let (mount_path, read_only) = (mount.path.clone(), mount.mode.is_read_only());
                let attachment = Attachment { instance_id: id.clone(), mount_path, read_only };
                volumes::attach(records, &mount.volume, &attachment)?;
            }
            Ok::<_, Refused>(devices::claim(records, &wanted, &id)?)
        });
        reserved.map_err(|error| match error {
            Refused::Records(source)
            | Refused::Attach(AttachError::Records(source))
            | Refused::Claim(ClaimError::Records(source)) => {
                CreateError::Reserve(ReserveError::from_sqlite(name, source))
            }
            Refused::Attach(error) => error.into(),
            Refused::Claim(error) => error.into(),
        })?;
        let dir = shared.dir_of(&id);
        let shared = Arc::clone(shared);
        let reservation = Self { shared, record, dir: dir.clone(), claim, is_kept: false };
        fs::create_dir(&dir).map_err(|source| CreateError::File { path: dir, source })?;
        Ok(reservation)
    }

    /// The instance is there.
    pub(super) fn keep(mut self) -> Claim {
        self.is_kept = true;
        self.claim.take().expect("a reservation has a claim until it is kept, which is once")
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        if let Err(error) = remove_folder(&self.dir) {
            tracing::error!(dir = %self.dir.display(), %error, "Failed to remove a folder");
        }
        let id = &self.record.id;
        if let Err(error) = self.shared.store.transact(|records| Record::remove(id, records)) {
            tracing::error!(%id, %error, "Failed to remove a record");
        }
    }
}

/// Why the records take no such instance.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum Refused {
    Attach(#[from] AttachError),
    Claim(#[from] ClaimError),
    Records(#[from] rusqlite::Error),
}
