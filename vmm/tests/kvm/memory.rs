//! Memory that comes and goes, as the guest has it and as the host counts it.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ovum_vmm::machine::StopReason;

use crate::guest::{GuestSpec, guest};

const MIB: u64 = 1 << 20;

/// What the machine has of the host's memory: it lives in this process.
fn resident_mib() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096 / MIB
}

/// A script that says `word` when all of the guest's memory is so many MiB, by `test`.
fn when_total_is(test: &str, word: &str) -> String {
    format!(
        "while ! [ $(awk '/MemTotal/ {{print int($2 / 1024)}}' /proc/meminfo) {test} ]; do
             sleep 0.1
         done
         echo {word}\n"
    )
}

/// As much as the guest's policy keeps movable: what its kernel uses can stay.
#[test]
fn memory_is_added_used_and_taken_away_again() {
    // More than it booted with, so that some of it lies in what was added.
    let pattern = "for i in $(seq 150); do cat /piece; done";
    let script = format!(
        "head -c 1048576 /dev/urandom > /piece; echo ready
        {}
        mkdir /t; mount -t tmpfs -o size=200m none /t
        {pattern} | md5sum; {pattern} > /t/f; md5sum < /t/f; echo written
        sleep 1; rm /t/f; echo freed
        {}
        while :; do sleep 1; done",
        when_total_is("-gt 330", "grown"),
        when_total_is("-lt 130", "shrunk"),
    );
    let mut guest = guest(&script).hotplug_mib(256).boot();
    guest.says("ready");
    assert_eq!(guest.machine.plugged_bytes(), 0);

    guest.machine.resize_hotplug(256 * MIB).unwrap();
    guest.says("grown");
    assert_eq!(guest.machine.plugged_bytes(), 256 * MIB);
    let [first, second] = guest.lines_until("written");
    assert_eq!(first, second, "what was written is read back");
    let used = resident_mib();
    assert!(used > 150, "{used} MiB");

    guest.says("freed");
    guest.machine.resize_hotplug(0).unwrap();
    guest.says("shrunk");
    guest.until("unplugged", |machine| machine.plugged_bytes() == 0);
    let left = resident_mib();
    assert!(left + 130 < used, "{left} of {used} MiB are left");
}

/// Nobody told the guest of the region's memory, and there is none: a program that goes there all
/// the same finds an address without a device.
#[test]
fn memory_that_is_not_plugged_is_not_there() {
    let script = "devmem 0x100000000 32; devmem 0x100000000 32 7; devmem 0x100000000 32";
    // The driver would keep the program away from the region.
    let no_driver = "initcall_blacklist=virtio_mem_driver_init";

    let (reason, said) = guest(script).hotplug_mib(128).cmdline(no_driver).boot().end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert_eq!(said, "0xFFFFFFFF\n0xFFFFFFFF\n");
}

#[test]
fn more_memory_than_was_set_aside_cannot_be_had() {
    let with = guest("echo ready; while :; do sleep 1; done").hotplug_mib(128).boot();
    for bytes in [130 * MIB, MIB, u64::MAX] {
        let refused = with.machine.resize_hotplug(bytes).unwrap_err().to_string();
        assert!(refused.contains("134217728"), "{refused}");
    }
    let without = guest("echo ready").boot();
    assert!(without.machine.resize_hotplug(2 * MIB).is_err());
    without.machine.resize_hotplug(0).unwrap();
}

/// Within seconds and without being asked.
#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    let script = "mkdir /t; mount -t tmpfs -o size=300m none /t
        head -c 209715200 /dev/zero > /t/f; echo filled
        sleep 1; rm /t/f; echo freed; while :; do sleep 1; done";
    let mut guest = guest(script).memory_mib(512).balloon().boot();
    guest.says("filled");
    let filled = resident_mib();
    assert!(filled > 200, "{filled} MiB");

    guest.says("freed");

    guest.until("returned", |_| resident_mib() + 180 < filled);
}

#[test]
fn memory_that_the_host_asks_for_is_given_and_given_back() {
    let script = "echo ready; while :; do sleep 1; done";
    let mut guest = guest(script).memory_mib(256).balloon().boot();
    guest.says("ready");

    let balloon = guest.machine.balloon().unwrap().clone();
    balloon.inflate(64 * MIB);
    guest.until("inflated", |_| balloon.given_bytes() == 64 * MIB);
    balloon.inflate(0);
    guest.until("deflated", |_| balloon.given_bytes() == 0);
}

/// Every guest has a balloon, so a boot must not notice it. What is counted is the same each time;
/// what is timed is for people to read, for the machine under the test may be busy.
#[test]
fn a_balloon_costs_a_boot_next_to_nothing() {
    let boot = |spec: GuestSpec| {
        let begin = Instant::now();
        let mut guest = spec.boot();
        assert_eq!(guest.end().0, StopReason::PowerOff);
        let exits = guest.machine.exits();
        let registers =
            exits.mmio_reads.load(Ordering::Relaxed) + exits.mmio_writes.load(Ordering::Relaxed);
        (registers, begin.elapsed())
    };

    let mut times: [Vec<Duration>; 2] = [Vec::new(), Vec::new()];
    let mut registers = [0, 0];
    for _ in 0..5 {
        for (index, spec) in [guest(""), guest("").balloon()].into_iter().enumerate() {
            let (count, time) = boot(spec);
            registers[index] = count;
            times[index].push(time);
        }
    }

    times.iter_mut().for_each(|times| times.sort_unstable());
    println!("register accesses {registers:?}, medians {:?}", times.map(|times| times[2]));
    assert!(registers[1] - registers[0] < 100, "{registers:?}");
}
