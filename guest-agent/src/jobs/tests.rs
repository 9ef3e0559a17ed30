//! Jobs as the server sees them: real processes and files, and the server's end of the connection.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use ovum_agent_proto::exec::{ExecSpec, WindowSize};
use ovum_agent_proto::files::{
    Entry, EntryKind, GetSpec, PathInfo, PathKind, PutKind, PutSpec, StatSpec,
};
use ovum_agent_proto::frame::{Frame, WINDOW_BYTES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, WaitOptions, kill_process, test_kill_process, waitpid};

use super::*;
use crate::workload;

/// How long something may take that should take no time.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection with its jobs, and the server's end.
struct Guest {
    session: Session,
    jobs: Jobs,
    server: UnixStream,
    received: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        let (ours, server) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        server.set_nonblocking(true).unwrap();
        let mut guest = Self {
            session: Session::open(ours.into()),
            jobs: Jobs::default(),
            server,
            received: Vec::new(),
        };
        let (0, ToServer::Hello { .. }) = guest.next() else { panic!("no hello") };
        guest
    }

    /// The server says something, which arrives.
    fn say(&mut self, stream: u32, message: ToAgent) {
        self.try_say(stream, message).unwrap();
    }

    fn try_say(&mut self, stream: u32, message: ToAgent) -> Result<(), Closed> {
        let env = [("PATH".to_owned(), "/usr/bin:/bin".to_owned()), ("A".into(), "base".into())];
        self.jobs.take(stream, message, &env, &mut self.session)
    }

    /// One turn of the loop around us, without signals: ended children are looked for.
    fn turn(&mut self) {
        let pids: Vec<Pid> = self.jobs.running.values().filter_map(pid).collect();
        for pid in pids {
            if let Ok(Some((_, status))) = waitpid(Some(pid), WaitOptions::NOHANG) {
                let code = workload::exit_code(status.exit_status(), status.terminating_signal());
                self.jobs.reaped(pid, code.unwrap());
            }
        }
        let ready: Vec<_> = {
            let has_room = self.session.has_room();
            let interests: Vec<_> = self.jobs.interests(has_room).collect();
            let mut fds: Vec<_> = interests
                .iter()
                .map(|(_, end, fd)| {
                    let flags = if *end == End::Input { PollFlags::OUT } else { PollFlags::IN };
                    PollFd::from_borrowed_fd(*fd, flags)
                })
                .collect();
            let wait = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            poll(&mut fds, Some(&wait)).unwrap();
            let found = fds.iter().zip(&interests).filter(|(fd, _)| !fd.revents().is_empty());
            found.map(|(_, (stream, end, _))| (*stream, *end)).collect()
        };
        for (stream, end) in ready {
            self.jobs.serve(stream, end, &mut self.session);
        }
        self.jobs.work(&mut self.session);
        self.session.send().unwrap();
    }

    /// What the server hears without anything happening.
    fn heard(&mut self) -> Option<(u32, ToServer)> {
        let mut chunk = [0; 1 << 16];
        while let Ok(read @ 1..) = self.server.read(&mut chunk) {
            self.received.extend_from_slice(&chunk[..read]);
        }
        let (frame, bytes) = Frame::decode(&self.received).unwrap()?;
        let heard = (frame.stream, ToServer::decode(frame).unwrap());
        self.received.drain(..bytes);
        Some(heard)
    }

    /// What the server hears next.
    fn next(&mut self) -> (u32, ToServer) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(heard) = self.heard() {
                return heard;
            }
            assert!(Instant::now() < deadline, "the agent is silent");
            self.turn();
        }
    }

    /// Everything until a command ends: output, error, exit status. Gives credit for all of it.
    fn until_ended(&mut self) -> (String, String, u8) {
        let (mut output, mut error) = (Vec::new(), Vec::new());
        loop {
            let (stream, message) = self.next();
            let cost = message.cost();
            match message {
                ToServer::Data(bytes) => output.extend(bytes),
                ToServer::ErrorData(bytes) => error.extend(bytes),
                ToServer::Ended { code } => {
                    let text = |bytes| String::from_utf8(bytes).unwrap();
                    return (text(output), text(error), code);
                }
                ToServer::Ack | ToServer::Credit(_) => {}
                other => panic!("{other:?}"),
            }
            if cost > 0 {
                self.say(stream, ToAgent::Credit(cost));
            }
        }
    }

    fn run(&mut self, spec: ExecSpec) -> (String, String, u8) {
        self.say(1, ToAgent::Exec(spec));
        self.until_ended()
    }

    fn refusal(&mut self, message: ToAgent) -> (ErrorCode, String) {
        self.say(1, message);
        match self.next() {
            (1, ToServer::Error { code, message }) => (code, message),
            other => panic!("{other:?}"),
        }
    }
}

fn pid(job: &Job) -> Option<Pid> {
    match job {
        Job::Command(command) => Some(command.pid()),
        Job::Put(_) | Job::Get(_) => None,
    }
}

fn sh(script: &str) -> ExecSpec {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    ExecSpec { argv, ..ExecSpec::default() }
}

fn await_death(pid: Pid) {
    let deadline = Instant::now() + PATIENCE;
    while test_kill_process(pid).is_ok() {
        assert!(Instant::now() < deadline, "{pid:?} lives");
        thread::yield_now();
    }
}

#[test]
fn a_command_writes_in_order_and_ends() {
    let (output, error, code) = Guest::new().run(sh("echo one; echo two >&2; echo $A; exit 7"));

    assert_eq!((output.as_str(), error.as_str(), code), ("one\ntwo\nbase\n", "", 7));
}

#[test]
fn standard_error_is_kept_apart_if_asked() {
    let spec = ExecSpec { apart: true, ..sh("echo out; echo err >&2") };

    assert_eq!(Guest::new().run(spec), ("out\n".into(), "err\n".into(), 0));
}

#[test]
fn environment_and_directory_are_as_asked() {
    let spec = ExecSpec {
        env: vec![("A".into(), "own".into()), ("B".into(), "=".into())],
        working_dir: Some("/usr".into()),
        ..sh("echo $A $B; pwd; env | grep -c ^A=")
    };

    assert_eq!(Guest::new().run(spec).0, "own =\n/usr\n1\n");
}

#[test]
fn a_signal_shows_in_the_status() {
    assert_eq!(Guest::new().run(sh("kill -9 $$")).2, 137);
    assert_eq!(Guest::new().run(sh("kill -15 $$")).2, 143);
}

#[test]
fn input_arrives_and_has_an_end() {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Exec(sh("cat; echo done")));
    guest.say(1, ToAgent::Data(b"hello ".to_vec()));
    guest.say(1, ToAgent::Data(b"there\n".to_vec()));
    guest.say(1, ToAgent::End);

    assert_eq!(guest.until_ended(), ("hello there\ndone\n".into(), String::new(), 0));
}

/// What a command does not read is taken all the same, once it can no longer read it.
#[test]
fn input_for_one_who_reads_no_more_is_thrown_away() {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Exec(sh("exec <&-; echo closed; sleep 0.2")));
    for _ in 0..4 {
        guest.say(1, ToAgent::Data(vec![0; 32 << 10]));
    }

    assert_eq!(guest.until_ended().2, 0);
}

#[test]
fn input_beyond_the_window_ends_the_connection() {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Exec(sh("sleep 1000")));

    let mut fed = 0;
    while guest.try_say(1, ToAgent::Data(vec![0; 32 << 10])).is_ok() {
        fed += 32 << 10;
    }

    // A pipe took some before the window was full.
    assert!(fed <= WINDOW_BYTES as usize + (64 << 10), "{fed}");
}

#[test]
fn the_time_of_a_command_and_of_its_children_is_over_together() {
    let spec = ExecSpec { timeout_ms: 300, ..sh("sleep 1000 & echo $!; sleep 1000") };

    let (output, _, code) = Guest::new().run(spec);

    assert_eq!(code, 124);
    await_death(Pid::from_raw(output.trim().parse().unwrap()).unwrap());
}

#[test]
fn a_command_that_is_called_off_is_killed_with_its_children() {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Exec(sh("sleep 1000 & echo $!; sleep 1000")));
    assert_eq!(guest.next(), (1, ToServer::Ack));
    let (1, ToServer::Data(line)) = guest.next() else { panic!("no output") };

    guest.say(1, ToAgent::Cancel);

    assert!(guest.jobs.running.is_empty());
    let child = String::from_utf8(line).unwrap().trim().parse().unwrap();
    await_death(Pid::from_raw(child).unwrap());
}

/// As with a server started over exec: it is not what was asked to end.
#[test]
fn what_runs_in_the_background_does_not_hold_a_command_up() {
    let (output, _, code) = Guest::new().run(sh("sleep 1000 & echo $!"));

    assert_eq!(code, 0);
    let background = Pid::from_raw(output.trim().parse().unwrap()).unwrap();
    assert!(test_kill_process(background).is_ok());
    kill_process(background, Signal::KILL).unwrap();
}

#[test]
fn a_server_without_room_stops_the_command() {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Exec(sh("yes")));
    let mut cost = 0;
    for _ in 0..200 {
        guest.turn();
        while let Some((_, message)) = guest.heard() {
            cost += message.cost();
        }
    }
    assert!(cost > WINDOW_BYTES - 100 && cost <= WINDOW_BYTES, "{cost}");

    guest.say(1, ToAgent::Credit(1000));
    let (1, ToServer::Data(bytes)) = guest.next() else { panic!("no output") };

    assert!(bytes.len() > 800 && bytes.len() < 1100, "{}", bytes.len());
    assert_eq!(guest.heard(), None);
}

#[test]
fn a_lot_of_output_arrives_whole() {
    let mut guest = Guest::new();

    let (output, _, code) = guest.run(sh("head -c 3000000 /dev/zero | tr '\\0' x; echo end"));

    assert_eq!((output.len(), code), (3_000_004, 0));
    assert!(output.ends_with("xend\n"));
}

#[test]
fn a_terminal_has_a_size_a_name_and_both_change() {
    let mut guest = Guest::new();
    let script = "trap 'stty size; exit 5' WINCH; tty >/dev/null && echo $TERM $LANG; stty size; \
                  echo ready; while :; do sleep 0.05; done";
    let spec = ExecSpec { terminal: Some(WindowSize { rows: 24, cols: 80 }), ..sh(script) };
    guest.say(1, ToAgent::Exec(spec));
    let mut seen = String::new();
    while !seen.contains("ready") {
        if let (1, ToServer::Data(bytes)) = guest.next() {
            seen.push_str(&String::from_utf8(bytes).unwrap());
        }
    }

    guest.say(1, ToAgent::Resize(WindowSize { rows: 50, cols: 132 }));
    let (rest, _, code) = guest.until_ended();

    assert_eq!(seen, "xterm-256color C.UTF-8\r\n24 80\r\nready\r\n");
    assert_eq!((rest.as_str(), code), ("50 132\r\n", 5));
}

#[test]
fn what_is_typed_on_a_terminal_is_echoed_and_a_key_can_interrupt() {
    let mut guest = Guest::new();
    let spec = ExecSpec {
        terminal: Some(WindowSize { rows: 24, cols: 80 }),
        // Not a program: an interrupt that comes as the shell becomes it is lost.
        ..sh("read line; echo got $line; read more")
    };
    guest.say(1, ToAgent::Exec(spec));
    guest.say(1, ToAgent::Data(b"hi\n".to_vec()));
    let mut seen = String::new();
    while !seen.contains("got hi") {
        if let (1, ToServer::Data(bytes)) = guest.next() {
            seen.push_str(&String::from_utf8(bytes).unwrap());
        }
    }

    guest.say(1, ToAgent::Data(vec![3]));

    assert_eq!(guest.until_ended().2, 130, "{seen}");
    assert!(seen.starts_with("hi\r\n"), "{seen:?}");
}

#[test]
fn what_cannot_be_started_says_why() {
    let exec = |argv: &[&str], working_dir: Option<&str>| {
        let argv = argv.iter().map(ToString::to_string).collect();
        let working_dir = working_dir.map(str::to_owned);
        Guest::new().refusal(ToAgent::Exec(ExecSpec { argv, working_dir, ..ExecSpec::default() }))
    };

    assert_eq!(exec(&["nothing"], None), (ErrorCode::NotFound, "nothing: not found".into()));
    let (code, message) = exec(&["/etc/passwd"], None);
    assert_eq!(code, ErrorCode::NotExecutable, "{message}");
    let (code, message) = exec(&["true"], Some("/nowhere"));
    assert_eq!(code, ErrorCode::NotFound);
    assert!(message.starts_with("working directory /nowhere cannot be entered"), "{message}");
    assert_eq!(exec(&["a\0b"], None).0, ErrorCode::Malformed);
}

#[test]
fn a_stream_in_use_is_not_opened_again_and_words_for_none_are_skipped() {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Exec(sh("sleep 1000")));
    assert_eq!(guest.next(), (1, ToServer::Ack));

    let (code, _) = guest.refusal(ToAgent::Exec(sh("true")));
    assert_eq!(code, ErrorCode::Malformed);

    for message in [ToAgent::Data(vec![1]), ToAgent::End, ToAgent::Credit(1), ToAgent::Cancel] {
        guest.say(9, message);
    }
    assert_eq!(guest.jobs.running.len(), 1);
}

#[test]
fn there_is_a_limit_to_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new();
    for stream in 1..=256 {
        let path = dir.path().join(stream.to_string());
        guest.say(stream, ToAgent::Put(put(&path, PutKind::File)));
        assert_eq!(guest.next(), (stream, ToServer::Ack));
    }

    guest.say(257, ToAgent::Exec(sh("true")));

    let (257, ToServer::Error { code: ErrorCode::Busy, .. }) = guest.next() else {
        panic!("admitted")
    };
}

fn put(path: &Path, kind: PutKind) -> PutSpec {
    let path = path.to_str().unwrap().to_owned();
    PutSpec { path, kind, mode: 0o640, owner: None, mtime: None }
}

fn store(guest: &mut Guest, spec: PutSpec, chunks: &[&[u8]]) -> ToServer {
    guest.say(1, ToAgent::Put(spec));
    for chunk in chunks {
        guest.say(1, ToAgent::Data(chunk.to_vec()));
    }
    guest.say(1, ToAgent::End);
    loop {
        match guest.next() {
            (1, ToServer::Ack | ToServer::Credit(_)) => {}
            (1, last) => return last,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_file_is_put_with_mode_and_time_and_its_parents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/file");
    let spec = PutSpec { mode: 0o4751, mtime: Some(1_700_000_000), ..put(&path, PutKind::File) };

    let stored = store(&mut Guest::new(), spec, &[b"hello ", b"there"]);

    assert_eq!(stored, ToServer::Stored { bytes: 11 });
    assert_eq!(fs::read(&path).unwrap(), b"hello there");
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.mode() & 0o7777, found.mtime()), (0o4751, 1_700_000_000));
    let parent = fs::metadata(dir.path().join("a")).unwrap();
    assert!(parent.is_dir() && parent.mode() & 0o700 == 0o700);
}

#[test]
fn an_existing_file_is_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "a longer content").unwrap();

    assert_eq!(
        store(&mut Guest::new(), put(&path, PutKind::File), &[b"short"]),
        ToServer::Stored { bytes: 5 }
    );

    assert_eq!(fs::read(&path).unwrap(), b"short");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
}

#[test]
fn zeroes_become_holes_and_the_size_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    let zeroes = vec![0; 32 << 10];
    let mut chunks: Vec<&[u8]> = vec![b"start"];
    chunks.extend([zeroes.as_slice(); 64]);
    let mut guest = Guest::new();

    let stored = store(&mut guest, put(&path, PutKind::File), &chunks);

    assert_eq!(stored, ToServer::Stored { bytes: 5 + 64 * (32 << 10) });
    let found = fs::metadata(&path).unwrap();
    assert_eq!(found.len(), 5 + 64 * (32 << 10));
    assert!(found.blocks() * 512 < 64 << 10, "{} blocks", found.blocks());
}

#[test]
fn directories_and_links_are_put_and_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, link) = (dir.path().join("d"), dir.path().join("l"));
    let mut guest = Guest::new();

    for _ in 0..2 {
        let stored = store(&mut guest, put(&folder, PutKind::Directory), &[]);
        assert_eq!(stored, ToServer::Stored { bytes: 0 });
        let kind = PutKind::Link("d/x".into());
        assert_eq!(store(&mut guest, put(&link, kind), &[]), ToServer::Stored { bytes: 0 });
    }

    assert_eq!(fs::read_link(&link).unwrap(), Path::new("d/x"));
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o640);
}

#[test]
fn one_kind_does_not_replace_another() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let refusal = |path: &Path, kind| Guest::new().refusal(ToAgent::Put(put(path, kind))).1;

    assert!(refusal(dir.path(), PutKind::File).ends_with("is a directory"));
    assert!(refusal(dir.path(), PutKind::Link("x".into())).ends_with("is a directory"));
    assert!(refusal(&file, PutKind::Directory).ends_with("is a file"));
    assert!(refusal(Path::new("/dev/null"), PutKind::File).ends_with("is not a regular file"));
}

fn tree(spec: GetSpec) -> Vec<(Entry, Vec<u8>)> {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Get(spec));
    assert_eq!(guest.next(), (1, ToServer::Ack));
    let mut tree: Vec<(Entry, Vec<u8>)> = Vec::new();
    loop {
        let (1, message) = guest.next() else { panic!("another stream") };
        guest.say(1, ToAgent::Credit(message.cost()));
        match message {
            ToServer::Entry(entry) => tree.push((entry, Vec::new())),
            ToServer::Data(bytes) => tree.last_mut().unwrap().1.extend(bytes),
            ToServer::End => return tree,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_tree_comes_parents_first_with_files_links_and_modes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("top");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/big"), vec![b'x'; 1_000_000]).unwrap();
    fs::set_permissions(root.join("sub/big"), Permissions::from_mode(0o751)).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    symlink("sub/big", root.join("link")).unwrap();
    let path = format!("{}/", root.display());

    let mut tree = tree(GetSpec { path, follow_links: false });

    assert_eq!(tree[0].0.path, "top");
    let position = |path: &str| tree.iter().position(|(entry, _)| entry.path == path).unwrap();
    assert!(position("top/sub") < position("top/sub/big"));
    tree.sort_by(|a, b| a.0.path.cmp(&b.0.path));
    let paths: Vec<_> = tree.iter().map(|(entry, _)| entry.path.as_str()).collect();
    assert_eq!(paths, ["top", "top/empty", "top/link", "top/sub", "top/sub/big"]);
    assert_eq!(tree[2].0.kind, EntryKind::Link("sub/big".into()));
    let (big, bytes) = &tree[4];
    assert_eq!((big.mode, big.size, bytes.len()), (0o751, 1_000_000, 1_000_000));
}

#[test]
fn links_are_followed_if_asked_but_never_in_a_circle() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("top");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), "text").unwrap();
    symlink("file", root.join("to-file")).unwrap();
    symlink(".", root.join("circle")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();

    let tree = tree(GetSpec { path: root.to_str().unwrap().into(), follow_links: true });

    let kind = |name: &str| {
        let found = tree.iter().find(|(entry, _)| entry.path == format!("top/{name}"));
        found.unwrap().0.kind.clone()
    };
    assert_eq!(kind("to-file"), EntryKind::File);
    assert_eq!(kind("circle"), EntryKind::Link(".".into()));
    assert_eq!(kind("dangling"), EntryKind::Link("nowhere".into()));
}

#[test]
fn a_single_file_goes_by_its_own_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    let path = dir.path().join("./file").to_str().unwrap().to_owned();

    let tree = tree(GetSpec { path, follow_links: false });

    assert_eq!(tree.len(), 1);
    assert_eq!((tree[0].0.path.as_str(), tree[0].1.as_slice()), ("file", &b"text"[..]));
}

#[test]
fn what_cannot_be_read_is_refused() {
    let get = |path: &str| {
        Guest::new().refusal(ToAgent::Get(GetSpec { path: path.into(), follow_links: false }))
    };

    assert_eq!(get("/nowhere/at/all").0, ErrorCode::NotFound);
    assert!(get("/dev/null").1.contains("neither a file"));
    assert_eq!(get("a\0b").0, ErrorCode::System);
}

#[test]
fn a_file_that_becomes_shorter_is_an_error_and_not_a_lie() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
    let mut guest = Guest::new();
    let spec = GetSpec { path: path.to_str().unwrap().into(), follow_links: false };
    guest.say(1, ToAgent::Get(spec));
    let mut heard = 0;
    while heard < WINDOW_BYTES / 2 {
        heard += guest.next().1.cost();
    }

    OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    guest.say(1, ToAgent::Credit(heard));

    let last = loop {
        match guest.next().1 {
            ToServer::Data(_) => guest.say(1, ToAgent::Credit(WINDOW_BYTES)),
            last => break last,
        }
    };
    let ToServer::Error { message, .. } = last else { panic!("{last:?}") };
    assert_eq!(message, "file: became shorter while it was read");
}

#[test]
fn a_question_is_answered_with_what_lies_there() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("file"), dir.path().join("link"));
    File::create(&file).unwrap().write_all(b"12345").unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o4711)).unwrap();
    symlink("file", &link).unwrap();
    let stat = |path: &Path, follow_links| {
        let path = path.to_str().unwrap().to_owned();
        let mut guest = Guest::new();
        guest.say(1, ToAgent::Stat(StatSpec { path, follow_links }));
        match guest.next() {
            (1, ToServer::PathInfo(info)) => info,
            other => panic!("{other:?}"),
        }
    };

    let info = PathInfo { kind: PathKind::File, mode: 0o4711, size: 5 };
    assert_eq!(stat(&file, false), info);
    assert_eq!(stat(&link, true), info);
    assert_eq!(stat(&link, false).kind, PathKind::Link("file".into()));
    assert_eq!(stat(dir.path(), false).kind, PathKind::Directory);
    assert_eq!(stat(Path::new("/dev/null"), false).kind, PathKind::Special);
    assert_eq!(stat(&file.join("below"), false).kind, PathKind::Missing);
    assert_eq!(stat(&dir.path().join("nothing"), true).kind, PathKind::Missing);
}
