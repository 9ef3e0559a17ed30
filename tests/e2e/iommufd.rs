//! Devices of the host in guests, by a file for each device and iommufd.
//!
//! The kernel of the emulated host has neither. Its VFIO is taken out, and one that was built with
//! both (`dev/host-modules`) put in: what is lent from then on is lent that way. So these cases
//! come after those that need what the kernel has, and are those of them that the way makes a
//! difference to.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ovum_test_host::lent::nvme;
use ovum_test_host::{TestHost, worker_pids};

use crate::cases;
use crate::devices::{self, NAME, await_return, forget, idle, kill_worker, register};

cases![
    a_worker_has_a_device_by_its_file_and_a_kill_gives_it_back,
    a_disk_of_the_host_is_a_guests_and_comes_back,
    devices_of_a_group_are_one_instances,
    a_device_that_is_pulled_out_ends_its_instance_and_is_shown_as_gone,
    a_part_of_a_device_is_made_for_each_start,
];

/// Modules to take out, the last to need another first, and to put in.
const OLD: [&str; 6] = ["mtty", "vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "mdev", "vfio"];
const NEW: [&str; 7] =
    ["iommufd", "vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci", "mdev", "mtty"];

/// Replaces the host's VFIO, which nothing uses between two cases, unless that was done before.
pub(crate) fn replace_vfio() {
    let is_loaded = |module: &str| Path::new("/sys/module").join(module).exists();
    if is_loaded("iommufd") {
        return;
    }
    let folder = env::var_os("OVUM_TEST_IOMMUFD").map(PathBuf::from);
    let folder = folder.expect("OVUM_TEST_IOMMUFD is what dev/host-modules says");
    for module in OLD.into_iter().filter(|module| is_loaded(module)) {
        assert!(Command::new("rmmod").arg(module).status().unwrap().success(), "{module}");
    }
    for module in NEW {
        let mut insert = Command::new("insmod");
        insert.arg(folder.join(module).with_extension("ko"));
        if ["iommufd", "vfio_iommu_type1"].contains(&module) {
            // The emulated IOMMU cannot remap interrupts.
            insert.arg("allow_unsafe_interrupts=1");
        }
        assert!(insert.status().unwrap().success(), "{module}");
    }
    assert!(Path::new("/dev/iommu").exists());
}

async fn a_worker_has_a_device_by_its_file_and_a_kill_gives_it_back(host: &TestHost) {
    replace_vfio();
    let server = &host.server;
    let address = nvme();
    register(server, &address).await;
    server.create(idle("victim")).await;
    server.wait("victim", "Running").await;
    let worker = worker_pids().pop().unwrap();
    let open = fs::read_dir(format!("/proc/{worker}/fd")).unwrap();
    let open: Vec<_> = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()).collect();

    kill_worker();
    await_return(&address).await;

    assert!(open.contains(&PathBuf::from("/dev/iommu")), "{open:?}");
    let is_own = |path: &PathBuf| path.starts_with("/dev/vfio/devices");
    let of_vfio: Vec<_> = open.iter().filter(|path| path.starts_with("/dev/vfio")).collect();
    assert!(of_vfio.len() == 1 && is_own(of_vfio[0]), "{open:?}");
    assert_eq!(server.wait("victim", "Stopped").await["state"], "Stopped");
    server.delete("victim").await;
    forget(server, NAME).await;
}

/// Cases of devices, once more.
macro_rules! once_more {
    ($($name:ident),* $(,)?) => {
        $(async fn $name(host: &TestHost) {
            replace_vfio();
            devices::$name(host).await;
        })*
    };
}

once_more![
    a_disk_of_the_host_is_a_guests_and_comes_back,
    devices_of_a_group_are_one_instances,
    a_device_that_is_pulled_out_ends_its_instance_and_is_shown_as_gone,
    a_part_of_a_device_is_made_for_each_start,
];
