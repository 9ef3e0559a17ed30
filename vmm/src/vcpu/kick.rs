//! Gets a vCPU thread out of KVM_RUN, whenever it is about to enter it or long since in it.
//!
//! A signal alone is lost if it arrives just before KVM_RUN. So its handler also sets
//! `immediate_exit` in the shared page of the thread's vCPU, with which the next KVM_RUN returns
//! before any guest code runs, with pending I/O completed (KVM API, 5 "The kvm_run structure").

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// The `immediate_exit` of this thread's vCPU, null if it has none.
    ///
    /// Invariant: what is not null points into a mapped `kvm_run`; [`Kickable`] keeps it so.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Installs the handler of the kick signal. Once in a process is enough.
///
/// # Errors
///
/// What sigaction(2) says.
pub(super) fn install() -> io::Result<()> {
    extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        // A thread-local without destructor or lazy start: reading it in a handler is harmless.
        let flag = IMMEDIATE_EXIT.get();
        if !flag.is_null() {
            // SAFETY: by the invariant it is mapped; it is this thread's own, one byte wide, and
            // KVM reads it as such.
            unsafe { flag.write_volatile(1) };
        }
    }
    register_signal_handler(SIGRTMIN(), on_kick)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Kicks `thread`: if it is [`Kickable`] its KVM_RUN, the present or the next one, returns.
pub(super) fn kick<T>(thread: &JoinHandle<T>) {
    // It fails only for a thread that has ended, and then there is nothing to kick.
    let _ = thread.kill(SIGRTMIN());
}

/// While it lives, the thread that made it can be kicked out of its vCPU.
#[derive(Debug)]
pub(super) struct Kickable {
    /// Not to be sent to another thread: it is about this one.
    _here: PhantomData<*mut u8>,
}

impl Kickable {
    /// Makes the present thread kickable.
    ///
    /// # Safety
    ///
    /// `vcpu` has to live at least as long as what is returned: the handler writes to its mapping.
    pub(super) unsafe fn new(vcpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Self { _here: PhantomData }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
