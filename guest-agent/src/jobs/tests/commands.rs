//! Commands: what they write and read, how they end, and who ends them.

use std::fs;
use std::thread;

use ovum_agent_proto::exec::WindowSize;
use ovum_agent_proto::frame::WINDOW_BYTES;
use rustix::process::{Signal, kill_process, test_kill_process};

use super::*;

/// Waits until a process is dead. Whose child it was is gone too, so it may be that nobody collects
/// it for a while.
fn await_death(pid: Pid) {
    let deadline = Instant::now() + PATIENCE;
    let status = format!("/proc/{}/status", pid.as_raw_nonzero());
    let lives = || fs::read_to_string(&status).is_ok_and(|text| !text.contains("State:\tZ"));
    while lives() {
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
    while cost <= WINDOW_BYTES - 100 {
        cost += guest.next().1.cost();
    }
    for _ in 0..20 {
        guest.turn();
        while let Some((_, message)) = guest.heard() {
            cost += message.cost();
        }
    }
    assert!(cost <= WINDOW_BYTES, "{cost}");

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
        // Not a shell: it notes an interrupt that comes as it begins to read, and reads on.
        argv: vec!["cat".into()],
        ..ExecSpec::default()
    };
    guest.say(1, ToAgent::Exec(spec));
    guest.say(1, ToAgent::Data(b"hi\n".to_vec()));
    let mut seen = String::new();
    while seen.matches("hi\r\n").count() < 2 {
        if let (1, ToServer::Data(bytes)) = guest.next() {
            seen.push_str(&String::from_utf8(bytes).unwrap());
        }
    }

    guest.say(1, ToAgent::Data(vec![3]));

    assert_eq!(guest.until_ended().2, 130, "{seen}");
    assert_eq!(seen, "hi\r\nhi\r\n");
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
