//! What a boot costs in counts, which are the same on every machine, each with a ceiling: nobody
//! makes boots dearer without saying so here.

use std::fs;
use std::path::Path;

use ovum_test_host::{BUSYBOX, TestHost, kvm_counter, root};
use serde_json::json;

use crate::cases;

cases![a_boot_costs_no_more_exits_than_it_did, what_is_loaded_has_not_grown];

/// Exits that the guest waits for, from its first instruction to the workload's first output, on
/// one vCPU.
const EXITS_MAX: [(&str, u64, &str); 2] = [
    ("io_exits", 12, "reports of the agent, and the ports at which the kernel looks for a PC"),
    (
        "mmio_exits",
        520,
        "registers of virtio devices: found once, then one for each interrupt; three of each \
         vacant slot",
    ),
];

/// Bytes of what is started or copied for each boot.
const BYTES_MAX: [(&str, u64, &str); 3] = [
    ("target/release/ovum", 20 << 20, "a worker is this program, and touches as little of it"),
    ("target/agent/ovum-agent", 1280 << 10, "it is copied into each guest and unpacked there"),
    ("target/kernel/vmlinux", 20 << 20, "its segments are copied into each guest"),
];

/// Functions that the kernel calls one after the other as it starts.
const INITCALLS_MAX: u64 = 460;

async fn a_boot_costs_no_more_exits_than_it_did(host: &TestHost) {
    let server = &host.server;
    server
        .create(json!({
            "name": "counted", "image": BUSYBOX, "size": "128MB", "vcpus": 1,
            "cmd": ["sh", "-c", "echo first; exec sleep 1000"],
        }))
        .await;
    server.follow_until("counted", "first").await;

    let counted = EXITS_MAX.map(|(counter, max, why)| (counter, kvm_counter(counter), max, why));

    server.delete("counted").await;
    for (counter, count, max, why) in counted {
        println!("{counter}: {count} of at most {max}");
        assert!(count > 0, "{counter} does not count: is another guest's end in the way?");
        assert!(count <= max, "{counter}: {count}, {max} allowed: {why}");
    }
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
