//! Guests of QEMU. They end at their first user instruction.

use std::env;
use std::path::PathBuf;
use std::process;
use std::time::Instant;

use ovum_test_host::ovum;
use ovum_test_host::qemu::{end_at_first_user, has_begun, microvm};
use tokio::process::Command;

use crate::Shape;

/// The peer.
pub(crate) struct Qemu {
    /// What guests of ours start from, as the server built it.
    pub(crate) initramfs: PathBuf,
}

impl Qemu {
    pub(crate) fn new() -> Self {
        let initramfs = env::temp_dir().join("bench-initramfs");
        #[expect(clippy::disallowed_methods, reason = "the program under test")]
        let mut command = process::Command::new(ovum());
        command.args(["initramfs", "--output"]).arg(&initramfs);
        assert!(command.status().unwrap().success());
        Self { initramfs }
    }

    /// Boots so many at the same time, up to their first user instruction; returns how many
    /// milliseconds that took.
    pub(crate) async fn boot_crowd(&self, count: usize, shape: Shape) -> f64 {
        let started = Instant::now();
        let guests: Vec<_> = (0..count).map(|_| self.command(shape).spawn().unwrap()).collect();
        for mut guest in guests {
            let status = guest.wait().await.unwrap();
            assert!(has_begun(status), "QEMU ended before the agent began: {status}");
        }
        started.elapsed().as_secs_f64() * 1e3
    }

    fn command(&self, shape: Shape) -> Command {
        let cmdline = "quiet panic=-1 8250.nr_uarts=0";
        let mut command = microvm(shape.vcpus, shape.memory_mib, &self.initramfs, cmdline);
        end_at_first_user(&mut command);
        let mut command = Command::from(command);
        command.kill_on_drop(true);
        command
    }
}
