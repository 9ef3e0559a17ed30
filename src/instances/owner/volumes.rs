//! Volumes given to an instance that has stopped, and taken from it.
//!
//! Who has a volume and what the instance is made of change in one transaction, so that neither is
//! ever known without the other.

use std::fs;
use std::io;
use std::sync::Arc;

use crate::instances::disks::layer_path;
use crate::instances::owner::Owner;
use crate::instances::spec::{VOLUME_DISKS_MAX, VolumeMode, VolumeMount};
use crate::instances::state::State;
use crate::instances::{Instance, VolumeError};
use crate::volumes::{self, Attachment};

impl Owner {
    /// Gives the instance a volume, known by its id.
    pub(super) fn attach_volume(
        &mut self,
        mount: VolumeMount,
    ) -> Result<Arc<Instance>, VolumeError> {
        self.check_stopped()?;
        let mut record = self.record.clone();
        let volumes = &mut record.spec.volumes;
        if volumes.iter().any(|other| other.path == mount.path) {
            return Err(VolumeError::PathTaken { path: mount.path });
        }
        let attachment = Attachment {
            instance_id: record.id.clone(),
            mount_path: mount.path.clone(),
            read_only: mount.mode.is_read_only(),
        };
        let volume = mount.volume.clone();
        volumes.push(mount);
        volumes.sort_by(|a, b| a.path.cmp(&b.path));
        if volumes.iter().map(|mount| mount.mode.disks()).sum::<usize>() > VOLUME_DISKS_MAX {
            return Err(VolumeError::TooMany);
        }
        self.shared.store.transact(|records| {
            volumes::attach(records, &volume, &attachment)?;
            Ok::<_, VolumeError>(record.update(records)?)
        })?;
        self.record = record;
        self.publish();
        Ok(self.instance())
    }

    /// Takes a volume from the instance, known by its id. What the instance wrote into a layer of
    /// its own above the volume goes.
    pub(super) fn detach_volume(&mut self, volume: &str) -> Result<Arc<Instance>, VolumeError> {
        self.check_stopped()?;
        let mut record = self.record.clone();
        let volumes = &mut record.spec.volumes;
        let Some(index) = volumes.iter().position(|mount| mount.volume == volume) else {
            return Err(VolumeError::NotAttached { volume: volume.to_owned() });
        };
        let mount = volumes.remove(index);
        self.shared.store.transact(|records| {
            volumes::detach(records, volume, &record.id)?;
            record.update(records)
        })?;
        self.record = record;
        self.publish();
        if let VolumeMode::Overlay { .. } = mount.mode {
            let path = layer_path(&self.shared.dir_of(&self.record.id), &mount);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    // It goes with the instance.
                    tracing::warn!(path = %path.display(), %error, "A layer could not be removed");
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(self.instance())
    }

    fn check_stopped(&self) -> Result<(), VolumeError> {
        if self.state == State::Stopped {
            Ok(())
        } else {
            Err(VolumeError::Refused { state: self.state })
        }
    }
}
