//! The report port: how this program tells the machine around it what it is doing.
//!
//! A write to the port leaves the guest at once, needs no driver and no other process, and works
//! from the first instruction of `main` on; see [`ovum_agent_proto::report`] for the words.

use std::arch::asm;

use ovum_agent_proto::report::{REPORT_PORT, Report};

/// The right to write to I/O ports, if the kernel granted it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Port {
    granted: bool,
}

impl Port {
    /// Asks for the right. A kernel that refuses costs the reports, not the workload.
    ///
    /// The kernel emulates `iopl` with an all-open permission map that it shares between
    /// processes; `ioperm` would make it allocate and copy a map of our own.
    pub(crate) fn open() -> Self {
        // SAFETY: changes what this process may do to devices, and no memory.
        let rc = unsafe { libc::iopl(3) };
        Self { granted: rc == 0 }
    }

    /// Tells the machine.
    pub(crate) fn report(self, report: Report) {
        if self.granted {
            // SAFETY: we have the right to this port, so the instruction does not fault. What
            // answers it, if anything, is the machine's report device, which only takes a note.
            unsafe {
                asm!(
                    "out dx, eax",
                    in("dx") REPORT_PORT,
                    in("eax") report.encode(),
                    options(nomem, nostack, preserves_flags),
                );
            }
        }
    }

    /// Takes the right back after [`Port::close`].
    pub(crate) fn reopen(self) {
        if self.granted {
            Self::open();
        }
    }

    /// Gives the right up for the calling process: children inherit it, and a workload has no use
    /// for it.
    pub(crate) fn close() {
        // SAFETY: as in `open`. No `Port` is used by this process afterwards: it becomes another
        // program, or ends, or takes the right back.
        unsafe { libc::iopl(0) };
    }
}
