//! Volumes given to an instance, and taken from it.
//!
//! Who has a volume and what the instance is made of change in one transaction, so that neither is
//! ever known without the other. For one that has stopped this is all. For one that runs the record
//! says first that a change is under way:
//!
//! ```text
//! attach: record `Attaching` ──> disk in the machine ──> mounted ──> record, without the change
//! detach: record `Detaching` ──> unmounted ──> disk out of the machine ──> record, without it
//! ```
//!
//! A layer above the volume, and its disk, go with it: nobody could find there what was written
//! without what it was written over.
//!
//! Whoever finds such a change (this server after a failure, the next one after a death) takes the
//! volume away, which can be done at any point of either: the instance does not have it then,
//! unless the guest uses it and so has it. A guest that ends meanwhile has finished nothing: what
//! was being attached is not, what was being detached still is.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{self, Instant};

use crate::agent::{AgentError, AttachSpec, DetachSpec, ErrorCode};
use crate::control::{DiskSpec, Order, Reply};
use crate::fleet::files;
use crate::fleet::worker::OrderError;
use crate::instances::disks::{layer_serial, remove_stray_layers, volume, volume_serial};
use crate::instances::owner::Owner;
use crate::instances::record::{Record, VolumeChange};
use crate::instances::spec::{VOLUME_DISKS_MAX, VolumeMount};
use crate::instances::state::State;
use crate::instances::{Instance, VolumeError};
use crate::volumes::{self, Attachment};

/// How long a guest may take to write back what it has of a volume, and to let go of it.
const DETACH_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take if no client waits for it, but whoever comes next. It is asked again.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);

impl Owner {
    /// Gives the instance a volume, known by its id.
    pub(super) async fn attach_volume(
        &mut self,
        mount: VolumeMount,
    ) -> Result<Arc<Instance>, VolumeError> {
        let runs = self.check_changeable()?;
        self.settle_volume_change(DETACH_TIMEOUT).await?;
        let mut record = self.record.clone();
        add(&mut record, &mount)?;
        let attachment = Attachment {
            instance_id: record.id.clone(),
            mount_path: mount.path.clone(),
            read_only: mount.mode.is_read_only(),
        };
        if runs {
            self.check_room(&mount).await?;
            let change = Some(VolumeChange::Attaching(mount.clone()));
            record = Record { volume_change: change, ..self.record.clone() };
        }
        self.shared.store.transact(|records| {
            volumes::attach(records, &mount.volume, &attachment)?;
            Ok::<_, VolumeError>(record.update(records)?)
        })?;
        self.record = record;
        if runs {
            if let Err(error) = self.bring(&mount).await {
                // One that is silent is asked later.
                if !matches!(error, VolumeError::Silent(_)) {
                    self.finish_volume_change().await;
                }
                return Err(error);
            }
            self.end_change(true)?;
            self.diary.note(&format!("volume {} came to {}", mount.volume, mount.path));
        }
        self.publish();
        Ok(self.instance())
    }

    /// Takes a volume from the instance, known by its id. What the instance wrote into a layer of
    /// its own above the volume goes.
    pub(super) async fn detach_volume(
        &mut self,
        volume: &str,
    ) -> Result<Arc<Instance>, VolumeError> {
        let runs = self.check_changeable()?;
        self.settle_volume_change(DETACH_TIMEOUT).await?;
        let mut found = self.record.spec.volumes.iter();
        let Some(mount) = found.find(|mount| mount.volume == volume).cloned() else {
            return Err(VolumeError::NotAttached { volume: volume.to_owned() });
        };
        if runs {
            self.begin_detaching(&mount)?;
            match self.take_away(&mount, DETACH_TIMEOUT).await {
                Ok(()) => {}
                Err(error) if error.leaves_it_there() => {
                    self.end_change(true)?;
                    return Err(error);
                }
                // Whether it is still there is found out later.
                Err(error) => return Err(error),
            }
            self.diary.note(&format!("volume {volume} left {}", mount.path));
        } else {
            self.record.volume_change = Some(VolumeChange::Detaching(mount.clone()));
        }
        self.end_change(false)?;
        Ok(self.instance())
    }

    /// Goes on with a change that an earlier server began, or that failed; if that fails, too, it
    /// is tried again in a while.
    pub(super) async fn finish_volume_change(&mut self) {
        if let Err(error) = self.settle_volume_change(SETTLE_TIMEOUT).await {
            tracing::warn!(id = self.record.id, %error, "A change of volumes is not settled yet");
            self.hush();
        }
    }

    /// The machine has ended, and with it what was being done in its guest.
    pub(super) fn end_volume_change(&mut self) {
        let Some(change) = &self.record.volume_change else { return };
        let has_it = matches!(change, VolumeChange::Detaching(_));
        if let Err(error) = self.end_change(has_it) {
            tracing::error!(id = self.record.id, %error, "A change of volumes is not settled yet");
        }
    }

    /// Finds out how a change that is under way has ended, which ends it.
    async fn settle_volume_change(&mut self, timeout: Duration) -> Result<(), VolumeError> {
        let Some(change) = self.record.volume_change.clone() else { return Ok(()) };
        if self.worker.is_none() {
            return self.end_change(matches!(change, VolumeChange::Detaching(_)));
        }
        match (self.take_away(change.mount(), timeout).await, &change) {
            (Ok(()), _) => self.end_change(false),
            (Err(VolumeError::InUse { .. }), _) => self.end_change(true),
            (Err(error), VolumeChange::Detaching(_)) if error.leaves_it_there() => {
                self.end_change(true)
            }
            (Err(error), VolumeChange::Attaching(mount)) if error.leaves_it_there() => {
                // A guest that cannot take it away was never asked to have it, or lies.
                self.withdraw(&volume_serial(mount)).await?;
                self.end_change(false)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// The change that is under way is over: the instance has the volume, or does not.
    fn end_change(&mut self, has_it: bool) -> Result<(), VolumeError> {
        let mut record = self.record.clone();
        let Some(change) = record.volume_change.take() else { return Ok(()) };
        let mount = change.mount();
        let volumes = &mut record.spec.volumes;
        volumes.retain(|other| other.volume != mount.volume);
        if has_it {
            volumes.push(mount.clone());
            volumes.sort_by(|a, b| a.path.cmp(&b.path));
        }
        self.shared.store.transact(|records| {
            if !has_it {
                volumes::detach(records, &mount.volume, &record.id)?;
            }
            record.update(records)
        })?;
        self.record = record;
        self.publish();
        remove_stray_layers(&self.shared, &self.record);
        Ok(())
    }

    fn begin_detaching(&mut self, mount: &VolumeMount) -> Result<(), VolumeError> {
        let change = Some(VolumeChange::Detaching(mount.clone()));
        let record = Record { volume_change: change, ..self.record.clone() };
        self.shared.store.intend(|records| record.update(records))?;
        self.record = record;
        Ok(())
    }

    /// Puts the volume's disk into the machine and has the guest mount it.
    async fn bring(&mut self, mount: &VolumeMount) -> Result<(), VolumeError> {
        let disk = volume(&self.shared, mount).await?;
        let (serial, read_only) = (disk.id, disk.read_only);
        let spec = DiskSpec { id: serial.clone(), read_only };
        let worker = self.worker.as_mut().ok_or(OrderError::Gone)?;
        worker.order_with(&Order::AttachDisk { disk: spec }, &[disk.file.as_fd()]).await?;
        let spec = AttachSpec { serial, path: mount.path.clone(), read_only };
        self.shared.agents.attach(&self.socket(), spec).await.map_err(VolumeError::of_agent)
    }

    /// Has the guest unmount the volume, and takes its disk out of the machine, then its layer's.
    async fn take_away(
        &mut self,
        mount: &VolumeMount,
        timeout: Duration,
    ) -> Result<(), VolumeError> {
        let deadline = Instant::now() + timeout;
        let silent = |_elapsed| AgentError::Silent { after: timeout };
        let ask = async |owner: &Self, serial: String| {
            let socket = owner.socket();
            let answer = owner.shared.agents.detach(&socket, DetachSpec { serial });
            let answer = time::timeout_at(deadline, answer).await;
            answer.map_err(silent).flatten().map_err(VolumeError::of_agent)
        };
        let serial = volume_serial(mount);
        ask(self, serial.clone()).await?;
        self.withdraw(&serial).await?;
        let Some(layer) = layer_serial(mount) else { return Ok(()) };
        match ask(self, layer.clone()).await {
            Ok(()) => self.withdraw(&layer).await,
            // The volume is gone, so this is not as before.
            Err(VolumeError::InUse { message } | VolumeError::Guest { message }) => {
                Err(VolumeError::Held { message })
            }
            Err(error) => Err(error),
        }
    }

    async fn withdraw(&mut self, serial: &str) -> Result<(), VolumeError> {
        let worker = self.worker.as_mut().ok_or(OrderError::Gone)?;
        worker.order(&Order::DetachDisk { id: serial.to_owned() }).await?;
        Ok(())
    }

    /// Whether it runs, as opposed to having stopped.
    fn check_changeable(&self) -> Result<bool, VolumeError> {
        match self.state {
            State::Stopped => Ok(false),
            State::Running if self.record.spec.agent => Ok(true),
            State::Running => Err(VolumeError::NoAgent),
            state => Err(VolumeError::Refused { state }),
        }
    }

    /// Whether the guest that runs can have `mount`.
    async fn check_room(&mut self, mount: &VolumeMount) -> Result<(), VolumeError> {
        let below = format!("{}/", mount.path);
        if self.record.spec.volumes.iter().any(|other| other.path.starts_with(&below)) {
            return Err(VolumeError::Hides { path: mount.path.clone() });
        }
        let worker = self.worker.as_mut().ok_or(OrderError::Gone)?;
        match worker.order(&Order::Status).await? {
            Reply::Done(status) if status.vacant_slots > 0 => Ok(()),
            _ => Err(VolumeError::NoSlot),
        }
    }

    fn socket(&self) -> PathBuf {
        self.shared.dir_of(&self.record.id).join(files::VSOCK)
    }
}

/// Adds `mount` to the volumes of `record`, if there can be one more like it.
fn add(record: &mut Record, mount: &VolumeMount) -> Result<(), VolumeError> {
    let volumes = &mut record.spec.volumes;
    if volumes.iter().any(|other| other.path == mount.path) {
        return Err(VolumeError::PathTaken { path: mount.path.clone() });
    }
    volumes.push(mount.clone());
    volumes.sort_by(|a, b| a.path.cmp(&b.path));
    if volumes.iter().map(|mount| mount.mode.disks()).sum::<usize>() > VOLUME_DISKS_MAX {
        return Err(VolumeError::TooMany);
    }
    Ok(())
}

impl VolumeError {
    fn of_agent(error: AgentError) -> Self {
        match error {
            AgentError::Refused { code: ErrorCode::Unsupported, .. } => Self::OldAgent,
            AgentError::Refused { code: ErrorCode::InUse, message } => Self::InUse { message },
            AgentError::Refused { code: ErrorCode::Held, message } => Self::Held { message },
            AgentError::Refused { message, .. } => Self::Guest { message },
            error => Self::Silent(error),
        }
    }

    /// Whether a guest that was asked to let go of a volume has it as before.
    fn leaves_it_there(&self) -> bool {
        matches!(self, Self::OldAgent | Self::InUse { .. } | Self::Guest { .. })
    }
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;
    use crate::images::digest::Digest;
    use crate::instances::record::Phase;
    use crate::instances::restart::RestartStatus;
    use crate::instances::spec::{InstanceSpec, VolumeMode};
    use crate::timeline::Timeline;

    fn mount(volume: &str, path: &str, mode: VolumeMode) -> VolumeMount {
        VolumeMount { volume: volume.to_owned(), path: path.to_owned(), mode }
    }

    fn record(volumes: Vec<VolumeMount>) -> Record {
        Record {
            id: "sample".to_owned(),
            spec: InstanceSpec { volumes, ..InstanceSpec::sample() },
            digest: Digest::of(b""),
            created_at: Utc::now(),
            expires_at: None,
            address: None,
            phase: Phase::Kept,
            timeline: Timeline::begin(),
            end: None,
            hold: None,
            restart: RestartStatus::default(),
            volume_change: None,
        }
    }

    #[test]
    fn volumes_stay_in_order_and_within_what_a_machine_has() {
        let layer = VolumeMode::Overlay { size_bytes: 1 << 30 };
        let layered: Vec<_> = (0..4).map(|n| mount("l", &format!("/l{n}"), layer)).collect();
        let mut record = record(layered);

        add(&mut record, &mount("v", "/b", VolumeMode::ReadWrite)).unwrap();
        let taken = add(&mut record.clone(), &mount("w", "/b", VolumeMode::ReadOnly));
        add(&mut record, &mount("w", "/a", VolumeMode::ReadOnly)).unwrap();
        let full = add(&mut record.clone(), &mount("x", "/x", VolumeMode::ReadOnly));

        assert!(matches!(taken, Err(VolumeError::PathTaken { path }) if path == "/b"));
        assert!(matches!(full, Err(VolumeError::TooMany)), "ten disks");
        let paths: Vec<_> = record.spec.volumes.iter().map(|mount| mount.path.as_str()).collect();
        assert_eq!(paths, ["/a", "/b", "/l0", "/l1", "/l2", "/l3"]);
    }

    /// A server that finds the record of another knows what was under way.
    #[test]
    fn a_change_under_way_is_kept_and_a_record_without_one_is_read() {
        let detaching = VolumeChange::Detaching(mount("v", "/a", VolumeMode::ReadOnly));
        let changed = Record { volume_change: Some(detaching), ..record(Vec::new()) };

        let mut json = serde_json::to_value(&changed).unwrap();

        assert_eq!(serde_json::from_value::<Record>(json.clone()).unwrap(), changed);
        json.as_object_mut().unwrap().remove("volume_change");
        assert_eq!(serde_json::from_value::<Record>(json).unwrap().volume_change, None);
    }

    /// What an agent says leaves the volume where it was, but for one word; silence says nothing.
    #[test]
    fn an_agent_that_says_no_has_changed_nothing() {
        let refused =
            |code| VolumeError::of_agent(AgentError::Refused { code, message: "no".to_owned() });
        for code in ErrorCode::ALL {
            assert_eq!(refused(code).leaves_it_there(), code != ErrorCode::Held, "{code:?}");
        }
        assert!(matches!(refused(ErrorCode::Unsupported), VolumeError::OldAgent));
        assert!(matches!(refused(ErrorCode::InUse), VolumeError::InUse { .. }));
        for error in [AgentError::Closed, AgentError::NotListening, AgentError::GuestEnded] {
            assert!(!VolumeError::of_agent(error).leaves_it_there());
        }
    }
}
