//! The host itself: the same work, without a guest between.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::guest::{DISK_MEASURES, Figures, Guest, Task, figures};

/// The root of guests as a folder of the host; dropped, it is none any more.
pub(crate) struct Host {
    root: PathBuf,
}

impl Host {
    pub(crate) fn new(guest: &Guest) -> Self {
        let host = Self { root: PathBuf::from("/run/bench-root") };
        fs::create_dir_all(&host.root).unwrap();
        run(Command::new("mount").args(["-o", "loop,ro"]).arg(&guest.root).arg(&host.root));
        for folder in ["dev", "proc"] {
            let place = host.root.join(folder);
            run(Command::new("mount").args(["--rbind", &format!("/{folder}")]).arg(place));
        }
        host
    }

    /// Works with the disk that guests are lent, while nobody is.
    pub(crate) fn work(&self) -> Figures {
        let mut command = Command::new("chroot");
        command.arg(&self.root).args(["bash", "-c", &Task::Lent.script()]);
        // fio keeps what it shares with its jobs in a file.
        let output = command.env("TMPDIR", "/dev/shm").stderr(Stdio::inherit()).output().unwrap();
        figures(&String::from_utf8_lossy(&output.stdout), &DISK_MEASURES)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        run(Command::new("umount").args(["--recursive", "--lazy"]).arg(&self.root));
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}
