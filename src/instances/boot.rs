//! What a machine is started from, first or once more: root disk and initramfs.
//!
//! Everything that the request can be wrong about is found out by [`Boot::prepare`], before there
//! is anything to undo.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::fleet::{NewWorker, WorkerDisk, WorkerSpec};
use crate::images::RootDisk;
use crate::initramfs::Archive;
use crate::instances::errors::BootError;
use crate::instances::spec::InstanceSpec;
use crate::instances::{Shared, guest};

/// A boot that is ready but for the writable layer.
#[derive(Debug)]
pub(super) struct Boot {
    image: RootDisk,
    initramfs: Vec<File>,
}

impl Boot {
    /// For a guest of `spec` on `image`.
    ///
    /// # Errors
    ///
    /// [`BootError`].
    pub(super) fn prepare(
        shared: &Shared,
        spec: &InstanceSpec,
        image: RootDisk,
    ) -> Result<Self, BootError> {
        let config = guest::config(spec, &image.config).ok_or(BootError::NothingToRun)?;
        let config = rewound(&Archive::config(&config)?.to_file()?)?;
        let base = base_archive(shared)?;
        Ok(Self { image, initramfs: vec![base, config] })
    }

    /// Starts the machine in the folder `dir`.
    ///
    /// # Errors
    ///
    /// [`BootError::Worker`]; no process is left.
    pub(super) async fn launch(
        self,
        shared: &Shared,
        spec: &InstanceSpec,
        dir: &Path,
        overlay: BorrowedFd<'_>,
    ) -> Result<NewWorker, BootError> {
        let worker = WorkerSpec {
            dir,
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            hotplug_bytes: spec.hotplug_bytes,
            initramfs: self.initramfs,
            disks: vec![
                WorkerDisk { id: "root", read_only: true, file: self.image.file.as_fd() },
                WorkerDisk { id: "overlay", read_only: false, file: overlay },
            ],
            disk_io_bps: spec.disk_io_bps,
            vsock: spec.agent,
            ends_with_us: spec.ends_with_server,
        };
        Ok(shared.fleet.spawn(worker).await?)
    }
}

/// The initramfs with the agent, the same for every guest of this server. Each worker gets a
/// description of its own, so that none moves another's place in the file.
fn base_archive(shared: &Shared) -> Result<File, BootError> {
    let base = match shared.base.get() {
        Some(base) => base,
        None => {
            let path = &shared.agent;
            let agent =
                fs::read(path).map_err(|source| BootError::File { path: path.clone(), source })?;
            let base = Archive::base(&agent)?.to_file()?;
            shared.base.get_or_init(|| base)
        }
    };
    rewound(base)
}

/// The same file with a position of its own, at the beginning.
fn rewound(file: &File) -> Result<File, BootError> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    File::open(&path).map_err(|source| BootError::File { path, source })
}
