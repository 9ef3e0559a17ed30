//! TAPs: network interfaces of the host whose other end is a file.
//!
//! They are not persistent: an interface is gone with the last of its files, however the process
//! ended that held it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Where they are made.
pub const DEVICE: &str = "/dev/net/tun";

/// Longest name of an interface.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

// include/uapi/linux/if_tun.h of Linux.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP: i32 = 0x0002;
const IFF_MULTI_QUEUE: i32 = 0x0100;
const IFF_NO_PI: i32 = 0x1000;
const IFF_VNET_HDR: i32 = 0x4000;
const IFF_TUN_EXCL: i32 = 0x8000;

/// Makes the interface `name`, which there is none of yet, with so many queues; it is down. Returns
/// a file for each.
///
/// # Errors
///
/// EPERM without the capability to, EBUSY if there is one of that name; else what the kernel says.
pub fn create(name: &str, queues: usize) -> io::Result<Vec<OwnedFd>> {
    let several = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several;
    let mut files = Vec::with_capacity(queues);
    for _ in 0..queues {
        let exclusive = if files.is_empty() { IFF_TUN_EXCL } else { 0 };
        files.push(attach(name, flags | exclusive)?);
    }
    Ok(files)
}

fn attach(name: &str, flags: i32) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open(Path::new(DEVICE))?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        // The flags are its low half; an index is there for their highest bit not to be a sign.
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_ifindex: flags },
    };
    if name.len() > NAME_BYTES_MAX || !name.is_ascii() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which is what the pointer is to.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(file.into()) }
}
