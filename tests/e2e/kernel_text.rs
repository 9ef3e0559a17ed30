//! The kernel's text, which the first guest of a server patches for all later ones.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ovum_test_host::mappings::Mapping;
use ovum_test_host::{BUSYBOX, Server, TestHost, only_worker, worker_pids};

use crate::cases;
use crate::ceilings::{self, MEMORY_MIB};

cases![
    a_later_guest_has_the_text_of_one_that_patched_its_own,
    a_later_guest_writes_to_its_text_in_one_place_only,
    no_text_outlives_its_server,
];

/// Where a guest has its kernel, and how much of it is text: the link map of the kernel.
const TEXT_START: u64 = 16 << 20;
const TEXT_BYTES: usize = 10 << 20;

/// All but the last two megabytes of it, in which each boot writes where static calls lead
/// (`static-calls.patch`): what it does not write to stays in the huge pages that guests share.
const UNWRITTEN_KIB: f64 = 8.0 * 1024.0;

const PAGE_BYTES: usize = 4096;

/// The text of the only guest, and whether it is mapped.
fn text() -> (Vec<u8>, bool) {
    let worker = only_worker();
    let mappings = Mapping::all_of(worker);
    let mapped = mappings.iter().find(|mapping| mapping.is_kernel_text);
    let guest = mappings.iter().find(|mapping| mapping.bytes() >= u64::from(MEMORY_MIB) << 20);
    let start = match mapped {
        Some(text) => text.range.start,
        None => guest.expect("guest memory is in one piece").range.start + TEXT_START,
    };
    let mut bytes = vec![0; TEXT_BYTES];
    let memory = File::open(format!("/proc/{worker}/mem")).unwrap();
    memory.read_exact_at(&mut bytes, start).unwrap();
    (bytes, mapped.is_some())
}

/// What a guest of so many vCPUs says its kernel does against its processor's flaws, its text, and
/// whether that is mapped.
async fn boot(server: &Server, vcpus: u8) -> (String, Vec<u8>, bool) {
    ceilings::boot(server, "text", vcpus).await;
    let (text, is_mapped) = text();
    let script = "grep . /sys/devices/system/cpu/vulnerabilities/*; dmesg | grep Unpatched; true";
    let says = server.sh("text", script).await;
    server.delete("text").await;
    (String::from_utf8(says.output).unwrap(), text, is_mapped)
}

async fn a_later_guest_has_the_text_of_one_that_patched_its_own(_: &TestHost) {
    // One of its own: that of all cases has had its first guest.
    let mut server = Server::start("texts").await;
    server.pull_to_the_end(BUSYBOX).await;
    for vcpus in [1, 2] {
        let (said, own, is_mapped) = boot(&server, vcpus).await;
        assert!(!is_mapped, "no guest was there before it");
        assert!(said.contains("Mitigation"), "{said}");
        assert!(!said.contains("Unpatched return thunk"), "{said}");

        let (later_said, later, is_mapped) = boot(&server, vcpus).await;
        assert!(is_mapped, "it patched its own");
        assert_eq!(later_said, said);
        let pages = own.chunks(PAGE_BYTES).zip(later.chunks(PAGE_BYTES));
        let different: Vec<_> = pages
            .enumerate()
            .filter(|(_, (own, later))| own != later)
            .map(|(nth, _)| nth)
            .collect();
        assert!(different.is_empty(), "pages of text that differ: {different:?}");
    }
    server.kill();
}

async fn a_later_guest_writes_to_its_text_in_one_place_only(_: &TestHost) {
    let mut server = Server::start("texts-huge").await;
    server.pull_to_the_end(BUSYBOX).await;
    for vcpus in [1, 2] {
        // The first one's text is gathered when it is seen at the start of the second.
        boot(&server, vcpus).await;
        boot(&server, vcpus).await;
        ceilings::boot(&server, "later", vcpus).await;

        let mappings = Mapping::all_of(worker_pids()[0]);

        let huge = mappings.iter().filter(|mapping| mapping.is_kernel_text);
        let huge_kib: f64 = huge.map(|mapping| mapping.huge_kib).sum();
        assert!(huge_kib >= UNWRITTEN_KIB, "{huge_kib} KiB are in huge pages: {mappings:?}");
        server.delete("later").await;
    }
    server.kill();
}

async fn no_text_outlives_its_server(_: &TestHost) {
    let mut server = Server::start("texts-killed").await;
    server.pull_to_the_end(BUSYBOX).await;
    let data_dir = server.data_dir.clone();
    boot(&server, 1).await;
    server.kill();

    let mut server = Server::start_at(&data_dir).await;

    assert!(!boot(&server, 1).await.2, "the first guest after a restart patches its own");
    assert!(boot(&server, 1).await.2);
    server.kill();
}
