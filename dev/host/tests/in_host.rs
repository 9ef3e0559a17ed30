//! What a caller of `in-host` counts on, each claim with a real emulated host.
//!
//! Needs QEMU and the other packages that `--packages` names; the first host takes a boot.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Below the checkout, because the emulated host has a `/tmp` of its own.
const FOLDER: &str = env!("CARGO_TARGET_TMPDIR");
/// For what takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn in_host() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_in-host"));
    command.env("OVUM_HOST", "emulated").current_dir(FOLDER).stdin(Stdio::null());
    command
}

fn run(script: &str) -> Output {
    in_host().args(["--", "sh", "-c", script]).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    str::from_utf8(&output.stdout).unwrap()
}

/// Bytes that no other order or encoding of them equals.
fn blob(name: &str) -> (PathBuf, Vec<u8>) {
    let path = Path::new(FOLDER).join(name);
    let mut random = fs::File::open("/dev/urandom").unwrap().take(10 << 20);
    let mut bytes = Vec::new();
    random.read_to_end(&mut bytes).unwrap();
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_processor_has_svm_and_kvm_answers() {
    let ioctl = "import fcntl; print(fcntl.ioctl(open('/dev/kvm', 'rb'), 0xAE00))";
    let output = run(&format!("grep -cw svm /proc/cpuinfo; python3 -c \"{ioctl}\""));

    assert_eq!(stdout(&output), "1\n12\n");
}

#[test]
fn the_exit_status_passes() {
    assert_eq!(run("exit 0").status.code(), Some(0));
    assert_eq!(run("exit 3").status.code(), Some(3));
    assert_eq!(run("kill -9 $$").status.code(), Some(128 + 9));
    assert_eq!(in_host().arg("no-such-program").output().unwrap().status.code(), Some(127));
}

/// A command that ends does not wait for what it left running.
#[test]
fn a_process_left_behind_is_killed() {
    assert_eq!(run("sleep 100000 & exit 7").status.code(), Some(7));
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let output = run("echo one; echo two >&2; echo three > /dev/stdout; echo four > /dev/stderr");

    let stderr = str::from_utf8(&output.stderr).unwrap();
    assert_eq!(stdout(&output), "one\nthree\n");
    assert_eq!(stderr.lines().skip(1).collect::<Vec<_>>(), ["two", "four"]);
    assert!(stderr.starts_with("in-host: emulated"), "no decision in {stderr:?}");
}

#[test]
fn ten_mebibytes_out_are_exact() {
    let (path, bytes) = blob("out");

    let output = in_host().arg("cat").arg(&path).output().unwrap();

    assert!(output.stdout == bytes, "{} bytes came", output.stdout.len());
}

#[test]
fn ten_mebibytes_in_are_exact() {
    let (path, bytes) = blob("in");

    let output = in_host().arg("cat").stdin(fs::File::open(path).unwrap()).output().unwrap();

    assert!(output.stdout == bytes, "{} bytes came", output.stdout.len());
}

#[test]
fn folder_environment_and_arguments_go_along() {
    let mut command = in_host();
    command.env("OVUM_TEST", "it's\ntwo lines").env("UNRELATED", "stays out");
    command.args(["--", "sh", "-c", "pwd; echo \"$1\"; env", "sh", "a 'b' $c \"d\""]);
    let output = command.output().unwrap();

    let text = stdout(&output);
    assert!(text.starts_with(&format!("{FOLDER}\na 'b' $c \"d\"\n")), "{text}");
    assert!(text.contains("\nOVUM_TEST=it's\ntwo lines\n"), "{text}");
    assert!(text.contains(&format!("\nPATH={}\n", std::env::var("PATH").unwrap())), "{text}");
    assert!(!text.contains("UNRELATED"), "{text}");
}

/// What is written inside must not reach the outer machine; the scratch disk is a real one.
#[test]
fn the_outer_machine_is_safe_and_the_scratch_disk_is_ext4() {
    let (path, bytes) = blob("kept");

    let script =
        "echo x > \"$0\" && cat \"$0\" && stat -f -c %T /var/lib/ovum && sync /var/lib/ovum";
    let output = in_host().args(["--", "sh", "-c", script]).arg(&path).output().unwrap();

    assert_eq!(stdout(&output), "x\next2/ext3\n");
    assert!(fs::read(&path).unwrap() == bytes, "the file outside changed");
}

#[test]
fn a_port_is_forwarded_and_the_outside_is_reachable() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let outside = TcpListener::bind("127.0.0.1:0").unwrap();
    let outside_port = outside.local_addr().unwrap().port();
    let script = format!(
        "busybox nc 10.0.2.2 {outside_port}; while :; do echo hello | busybox nc -l -p {port}; done"
    );
    let mut host = in_host();
    host.arg(format!("--forward={port}")).args(["--", "sh", "-c", &script]);
    let mut host = Stopped(host.stdout(Stdio::piped()).spawn().unwrap());

    outside.accept().unwrap().0.write_all(b"from outside").unwrap();

    let hello = eventually("the server inside", || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        (!text.is_empty()).then_some(text)
    });
    assert_eq!(hello, "hello\n");
    let mut heard = [0; 12];
    host.0.stdout.as_mut().unwrap().read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"from outside");
}

/// However it ends, even with no chance to clean up.
#[test]
fn a_killed_run_leaves_no_process() {
    let mut host = in_host();
    host.args(["--", "sh", "-c", "echo up; sleep 100000"]).stdout(Stdio::piped());
    let mut host = Stopped(host.spawn().unwrap());
    host.0.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    let pid = host.0.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children: Vec<u32> =
        children.split_whitespace().map(|child| child.parse().unwrap()).collect();
    assert!(!children.is_empty(), "no QEMU to look for");

    drop(host);

    for child in children {
        eventually("QEMU to die", || {
            let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
            let is_gone = status.is_empty() || status.contains("State:\tZ");
            is_gone.then_some(())
        });
    }
}

#[test]
fn two_hosts_do_not_disturb_each_other() {
    let script = |name| format!("echo {name} > /var/lib/ovum/x; sleep 1; cat /var/lib/ovum/x");
    let other = thread::spawn(move || run(&script("other")));
    let one = run(&script("one"));

    assert_eq!(stdout(&one), "one\n");
    assert_eq!(stdout(&other.join().unwrap()), "other\n");
}

#[test]
fn a_folder_in_tmp_is_visible_and_stays_as_it_was() {
    let folder = TempDir::new_in("/tmp").unwrap();
    fs::write(folder.path().join("outer"), "seen").unwrap();
    let mut host = in_host();
    host.current_dir(folder.path()).args(["--", "sh", "-c", "cat outer; echo x > inner; ls"]);

    assert_eq!(stdout(&host.output().unwrap()), "seeninner\nouter\n");

    assert!(!folder.path().join("inner").exists());
}

#[test]
fn what_cannot_work_is_said() {
    let mut hidden = in_host();
    let stderr = hidden.current_dir("/run").arg("true").output().unwrap().stderr;
    assert!(String::from_utf8_lossy(&stderr).contains("/run is not visible inside"));
    let mut unarmed = in_host();
    let stderr = unarmed.env("PATH", "/nowhere").arg("true").output().unwrap().stderr;
    assert!(String::from_utf8_lossy(&stderr).contains("--packages"));
}

/// A run that is killed when its test is done with it.
struct Stopped(Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}
