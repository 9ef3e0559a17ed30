//! What something costs: exits of the guest, and time on a CPU by process.

use std::collections::BTreeMap;
use std::fs;
use std::process;

use ovum_test_host::{kvm_counter, worker_pids};

/// KVM's counters that are shown, and what for.
const COUNTERS: [(&str, &str); 6] = [
    ("exits", "exits"),
    ("io_exits", "to ports"),
    ("mmio_exits", "to registers"),
    ("halt_exits", "to rest"),
    ("irq_injections", "interrupts"),
    ("pf_taken", "page faults"),
];

/// Counters at a moment, or between two.
pub(crate) struct Cost {
    counts: BTreeMap<String, u64>,
}

impl Cost {
    pub(crate) fn now() -> Self {
        let mut counts = BTreeMap::new();
        for (file, name) in COUNTERS {
            counts.insert(name.to_owned(), kvm_counter(file));
        }
        for pid in worker_pids() {
            add_threads(pid, "worker", &mut counts);
        }
        for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains("ovum\0serve") {
                let pid = entry.file_name().to_string_lossy().parse().unwrap_or(0);
                add_threads(pid, "server", &mut counts);
            }
        }
        add_threads(process::id(), "client", &mut counts);
        Self { counts }
    }

    pub(crate) fn since(before: &Self) -> Self {
        let mut counts = Self::now().counts;
        for (name, count) in &mut counts {
            *count = count.saturating_sub(before.counts.get(name).copied().unwrap_or(0));
        }
        Self { counts }
    }

    /// Prints it for one of `times` that all of it was for.
    pub(crate) fn print(&self, times: u32) {
        let each = self.counts.iter().map(|(name, count)| {
            #[expect(clippy::cast_precision_loss, reason = "counts of a bench")]
            let each = *count as f64 / f64::from(times);
            format!("{name} {each:.1}")
        });
        println!("  each: {}", each.collect::<Vec<_>>().join(", "));
    }
}

fn add_threads(pid: u32, process: &str, counts: &mut BTreeMap<String, u64>) {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for thread in threads {
        let read = |file| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let name = if process == "worker" {
            format!("{process} {}", read("comm").trim())
        } else {
            process.to_owned()
        };
        let text = read("schedstat");
        let mut words = text.split(' ').map(|word| word.trim().parse::<u64>().unwrap_or(0));
        *counts.entry(format!("{name} us")).or_default() += words.next().unwrap_or(0) / 1000;
        *counts.entry(format!("{name} slices")).or_default() += words.nth(1).unwrap_or(0);
    }
}
