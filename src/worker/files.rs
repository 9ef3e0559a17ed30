//! The files that came with a launch message, each put where it belongs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use anyhow::{Context, bail};
use ovum_vmm::spec::MachineFiles;

use crate::control::FileRole;
use crate::os::packets::PacketListener;

/// What a worker works with.
#[derive(Debug)]
pub(super) struct Files {
    /// The machine's own.
    pub(super) machine: MachineFiles,
    /// The events file.
    pub(super) events: File,
    /// Where control connections arrive.
    pub(super) control: PacketListener,
    /// The process that the machine does not outlive, if there is one.
    pub(super) lifeline: Option<OwnedFd>,
}

impl Files {
    /// Gives each of `files` the role of the same place in `roles`.
    ///
    /// # Errors
    ///
    /// If their numbers differ, a role is missing, or one that there is only one of comes twice.
    pub(super) fn sort(roles: &[FileRole], files: Vec<OwnedFd>) -> anyhow::Result<Self> {
        if roles.len() != files.len() {
            bail!("The launch message names {} files and has {}", roles.len(), files.len());
        }
        let mut single = Singles::default();
        let (mut initramfs, mut disks, mut taps) = (Vec::new(), Vec::new(), Vec::new());
        for (&role, file) in roles.iter().zip(files) {
            match role {
                FileRole::Initramfs => initramfs.push(File::from(file)),
                FileRole::Disk => disks.push(File::from(file)),
                FileRole::Tap => taps.push(file),
                _ => single.put(role, file)?,
            }
        }
        let machine = MachineFiles {
            kvm: single.take(FileRole::Kvm)?,
            kernel: single.take(FileRole::Kernel)?.into(),
            kernel_text: single.take(FileRole::KernelText).ok().map(File::from),
            initramfs,
            disks,
            taps,
            console: single.take(FileRole::Console)?.into(),
            vsock: single.take(FileRole::Vsock).ok().map(UnixListener::from),
        };
        let events = single.take(FileRole::Events)?.into();
        let control = PacketListener::from(single.take(FileRole::Control)?);
        let lifeline = single.take(FileRole::Lifeline).ok();
        Ok(Self { machine, events, control, lifeline })
    }
}

/// Files of which there is at most one for a role.
#[derive(Debug, Default)]
struct Singles(Vec<(FileRole, OwnedFd)>);

impl Singles {
    fn put(&mut self, role: FileRole, file: OwnedFd) -> anyhow::Result<()> {
        if self.0.iter().any(|(taken, _)| *taken == role) {
            bail!("The launch message has two files for {role:?}");
        }
        self.0.push((role, file));
        Ok(())
    }

    fn take(&mut self, role: FileRole) -> anyhow::Result<OwnedFd> {
        let place = self.0.iter().position(|(taken, _)| *taken == role);
        let place =
            place.with_context(|| format!("The launch message has no file for {role:?}"))?;
        Ok(self.0.swap_remove(place).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn a_missing_role_is_named() {
        let error = Files::sort(&[FileRole::Kvm], vec![file()]).unwrap_err();

        assert_eq!(error.to_string(), "The launch message has no file for Kernel");
    }

    #[test]
    fn a_role_given_twice_is_refused() {
        let roles = [FileRole::Events, FileRole::Events];

        let error = Files::sort(&roles, vec![file(), file()]).unwrap_err();

        assert_eq!(error.to_string(), "The launch message has two files for Events");
    }
}
