//! Disks that come and go while the machine runs.
//!
//! ```text
//! attach: device ──> kick, interrupt ──> device thread ──> registers: the guest can find it
//! detach: registers go ──> requests in flight end ──> kick, interrupt ──> file closed
//! ```
//!
//! The guest is told of neither: it has to be asked to look for a disk, and to let go of one
//! before. One that was not finds that a device it uses has become a placeholder, and harms itself.

use std::fs::File;

use super::place::{clear, place};
use super::{Machine, Phase};
use crate::machine_error::{AttachError, BuildError, Ended};
use crate::spec::DiskSpec;
use crate::virtio::blk::Blk;

impl Machine {
    /// Puts a disk over `file` into the first vacant slot, under the limit that all disks share.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; nothing has changed.
    pub fn attach_disk(&mut self, spec: &DiskSpec, file: File) -> Result<(), AttachError> {
        if let Phase::Stopped = self.phase {
            return Err(Ended.into());
        }
        if self.disks.iter().any(|(_, id)| *id == spec.id) {
            return Err(AttachError::IdTaken { id: spec.id.clone() });
        }
        let slot = self.platform.slots.first_vacant().ok_or(AttachError::NoSlot)?;
        let disk = Blk::new(file, spec, &self.handles.disk_limiter)
            .map_err(|source| BuildError::Disk { id: spec.id.clone(), source })?;
        let shown = self.platform.slots.shown();
        let (task, registers) =
            place(&self.vm, &self.mem, slot, Box::new(disk), &self.orders, shown)?;
        match self.orders.put(slot, Box::new(task)) {
            Some(Ok(())) => {}
            Some(Err(refused)) => {
                clear(&self.vm, slot, &refused.task);
                registers.vanish();
                return Err(BuildError::Thread(refused.source).into());
            }
            None => return Err(Ended.into()),
        }
        self.platform.slots.fill(slot, registers);
        self.disks.push((slot, spec.id.clone()));
        Ok(())
    }

    /// Takes the disk `id` away: what the guest had asked of it is done, and its file closed. Its
    /// slot is vacant then. False if there is no such disk.
    ///
    /// # Errors
    ///
    /// [`Ended`] if a thread of the machine is no more.
    pub fn detach_disk(&mut self, id: &str) -> Result<bool, Ended> {
        let Some(index) = self.disks.iter().position(|(_, other)| other == id) else {
            return Ok(false);
        };
        let (slot, _) = self.disks.swap_remove(index);
        self.platform.slots.vacate(slot);
        let task = self.orders.take(slot).ok_or(Ended)?;
        if let Some(task) = task {
            clear(&self.vm, slot, &task);
        }
        Ok(true)
    }

    /// How many disks can be attached.
    pub fn vacant_slots(&self) -> usize {
        self.platform.slots.vacant()
    }
}
