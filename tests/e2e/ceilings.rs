//! What a boot costs in counts, which are the same on every machine, each with a ceiling: nobody
//! makes boots dearer without saying so here.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ovum_test_host::resident::Resident;
use ovum_test_host::{BUSYBOX, Server, TestHost, kvm_counter, only_worker, root};
use serde_json::json;
use tokio::time;

use crate::cases;

cases![
    a_boot_costs_no_more_exits_than_it_did,
    a_boot_asks_no_more_of_the_host_than_it_did,
    an_idle_worker_is_small,
    an_idle_guest_sleeps,
    a_large_guest_sets_nothing_aside_and_stops_nobody,
    what_is_loaded_has_not_grown
];

/// Exits that the guest waits for, from its first instruction to the workload's first output, on
/// one vCPU.
const EXITS_MAX: [(&str, u64, &str); 2] = [
    ("io_exits", 12, "reports of the agent, and the ports at which the kernel looks for a PC"),
    (
        "mmio_exits",
        160,
        "what is written to registers of virtio devices as each is set up; reads are none, and an \
         interrupt is heard without",
    ),
];

/// Events of the host's kernel in a worker's threads, which of them, what of each is added up, how
/// much that may be from its start to its workload's first output, and why it is as much as it is.
/// A timer's are left out: there are more the longer a boot takes.
const EVENTS_MAX: [(&str, &str, &str, u64, &str); 6] = [
    ("kvm/kvm_cpuid", "", HITS, 225, "the kernel looks for what it may use, as each program does"),
    ("kvm/kvm_msr", "ecx != 0x6e0 && ecx != 0x80b", HITS, 100, "the local APIC's, each once"),
    (
        "kvm/kvm_mmio",
        "gpa >= 0xfec00000 && gpa < 0xfec01000",
        HITS,
        120,
        "the I/O APIC: two for each pin, and some for each that is used; a read counts twice",
    ),
    (
        "kvm/kvm_page_fault",
        // Below the end of its memory: devices are above.
        "fault_address < 0x8000000",
        HITS,
        50,
        "memory that the guest touches first, by two megabytes where it can be, its text too",
    ),
    (
        "raw_syscalls/sys_enter",
        "",
        HITS,
        800,
        "to build a machine, to enter it again after each exit, and for what its devices move",
    ),
    (
        "syscalls/sys_exit_read",
        "ret > 0",
        "ret",
        6 << 20,
        "bytes copied into the guest before it starts: the agent, and the kernel but for its text",
    ),
];

/// How often an event was, among what can be added up of it.
const HITS: &str = "hitcount";

/// Most memory of an idle worker outside its guest's, in MiB: what it has of its own, a third of
/// that being addresses that the loader filled in, and what it runs to wait.
const IDLE_MIB_MAX: f64 = 4.0;

/// How long a worker has to become idle.
const IDLE_PATIENCE: Duration = Duration::from_secs(30);

/// How often a guest that does nothing wakes in [`SLEEP`], which is twice for most of what it does:
/// its kernel looks every two seconds who had to wait, every five for what is to be written, and
/// gets random numbers in its first minute.
const IDLE_WAKES_MAX: u64 = 70;

/// How long that is counted, and how long after the boot it begins.
const SLEEP: Duration = Duration::from_secs(10);

/// What the kernel of a guest of four GiB may keep of them, in KiB: 64 bytes of each 4,096, its
/// program, and tables whose sizes are by the memory. Buffers for devices that reach only what is
/// low, which no guest without a device of the host has, would be 64 MiB more.
const KEPT_KIB_MAX: u64 = 100 << 10;

/// Bytes of what is started or copied for each boot.
const BYTES_MAX: [(&str, u64, &str); 3] = [
    ("target/release/ovum", 20 << 20, "a worker is this program, and touches as little of it"),
    ("target/agent/ovum-agent", 1280 << 10, "it is copied into each guest and unpacked there"),
    ("target/kernel/vmlinux", 20 << 20, "its segments are copied into each guest"),
];

/// Functions that the kernel calls one after the other as it starts.
const INITCALLS_MAX: u64 = 460;

/// Memory of the guest that is booted.
pub(crate) const MEMORY_MIB: u32 = 128;

/// Boots a guest of so many vCPUs, until its workload has spoken.
pub(crate) async fn boot(server: &Server, name: &str, vcpus: u8) {
    server
        .create(json!({
            "name": name, "image": BUSYBOX, "size": format!("{MEMORY_MIB}MB"), "vcpus": vcpus,
            "cmd": ["sh", "-c", "echo first; exec sleep 1000"],
        }))
        .await;
    server.follow_until(name, "first").await;
}

async fn a_boot_costs_no_more_exits_than_it_did(host: &TestHost) {
    boot(&host.server, "counted", 1).await;

    let counted = EXITS_MAX.map(|(counter, max, why)| (counter, kvm_counter(counter), max, why));

    host.server.delete("counted").await;
    for (counter, count, max, why) in counted {
        println!("{counter}: {count} of at most {max}");
        assert!(count > 0, "{counter} does not count: is another guest's end in the way?");
        assert!(count <= max, "{counter}: {count}, {max} allowed: {why}");
    }
}

async fn a_boot_asks_no_more_of_the_host_than_it_did(host: &TestHost) {
    // Not the first of its kind, which patches its kernel for all others.
    boot(&host.server, "first", 1).await;
    host.server.delete("first").await;
    let tallies = EVENTS_MAX.map(|(event, filter, what, ..)| Tally::begin(event, filter, what));
    boot(&host.server, "tallied", 1).await;

    let worker = only_worker();
    let counts: Vec<_> = tallies.iter().map(|tally| tally.of(worker)).collect();

    host.server.delete("tallied").await;
    for ((event, _, _, max, why), count) in EVENTS_MAX.into_iter().zip(counts) {
        println!("{event}: {count} of at most {max}");
        assert!(count > 0, "{event} was not counted");
        assert!(count <= max, "{event}: {count}, {max} allowed: {why}");
    }
}

async fn an_idle_worker_is_small(host: &TestHost) {
    boot(&host.server, "idle", 1).await;

    let worker = only_worker();
    let deadline = Instant::now() + IDLE_PATIENCE;
    let mut resident = Resident::of(worker, MEMORY_MIB);
    while resident.mib > IDLE_MIB_MAX && Instant::now() < deadline {
        time::sleep(Duration::from_millis(200)).await;
        resident = Resident::of(worker, MEMORY_MIB);
    }

    host.server.delete("idle").await;
    println!("{resident:?} of at most {IDLE_MIB_MAX}");
    assert!(resident.own_mib > 0.1, "nothing was measured");
    assert!(resident.mib <= IDLE_MIB_MAX, "{resident:?}, {IDLE_MIB_MAX} allowed");
}

async fn an_idle_guest_sleeps(host: &TestHost) {
    boot(&host.server, "asleep", 1).await;
    let worker = only_worker();
    time::sleep(SLEEP).await;

    let tally = Tally::begin("kvm/kvm_vcpu_wakeup", "", HITS);
    time::sleep(SLEEP).await;
    let wakes = tally.of(worker);

    host.server.delete("asleep").await;
    println!("an idle guest woke {wakes} times of at most {IDLE_WAKES_MAX}");
    assert!(wakes > 0, "nothing was counted");
    assert!(wakes <= IDLE_WAKES_MAX, "it woke {wakes} times, {IDLE_WAKES_MAX} allowed");
}

/// Where the kernel counts its events (Documentation/trace/histogram.rst).
const EVENTS: &str = "/sys/kernel/debug/tracing/events";

/// An event that the kernel counts, for each thread, until this is dropped.
struct Tally {
    event: &'static str,
    /// What of it is added up.
    what: &'static str,
    trigger: String,
}

impl Tally {
    fn begin(event: &'static str, filter: &str, what: &'static str) -> Self {
        let condition = if filter.is_empty() { String::new() } else { format!(" if {filter}") };
        let trigger = format!("hist:keys=common_pid:vals={what}{condition}");
        let tally = Self { event, what, trigger };
        fs::write(tally.file("trigger"), &tally.trigger).expect("the host's kernel counts events");
        tally
    }

    /// How much it was in all threads of this process.
    fn of(&self, pid: u32) -> u64 {
        let counts = fs::read_to_string(self.file("hist")).expect("it is being counted");
        let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
        let threads: Vec<_> = threads.flatten().map(|thread| thread.file_name()).collect();
        let name = format!("{}:", self.what);
        let count = |line: &str| {
            let line = line.strip_prefix("{ common_pid:")?;
            let (thread, counts) = line.split_once('}')?;
            let is_its = threads.iter().any(|its| its == thread.trim());
            let count = counts.split_whitespace().skip_while(|word| *word != name).nth(1)?;
            is_its.then(|| count.parse::<u64>().expect("a count is a number"))
        };
        counts.lines().filter_map(count).sum()
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(EVENTS).join(self.event).join(name)
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        let _ = fs::write(self.file("trigger"), format!("!{}", self.trigger));
    }
}

/// It begins with the clock of KVM: to change to that, all its processors would stand still, and on
/// a busy host each waits for the last.
async fn a_large_guest_sets_nothing_aside_and_stops_nobody(host: &TestHost) {
    let script =
        "dmesg | grep 'Memory:\\|Switched to clocksource kvm'; nproc; grep MemTotal /proc/meminfo";
    let body = json!({
        "name": "large", "image": BUSYBOX, "size": "4GB", "vcpus": 8, "cmd": ["sh", "-c", script],
    });

    let (said, _) = host.server.run_body(body).await;

    let lines: Vec<&str> = said.lines().collect();
    let [told, "8", total] = lines[..] else { panic!("{said}") };
    assert!(told.contains("Memory:"), "the kernel tells of its memory, and of no change: {told}");
    let total = total.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    let kept_kib = (4 << 20) - total.expect("a number of KiB");
    println!("its kernel keeps {kept_kib} KiB of at most {KEPT_KIB_MAX}");
    assert!(kept_kib <= KEPT_KIB_MAX, "{kept_kib} KiB, {KEPT_KIB_MAX} allowed");
}

async fn what_is_loaded_has_not_grown(_: &TestHost) {
    for (path, max, why) in BYTES_MAX {
        let bytes = fs::metadata(root().join(path)).expect("it is built").len();
        println!("{path}: {bytes} of at most {max} bytes");
        assert!(bytes <= max, "{path}: {bytes} bytes, {max} allowed: {why}");
    }
    let initcalls = initcalls(&root().join("target/kernel/System.map"));
    println!("initcalls: {initcalls} of at most {INITCALLS_MAX}");
    assert!(initcalls <= INITCALLS_MAX, "{initcalls} initcalls, {INITCALLS_MAX} allowed");
}

/// The kernel's table of them has an offset of four bytes for each.
fn initcalls(map: &Path) -> u64 {
    let map = fs::read_to_string(map).expect("the kernel's build leaves it");
    let address = |symbol: &str| {
        let line = map.lines().find(|line| line.split(' ').nth(2) == Some(symbol));
        let hex = line.and_then(|line| line.split(' ').next()).expect("every kernel has it");
        u64::from_str_radix(hex, 16).expect("an address is hex")
    };
    (address("__initcall_end") - address("__initcall_start")) / 4
}
