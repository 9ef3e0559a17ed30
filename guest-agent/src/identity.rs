//! Who the guest is: its name, its address, its time.
//!
//! None of this can fail a boot. What is refused is said on the console.

use std::fs;
use std::io::ErrorKind;

use ovum_agent_proto::config::GuestConfig;
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec};
use rustix::{system, time};

use crate::{console, network};

const NS_PER_S: i128 = 1_000_000_000;

/// How far behind what it should be a clock may be.
const BEHIND_NS_MAX: i128 = NS_PER_S;

/// How far ahead of it: the configuration was written before the machine was built, which takes
/// long where many are.
const AHEAD_NS_MAX: i128 = 60 * NS_PER_S;

/// Gives the guest its identity.
pub(crate) fn assume(config: &GuestConfig) {
    let steps = [
        ("host name", system::sethostname(config.hostname.as_bytes())),
        ("network", network::connect(config.network.as_ref())),
        ("clock", set_clock(config.realtime_ns)),
    ];
    for (what, done) in steps {
        if let Err(errno) = done {
            console::say(format_args!("{what} is not set: {errno}"));
        }
    }
    name_files(&config.hostname);
    if let Some(network) = &config.network {
        network::name_servers(network);
    }
}

/// Writes /etc/hostname, and /etc/hosts if the image has none: programs look up their own name.
fn name_files(hostname: &str) {
    let name = format!("{hostname}\n");
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    );
    // What an image says about its host name is where it was built.
    let named = fs::read("/etc/hostname").is_ok_and(|present| present == name.as_bytes());
    let has_hosts = fs::metadata("/etc/hosts").is_ok_and(|file| file.len() > 0);
    let wanted = [("/etc/hostname", named, name), ("/etc/hosts", has_hosts, hosts)];
    for (path, present, content) in wanted {
        if present {
            continue;
        }
        match fs::write(path, content) {
            // Without /etc there is no program that reads it.
            Err(error) if error.kind() != ErrorKind::NotFound => {
                console::say(format_args!("{path} is not written: {error}"));
            }
            _ => {}
        }
    }
}

/// Sets the clock if the kernel found none, or a wrong one.
fn set_clock(realtime_ns: u64) -> Result<(), Errno> {
    let [now_ns, booted_ns] = [ClockId::Realtime, ClockId::Boottime].map(|clock| {
        let Timespec { tv_sec, tv_nsec } = time::clock_gettime(clock);
        i128::from(tv_sec) * NS_PER_S + i128::from(tv_nsec)
    });
    let wanted_ns = i128::from(realtime_ns) + booted_ns;
    if is_right(now_ns, wanted_ns) {
        return Ok(());
    }
    let whole = |ns| i64::try_from(ns).map_err(|_| Errno::INVAL);
    let wanted =
        Timespec { tv_sec: whole(wanted_ns / NS_PER_S)?, tv_nsec: whole(wanted_ns % NS_PER_S)? };
    time::clock_settime(ClockId::Realtime, wanted)
}

/// Whether a clock that says `now_ns` is better left alone, being more exact than the least that it
/// should be: what the configuration says, and the time since the kernel started.
fn is_right(now_ns: i128, wanted_ns: i128) -> bool {
    (-BEHIND_NS_MAX..=AHEAD_NS_MAX).contains(&(now_ns - wanted_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_left_alone_that_is_right_though_the_machine_was_long_in_the_making() {
        let wanted_ns = 1_800_000_000 * NS_PER_S;
        let is_right_at = |seconds: i128| is_right(wanted_ns + seconds * NS_PER_S, wanted_ns);

        assert!(is_right_at(0) && is_right_at(-1) && is_right_at(20));
        assert!(!is_right_at(-2) && !is_right_at(61));
        assert!(!is_right(0, wanted_ns), "the kernel has found no clock");
    }
}
