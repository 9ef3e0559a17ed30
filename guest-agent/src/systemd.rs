//! systemd: it is PID 1, and the agent one of its units.
//!
//! The kernel starts the agent, whatever the image. Where the image wants systemd, the agent leaves
//! what its unit needs in /run, and becomes systemd. That starts the unit before anything else and
//! again should it ever end: from then on the agent is a process like others, with a cgroup that
//! commands share, and nothing of what systemd does to PID 1 (another execution of itself, another
//! environment) concerns it.
//!
//! What systemd mounts is left to systemd, but for /run, where the unit has to lie before there is
//! a systemd; that is mounted as systemd would, which leaves it alone then.
//!
//! systemd ends the guest by becoming another program, which tells every process to end. That is
//! when the agent reports success in its name: PID 1 has no exit status.

use std::ffi::CStr;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use ovum_agent_proto::config::GuestConfig;
use rustix::mount::{self, MountFlags};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::console;
use crate::program::Program;

/// Signal at which systemd powers off: SIGRTMIN+4 (systemd(1), "Signals"); SIGTERM makes it start
/// over.
pub(crate) const POWER_OFF: u8 = 34 + 4;

/// Where the unit finds its configuration. It holds the environment, which may hold secrets.
pub(crate) const CONFIG: &str = "/run/ovum/config.json";

/// Our folder in /run, for root alone.
const FOLDER: &str = "/run/ovum";

/// This program, for systemd to start: the initramfs has no path any more.
const AGENT: &str = "/run/ovum/ovum-agent";

/// What systemd mounts on /run (mount-setup.c of systemd).
const RUN_OPTIONS: &CStr = c"mode=755,size=20%,nr_inodes=800k";

/// Units that last until the next boot (systemd.unit(5), "Unit File Load Path").
const UNITS: &str = "/run/systemd/system";

const UNIT_NAME: &str = "ovum-agent.service";

/// The unit. It is there from the beginning of a boot to the end of a shutdown, so it has none of
/// the usual dependencies. What commands do is not the agent's: that one of them is killed for its
/// memory does not end the unit, nor do they end with it.
const UNIT: &str = "\
[Unit]
Description=Guest agent of ovum
DefaultDependencies=no
IgnoreOnIsolate=yes
StartLimitIntervalSec=0

[Service]
ExecStart=/run/ovum/ovum-agent
Restart=always
RestartSec=1
OOMScoreAdjust=-1000
OOMPolicy=continue
KillMode=process
TasksMax=infinity
LimitNOFILE=65536:1048576
";

/// Who starts it: all boots, and the one that an administrator gets when others fail.
const STARTERS: [&str; 2] = ["sysinit.target.wants", "emergency.target.wants"];

/// The console takes no input, so nobody can log in there; and without udev a login would wait for
/// the device to be announced, and all else for the login, for 90 s.
const MASKED: &str = "serial-getty@hvc0.service";

/// The kernel is told to be quiet, which systemd would take as said to itself, too. A drop-in of
/// the image with a later name wins.
const MANAGER: (&str, &str) =
    ("/run/systemd/system.conf.d/00-ovum.conf", "[Manager]\nShowStatus=yes\n");

/// Which installation this is.
const MACHINE_ID: &str = "/etc/machine-id";

/// What an image says there that was never booted (machine-id(5), "First Boot Semantics").
const UNINITIALIZED: &str = "uninitialized";

/// As the program is called that systemd becomes at the end. The kernel keeps 15 bytes.
const SHUTDOWN: &str = "systemd-shutdow";

/// Whether running `program` as PID 1 means to run systemd. Needs the image's root.
pub(crate) fn is_meant(program: &Program) -> bool {
    program.is_init_system()
        && fs::canonicalize(program.name()).is_ok_and(|path| path.ends_with("systemd"))
}

/// Leaves in /run what systemd shall find there; nothing of the agent if it is not to listen.
///
/// # Errors
///
/// What the kernel says, with the path it says it of.
pub(crate) fn prepare(config: &GuestConfig) -> Result<(), (String, io::Error)> {
    let at = |path: &str| {
        let path = path.to_owned();
        move |error: io::Error| (path, error)
    };
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::STRICTATIME;
    fs::create_dir_all("/run").map_err(at("/run"))?;
    mount::mount("tmpfs", "/run", "tmpfs", flags, RUN_OPTIONS)
        .map_err(|errno| at("/run")(errno.into()))?;
    name_machine();
    write(MANAGER.0, MANAGER.1.as_bytes()).map_err(at(MANAGER.0))?;
    fs::create_dir_all(UNITS).map_err(at(UNITS))?;
    symlink("/dev/null", format!("{UNITS}/{MASKED}")).map_err(at(MASKED))?;
    if config.listen {
        install(config).map_err(at(FOLDER))?;
    }
    Ok(())
}

/// The unit with its program and configuration.
fn install(config: &GuestConfig) -> io::Result<()> {
    fs::create_dir(FOLDER)?;
    fs::set_permissions(FOLDER, Permissions::from_mode(0o700))?;
    let mut options = File::options();
    options.write(true).create_new(true);
    let mut agent = options.clone().mode(0o700).open(AGENT)?;
    io::copy(&mut File::open("/proc/self/exe")?, &mut agent)?;
    let text = serde_json::to_vec(config)?;
    options.mode(0o600).open(CONFIG)?.write_all(&text)?;
    write(&format!("{UNITS}/{UNIT_NAME}"), UNIT.as_bytes())?;
    for starter in STARTERS {
        fs::create_dir_all(format!("{UNITS}/{starter}"))?;
        symlink(format!("../{UNIT_NAME}"), format!("{UNITS}/{starter}/{UNIT_NAME}"))?;
    }
    Ok(())
}

/// Writes a file, in a folder that is made if it is missing.
fn write(path: &str, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = Path::new(path).parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, content)
}

/// Gives an installation that has no name one of its own, which stays with its disk.
///
/// So no boot is a first one to systemd: it would set units to what their vendors prefer, whatever
/// the image has done, and ask questions at a console that gives no answers.
fn name_machine() {
    let present = fs::read_to_string(MACHINE_ID).unwrap_or_default();
    if !is_nameless(&present) {
        return;
    }
    let mut random = [0; 16];
    let named = getrandom(&mut random, GetRandomFlags::empty())
        .map_err(io::Error::from)
        .and_then(|_| fs::write(MACHINE_ID, machine_id(random)));
    match named {
        // Without /etc there is nobody who asks.
        Err(error) if error.kind() != ErrorKind::NotFound => {
            console::say(format_args!("{MACHINE_ID} is not written: {error}"));
        }
        _ => {}
    }
}

fn is_nameless(present: &str) -> bool {
    matches!(present.trim(), "" | UNINITIALIZED)
}

/// 32 digits and a newline, marked as random (machine-id(5), "Relation to OSF UUIDs").
fn machine_id(mut random: [u8; 16]) -> String {
    random[6] = (random[6] & 0x0f) | 0x40;
    random[8] = (random[8] & 0x3f) | 0x80;
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    digits + "\n"
}

/// Whether systemd is ending the guest, and not only this unit.
pub(crate) fn is_ending() -> bool {
    fs::read_to_string("/proc/1/comm").is_ok_and(|name| name.trim_end() == SHUTDOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_id_is_a_random_uuid_in_32_digits() {
        let id = machine_id([0xff; 16]);

        assert_eq!(id, "ffffffffffff4fffbfffffffffffffff\n");
    }

    #[test]
    fn only_an_image_that_was_never_booted_is_named() {
        assert!(["", "\n", "uninitialized\n"].into_iter().all(is_nameless));
        assert!(!is_nameless("3747a003bad343519c1f26a02d74dc48\n"));
    }

    /// The unit is text; its paths are constants.
    #[test]
    fn the_unit_starts_the_program_that_lies_there() {
        assert!(UNIT.contains(&format!("\nExecStart={AGENT}\n")));
        assert!(AGENT.starts_with(FOLDER) && CONFIG.starts_with(FOLDER));
    }

    #[test]
    fn nothing_ends_this_host_while_it_is_tested() {
        assert!(!is_ending());
    }
}
