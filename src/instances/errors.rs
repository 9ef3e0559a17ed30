//! What can go wrong with instances, seen from outside: one type per thing a caller asks for.

use std::io;
use std::path::PathBuf;

use chrono::{DateTime, Utc};
use rusqlite::ErrorCode;

use crate::agent::AgentError;
use crate::devices::{ClaimError, GiveBackError, LendError, WantError};
use crate::disks::DiskError;
use crate::fleet::{SpawnError, worker};
use crate::images::{ImagesError, ReadyError, RequestError};
use crate::initramfs::ArchiveError;
use crate::instances::record::ReserveError;
use crate::instances::spec::{SPARE_SLOTS, VOLUME_DISKS_MAX};
use crate::instances::state::State;
use crate::network::NetworkError;
use crate::resources::Shortage;
use crate::volumes::{AttachError, FindError as VolumeFindError};

/// Why instances cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Their folder.
    #[error("Failed to use {path}", path = path.display())]
    Dir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Their records.
    #[error("Failed to read the records of instances")]
    Records(#[source] rusqlite::Error),
}

/// Why no instance is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// None has this id, name or beginning of an id.
    #[error("No such instance")]
    Missing,
    /// Several ids begin so.
    #[error("Several instances match")]
    Ambiguous,
}

/// Why an instance was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The image cannot be asked for.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The image was deleted while it was waited for.
    #[error("Image {name} is not on this host")]
    ImageMissing {
        /// Which.
        name: String,
    },
    /// The image is on its way.
    #[error("Image {name} is being pulled: try again shortly")]
    ImageNotReady {
        /// Which.
        name: String,
    },
    /// The image cannot be had.
    #[error("Image {name} failed: {why}")]
    ImageFailed {
        /// Which.
        name: String,
        /// The chain of causes.
        why: String,
    },
    /// The images of this host cannot be used.
    #[error(transparent)]
    Images(ImagesError),
    /// The machine.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host has too little.
    #[error(transparent)]
    Shortage(#[from] Shortage),
    /// A volume that it names.
    #[error(transparent)]
    Volume(#[from] VolumeFindError),
    /// A volume that it does not get.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Devices that it cannot have.
    #[error(transparent)]
    Want(#[from] WantError),
    /// A device that it does not get.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The record.
    #[error(transparent)]
    Reserve(ReserveError),
    /// The instance's folder.
    #[error("Failed to use {path}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A writable layer cannot have the size asked for.
    #[error("Value of overlay_size cannot be had")]
    OverlaySize(#[source] DiskError),
    /// The host has no room for the writable layer.
    #[error(transparent)]
    NoSpace(DiskError),
    /// The writable layer.
    #[error(transparent)]
    Disk(DiskError),
}

impl From<DiskError> for CreateError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::Size { .. } => Self::OverlaySize(error),
            DiskError::NoSpace { .. } => Self::NoSpace(error),
            _ => Self::Disk(error),
        }
    }
}

/// Why a machine was not started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither image nor request say what to run.
    #[error("The image has neither entrypoint nor cmd: give one")]
    NothingToRun,
    /// Environment and arguments are more than a guest takes.
    #[error("The environment, entrypoint and cmd are too large")]
    TooMuchText(#[source] ArchiveError),
    /// The agent's program.
    #[error("Failed to use {path}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server closes before its turn: the next one can be asked.
    #[error("The server is closing")]
    Closing,
    /// The kernel's headers.
    #[error("Failed to use {path}, which skip_kernel_headers does without", path = path.display())]
    Headers {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The initramfs.
    #[error(transparent)]
    Initramfs(ArchiveError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Devices of the host.
    #[error(transparent)]
    Devices(#[from] LendError),
    /// The worker.
    #[error(transparent)]
    Worker(#[from] SpawnError),
}

impl From<ArchiveError> for BootError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::ConfigLength { .. } => Self::TooMuchText(error),
            ArchiveError::FileLength { .. }
            | ArchiveError::ConfigEncode(_)
            | ArchiveError::Memory { .. } => Self::Initramfs(error),
        }
    }
}

/// Why the owner of an instance did not take an order.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// The server closes: the next one can be asked.
    #[error("The server is closing")]
    Closing,
}

/// What a record could not be changed for.
#[derive(Debug, thiserror::Error)]
#[error("Failed to change the record of instance {id}")]
pub struct RecordError {
    /// Which instance.
    pub id: String,
    /// Why.
    #[source]
    pub source: rusqlite::Error,
}

impl RecordError {
    /// Whether there is no room for the change.
    pub(super) fn lacks_room(&self) -> bool {
        self.source.sqlite_error_code() == Some(ErrorCode::DiskFull)
    }
}

/// Why a machine was not ended.
#[derive(Debug, thiserror::Error)]
pub enum EndError {
    /// The worker outlived its kill.
    #[error("Worker process {pid} could not be killed")]
    Stuck {
        /// Its process id.
        pid: u32,
    },
    /// Whether there is a worker is not known.
    #[error("Failed to find out whether instance {id} still runs")]
    Worker {
        /// Which instance.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why an instance was not stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// It was not asked.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// Not in this state.
    #[error("Instance is {state}: only Running and Initializing ones can be stopped")]
    Refused {
        /// The state.
        state: State,
    },
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The machine.
    #[error(transparent)]
    End(#[from] EndError),
}

/// Why an instance was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It was not asked.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// Not in this state.
    #[error("Instance is {state}: only Stopped ones can be started")]
    Refused {
        /// The state.
        state: State,
    },
    /// Part of it may be gone.
    #[error("Instance is half deleted: delete it once more")]
    HalfDeleted,
    /// Its root disk.
    #[error("The image of the instance cannot be had")]
    Image(#[source] ReadyError),
    /// The host has too little.
    #[error(transparent)]
    Shortage(#[from] Shortage),
    /// Its writable layer, or a volume.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The machine.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Why an instance has the volumes that it had.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// It was not asked.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// Not in this state.
    #[error(
        "Instance is {state}: volumes are attached to and detached from Running and Stopped ones"
    )]
    Refused {
        /// The state.
        state: State,
    },
    /// Another volume is there.
    #[error("Another volume is mounted at {path:?}")]
    PathTaken {
        /// Where.
        path: String,
    },
    /// A machine has no slot for it.
    #[error("The volumes of an instance take at most {VOLUME_DISKS_MAX} disks")]
    TooMany,
    /// This machine has none left.
    #[error(
        "The machine has no slot left for a disk, having begun with at most {SPARE_SLOTS} to \
         spare: detach another volume, or stop the instance first"
    )]
    NoSlot,
    /// Nobody in the guest could mount it.
    #[error(
        "The guest goes without its agent, which would have to mount or unmount the volume: stop \
         the instance first"
    )]
    NoAgent,
    /// The guest was started by an older server.
    #[error("The agent in the guest is too old for this: stop the instance first")]
    OldAgent,
    /// What is below the path would not be seen any more.
    #[error("A volume is mounted below {path:?}, which would hide it: stop the instance first")]
    Hides {
        /// Where.
        path: String,
    },
    /// The guest has the volume as before.
    #[error("The volume is in use in the guest: {message}")]
    InUse {
        /// By what and what to do, as the agent says.
        message: String,
    },
    /// The guest does not have the volume any more, nor has it let go of it.
    #[error("The volume leaves as soon as the guest lets it: {message}")]
    Held {
        /// Why, as the agent says.
        message: String,
    },
    /// The guest has the volumes that it had.
    #[error("The guest refused: {message}")]
    Guest {
        /// Why, as the agent says.
        message: String,
    },
    /// Its agent did not answer. It is asked again until it does, or ends.
    #[error("The guest did not say whether it has the volume: its agent was asked in vain")]
    Silent(#[source] AgentError),
    /// Its worker.
    #[error("The machine did not do as it was told")]
    Worker(#[from] worker::OrderError),
    /// The volume's disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The instance has no such volume.
    #[error("Volume {volume} is not attached to this instance")]
    NotAttached {
        /// Which.
        volume: String,
    },
    /// Which volume?
    #[error(transparent)]
    Find(#[from] VolumeFindError),
    /// It does not get it.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The records.
    #[error("Failed to keep what volumes an instance has")]
    Records(#[from] rusqlite::Error),
}

/// Why an instance is looked after as before.
#[derive(Debug, thiserror::Error)]
pub enum UpkeepError {
    /// It was not asked.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// Its time is over: it is about to be deleted.
    #[error("Instance expired at {at}")]
    Expired {
        /// When.
        at: DateTime<Utc>,
    },
    /// Nobody in the guest can be asked.
    #[error("A health check by exec needs the guest agent, which this instance goes without")]
    NoAgent,
    /// Nobody in the guest can be reached.
    #[error("A health check by HTTP or TCP needs a network, which this instance goes without")]
    NoNetwork,
    /// The host has no such rate for it.
    #[error(transparent)]
    Shortage(#[from] Shortage),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its worker was not told; all of it is written down.
    #[error("Failed to tell the machine, for which the change holds from its next start on")]
    Worker(#[source] worker::OrderError),
}

/// Why an instance was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Its devices.
    #[error(transparent)]
    Devices(#[from] GiveBackError),
    /// It was not asked.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The machine.
    #[error(transparent)]
    End(#[from] EndError),
    /// The files.
    #[error("Failed to remove {path}", path = path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
