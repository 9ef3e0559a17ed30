//! Devices on a host that is made of files.

use std::fs;

use super::*;
use crate::devices::testing::Tree;

const NVME: &str = "0000:01:00.0";

/// A host with a disk and a network card that share a group, and a GPU.
fn host() -> (Tree, Devices) {
    let tree = Tree::new();
    tree.function(NVME, "1b36", "0010", "0x010802").group(NVME, 3).driver(NVME, "nvme");
    tree.function("0000:01:00.1", "8086", "10d3", "0x020000").group("0000:01:00.1", 3);
    tree.function("0000:02:00.0", "10de", "27b8", "0x030200").group("0000:02:00.0", 4);
    tree.function("0000:00:01.0", "8086", "1", "0x060400").group("0000:00:01.0", 1);
    tree.function("0000:03:00.0", "8086", "2", "0x020000");
    tree.file("sys/bus/pci/drivers/vfio-pci/unbind", "");
    let store = Store::open(&tree.root().join("records")).unwrap();
    let devices = Devices::open(DevicesSpec { root: tree.root().to_owned(), store }).unwrap();
    (tree, devices)
}

fn spec(address: &str, name: Option<&str>) -> DeviceSpec {
    let name = name.map(|name| name.parse().unwrap());
    DeviceSpec { address: address.parse().unwrap(), name, tags: BTreeMap::new() }
}

/// Adds the record of an instance.
fn instance(devices: &Devices, id: &str) {
    let insert = "INSERT INTO instances (id, name, json) VALUES (?1, ?1, '{}')";
    devices.shared.store.transact(|records| records.execute(insert, [id])).unwrap();
}

fn claim_for(devices: &Devices, instance: &str, keys: &[&str]) -> Result<(), ClaimError> {
    let keys: Vec<_> = keys.iter().map(|&key| key.to_owned()).collect();
    let wanted = devices.want(&keys).unwrap();
    devices.shared.store.transact(|records| claim(records, &wanted, instance))
}

#[test]
fn what_can_be_given_away_is_available() {
    let (tree, devices) = host();
    tree.file("usr/share/misc/pci.ids", "8086  Intel\n\t10d3  82574L\n");

    let available = devices.available().unwrap();

    let seen: Vec<_> = available.iter().map(|one| (one.address.as_str(), one.group)).collect();
    assert_eq!(seen, [(NVME, 3), ("0000:01:00.1", 3), ("0000:02:00.0", 4)]);
    assert_eq!(available[0].driver.as_deref(), Some("nvme"));
    assert_eq!(available[0].vendor_name, None);
    assert_eq!(available[1].vendor_name.as_deref(), Some("Intel"));
    assert_eq!(available[1].device_name.as_deref(), Some("82574L"));
}

#[test]
fn a_device_is_registered_once_and_found_by_id_and_name() {
    let (_tree, devices) = host();
    let made = devices.register(spec(NVME, None)).unwrap();

    assert_eq!(made.name.as_str(), "pci-0000-01-00-0");
    assert!(!made.is_gpu && !made.is_bound);
    let again = devices.register(spec(NVME, Some("other"))).unwrap_err();
    assert!(matches!(again, RegisterError::Registered { .. }), "{again}");
    let taken = devices.register(spec("0000:02:00.0", Some("pci-0000-01-00-0"))).unwrap_err();
    assert!(matches!(taken, RegisterError::NameTaken { .. }), "{taken}");
    let gpu = devices.register(spec("0000:02:00.0", Some("l4-gpu"))).unwrap();
    assert!(gpu.is_gpu);
    assert_eq!(devices.find("l4-gpu").unwrap(), devices.find(&gpu.id).unwrap());
    assert_eq!(devices.list().unwrap(), [made.clone(), gpu]);

    devices.delete("l4-gpu").unwrap();
    devices.delete(&made.id).unwrap();
    assert!(matches!(devices.delete("l4-gpu"), Err(DeleteError::Find(FindError::Missing { .. }))));
    assert_eq!(devices.list().unwrap(), []);
}

#[test]
fn one_instance_at_a_time_has_a_device_and_all_of_its_group() {
    let (_tree, devices) = host();
    // Nothing drives the network card, so the disk of its group can be given away.
    let disk = devices.register(spec(NVME, Some("disk"))).unwrap();
    devices.register(spec("0000:02:00.0", Some("gpu"))).unwrap();
    for id in ["one", "two"] {
        instance(&devices, id);
    }
    claim_for(&devices, "one", &["disk", "gpu"]).unwrap();

    let second = claim_for(&devices, "two", &[&disk.id]).unwrap_err();
    assert_eq!(
        second.to_string(),
        "Device disk is attached to instance one: one at a time can have it"
    );
    assert_eq!(devices.find("gpu").unwrap().attached_to.as_deref(), Some("one"));
    let deleted = devices.delete("disk").unwrap_err();
    assert!(deleted.to_string().contains("attached to instance one: delete that first"));
    let gone = "DELETE FROM instances WHERE id = 'one'";
    devices.shared.store.transact(|records| records.execute(gone, [])).unwrap();
    assert_eq!(devices.find("gpu").unwrap().attached_to, None);
    claim_for(&devices, "two", &["disk"]).unwrap();
}

#[test]
fn a_group_is_one_instances() {
    let (tree, devices) = host();
    tree.driver(NVME, "vfio-pci");
    devices.register(spec(NVME, Some("disk"))).unwrap();
    devices.register(spec("0000:01:00.1", Some("card"))).unwrap();
    for id in ["one", "two"] {
        instance(&devices, id);
    }
    claim_for(&devices, "one", &["disk"]).unwrap();

    let other = claim_for(&devices, "two", &["card"]).unwrap_err().to_string();
    assert!(other.starts_with("Device card shares its IOMMU group with device disk"), "{other}");
    claim_for(&devices, "one", &["card"]).unwrap();
}

#[test]
fn nobody_names_a_device_twice() {
    let (_tree, devices) = host();
    let disk = devices.register(spec(NVME, Some("disk"))).unwrap();

    let error = devices.want(&["disk".to_owned(), disk.id]).unwrap_err();

    assert!(matches!(error, WantError::Twice { .. }), "{error}");
}

/// No driver of this host takes anything: what was begun is undone.
#[tokio::test]
async fn a_loan_that_fails_leaves_nothing_lent() {
    let (tree, devices) = host();
    devices.register(spec(NVME, Some("disk"))).unwrap();

    let error = devices.lend("one", &["disk".to_owned()], None).await.unwrap_err();

    assert!(matches!(error, LendError::Bind { .. }), "{error}");
    let text = tree.text(&format!("sys/bus/pci/devices/{NVME}/driver_override"));
    assert_eq!(text.trim(), "");
    assert_eq!(devices.resume("one"), Ok(None));
}

#[tokio::test]
async fn a_server_finds_what_the_one_before_has_lent_and_a_boot_undoes_it() {
    let (tree, devices) = host();
    tree.driver(NVME, "vfio-pci").file("dev/vfio/3", "");
    devices.register(spec(NVME, Some("disk"))).unwrap();
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let kind = "sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1";
    tree.file(&format!("{kind}/available_instances"), "1").file(&format!("{kind}/create"), "");
    tree.file("proc/sys/kernel/random/uuid", uuid).file("dev/vfio/9", "");
    let place = tree.root().join("sys/devices/virtual/mtty/x");
    fs::create_dir_all(&place).unwrap();
    tree.link(&format!("sys/bus/mdev/devices/{uuid}"), &place);
    tree.file("sys/devices/virtual/mtty/x/remove", "");
    let group = tree.root().join("sys/kernel/iommu_groups/9");
    tree.link("sys/devices/virtual/mtty/x/iommu_group", &group);

    let loan = devices.lend("one", &["disk".to_owned()], Some("mtty-1")).await.unwrap();

    let loan = loan.unwrap().keep();
    assert_eq!(loan.paths.len(), 2);
    assert_eq!(loan.mdev_uuid.as_deref(), Some(uuid));
    let open = || {
        let store = devices.shared.store.clone();
        Devices::open(DevicesSpec { root: tree.root().to_owned(), store }).unwrap()
    };
    let found = open().resume("one").unwrap().unwrap();
    assert_eq!((found.id, found.mdev_uuid), (loan.id.clone(), loan.mdev_uuid.clone()));
    open().release_strays(&BTreeSet::from(["one".to_owned()])).await;
    assert!(open().resume("one").unwrap().is_some(), "its instance is there");
    open().release_strays(&BTreeSet::new()).await;
    assert_eq!(open().resume("one"), Ok(None));
    assert_eq!(tree.text("sys/devices/virtual/mtty/x/remove").trim(), "1");

    let _lent_once_more = devices.lend("two", &[], Some("mtty-1")).await.unwrap().unwrap().keep();
    tree.file("proc/sys/kernel/random/boot_id", "next\n");
    assert_eq!(open().resume("two"), Ok(None));
}

#[test]
fn gpus_are_given_whole_or_in_parts() {
    let (tree, devices) = host();
    devices.register(spec("0000:02:00.0", Some("gpu"))).unwrap();
    let whole = |free| Gpus::Whole { devices: vec![("gpu".to_owned(), free)] };
    assert_eq!(devices.gpus().unwrap(), Some(whole(true)));

    instance(&devices, "one");
    claim_for(&devices, "one", &["gpu"]).unwrap();
    assert_eq!(devices.gpus().unwrap(), Some(whole(false)));

    for (parent, kind, free) in [("a", "x-1", "4"), ("a", "x-2", "2"), ("b", "x-1", "0")] {
        let folder = format!("sys/class/mdev_bus/{parent}/mdev_supported_types/{kind}");
        tree.file(&format!("{folder}/available_instances"), free);
    }
    tree.file("sys/bus/mdev/devices/one/remove", "");
    let Some(Gpus::Parts { total, used, profiles }) = devices.gpus().unwrap() else { panic!() };
    assert_eq!((total, used, profiles.len()), (5, 1, 2));
}
