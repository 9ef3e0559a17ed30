//! The workload's root: the image below, a writable layer above, the kernel's file systems inside.
//!
//! We start in the initramfs. The image (EROFS) and the writable layer (ext4, or a tmpfs if there
//! is no disk for one) are mounted there, an overlay of both beside them; then the overlay is moved
//! over `/` and we enter it. `pivot_root` is no choice: the kernel refuses it for the initramfs,
//! which is the one mount that can neither be moved nor unmounted. `switch_root` programs do the
//! same as we do, and delete the files of the initramfs first; ours are this program and 1 KiB.
//!
//! Image files are not touched: what the image lacks, a mount point for instance, is made.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;

use ovum_agent_proto::config::GuestConfig;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, MountFlags};
use rustix::{fs, mount, process};

use crate::{chain, console};

/// Where things are in the initramfs.
const IMAGE: &str = "/image";
const LAYER: &str = "/layer";
const MERGED: &str = "/merged";

/// Directories on the writable layer: what was changed, and the overlay's scratch space.
const CHANGES: &str = "/layer/changes";
const SCRATCH: &str = "/layer/scratch";

/// `metacopy` lets a `chown -R` at start copy no data, `redirect_dir` lets directories of the image
/// be renamed. Both are safe as long as nothing but this overlay writes to the layer.
const OVERLAY: &str =
    "lowerdir=/image,upperdir=/layer/changes,workdir=/layer/scratch,metacopy=on,redirect_dir=on";

/// The lazy initialisation of an ext4 is work in the background of every first boot, for blocks
/// that a sparse file reads as zeroes anyway.
const LAYER_OPTIONS: &str = "noinit_itable";

/// A file system of the kernel's, with its place in the root.
struct Kernel {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static str,
    /// Without it nothing works; the others are missed by few.
    required: bool,
}

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Nothing lies on /run and /tmp: images bring directories there that their programs count on.
#[rustfmt::skip]
const KERNEL: [Kernel; 7] = [
    Kernel { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, options: "", required: true },
    Kernel { kind: "proc", target: "/proc", flags: SAFE, options: "", required: true },
    Kernel { kind: "sysfs", target: "/sys", flags: SAFE, options: "", required: true },
    Kernel { kind: "cgroup2", target: "/sys/fs/cgroup", flags: SAFE, options: "", required: false },
    Kernel {
        kind: "devpts", target: "/dev/pts", flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: "gid=5,mode=620,ptmxmode=666", required: false,
    },
    Kernel {
        kind: "tmpfs", target: "/dev/shm", flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        options: "mode=1777", required: false,
    },
    Kernel { kind: "mqueue", target: "/dev/mqueue", flags: SAFE, options: "", required: false },
];

/// Names that programs expect in /dev and that the kernel leaves to user space.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// The root, entered. Dropping it writes everything back and leaves the layer's disk clean.
#[derive(Debug)]
pub(crate) struct Root {
    /// The writable layer's file system, which has no path any more.
    layer: OwnedFd,
}

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    #[error("Failed to mount {source_name} ({kind}) on {target}")]
    Mount {
        kind: &'static str,
        source_name: String,
        target: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("Failed to prepare {path}")]
    Prepare {
        path: &'static str,
        #[source]
        source: io::Error,
    },
}

impl Root {
    /// Mounts image and layer, enters the root and furnishes it. Needs /dev of the initramfs.
    pub(crate) fn enter(config: &GuestConfig) -> Result<Self, RootError> {
        let read_only = MountFlags::RDONLY | MountFlags::NOATIME;
        attach(&config.root_device, IMAGE, "erofs", read_only, "")?;
        match &config.overlay_device {
            Some(device) => attach(device, LAYER, "ext4", MountFlags::NOATIME, LAYER_OPTIONS)?,
            None => attach("tmpfs", LAYER, "tmpfs", MountFlags::NOATIME, "mode=755")?,
        }
        for path in [CHANGES, SCRATCH] {
            directory(path).map_err(prepare(path))?;
        }
        attach("overlay", MERGED, "overlay", MountFlags::NOATIME, OVERLAY)?;
        let layer = fs::open(LAYER, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(prepare(LAYER))?;

        process::chdir(MERGED).map_err(prepare(MERGED))?;
        mount::mount_move(".", "/").map_err(prepare("/"))?;
        process::chroot(".").map_err(prepare("/"))?;
        let root = Self { layer };

        for Kernel { kind, target, flags, options, required } in KERNEL {
            match attach(kind, target, kind, flags, options) {
                Err(error) if required => return Err(error),
                Err(error) => console::say(format_args!("{}", chain(&error))),
                Ok(()) => {}
            }
        }
        for (points_to, path) in LINKS {
            fs::symlink(points_to, path).map_err(prepare(path))?;
        }
        Ok(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        fs::sync();
        // Through the layer's own descriptor: the overlay above keeps the disk mounted, yet has
        // nothing open for writing any more, so the kernel lets it become read-only and marks it
        // clean. Refused if a process survived; the journal then does it at the next mount.
        let clean =
            mount::fspick(&self.layer, "", FsPickFlags::FSPICK_EMPTY_PATH).and_then(|picked| {
                mount::fsconfig_set_flag(&picked, "ro")?;
                mount::fsconfig_reconfigure(&picked)
            });
        if let Err(errno) = clean {
            console::say(format_args!("writable layer is left to its journal: {errno}"));
        }
    }
}

/// Mounts the devices in the initramfs, where image and layer are found.
pub(crate) fn devices() -> Result<(), RootError> {
    attach("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "")
}

/// Makes a directory unless it is there.
pub(crate) fn directory(path: &str) -> Result<(), Errno> {
    match fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

/// Mounts, and makes the mount point only if it turns out to be missing: it rarely is.
fn attach(
    source_name: &str,
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    options: &str,
) -> Result<(), RootError> {
    let options = CString::new(options).unwrap_or_default();
    let attempt = || mount::mount(source_name, target, kind, flags, options.as_c_str());
    let mut outcome = attempt();
    if outcome == Err(Errno::NOENT) {
        outcome = directory(target).and_then(|()| attempt());
    }
    outcome.map_err(|errno| RootError::Mount {
        kind,
        source_name: source_name.to_owned(),
        target,
        source: errno.into(),
    })
}

fn prepare(path: &'static str) -> impl Fn(Errno) -> RootError {
    move |errno| RootError::Prepare { path, source: errno.into() }
}
