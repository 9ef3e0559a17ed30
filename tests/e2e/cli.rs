//! The command line, as it is typed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ovum_test_host::{
    BUSYBOX, SECRET, Server, TestHost, free_address, ovum, root, subnet_of, workers,
};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;

pub(crate) mod inside;
pub(crate) mod orders;
mod terminal;

cases![
    a_bare_kernel_boots_in_the_foreground,
    a_kernel_that_panics_in_the_foreground_is_a_failure,
    an_agent_boots_in_the_foreground_and_its_boot_is_traced,
    an_image_runs_without_a_server_and_leaves_nothing,
    ctrl_c_ends_a_run_without_a_server_and_leaves_nothing,
    a_killed_run_without_a_server_takes_its_guest_along,
    runs_without_a_server_share_one_and_outlive_it,
    a_run_goes_through_the_server_of_its_data_folder,
    a_state_is_waited_for_or_given_up,
    a_user_of_the_group_kvm_needs_no_root,
    the_first_five_minutes_of_the_readme_work,
];

/// `ovum boot` with this kernel and what follows it.
fn boot(arguments: &[&str]) -> Output {
    let kernel = root().join("target/kernel/vmlinux");
    Command::new(ovum()).args(["boot", "--kernel"]).arg(kernel).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

/// An initramfs with busybox whose init is `script`.
fn initramfs(dir: &Path, script: &str) -> PathBuf {
    let tree = dir.join("root");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    fs::write(tree.join("init"), format!("#!/bin/busybox sh\n{script}\n")).unwrap();
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let archive = dir.join("initramfs");
    let mut cpio = Command::new("busybox")
        .args(["cpio", "-o", "-H", "newc"])
        .current_dir(&tree)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&archive).unwrap())
        .spawn()
        .unwrap();
    cpio.stdin.take().unwrap().write_all(b"bin\nbin/busybox\ninit\n").unwrap();
    assert!(cpio.wait().unwrap().success());
    archive
}

async fn a_bare_kernel_boots_in_the_foreground(_: &TestHost) {
    let dir = tempfile::tempdir().unwrap();
    // In one line, between which and the next the kernel may have something to say.
    let script = "PATH=/bin\nbusybox echo init says $word on $(busybox nproc); busybox poweroff -f";
    let archive = initramfs(dir.path(), script);

    let archive = archive.to_str().unwrap();
    let booted = boot(&["--initrd", archive, "--vcpus=2", "--cmdline", "word=hello"]);

    let (said, told) = (text(&booted.stdout), text(&booted.stderr));
    assert_eq!((booted.status.code(), told.as_str()), (Some(0), ""), "{said}");
    assert!(said.contains("Linux version "), "{said}");
    assert!(said.contains("init says hello on 2\n"), "{said}");
}

/// The loop of those who develop a kernel or an agent.
async fn an_agent_boots_in_the_foreground_and_its_boot_is_traced(_: &TestHost) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    let image = dir.path().join("root.erofs");
    let made = Command::new("mkfs.erofs").arg("--quiet").arg(&image).arg(&tree).status().unwrap();
    assert!(made.success());

    let agent = root().join("target/agent/ovum-agent");
    let [agent, image] = [agent.to_str().unwrap(), image.to_str().unwrap()];
    let with_agent = ["--agent", agent, "--root", image, "--trace"];
    let command = ["--", "busybox", "sh", "-c", "echo from $(busybox hostname)"];
    let ran = boot(&[with_agent, command].concat());

    let (said, told) = (text(&ran.stdout), text(&ran.stderr));
    assert_eq!((ran.status.code(), said.as_str()), (Some(0), "from ovum\n"), "{told}");
    let shown: Vec<_> = told.lines().skip(1).filter_map(|line| line.split(' ').nth(2)).collect();
    assert_eq!(shown, ["worker", "vmm", "kernel", "agent", "workload", "first_output"], "{told}");
}

async fn a_kernel_that_panics_in_the_foreground_is_a_failure(_: &TestHost) {
    let booted = boot(&["--memory-mib=128"]);

    let (said, told) = (text(&booted.stdout), text(&booted.stderr));
    assert_eq!(booted.status.code(), Some(1), "{said}");
    assert!(said.contains("Kernel panic"), "{said}");
    assert!(told.contains("panicked"), "{told}");
}

/// `ovum run` of busybox on a data folder of its own.
fn run(data_dir: &Path, script: &str) -> Command {
    let mut command = Command::new(ovum());
    command.args(["run", "--memory=128MB", "--cpus=1", "--data-dir"]).arg(data_dir);
    command.env("OVUM_SUBNET", subnet_of(data_dir));
    command.args([BUSYBOX, "--", "sh", "-c", script]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// No worker, no instance's folder, no socket: only the images are there.
fn assert_nothing_is_left(data_dir: &Path) {
    let instances = fs::read_dir(data_dir.join("instances")).unwrap().count();
    assert_eq!((instances, workers()), (0, Vec::new()));
    assert!(!data_dir.join("api.sock").exists());
}

async fn an_image_runs_without_a_server_and_leaves_nothing(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/alone");

    for _first_and_again in 0..2 {
        let ran = run(data_dir, "echo to stdout; exit 7").output().unwrap();

        assert_eq!(ran.status.code(), Some(7), "{}", text(&ran.stderr));
        assert!(text(&ran.stdout).contains("to stdout\n"), "{}", text(&ran.stdout));
        assert_nothing_is_left(data_dir);
    }
    let detached = Command::new(ovum())
        .args(["run", "--detach", "--data-dir"])
        .arg(data_dir)
        .arg(BUSYBOX)
        .output()
        .unwrap();
    assert!(!detached.status.success());
    assert!(text(&detached.stderr).contains("ovum serve"), "{}", text(&detached.stderr));
}

/// Waits until `is_so`, for as long as a guest may take.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(150);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        time::sleep(Duration::from_millis(50)).await;
    }
}

fn console(data_dir: &Path) -> String {
    let folders = fs::read_dir(data_dir.join("instances")).into_iter().flatten().flatten();
    let logs = folders.filter_map(|folder| fs::read(folder.path().join("console.log")).ok());
    logs.map(|log| text(&log)).collect()
}

fn signal(child: &Child, name: &str) {
    signal_process(child.id(), name);
}

fn signal_process(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

async fn ctrl_c_ends_a_run_without_a_server_and_leaves_nothing(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/interrupted");
    for (name, code) in [("-INT", 130), ("-TERM", 143)] {
        let child = run(data_dir, "echo up; sleep 1000").spawn().unwrap();
        until("the guest is up", || console(data_dir).contains("up\n")).await;

        signal(&child, name);
        let ended = child.wait_with_output().unwrap();

        assert_eq!(ended.status.code(), Some(code), "{}", text(&ended.stderr));
        assert_nothing_is_left(data_dir);
    }
}

/// A command that is killed cannot clean up: its guest ends with it, and the next one does the
/// rest.
async fn a_killed_run_without_a_server_takes_its_guest_along(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/killed-run");
    let mut child = run(data_dir, "echo up; sleep 1000").spawn().unwrap();
    until("the guest is up", || console(data_dir).contains("up\n")).await;

    child.kill().unwrap();
    child.wait().unwrap();
    until("the guest is gone", || workers().is_empty()).await;
    let next = run(data_dir, "echo next").output().unwrap();

    assert_eq!(next.status.code(), Some(0), "{}", text(&next.stderr));
    assert_nothing_is_left(data_dir);
}

async fn runs_without_a_server_share_one_and_outlive_it(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/shared");
    let mut first = run(data_dir, "echo first is up; sleep 1000").spawn().unwrap();
    until("the first is up", || console(data_dir).contains("first is up\n")).await;
    let script = "echo second is up; for i in 1 2 3 4 5 6 7 8; do sleep 1; echo line $i; done";
    let second = run(data_dir, &format!("{script}; exit 4")).spawn().unwrap();
    until("the second is up", || console(data_dir).contains("second is up\n")).await;

    signal(&first, "-INT");
    let first = first.wait().unwrap();
    let second = second.wait_with_output().unwrap();

    assert_eq!(first.code(), Some(130));
    let said = text(&second.stdout);
    assert_eq!(second.status.code(), Some(4), "{said}{}", text(&second.stderr));
    let lines: Vec<_> = said.lines().filter(|line| line.starts_with("line ")).collect();
    let expected: Vec<_> = (1..=8).map(|number| format!("line {number}")).collect();
    assert_eq!(lines, expected);
    assert_nothing_is_left(data_dir);
}

/// `ovum` with the rights of the host's server.
fn typed(server: &Server, arguments: &[&str]) -> Command {
    let mut typed = Command::new(ovum());
    typed.args(arguments).env("OVUM_DATA_DIR", &server.data_dir).env("OVUM_JWT_SECRET", SECRET);
    typed
}

/// What comes of it.
fn on(server: &Server, arguments: &[&str]) -> Output {
    typed(server, arguments).stdin(Stdio::null()).output().unwrap()
}

async fn a_run_goes_through_the_server_of_its_data_folder(host: &TestHost) {
    let ran = on(
        &host.server,
        &["run", "--name=typed", "--memory=128MB", BUSYBOX, "--", "sh", "-c", "exit 9"],
    );

    assert_eq!(ran.status.code(), Some(9), "{}", text(&ran.stderr));
    let listed = on(&host.server, &["ps", "--all", "--json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!((&listed[0]["name"], &listed[0]["exit_code"]), (&json!("typed"), &json!(9)));
    let images = on(&host.server, &["image", "ls", "--json"]);
    let images: Value = serde_json::from_slice(&images.stdout).unwrap();
    assert!(images.as_array().unwrap().iter().any(|image| image["name"] == BUSYBOX), "{images}");
    assert!(on(&host.server, &["rm", "typed"]).status.success());
}

async fn a_state_is_waited_for_or_given_up(host: &TestHost) {
    let script = ["sh", "-c", "sleep 3"];
    let body = json!({ "name": "awaited", "image": BUSYBOX, "size": "128MB", "cmd": script });
    host.server.create(body).await;

    let running = on(&host.server, &["wait", "awaited", "--state=running", "--timeout=150s"]);
    let too_short = on(&host.server, &["wait", "awaited", "--timeout=10ms"]);
    let stopped = on(&host.server, &["wait", "awaited"]);
    let in_vain = on(&host.server, &["wait", "awaited", "--state=running"]);
    let nobody = on(&host.server, &["wait", "nobody"]);

    assert_eq!(text(&running.stdout), "Running\n", "{}", text(&running.stderr));
    assert_eq!(text(&stopped.stdout), "Stopped\n", "{}", text(&stopped.stderr));
    for (ended, told) in [(too_short, "still"), (in_vain, "will not"), (nobody, "not found")] {
        assert_eq!(ended.status.code(), Some(1));
        assert!(text(&ended.stderr).contains(told), "{}", text(&ended.stderr));
    }
    host.server.delete("awaited").await;
}

/// The group that may use KVM. Where no udev has seen to it, as on the emulated host, this does.
fn group_of_kvm() -> u32 {
    let kvm = fs::metadata("/dev/kvm").unwrap();
    if kvm.mode() & 0o060 == 0o060 {
        return kvm.gid();
    }
    let group = 65533;
    chown("/dev/kvm", None, Some(group)).unwrap();
    fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o660)).unwrap();
    group
}

async fn a_user_of_the_group_kvm_needs_no_root(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/unprivileged");
    fs::create_dir_all(data_dir).unwrap();
    let (user, group) = (65534, group_of_kvm());
    chown(data_dir, Some(user), Some(group)).unwrap();
    fs::set_permissions("/var/lib/ovum", fs::Permissions::from_mode(0o755)).unwrap();
    let typed = run(data_dir, "id -u; exit 5");

    let ran = Command::new("setpriv")
        .args(["--clear-groups", &format!("--reuid={user}"), &format!("--regid={group}")])
        .arg(typed.get_program())
        .args(["run", "--network=false"])
        .args(typed.get_args().skip(1))
        .env("HOME", data_dir)
        .output()
        .unwrap();

    let said = text(&ran.stdout);
    assert_eq!(ran.status.code(), Some(5), "{said}{}", text(&ran.stderr));
    assert!(said.contains("0\n"), "root of the guest, not of the host: {said}");
    assert_nothing_is_left(data_dir);
}

/// The first block of code below a heading of the README.
fn readme(heading: &str) -> String {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, below) = readme.split_once(&format!("\n## {heading}\n")).unwrap();
    let (_, block) = below.split_once("```sh\n").unwrap();
    block.split_once("```").unwrap().0.to_owned()
}

async fn the_first_five_minutes_of_the_readme_work(_: &TestHost) {
    let dir = tempfile::tempdir().unwrap();
    let script = readme("First five minutes");
    let hub = "docker.io/library/busybox:latest";
    let checkout = root().canonicalize().unwrap();
    let path = format!("{}/", checkout.display());
    // Typed in the checkout, which is read-only to nobody but should stay as it is.
    let script = script.replace(hub, BUSYBOX).replace("$PWD/", &path);

    let typed = Command::new("sh")
        .args(["-euc", &script])
        .current_dir(dir.path())
        .env("OVUM_DATA_DIR", "/var/lib/ovum/readme")
        .env("OVUM_LISTEN", free_address())
        .output()
        .unwrap();

    let said = text(&typed.stdout);
    assert!(typed.status.success(), "{said}{}", text(&typed.stderr));
    for part in ["ok   KVM", "Linux ", "exit code 3\n", "Running\n", "clock", BUSYBOX] {
        assert!(said.contains(part), "no {part:?}: {said}");
    }
}
