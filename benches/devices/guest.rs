//! What both subjects run: the same root, the same work, and the figures that come out of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use ovum::initramfs::Archive;
use ovum_agent_proto::VERSION;
use ovum_agent_proto::config::{GuestConfig, GuestNetwork};
use ovum_test_host::root;

/// Memory at the start.
pub(crate) const MEMORY_MIB: u32 = 256;

/// Memory to be plugged.
pub(crate) const PLUG_BYTES: u64 = 1 << 30;

/// The disk's serial number.
pub(crate) const DATA: &str = "data";

/// Finds the disk of its own.
const OWN_DISK: &str = r#"
seconds=2
for disk in /sys/block/vd*; do
    if [ "$(cat "$disk/serial")" = data ]; then disk=/dev/${disk##*/}; break; fi
done
"#;

/// Waits for the one that it was lent: the kernel looks for it while programs run already.
const LENT_DISK: &str = "
seconds=1 disk=/dev/nvme0n1
until [ -b $disk ]; do sleep 0.01; done
";

/// Prints `NAME=FIGURE` for each of [`DISK_MEASURES`]. Of fio's terse lines fields 7 and 8 are
/// KiB/s and operations of reads, 48 and 49 of writes.
const DISK_WORK: &str = r#"
job() {
    name=$1; field=$2; shift 2
    line=$(fio --minimal --name=job --filename="$disk" --direct=1 --ioengine=libaio \
        --time_based --runtime="$seconds" "$@" | grep '^3;' | cut -d';' -f"$field")
    echo "$name=$line"
}
job 'random reads, depth 1' 8 --rw=randread --bs=4k --iodepth=1
job 'random reads, depth 32' 8 --rw=randread --bs=4k --iodepth=32
job 'random writes, depth 1' 49 --rw=randwrite --bs=4k --iodepth=1
job 'random writes, depth 32' 49 --rw=randwrite --bs=4k --iodepth=32
job 'reads of 1 MiB' 7 --rw=read --bs=1M --iodepth=4
job 'writes of 1 MiB' 48 --rw=write --bs=1M --iodepth=4
"#;

/// Prints them for each of [`LINK_MEASURES`].
const LINK_WORK: &str = r#"
echo "to the host=$(iperf3 -f m -t 2 -c "$GATEWAY" | awk '/receiver/ { print $7 }')"
echo "from the host=$(iperf3 -f m -t 2 -R -c "$GATEWAY" | awk '/receiver/ { print $7 }')"
echo "round trip=$(ping -q -A -c 200 "$GATEWAY" | awk -F/ '/^rtt/ { print $5 }')"
"#;

/// One line of the table.
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) more_is_better: bool,
}

const fn more(name: &'static str, unit: &'static str) -> Measure {
    Measure { name, unit, more_is_better: true }
}

/// What a disk is worth.
pub(crate) const DISK_MEASURES: [Measure; 6] = [
    more("random reads, depth 1", "IOPS"),
    more("random reads, depth 32", "IOPS"),
    more("random writes, depth 1", "IOPS"),
    more("random writes, depth 32", "IOPS"),
    more("reads of 1 MiB", "KiB/s"),
    more("writes of 1 MiB", "KiB/s"),
];

/// What a way to the host is worth.
pub(crate) const LINK_MEASURES: [Measure; 3] = [
    more("to the host", "Mbit/s"),
    more("from the host", "Mbit/s"),
    Measure { name: "round trip", unit: "ms", more_is_better: false },
];

/// Figures of one subject, by the names of its measures.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// A guest to be: what does not differ between subjects.
pub(crate) struct Guest {
    /// EROFS with what the work needs.
    pub(crate) root: PathBuf,
    /// Its other disk, whose serial is [`DATA`].
    pub(crate) disk: Option<PathBuf>,
    /// The device of the host that it is lent, as sysfs lists it.
    pub(crate) lent: Option<PathBuf>,
}

/// What a guest does.
#[derive(Clone, Copy)]
pub(crate) enum Task {
    /// [`DISK_MEASURES`] of its own disk, and [`LINK_MEASURES`].
    Own(Link),
    /// [`DISK_MEASURES`] of the disk that it is lent.
    Lent,
    /// Waits for memory.
    Wait,
}

impl Task {
    pub(crate) fn script(self) -> String {
        match self {
            Self::Own(_) => [OWN_DISK, DISK_WORK, LINK_WORK].concat(),
            Self::Lent => [LENT_DISK, DISK_WORK].concat(),
            Self::Wait => "echo ready; sleep 1000".to_owned(),
        }
    }

    fn link(self) -> Option<Link> {
        match self {
            Self::Own(link) => Some(link),
            Self::Lent | Self::Wait => None,
        }
    }
}

/// Its way to the host.
#[derive(Clone, Copy)]
pub(crate) struct Link {
    /// The host's interface.
    pub(crate) tap: &'static str,
    /// The number of its subnet.
    pub(crate) subnet: u8,
}

impl Link {
    fn address(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 98, self.subnet, host)
    }

    /// Gives the interface, which is there, the host's address.
    pub(crate) fn set_up(self) {
        let address = format!("{}/24", self.address(1));
        ip(&["address", "replace", &address, "dev", self.tap]);
        ip(&["link", "set", self.tap, "up"]);
    }
}

pub(crate) fn ip(args: &[&str]) {
    assert!(Command::new("ip").args(args).status().unwrap().success(), "ip {args:?}");
}

/// Initramfs for a guest that does `task`. Its root is the first disk.
pub(crate) fn initramfs(task: Task) -> Vec<u8> {
    let agent = fs::read(root().join("target/agent/ovum-agent")).unwrap();
    let link = task.link();
    let mut env = vec![("PATH".to_owned(), "/usr/sbin:/usr/bin:/sbin:/bin".to_owned())];
    env.extend(link.map(|link| ("GATEWAY".to_owned(), link.address(1).to_string())));
    let config = GuestConfig {
        version: VERSION,
        hostname: "bench".to_owned(),
        root_device: "/dev/vda".to_owned(),
        overlay_device: None,
        network: link.map(|link| GuestNetwork {
            address: link.address(2),
            prefix: 24,
            gateway: link.address(1),
            dns: Vec::new(),
        }),
        argv: ["bash", "-c", &task.script()].map(str::to_owned).to_vec(),
        env,
        working_dir: "/".to_owned(),
        listen: false,
        realtime_ns: 0,
        volumes: Vec::new(),
        kernel_headers: false,
        memory_watch: None,
    };
    let (base, own) = (Archive::base(&agent).unwrap(), Archive::config(&config).unwrap());
    [base.bytes(), own.bytes()].concat()
}

/// The guest kernel.
pub(crate) fn kernel() -> PathBuf {
    root().join("target/kernel/vmlinux")
}

/// What was said by who did the work, as figures.
pub(crate) fn figures<'m>(said: &str, measures: impl IntoIterator<Item = &'m Measure>) -> Figures {
    let figure = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let figure = line.and_then(|text| text.trim().parse().ok());
        figure.unwrap_or_else(|| panic!("{name} is not there: {said}"))
    };
    measures.into_iter().map(|measure| (measure.name, figure(measure.name))).collect()
}

/// Where a file of the bench lies: on the emulated host's disk, which has a real file system.
pub(crate) fn file(name: &str) -> PathBuf {
    Path::new("/var/lib/ovum").join(format!("bench-{name}"))
}

/// Opens a file of a guest.
pub(crate) fn open(path: &Path, write: bool) -> File {
    File::options().read(true).write(write).open(path).unwrap()
}
