//! What this host has: processors, memory, disk, how much of that disk a folder takes, and how fast
//! the network is.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

use rustix::fs::statvfs;

/// Unit of `st_blocks` (stat(2)).
const BLOCK_BYTES: u64 = 512;

/// Processors that this process may use.
pub fn processors() -> u64 {
    thread::available_parallelism().map_or(1, |processors| processors.get() as u64)
}

/// Memory, in bytes, as the kernel counts it.
pub fn memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// Size of the file system that `folder` is on, in bytes; `None` if it does not say.
pub fn disk_bytes(folder: &Path) -> Option<u64> {
    statvfs(folder).ok().map(|stat| stat.f_blocks.saturating_mul(stat.f_frsize))
}

/// Bytes per second of the link that leads to everywhere else; `None` if there is none, or if it
/// does not say, as virtual ones do not.
pub fn uplink_bps() -> Option<u64> {
    let routes = fs::read_to_string("/proc/net/route").ok()?;
    let speed = Path::new("/sys/class/net").join(uplink(&routes)?).join("speed");
    // In Mbit/s, or -1 (Documentation/ABI/testing/sysfs-class-net).
    let mbps = fs::read_to_string(speed).ok()?.trim().parse::<u64>().ok()?;
    (mbps > 0).then(|| mbps.saturating_mul(1_000_000 / 8))
}

/// The interface of the best default route in /proc/net/route.
fn uplink(routes: &str) -> Option<&str> {
    let best = routes.lines().filter_map(default_route).min_by_key(|(metric, _)| *metric);
    best.map(|(_, interface)| interface)
}

/// Metric and interface, if the line is a default route.
fn default_route(line: &str) -> Option<(u32, &str)> {
    let mut words = line.split_ascii_whitespace();
    let (interface, destination) = (words.next()?, words.next()?);
    // Behind the gateway, the flags and two counters of use.
    let (metric, mask) = (words.nth(4)?.parse().ok()?, words.next()?);
    (destination == "00000000" && mask == "00000000").then_some((metric, interface))
}

/// Bytes of disk that everything in `folder` takes. What cannot be read counts nothing, for it may
/// be about to go.
pub fn used_bytes(folder: &Path) -> u64 {
    let mut folders = vec![folder.to_owned()];
    let mut bytes = 0_u64;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            // Of a link itself, not of what it leads to.
            let Ok(metadata) = entry.metadata() else { continue };
            bytes = bytes.saturating_add(metadata.blocks().saturating_mul(BLOCK_BYTES));
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_something() {
        assert!(processors() >= 1);
        assert!(memory_bytes() > 64 << 20);
        assert!(disk_bytes(Path::new("/")).unwrap() > 0);
    }

    #[test]
    fn the_uplink_is_where_the_best_default_route_leads() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\n\
            wlan0\t00000000\t010200C0\t0003\t0\t0\t600\t00000000\t0\n\
            eth1\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\n\
            vpn\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\n\
            br0\t0000640A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\n";

        assert_eq!(uplink(table), Some("eth1"));
        assert_eq!(uplink("br0\t0000640A\t0\t1\t0\t0\t0\t0000FFFF\neth0\t00000000"), None);
    }

    #[test]
    fn holes_take_nothing_and_neither_does_what_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let file = fs::File::create(dir.path().join("sub/file")).unwrap();
        file.set_len(1 << 40).unwrap();
        fs::write(dir.path().join("sub/data"), vec![1; 1 << 20]).unwrap();

        let bytes = used_bytes(dir.path());

        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
        assert_eq!(used_bytes(&dir.path().join("none")), 0);
    }
}
