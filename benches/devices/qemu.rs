//! Guests of QEMU: a process each.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use ovum_test_host::qemu::{end_at_first_user, has_begun, microvm, q35};

use crate::guest::{
    self, DATA, DISK_MEASURES, Figures, Guest, LINK_MEASURES, Link, MEMORY_MIB, Task, figures,
    initramfs, ip,
};

const LINK: Link = Link { tap: "bench-qemu", subnet: 2 };

/// Words that spare its guests what ours are spared, too.
const CMDLINE: &str = "quiet panic=-1 console=hvc0 8250.nr_uarts=0 tsc=reliable no_timer_check \
    random.trust_cpu=on";

/// Has a guest work with its disk and its network.
pub(crate) fn work(guest: &Guest) -> Figures {
    ip(&["tuntap", "add", LINK.tap, "mode", "tap", "vnet_hdr"]);
    LINK.set_up();
    let archive = guest::file("qemu-initramfs");
    fs::write(&archive, initramfs(Task::Own(LINK))).unwrap();
    let mut command = microvm(1, MEMORY_MIB, &archive, CMDLINE);
    add_root(&mut command, guest, "device");
    if let Some(disk) = &guest.disk {
        command
            .args(["-drive", &drive(DATA, disk, "aio=io_uring")])
            .args(["-device", &format!("virtio-blk-device,drive={DATA},serial={DATA}")]);
    }
    command
        .args(["-netdev", &format!("tap,id=net,ifname={},script=no,downscript=no", LINK.tap)])
        .args(["-device", "virtio-net-device,netdev=net,mac=02:00:00:00:00:02"]);
    let said = finish(command, "device");
    ip(&["tuntap", "del", LINK.tap, "mode", "tap"]);
    figures(&said, DISK_MEASURES.iter().chain(&LINK_MEASURES))
}

/// Has a guest work with the disk that it is lent.
pub(crate) fn work_lent(guest: &Guest) -> Figures {
    figures(&finish(with_lent(guest), "pci"), &DISK_MEASURES)
}

/// How many milliseconds it takes from nothing to the guest's first user instruction.
pub(crate) fn boot(guest: &Guest) -> f64 {
    let mut command = with_lent(guest);
    end_at_first_user(&mut command);
    let started = Instant::now();
    let status = command.status().expect("qemu-system-x86_64 runs");
    let took_ms = started.elapsed().as_secs_f64() * 1e3;
    assert!(has_begun(status), "QEMU ended before the agent began: {status}");
    took_ms
}

/// A guest that can be lent something, and is if there is something to lend.
fn with_lent(guest: &Guest) -> Command {
    let archive = guest::file("qemu-initramfs");
    fs::write(&archive, initramfs(Task::Lent)).unwrap();
    let mut command = q35(1, MEMORY_MIB, &archive, CMDLINE);
    add_root(&mut command, guest, "pci");
    if let Some(path) = &guest.lent {
        command.args(["-device", &format!("vfio-pci,sysfsdev={}", path.display())]);
    }
    command
}

fn add_root(command: &mut Command, guest: &Guest, transport: &str) {
    command
        .args(["-drive", &drive("root", &guest.root, "readonly=on")])
        .args(["-device", &format!("virtio-blk-{transport},drive=root,serial=root")]);
}

fn drive(id: &str, path: &Path, how: &str) -> String {
    format!("id={id},file={},format=raw,if=none,{how}", path.display())
}

/// Lets it run to its end; returns what it said on its console.
fn finish(mut command: Command, transport: &str) -> String {
    let console = guest::file("qemu-console");
    command
        .args(["-chardev", &format!("file,id=console,path={}", console.display())])
        .args(["-device", &format!("virtio-serial-{transport}")])
        .args(["-device", "virtconsole,chardev=console"]);
    let status = command.status().expect("qemu-system-x86_64 runs");
    let said = fs::read_to_string(&console).unwrap();
    assert!(status.success(), "{status}: {said}");
    said
}
