//! What lies beyond a host: a network namespace behind a pair of links, which knows the way to this
//! host and, unless told, none to any guest.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Addresses of the outside: this host's end, and the other.
pub(crate) const NEAR: &str = "192.0.2.1";
pub(crate) const FAR: &str = "192.0.2.2";

/// The namespace. It goes when dropped.
pub(crate) struct Outside;

/// Which names were asked for.
#[derive(Clone, Default)]
pub(crate) struct Names(Arc<Mutex<Vec<String>>>);

impl Outside {
    pub(crate) fn open() -> Self {
        let outside = Self;
        outside.close();
        for line in [
            "netns add outside",
            "link add ovum-near type veth peer name far netns outside",
            &format!("address add {NEAR}/24 dev ovum-near"),
            "link set ovum-near up",
            &format!("-n outside address add {FAR}/24 dev far"),
            "-n outside link set far up",
            "-n outside link set lo up",
        ] {
            ip(line);
        }
        outside
    }

    fn close(&self) {
        // They fail if there is none, which is what is wanted.
        let _ = Command::new("ip").args(["link", "delete", "ovum-near"]).output();
        let _ = Command::new("ip").args(["netns", "delete", "outside"]).output();
    }

    /// Does `work` out there. What it opens stays there.
    pub(crate) fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let entered = thread::spawn(|| {
            let namespace = File::open("/run/netns/outside").unwrap();
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            work()
        });
        entered.join().unwrap()
    }

    /// Answers everyone who connects to `port` with where they come from.
    pub(crate) fn tell_addresses(&self, port: u16) {
        let listener = self.listen(port);
        thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                let body = format!("you are {}\n", client.peer_addr().unwrap().ip());
                let _ = client.read(&mut [0; 1024]);
                let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                // A client that is gone is no failure of the outside.
                let _ = client.write_all((head + &body).as_bytes());
            }
        });
    }

    /// A name server: all names are those of [`FAR`].
    pub(crate) fn serve_names(&self) -> Names {
        let socket = self.enter(|| UdpSocket::bind((FAR, 53)).unwrap());
        let names = Names::default();
        let asked = names.clone();
        thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((bytes, client)) = socket.recv_from(&mut query) {
                if let Some(answer) = asked.answer(&query[..bytes]) {
                    let _ = socket.send_to(&answer, client);
                }
            }
        });
        names
    }

    fn listen(&self, port: u16) -> TcpListener {
        self.enter(move || TcpListener::bind((FAR, port)).unwrap())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.close();
    }
}

impl Names {
    /// All that were, in the order of the alphabet.
    pub(crate) fn asked(&self) -> Vec<String> {
        let mut names = self.0.lock().unwrap().clone();
        names.sort();
        names.dedup();
        names
    }

    /// The answer to a query (RFC 1035, 4.1 "Format"): one question, and its address if it is for
    /// one of IPv4.
    fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let (mut name, mut at) = (Vec::new(), 12);
        while let Some(&length @ 1..) = query.get(at) {
            let end = at + 1 + usize::from(length);
            name.push(String::from_utf8_lossy(query.get(at + 1..end)?).into_owned());
            at = end;
        }
        self.0.lock().unwrap().push(name.join("."));
        let question = query.get(12..at + 5)?;
        let is_for_ipv4 = question.ends_with(&[0, 1, 0, 1]);
        let mut answer = query.get(..2)?.to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_for_ipv4), 0, 0, 0, 0]);
        answer.extend(question);
        if is_for_ipv4 {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(FAR.parse::<Ipv4Addr>().unwrap().octets());
        }
        Some(answer)
    }
}

/// Runs `ip` with these words.
pub(crate) fn ip(line: &str) {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
}
