//! The workload's root: the image below, a writable layer above, the kernel's file systems inside.
//!
//! We start in the initramfs. The image (EROFS) and the writable layer (ext4, or a tmpfs if there
//! is no disk for one) are mounted there, an overlay of both beside them; then the overlay is moved
//! over `/` and we enter it. `pivot_root` is no choice: the kernel refuses it for the initramfs,
//! which is the one mount that can neither be moved nor unmounted. `switch_root` programs do the
//! same as we do, and delete the files of the initramfs first; ours are this program and 1 KiB.
//!
//! Image files are not touched: what the image lacks, a mount point for instance, is made.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::{io, mem};

use ovum_agent_proto::config::GuestConfig;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, MountFlags};
use rustix::{fs, mount, process};

use crate::volumes::{VolumeError, Volumes};
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
const OVERLAY: Mount<'static> = Mount {
    source: "overlay",
    kind: "overlay",
    target: MERGED,
    flags: MountFlags::NOATIME,
    options: c"lowerdir=/image,upperdir=/layer/changes,workdir=/layer/scratch,\
               metacopy=on,redirect_dir=on",
    place: Place::New,
};

/// Neither initialise inode tables nor read ahead block bitmaps: both are work in the background of
/// a boot, the first for blocks that a sparse file reads as zeroes anyway.
const LAYER_OPTIONS: &CStr = c"noinit_itable,no_prefetch_block_bitmaps";

/// The devices, in the initramfs and in the root.
const DEVICES: Mount<'static> = kernel("devtmpfs", "/dev", NO_SUID, c"", Place::Usual);

/// Without these nothing works. Nothing is mounted on /run and /tmp: images bring directories there
/// that their programs count on.
const NEEDED: [Mount<'static>; 3] = [
    DEVICES,
    kernel("proc", "/proc", SAFE, c"", Place::Usual),
    kernel("sysfs", "/sys", SAFE, c"", Place::Usual),
];

/// These are missed by few. systemd mounts them itself, with options of its own.
const USEFUL: [Mount<'static>; 4] = [
    kernel("cgroup2", "/sys/fs/cgroup", SAFE, c"", Place::Usual),
    kernel("devpts", "/dev/pts", NO_EXEC, c"gid=5,mode=620,ptmxmode=666", Place::New),
    kernel("tmpfs", "/dev/shm", NO_DEV, c"mode=1777", Place::New),
    kernel("mqueue", "/dev/mqueue", SAFE, c"", Place::New),
];

const NO_SUID: MountFlags = MountFlags::NOSUID;
const NO_DEV: MountFlags = NO_SUID.union(MountFlags::NODEV);
const NO_EXEC: MountFlags = NO_SUID.union(MountFlags::NOEXEC);
const SAFE: MountFlags = NO_DEV.union(MountFlags::NOEXEC);

/// Anyone may make files, and delete their own.
const EVERYONES: Mode = Mode::from_raw_mode(0o1777);

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
    /// Dropped behind the root, whose drop writes everything back.
    volumes: Volumes,
}

/// Something to mount.
struct Mount<'a> {
    source: &'a str,
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static CStr,
    place: Place,
}

/// What is known about a mount point.
enum Place {
    /// It is not there before we make it.
    New,
    /// The image or the kernel mostly has it; if not, it is made.
    Usual,
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
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("Failed to prepare {path}")]
    Prepare {
        path: &'static str,
        #[source]
        source: io::Error,
    },
}

impl Root {
    /// Mounts image, layer and volumes, enters the root and mounts in it what nobody can do
    /// without. Needs /dev of the initramfs.
    pub(crate) fn enter(config: &GuestConfig) -> Result<Self, RootError> {
        Mount {
            source: &config.root_device,
            kind: "erofs",
            target: IMAGE,
            flags: MountFlags::RDONLY | MountFlags::NOATIME,
            options: c"",
            place: Place::New,
        }
        .attach()?;
        let (source, kind, options) = match &config.overlay_device {
            Some(device) => (device.as_str(), "ext4", LAYER_OPTIONS),
            None => ("tmpfs", "tmpfs", c"mode=755"),
        };
        let (flags, place) = (MountFlags::NOATIME, Place::New);
        Mount { source, kind, target: LAYER, flags, options, place }.attach()?;
        for path in [CHANGES, SCRATCH] {
            directory(path).map_err(prepare(path))?;
        }
        OVERLAY.attach()?;
        let layer = fs::open(LAYER, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(prepare(LAYER))?;
        let volumes = Volumes::mount(&config.volumes)?;

        process::chdir(MERGED).map_err(prepare(MERGED))?;
        mount::mount_move(".", "/").map_err(prepare("/"))?;
        process::chroot(".").map_err(prepare("/"))?;
        let mut root = Self { layer, volumes };

        NEEDED.iter().try_for_each(Mount::attach)?;
        for (points_to, path) in LINKS {
            fs::symlink(points_to, path).map_err(prepare(path))?;
        }
        directory("/run").map_err(prepare("/run"))?;
        if fs::mkdirat(CWD, "/tmp", EVERYONES).is_ok() {
            // Once more, since the first was subject to the umask.
            fs::chmodat(CWD, "/tmp", EVERYONES, AtFlags::empty()).map_err(prepare("/tmp"))?;
        }
        root.volumes.settle()?;
        Ok(root)
    }
}

impl Root {
    /// The volumes in it.
    pub(crate) fn volumes(&mut self) -> &mut Volumes {
        &mut self.volumes
    }

    /// Leaves the root as it is: someone else ends this guest.
    pub(crate) fn leave(self) {
        mem::forget(self);
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

/// Mounts what else programs expect, unless an init system does that.
pub(crate) fn furnish() {
    for error in USEFUL.iter().filter_map(|mount| mount.attach().err()) {
        console::say(format_args!("{}", chain(&error)));
    }
}

/// Mounts the devices in the initramfs, where image and layer are found.
pub(crate) fn devices() -> Result<(), RootError> {
    DEVICES.attach()
}

/// Makes a directory unless it is there.
pub(crate) fn directory(path: &str) -> Result<(), Errno> {
    match fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

impl Mount<'_> {
    /// Mounts. A usual mount point is made only if it turns out to be missing.
    fn attach(&self) -> Result<(), RootError> {
        let attempt =
            || mount::mount(self.source, self.target, self.kind, self.flags, self.options);
        let with_place = || directory(self.target).and_then(|()| attempt());
        let outcome = match self.place {
            Place::New => with_place(),
            Place::Usual => match attempt() {
                Err(Errno::NOENT) => with_place(),
                outcome => outcome,
            },
        };
        outcome.map_err(|errno| RootError::Mount {
            kind: self.kind,
            source_name: self.source.to_owned(),
            target: self.target,
            source: errno.into(),
        })
    }
}

const fn kernel(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static CStr,
    place: Place,
) -> Mount<'static> {
    Mount { source: kind, kind, target, flags, options, place }
}

fn prepare(path: &'static str) -> impl Fn(Errno) -> RootError {
    move |errno| RootError::Prepare { path, source: errno.into() }
}
