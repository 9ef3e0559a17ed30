//! `ovum exec` and `ovum cp`, as they are typed.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use ovum_test_host::{BUSYBOX, Server, TestHost};

use super::terminal::Terminal;
use super::{on, signal_process, text, typed};
use crate::cases;

cases![
    a_command_in_an_instance_exits_as_it_exits,
    input_is_passed_on_with_an_end,
    a_terminal_here_is_a_terminal_there,
    a_terminal_is_as_it_was_when_a_command_is_called_off,
    files_and_folders_are_copied_by_the_rules_of_docker,
    links_modes_and_owners_are_kept,
    an_archive_goes_in_and_comes_out,
    what_cannot_be_copied_is_said,
];

async fn a_command_in_an_instance_exits_as_it_exits(host: &TestHost) {
    let server = &host.server;
    server.start_idle("inside", BUSYBOX).await;

    let ran = on(server, &["exec", "inside", "sh", "-c", "echo out; echo error >&2; exit 7"]);
    let killed = on(server, &["exec", "inside", "--", "sh", "-c", "kill -9 $$"]);
    let late = on(server, &["exec", "--timeout=1", "inside", "sleep", "1000"]);
    let missing = on(server, &["exec", "inside", "nothing"]);
    let told = on(
        server,
        &["exec", "-e", "A=b c", "--workdir=/bin", "inside", "sh", "-c", "echo $A; pwd"],
    );
    let nobody = on(server, &["exec", "nobody", "true"]);

    assert_eq!((text(&ran.stdout), text(&ran.stderr)), ("out\n".into(), "error\n".into()));
    assert_eq!(ran.status.code(), Some(7));
    assert_eq!((killed.status.code(), late.status.code()), (Some(137), Some(124)));
    assert_eq!(missing.status.code(), Some(127));
    assert!(text(&missing.stderr).contains("nothing: not found"), "{}", text(&missing.stderr));
    assert_eq!(text(&told.stdout), "b c\n/bin\n");
    assert_eq!(nobody.status.code(), Some(1));
    assert!(text(&nobody.stderr).contains("not found"), "{}", text(&nobody.stderr));
    server.delete("inside").await;
}

/// `ovum` with something piped in.
fn piped(server: &Server, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = typed(server, arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writing = thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    // Who refuses does not read it.
    let _ = writing.join().unwrap();
    output
}

async fn input_is_passed_on_with_an_end(host: &TestHost) {
    let server = &host.server;
    server.start_idle("piped", BUSYBOX).await;
    let input: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();

    let counted = piped(server, &["exec", "-i", "piped", "wc", "-c"], &input);
    let back = piped(server, &["exec", "-i", "piped", "cat"], &input);
    let early = piped(server, &["exec", "-i", "piped", "sh", "-c", "exit 3"], &input);

    assert_eq!(text(&counted.stdout), "1200000\n", "{}", text(&counted.stderr));
    assert!(back.stdout == input, "{} bytes came back", back.stdout.len());
    assert_eq!(early.status.code(), Some(3), "{}", text(&early.stderr));
    server.delete("piped").await;
}

async fn a_terminal_here_is_a_terminal_there(host: &TestHost) {
    let server = &host.server;
    server.start_idle("shell", BUSYBOX).await;
    let command = typed(server, &["exec", "-it", "shell", "sh"]);
    let mut terminal = Terminal::start(&command, 30, 100);

    terminal.until("# ").await;
    terminal.keys("stty size; tty\r");
    let size = terminal.until("/dev/pts/").await;
    terminal.resize(50, 132);
    terminal.keys("while [ \"$(stty size)\" != '50 132' ]; do sleep 0.1; done; echo re''sized\r");
    terminal.until("resized\r\n").await;
    // Begun by what is interrupted: a shell about to start it takes the key for itself.
    terminal.keys("sh -c \"echo be''gun; exec sleep 1000\"\r");
    terminal.until("begun\r\n").await;
    terminal.keys("\x03");
    terminal.keys("echo status $?\r");
    let interrupted = terminal.until("status 130\r\n").await;
    terminal.keys("exit 6\r");
    let (rest, status) = terminal.end().await;

    assert!(size.contains("30 100\r\n/dev/pts/"), "{size:?}");
    assert!(interrupted.contains("^C"), "{interrupted:?}");
    assert_eq!(status.code(), Some(6), "{rest:?}");
    server.delete("shell").await;
}

async fn a_terminal_is_as_it_was_when_a_command_is_called_off(host: &TestHost) {
    let server = &host.server;
    server.start_idle("off", BUSYBOX).await;
    for (name, code) in [("-TERM", 143), ("-HUP", 129)] {
        let command =
            typed(server, &["exec", "-it", "off", "sh", "-c", "echo up; exec sleep 4444"]);
        let mut terminal = Terminal::start(&command, 24, 80);
        terminal.until("up\r\n").await;
        let during = terminal.is_raw();

        signal_process(terminal.pid(), name);
        let (after, status) = terminal.ended().await;

        assert_eq!((during, after), (true, false), "{name}");
        assert_eq!(status.code(), Some(code), "{name}");
    }
    super::until("nothing of it is left", || {
        let left = on(server, &["exec", "off", "sh", "-c", "ps | grep -c '[s]leep 4444'"]);
        text(&left.stdout) == "0\n"
    })
    .await;
    server.delete("off").await;
}

/// A folder with two files, one of them to be run, and a folder.
fn tree(at: &Path) {
    fs::create_dir_all(at.join("sub/empty")).unwrap();
    fs::write(at.join("file"), b"content\n").unwrap();
    fs::write(at.join("sub/run"), b"#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(at.join("sub/run"), Permissions::from_mode(0o755)).unwrap();
}

fn copy(server: &Server, from: &str, to: &str) {
    let copied = on(server, &["cp", "--quiet", from, to]);
    assert!(copied.status.success(), "{from} to {to}: {}", text(&copied.stderr));
    assert_eq!(text(&copied.stderr), "");
}

fn sh(server: &Server, instance: &str, script: &str) -> String {
    text(&on(server, &["exec", instance, "sh", "-c", script]).stdout)
}

async fn files_and_folders_are_copied_by_the_rules_of_docker(host: &TestHost) {
    let server = &host.server;
    server.start_idle("rules", BUSYBOX).await;
    let dir = tempfile::tempdir().unwrap();
    let here = |name: &str| dir.path().join(name).display().to_string();
    tree(&dir.path().join("ours"));

    copy(server, &here("ours"), "rules:/new");
    copy(server, &here("ours"), "rules:/new");
    copy(server, &here("ours/."), "rules:/content");
    copy(server, &here("ours/file"), "rules:/new/sub");
    copy(server, &here("ours/file"), "rules:/named");
    let script = "cd /; find new content named | sort; /new/ours/sub/run";
    assert_eq!(
        sh(server, "rules", script).lines().collect::<Vec<_>>(),
        [
            "content",
            "content/file",
            "content/sub",
            "content/sub/empty",
            "content/sub/run",
            "named",
            "new",
            "new/file",
            "new/ours",
            "new/ours/file",
            "new/ours/sub",
            "new/ours/sub/empty",
            "new/ours/sub/run",
            "new/sub",
            "new/sub/empty",
            "new/sub/file",
            "new/sub/run",
            "ran",
        ]
    );

    copy(server, "rules:/content", &here("back"));
    copy(server, "rules:/content", &here("back"));
    copy(server, "rules:/content/.", &here("spread"));
    copy(server, "rules:/content/file", &here("back/sub"));
    for path in ["back/file", "back/content/file", "spread/file", "back/sub/file"] {
        assert_eq!(fs::read(here(path)).unwrap(), b"content\n", "{path}");
    }
    assert_eq!(fs::metadata(here("back/sub/run")).unwrap().mode() & 0o777, 0o755);
    assert!(Path::new(&here("spread/sub/empty")).is_dir());
    server.delete("rules").await;
}

async fn links_modes_and_owners_are_kept(host: &TestHost) {
    let server = &host.server;
    server.start_idle("kept", BUSYBOX).await;
    let dir = tempfile::tempdir().unwrap();
    let here = |name: &str| dir.path().join(name).display().to_string();
    fs::create_dir(here("links")).unwrap();
    fs::write(here("links/f"), b"f").unwrap();
    symlink("f", here("links/l")).unwrap();

    copy(server, &here("links"), "kept:/links");
    let followed = on(server, &["cp", "-qL", &here("links/l"), "kept:/followed"]);
    let script = "readlink /links/l; cat /followed; chown 1000:1001 /links/f; chmod 4711 /links/f";
    let seen = sh(server, "kept", script);
    let archive = on(server, &["cp", "-qa", "kept:/links", &here("archive")]);
    let again = on(server, &["cp", "-qa", &here("archive/f"), "kept:/again"]);

    assert!(followed.status.success() && archive.status.success() && again.status.success());
    assert_eq!(seen, "f\nf");
    let found = fs::metadata(here("archive/f")).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (1000, 1001, 0o711));
    assert_eq!(fs::read_link(here("archive/l")).unwrap(), Path::new("f"));
    assert_eq!(sh(server, "kept", "stat -c '%u %g %a' /again"), "1000 1001 711\n");
    server.delete("kept").await;
}

async fn an_archive_goes_in_and_comes_out(host: &TestHost) {
    let server = &host.server;
    server.start_idle("archive", BUSYBOX).await;
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours");
    tree(&ours);
    symlink("file", ours.join("link")).unwrap();
    fs::hard_link(ours.join("file"), ours.join("other")).unwrap();
    let long = "long-name-".repeat(20);
    fs::write(ours.join(&long), vec![7; 100_000]).unwrap();
    let tar = |arguments: &[&str]| {
        let output = Command::new("tar").args(arguments).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        output.stdout
    };

    let archive = tar(&["--create", "--sort=name", "ours"]);
    let taken = piped(server, &["cp", "-", "archive:/srv"], &archive);
    assert!(!taken.status.success(), "there is no such folder");
    assert!(text(&taken.stderr).contains("/srv is not a folder"), "{}", text(&taken.stderr));
    sh(server, "archive", "mkdir /srv");
    let taken = piped(server, &["cp", "-", "archive:/srv"], &archive);
    assert!(taken.status.success(), "{}", text(&taken.stderr));
    let script = "cd /srv/ours; cat file other; readlink link; sub/run; cat long* | wc -c";
    assert_eq!(sh(server, "archive", script), "content\ncontent\nfile\nran\n100000\n");

    let given = on(server, &["cp", "archive:/srv/ours", "-"]);
    assert!(given.status.success(), "{}", text(&given.stderr));
    fs::write(dir.path().join("given.tar"), &given.stdout).unwrap();
    fs::create_dir(dir.path().join("back")).unwrap();
    tar(&["--extract", "--file=given.tar", "--directory=back"]);
    let same = Command::new("diff")
        .args(["-r", "ours", "back/ours"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(same.status.success(), "{}", text(&same.stdout));
    let spread = on(server, &["cp", "archive:/srv/ours/sub/.", "-"]);
    fs::write(dir.path().join("spread.tar"), &spread.stdout).unwrap();
    let listed = text(&tar(&["--list", "--file=spread.tar"]));
    let mut listed: Vec<_> = listed.lines().collect();
    listed.sort_unstable();
    assert_eq!(listed, ["./", "./empty/", "./run"]);
    server.delete("archive").await;
}

async fn what_cannot_be_copied_is_said(host: &TestHost) {
    let server = &host.server;
    server.start_idle("refuses", BUSYBOX).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file").display().to_string();
    fs::write(&file, b"x").unwrap();
    let folder = dir.path().display().to_string();

    for (from, to, words) in [
        ("/nowhere/at/all", "refuses:/a", "/nowhere/at/all"),
        ("refuses:/nowhere", folder.as_str(), "/nowhere: No such file"),
        (file.as_str(), "refuses:/missing/", "There is no folder"),
        (folder.as_str(), "refuses:/bin/busybox", "is not a folder"),
        ("refuses:/bin", file.as_str(), "is not a folder"),
        ("refuses:/a", "refuses:/b", "Only one of the two"),
        (file.as_str(), "-", "One of the two must be"),
        (file.as_str(), "nobody:/a", "not found"),
    ] {
        let copied = on(server, &["cp", from, to]);
        let said = text(&copied.stderr);
        assert_eq!(copied.status.code(), Some(1), "{from} to {to}: {said}");
        assert!(said.contains(words), "{from} to {to}: {said}");
    }
    let garbage = piped(server, &["cp", "-", "refuses:/"], &[b'x'; 2048]);
    assert!(text(&garbage.stderr).contains("Malformed tar archive"), "{}", text(&garbage.stderr));
    let mut out = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..6].copy_from_slice(b"../out");
    header.set_size(1);
    header.set_cksum();
    out.append(&header, &b"x"[..]).unwrap();
    let leads_out = piped(server, &["cp", "-", "refuses:/tmp"], &out.into_inner().unwrap());
    assert!(text(&leads_out.stderr).contains("leads out"), "{}", text(&leads_out.stderr));
    server.delete("refuses").await;
}
