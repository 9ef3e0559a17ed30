//! Devices of the host in a guest: those that `dev/in-host --vfio` has.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ovum_vmm::machine::{Machine, StopReason};
use ovum_vmm::machine_error::{BuildError, SaveError};
use ovum_vmm::vfio::VfioError;

use crate::archive::Archive;
use crate::guest::{file, guest};
use crate::program::serial_setter;

/// Where sysfs lists devices.
const PCI: &str = "/sys/bus/pci/devices";

/// NVMe controllers in sysfs.
const NVME_CLASS: &str = "0x010802";

/// The kernel looks for disks while programs run already.
const WAIT_FOR_DISK: &str = "until [ -b /dev/nvme0n1 ]; do usleep 1000; done";

/// How long the host may take to find a disk again.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device that its driver has let go of; dropped, the driver gets it back.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) path: PathBuf,
    /// What it gets back, if it had one; nothing is whoever finds it.
    driver: Option<&'static str>,
}

impl Lent {
    /// Takes the device of a class from the host, of which there must be one.
    fn take(class: &str) -> Self {
        Self::take_with(&[("class", class)])
    }

    /// Takes the device with these identities.
    fn take_id(vendor: &str, device: &str) -> Self {
        Self::take_with(&[("vendor", vendor), ("device", device)])
    }

    fn take_with(signs: &[(&str, &str)]) -> Self {
        let devices = fs::read_dir(PCI).unwrap().map(|entry| entry.unwrap());
        let has = |path: &Path, (file, value): &(&str, &str)| {
            fs::read_to_string(path.join(file)).unwrap().trim() == *value
        };
        let is_it = |path: &Path| signs.iter().all(|sign| has(path, sign));
        let found = devices.map(|entry| entry.path()).find(|path| is_it(path));
        let device = found.expect("these tests need devices to pass on: dev/in-host --vfio");
        let lent = Self { path: device, driver: Some("") };
        lent.bind("vfio-pci");
        lent
    }

    fn bind(&self, driver: &str) {
        let address = self.path.file_name().unwrap().to_str().unwrap();
        fs::write(self.path.join("driver_override"), format!("{driver}\n")).unwrap();
        if self.path.join("driver").exists() {
            fs::write(self.path.join("driver/unbind"), address).unwrap();
        }
        fs::write("/sys/bus/pci/drivers_probe", address).unwrap();
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(driver) = self.driver {
            self.bind(driver);
        }
    }
}

/// A mediated device of the kernel's sample, a serial port whose output is its input; dropped, it
/// is no more.
#[derive(Debug)]
struct Mediated(Lent);

impl Mediated {
    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

    fn create() -> Self {
        if !Path::new("/sys/class/mtty").exists() {
            let module = env::var_os("OVUM_TEST_MDEV");
            let module = module.expect("OVUM_TEST_MDEV is what dev/host-modules built");
            assert!(Command::new("insmod").arg(module).status().unwrap().success());
        }
        let kind = "/sys/devices/virtual/mtty/mtty/mdev_supported_types/mtty-1";
        fs::write(format!("{kind}/create"), Self::UUID).unwrap();
        let path = Path::new("/sys/bus/mdev/devices").join(Self::UUID);
        Self(Lent { path, driver: None })
    }
}

impl Drop for Mediated {
    fn drop(&mut self) {
        fs::write(self.0.path.join("remove"), "1").unwrap();
        assert!(!self.0.path.exists());
    }
}

/// What this process has open of VFIO, by path.
fn open_files() -> Vec<String> {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let paths = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let mut paths: Vec<_> = paths.map(|path| path.to_str().unwrap().to_owned()).collect();
    paths.retain(|path| path.starts_with("/dev/vfio/") || path == "/dev/iommu");
    paths.sort();
    paths
}

/// Why a machine with the device at `path` cannot be built.
fn refused(path: &Path) -> VfioError {
    let lent = Lent { path: path.into(), driver: None };
    let spec = guest("").device(&lent);
    match Machine::build(&spec.spec, spec.files().0).unwrap_err() {
        BuildError::Vfio(error) => error,
        error => panic!("{error:?}"),
    }
}

/// Says `heard` once an interrupt of that name was counted more than twice.
fn has_interrupts(name: &str) -> String {
    format!(
        "awk '/{name}/ {{ for (i = 2; i < NF; i++) if ($i ~ /^[0-9]+$/) sum += $i }}
            END {{ print (sum > 2 ? \"heard\" : \"silent\") }}' /proc/interrupts"
    )
}

/// Does something with the NVMe disk of the host, once that has found it.
fn on_host<T>(act: impl Fn(&File) -> io::Result<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let disk = OpenOptions::new().read(true).write(true).open("/dev/nvme0n1");
        match disk.and_then(|disk| act(&disk)) {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < deadline, "no NVMe disk in time: {error}"),
        }
    }
}

/// Through the controller's own DMA and interrupts: the host is not asked for a single byte.
#[test]
fn a_guest_reads_and_writes_an_nvme_disk_of_the_host() {
    on_host(|disk| disk.write_all_at(&[b"from the host\n", &[0; 498][..]].concat(), 0));
    let script = format!(
        "{WAIT_FOR_DISK}; head -n 1 /dev/nvme0n1
        seq 1 100000 | dd of=/dev/nvme0n1 bs=4k seek=1 conv=fsync 2> /dev/null
        echo 3 > /proc/sys/vm/drop_caches
        tail -c +4097 /dev/nvme0n1 | head -n 100000 | tail -n 1
        grep -c MSIX.*nvme0q /proc/interrupts; {}; ls /sys/bus/pci/devices | wc -l",
        has_interrupts("nvme0q")
    );
    let lent = Lent::take(NVME_CLASS);

    let mut guest = guest(&script).vcpus(2).device(&lent).boot();
    let open = open_files();
    let (reason, said) = guest.end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert_eq!(said, "from the host\n100000\n3\nheard\n2\n");
    guest.cut();
    // By a file of its own where the host has one; and nothing stays open.
    let has_iommufd = Path::new("/dev/iommu").exists();
    let by_file = open.iter().any(|path| path.starts_with("/dev/vfio/devices/"));
    assert_eq!((open.len(), by_file), (2, has_iommufd), "{open:?}");
    assert_eq!(open.iter().any(|path| path == "/dev/iommu"), has_iommufd, "{open:?}");
    assert_eq!(open_files(), [""; 0]);
    drop(lent);
    let found = on_host(|disk| {
        let mut found = [0; 8];
        disk.read_exact_at(&mut found, 4096).map(|()| found)
    });
    assert_eq!(&found, b"1\n2\n3\n4\n");
}

/// One piece of memory larger than all that it booted with is read into, and all of it is right.
#[test]
fn a_device_reaches_memory_that_comes_goes_and_comes_again() {
    for block in 0_u8..64 {
        let content = vec![block; 1 << 20];
        on_host(|disk| disk.write_all_at(&content, u64::from(block) << 20));
    }
    let sum = Command::new("md5sum").stdin(on_host(File::try_clone)).output().unwrap();
    let script = format!(
        "awk '/MemTotal/ {{ print ($2 < 65536) }}' /proc/meminfo; {WAIT_FOR_DISK}; echo ready
        until [ $(awk '/MemTotal/ {{print $2}}' /proc/meminfo) -gt 240000 ]; do usleep 1000; done
        dd if=/dev/nvme0n1 bs=64M count=1 iflag=direct 2> /dev/null | md5sum; echo read
        until [ $(awk '/MemTotal/ {{print $2}}' /proc/meminfo) -lt 110000 ]; do usleep 1000; done
        echo gone
        until [ $(awk '/MemTotal/ {{print $2}}' /proc/meminfo) -gt 240000 ]; do usleep 1000; done
        dd if=/dev/nvme0n1 bs=64M count=1 iflag=direct 2> /dev/null | md5sum"
    );
    let lent = Lent::take(NVME_CLASS);

    let mut guest = guest(&script).memory_mib(72).hotplug_mib(256).device(&lent).boot();
    let [is_small] = guest.lines_until("ready");
    guest.machine.resize_hotplug(256 << 20).unwrap();
    let [first] = guest.lines_until("read");
    guest.machine.resize_hotplug(0).unwrap();
    // Some the kernel may need, but not in every piece that was mapped for the device.
    guest.says("gone");
    guest.until("unplugged", |machine| machine.plugged_bytes() < 64 << 20);
    guest.machine.resize_hotplug(256 << 20).unwrap();
    let (reason, said) = guest.end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert_eq!(is_small, "1");
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert_eq!([first.trim(), said.trim()], [sum.trim(); 2]);
}

#[test]
fn a_network_card_of_the_host_passes_packets() {
    let script = format!(
        "ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0
        until [ \"$(cat /sys/class/net/eth0/carrier)\" = 1 ]; do usleep 10000; done
        ping -c 3 -W 20 10.0.2.2 | grep -c 'seq='; {}",
        has_interrupts("eth0")
    );
    let lent = Lent::take_id("0x8086", "0x10d3");

    let mut guest = guest(&script).device(&lent).boot();
    let (reason, said) = guest.end();

    assert_eq!((reason, said.as_str()), (StopReason::PowerOff, "3\nheard\n"));
}

/// A device that no driver knows, by its registers: QEMU's for teaching complements and multiplies.
/// Its interrupt is a message by MSI, set up by hand: vector 0xf5, which nothing in the kernel has,
/// so that it counts one more as spurious. It does not acknowledge 0xff, and would hear no other.
#[test]
fn a_device_without_a_driver_computes_and_raises_its_interrupt() {
    let script = "device=/sys/bus/pci/devices/0000:00:01.0; echo 1 > $device/enable
        start=$(head -n 1 $device/resource | cut -d' ' -f1)
        devmem $((start + 4)) 32 0x12345678; devmem $((start + 4))
        devmem $((start + 8)) 32 5
        until [ $(($(devmem $((start + 32))) & 1)) = 0 ]; do :; done
        devmem $((start + 8))
        put() { printf $2 | dd of=$device/config bs=2 seek=$1 conv=notrunc 2> /dev/null; }
        put 34 '\\000\\000'; put 35 '\\340\\376'; put 38 '\\365\\000'
        put 33 '\\201\\000'; put 2 '\\006\\000'
        spurious() { awk '/SPU/ { print $2 }' /proc/interrupts; }
        spurious; devmem $((start + 96)) 32 1
        until [ $(spurious) -gt 0 ]; do :; done; spurious";
    let lent = Lent::take_id("0x1234", "0x11e8");

    let mut guest = guest(script).device(&lent).boot();
    let (reason, said) = guest.end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert_eq!(said, "0xEDCBA987\n0x00000078\n0\n1\n");
}

/// The real thing of its kind: the kernel's driver writes and reads its registers, which are ports.
/// It has nothing but a pin to raise, which guests do not get, so the driver looks by itself.
#[test]
fn a_mediated_device_is_a_serial_port_of_the_guest() {
    let script = "device=/sys/bus/pci/devices/0000:00:01.0
        cat $device/vendor $device/device $device/class
        head -n 1 $device/resource | cut -d' ' -f1,2; cat $device/irq
        echo 1 > $device/enable; /setserial; echo set $?
        stty -F /dev/ttyS0 raw -echo; exec 3<> /dev/ttyS0
        seq 1 20 >&3 & head -n 20 <&3 | md5sum; seq 1 20 | md5sum";
    let mut programs = Archive::default();
    programs.program("setserial", &serial_setter("/dev/ttyS0", 0xc000));
    for _ in 0..2 {
        let mediated = Mediated::create();

        let mut guest = guest(script).archive(programs.clone()).device(&mediated.0).boot();
        let (reason, said) = guest.end();
        guest.cut();

        assert_eq!(reason, StopReason::PowerOff, "{said}");
        let lines: Vec<_> = said.lines().collect();
        let found = ["0x4348", "0x3253", "0x070002", "0x000000000000c000 0x000000000000c007", "0"];
        assert_eq!(lines[..5], found);
        assert_eq!(lines[5], "set 0");
        assert_eq!(lines[6], lines[7], "{said}");
    }
}

/// It masks vectors while they are raised, then writes noise over all of configuration space: BARs
/// go anywhere, interrupts anywhere. It costs that guest its device; the next finds it whole.
/// A round is 1024 writes: of 200 rounds the emulated host does not see the end in two minutes.
#[test]
fn a_guest_that_is_an_enemy_breaks_its_device_for_itself_only() {
    on_host(|disk| disk.write_all_at(&[b"from the host\n", &[0; 498][..]].concat(), 0));
    let script = format!(
        "{WAIT_FOR_DISK}; device=/sys/bus/pci/devices/0000:00:01.0
        table=$(($(head -n 1 $device/resource | cut -d' ' -f1) + 0x2000))
        dd if=/dev/nvme0n1 of=/dev/null bs=4k count=2000 iflag=direct 2> /dev/null &
        for n in $(seq 50); do
            for vector in 0 1; do devmem $((table + 16 * vector + 12)) 32 $((n % 2)); done
        done; wait; echo masked; echo 0000:00:01.0 > /sys/bus/pci/drivers/nvme/unbind
        for n in $(seq 4); do
            dd if=/dev/urandom of=$device/config bs=4096 count=1 conv=notrunc 2> /dev/null
        done; echo written"
    );
    let lent = Lent::take(NVME_CLASS);

    let (reason, said) = guest(&script).device(&lent).boot().end();
    assert_eq!((reason, said.as_str()), (StopReason::PowerOff, "masked\nwritten\n"));

    let script = format!("{WAIT_FOR_DISK}; head -n 1 /dev/nvme0n1");
    let (reason, said) = guest(&script).device(&lent).boot().end();
    assert_eq!((reason, said.as_str()), (StopReason::PowerOff, "from the host\n"));
}

/// Whoever asks first has it, and it is whole afterwards.
#[test]
fn a_device_that_is_not_free_is_refused_and_stays_as_it_was() {
    // More memory is its sign to go on.
    let script = format!(
        "{WAIT_FOR_DISK}; echo found
        until [ $(awk '/MemTotal/ {{print $2}}' /proc/meminfo) -gt 140000 ]; do usleep 1000; done
        head -n 1 /dev/nvme0n1"
    );
    on_host(|disk| disk.write_all_at(&[b"from the host\n", &[0; 498][..]].concat(), 0));
    let lent = Lent::take(NVME_CLASS);
    let path = lent.path.clone();

    let mut first = guest(&script).hotplug_mib(128).device(&lent).boot();
    first.says("found");
    let in_use = refused(&path);
    first.machine.resize_hotplug(128 << 20).unwrap();
    let (reason, said) = first.end();
    first.cut();
    drop(lent);
    on_host(|_| Ok(()));
    let bound = refused(&path);
    let vanished = refused("/sys/bus/pci/devices/0000:ff:1f.0".as_ref());

    assert!(matches!(in_use, VfioError::InUse { .. }), "{in_use:?}");
    assert_eq!((reason, said.trim()), (StopReason::PowerOff, "from the host"));
    assert!(matches!(bound, VfioError::NotViable { .. }), "{bound:?}");
    assert!(matches!(vanished, VfioError::Open { .. }), "{vanished:?}");
    on_host(|disk| disk.read_exact_at(&mut [0; 512], 0));
}

/// Functions of the emulated host's chipset share a group, and nothing drives them.
#[test]
fn a_device_whose_group_another_machine_has_is_refused() {
    let peers = fs::read_dir("/sys/kernel/iommu_groups").unwrap().find_map(|group| {
        let devices = fs::read_dir(group.unwrap().path().join("devices")).unwrap();
        let paths = devices.map(|device| Path::new(PCI).join(device.unwrap().file_name()));
        let is_bridge =
            |path: &Path| fs::read_to_string(path.join("class")).unwrap().starts_with("0x06");
        let peers: Vec<_> = paths.filter(|path| !is_bridge(path)).collect();
        (peers.len() > 1).then_some(peers)
    });
    let take = |path: &PathBuf| {
        let lent = Lent { path: path.clone(), driver: Some("") };
        lent.bind("vfio-pci");
        lent
    };
    let peers: Vec<_> = peers.expect("functions of the chipset share a group");
    let [first, second] = [&peers[0], &peers[1]].map(take);
    let mut guest = guest("echo ready; while :; do :; done").device(&first).boot();
    guest.says("ready");

    let error = refused(&second.path);

    assert!(matches!(error, VfioError::InUse { .. }), "{error:?}");
    guest.cut();
}

/// The kernel asks for it, and waits until it is closed; what it finds again there is whole.
#[test]
fn a_device_that_is_pulled_out_ends_its_machine_and_is_let_go_of() {
    on_host(|disk| disk.write_all_at(&[b"from the host\n", &[0; 498][..]].concat(), 0));
    let script = format!(
        "{WAIT_FOR_DISK}; echo found
        while :; do dd if=/dev/nvme0n1 of=/dev/null bs=4k iflag=direct 2> /dev/null; done"
    );
    let lent = Lent::take(NVME_CLASS);
    let path = lent.path.clone();
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut guest = guest(&script).device(&lent).boot();
    guest.says("found");

    let remover = thread::spawn(move || fs::write(path.join("remove"), "1"));
    let (reason, said) = guest.end();
    let waits = lent.path.exists();
    guest.cut();
    remover.join().unwrap().unwrap();

    assert_eq!(reason, StopReason::Fault(format!("Its host takes device {name} away")), "{said}");
    assert!(waits, "it is not gone before it was closed");
    assert!(!lent.path.exists());
    fs::write("/sys/bus/pci/rescan", "1").unwrap();
    on_host(|disk| disk.read_exact_at(&mut [0; 512], 0));
    let script = format!("{WAIT_FOR_DISK}; head -n 1 /dev/nvme0n1");
    lent.bind("vfio-pci");
    let (reason, said) = self::guest(&script).device(&lent).boot().end();
    assert_eq!((reason, said.as_str()), (StopReason::PowerOff, "from the host\n"));
}

/// What is in a device nobody can save, and its memory stays where it is.
#[test]
fn a_machine_with_a_device_of_the_host_is_not_saved() {
    let lent = Lent::take(NVME_CLASS);
    let disk = file(&[0; 4096]);
    let mut guest = guest("echo ready; while :; do :; done").disk(&disk, true).device(&lent).boot();
    guest.says("ready");

    guest.machine.pause().unwrap();
    assert!(matches!(guest.machine.save(), Err(SaveError::HostDevices)));

    guest.machine.resume().unwrap();
    guest.cut();
}
