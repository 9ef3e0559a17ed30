//! The host's end of a network interface: a TAP, whose packets carry a virtio header.
//!
//! Each read and write is one packet: `struct virtio_net_hdr_v1`, then the Ethernet frame. The
//! kernel reads and writes that header itself, so that a checksum the guest left open and a packet
//! that is yet to be cut into segments pass through unlooked at
//! (Documentation/networking/tuntap.rst of Linux).

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::header::HEADER_BYTES;

/// What the guest may be handed: a partial checksum, and TCP or UDP packets that are larger than
/// the link takes. (include/uapi/linux/if_tun.h)
pub const TAKES_CSUM: u32 = 0x01;
/// TCP over IPv4.
pub const TAKES_TSO4: u32 = 0x02;
/// TCP over IPv6.
pub const TAKES_TSO6: u32 = 0x04;
/// TCP with congestion notification.
pub const TAKES_ECN: u32 = 0x08;
/// UDP over IPv4.
pub const TAKES_USO4: u32 = 0x20;
/// UDP over IPv6.
pub const TAKES_USO6: u32 = 0x40;

// From the same header: the type of every one of these calls is 'T'.
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;

/// One queue of a TAP: packets are read from its file and written to it, without waiting.
pub trait Tap: AsFd + Debug + Send {
    /// Says what packets for the guest may be like, as a set of `TAKES_`.
    ///
    /// # Errors
    ///
    /// What the kernel says: EINVAL if it does not know one of them.
    fn offer(&self, takes: u32) -> io::Result<()>;

    /// Whether packets for the guest come this way, too.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    fn enable(&self, enabled: bool) -> io::Result<()>;
}

/// A queue of a real one.
#[derive(Debug)]
pub struct TapFile(OwnedFd);

impl TapFile {
    /// Around `file`, which is attached to an interface already.
    ///
    /// # Errors
    ///
    /// EINVAL if it is no TAP that carries virtio headers and nothing else before its frames; else
    /// what the kernel says.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let mut request = no_request();
        // SAFETY: TUNGETIFF writes one `struct ifreq`, which is what the pointer is to.
        let got = unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &raw mut request) };
        checked(got)?;
        // SAFETY: what TUNGETIFF wrote of the union are the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & wanted != wanted {
            let what = "it is no TAP with virtio headers";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let bytes = libc::c_int::try_from(HEADER_BYTES).map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) };
        checked(set)?;
        fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Self(file))
    }
}

impl AsFd for TapFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Tap for TapFile {
    fn offer(&self, takes: u32) -> io::Result<()> {
        let takes = libc::c_ulong::from(takes);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETOFFLOAD, takes) })
    }

    fn enable(&self, enabled: bool) -> io::Result<()> {
        let mut request = no_request();
        request.ifr_ifru.ifru_flags = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        // SAFETY: TUNSETQUEUE reads one `struct ifreq`.
        let set = unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETQUEUE, &raw const request) };
        match checked(set) {
            // It is as it shall be already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            outcome => outcome,
        }
    }
}

fn no_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_file_that_is_no_tap_is_refused() {
        for path in ["/dev/null", "/dev/zero", "/proc/self/exe"] {
            assert!(TapFile::new(File::open(path).unwrap().into()).is_err(), "{path}");
        }
    }
}
