//! Boots one machine from the command line and prints what happens to it.
//!
//! ```text
//! boot [--vcpus N] [--memory MIB] [--disk FILE]... [--read-only-disk FILE]... [--serial]
//!      [--cmdline WORDS] [--log FILE] [--pause-ms MS] KERNEL [INITRAMFS]...
//! ```
#![expect(clippy::print_stdout, reason = "a program for people")]

use std::env;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use ovum_vmm::machine::{Machine, MachineEventKind};
use ovum_vmm::spec::{DiskSpec, MachineFiles, MachineSpec};
use rustix::event::{PollFd, PollFlags, poll};

type AnyError = Box<dyn Error>;

fn main() -> ExitCode {
    match boot() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut source = Some(&*error as &dyn Error);
            while let Some(error) = source {
                println!("{error}");
                source = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn boot() -> Result<(), AnyError> {
    let started = Instant::now();
    let (spec, files, pause) = arguments()?;
    let say = |what: &str| println!("{:9.3} ms  {what}", started.elapsed().as_secs_f64() * 1e3);
    let mut machine = Machine::build(&spec, files)?;
    say("built");
    machine.boot()?;
    if let Some(pause) = pause {
        // The guest is left alone for a while: that is what is being tried.
        thread::park_timeout(pause);
        machine.pause()?;
        let state = serde_json::to_vec(&machine.save()?)?;
        say(&format!("paused, {} bytes of state", state.len()));
        machine.resume()?;
        say("resumed");
    }
    loop {
        while let Some(event) = machine.next_event() {
            say(&format!("{:?}", event.kind));
            if matches!(event.kind, MachineEventKind::Stopped { .. }) {
                say(&format!("{:?}", machine.exits()));
                return Ok(());
            }
        }
        poll(&mut [PollFd::from_borrowed_fd(machine.events_fd(), PollFlags::IN)], None)?;
    }
}

fn arguments() -> Result<(MachineSpec, MachineFiles, Option<Duration>), AnyError> {
    let open = |path: &str, write: bool| {
        OpenOptions::new().read(true).write(write).open(path).map_err(|e| format!("{path}: {e}"))
    };
    let mut spec = MachineSpec {
        vcpus: 1,
        memory_bytes: 256 << 20,
        cmdline: String::new(),
        disks: Vec::new(),
        vsock_cid: None,
        serial: false,
    };
    let (mut disks, mut pause, mut plain) = (Vec::new(), None, Vec::new());
    let mut log: File = tempfile::tempfile()?;
    let mut words = env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--vcpus" => spec.vcpus = value()?.parse()?,
            "--memory" => spec.memory_bytes = value()?.parse::<u64>()? << 20,
            "--cmdline" => spec.cmdline = value()?,
            "--serial" => spec.serial = true,
            "--log" => log = File::create(value()?)?,
            "--pause-ms" => pause = Some(Duration::from_millis(value()?.parse()?)),
            "--disk" | "--read-only-disk" => {
                let read_only = word != "--disk";
                disks.push(open(&value()?, !read_only)?);
                spec.disks.push(DiskSpec { id: format!("disk{}", disks.len()), read_only });
            }
            _ => plain.push(open(&word, false)?),
        }
    }
    if plain.is_empty() {
        return Err("Usage: boot [OPTIONS] KERNEL [INITRAMFS]...".into());
    }
    let kernel = plain.remove(0);
    let kvm = open("/dev/kvm", true)?.into();
    let files = MachineFiles { kvm, kernel, initramfs: plain, disks, console: log, vsock: None };
    Ok((spec, files, pause))
}
