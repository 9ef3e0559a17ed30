//! A person at a terminal: a program that has one, keys that are typed, a window that changes.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::{task, time};

/// How long a guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(100);

/// A terminal with a program on it.
pub(super) struct Terminal {
    keyboard: File,
    screen: UnboundedReceiver<Vec<u8>>,
    child: Child,
}

impl Terminal {
    /// Starts `ovum` as `command` says, on a terminal of its own that controls it.
    pub(super) fn start(command: &Command, rows: u16, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let keyboard = File::from(master);
        resize(&keyboard, rows, columns);
        let mut child = Command::new("setsid");
        child.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            child.env(name, value.unwrap());
        }
        let slave = File::from(slave);
        child.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
        let child = child.spawn().unwrap();
        let mut shown = keyboard.try_clone().unwrap();
        let (sender, screen) = unbounded_channel();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            // A terminal that nobody has open any more is an error, not an end.
            while let Ok(read @ 1..) = shown.read(&mut chunk) {
                if sender.send(chunk[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keyboard, screen, child }
    }

    /// Types these keys.
    pub(super) fn keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Makes the window this large.
    pub(super) fn resize(&mut self, rows: u16, columns: u16) {
        resize(&self.keyboard, rows, columns);
    }

    /// Reads until `marker` is on the screen; returns what came.
    pub(super) async fn until(&mut self, marker: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(marker) {
            let next = time::timeout(PATIENCE, self.screen.recv()).await;
            match next {
                Ok(Some(bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                Ok(None) => panic!("the screen is dark; no {marker:?} in {seen:?}"),
                Err(_) => panic!("no {marker:?} in {seen:?}"),
            }
        }
        seen
    }

    /// Whether keys are passed on as they are, as the program has made it.
    pub(super) fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.keyboard).unwrap().local_modes;
        !modes.contains(LocalModes::ICANON)
    }

    /// The program's process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end; returns whether keys are still passed on as they are, and how it ended.
    pub(super) async fn ended(mut self) -> (bool, ExitStatus) {
        // Held open here, so that the terminal outlives the program.
        let status = task::spawn_blocking(move || self.child.wait().map(|status| (self, status)));
        let (terminal, status) = time::timeout(PATIENCE, status).await.unwrap().unwrap().unwrap();
        (terminal.is_raw(), status)
    }

    /// Reads to the end; returns what came and how the program ended.
    pub(super) async fn end(mut self) -> (String, ExitStatus) {
        let mut seen = String::new();
        while let Some(bytes) = time::timeout(PATIENCE, self.screen.recv()).await.unwrap() {
            seen.push_str(&String::from_utf8_lossy(&bytes));
        }
        (seen, self.child.wait().unwrap())
    }
}

fn resize(terminal: &File, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}
