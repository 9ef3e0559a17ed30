//! The server's end of a worker, with a test standing where the worker stands.

use std::io::Write;
use std::path::Path;
use std::process;
use std::slice;
use std::thread;
use std::time::Instant;

use tempfile::TempDir;
use tokio::process::Child;
use tokio::task;

use super::worker::{Happened, OrderError};
use super::*;
use crate::control::{Event, Happening, Order, RateLimitSpec, Status};
use crate::os::{packets, spawn};

/// A program that takes any argument, says nothing to anybody, and never ends.
const ENDLESS: &str = "/usr/bin/yes";

const PATIENCE: Duration = Duration::from_secs(20);

/// An instance's folder with a worker's control socket in it.
struct Peer {
    dir: TempDir,
    control: PacketListener,
}

impl Peer {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let control = PacketListener::bind(&dir.path().join(files::CONTROL)).unwrap();
        Self { dir, control }
    }

    /// Writes events of these numbers to the events file.
    fn journal(&self, numbers: impl IntoIterator<Item = u64>) {
        let mut file = append(&self.dir.path().join(files::EVENTS)).unwrap();
        for number in numbers {
            let line = serde_json::to_string(&event(number)).unwrap();
            writeln!(file, "{line}").unwrap();
        }
    }

    /// The server's end of `identity`, as after a restart.
    fn adopt(&self, identity: Identity) -> Worker {
        let process = identity.find().unwrap().unwrap();
        Worker::found(identity, process, self.dir.path()).unwrap()
    }

    fn adopt_self(&self) -> Worker {
        self.adopt(Identity::of(process::id()).unwrap())
    }
}

fn event(number: u64) -> Event {
    Event { seq: number, at_ns: number, what: Happening::Launched }
}

fn send(connection: &PacketSocket, reply: &Reply) {
    connection.send(&serde_json::to_vec(reply).unwrap(), &[]).unwrap();
}

async fn next(worker: &mut Worker) -> Option<u64> {
    match time::timeout(PATIENCE, worker.next()).await.expect("it happens in time") {
        Happened::Event(event) => Some(event.seq),
        Happened::Gone => None,
    }
}

fn endless() -> (Identity, Child) {
    let (_ours, theirs) = packets::pair().unwrap();
    let log = tempfile::tempfile().unwrap();
    let child = spawn::start(Path::new(ENDLESS), "x", theirs.into(), log);
    let child = child.unwrap();
    (Identity::of(child.id().unwrap()).unwrap(), child)
}

/// A connection that was broken, or that skips a number, costs no event.
#[tokio::test]
async fn each_event_comes_once_and_in_order() {
    let peer = Peer::new();
    peer.journal([0, 1]);
    let mut worker = peer.adopt_self();

    let old = [next(&mut worker).await, next(&mut worker).await];
    let script = async {
        let connection = accept(&peer).await;
        send(&connection, &Reply::Event(event(1)));
        send(&connection, &Reply::Event(event(2)));
        peer.journal([2, 3, 4, 5]);
        send(&connection, &Reply::Event(event(4)));
        drop(connection);
        let connection = accept(&peer).await;
        send(&connection, &Reply::Event(event(5)));
        send(&connection, &Reply::Event(event(6)));
        connection
    };
    let new = async {
        let mut seen = Vec::new();
        while seen.last() != Some(&Some(6)) {
            seen.push(next(&mut worker).await);
        }
        seen
    };
    let (_connection, new) = tokio::join!(script, new);

    assert_eq!(old, [Some(0), Some(1)]);
    assert_eq!(new, [2, 3, 4, 5, 6].map(Some));
}

/// Waits until the server's end connects.
async fn accept(peer: &Peer) -> PacketSocket {
    let listener = peer.control.as_fd().try_clone_to_owned().unwrap();
    let accepted = task::spawn_blocking(move || PacketListener::from(listener).accept());
    accepted.await.unwrap().unwrap()
}

#[tokio::test]
async fn an_order_gets_its_answer_though_events_come_first() {
    let peer = Peer::new();
    let mut worker = peer.adopt_self();

    let script = async {
        let connection = accept(&peer).await;
        let answer = task::spawn_blocking(move || {
            let order = connection.recv().unwrap();
            send(&connection, &Reply::Event(event(0)));
            send(&connection, &Reply::Done(status(7)));
            let refused = connection.recv().unwrap();
            send(&connection, &Reply::Failed { message: "no".into() });
            [order.bytes, refused.bytes]
        });
        answer.await.unwrap()
    };
    let orders = async {
        let done = worker.order(&Order::Status).await;
        let refused = worker.order(&Order::Stop).await;
        (done, refused, worker.queued())
    };
    let (orders, (done, refused, queued)) = tokio::join!(script, orders);

    assert_eq!(orders, [&br#"{"order":"status"}"#[..], br#"{"order":"stop"}"#]);
    assert_eq!(done.unwrap(), Reply::Done(status(7)));
    assert!(matches!(refused, Err(OrderError::Refused { message }) if message == "no"));
    assert_eq!(queued, Some(event(0)));
}

/// An order for a disk is the only one that brings a file.
#[tokio::test]
async fn an_order_arrives_with_the_file_beside_it() {
    let peer = Peer::new();
    let mut worker = peer.adopt_self();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"disk").unwrap();
    let disk = DiskSpec { id: "v".to_owned(), read_only: true };
    let attach = Order::AttachDisk { disk };

    let script = async {
        let connection = accept(&peer).await;
        let heard = task::spawn_blocking(move || {
            let heard = connection.recv().unwrap();
            send(&connection, &Reply::Done(status(7)));
            heard
        });
        heard.await.unwrap()
    };
    let files = [file.as_fd()];
    let (heard, done) = tokio::join!(script, worker.order_with(&attach, &files));

    assert!(done.is_ok());
    assert_eq!(serde_json::from_slice::<Order>(&heard.bytes).unwrap(), attach);
    assert_eq!((heard.files.len(), attach.files(), Order::Status.files()), (1, 1, 0));
    let length = File::from(heard.files.into_iter().next().unwrap()).metadata().unwrap().len();
    assert_eq!(length, 4);
}

#[tokio::test]
async fn the_death_of_a_process_comes_after_its_last_words() {
    let peer = Peer::new();
    let (identity, _child) = endless();
    let mut worker = peer.adopt(identity);
    drop(accept_while(&peer, &mut worker).await);

    peer.journal([0, 1]);
    worker.kill().unwrap();

    let mut seen = Vec::new();
    while let Some(number) = next(&mut worker).await {
        seen.push(number);
    }
    assert_eq!(seen, [0, 1]);
    assert!(matches!(worker.order(&Order::Status).await, Err(OrderError::Gone)));
}

/// The connection that the server's end makes when it waits for the first time.
async fn accept_while(peer: &Peer, worker: &mut Worker) -> PacketSocket {
    tokio::select! {
        connection = accept(peer) => connection,
        happened = worker.next() => panic!("nothing can have happened: {happened:?}"),
    }
}

fn fleet(program: &str) -> Fleet {
    let nowhere = Path::new("/nonexistent").to_owned();
    Fleet {
        nursery: Nursery::new(program.into()),
        kvm: nowhere.clone(),
        kernel: nowhere,
        kernel_texts: None,
        groups: None,
    }
}

fn status(pid: u32) -> Status {
    Status { pid, running: true, plugged_bytes: 0, given_bytes: 0, vacant_slots: 0 }
}

fn any_launch() -> Launch {
    let machine = MachineSpec {
        vcpus: 1,
        memory_bytes: 64 << 20,
        hotplug_bytes: 0,
        balloon: false,
        cmdline: String::new(),
        disks: Vec::new(),
        spare_slots: 0,
        net: None,
        disk_limit: RateLimitSpec::default(),
        vsock_cid: None,
        devices: Vec::new(),
        serial: false,
    };
    Launch { machine, hotplug: HotplugPolicy::Boot, files: Vec::new() }
}

fn any_worker(dir: &Path) -> WorkerSpec<'_> {
    WorkerSpec {
        ends_with_us: false,
        hotplug_bytes: 0,
        hotplug: HotplugPolicy::Boot,
        disk_io_bps: None,
        dir,
        vcpus: 1,
        memory_bytes: 64 << 20,
        initramfs: Vec::new(),
        disks: Vec::new(),
        net: None,
        devices: &[],
        spare_slots: 0,
        vsock: true,
    }
}

fn identity_in(dir: &Path) -> Identity {
    serde_json::from_slice(&fs::read(dir.join(files::IDENTITY)).unwrap()).unwrap()
}

#[tokio::test]
async fn a_program_that_ends_at_once_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = tempfile::tempfile().unwrap();

    let begin = Instant::now();
    let started = fleet("/bin/false").start(&any_launch(), &[], dir.path(), log).await;

    assert!(matches!(started, Err(SpawnError::Died | SpawnError::Start(_))), "{started:?}");
    assert!(begin.elapsed() < LAUNCH_TIMEOUT / 2);
}

/// A client that hangs up drops the future of its creation.
#[tokio::test]
async fn a_start_that_is_given_up_leaves_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let (identity, mut child) = endless();
    let process = identity.find().unwrap().unwrap();
    let worker = Worker::new(identity, process, dir.path()).unwrap();
    let (ours, _theirs) = packets::pair().unwrap();

    let launch = any_launch();
    let told = Fleet::tell(NewWorker(Some(worker)), ours, &launch, &[]);
    let given_up = time::timeout(Duration::from_millis(100), told).await;

    assert!(given_up.is_err(), "{given_up:?}");
    time::timeout(PATIENCE, child.wait()).await.expect("it is killed").unwrap();
    assert!(identity_in(dir.path()).find().unwrap().is_none());
}

#[tokio::test]
async fn a_worker_is_found_again_until_it_ends() {
    let peer = Peer::new();
    let (identity, mut child) = endless();
    let dir = peer.dir.path();
    let fleet = fleet(ENDLESS);
    assert!(fleet.adopt(dir).await.unwrap().is_none(), "there was none yet");
    fs::write(dir.join(files::IDENTITY), serde_json::to_vec(&identity).unwrap()).unwrap();
    let listener = peer.control.as_fd().try_clone_to_owned().unwrap();
    let pid = identity.pid;
    let answering = thread::spawn(move || {
        let connection = PacketListener::from(listener).accept().unwrap();
        assert_eq!(connection.recv().unwrap().bytes, br#"{"order":"status"}"#);
        send(&connection, &Reply::Done(status(pid)));
    });

    let found = fleet.adopt(dir).await.unwrap().expect("it runs");
    answering.join().unwrap();
    found.kill().unwrap();
    child.wait().await.unwrap();
    let gone = fleet.adopt(dir).await.unwrap();

    assert_eq!(found.pid(), pid);
    assert!(gone.is_none(), "{gone:?}");
    fs::write(dir.join(files::IDENTITY), b"{\"pid\":").unwrap();
    assert!(fleet.adopt(dir).await.unwrap().is_none(), "half a file is no worker");
}

#[tokio::test]
async fn what_is_not_the_kvm_device_is_not_handed_on() {
    let dir = tempfile::tempdir().unwrap();
    for path in ["/nonexistent", "/dev/null"] {
        let fleet = Fleet { kvm: path.into(), ..fleet(ENDLESS) };
        let refused = fleet.spawn(any_worker(dir.path())).await.unwrap_err();
        assert!(matches!(refused, SpawnError::Kvm { .. }), "{refused:?}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// What a balloon takes from a guest its devices would still reach.
#[test]
fn a_guest_that_is_lent_devices_has_no_balloon() {
    let path = PathBuf::from("/sys/bus/pci/devices/0000:03:00.0");
    let spec = |devices| machine(&WorkerSpec { devices, ..any_worker(Path::new("/nonexistent")) });

    let with_device = spec(slice::from_ref(&path));

    assert!(spec(&[]).balloon && spec(&[]).devices.is_empty());
    assert!(!with_device.balloon);
    assert_eq!(with_device.devices, [HostDeviceSpec { path: path.clone() }]);
}
