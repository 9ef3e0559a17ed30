//! Guests of QEMU: a process each.

use std::fs;
use std::path::Path;

use ovum_test_host::qemu::microvm;

use crate::guest::{self, DATA, Figures, Guest, Link, MEMORY_MIB, figures, initramfs, ip};

const LINK: Link = Link { tap: "bench-qemu", subnet: 2 };

/// Words that spare its guests what ours are spared, too.
const CMDLINE: &str = "quiet panic=-1 console=hvc0 8250.nr_uarts=0 tsc=reliable no_timer_check \
    random.trust_cpu=on";

/// Has a guest do the work.
pub(crate) fn work(guest: &Guest) -> Figures {
    ip(&["tuntap", "add", LINK.tap, "mode", "tap", "vnet_hdr"]);
    LINK.set_up();
    let (console, archive) = (guest::file("qemu-console"), guest::file("qemu-initramfs"));
    fs::write(&archive, initramfs(Some(LINK))).unwrap();
    let drive = |id: &str, path: &Path, how: &str| {
        format!("id={id},file={},format=raw,if=none,{how}", path.display())
    };
    let status = microvm(1, MEMORY_MIB, &archive, CMDLINE)
        .args(["-drive", &drive("root", &guest.root, "readonly=on")])
        .args(["-device", "virtio-blk-device,drive=root,serial=root"])
        .args(["-drive", &drive(DATA, &guest.disk, "aio=io_uring")])
        .args(["-device", &format!("virtio-blk-device,drive={DATA},serial={DATA}")])
        .args(["-netdev", &format!("tap,id=net,ifname={},script=no,downscript=no", LINK.tap)])
        .args(["-device", "virtio-net-device,netdev=net,mac=02:00:00:00:00:02"])
        .args(["-chardev", &format!("file,id=console,path={}", console.display())])
        .args(["-device", "virtio-serial-device", "-device", "virtconsole,chardev=console"])
        .status()
        .expect("qemu-system-x86_64 runs");
    assert!(status.success(), "{status}: {:?}", fs::read_to_string(&console));
    ip(&["tuntap", "del", LINK.tap, "mode", "tap"]);
    figures(&console)
}
