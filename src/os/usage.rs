//! What a process costs the host, by what /proc says.

use std::fs;
use std::io;
use std::time::Duration;

use crate::os::PAGE_BYTES;
use crate::os::spawn::Identity;

/// Length of a clock tick in /proc: USER_HZ is 100 on every x86-64 kernel.
const TICK: Duration = Duration::from_millis(10);

// Places among the fields after the name in /proc/PID/stat (proc_pid_stat(5): 14th, 15th, 23rd and
// 24th of all, the name being the 2nd).
const UTIME: usize = 11;
const STIME: usize = 12;
const VSIZE: usize = 20;
const RSS: usize = 21;

/// What a process has cost so far, and costs now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time of all its threads, guest code included.
    pub cpu: Duration,
    /// Memory it has touched.
    pub resident_bytes: u64,
    /// Memory it has mapped.
    pub virtual_bytes: u64,
}

/// The host's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total_bytes: u64,
    /// What could be used without swapping.
    pub available_bytes: u64,
}

impl HostMemory {
    /// As it is now.
    ///
    /// # Errors
    ///
    /// What /proc says.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/meminfo")?).unwrap_or_default())
    }

    fn parse(meminfo: &str) -> Option<Self> {
        let bytes = |name: &str| {
            let value = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
        };
        let (total_bytes, available_bytes) = (bytes("MemTotal:")?, bytes("MemAvailable:")?);
        Some(Self { total_bytes, available_bytes })
    }
}

impl Usage {
    /// Of the process that is `identity`; `None` if it has ended.
    ///
    /// # Errors
    ///
    /// What /proc says, other than that there is no such process.
    pub fn of(identity: &Identity) -> io::Result<Option<Self>> {
        let pid = identity.pid;
        let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // The number is still the same process's, or it was not when it was read.
        match Identity::of(pid) {
            Ok(found) if found == *identity => Ok(Self::parse(&stat)),
            Ok(_another) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parse(stat: &str) -> Option<Self> {
        let (_, fields) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let field = |place: usize| fields.get(place)?.trim().parse::<u64>().ok();
        let ticks = field(UTIME)?.saturating_add(field(STIME)?);
        Some(Self {
            cpu: TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX)),
            resident_bytes: field(RSS)?.saturating_mul(PAGE_BYTES),
            virtual_bytes: field(VSIZE)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn fields_are_counted_behind_a_name_that_can_be_anything() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 99 8192 3 0\n";

        let usage = Usage::parse(stat).unwrap();

        assert_eq!(usage.cpu, Duration::from_secs(2));
        assert_eq!((usage.virtual_bytes, usage.resident_bytes), (8192, 3 * 4096));
        assert_eq!(Usage::parse("7 (a) S 1"), None);
    }

    #[test]
    fn the_hosts_memory_is_what_it_says() {
        let meminfo = "MemTotal:       16 kB\nMemFree:        1 kB\nMemAvailable:   12 kB\n";

        let memory = HostMemory::parse(meminfo).unwrap();

        assert_eq!((memory.total_bytes, memory.available_bytes), (16 << 10, 12 << 10));
        assert_eq!(HostMemory::parse("MemTotal: 16 kB\n"), None);
        assert!(HostMemory::read().unwrap().total_bytes > 0);
    }

    #[test]
    fn a_process_that_runs_has_memory() {
        let own = Identity::of(process::id()).unwrap();

        let usage = Usage::of(&own).unwrap().unwrap();

        assert!(usage.resident_bytes > 0 && usage.virtual_bytes >= usage.resident_bytes);
    }
}
